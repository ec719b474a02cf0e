"""The ways to share Muon's step out over ranks that distributed.py times: ours and the usual ones.

All do the same work: five iterations with Keller's coefficients in float32, Nesterov, momentum
0.95, decoupled weight decay 0.1, the scale sqrt(max(1, out/in)); distributed.py says which they
are, and prints how far the first step of each is from that of `torch.optim.Muon`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from peers import DECAY, LR, MOMENTUM, PEERS, Implementation, torch_patches
from sets import Entry, Workload
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.optim import _muon

import muonkit

OURS = "muonkit"

# Renamed in torch 2.13.
_all_gather: Callable[..., Any] = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)


class Parameters:
    """The parameters of one set as this rank has them; all contenders step on the same ones."""

    def __init__(self, entries: Sequence[Entry], mesh: DeviceMesh | None) -> None:
        made = Workload(list(entries))  # the same on all ranks
        self.shapes = [torch.Size(entry.shape) for entry in entries]
        self.sharded = mesh is not None
        self.given: list[nn.Parameter] = []
        for whole, whole_gradient in zip(made.weights, made.gradients, strict=True):
            weight, gradient = whole, whole_gradient
            if mesh is not None:
                weight = distribute_tensor(whole, mesh, [Shard(0)])
                gradient = distribute_tensor(whole_gradient, mesh, [Shard(0)])
            self.given.append(nn.Parameter(weight))
            self.given[-1].grad = gradient
        self.weights = [local_part(p.detach()) for p in self.given]
        self.gradients = [local_part(p.grad) for p in self.given]
        self._first = [w.clone() for w in self.weights]

    def restore(self) -> None:
        """The weights as they were made: the decay in a step depends on them."""
        torch._foreach_copy_(self.weights, self._first)

    def most_rows(self, i: int) -> int:
        """Rows of a matrix on the ranks that have most of them; the last ranks have fewer."""
        return math.ceil(self.shapes[i][0] / dist.get_world_size())

    def rows(self, i: int) -> slice:
        """This rank's rows of a matrix."""
        if not self.sharded:
            return slice(None)
        most, total = self.most_rows(i), self.shapes[i][0]
        first = min(dist.get_rank() * most, total)
        return slice(first, min(first + most, total))


def local_part(tensor: Tensor | None) -> Tensor:
    """What this rank has of it."""
    assert tensor is not None
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


# --- the other ways --------------------------------------------------------------------------

Wait = Callable[[], Any]


def one_ahead(start: Callable[[int], Wait], count: int) -> Iterator[Wait]:
    """`start(0)`, `start(1)`, ...: each is begun before the one before it is used."""
    coming = start(0)
    for k in range(count):
        current = coming
        if k + 1 < count:
            coming = start(k + 1)
        yield current


def padded(tensor: Tensor, rows: int, dtype: torch.dtype) -> Tensor:
    """A copy with so many rows: gloo's collectives take parts of one size only."""
    copy = torch.empty(rows, tensor.shape[1], dtype=dtype)
    copy[: len(tensor)] = tensor
    return copy


class Other:
    """torch.optim.Muon's step, around the exchange that a subclass is about.

    Args:
        wire: dtype of what is sent.
        orthogonalize: of one whole matrix, in a new tensor.
    """

    def __init__(
        self, parameters: Parameters, wire: torch.dtype, orthogonalize: Callable[[Tensor], Tensor]
    ) -> None:
        self.parameters, self.wire, self.orthogonalize = parameters, wire, orthogonalize
        self.momenta: dict[int, Tensor] = {}
        self.rank, self.ranks = dist.get_rank(), dist.get_world_size()

    def direction(self, i: int) -> Tensor:
        gradient = self.parameters.gradients[i]
        if i not in self.momenta:
            self.momenta[i] = torch.zeros_like(gradient)
        momentum = self.momenta[i].lerp_(gradient, 1 - MOMENTUM)
        return gradient.lerp(momentum, MOMENTUM)

    def apply(self, i: int, o: Tensor) -> None:
        """o: the rows that this rank has."""
        weight, shape = self.parameters.weights[i], self.parameters.shapes[i]
        weight.mul_(1 - LR * DECAY).add_(o, alpha=-_muon._adjust_lr(LR, None, shape))


class AllGather(Other):
    """torch.optim.Muon on full tensors; fsdp2 only."""

    @torch.no_grad()
    def step(self) -> None:
        gathered = one_ahead(self._gather, len(self.parameters.shapes))
        for i, wait in enumerate(gathered):
            self.apply(i, self.orthogonalize(wait())[self.parameters.rows(i)])

    def _gather(self, i: int) -> Wait:
        own = padded(self.direction(i), self.parameters.most_rows(i), self.wire)
        full = own.new_empty(self.ranks * len(own), own.shape[1])
        work = _all_gather(full, own, async_op=True)

        def wait(own: Tensor = own) -> Tensor:  # kept alive until it has been sent
            work.wait()
            return full[: self.parameters.shapes[i][0]].float()

        return wait


