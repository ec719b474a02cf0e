"""What a step costs every rank: the optimizer's own plan, and the schemes it is compared with.

The plan is made by `muonkit.distributed.plan`, by the functions that plan a real step, from the
shapes of a model instead of its tensors (`Simulation` follows `muonkit.distributed.step_plan`; a
test compares them). Nothing here is measured.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from math import prod
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from muonkit.distributed.placement import Axis, Box, Placement, Where, box_size, cells
from muonkit.distributed.plan import (
    Machine,
    Matrix,
    Plan,
    Stored,
    Traffic,
    cheaper_repeated,
    default_cap,
    make_gather,
    make_own,
    make_plan,
)
from muonkit.distributed.transfers import Direction, alike
from muonkit.lab.plan_layouts import Lay, Mesh
from muonkit.lab.shapes import ModelShape, ParameterShape
from muonkit.newton_schulz import triton as kernels
from muonkit.newton_schulz.coefficients import KELLER, resolve
from muonkit.newton_schulz.forms import choose_form, product_flops
from muonkit.newton_schulz.symmetric import block_count
from muonkit.variants import VARIANTS
from muonkit.views import View, blocks_of, row_blocks, row_shape

__all__ = [
    "Assumptions",
    "Costs",
    "Simulation",
    "Vector",
    "costs_of",
    "elements",
    "flops_of",
    "is_own",
    "matrices_of",
    "of_stage",
    "workspace",
]

Vector = npt.NDArray[np.float64]  # a figure for every rank of a stage

#: Buckets that the optimizer has under way at once.
_DEPTH = 3


@dataclass(frozen=True)
class Assumptions:
    """What a prediction rests on, beside the model and the mesh.

    Attributes:
        device: "cuda": products in bfloat16 by the symmetric kernel; "cpu": in float32 in blocks.
        rates: of products and links.
        memory: bytes/s of a rank's memory.
        itemsize: bytes of an element of parameters, gradients, momentum and moments.
        wire: the same on the way between ranks; None is `itemsize`.
        variant: a key of `VARIANTS`.
        replicas: "auto", "recompute" or "split", as the optimizer's option.
    """

    device: str
    rates: Machine
    memory: float
    itemsize: int = 4
    wire: int | None = None
    variant: str = "plain"
    replicas: str = "auto"

    @property
    def on_the_way(self) -> int:
        return self.itemsize if self.wire is None else self.wire

    @property
    def product_itemsize(self) -> int:
        return 4 if self.device == "cpu" else 2


@dataclass(frozen=True)
class Costs:
    """What one step costs every rank, in bytes and FLOPs; nothing is in seconds.

    Attributes:
        flops: of the products.
        matrices: orthogonalized.
        received_in, sent_in: bytes of momentum on the way to those who compute.
        received_out, sent_out: bytes of results on the way back.
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
    the layers, the first ones larger by one; what comes before them is in the first stage, what
    comes after them in the last.
    """
    kinds = model.parameters
    layers = max(p.layers.stop for p in kinds if p.layers is not None)
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


def is_own(lay: Lay, p: ParameterShape, replicas: str) -> bool:
    """Whether every matrix is whole on the ranks that have it, and none waits for another's work;
    as the optimizer decides.
    """
    if lay.lives != lay.stored:
        return False
    if p.view is None:
        return True
    if any(axis in lay.given for axis in lay.stored.copies()):
        return False
    cut = {axis.dim for axis in lay.stored.axes if axis.dim is not None}
    experts = View.parse(p.view).steps[0] == "experts"
    if cut and not (experts and max(cut) < len(p.shape) - 2):
        return bool((elements(lay.stored, p.shape) == prod(p.shape)).all())
    copies = [axis for axis in lay.stored.copies() if axis not in lay.implied]
    return not copies or replicas == "recompute"


@dataclass
class Simulation:
    """One stage's step. `plans` are those of a real step, AdamW's with how often each is there."""

    mesh: Mesh
    assume: Assumptions
    parameters: list[tuple[str, ParameterShape, Lay]]
    plans: list[tuple[Plan, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        loads = [0] * self.mesh.ranks
        groups: dict[str, list[tuple[str, ParameterShape, Lay]]] = {}
        gathers: dict[Stored, int] = {}
        for name, p, lay in self.parameters:
            if p.view is not None:
                groups.setdefault(p.view, []).append((name, p, lay))
            elif not is_own(lay, p, self.assume.replicas):
                kind = Stored("", p.shape, lay.stored, lay.lives)
                gathers[kind] = gathers.get(kind, 0) + 1
        for members in groups.values():
            own = [m for m in members if is_own(m[2], m[1], self.assume.replicas)]
            shared = [m for m in members if not is_own(m[2], m[1], self.assume.replicas)]
            if own:
                tensors, matrices = self._describe(own)
                self.plans.append((make_own(self.mesh.ranks, tensors, matrices, loads), 1))
            if shared:
                self.plans.append((self._share(shared, loads), 1))
        for kind, count in gathers.items():
            # Without the cap, which cuts it in more buckets of the same bytes.
            plan = make_gather(self.mesh.ranks, [kind], self.assume.itemsize)
            self.plans.append((plan, count))

    def _share(self, members: Sequence[tuple[str, ParameterShape, Lay]], loads: list[int]) -> Plan:
        tensors, matrices = self._describe(members)
        costs: dict[Lay, list[int]] = {}
        for matrix in matrices:
            cost = costs.setdefault(members[matrix.tensor][2], [0, 0])
            cost[0] += matrix.flops
            cost[1] += box_size(matrix.box) * self.assume.on_the_way
        repeats = {lay: self._repeated(lay, *cost) for lay, cost in costs.items()}
        tensors = [
            tensor._replace(repeat=repeats[lay])
            for tensor, (_, _, lay) in zip(tensors, members, strict=True)
        ]
        cap = default_cap(self.assume.device)
        return make_plan(self.mesh.ranks, tensors, matrices, self.assume.on_the_way, cap, loads)

    def _repeated(self, lay: Lay, flops: int, size: int) -> tuple[int, ...]:
        known = (*lay.given, *lay.implied)
        axes = tuple(axis for axis in lay.lives.copies() if axis not in known)
        if not axes or self.assume.replicas == "split":
            return lay.implied
        both = tuple(sorted((*axes, *lay.implied)))
        if self.assume.replicas == "recompute":
            return both
        cheaper = cheaper_repeated(self.assume.rates, lay.stored, axes, flops, size)
        return both if cheaper else lay.implied

    def _describe(
        self, members: Sequence[tuple[str, ParameterShape, Lay]]
    ) -> tuple[list[Stored], list[Matrix]]:
        tensors: list[Stored] = []
        matrices: list[Matrix] = []
        for number, (name, p, lay) in enumerate(members):
            assert p.view is not None
            tensor = Stored(name, p.shape, lay.stored, lay.lives)
            boxes = matrices_of(p.view, p.shape, self.assume.variant, self.assume.device)
            kept = VARIANTS[self.assume.variant].state
            if kept != "none":
                like = row_shape(p.view, p.shape) if kept == "rows" else p.shape
                tensor = tensor._replace(
                    state_shape=like, state_lives=_state_placement(lay, p.shape, like)
                )
            tensors.append(tensor)
            matrices += [Matrix(number, box, flops, state) for box, flops, state in boxes]
        return tensors, matrices

    def traffic(self, node: int = 1) -> dict[str, Vector]:
        """The sum of the plans' `traffic`, by its fields."""
        total = {name: np.zeros(self.mesh.ranks) for name in Traffic._fields}
        for plan, count in self.plans:
            for name, figures in plan.traffic(node)._asdict().items():
                total[name] += count * np.array(figures, dtype=np.float64)
        return total


