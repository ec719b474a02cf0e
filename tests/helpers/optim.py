"""What the optimizer's tests share: small models and gradients that a seed decides."""

from __future__ import annotations

import torch
from torch import nn

from muonkit import Muon

VIEWED = [
    ("matrix", (6, 10)),
    ("matrix", (10, 6)),
    ("flatten", (6, 3, 2, 2)),
    ("experts", (3, 6, 4)),
    ("split(rows=3)", (12, 5)),
    ("split(rows=6+2+2)", (10, 5)),
    ("split(cols=2)", (5, 12)),
    ("split(rows=2) > split(rows=3+2)", (10, 7)),
    ("transpose > split(rows=3)", (5, 12)),
    ("experts > split(rows=2)", (2, 8, 5)),
]


def parameter(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    generator = torch.Generator().manual_seed(seed)
    return nn.Parameter(torch.randn(shape, generator=generator).to(dtype))


def set_gradients(params: list[nn.Parameter], seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(1000 + seed)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)


def mlp(width: int = 12, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(width, 2 * width),
        nn.ReLU(),
        nn.Linear(2 * width, width),
        nn.LayerNorm(width),
        nn.Linear(width, 3),
    )


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, seed: int = 0) -> None:
    for t in range(steps):
        set_gradients(list(model.parameters()), seed + t)
        optimizer.step()


def momentum_of(optimizer: Muon, p: torch.Tensor) -> torch.Tensor:
    return optimizer.state[p]["momentum_buffer"]
