"""Views: every element is covered once, blocks are the right matrices, misfits are refused."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from muonkit import View
from muonkit.views import blocks_of

# view, shape of the parameter, (batch, rows, cols) of each block
CASES = [
    ("matrix", (4, 6), [(1, 4, 6)]),
    ("transpose", (4, 6), [(1, 6, 4)]),
    ("flatten", (4, 3, 5, 2), [(1, 4, 30)]),
    ("flatten", (4, 6), [(1, 4, 6)]),
    ("flatten > transpose", (4, 3, 2), [(1, 6, 4)]),
    ("experts", (3, 4, 6), [(3, 4, 6)]),
    ("experts", (2, 3, 4, 6), [(6, 4, 6)]),
    ("split(rows=3)", (6, 4), [(3, 2, 4)]),
    ("split(rows=2+2+2)", (6, 4), [(3, 2, 4)]),
    ("split(rows=4+1+1)", (6, 4), [(1, 4, 4), (1, 1, 4), (1, 1, 4)]),
    ("split(cols=2)", (6, 4), [(1, 6, 2), (1, 6, 2)]),
    ("split(cols=3+1)", (6, 4), [(1, 6, 3), (1, 6, 1)]),
    ("split(rows=2) > split(cols=2)", (6, 4), [(2, 3, 2)] * 2),
    ("split(cols=2) > split(rows=2)", (6, 4), [(2, 3, 2), (2, 3, 2)]),
    ("split(rows=4+2) > split(rows=2)", (6, 4), [(2, 2, 4), (2, 1, 4)]),
    ("transpose > split(rows=3)", (4, 6), [(1, 2, 4)] * 3),
    ("transpose > split(cols=2)", (4, 6), [(2, 6, 2)]),
    ("flatten > split(rows=2)", (4, 3, 5), [(2, 2, 15)]),
    ("flatten > split(rows=2) > transpose", (4, 3, 5), [(2, 15, 2)]),
    ("experts > split(rows=2)", (3, 4, 6), [(6, 2, 6)]),
    ("experts > split(rows=3+1)", (3, 4, 6), [(3, 3, 6), (3, 1, 6)]),
    ("experts > split(cols=2)", (3, 4, 6), [(3, 4, 3)] * 2),
    ("experts > transpose > split(rows=2)", (3, 4, 6), [(3, 3, 4)] * 2),
]


@pytest.mark.parametrize(("spec", "shape", "expected"), CASES)
def test_blocks_are_the_expected_matrices(
    spec: str, shape: tuple[int, ...], expected: list[tuple[int, int, int]]
) -> None:
    blocks = View.parse(spec).blocks(shape)
    assert [(b.batch, b.rows, b.cols) for b in blocks] == expected


@pytest.mark.parametrize("layout", ["contiguous", "reversed strides"])
@pytest.mark.parametrize(("spec", "shape", "expected"), CASES)
def test_blocks_cover_every_element_once(
    spec: str, shape: tuple[int, ...], expected: object, layout: str
) -> None:
    p = torch.arange(torch.Size(shape).numel()).reshape(shape)
    back = torch.zeros_like(p)
    if layout == "reversed strides":
        reverse = tuple(reversed(range(p.ndim)))
        p = p.permute(reverse).contiguous().permute(reverse)
        back = back.permute(reverse).contiguous().permute(reverse)
    for block in View.parse(spec).blocks(shape):
        matrices = block.to_matrices(block.region(p))
        assert matrices.shape == (block.batch, block.rows, block.cols)
        block.region(back).add_(block.to_regions(matrices.clone())[0])
    assert torch.equal(back, p)


def test_blocks_hold_what_they_say() -> None:
    w = torch.arange(24).reshape(4, 6)
    q, k, v = (
        b.to_matrices(b.region(w))[0] for b in blocks_of("transpose > split(rows=3)", (4, 6))
    )
    assert torch.equal(q, w[:, :2].T)
    assert torch.equal(k, w[:, 2:4].T)
    assert torch.equal(v, w[:, 4:].T)
    e = torch.arange(48).reshape(2, 4, 6)
    (block,) = blocks_of("experts > split(rows=2)", (2, 4, 6))
    gate_0, up_0, gate_1, up_1 = block.to_matrices(block.region(e))
    assert torch.equal(gate_0, e[0, :2])
    assert torch.equal(up_0, e[0, 2:])
    assert torch.equal(up_1, e[1, 2:])
    assert torch.equal(gate_1, e[1, :2])


@given(
    rows=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    cols=st.integers(1, 6),
    experts=st.integers(0, 3),
    transposed=st.booleans(),
)
def test_any_sizes_are_covered(rows: list[int], cols: int, experts: int, transposed: bool) -> None:
    matrix = (cols, sum(rows)) if transposed else (sum(rows), cols)
    shape = (experts, *matrix) if experts else matrix
    steps = ["experts" if experts else "matrix"] + ["transpose"] * transposed
    steps.append(f"split(rows={'+'.join(map(str, rows))})" if len(rows) > 1 else "split(rows=1)")
    count = torch.zeros(shape)
    blocks = blocks_of(" > ".join(steps), shape)
    for block in blocks:
        block.region(count).add_(1)
    assert torch.equal(count, torch.ones(shape))
    assert sum(b.batch * b.rows for b in blocks) == sum(rows) * max(experts, 1)


def test_the_spelling_is_canonical() -> None:
    assert str(View.parse("split( rows = 1 + 2 )")) == "matrix > split(rows=1+2)"
    assert View.parse(" experts>transpose ") == View.parse("experts > transpose")
    assert str(View.parse(str(View.parse("split(rows=3)")))) == "matrix > split(rows=3)"


@pytest.mark.parametrize(
    ("spec", "shape", "words"),
    [
        ("matrix", (4,), "exactly 2 dimensions, got shape"),
        ("matrix", (4, 3, 2), "'flatten', 'experts'"),
        ("flatten", (4,), "at least 2"),
        ("experts", (4, 3), "at least 3"),
        ("split(rows=4)", (6, 2), "6 rows in 4 equal parts"),
        ("split(rows=0)", (6, 2), "0 equal parts"),
        ("split(rows=4+1)", (6, 2), r"sizes \[4, 1\], sum 5, for 6 rows"),
        ("split(rows=6+0)", (6, 2), "must be positive"),
        ("flatten > split(cols=2)", (4, 2, 2), "dimensions that .flatten. joins"),
        ("split(rows=2) > split(rows=2+1)", (6, 2), "unequal split first"),
        ("split(rows=2) > split(rows=2+2)", (6, 2), "sum 4, for 3 rows"),
    ],
)
def test_a_misfit_is_refused(spec: str, shape: tuple[int, ...], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        View.parse(spec).blocks(shape)


@pytest.mark.parametrize("spec", ["", "matrx", "split", "matrix > flatten", "split(rows=a)", ">"])
def test_unknown_spellings_are_refused(spec: str) -> None:
    with pytest.raises(ValueError, match="unknown view"):
        View.parse(spec)


def test_a_view_is_a_string() -> None:
    with pytest.raises(TypeError, match="a view is a string, got int"):
        View.parse(3)  # type: ignore[arg-type]
