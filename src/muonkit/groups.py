"""Param groups: completed with defaults, named; `validate` has what they may say."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from muonkit._text import shown, unknown
from muonkit.int8 import block_extents, scale_shape
from muonkit.newton_schulz.coefficients import Schedule
from muonkit.newton_schulz.orthogonalizer import NS_DTYPES
from muonkit.options import (
    ADAMW,
    DEFAULTS,
    FILLS,
    MUON,
    OF_ALGORITHM,
    OTHER_NAMES,
    spelled,
    take_other_names_,
)
from muonkit.scale import ADAMW_UNITS, SCALES, scale_factor
from muonkit.stages import STAGES, kept_shape, kept_state, listed, sets_the_size
from muonkit.views import View

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from muonkit.stages import Stage

__all__ = [
    "ALGORITHMS",
    "MOMENTUM",
    "NS_OPTIONS",
    "SCALE",
    "STEP",
    "VARIANCE",
    "adopt_momentum",
    "adopt_other_names",
    "beta2_of",
    "check_names",
    "complete_group",
    "computed_dtype",
    "drop_foreign_keys",
    "is_trained",
    "keeps_int8",
    "momentum_dtype",
    "name_of",
    "own_names",
    "parameter_names",
    "refuse_eps",
    "refuse_half_named",
    "refuse_held",
    "scale_of",
    "scaled_block",
    "separate_lr",
    "spell_",
    "stage_names",
    "state_shapes",
    "unused_name",
    "update_dtype",
    "warn_of_eps",
]

# The options that `orthogonalize` takes from a group, in the order of its arguments.
NS_OPTIONS = ("ns_coefficients", "ns_steps", "ns_form", "ns_dtype")

# The keys of the state; AdamW's are torch's.
MOMENTUM, VARIANCE, STEP = "momentum_buffer", "second_momentum_buffer", "step"
SCALE = "momentum_scale"  # of a momentum in int8

_KEPT_IN = {**NS_DTYPES, "int8": torch.int8}

# torch.optim.Muon's default, kept for its signature.
EPS = DEFAULTS["eps"]

ALGORITHMS = ("muon", "adamw")

# Keys that `Optimizer.add_param_group` fills into every group, but that groups of this algorithm
# do not have.
_FOREIGN_KEYS = {"muon": tuple(FILLS.values()), "adamw": (*FILLS.values(), *MUON)}
# Keys that no group of this algorithm may have: nobody would read them.
_UNREAD_KEYS = {
    "muon": (*_FOREIGN_KEYS["muon"], *ADAMW),
    "adamw": (*_FOREIGN_KEYS["adamw"], "view"),
}
_DTYPE_KEYS = ("ns_dtype", "momentum_dtype", "exchange_dtype")


def complete_group(group: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """A copy of the group with its algorithm, view and AdamW's own defaults filled in.

    Muon's defaults are left to `Optimizer.add_param_group`.

    Raises:
        ValueError: unknown or contradictory algorithm; an AdamW group whose lr would be Muon's in
            units that mean nothing to it.
        TypeError: not a dict with parameters.
    """
    if not isinstance(group, dict) or "params" not in group:
        raise TypeError(f"a param group is a dict with 'params', got {group!r:.80}")
    group = {**group, "params": _listed(group["params"])}
    if "use_muon" in group:  # Keller Jordan's spelling
        said = "muon" if group["use_muon"] else "adamw"
        if group.setdefault("algorithm", said) != said:
            raise ValueError(
                f"a group says use_muon={group['use_muon']} and algorithm={group['algorithm']!r}; "
                "give one of them"
            )
    if not group.pop("decay", True):  # routing's spelling
        decay = group.setdefault("weight_decay", 0.0)
        if isinstance(decay, Tensor) or decay != 0:
            raise ValueError(f"a group says decay=False and weight_decay={decay}; give one of them")
    algorithm = group.setdefault("algorithm", "muon")
    if algorithm not in ALGORITHMS:
        raise ValueError(unknown("algorithm", algorithm, ALGORITHMS))
    _refuse_unread(group)
    if algorithm == "muon":
        warn_of_eps(group)
        group["view"] = str(View.parse(group.get("view", "matrix")))
        spell_(group)
        return group
    no_lr = "lr" not in group and defaults["adamw_lr"] is None
    if no_lr and defaults["adjust_lr_fn"] not in ADAMW_UNITS:
        units = " or ".join(repr(name) for name in SCALES if name in ADAMW_UNITS)
        raise ValueError(
            "an AdamW group has no lr of its own, and Muon's is in other units unless "
            f"adjust_lr_fn is {units}; add 'lr' to the group or give adamw_lr"
        )
    if no_lr and sets_the_size(defaults):
        raise ValueError(
            "an AdamW group has no lr of its own, and Muon's is the size of an update relative to "
            f"its weight with constraint={spelled(defaults['constraint'])}; add 'lr' to the group "
            "or give adamw_lr"
        )
    for key, name in FILLS.items():
        if defaults[name] is not None:
            group.setdefault(key, defaults[name])
    return group


def _refuse_unread(group: dict[str, Any]) -> None:
    """Refuse options of the other algorithm, which would be dropped.

    Raises:
        ValueError: there is one.
    """
    algorithm = group["algorithm"]
    unread = [key for key in _UNREAD_KEYS[algorithm] if key in group]
    if unread:
        other = "adamw" if algorithm == "muon" else "muon"
        has = ", ".join(key for key in OF_ALGORITHM[algorithm] if key != "eps" or other == "muon")
        raise ValueError(
            f"a group of {algorithm} got {', '.join(map(repr, unread))}, which it does not read: "
            f"it has {has}; take it out, or say 'algorithm': {other!r}"
        )


def spell_(options: dict[str, Any]) -> None:
    """What JSON, checkpoints and torch.compile can hold: `torch.float32` as "float32", a
    `Schedule` as its numbers, stages in a tuple; every option under its own name.

    Raises:
        ValueError: an option is there under two names.
    """
    take_other_names_(options)
    for key in STAGES:
        if key in options:
            options[key] = listed(options[key])
    for key in _DTYPE_KEYS:
        if key in options:
            options[key] = str(options[key]).removeprefix("torch.")
    if isinstance(schedule := options.get("ns_coefficients"), Schedule):
        options["ns_coefficients"] = schedule.spelled()


def refuse_half_named(group: dict[str, Any], groups: Sequence[Mapping[str, Any]]) -> None:
    """Refuse a group that names some of its parameters, or that has names where the others have
    none, or none where they have.

    Raises:
        ValueError: as `Optimizer.add_param_group`, with its first words.
    """
    if not group["params"]:
        return
    named = [isinstance(item, tuple) for item in group["params"]]
    remedy = (
        "give all groups their parameters as (name, parameter), as model.named_parameters() has "
        "them, or none"
    )
    if any(named) and not all(named):
        raise ValueError(
            "all optimizer params should be with/without names: a param group has names for "
            f"{sum(named)} of its {len(named)} parameters; {remedy}"
        )
    has = all(named) or "param_names" in group
    if groups and has != ("param_names" in groups[0]):
        ours = "names" if has else "no names"
        theirs = "none" if has else "some"
        raise ValueError(
            "all optimizer param groups should be with/without names: a param group has "
            f"{ours}, and the optimizer's others have {theirs}; {remedy}"
        )


def warn_of_eps(options: dict[str, Any]) -> None:
    """Warn of an eps for Muon, which has no effect."""
    eps = options.get("eps", EPS)
    if isinstance(eps, int | float) and eps >= 0 and eps != EPS:  # others are refused
        warnings.warn(
            f"eps={options['eps']} has no effect on Muon, whose update does not depend on the "
            "gradient's scale; AdamW's is adamw_eps, or eps in its groups",
            UserWarning,
            stacklevel=4,
        )


def _listed(params: Any) -> list[Any]:
    if isinstance(params, set):
        raise TypeError(
            "parameters need an order that is the same every time: give a list, not a set"
        )
    return [params] if isinstance(params, Tensor) else list(params)


def drop_foreign_keys(group: dict[str, Any]) -> None:
    """Take out what `Optimizer.add_param_group` filled in for the other algorithm."""
    for key in _FOREIGN_KEYS[group["algorithm"]]:
        group.pop(key, None)


def refuse_held(group: Any, groups: list[dict[str, Any]]) -> None:
    """Refuse a group with a parameter that another group has: a layer that was frozen, for one.

    Raises:
        ValueError: there is one.
    """
    given = group.get("params", ()) if isinstance(group, dict) else ()
    items = (
        [given] if isinstance(given, Tensor) else given if isinstance(given, list | tuple) else ()
    )
    added = {id(item[1] if isinstance(item, tuple) else item) for item in items}
    for other in groups:
        for name, p in zip(parameter_names(other), other["params"], strict=True):
            if id(p) in added:
                raise ValueError(
                    f"some parameters appear in more than one parameter group: {name} is in "
                    f"{other['name']!r} already, which trains it as soon as it has a gradient, "
                    "also where it was frozen until now; nothing need be added"
                )


def separate_lr(groups: list[dict[str, Any]], others: list[dict[str, Any]] | None = None) -> None:
    """Give every group its own copy of a tensor lr.

    Schedulers fill a tensor lr group by group: shared between groups, it would be scaled once for
    each, or be the last group's.
    """
    for number, group in enumerate(groups):
        rest = [*groups[:number], *groups[number + 1 :], *(others or ())]
        if isinstance(group["lr"], Tensor) and any(group["lr"] is g["lr"] for g in rest):
            group["lr"] = group["lr"].clone()


def unused_name(group: dict[str, Any], others: list[dict[str, Any]]) -> str:
    """A name for the group that none of the others has: what a framework's learning-rate monitor
    shows, and wants to be unique. Its own, if it has one.

    Raises:
        TypeError: the name that the group has is no string.
    """
    taken = {other["name"] for other in others}
    name = group.get("name")
    if name is None:
        name = group["algorithm"]
        if name == "muon" and group["view"] != "matrix":
            name += f" {group['view']}"
        decay = group["weight_decay"]
        if name == "adamw" and not isinstance(decay, Tensor) and decay == 0:
            name += " no decay"
    elif not isinstance(name, str):
        raise TypeError(f"a param group's name is a string, got {name!r:.80}")
    numbered = (name, *(f"{name} {number}" for number in range(2, len(others) + 3)))
    return next(each for each in numbered if each not in taken)


def adopt_other_names(groups: list[dict[str, Any]]) -> None:
    """Take an option that was set in a group under its other name for the option itself."""
    for group in groups:
        if group["algorithm"] == "muon" and any(other in group for other in OTHER_NAMES):
            for other, name in OTHER_NAMES.items():
                if other in group:
                    group.pop(name, None)
            spell_(group)


def stage_names(group: Mapping[str, Any]) -> dict[str, str]:
    """What a group's three options for stages say, in words: "normuon", "normuon, muon_plus"."""
    return {key: ", ".join(map(spelled, listed(group[key]))) or "none" for key in STAGES}


