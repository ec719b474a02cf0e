"""Parameters that several ranks share: their plan, and the batches of a step over it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch

from muonkit.batching import (
    MatrixRef,
    MatrixStack,
    MomentumShards,
    ParamShards,
    multiply_,
    norms_of,
    place,
)
from muonkit.distributed.exchange import Exchange, Pending, add_up, gather, move, slots
from muonkit.distributed.placement import Box, Placement, box_size, slices
from muonkit.distributed.plan import Assignment, Plan, Transfers
from muonkit.distributed.plan_batches import Item, cap_of, make_batches
from muonkit.groups import computed_dtype, momentum_dtype

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor

    from muonkit.batching import LocalParam
    from muonkit.distributed.exchange import Domain
    from muonkit.distributed.planner import PlannedParams
    from muonkit.distributed.transfers import PlannedTensor
    from muonkit.views import Block

__all__ = ["ShardedGroup", "exchange_dtype", "stage_dtype", "update_dtype"]


def update_dtype(p: Tensor, grad_dtype: torch.dtype, group: Mapping[str, Any]) -> torch.dtype:
    """The dtype in which the update of a parameter is computed, and by default exchanged."""
    most = torch.promote_types(p.dtype, torch.float32)
    dtype = computed_dtype(grad_dtype, momentum_dtype(group, p))
    return most if dtype.itemsize > most.itemsize else dtype


def exchange_dtype(p: Tensor, grad_dtype: torch.dtype, group: Mapping[str, Any]) -> torch.dtype:
    """The dtype in which the update of a parameter is exchanged."""
    chosen = group["exchange_dtype"]
    return update_dtype(p, grad_dtype, group) if chosen == "auto" else getattr(torch, chosen)


def stage_dtype(p: Tensor) -> torch.dtype:
    """The dtype in which the stage's state is exchanged."""
    return torch.promote_types(p.dtype, torch.float32)


T = TypeVar("T")


class _Part(NamedTuple):
    """A box of a matrix that this rank has, and where it lies in the rank's own tensor."""

    matrix: int
    box: Box
    cut: tuple[slice, ...]

    def of(self, tensor: Tensor) -> Tensor:
        """This part of a tensor; a view of its memory."""
        return tensor[self.cut]


class _Rounds:
    """How a bucket's results, or the stage's state, come back from the owners.

    Attributes:
        moves_in, moves: whether any rank sends anything to the owners, and back.
        gathered: see `Plan.gathers`.
        late: what relays pass on in a second round; None where there are none.
        chunks: of the first round and the second.
    """

    def __init__(
        self, plan: Plan, bucket: tuple[Assignment, ...], me: int, cap: int, state: bool
    ) -> None:
        self.moves_in, self.moves = (plan.moves(bucket, inward, state) for inward in (True, False))
        self.gathered = plan.gathers(bucket, state)
        outbound = plan.stage_outbound if state else plan.outbound
        self.late: Transfers | None = None
        self.chunks = [plan.chunks(bucket, cap, state)]
        if plan.relays(bucket, state):
            self.late = outbound(bucket, me, late=True)
            self.chunks.append(plan.chunks(bucket, cap, state, late=True))


