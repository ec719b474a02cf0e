"""The step itself: the algorithm, on one batch of matrices."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from muonkit import int8
from muonkit._compile import copy_each_, scheduled
from muonkit.batching import stacked
from muonkit.distributed.exchange import Pending
from muonkit.groups import NS_OPTIONS, beta2_of, computed_dtype, scale_of, update_dtype
from muonkit.newton_schulz.orthogonalizer import orthogonalize_
from muonkit.selection import selects
from muonkit.stages import NO_NORM, decays, kept_state, stages_of

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Sequence

    from muonkit.batching import MatrixStack, MomentumShards, ObservedBatch, ParamShards
    from muonkit.stages import Constraint, Stage

__all__ = ["Observer", "muon_step"]


class Observer(Protocol):
    """Is told of a batch's whole matrices, on the rank that computes them.

    All ranks have one, or none has: it may exchange in `before`. It never writes to its arguments.
    """

    def call(self, step: Callable[..., Any], closure: Any) -> Any:
        """Take the step, outside of torch.compile's graphs: what follows has no place in one."""
        ...

    def before(self, batch: ObservedBatch, group: dict[str, Any], u: Sequence[Tensor]) -> None:
        """See the matrices before they are orthogonalized; parameters are as they were."""
        ...

    def orthogonalized(self, o: Sequence[Tensor]) -> None:
        """See the orthogonalized matrices before the stages that follow."""
        ...

    def after(self, o: Sequence[Tensor]) -> None:
        """See the update before it is applied."""
        ...


def muon_step(
    batch: ObservedBatch, group: dict[str, Any], observer: Observer | None = None
) -> Generator[None, None, None]:
    """The algorithm. It pauses while an exchange is under way, so that other batches go on."""
    stages = stages_of(group)
    norms = batch.weight_norms() if stages.constraint else None
    if selects(group):  # from here on U and O are the rows that are taken (Dion2)
        shards = _sum_(batch.momentum_shards, group)
        row_norms, mu = batch.line_norms(shards), group["momentum"]
        yield
        batch.select_(row_norms.wait(), mu.reshape(()) if isinstance(mu, Tensor) else mu)
    else:
        shards = _momentum_(batch.momentum_shards, group)  # elementwise, on the state's shards
    u = batch.to_owners(shards)
    yield from u.arrive()  # (torch.compile loses what `yield from` gives)
    whole = u.wait()
    if observer is not None:
        observer.before(batch, group, whole)
    # Views of the whole matrices: what is done to these is done to them. (As late as can be: what a
    # stage keeps takes memory.)
    stacks = batch.stacks(whole) if stages.before else ()
    _run_(stages.before, stacks, group)
    o = [orthogonalize_(m, *(group[key] for key in NS_OPTIONS)) for m in whole]  # whole matrices
    if observer is not None:
        observer.orthogonalized(o)
    stacks = batch.stacks(o) if any(stages) and not stages.before else stacks
    _run_(stages.after, stacks, group)
    kept = Pending(None) if kept_state(group) == "none" else batch.keep(stacks)
    old = None if norms is None else norms.wait()
    if old is not None:
        _size_(stages.constraint, stacks, old)
    if observer is not None:
        observer.after(batch.with_all_lines(o) if selects(group) else o)
    d = batch.to_params(o)
    yield from d.arrive()
    _apply_(batch.param_shards, d.wait(), group)
    kept.wait()
    if old is not None and _holds_norms(stages.constraint):
        norms = batch.weight_norms()
        yield
        batch.scale_weights_(_factors(stages.constraint, old, norms.wait()))


def _momentum_(momentum_shards: Sequence[MomentumShards], group: dict[str, Any]) -> list[Tensor]:
    """M <- lerp(M, G, 1 - mu); U = lerp(G, M, mu) if nesterov else M.

    Returns U of the shards that are not only kept, stacked, in memory of its own; gradients are
    never written to.
    """
    mu, nesterov = group["momentum"], group["nesterov"]
    stacks = []
    for shards in momentum_shards:
        grads, momenta, dtype, only_kept, scales = shards
        if only_kept and not group["maximize"] and _alike(grads, momenta):
            share: Any = scheduled(1 - mu, momenta[0])
            torch._foreach_lerp_(momenta, grads, share)
            continue
        U = stacked(grads, alone=len(momentum_shards) == 1)
        U = U.to(computed_dtype(U.dtype, momenta[0].dtype))
        # 1 - mu is computed before either is rounded to the momentum's dtype.
        kept: Any = scheduled(mu, U)
        new: Any = scheduled(1 - mu, U)
        if group["maximize"]:
            U.neg_()
        directions = U.unbind()
        if scales is not None:
            U = int8.update_(momenta, scales, U, kept, new, nesterov)
        elif U.dtype == momenta[0].dtype:
            torch._foreach_lerp_(momenta, directions, new)
            if nesterov:
                torch._foreach_lerp_(directions, momenta, kept)
            else:
                torch._foreach_copy_(directions, momenta)
        else:
            M = torch.stack(momenta).to(U.dtype).lerp_(U, new)
            _store_(momenta, M)
            U = U.lerp_(M, kept) if nesterov else M
        if not only_kept:
            stacks.append(U.to(update_dtype(U.dtype, dtype)))
    return stacks


