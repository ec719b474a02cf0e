"""Views: every element is covered once, blocks are the right matrices, misfits are refused."""

from __future__ import annotations

import re
from bisect import bisect_right
from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from muonkit import View
from muonkit.views import blocks_of, row_blocks, row_shape
from tests.helpers import optim as optim_helpers

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
    ("split(cols=2)", (6, 4), [(2, 6, 2)]),
    ("split(cols=3+1)", (6, 4), [(1, 6, 3), (1, 6, 1)]),
    ("split(rows=2) > split(cols=2)", (6, 4), [(4, 3, 2)]),
    ("split(cols=2) > split(rows=2)", (6, 4), [(4, 3, 2)]),
    ("split(cols=2) > split(cols=2)", (6, 8), [(2, 6, 2), (2, 6, 2)]),
    ("split(cols=2) > split(cols=3+1)", (6, 8), [(2, 6, 3), (2, 6, 1)]),
    ("split(cols=4+2) > split(cols=2)", (4, 6), [(1, 4, 2), (1, 4, 2), (1, 4, 1), (1, 4, 1)]),
    ("split(rows=2) > split(rows=2+1)", (6, 4), [(2, 2, 4), (2, 1, 4)]),
    ("split(rows=2) > split(rows=2+1) > split(cols=2)", (6, 4), [(2, 2, 2)] * 2 + [(2, 1, 2)] * 2),
    ("split(cols=2) > split(rows=2) > split(rows=2+1)", (6, 4), [(2, 2, 2), (2, 1, 2)] * 2),
    ("transpose > split(cols=2) > split(cols=2+1)", (6, 4), [(2, 4, 2), (2, 4, 1)]),
    ("transpose > split(rows=2) > split(rows=2+1)", (4, 6), [(2, 2, 4), (2, 1, 4)]),
    ("experts > split(rows=2) > split(rows=2+1)", (3, 6, 4), [(6, 2, 4), (6, 1, 4)]),
    ("flatten > split(cols=2)", (6, 4, 1, 1), [(2, 6, 2)]),
    ("split(rows=4+2) > split(rows=2)", (6, 4), [(2, 2, 4), (2, 1, 4)]),
    ("transpose > split(rows=3)", (4, 6), [(3, 2, 4)]),
    ("transpose > split(cols=2)", (4, 6), [(2, 6, 2)]),
    ("flatten > split(rows=2)", (4, 3, 5), [(2, 2, 15)]),
    ("flatten > split(rows=2) > transpose", (4, 3, 5), [(2, 15, 2)]),
    ("experts > split(rows=2)", (3, 4, 6), [(6, 2, 6)]),
    ("experts > split(rows=3+1)", (3, 4, 6), [(3, 3, 6), (3, 1, 6)]),
    ("experts > split(cols=2)", (3, 4, 6), [(6, 4, 3)]),
    ("experts > transpose > split(rows=2)", (3, 4, 6), [(6, 3, 4)]),
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
    (block,) = blocks_of("transpose > split(rows=3)", (4, 6))
    q, k, v = block.to_matrices(block.region(w))
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


