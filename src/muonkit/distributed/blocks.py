"""Blocks of MuonBP: what one rank stores of a matrix, as a matrix of its own. Pure Python, no
tensors.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from muonkit.distributed.placement import Box, Placement, pieces

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from muonkit.views import Block

__all__ = ["StoredBlock", "blocks_of_matrix"]


class StoredBlock(NamedTuple):
    """One block of a matrix.

    Attributes:
        block: its rows and columns, as the matrix's own.
        stage_block: of the stage's state; `block` where it keeps none.
        box, stage_box: where it lies in the parameter, and in the stage's state.
        cut: whether it is less than the matrix.
    """

    block: Block
    stage_block: Block
    box: Box
    stage_box: Box | None
    cut: bool


def blocks_of_matrix(
    block: Block,
    stage_block: Block,
    boxes: tuple[Box, Box | None],
    shape: tuple[int, ...],
    placement: Placement,
) -> Iterator[StoredBlock]:
    """The parts of one matrix that a rank stores each: of a matrix that nothing cuts, itself. Where
    a rank stores several parts that lie apart, each is a block.

    Args:
        block, stage_block: that the matrix is from.
        boxes: of the matrix in the parameter, and in the stage's state.
        shape, placement: of the parameter.

    Raises:
        ValueError: the stage keeps a number per row, and no rank has a whole row.
    """
    box, stage_box = boxes
    for part, _ in pieces(placement, shape, box):
        if part == box:
            yield StoredBlock(block, stage_block, box, stage_box, cut=False)
            continue
        mine = of_stage = _resized(block, box, part)
        within = None
        if stage_box is not None:
            within = _of_stage(box, part, stage_box)
            if stage_box != box:
                of_stage = replace(
                    stage_block,
                    index=(),
                    shape=_lengths(within),
                    batch=1,
                    rows=mine.rows,
                    pieces=None,
                )
        yield StoredBlock(mine, of_stage, part, within, cut=True)


def _of_stage(box: Box, part: Box, stage_box: Box) -> Box:
    """The box of the stage's state that belongs to a part of a matrix: it has the parameter's dims,
    and one place in those that hold columns.
    """
    found = []
    for whole, some, kept in zip(box, part, stage_box, strict=True):
        if whole != kept and some != whole:
            raise ValueError(
                "is cut between columns, and a stage that keeps a number per row needs whole rows "
                "in every step"
            )
        found.append(some if whole == kept else kept)
    return tuple(found)


def _resized(block: Block, box: Box, part: Box) -> Block:
    """The block of a part of one of its matrices."""
    lengths, some = _lengths(box), _lengths(part)
    stored = (block.cols, block.rows) if block.transposed else (block.rows, block.cols)
    dim = next(
        d
        for d, length in enumerate(lengths)
        if (length, math.prod(lengths[d + 1 :])) == stored and math.prod(lengths[:d]) == 1
    )
    rows, cols = some[dim], math.prod(some[dim + 1 :])
    rows, cols = (cols, rows) if block.transposed else (rows, cols)
    return replace(block, index=(), shape=some, batch=1, rows=rows, cols=cols, pieces=None)


def _lengths(box: Sequence[tuple[int, int]]) -> tuple[int, ...]:
    return tuple(stop - start for start, stop in box)
