"""Variants: the published equations, in every dtype and layout, and nothing non-finite."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from torch import Tensor

from muonkit import orthogonalize
from muonkit.variants import VARIANTS, check_variant
from muonkit.views import blocks_of, row_blocks, row_shape

STATEFUL = [name for name, variant in VARIANTS.items() if variant.state != "none"]
SHAPES = [(5, 8), (8, 5), (1, 6), (6, 1), (4, 4), (1, 1)]
# A rounding of O's dtype, and for the wide ones those of a sum of squares besides.
TOLERANCE = {
    torch.float64: 1e-12,
    torch.float32: 2e-6,
    torch.bfloat16: 2**-8,
    torch.float16: 2**-11,
}


def orthogonal(count: int, rows: int, cols: int, seed: int = 0) -> Tensor:
    """Stacks as the orthogonalizer returns them, in float64."""
    generator = torch.Generator().manual_seed(seed)
    G = torch.randn(count, rows, cols, generator=generator, dtype=torch.float64)
    return orthogonalize(G, ns_dtype="float64")


def state_of(name: str, O: Tensor, dtype: torch.dtype = torch.float32) -> Tensor | None:
    count, rows, cols = O.shape
    state = VARIANTS[name].state
    if state == "none":
        return None
    shape = (count, rows, 1) if state == "rows" else (count, rows, cols)
    return torch.zeros(shape, dtype=dtype)


def transcription(
    name: str, O: list[list[float]], v: list[list[float]], beta2: float, t: int
) -> list[list[float]]:
    """The equations for one matrix, number by number; rewrites v (rows x columns)."""
    m, n = len(O), len(O[0])
    entries = list(product(range(m), range(n)))
    norm = math.sqrt(sum(O[i][j] ** 2 for i, j in entries))
    for i, j in entries:
        seen = sum(x**2 for x in O[i]) / n if name == "normuon" else O[i][j] ** 2
        v[i][j] = beta2 * v[i][j] + (1 - beta2) * seen
    eps, bias, target = 1e-10, 1.0, norm
    if name == "adamuon":
        eps, bias, target = 1e-8, 1 - beta2**t, math.sqrt(min(m, n))
    hat = [[O[i][j] / (math.sqrt(v[i][j] / bias) + eps) for j in range(n)] for i in range(m)]
    norm_hat = math.sqrt(sum(hat[i][j] ** 2 for i, j in entries))
    return [[hat[i][j] * target / norm_hat for j in range(n)] for i in range(m)]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("rows", "cols"), SHAPES)
@pytest.mark.parametrize("name", STATEFUL)
def test_five_steps_are_the_published_equations(
    name: str, rows: int, cols: int, dtype: torch.dtype
) -> None:
    variant, beta2 = VARIANTS[name], VARIANTS[name].beta2
    assert beta2 is not None
    v, expected_v = None, [[[0.0] * cols for _ in range(rows)] for _ in range(3)]
    for t in range(1, 6):
        # Steps of different size, or a wrong weight of the past would cancel in the norms.
        O = (orthogonal(3, rows, cols, seed=t) * (0.5 + t / 5)).to(dtype)
        if v is None:
            v = state_of(name, O, torch.promote_types(dtype, torch.float32))
        assert v is not None
        expected = [
            transcription(name, matrix.tolist(), past, beta2, t)
            for matrix, past in zip(O.double(), expected_v, strict=True)
        ]
        variant.apply_(O, v, beta2, t)
        rtol = TOLERANCE[dtype]
        torch.testing.assert_close(
            O.double(), torch.tensor(expected, dtype=torch.float64), rtol=rtol, atol=rtol * 1e-3
        )
        wide = torch.tensor(expected_v, dtype=v.dtype)
        torch.testing.assert_close(v.expand_as(wide), wide, rtol=2e-6, atol=1e-12)


def test_adamuon_corrects_the_bias_inside_eps_too() -> None:
    # Entries of 1e-8 are where eps shows; without the correction it would be 30 times too large.
    O = torch.tensor([[[3e-8, 1.0], [1.0, 2e-8]]], dtype=torch.float64)
    v = torch.zeros_like(O)
    expected = transcription("adamuon", O[0].tolist(), [[0.0, 0.0], [0.0, 0.0]], 0.999, 1)
    VARIANTS["adamuon"].apply_(O, v, 0.999, 1)
    torch.testing.assert_close(O[0], torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=0)


@pytest.mark.parametrize("shape", [(), (1,), (3, 1, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.int64])
def test_the_step_may_be_a_tensor_and_differ_between_matrices(
    shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    ages = [1, 4, 900] if len(shape) == 3 else [7, 7, 7]
    # Small enough for eps, and with it the step, to matter.
    O, past = orthogonal(3, 4, 6) * 1e-8, 1e-18 * torch.rand(3, 4, 6, dtype=torch.float64)
    alone = O.clone()
    for i, t in enumerate(ages):
        VARIANTS["adamuon"].apply_(alone[i : i + 1], past[i : i + 1].clone(), 0.999, t)
    step = torch.tensor(ages, dtype=dtype)[: math.prod(shape)].reshape(shape)
    VARIANTS["adamuon"].apply_(O, past.clone(), 0.999, step)
    # The correction is in the step's precision: 1 - 0.999 in float32.
    torch.testing.assert_close(O, alone, rtol=1e-4, atol=1e-12)


@pytest.mark.parametrize("name", VARIANTS)
def test_a_stack_is_its_matrices_one_by_one(name: str) -> None:
    variant, beta2 = VARIANTS[name], VARIANTS[name].beta2 or 0.0
    O = orthogonal(4, 6, 9).float() * torch.tensor([1.0, 1e-3, 1.2, 0.0]).reshape(4, 1, 1)
    v = state_of(name, O)
    loop = [o.clone()[None] for o in O]
    loop_v = [state_of(name, o) for o in loop]
    for t in (1, 2):
        variant.apply_(O, v, beta2, t)
        for o, past in zip(loop, loop_v, strict=True):
            variant.apply_(o, past, beta2, t)
    torch.testing.assert_close(O, torch.cat(loop), rtol=1e-6, atol=1e-9)
    if v is not None:
        assert loop_v[0] is not None
        torch.testing.assert_close(v[:1], loop_v[0], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", VARIANTS)
def test_strided_memory_is_rewritten_in_place(name: str, dtype: torch.dtype) -> None:
    variant, beta2 = VARIANTS[name], VARIANTS[name].beta2 or 0.0
    # The matrices of a padded batch, stored transposed: what the step takes a stack from.
    whole = torch.full((3, 12, 7), 7.0, dtype=dtype)
    O = whole[:, :9, :5].mT
    O.copy_(orthogonal(3, 5, 9))
    twin = O.contiguous()
    v, twin_v = state_of(name, O), state_of(name, O)
    if v is not None:
        v = v.mT.contiguous().mT
    variant.apply_(O, v, beta2, 1)
    variant.apply_(twin, twin_v, beta2, 1)
    # Sums of squares in another order may end on the other side of a rounding.
    rtol = max(2e-6, torch.finfo(dtype).eps)
    torch.testing.assert_close(O, twin, rtol=rtol, atol=0)
    assert (whole[:, 9:] == 7).all()
    assert (whole[:, :, 5:] == 7).all()


@pytest.mark.parametrize(("rows", "cols"), SHAPES)
def test_the_norm_of_the_result(rows: int, cols: int) -> None:
    before = orthogonal(3, rows, cols).float() * 1.3
    expected = {
        "plain": before.norm(dim=(1, 2)),
        "normuon": before.norm(dim=(1, 2)),
        "adamuon": torch.full((3,), math.sqrt(min(rows, cols))),
    }
    for name, variant in VARIANTS.items():
        O, v = before.clone(), state_of(name, before)
        for t in (1, 2):
            O.copy_(before)
            variant.apply_(O, v, variant.beta2 or 0.0, t)
        torch.testing.assert_close(O.norm(dim=(1, 2)), expected[name], rtol=2e-6, atol=0)


HARD = {
    "zero": torch.zeros(1, 4, 6),
    "zero rows": torch.eye(4, 6)[None] * torch.tensor([1.0, 0, 0, 1]).reshape(1, 4, 1),
    "zero columns": torch.eye(6, 4)[None],
    "noise beside a row": torch.cat([torch.ones(1, 1, 6) / 6**0.5, 1e-12 * torch.ones(1, 3, 6)], 1),
    "below eps": torch.full((1, 4, 6), 1e-11),
    "squares underflow": torch.full((1, 4, 6), 1e-30),
    "denormal": torch.full((1, 4, 6), 1e-42),
    "large": torch.full((1, 4, 6), 1e4),
}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("matrix", HARD)
@pytest.mark.parametrize("name", VARIANTS)
def test_pitfall_4_nothing_non_finite_comes_out(name: str, matrix: str, dtype: torch.dtype) -> None:
    variant, beta2 = VARIANTS[name], VARIANTS[name].beta2 or 0.0
    usual = orthogonal(1, *HARD[matrix].shape[1:]).to(dtype)
    v = state_of(name, usual)
    # At first, then after usual matrices, and a usual one after it.
    for t, given in enumerate([HARD[matrix], usual, HARD[matrix], HARD[matrix], usual], start=1):
        O = given.to(dtype, copy=True)
        before = O.double().norm().item()
        variant.apply_(O, v, beta2, t)
        assert O.isfinite().all()
        assert v is None or v.isfinite().all()
        most = math.sqrt(min(O.shape[1:])) if name == "adamuon" else before
        rounding = 2 * max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)  # of O and of v
        assert O.double().norm().item() <= most * (1 + rounding) + 1e-30
        assert (O[given.to(dtype) == 0] == 0).all()
    # The last usual matrix is not lost in what came before.
    assert O.double().norm().item() >= 0.5


def test_a_nan_stays_in_its_matrix() -> None:
    for name in STATEFUL:
        O = orthogonal(3, 4, 6).float()
        O[1, 2, 3] = math.nan
        VARIANTS[name].apply_(O, state_of(name, O), 0.9, 1)
        assert O[1].isnan().any()
        assert O[[0, 2]].isfinite().all()


def test_normuon_keeps_one_number_per_output() -> None:
    """Of a parameter stored in x out the outputs are columns; its view says so."""
    w = orthogonal(1, 6, 4)[0].float() * torch.arange(1.0, 5.0)
    (block,), (row,) = blocks_of("transpose", (6, 4)), row_blocks("transpose", (6, 4))
    kept = torch.zeros(row_shape("transpose", (6, 4)))
    O, v = block.to_matrices(w.clone()), row.to_matrices(kept)
    VARIANTS["normuon"].apply_(O, v, 0.95, 1)
    torch.testing.assert_close(kept, 0.05 * w.square().mean(0, keepdim=True))
    norms = block.to_regions(O)[0].norm(dim=0)
    # After the first step every output's weights have one norm.
    torch.testing.assert_close(norms, norms[:1].expand(4), rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", VARIANTS)
def test_nothing_is_read_back_to_the_host(name: str) -> None:
    O = torch.empty(3, 4, 6, dtype=torch.bfloat16, device="meta")
    v = state_of(name, O)
    step = torch.empty(3, 1, 1, device="meta")
    # A meta tensor has no values: whoever asks for one is refused.
    VARIANTS[name].apply_(O, None if v is None else v.to("meta"), 0.9, step)


@pytest.mark.parametrize("name", VARIANTS)
def test_one_graph_when_compiled(name: str) -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    variant, beta2 = VARIANTS[name], VARIANTS[name].beta2 or 0.0
    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(backend=counter, fullgraph=True)
    def apply_(O: Tensor, v: Tensor | None, step: Tensor) -> None:
        variant.apply_(O, v, beta2, step)

    O = orthogonal(3, 9, 5).to(torch.bfloat16).mT
    v, twin_v = state_of(name, O), state_of(name, O)
    for t in (1, 2, 3):
        O.copy_(orthogonal(3, 5, 9, seed=t))
        twin = O.clone()
        apply_(O, v, torch.tensor(float(t)))
        variant.apply_(twin, twin_v, beta2, t)
        torch.testing.assert_close(O, twin)
    assert counter.frame_count <= 1  # plain has nothing to compile


def test_an_unknown_variant_lists_the_options() -> None:
    for name, variant in VARIANTS.items():
        assert check_variant(name) is variant
    for wrong in ("NorMuon", "", None, ["normuon"]):
        with pytest.raises(ValueError, match="one of 'plain', 'normuon', 'adamuon'"):
            check_variant(wrong)  # type: ignore[arg-type]