def adopt_momentum(groups: list[dict[str, Any]]) -> None:
    """OneCycleLR and CyclicLR cycle the momentum of every group of an optimizer that has one: for
    AdamW's that is beta1, as these schedulers have it for torch's AdamW.
    """
    for group in groups:
        betas = group.get("betas")
        if (
            group["algorithm"] == "adamw"
            and "momentum" in group
            and isinstance(betas, tuple | list)
        ):
            group["betas"] = (group.pop("momentum"), *betas[1:])


def refuse_eps(eps: Any) -> None:
    """Refuse an eps given to `MuonW`, which was meant for AdamW.

    Raises:
        TypeError: it is another one than torch.optim.Muon's default.
    """
    if isinstance(eps, int | float) and eps >= 0 and eps != EPS:  # others are refused as such
        raise TypeError(
            f"MuonW got eps={eps!r}, which has no effect on Muon; AdamW's is called adamw_eps"
        )


def beta2_of(group: Mapping[str, Any], stage: Stage) -> float:
    """The weight of the past in what a stage averages."""
    given: float | None = group["stage_beta2"]
    return given if given is not None else (stage.beta2 or 0.0)


def scale_of(group: Mapping[str, Any], rows: int, cols: int) -> float:
    """The factor on lr for one matrix; 1 where a constraint says how large an update is."""
    if sets_the_size(group):
        return 1.0
    return scale_factor(group["adjust_lr_fn"], rows, cols)