@pytest.mark.parametrize(("spec", "shape", "expected"), CASES)
def test_boxes_are_where_the_matrices_lie(
    spec: str, shape: tuple[int, ...], expected: object
) -> None:
    p = torch.arange(torch.Size(shape).numel()).reshape(shape)
    rows = torch.arange(torch.Size(row_shape(spec, shape)).numel()).reshape(row_shape(spec, shape))
    for tensor, blocks in ((p, blocks_of(spec, shape)), (rows, row_blocks(spec, shape))):
        for block in blocks:
            matrices = block.to_matrices(block.region(tensor))
            boxes = block.boxes()
            assert len(boxes) == block.batch
            for matrix, box in zip(matrices, boxes, strict=True):
                part = tensor[tuple(slice(start, stop) for start, stop in box)]
                stored = (block.cols, block.rows) if block.transposed else (block.rows, block.cols)
                part = part.reshape(stored)
                assert torch.equal(matrix, part.mT if block.transposed else part)


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
        ("split(rows=2) > split(rows=2+2)", (6, 2), "sum 4, for 3 rows"),
    ],
)
def test_a_misfit_is_refused(spec: str, shape: tuple[int, ...], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        View.parse(spec).blocks(shape)


@pytest.mark.parametrize("spec", ["", "matrx", "split", "matrix > flatten", "split(rows=a)", ">"])
def test_unknown_spellings_are_refused(spec: str) -> None:
    with pytest.raises(ValueError, match=r"unknown (view|step in the view)"):
        View.parse(spec)


@pytest.mark.parametrize(
    ("spec", "meant"),
    [
        ("matrx", "unknown view 'matrx': did you mean 'matrix'? It is one of 'matrix', 'flatten'"),
        ("spilt(rows=2)", "unknown view 'spilt(rows=2)': did you mean 'split(rows=N)'?"),
        (
            "experts > transposed > split(rows=2)",
            "unknown step in the view 'experts > transposed > split(rows=2)': 'transposed': did "
            "you mean 'transpose'? It is one of 'transpose', 'split(rows=N)'",
        ),
        ("expert > transpose", "unknown step in the view 'expert > transpose': 'expert': did you"),
    ],
)
def test_a_misspelt_view_is_told_what_was_meant(spec: str, meant: str) -> None:
    with pytest.raises(ValueError, match=re.escape(meant)):
        View.parse(spec)


def test_a_view_is_a_string() -> None:
    with pytest.raises(TypeError, match=r"write View.parse\('split\(rows=3\)'\)"):
        View("split(rows=3)")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="a view is a string, got int"):
        View.parse(3)  # type: ignore[arg-type]


# --- one number per matrix row ------------------------------------------------------------------

# view, shape of the parameter, and for each dimension that holds columns where its segments begin
ROWS: list[tuple[str, tuple[int, ...], dict[int, list[int]]]] = [
    ("matrix", (4, 6), {1: [0]}),
    ("transpose", (4, 6), {0: [0]}),
    ("flatten", (4, 3, 5, 2), {1: [0], 2: [0], 3: [0]}),
    ("flatten", (6, 3, 2, 2), {1: [0], 2: [0], 3: [0]}),
    ("flatten", (4, 6), {1: [0]}),
    ("flatten > transpose", (4, 3, 2), {0: [0]}),
    ("experts", (3, 4, 6), {2: [0]}),
    ("experts", (2, 3, 4, 6), {3: [0]}),
    ("experts > transpose", (3, 4, 6), {1: [0]}),
    ("experts > transpose > split(cols=2)", (3, 4, 6), {1: [0, 2]}),
    ("experts > transpose > split(cols=3+1)", (3, 4, 6), {1: [0, 3]}),
    ("split(rows=3)", (6, 4), {1: [0]}),
    ("split(rows=4+1+1)", (6, 4), {1: [0]}),
    ("split(cols=2)", (6, 4), {1: [0, 2]}),
    ("split(cols=3+1)", (6, 4), {1: [0, 3]}),
    ("split(rows=2) > split(cols=2)", (6, 4), {1: [0, 2]}),
    ("split(cols=2) > split(rows=2)", (6, 4), {1: [0, 2]}),
    ("split(cols=2) > split(cols=2)", (6, 8), {1: [0, 2, 4, 6]}),
    ("split(cols=2) > split(cols=3+1)", (6, 8), {1: [0, 3, 4, 7]}),
    ("split(cols=4+2) > split(cols=2)", (4, 6), {1: [0, 2, 4, 5]}),
    ("split(rows=2) > split(rows=2+1)", (6, 4), {1: [0]}),
    ("split(rows=2) > split(rows=2+1) > split(cols=2)", (6, 4), {1: [0, 2]}),
    ("split(cols=2) > split(rows=2) > split(rows=2+1)", (6, 4), {1: [0, 2]}),
    ("transpose > split(cols=2) > split(cols=2+1)", (6, 4), {0: [0, 2, 3, 5]}),
    ("transpose > split(rows=2) > split(rows=2+1)", (4, 6), {0: [0]}),
    ("experts > split(rows=2) > split(rows=2+1)", (3, 6, 4), {2: [0]}),
    ("flatten > split(cols=2)", (6, 4, 1, 1), {1: [0, 2], 2: [0], 3: [0]}),
    ("split(cols=2) > split(rows=4+2) > split(cols=2)", (6, 8), {1: [0, 2, 4, 6]}),
    ("split(rows=4+2) > split(rows=2)", (6, 4), {1: [0]}),
    ("split(rows=4+2) > split(rows=2) > transpose", (6, 4), {0: [0, 2, 4, 5]}),
    ("transpose > split(rows=3)", (4, 6), {0: [0]}),
    ("transpose > split(cols=2)", (4, 6), {0: [0, 2]}),
    ("transpose > split(cols=4+2) > split(cols=2) > split(rows=2)", (6, 4), {0: [0, 2, 4, 5]}),
    ("flatten > split(rows=2)", (4, 3, 5), {1: [0], 2: [0]}),
    ("flatten > split(rows=3+1)", (4, 3, 5), {1: [0], 2: [0]}),
    ("flatten > split(rows=2) > transpose", (4, 3, 5), {0: [0, 2]}),
    ("flatten > split(rows=3+1) > transpose", (4, 3, 5), {0: [0, 3]}),
    ("experts > split(rows=2)", (3, 4, 6), {2: [0]}),
    ("experts > split(rows=3+1)", (3, 4, 6), {2: [0]}),
    ("experts > split(cols=2)", (3, 4, 6), {2: [0, 3]}),
    ("experts > transpose > split(rows=2)", (3, 4, 6), {1: [0]}),
]


