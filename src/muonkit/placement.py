"""Placements: for every rank, the rectangle of a tensor that it stores. Pure Python, no tensors.

The ranks that an optimizer's parameters are spread over are counted 0, 1, ... and called
*positions*. They form meshes; along each mesh axis a tensor is cut on one of its dims, or repeated.
A rectangle is a `Box`: one half-open interval for every dim of the tensor in its logical shape.
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
    "Where",
    "box_size",
    "cells",
    "intersection",
    "nested",
    "pieces",
    "replicated",
    "shared_out",
    "slices",
    "whole",
]

Interval = tuple[int, int]
Box = tuple[Interval, ...]
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
        """Of the rank at this position, along each mesh axis."""
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
        """What the rank at this position stores of a tensor of this shape; may be empty.

        Raises:
            ValueError: it is more than one rectangle.
        """
        at = self.coordinates(position)
        box = []
        for dim, length in enumerate(shape):
            where = tuple(at[axis] for axis, _, _ in _cuts(self, dim))
            box.append(_along(self, length, dim)[where])
        return tuple(box)

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

    def twins(self, position: int, axes: Sequence[int]) -> tuple[int, ...]:
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
def shared_out(placement: Placement, shape: tuple[int, ...], axes: tuple[int, ...]) -> Placement:
    """The same, but of what the ranks along these axes all had, each keeps a part (ZeRO).

    Cut on the first dim where every rank's part is one rectangle of what it had; as it was where
    there is none (a scalar, or parts that do not nest).
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
        try:
            if not math.prod(shape) or _finer(shared, placement, length, dim):
                return shared
        except ValueError:
            continue
    return placement


def _finer(inner: Placement, outer: Placement, length: int, dim: int) -> bool:
    """Whether every rank's interval of a dim is, in one placement, inside its own in another, which
    has some of its cuts.
    """
    cuts = [axis for axis, _, _ in _cuts(inner, dim)]
    kept = [cuts.index(axis) for axis, _, _ in _cuts(outer, dim)]
    wide = _along(outer, length, dim)
    return all(
        nested((interval,), (wide[tuple(where[i] for i in kept)],))
        for where, interval in _along(inner, length, dim).items()
    )


def intersection(one: Box, other: Box) -> Box | None:
    """What both contain; None if that is nothing."""
    box = tuple((max(a, c), min(b, d)) for (a, b), (c, d) in zip(one, other, strict=True))
    return box if all(start < stop for start, stop in box) else None


def nested(inner: Box, outer: Box) -> bool:
    """Whether `outer` contains all of `inner`; an empty one is contained everywhere."""
    return box_size(inner) == 0 or intersection(inner, outer) == inner


def box_size(box: Box) -> int:
    """Its number of elements."""
    return math.prod(stop - start for start, stop in box)


def slices(box: Box, inside: Box) -> tuple[slice, ...]:
    """What cuts `box` out of a tensor that holds the box `inside`."""
    return tuple(
        slice(start - origin, stop - origin)
        for (start, stop), (origin, _) in zip(box, inside, strict=True)
    )


@functools.lru_cache(maxsize=1 << 16)
def pieces(
    placement: Placement, shape: tuple[int, ...], box: Box, where: Where = ()
) -> tuple[Piece, ...]:
    """The parts of a box by who stores them; together they cover it exactly once.

    Args:
        shape: of the whole tensor, whose coordinates the box is in.
        where: which ranks count, by coordinates along axes that cut nothing; all of them.

    Raises:
        ValueError: a rank stores more than one rectangle.
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


@functools.lru_cache(maxsize=4096)
def cells(placement: Placement, length: int, dim: int) -> list[tuple[Interval, dict[int, int]]]:
    """The non-empty intervals that a dim is cut in, ascending, with the coordinates of each."""
    cuts = _cuts(placement, dim)
    found = [
        (interval, dict(zip((axis for axis, _, _ in cuts), where, strict=True)))
        for where, interval in _along(placement, length, dim).items()
        if interval[0] < interval[1]
    ]
    return sorted(found, key=lambda cell: cell[0])


def _cuts(placement: Placement, dim: int) -> list[tuple[int, int, int]]:
    """(mesh axis, its size, split) of the axes that cut this dim, from left to right."""
    return [
        (i, size, axis.split)
        for i, (size, axis) in enumerate(zip(placement.mesh, placement.axes, strict=True))
        if axis.dim == dim
    ]


def _along(placement: Placement, length: int, dim: int) -> dict[tuple[int, ...], Interval]:
    """The interval of each combination of coordinates along the mesh axes that cut this dim."""
    return _intervals(length, tuple(cut[1:] for cut in _cuts(placement, dim)))


@functools.lru_cache(maxsize=4096)
def _intervals(length: int, cuts: tuple[tuple[int, int], ...]) -> dict[tuple[int, ...], Interval]:
    """What each combination of coordinates along the cutting axes stores of `range(length)`."""
    runs: dict[tuple[int, ...], list[Interval]] = {(): [(0, length)] if length else []}
    for size, split in cuts:
        runs = {
            (*where, i): part
            for where, before in runs.items()
            for i, part in enumerate(_cut(before, size, split))
        }
    found = {}
    for where, parts in runs.items():
        if len(parts) > 1:
            raise ValueError(
                f"a dim of {length} is cut so that one rank stores {len(parts)} separate parts of "
                f"it ({', '.join(f'[{a}:{b}]' for a, b in parts[:4])}): every rank has to store "
                "one rectangle; redistribute the parameter, or cut it along another dim"
            )
        found[where] = parts[0] if parts else (length, length)
    return found


def _cut(runs: list[Interval], size: int, split: int) -> list[list[Interval]]:
    """What each of `size` ranks gets of these runs: the i-th part of each of `split` parts."""
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
