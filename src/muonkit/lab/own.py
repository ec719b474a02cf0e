"""A task of one's own: ``muonkit compare mytask.py:task``, or ``package.module:name``.

The protocol is a function without arguments that returns four things::

    def task():
        return model, train, validation, loss

model
    an ``nn.Module``, or a function (a class is one) that makes one. It is made anew for every run,
    on the CPU, with the global random numbers seeded by the run's seed: for that a function is
    called, and for a module ``task`` itself, of which the rest is then dropped.
train, validation
    batches: a ``DataLoader``, a list, any iterable that can be gone through again, or a function
    that makes one (called for every pass; with an int that differs by seed and pass, if it has an
    argument without a default). See :mod:`muonkit.lab.loaders`.
loss
    ``loss(model, batch)``, which returns a scalar, the mean over the batch; or a criterion, an
    ``nn.Module`` or one of ``torch.nn.functional`` (or a ``functools.partial`` of these), for
    batches of (inputs, targets); or None for a model that returns its loss, as Hugging Face's do:
    ``model(**batch).loss``.
"""

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from muonkit._text import shortened
from muonkit.lab.errors import LabError, TaskError
from muonkit.lab.loaders import OwnData, add_to, digest_of, examples, tensors
from muonkit.lab.objective import Batch, Measured, placed
from muonkit.lab.randomness import seed_all, seeded
from muonkit.lab.source import absent, content_of, factories, module_of, path_of, suggested
from muonkit.lab.task import Budget, Task, default_rates
from muonkit.lab.user import users

EXPECTED = "expected four things: model, train, validation, loss"
STEPS = 300

_OF_MODEL = "make it a part of the model, and return a function loss(model, batch)"


# --- the loss --------------------------------------------------------------------------------


@dataclass(frozen=True)
class OwnLoss:
    """What the task returned as its loss, called as its kind is.

    Attributes:
        given: the function, the criterion, or None.
        name: how errors call it.
    """

    given: Any
    name: str

    def __post_init__(self) -> None:
        if isinstance(self.given, type):
            raise TaskError(
                f"{self.name} is a class, expected what it makes: write {self.given.__name__}()"
            )
        if self.given is not None and not callable(self.given):
            raise TaskError(
                f"{self.name} is of type {type(self.given).__name__}, expected a function "
                "loss(model, batch), a criterion such as nn.CrossEntropyLoss(), or None where "
                "model(**batch).loss is the loss"
            )
        for name, p in self._module.named_parameters():
            if p.requires_grad:
                raise TaskError(
                    f"{self.name} has a parameter of its own ({shortened(name, 60)}), which no "
                    f"optimizer would train: {_OF_MODEL}"
                )

    @property
    def _function(self) -> Any:
        """What was given, without options that are set: F.cross_entropy with label_smoothing."""
        given = self.given
        while isinstance(given, partial):
            given = given.func
        return given

    @property
    def _module(self) -> nn.Module:
        """The criterion as a module; one without tensors where it is none."""
        given = self._function
        return given if isinstance(given, nn.Module) else nn.Identity()

    @property
    def _is_criterion(self) -> bool:
        given = self._function
        return isinstance(given, nn.Module) or (
            getattr(given, "__module__", "") == "torch.nn.functional"
        )

    def digest(self) -> str:
        """Of the tensors that a criterion has of its own."""
        return digest_of(self._module.state_dict())

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        with users(self.name):
            return self._scalar(self._outputs(model, batch)[0], with_gradient=True)

    def measure(self, model: nn.Module, batch: Batch) -> Measured:
        with users(self.name):
            loss, outputs = self._outputs(model, batch)
            right = _right(outputs, batch[1]) if self._is_criterion else None
            return Measured(self._scalar(loss), examples(batch), right)

    def _outputs(self, model: nn.Module, batch: Batch) -> tuple[Any, Any]:
        """The loss, and what the model returned where that is known."""
        if self.given is None:
            return self._of_model(model, batch), None
        if not self._is_criterion:
            return self.given(model, batch), None
        if not (isinstance(batch, list | tuple) and len(batch) == 2):
            raise TaskError(
                f"{self.name} is a criterion, and a batch is {_kind(batch)}, expected (inputs, "
                "targets): return a function loss(model, batch) instead"
            )
        outputs = model(batch[0])
        return placed(self.given, next(tensors(batch)).device)(outputs, batch[1]), outputs

    def _of_model(self, model: nn.Module, batch: Batch) -> Any:
        if not isinstance(batch, Mapping):
            raise TaskError(
                f"{self.name} is None, and a batch is {_kind(batch)}, expected a dict for "
                "model(**batch).loss: return a function loss(model, batch)"
            )
        found = model(**batch)
        loss = found.get("loss") if isinstance(found, Mapping) else getattr(found, "loss", None)
        if loss is None:
            raise TaskError(
                f"{self.name} is None, and model(**batch) has no loss: put labels into the batch, "
                "or return a function loss(model, batch)"
            )
        return loss

    def _scalar(self, loss: Any, *, with_gradient: bool = False) -> Tensor:
        if not isinstance(loss, Tensor):
            raise TaskError(
                f"{self.name} returned {type(loss).__name__}, expected a scalar tensor: leave out "
                "float() or .item(), which have no gradient"
                if isinstance(loss, float)
                else f"{self.name} returned {type(loss).__name__}, expected a scalar tensor: end "
                "it with 'return loss', and nothing beside it"
            )
        if not loss.is_floating_point():
            raise TaskError(
                f"{self.name} returned a tensor in {loss.dtype}, which has no gradient: expected "
                "a floating-point loss"
            )
        if loss.numel() != 1:
            raise TaskError(
                f"{self.name} returned a tensor of shape {tuple(loss.shape)} and {loss.dtype}, "
                "expected a scalar: end it with .mean()"
            )
        if with_gradient and not loss.requires_grad:
            raise TaskError(
                f"{self.name} returned a scalar without a gradient: compute it from the model that "
                "it is given, outside of torch.no_grad() and without detach()"
            )
        return loss.reshape(())


