"""The planner: who computes what in a step, from shapes and placements. Pure Python, no tensors.

`plan_step` plans the step of an optimizer and the simulated step of thousands of ranks. Every rank
makes the same plan by itself: it is a function of shapes, layouts and constants.
"""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, NamedTuple

from muonkit.distributed.blocks import blocks_of_matrix
from muonkit.distributed.machines import Machine, cheaper_repeated
from muonkit.distributed.owners import are_even, make_gather, make_own, make_plan
from muonkit.distributed.param_layout import Layout, computed_in_place, stage_placement
from muonkit.distributed.placement import Box, Placement, cells
from muonkit.distributed.plan import Plan, StepPlan
from muonkit.distributed.transfers import Lines, Matrix, PlannedTensor
from muonkit.selection import count_of, lines_are_rows
from muonkit.stages import kept_shape
from muonkit.views import Block, blocks_of, line_dims, row_blocks

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Mapping, Sequence

__all__ = [
    "GroupToPlan",
    "MatrixBlock",
    "ParamToPlan",
    "PlannedGroup",
    "PlannedParams",
    "blocks_of_param",
    "check_blocks",
    "matrices_of",
    "plan_step",
    "selected_lines",
]


class ParamToPlan(NamedTuple):
    """A parameter as the planner knows it.

    Attributes:
        name: for messages.
        shape: the logical one.
        layout: where it and its state lie.
        kind: what must be equal for two parameters to travel together: their dtypes.
        itemsize: bytes per element when it travels.
        stage_itemsize: bytes per element of the stage's state.
        has_grad: False for a parameter that this step leaves as it is. If its matrices are computed
            where they lie it counts nevertheless: the owners of others may not depend on which
            experts got a token on one rank.
    """

    name: str
    shape: tuple[int, ...]
    layout: Layout
    kind: Hashable = None
    itemsize: int = 4
    stage_itemsize: int = 4
    has_grad: bool = True


class GroupToPlan(NamedTuple):
    """Parameters of equal hyperparameters.

    Attributes:
        params: by their indices in the group; those that are not trained may be left out.
        view: how each is a batch of matrices; None for AdamW's.
        flops: of one matrix, by the parameter's `kind`, rows and columns.
        replicas: the option.
        stage_state: what a stage keeps of a matrix: "none", "rows" or "entries".
        fraction, selection: the options.
        cap: bytes that a rank may have in flight for one bucket.
        in_blocks: whether what a rank stores of a matrix is a matrix of its own (MuonBP).
    """

    params: Mapping[int, ParamToPlan]
    view: str | None
    flops: Callable[[Hashable, int, int], int]
    cap: int
    replicas: str = "auto"
    stage_state: str = "none"
    fraction: float = 1.0
    selection: str = "global"
    in_blocks: bool = False


class MatrixBlock(NamedTuple):
    """Which block of which parameter (by its index in the group) a planned matrix is from.

    Attributes:
        param: the index in the group.
        block: of the parameter.
        stage_block: of the stage's state; the same block where it keeps none.
        cut: whether the planned matrix is less than one of the view.
    """

    param: int
    block: Block
    stage_block: Block
    cut: bool = False


class PlannedParams(NamedTuple):
    """Parameters that travel together, by their indices in the group, and their plan.

    Attributes:
        blocks: of the plan's matrices, one for each; empty for AdamW's.
        in_blocks: as `GroupToPlan.in_blocks`: whoever stores a part of a matrix stores it whole.
    """

    params: tuple[int, ...]
    plan: Plan
    blocks: tuple[MatrixBlock, ...] = ()
    in_blocks: bool = False


class PlannedGroup(NamedTuple):
    """One group's part of a step.

    Attributes:
        own: indices of the parameters that are computed where they are.
        shared: what several ranks compute for one another.
    """

    own: tuple[int, ...]
    shared: tuple[PlannedParams, ...]


