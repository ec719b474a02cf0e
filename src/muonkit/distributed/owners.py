"""Owners and buckets: which rank computes which matrix. Pure Python, no tensors."""

from __future__ import annotations

import heapq
import math
from typing import TYPE_CHECKING

from muonkit.distributed.placement import Box, box_size, pieces, whole
from muonkit.distributed.plan import PADDING, Assignment, Plan
from muonkit.distributed.transfers import Direction, Matrix, PlannedTensor, alike

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

__all__ = ["are_even", "make_gather", "make_own", "make_plan"]


def make_plan(
    ranks: int,
    tensors: Sequence[PlannedTensor],
    matrices: Sequence[Matrix],
    itemsize: int,
    cap: int,
    loads: list[int] | None = None,
    stage_itemsize: int = 4,
    node: int = 0,
) -> Plan:
    """Owners by FLOPs, longest first, each to the least loaded rank that stores a part of it (LPT,
    Graham 1969); then buckets, in the same order, so that each is about balanced too.

    Args:
        cap: bytes that a rank may have in flight for one bucket; a larger matrix goes alone.
        loads: FLOPs that each rank has already; added to.
        node: ranks in a node; all are in one where it is 0, or no less than there are.
    """
    loads = [0] * ranks if loads is None else loads
    like = alike(tensors, matrices)
    heaps: dict[tuple[int, ...], list[tuple[int, int]]] = {}
    heap_of: dict[int, list[tuple[int, int]]] = {}
    assignments = []
    for i in sorted(range(len(matrices)), key=lambda i: (-matrices[i].flops, i)):
        tensor = tensors[matrices[i].tensor]
        heap = heap_of.get(like[i])
        if heap is None:
            able = _able(tensor, matrices[i].box)
            heap = heaps.setdefault(able, [(loads[position], position) for position in able])
            heapq.heapify(heap)
            heap_of[like[i]] = heap
        owner = _lightest(heap, loads)
        owners = (
            tensor.state_placement.replicas(owner, tensor.repeat) if tensor.repeat else (owner,)
        )
        for position in owners:
            loads[position] += matrices[i].flops
        assignments.append(Assignment(i, owners))
    buckets = _fill(assignments, tensors, matrices, itemsize, cap, like)
    return Plan(
        ranks, tuple(tensors), tuple(matrices), buckets, itemsize, stage_itemsize, node=node
    )


def make_own(
    ranks: int, tensors: Sequence[PlannedTensor], matrices: Sequence[Matrix], loads: list[int]
) -> Plan:
    """The plan of matrices that are whole wherever they are stored: nothing moves.

    Args:
        loads: FLOPs that each rank has already; added to.
    """
    assignments = []
    for i, matrix in enumerate(matrices):
        tensor = tensors[matrix.tensor]
        for piece in pieces(tensor.state_placement, tensor.shape, matrix.box):
            assignments.append(Assignment(i, piece.positions))
            for position in piece.positions:
                loads[position] += matrix.flops
    alone = tuple(tensor._replace(repeat=tensor.state_placement.copies()) for tensor in tensors)
    return Plan(ranks, alone, tuple(matrices), (tuple(assignments),), 0)


