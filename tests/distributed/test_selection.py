"""`selection="local"` against its own definition, and what a fraction of the rows sends."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import Placement

from muonkit import Muon, orthogonalize
from muonkit.selection import count_of
from tests.helpers import measures, zoo
from tests.helpers.ranks import Cases, Ranks

CASES = Cases()

OPTIONS: dict[str, Any] = {"lr": 0.1, "weight_decay": 0.3, "momentum": 0.9, "ns_dtype": "float64"}
STEPS = 4
# Rows and columns that some numbers of ranks cut unevenly, or leave ranks without.
SHAPES = {"wide": (10, 14), "tall": (14, 10), "square": (8, 8), "small": (3, 5), "fused": (21, 7)}
VIEWS = {"fused": "split(rows=3)"}


def cut(length: int, ranks: int) -> list[tuple[int, int]]:
    """How DTensor cuts a dim: as torch.chunk."""
    step = -(-length // ranks)
    bounds = [(min(i * step, length), min((i + 1) * step, length)) for i in range(ranks)]
    return [(a, b) for a, b in bounds if a < b]


class Where(NamedTuple):
    """A layout on n ranks: its mesh axes and placements, and over how many ranks it cuts rows and
    columns.
    """

    axes: Callable[[int], tuple[int, ...]]
    placements: list[Placement] | None
    rows: Callable[[int], int]
    cols: Callable[[int], int]
    zero: int = 0


def one(n: int) -> int:
    return 1


LAYOUTS = {
    "ddp": Where(lambda n: (n,), None, one, one),
    "zero1": Where(lambda n: (n,), None, lambda n: n, one, zero=1),
    "fsdp2": Where(lambda n: (n,), [Shard(0)], lambda n: n, one),
    "tp": Where(lambda n: (n,), [Shard(1)], one, lambda n: n),
    "hsdp": Where(lambda n: (2, n // 2), [Replicate(), Shard(0)], lambda n: n // 2, one),
    "fsdp2_tp": Where(lambda n: (n // 2, 2), [Shard(0), Shard(1)], lambda n: n // 2, lambda n: 2),
}


def make(layout: str, shapes: dict[str, tuple[int, int]], **options: Any) -> tuple[nn.Module, Muon]:
    where, size = LAYOUTS[layout], dist.get_world_size()
    model = nn.Module()
    for name, shape in shapes.items():
        noise = zoo.full_random(name, torch.Size(shape), 0).double()
        model.register_parameter(name, nn.Parameter(noise))
    told: dict[str, Any] = {"zero": where.zero}
    if where.placements is None:
        told["process_group"] = dist.group.WORLD
    else:
        axes = where.axes(size)
        placements = where.placements
        zoo.distribute(model, zoo.mesh(axes, ("a", "b")[: len(axes)]), lambda *_: placements)
    groups = [
        {"params": [p], "view": VIEWS.get(name, "matrix")} for name, p in model.named_parameters()
    ]
    return model, Muon(groups, **{**OPTIONS, **options, **told})


def expected(
    layout: str, ranks: int, fraction: float, after: str | None
) -> dict[str, dict[str, Tensor]]:
    """Parameters and state in float64: of each cell of rows, or of columns, the largest."""
    where = LAYOUTS[layout]
    found: dict[str, dict[str, Tensor]] = {"parameters": {}, "momentum": {}, "variance": {}}
    for name, shape in SHAPES.items():
        W = zoo.full_random(name, torch.Size(shape), 0).double()
        M, v = torch.zeros_like(W), torch.zeros(shape[0], 1, dtype=torch.float64)
        matrices = cut(shape[0], 3 if name in VIEWS else 1)
        for step in range(STEPS):
            G = gradient(name, shape, step)
            for start, stop in matrices:
                parts = [t[start:stop] for t in (W, M, G, v)]
                # Where ranks cut the parameter's rows, and its columns.
                rows = [
                    (max(a, start) - start, min(b, stop) - start)
                    for a, b in cut(shape[0], where.rows(ranks))
                    if max(a, start) < min(b, stop)
                ]
                cols = cut(shape[1], where.cols(ranks))
                one_step(*parts, rows, cols, fraction, after)
        found["parameters"][name], found["momentum"][name] = W, M
        if after:
            found["variance"][name] = v
    return found


def one_step(
    W: Tensor,
    M: Tensor,
    G: Tensor,
    v: Tensor,
    rows: list[tuple[int, int]],
    cols: list[tuple[int, int]],
    fraction: float,
    after: str | None,
) -> None:
    M += G
    scale = max(1.0, W.shape[0] / W.shape[1]) ** 0.5
    cells = rows
    if W.shape[0] > W.shape[1] and not after:
        W, M, cells = W.mT, M.mT, cols
    norms = M.abs().sum(1).tolist()
    S = sorted(
        itertools.chain.from_iterable(
            sorted(range(a, b), key=lambda i: -norms[i])[: count_of(fraction, b - a)]
            for a, b in cells
        )
    )
    O = orthogonalize(M[S].clone(), ns_dtype="float64")
    M[S] *= OPTIONS["momentum"]
    if after:
        v[S] = 0.95 * v[S] + 0.05 * O.square().mean(1, keepdim=True)
        normed = O / (v[S].sqrt() + 1e-10)
        O = normed * O.norm() / normed.norm()
    W *= 1 - OPTIONS["lr"] * OPTIONS["weight_decay"]
    W[S] -= OPTIONS["lr"] * scale * O


@functools.cache
def gradient(name: str, shape: tuple[int, int], step: int) -> Tensor:
    return zoo.full_random(f"{name}'s gradient", torch.Size(shape), step + 1).double()


@CASES.on(2, layout=["ddp", "zero1", "fsdp2", "tp"], after=[None, "normuon"])
@CASES.on(4, layout=list(LAYOUTS), after=[None, "normuon"])
def local_is_its_definition(layout: str, after: str | None) -> dict[str, float]:
    fraction = 0.4
    model, optimizer = make(layout, SHAPES, fraction=fraction, selection="local", after=after or ())
    for step in range(STEPS):
        for name, p in model.named_parameters():
            p.grad = zoo.laid_out(gradient(name, SHAPES[name], step), p)
        if step == STEPS - 1:
            plan, me = optimizer.plan(), dist.get_rank()
            with measures.sent_bytes(measures.sums_of(optimizer)) as sent:
                optimizer.step()
            traffic = plan.traffic()
            assert sum(sent.values()) == traffic.sent_in[me] + traffic.sent_out[me]
            continue
        optimizer.step()
    wanted = expected(layout, dist.get_world_size(), fraction, after)
    return {
        kind: far for kind, (far, _) in measures.deviations(model, optimizer, wanted).items() if far
    }


@CASES.on(4)
def copies_that_are_trained_apart_select_apart() -> int:
    """A parameter on one axis of a mesh, whose gradients differ along the other: each copy takes
    its own largest rows, though all ranks add their norms up together.
    """
    grid = zoo.mesh((2, 2), ("a", "b"))
    full = zoo.full_random("w", torch.Size((8, 8)), 0).double()
    lone = nn.Parameter(distribute_tensor(full.clone(), grid["b"], [Shard(0)]))
    other = nn.Parameter(distribute_tensor(full.clone(), grid, [Replicate(), Shard(0)]))
    options: dict[str, Any] = {**OPTIONS, "fraction": 0.25, "selection": "global"}
    optimizer = Muon([lone, other], **options)
    alone = nn.Parameter(full.clone())
    reference = Muon([alone], **options)
    copy = grid.get_coordinate()[0]  # type: ignore[index]
    taken = set()
    for step in range(STEPS):
        alone.grad = gradient(f"of copy {copy}", (8, 8), step)
        lone.grad = zoo.laid_out(alone.grad, lone)
        other.grad = zoo.laid_out(gradient("w", (8, 8), step), other)
        before = alone.detach().clone()
        optimizer.step()
        reference.step()
        moved = (alone.detach() - before * (1 - options["lr"] * options["weight_decay"])).abs()
        taken |= {int(row) for row in moved.sum(1).gt(1e-9).nonzero()}
    mine = zoo.local_part(alone.detach(), lone)
    assert zoo.deviation(zoo.part_of(lone.detach()), mine) < 1e-12
    return sum(2**row for row in taken)


# --- bytes and FLOPs ------------------------------------------------------------------------------

EVEN = {f"w{i}": (16, 16) for i in range(8)}
# Of what all rows send: rows are cut over ranks, and "global" sends all, or they are not.
GLOBAL = {"ddp": 0.25, "zero1": 1, "fsdp2": 1, "tp": 0.25, "hsdp": 1, "fsdp2_tp": 1}


@CASES.on(4, layout=list(LAYOUTS), selection=["global", "local"])
def sends_what_is_planned(layout: str, selection: str) -> tuple[float, float]:
    """The bytes and FLOPs of a step, over those of a step with all rows."""
    found = []
    for fraction in (1.0, 0.25):
        model, optimizer = make(layout, EVEN, fraction=fraction, selection=selection)
        for name, p in model.named_parameters():
            p.grad = zoo.laid_out(gradient(name, EVEN[name], 0), p)
        with measures.sent_bytes(measures.sums_of(optimizer)) as sent:
            optimizer.step()
        me, traffic = dist.get_rank(), optimizer.plan().traffic()
        assert sum(sent.values()) == traffic.sent_in[me] + traffic.sent_out[me]
        assert sum(sent.values()) == sum(
            sum(way.values()) for way in optimizer.plan().messages(me).values()
        )
        found.append((sum(sent.values()), sum(traffic.flops)))
    (bytes_of_all, flops_of_all), (some_bytes, some_flops) = found
    alone = Muon([nn.Parameter(torch.zeros(4, 16, dtype=torch.float64))], **OPTIONS)
    whole = Muon([nn.Parameter(torch.zeros(16, 16, dtype=torch.float64))], **OPTIONS)
    ratio = alone.plan().traffic().flops[0] / whole.plan().traffic().flops[0]
    assert some_flops / flops_of_all == pytest.approx(ratio)
    return some_bytes / bytes_of_all, some_flops / flops_of_all


@pytest.mark.sampled
@pytest.mark.parametrize(("world_size", "case"), CASES.ids())
def test_a_selection_on_ranks(world_size: int, case: str, ranks: Ranks) -> None:
    values = ranks.outcome(world_size, case).check()
    if case.startswith("sends"):
        layout, selection = case.split("-")[1:]
        for sent, flops in values:
            assert sent == (0.25 if selection == "local" else GLOBAL[layout])
            assert flops < 0.1
        return
    if case.startswith("copies"):
        first, _, second, _ = values
        assert first != second  # else one selection for both would do
        return
    for value in values:
        assert max(value.values(), default=0) <= 1e-12, value
