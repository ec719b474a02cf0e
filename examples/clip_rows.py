"""A stage in one file: no row of an update is much longer than the others.

    python examples/clip_rows.py

A stage rewrites whole orthogonalized matrices, so it needs no line about ranks: the parameters
are the same under DDP, FSDP2 and tensor parallelism (tests/optim/test_own_stages.py holds it).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from muonkit import MuonW, Stage

MOST = 1.2


def clip_rows_(O: Tensor, v: Tensor | None, beta2: float, step: float | Tensor) -> None:
    """Shorten every row of O, (N, rows, cols), to at most MOST times its matrix's mean row norm."""
    wide = torch.promote_types(O.dtype, torch.float32)
    norm = torch.linalg.vector_norm(O, dim=-1, keepdim=True, dtype=wide)
    limit = MOST * norm.mean(dim=-2, keepdim=True)
    O.mul_((limit / norm.clamp_min(1e-15)).clamp_max(1))


CLIP_ROWS = Stage("clip_rows", clip_rows_)


def main() -> None:
    for after in ((), CLIP_ROWS):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU())
        model.append(nn.Linear(64, 1))
        optimizer = MuonW(model, lr=2e-3, after=after)
        x = torch.randn(512, 32)
        for _ in range(100):
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(model(x), x[:, :2].prod(dim=1, keepdim=True))
            loss.backward()
            optimizer.step()
        print(f"{optimizer.describe()[0]['after']:<10} loss {loss.item():.4f}")


if __name__ == "__main__":
    main()
