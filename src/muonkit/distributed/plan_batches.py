"""Batches: which matrices are computed together. Pure Python, no tensors."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, NamedTuple

from muonkit._compile import constant_result

if TYPE_CHECKING:
    from collections.abc import Hashable

__all__ = ["Item", "PlannedBatch", "cap_of", "make_batches"]

# Cap on the bytes of one batch of matrices, above which no batch grows (but a single parameter may
# be larger); the transient peak of a step is a small multiple of the largest batch. On a CPU as
# much as `muonkit.newton_schulz.scratch` keeps; launches are dearer elsewhere.
_CAP = {"cpu": 64 * 2**20}
_CAP_ELSEWHERE = 256 * 2**20

# FLOPs that take as long as the launches of one more batch: up to here it is cheaper to pad
# matrices with zeros, into the batch of a larger shape, than to compute them on their own. The
# CPU's stands for a batch of its own, half a millisecond of Python and small operations, at 200
# GFLOP/s: of 1e7, 3e7, 5e7 and 1e8 the last gave the fastest step over a ResNet-20's matrices. A
# GPU's launches cost about the same and its FLOPs a thousandth, but that was never measured: a
# cautious guess.
_FLOPS_OF_A_LAUNCH = {"cpu": 10**8}
_FLOPS_OF_A_LAUNCH_ELSEWHERE = 10**9

# With more shapes than this none are joined: looking at all pairs again and again takes seconds.
_MOST_CLASSES = 40

# FLOPs that take as long as moving one element into a padded batch and out of it again.
_FLOPS_OF_A_MOVE = 300


class Item(NamedTuple):
    """One block of one parameter, as far as the plan needs to know it.

    Attributes:
        key: what must be equal for two items to be computed together.
        device: type of the device, "cpu".
        matrices, rows, cols: how many matrices, and their shape.
        itemsize: bytes per element.
    """

    key: Hashable
    device: str
    matrices: int
    rows: int
    cols: int
    itemsize: int


class PlannedBatch(NamedTuple):
    """Attributes:
    rows, cols: of every matrix in the batch; smaller ones are padded with zeros, or transposed
        and padded.
    positions: of its items in the caller's list.
    """

    rows: int
    cols: int
    positions: tuple[int, ...]


def cap_of(device: str, given: int | None = None) -> int:
    """Bytes that may be in flight at once on a device of this type, unless a cap is given."""
    return given or _CAP.get(device, _CAP_ELSEWHERE)


def make_batches(items: tuple[Item, ...], cap: int | None = None) -> list[PlannedBatch]:
    """Items of equal key and shape together, small ones of several shapes too, under the cap.

    Zero rows and columns stay zero in every product, so padding changes nothing but the FLOPs. An
    item larger than the cap is a batch of its own.

    Args:
        cap: bytes of the (padded) matrices of a batch; None is 64 MiB on a CPU, else 256.
    """
    return [PlannedBatch(*fields) for fields in _make_batches(items, cap)]


@constant_result
def _make_batches(
    items: tuple[Item, ...], cap: int | None
) -> tuple[tuple[int, int, tuple[int, ...]], ...]:
    return _cached(items, cap)


@functools.lru_cache(maxsize=256)
def _cached(
    items: tuple[Item, ...], cap: int | None
) -> tuple[tuple[int, int, tuple[int, ...]], ...]:
    classes: dict[tuple[Hashable, int, int], list[int]] = {}
    for position, item in enumerate(items):
        classes.setdefault((item.key, item.rows, item.cols), []).append(position)
    merged = _merge([((rows, cols), at) for (_, rows, cols), at in classes.items()], items)
    return tuple(
        (rows, cols, positions)
        for (rows, cols), at in merged
        for positions in _under_cap(rows * cols, at, items, cap)
    )


_Class = tuple[tuple[int, int], list[int]]


def _merge(classes: list[_Class], items: tuple[Item, ...]) -> list[_Class]:
    """Join the two classes whose joining costs the fewest FLOPs, while that is below a launch."""
    while len(classes) <= _MOST_CLASSES:
        best: tuple[float, int, int] | None = None
        for j in range(len(classes)):
            for i in range(j):
                first = items[classes[i][1][0]]
                if first.key != items[classes[j][1][0]].key:
                    continue
                launch = _FLOPS_OF_A_LAUNCH.get(first.device, _FLOPS_OF_A_LAUNCH_ELSEWHERE)
                extra = _extra_flops([classes[i], classes[j]], items)
                if extra < launch and (best is None or extra < best[0]):
                    best = extra, i, j
        if best is None:
            return classes
        _, i, j = best
        joined = _envelope([classes[i], classes[j]]), classes[i][1] + classes[j][1]
        classes = [*classes[:i], joined, *classes[i + 1 : j], *classes[j + 1 :]]
    return classes


def _envelope(classes: list[_Class]) -> tuple[int, int]:
    """The least wide shape that holds matrices of all classes, tall ones transposed."""
    sides = [sorted(shape) for shape, _ in classes]
    return max(m for m, _ in sides), max(n for _, n in sides)


def _extra_flops(classes: list[_Class], items: tuple[Item, ...]) -> int:
    m, n = _envelope(classes)
    return sum(
        (_flops(m, n) - _flops(*sorted(shape)) + _FLOPS_OF_A_MOVE * m * n)
        * sum(items[i].matrices for i in at)
        for shape, at in classes
    )


def _flops(m: int, n: int) -> int:
    """FLOPs of five iterations on one matrix in the standard form, the costliest one."""
    return 20 * m * m * n + 10 * m**3


def _under_cap(
    elements: int, at: list[int], items: tuple[Item, ...], cap: int | None
) -> list[tuple[int, ...]]:
    """In as few batches as the cap allows, of about equal size."""
    cap = cap_of(items[at[0]].device, cap)
    sizes = {i: items[i].matrices * elements * items[i].itemsize for i in at}
    total, largest = sum(sizes.values()), max(sizes.values())
    even = total // -(-total // cap) + largest - 1
    batches: list[list[int]] = []
    size = 0
    for position in sorted(at):
        if not batches or size + sizes[position] > min(cap, even):
            batches.append([])
            size = 0
        batches[-1].append(position)
        size += sizes[position]
    return [tuple(batch) for batch in batches]
