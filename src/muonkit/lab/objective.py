"""What a model is trained to, and where: a loss of a batch, on a device.

A built-in task and a task of the user's own go through the same two types: an `Objective` makes of
a model and a batch one scalar to descend on, and for validation how much that batch counts; a
`Place` moves batches to the device and casts there.
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from copy import copy
from dataclasses import dataclass, fields, is_dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

#: What a loader yields: (inputs, targets) in the built-in tasks; of a task of one's own whatever
#: its loss takes.
Batch = Any


@dataclass(frozen=True)
class Measured:
    """A batch's loss and its weight.

    Attributes:
        loss: a scalar, the mean over the batch.
        count: targets in it, by which means over several batches are weighted.
        right: how many of the targets are the likeliest class; None where there are no classes.
    """

    loss: Tensor
    count: int
    right: int | None


class Objective(Protocol):
    """A loss."""

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The mean over the batch, a scalar with a gradient."""

    def measure(self, model: nn.Module, batch: Batch) -> Measured:
        """The same for validation, without a gradient."""


class CrossEntropy:
    """Mean cross-entropy in nats of (inputs, targets): logits (..., classes), targets (...)."""

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return loss_of(model, *batch)[0]

    def measure(self, model: nn.Module, batch: Batch) -> Measured:
        x, y = batch
        mean, logits = loss_of(model, x, y)
        return Measured(mean, y.numel(), int((logits.argmax(-1) == y.flatten()).sum()))


def loss_of(model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy in nats, and the logits as (targets, classes)."""
    logits = model(x).flatten(0, -2)
    return F.cross_entropy(logits, y.flatten()), logits


CROSS_ENTROPY = CrossEntropy()


@dataclass(frozen=True)
class Place:
    """Where runs are trained: ``"cpu"`` as it is, ``"cuda"`` under autocast to bfloat16."""

    device: str = "cpu"

    def autocast(self) -> AbstractContextManager[Any]:
        """The block of the forward pass and the loss."""
        if self.device == "cpu":
            return nullcontext()
        return torch.autocast(self.device, torch.bfloat16)

    def moved(self, batch: Batch) -> Batch:
        """The batch with every tensor in it on the device."""
        return batch if self.device == "cpu" else _moved(batch, self.device)

    def wait(self) -> None:
        """Until the device has done what it was given, so that seconds are its own."""
        if self.device != "cpu":
            torch.cuda.synchronize()


CPU = Place()


def by_name(batch: Batch) -> Mapping[Any, Any] | None:
    """The parts of a dict or of a dataclass; None of anything else."""
    if isinstance(batch, Mapping):
        return batch
    if is_dataclass(batch) and not isinstance(batch, type):
        return {each.name: getattr(batch, each.name) for each in fields(batch)}
    return None


def placed(criterion: Any, device: torch.device) -> Any:
    """A criterion with the tensors that it has, such as the weights of classes, on a device."""
    if isinstance(criterion, partial):
        args, keywords = _moved(criterion.args, device), _moved(criterion.keywords, device)
        return partial(placed(criterion.func, device), *args, **keywords)
    return criterion.to(device) if isinstance(criterion, nn.Module) else criterion


def _moved(value: Any, device: str | torch.device) -> Any:
    if hasattr(value, "to"):  # tensors, and what Hugging Face's tokenizers return
        return value.to(device)
    if isinstance(value, Mapping):
        return {name: _moved(each, device) for name, each in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_moved(each, device) for each in value))
    if isinstance(value, list | tuple):
        return type(value)(_moved(each, device) for each in value)
    if (named := by_name(value)) is not None:  # a dataclass, also one that is frozen
        value = copy(value)
        for name, each in named.items():
            object.__setattr__(value, name, _moved(each, device))
    return value
