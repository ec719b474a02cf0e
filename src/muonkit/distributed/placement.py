"""Placements: for every rank, what it stores of a tensor. Pure Python, no tensors.

The ranks that an optimizer's parameters are spread over are counted 0, 1, ... and called
*positions*. They form meshes; along each mesh axis a tensor is cut on one of its dims, or repeated.
A rectangle is a `Box`: one half-open interval for every dim of the tensor in its logical shape. A
rank stores one box, or several where a dim is cut in strides (packed projections): its tensor has
the *runs* of every dim one after the other.
"""

from __future__ import annotations

import bisect
import functools
import itertools
import math
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = [
    "Axis",
    "Box",
    "Interval",
    "Piece",
    "Placement",
    "Runs",
    "Where",
    "box_size",
    "cells",
    "intersection",
    "nested",
    "pieces",
    "replicated",
    "shard_over",
    "slices",
    "whole",
]

Interval = tuple[int, int]
Box = tuple[Interval, ...]
Runs = tuple[Interval, ...]  # of one dim: ascending, and apart
Where = tuple[tuple[int, int], ...]  # (mesh axis, coordinate): the ranks that have these


class Axis(NamedTuple):
    """What one mesh axis does to a tensor.

    Attributes:
        dim: the tensor dim that it cuts; None where every rank along the axis has the same.
        split: DTensor's `_StridedShard(split_factor)`: the dim is first cut in so many parts, each
            of which is cut along this axis; 1 is a plain `Shard`.
    """

    dim: int | None
    split: int = 1


