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
import importlib
import importlib.util
import math
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from muonkit._text import meant, shortened
from muonkit.lab.errors import LabError, TaskError
from muonkit.lab.files import UnfitError, read
from muonkit.lab.loaders import OwnData, add_to, digest_of, examples
from muonkit.lab.objective import Batch, Measured, Objective
from muonkit.lab.randomness import seed_all, seeded
from muonkit.lab.specs import factories
from muonkit.lab.task import Budget, Task, default_rates
from muonkit.lab.user import users

EXPECTED = "expected four things: model, train, validation, loss"
STEPS = 300
#: More than any source file has, in bytes.
_MOST = 1 << 24


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

    @property
    def _is_criterion(self) -> bool:
        given = self.given
        while isinstance(given, partial):  # F.cross_entropy with label_smoothing, say
            given = given.func
        return isinstance(given, nn.Module) or (
            getattr(given, "__module__", "") == "torch.nn.functional"
        )

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
        return self.given(outputs, batch[1]), outputs

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
        if loss.numel() != 1 or not loss.is_floating_point():
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
        raise LabError(f"{spec!r} has no function: write {_suggested(spec)}")
    path = _path(where)
    content = _content(path)
    source = hashlib.sha256(content).hexdigest()[:16]
    key = (str(path), name, source)
    if key not in _loaded:
        module = _module(where, path, content)
        if not hasattr(module, name):
            offered = factories(path)
            hint = f"{meant(name, offered)} " if meant(name, offered) else ""
            raise LabError(
                f"{where} has no {name!r}: {hint}it has {', '.join(offered) or 'no function'}"
            )
        _loaded[key] = _Own(spec, getattr(module, name)).task(source)
    return _loaded[key]


_loaded: dict[tuple[str, str, str], Task] = {}


def _suggested(spec: str) -> str:
    where = spec.rstrip(":")
    file = Path(where) if where.endswith(".py") else Path(f"{where}.py")
    names = factories(file) if file.is_file() else []
    name = "task" if "task" in names or not names else names[0]
    return f"{where}:{name}"


def _is_file(where: str) -> bool:
    return where.endswith(".py") or "/" in where or "\\" in where


def _path(where: str) -> Path:
    """The source of a file, or of a module, which is not imported for that."""
    if _is_file(where):
        path = Path(where).resolve()
        if not path.is_file():
            near = [str(each) for each in Path(where).parent.glob("*.py")]
            hint = f"{meant(where, near)} " if meant(where, near) else ""
            raise LabError(
                f"there is no file {where}: {hint}`muonkit new-task {Path(where).stem or 'mytask'}`"
                " writes one to begin with"
            )
        return path
    _search_here()
    importlib.invalidate_caches()
    try:
        with users(f"importing {where}"):
            found = importlib.util.find_spec(where)
    except TaskError as error:
        if not isinstance(error.__cause__, ModuleNotFoundError):
            raise
        found = None
    if found is None or not found.origin or not Path(found.origin).is_file():
        raise LabError(
            f"there is no module {where!r}: run from the folder that has it, install it, or name "
            "the file, as mytask.py:task"
        )
    return Path(found.origin)


def _content(path: Path) -> bytes:
    try:
        return read(path.resolve(), _MOST)
    except (OSError, UnfitError) as error:
        raise LabError(f"cannot read {path} ({error})") from error


def _search_here(folder: str | None = None) -> None:
    folder = folder or os.getcwd()
    if folder not in sys.path:
        sys.path.insert(0, folder)


def _module(where: str, path: Path, content: bytes) -> ModuleType:
    """The module, made of this content: neither of an older import nor of an older .pyc."""
    name = where
    if _is_file(where):
        name = path.stem
        _search_here(str(path.parent))
        before = sys.modules.get(name)
        if before is not None and getattr(before, "__file__", None) != str(path):
            name = f"muonkit_task_{path.stem}"  # another module has its name already
    found = importlib.util.spec_from_file_location(name, path)
    assert found is not None
    module = importlib.util.module_from_spec(found)
    # Before it is run: classes of it are found by their module's name, as pickle does.
    sys.modules[name] = module
    try:
        with users(f"importing {where}"):
            exec(compile(content, path, "exec"), module.__dict__)
    except TaskError as error:
        sys.modules.pop(name, None)
        if isinstance(error.__cause__, ImportError) and "relative import" in str(error.__cause__):
            raise LabError(
                f"{where} imports from its package, which a file alone has not: name it as a "
                f"module, from the folder above the package: package.{path.stem}:task"
            ) from error
        raise
    except BaseException:
        sys.modules.pop(name, None)
        raise
    return module


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
        self.loss: Objective = OwnLoss(loss, f"the loss of {spec}")
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
                right = self.loss.measure(model, held_out).right
            if digest_of(held_out) != given[1]:
                self.data.see_untouched()
            return right is not None


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
