"""Parameters that several ranks share: their plan, and the batches of a step over it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from muonkit.batching import MatrixRef, MatrixStack, MomentumShards, ParamShards, place
from muonkit.distributed.exchange import Exchange, Pending, move
from muonkit.distributed.layout import Layout
from muonkit.distributed.placement import Axis, Box, Placement, box_size, replicated, slices
from muonkit.distributed.plan import (
    Assignment,
    Item,
    Matrix,
    Plan,
    Stored,
    Transfers,
    cheaper_repeated,
    default_cap,
    machine,
    make_batches,
    make_own,
    make_plan,
)
from muonkit.groups import computed_dtype, flops_of, momentum_dtype
from muonkit.variants import variant_of
from muonkit.views import Block, blocks_of, row_blocks, row_shape

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from muonkit.batching import LocalParam
    from muonkit.distributed.exchange import Domain
    from muonkit.distributed.layout import Layouts

__all__ = ["Param", "ShardedGroup", "own_plan", "state_placement"]


def update_dtype(p: Tensor, grad_dtype: torch.dtype, group: Mapping[str, Any]) -> torch.dtype:
    """What the update of a parameter is computed in, and travels in unless it is told otherwise."""
    most = torch.promote_types(p.dtype, torch.float32)
    dtype = computed_dtype(grad_dtype, momentum_dtype(group, p))
    return most if dtype.itemsize > most.itemsize else dtype


def state_placement(
    layout: Layout, shape: tuple[int, ...], state_shape: tuple[int, ...]
) -> Placement:
    """Where the variant's state lives: as the momentum, and repeated along the mesh axes that cut
    a dim of which the state has one value only.
    """
    axes = tuple(
        Axis(None) if axis.dim is not None and state_shape[axis.dim] != shape[axis.dim] else axis
        for axis in layout.lives.axes
    )
    return layout.lives._replace(axes=axes)


def repeated_axes(
    layout: Layout, group: Mapping[str, Any], domain: Domain, flops: int, size: int
) -> tuple[int, ...]:
    """The mesh axes along which a group's matrices are computed again rather than shared out.

    Along `process_group`'s axis they are always shared out; along axes that a placement replicates
    as `replicas` says, "auto" by cost. Where state is shared out, the work is too.

    Args:
        flops, size: of all matrices of this layout; size in bytes on the way.
    """
    implied = layout.implied
    known = (*layout.given, *implied)
    axes = tuple(axis for axis in layout.lives.copies() if axis not in known)
    choice = group["replicas"]
    if not axes or choice == "split":
        return implied
    both = tuple(sorted((*axes, *implied)))
    rates = machine(domain.device.type, domain.node)
    if choice == "recompute" or cheaper_repeated(rates, layout.stored, axes, flops, size):
        return both
    return implied


class Param(NamedTuple):
    """A parameter: its number in the group, its name, itself, and its gradient's dtype."""

    number: int
    name: str
    p: Tensor
    grad_dtype: torch.dtype


_ALONE = Layout(replicated(1), replicated(1), (), (), None, 0, alone=True)


