"""The adapter: how an optimizer is made, what it claims, and where it is found."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
import sysconfig
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, TypeAlias

import torch
from torch import nn
from torch.optim import Optimizer

from muonkit._text import shortened, unknown

__all__ = ["CLAIMS", "SAME", "Make", "Subject", "load", "told"]

Make: TypeAlias = Callable[..., Optimizer]

# What a law may need, in the words of the reports.
CLAIMS = {
    "matrices": "2-D parameters",
    "convolutions": "4-D parameters, each as the matrix out × (in · kh · kw)",
    "experts": "3-D parameters, each as a stack of matrices",
    "heads": "parameters whose rows are equal blocks, each a matrix of its own",
    "scale": "a rule for the learning rate of a matrix by its shape",
    "decay": "decoupled weight decay",
    "momentum": "a momentum of the gradients, with Nesterov's look-ahead or without",
    "checkpoint": "state dicts from which a run goes on",
    "bfloat16": "parameters in bfloat16",
    "float64": "parameters in float64",
    "ddp": "parameters with a copy on every rank",
    "fsdp2": "DTensors that are sharded on their first dim",
}


# By how much of its norm an update may differ, by the dtype of the products: see `laws`.
# float32: the iterations amplify a rounding of 6e-8 by at most 3.4445^5 = 485.
SAME = {
    torch.float64: 2e-3,
    torch.float32: 2e-3,
    torch.float16: 0.25,
    torch.bfloat16: 0.25,
}


@dataclass(frozen=True)
class Subject:
    """An optimizer under test.

    Attributes:
        make: `make(params, *, lr, weight_decay)`: from a list of parameters to the optimizer that
            trains all of them with Muon. A class whose constructor can be called so will do.
        name: what the reports call it.
        convolutions: whether `make` takes 4-D parameters, as the matrix out × (in · kh · kw).
        experts: whether `make` takes 3-D parameters, as stacks of matrices.
        heads: `heads(params, blocks, *, lr, weight_decay)`: the same, where the rows of every
            parameter are so many equal blocks; None: not claimed.
        scale: (rows, cols) of one matrix -> the factor on lr that is documented for it.
        decay: whether weight_decay is decoupled, lr · weight_decay · W a step.
        momentum: the weight of the past, (M <- momentum M + G, or the average of both); None: not
            claimed. That is right too where something else is mixed in.
        nesterov: whether the update looks ahead by one gradient, U = G + momentum M.
        checkpoint: whether state dicts are claimed.
        bfloat16, float64: whether parameters of these dtypes are claimed.
        products: the dtype of the matrix products on a CPU. It decides the tolerances alone.
        ddp: as `make`, on ranks that all have a copy of every parameter and gradient; called after
            `torch.distributed` was initialized.
        fsdp2: as `make`, for parameters that are DTensors sharded on dim 0.
        deliberate: pairs of a law and why the optimizer breaks it on purpose, for the reports.
    """

    make: Make
    name: str = ""
    convolutions: bool = False
    experts: bool = False
    heads: Make | None = None
    scale: Callable[[int, int], float] | None = None
    decay: bool = True
    momentum: float | None = None
    nesterov: bool = True
    checkpoint: bool = True
    bfloat16: bool = True
    float64: bool = False
    products: torch.dtype = torch.bfloat16
    ddp: Make | None = None
    fsdp2: Make | None = None
    deliberate: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        for name in ("make", "heads", "scale", "ddp", "fsdp2"):
            value = getattr(self, name)
            if not callable(value) and (name == "make" or value is not None):
                self._refuse(name, "a function" if name == "make" else "a function or None")
        for name in (
            "convolutions", "experts", "decay", "nesterov", "checkpoint", "bfloat16", "float64"
        ):  # fmt: skip
            if not isinstance(getattr(self, name), bool):
                self._refuse(name, "True or False")
        number = isinstance(self.momentum, int | float) and not isinstance(self.momentum, bool)
        if self.momentum is not None and not (number and 0 <= self.momentum < 1):
            self._refuse("momentum", "the weight of the past, from 0 to below 1, or None")
        if self.products not in SAME:
            self._refuse("products", f"one of {', '.join(map(str, SAME))}")
        pairs = self.deliberate if isinstance(self.deliberate, tuple) else (None,)
        for pair in pairs:
            if not (isinstance(pair, tuple) and list(map(type, pair)) == [str, str]):
                self._refuse("deliberate", 'pairs, (("the_law", "why"),)')

    def _refuse(self, name: str, expected: str) -> None:
        got = shortened(repr(getattr(self, name)), 80)
        raise TypeError(f"Subject got {name}={got}, expected {expected}")

    def claims(self, claim: str) -> bool:
        """Whether it says that it does what `CLAIMS` has under this name."""
        value = True if claim == "matrices" else getattr(self, claim)
        return value is not None and value is not False

    def why(self, law: str) -> str:
        """Why it breaks a law on purpose; of one on ranks with their number or without."""
        reasons = dict(self.deliberate)
        return reasons.get(law) or reasons.get(law.partition("-on-")[0], "")

    def optimizer(
        self,
        params: Sequence[nn.Parameter],
        *,
        lr: float = 1.0,
        weight_decay: float = 0.0,
        blocks: int | None = None,
        layout: str = "make",
    ) -> Optimizer:
        """Make one, and see that it is one.

        Args:
            blocks: for `heads`: how many blocks the rows of every parameter are.
            layout: "make", "ddp" or "fsdp2".

        Raises:
            TypeError: what came is no optimizer of these parameters.
        """
        make: Any = getattr(self, layout) if blocks is None else self.heads
        given: tuple[Any, ...] = (list(params),) if blocks is None else (list(params), blocks)
        # An optimizer that does not decay need not know the word; one that does has it at zero.
        known = self.decay or weight_decay or "weight_decay" in _parameters(make)
        decay = {"weight_decay": weight_decay} if known else {}
        made: Optimizer = make(*given, lr=lr, **decay)
        if not callable(getattr(made, "step", None)) or not hasattr(made, "param_groups"):
            raise TypeError(
                f"the adapter of {self.name or 'the optimizer'} returned "
                f"{shortened(repr(made), 80)}, expected an optimizer with step() and "
                "param_groups: end make(params, *, lr, weight_decay) with 'return optimizer'"
            )
        held = {id(p) for group in made.param_groups for p in group["params"]}
        if lost := [tuple(p.shape) for p in params if id(p) not in held]:
            raise TypeError(
                f"the adapter of {self.name or 'the optimizer'} returned one without the "
                f"parameters of shape {', '.join(map(str, lost))}: make has to give all that it "
                "gets to the optimizer, and only claim what that takes"
            )
        return made


def load(spec: str) -> Subject:
    """The subject that `mypackage.module:name` or `path/to/file.py:name` names: a `Subject`, a
    function without required arguments that returns one, or a `make`.

    Raises:
        ValueError, TypeError, LookupError, ImportError: there is none; the message says what was
            got, what was expected, and the remedy.
    """
    where, colon, name = spec.rpartition(":")
    if not colon or not where or not name:
        raise ValueError(
            f"--optimizer got {spec!r}, expected a module and a name with a colon between them: "
            "mypackage.module:make, or path/to/file.py:make"
        )
    module = _module(where)
    found: Any = module
    for part in name.split("."):
        if not hasattr(found, part):
            public = [word for word in vars(found) if not word.startswith("_")]
            raise LookupError(f"{where} has no {name!r}: " + unknown("name", part, public))
        found = getattr(found, part)
    return _subject(found, spec)


def _subject(found: Any, spec: str) -> Subject:
    subject = _made_by(found, spec) if callable(found) else found
    if not isinstance(subject, Subject):
        raise TypeError(
            f"--optimizer {spec} is {shortened(repr(found), 80)}, expected a "
            "muonkit.testing.Subject, or a function make(params, *, lr, weight_decay) that returns "
            "an optimizer"
        )
    probe = nn.Parameter(torch.zeros(2, 3))
    try:
        subject.optimizer([probe])
    except Exception as error:
        decay = ", weight_decay=0.0" if subject.decay else ""
        raise TypeError(
            f"--optimizer {spec} could not be called as make([parameter], lr=1.0{decay}): "
            f"{told(error)}. Give a function of that form, or a muonkit.testing.Subject with "
            "make=such a function; one without decay says decay=False"
        ) from error
    return subject


def _made_by(found: Any, spec: str) -> Any:
    """A `make` as a subject; what cannot be called as one, but without arguments, is called."""
    is_make = isinstance(found, type) or _takes(found, [], lr=1.0, weight_decay=0.0)
    return found() if not is_make and _takes(found) else Subject(found, name=spec)


def _parameters(function: Any) -> Mapping[str, Any]:
    try:
        return inspect.signature(function).parameters
    except (TypeError, ValueError):
        return {}


def _takes(function: Any, *args: Any, **kwargs: Any) -> bool:
    try:
        inspect.signature(function).bind(*args, **kwargs)
    except (TypeError, ValueError):
        return False
    return True


def told(error: BaseException) -> str:
    """An error of the code under test in a line: its type, its first line, and the line of that
    code which raised it, or called into torch or Python's own library."""
    first = (str(error).strip().splitlines() or [""])[0]
    where = ""
    for frame in traceback.extract_tb(error.__traceback__):
        if _is_theirs(frame.filename):
            where = f" ({Path(frame.filename).name}:{frame.lineno})"
    return f"{type(error).__name__}: {shortened(first, 300)}{where}"