class _Bucket:
    """One bucket of the plan, and this rank's part in it; the same in every step."""

    def __init__(self, sharded: ShardedGroup, assignments: tuple[Assignment, ...]) -> None:
        plan, me = sharded.plan, sharded.domain.position
        every = assignments
        if sharded.in_blocks:  # those alone that this rank stores: others have far more of them
            assignments = tuple(
                each for each in every if sharded.parts(each.matrix, "param_placement")
            )
        self.assignments = assignments
        self.inbound, self.outbound = plan.inbound(assignments, me), plan.outbound(assignments, me)
        self.stage_inbound: Transfers | None = None
        if plan.has_stage_state:
            self.stage_inbound = plan.stage_inbound(assignments, me)
            self.stage_outbound = plan.stage_outbound(assignments, me)
        self.rounds = {
            state: _Rounds(plan, every, me, sharded.cap, state)
            for state in ((False, True) if plan.has_stage_state else (False,))
        }
        # Of blocks that stay where they are nothing is rounded.
        moves = any(rounds.moves_in or rounds.moves for rounds in self.rounds.values())
        self.comm_dtype = sharded.comm_dtype if moves or not sharded.in_blocks else sharded.dtype
        self.param_shards: dict[tuple[int, int, bool], list[_Part]] = {}
        shards: dict[tuple[Any, ...], list[_Part]] = {}
        sent = {(matrix, box) for _, matrix, box in self.inbound.sends}
        for assignment in assignments:
            param, block, _, cut = sharded.blocks[assignment.matrix]
            for part in sharded.parts(assignment.matrix, "state_placement"):
                shape = [b - a for a, b in part.box]
                only_kept = (part.matrix, part.box) not in sent
                key = (only_kept, *shape, sharded.grad_dtypes[param])
                shards.setdefault(key, []).append(part)
            for part in sharded.parts(assignment.matrix, "param_placement"):
                self.param_shards.setdefault((block.rows, block.cols, cut), []).append(part)
        # The parts of each stack, and whether they are only kept; these last.
        self.momentum_shards = [
            (parts, key[0]) for key, parts in sorted(shards.items(), key=lambda item: item[0][0])
        ]
        self.stacked = {
            (part.matrix, part.box): (stack, k)
            for stack, (members, _) in enumerate(self.momentum_shards)
            for k, part in enumerate(members)
        }
        self.numbers = {each.matrix: number for number, each in enumerate(assignments)}
        self.indices: dict[tuple[int, ...], Tensor] = {}
        self.copies: Tensor | None = None  # ranks that store each part of `param_shards`
        self.batches = self._batches(
            sharded, [assignment.matrix for assignment in assignments if me in assignment.owners]
        )

    def _batches(self, sharded: ShardedGroup, owned: list[int]) -> list[tuple[int, int, list[int]]]:
        """Rows, columns and matrices of what is computed together, equal shapes side by side."""
        blocks = {matrix: sharded.blocks[matrix].block for matrix in owned}
        kind = sharded.domain.device.type
        # Copies that are computed again elsewhere must come out the same to the bit: matrices of
        # other ranks' choice do not share their batch.
        items = [
            Item(sharded.tensor(matrix).repeat, kind, 1, b.rows, b.cols, sharded.dtype.itemsize)
            for matrix, b in blocks.items()
        ]
        return [
            (
                batch.rows,
                batch.cols,
                sorted(
                    (owned[i] for i in batch.positions),
                    key=lambda matrix: (blocks[matrix].rows, blocks[matrix].cols, matrix),
                ),
            )
            for batch in make_batches(tuple(items), sharded.group["bytes_in_flight"])
        ]


