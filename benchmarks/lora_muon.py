"""LoRA-Muon (Cesista, Simal, Crowson, Biderman, arXiv 2606.12921), as finetune.py compares it.

With W = A Bᵀ, of A (m, r) and B (n, r), momenta M of both, S_A = AᵀA, S_B = BᵀB:

    A <- s A - lr / (2 s) msign(M_A S_B^-1/2) S_B^-1/2
    B <- s B - lr / (2 s) msign(M_B S_A^-1/2) S_A^-1/2        s = sqrt(1 - lr * weight_decay)

so that each term of the change of W has a spectral norm of lr / 2. LoRA begins with A = 0, where
S_A has no inverse: directions in which a factor is smaller than 1e-6 of its largest are left out
(a pseudo-inverse), and B moves from the second step on. The paper's text on that could not be read.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from muonkit import orthogonalize

_SMALL = 1e-6


class LoRAMuon(torch.optim.Optimizer):
    """Steps on pairs of factors.

    Args:
        pairs: (A, B) of every adapted weight: PEFT's `lora_B` (m, r) and `lora_A` (r, n), which is
            this module's Bᵀ.
    """

    def __init__(
        self,
        pairs: Sequence[tuple[Tensor, Tensor]],
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
    ) -> None:
        groups = [{"params": list(pair)} for pair in pairs]
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        super().__init__(groups, defaults)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            A, B_T = group["params"]
            lr, shrink = group["lr"], (1 - group["lr"] * group["weight_decay"]) ** 0.5
            directions = []
            for p in (A, B_T):
                momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
                momentum.lerp_(p.grad, 1 - group["momentum"])
                directions.append(momentum)
            R_A, R_B = inverse_root(A.T @ A), inverse_root(B_T @ B_T.T)
            # Both from the factors as they were.
            dA = orthogonalize(directions[0] @ R_B, ns_dtype="float32") @ R_B
            dB_T = R_A @ orthogonalize(R_A @ directions[1], ns_dtype="float32")
            for p, d in ((A, dA), (B_T, dB_T)):
                p.mul_(shrink).sub_(d, alpha=lr / 2 / shrink)


def inverse_root(gram: Tensor) -> Tensor:
    """The pseudo-inverse of the symmetric root, (r, r)."""
    values, vectors = torch.linalg.eigh(gram.double())
    kept = values > values[-1].clamp_min(0) * _SMALL**2
    roots = torch.where(kept, values.clamp_min(1e-300).rsqrt(), 0.0)
    return ((vectors * roots) @ vectors.T).to(gram.dtype)