class _MatrixRef(NamedTuple):
    """One matrix: the parameter that it is of, and how it lies there."""

    param: int
    block: Block
    state_block: Block


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
        self.state: tuple[Transfers, Transfers] | None = None
        if plan.has_state:
            self.state = plan.state_inbound(assignments, me), plan.state_outbound(assignments, me)
        self.moves = {
            (inward, state): plan.moves(assignments, inward, state)
            for inward in (True, False)
            for state in ((False, True) if plan.has_state else (False,))
        }
        self.turns = {
            state: plan.turns(assignments, sharded.cap, state)
            for state in ((False, True) if plan.has_state else (False,))
        }
        self.momentum_shards: dict[tuple[Any, ...], list[_Part]] = {}  # the parts of each stack
        self.param_shards: dict[tuple[int, int], list[_Part]] = {}
        for assignment in assignments:
            source = sharded.sources[assignment.matrix]
            for part in sharded.parts(assignment.matrix, "lives"):
                shape = [b - a for a, b in part.box]
                key = (*shape, sharded.grad_dtypes[source.param])
                self.momentum_shards.setdefault(key, []).append(part)
            for part in sharded.parts(assignment.matrix, "stored"):
                shape_of = source.block.rows, source.block.cols
                self.param_shards.setdefault(shape_of, []).append(part)
        self.stacked = {
            (part.matrix, part.box): (stack, k)
            for stack, members in enumerate(self.momentum_shards.values())
            for k, part in enumerate(members)
        }
        self.batches = self._batches(
            sharded, [assignment.matrix for assignment in assignments if me in assignment.owners]
        )

    def _batches(self, sharded: ShardedGroup, owned: list[int]) -> list[tuple[int, int, list[int]]]:
        """Rows, columns and matrices of what is computed together, equal shapes side by side."""
        blocks = {matrix: sharded.sources[matrix].block for matrix in owned}
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
    """The shared parameters of one group with updates of one dtype, planned.

    Args:
        params: of equal dtypes.
        loads: FLOPs that each rank has already; added to.
    """

    def __init__(
        self,
        layouts: Layouts,
        group: dict[str, Any],
        params: Sequence[Param],
        loads: list[int],
    ) -> None:
        assert layouts.domain is not None
        self.domain: Domain = layouts.domain
        self.group = group
        self.params = {param.number: param.p for param in params}
        self.grad_dtypes = {param.number: param.grad_dtype for param in params}
        self.dtype = update_dtype(params[0].p, params[0].grad_dtype, group)
        chosen = group["exchange_dtype"]
        self.comm_dtype = self.dtype if chosen == "auto" else getattr(torch, chosen)
        tensors, matrices, self.sources = _describe(layouts, group, params)
        tensors = self._repeat(tensors, matrices, [layouts[param.p] for param in params])
        kind = self.domain.device.type
        self.cap: int = group["bytes_in_flight"] or default_cap(kind)
        size = self.domain.size
        self.state_dtype = torch.promote_types(params[0].p.dtype, torch.float32)
        self.plan: Plan = make_plan(
            size,
            tensors,
            matrices,
            self.comm_dtype.itemsize,
            self.cap,
            loads,
            self.state_dtype.itemsize,
        )
        self._state_cuts: dict[tuple[int, Box], tuple[slice, ...]] = {}
        self.buckets = [_Bucket(self, assignments) for assignments in self.plan.buckets]

    def _repeat(
        self, tensors: list[Stored], matrices: list[Matrix], layouts: list[Layout]
    ) -> list[Stored]:
        """The tensors, told along which axes they are computed again."""
        costs: dict[Layout, list[int]] = {}
        for matrix in matrices:
            cost = costs.setdefault(layouts[matrix.tensor], [0, 0])
            cost[0] += matrix.flops
            cost[1] += box_size(matrix.box) * self.comm_dtype.itemsize
        return [
            tensor._replace(
                repeat=repeated_axes(layout, self.group, self.domain, *costs.get(layout, (0, 0)))
            )
            for tensor, layout in zip(tensors, layouts, strict=True)
        ]

    def tensor(self, matrix: int) -> Stored:
        """The parameter that a matrix is of."""
        return self.plan.tensors[self.plan.matrices[matrix].tensor]

    def parts(self, matrix: int, where: str) -> list[_Part]:
        """What this rank has of a matrix, in what it has of the parameter ("stored"), or of the
        momentum ("lives").
        """
        tensor, me = self.tensor(matrix), self.domain.position
        placement: Placement = getattr(tensor, where)
        boxes = placement.parts(tensor.shape, me, self.plan.matrices[matrix].box)
        return [_Part(matrix, box, placement.slices(tensor.shape, me, box)) for box in boxes]

    def momentum_piece(self, part: _Part, stored: Tensor) -> Tensor:
        """The piece of this rank's shard of a parameter that lies where its momentum is kept."""
        planned = self.tensor(part.matrix)
        return stored[planned.stored.slices(planned.shape, self.domain.position, part.box)]

    def state_piece(self, matrix: int, box: Box, tensor: Tensor) -> Tensor:
        """A box of the variant's state, of this rank's own tensor of it."""
        if (matrix, box) not in self._state_cuts:
            planned = self.tensor(matrix)
            assert planned.state_lives is not None
            self._state_cuts[matrix, box] = planned.state_lives.slices(
                planned.state_shape, self.domain.position, box
            )
        return tensor[self._state_cuts[matrix, box]]

    def batches(self, entries: Mapping[int, LocalParam]) -> list[ShardedBatch]:
        """Those of a step; entries by index in the group."""
        return [ShardedBatch(self, bucket, entries) for bucket in self.buckets]