def _alike(grads: Sequence[Tensor], momenta: Sequence[Tensor]) -> bool:
    """Whether both lie alike in memory, so that the last bits are those of a stacked gradient."""
    return all(
        g.dtype == m.dtype and g.stride() == m.stride() for g, m in zip(grads, momenta, strict=True)
    )


def _sum_(momentum_shards: Sequence[MomentumShards], group: dict[str, Any]) -> list[Tensor]:
    """M <- M + G.

    Returns M of the shards that are not only kept, stacked, in memory of its own; gradients are
    never written to.
    """
    stacks = []
    sign = -1 if group["maximize"] else 1
    for grads, momenta, dtype, only_kept, _ in momentum_shards:
        wide = computed_dtype(grads[0].dtype, momenta[0].dtype)
        if wide == momenta[0].dtype:
            torch._foreach_add_(momenta, grads, alpha=sign)
            if only_kept:
                continue
            U = stacked(momenta, alone=len(momentum_shards) == 1)
        else:
            U = torch.stack(momenta).to(wide).add_(torch.stack(grads), alpha=sign)
            _store_(momenta, U)
        if not only_kept:
            stacks.append(U.to(update_dtype(U.dtype, dtype)))
    return stacks


def _store_(momenta: list[Tensor], M: Tensor) -> None:
    """Keep momenta in fewer bits than they were computed in."""
    if momenta[0].dtype == torch.float16:  # infinite beyond this; NaN stays NaN
        largest = torch.finfo(torch.float16).max
        M = M.clamp(-largest, largest)
    copy_each_(momenta, M.unbind())


def _run_(stages: Sequence[Stage], stacks: Sequence[MatrixStack], group: dict[str, Any]) -> None:
    """The stages in order, on whole matrices without padding."""
    for stage in stages:
        for whole in stacks:
            state, steps = (None, None) if stage.state == "none" else (whole.variance, whole.steps)
            beta2 = beta2_of(group, stage)
            stage.apply_(whole.matrices, state, beta2, 0 if steps is None else steps)


def _size_(constraints: Sequence[Constraint], stacks: Sequence[MatrixStack], old: Tensor) -> None:
    """Give every update the norm that a constraint wants, by the norms of the weights."""
    for constraint in constraints:
        if constraint.update is None:
            continue
        for whole in stacks:
            O = whole.matrices
            norm = torch.linalg.vector_norm(O, dim=(-2, -1), dtype=old.dtype)
            wanted = constraint.update(old[whole.numbers].to(O.device))
            O.mul_((wanted / norm.clamp_min_(NO_NORM)).reshape(-1, 1, 1))


def _holds_norms(constraints: Sequence[Constraint]) -> bool:
    return any(constraint.target is not None for constraint in constraints)


def _factors(constraints: Sequence[Constraint], old: Tensor, new: Tensor) -> Tensor:
    """What the weights are multiplied by, so that their norms are what the constraints want."""
    wanted = new
    for constraint in constraints:
        if constraint.target is not None:
            wanted = constraint.target(old, wanted)
    return wanted / new.clamp_min(NO_NORM)


def _apply_(
    param_shards: Sequence[ParamShards], d: Sequence[list[Tensor]], group: dict[str, Any]
) -> None:
    """W <- W - lr * weight_decay * W - lr * scale * D."""
    decaying = decays(group)
    for (params, rows, cols, cut), updates in zip(param_shards, d, strict=True):
        lr, decay = (
            _near(value, params[0]).reshape(()) if isinstance(value, Tensor) else value
            for value in (group["lr"], group["weight_decay"])
        )
        if decaying and (isinstance(decay, Tensor) or decay != 0):
            if group["cautious"]:
                shrinking = [p * (o * p > 0) for o, p in zip(updates, params, strict=True)]
                _add_(params, shrinking, -lr * decay)
            else:
                _add_(params, params, -lr * decay)
        scale = scale_of(group, rows, cols) * (group["block_lr_factor"] if cut else 1)
        _add_(params, updates, -lr * scale)


def _near(value: Tensor, like: Tensor) -> Tensor:
    """On the device of another; a GPU is not waited for, unless what it knows is needed here."""
    return value.to(like.device, non_blocking=like.device.type == "cuda")


def _add_(params: list[Tensor], tensors: list[Tensor], factor: float | Tensor) -> None:
    """params += factor * tensors, with the factor in full precision.

    (`_foreach_mul_` by a float would round it to the parameters' dtype: in bf16, 1 - 0.002 becomes
    1 - 0.0039. The sum is rounded to it all the same: bf16 weights lose small decays.)
    """
    factor = scheduled(factor, params[0])
    if isinstance(factor, Tensor):
        # A tensor as alpha would be read back to the host; multiplying keeps it on the device.
        torch._foreach_add_(params, torch._foreach_mul(tensors, factor))
    else:
        torch._foreach_add_(params, tensors, alpha=factor)
