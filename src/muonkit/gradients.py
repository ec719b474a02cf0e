"""Gradients before the step: which parameters have one, and whether the step may take place."""

from __future__ import annotations

import enum
import warnings
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias, cast

import torch
from torch import Tensor

from muonkit._torch import has_float64
from muonkit.distributed.exchange import check_ranks_agree
from muonkit.distributed.layout import is_dtensor, local
from muonkit.groups import name_of, parameter_names

if TYPE_CHECKING:
    from collections.abc import Sequence

    from muonkit.distributed.layout import Layouts

__all__ = [
    "GradientCheck",
    "Scaled",
    "Vote",
    "Work",
    "clip_gradients_",
    "forget_scaler",
    "judge",
    "lies_elsewhere",
    "local_gradient",
    "refuse_sparse",
    "scaled_by",
    "warn_if_idle",
    "with_gradients",
]

Work: TypeAlias = "Sequence[tuple[dict[str, Any], list[Tensor]]]"


def with_gradients(groups: Sequence[dict[str, Any]]) -> Work:
    """Every group, and its parameters that have a gradient."""
    return [(group, [p for p in group["params"] if p.grad is not None]) for group in groups]


def refuse_sparse(work: Work) -> None:
    """Raises:
    RuntimeError: a gradient is sparse.
    """
    for group, params in work:
        for p in params:
            grad: Any = p.grad
            if grad.layout != torch.strided:
                raise RuntimeError(
                    f"Muon does not support sparse gradients: {name_of(p, group)} "
                    f"{tuple(p.shape)} has one; build its embedding with sparse=False, or train it "
                    "with torch.optim.SparseAdam"
                )


def warn_if_idle(work: Work) -> None:
    """Warn where no parameter at all has a gradient."""
    if not any(params for _, params in work):
        warnings.warn(
            "no parameter of the optimizer has a gradient: nothing is trained. step() comes after "
            "backward(). fully_shard, parallelize_module, to_empty() of a model on meta, "
            "load_state_dict(assign=True) and the like put other parameters in place of those that "
            "an optimizer was given before: make it after them, or put the "
            'new ones into its groups ("params") in their place',
            UserWarning,
            stacklevel=4,
        )


class Vote(enum.IntEnum):
    """What a rank's gradients want of a step; the highest vote of all ranks counts."""

    STEP = 0
    SKIP = 1
    RAISE = 2


class GradientCheck(NamedTuple):
    """What one rank's gradients say of a step.

    Attributes:
        vote: for or against it.
        names: parameters with a non-finite gradient on this rank.
    """

    vote: Vote
    names: list[str]

    def may_step(self, vote: int) -> bool:
        """Whether the step takes place, by the highest vote of all ranks.

        Raises:
            FloatingPointError: a non-finite gradient in a group that says "raise".
        """
        if vote == Vote.RAISE:
            some = ", ".join(self.names[:5]) or "a parameter on another rank"
            raise FloatingPointError(
                f"the gradient of {some}{' ...' if len(self.names) > 5 else ''} is not "
                "finite; nothing was changed. Lower lr or clip gradients; nonfinite='skip' leaves "
                "such steps out"
            )
        return vote == Vote.STEP


def judge(work: Work) -> GradientCheck:
    """This rank's verdict, by the policies of the groups that are checked.

    Waits once per device, and not at all where every group propagates.
    """
    checked = [
        (group["nonfinite"], name, local(cast("Tensor", p.grad)))
        for group, _ in work
        if group["nonfinite"] != "propagate"
        for name, p in zip(parameter_names(group), group["params"], strict=True)
        if p.grad is not None and p.grad.layout == torch.strided
    ]
    checked = [(policy, name, grad) for policy, name, grad in checked if grad.numel()]
    if not checked:
        return GradientCheck(Vote.STEP, [])
    finite = _are_finite([grad for _, _, grad in checked])
    broken = [
        (policy, name) for (policy, name, _), ok in zip(checked, finite, strict=True) if not ok
    ]
    votes = [Vote.RAISE if policy == "raise" else Vote.SKIP for policy, _ in broken]
    return GradientCheck(max(votes, default=Vote.STEP), [name for _, name in broken])


def _are_finite(grads: Sequence[Tensor]) -> list[bool]:
    """Whether each gradient is finite in all its entries; waits once per device."""
    answers = [False] * len(grads)
    for device in {grad.device for grad in grads}:
        here = [i for i, grad in enumerate(grads) if grad.device == device]
        if device.type == "meta":  # no values: a dry run goes on
            for i in here:
                answers[i] = True
            continue
        # The largest magnitude: a 2-norm would overflow on large finite gradients.
        norms = torch._foreach_norm([grads[i] for i in here], float("inf"))
        # Each in its own dtype: a float64 narrowed to float32 may be infinite there.
        finite = torch.stack([norm.isfinite() for norm in norms]).tolist()
        for i, ok in zip(here, finite, strict=True):
            answers[i] = ok
    return answers