def _kind(batch: Batch) -> str:
    if isinstance(batch, list | tuple):
        return f"a {type(batch).__name__} of {len(batch)}"
    return f"a {type(batch).__name__}"


def _right(outputs: Any, targets: Any) -> int | None:
    """How many targets are the likeliest class: (N, C, ...) against whole numbers (N, ...)."""
    if not (isinstance(outputs, Tensor) and isinstance(targets, Tensor)):
        return None
    if targets.is_floating_point() or outputs.ndim != targets.ndim + 1 or outputs.ndim != 2:
        return None
    return int((outputs.argmax(1) == targets).sum())


# --- finding it ------------------------------------------------------------------------------


def own_task(spec: str) -> Task:
    """The task that ``spec`` names, loaded once per state of its source.

    Raises:
        LabError: there is no such file, module or function.
        TaskError: it is not what the protocol says, or its code failed.
    """
    where, _, name = spec.rpartition(":")
    if not where or not name:
        raise LabError(f"{spec!r} has no function: write {suggested(spec, 'task')}")
    path = path_of(where)
    content = content_of(path)
    source = hashlib.sha256(content).hexdigest()[:16]
    key = (str(path), name, source)
    if key not in _loaded:
        module = module_of(where, path, content)
        if not hasattr(module, name):
            raise absent(where, name, factories(path))
        _loaded[key] = _Own(spec, getattr(module, name)).task(source)
    return _loaded[key]


_loaded: dict[tuple[str, str, str], Task] = {}


def said_of_seeds(task: Task, data: OwnData) -> str:
    """What ± and p are worth where all seeds begin with the same weights; else nothing."""
    if _digest(task.make(0)) != _digest(task.make(1)):
        return ""
    begins = "Every seed begins with the same weights"
    if data.is_same_for_all_seeds():
        return (
            f"{begins} and has the same batches, so that its runs are one run several times, but "
            "for dropout: ± and p mean nothing. Shuffle the batches, or leave the seed out of the "
            "function that makes the model."
        )
    return (
        f"{begins}, as those of a pretrained model are: ± and p are of the batches alone. If that "
        "is not meant, leave the seed out of the function that makes the model."
    )


# --- the task --------------------------------------------------------------------------------


