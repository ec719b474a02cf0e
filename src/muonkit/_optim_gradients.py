"""Gradients before the step: which parameters have one, and whether the step may take place."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias, cast

import torch
from torch import Tensor

from muonkit._groups import parameter_names

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["Work", "may_step", "with_gradients"]

Work: TypeAlias = "Sequence[tuple[dict[str, Any], list[Tensor]]]"


def with_gradients(group: dict[str, Any]) -> list[Tensor]:
    """The group's parameters that have a gradient.

    Raises:
        RuntimeError: one of them is sparse.
    """
    for name, p in zip(parameter_names(group), group["params"], strict=True):
        if p.grad is not None and p.grad.layout != torch.strided:
            raise RuntimeError(
                f"Muon does not support sparse gradients: {name} {tuple(p.shape)} has one; "
                "build its embedding with sparse=False, or train it with torch.optim.SparseAdam"
            )
    return [p for p in group["params"] if p.grad is not None]


def may_step(work: Work) -> bool:
    """Whether the step may take place, by the policies of the groups that are checked.

    Waits once per device, and not at all where every group propagates.

    Raises:
        FloatingPointError: a non-finite gradient in a group that says "raise".
    """
    checked = [
        (group["nonfinite"], name, cast("Tensor", p.grad))
        for group, _ in work
        if group["nonfinite"] != "propagate"
        for name, p in zip(parameter_names(group), group["params"], strict=True)
        if p.grad is not None and p.grad.numel()
    ]
    if not checked:
        return True
    finite = _are_finite([grad for _, _, grad in checked])
    broken = [
        (policy, name) for (policy, name, _), ok in zip(checked, finite, strict=True) if not ok
    ]
    if any(policy == "raise" for policy, _ in broken):
        names = [name for _, name in broken]
        raise FloatingPointError(
            f"the gradient of {', '.join(names[:5])}{' ...' if len(names) > 5 else ''} is not "
            "finite; nothing was changed. Lower lr or clip gradients; nonfinite='skip' leaves such "
            "steps out"
        )
    return not broken


def _are_finite(grads: Sequence[Tensor]) -> list[bool]:
    """Of each gradient, whether all of it is finite; waits once per device."""
    answers = [False] * len(grads)
    for device in {grad.device for grad in grads}:
        here = [i for i, grad in enumerate(grads) if grad.device == device]
        # The largest magnitude: a 2-norm would overflow on large finite gradients.
        norms = torch._foreach_norm([grads[i] for i in here], float("inf"))
        finite = torch.stack([norm.float() for norm in norms]).isfinite().tolist()
        for i, ok in zip(here, finite, strict=True):
            answers[i] = ok
    return answers
