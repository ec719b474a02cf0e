"""One parameter's options and state, from a format to ours and back.

A value without a counterpart becomes a note. A value that makes no sense is a ValueError that
speaks of the parameter as "it": the caller puts the name before.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from muonkit._text import unknown
from muonkit.groups import MOMENTUM, STEP, VARIANCE, state_shapes
from muonkit.newton_schulz.coefficients import DEFAULT_STEPS, KELLER, resolve
from muonkit.newton_schulz.orthogonalizer import NS_DTYPES
from muonkit.scale import scale_factor
from muonkit.stages import listed
from muonkit.state import as_numbers
from muonkit.views import blocks_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from muonkit.convert.formats import Format, Side
    from muonkit.views import Block

__all__ = [
    "SCHEDULERS",
    "Read",
    "is_summed",
    "over_average",
    "read_parameter",
    "same",
    "times",
    "written_parameter",
]

# Keys that torch's schedulers leave in a group: learning rates, and values of other options.
_RATES = ("initial_lr", "max_lr", "min_lr", "base_lr")
SCHEDULERS = (*_RATES, "max_momentum", "base_momentum")

# Our options that other formats do not have -> the value at which nothing is lost.
_OUR_NEUTRAL = {
    "maximize": False,
    "cautious": False,
    "before": (),
    "after": (),
    "constraint": (),
    "fraction": 1.0,
    "period": 1,
    "block_lr_factor": 1.0,
    "nonfinite": "propagate",
}
_MOMENTS = {"exp_avg": "AdamW's first moment", "exp_avg_sq": "AdamW's second moment"}


@dataclass(frozen=True)
class Read:
    """One parameter's options and state after the conversion.

    Attributes:
        side: the key of its side in the format's `sides`.
        options: its group's options.
        state: its state; empty where it was never trained.
        schedule: what a scheduler left in its group.
        view: muonkit's view of it; None for AdamW.
        steps: steps taken so far, as far as they are counted.
        notes: what was not carried.
    """

    side: str
    options: dict[str, Any]
    state: dict[str, Any]
    schedule: dict[str, Any]
    view: str | None
    steps: int
    notes: list[str]


def same(one: Any, other: Any) -> bool:
    """Whether two values of an option are the same, tensors and lists of JSON among them."""
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        return float(one) == float(other)
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=1e-9)  # one that went to and fro is rounded
    return bool(one == other)


# --- theirs to ours ---------------------------------------------------------------------------


def read_parameter(
    form: Format, p: Tensor, group: Mapping[str, Any], entry: Mapping[str, Any]
) -> Read:
    """Convert a parameter's options (`group`) and state (`entry`) from the format to muonkit's.

    Raises:
        ValueError: an algorithm that is not here, a shape that cannot be trained there, a key that
            is missing, or a tensor of another shape or kind than the parameter's.
    """
    name = form.side_of(group, entry)
    if name not in form.sides:
        told = unknown("algorithm", name, form.sides)
        raise ValueError(f"it is trained by {name!r} there: {told}")
    side, notes = form.sides[name], list[str]()
    group = form.prepare(name, group)
    options = _read_options(form, side, group, notes)
    view, factor = None, 1.0
    if side.algorithm == "muon":
        shape = tuple(p.shape)
        view = form.view(group, shape)
        theirs = None if form.scale_key is None else group[form.scale_key]
        ours = options["adjust_lr_fn"]
        factor = 1 / _lr_factor(form, theirs, ours, shape, view, view, notes)
        _rescale(options, factor)
    schedule = {key: group[key] for key in SCHEDULERS if key in group}
    schedule |= {key: schedule[key] * factor for key in _RATES if key in schedule}
    state = _read_state(form, side, p, {**options, "view": view}, group, entry, notes)
    if MOMENTUM in state and state[MOMENTUM].dtype != p.dtype:
        options["momentum_dtype"] = str(state[MOMENTUM].dtype).removeprefix("torch.")
    steps = int(state[STEP]) if STEP in state else 0
    return Read(name, options, state, schedule, view, steps, notes)


def _read_options(
    form: Format, side: Side, group: Mapping[str, Any], notes: list[str]
) -> dict[str, Any]:
    options: dict[str, Any] = dict(side.fixed)
    used = {"params", "param_names", "name", *SCHEDULERS, *side.ignored, *side.neutral}
    lacks = []
    for ours, key in side.names.items():
        keys = [key] if isinstance(key, str) else list(key)
        used.update(keys)
        if all(each in group for each in keys):
            values = [group[each] for each in keys]
            options[ours] = values[0] if isinstance(key, str) else tuple(values)
        elif ours in side.absent:
            options[ours] = side.absent[ours]
        else:
            lacks += [each for each in keys if each not in group]
    if side.algorithm == "muon" and form.scale_key is not None:
        used.add(form.scale_key)
        if form.scale_key not in group:
            lacks.append(form.scale_key)
        elif group[form.scale_key] not in form.scales:
            what = f"{form.scale_key} in its group"
            raise ValueError(unknown(what, group[form.scale_key], form.scales))
    if lacks:
        raise ValueError(f"its group lacks {', '.join(lacks)}: it is no group of this format")
    if side.algorithm == "muon":
        options["adjust_lr_fn"] = form.scales[group[form.scale_key] if form.scale_key else None]
    notes += [f"{k}={group[k]!r}" for k, v in side.neutral.items() if not same(group.get(k, v), v)]
    notes += [f"{k}={v!r:.60}" for k, v in group.items() if k not in used]
    for key in ("lr", "weight_decay"):  # never one tensor in two optimizers
        if isinstance(options[key], Tensor):
            options[key] = options[key].detach().clone()
    return options


def _lr_factor(
    form: Format,
    theirs: Any,
    ours: str,
    shape: tuple[int, ...],
    own: str,
    view: str,
    notes: list[str],
) -> float:
    """muonkit's scale of a parameter, in our view of it, over the format's in theirs (`view`): for
    the first block, if blocks differ. Where the views do, that of the root mean squares, which is
    1 / sqrt(max(rows, cols)) of an orthogonal block.
    """
    given, named = form.scale(theirs, shape), form.scales[theirs]
    here, there = blocks_of(own, shape), blocks_of(view, shape)
    if given is None and named == ours and here == there:
        return 1.0

    def their_scale(block: Block) -> float:
        return scale_factor(named, block.rows, block.cols) if given is None else given

    if here != there:
        (one, *_), (other, *_) = here, there
        wider = math.sqrt(max(other.rows, other.cols) / max(one.rows, one.cols))
        return scale_factor(ours, one.rows, one.cols) / their_scale(other) * wider
    factors = [scale_factor(ours, b.rows, b.cols) / their_scale(b) for b in here]
    if max(factors) - min(factors) > 1e-9 * max(factors):
        notes.append(f"the scale of its blocks, which is {theirs!r} there and {ours!r} here")
    return 1.0 if abs(factors[0] - 1) < 1e-9 else factors[0]


def _rescale(options: dict[str, Any], factor: float) -> None:
    """Multiply the learning rate, and leave the decay of a step as it is."""
    if factor != 1.0:
        options["lr"] = options["lr"] * factor
        options["weight_decay"] = options["weight_decay"] / factor


def _read_state(
    form: Format,
    side: Side,
    p: Tensor,
    ours: Mapping[str, Any],
    group: Mapping[str, Any],
    entry: Mapping[str, Any],
    notes: list[str],
) -> dict[str, Any]:
    known = {*side.state.values(), side.step, *side.marks}
    notes += [f"the state's {key!r}" for key in entry if key not in known]
    if not any(key in entry for key in side.state.values()):
        if p.requires_grad:
            notes.append("a state: it had none, and begins at zero")
        return {}
    counted = side.algorithm == "adamw" or VARIANCE in side.state
    count = entry.get(side.step or "", group.get("step")) if counted else None
    lacks = [key for key in side.state.values() if key not in entry]
    if counted and count is None:
        lacks.append(side.step or "step")
    if lacks:
        raise ValueError(
            f"its state has {', '.join(map(str, entry))}, and lacks {', '.join(lacks)}"
        )
    shapes = state_shapes(
        p,
        {
            **ours,
            "algorithm": side.algorithm,
            "before": (),
            "after": listed(side.after),
            "constraint": (),
        },
    )
    state: dict[str, Any] = {}
    for key, theirs in side.state.items():
        value = _fitting(theirs, entry[theirs], shapes[key])
        state[key] = value.detach().clone()
        if key == MOMENTUM and side.summed:
            state[key] = times(value, 1 / over_average(ours))
        if key in _MOMENTS and value.dtype != p.dtype:
            notes.append(f"the dtype of {_MOMENTS[key]}: {value.dtype} there, {p.dtype} here")
        if key == MOMENTUM and str(value.dtype).removeprefix("torch.") not in NS_DTYPES:
            raise ValueError(f"its {theirs} is {value.dtype}; it is kept in {', '.join(NS_DTYPES)}")
    if counted:
        state[STEP] = torch.as_tensor(count, dtype=torch.float32).detach().clone()
    return state


def _fitting(key: str, value: Any, shape: tuple[int, ...]) -> Tensor:
    """A tensor in the shape in which it is kept here; a convolution's may be a matrix there."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        what = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"its {key} is {what}, and a floating-point tensor is wanted")
    if tuple(value.shape) == shape:
        return value
    whole = torch.Size(shape).numel()
    if value.ndim == 2 < len(shape) and value.shape[0] == shape[0] and value.numel() == whole:
        return value.reshape(shape)
    raise ValueError(f"its {key} has shape {tuple(value.shape)}, and {shape} is wanted")


