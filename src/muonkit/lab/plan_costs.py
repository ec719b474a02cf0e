"""The costs of a step for every rank, by the optimizer's own plan.

The plan is made by `muonkit.distributed.planner.plan_step`, which plans a real step too, from the
shapes of a model instead of its tensors. Nothing here is measured.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from muonkit.distributed.machines import Machine
from muonkit.distributed.param_layout import Layout, stage_placement
from muonkit.distributed.placement import Box, Placement, Where, box_size, cells
from muonkit.distributed.plan import Plan, StepPlan
from muonkit.distributed.plan_batches import cap_of
from muonkit.distributed.planner import GroupToPlan, ParamToPlan, plan_step
from muonkit.distributed.transfers import Direction, alike
from muonkit.lab.plan_layouts import Mesh
from muonkit.lab.shapes import ModelShape, ParameterShape
from muonkit.newton_schulz import triton as kernels
from muonkit.newton_schulz.coefficients import KELLER, resolve
from muonkit.newton_schulz.forms import choose_form, product_flops
from muonkit.newton_schulz.symmetric import block_count
from muonkit.stages import AFTER, kept_shape

__all__ = [
    "Assumptions",
    "Costs",
    "Simulation",
    "Vector",
    "costs_of",
    "elements",
    "flops_of",
    "of_stage",
    "workspace",
]

Vector = npt.NDArray[np.float64]  # a figure for every rank of a stage

#: Buckets that the optimizer has under way at once.
_DEPTH = 3


@dataclass(frozen=True)
class Assumptions:
    """The assumptions of a prediction, beside the model and the mesh.

    Attributes:
        device: "cuda": products in bfloat16 by the symmetric kernel; "cpu": in float32 in blocks.
        rates: of products and links.
        memory: bytes/s of a rank's memory.
        itemsize: bytes of an element of parameters, gradients, momentum and moments.
        comm_itemsize: bytes of an element between ranks; None is `itemsize`.
        after: the stage of that option: a key of `AFTER`, or "none".
        replicas: "auto", "recompute" or "split", as the optimizer's option.
        fraction, selection: as the optimizer's options.
        period: as the optimizer's option.
    """

    device: str
    rates: Machine
    memory: float
    itemsize: int = 4
    comm_itemsize: int | None = None
    after: str = "none"
    replicas: str = "auto"
    fraction: float = 1.0
    selection: str = "global"
    period: int = 1

    @property
    def kept(self) -> str:
        """What the stage keeps of a matrix: "none", "rows" or "entries"."""
        return AFTER[self.after].state if self.after in AFTER else "none"

    @property
    def comm_bytes(self) -> int:
        return self.itemsize if self.comm_itemsize is None else self.comm_itemsize

    @property
    def product_itemsize(self) -> int:
        return 4 if self.device == "cpu" else 2


@dataclass(frozen=True)
class Costs:
    """The costs of one step for every rank, in bytes and FLOPs; nothing is in seconds.

    Attributes:
        flops: of the products.
        matrices: orthogonalized.
        received_in, sent_in: bytes of momentum, from the ranks that store it to the owners.
        received_out, sent_out: bytes of results, from the owners to the ranks that store the
            parameters.
        between: the larger direction of what of these leaves the node, in plus out.
        within: the same of what stays in the node.
        parameters, state: bytes kept. Gradients are as many as parameters.
        transient: most bytes held for the exchange and the products at once, an upper estimate.
        touched: bytes that elementwise work reads and writes.
    """

    flops: Vector
    matrices: Vector
    received_in: Vector
    sent_in: Vector
    received_out: Vector
    sent_out: Vector
    between: Vector
    within: Vector
    parameters: Vector
    state: Vector
    transient: Vector
    touched: Vector


def flops_of(rows: int, cols: int, device: str) -> int:
    """FLOPs of five iterations of the default schedule on one matrix; see
    `muonkit.newton_schulz.forms`.
    """
    m, n = sorted((rows, cols))
    triples, itemsize = resolve(KELLER).triples, 4 if device == "cpu" else 2
    if device == "cpu":
        blocks = block_count(m, torch.float32, torch.device("cpu"))
    else:
        # The simulated GPU has the kernel, whatever this machine has.
        blocks = kernels.row_blocks(m, torch.bfloat16)
    restarts = choose_form("auto", m, n, triples, itemsize, blocks).restarts
    return product_flops(m, n, triples, restarts, blocks)


# -- parameters -----------------------------------------------------------------------------------


def of_stage(model: ModelShape, stage: int, stages: int) -> list[tuple[str, ParameterShape]]:
    """The parameters of a pipeline stage by name, layer by layer as in the model: an even share of
    the layers, the last ones larger by one; what comes before them is in the first stage, what
    comes after them in the last.
    """
    kinds, layers = model.parameters, model.layers
    if not layers:
        return [(p.name, p) for p in kinds]
    bounds = [layers * s // stages for s in range(stages + 1)]
    mine = range(bounds[stage], bounds[stage + 1])
    first = next(i for i, p in enumerate(kinds) if p.layers is not None)
    named = [(p.name, p) for p in kinds[:first]] if stage == 0 else []
    for layer in mine:
        for p in kinds:
            if p.layers is not None and layer in p.layers:
                named.append((p.name.replace("*", str(layer), 1), p))
    if stage == stages - 1:
        named += [(p.name, p) for p in kinds[first:] if p.layers is None]
    return named


@lru_cache(maxsize=256)
def elements(placement: Placement, shape: tuple[int, ...]) -> Vector:
    """How many elements of a tensor every rank has."""
    have = np.ones(placement.mesh)
    for dim, length in enumerate(shape):
        axes = [i for i, axis in enumerate(placement.axes) if axis.dim == dim]
        lengths = np.zeros([placement.mesh[i] for i in axes])
        for (start, stop), at in cells(placement, length, dim):
            lengths[tuple(at[i] for i in axes)] += stop - start
        have = have * np.expand_dims(lengths, [i for i in range(have.ndim) if i not in axes])
    by_position = np.zeros(have.size)
    by_position[list(placement.positions)] = have.ravel()
    by_position.flags.writeable = False
    return by_position


# -- muonkit's own step ---------------------------------------------------------------------------


@dataclass
class Simulation:
    """One pipeline stage's step: the optimizer's planner plans it, from shapes.

    Attributes:
        parameters: their names, shapes and layouts.
        in_blocks: whether it is one between whole steps.
    """

    mesh: Mesh
    assume: Assumptions
    parameters: list[tuple[str, ParameterShape, Layout]]
    in_blocks: bool = False
    plan: StepPlan = field(init=False)

    def __post_init__(self) -> None:
        by_view: dict[str | None, dict[int, ParamToPlan]] = {}
        for index, (name, p, layout) in enumerate(self.parameters):
            itemsize = self.assume.itemsize if p.view is None else self.assume.comm_bytes
            param = ParamToPlan(name, p.shape, layout, itemsize=itemsize)
            by_view.setdefault(p.view, {})[index] = param
        groups = [
            GroupToPlan(
                params,
                view,
                self._flops,
                cap_of(self.assume.device),
                self.assume.replicas,
                self.assume.kept,
                self.assume.fraction,
                self.assume.selection,
                self.in_blocks,
            )
            for view, params in by_view.items()
        ]
        rates, ranks = self.assume.rates, self.mesh.ranks
        self.plan, _ = plan_step(groups, rates, ranks, merge_gathers=True)

    def _flops(self, kind: object, rows: int, cols: int) -> int:
        return flops_of(rows, cols, self.assume.device)

    def traffic(self, node: int = 1) -> dict[str, Vector]:
        """The plan's `traffic`, by its fields."""
        figures = self.plan.traffic(node)._asdict()
        return {name: np.array(each, dtype=np.float64) for name, each in figures.items()}


