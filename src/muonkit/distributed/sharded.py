"""Parameters that several ranks share: their plan, and the batches of a step over it."""

from __future__ import annotations

import itertools
import math
from functools import partial
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
from muonkit.distributed.exchange import Exchange, Pending, add_up, move, slots
from muonkit.distributed.outbound import Outbound
from muonkit.distributed.placement import Box, Placement, box_size, slices
from muonkit.distributed.plan import Assignment, Transfer, Transfers
from muonkit.distributed.plan_batches import Item, cap_of, make_batches
from muonkit.distributed.selected import BucketLines, SelectedLines, lines_of
from muonkit.groups import computed_dtype, momentum_dtype, scaled_block, update_dtype
from muonkit.int8 import Scales, scale_cut
from muonkit.newton_schulz.dtypes import is_small, size_decides
from muonkit.selection import put, selects, take

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from muonkit.batching import LocalParam
    from muonkit.distributed.exchange import Domain
    from muonkit.distributed.planner import PlannedParams
    from muonkit.distributed.transfers import PlannedTensor

__all__ = ["ShardedGroup", "exchange_dtype", "stage_dtype"]


def exchange_dtype(p: Tensor, grad_dtype: torch.dtype, group: Mapping[str, Any]) -> torch.dtype:
    """The dtype in which the update of a parameter is exchanged."""
    chosen = group["exchange_dtype"]
    return _update_dtype(p, grad_dtype, group) if chosen == "auto" else getattr(torch, chosen)


def _update_dtype(p: Tensor, grad_dtype: torch.dtype, group: Mapping[str, Any]) -> torch.dtype:
    return update_dtype(computed_dtype(grad_dtype, momentum_dtype(group, p)), p.dtype)


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


class _Arrivals(NamedTuple):
    """Where the results that arrive in one round are to be: `size` elements, and of each part of a
    matrix its shape and where it starts and stops in these.
    """

    size: int
    parts: list[tuple[tuple[int, Box], int, int, list[int]]]


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
        self.inbound, self.moves = plan.inbound(assignments, me), plan.moves(every, inward=True)
        self.outbound = Outbound(plan, every, me, sharded.cap, mine=assignments)
        self.stage_inbound: Transfers | None = None
        if plan.has_stage_state:
            self.stage_inbound = plan.inbound(assignments, me, state=True)
            self.stage_moves = plan.moves(every, inward=True, state=True)
            self.stage_outbound = Outbound(
                plan, every, me, sharded.cap, state=True, own=True, mine=assignments
            )
        # Of blocks that stay where they are nothing is rounded.
        moves = self.moves or self.outbound.moves
        self.comm_dtype = sharded.comm_dtype if moves or not sharded.in_blocks else sharded.dtype
        # Where in an owner's matrices things come from and go to.
        self.received = [
            (at, matrix, sharded.inside(matrix, box)) for at, matrix, box in self.inbound.recvs
        ]
        self.sent = [
            (at, matrix, sharded.inside(matrix, box)) for at, matrix, box in self.outbound.sends
        ]
        self.own = [
            ((matrix, box), sharded.inside(matrix, box)) for _, matrix, box in self.outbound.own
        ]
        self.arrivals = [
            sharded.arrivals(recvs, self.outbound.gathered) for recvs in self.outbound.rounds
        ]
        self.param_shards: dict[tuple[int, int, bool], list[_Part]] = {}
        shards: dict[tuple[Any, ...], list[_Part]] = {}
        sent = {(matrix, box) for _, matrix, box in self.inbound.sends}
        for assignment in assignments:
            param, block, _, cut = sharded.blocks[assignment.matrix]
            for part in sharded.parts(assignment.matrix, "state_placement"):
                shape = [b - a for a, b in part.box]
                only_kept = (part.matrix, part.box) not in sent
                lines = plan.matrices[part.matrix].lines
                along = None if lines is None else (lines.dims, lines.sent)
                kind = sharded.grad_dtypes[param], sharded.scaled_blocks[param]
                key = (only_kept, *shape, *kind, along)
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
        self.norms: _Norms | None = None
        self.lines: BucketLines | None = None
        if selects(sharded.group):
            self.lines = BucketLines(
                plan,
                sharded.domain,
                list(self.numbers),
                [[(part.matrix, part.box) for part in some] for some, _ in self.momentum_shards],
            )
        self.batches = self._batches(
            sharded, [assignment.matrix for assignment in assignments if me in assignment.owners]
        )

    def _batches(self, sharded: ShardedGroup, owned: list[int]) -> list[tuple[int, int, list[int]]]:
        """Rows, columns and matrices of what is computed together, equal shapes side by side."""
        shapes = {matrix: sharded.computed(matrix) for matrix in owned}
        kind = sharded.domain.device.type
        small_apart = size_decides(sharded.group["ns_dtype"], kind)
        # Copies that are computed again elsewhere must come out the same to the bit: matrices of
        # other ranks' choice do not share their batch. And a matrix is in the dtype of its own
        # shape, whatever it is computed with.
        keys = {
            matrix: (sharded.tensor(matrix).repeat, small_apart and is_small(*shape))
            for matrix, shape in shapes.items()
        }
        items = [
            Item(keys[matrix], kind, 1, *shape, sharded.dtype.itemsize)
            for matrix, shape in shapes.items()
        ]
        return [
            (
                batch.rows,
                batch.cols,
                sorted(
                    (owned[i] for i in batch.positions),
                    key=lambda matrix: (*shapes[matrix], matrix),
                ),
            )
            for batch in make_batches(tuple(items), sharded.group["bytes_in_flight"])
        ]


