"""The Triton kernel, without a GPU: in Triton's interpreter against float64, and as compiled code.

Everything that imports Triton runs apart; see `kernel_helpers`.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from muonkit.newton_schulz import triton as kernels
from tests.helpers import internals
from tests.helpers.kernels import DTYPES, allowed, cases, compiled, interpreted

NO_TRITON = importlib.util.find_spec("triton") is None
KERNEL = "muonkit.newton_schulz.triton.symmetric_kernel"
needs_triton = pytest.mark.skipif(NO_TRITON, reason="Triton is not installed (Linux only)")


@needs_triton
def test_every_case_is_within_the_bound_of_its_dtype() -> None:
    found = interpreted()
    wrong = {}
    for case in cases():
        result = found[case.name]
        kind = [[case.batch, case.m, case.m], str(DTYPES[case.dtype]), True]
        good = result["error"] <= allowed(case) and result["kind"] == kind
        if not (good and result["symmetric"]):
            wrong[case.name] = (result, allowed(case))
    assert not wrong


def test_every_case_has_a_name_of_its_own() -> None:
    names = [(case.name, case.scalars) for case in cases()]
    assert len({name for name, _ in names}) == len(names)


@needs_triton
@pytest.mark.parametrize("value", ["nan", "inf"])
def test_what_is_not_finite_reaches_its_row_and_column_and_nothing_else(value: str) -> None:
    assert interpreted()[value] == dict.fromkeys(
        ("others_untouched", "rest_untouched", "reached"), True
    )


@needs_triton
def test_offsets_beyond_two_to_the_31_reach_the_right_elements() -> None:
    assert interpreted()["far"] is True


@needs_triton
def test_tiles_are_each_taken_once_and_exactly() -> None:
    assert interpreted()["order"] == {"once": True, "exact": True}


@needs_triton
def test_empty_operands() -> None:
    assert interpreted()["empty"] is True


@needs_triton
def test_d_is_not_read_where_beta_is_zero() -> None:
    assert interpreted()["unread"] is True


@needs_triton
def test_float32_is_exact_unless_torch_allows_tf32() -> None:
    assert interpreted()["precisions"] == ["ieee", "tf32", "ieee", "ieee"]


@needs_triton
@pytest.mark.parametrize(
    ("target", "instruction"),
    [
        pytest.param("sm_80", "mma.sync", marks=pytest.mark.whole),
        ("sm_90", "wgmma"),
        pytest.param("columns", "wgmma", marks=pytest.mark.whole),
    ],
)
def test_compiled_code_uses_tensor_cores_and_does_not_spill(target: str, instruction: str) -> None:
    found = compiled()[target]
    assert found["fault"] is None
    assert found["instructions"].get(instruction, 0) > 0


@needs_triton
def test_blocks_for_any_strides_do_not_spill_and_larger_ones_would() -> None:
    assert compiled()["any strides"]["fault"] is None
    # So a spill is seen where there is one.
    assert "spills" in compiled()["too large"]["fault"]


@needs_triton
@pytest.mark.parametrize("name", ["sm_80", "columns", "any strides"])
def test_every_offset_is_64_bits_wide(name: str) -> None:
    assert compiled()[f"narrow offsets, {name}"] == []


@needs_triton
def test_sizes_strides_and_scalars_do_not_compile_anew() -> None:
    assert compiled()["specializations"] == 1


@pytest.mark.parametrize(
    ("L", "R", "D", "complaint"),
    [
        (torch.zeros(3, 4), torch.zeros(3, 4), None, "shape"),
        (torch.zeros(1, 3, 4), torch.zeros(1, 3, 5), None, "shape"),
        (torch.zeros(2, 3, 4), torch.zeros(2, 3, 4), torch.zeros(2, 3, 4), "D of shape"),
        (torch.zeros(1, 3, 4), torch.zeros(1, 3, 4).bfloat16(), None, "one dtype"),
        (torch.zeros(1, 3, 3), torch.zeros(1, 3, 3), torch.zeros(1, 3, 3).half(), "one dtype"),
        (torch.zeros(1, 3, 4).double(), torch.zeros(1, 3, 4).double(), None, "float64"),
        (torch.zeros(1, 3, 4), torch.zeros(1, 3, 4, device="meta"), None, "one device"),
    ],
)
def test_operands_that_do_not_fit_are_refused(
    L: Tensor, R: Tensor, D: Tensor | None, complaint: str
) -> None:
    with pytest.raises((ValueError, TypeError), match=complaint):
        kernels.symmetric_product(L, R, D, 1.0, 1.0, 0.0)


def test_where_there_is_no_gpu_there_is_no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not kernels.available(torch.device("cpu"))
    assert not kernels.available(torch.device("meta"))

    def broken(index: int | None) -> tuple[int, int]:
        raise RuntimeError("no NVIDIA driver")

    monkeypatch.setattr(torch.cuda, "get_device_capability", broken)
    assert not kernels.available(torch.device("cuda", 97))


@needs_triton
@pytest.mark.parametrize(("capability", "expected"), [((7, 5), False), ((8, 0), True)])
def test_the_kernel_needs_an_ampere_gpu(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], expected: bool
) -> None:
    asked = []
    monkeypatch.setattr(
        torch.cuda, "get_device_capability", lambda index: asked.append(index) or capability
    )
    monkeypatch.setattr(f"{KERNEL}.start_driver", lambda: None)
    # The answer is remembered: an index for each.
    device = torch.device("cuda", capability[0])
    try:
        assert [kernels.available(device) for _ in range(3)] == [expected] * 3
    finally:
        internals.forget_gpus()
    assert asked == [capability[0]]


@needs_triton
def test_a_triton_that_cannot_launch_is_told_of_once_and_not_used(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In an image without a C compiler the first launch raises: in the middle of a step."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))

    def without_a_compiler() -> None:
        raise RuntimeError("Failed to find C compiler.")

    monkeypatch.setattr(f"{KERNEL}.start_driver", without_a_compiler)
    internals.forget_gpus()
    try:
        with pytest.warns(UserWarning, match=r"Failed to find C compiler.*gcc") as told:
            found = [kernels.pays(768, torch.bfloat16, torch.device("cuda", n)) for n in (0, 1, 0)]
    finally:
        internals.forget_gpus()
    assert found == [False] * 3
    assert len(told) == 1


def test_triton_is_not_imported_before_it_is_needed() -> None:
    code = (
        "import sys, torch; before = 'triton' in sys.modules; "
        "from muonkit.newton_schulz import triton as kernels; "
        "kernels.available(torch.device('cpu')); print(before, 'triton' in sys.modules)"
    )
    shown = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=120
    )
    assert shown.stdout.split() == ["False", "False"]
