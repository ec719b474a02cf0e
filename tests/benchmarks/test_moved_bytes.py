"""The bytes that a step moves are counted, and stay as few as they are."""

from __future__ import annotations

import pytest
import torch

from tests.helpers.paths import ROOT

ENTRY = 4 * 64 * 64  # bytes of a matrix


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("torch.mm(A, B)", 3),
        ("torch.mm(A, A.mT)", 2),
        ("A.mT[1:]", 0),
        ("A.add_(B)", 3),
        ("A.copy_(B)", 2),
        ("torch.empty_like(A)", 0),
        ("torch.mul(A, A[0, 0].expand(64, 64), out=B)", 2 + 1 / 64**2),
        ("torch._foreach_lerp_([A, B], [C, C], 0.5)", 5),
        ("torch.baddbmm(C[None], A[None], B[None], beta=0.0, out=C[None])", 3),
        ("torch.baddbmm(C[None], A[None], B[None], out=C[None])", 4),
    ],
)
def test_operands_are_read_once_and_results_written_once(code: str, expected: float) -> None:
    from moved_bytes import CountMoved

    names = {"torch": torch, **{name: torch.randn(64, 64) for name in "ABC"}}
    with CountMoved() as counted:
        eval(code, names)
    assert counted.bytes.total() == expected * ENTRY


def test_a_step_moves_few_bytes() -> None:
    """Counted: 1.44. What it has beyond the fewest is a stack of the gradients, a division by the
    norm, decay apart from the update, and in one process the results put back.
    """
    from moved_bytes import row
    from sets import gpt

    found = row(gpt(1, 128))
    assert found["moved"]["muonkit fp32"]["all"] <= 1.45 * found["fewest"]


def test_symmetric_products_add_no_passes() -> None:
    """Counted: 2.40, of matrices whose products are computed in blocks."""
    from moved_bytes import row
    from sets import gpt

    found = row(gpt(1, 768))
    assert found["moved"]["muonkit fp32"]["all"] <= 2.42 * found["fewest"]