def plan_step(
    groups: Sequence[GroupToPlan], rates: Machine, ranks: int, merge_gathers: bool = False
) -> tuple[StepPlan, list[PlannedGroup]]:
    """Plan a step.

    Args:
        rates: of the ranks' products and links, for choices by cost.
        ranks: how many there are.
        merge_gathers: plan AdamW's parameters of one shape and layout once and count them as often
            as there are, without a cap: the same bytes, in far less time where ranks are many.

    Returns:
        The plan of the whole step, and each group's part of it. The plan has first what ranks
        compute where it is, then what they exchange, then AdamW's parameters.
    """
    loads = [0] * ranks
    own_plans: list[Plan] = []
    exchanged: list[Plan] = []
    gathers: list[Plan] = []
    times: list[int] = []
    planned: list[PlannedGroup] = []
    for group in groups:
        in_place = [i for i, param in group.params.items() if _is_in_place(group, param)]
        own, shared = _sort(group, set(in_place))
        if group.view is None:
            if merge_gathers:
                for plan, count in _merged_gathers(ranks, group, shared, rates):
                    gathers.append(plan)
                    times.append(count)
                planned.append(PlannedGroup(own, ()))
                continue
            found = [_gather(ranks, group, indices, rates) for indices in shared]
            gathers += [params.plan for params in found]
            times += [1] * len(found)
        else:
            plan = _own(ranks, group, in_place, loads)
            if plan.matrices:
                own_plans.append(plan)
            found = [_shared(ranks, group, indices, rates, loads) for indices in shared]
            exchanged += [params.plan for params in found]
        planned.append(PlannedGroup(own, tuple(found)))
    plans = (*own_plans, *exchanged, *gathers)
    counts = (1,) * (len(plans) - len(times)) + tuple(times)
    return StepPlan(ranks, plans, counts), planned


def _sort(group: GroupToPlan, in_place: set[int]) -> tuple[tuple[int, ...], list[tuple[int, ...]]]:
    """Indices of the parameters with a gradient that are computed where they are, and of the
    others by kind.
    """
    own: list[int] = []
    shared: dict[Hashable, list[int]] = {}
    for index, param in group.params.items():
        if not param.has_grad:
            continue
        if index in in_place:
            own.append(index)
        else:
            shared.setdefault(param.kind, []).append(index)
    return tuple(own), [tuple(indices) for indices in shared.values()]


def _is_in_place(group: GroupToPlan, param: ParamToPlan) -> bool:
    layout = param.layout
    return layout.alone or computed_in_place(layout, param.shape, group.view, group.replicas)


def _own(ranks: int, group: GroupToPlan, in_place: Sequence[int], loads: list[int]) -> Plan:
    """The plan of the matrices that are computed where they are. It leaves out parameters on other
    ranks than these, of which only some ranks know.
    """
    indices = [i for i in in_place if ranks == 1 or not group.params[i].layout.alone]
    tensors, matrices, _ = _describe(group, indices)
    return make_own(ranks, tensors, matrices, loads)


def _shared(
    ranks: int, group: GroupToPlan, indices: tuple[int, ...], rates: Machine, loads: list[int]
) -> PlannedParams:
    """The plan of parameters of one kind that ranks compute for one another."""
    tensors, matrices, blocks = _describe(group, indices)
    first = group.params[indices[0]]
    flops = [0] * len(tensors)
    for matrix in matrices:
        flops[matrix.tensor] += matrix.flops
    costs: dict[Layout, list[int]] = {}
    for index, number in zip(indices, flops, strict=True):
        cost = costs.setdefault(group.params[index].layout, [0, 0])
        cost[0] += number
        cost[1] += math.prod(group.params[index].shape) * first.itemsize
    repeats = {
        layout: _repeated_axes(layout, _replicas(group, layout), rates, *cost)
        for layout, cost in costs.items()
    }
    tensors = [
        tensor._replace(repeat=repeats[group.params[index].layout])
        for tensor, index in zip(tensors, indices, strict=True)
    ]
    plan = make_plan(
        ranks,
        tensors,
        matrices,
        first.itemsize,
        group.cap,
        loads,
        first.stage_itemsize,
        rates.node,
    )
    return PlannedParams(indices, plan, tuple(blocks), group.in_blocks)


