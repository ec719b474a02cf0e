"""AdamW for what is not a hidden matrix: torch's own functional AdamW, fused where it exists."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["adamw_step_"]

# Where torch's fused kernel takes floating-point parameters (torch 2.9 and later).
_FUSED_DEVICES = ("cpu", "cuda", "mps", "xpu")


def adamw_step_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    states: Sequence[dict[str, Any]],
    group: dict[str, Any],
) -> None:
    """One AdamW step, in place on `params` and `states`; `torch.optim.AdamW`'s state keys.

    Args:
        params, grads: of equal shapes, pairwise; gradients are not written to.
        states: one dict per parameter; filled with step, exp_avg and exp_avg_sq where empty.
        group: lr, betas, eps, weight_decay, maximize.
    """
    fused = not torch.compiler.is_compiling() and all(
        p.device.type in _FUSED_DEVICES for p in params
    )
    for p, state in zip(params, states, strict=True):
        if "exp_avg" not in state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
            state["exp_avg"] = torch.zeros_like(p, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = torch.zeros_like(p, memory_format=torch.preserve_format)
        for key in ("exp_avg", "exp_avg_sq"):
            # No copy, unless the model was moved or cast after the last step.
            state[key] = state[key].to(p.device, p.dtype)
    beta1, beta2 = group["betas"]
    adamw(
        list(params),
        list(grads),
        [state["exp_avg"] for state in states],
        [state["exp_avg_sq"] for state in states],
        [],
        [state["step"] for state in states],
        fused=fused,
        foreach=None if fused else not isinstance(group["lr"], Tensor),
        amsgrad=False,
        beta1=beta1,
        beta2=beta2,
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=group["maximize"],
    )
