"""A small model with grouped queries, for one process and for every layout."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

WIDTH = 16


class Attention(nn.Module):
    """Causal attention with grouped queries; under tensor parallelism with the rank's heads."""

    def __init__(self, heads: int, kv_heads: int, head_dim: int) -> None:
        super().__init__()
        self.num_heads, self.num_key_value_heads, self.head_dim = heads, kv_heads, head_dim
        self.q_proj = nn.Linear(WIDTH, heads * head_dim)
        self.k_proj = nn.Linear(WIDTH, kv_heads * head_dim)
        self.v_proj = nn.Linear(WIDTH, kv_heads * head_dim, bias=False)
        self.o_proj = nn.Linear(heads * head_dim, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        layers = self.q_proj, self.k_proj, self.v_proj
        q, k, v = (f(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for f in layers)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        out: Tensor = self.o_proj(mixed.transpose(1, 2).flatten(2)).clone()  # FSDP2 warns of views
        return out


class Net(nn.Module):
    """Numbers (batch, time, WIDTH) -> numbers of the same shape."""

    def __init__(self, heads: int = 4, kv_heads: int = 2, head_dim: int = 5) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Attention(heads, kv_heads, head_dim) for _ in range(2))
        self.head = nn.Linear(WIDTH, WIDTH)
        self.double()
        with torch.no_grad():
            for name, p in self.named_parameters():
                if "q_proj" in name or "k_proj" in name:
                    p.mul_(3)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        out: Tensor = x + self.head(x)
        return out


def batch(step: int, size: int = 8) -> Tensor:
    """The numbers of a step, of which rank r of n has every n-th from r on."""
    return torch.randn(
        size, 6, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(step)
    )