def _replicas(group: GroupToPlan, layout: Layout) -> str:
    """The option, and in a step of blocks, which is to send nothing, "recompute" for "auto"."""
    cut = any(axis.dim is not None for axis in layout.param_placement.axes)
    return "recompute" if group.in_blocks and cut and group.replicas == "auto" else group.replicas


def _repeated_axes(
    layout: Layout, replicas: str, rates: Machine, flops: int, size: int
) -> tuple[int, ...]:
    """The mesh axes along which the same matrices are computed again, rather than divided among
    the ranks.

    Along `process_group`'s axis they are always divided; along axes that a placement replicates as
    `replicas` says, "auto" by cost. Where state is sharded, the work is divided too.

    Args:
        flops, size: of all matrices of this layout; the bytes that they have when they travel.
    """
    implied = layout.implied
    known = (*layout.given, *implied)
    axes = tuple(axis for axis in layout.state_placement.copies() if axis not in known)
    if not axes or replicas == "split":
        return implied
    both = tuple(sorted((*axes, *implied)))
    if replicas == "recompute":
        return both
    cheaper = cheaper_repeated(rates, layout.param_placement, axes, flops, size)
    return both if cheaper else implied


def _gather(
    ranks: int, group: GroupToPlan, indices: tuple[int, ...], rates: Machine
) -> PlannedParams:
    tensors = [_tensor(group.params[i]) for i in indices]
    itemsize = group.params[indices[0]].itemsize
    plan = make_gather(ranks, tensors, itemsize, group.cap, rates.node)
    return PlannedParams(indices, plan)


def _merged_gathers(
    ranks: int, group: GroupToPlan, shared: Sequence[tuple[int, ...]], rates: Machine
) -> list[tuple[Plan, int]]:
    counts: dict[tuple[PlannedTensor, int, bool], int] = {}
    for indices in shared:
        # Of all that travel together, as in the optimizer's own plan.
        even = are_even(ranks, [_tensor(group.params[index]) for index in indices])
        for index in indices:
            param = group.params[index]
            kind = _tensor(param)._replace(name=""), param.itemsize, even
            counts[kind] = counts.get(kind, 0) + 1
    return [
        (make_gather(ranks, [tensor], itemsize, node=rates.node, even=even), count)
        for (tensor, itemsize, even), count in counts.items()
    ]


# -- parameters and their matrices ----------------------------------------------------------------


def _tensor(param: ParamToPlan) -> PlannedTensor:
    layout = param.layout
    return PlannedTensor(param.name, param.shape, layout.param_placement, layout.state_placement)


def _describe(
    group: GroupToPlan, indices: Sequence[int]
) -> tuple[list[PlannedTensor], list[Matrix], list[MatrixBlock]]:
    """Parameters of a group as tensors, all their matrices, and the block of each."""
    assert group.view is not None
    tensors: list[PlannedTensor] = []
    matrices: list[Matrix] = []
    blocks: list[MatrixBlock] = []
    costs: dict[tuple[Hashable, int, int], int] = {}
    for number, index in enumerate(indices):
        param = group.params[index]
        shape, tensor = param.shape, _tensor(param)
        if group.stage_state != "none":
            like = kept_shape(group.stage_state, group.view, shape)
            placement = stage_placement(param.layout, shape, like)
            tensor = tensor._replace(stage_shape=like, stage_placement=placement)
        tensors.append(tensor)
        for block, stage_block, boxes, cut in _matrices(group, param):
            blocks += [MatrixBlock(index, block, stage_block, cut)] * len(boxes)
            for box, stage_box in boxes:
                lines = _lines(group, block, box, shape, param.layout.state_placement)
                matrix = Matrix(number, box, 0, stage_box, lines)
                of_kind = param.kind, *matrix.computed(block.rows, block.cols)
                if of_kind not in costs:
                    costs[of_kind] = group.flops(*of_kind)
                matrices.append(matrix._replace(flops=costs[of_kind]))
    return tensors, matrices, blocks


