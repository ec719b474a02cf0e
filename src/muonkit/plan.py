"""The plan: which rank computes which matrix, and who sends what to whom. Pure Python, no tensors.

One code plans a real step and simulates thousands of ranks. Ranks are positions (see
`muonkit.placement`). Of every matrix, the ranks that store parts of it send these to its owner,
which computes it whole; the owner sends the result back to all who store a part of the parameter.
Every rank makes the same plan by itself: it is a function of shapes, placements and constants.
"""

from __future__ import annotations

import functools
import hashlib
import heapq
from typing import TYPE_CHECKING, Any, NamedTuple

from muonkit._plan_batches import Item, PlannedBatch, default_cap, make_batches
from muonkit.placement import Box, Placement, box_size, pieces, whole

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

__all__ = [
    "MACHINES",
    "Errand",
    "Item",
    "Job",
    "Machine",
    "Matrix",
    "Parcel",
    "Plan",
    "PlannedBatch",
    "StepPlan",
    "Stored",
    "Traffic",
    "cheaper_repeated",
    "default_cap",
    "machine",
    "make_batches",
    "make_gather",
    "make_own",
    "make_plan",
    "sources",
    "targets",
]


class Stored(NamedTuple):
    """A parameter, as far as the plan needs to know it.

    Attributes:
        name: for messages.
        shape: the logical one.
        stored: where the parameter lies.
        lives: where its momentum lies: within `stored`, on the same mesh.
        repeat: mesh axes along which the same is computed again, rather than shared out and sent.
        state_shape, state_lives: of the variant's state, where it keeps one.
    """

    name: str
    shape: tuple[int, ...]
    stored: Placement
    lives: Placement
    repeat: tuple[int, ...] = ()
    state_shape: tuple[int, ...] = ()
    state_lives: Placement | None = None


class Matrix(NamedTuple):
    """One matrix of a parameter.

    Attributes:
        tensor: the parameter's index.
        box: of the parameter, which holds it.
        flops: that it costs to orthogonalize.
        state_box: of the variant's state, which belongs to it.
    """

    tensor: int
    box: Box
    flops: int
    state_box: Box | None = None


class Job(NamedTuple):
    """A matrix (by its index) and the ranks that compute it: one, or one in every repetition."""

    matrix: int
    owners: tuple[int, ...]


class Parcel(NamedTuple):
    """A box of the matrix `matrix`, to or from the rank at `position`."""

    position: int
    matrix: int
    box: Box


class Errand(NamedTuple):
    """One rank's part of an exchange: what it sends, and what it receives, its own included.

    Both are in order of positions, and for each position in order of jobs: the order in which the
    other side has it too.
    """

    sends: tuple[Parcel, ...]
    receives: tuple[Parcel, ...]

    @property
    def is_local(self) -> bool:
        """Whether all of it stays on the rank itself (which says nothing of other ranks)."""
        return len({parcel.position for parcel in (*self.sends, *self.receives)}) <= 1