class Placement(NamedTuple):
    """How a tensor lies on a mesh.

    Attributes:
        mesh: ranks along each mesh axis.
        axes: one for each of them; applied from left to right, as DTensor does.
        positions: of the mesh's ranks, in row-major order of their coordinates.
    """

    mesh: tuple[int, ...]
    axes: tuple[Axis, ...]
    positions: range | tuple[int, ...]

    def coordinates(self, position: int) -> tuple[int, ...]:
        """The coordinates of the rank at this position, one for each mesh axis."""
        index = _indices(self.positions)[position]
        coordinates = []
        for size in reversed(self.mesh):
            index, coordinate = divmod(index, size)
            coordinates.append(coordinate)
        return tuple(reversed(coordinates))

    def position(self, coordinates: Sequence[int]) -> int:
        """The inverse of `coordinates`."""
        index = 0
        for size, coordinate in zip(self.mesh, coordinates, strict=True):
            index = index * size + coordinate
        return self.positions[index]

    def box(self, shape: tuple[int, ...], position: int) -> Box:
        """The box of a tensor of this shape that the rank at this position stores; may be empty.

        Raises:
            ValueError: it is more than one rectangle.
        """
        box = []
        for length, runs in zip(shape, self.runs(shape, position), strict=True):
            if len(runs) > 1:
                raise ValueError(
                    f"a dim of {length} is cut so that one rank stores {_parts(runs)}, expected "
                    "one rectangle"
                )
            box.append(runs[0] if runs else (length, length))
        return tuple(box)

    def runs(self, shape: tuple[int, ...], position: int) -> tuple[Runs, ...]:
        """For each dim, the intervals of it that the rank at this position stores."""
        return _runs(self, shape, position)

    def local_shape(self, shape: tuple[int, ...], position: int) -> tuple[int, ...]:
        """The shape of what the rank at this position stores."""
        return tuple(map(_total, self.runs(shape, position)))

    def parts(self, shape: tuple[int, ...], position: int, box: Box) -> tuple[Box, ...]:
        """The parts of a box that the rank at this position stores, in ascending order."""
        found = []
        for (start, stop), runs in zip(box, self.runs(shape, position), strict=True):
            clipped = [(max(a, start), min(b, stop)) for a, b in runs]
            found.append([(a, b) for a, b in clipped if a < b])
        return tuple(itertools.product(*found))

    def slices(self, shape: tuple[int, ...], position: int, box: Box) -> tuple[slice, ...]:
        """The index of a box, one of its `parts`, in the tensor that this rank stores."""
        runs = self.runs(shape, position)
        return tuple(_slice((interval,), some) for interval, some in zip(box, runs, strict=True))

    def origin(self, shape: tuple[int, ...], position: int, box: Box) -> Box:
        """The inverse of `slices`: where a box of the tensor that this rank stores is from."""
        found = []
        for (start, stop), runs in zip(box, self.runs(shape, position), strict=True):
            before = 0
            for a, b in runs:
                if start < before + b - a:
                    break
                before += b - a
            found.append((start - before + a, stop - before + a))
        return tuple(found)

    def slices_within(
        self, outer: Placement, shape: tuple[int, ...], position: int
    ) -> tuple[slice, ...]:
        """The index, in the tensor that this rank stores under `outer`, of what it stores here."""
        runs = zip(self.runs(shape, position), outer.runs(shape, position), strict=True)
        return tuple(_slice(inner, some) for inner, some in runs)

    def check_order(self, shape: tuple[int, ...]) -> None:
        """Refuse strides that two axes make in one dim: FSDP2 shards what an axis to its right has
        cut, and where that does not come out even, placements do not say who has what.

        Raises:
            ValueError: a dim that several axes cut, of which a rank stores several parts.
        """
        for dim, length in enumerate(shape):
            cuts = [cut for cut in _cuts(self, dim) if cut[1] > 1]
            for runs in _along(self, length, dim).values() if len(cuts) > 1 else ():
                if len(runs) > 1:
                    raise ValueError(
                        f"a dim of {length} is cut by {len(cuts)} mesh axes so that one rank "
                        f"stores {_parts(runs)}: every rank has to store one, for nothing says in "
                        "which order the axes cut; redistribute the parameter, or cut it along "
                        "another dim"
                    )

    def described(self) -> str:
        """In DTensor's words."""
        words = [
            "Replicate()"
            if dim is None
            else f"Shard({dim})"
            if split == 1
            else f"_StridedShard({dim}, split_factor={split})"
            for dim, split in self.axes
        ]
        return f"[{', '.join(words)}] on a mesh of {' x '.join(map(str, self.mesh))}"

    def copies(self) -> tuple[int, ...]:
        """The mesh axes along which every rank has the same."""
        return tuple(i for i, axis in enumerate(self.axes) if axis.dim is None)

    def replicas(self, position: int, axes: Sequence[int]) -> tuple[int, ...]:
        """The positions that differ from this one along the given mesh axes only, itself included.

        In the same order for each of them.
        """
        at = self.coordinates(position)
        ranges = [range(n) if i in axes else (at[i],) for i, n in enumerate(self.mesh)]
        return tuple(self.position(coordinates) for coordinates in itertools.product(*ranges))

    def where(self, position: int, axes: Sequence[int]) -> Where:
        """The coordinates along the given mesh axes of the rank at this position."""
        if not axes:
            return ()
        at = self.coordinates(position)
        return tuple((axis, at[axis]) for axis in axes)


class Piece(NamedTuple):
    """A part of a box, and the positions of the ranks that store it."""

    box: Box
    positions: tuple[int, ...]


def whole(shape: Sequence[int]) -> Box:
    """The box of a whole tensor."""
    return tuple((0, length) for length in shape)


def replicated(count: int) -> Placement:
    """The same whole tensor on each of `count` ranks."""
    return Placement((count,), (Axis(None),), range(count))


@functools.lru_cache(maxsize=4096)
def shard_over(placement: Placement, shape: tuple[int, ...], axes: tuple[int, ...]) -> Placement:
    """Shard the replicated tensor over these mesh axes (ZeRO).

    It is cut on the first dim on which every rank's part is one rectangle of what it had. Where
    there is no such dim (a scalar, or parts that do not nest) the placement is returned as it was.
    """
    for dim, length in enumerate(shape):
        after = [1] * len(placement.mesh)  # what cuts this dim to the right of each mesh axis
        for i in reversed(range(len(placement.mesh) - 1)):
            cuts = placement.axes[i + 1].dim == dim
            after[i] = after[i + 1] * (placement.mesh[i + 1] if cuts else 1)
        shared = placement._replace(
            axes=tuple(
                Axis(dim, after[i]) if i in axes else axis for i, axis in enumerate(placement.axes)
            )
        )
        if not math.prod(shape) or _finer(shared, placement, length, dim):
            return shared
    return placement


