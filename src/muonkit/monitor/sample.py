"""One sample: the measurements of one step on all ranks, gathered on each of them.

The rank that computes a matrix measures it whole. AdamW's parameters are measured by every rank
that keeps a part of their state, as sums of squares that count every entry once.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from muonkit._torch import measurable
from muonkit.batching import place
from muonkit.distributed.exchange import together
from muonkit.distributed.layout import is_dtensor, local
from muonkit.gradients import local_gradient
from muonkit.groups import scale_of
from muonkit.monitor.spectra import norms, orthogonality_error, spectra
from muonkit.stages import decays
from muonkit.views import blocks_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from torch import Tensor

    from muonkit.batching import MatrixRef, ObservedBatch
    from muonkit.distributed.placement import Box
    from muonkit.optim import Muon

__all__ = ["KINDS", "Key", "Sampler", "global_rank", "matrices_of"]

KINDS = ("gradient", "momentum", "update", "weight")


class Key(NamedTuple):
    """A matrix, by the numbers of its group, of its parameter there, and of the matrix in that."""

    group: int
    param: int
    number: int


def matrices_of(group: Mapping[str, Any], p: Tensor) -> list[tuple[Box, int, int]]:
    """Where every matrix of a parameter lies in it, with its rows and columns, in order."""
    return [
        (box, block.rows, block.cols)
        for block in blocks_of(group["view"], tuple(p.shape))
        if block.batch * block.rows * block.cols
        for box in block.boxes()
    ]


class _Names:
    """Which matrix a batch's source is: the same name on all ranks."""

    def __init__(self, optimizer: Muon) -> None:
        self._known: dict[int, tuple[int, int, dict[Box, int]]] = {}
        self._parts: dict[int, Tensor] = {}  # DTensors, by this rank's own tensor
        self._layouts = optimizer._layouts
        for g, group in enumerate(optimizer.param_groups):
            for i, p in enumerate(group["params"] if group["algorithm"] == "muon" else ()):
                index = {box: k for k, (box, _, _) in enumerate(matrices_of(group, p))}
                self._known[id(p)] = self._known[id(local(p))] = g, i, index
                if is_dtensor(p):
                    self._parts[id(local(p))] = p

    def key(self, source: MatrixRef) -> Key:
        g, i, index = self._known[id(source.param)]
        p, box = self._parts.get(id(source.param)), source.box
        if p is not None:
            layout = self._layouts[p]
            box = layout.param_placement.origin(tuple(p.shape), layout.at, box)
        return Key(g, i, index[box])


