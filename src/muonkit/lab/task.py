"""What a task is: its data, its model, its loss, and the defaults that hold for every optimizer."""

import hashlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import nn

from muonkit.lab import data
from muonkit.lab.objective import CROSS_ENTROPY, Objective
from muonkit.lab.optimizers import OPTIMIZERS, RELATIVE
from muonkit.lab.randomness import seed_all


@dataclass(frozen=True)
class Budget:
    """How long a run is: a number of steps, or of passes over the training data."""

    amount: int
    unit: str  # "steps" | "epochs"

    def steps(self, per_epoch: int) -> int:
        return self.amount * (per_epoch if self.unit == "epochs" else 1)

    def __str__(self) -> str:
        return f"{self.amount} {self.unit if self.amount != 1 else self.unit[:-1]}"


@dataclass(frozen=True)
class Task:
    """One comparison: the data, the model, and the defaults that hold for every optimizer.

    Attributes:
        name: what is typed.
        summary: one line for the help text and the report.
        load: makes the data; the only thing that may take long or need the network.
        build: makes the model on the CPU; its initial weights come from torch's global seed.
        batch_size: examples per step (for text: windows).
        budget: length of a run.
        lr: default learning rate of each optimizer, the centre of its sweep.
        evaluations: validations per run, evenly spaced, the last one at the end.
        accuracy: whether the share of right answers is reported (it is not for text).
        objective: the loss.
        unit: what losses are in.
        source: a digest of the file that a task of the user's own stands in; None: it is ours.
        identify: the model in a few words that change with it; None: from what `build` makes.
    """

    name: str
    summary: str
    load: Callable[[], data.Data]
    build: Callable[[], nn.Module]
    batch_size: int
    budget: Budget
    lr: Mapping[str, float]
    evaluations: int
    accuracy: bool
    objective: Objective = CROSS_ENTROPY
    unit: str = "nats"
    source: str | None = None
    identify: Callable[[], str] | None = None

    @property
    def is_own(self) -> bool:
        """Whether it is the user's."""
        return self.source is not None

    @property
    def label(self) -> str:
        """The name as a folder has it."""
        if not self.is_own:
            return self.name
        where = self.name.rpartition(":")[0]
        stem = Path(where).stem if where.endswith(".py") else where.rpartition(".")[2]
        return "".join(c if c.isalnum() or c in "-_" else "-" for c in stem)

    def make(self, seed: int) -> nn.Module:
        """The model as every run of that seed begins: the seed alone decides its weights."""
        seed_all("weights", seed)
        return self.build()

    @property
    def model(self) -> str:
        """The model with all its options, and a digest of its tensors' names and shapes: what a
        folder of an older model differs in. The user's: its class, and a digest of its weights.
        """
        if self.identify is not None:
            return self.identify()
        with torch.device("meta"):  # no memory, no random numbers
            tensors = self.build().state_dict()
        listed = "".join(f"{name} {tuple(t.shape)} {t.dtype}\n" for name, t in tensors.items())
        return f"{_call(self.build)}, {hashlib.sha256(listed.encode()).hexdigest()[:8]}"


def _call(build: Callable[[], nn.Module]) -> str:
    """``ConvNet(classes=10, width=16)``: defaults that nobody gave are options too."""
    given = build if isinstance(build, partial) else partial(build)
    bound = inspect.signature(given.func).bind(*given.args, **given.keywords)
    bound.apply_defaults()
    options = ", ".join(f"{name}={value!r}" for name, value in bound.arguments.items())
    return f"{getattr(given.func, '__name__', 'model')}({options})"


def rates(muon: float, adamw: float, sgd: float, relative: float = 0.032) -> dict[str, float]:
    """Default learning rates by optimizer: one for every Muon, since the scale is the same, but for
    those whose lr is the size of an update relative to its weight.
    """
    scaled = {name: muon for name, spec in OPTIMIZERS.items() if spec.scaled}
    return {
        **scaled,
        **dict.fromkeys(RELATIVE, relative),
        "adamw": adamw,
        "adamw-0.99": adamw,
        "sgd": sgd,
    }


def default_rates() -> dict[str, float]:
    """Where the rates of a task begin that nobody has tuned: between those of the tasks here."""
    return rates(muon=4e-3, adamw=2e-3, sgd=0.1)