class Traffic(NamedTuple):
    """What one step costs every rank, by position.

    Attributes:
        flops: of the products.
        matrices: orthogonalized.
        owned: elements of the matrices that it owns.
        sent_in, received_in: bytes on the way to the owners.
        sent_out, received_out: bytes on the way back.
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
        mean = sum(self.flops) / len(self.flops)
        return max(self.flops) / mean if mean else 1.0


class Plan(NamedTuple):
    """All exchanges of a step over parameters of equal hyperparameters.

    Attributes:
        ranks: how many positions there are.
        tensors, matrices: what is planned for.
        buckets: jobs that are exchanged together, in order.
        itemsize: bytes per element on the way.
        state_itemsize: the same of the variant's state.
        inward: whether there is a way to the owners; False where they have all they need.
    """

    ranks: int
    tensors: tuple[Stored, ...]
    matrices: tuple[Matrix, ...]
    buckets: tuple[tuple[Job, ...], ...]
    itemsize: int
    state_itemsize: int = 4
    inward: bool = True

    def jobs(self) -> Iterable[Job]:
        return (job for bucket in self.buckets for job in bucket)

    def inbound(self, bucket: Sequence[Job], me: int) -> Errand:
        """Momentum, from where it lives to the owners."""
        return self._errand(bucket, me, inward=True)

    def outbound(self, bucket: Sequence[Job], me: int) -> Errand:
        """Results, from the owners to where the parameters are stored."""
        return self._errand(bucket, me, inward=False)

    def state_inbound(self, bucket: Sequence[Job], me: int) -> Errand:
        """The variant's state, to the owners; boxes are in the state's coordinates."""
        return self._errand(bucket, me, inward=True, state=True)

    def state_outbound(self, bucket: Sequence[Job], me: int) -> Errand:
        """The variant's state, from the owners to everywhere where it lives."""
        return self._errand(bucket, me, inward=False, state=True)

    def errands(self, bucket: Sequence[Job], me: int) -> Iterator[tuple[str, Errand, int]]:
        """All ways of a bucket: "to_owners" or "to_params", this rank's part, bytes per element."""
        if self.inward:
            yield "to_owners", self.inbound(bucket, me), self.itemsize
        yield "to_params", self.outbound(bucket, me), self.itemsize
        if self.has_state:
            yield "to_owners", self.state_inbound(bucket, me), self.state_itemsize
            yield "to_params", self.state_outbound(bucket, me), self.state_itemsize

    def _errand(self, bucket: Sequence[Job], me: int, inward: bool, state: bool = False) -> Errand:
        sends: list[Parcel] = []
        receives: list[Parcel] = []
        for job in bucket:
            for owner in job.owners:
                others = self._others(job.matrix, owner, inward, state)
                mine, theirs = (sends, receives) if inward else (receives, sends)
                if me in others:
                    mine.append(Parcel(owner, job.matrix, others[me]))
                if me == owner:
                    theirs.extend(Parcel(p, job.matrix, box) for p, box in others.items())
        # Stable: for each position in order of jobs.
        return Errand(
            tuple(sorted(sends, key=lambda parcel: parcel.position)),
            tuple(sorted(receives, key=lambda parcel: parcel.position)),
        )

    def _others(self, matrix: int, owner: int, inward: bool, state: bool) -> dict[int, Box]:
        """Who exchanges which box of a matrix with this owner."""
        _, box, _, state_box = self.matrices[matrix]
        tensor = self.tensors[self.matrices[matrix].tensor]
        shape, stored, lives = tensor.shape, tensor.stored, tensor.lives
        if state:
            assert tensor.state_lives is not None
            assert state_box is not None
            shape, box, stored = tensor.state_shape, state_box, tensor.state_lives
            lives = stored
        if inward:
            return sources(lives, shape, box, owner)
        return targets(stored, shape, box, owner, tensor.repeat)

    def moves(self, bucket: Sequence[Job], inward: bool, state: bool = False) -> bool:
        """Whether anything of the bucket goes from one rank to another: the same on all ranks."""
        return any(
            set(self._others(job.matrix, owner, inward, state)) != {owner}
            for job in bucket
            for owner in job.owners
        )

    @property
    def has_state(self) -> bool:
        """Whether a variant's state travels too."""
        return any(tensor.state_lives is not None for tensor in self.tensors)

    def traffic(self) -> Traffic:
        """What the step costs each rank, the variant's state included."""
        total = Traffic(*([0] * self.ranks for _ in Traffic._fields))
        counts: dict[tuple[Any, ...], list[int]] = {}
        for job in self.jobs():
            tensor, box, flops, state_box = self.matrices[job.matrix]
            for owner in job.owners:
                total.flops[owner] += flops
                total.matrices[owner] += 1
                total.owned[owner] += box_size(box)
                # Equal parameters of many layers send alike.
                alike = (self.tensors[tensor]._replace(name=""), box, state_box, owner)
                counts.setdefault(alike, [job.matrix, 0])[1] += 1
        for alike, (matrix, count) in counts.items():
            self._count(total, matrix, alike[-1], count)
        return total

    def _count(self, total: Traffic, matrix: int, owner: int, count: int) -> None:
        for state in (False, True) if self.has_state else (False,):
            itemsize = (self.state_itemsize if state else self.itemsize) * count
            for inward in (True, False) if self.inward else (False,):
                there, here = (
                    (total.sent_in, total.received_in)
                    if inward
                    else (total.received_out, total.sent_out)
                )
                for position, box in self._others(matrix, owner, inward, state).items():
                    if position != owner:
                        size = box_size(box) * itemsize
                        there[position] += size
                        here[owner] += size

    def fingerprint(self) -> str:
        """Equal on two ranks only if they planned the same."""
        return hashlib.sha256(repr(self).encode()).hexdigest()