_LIBRARY = sysconfig.get_path("stdlib")
_NOT_THEIRS = ("<", str(Path(__file__).parent), str(Path(torch.__file__).parent))


def _is_theirs(file: str) -> bool:
    """Whether the code under test is in it, and not that of torch, Python or this suite."""
    installed = "site-packages" in file or "dist-packages" in file  # a folder of the library's
    return not file.startswith(_NOT_THEIRS) and (installed or not file.startswith(_LIBRARY))


def _module(where: str) -> ModuleType:
    if not where.endswith(".py"):
        try:
            return importlib.import_module(where)
        except (Exception, SystemExit) as error:  # a script's sys.exit() would end pytest
            missing = error.name if isinstance(error, ModuleNotFoundError) else None
            if missing is None or not (where + ".").startswith(missing + "."):
                raise _unimported(where, error) from error  # the module is there
            raise LookupError(
                f"--optimizer names the module {where!r}, and there is no {missing!r} on the "
                f"path; install it, run from its folder with 'python -m pytest', or give a file, "
                "path/to/file.py:make"
            ) from error
    path = Path(where).resolve()
    if not path.is_file():
        raise LookupError(f"--optimizer names the file {where!r}, and there is none at {path}")
    name = f"conformance_of_{path.stem}"
    known = sys.modules.get(name)
    if known is not None and known.__file__ == str(path):
        return known
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickles look there
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))  # for what stands beside it, which it may import
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise _unimported(where, error) from error
    return module


def _unimported(where: str, error: BaseException) -> ImportError:
    return ImportError(
        f"--optimizer names {where}, whose import raised {told(error)}; it has to be imported "
        "without an error, here and on every rank"
    )
