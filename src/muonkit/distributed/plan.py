"""The plan: which rank computes which matrix, and who sends what to whom. Pure Python, no tensors.

Ranks are positions (see `muonkit.distributed.placement`). The ranks that store parts of a matrix's
momentum send these to its owner, which computes the matrix whole; the owner sends the result back
to all who store a part of the parameter: at once, or where these are on several nodes in two
rounds (`muonkit.distributed.nodes`); or all ranks gather the results of all.
`muonkit.distributed.planner` makes the plan.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, NamedTuple

from muonkit.distributed.nodes import count_hops, share_nodes
from muonkit.distributed.placement import Box, Where, box_size
from muonkit.distributed.transfers import Direction, Matrix, PlannedTensor, alike

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

__all__ = [
    "PADDING",
    "Assignment",
    "Plan",
    "StepPlan",
    "Traffic",
    "Transfer",
    "Transfers",
    "fingerprint",
]

# An all-gather sends parts of one size; where these are more than so many times all results, every
# result is sent by itself.
PADDING = 9 / 8


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
    """One rank's part of an exchange: what it sends and receives, to and from itself included.

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
        sent_in: bytes sent to the owners.
        received_in: bytes received by the owners.
        sent_out: bytes sent by the owners.
        received_out: bytes received by the ranks that store the parameters.
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
        itemsize: bytes per element when it travels; 0 where nothing does.
        stage_itemsize: bytes per element of the stage's state.
        inward: whether anything is sent to the owners; False for AdamW's parameters.
        node: ranks in a node; all are in one where it is 0, or no less than there are.
        padding: an all-gather sends at most so many times as much as all results.
    """

    ranks: int
    tensors: tuple[PlannedTensor, ...]
    matrices: tuple[Matrix, ...]
    buckets: tuple[tuple[Assignment, ...], ...]
    itemsize: int
    stage_itemsize: int = 4
    inward: bool = True
    node: int = 0
    padding: float = PADDING

    @property
    def several_nodes(self) -> bool:
        """Whether results travel between nodes."""
        return 0 < self.node < self.ranks

    def assignments(self) -> Iterable[Assignment]:
        return (assignment for bucket in self.buckets for assignment in bucket)

    def apart(self, matrix: int, me: int) -> tuple[int, int]:
        """How many copies of a matrix are trained each by itself, and which one is this rank's."""
        tensor = self.tensors[self.matrices[matrix].tensor]
        placement = tensor.param_placement
        copies, mine = 1, 0
        for axis, at in placement.where(me, tensor.repeat):
            copies *= placement.mesh[axis]
            mine = mine * placement.mesh[axis] + at
        return copies, mine

    def inbound(self, bucket: Sequence[Assignment], me: int, *, state: bool = False) -> Transfers:
        """Momentum, from the ranks that store it to the owners; or a stage's `state`, whose boxes
        are in the state's coordinates.
        """
        return self._transfers_of(bucket, me, inward=True, state=state)

    def outbound(
        self, bucket: Sequence[Assignment], me: int, *, late: bool = False, state: bool = False
    ) -> Transfers:
        """Results, from the owners to the ranks that store the parameters, or a stage's `state` to
        those that store it. Between nodes it takes two rounds: `late` from relays.
        """
        if not self.several_nodes:
            return Transfers((), ()) if late else self._transfers_of(bucket, me, False, state)
        sends: list[Transfer] = []
        recvs: list[Transfer] = []
        for matrix, owners in bucket:
            way = self.direction(matrix, inward=False, state=state)
            for owner in owners:
                for source, to, box, second in way.hops(owner, self.node):
                    if second == late and source == me:
                        sends.append(Transfer(to, matrix, box))
                    if second == late and to == me:
                        recvs.append(Transfer(source, matrix, box))
        return _in_order(sends, recvs)

    def rank_transfers(
        self, bucket: Sequence[Assignment], me: int
    ) -> Iterator[tuple[str, Transfers, int]]:
        """The exchanges of a bucket in which each pair of ranks has its own message: "to_owners" or
        "to_params", this rank's part of it, and bytes per element.
        """
        for state, itemsize in self._travelling():
            if self.inward:
                there = self.inbound(bucket, me, state=state)
                yield "to_owners", self._taken(there, state), itemsize
            if not self.gathers(bucket, state):
                for late in (False, True):
                    back = self.outbound(bucket, me, late=late, state=state)
                    yield "to_params", self._taken(back, state), itemsize

    def gathered_bytes(self, bucket: Sequence[Assignment]) -> int:
        """What each rank puts into the bucket's all-gathers: every other rank gets all of it."""
        return sum(self.gathers(bucket, state) * size for state, size in self._travelling())

    def _travelling(self) -> Iterator[tuple[bool, int]]:
        """Whether it is the stage's state, and bytes per element, of what goes to and fro."""
        yield False, self.itemsize
        if self.has_stage_state:
            yield True, self.stage_itemsize

    def _taken(self, transfers: Transfers, state: bool) -> Transfers:
        """The boxes that travel, where some lines do; the state of a stage travels whole."""
        if state:
            return transfers
        sends, recvs = (
            tuple(t._replace(box=self.matrices[t.matrix].taken(t.box)) for t in some)
            for some in transfers
        )
        return Transfers(sends, recvs)

    def _transfers_of(
        self, bucket: Sequence[Assignment], me: int, inward: bool, state: bool = False
    ) -> Transfers:
        sends: list[Transfer] = []
        recvs: list[Transfer] = []
        mine, theirs = (sends, recvs) if inward else (recvs, sends)
        for assignment in bucket:
            way = self.direction(assignment.matrix, inward, state)
            parts = way.parts(me)
            for owner in assignment.owners:
                if way.counts(me, owner):
                    mine += [Transfer(owner, assignment.matrix, part) for part in parts]
                if me == owner:
                    theirs += [Transfer(p, assignment.matrix, box) for p, box in way.others(owner)]
        return _in_order(sends, recvs)

    def direction(self, matrix: int, inward: bool, state: bool = False) -> Direction:
        """The direction of a matrix, or of its stage's state: to the owner, or back."""
        number, box, _, stage_box, lines = self.matrices[matrix]
        tensor = self.tensors[number]
        shape, place = tensor.shape, tensor.state_placement if inward else tensor.param_placement
        if state:
            assert tensor.stage_placement is not None
            assert stage_box is not None
            shape, box, place = tensor.stage_shape, stage_box, tensor.stage_placement
            lines = None  # it travels whole
        return Direction(place, shape, box, place.copies() if inward else tensor.repeat, lines)

    def moves(self, bucket: Sequence[Assignment], inward: bool, state: bool = False) -> bool:
        """Whether anything of the bucket goes from one rank to another: the same on all ranks."""
        return any(
            {at for at, _ in self.direction(assignment.matrix, inward, state).others(owner)}
            != {owner}
            for assignment in bucket
            for owner in assignment.owners
        )

    def relays(self, bucket: Sequence[Assignment], state: bool = False) -> bool:
        """Whether any result of the bucket is passed on by a relay: the same on all ranks."""
        return self.several_nodes and any(
            hop.late
            for matrix, owners in bucket
            for way in [self.direction(matrix, inward=False, state=state)]
            for owner in owners
            for hop in way.hops(owner, self.node)
        )

    def gathers(self, bucket: Sequence[Assignment], state: bool = False) -> int:
        """How many elements each rank puts into an all-gather of the bucket's results: those of the
        rank that has most. 0 where owners send every rank its own instead: where not all ranks get
        all results, where they are two (of which each sends one message in any case) or on several
        nodes, or where the parts differ much in size.
        """
        if self.ranks < 3 or self.several_nodes:
            return 0
        sizes: dict[int, int] = {}
        for matrix, owners in bucket:
            way = self.direction(matrix, inward=False, state=state)
            if len(owners) > 1 or not way.to_all(self.ranks):
                return 0
            sizes[owners[0]] = sizes.get(owners[0], 0) + way.size(way.box)
        most = max(sizes.values(), default=0)
        return most if self.ranks * most <= self.padding * sum(sizes.values()) else 0

    def chunks(
        self, bucket: Sequence[Assignment], cap: int, state: bool = False, late: bool = False
    ) -> int:
        """In how many chunks owners send the results of a bucket (or `late`: relays), so that no
        rank's buffer is larger than the cap: it holds as many copies of a matrix as its owner
        sends.
        """
        itemsize = self.stage_itemsize if state else self.itemsize
        sent: dict[int, int] = {}
        for matrix, owners in bucket:
            way = self.direction(matrix, inward=False, state=state)
            for owner in owners:
                if self.several_nodes:
                    for source, to, box, second in way.hops(owner, self.node):
                        if second == late and source != to:
                            sent[source] = sent.get(source, 0) + way.size(box) * itemsize
                elif not late:
                    sizes = way.sizes(way.place.where(owner, way.axes))
                    away = sum(sizes.values()) - sizes.get(owner, 0)
                    sent[owner] = sent.get(owner, 0) + away * itemsize
        chunks = -(-max(sent.values(), default=0) // cap)
        return min(max(chunks, 1), max(self.ranks - 1, 1))

    @property
    def has_stage_state(self) -> bool:
        """Whether a stage's state travels too."""
        return any(tensor.stage_placement is not None for tensor in self.tensors)

    def traffic(self, node: int = 1) -> Traffic:
        """The costs of the step for each rank, those of the stage's state included.

        Args:
            node: ranks in a node; bytes are counted that go from one node to another, by default
                from one rank to another. Of a plan for several nodes: 1, or the ranks in these.
        """
        if self.several_nodes and node not in (1, self.node):
            raise ValueError(f"planned for nodes of {self.node} ranks, got node={node}")
        total = Traffic(*([0] * self.ranks for _ in Traffic._fields))
        for matrix, owners in self.assignments():
            flops = self.matrices[matrix].flops
            for owner in owners:
                total.flops[owner] += flops
        kinds = self._kinds(inward=self.inward)
        if self.inward:  # AdamW's parts are not orthogonalized
            for matrix, count in kinds.items():
                size = box_size(self.matrices[matrix].taken(self.matrices[matrix].box))
                for owner, number in count.items():
                    total.matrices[owner] += number
                    total.owned[owner] += number * size
        for state, _ in self._travelling():
            if self.inward:
                for matrix, count in kinds.items():
                    self._count(total, matrix, count, True, state, node)
            apart = []
            for bucket in self.buckets:
                size = self.gathers(bucket, state)
                if size:
                    self._count_gathered(total, size, state, node)
                else:
                    apart.append(bucket)
            alike_in = all(t.state_placement == t.param_placement for t in self.tensors)
            back = kinds
            if not (self.inward and alike_in and len(apart) == len(self.buckets)):
                back = self._kinds(False, apart)
            for matrix, count in back.items():
                self._count(total, matrix, count, False, state, node)
        return total

    def _kinds(
        self, inward: bool, buckets: Sequence[Sequence[Assignment]] | None = None
    ) -> dict[int, dict[int, int]]:
        """How many matrices of each kind every owner has, in all buckets or in these; a kind by its
        first matrix.
        """
        like = alike(self.tensors, self.matrices, inward)
        kinds: dict[int, dict[int, int]] = {}
        for bucket in self.buckets if buckets is None else buckets:
            for matrix, owners in bucket:
                count = kinds.setdefault(like[matrix], {})
                for owner in owners:
                    count[owner] = count.get(owner, 0) + 1
        return kinds

    def _count_gathered(self, total: Traffic, size: int, state: bool, node: int) -> None:
        """Add the bytes of an all-gather: every rank's part goes to all others."""
        each = size * (self.stage_itemsize if state else self.itemsize)
        of_node = _by_node(dict.fromkeys(range(self.ranks), 1), node)
        for rank in range(self.ranks):
            away = self.ranks - of_node[rank // node]
            total.sent_out[rank] += each * away
            total.received_out[rank] += each * away

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
        way = self.direction(matrix, inward, state)
        itemsize = self.stage_itemsize if state else self.itemsize
        partners: dict[Where, list[int]] = {}
        for owner in assignments:
            partners.setdefault(way.place.where(owner, way.axes), []).append(owner)
        for where, owners in partners.items():
            if not inward and self.several_nodes and share_nodes(way.pieces(owners[0]), self.node):
                pieces = [(way.size(box), at) for box, at in way.pieces(owners[0])]
                some = {owner: assignments[owner] for owner in owners}
                counted = count_hops(pieces, some, self.node, within=node == 1)
                for column, sums in zip((here, there), counted, strict=True):
                    for position, elements in sums.items():
                        column[position] += elements * itemsize
                continue
            sizes = way.sizes(where)
            together, of_node = sum(sizes.values()), _by_node(sizes, node)
            count, in_node = 0, _by_node({owner: assignments[owner] for owner in owners}, node)
            for owner in owners:
                count += assignments[owner]
                away = together - of_node.get(owner // node, 0)
                here[owner] += away * assignments[owner] * itemsize
            for position, size in sizes.items():
                there[position] += size * (count - in_node.get(position // node, 0)) * itemsize


class StepPlan(NamedTuple):
    """Everything that one step exchanges and computes, on every rank.

    Attributes:
        ranks: how many there are.
        plans: what ranks compute where it is, then what they exchange.
        counts: how often each of `plans` is there.
    """

    ranks: int
    plans: tuple[Plan, ...]
    counts: tuple[int, ...]

    def traffic(self, node: int = 1) -> Traffic:
        """The costs of the step for each rank, as `Plan.traffic`."""
        total = Traffic(*([0] * self.ranks for _ in Traffic._fields))
        for plan, count in zip(self.plans, self.counts, strict=True):
            for sums, figures in zip(total, plan.traffic(node), strict=True):
                for rank, figure in enumerate(figures):
                    sums[rank] += count * figure
        return total

    def messages(self, position: int) -> dict[str, dict[int, int]]:
        """The bytes that the rank at this position sends to each other rank, by direction:
        "to_owners", "to_params" (the stage's state included), and "adamw" (the parameters
        themselves).
        """
        sent: dict[str, dict[int, int]] = {"to_owners": {}, "to_params": {}, "adamw": {}}
        for plan, count in zip(self.plans, self.counts, strict=True):
            for bucket in plan.buckets:
                for direction, transfers, itemsize in plan.rank_transfers(bucket, position):
                    to = sent[direction if plan.inward else "adamw"]
                    for at, _, box in transfers.sends:
                        if at != position and box_size(box):
                            to[at] = to.get(at, 0) + count * box_size(box) * itemsize
                for at in range(plan.ranks) if plan.gathered_bytes(bucket) else ():
                    if at != position:
                        to = sent["to_params" if plan.inward else "adamw"]
                        to[at] = to.get(at, 0) + count * plan.gathered_bytes(bucket)
        return sent


def fingerprint(plans: Iterable[Plan]) -> str:
    """Equal on two ranks only if they planned the same."""
    return hashlib.sha256(repr(tuple(plans)).encode()).hexdigest()


def _in_order(sends: list[Transfer], recvs: list[Transfer]) -> Transfers:
    """For each position in order of assignments, and of a matrix's parts: sorting is stable."""
    return Transfers(
        tuple(sorted(sends, key=lambda transfer: transfer.position)),
        tuple(sorted(recvs, key=lambda transfer: transfer.position)),
    )


def _by_node(counts: Mapping[int, int], node: int) -> Mapping[int, int]:
    """Sums over the positions of each node."""
    if node == 1:
        return counts
    sums: dict[int, int] = {}
    for position, count in counts.items():
        sums[position // node] = sums.get(position // node, 0) + count
    return sums