class Sampler:
    """An observer of the step (`muonkit.step.Observer`) that measures what it is told.

    Args:
        kinds: the tensors whose singular values are taken.
    """

    def __init__(self, optimizer: Muon, kinds: Sequence[str]) -> None:
        self._optimizer, self._kinds = optimizer, kinds
        disable: Any = torch.compiler.disable
        self.call: Callable[..., Any] = disable(lambda step, closure: step(closure))
        self._names: _Names | None = None
        self._measured: list[tuple[list[Key], str, Tensor]] = []
        self._batch: tuple[list[list[MatrixRef]], dict[str, Any], list[Tensor]] | None = None
        # By the parameter, which stays itself where groups change; it is kept, as is its id.
        self._weights: dict[int, tuple[Tensor, Tensor]] = {}

    # --- Muon's matrices ------------------------------------------------------------------------

    def before(self, batch: ObservedBatch, group: dict[str, Any], u: Sequence[Tensor]) -> None:
        if self._names is None:  # not earlier: another hook may have replaced parameters meanwhile
            self._names = _Names(self._optimizer)
        sources = [list(some) for some in batch.sources()]
        momenta = [shards.momentum() for shards in batch.momentum_shards]
        self._measure("momentum", sources, batch.gathered(momenta).wait())
        grads = [torch.stack(shards.grads) for shards in batch.momentum_shards]
        self._measure("gradient", sources, batch.gathered(grads).wait())
        weights = [torch.stack(some) for some in batch.weights()]
        whole = list(batch.gathered(weights).wait())
        self._measure("weight", sources, whole)
        self._batch = sources, group, whole

    def orthogonalized(self, o: Sequence[Tensor]) -> None:
        assert self._batch is not None
        computed = [
            [each._replace(rows=each.computed[0], cols=each.computed[1]) for each in some]
            for some in self._batch[0]
        ]
        for keys, matrices in self._runs(computed, o):
            self._measured.append((keys, "error", orthogonality_error(matrices)[:, None]))

    def after(self, o: Sequence[Tensor]) -> None:
        assert self._batch is not None
        sources, group, weights = self._batch
        self._batch = None
        self._measure("update", sources, o)
        for (keys, updates), (_, W) in zip(
            self._runs(sources, o), self._runs(sources, weights), strict=True
        ):
            decayed = W * (updates * W > 0) if group["cautious"] else W
            norm, _ = norms(decayed)
            rows, cols = updates.shape[-2:]
            lr, decay = float(group["lr"]), float(group["weight_decay"]) * decays(group)
            scale = scale_of(group, rows, cols)
            applied = torch.stack([norm * (lr * decay), torch.full_like(norm, lr * scale)], -1)
            self._measured.append((keys, "applied", applied))

    def _measure(self, kind: str, sources: list[list[MatrixRef]], stacks: Sequence[Tensor]) -> None:
        for keys, matrices in self._runs(sources, stacks):
            norm, broken = norms(matrices)
            self._measured.append((keys, kind, torch.stack([norm, broken.to(norm)], -1)))
            if kind in self._kinds:
                self._measured.append((keys, f"{kind} spectrum", spectra(matrices)))

    def _runs(
        self, sources: list[list[MatrixRef]], stacks: Sequence[Tensor]
    ) -> Iterator[tuple[list[Key], Tensor]]:
        """Matrices of one shape, without padding, and which they are."""
        names = self._names
        assert names is not None
        for some, stack in zip(sources, stacks, strict=True):
            start = 0
            while start < len(some):
                rows, cols = some[start].rows, some[start].cols
                stop = start
                while stop < len(some) and (some[stop].rows, some[stop].cols) == (rows, cols):
                    stop += 1
                keys = [names.key(source) for source in some[start:stop]]
                yield keys, place(stack[start:stop], rows, cols)
                start = stop

    # --- AdamW's parameters ---------------------------------------------------------------------

    def begin(self) -> None:
        """Before the step: what the decay of AdamW's parameters will act on."""
        for _, p, _ in self._adamw():
            mine = self._optimizer._layouts.part(p, local(p))
            self._weights[id(p)] = p, _square(mine)

    def end(self) -> None:
        """After the step: the rest of them."""
        layouts = self._optimizer._layouts
        for key, p, group in self._adamw():
            state = self._optimizer.state.get(p)
            if p.grad is None or not state:
                continue
            grad = layouts.part(p, local_gradient(p))
            first, second = local(state["exp_avg"]), local(state["exp_avg_sq"])
            update = _adamw_update(first, second, float(state["step"]), group)
            tensors = grad, first, update, layouts.part(p, local(p))
            squares = [_square(t) for t in tensors[:3]]
            broken = [_not_finite(t) for t in tensors]
            _, weight = self._weights.get(id(p), (p, squares[0].new_tensor(math.nan)))
            numbers = torch.stack([t.to(weight) for t in (*squares, weight, *broken)])
            self._measured.append(([Key(*key, 0)], "adamw", numbers[None] / self._copies(p)))

    def _adamw(self) -> Iterator[tuple[tuple[int, int], Tensor, dict[str, Any]]]:
        for g, group in enumerate(self._optimizer.param_groups):
            if group["algorithm"] == "adamw":
                for i, p in enumerate(group["params"]):
                    yield (g, i), p, group

    def _copies(self, p: Any) -> int:
        """How many ranks have a copy of each entry of the parameter's state."""
        layouts = self._optimizer._layouts
        return 1 if layouts.domain is None else layouts.copies(p, of_state=True)

    # --- together -------------------------------------------------------------------------------

    def gather(self) -> list[tuple[int, list[tuple[Key, str, list[float]]]]]:
        """The measurements of every rank, in the order of ranks. All ranks have to call this."""
        mine = [
            (key, kind, numbers)
            for keys, kind, values in self._measured
            for key, numbers in zip(keys, values.tolist(), strict=True)
        ]
        domain = self._optimizer._layouts.domain
        if domain is None:
            return [(global_rank(), mine)]
        together(domain, "a Monitor's sample")
        everyone: list[Any] = [None] * domain.size
        torch.distributed.all_gather_object(everyone, mine, group=domain.control)
        ranks = torch.distributed.get_process_group_ranks(domain.group)
        return list(zip(ranks, everyone, strict=True))


def global_rank() -> int:
    dist = torch.distributed
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def _square(t: Tensor) -> Tensor:
    t = torch.view_as_real(t) if t.is_complex() else t
    norm: Tensor = torch.linalg.vector_norm(measurable(t), dtype=torch.float64)
    return norm.square()


def _not_finite(t: Tensor) -> Tensor:
    return (~measurable(t).isfinite()).sum()


def _adamw_update(m: Tensor, v: Tensor, step: float, group: Mapping[str, Any]) -> Tensor:
    """lr m^ / (√v^ + ε), as torch's adamw applies it, from the state after the step."""
    if m.is_complex():
        m, v = torch.view_as_real(m), torch.view_as_real(v)
    beta1, beta2 = group["betas"]
    dtype = torch.promote_types(m.dtype, torch.float32)
    root = v.to(dtype).div(1 - beta2**step).sqrt_().add_(group["eps"])
    return m.to(dtype).div(root).mul_(float(group["lr"]) / (1 - beta1**step))