def times(tensor: Tensor, factor: float) -> Tensor:
    """The product, in a dtype that holds it on the way, as it is kept."""
    wide = torch.promote_types(tensor.dtype, torch.float32)
    return (tensor.detach().to(wide) * factor).to(tensor.dtype)


# --- ours to theirs ---------------------------------------------------------------------------


def written_parameter(
    form: Format, p: Tensor, group: Mapping[str, Any], entry: Mapping[str, Any]
) -> Read:
    """Convert a parameter's options and state from muonkit's to the format.

    Raises:
        ValueError: a shape that cannot be trained there, a state that lies on several ranks.
    """
    notes: list[str] = []
    name = _side_for(form, group)
    side = form.sides[name]
    steps = int(entry[STEP]) if STEP in entry else 0
    keys, factor, view = form.keys(name, group.get("view", ""), steps), 1.0, None
    values = dict(group)
    if side.algorithm == "muon":
        shape, own = tuple(p.shape), group["view"]
        view = form.view(keys, shape)
        scale = group["adjust_lr_fn"] or "original"
        theirs = _their_scale(form, scale, shape)
        factor = _lr_factor(form, theirs, scale, shape, own, view, notes)
        if blocks_of(view, shape) != blocks_of(own, shape):
            what = "(the learning rate keeps an update's root mean square)"
            notes.append(f"the view {own!r}, which is {view!r} there {what}")
        _rescale(values, factor)
        if form.scale_key is not None:
            keys[form.scale_key] = theirs
    schedule = {key: group[key] for key in SCHEDULERS if key in group}
    schedule |= {key: schedule[key] * factor for key in _RATES if key in schedule}
    options = _written_options(side, values, notes)
    state = _written_state(form, side, p, group, entry, notes)
    return Read(name, {**keys, **options}, state, schedule, view, steps, notes)