def costs_of(step: Simulation, assume: Assumptions) -> Costs:
    total, far = step.traffic(), step.traffic(assume.rates.node)
    near = {name: total[name] - far[name] for name in total}
    parameters = state = touched = np.zeros(step.mesh.ranks)
    for _, p, layout in step.parameters:
        stored = elements(layout.param_placement, p.shape)
        kept = elements(layout.state_placement, p.shape)
        parameters = parameters + stored * assume.itemsize
        if p.view is None:
            state = state + 2 * kept * assume.itemsize
            # Gradient, two moments read and written, parameter read and written.
            touched = touched + 7 * kept * assume.itemsize
            continue
        state = state + kept * assume.itemsize
        # Gradient, momentum read and written, update written; update, parameter read and written.
        touched = touched + (4 * kept + 3 * stored) * assume.itemsize
        stage_state = assume.kept
        if stage_state != "none":
            like = kept_shape(stage_state, p.view, p.shape)
            state = state + 4 * elements(stage_placement(layout, p.shape, like), like)
    return Costs(
        flops=total["flops"],
        matrices=total["matrices"],
        received_in=total["received_in"],
        sent_in=total["sent_in"],
        received_out=total["received_out"],
        sent_out=total["sent_out"],
        between=_busier(far),
        within=_busier(near),
        parameters=parameters,
        state=state,
        transient=_transient(step, assume),
        touched=touched,
    )


