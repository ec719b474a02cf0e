"""AdamW for what is not a hidden matrix: torch's own functional AdamW, fused where it exists."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from muonkit._compile import scheduled

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
        params: plain tensors, real or complex.
        grads: one for each, of its shape; not written to.
        states: one dict for each, with step, exp_avg and exp_avg_sq, plain tensors too.
        group: lr, betas, eps, weight_decay, maximize.
    """
    fused: list[Any] = []
    others: list[Any] = []
    for p, grad, state in map(_as_real, params, grads, states):
        # A gradient that lies otherwise is laid out as the parameter, which is cheaper than to
        # take the parameter, or its whole group, out of the fused kernel.
        grad = grad.to(p.dtype)
        if grad.stride() != p.stride() and not torch.compiler.is_compiling():
            grad = torch.empty_like(p).copy_(grad)
        fits = not torch.compiler.is_compiling() and _fits_fused(p, grad, state)
        (fused if fits else others).append((p, grad, state))
    _update_(fused, group, fused=True)
    # The fused kernel computes 16 bits in float32, the others do not: in float16 eps is zero, and
    # what has no gradient yet 0/0.
    _update_([each for each in others if each[0].dtype.itemsize > 2], group, fused=False)
    for p, grad, state in others:
        if p.dtype.itemsize == 2:
            _update_in_float32_(p, grad, state, group)


def _as_real(
    p: Tensor, grad: Tensor, state: dict[str, Any]
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """A complex parameter as the real one of its real and imaginary parts, as torch's AdamW has it;
    shares its memory."""
    if not p.is_complex():
        return p, grad, state
    moments = {key: torch.view_as_real(state[key]) for key in ("exp_avg", "exp_avg_sq")}
    grad = torch.view_as_real(grad.to(p.dtype).resolve_conj())
    return torch.view_as_real(p), grad, {**state, **moments}


def _update_(entries: Sequence[Any], group: dict[str, Any], fused: bool) -> None:
    if not entries:
        return
    compiling = torch.compiler.is_compiling()
    like = entries[0][0]
    scalars: Any = [scheduled(value, like) for value in (group["lr"], *group["betas"])]
    lr, beta1, beta2 = scalars  # torch 2.9 types the betas as floats
    adamw(
        [p for p, _, _ in entries],
        [grad for _, grad, _ in entries],
        [state["exp_avg"] for _, _, state in entries],
        [state["exp_avg_sq"] for _, _, state in entries],
        [],
        [state["step"] for _, _, state in entries],
        fused=fused,
        foreach=None if fused else compiling or not isinstance(group["lr"], Tensor),
        # When compiling, the step count is a tensor of the graph like the others; on a GPU, where
        # the fused kernel has made it, reading it would wait for the GPU.
        capturable=compiling
        or all(
            p.device.type == "cuda" and state["step"].device == p.device for p, _, state in entries
        ),
        amsgrad=False,
        beta1=beta1,
        beta2=beta2,
        lr=lr,
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=group["maximize"],
    )


def _update_in_float32_(
    p: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]
) -> None:
    """Update one parameter through float32 copies; the results are rounded to its dtype."""
    own = {"p": p, "exp_avg": state["exp_avg"], "exp_avg_sq": state["exp_avg_sq"]}
    wide = {key: tensor.float() for key, tensor in own.items()}
    copies = {**state, "exp_avg": wide["exp_avg"], "exp_avg_sq": wide["exp_avg_sq"]}
    _update_([(wide["p"], grad.float(), copies)], group, fused=False)
    for key, tensor in own.items():
        tensor.copy_(wide[key])


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
