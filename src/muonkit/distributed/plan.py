"""The plan: which rank computes which matrix, and who sends what to whom. Pure Python, no tensors.

One code plans a real step and simulates thousands of ranks. Ranks are positions (see
`muonkit.distributed.placement`). Of every matrix, the ranks that store parts of it send these to
its owner, which computes it whole; the owner sends the result back to all who store a part of the
parameter. Every rank makes the same plan by itself: it is a function of shapes, placements and
constants.
"""

from __future__ import annotations

import hashlib
import heapq
import math
from typing import TYPE_CHECKING, NamedTuple

from muonkit.distributed.machines import MACHINES, Machine, cheaper_repeated, machine
from muonkit.distributed.placement import Box, Where, box_size, pieces, whole
from muonkit.distributed.plan_batches import Item, PlannedBatch, default_cap, make_batches
from muonkit.distributed.transfers import Direction, Matrix, Stored, alike

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

__all__ = [
    "MACHINES",
    "Assignment",
    "Item",
    "Machine",
    "Matrix",
    "Plan",
    "PlannedBatch",
    "StepPlan",
    "Stored",
    "Traffic",
    "Transfer",
    "Transfers",
    "cheaper_repeated",
    "default_cap",
    "machine",
    "make_batches",
    "make_gather",
    "make_own",
    "make_plan",
]


class Assignment(NamedTuple):
    """A matrix (by its index) and the ranks that compute it: one, or one in every repetition."""

    matrix: int
    owners: tuple[int, ...]


class Transfer(NamedTuple):
    """A box of the matrix `matrix`, to or from the rank at `position`."""

    position: int
    matrix: int
    box: Box


class Transfers(NamedTuple):
    """One rank's part of an exchange: what it sends, and what it receives, its own included.

    Both are in order of positions, and for each position in order of assignments: the order in
    which the other side has it too.
    """

    sends: tuple[Transfer, ...]
    recvs: tuple[Transfer, ...]


class Traffic(NamedTuple):
    """What one step costs every rank, by position.

    Attributes:
        flops: of the products.
        matrices: orthogonalized.
        owned: elements of the matrices that it owns.
        sent_in: bytes on the way to the owners.
        received_in: the same, at the owners.
        sent_out: bytes on the way back.
        received_out: the same, where the parameters are stored.
    """

    flops: list[int]
    matrices: list[int]
    owned: list[int]
    sent_in: list[int]
    received_in: list[int]
    sent_out: list[int]
    received_out: list[int]

    @property
    def balance(self) -> float:
        """Largest over mean of the ranks' FLOPs."""
        total = sum(self.flops)
        return max(self.flops) * len(self.flops) / total if total else 1.0