class ShardedGroup:
    """Parameters of one group, of equal dtypes, that several ranks compute for one another.

    Args:
        grads: dtypes of the gradients, by the parameters' indices in the group.
        shared: their plan.
    """

    def __init__(
        self,
        domain: Domain,
        group: dict[str, Any],
        grads: Mapping[int, torch.dtype],
        shared: PlannedParams,
    ) -> None:
        self.domain, self.group = domain, group
        self.plan, self.blocks = shared.plan, shared.blocks
        self.in_blocks = shared.in_blocks
        self.params: dict[int, Tensor] = {i: group["params"][i] for i in shared.params}
        self.grad_dtypes = {i: grads[i] for i in shared.params}
        first = shared.params[0]
        p, grad_dtype = self.params[first], grads[first]
        self.dtype = update_dtype(p, grad_dtype, group)
        self.comm_dtype = exchange_dtype(p, grad_dtype, group)
        self.stage_dtype = stage_dtype(p)
        self.cap: int = cap_of(domain.device.type, group["bytes_in_flight"])
        self._stage_cuts: dict[tuple[int, Box], tuple[slice, ...]] = {}
        self.buckets = [_Bucket(self, assignments) for assignments in self.plan.buckets]

    def tensor(self, matrix: int) -> PlannedTensor:
        """The parameter that a matrix is of."""
        return self.plan.tensors[self.plan.matrices[matrix].tensor]

    def parts(self, matrix: int, where: str) -> list[_Part]:
        """The parts of a matrix that this rank stores: of the parameter ("param_placement"), or of
        the momentum ("state_placement").
        """
        tensor, me = self.tensor(matrix), self.domain.position
        placement: Placement = getattr(tensor, where)
        boxes = placement.parts(tensor.shape, me, self.plan.matrices[matrix].box)
        return [_Part(matrix, box, placement.slices(tensor.shape, me, box)) for box in boxes]

    def momentum_piece(self, part: _Part, shard: Tensor) -> Tensor:
        """The piece of this rank's shard of a parameter that lies where its momentum is kept."""
        planned = self.tensor(part.matrix)
        return shard[planned.param_placement.slices(planned.shape, self.domain.position, part.box)]

    def stage_piece(self, matrix: int, box: Box, tensor: Tensor) -> Tensor:
        """A box of the stage's state, of this rank's own tensor of it."""
        if (matrix, box) not in self._stage_cuts:
            planned = self.tensor(matrix)
            assert planned.stage_placement is not None
            self._stage_cuts[matrix, box] = planned.stage_placement.slices(
                planned.stage_shape, self.domain.position, box
            )
        return tensor[self._stage_cuts[matrix, box]]

    def batches(self, entries: Mapping[int, LocalParam]) -> list[ShardedBatch]:
        """The batches of a step.

        Args:
            entries: by the parameters' indices in the group.
        """
        return [ShardedBatch(self, bucket, entries) for bucket in self.buckets]


