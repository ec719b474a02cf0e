"""Parameters that several ranks share: their plan, and the batches of a step over it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

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
from muonkit.distributed.exchange import Exchange, Pending, add_up, move
from muonkit.distributed.placement import Box, Placement, slices
from muonkit.distributed.plan import Assignment, Transfers
from muonkit.distributed.plan_batches import Item, cap_of, make_batches
from muonkit.groups import computed_dtype, momentum_dtype, scaled_block
from muonkit.int8 import Scales, scale_cut

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

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


class _Part(NamedTuple):
    """A box of a matrix that this rank has, and where it lies in the rank's own tensor."""

    matrix: int
    box: Box
    cut: tuple[slice, ...]

    def of(self, tensor: Tensor) -> Tensor:
        """This part of a tensor; a view of its memory."""
        return tensor[self.cut]


class _Bucket:
    """One bucket of the plan, and this rank's part in it; the same in every step."""

    def __init__(self, sharded: ShardedGroup, assignments: tuple[Assignment, ...]) -> None:
        plan, me = sharded.plan, sharded.domain.position
        self.assignments = assignments
        self.inbound, self.outbound = plan.inbound(assignments, me), plan.outbound(assignments, me)
        self.stage_transfers: tuple[Transfers, Transfers] | None = None
        if plan.has_stage_state:
            self.stage_transfers = (
                plan.stage_inbound(assignments, me),
                plan.stage_outbound(assignments, me),
            )
        self.moves = {
            (inward, state): plan.moves(assignments, inward, state)
            for inward in (True, False)
            for state in ((False, True) if plan.has_stage_state else (False,))
        }
        self.chunks = {
            state: plan.chunks(assignments, sharded.cap, state)
            for state in ((False, True) if plan.has_stage_state else (False,))
        }
        self.momentum_shards: dict[tuple[Any, ...], list[_Part]] = {}  # the parts of each stack
        self.param_shards: dict[tuple[int, int], list[_Part]] = {}
        for assignment in assignments:
            param, block, _ = sharded.blocks[assignment.matrix]
            for part in sharded.parts(assignment.matrix, "state_placement"):
                shape = [b - a for a, b in part.box]
                key = (*shape, sharded.grad_dtypes[param], sharded.scaled_blocks[param])
                self.momentum_shards.setdefault(key, []).append(part)
            for part in sharded.parts(assignment.matrix, "param_placement"):
                self.param_shards.setdefault((block.rows, block.cols), []).append(part)
        self.stacked = {
            (part.matrix, part.box): (stack, k)
            for stack, members in enumerate(self.momentum_shards.values())
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
        self.params: dict[int, Tensor] = {i: group["params"][i] for i in shared.params}
        self.grad_dtypes = {i: grads[i] for i in shared.params}
        first = shared.params[0]
        p, grad_dtype = self.params[first], grads[first]
        # Of a momentum in int8, the extents of its blocks; pieces of one stack have equal ones.
        self.scaled_blocks = {i: scaled_block(p, group) for i, p in self.params.items()}
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
                self._scales(members),
            )
            for members in bucket.momentum_shards.values()
        ]
        self.param_shards = [
            ParamShards([part.of(self._entry(part.matrix).param) for part in members], *shape)
            for shape, members in bucket.param_shards.items()
        ]
        self._variances: dict[int, Tensor] = {}  # of the matrices that this rank owns
        self._stacks: list[tuple[list[int], Tensor]] = []  # the same, as `stacks` gave them out

    def _entry(self, matrix: int) -> LocalParam:
        return self.entries[self.sharded.blocks[matrix].param]

    def _scales(self, members: Sequence[_Part]) -> Scales | None:
        scales = [(part, self._entry(part.matrix).scale) for part in members]
        tensors = [s.tensor[scale_cut(part.cut, s.block)] for part, s in scales if s is not None]
        block = self.sharded.scaled_blocks[self.sharded.blocks[members[0].matrix].param]
        return None if block is None else Scales.of(tensors, block)

    def to_owners(self, u: Sequence[Tensor]) -> Pending[Any]:
        whole = self._owner_buffers()
        pending = [self._inward(u, whole, self.sharded.comm_dtype)]
        if self.bucket.stage_transfers is not None:
            pending.append(self._fetch_stage_state(self.bucket.stage_transfers[0]))
        return Pending(whole, pending)

    def gathered(self, tensors: Sequence[Tensor]) -> Pending[Any]:
        whole = self._owner_buffers()
        return Pending(whole, [self._inward(tensors, whole, self.sharded.dtype)])

    def weights(self) -> list[list[Tensor]]:
        return [
            [self.sharded.momentum_piece(part, self._entry(part.matrix).param) for part in members]
            for members in self.bucket.momentum_shards.values()
        ]

    def sources(self) -> list[list[MatrixRef]]:
        return [[self._source(matrix) for matrix in members] for *_, members in self.bucket.batches]

    def _source(self, matrix: int) -> MatrixRef:
        number, block, _ = self.sharded.blocks[matrix]
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
        return self._move(outgoing, incoming, dtype, inward=True, state=False)

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
        outgoing, incoming = self._stage_transfers(transfers)
        return self._move(outgoing, incoming, self.sharded.stage_dtype, inward=True, state=True)

    def _stage_transfers(
        self, transfers: Transfers, back: bool = False
    ) -> tuple[list[tuple[int, Tensor]], list[tuple[int, Tensor]]]:
        """The pieces of the variance that are sent and received: to the owner, or `back`."""
        at_home, at_owner = (
            (transfers.recvs, transfers.sends) if back else (transfers.sends, transfers.recvs)
        )
        home = []
        for position, matrix, box in at_home:
            variance = self._entry(matrix).variance
            assert variance is not None
            home.append((position, self.sharded.stage_piece(matrix, box, variance)))
        owner = []
        for position, matrix, box in at_owner:
            state = self.sharded.plan.matrices[matrix].stage_box
            assert state is not None
            owner.append((position, self._variances[matrix][slices(box, state)]))
        return (owner, home) if back else (home, owner)

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
                if self.bucket.stage_transfers is not None:
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
        assert self.bucket.stage_transfers is not None
        for some, variance in self._stacks:
            for matrix, rows in zip(some, variance.unbind(), strict=True):
                self._logical_stage_state(matrix).copy_(rows)
        outgoing, incoming = self._stage_transfers(self.bucket.stage_transfers[1], back=True)
        exchange = self._move_out(outgoing, incoming, self.sharded.stage_dtype, state=True)
        return Pending(None, [exchange])

    def to_params(self, o: Sequence[Tensor]) -> Pending[Any]:
        parts = self._parts(o)
        transfers = self.bucket.outbound
        outgoing = [
            (position, parts[matrix][self._inside(matrix, box)])
            for position, matrix, box in transfers.sends
        ]
        pieces: dict[tuple[int, Box], Tensor] = {
            (matrix, box): torch.empty(
                [b - a for a, b in box],
                dtype=self.sharded.dtype,
                device=self._entry(matrix).param.device,
            )
            for _, matrix, box in transfers.recvs
        }
        incoming = [(position, pieces[matrix, box]) for position, matrix, box in transfers.recvs]
        exchange = self._move_out(outgoing, incoming, self.sharded.comm_dtype, state=False)
        updates = [
            [pieces[part.matrix, part.box] for part in members]
            for members in self.bucket.param_shards.values()
        ]
        return Pending(updates, [exchange])

    def weight_norms(self) -> Pending[Tensor]:
        domain, bucket = self.sharded.domain, self.bucket
        weights, matrices = self._weights()
        dtype = self.sharded.stage_dtype
        squares = torch.zeros(len(bucket.assignments), dtype=dtype, device=domain.device)
        if weights:
            # A part that several ranks store is in the sum as often.
            if bucket.copies is None:
                placements = [self.sharded.tensor(matrix).param_placement for matrix in matrices]
                copies = [math.prod(p.mesh[axis] for axis in p.copies()) for p in placements]
                bucket.copies = torch.tensor(copies, dtype=dtype, device=domain.device)
            mine = norms_of(weights).to(squares).square_() / bucket.copies
            squares.index_add_(0, self._numbers(matrices), mine)
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

    def _move_out(
        self,
        outgoing: list[tuple[int, Tensor]],
        incoming: list[tuple[int, Tensor]],
        dtype: torch.dtype,
        state: bool,
    ) -> Exchange:
        """Send the results, in several chunks where an owner's copies for all others would not fit
        in the cap; the last chunk is under way when this returns.
        """
        chunks = self.bucket.chunks[state]
        for number in range(chunks - 1):
            self._move(outgoing, incoming, dtype, False, state, (number, chunks)).wait()
        return self._move(outgoing, incoming, dtype, False, state, (chunks - 1, chunks))

    def _move(
        self,
        outgoing: list[tuple[int, Tensor]],
        incoming: list[tuple[int, Tensor]],
        dtype: torch.dtype,
        inward: bool,
        state: bool,
        chunk: tuple[int, int] = (0, 1),
    ) -> Exchange:
        together = self.bucket.moves[inward, state]
        return move(self.sharded.domain, outgoing, incoming, dtype, together, chunk)


def _alike(one: Block, other: Block) -> bool:
    return (one.rows, one.cols) == (other.rows, other.cols)
