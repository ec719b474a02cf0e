"""Tensors as the plan knows them, and between which ranks a matrix goes. Pure Python."""

from __future__ import annotations

import bisect
import functools
from typing import TYPE_CHECKING, Any, NamedTuple

from muonkit.distributed.nodes import Hop, hops
from muonkit.distributed.placement import (
    Box,
    Interval,
    Piece,
    Placement,
    Where,
    box_size,
    cells,
    pieces,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = ["Direction", "Lines", "Matrix", "PlannedTensor", "alike"]


class PlannedTensor(NamedTuple):
    """A parameter, as far as the plan needs to know it.

    Attributes:
        name: for messages.
        shape: the logical one.
        param_placement: of the parameter.
        state_placement: of its momentum: on every rank within what that stores of the parameter, on
            the same mesh.
        repeat: mesh axes along which the same matrices are computed again, rather than divided
            among the ranks and sent.
        stage_shape, stage_placement: of the stage's state, where it keeps one.
    """

    name: str
    shape: tuple[int, ...]
    param_placement: Placement
    state_placement: Placement
    repeat: tuple[int, ...] = ()
    stage_shape: tuple[int, ...] = ()
    stage_placement: Placement | None = None


class Lines(NamedTuple):
    """Which lines of a matrix a step takes: its rows, or its columns (`muonkit.selection`).

    Attributes:
        dims: of the parameter, that the lines are counted along, row-major.
        rows: whether they are the matrix's rows.
        cells: (start, stop, k): of the lines in [start, stop) the k largest are taken.
        sent: the one of `dims` along which the lines that were taken travel without the others, as
            every rank has whole cells of it; None where whole matrices travel.
    """

    dims: tuple[int, ...]
    rows: bool
    cells: tuple[tuple[int, int, int], ...]
    sent: int | None

    @property
    def total(self) -> int:
        """How many lines are taken."""
        return sum(k for _, _, k in self.cells)

    def shape(self, rows: int, cols: int) -> tuple[int, int]:
        """The shape of the lines that are taken of a matrix of so many rows and columns."""
        return (self.total, cols) if self.rows else (rows, self.total)

    def among(self, start: int, stop: int) -> int:
        """How many are taken of the lines in [start, stop), which are whole cells."""
        return sum(k for a, b, k in self.cells if start <= a and b <= stop)

    def taken(self, box: Box, matrix: Box) -> Box:
        """A part of the matrix in the coordinates of what is taken of it."""
        if self.sent is None:
            return box
        (start, stop), origin = box[self.sent], matrix[self.sent][0]
        first = origin + self.among(0, start - origin)
        interval = first, first + self.among(start - origin, stop - origin)
        return (*box[: self.sent], interval, *box[self.sent + 1 :])


class Matrix(NamedTuple):
    """One matrix of a parameter.

    Attributes:
        tensor: the parameter's index.
        box: of the parameter, which holds it.
        flops: that it costs to orthogonalize.
        stage_box: of the stage's state, which belongs to it.
        lines: that a step takes of it; None where it takes all.
    """

    tensor: int
    box: Box
    flops: int
    stage_box: Box | None = None
    lines: Lines | None = None

    def computed(self, rows: int, cols: int) -> tuple[int, int]:
        """The shape of what is orthogonalized of a matrix of so many rows and columns."""
        return (rows, cols) if self.lines is None else self.lines.shape(rows, cols)

    def taken(self, box: Box) -> Box:
        """What travels of a part of it."""
        return box if self.lines is None else self.lines.taken(box, self.box)


class Direction(NamedTuple):
    """The way of a matrix between its owner and the ranks that store its parts, to or from them.

    On the way to the owner, `axes` are those along which the momentum is replicated: each owner
    receives from the ranks of its own coordinates along them. On the way back they are those along
    which the work is repeated: each owner sends to the ranks of its own repetition.

    Attributes:
        place: where the tensor lies whose box it is.
        shape: of the tensor.
        axes: mesh axes along which an owner deals with ranks of its own coordinates only.
        lines: of the matrix, that travel; None where all do.
    """

    place: Placement
    shape: tuple[int, ...]
    box: Box
    axes: tuple[int, ...]
    lines: Lines | None = None

    def others(self, owner: int) -> list[tuple[int, Box]]:
        """Who exchanges which part of the box with this owner."""
        return [(at, piece.box) for piece in self.pieces(owner) for at in piece.positions]

    def pieces(self, owner: int) -> tuple[Piece, ...]:
        """The parts of the box, each with all who exchange it with this owner."""
        return pieces(self.place, self.shape, self.box, self.place.where(owner, self.axes))

    def hops(self, owner: int, node: int) -> tuple[Hop, ...]:
        """How the parts come from this owner to those who store them, on nodes of so many ranks."""
        return _hops(self.pieces(owner), owner, node)

    def to_all(self, ranks: int) -> bool:
        """Whether every one of so many ranks has the whole box."""
        whole = len(self.place.copies()) == len(self.place.mesh) and not self.axes
        return whole and len(self.place.positions) == ranks

    def parts(self, position: int) -> tuple[Box, ...]:
        """The parts of the box that the rank at this position stores."""
        return self.place.parts(self.shape, position, self.box)

    def counts(self, position: int, owner: int) -> bool:
        """Whether this owner deals with the rank at this position, if that has a part."""
        return not self.axes or (
            self.place.where(position, self.axes) == self.place.where(owner, self.axes)
        )

    def size(self, box: Box) -> int:
        """The elements that travel of a part of the box."""
        return box_size(box if self.lines is None else self.lines.taken(box, self.box))

    def sizes(self, where: Where) -> Mapping[int, int]:
        """The elements that travel between an owner and each of its others; the owner's coordinates
        are `where`.
        """
        return _sizes(self.place, self.shape, self.box, where, self.lines)


@functools.lru_cache(maxsize=1 << 12)
def _hops(parts: tuple[Piece, ...], owner: int, node: int) -> tuple[Hop, ...]:
    return tuple(hops(parts, owner, node))


@functools.lru_cache(maxsize=1 << 10)
def _sizes(
    place: Placement, shape: tuple[int, ...], box: Box, where: Where, lines: Lines | None
) -> dict[int, int]:
    sizes: dict[int, int] = {}
    for part, positions in pieces(place, shape, box, where):
        size = box_size(part if lines is None else lines.taken(part, box))
        for position in positions:
            sizes[position] = sizes.get(position, 0) + size
    return sizes


def alike(
    tensors: Sequence[PlannedTensor], matrices: Sequence[Matrix], inward: bool = True
) -> list[int]:
    """For each matrix, the first one whose parts lie on the same ranks, in the same sizes: of an
    equal parameter, and elsewhere at most along dims that nothing cuts, or within what one rank
    has of a dim (experts of a stack); and of which the same lines travel.

    Args:
        inward: compare the parts of the momentum; matrices that are alike in these are alike in the
            parts of the parameters too. False: compare the parts of the parameters only.
    """
    kinds: dict[PlannedTensor, int] = {}
    kind = [kinds.setdefault(tensor._replace(name=""), len(kinds)) for tensor in tensors]
    extents = [_Extents(t.state_placement if inward else t.param_placement, t.shape) for t in kinds]
    of_state = [_Extents(t.stage_placement, t.stage_shape) for t in kinds]
    first: dict[tuple[Any, ...], int] = {}
    known: dict[tuple[int, Box, Box | None], int] = {}
    like = []
    for i, (tensor, box, _, stage_box, lines) in enumerate(matrices):
        k = kind[tensor]
        same = known.get((k, box, stage_box))
        if same is None:
            key = (k, lines, *extents[k].of(box), *of_state[k].of(stage_box or ()))
            same = known[k, box, stage_box] = first.setdefault(key, i)
        like.append(same)
    return like


class _Extents:
    """The features of a box on which the sizes of its parts depend: for each dim its length, and
    the interval of the cut dim in which it lies; where it spans several, its start and stop.

    The intervals of a parameter are those of its momentum, or unions of them.
    """

    def __init__(self, place: Placement | None, shape: tuple[int, ...]) -> None:
        self._starts: list[list[int]] = []
        for dim, length in enumerate(shape if place is not None else ()):
            assert place is not None
            self._starts.append([start for (start, _), _ in cells(place, length, dim)])

    def of(self, box: Box) -> list[Interval]:
        return [self._extent(dim, *interval) for dim, interval in enumerate(box)]

    def _extent(self, dim: int, start: int, stop: int) -> Interval:
        starts = self._starts[dim]
        first, last = (bisect.bisect_right(starts, at) for at in (start, stop - 1))
        # Negative, so that it is no interval.
        return (-first, stop - start) if first == last else (start, stop)