def local_gradient(p: Any) -> Tensor:
    """This rank's part of the gradient, laid out as the parameter.

    A DTensor's gradient may come with other placements (partial sums, from a module whose input was
    sharded): it is redistributed, which all ranks of its mesh take part in.
    """
    grad = p.grad
    return local(grad.redistribute(placements=p.placements) if lies_elsewhere(p) else grad)


def lies_elsewhere(p: Any) -> bool:
    """Whether the gradient of a DTensor has other placements than it."""
    grad = p.grad
    return is_dtensor(grad) and is_dtensor(p) and grad.placements != p.placements


class Scaled(NamedTuple):
    """The scale and the overflow that a GradScaler hands over to an optimizer that skips by itself.

    Attributes:
        scale: that the gradients still have; None where they are unscaled already.
        overflow: whether this rank found a non-finite one.
    """

    scale: float | None
    overflow: bool

    def check(self) -> GradientCheck:
        """This rank's vote: a step whose gradients overflowed is skipped."""
        return GradientCheck(Vote.SKIP if self.overflow else Vote.STEP, [])

    def unscale_(self, work: Work) -> None:
        """Divide the gradients by the scale in place, as the scaler would have done."""
        grads = [local(cast("Tensor", p.grad)) for _, params in work for p in params]
        if self.scale is not None and grads:
            torch._foreach_mul_(grads, 1 / self.scale)


def scaled_by(optimizer: Any) -> Scaled | None:
    """The scale that a GradScaler has set on the optimizer for this step; waits for its value."""
    found = getattr(optimizer, "found_inf", None)
    if found is None:
        return None
    scale = optimizer.grad_scale
    return Scaled(None if scale is None else float(scale), bool(found.item()))


def forget_scaler(optimizer: Any) -> None:
    """After a step that raised: a GradScaler takes back what it has set after others only, and
    would multiply its next scale by the one that it finds.
    """
    for name in ("grad_scale", "found_inf"):
        vars(optimizer).pop(name, None)


def _is_alone(layouts: Layouts, p: Tensor) -> bool:
    layout = layouts.get(p)
    return layout is not None and layout.alone


_CLIPPED = "all ranks clip alike, and none has been clipped: give the same arguments on all"


def clip_gradients_(
    named: Sequence[tuple[str, Any]],
    layouts: Layouts,
    max_norm: float,
    error_if_nonfinite: bool,
) -> Tensor:
    """Scale the gradients so that their norm over all ranks is at most `max_norm`.

    Every entry counts once, however many ranks have it.
    """
    domain = layouts.domain
    if domain is not None:
        asked = [
            ("max_norm", repr(max_norm)),
            ("error_if_nonfinite", f"{error_if_nonfinite}"),
        ]
        # To redistribute a gradient takes all ranks of its mesh.
        asked += [
            (f"the gradient of {name}", f"{p.grad.placements}")
            for name, p in named
            if lies_elsewhere(p) and not _is_alone(layouts, p)  # those ask their own mesh only
        ]
        check_ranks_agree(domain, asked, {"": _CLIPPED}, call="clip_grad_norm_")
    params = [p for _, p in named if p.grad is not None]
    by_copies: dict[int, list[Tensor]] = {}
    for p in params:
        if lies_elsewhere(p):
            p.grad = p.grad.redistribute(placements=p.placements)
        copies = 1 if domain is None else layouts.copies(p)
        by_copies.setdefault(copies, []).append(local(p.grad))
    grads = [grad for some in by_copies.values() for grad in some]
    where = torch.device("cpu") if not grads else grads[0].device
    where = where if domain is None else domain.device
    # A gradient's dtype may not hold the square of its entries: 256² is beyond float16.
    devices = {where, *(grad.device for grad in grads)}
    wide = torch.float64 if all(map(has_float64, devices)) else torch.float32
    square = torch.zeros((), dtype=wide, device=where)
    for copies, some in by_copies.items():
        square += _square(some, wide).to(where) / copies
    if domain is not None:
        torch.distributed.all_reduce(square, group=domain.group)
    norm = square.sqrt()
    total = norm if torch.float64 in {grad.dtype for grad in grads} else norm.float()
    if error_if_nonfinite and not torch.isfinite(total):
        raise RuntimeError(
            f"the gradients' norm is {total.item()}; nothing was clipped. Lower lr, or leave such "
            "steps out with nonfinite='skip'"
        )
    # As torch.nn.utils.clip_grads_with_norm_.
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for grads in by_copies.values():
        for device in {grad.device for grad in grads}:
            here = [grad for grad in grads if grad.device == device]
            torch._foreach_mul_(here, factor.to(device))
    return total


def _square(grads: Sequence[Tensor], wide: torch.dtype) -> Tensor:
    """The square of the norm of all of them together, on the first one's device."""
    norms: list[Tensor] = []
    for key in {(grad.device, grad.dtype) for grad in grads}:
        here = [grad for grad in grads if (grad.device, grad.dtype) == key]
        norms += torch._foreach_norm(here, 2.0, torch.promote_types(key[1], torch.float32))
    return torch.stack([norm.to(norms[0].device, wide) for norm in norms]).square().sum()