def loop_of_row_means(
    p: torch.Tensor, columns: dict[int, list[int]]
) -> tuple[tuple[int, ...], torch.Tensor]:
    """Means over the columns of each matrix, entry by entry."""
    shape = tuple(len(columns[d]) if d in columns else n for d, n in enumerate(p.shape))
    total, count = torch.zeros(shape, dtype=p.dtype), torch.zeros(shape, dtype=p.dtype)
    for place in product(*map(range, p.shape)):
        row = tuple(
            bisect_right(columns[d], x) - 1 if d in columns else x for d, x in enumerate(place)
        )
        total[row] += p[place]
        count[row] += 1
    return shape, total / count


def row_means(spec: str, p: torch.Tensor) -> torch.Tensor:
    """The same as the step does it: two parameters at a time, whole matrices, and back."""
    shape = tuple(p.shape)
    both = [torch.full(row_shape(spec, shape), torch.nan, dtype=p.dtype) for _ in range(2)]
    blocks, rows = blocks_of(spec, shape), row_blocks(spec, shape)
    assert len(blocks) == len(rows)
    for block, row in zip(blocks, rows, strict=True):
        assert (row.batch, row.rows, row.cols) == (block.batch, block.rows, 1)
        matrices = block.to_matrices(torch.stack([block.region(-p), block.region(p)]))
        v = row.to_matrices(torch.stack([row.region(b) for b in both]))
        assert v.shape == (2 * block.batch, block.rows, 1)
        assert v.isnan().all()  # no other block has written here
        for b, region in zip(both, row.to_regions(matrices.mean(-1, keepdim=True)), strict=True):
            row.region(b).copy_(region)
        again = row.to_matrices(torch.stack([row.region(b) for b in both]))
        torch.testing.assert_close(again, matrices.mean(-1, keepdim=True), rtol=0, atol=0)
    assert torch.equal(both[0], -both[1])
    return both[1]