class _Own:
    """What the user's function returned, checked, and a `Task` made of it."""

    def __init__(self, spec: str, function: Any) -> None:
        self.spec, self.function = spec, function
        if not callable(function):
            raise TaskError(
                f"{spec} is of type {type(function).__name__}, expected a function that returns "
                "model, train, validation, loss"
            )
        model, self.train, self.validation, loss = self._returned()
        if not isinstance(model, nn.Module) and not callable(model):
            raise TaskError(
                f"the model of {spec} is of type {type(model).__name__}, expected an nn.Module, or "
                "a function that makes one"
            )
        self.first = model if isinstance(model, nn.Module) else None
        self.make: Callable[[], Any] = model if self.first is None else self._again
        self.loss = OwnLoss(loss, f"the loss of {spec}")
        self.data = OwnData(self.train, self.validation, spec)

    def _returned(self) -> tuple[Any, Any, Any, Any]:
        seed_all("weights", 0)  # so that a module is that of seed 0
        with users(f"{self.spec}()"):
            found = self.function()
        if not isinstance(found, list | tuple) or len(found) != 4:
            got = _kind(found) if isinstance(found, list | tuple) else type(found).__name__
            raise TaskError(f"{self.spec}() returned {got}, {EXPECTED}")
        model, train, validation, loss = found
        return model, train, validation, loss

    def _again(self) -> Any:
        """The model of another call of the task, which makes it with other random numbers."""
        with users(f"{self.spec}()"):
            return self.function()[0]

    def build(self) -> nn.Module:
        with users(f"the model of {self.spec}"):
            model = self.make()
        if not isinstance(model, nn.Module):
            raise TaskError(
                f"the model of {self.spec} made {type(model).__name__}, expected an nn.Module"
            )
        if any(isinstance(p, UninitializedParameter) for p in model.parameters()):
            raise TaskError(
                f"the model of {self.spec} has lazy layers without a size: call it on a batch in "
                "the function that makes it"
            )
        elsewhere = {p.device.type for p in model.parameters()} - {"cpu"}
        if elsewhere:
            raise TaskError(
                f"the model of {self.spec} is on {', '.join(sorted(elsewhere))}, expected the CPU: "
                "leave out .to(device), it is moved where it is trained"
            )
        if not any(p.requires_grad for p in model.parameters()):
            raise TaskError(f"the model of {self.spec} has no parameter to train")
        return model.train()

    def _begun(self) -> nn.Module:
        """The model of seed 0."""
        with seeded("weights", 0):
            return self.build()

    def task(self, source: str) -> Task:
        """The task, with its model and its source as they are now."""
        model = self._begun()
        kind, digest = type(model).__name__, _digest(model)
        again = self._begun() if self.first is None else self.first
        if _digest(again) != digest:
            raise TaskError(
                f"the model of {self.spec} has other weights each time, at the same seed, so that "
                "optimizers would not begin alike: draw them from torch's, numpy's or Python's "
                "global generator"
            )
        shared = _shared(model, again)
        has_accuracy = self._has_accuracy(model)
        if shared or _digest(again) != digest:  # buffers, as of a batch norm, change in the trial
            raise TaskError(
                f"the model of {self.spec} has the same tensors each time"
                f"{f' ({shortened(shared[0], 60)})' if shared else ''}, so that each run would "
                "begin with the weights that the one before has trained: make them anew in the "
                "function, or copy them there with copy.deepcopy"
            )
        self.first = None  # its memory is not needed any more
        said = (getattr(self.function, "__doc__", None) or kind).strip().partition("\n")[0]
        return Task(
            name=self.spec,
            summary=shortened(said.rstrip("."), 80),
            load=lambda: self.data,
            build=self.build,
            batch_size=self.data.examples,
            budget=Budget(STEPS, "steps"),
            lr=default_rates(),
            evaluations=20,
            accuracy=has_accuracy,
            objective=self.loss,
            unit="",
            source=source,
            identify=lambda: f"{kind}, {digest}",
        )

    def _has_accuracy(self, model: nn.Module) -> bool:
        """Try the loss once, so that what is wrong with it is told before anything is written."""
        with seeded("trial"):
            held_out = next(self.data.validation())
            batch = self.data.batch(0, 0, 0)
            given = digest_of(batch), digest_of(held_out)
            of_loss = self.loss.digest()
            loss = self.loss.loss(model, batch)
            if not math.isfinite(loss.item()):
                raise TaskError(
                    f"the loss of {self.spec} is {loss.item()} on the first batch, before any "
                    "step: no optimizer can begin there"
                )
            with users(f"the loss of {self.spec}"):
                loss.backward()  # type: ignore[no-untyped-call]
            model.eval()
            if digest_of(batch) != given[0]:
                self.data.see_untouched()
            with torch.no_grad():
                measured = self.loss.measure(model, held_out)
            if not math.isfinite(measured.loss.item()):
                raise TaskError(
                    f"the loss of {self.spec} is {measured.loss.item()} on the first validation "
                    "batch, before any step: no optimizer can begin there"
                )
            if digest_of(held_out) != given[1]:
                self.data.see_untouched()
            if self.loss.digest() != of_loss:
                raise TaskError(
                    f"the loss of {self.spec} changes tensors of its own, so that each run would "
                    f"begin with those that the one before has left: {_OF_MODEL}"
                )
            return measured.right is not None


def _shared(one: nn.Module, other: nn.Module) -> list[str]:
    """The names of parameters that are trained in the memory of another model."""
    taken = {p.untyped_storage().data_ptr() for p in one.parameters() if p.requires_grad}
    return [
        name
        for name, p in other.named_parameters()
        if p.requires_grad and p.numel() and p.untyped_storage().data_ptr() in taken
    ]


def _digest(model: nn.Module) -> str:
    """Of the model's tensors: their names, shapes and values."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        add_to(digest, tensor)
    return digest.hexdigest()[:8]
