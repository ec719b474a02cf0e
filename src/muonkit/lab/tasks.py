"""What can be trained: one table, one frozen record each.

A new task is one record in ``TASKS``: where its data come from, which model, how long, and the
learning rates it starts from.
"""

import hashlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from muonkit.lab import data, models
from muonkit.lab.errors import unknown
from muonkit.lab.optimizers import OPTIMIZERS, RELATIVE


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

    @property
    def model(self) -> str:
        """The model with all its options, and a digest of its tensors' names and shapes: what a
        folder of an older model differs in.
        """
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


_CONTEXT = 128

# The learning rates of muonw and adamw for gpt, and of muonw, adamw and sgd for mnist, are what
# --sweep chose on 2026-11-22 (docs/lab.md has the grids). All others are guesses from which --sweep
# starts.


def _rates(muon: float, adamw: float, sgd: float, relative: float = 0.032) -> dict[str, float]:
    """Default learning rates by optimizer: one for every Muon, since the scale is the same, but for
    those whose lr is the size of an update relative to its weight.
    """
    rates = {name: muon for name, spec in OPTIMIZERS.items() if spec.scaled}
    return {**rates, **dict.fromkeys(RELATIVE, relative), "adamw": adamw, "sgd": sgd}


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task(
            name="gpt",
            summary="byte-level GPT on the source of Python's standard library (no download)",
            load=partial(data.stdlib_text, _CONTEXT),
            build=partial(models.GPT, 256, _CONTEXT),
            batch_size=16,
            budget=Budget(400, "steps"),
            lr=_rates(muon=0.016, adamw=2e-3, sgd=0.3),
            evaluations=20,
            accuracy=False,
        ),
        Task(
            name="digits",
            summary="MLP on scikit-learn's 8 x 8 digits (no download)",
            load=data.digits,
            build=partial(models.mlp, 64, 128, 10, 2),
            batch_size=64,
            budget=Budget(20, "epochs"),
            lr=_rates(muon=4e-3, adamw=4e-3, sgd=0.1),
            evaluations=20,
            accuracy=True,
        ),
        Task(
            name="mnist",
            summary="MLP on MNIST (12 MB)",
            load=data.mnist,
            build=partial(models.mlp, 784, 256, 10, 3),
            batch_size=128,
            budget=Budget(3, "epochs"),
            lr=_rates(muon=1e-3, adamw=2e-3, sgd=0.1, relative=0.008),
            evaluations=20,
            accuracy=True,
        ),
        Task(
            name="cifar10",
            summary="small residual convnet on CIFAR-10 (170 MB)",
            load=data.cifar10,
            build=models.ConvNet,
            batch_size=250,
            budget=Budget(5, "epochs"),
            lr=_rates(muon=4e-3, adamw=4e-3, sgd=0.1, relative=0.016),
            evaluations=10,
            accuracy=True,
        ),
    )
}


def get_task(name: str) -> Task:
    """The task called ``name``; LabError with the closest name when there is none."""
    if name not in TASKS:
        raise unknown("task", name, TASKS)
    return TASKS[name]