def _state_placement(lay: Lay, shape: tuple[int, ...], like: tuple[int, ...]) -> Placement:
    axes = tuple(
        Axis(None) if axis.dim is not None and like[axis.dim] != shape[axis.dim] else axis
        for axis in lay.lives.axes
    )
    return lay.lives._replace(axes=axes)


@lru_cache(maxsize=256)
def matrices_of(
    view: str, shape: tuple[int, ...], variant: str, device: str
) -> list[tuple[Box, int, Box | None]]:
    """Every matrix of a parameter: its box, its FLOPs, and the box of its variant's state."""
    kept = VARIANTS[variant].state
    found: list[tuple[Box, int, Box | None]] = []
    for block, row_block in zip(blocks_of(view, shape), row_blocks(view, shape), strict=True):
        flops = flops_of(block.rows, block.cols, device)
        of = row_block if kept == "rows" else block
        for box, state in zip(block.boxes(), of.boxes(), strict=True):
            found.append((box, flops, None if kept == "none" else state))
    return found


def costs_of(step: Simulation, assume: Assumptions) -> Costs:
    total, far = step.traffic(), step.traffic(assume.rates.node)
    near = {name: total[name] - far[name] for name in total}
    parameters = state = touched = np.zeros(step.mesh.ranks)
    for _, p, lay in step.parameters:
        stored, lives = elements(lay.stored, p.shape), elements(lay.lives, p.shape)
        parameters = parameters + stored * assume.itemsize
        if p.view is None:
            state = state + 2 * lives * assume.itemsize
            # Gradient, two moments read and written, parameter read and written.
            touched = touched + 7 * lives * assume.itemsize
            continue
        state = state + lives * assume.itemsize
        # Gradient, momentum read and written, update written; update, parameter read and written.
        touched = touched + (4 * lives + 3 * stored) * assume.itemsize
        kept = VARIANTS[assume.variant].state
        if kept != "none":
            like = row_shape(p.view, p.shape) if kept == "rows" else p.shape
            state = state + 4 * elements(_state_placement(lay, p.shape, like), like)
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
    for plan, _ in step.plans:
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
    cap, both = default_cap(assume.device), assume.itemsize + plan.itemsize
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
                    (like[kind], inward, _way(plan, like[kind], inward))
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