def _finer(inner: Placement, outer: Placement, length: int, dim: int) -> bool:
    """Whether every rank has one interval of a dim at most, which is, in one placement, inside its
    own in another, which has some of its cuts.
    """
    cuts = [axis for axis, _, _ in _cuts(inner, dim)]
    kept = [cuts.index(axis) for axis, _, _ in _cuts(outer, dim)]
    wide = _along(outer, length, dim)
    for where, runs in _along(inner, length, dim).items():
        around = wide[tuple(where[i] for i in kept)]
        if max(len(runs), len(around)) > 1 or (runs and not nested(runs, around)):
            return False
    return True


def intersection(one: Box, other: Box) -> Box | None:
    """The box that both contain; None if they have no element in common."""
    box = tuple((max(a, c), min(b, d)) for (a, b), (c, d) in zip(one, other, strict=True))
    return box if all(start < stop for start, stop in box) else None


def nested(inner: Box, outer: Box) -> bool:
    """Whether `outer` contains all of `inner`; an empty one is contained everywhere."""
    return box_size(inner) == 0 or intersection(inner, outer) == inner


def box_size(box: Box) -> int:
    """Its number of elements."""
    return math.prod(stop - start for start, stop in box)


def _slice(inner: Runs, outer: Runs) -> slice:
    """The slice of the inner runs in a dim that has the outer runs one after the other.

    Raises:
        ValueError: they do not follow one another there.
    """
    if not inner:
        return slice(0, 0)
    starts = []
    before = 0
    for a, b in outer:
        starts += [before + start - a for start, stop in inner if a <= start and stop <= b]
        before += b - a
    lengths = [stop - start for start, stop in inner]
    expected = list(itertools.accumulate(lengths[:-1], initial=starts[0] if starts else 0))
    if starts != expected:
        raise ValueError(f"the intervals {inner} are not one part of {outer}")
    return slice(starts[0], starts[0] + sum(lengths))


def _total(runs: Runs) -> int:
    return sum(stop - start for start, stop in runs)


def _parts(runs: Runs) -> str:
    some = ", ".join(f"[{a}:{b}]" for a, b in runs[:4])
    return f"{len(runs)} separate parts of it ({some})"


def slices(box: Box, inside: Box) -> tuple[slice, ...]:
    """The index of `box` in a tensor that holds the box `inside`."""
    return tuple(
        slice(start - origin, stop - origin)
        for (start, stop), (origin, _) in zip(box, inside, strict=True)
    )


@functools.lru_cache(maxsize=1 << 16)
def pieces(
    placement: Placement, shape: tuple[int, ...], box: Box, where: Where = ()
) -> tuple[Piece, ...]:
    """The parts of a box by who stores them; together they cover it exactly once.

    A rank's own are in the order of `Placement.parts`.

    Args:
        shape: of the whole tensor, whose coordinates the box is in.
        where: which ranks count, by coordinates along axes that cut nothing; all of them.
    """
    found: list[list[tuple[Interval, dict[int, int]]]] = []
    for dim, (start, stop) in enumerate(box):
        parts = cells(placement, shape[dim], dim)
        first = bisect.bisect_right(parts, start, key=lambda cell: cell[0][1])
        overlaps = []
        for (a, b), at in itertools.islice(parts, first, None):
            if a >= stop:
                break
            overlaps.append(((max(a, start), min(b, stop)), at))
        found.append(overlaps)
    answer = []
    for combination in itertools.product(*found):
        fixed = dict(where)
        for _, at in combination:
            fixed.update(at)
        answer.append(
            Piece(tuple(interval for interval, _ in combination), _holders(placement, fixed))
        )
    return tuple(answer)