def test_the_row_cases_hold_every_view() -> None:
    named = {spec for spec, *_ in ROWS}
    assert named >= {spec for spec, *_ in CASES} - {"split(rows=2+2+2)"}  # split(rows=3)
    assert named >= {spec for spec, _ in optim_helpers.VIEWED} - {
        "split(rows=6+2+2)",  # as split(rows=4+1+1)
        "split(rows=2) > split(rows=3+2)",  # as split(rows=2+1)
    }


@pytest.mark.parametrize(("spec", "shape", "columns"), ROWS)
def test_rows_are_the_rows_of_the_blocks(
    spec: str, shape: tuple[int, ...], columns: dict[int, list[int]]
) -> None:
    p = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected_shape, expected = loop_of_row_means(p, columns)
    assert row_shape(spec, shape) == expected_shape
    torch.testing.assert_close(row_means(spec, p), expected, rtol=1e-12, atol=1e-14)


@given(
    rows=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    cols=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    experts=st.integers(0, 3),
    transposed=st.booleans(),
    rows_first=st.booleans(),
)
def test_any_grid_of_blocks_has_its_rows(
    rows: list[int], cols: list[int], experts: int, transposed: bool, rows_first: bool
) -> None:
    sizes = {"rows": rows, "cols": cols}
    steps = ["experts" if experts else "matrix"] + ["transpose"] * transposed
    for axis in ("rows", "cols") if rows_first else ("cols", "rows"):
        parts = "+".join(map(str, sizes[axis])) if len(sizes[axis]) > 1 else "1"
        steps.append(f"split({axis}={parts})")
    spec = " > ".join(steps)
    stored = (sum(cols), sum(rows)) if transposed else (sum(rows), sum(cols))
    shape = (experts, *stored) if experts else stored
    dim = len(shape) - (2 if transposed else 1)
    starts = [sum(cols[:i]) for i in range(len(cols))]
    p = torch.arange(torch.Size(shape).numel(), dtype=torch.float64).reshape(shape).sin()
    expected_shape, expected = loop_of_row_means(p, {dim: starts})
    assert row_shape(spec, shape) == expected_shape
    torch.testing.assert_close(row_means(spec, p), expected, rtol=1e-12, atol=1e-14)


def test_regions_of_rows_are_views_of_their_tensor() -> None:
    for spec, shape, _ in ROWS:
        v = torch.zeros(row_shape(spec, shape))
        for row in row_blocks(spec, shape):
            row.region(v).add_(1)
        assert torch.equal(v, torch.ones_like(v)), spec


def test_a_parameter_without_entries_has_no_rows() -> None:
    assert row_shape("matrix", (0, 4)) == (0, 1)
    assert row_shape("matrix", (4, 0)) == (4, 0)
    assert row_shape("transpose", (0, 4)) == (0, 4)
    assert row_shape("experts", (0, 4, 6)) == (0, 4, 1)


def test_rows_of_a_misfit_are_refused() -> None:
    for function in (row_shape, row_blocks):
        with pytest.raises(ValueError, match="exactly 2 dimensions"):
            function("matrix", (4, 3, 2))


def test_rows_compile_to_one_graph() -> None:
    torch._dynamo.reset()

    @torch.compile(backend="eager", fullgraph=True, dynamic=False)  # as parameters are
    def count_rows_(p: torch.Tensor, v: torch.Tensor, spec: str) -> torch.Tensor:
        for row in row_blocks(spec, p.shape):
            row.region(v).add_(row.batch * row.rows)
        return torch.zeros(row_shape(spec, p.shape))

    for spec, shape in [("transpose > split(cols=4+2)", (6, 4)), ("experts", (3, 4, 6))]:
        p, v = torch.zeros(shape), torch.zeros(row_shape(spec, shape))
        assert count_rows_(p, v, spec).shape == v.shape
        expected = 12 if spec == "experts" else 4
        assert torch.equal(v, torch.full_like(v, expected))