def _lines(
    group: GroupToPlan, block: Block, box: Box, shape: tuple[int, ...], placement: Placement
) -> Lines | None:
    if group.fraction == 1:
        return None
    rows = lines_are_rows(block.rows, block.cols, group.stage_state)
    assert group.view is not None
    dims = tuple(line_dims(group.view, block, len(shape), rows))
    return selected_lines(group.fraction, group.selection, dims, rows, box, shape, placement)


@functools.lru_cache(maxsize=4096)
def selected_lines(
    fraction: float,
    selection: str,
    dims: tuple[int, ...],
    rows: bool,
    box: Box,
    shape: tuple[int, ...],
    placement: Placement,
) -> Lines:
    """Which lines of a matrix are taken, and whether they travel alone: along one dim, of which
    every rank has either all of the matrix's lines, or with "local" a cell of their own.

    Args:
        placement: of the momentum.
    """
    lengths = [box[dim][1] - box[dim][0] for dim in dims]
    count = math.prod(lengths)
    long = [dim for dim, length in zip(dims, lengths, strict=True) if length > 1]
    along = long[0] if len(long) == 1 else dims[0] if not long else None
    if along is not None:
        start, stop = box[along]
        cut = [
            (max(a, start) - start, min(b, stop) - start)
            for (a, b), _ in cells(placement, shape[along], along)
            if max(a, start) < min(b, stop)
        ]
        if selection == "local" or len(cut) == 1:
            taken = tuple((a, b, count_of(fraction, b - a)) for a, b in cut)
            return Lines(dims, rows, taken, along)
    return Lines(dims, rows, ((0, count, count_of(fraction, count)),), None)


def check_blocks(group: GroupToPlan) -> None:
    """Refuse a group with steps of blocks in which a stage would not have what it needs.

    Raises:
        ValueError: it keeps a number per row, and a rank stores parts of rows.
    """
    for param in group.params.values():
        _matrices(group, param)


_Found = tuple[Block, Block, tuple[tuple[Box, Box | None], ...], bool]


def _matrices(group: GroupToPlan, param: ParamToPlan) -> Sequence[_Found]:
    """What `matrices_of` has, and whether it is cut: in a step of blocks the blocks."""
    assert group.view is not None
    if not group.in_blocks:
        return [
            (*found, False) for found in matrices_of(group.view, param.shape, group.stage_state)
        ]
    try:
        return blocks_of_param(
            group.view, param.shape, group.stage_state, param.layout.param_placement
        )
    except ValueError as error:
        raise ValueError(
            f"{param.name} {param.shape} {error}: with period > 1, give its group (or Rule) "
            'period=1, or another stage than "normuon"; "adamuon" keeps a number per entry, '
            '"muon_plus" none'
        ) from None


@functools.lru_cache(maxsize=256)
def blocks_of_param(
    view: str, shape: tuple[int, ...], stage_state: str, placement: Placement
) -> tuple[_Found, ...]:
    """The blocks that ranks store of all matrices of a parameter, as `matrices_of` has matrices,
    and whether each is less than a matrix.

    Raises:
        ValueError: as `blocks_of_matrix`.
    """
    return tuple(
        (each.block, each.stage_block, ((each.box, each.stage_box),), each.cut)
        for block, stage_block, boxes in matrices_of(view, shape, stage_state)
        for pair in boxes
        for each in blocks_of_matrix(block, stage_block, pair, shape, placement)
    )


@functools.lru_cache(maxsize=256)
def matrices_of(
    view: str, shape: tuple[int, ...], stage_state: str
) -> tuple[tuple[Block, Block, tuple[tuple[Box, Box | None], ...]], ...]:
    """The blocks of a parameter that hold matrices: the block, that of the stage's state, and
    for each matrix its box, and the box of the stage's state (None where it keeps none).
    """
    found = []
    for block, row_block in zip(blocks_of(view, shape), row_blocks(view, shape), strict=True):
        if not block.batch * block.rows * block.cols:
            continue
        stage_block = row_block if stage_state == "rows" else block
        boxes = tuple(
            (box, None if stage_state == "none" else stage_box)
            for box, stage_box in zip(block.boxes(), stage_block.boxes(), strict=True)
        )
        found.append((block, stage_block, boxes))
    return tuple(found)
