"""How other Muons name their options and state: one entry of `FORMATS` for each of them.

Every entry was read from the source that it names. The momentum of a format is an average,
M <- lerp(M, G, 1 - mu), or a sum, M <- mu M + G, which is 1 / (1 - mu) times the average: also with
Nesterov's step both point the same way, and orthogonalization takes the length out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from muonkit.groups import MOMENTUM, STEP, VARIANCE
from muonkit.newton_schulz.coefficients import DEFAULT_STEPS, KELLER
from muonkit.views import View

__all__ = ["FORMATS", "Format", "Side"]


@dataclass(frozen=True)
class Side:
    """What a format keeps for the parameters of one algorithm.

    Attributes:
        algorithm: ours: "muon" or "adamw".
        names: our option -> the key of a group that has it, or two keys for a pair.
        state: our key -> the key of a parameter's state.
        step: the key of the state that counts the steps; None where the group counts them.
        whole_steps: the count is an int, else a float32 tensor.
        summed: the momentum is a sum.
        fixed: our options that cannot be said there, and what they always are.
        absent: our options that older state dicts lack, and what they were then.
        neutral: options that are not here, and the value at which they do nothing.
        ignored: keys of a group that do not matter to this algorithm, or to any result.
        marks: what a parameter's state has beside.
    """

    algorithm: str
    names: Mapping[str, str | tuple[str, str]]
    state: Mapping[str, str]
    step: str | None = None
    whole_steps: bool = False
    summed: bool = False
    fixed: Mapping[str, Any] = field(default_factory=dict)
    absent: Mapping[str, Any] = field(default_factory=dict)
    neutral: Mapping[str, Any] = field(default_factory=dict)
    ignored: Sequence[str] = ()
    marks: Mapping[str, Any] = field(default_factory=dict)

    @property
    def after(self) -> tuple[str, ...]:
        return tuple(self.fixed.get("after", ()))


@dataclass(frozen=True)
class Format:
    """One published Muon.

    Attributes:
        sides: by the name that the format has for each.
        side_of: (group, state of a parameter) -> that name.
        view: (group, shape) -> our view of a Muon parameter; raises ValueError for a shape that
            cannot be trained there.
        keys: (side, view, steps taken) -> what a group has beside options, when we write one.
        filled: what it has where none of its parameters says another.
        scales: what the format calls a scale -> our name of it. The first is what is taken for a
            scale that it has not: the learning rate makes up for the difference.
        scale_key: the key of a group that says it.
        scale: (their name, shape) -> the factor on lr, where it is not ours of that name.
        assumed: what a state dict does not tell, and what their step does that ours does not.
        prepare: (side, group) -> the group, where an option is not one key of it.
        layout: the optimizers that a whole model needs there: "two" (Muon and AdamW), "one" with
            groups, "one group" for all, or "none": it is read alone.
        by_size: a Muon group may have been sorted by size, the largest first.
        flat: the momentum of more than two dimensions is kept as a matrix.
    """

    sides: Mapping[str, Side]
    side_of: Callable[[Mapping[str, Any], Mapping[str, Any]], str]
    view: Callable[[Mapping[str, Any], tuple[int, ...]], str]
    keys: Callable[[str, str, int], dict[str, Any]]
    scales: Mapping[Any, str]
    scale_key: str | None = None
    scale: Callable[[Any, tuple[int, ...]], float | None] = lambda name, shape: None
    filled: Mapping[str, Any] = field(default_factory=dict)
    assumed: Sequence[str] = ()
    prepare: Callable[[str, Mapping[str, Any]], Mapping[str, Any]] = lambda side, group: group
    layout: str = "one"
    by_size: bool = False
    flat: bool = False


# --- what several have alike ------------------------------------------------------------------

_ADAM_STATE = {"exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"}
_ADAM_NAMES = {"lr": "lr", "weight_decay": "weight_decay", "betas": "betas", "eps": "eps"}

# Also beside Muons that have no AdamW of their own.
_TORCH_ADAMW = Side(
    "adamw",
    names={**_ADAM_NAMES, "maximize": "maximize"},
    state=_ADAM_STATE,
    step=STEP,
    absent={"maximize": False},
    neutral={"amsgrad": False, "decoupled_weight_decay": True},
    ignored=("foreach", "capturable", "differentiable", "fused"),
)

_NO_GRADIENT = (
    "what a parameter without a gradient does: it takes part in their step with zeros (momentum "
    "and decay go on), and is left alone by ours"
)


def _by_keys(group: Mapping[str, Any], entry: Mapping[str, Any]) -> str:
    return "adamw" if "betas" in group else "muon"


# --- torch.optim.Muon, torch.optim.AdamW ------------------------------------------------------


def _matrix(group: Mapping[str, Any], shape: tuple[int, ...]) -> str:
    if len(shape) != 2:
        raise ValueError(f"Muon trains 2-D parameters alone there, and this one has shape {shape}")
    return "matrix"


_TORCH = Format(
    sides={
        "muon": Side(
            "muon",
            names={
                "lr": "lr",
                "weight_decay": "weight_decay",
                "momentum": "momentum",
                "nesterov": "nesterov",
                "ns_coefficients": "ns_coefficients",
                "ns_steps": "ns_steps",
            },
            state={MOMENTUM: "momentum_buffer"},
            ignored=("eps",),
        ),
        "adamw": _TORCH_ADAMW,
    },
    side_of=_by_keys,
    view=_matrix,
    keys=lambda side, view, steps: {"eps": 1e-7} if side == "muon" else {},
    scales={None: "original", "original": "original", "match_rms_adamw": "match_rms_adamw"},
    scale_key="adjust_lr_fn",
    layout="two",
)


# --- github.com/KellerJordan/Muon, muon.py: all of its classes ---------------------------------


def _keller_side(group: Mapping[str, Any], entry: Mapping[str, Any]) -> str:
    if "use_muon" in group:
        return "muon" if group["use_muon"] else "adamw"
    return "torch's adamw" if "betas" in group else "muon"  # Muon and SingleDeviceMuon alone


def _keller_view(group: Mapping[str, Any], shape: tuple[int, ...]) -> str:
    if len(shape) < 2:
        raise ValueError(f"Muon trains matrices there, and this one has shape {shape}")
    return {2: "matrix", 4: "flatten"}.get(len(shape), "experts")


_KELLER = Format(
    sides={
        "muon": Side(
            "muon",
            names={"lr": "lr", "weight_decay": "weight_decay", "momentum": "momentum"},
            state={MOMENTUM: "momentum_buffer"},
            fixed={"nesterov": True, "ns_coefficients": KELLER, "ns_steps": 5},
            ignored=("use_muon",),
        ),
        "adamw": Side(
            "adamw",
            names=_ADAM_NAMES,
            state=_ADAM_STATE,
            step=STEP,
            whole_steps=True,
            ignored=("use_muon",),
        ),
        "torch's adamw": _TORCH_ADAMW,
    },
    side_of=_keller_side,
    view=_keller_view,
    keys=lambda side, view, steps: {"use_muon": side == "muon"},
    scales={None: "original"},
    # A convolution's update is a matrix by then, and its scale is still that of the last two dims.
    scale=lambda name, shape: max(1.0, shape[-2] / shape[-1]) ** 0.5,
    assumed=(_NO_GRADIENT,),
    by_size=True,
)


# --- github.com/MoonshotAI/Moonlight: examples/toy_train.py -------------------------------------


def _moonlight_side(group: Mapping[str, Any], entry: Mapping[str, Any]) -> str:
    if "use_muon" not in entry:
        return "none"
    return "muon" if entry["use_muon"] else "adamw"


_LATE_EPS = (
    "where AdamW adds its eps: to the root of the second moment before its bias correction there, "
    "after it here; eps is eps / sqrt(1 - beta2^t) for theirs"
)

# Moonlight's class is made from Keller Jordan's first one: one class for both algorithms.
_SUMMED_MUON = Side(
    "muon",
    names={"lr": "lr", "momentum": "momentum", "nesterov": "nesterov", "ns_steps": "ns_steps"},
    state={MOMENTUM: "momentum_buffer"},
    summed=True,
    fixed={"ns_coefficients": KELLER},
    ignored=("adamw_betas", "adamw_eps"),
    marks={"use_muon": True},
)
_BESIDE_IT = Side(
    "adamw",
    names={"lr": "lr", "betas": "adamw_betas", "eps": "adamw_eps"},
    state={"exp_avg": "moment1", "exp_avg_sq": "moment2"},
    step=STEP,
    whole_steps=True,
    ignored=("momentum", "nesterov", "ns_steps"),
    marks={"use_muon": False},
)

_MOONLIGHT = Format(
    sides={
        "muon": replace(_SUMMED_MUON, names={**_SUMMED_MUON.names, "weight_decay": "wd"}),
        "adamw": replace(_BESIDE_IT, names={**_BESIDE_IT.names, "weight_decay": "wd"}),
    },
    side_of=_moonlight_side,
    view=lambda group, shape: "matrix" if len(shape) == 2 else "flatten",
    keys=lambda side, view, steps: {},
    scales={None: "match_rms_adamw"},
    scale=lambda name, shape: 0.2 * math.sqrt(max(shape[:2])),
    assumed=(_LATE_EPS,),
    layout="one group",
    flat=True,
)


# --- github.com/KellerJordan/Muon: muon.py as it was until January 2025 -------------------------


def _adamw_lr(side: str, group: Mapping[str, Any]) -> Mapping[str, Any]:
    if side == "muon" or "adamw_lr_ratio" not in group:
        return group
    rates = ("lr", "initial_lr")
    return {**group, **{k: group[k] * group["adamw_lr_ratio"] for k in rates if k in group}}


_KELLER_2024 = Format(
    sides={
        "muon": replace(
            _SUMMED_MUON,
            fixed={**_SUMMED_MUON.fixed, "weight_decay": 0.0},
            ignored=(*_SUMMED_MUON.ignored, "adamw_lr_ratio", "adamw_wd"),
        ),
        "adamw": replace(
            _BESIDE_IT,
            names={**_BESIDE_IT.names, "weight_decay": "adamw_wd"},
            ignored=(*_BESIDE_IT.ignored, "adamw_lr_ratio"),
        ),
    },
    side_of=_moonlight_side,
    view=_MOONLIGHT.view,
    keys=lambda side, view, steps: {},
    scales={None: "original"},
    assumed=(_LATE_EPS,),
    prepare=_adamw_lr,
    layout="none",
    flat=True,
)


# --- github.com/microsoft/dion: muon.py and normuon.py ----------------------------------------


def _dion_view(group: Mapping[str, Any], shape: tuple[int, ...]) -> str:
    if len(shape) < 2:
        raise ValueError(f"Muon trains matrices there, and this one has shape {shape}")
    if (group.get("num_heads") or 1) > 1:
        return f"split(rows={group['num_heads']})"
    if group.get("split_sizes"):
        return f"split(rows={'+'.join(map(str, group['split_sizes']))})"
    return "matrix" if len(shape) == 2 else "flatten" if group.get("flatten") else "experts"


def _dion_keys(side: str, view: str, steps: int) -> dict[str, Any]:
    keys: dict[str, Any] = {"algorithm": side, "step": steps}
    if side == "adamw":
        return keys
    first, *cuts = View.parse(view).steps
    keys["epsilon"] = 1e-8
    if first != "matrix":  # to which it does not matter: it may share a group with either
        keys["flatten"] = first == "flatten"
    if len(cuts) == 1 and cuts[0].startswith("split(rows="):
        sizes = [int(n) for n in cuts[0].removeprefix("split(rows=").removesuffix(")").split("+")]
        keys |= {"num_heads": sizes[0]} if len(sizes) == 1 else {"split_sizes": tuple(sizes)}
    return keys


_DION_MUON = Side(
    "muon",
    names={
        "lr": "lr",
        "weight_decay": "weight_decay",
        "momentum": "mu",
        "nesterov": "nesterov",
        "cautious": "cautious_wd",
    },
    state={MOMENTUM: "momentum"},
    summed=True,
    # Five steps, as in all of its functions.
    fixed={"ns_coefficients": "polar_express_1.02", "ns_steps": DEFAULT_STEPS},
    absent={"cautious": False},
    ignored=(
        *("algorithm", "beta1", "beta2", "epsilon", "step", "muon_beta2"),
        *("flatten", "num_heads", "split_sizes"),
    ),
)

_DION = Format(
    sides={
        "muon": _DION_MUON,
        "normuon": Side(
            "muon",
            names={**_DION_MUON.names, "stage_beta2": "muon_beta2"},
            state={**_DION_MUON.state, VARIANCE: "variance_neuron"},
            summed=True,
            fixed={**_DION_MUON.fixed, "after": ("normuon",)},
            absent=_DION_MUON.absent,
            ignored=_DION_MUON.ignored,
        ),
        "adamw": Side(
            "adamw",
            names={
                "lr": "lr",
                "weight_decay": "weight_decay",
                "betas": ("beta1", "beta2"),
                "eps": "epsilon",
            },
            state={"exp_avg": "momentum", "exp_avg_sq": "variance"},
            step="step_dev",  # older versions have the group's alone
            neutral={"cautious_wd": False},
            ignored=(
                *("algorithm", "mu", "nesterov", "adjust_lr", "muon_beta2", "step"),
                *("flatten", "num_heads", "split_sizes"),
            ),
        ),
    },
    side_of=lambda group, entry: str(group.get("algorithm")),
    view=_dion_view,
    keys=_dion_keys,
    scales={
        "spectral_norm": "spectral",
        "rms_norm": "match_rms_adamw",
        None: "original",
    },
    scale_key="adjust_lr",
    scale=lambda name, shape: 1.0 if name is None else None,
    filled={"flatten": False},
    assumed=(
        "which polynomials their Newton-Schulz has: its default's, use_polar_express; without it "
        "give ns_coefficients='you'",
    ),
)

FORMATS: dict[str, Format] = {
    "torch": _TORCH,
    "keller": _KELLER,
    "keller_2024": _KELLER_2024,
    "moonlight": _MOONLIGHT,
    "dion": _DION,
}