def own_plan(
    layouts: Layouts, group: dict[str, Any], params: Sequence[Param], loads: list[int]
) -> Plan:
    """What every rank computes of its own, among the ranks that share others.

    Without what lies on other ranks than these: of that only some of them know.
    """
    spread = [
        param
        for param in params
        if layouts.domain is None or not (layouts.get(param.p) or _ALONE).alone
    ]
    tensors, matrices, _ = _describe(layouts, group, spread)
    return make_own(len(loads), tensors, matrices, loads)


def _describe(
    layouts: Layouts, group: dict[str, Any], params: Sequence[Param]
) -> tuple[list[Stored], list[Matrix], list[_MatrixRef]]:
    """Parameters and their matrices as the plan knows them, and where each matrix is from."""
    kept, view = variant_of(group["variant"]).state, group["view"]
    tensors: list[Stored] = []
    matrices: list[Matrix] = []
    sources: list[_MatrixRef] = []
    for number, (index, name, p, _) in enumerate(params):
        shape, layout = tuple(p.shape), layouts.get(p) or _ALONE
        device = p.device if layouts.domain is None else layouts.domain.device
        tensor = Stored(name, shape, layout.stored, layout.lives)
        if kept != "none":
            like = row_shape(view, shape) if kept == "rows" else shape
            lives = state_placement(layout, shape, like)
            tensor = tensor._replace(state_shape=like, state_lives=lives)
        tensors.append(tensor)
        for block, row_block in zip(blocks_of(view, shape), row_blocks(view, shape), strict=True):
            if not block.batch * block.rows * block.cols:
                continue
            flops = flops_of(group, block.rows, block.cols, p.dtype, device)
            of = row_block if kept == "rows" else block
            for box, state in zip(block.boxes(), of.boxes(), strict=True):
                sources.append(_MatrixRef(index, block, of))
                matrices.append(Matrix(number, box, flops, None if kept == "none" else state))
    return tensors, matrices, sources