def _side_for(form: Format, group: Mapping[str, Any]) -> str:
    """The format's side for a group of ours, with its stages if there are any."""
    fits = [key for key, side in form.sides.items() if side.algorithm == group["algorithm"]]
    after = listed(group.get("after"))
    return next((key for key in fits if form.sides[key].after == after), fits[0])


def _their_scale(form: Format, ours: str, shape: tuple[int, ...]) -> Any:
    """The name that is ours without a factor, else one that is ours with one, else the first."""
    named = [theirs for theirs, name in form.scales.items() if name == ours]
    exact = [theirs for theirs in named if form.scale(theirs, shape) is None]
    return next(iter([*exact, *named, *form.scales]))


def _written_options(side: Side, group: Mapping[str, Any], notes: list[str]) -> dict[str, Any]:
    options: dict[str, Any] = {}
    values = dict(group)
    if values.get("ns_coefficients") is not None and "ns_coefficients" in side.names:
        triples = resolve(values["ns_coefficients"], values["ns_steps"])
        one = len(set(triples.triples)) == 1 and triples.margin == 1 and not triples.exact
        if not one:
            notes.append(
                f"ns_coefficients={values['ns_coefficients']!r:.60}: Keller Jordan's there"
            )
        values["ns_coefficients"] = triples.triples[0] if one else KELLER
        values["ns_steps"] = len(triples.triples) if one else DEFAULT_STEPS
    for ours, key in side.names.items():
        value = values[ours]
        if ours == "stage_beta2" and value is None:
            value = 0.95  # its own default, which is the format's too
        if isinstance(value, Tensor):
            value = value.detach().clone()
        options |= {key: value} if isinstance(key, str) else dict(zip(key, value, strict=True))
    for ours, always in side.fixed.items():
        if ours in group and not _as_fixed(ours, group, side):
            notes.append(f"{ours}={group[ours]!r:.60}: always {always!r:.60} there")
    said = {*side.names, *side.fixed}
    notes += [
        f"{key}={group[key]!r}"
        for key, neutral in _OUR_NEUTRAL.items()
        if key in group and key not in said and not same(group[key], neutral)
    ]
    return options


