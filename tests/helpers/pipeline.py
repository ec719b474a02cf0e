"""A model that is cut into stages, as a pipeline cuts it, and trained alike in every cut."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from muonkit import Muon, MuonW, Rule


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 4)


def stage(names: Iterable[str]) -> nn.ModuleDict:
    """Some layers of one model; the same ones for a name, wherever they are."""
    layers = {}
    for name in names:
        torch.manual_seed(ord(name))
        layers[name] = Block()
    return nn.ModuleDict(layers)


def optimizer_of(model: nn.Module, **options: Any) -> MuonW:
    # A rule: what the last layer of a part is taken for is not the subject here.
    rules = Rule("*.up.weight", "muon"), Rule("*.down.weight", "muon")
    return MuonW(model, lr=0.1, ns_dtype="float32", rules=rules, **options)


def train_by_name(model: nn.Module, optimizer: Muon, steps: Iterable[int]) -> None:
    """Each parameter's gradients are its name's, whatever is beside it."""
    for step in steps:
        for name, p in model.named_parameters():
            generator = torch.Generator().manual_seed(sum(name.encode()) + 1000 * step)
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()


def trained(names: str, steps: Iterable[int], **options: Any) -> tuple[nn.ModuleDict, MuonW]:
    model = stage(names)
    optimizer = optimizer_of(model, **options)
    train_by_name(model, optimizer, steps)
    return model, optimizer