class ShardedBatch:
    """A bucket of matrices that several ranks have parts of.

    The pieces of the momentum go to the owners, the results to all ranks that store parts of the
    parameter: one exchange each. The stage's state has exchanges of its own.
    """

    def __init__(
        self, sharded: ShardedGroup, bucket: _Bucket, entries: Mapping[int, LocalParam]
    ) -> None:
        self.sharded, self.bucket, self.entries = sharded, bucket, entries
        self.momentum_shards = [
            MomentumShards(
                [part.of(self._entry(part.matrix).grad) for part in members],
                [part.of(self._entry(part.matrix).momentum) for part in members],
                sharded.params[sharded.blocks[members[0].matrix].param].dtype,
                only_kept,
            )
            for members, only_kept in bucket.momentum_shards
        ]
        self.param_shards = [
            ParamShards([part.of(self._entry(part.matrix).param) for part in members], *shape)
            for shape, members in bucket.param_shards.items()
        ]
        self._variances: dict[int, Tensor] = {}  # of the matrices that this rank owns
        self._stacks: list[tuple[list[int], Tensor]] = []  # the same, as `stacks` gave them out

    def _entry(self, matrix: int) -> LocalParam:
        return self.entries[self.sharded.blocks[matrix].param]

    def to_owners(self, u: Sequence[Tensor]) -> Pending[Any]:
        whole = self._owner_buffers()
        pending = [self._inward(u, whole, self.bucket.comm_dtype)]
        if self.bucket.stage_inbound is not None:
            pending.append(self._fetch_stage_state(self.bucket.stage_inbound))
        return Pending(whole, pending)

    def gathered(self, tensors: Sequence[Tensor]) -> Pending[Any]:
        whole = self._owner_buffers()
        return Pending(whole, [self._inward(tensors, whole, self.sharded.dtype)])

    def weights(self) -> list[list[Tensor]]:
        return [
            [self.sharded.momentum_piece(part, self._entry(part.matrix).param) for part in members]
            for members, _ in self.bucket.momentum_shards
        ]

    def sources(self) -> list[list[MatrixRef]]:
        return [[self._source(matrix) for matrix in members] for *_, members in self.bucket.batches]

    def _source(self, matrix: int) -> MatrixRef:
        number, block, *_ = self.sharded.blocks[matrix]
        box = self.sharded.plan.matrices[matrix].box
        return MatrixRef(self.sharded.params[number], box, block.rows, block.cols)

    def _inward(self, u: Sequence[Tensor], whole: Sequence[Tensor], dtype: torch.dtype) -> Exchange:
        """Stacks of this rank's pieces of the momentum, to the owners' buffers."""
        parts = self._parts(whole)
        transfers = self.bucket.inbound
        pieces = [stack.unbind() for stack in u]
        outgoing = []
        for position, matrix, box in transfers.sends:
            stack, k = self.bucket.stacked[matrix, box]
            outgoing.append((position, pieces[stack][k]))
        incoming = [
            (position, parts[matrix][self._inside(matrix, box)])
            for position, matrix, box in transfers.recvs
        ]
        return self._move_in(outgoing, incoming, dtype, state=False)

    def _owner_buffers(self) -> list[Tensor]:
        """Room for the matrices that this rank owns, zero where they are padded."""
        buffers = []
        for rows, cols, members in self.bucket.batches:
            blocks = [self.sharded.blocks[matrix].block for matrix in members]
            padded = any((b.rows, b.cols) != (rows, cols) for b in blocks)
            make = torch.zeros if padded else torch.empty
            device = self.sharded.domain.device
            buffers.append(make(len(members), rows, cols, dtype=self.sharded.dtype, device=device))
        return buffers

    def _parts(self, whole: Sequence[Tensor]) -> dict[int, Tensor]:
        """For each matrix that this rank owns, its place, in the shape of its box."""
        parts = {}
        for (_, _, members), matrices in zip(self.bucket.batches, whole, strict=True):
            for matrix, padded in zip(members, torch.split(matrices, 1), strict=True):
                block = self.sharded.blocks[matrix].block
                logical = place(padded, block.rows, block.cols)[0]
                as_kept = logical.mT if block.transposed else logical
                box = self.sharded.plan.matrices[matrix].box
                parts[matrix] = as_kept.view([b - a for a, b in box])
        return parts

    def _inside(self, matrix: int, box: Box) -> tuple[slice, ...]:
        return slices(box, self.sharded.plan.matrices[matrix].box)

    def _fetch_stage_state(self, transfers: Transfers) -> Exchange:
        """Receive the variance of the owned matrices, oriented as it is kept."""
        for _, matrix, _ in transfers.recvs:
            if matrix not in self._variances:
                state = self.sharded.plan.matrices[matrix].stage_box
                assert state is not None
                self._variances[matrix] = torch.empty(
                    [b - a for a, b in state],
                    dtype=self.sharded.stage_dtype,
                    device=self.sharded.domain.device,
                )
        outgoing = [(at, self._kept_state(matrix, box)) for at, matrix, box in transfers.sends]
        incoming = [(at, self._owned_state(matrix, box)) for at, matrix, box in transfers.recvs]
        return self._move_in(outgoing, incoming, self.sharded.stage_dtype, state=True)

    def _kept_state(self, matrix: int, box: Box) -> Tensor:
        """A piece of the variance where it is kept."""
        variance = self._entry(matrix).variance
        assert variance is not None
        return self.sharded.stage_piece(matrix, box, variance)

    def _owned_state(self, matrix: int, box: Box) -> Tensor:
        """A piece of the variance of a matrix that this rank owns."""
        state = self.sharded.plan.matrices[matrix].stage_box
        assert state is not None
        return self._variances[matrix][slices(box, state)]

    def stacks(self, o: Sequence[Tensor]) -> list[MatrixStack]:
        stacks = []
        for (_, _, members), matrices in zip(self.bucket.batches, o, strict=True):
            start = 0
            while start < len(members):
                block = self.sharded.blocks[members[start]].block
                stop = start + 1
                while stop < len(members) and _alike(
                    self.sharded.blocks[members[stop]].block, block
                ):
                    stop += 1
                some = members[start:stop]
                variance = None
                if self.bucket.stage_inbound is not None:
                    variance = torch.stack([self._logical_stage_state(matrix) for matrix in some])
                    self._stacks.append((some, variance))
                steps = [self._entry(matrix).steps for matrix in some]
                count = None
                if steps[0] is not None:
                    count = torch.stack([s for s in steps if s is not None])
                    count = count.to(matrices.device).reshape(-1, 1, 1)
                whole = place(matrices[start:stop], block.rows, block.cols)
                numbers = self._numbers(some)
                stacks.append(MatrixStack(whole, numbers, variance, count))
                start = stop
        return stacks

    def _logical_stage_state(self, matrix: int) -> Tensor:
        """`(rows, 1)` or `(rows, cols)`."""
        block = self.sharded.blocks[matrix].stage_block
        return block.to_matrices(self._variances[matrix])[0]

    def keep(self, stacks: Sequence[MatrixStack]) -> Pending[None]:
        """Send the stage's state back to everywhere where it is kept."""
        for some, variance in self._stacks:
            for matrix, rows in zip(some, variance.unbind(), strict=True):
                self._logical_stage_state(matrix).copy_(rows)
        back = self.bucket.stage_outbound
        outgoing = [(at, self._owned_state(matrix, box)) for at, matrix, box in back.sends]
        return self._send_back(None, outgoing, back, self._kept_state, state=True)

    def to_params(self, o: Sequence[Tensor]) -> Pending[Any]:
        parts, back = self._parts(o), self.bucket.outbound
        outgoing = [
            (at, parts[matrix][self._inside(matrix, box)]) for at, matrix, box in back.sends
        ]
        pieces = self._room(parts)
        updates = [
            [pieces[part.matrix, part.box] for part in members]
            for members in self.bucket.param_shards.values()
        ]
        return self._send_back(updates, outgoing, back, lambda *which: pieces[which], state=False)

    def _send_back(
        self,
        value: T,
        outgoing: list[tuple[int, Tensor]],
        transfers: Transfers,
        place_of: Callable[[int, Box], Tensor],
        state: bool,
    ) -> Pending[T]:
        """Start to send what owners have to all who store it.

        Args:
            value: what the result has.
            outgoing: this rank's part of the first round's sends.
            transfers: the first round.
            place_of: where a part of a matrix is kept on this rank.
        """
        sharded, rounds = self.sharded, self.bucket.rounds[state]
        dtype = sharded.stage_dtype if state else self.bucket.comm_dtype
        domain = sharded.domain
        incoming = [(at, place_of(matrix, box)) for at, matrix, box in transfers.recvs]
        if rounds.gathered:
            own = [tensor for at, tensor in outgoing if at == domain.position]
            return Pending(value, [gather(domain, own, incoming, dtype, rounds.gathered)])
        first = self._in_chunks(outgoing, incoming, dtype, rounds.moves, rounds.chunks[0])
        late = rounds.late
        if late is None:
            return Pending(value, [first])

        def pass_on() -> Exchange:
            sends, recvs = (
                [(at, place_of(matrix, box)) for at, matrix, box in some] for some in late
            )
            return self._in_chunks(sends, recvs, dtype, True, rounds.chunks[1])

        return Pending(value, [first], start_late=pass_on)

    def _room(self, parts: Mapping[int, Tensor]) -> dict[tuple[int, Box], Tensor]:
        """Where the results that this rank receives will be: those of a round in the order in which
        they arrive, in one piece of memory; what this rank computed itself is used where it is if
        it can be.
        """
        sharded, me, rounds = self.sharded, self.sharded.domain.position, self.bucket.rounds[False]
        pieces: dict[tuple[int, Box], Tensor] = {}
        first = []
        for transfer in self.bucket.outbound.recvs:
            at, matrix, box = transfer
            if at == me and not rounds.gathered and self.bucket.comm_dtype == sharded.dtype:
                own = parts[matrix][self._inside(matrix, box)]
                if own.is_contiguous() and own.device == self._entry(matrix).param.device:
                    pieces[matrix, box] = own
                    continue
            first.append(transfer)
        if not rounds.gathered:
            first.sort(key=lambda transfer: transfer.position == me)  # they would part others
        for recvs in (first, rounds.late.recvs if rounds.late is not None else ()):
            if not recvs:
                continue
            sizes = [(at, box_size(box)) for at, _, box in recvs]
            count = sharded.domain.size * rounds.gathered or sum(size for _, size in sizes)
            device = self._entry(recvs[0].matrix).param.device
            flat = torch.empty(count, dtype=sharded.dtype, device=device)
            starts = slots(sizes, rounds.gathered)
            for (_, matrix, box), (_, size), start in zip(recvs, sizes, starts, strict=True):
                pieces[matrix, box] = flat[start : start + size].view([b - a for a, b in box])
        return pieces

    def weight_norms(self) -> Pending[Tensor]:
        domain, bucket = self.sharded.domain, self.bucket
        weights, matrices = self._weights()
        dtype = self.sharded.stage_dtype
        squares = torch.zeros(len(bucket.assignments), dtype=dtype, device=domain.device)
        if weights:
            # A part that several ranks store is in the sum as often.
            if bucket.copies is None and not self.sharded.in_blocks:
                placements = [self.sharded.tensor(matrix).param_placement for matrix in matrices]
                copies = [math.prod(p.mesh[axis] for axis in p.copies()) for p in placements]
                bucket.copies = torch.tensor(copies, dtype=dtype, device=domain.device)
            mine = norms_of(weights).to(squares).square_()
            if bucket.copies is not None:
                mine = mine / bucket.copies
            squares.index_add_(0, self._numbers(matrices), mine)
        if self.sharded.in_blocks:  # a block is whole wherever it is stored
            return Pending(squares.sqrt_())
        return Pending(squares, [add_up(domain, squares)], torch.Tensor.sqrt_)

    def scale_weights_(self, factors: Tensor) -> None:
        weights, matrices = self._weights()
        if weights:
            multiply_(weights, factors[self._numbers(matrices)])

    def _weights(self) -> tuple[list[Tensor], list[int]]:
        """The parts of weights that this rank stores, and of which matrix each is."""
        parts = [part for members in self.bucket.param_shards.values() for part in members]
        weights = [part.of(self._entry(part.matrix).param) for part in parts]
        return weights, [part.matrix for part in parts]

    def _numbers(self, matrices: Sequence[int]) -> Tensor:
        """The numbers of matrices in the bucket; on the device, where they stay for later steps."""
        bucket, key = self.bucket, tuple(matrices)
        if key not in bucket.indices:
            numbers = [bucket.numbers[matrix] for matrix in matrices]
            bucket.indices[key] = torch.tensor(numbers, device=self.sharded.domain.device)
        return bucket.indices[key]

    def _in_chunks(
        self,
        outgoing: list[tuple[int, Tensor]],
        incoming: list[tuple[int, Tensor]],
        dtype: torch.dtype,
        together: bool,
        chunks: int,
    ) -> Exchange:
        """Send results in several chunks, where a rank's copies for all others would not fit in the
        cap; the last chunk is under way when this returns.
        """
        domain = self.sharded.domain
        for number in range(chunks - 1):
            move(domain, outgoing, incoming, dtype, together, (number, chunks)).wait()
        return move(domain, outgoing, incoming, dtype, together, (chunks - 1, chunks))

    def _move_in(
        self,
        outgoing: list[tuple[int, Tensor]],
        incoming: list[tuple[int, Tensor]],
        dtype: torch.dtype,
        state: bool,
    ) -> Exchange:
        together = self.bucket.rounds[state].moves_in
        return move(self.sharded.domain, outgoing, incoming, dtype, together)


def _alike(one: Block, other: Block) -> bool:
    return (one.rows, one.cols) == (other.rows, other.cols)