def make_gather(
    ranks: int,
    tensors: Sequence[PlannedTensor],
    itemsize: int,
    cap: int | None = None,
    node: int = 0,
    even: bool | None = None,
) -> Plan:
    """The plan of an elementwise step: every rank computes the part of the parameter that its state
    lives for, and sends it to all who store it.

    Args:
        cap: bytes that a rank may send in one bucket, for which parts are cut on their first dim;
            None is all in one.
        node: ranks in a node; all are in one where it is 0, or no less than there are.
        even: whether ranks have about equal parts, of which an all-gather pads little: by default,
            whether they have of these tensors.
    """
    padding = math.inf if (are_even(ranks, tensors) if even is None else even) else 0
    matrices: list[Matrix] = []
    buckets: list[list[Assignment]] = [[]]
    busy = 0
    alone = [tensor._replace(repeat=tensor.state_placement.copies()) for tensor in tensors]
    for i, tensor in enumerate(alone):
        parts = pieces(tensor.state_placement, tensor.shape, whole(tensor.shape))
        if not parts:
            continue
        axes = [axis for axis in tensor.param_placement.copies() if axis not in tensor.repeat]
        others = math.prod(tensor.param_placement.mesh[axis] for axis in axes) - 1
        sent = max(box_size(box) for box, _ in parts) * others * itemsize
        cuts = max(1, -(-sent // cap)) if cap and tensor.shape else 1
        for k in range(cuts):
            if cap and buckets[-1] and busy + -(-sent // cuts) > cap:
                buckets.append([])
                busy = 0
            busy += -(-sent // cuts)
            for box, at in parts:
                part = _kth(box, k, cuts)
                if box_size(part):
                    buckets[-1].append(Assignment(len(matrices), at))
                    matrices.append(Matrix(i, part, 0))
    filled = tuple(tuple(bucket) for bucket in buckets if bucket)
    return Plan(
        ranks,
        tuple(alone),
        tuple(matrices),
        filled,
        itemsize,
        inward=False,
        node=node,
        padding=padding,
    )


def are_even(ranks: int, tensors: Iterable[PlannedTensor]) -> bool:
    """Whether an all-gather of the parts of an elementwise step pads little."""
    sizes = [0] * ranks
    for tensor in tensors:
        for box, at in pieces(tensor.state_placement, tensor.shape, whole(tensor.shape)):
            for position in at:
                sizes[position] += box_size(box)
    return ranks * max(sizes) <= PADDING * sum(sizes)


def _kth(box: Box, k: int, cuts: int) -> Box:
    """The k-th of so many parts of a box, cut on its first dim."""
    if cuts == 1:
        return box
    (start, stop), *rest = box
    step = -(-(stop - start) // cuts)
    return ((min(start + k * step, stop), min(start + (k + 1) * step, stop)), *rest)


def _able(tensor: PlannedTensor, box: Box) -> tuple[int, ...]:
    """Who may own a matrix: whoever has a part of it, in the first repetition."""
    first = tensor.state_placement.where(tensor.state_placement.positions[0], tensor.repeat)
    parts = pieces(tensor.state_placement, tensor.shape, box, first)
    return tuple(sorted({position for piece in parts for position in piece.positions}))


def _lightest(heap: list[tuple[int, int]], loads: list[int]) -> int:
    """The least loaded, lowest position; the heap's loads may be out of date, never too high."""
    while heap[0][0] != loads[heap[0][1]]:
        position = heap[0][1]
        heapq.heapreplace(heap, (loads[position], position))
    return heap[0][1]


def _fill(
    assignments: Sequence[Assignment],
    tensors: Sequence[PlannedTensor],
    matrices: Sequence[Matrix],
    itemsize: int,
    cap: int,
    like: Sequence[int],
) -> tuple[tuple[Assignment, ...], ...]:
    """Assignments in buckets, in order: no rank owns, or receives, more than the cap of one."""
    buckets: list[list[Assignment]] = []
    busy: dict[int, int] = {}
    stored = 0
    weights: dict[int, tuple[int, int]] = {}
    for assignment in assignments:
        kind = like[assignment.matrix]
        if kind not in weights:
            tensor = tensors[matrices[kind].tensor]
            weights[kind] = _weights(tensor, matrices[kind].box, assignment.owners[0])
        size, part = (n * itemsize for n in weights[kind])
        most = max(busy.get(owner, 0) for owner in assignment.owners) + size
        if not buckets or max(most, stored + part) > cap:
            buckets.append([])
            busy, stored, most = {}, 0, size
        buckets[-1].append(assignment)
        stored += part
        for owner in assignment.owners:
            busy[owner] = busy.get(owner, 0) + size
    return tuple(tuple(bucket) for bucket in buckets)


def _weights(tensor: PlannedTensor, box: Box, owner: int) -> tuple[int, int]:
    """The number of elements of a box, all of which its owner receives, and of the largest part of
    it that a rank stores. Both are the same for every owner of the box. (The buffers from which an
    owner sends to all others are not counted: they are filled and sent in chunks.)
    """
    way = Direction(tensor.param_placement, tensor.shape, box, tensor.repeat)
    sizes = way.sizes(tensor.param_placement.where(owner, tensor.repeat)).values()
    return box_size(box), max(sizes, default=0)
