"""What can train a task: one table. All share betas and the decoupled decay; only SGD differs.

A new optimizer is one entry in ``OPTIMIZERS`` and a default learning rate in each task.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

import muonkit
from muonkit.lab.errors import LabError, unknown

BETAS = (0.9, 0.95)
WEIGHT_DECAY = 0.1
#: SGD's decay is part of the gradient, so it acts multiplied by the (much larger) learning rate.
SGD_WEIGHT_DECAY = 5e-4


class Optimizer(Protocol):
    """The part of ``torch.optim.Optimizer`` the trainer uses."""

    @property
    def param_groups(self) -> list[dict[str, Any]]: ...
    def step(self) -> Any: ...
    def zero_grad(self) -> None: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state_dict: dict[str, Any]) -> None: ...


class Together:
    """Several torch optimizers, each with its own parameters, driven as one."""

    def __init__(self, *parts: torch.optim.Optimizer) -> None:
        self.parts = parts

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return [group for part in self.parts for group in part.param_groups]

    def step(self) -> None:
        for part in self.parts:
            part.step()

    def zero_grad(self) -> None:
        for part in self.parts:
            part.zero_grad()

    def state_dict(self) -> dict[str, Any]:
        return {str(i): part.state_dict() for i, part in enumerate(self.parts)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for i, part in enumerate(self.parts):
            part.load_state_dict(state_dict[str(i)])


def _adamw(parameters: Iterable[nn.Parameter], lr: float) -> torch.optim.AdamW:
    """torch's AdamW with decay on matrices and tables only."""
    every = list(parameters)
    groups = [
        {"params": [p for p in every if p.ndim >= 2], "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in every if p.ndim < 2], "weight_decay": 0.0},
    ]
    # Fused is the fastest that torch has, here and on GPUs.
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=lr, betas=BETAS, fused=True)


def _build_adamw(model: nn.Module, lr: float) -> Optimizer:
    return _adamw(model.parameters(), lr)


def _build_sgd(model: nn.Module, lr: float) -> Optimizer:
    return torch.optim.SGD(
        model.parameters(), lr=lr, momentum=0.9, nesterov=True, weight_decay=SGD_WEIGHT_DECAY
    )


def _build_muonw(model: nn.Module, lr: float) -> Optimizer:
    return muonkit.MuonW(model, lr=lr, weight_decay=WEIGHT_DECAY, adamw_betas=BETAS)


def _build_torch_muon(model: nn.Module, lr: float) -> Optimizer:
    chosen = {
        id(route.param)
        for route in muonkit.route(model)
        if route.algorithm == "muon" and route.param.ndim == 2
    }
    hidden = [p for p in model.parameters() if id(p) in chosen]
    rest = [p for p in model.parameters() if id(p) not in chosen]
    if not hidden:
        # Together() would be AdamW under Muon's name.
        raise LabError(
            "torch-muon has nothing to train here: torch.optim.Muon takes 2-D hidden matrices "
            "only, and the model has none; leave it out of --optimizers"
        )
    muon = torch.optim.Muon(
        hidden, lr=lr, weight_decay=WEIGHT_DECAY, adjust_lr_fn="match_rms_adamw"
    )
    return Together(muon, _adamw(rest, lr))


@dataclass(frozen=True)
class OptimizerSpec:
    """How an optimizer is made for a model, and one line on what it is."""

    name: str
    summary: str
    build: Callable[[nn.Module, float], Optimizer]


OPTIMIZERS: dict[str, OptimizerSpec] = {
    spec.name: spec
    for spec in (
        OptimizerSpec("muonw", "muonkit.MuonW(model): Muon and AdamW in one", _build_muonw),
        OptimizerSpec("adamw", "torch.optim.AdamW, decay on matrices only", _build_adamw),
        OptimizerSpec("sgd", "torch.optim.SGD, Nesterov momentum 0.9", _build_sgd),
        OptimizerSpec(
            "torch-muon",
            "torch.optim.Muon for the 2-D hidden matrices, torch.optim.AdamW for the rest; "
            "its bfloat16 products are about 100 times slower than float32 on most CPUs",
            _build_torch_muon,
        ),
    )
}


def get_optimizer(name: str) -> OptimizerSpec:
    """The optimizer called ``name``; LabError with the closest name when there is none."""
    if name not in OPTIMIZERS:
        raise unknown("optimizer", name, OPTIMIZERS)
    return OPTIMIZERS[name]
