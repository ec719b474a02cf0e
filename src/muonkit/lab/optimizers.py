"""What can train a task: one table. Nearly all share betas and the decoupled decay; SGD does not.

A new optimizer is one entry in ``OPTIMIZERS`` and a default learning rate in each task.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from string import Template
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

import muonkit
from muonkit.lab.errors import LabError, RunError, unknown
from muonkit.lab.rules import in_script

BETAS = (0.9, 0.95)
SLOWER_BETAS = (0.9, 0.99)
#: The unit of every recorded learning rate of a Muon, whatever MuonW's default is.
SCALE = "match_rms_adamw"
#: What becomes of parameters that routing cannot judge, and for which there is no rule.
FALLBACK = "adamw"
WEIGHT_DECAY = 0.1
#: SGD's decay is part of the gradient, so it acts multiplied by the (much larger) learning rate.
SGD_WEIGHT_DECAY = 5e-4


class Given(NamedTuple):
    """What an optimizer is made with, beside the model.

    Attributes:
        lr, decay: the learning rate and the weight decay.
        embedding_lr: the rate of embeddings and head, None for the same: a Muon gives it to all
            that it leaves to AdamW.
        rules: of routing; by these AdamW tells embeddings and head too.
    """

    lr: float
    decay: float
    embedding_lr: float | None = None
    rules: Sequence[muonkit.Rule] = ()


class Facts(NamedTuple):
    """What a script has to know of the model: whether routing cannot judge a parameter of it, and
    whether one is complex.
    """

    is_undecided: bool = False
    has_complex: bool = False


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


def _apart(model: nn.Module, rules: Sequence[muonkit.Rule]) -> list[nn.Parameter]:
    """Embeddings, head, and what else of two or more dimensions Muon leaves to AdamW."""
    routes = muonkit.route(model, rules, undecided=FALLBACK)
    return [r.param for r in routes if r.algorithm == "adamw" and r.param.ndim >= 2]


def _adamw(
    parameters: Iterable[nn.Parameter],
    lr: float,
    decay: float,
    apart: Iterable[nn.Parameter] = (),
    apart_lr: float | None = None,
    betas: tuple[float, float] = BETAS,
) -> torch.optim.AdamW:
    """torch's AdamW with decay on matrices and tables only, and another rate for some of them."""
    every = list(parameters)
    others = {id(p) for p in apart} if apart_lr is not None else set()
    groups: list[dict[str, Any]] = [
        {
            "params": [p for p in every if p.ndim >= 2 and id(p) not in others],
            "weight_decay": decay,
        },
        {"params": [p for p in every if id(p) in others], "weight_decay": decay, "lr": apart_lr},
        {"params": [p for p in every if p.ndim < 2], "weight_decay": 0.0},
    ]
    # The fastest that torch has, here and on GPUs; it has none for complex numbers.
    fused = all(p.is_floating_point() for p in every)
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=lr, betas=betas, fused=fused)


def _make_adamw(betas: tuple[float, float], model: nn.Module, given: Given) -> Optimizer:
    apart = () if given.embedding_lr is None else _apart(model, given.rules)
    return _adamw(model.parameters(), given.lr, given.decay, apart, given.embedding_lr, betas)


def _make_sgd(model: nn.Module, given: Given) -> Optimizer:
    if given.embedding_lr is not None:
        raise LabError("sgd has no rate of its own for embeddings: leave it out of --embedding-lr")
    return torch.optim.SGD(
        model.parameters(), lr=given.lr, momentum=0.9, nesterov=True, weight_decay=given.decay
    )


_MUONW: dict[str, Any] = {"adamw_betas": BETAS, "adjust_lr_fn": SCALE}