def _busier(bytes_: dict[str, Vector]) -> Vector:
    """Links carry both directions at once."""
    there = np.maximum(bytes_["sent_in"], bytes_["received_in"])
    back = np.maximum(bytes_["sent_out"], bytes_["received_out"])
    busier: Vector = there + back
    return busier


# -- memory ---------------------------------------------------------------------------------------


def _transient(step: Simulation, assume: Assumptions) -> Vector:
    """The largest of: any three buckets in a row and one's products, or a batch of own matrices."""
    most = np.zeros(step.mesh.ranks)
    for plan in step.plan.plans:
        if not plan.inward:
            continue
        if not plan.itemsize:
            most = np.maximum(most, _own_batch(plan, assume))
            continue
        window: list[Vector] = []
        for held, work in _buckets(plan, assume):
            window = [*window[-(_DEPTH - 1) :], held]
            most = np.maximum(most, sum(window) + work)
    return most


def _buckets(plan: Plan, assume: Assumptions) -> Iterator[tuple[Vector, Vector]]:
    """For every bucket, bytes held on every rank for its exchange, and for its products.

    On the way in there are the pieces, copied for sending, and what arrives, as whole matrices; on
    the way out whole matrices, copied for sending (as many at a time as the cap allows), and what
    arrives, as pieces. What stays on its rank is counted as if it were sent.
    """
    likes = [alike(plan.tensors, plan.matrices, inward) for inward in (True, False)]
    cap, both = cap_of(assume.device), assume.itemsize + plan.itemsize
    known: dict[tuple[int, Where, bool], _Lying] = {}
    kinds: dict[int, tuple[int, int, tuple[tuple[int, bool, Direction], ...]]] = {}
    for bucket in plan.buckets:
        counts: dict[tuple[int, Where, bool], int] = {}
        momenta, params, owned, sent, work = np.zeros((5, plan.ranks))
        for matrix, owners in bucket:
            kind = likes[0][matrix]
            if kind not in kinds:
                box = plan.matrices[kind].box
                ways = tuple(
                    (like[kind], inward, plan.direction(like[kind], inward))
                    for inward, like in zip((True, False), likes, strict=True)
                )
                kinds[kind] = box_size(box), workspace(box, assume), ways
            size, extra, ways = kinds[kind]
            for owner in owners:
                owned[owner] += size
                work[owner] += extra
                for of_way, inward, way in ways:
                    where = way.place.where(owner, way.axes)
                    key = of_way, where, inward
                    if key not in known:
                        known[key] = _lying(way.sizes(where))
                    counts[key] = counts.get(key, 0) + 1
                    if not inward:
                        sent[owner] += known[key].total * plan.itemsize
        for key, count in counts.items():
            (momenta if key[2] else params)[known[key].positions] += count * known[key].sizes
        inward_bytes = (momenta + owned) * both
        outward_bytes = owned * assume.itemsize + np.minimum(sent, cap) + params * both
        yield np.maximum(inward_bytes, outward_bytes), work


class _Lying(NamedTuple):
    """Who has how many elements of a matrix."""

    positions: npt.NDArray[np.int64]
    sizes: npt.NDArray[np.int64]
    total: int


def _lying(sizes: Mapping[int, int]) -> _Lying:
    return _Lying(np.array(list(sizes)), np.array(list(sizes.values())), sum(sizes.values()))


def workspace(box: Box, assume: Assumptions) -> int:
    """Bytes for the products of one matrix: itself, and three symmetric ones."""
    m, n = sorted(b - a for a, b in box)[-2:]
    return (m * n + 3 * m * m) * assume.product_itemsize


def _own_batch(plan: Plan, assume: Assumptions) -> Vector:
    """A batch holds up to the cap, or all that a rank has of one parameter, and its products."""
    cap = cap_of(assume.device)
    most = np.zeros(plan.ranks)
    every = np.zeros(plan.ranks)
    by_tensor: dict[int, Vector] = {}
    for matrix, owners in plan.assignments():
        planned = plan.matrices[matrix]
        mine = by_tensor.setdefault(planned.tensor, np.zeros(plan.ranks))
        mine[list(owners)] += box_size(planned.box) * assume.itemsize
    boxes = {matrix.box for matrix in plan.matrices}
    ratio = max((workspace(box, assume) / box_size(box) for box in boxes), default=0.0)
    for mine in by_tensor.values():
        most = np.maximum(most, mine)
        every += mine
    batch = np.maximum(most, np.minimum(every, cap))
    held: Vector = batch * (1 + ratio / assume.itemsize)
    return held