class Plan(NamedTuple):
    """All exchanges of a step over parameters of equal hyperparameters.

    Attributes:
        ranks: how many positions there are.
        tensors, matrices: what is planned for.
        buckets: assignments that are exchanged together, in order.
        itemsize: bytes per element on the way.
        state_itemsize: the same of the variant's state.
        inward: whether there is a way to the owners; False where they have all they need.
    """

    ranks: int
    tensors: tuple[Stored, ...]
    matrices: tuple[Matrix, ...]
    buckets: tuple[tuple[Assignment, ...], ...]
    itemsize: int
    state_itemsize: int = 4
    inward: bool = True

    def assignments(self) -> Iterable[Assignment]:
        return (assignment for bucket in self.buckets for assignment in bucket)

    def inbound(self, bucket: Sequence[Assignment], me: int) -> Transfers:
        """Momentum, from where it lives to the owners."""
        return self._transfers_of(bucket, me, inward=True)

    def outbound(self, bucket: Sequence[Assignment], me: int) -> Transfers:
        """Results, from the owners to where the parameters are stored."""
        return self._transfers_of(bucket, me, inward=False)

    def state_inbound(self, bucket: Sequence[Assignment], me: int) -> Transfers:
        """The variant's state, to the owners; boxes are in the state's coordinates."""
        return self._transfers_of(bucket, me, inward=True, state=True)

    def state_outbound(self, bucket: Sequence[Assignment], me: int) -> Transfers:
        """The variant's state, from the owners to everywhere where it lives."""
        return self._transfers_of(bucket, me, inward=False, state=True)

    def rank_transfers(
        self, bucket: Sequence[Assignment], me: int
    ) -> Iterator[tuple[str, Transfers, int]]:
        """All ways of a bucket: "to_owners" or "to_params", this rank's part, bytes per element."""
        if self.inward:
            yield "to_owners", self.inbound(bucket, me), self.itemsize
        yield "to_params", self.outbound(bucket, me), self.itemsize
        if self.has_state:
            yield "to_owners", self.state_inbound(bucket, me), self.state_itemsize
            yield "to_params", self.state_outbound(bucket, me), self.state_itemsize

    def _transfers_of(
        self, bucket: Sequence[Assignment], me: int, inward: bool, state: bool = False
    ) -> Transfers:
        sends: list[Transfer] = []
        recvs: list[Transfer] = []
        mine, theirs = (sends, recvs) if inward else (recvs, sends)
        for assignment in bucket:
            way = self._way(assignment.matrix, inward, state)
            parts = way.parts(me)
            for owner in assignment.owners:
                if way.counts(me, owner):
                    mine += [Transfer(owner, assignment.matrix, part) for part in parts]
                if me == owner:
                    theirs += [Transfer(p, assignment.matrix, box) for p, box in way.others(owner)]
        # Stable: for each position in order of assignments, and of a matrix's parts.
        return Transfers(
            tuple(sorted(sends, key=lambda transfer: transfer.position)),
            tuple(sorted(recvs, key=lambda transfer: transfer.position)),
        )

    def _way(self, matrix: int, inward: bool, state: bool) -> Direction:
        """How a matrix, or the variant's state that belongs to it, goes to its owner or back."""
        number, box, _, state_box = self.matrices[matrix]
        tensor = self.tensors[number]
        shape, place = tensor.shape, tensor.lives if inward else tensor.stored
        if state:
            assert tensor.state_lives is not None
            assert state_box is not None
            shape, box, place = tensor.state_shape, state_box, tensor.state_lives
        return Direction(place, shape, box, place.copies() if inward else tensor.repeat)

    def moves(self, bucket: Sequence[Assignment], inward: bool, state: bool = False) -> bool:
        """Whether anything of the bucket goes from one rank to another: the same on all ranks."""
        return any(
            {at for at, _ in self._way(assignment.matrix, inward, state).others(owner)} != {owner}
            for assignment in bucket
            for owner in assignment.owners
        )

    def turns(self, bucket: Sequence[Assignment], cap: int, state: bool = False) -> int:
        """In how many turns the way out of a bucket has to be taken, so that no rank's buffer is
        larger than the cap: an owner has as many copies in it as it sends.
        """
        sent: dict[int, int] = {}
        for matrix, owners in bucket:
            way = self._way(matrix, inward=False, state=state)
            itemsize = self.state_itemsize if state else self.itemsize
            for owner in owners:
                sizes = way.sizes(way.place.where(owner, way.axes))
                away = sum(sizes.values()) - sizes.get(owner, 0)
                sent[owner] = sent.get(owner, 0) + away * itemsize
        turns = -(-max(sent.values(), default=0) // cap)
        return min(max(turns, 1), max(self.ranks - 1, 1))

    @property
    def has_state(self) -> bool:
        """Whether a variant's state travels too."""
        return any(tensor.state_lives is not None for tensor in self.tensors)

    def traffic(self, node: int = 1) -> Traffic:
        """What the step costs each rank, the variant's state included.

        Args:
            node: ranks in a node; bytes are counted that go from one node to another, by default
                from one rank to another.
        """
        total = Traffic(*([0] * self.ranks for _ in Traffic._fields))
        for matrix, owners in self.assignments():
            flops = self.matrices[matrix].flops
            for owner in owners:
                total.flops[owner] += flops
        kinds = self._kinds(inward=self.inward)
        if self.inward:  # AdamW's parts are not orthogonalized
            for matrix, count in kinds.items():
                size = box_size(self.matrices[matrix].box)
                for owner, number in count.items():
                    total.matrices[owner] += number
                    total.owned[owner] += number * size
        for inward in (True, False) if self.inward else (False,):
            if self.inward and not inward and any(t.lives != t.stored for t in self.tensors):
                kinds = self._kinds(inward)
            for matrix, count in kinds.items():
                for state in (False, True) if self.has_state else (False,):
                    self._count(total, matrix, count, inward, state, node)
        return total

    def _kinds(self, inward: bool) -> dict[int, dict[int, int]]:
        """How many matrices of each kind every owner has; a kind by its first matrix."""
        like = alike(self.tensors, self.matrices, inward)
        kinds: dict[int, dict[int, int]] = {}
        for matrix, owners in self.assignments():
            count = kinds.setdefault(like[matrix], {})
            for owner in owners:
                count[owner] = count.get(owner, 0) + 1
        return kinds

    def _count(
        self,
        total: Traffic,
        matrix: int,
        assignments: dict[int, int],
        inward: bool,
        state: bool,
        node: int,
    ) -> None:
        """Add the bytes that all assignments of a kind send in one direction, by owner; they are
        alike for all owners who deal with the same ranks.
        """
        there, here = (
            (total.sent_in, total.received_in) if inward else (total.received_out, total.sent_out)
        )
        way = self._way(matrix, inward, state)
        itemsize = self.state_itemsize if state else self.itemsize
        partners: dict[Where, list[int]] = {}
        for owner in assignments:
            partners.setdefault(way.place.where(owner, way.axes), []).append(owner)
        for where, owners in partners.items():
            sizes = way.sizes(where)
            together, of_node = sum(sizes.values()), _by_node(sizes, node)
            count, in_node = 0, _by_node({owner: assignments[owner] for owner in owners}, node)
            for owner in owners:
                count += assignments[owner]
                away = together - of_node.get(owner // node, 0)
                here[owner] += away * assignments[owner] * itemsize
            for position, size in sizes.items():
                there[position] += size * (count - in_node.get(position // node, 0)) * itemsize

    def fingerprint(self) -> str:
        """Equal on two ranks only if they planned the same."""
        return hashlib.sha256(repr(self).encode()).hexdigest()


class StepPlan(NamedTuple):
    """Everything that one step exchanges and computes, on every rank."""

    ranks: int
    plans: tuple[Plan, ...]

    def traffic(self, node: int = 1) -> Traffic:
        """What the step costs each rank; bytes between nodes of so many ranks only."""
        nothing = Traffic(*([0] * self.ranks for _ in Traffic._fields))
        each = [nothing, *(plan.traffic(node) for plan in self.plans)]
        return Traffic(
            *([sum(ns) for ns in zip(*column, strict=True)] for column in zip(*each, strict=True))
        )

    def messages(self, position: int) -> dict[str, dict[int, int]]:
        """What the rank at this position sends: bytes to each other one, by way: "to_owners",
        "to_params" (the variant's state included), and "adamw" (the parameters themselves).
        """
        sent: dict[str, dict[int, int]] = {"to_owners": {}, "to_params": {}, "adamw": {}}
        for plan in self.plans:
            for bucket in plan.buckets:
                for way, transfers, itemsize in plan.rank_transfers(bucket, position):
                    name = way if plan.inward else "adamw"
                    for at, _, box in transfers.sends:
                        if at != position and box_size(box):
                            to = sent[name]
                            to[at] = to.get(at, 0) + box_size(box) * itemsize
        return sent

    def fingerprint(self) -> str:
        """Equal on two ranks only if they planned the same."""
        return hashlib.sha256(
            " ".join(plan.fingerprint() for plan in self.plans).encode()
        ).hexdigest()


def make_plan(
    ranks: int,
    tensors: Sequence[Stored],
    matrices: Sequence[Matrix],
    itemsize: int,
    cap: int,
    loads: list[int] | None = None,
    state_itemsize: int = 4,
) -> Plan:
    """Owners by FLOPs, longest first, each to the least loaded rank that stores a part of it (LPT,
    Graham 1969); then buckets, in the same order, so that each is about balanced too.

    Args:
        cap: bytes that a rank may have in flight for one bucket; a larger matrix goes alone.
        loads: FLOPs that each rank has already; added to.
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
        owners = tensor.lives.twins(owner, tensor.repeat) if tensor.repeat else (owner,)
        for position in owners:
            loads[position] += matrices[i].flops
        assignments.append(Assignment(i, owners))
    buckets = _fill(assignments, tensors, matrices, itemsize, cap, like)
    return Plan(ranks, tuple(tensors), tuple(matrices), buckets, itemsize, state_itemsize)


def make_own(
    ranks: int, tensors: Sequence[Stored], matrices: Sequence[Matrix], loads: list[int]
) -> Plan:
    """The plan of matrices that are whole wherever they are stored: nothing moves.

    Args:
        loads: FLOPs that each rank has already; added to.
    """
    assignments = []
    for i, matrix in enumerate(matrices):
        tensor = tensors[matrix.tensor]
        for piece in pieces(tensor.lives, tensor.shape, matrix.box):
            assignments.append(Assignment(i, piece.positions))
            for position in piece.positions:
                loads[position] += matrix.flops
    alone = tuple(tensor._replace(repeat=tensor.lives.copies()) for tensor in tensors)
    return Plan(ranks, alone, tuple(matrices), (tuple(assignments),), 0)


def make_gather(
    ranks: int, tensors: Sequence[Stored], itemsize: int, cap: int | None = None
) -> Plan:
    """The plan of an elementwise step: every rank computes the part of the parameter that its state
    lives for, and sends it to all who store it.

    Args:
        cap: bytes that a rank may send in one bucket, for which parts are cut on their first dim;
            None is all in one.
    """
    matrices: list[Matrix] = []
    buckets: list[list[Assignment]] = [[]]
    busy = 0
    alone = [tensor._replace(repeat=tensor.lives.copies()) for tensor in tensors]
    for i, tensor in enumerate(alone):
        parts = pieces(tensor.lives, tensor.shape, whole(tensor.shape))
        if not parts:
            continue
        axes = [axis for axis in tensor.stored.copies() if axis not in tensor.repeat]
        others = math.prod(tensor.stored.mesh[axis] for axis in axes) - 1
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
    return Plan(ranks, tuple(alone), tuple(matrices), filled, itemsize, inward=False)


def _kth(box: Box, k: int, cuts: int) -> Box:
    """The k-th of so many parts of a box, cut on its first dim."""
    if cuts == 1:
        return box
    (start, stop), *rest = box
    step = -(-(stop - start) // cuts)
    return ((min(start + k * step, stop), min(start + (k + 1) * step, stop)), *rest)


def _by_node(counts: Mapping[int, int], node: int) -> Mapping[int, int]:
    """Sums over the positions of each node."""
    if node == 1:
        return counts
    sums: dict[int, int] = {}
    for position, count in counts.items():
        sums[position // node] = sums.get(position // node, 0) + count
    return sums


def _able(tensor: Stored, box: Box) -> tuple[int, ...]:
    """Who may own a matrix: whoever has a part of it, in the first repetition."""
    first = tensor.lives.where(tensor.lives.positions[0], tensor.repeat)
    parts = pieces(tensor.lives, tensor.shape, box, first)
    return tuple(sorted({position for piece in parts for position in piece.positions}))


def _lightest(heap: list[tuple[int, int]], loads: list[int]) -> int:
    """The least loaded, lowest position; the heap's loads may be out of date, never too high."""
    while heap[0][0] != loads[heap[0][1]]:
        position = heap[0][1]
        heapq.heapreplace(heap, (loads[position], position))
    return heap[0][1]


def _fill(
    assignments: Sequence[Assignment],
    tensors: Sequence[Stored],
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


def _weights(tensor: Stored, box: Box, owner: int) -> tuple[int, int]:
    """The size of a box, which its owner has whole, and of the largest part of it that a rank
    stores. Both are the same for every owner of the box. (The buffers from which an owner sends to
    all others are not counted: they are filled and sent in chunks.)
    """
    way = Direction(tensor.stored, tensor.shape, box, tensor.repeat)
    sizes = way.sizes(tensor.stored.where(owner, tensor.repeat)).values()
    return box_size(box), max(sizes, default=0)
