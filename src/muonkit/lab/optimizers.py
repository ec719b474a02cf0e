"""What can train a task: one table. All share betas and the decoupled decay; only SGD differs.

A new optimizer is one entry in ``OPTIMIZERS`` and a default learning rate in each task.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

import muonkit
from muonkit.lab.errors import LabError, RunError, unknown

BETAS = (0.9, 0.95)
#: The unit of every recorded learning rate of a Muon, whatever MuonW's default is.
SCALE = "match_rms_adamw"
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


class _Float32Casts(TorchFunctionMode):
    """Where ``tensor.bfloat16()`` is called in this block, a float32 copy comes out."""

    def __init__(self) -> None:
        super().__init__()
        self.casts = 0

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is torch.Tensor.bfloat16:
            self.casts += 1
            # A copy, as a cast makes: the loop divides in place what may be the momentum itself.
            return args[0].float().clone()
        return func(*args, **(kwargs or {}))


class Float32Muon(Together):
    """torch.optim.Muon beside AdamW, its cast to bfloat16 changed to float32 and nothing else."""

    def step(self) -> None:
        """One step.

        Raises:
            RunError: this torch's Muon does not cast by ``tensor.bfloat16()``, so its products
                would not be float32.
        """
        with _Float32Casts() as found:
            super().step()
        if not found.casts:
            raise RunError(
                f"torch-muon-fp32 found no bfloat16() to change in torch {torch.__version__}'s "
                "Muon: leave it out of --optimizers, or take torch 2.9 to 2.13"
            )


def _adamw(parameters: Iterable[nn.Parameter], lr: float, decay: float) -> torch.optim.AdamW:
    """torch's AdamW with decay on matrices and tables only."""
    every = list(parameters)
    groups = [
        {"params": [p for p in every if p.ndim >= 2], "weight_decay": decay},
        {"params": [p for p in every if p.ndim < 2], "weight_decay": 0.0},
    ]
    # Fused is the fastest that torch has, here and on GPUs.
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=lr, betas=BETAS, fused=True)


def _make_adamw(model: nn.Module, lr: float, decay: float) -> Optimizer:
    return _adamw(model.parameters(), lr, decay)


def _make_sgd(model: nn.Module, lr: float, decay: float) -> Optimizer:
    return torch.optim.SGD(
        model.parameters(), lr=lr, momentum=0.9, nesterov=True, weight_decay=decay
    )


_MUONW: dict[str, Any] = {"adamw_betas": BETAS, "adjust_lr_fn": SCALE}


def _make_muonw(model: nn.Module, lr: float, decay: float) -> Optimizer:
    return muonkit.MuonW(model, lr=lr, weight_decay=decay, **_MUONW)


# What stands around Muon, each alone: title, and the options of MuonW.
_STAGES: dict[str, tuple[str, dict[str, Any]]] = {
    "normuon": ("NorMuon", {"after": "normuon"}),
    "adamuon": ("AdaMuon", {"after": "adamuon"}),
    "muoneq": ("MuonEq", {"before": "muoneq"}),
    "muon_plus": ("Muon+", {"after": "muon_plus"}),
    "hyperball": ("Hyperball", {"constraint": "hyperball"}),
    "relative_update": ("Relative update", {"constraint": "relative_update"}),
    "radial_brake": ("Radial brake", {"constraint": "radial_brake"}),
    "aol4": ("Turbo-Muon", {"ns_coefficients": "aol4"}),
    "int8": ("int8 momentum", {"momentum_dtype": "int8"}),
    "dion2": ("Dion2", {"fraction": 0.25}),
    "nordion2": ("NorDion2", {"fraction": 0.25, "after": "normuon"}),
}

# With these lr is the size of an update relative to its weight; AdamW's share of it is about the
# quotient of MuonW's lr and of that size where gpt begins.
RELATIVE = ("hyperball", "relative_update")
_ADAMW_SHARE = 0.5


def _make_staged(name: str, model: nn.Module, lr: float, decay: float) -> Optimizer:
    options = {**_MUONW, **_STAGES[name][1]}
    if name in RELATIVE:
        options["adamw_lr"] = _ADAMW_SHARE * lr
    return muonkit.MuonW(model, lr=lr, weight_decay=decay, **options)