class RoundRobin(Other):
    """Keller Jordan's: turns of N matrices, one for each rank."""

    def __init__(
        self,
        parameters: Parameters,
        wire: torch.dtype,
        orthogonalize: Callable[[Tensor], Tensor],
        scatter: bool = False,
    ) -> None:
        super().__init__(parameters, wire, orthogonalize)
        shapes = parameters.shapes
        order = sorted(range(len(shapes)), key=lambda i: tuple(shapes[i]), reverse=True)
        self.turns = [order[k : k + self.ranks] for k in range(0, len(order), self.ranks)]
        self._send_back = self._scatter if scatter else self._all_gather

    @torch.no_grad()
    def step(self) -> None:
        put: Wait | None = None
        fetched = one_ahead(self._fetch, len(self.turns))
        for turn, wait in zip(self.turns, fetched, strict=True):
            whole = wait()
            o = None if whole is None else self.orthogonalize(whole)
            before, put = put, self._send_back(turn, o)
            if before is not None:
                before()
        if put is not None:
            put()

    def _fetch(self, number: int) -> Wait:
        """The direction of this rank's matrix of a turn, whole; None where it has none."""
        turn = self.turns[number]
        if not self.parameters.sharded:  # then only the owner keeps momentum
            own = self.direction(turn[self.rank]) if self.rank < len(turn) else None
            return lambda: own
        pending: list[Any] = []
        mine: Tensor | None = None
        for owner, i in enumerate(turn):
            part = padded(self.direction(i), self.parameters.most_rows(i), self.wire)
            chunks = None
            if owner == self.rank:
                mine = part.new_empty(self.ranks * len(part), part.shape[1])
                chunks = list(mine.chunk(self.ranks))
                mine = mine[: self.parameters.shapes[i][0]]
            pending.append((dist.gather(part, chunks, dst=owner, async_op=True), part))

        def wait() -> Tensor | None:
            for work, _ in pending:
                work.wait()
            return None if mine is None else mine.float()

        return wait

    def _all_gather(self, turn: list[int], o: Tensor | None) -> Wait:
        shapes = [self.parameters.shapes[i] for i in turn]
        own = torch.empty(max(shape.numel() for shape in shapes), dtype=self.wire)
        if o is not None:
            own[: o.numel()].view(o.shape).copy_(o)
        everyone = own.new_empty(self.ranks, len(own))
        work = _all_gather(everyone.view(-1), own, async_op=True)

        def put(own: Tensor = own) -> None:
            work.wait()
            for i, shape, result in zip(turn, shapes, everyone, strict=False):
                rows = self.parameters.rows(i)
                self.apply(i, result[: shape.numel()].view(shape)[rows])

        return put

    def _scatter(self, turn: list[int], o: Tensor | None) -> Wait:
        pending: list[Any] = []
        for owner, i in enumerate(turn):
            most, cols = self.parameters.most_rows(i), self.parameters.shapes[i][1]
            part = torch.empty(most, cols, dtype=self.wire)
            chunks = None
            if owner == self.rank:
                assert o is not None
                chunks = list(padded(o, self.ranks * most, self.wire).chunk(self.ranks))
            work = dist.scatter(part, chunks, src=owner, async_op=True)
            pending.append((work, i, part, chunks))

        def put() -> None:
            for work, i, part, _ in pending:
                work.wait()
                self.apply(i, part[: len(self.parameters.weights[i])])

        return put


# --- who takes part --------------------------------------------------------------------------


def torch_products(matrix: Tensor) -> Tensor:
    """torch.optim.Muon's, in float32."""
    ((_, _, orthogonalize),) = _patches()
    coefficients = (_muon.DEFAULT_A, _muon.DEFAULT_B, _muon.DEFAULT_C)
    result: Tensor = orthogonalize(matrix, coefficients, _muon.DEFAULT_NS_STEPS, _muon.EPS)
    return result


_patches = functools.cache(torch_patches)


def our_products(matrix: Tensor) -> Tensor:
    return muonkit.orthogonalize(matrix, ns_dtype="float32")


def ours(parameters: Parameters, wire: torch.dtype, **options: Any) -> Any:
    return muonkit.Muon(
        parameters.given,
        lr=LR,
        weight_decay=DECAY,
        ns_dtype="float32",
        exchange_dtype=wire,
        **options,
    )


def ours_ddp(parameters: Parameters, wire: torch.dtype, zero: int) -> Any:
    return ours(parameters, wire, process_group=dist.group.WORLD, zero=zero)


def torch_alone(parameters: Parameters, wire: torch.dtype) -> Any:
    return Implementation(PEERS["torch fp32"], [(p, "matrix") for p in parameters.given])


class Contender(NamedTuple):
    """A name, how it is made from parameters and the dtype on the way, and whether it sends."""

    name: str
    make: Callable[[Parameters, torch.dtype], Any]
    sends: bool = True


def _other(kind: type[Other], products: Callable[[Tensor], Tensor], **options: Any) -> Any:
    return functools.partial(kind, orthogonalize=products, **options)


# The first of each is what the first steps of the others are compared with.
CONTENDERS: dict[str, tuple[Contender, ...]] = {
    "fsdp2": (
        Contender("torch, all-gather", _other(AllGather, torch_products)),
        Contender(OURS, ours),
        Contender("round robin", _other(RoundRobin, torch_products)),
        Contender("round robin, scatter", _other(RoundRobin, torch_products, scatter=True)),
        Contender(
            "round robin, scatter, muonkit's products",
            _other(RoundRobin, our_products, scatter=True),
        ),
    ),
    "ddp": (
        Contender("torch, each rank alone", torch_alone, sends=False),
        Contender(OURS, functools.partial(ours_ddp, zero=0)),
        Contender("muonkit, zero=1", functools.partial(ours_ddp, zero=1)),
        Contender("muonkit, each rank alone", ours, sends=False),
        Contender("round robin", _other(RoundRobin, torch_products)),
        Contender("round robin, muonkit's products", _other(RoundRobin, our_products)),
    ),
}