class ShardedBatch:
    """A bucket of matrices that several ranks have parts of.

    The momentum's pieces go to the owners, the results to everywhere where the parameter is
    stored; each way is one exchange, and the variant's state has its own.
    """

    def __init__(
        self, sharded: ShardedGroup, bucket: _Bucket, entries: Mapping[int, LocalParam]
    ) -> None:
        self.sharded, self.bucket, self.entries = sharded, bucket, entries
        self.momentum_shards = [
            MomentumShards(
                [part.of(self._entry(part.matrix).grad) for part in members],
                [part.of(self._entry(part.matrix).momentum) for part in members],
                sharded.params[sharded.sources[members[0].matrix].param].dtype,
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
        return self.entries[self.sharded.sources[matrix].param]

    def to_owners(self, u: Sequence[Tensor]) -> Pending[Any]:
        whole = self._owner_buffers()
        on_its_way = [self._inward(u, whole, self.sharded.comm_dtype)]
        if self.bucket.state is not None:
            on_its_way.append(self._fetch_state(self.bucket.state[0]))
        return Pending(whole, on_its_way)

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
        number, block, _ = self.sharded.sources[matrix]
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
            blocks = [self.sharded.sources[matrix].block for matrix in members]
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
                block = self.sharded.sources[matrix].block
                logical = place(padded, block.rows, block.cols)[0]
                stored = logical.mT if block.transposed else logical
                box = self.sharded.plan.matrices[matrix].box
                parts[matrix] = stored.view([b - a for a, b in box])
        return parts

    def _inside(self, matrix: int, box: Box) -> tuple[slice, ...]:
        return slices(box, self.sharded.plan.matrices[matrix].box)

    def _fetch_state(self, transfers: Transfers) -> Exchange:
        """Receive the owned matrices' variance, in the stored orientation."""
        for _, matrix, _ in transfers.recvs:
            if matrix not in self._variances:
                state = self.sharded.plan.matrices[matrix].state_box
                assert state is not None
                self._variances[matrix] = torch.empty(
                    [b - a for a, b in state],
                    dtype=self.sharded.state_dtype,
                    device=self.sharded.domain.device,
                )
        outgoing, incoming = self._state_transfers(transfers)
        return self._move(outgoing, incoming, self.sharded.state_dtype, inward=True, state=True)

    def _state_transfers(
        self, transfers: Transfers, back: bool = False
    ) -> tuple[list[tuple[int, Tensor]], list[tuple[int, Tensor]]]:
        """What is sent and received of the variance: from where it lives to the owner, or back."""
        at_home, at_owner = (
            (transfers.recvs, transfers.sends) if back else (transfers.sends, transfers.recvs)
        )
        home = []
        for position, matrix, box in at_home:
            variance = self._entry(matrix).variance
            assert variance is not None
            home.append((position, self.sharded.state_piece(matrix, box, variance)))
        owner = []
        for position, matrix, box in at_owner:
            state = self.sharded.plan.matrices[matrix].state_box
            assert state is not None
            owner.append((position, self._variances[matrix][slices(box, state)]))
        return (owner, home) if back else (home, owner)

    def stacks(self, o: Sequence[Tensor]) -> list[MatrixStack]:
        stacks = []
        for (_, _, members), matrices in zip(self.bucket.batches, o, strict=True):
            start = 0
            while start < len(members):
                block = self.sharded.sources[members[start]].block
                stop = start + 1
                while stop < len(members) and _alike(
                    self.sharded.sources[members[stop]].block, block
                ):
                    stop += 1
                some = members[start:stop]
                variance = torch.stack([self._logical_state(matrix) for matrix in some])
                steps = [self._entry(matrix).steps for matrix in some]
                count = None
                if steps[0] is not None:
                    count = torch.stack([s for s in steps if s is not None])
                    count = count.to(matrices.device).reshape(-1, 1, 1)
                whole = place(matrices[start:stop], block.rows, block.cols)
                stacks.append(MatrixStack(whole, variance, count))
                self._stacks.append((some, variance))
                start = stop
        return stacks

    def _logical_state(self, matrix: int) -> Tensor:
        """`(rows, 1)` or `(rows, cols)`."""
        block = self.sharded.sources[matrix].state_block
        return block.to_matrices(self._variances[matrix])[0]

    def keep(self, stacks: Sequence[MatrixStack]) -> Pending[None]:
        """Send the variant's state back to everywhere where it is kept."""
        assert self.bucket.state is not None
        for some, variance in self._stacks:
            for matrix, rows in zip(some, variance.unbind(), strict=True):
                self._logical_state(matrix).copy_(rows)
        outgoing, incoming = self._state_transfers(self.bucket.state[1], back=True)
        exchange = self._move_out(outgoing, incoming, self.sharded.state_dtype, state=True)
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

    def _move_out(
        self,
        outgoing: list[tuple[int, Tensor]],
        incoming: list[tuple[int, Tensor]],
        dtype: torch.dtype,
        state: bool,
    ) -> Exchange:
        """In several turns where an owner's copies for all others would not fit in the cap; the
        last of them is on its way when this returns.
        """
        turns = self.bucket.turns[state]
        for number in range(turns - 1):
            self._move(outgoing, incoming, dtype, False, state, (number, turns)).wait()
        return self._move(outgoing, incoming, dtype, False, state, (turns - 1, turns))

    def _move(
        self,
        outgoing: list[tuple[int, Tensor]],
        incoming: list[tuple[int, Tensor]],
        dtype: torch.dtype,
        inward: bool,
        state: bool,
        turn: tuple[int, int] = (0, 1),
    ) -> Exchange:
        together = self.bucket.moves[inward, state]
        return move(self.sharded.domain, outgoing, incoming, dtype, together, turn)


def _alike(one: Block, other: Block) -> bool:
    return (one.rows, one.cols) == (other.rows, other.cols)