def _way(plan: Plan, matrix: int, inward: bool) -> Direction:
    number, box, _, _ = plan.matrices[matrix]
    tensor = plan.tensors[number]
    if inward:
        return Direction(tensor.lives, tensor.shape, box, tensor.lives.copies())
    return Direction(tensor.stored, tensor.shape, box, tensor.repeat)


def workspace(box: Box, assume: Assumptions) -> int:
    """Bytes for the products of one matrix: itself, and three symmetric ones."""
    m, n = sorted(b - a for a, b in box)[-2:]
    return (m * n + 3 * m * m) * assume.product_itemsize


def _own_batch(plan: Plan, assume: Assumptions) -> Vector:
    """A batch holds up to the cap, or all that a rank has of one parameter, and its products."""
    cap = default_cap(assume.device)
    most = np.zeros(plan.ranks)
    every = np.zeros(plan.ranks)
    by_tensor: dict[int, Vector] = {}
    for matrix, owners in plan.assignments():
        tensor, box, _, _ = plan.matrices[matrix]
        mine = by_tensor.setdefault(tensor, np.zeros(plan.ranks))
        mine[list(owners)] += box_size(box) * assume.itemsize
    boxes = {matrix.box for matrix in plan.matrices}
    ratio = max((workspace(box, assume) / box_size(box) for box in boxes), default=0.0)
    for mine in by_tensor.values():
        most = np.maximum(most, mine)
        every += mine
    batch = np.maximum(most, np.minimum(every, cap))
    held: Vector = batch * (1 + ratio / assume.itemsize)
    return held
