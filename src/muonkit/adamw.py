"""AdamW for what is not a hidden matrix: torch's own functional AdamW, fused where it exists."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from torch.optim.adamw import adamw

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["adamw_step_"]

# Where torch's fused kernel takes floating-point parameters (torch 2.9 and later).
_FUSED_DEVICES = ("cpu", "cuda", "mps", "xpu")


def adamw_step_(
    params: Sequence[Tensor], states: Sequence[dict[str, Any]], group: dict[str, Any]
) -> None:
    """One AdamW step, in place on `params` and `states`; `torch.optim.AdamW`'s state keys.

    Args:
        params: each has a gradient, which is not written to.
        states: one dict per parameter; filled with step, exp_avg and exp_avg_sq where empty.
        group: lr, betas, eps, weight_decay, maximize.
    """
    for p, state in zip(params, states, strict=True):
        if "exp_avg" not in state:
            state["step"] = 0.0
            state["exp_avg"] = torch.zeros_like(p, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = torch.zeros_like(p, memory_format=torch.preserve_format)
        # No copies, unless the model was moved or cast after the last step, or the checkpoint is
        # of an optimizer that counts its steps in a number.
        state["step"] = torch.as_tensor(state["step"], dtype=torch.float32, device=p.device)
        for key in ("exp_avg", "exp_avg_sq"):
            state[key] = state[key].to(p.device, p.dtype)
    grads = [cast("Tensor", p.grad).to(p.dtype) for p in params]
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
