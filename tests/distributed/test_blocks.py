"""Laws of blocks: what a rank stores of a matrix is a matrix of its own, in logical orientation."""

from __future__ import annotations

import contextlib
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from muonkit.distributed.blocks import blocks_of_matrix
from muonkit.distributed.placement import Axis, Placement, box_size
from muonkit.distributed.planner import blocks_of_param, matrices_of
from muonkit.views import row_shape

VIEWS = {
    "matrix": (6, 8),
    "transpose": (6, 8),
    "flatten": (4, 3, 2, 2),
    "experts": (3, 4, 6),
    "experts > transpose > split(rows=2)": (3, 4, 6),
    "split(rows=3)": (6, 8),
    "split(rows=1+5)": (6, 8),
    "split(cols=2)": (6, 8),
    "transpose > split(rows=4)": (6, 8),
    "split(rows=2) > split(rows=1+2)": (6, 8),
}


@st.composite
def placed(draw: st.DrawFn) -> tuple[str, tuple[int, ...], Placement]:
    view = draw(st.sampled_from(sorted(VIEWS)))
    shape = VIEWS[view]
    mesh = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=2)))
    dims = st.one_of(st.none(), st.integers(0, len(shape) - 1))
    axes = tuple(Axis(draw(dims), draw(st.sampled_from([1, 1, 2, 3]))) for _ in mesh)
    return view, shape, Placement(mesh, axes, range(math.prod(mesh)))


def inside(box: tuple[tuple[int, int], ...]) -> tuple[slice, ...]:
    return tuple(slice(a, b) for a, b in box)


@given(placed())
def test_blocks_are_submatrices_that_cover_a_matrix_once(
    given_: tuple[str, tuple[int, ...], Placement],
) -> None:
    view, shape, placement = given_
    entries = torch.arange(math.prod(shape)).view(shape)
    numbers = torch.arange(math.prod(row_shape(view, shape))).view(row_shape(view, shape))
    for block, stage_block, pairs in matrices_of(view, shape, "rows"):
        for box, stage_box in pairs:
            assert stage_box is not None
            whole = block.to_matrices(entries[inside(box)])[0]
            rows_of_whole = stage_block.to_matrices(numbers[inside(stage_box)])[0]
            seen = []
            pair = box, None
            for found in blocks_of_matrix(block, stage_block, pair, shape, placement):
                part = found.block.to_matrices(entries[inside(found.box)])[0]
                assert part.shape == (found.block.rows, found.block.cols)
                assert found.cut == (found.box != box) == (part.shape != whole.shape)
                flat = whole.flatten().tolist()
                at = torch.tensor([[flat.index(entry) for entry in row] for row in part.tolist()])
                rows, cols = at // block.cols, at % block.cols
                assert (rows == rows[:, :1]).all()
                assert (cols == cols[:1]).all()
                seen += part.flatten().tolist()
            assert sorted(seen) == sorted(whole.flatten().tolist())
            # With a number per row, a block's are those of its rows; or it has no whole row.
            pair = box, stage_box
            with contextlib.suppress(ValueError):
                for found in blocks_of_matrix(block, stage_block, pair, shape, placement):
                    assert found.stage_box is not None
                    assert found.block.cols == block.cols
                    part = found.block.to_matrices(entries[inside(found.box)])[0]
                    kept = found.stage_block.to_matrices(numbers[inside(found.stage_box)])[0]
                    which = [(whole[:, 0] == first).nonzero().item() for first in part[:, 0]]
                    assert torch.equal(kept, rows_of_whole[which])


@given(placed())
def test_a_number_per_row_is_refused_where_columns_are_cut_and_only_there(
    given_: tuple[str, tuple[int, ...], Placement],
) -> None:
    view, shape, placement = given_
    blocks = blocks_of_param(view, shape, "none", placement)
    assert sum(box_size(box) for _, _, ((box, _),), _ in blocks) == math.prod(shape)
    cols = {block.cols for block, _, _ in matrices_of(view, shape, "none")}
    assert len(cols) == 1
    whole_rows = {block.cols for block, *_ in blocks} == cols
    refused = pytest.raises(ValueError, match="between columns")
    with contextlib.nullcontext() if whole_rows else refused:
        blocks_of_param(view, shape, "rows", placement)
    entries = blocks_of_param(view, shape, "entries", placement)
    assert all(box == stage_box for _, _, ((box, stage_box),), _ in entries)