def _holders(placement: Placement, fixed: dict[int, int]) -> tuple[int, ...]:
    """The positions with these coordinates along these mesh axes, in row-major order."""
    indices = [0]
    for axis, size in enumerate(placement.mesh):
        along = (fixed[axis],) if axis in fixed else range(size)
        indices = [index * size + coordinate for index in indices for coordinate in along]
    return tuple(placement.positions[index] for index in indices)


@functools.lru_cache(maxsize=64)
def _indices(positions: range | tuple[int, ...]) -> dict[int, int]:
    return {position: index for index, position in enumerate(positions)}


@functools.lru_cache(maxsize=1 << 12)
def _runs(placement: Placement, shape: tuple[int, ...], position: int) -> tuple[Runs, ...]:
    at = placement.coordinates(position)
    found = []
    for dim, length in enumerate(shape):
        where = tuple(at[axis] for axis, _, _ in _cuts(placement, dim))
        found.append(_along(placement, length, dim)[where])
    return tuple(found)


@functools.lru_cache(maxsize=4096)
def cells(placement: Placement, length: int, dim: int) -> list[tuple[Interval, dict[int, int]]]:
    """The non-empty intervals that a dim is cut in, ascending, with the coordinates of each."""
    cuts = _cuts(placement, dim)
    found = [
        (interval, dict(zip((axis for axis, _, _ in cuts), where, strict=True)))
        for where, runs in _along(placement, length, dim).items()
        for interval in runs
    ]
    return sorted(found, key=lambda cell: cell[0])


def _cuts(placement: Placement, dim: int) -> list[tuple[int, int, int]]:
    """(mesh axis, its size, split) of the axes that cut this dim, from left to right."""
    return [
        (i, size, axis.split)
        for i, (size, axis) in enumerate(zip(placement.mesh, placement.axes, strict=True))
        if axis.dim == dim
    ]


def _along(placement: Placement, length: int, dim: int) -> dict[tuple[int, ...], Runs]:
    """The runs of each combination of coordinates along the mesh axes that cut this dim."""
    return _intervals(length, tuple(cut[1:] for cut in _cuts(placement, dim)))


@functools.lru_cache(maxsize=4096)
def _intervals(length: int, cuts: tuple[tuple[int, int], ...]) -> dict[tuple[int, ...], Runs]:
    """The intervals of `range(length)` for each combination of coordinates along these axes."""
    runs: dict[tuple[int, ...], list[Interval]] = {(): [(0, length)] if length else []}
    for size, split in cuts:
        runs = {
            (*where, i): part
            for where, before in runs.items()
            for i, part in enumerate(_cut(before, size, split))
        }
    return {where: tuple(parts) for where, parts in runs.items()}


def _cut(runs: list[Interval], size: int, split: int) -> list[list[Interval]]:
    """The runs that each of `size` ranks gets: the i-th part of each of `split` parts."""
    total = sum(stop - start for start, stop in runs)
    outer = -(-total // split)
    parts: list[list[Interval]] = [[] for _ in range(size)]
    for k in range(split):
        first, last = min(k * outer, total), min((k + 1) * outer, total)
        inner = -(-(last - first) // size)
        for i in range(size):
            start = min(first + i * inner, last)
            stop = min(first + (i + 1) * inner, last)
            _extend(parts[i], _window(runs, start, stop))
    return parts


def _window(runs: list[Interval], start: int, stop: int) -> list[Interval]:
    """The elements number `start` to `stop` of the runs' own."""
    window, seen = [], 0
    for a, b in runs:
        low, high = max(a, a + start - seen), min(b, a + stop - seen)
        if low < high:
            window.append((low, high))
        seen += b - a
    return window


def _extend(runs: list[Interval], more: list[Interval]) -> None:
    for run in more:
        if runs and runs[-1][1] == run[0]:
            runs[-1] = runs[-1][0], run[1]
        else:
            runs.append(run)
