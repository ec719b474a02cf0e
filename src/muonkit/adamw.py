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
        params: plain tensors.
        grads: one for each, of its shape; not written to.
        states: one dict for each, with step, exp_avg and exp_avg_sq, plain tensors too.
        group: lr, betas, eps, weight_decay, maximize.
    """
    grads = [grad.to(p.dtype) for p, grad in zip(params, grads, strict=True)]
    compiling = torch.compiler.is_compiling()
    fused = not compiling and all(
        _fits_fused(p, g, state) for p, g, state in zip(params, grads, states, strict=True)
    )
    beta1, beta2 = group["betas"]
    adamw(
        list(params),
        grads,
        [state["exp_avg"] for state in states],
        [state["exp_avg_sq"] for state in states],
        [],
        [state["step"] for state in states],
        fused=fused,
        foreach=None if fused else compiling or not isinstance(group["lr"], Tensor),
        # When compiling, the step count is a tensor of the graph like the others.
        capturable=compiling,
        amsgrad=False,
        beta1=beta1,
        beta2=beta2,
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=group["maximize"],
    )


def _fits_fused(p: Tensor, grad: Tensor, state: dict[str, Any]) -> bool:
    """Whether torch's fused kernel may have this parameter.

    It walks all four tensors by raw pointer: where one has other strides, or gaps, it computes
    with the wrong elements, and writes outside of the parameter (torch 2.13, CPU).
    """
    return (
        p.device.type in _FUSED_DEVICES
        and all(t.stride() == p.stride() for t in (grad, state["exp_avg"], state["exp_avg_sq"]))
        and (
            p.is_contiguous()
            or (p.ndim == 4 and p.is_contiguous(memory_format=torch.channels_last))
            or (p.ndim == 5 and p.is_contiguous(memory_format=torch.channels_last_3d))
        )
    )
