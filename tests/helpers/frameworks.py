"""What the tests of other people's training loops share: a model, its batches, one process's run.

A framework is told of its ranks by the environment, as its launcher would tell it, and meets a
process group that is there already. Products are in float32 on every machine, so that a deviation
is not the rounding of bf16 products.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator, Mapping
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn

from muonkit import MuonW, Rule
from tests.helpers.pages import read_blocks
from tests.helpers.paths import ROOT

STEPS, SAVED_AFTER = 10, 5
BATCH = 4  # of all ranks together
FEATURES = 6

# All but the rounding of float32: sums in another order, times ten steps of lr 0.05 through
# products whose condition the momentum's decides.
EXACT = 2e-5
# Of a run that was resumed from the one that was not: DDP makes its gradient buckets anew after the
# first step of a process, which changes the order of sums.
SAME = 1e-6

OPTIONS: dict[str, Any] = {
    "lr": 0.05,
    "adjust_lr_fn": "match_rms_adamw",
    "weight_decay": 0.1,
    "ns_dtype": "float32",
    "rules": [Rule("up.weight", "muon"), Rule("down.weight", "muon")],
}


class Model(nn.Module):
    """Two hidden matrices, a norm and a head; shapes that two ranks cannot halve evenly."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.up, self.norm = nn.Linear(FEATURES, 11), nn.LayerNorm(11)
        self.down, self.head = nn.Linear(11, 7), nn.Linear(7, 3)

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        hidden = self.down(self.norm(self.up(x).relu()))
        return {"loss": (self.head(hidden) - labels).square().mean()}


def samples() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        {
            "x": torch.randn(FEATURES, generator=generator),
            "labels": torch.randn(3, generator=generator),
        }
        for _ in range(STEPS * BATCH)
    ]


def batch(step: int, rank: int = 0, ranks: int = 1) -> dict[str, Tensor]:
    """This rank's part of the batch of a step."""
    size = BATCH // ranks
    first = step * BATCH + rank * size
    some = samples()[first : first + size]
    return {key: torch.stack([one[key] for one in some]) for key in some[0]}


@functools.cache
def alone(variant: str = "plain") -> dict[str, Tensor]:
    """The parameters that one process has after all steps, without any framework."""
    model = Model()
    optimizer = MuonW(model, variant=variant, **OPTIONS)
    for step in range(STEPS):
        optimizer.zero_grad()
        model(**batch(step))["loss"].backward()
        optimizer.step()
    return whole(model)


def whole(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter, whole, by its name in the model that nobody has wrapped."""
    full = {}
    for name, p in model.named_parameters():
        tensor = p.detach()
        full[name.removeprefix("module.")] = (
            tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor.clone()
        )
    return full


def deviation(got: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """The largest deviation over the largest magnitude of each parameter."""
    assert set(got) == set(expected)
    return max(
        float((got[name] - value).abs().max() / value.abs().max())
        for name, value in expected.items()
    )


def page(section: str) -> list[str]:
    """The Python blocks of docs/trainers.md under a heading: those above the first one before them,
    and those too that docs/test_pages.py skips, since they are for ranks.
    """
    blocks = read_blocks((ROOT / "docs" / "trainers.md").read_text(encoding="utf-8"))
    found = [b.text for b in blocks if b.section == section and b.language == "python"]
    assert found, section
    return [b.text for b in blocks if b.section == "In your trainer"] + found


@contextlib.contextmanager
def launched() -> Iterator[None]:
    """The environment as a launcher makes it for this rank."""
    rank, size = dist.get_rank(), dist.get_world_size()
    told = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": size,
        "LOCAL_WORLD_SIZE": size,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": 29500,
        "OMP_NUM_THREADS": 1,
        "ACCELERATE_USE_CPU": "true",
    }
    with mock.patch.dict(os.environ, {key: str(value) for key, value in told.items()}):
        yield