def state_shapes(p: Tensor, group: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """The tensors that are kept for a parameter, beside the count of its steps: their logical
    shapes.
    """
    shape = tuple(p.shape)
    if group["algorithm"] == "adamw":
        return {"exp_avg": shape, "exp_avg_sq": shape}
    shapes, kept = {MOMENTUM: shape}, kept_state(group)
    if keeps_int8(group):
        shapes[SCALE] = scale_shape(group["view"], shape)
    if kept != "none":
        shapes[VARIANCE] = kept_shape(kept, group["view"], shape)
    return shapes


def is_trained(p: Tensor) -> bool:
    """Whether a step may change the parameter: then it has a layout and state."""
    return p.requires_grad or p.grad is not None


def keeps_int8(group: Mapping[str, Any]) -> bool:
    """Whether the group's momenta are kept in int8, with scales."""
    # (A group of AdamW's has none; one that was read from elsewhere may not say.)
    return group.get("momentum_dtype") == "int8"


def momentum_dtype(group: Mapping[str, Any], p: Tensor) -> torch.dtype:
    """The dtype that the momentum of this parameter is kept in."""
    return _KEPT_IN.get(group["momentum_dtype"], p.dtype)


def scaled_block(p: Tensor, group: Mapping[str, Any]) -> tuple[int, ...] | None:
    """The extents of the blocks of this parameter's momentum, where it is kept in int8."""
    if not keeps_int8(group):
        return None
    return block_extents(p.shape, scale_shape(group["view"], p.shape))


def computed_dtype(grad: torch.dtype, momentum: torch.dtype) -> torch.dtype:
    """The dtype that the momentum is computed in: float16 has not the range for it."""
    dtype = torch.promote_types(grad, momentum)
    return torch.float32 if dtype == torch.float16 else dtype


def update_dtype(computed: torch.dtype, param: torch.dtype) -> torch.dtype:
    """The dtype that an update is orthogonalized in: the one that its momentum was computed in, but
    no wider than float32 where the parameter is not wider either.
    """
    most = torch.promote_types(param, torch.float32)
    return most if computed.itemsize > most.itemsize else computed


def parameter_names(group: Mapping[str, Any]) -> list[str]:
    """A name for every parameter of the group, to be shown: see `muonkit._text`.

    Raises:
        ValueError: as `own_names`.
    """
    return [shown(name) for name in own_names(group)]


def name_of(p: Tensor, group: Mapping[str, Any]) -> str:
    """The name of one of a group's parameters, to be shown."""
    names = zip(parameter_names(group), group["params"], strict=True)
    return next(name for name, q in names if p is q)


def own_names(group: Mapping[str, Any]) -> list[str]:
    """A name for every parameter of the group, as it is.

    Raises:
        ValueError: parameters were taken out of the group, or put in, and their names were not.
    """
    check_names(group)
    names = group.get("param_names")
    return list(names) if names else [f"parameter {i}" for i in range(len(group["params"]))]


def check_names(group: Mapping[str, Any]) -> None:
    """Raises:
    ValueError: as `own_names`.
    """
    names, count = group.get("param_names"), len(group["params"])
    if names and len(names) != count:
        raise ValueError(
            f"a param group has {count} parameters and {len(names)} names: change its 'params' and "
            "'param_names' (and the optimizer's state) together, or leave them and set the "
            "parameter's requires_grad_(False) and grad = None"
        )