class _Norms(NamedTuple):
    """Where the ranks add up the squares of a bucket's weights.

    Copies that are trained apart have places of their own: each is a weight by itself.

    Attributes:
        size: how many places there are.
        places: of this rank's copy of each matrix.
        copies: ranks that store each part of `param_shards`, of one such copy.
    """

    size: int
    places: Tensor
    copies: Tensor

    @classmethod
    def of(
        cls, sharded: ShardedGroup, assignments: Sequence[Assignment], matrices: Sequence[int]
    ) -> _Norms:
        size, places = 0, []
        for assignment in assignments:
            apart, mine = sharded.plan.apart(assignment.matrix, sharded.domain.position)
            places.append(size + mine)
            size += apart
        copies = []
        for tensor in map(sharded.tensor, matrices):
            mesh = tensor.param_placement.mesh
            together = set(tensor.param_placement.copies()).difference(tensor.repeat)
            copies.append(math.prod(mesh[axis] for axis in together))
        device = sharded.domain.device
        return cls(
            size,
            torch.tensor(places, device=device),
            torch.tensor(copies, dtype=sharded.stage_dtype, device=device),
        )


def _squares(weights: list[Tensor], like: Tensor) -> Tensor:
    return norms_of(weights).to(like).square_()


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
        # Of a momentum in int8, the extents of its blocks; pieces of one stack have equal ones.
        self.scaled_blocks = {i: scaled_block(p, group) for i, p in self.params.items()}
        self.dtype = _update_dtype(p, grad_dtype, group)
        self.comm_dtype = exchange_dtype(p, grad_dtype, group)
        self.stage_dtype = stage_dtype(p)
        self.cap: int = cap_of(domain.device.type, group["bytes_in_flight"])
        self._stage_cuts: dict[tuple[int, Box], tuple[slice, ...]] = {}
        self.buckets = [_Bucket(self, assignments) for assignments in self.plan.buckets]

    def tensor(self, matrix: int) -> PlannedTensor:
        """The parameter that a matrix is of."""
        return self.plan.tensors[self.plan.matrices[matrix].tensor]

    def computed(self, matrix: int) -> tuple[int, int]:
        """Rows and columns of what is orthogonalized of a matrix."""
        block = self.blocks[matrix].block
        return self.plan.matrices[matrix].computed(block.rows, block.cols)

    def inside(self, matrix: int, box: Box) -> tuple[slice, ...]:
        """The index of what travels of a part, in what travels of the matrix."""
        planned = self.plan.matrices[matrix]
        return slices(planned.taken(box), planned.taken(planned.box))

    def arrivals(self, recvs: Sequence[Transfer], gathered: int) -> _Arrivals:
        """Room for what arrives in one round, laid out as it arrives."""
        boxes = [self.plan.matrices[matrix].taken(box) for _, matrix, box in recvs]
        sizes = [box_size(box) for box in boxes]
        starts = list(itertools.accumulate(sizes, initial=0))
        size = starts.pop()
        if gathered:
            size = self.domain.size * gathered
            positions = [at for at, _, _ in recvs]
            starts = slots(list(zip(positions, sizes, strict=True)), gathered)
        each = zip(recvs, boxes, sizes, starts, strict=True)
        return _Arrivals(
            size,
            [
                ((matrix, box), start, start + count, [b - a for a, b in travels])
                for (_, matrix, box), travels, count, start in each
            ],
        )

    def is_sent_whole(self, matrix: int) -> bool:
        """Whether its owner takes the lines of a matrix, of which all travel."""
        lines = self.plan.matrices[matrix].lines
        return lines is not None and lines.sent is None

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
                self._scales(members),
            )
            for members, only_kept in bucket.momentum_shards
        ]
        self.param_shards = [
            ParamShards([part.of(self._entry(part.matrix).param) for part in members], *shape)
            for shape, members in bucket.param_shards.items()
        ]
        self.lines: SelectedLines | None = None  # once they are selected
        self._variances: dict[int, Tensor] = {}  # of the matrices that this rank owns
        self._stacks: list[tuple[list[int], Tensor]] = []  # the same, as `stacks` gave them out

    def _entry(self, matrix: int) -> LocalParam:
        return self.entries[self.sharded.blocks[matrix].param]

    def _scales(self, members: Sequence[_Part]) -> Scales | None:
        scales = [(part, self._entry(part.matrix).scale) for part in members]
        tensors = [s.tensor[scale_cut(part.cut, s.block)] for part, s in scales if s is not None]
        block = self.sharded.scaled_blocks[self.sharded.blocks[members[0].matrix].param]
        return None if block is None else Scales.of(tensors, block)

    def line_norms(self, u: Sequence[Tensor]) -> Pending[Tensor]:
        assert self.bucket.lines is not None
        return self.bucket.lines.norms(u)

    def select_(self, norms: Tensor, mu: float | Tensor) -> None:
        assert self.bucket.lines is not None
        self.lines = SelectedLines(self.bucket.lines, norms)
        self.lines.keep_([shards.momenta for shards in self.momentum_shards], mu)

    def to_owners(self, u: Sequence[Tensor]) -> Pending[Any]:
        whole = self._owner_buffers()
        parts, take_lines = self._parts(whole), None
        if self.lines is not None:
            for matrix in filter(self.sharded.is_sent_whole, parts):
                box = self.sharded.plan.matrices[matrix].box
                shape, device = [b - a for a, b in box], self.sharded.domain.device
                parts[matrix] = torch.empty(shape, dtype=self.sharded.dtype, device=device)
            u, take_lines = self.lines.take(u), partial(self._take_lines, parts)
        incoming = [(at, parts[matrix][cut]) for at, matrix, cut in self.bucket.received]
        pending = [self._inward(u, incoming, self.bucket.comm_dtype)]
        if self.bucket.stage_inbound is not None:
            pending.append(self._fetch_stage_state(self.bucket.stage_inbound))
        return Pending(whole, pending, take_lines)

    def gathered(self, tensors: Sequence[Tensor]) -> Pending[Any]:
        whole = self._owner_buffers(all_lines=True)
        parts, matrices = self._parts(whole, all_lines=True), self.sharded.plan.matrices
        incoming = [
            (at, parts[matrix][slices(box, matrices[matrix].box)])
            for at, matrix, box in self.bucket.inbound.recvs
        ]
        return Pending(whole, [self._inward(tensors, incoming, self.sharded.dtype)])

    def with_all_lines(self, o: Sequence[Tensor]) -> list[Tensor]:
        whole = self._owner_buffers(all_lines=True)
        places = self._places(whole, all_lines=True)
        for matrix, taken in self._places(o).items():
            places[matrix].copy_(self._put(matrix, taken))
        return whole

    def _take_lines(self, parts: dict[int, Tensor], whole: Sequence[Tensor]) -> None:
        """Copy the selected lines of matrices that arrived whole into their places."""
        assert self.lines is not None
        for matrix, computed in self._places(whole).items():
            if self.sharded.is_sent_whole(matrix):
                matrices = self.sharded.blocks[matrix].block.to_matrices(parts[matrix])
                lines = self.lines.of(matrix)[None].to(matrices.device)
                by_rows = lines_of(self.sharded.plan, matrix).rows
                computed.copy_(take(matrices, lines, by_rows)[0])

    def _put(self, matrix: int, taken: Tensor) -> Tensor:
        """A matrix that has these lines, and is zero elsewhere."""
        assert self.lines is not None
        block, by_rows = self.sharded.blocks[matrix].block, lines_of(self.sharded.plan, matrix).rows
        lines = self.lines.of(matrix)[None].to(taken.device)
        return put(taken[None], lines, by_rows, block.rows if by_rows else block.cols)[0]

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
        computed = self.sharded.computed(matrix)
        return MatrixRef(self.sharded.params[number], box, block.rows, block.cols, computed)

    def _inward(
        self, u: Sequence[Tensor], incoming: list[tuple[int, Tensor]], dtype: torch.dtype
    ) -> Exchange:
        """Stacks of this rank's pieces of the momentum, to the owners' places for the matrices."""
        pieces = [stack.unbind() for stack in u]
        outgoing = []
        for position, matrix, box in self.bucket.inbound.sends:
            stack, k = self.bucket.stacked[matrix, box]
            outgoing.append((position, pieces[stack][k]))
        return move(self.sharded.domain, outgoing, incoming, dtype, self.bucket.moves)

    def _shape(self, matrix: int, all_lines: bool = False) -> tuple[int, int]:
        """Rows and columns of a matrix, or of what is orthogonalized of it."""
        block = self.sharded.blocks[matrix].block
        return (block.rows, block.cols) if all_lines else self.sharded.computed(matrix)

    def _owner_buffers(self, all_lines: bool = False) -> list[Tensor]:
        """Room for the matrices that this rank owns, zero where they are padded."""
        buffers = []
        for rows, cols, members in self.bucket.batches:
            shapes = [self._shape(matrix, all_lines) for matrix in members]
            if all_lines and self.bucket.lines is not None:  # batches are of smaller ones
                rows, cols = max(map(min, shapes)), max(map(max, shapes))
            padded = any(shape != (rows, cols) for shape in shapes)
            make = torch.zeros if padded else torch.empty
            device = self.sharded.domain.device
            buffers.append(make(len(members), rows, cols, dtype=self.sharded.dtype, device=device))
        return buffers

    def _places(self, whole: Sequence[Tensor], all_lines: bool = False) -> dict[int, Tensor]:
        """For each matrix that this rank owns, its place, without padding."""
        places = {}
        for (_, _, members), matrices in zip(self.bucket.batches, whole, strict=True):
            for matrix, padded in zip(members, torch.split(matrices, 1), strict=True):
                places[matrix] = place(padded, *self._shape(matrix, all_lines))[0]
        return places

    def _parts(self, whole: Sequence[Tensor], all_lines: bool = False) -> dict[int, Tensor]:
        """For each matrix that this rank owns, its place, in the shape of what travels of its box;
        not of those that travel whole.
        """
        parts = self._places(whole, all_lines)
        for matrix, logical in parts.items():
            if self.sharded.is_sent_whole(matrix) and not all_lines:
                continue
            block, planned = self.sharded.blocks[matrix].block, self.sharded.plan.matrices[matrix]
            as_kept = logical.mT if block.transposed else logical
            box = planned.box if all_lines else planned.taken(planned.box)
            parts[matrix] = as_kept.view([b - a for a, b in box])
        return parts

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
        dtype, moves = self.sharded.stage_dtype, self.bucket.stage_moves
        return move(self.sharded.domain, outgoing, incoming, dtype, moves)

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
                shape = self.sharded.computed(members[start])
                stop = start + 1
                while stop < len(members) and self.sharded.computed(members[stop]) == shape:
                    stop += 1
                some = members[start:stop]
                variance = None
                if self.bucket.stage_inbound is not None:
                    variance = torch.stack([self._taken_stage_state(matrix) for matrix in some])
                    self._stacks.append((some, variance))
                steps = [self._entry(matrix).steps for matrix in some]
                count = None
                if steps[0] is not None:
                    count = torch.stack([s for s in steps if s is not None])
                    count = count.to(matrices.device).reshape(-1, 1, 1)
                whole = place(matrices[start:stop], *shape)
                numbers = self._numbers(some)
                stacks.append(MatrixStack(whole, numbers, variance, count))
                start = stop
        return stacks

    def _logical_stage_state(self, matrix: int) -> Tensor:
        """`(rows, 1)` or `(rows, cols)`."""
        block = self.sharded.blocks[matrix].stage_block
        return block.to_matrices(self._variances[matrix])[0]

    def _taken_stage_state(self, matrix: int) -> Tensor:
        """The stage's state of the selected rows of a matrix."""
        state = self._logical_stage_state(matrix)
        return state if self.lines is None else state[self.lines.of(matrix).to(state.device)]

    def keep(self, stacks: Sequence[MatrixStack]) -> Pending[None]:
        """Send the stage's state back to everywhere where it is kept."""
        for some, variance in self._stacks:
            for matrix, rows in zip(some, variance.unbind(), strict=True):
                state = self._logical_stage_state(matrix)
                if self.lines is None:
                    state.copy_(rows)
                else:
                    state.index_copy_(0, self.lines.of(matrix).to(state.device), rows)
        back = self.bucket.stage_outbound
        outgoing = [(at, self._owned_state(matrix, box)) for at, matrix, box in back.sends]
        domain, dtype = self.sharded.domain, self.sharded.stage_dtype
        return back.send(domain, None, outgoing, self._kept_state, dtype)

    def to_params(self, o: Sequence[Tensor]) -> Pending[Any]:
        sharded, bucket = self.sharded, self.bucket
        parts = self._parts(o)
        for matrix in filter(sharded.is_sent_whole, parts) if self.lines is not None else ():
            box = sharded.plan.matrices[matrix].box
            block, whole = sharded.blocks[matrix].block, self._put(matrix, parts[matrix])
            as_kept = whole.mT if block.transposed else whole
            parts[matrix] = as_kept.reshape([b - a for a, b in box])
        outgoing = [(at, parts[matrix][cut]) for at, matrix, cut in bucket.sent]
        pieces, buffers = self._room(parts)
        full, put_lines = pieces, None
        if self.lines is not None:
            full = {at: self._room_for(piece, *at) for at, piece in pieces.items()}
            put_lines = partial(self._put_lines, full, pieces)
        updates = [
            [full[part.matrix, part.box] for part in members]
            for members in bucket.param_shards.values()
        ]

        def place_of(matrix: int, box: Box) -> Tensor:
            return pieces[matrix, box]

        return bucket.outbound.send(
            sharded.domain, updates, outgoing, place_of, bucket.comm_dtype, put_lines, buffers
        )

    def _room(
        self, parts: Mapping[int, Tensor]
    ) -> tuple[dict[tuple[int, Box], Tensor], list[Tensor | None]]:
        """Where the results of this rank's parts are to be, and for each round the memory in which
        they arrive, if they are read there. What this rank computed itself is used where it is.
        """
        bucket, dtype, domain = self.bucket, self.sharded.dtype, self.sharded.domain
        rounded = bucket.comm_dtype != dtype
        pieces: dict[tuple[int, Box], Tensor] = {}
        for at, cut in bucket.own:
            own = parts[at[0]][cut]
            if rounded:  # as the others are: copies have to be equal on all ranks
                own = own.to(bucket.comm_dtype).to(dtype)
            pieces[at] = own.to(self._entry(at[0]).param.device).contiguous()
        buffers: list[Tensor | None] = []
        for size, arrivals in bucket.arrivals:
            if not arrivals:
                buffers.append(None)
                continue
            device = self._entry(arrivals[0][0][0]).param.device
            flat = torch.empty(size, dtype=dtype, device=device)
            for at, start, stop, shape in arrivals:
                pieces[at] = flat[start:stop].view(shape)
            buffers.append(None if rounded or device != domain.device else flat)
        return pieces, buffers

    def _room_for(self, piece: Tensor, matrix: int, box: Box) -> Tensor:
        """Zeros in the shape of a box of which some lines arrive; the piece itself where all do."""
        if self.sharded.is_sent_whole(matrix):
            return piece
        return piece.new_zeros([b - a for a, b in box])

    def _put_lines(
        self,
        full: Mapping[tuple[int, Box], Tensor],
        pieces: Mapping[tuple[int, Box], Tensor],
        updates: object,
    ) -> None:
        """Put the lines that have arrived where they belong."""
        assert self.lines is not None
        for (matrix, box), piece in pieces.items():
            whole = full[matrix, box]
            if whole is not piece:
                along = lines_of(self.sharded.plan, matrix).sent
                assert along is not None
                lines = self.lines.inside(matrix, box).to(whole.device)
                whole.index_copy_(along, lines, piece)

    def weight_norms(self) -> Pending[Tensor]:
        domain, bucket = self.sharded.domain, self.bucket
        weights, matrices = self._weights()
        dtype, count = self.sharded.stage_dtype, len(bucket.assignments)
        if self.sharded.in_blocks:  # a block is whole wherever it is stored
            squares = torch.zeros(count, dtype=dtype, device=domain.device)
            if weights:
                squares.index_add_(0, self._numbers(matrices), _squares(weights, squares))
            return Pending(squares.sqrt_())
        if bucket.norms is None:
            bucket.norms = _Norms.of(self.sharded, bucket.assignments, matrices)
        norms = bucket.norms
        squares = torch.zeros(norms.size, dtype=dtype, device=domain.device)
        if weights:
            # A part that several ranks store is in the sum as often.
            mine = _squares(weights, squares) / norms.copies
            squares.index_add_(0, norms.places[self._numbers(matrices)], mine)
        found = squares.new_empty(count)

        def take(found: Tensor) -> None:
            torch.sqrt(squares[norms.places], out=found)

        return Pending(found, [add_up(domain, squares)], take)

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
