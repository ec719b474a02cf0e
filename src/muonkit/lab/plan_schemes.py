"""The ways of doing a step that ``muonkit plan`` compares, and the time that each is predicted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from math import prod

import numpy as np

from muonkit.distributed.param_layout import computed_in_place
from muonkit.distributed.placement import Placement, box_size, replicated
from muonkit.distributed.plan import Plan
from muonkit.distributed.planner import matrices_of
from muonkit.lab.plan_costs import (
    Assumptions,
    Costs,
    Simulation,
    costs_of,
    elements,
    flops_of,
    of_stage,
    workspace,
)
from muonkit.lab.plan_layouts import Mesh, place, replicating
from muonkit.lab.shapes import ModelShape, ParameterShape

__all__ = ["Scheme", "Seconds", "schemes", "seconds"]


@dataclass(frozen=True)
class Scheme:
    """A way of doing the step.

    Attributes:
        bound: the least max over mean of FLOPs that any choice of owners could have; None where
            there is nothing to choose.
        bound_by: what sets it.
        buckets: exchanges in a row.
        chain: FLOPs one after the other if every exchange waited for the products of the one before
            it: the sum over buckets of the busiest rank's; None where there are no buckets.
    """

    name: str
    costs: Costs
    bound: float | None = None
    bound_by: str = ""
    buckets: int = 0
    chain: float | None = None


@dataclass(frozen=True)
class Seconds:
    """A prediction, each the slowest rank's.

    Attributes:
        elementwise: what reads and writes memory.
        products: FLOPs of the busiest rank over the rate of products.
        chain: FLOPs of `Scheme.chain` over that rate: ranks wait for one another in every bucket.
        exchange: bytes over the rates of links, what leaves the node after what does not.
    """

    elementwise: float
    products: float
    chain: float
    exchange: float

    @property
    def overlapped(self) -> float:
        """If products hide the exchange, or the other way round, altogether."""
        return self.elementwise + max(self.products, self.exchange)

    @property
    def serial(self) -> float:
        """If neither hides any of the other, and every bucket waits for the one before it."""
        return self.elementwise + self.chain + self.exchange


def seconds(scheme: Scheme, assume: Assumptions) -> Seconds:
    """The seconds of a step at the assumed rates, without latencies."""
    costs = scheme.costs
    busiest = float(costs.flops.max())
    chain = busiest if scheme.chain is None else scheme.chain
    exchange = costs.between / assume.rates.inter + costs.within / assume.rates.intra
    return Seconds(
        elementwise=float(costs.touched.max()) / assume.memory,
        products=busiest / assume.rates.flops,
        chain=chain / assume.rates.flops,
        exchange=float(exchange.max()),
    )


def schemes(model: ModelShape, layout: str, mesh: Mesh, assume: Assumptions) -> list[Scheme]:
    """muonkit's step in a layout, with a period that of blocks too, and others on the same ranks;
    all stages together.
    """
    zero_layout, zero_mesh = replicating(layout, mesh)
    zero_mesh = replace(zero_mesh, stages=mesh.stages)
    found: list[Scheme] = []
    stages = range(mesh.stages)
    for in_blocks in (False, True) if assume.period > 1 else (False,):
        found.append(_together([_muon(model, layout, mesh, s, assume, in_blocks) for s in stages]))
    found.append(_together([_all_gather(model, layout, mesh, s, assume) for s in stages]))
    found.append(_together([_round_robin(model, mesh, s, assume) for s in stages]))
    if layout != zero_layout:
        found.append(_together([_adamw(model, layout, mesh, s, assume) for s in stages]))
    found.append(_together([_adamw(model, zero_layout, zero_mesh, s, assume) for s in stages]))
    return found


def _together(stages: Sequence[Scheme]) -> Scheme:
    """One scheme over the ranks of all pipeline stages, one stage after the other."""
    if len(stages) == 1:
        return stages[0]
    joined = Costs(
        *(np.concatenate([getattr(s.costs, f.name) for s in stages]) for f in fields(Costs))
    )
    chains = [stage.chain for stage in stages if stage.chain is not None]
    chain = max(chains) if chains else None
    if stages[0].bound is None:
        return replace(stages[0], costs=joined, chain=chain)
    # Each stage has its own ranks: the bound of the slowest, over the mean of all.
    means = [stage.costs.flops.mean() for stage in stages]
    worst = max(stages, key=lambda s: (s.bound or 1.0) * s.costs.flops.mean())
    bound = (worst.bound or 1.0) * worst.costs.flops.mean() / np.mean(means)
    buckets = max(stage.buckets for stage in stages)
    return Scheme(stages[0].name, joined, float(bound), worst.bound_by, buckets, chain)


def _muon(
    model: ModelShape, layout: str, mesh: Mesh, stage: int, assume: Assumptions, in_blocks: bool
) -> Scheme:
    named = of_stage(model, stage, mesh.stages)
    laid = [(name, p, place(p, layout, mesh)) for name, p in named]
    step = Simulation(mesh, assume, laid, in_blocks)
    bound, why = lower_bound(step.plan.plans, mesh.ranks)
    buckets = sum(len(plan.buckets) for plan in step.plan.plans if plan.inward and plan.itemsize)
    costs = costs_of(step, assume)
    name = f"muonkit, {layout}" + ", blocks" * in_blocks
    return Scheme(name, costs, bound, why, buckets, _chain(step))


def _chain(step: Simulation) -> float:
    total = 0.0
    for plan in step.plan.plans:
        if not plan.inward:
            continue
        for bucket in plan.buckets:
            busy: dict[int, int] = {}
            for matrix, owners in bucket:
                for owner in owners:
                    busy[owner] = busy.get(owner, 0) + plan.matrices[matrix].flops
            total += max(busy.values(), default=0)
    return total


def lower_bound(plans: Sequence[Plan], ranks: int) -> tuple[float, str]:
    """The least max over mean of FLOPs that any choice of owners could have, and why.

    If each of N ranks has at most k - 1 of the (k - 1) N + 1 largest matrices, one is left over: so
    one rank has k of them, which cost no less than the k smallest of these. What is whole on a rank
    already stays there.
    """
    flops: list[int] = []
    fixed = np.zeros(ranks)
    for plan in plans:
        if not plan.inward:  # AdamW's
            continue
        own = not plan.itemsize
        for matrix, owners in plan.assignments():
            cost = plan.matrices[matrix].flops
            flops += [cost] * len(owners)
            if own:
                fixed[list(owners)] += cost
    if not sum(flops):
        return 1.0, "there are no matrices"
    costs = np.sort(np.array(flops, dtype=np.float64))[::-1]
    sums = np.concatenate([[0.0], np.cumsum(costs)])
    mean = sums[-1] / ranks
    best, why = mean, "the mean: nothing else sets a bound"
    for k in range(1, (len(costs) - 1) // ranks + 2):
        last = (k - 1) * ranks + 1
        load = sums[last] - sums[last - k]
        if load > best * (1 + 1e-9):
            best = load
            why = "the largest matrix" if k == 1 else f"{len(costs):,} matrices on {ranks:,} ranks"
    if fixed.max() > best * (1 + 1e-9):
        best, why = fixed.max(), "matrices that are whole where they lie"
    return float(best / mean), why


def _adamw(model: ModelShape, layout: str, mesh: Mesh, stage: int, assume: Assumptions) -> Scheme:
    """AdamW on every parameter, in a layout."""
    laid = [
        (name, replace(p, view=None), place(p, layout, mesh))
        for name, p in of_stage(model, stage, mesh.stages)
    ]
    costs = costs_of(Simulation(mesh, assume, laid), assume)
    stored = laid[0][2].param_placement
    between = costs.received_out * _share_between(stored, stored.copies(), assume.rates.node)
    costs = replace(costs, between=between, within=costs.received_out - between)
    return Scheme(f"AdamW, {layout}", costs)


@lru_cache(maxsize=4096)
def _share_between(placement: Placement, axes: tuple[int, ...], node: int) -> float:
    """The share of what a rank receives in an all-gather along mesh axes that crosses nodes.

    A node gets everything once, each of its ranks a part, which they pass on within it.
    """
    group = placement.replicas(placement.positions[0], axes)
    nodes = {position // node for position in group}
    return len(nodes) / len(group) if len(nodes) > 1 else 0.0


def _all_gather(
    model: ModelShape, layout_name: str, mesh: Mesh, stage: int, assume: Assumptions
) -> Scheme:
    """Every rank gathers every matrix that is not whole where it lies, and computes all of them:
    torch.optim.Muon on full tensors.
    """
    flops = matrices = received = between = np.zeros(mesh.ranks)
    parameters = state = touched = np.zeros(mesh.ranks)
    transient = 0.0
    for _, p in of_stage(model, stage, mesh.stages):
        layout = place(p, layout_name, mesh)
        stored = elements(layout.param_placement, p.shape)
        kept = elements(layout.state_placement, p.shape)
        parameters = parameters + stored * assume.itemsize
        state = state + kept * assume.itemsize * (1 if p.view else 2)
        if p.view is None:
            touched = touched + 7 * kept * assume.itemsize
            # AdamW as in muonkit: where the state is sharded, parts of parameters are gathered.
            got, along = (stored - kept) * assume.itemsize, layout.param_placement.copies()
            received = received + got
            between = between + got * _share_between(
                layout.param_placement, along, assume.rates.node
            )
            continue
        touched = touched + (4 * kept + 3 * stored) * assume.itemsize
        found = _work(p, assume)
        if computed_in_place(layout, p.shape, p.view, "recompute"):
            share = stored / prod(p.shape)
        else:
            share = np.ones(mesh.ranks)
            got = (prod(p.shape) - kept) * assume.comm_bytes
            along = tuple(
                i for i, axis in enumerate(layout.state_placement.axes) if axis.dim is not None
            )
            received = received + got
            between = between + got * _share_between(
                layout.state_placement, along, assume.rates.node
            )
        flops = flops + found.flops * share
        matrices = matrices + found.matrices * share
        transient = max(transient, float((share * found.transient).max()))
    none = np.zeros(mesh.ranks)
    costs = Costs(
        flops=flops,
        matrices=matrices,
        received_in=received,
        sent_in=received,
        received_out=none,
        sent_out=none,
        between=between,
        within=received - between,
        parameters=parameters,
        state=state,
        transient=np.full(mesh.ranks, transient),
        touched=touched,
    )
    return Scheme(f"all-gather, {layout_name}", costs)


@dataclass(frozen=True)
class _Work:
    """The work on one parameter; `transient` is in bytes, the gathered parameter included."""

    matrices: int
    flops: int
    transient: int


def _work(p: ParameterShape, assume: Assumptions) -> _Work:
    assert p.view is not None
    matrices, flops, elements_of_all, space = 0, 0, 0, 0
    for block, _, boxes in matrices_of(p.view, p.shape, "none"):
        box, _ = boxes[0]
        matrices += len(boxes)
        flops += len(boxes) * flops_of(block.rows, block.cols, assume.device)
        elements_of_all += len(boxes) * box_size(box)
        space = max(space, workspace(box, assume))
    return _Work(matrices, flops, elements_of_all * assume.itemsize + space * matrices)


def _round_robin(model: ModelShape, mesh: Mesh, stage: int, assume: Assumptions) -> Scheme:
    """Keller Jordan's: all ranks have all parameters whole; of Muon's, by falling size, rank i owns
    every N-th, has its momentum, and sends all others the result. AdamW's state is whole
    everywhere. A stack of experts is one parameter.
    """
    ranks = mesh.ranks
    flops, matrices, owned, transient = np.zeros((4, ranks))
    rounds: dict[int, int] = {}  # one all-gather for every N parameters
    named = of_stage(model, stage, mesh.stages)
    muon = sorted((p for _, p in named if p.view), key=lambda p: -prod(p.shape))
    for turn, p in enumerate(muon):
        owner, found = turn % ranks, _work(p, assume)
        flops[owner] += found.flops
        rounds[turn // ranks] = max(rounds.get(turn // ranks, 0), found.flops)
        matrices[owner] += found.matrices
        owned[owner] += prod(p.shape)
        transient[owner] = max(transient[owner], found.transient)
    of_adamw = sum(prod(p.shape) for _, p in named if not p.view)
    received = (owned.sum() - owned) * assume.itemsize
    between = received * _share_between(replicated(ranks), (0,), assume.rates.node)
    costs = Costs(
        flops=flops,
        matrices=matrices,
        received_in=np.zeros(ranks),
        sent_in=np.zeros(ranks),
        received_out=received,
        sent_out=received,
        between=between,
        within=received - between,
        parameters=np.full(ranks, (owned.sum() + of_adamw) * assume.itemsize),
        state=(owned + 2 * of_adamw) * assume.itemsize,
        transient=transient,
        touched=(7 * owned + 7 * of_adamw) * assume.itemsize,
    )
    return Scheme("round robin, whole", costs, chain=sum(rounds.values()))