def _torch_parts(
    name: str, model: nn.Module, lr: float, decay: float
) -> tuple[torch.optim.Optimizer, torch.optim.Optimizer]:
    """torch.optim.Muon for the 2-D hidden matrices, AdamW for all else; LabError without one."""
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
            f"{name} has nothing to train here: torch.optim.Muon takes 2-D hidden matrices "
            "only, and the model has none; leave it out of --optimizers"
        )
    muon = torch.optim.Muon(hidden, lr=lr, weight_decay=decay, adjust_lr_fn=SCALE)
    return muon, _adamw(rest, lr, decay)


def _make_torch_muon(model: nn.Module, lr: float, decay: float) -> Optimizer:
    return Together(*_torch_parts("torch-muon", model, lr, decay))


def _make_torch_muon_fp32(model: nn.Module, lr: float, decay: float) -> Optimizer:
    return Float32Muon(*_torch_parts("torch-muon-fp32", model, lr, decay))


@dataclass(frozen=True)
class OptimizerSpec:
    """One line on what an optimizer is, and how it is made.

    Attributes:
        title: its name in sentences and pictures.
        make: from a model, a learning rate and a weight decay.
        weight_decay: the default, and the centre of its sweep.
        scaled: whether its learning rate is in the unit of `SCALE`.
    """

    name: str
    title: str
    summary: str
    make: Callable[[nn.Module, float, float], Optimizer]
    weight_decay: float = WEIGHT_DECAY
    scaled: bool = False

    def build(self, model: nn.Module, lr: float, weight_decay: float | None = None) -> Optimizer:
        """The optimizer for ``model``; a weight decay of None is the default."""
        return self.make(model, lr, self.weight_decay if weight_decay is None else weight_decay)


def _staged(name: str) -> OptimizerSpec:
    title, options = _STAGES[name]
    said = ", ".join(
        f'{option}="{value}"' if isinstance(value, str) else f"{option}={value}"
        for option, value in options.items()
    )
    unit = (
        f"lr relative to the weight, AdamW's {_ADAMW_SHARE} of it"
        if name in RELATIVE
        else f"scale {SCALE}"
    )
    summary = f"muonkit.MuonW(model, {said}), {unit}"
    make = partial(_make_staged, name)
    return OptimizerSpec(name, title, summary, make, scaled=name not in RELATIVE)


OPTIMIZERS: dict[str, OptimizerSpec] = {
    spec.name: spec
    for spec in (
        OptimizerSpec(
            "muonw",
            "MuonW",
            f"muonkit.MuonW(model), scale {SCALE}",
            _make_muonw,
            scaled=True,
        ),
        *map(_staged, _STAGES),
        OptimizerSpec("adamw", "AdamW", "torch.optim.AdamW, decay on matrices only", _make_adamw),
        OptimizerSpec(
            "sgd", "SGD", "torch.optim.SGD, Nesterov momentum 0.9", _make_sgd, SGD_WEIGHT_DECAY
        ),
        OptimizerSpec(
            "torch-muon",
            "torch.optim.Muon",
            "torch.optim.Muon for the 2-D hidden matrices, torch.optim.AdamW for the rest; "
            "its bfloat16 products are about 100 times slower than float32 on most CPUs",
            _make_torch_muon,
            scaled=True,
        ),
        OptimizerSpec(
            "torch-muon-fp32",
            "torch.optim.Muon in float32",
            "the same, its cast to bfloat16 changed to float32",
            _make_torch_muon_fp32,
            scaled=True,
        ),
    )
}


def get_optimizer(name: str) -> OptimizerSpec:
    """The optimizer called ``name``; LabError with the closest name when there is none."""
    if name not in OPTIMIZERS:
        raise unknown("optimizer", name, OPTIMIZERS)
    return OPTIMIZERS[name]


def title_of(name: str) -> str:
    """The name in sentences and pictures of the optimizer called ``name``, or of anything else."""
    return OPTIMIZERS[name].title if name in OPTIMIZERS else name