def _as_fixed(ours: str, group: Mapping[str, Any], side: Side) -> bool:
    if ours not in ("ns_coefficients", "ns_steps"):
        return same(group[ours], side.fixed[ours])
    # Compared as the iterations that they stand for, whatever they are called.
    here = resolve(group["ns_coefficients"], group["ns_steps"])
    steps = side.fixed.get("ns_steps", group["ns_steps"])
    return here == resolve(side.fixed["ns_coefficients"], steps)


def _written_state(
    form: Format,
    side: Side,
    p: Tensor,
    group: Mapping[str, Any],
    entry: Mapping[str, Any],
    notes: list[str],
) -> dict[str, Any]:
    state: dict[str, Any] = {}
    for key, theirs in side.state.items():
        if key not in entry:
            continue
        value: Tensor = entry[key].detach()
        if type(value) is not type(p.detach()) and hasattr(value, "placements"):
            raise ValueError(
                "its state lies on several ranks: call optimizer.consolidate_state_dict() on all "
                "of them first, and convert on rank 0"
            )
        if value.dtype == torch.int8:
            value = as_numbers(entry)
        if key == MOMENTUM and side.summed != is_summed(group):
            factor = over_average(group) if side.summed else 1 / over_average(group)
            value = times(value.to(torch.promote_types(value.dtype, p.dtype)), factor)
        if key == MOMENTUM and form.flat and value.ndim > 2:
            value = value.flatten(1)
        state[theirs] = value.to(p.dtype, copy=True) if key == MOMENTUM else value.clone()
    if state and side.step is not None:
        count = float(entry[STEP])
        whole = int(count)
        state[side.step] = whole if side.whole_steps else torch.tensor(count, dtype=torch.float32)
    notes += [
        f"the state's {key!r}" for key in (VARIANCE,) if key in entry and key not in side.state
    ]
    return {**side.marks, **state}


def is_summed(group: Mapping[str, Any]) -> bool:
    """Whether the momentum of a group of ours is a sum: where a step takes a fraction of it."""
    return bool(group["fraction"] < 1)


def over_average(group: Mapping[str, Any]) -> float:
    """How many times a running average its sum is."""
    return float(1 / (1 - group["momentum"]))