# What stands around Muon, each alone: title, and the options of MuonW.
STAGES: dict[str, tuple[str, dict[str, Any]]] = {
    "muonw": ("MuonW", {}),
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


def _share(name: str) -> float:
    return _ADAMW_SHARE if name in RELATIVE else 1.0


def _muonw_options(name: str, given: Given) -> dict[str, Any]:
    """What MuonW is given, beside the model and how it is routed."""
    options: dict[str, Any] = {"lr": given.lr, "weight_decay": given.decay}
    if given.embedding_lr is not None:
        options["adamw_lr"] = given.embedding_lr
    elif name in RELATIVE:
        options["adamw_lr"] = _share(name) * given.lr
    return {**options, **_MUONW, **STAGES[name][1]}


def _make_muonw(name: str, model: nn.Module, given: Given) -> Optimizer:
    routes = muonkit.route(model, given.rules, scale=SCALE, undecided=FALLBACK)
    if not any(route.algorithm == "muon" for route in routes):
        # It would be AdamW under Muon's name.
        raise LabError(
            f"{name} has nothing to train here: the model has no hidden matrix (`muonkit route` "
            "says why), and AdamW trains all of it; leave it out of --optimizers"
        )
    return muonkit.MuonW(routes, **_muonw_options(name, given))


def _torch_parts(
    name: str, model: nn.Module, given: Given
) -> tuple[torch.optim.Optimizer, torch.optim.Optimizer]:
    """torch.optim.Muon for the 2-D hidden matrices, AdamW for all else; LabError without one."""
    chosen = {
        id(route.param)
        for route in muonkit.route(model, given.rules, undecided=FALLBACK)
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
    muon = torch.optim.Muon(hidden, lr=given.lr, weight_decay=given.decay, adjust_lr_fn=SCALE)
    rest_lr = given.lr if given.embedding_lr is None else given.embedding_lr
    return muon, _adamw(rest, rest_lr, given.decay)


def _make_torch_muon(model: nn.Module, given: Given) -> Optimizer:
    return Together(*_torch_parts("torch-muon", model, given))


def _make_torch_muon_fp32(model: nn.Module, given: Given) -> Optimizer:
    return Float32Muon(*_torch_parts("torch-muon-fp32", model, given))


# --- as a script has them: what begins with $ is filled in -------------------------------------

_ADAMW_LINES = """import torch

optimizer = torch.optim.AdamW(
    [
        {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": $decay},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ],
    lr=$lr,
    betas=$betas,
    fused=$fused
)
"""

_ADAMW_APART_LINES = """import torch
from muonkit import $names

# Embeddings, head, and what else of two or more dimensions Muon would leave to AdamW.
apart = [r.param for r in route(model$routed) if r.algorithm == "adamw" and r.param.ndim >= 2]
taken = {id(p) for p in apart}
matrices = [p for p in model.parameters() if p.ndim >= 2 and id(p) not in taken]
optimizer = torch.optim.AdamW(
    [
        {"params": matrices, "weight_decay": $decay},
        {"params": apart, "weight_decay": $decay, "lr": $embedding},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ],
    lr=$lr,
    betas=$betas,
    fused=$fused
)
"""

_SGD_LINES = """import torch

optimizer = torch.optim.SGD(
    model.parameters(), lr=$lr, momentum=0.9, nesterov=True, weight_decay=$decay
)
"""

_IN_FLOAT32 = """# torch.optim.Muon multiplies in bfloat16; what was compared did so in float32.
"""

_TORCH_MUON_LINES = """import torch
from muonkit import $names

hidden = [r.param for r in route(model$routed) if r.algorithm == "muon" and r.param.ndim == 2]
taken = {id(p) for p in hidden}
rest = [p for p in model.parameters() if id(p) not in taken]
optimizers = (  # both of them step
    torch.optim.Muon(hidden, lr=$lr, weight_decay=$decay, adjust_lr_fn="$scale"),
    torch.optim.AdamW(
        [
            {"params": [p for p in rest if p.ndim >= 2], "weight_decay": $decay},
            {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0},
        ],
        lr=$embedding,
        betas=$betas,
        fused=$fused
    ),
)
"""


def _filled(text: str, given: Given, facts: Facts, betas: tuple[float, float] = BETAS) -> str:
    return Template(text).substitute(
        lr=repr(given.lr),
        decay=repr(given.decay),
        embedding=repr(given.lr if given.embedding_lr is None else given.embedding_lr),
        betas=repr(betas),
        scale=SCALE,
        fused="False,  # it has no complex numbers" if facts.has_complex else "True,",
        names="Rule, route" if given.rules else "route",
        routed="".join(f", {each}" for each in _routing(given, facts)),
    )


def _routing(given: Given, facts: Facts) -> list[str]:
    """The arguments by which MuonW and `muonkit.route` route as it was done here."""
    # Without the last one they would refuse such a model.
    undecided = f'undecided="{FALLBACK}"' if facts.is_undecided else ""
    return [each for each in (in_script(given.rules), undecided) if each]


def _adamw_lines(betas: tuple[float, float], given: Given, facts: Facts) -> str:
    text = _ADAMW_LINES if given.embedding_lr is None else _ADAMW_APART_LINES
    return _filled(text, given, facts, betas)


def _muonw_lines(name: str, given: Given, facts: Facts) -> str:
    options = _muonw_options(name, given)
    said = [*_routing(given, facts), *(f"{o}={_quoted(value)}" for o, value in options.items())]
    names = "MuonW, Rule" if given.rules else "MuonW"
    arguments = "".join(f"    {each},\n" for each in ["model", *said])
    return f"from muonkit import {names}\n\noptimizer = MuonW(\n{arguments})\n"


def _quoted(value: object) -> str:
    return f'"{value}"' if isinstance(value, str) else repr(value)


@dataclass(frozen=True)
class OptimizerSpec:
    """One line on what an optimizer is, and how it is made.

    Attributes:
        title: its name in sentences and pictures.
        make: from a model and what is given.
        lines: the same for a script, as text in which the model is called ``model``; they end with
            ``optimizer``, or with ``optimizers``.
        weight_decay: the default, and the centre of its sweep.
        scaled: whether its learning rate is in the unit of `SCALE`.
        has_embedding_lr: whether embeddings and head can have another rate.
        embedding_share: their usual rate is this times lr.
    """

    name: str
    title: str
    summary: str
    make: Callable[[nn.Module, Given], Optimizer]
    lines: Callable[[Given, Facts], str]
    weight_decay: float = WEIGHT_DECAY
    scaled: bool = False
    has_embedding_lr: bool = True
    embedding_share: float = 1.0

    def embedding_rate(self, lr: float, given: float | None = None) -> float:
        """The rate of embeddings and head beside ``lr``; None is the usual one."""
        return self.embedding_share * lr if given is None else given

    def decay(self, given: float | None) -> float:
        """A weight decay; None is the default."""
        return self.weight_decay if given is None else given

    def build(
        self,
        model: nn.Module,
        lr: float,
        weight_decay: float | None = None,
        embedding_lr: float | None = None,
        rules: Sequence[muonkit.Rule] = (),
    ) -> Optimizer:
        """The optimizer for ``model``; a weight decay of None is the default."""
        return self.make(model, Given(lr, self.decay(weight_decay), embedding_lr, rules))


def _staged(name: str) -> OptimizerSpec:
    title, options = STAGES[name]
    said = ", ".join(
        f'{option}="{value}"' if isinstance(value, str) else f"{option}={value}"
        for option, value in options.items()
    )
    unit = (
        f"lr relative to the weight, AdamW's {_ADAMW_SHARE} of it"
        if name in RELATIVE
        else f"scale {SCALE}"
    )
    summary = f"muonkit.MuonW({', '.join(filter(None, ['model', said]))}), {unit}"
    return OptimizerSpec(
        name,
        title,
        summary,
        partial(_make_muonw, name),
        partial(_muonw_lines, name),
        scaled=name not in RELATIVE,
        embedding_share=_share(name),
    )


OPTIMIZERS: dict[str, OptimizerSpec] = {
    spec.name: spec
    for spec in (
        *map(_staged, STAGES),
        OptimizerSpec(
            "adamw",
            "AdamW",
            "torch.optim.AdamW, decay on matrices only",
            partial(_make_adamw, BETAS),
            partial(_adamw_lines, BETAS),
        ),
        OptimizerSpec(
            "adamw-0.99",
            "AdamW with a beta2 of 0.99",
            "the same with a beta2 of 0.99 instead of 0.95",
            partial(_make_adamw, SLOWER_BETAS),
            partial(_adamw_lines, SLOWER_BETAS),
        ),
        OptimizerSpec(
            "sgd",
            "SGD",
            "torch.optim.SGD, Nesterov momentum 0.9",
            _make_sgd,
            partial(_filled, _SGD_LINES),
            SGD_WEIGHT_DECAY,
            has_embedding_lr=False,
        ),
        OptimizerSpec(
            "torch-muon",
            "torch.optim.Muon",
            "torch.optim.Muon for the 2-D hidden matrices, torch.optim.AdamW for the rest; "
            "its bfloat16 products are about 100 times slower than float32 on most CPUs",
            _make_torch_muon,
            partial(_filled, _TORCH_MUON_LINES),
            scaled=True,
        ),
        OptimizerSpec(
            "torch-muon-fp32",
            "torch.optim.Muon in float32",
            "the same, its cast to bfloat16 changed to float32",
            _make_torch_muon_fp32,
            partial(_filled, _IN_FLOAT32 + _TORCH_MUON_LINES),
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