class StepPlan(NamedTuple):
    """Everything that one step exchanges and computes, on every rank."""

    plans: tuple[Plan, ...]

    def traffic(self) -> Traffic:
        """What the step costs each rank."""
        each = [plan.traffic() for plan in self.plans]
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
                for way, errand, itemsize in plan.errands(bucket, position):
                    name = way if plan.inward else "adamw"
                    for at, _, box in errand.sends:
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
    heaps: dict[tuple[int, ...], list[tuple[int, int]]] = {}
    jobs = []
    for i in sorted(range(len(matrices)), key=lambda i: (-matrices[i].flops, i)):
        tensor = tensors[matrices[i].tensor]
        able = _able(tensor.lives, tensor.shape, matrices[i].box, tensor.repeat)
        if able not in heaps:
            heaps[able] = [(loads[position], position) for position in able]
            heapq.heapify(heaps[able])
        owner = _lightest(heaps[able], loads)
        owners = tensor.lives.twins(owner, tensor.repeat) if tensor.repeat else (owner,)
        for position in owners:
            loads[position] += matrices[i].flops
        jobs.append(Job(i, owners))
    buckets = _fill(jobs, tensors, matrices, itemsize, cap)
    return Plan(ranks, tuple(tensors), tuple(matrices), buckets, itemsize, state_itemsize)


def make_own(
    ranks: int, tensors: Sequence[Stored], matrices: Sequence[Matrix], loads: list[int]
) -> Plan:
    """The plan of matrices that are whole wherever they are stored: nothing moves.

    Args:
        loads: FLOPs that each rank has already; added to.
    """
    jobs = []
    for i, matrix in enumerate(matrices):
        tensor = tensors[matrix.tensor]
        for piece in pieces(tensor.lives, tensor.shape, matrix.box):
            jobs.append(Job(i, piece.positions))
            for position in piece.positions:
                loads[position] += matrix.flops
    alone = tuple(tensor._replace(repeat=tensor.lives.copies()) for tensor in tensors)
    return Plan(ranks, alone, tuple(matrices), (tuple(jobs),), 0)


def make_gather(ranks: int, tensors: Sequence[Stored], itemsize: int, cap: int) -> Plan:
    """The plan of an elementwise step: every rank computes the part of the parameter that its state
    lives for, and sends it to all who store it.
    """
    matrices: list[Matrix] = []
    jobs: list[Job] = []
    for i, tensor in enumerate(tensors):
        for piece in pieces(tensor.lives, tensor.shape, whole(tensor.shape)):
            jobs.append(Job(len(matrices), piece.positions))
            matrices.append(Matrix(i, piece.box, 0))
    alone = [tensor._replace(repeat=tensor.lives.copies()) for tensor in tensors]
    buckets = _fill(jobs, alone, matrices, itemsize, cap)
    return Plan(ranks, tuple(alone), tuple(matrices), buckets, itemsize, inward=False)


def sources(lives: Placement, shape: tuple[int, ...], box: Box, owner: int) -> dict[int, Box]:
    """Who sends which part of a box to its owner: the owner itself what it has; of several copies
    the one that has the owner's place among the copies.
    """
    return _sources(lives, shape, box, lives.copy(owner))


@functools.lru_cache(maxsize=1 << 16)
def _sources(lives: Placement, shape: tuple[int, ...], box: Box, copy: int) -> dict[int, Box]:
    return {piece.positions[copy]: piece.box for piece in pieces(lives, shape, box)}


@functools.lru_cache(maxsize=1 << 16)
def targets(
    stored: Placement, shape: tuple[int, ...], box: Box, owner: int, repeat: tuple[int, ...]
) -> dict[int, Box]:
    """Who gets which part of a box from its owner: all who store it, and have none of their own
    repetition.
    """
    return {
        position: piece.box
        for piece in pieces(stored, shape, box)
        for position in piece.positions
        if not repeat or stored.agrees(position, owner, repeat)
    }


@functools.lru_cache(maxsize=1 << 16)
def _able(
    lives: Placement, shape: tuple[int, ...], box: Box, repeat: tuple[int, ...]
) -> tuple[int, ...]:
    """Who may own a matrix: whoever has a part of it, in the first repetition."""
    first = lives.positions[0]
    return tuple(
        sorted(
            position
            for piece in pieces(lives, shape, box)
            for position in piece.positions
            if not repeat or lives.agrees(position, first, repeat)
        )
    )


def _lightest(heap: list[tuple[int, int]], loads: list[int]) -> int:
    """The least loaded, lowest position; the heap's loads may be out of date, never too high."""
    while heap[0][0] != loads[heap[0][1]]:
        position = heap[0][1]
        heapq.heapreplace(heap, (loads[position], position))
    return heap[0][1]


def _fill(
    jobs: Sequence[Job],
    tensors: Sequence[Stored],
    matrices: Sequence[Matrix],
    itemsize: int,
    cap: int,
) -> tuple[tuple[Job, ...], ...]:
    """Jobs in buckets, in their order: none has a rank send or receive more than the cap."""
    buckets: list[list[Job]] = []
    busy: dict[int, int] = {}
    stored = 0
    for job in jobs:
        tensor, box = tensors[matrices[job.matrix].tensor], matrices[job.matrix].box
        size, part = (n * itemsize for n in _weights(tensor, box, job.owners[0]))
        most = max(busy.get(owner, 0) for owner in job.owners) + size
        if not buckets or max(most, stored + part) > cap:
            buckets.append([])
            busy, stored, most = {}, 0, size
        buckets[-1].append(job)
        stored += part
        for owner in job.owners:
            busy[owner] = busy.get(owner, 0) + size
    return tuple(tuple(bucket) for bucket in buckets)


def _weights(tensor: Stored, box: Box, owner: int) -> tuple[int, int]:
    """Elements of a box that its owner handles at most, and of those any one rank stores."""
    return _weights_of(tensor.stored, tensor.shape, box, owner, tensor.repeat)


@functools.lru_cache(maxsize=1 << 16)
def _weights_of(
    stored: Placement, shape: tuple[int, ...], box: Box, owner: int, repeat: tuple[int, ...]
) -> tuple[int, int]:
    sizes = [box_size(part) for part in targets(stored, shape, box, owner, repeat).values()]
    return max(sum(sizes), box_size(box)), max(sizes, default=0)


class Machine(NamedTuple):
    """Rates of one rank, for choices of cost and for predictions.

    Attributes:
        flops: products, FLOP/s.
        intra, inter: bytes/s that it sends within its node, and to others.
        node: ranks in a node.
    """

    flops: float
    intra: float
    inter: float
    node: int

    def rate(self, positions: Iterable[int]) -> float:
        """Bytes/s between these ranks."""
        nodes = {position // self.node for position in positions}
        return self.intra if len(nodes) <= 1 else self.inter


# Round figures for the choice between computing again and sending: half of what data sheets say.
# GPUs as an H100 with NVLink and 400 Gbit/s a rank, bf16 products; CPUs two cores and Ethernet.
MACHINES = {"cpu": (1e11, 2e9, 1e9), "cuda": (4e14, 2e11, 2.5e10)}


def machine(device: str, node: int) -> Machine:
    """The rates assumed for a type of device."""
    return Machine(*MACHINES.get(device, MACHINES["cuda"]), node)


def cheaper_repeated(
    rates: Machine, stored: Placement, axes: Sequence[int], flops: int, size: int
) -> bool:
    """Whether ranks that have copies along these axes had better compute the same, each set of
    shards among itself, than share the matrices out over all copies.

    Shared out, a rank computes less, and every result crosses the copies.

    Args:
        flops: of all matrices.
        size: their bytes on the way.
    """
    copies = 1
    for axis in axes:
        copies *= stored.mesh[axis]
    ranks = len(stored.positions)
    shards = ranks // copies
    others = [axis for axis in range(len(stored.mesh)) if axis not in axes]
    one_set = stored.twins(stored.positions[0], others)
    repeated = flops / shards / rates.flops
    repeated += 2 * (shards - 1) / shards**2 * size / rates.rate(one_set)
    shared = flops / ranks / rates.flops
    shared += (shards - 1) / shards * size / ranks / rates.rate(one_set)  # a set's own parts
    shared += (ranks - 1) / ranks * size / shards / rates.rate(stored.positions)
    return repeated <= shared
