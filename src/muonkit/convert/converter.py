"""The conversion itself, parameter by parameter; `muonkit.convert` has the overview."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from muonkit._text import unknown
from muonkit.convert.formats import FORMATS, Format
from muonkit.convert.match import Parameter, named_of, positions_of, read_all, refuse
from muonkit.convert.values import is_summed, over_average, same, times, written_parameter
from muonkit.groups import MOMENTUM, parameter_names
from muonkit.optim import Muon
from muonkit.options import OF_ALGORITHM, STRUCTURE, take_other_names_, unspelled
from muonkit.views import blocks_of

__all__ = ["FORMATS", "Exported", "Imported", "from_muonkit", "joined", "to_muonkit"]

Source: TypeAlias = Optimizer | Mapping[str, Any]

# What comes from the states, group by group.
_THEIRS = (
    *("lr", "weight_decay", "eps", "adjust_lr_fn"),
    *("adamw_lr", "adamw_betas", "adamw_eps", "adamw_wd"),
)


@dataclass(frozen=True)
class Imported:
    """What `to_muonkit` returns; printed, it is the list of what was not carried.

    Attributes:
        optimizer: ours, with state and hyperparameters.
        not_carried: one line each, with the parameters that it is about.
    """

    optimizer: Muon
    not_carried: tuple[str, ...]

    def __str__(self) -> str:
        return _shown(self.not_carried)


@dataclass(frozen=True)
class Exported:
    """What `from_muonkit` returns; printed, it is the list of what was not carried.

    Attributes:
        param_groups: for each optimizer of the other kind, the groups to make it with.
        state_dicts: for each of these optimizers, the state dict to load then.
        not_carried: one line each, with the parameters that it is about.
    """

    param_groups: tuple[list[dict[str, Any]], ...]
    state_dicts: tuple[dict[str, Any], ...]
    not_carried: tuple[str, ...]

    def __str__(self) -> str:
        return _shown(self.not_carried)


def to_muonkit(
    source: str,
    states: Source | Sequence[Source],
    model: nn.Module | Mapping[str, Tensor] | Iterable[tuple[str, Tensor]],
    params: Iterable[Any] | None = None,
    *,
    optimizer: Muon | None = None,
    hyperparameters: bool = True,
    **options: Any,
) -> Imported:
    """An optimizer of ours that goes on where those of another library were.

    Args:
        source: a key of `FORMATS`.
        states: their state dict, or the optimizer itself; where several train the model (torch's
            two) a list of them. Those that each rank of Keller Jordan's `Muon` saved are one: see
            `joined`.
        model: the model, or its named parameters.
        params: what their optimizer was made with, for each of several: parameters, pairs of name
            and parameter, names, or param groups; in that order. State dicts hold positions. Not
            needed where optimizers are given, or the state dicts have names.
        optimizer: one of ours that takes the state, made as you like (`MuonW(model)`). None makes
            a `Muon` with their groups, in their order. A scheduler on it goes on where it is made
            with theirs' `last_epoch - 1` for its own: `LambdaLR(ours, f, theirs.last_epoch - 1)`.
            A group is split where its parameters need different views or learning rates here
            (where their scale of a shape is not ours, the learning rate makes up for it).
        hyperparameters: take these over into `optimizer` too; False leaves those that it has.
        **options: other arguments of `Muon` for the one that is made: process_group, zero,
            ns_dtype, ... and ns_coefficients, where theirs are not those that their class has by
            default.

    Raises:
        ValueError: a parameter of the model that theirs do not have, or one that the model has not;
            keys, shapes or dtypes that are not this format's; another algorithm than `optimizer`
            trains a parameter by. All that is wrong is listed; nothing is loaded.
        TypeError: arguments that do not go together.
    """
    form = _format(source)
    if optimizer is not None and options:
        raise TypeError(f"got an optimizer, and {', '.join(options)} beside it: set them in it")
    given = [key for key in options if key in _THEIRS or key in STRUCTURE]
    if given:
        raise TypeError(
            f"{', '.join(given)} come from the states, group by group: change "
            "optimizer.param_groups afterwards"
        )
    named = named_of(model)
    found = read_all(form, positions_of(states, params, named), named)
    notes = [(note, each.name) for each in found for note in each.read.notes]
    if optimizer is None:
        hyperparameters = False  # they are in the groups
        optimizer = _made(_split(found), options)
    else:
        notes += _refuse_structure(optimizer, found)
    optimizer.load_state_dict(_filled(optimizer, found, hyperparameters))
    assumed = [text for text in form.assumed if not any(f"{key}=" in text for key in options)]
    return Imported(optimizer, (*assumed, *_grouped(notes)))


def from_muonkit(
    target: str, optimizer: Muon, theirs: Optimizer | Sequence[Optimizer] | None = None
) -> Exported:
    """Our state and hyperparameters as another library's optimizers load them.

    Args:
        target: a key of `FORMATS`. "torch" gives two optimizers, Muon first, and any other one;
            Moonlight's takes the matrices first, in the order of `param_groups[0][0]["params"]`.
        optimizer: ours; where its state lies on several ranks, after `consolidate_state_dict()`.
        theirs: their optimizers, made already: the state dicts are then in the order of their
            groups. None makes groups as ours are.

    Raises:
        ValueError: a parameter that they cannot train, or that one side has not; parameters of one
            group of theirs with different learning rates here.
    """
    form = _format(target)
    if form.layout == "none":
        raise ValueError(f"{target!r} is read alone: its authors have replaced it")
    saved = optimizer.state_dict()
    found: list[Parameter] = []
    problems: list[str] = []
    groups = zip(optimizer.param_groups, saved["param_groups"], strict=True)
    for place, (group, kept) in enumerate(groups):
        names, own = parameter_names(group), unspelled(kept, group)
        for name, p, key in zip(names, group["params"], kept["params"], strict=True):
            try:
                read = written_parameter(form, p, own, saved["state"].get(key) or {})
            except ValueError as error:
                problems.append(f"{name}: {error}")
                continue
            found.append(Parameter(name, p, group["algorithm"], read, place))
    refuse(problems, f"cannot be converted to {target!r}")
    optimizers = [] if theirs is None else [theirs] if isinstance(theirs, Optimizer) else [*theirs]
    layout = _own_layout(form, found) if theirs is None else _layout_of(form, optimizers, found)
    notes = [(note, each.name) for each in found for note in each.read.notes]
    made, dicts = [], []
    # What does not matter to a result stays as it is in their groups: fused, foreach.
    ignored = [key for side in form.sides.values() for key in side.ignored]
    for number, part in enumerate(layout):
        merged = [{**form.filled, **_merged(members, notes)} for members in part]
        if theirs is not None:
            kept = [
                {key: group[key] for key in ignored if key in group}
                for group in optimizers[number].param_groups
            ]
            merged = [{**own, **options} for own, options in zip(kept, merged, strict=True)]
        dicts.append(_their_state(part, merged))
        pairs = zip(merged, part, strict=True)
        made.append([{**options, "params": [e.param for e in each]} for options, each in pairs])
    return Exported(tuple(made), tuple(dicts), tuple(_grouped(notes)))


def joined(states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One state dict of those that the ranks saved, where each has the state of its own matrices,
    as in Keller Jordan's `Muon` and `MuonWithAuxAdam`.

    Raises:
        ValueError: they have different groups.
    """
    groups = [[list(group["params"]) for group in saved["param_groups"]] for saved in states]
    if not groups or any(each != groups[0] for each in groups):
        raise ValueError("these are no state dicts of the ranks of one optimizer: other groups")
    state: dict[Any, Any] = {}
    for saved in states:
        state.update({key: entry for key, entry in saved["state"].items() if entry})
    return {**states[0], "state": state}


def _format(name: str) -> Format:
    if name not in FORMATS:
        raise ValueError(unknown("format", name, FORMATS))
    return FORMATS[name]


# --- ours -------------------------------------------------------------------------------------


def _split(found: Sequence[Parameter]) -> list[list[Parameter]]:
    """Parameters that share a group on the other side, group by group."""
    groups: list[list[Parameter]] = []
    for each in found:
        near = (group for group in groups if group[0].place == each.place)
        home = next((group for group in near if _alike(group[0], each)), None)
        groups.append([each]) if home is None else home.append(each)
    return groups


def _alike(one: Parameter, other: Parameter) -> bool:
    mine, yours = one.read.options, other.read.options
    return (
        (one.read.side, one.read.view) == (other.read.side, other.read.view)
        and mine.keys() == yours.keys()
        and all(key == "step" or same(value, yours[key]) for key, value in mine.items())
    )


def _made(groups: Sequence[Sequence[Parameter]], options: Mapping[str, Any]) -> Muon:
    """An optimizer of ours with these groups; `options` are the caller's."""
    made = []
    options = dict(options)
    take_other_names_(options)
    for members in groups:
        first = members[0]
        group: dict[str, Any] = {
            "params": [(each.name, each.param) for each in members],
            "algorithm": first.algorithm,
            **first.read.options,
            **first.read.schedule,
        }
        if first.read.view is not None:
            group["view"] = first.read.view
        own = OF_ALGORITHM[first.algorithm]
        made.append({**group, **{key: options[key] for key in options if key in own}})
    others = {key: options[key] for key in options if key not in OF_ALGORITHM["muon"]}
    return Muon(made, **others)


def _refuse_structure(optimizer: Muon, found: Sequence[Parameter]) -> list[tuple[str, str]]:
    """Notes of the views that differ.

    Raises:
        ValueError: the optimizer has other parameters, or trains one by another algorithm.
    """
    there = {id(each.param): each for each in found}
    notes, problems, here = [], [], set()
    for group in optimizer.param_groups:
        for name, p in zip(parameter_names(group), group["params"], strict=True):
            here.add(id(p))
            each = there.get(id(p))
            if each is None:
                if p.requires_grad:
                    problems.append(f"{name}: the optimizer trains it, and theirs does not have it")
            elif each.algorithm != group["algorithm"]:
                problems.append(
                    f"{name}: it is trained by {each.algorithm} there and by {group['algorithm']} "
                    "in the optimizer; leave optimizer= out, or route it alike (muonkit.Rule)"
                )
            elif each.read.view is not None:
                shape = tuple(p.shape)
                if blocks_of(each.read.view, shape) != blocks_of(group["view"], shape):
                    notes.append((f"the view {each.read.view!r}, {group['view']!r} here", name))
    for each in found:
        if id(each.param) not in here and each.param.requires_grad:
            problems.append(f"{each.name}: theirs has it, and the optimizer does not")
    refuse(problems, "does not fit the optimizer")
    return notes


def _filled(optimizer: Muon, found: Sequence[Parameter], hyperparameters: bool) -> dict[str, Any]:
    """The optimizer's state dict, with what was found in it.

    Raises:
        ValueError: theirs has several values of an option where the optimizer has one group.
    """
    there = {id(each.param): each for each in found}
    saved = optimizer.state_dict()
    groups, state, problems = [], dict(saved["state"]), []
    for group, kept in zip(optimizer.param_groups, saved["param_groups"], strict=True):
        pairs = zip(group["params"], kept["params"], strict=True)
        members = [(there[id(p)], key) for p, key in pairs if id(p) in there]
        for each, key in members:
            before = state.get(key) or {}
            zeros = {kind: torch.zeros_like(value) for kind, value in before.items()}
            filled = each.read.state or zeros
            if MOMENTUM in filled and is_summed(group):  # read as an average
                factor = over_average(each.read.options)
                filled = {**filled, MOMENTUM: times(filled[MOMENTUM], factor)}
            if filled:
                state[key] = filled
        if hyperparameters:
            conflicts: list[tuple[str, str]] = []
            kept = {**kept, **_merged([each for each, _ in members], conflicts, rates=False)}
            kept |= members[0][0].read.schedule if members else {}
            problems += [f"group {kept['name']!r}: {line}" for line in _grouped(conflicts)]
        groups.append(kept)
    remedy = "has several values where the optimizer has one group: leave optimizer= out, which "
    remedy += (
        "makes their groups, or give hyperparameters=False, which leaves the optimizer its own"
    )
    refuse(problems, remedy)
    return {**saved, "state": state, "param_groups": groups}


# --- theirs -----------------------------------------------------------------------------------


def _own_layout(form: Format, found: Sequence[Parameter]) -> list[list[list[Parameter]]]:
    """Our parameters in groups of theirs: for each optimizer, for each group."""
    muon = [each for each in found if each.algorithm == "muon"]
    adamw = [each for each in found if each.algorithm == "adamw"]
    if form.layout == "one group":
        return [[[*muon, *adamw]]]
    parts = [muon, adamw] if form.layout == "two" else [found]
    layout = [_split(part) for part in parts if part]
    if form.by_size:
        # The order that their class for several ranks makes; the one for one takes any.
        for group in (group for part in layout for group in part):
            if group[0].algorithm == "muon":
                group.sort(key=lambda each: each.param.size(), reverse=True)
    return layout


def _layout_of(
    form: Format, optimizers: Sequence[Optimizer], found: Sequence[Parameter]
) -> list[list[list[Parameter]]]:
    """Our parameters as optimizers of theirs hold them.

    Raises:
        ValueError: they hold other parameters, or train one by another algorithm.
    """
    here = {id(each.param): each for each in found}
    problems, layout = [], []
    for optimizer in optimizers:
        layout.append(
            [[here.pop(id(p), None) for p in g["params"]] for g in optimizer.param_groups]
        )
        for group, members in zip(optimizer.param_groups, layout[-1], strict=True):
            for p, each in zip(group["params"], members, strict=True):
                side = form.side_of(group, optimizer.state.get(p, {}))
                if each is None:
                    problems.append(f"theirs holds a tensor {tuple(p.shape)} that ours does not")
                elif side != each.read.side and each.algorithm != form.sides[side].algorithm:
                    problems.append(
                        f"{each.name}: it is trained by {side} there, {each.algorithm} here"
                    )
    problems += [f"{each.name}: theirs does not hold it" for each in here.values()]
    refuse(problems, "does not fit their optimizers")
    return layout  # type: ignore[return-value]


def _merged(
    members: Sequence[Parameter], notes: list[tuple[str, str]], rates: bool = True
) -> dict[str, Any]:
    """The options of one group: the first parameter's, what others had is noted.

    Raises:
        ValueError: with `rates`, several learning rates.
    """
    common: dict[str, Any] = {}
    several = []
    for each in members:
        for key, value in each.read.options.items():
            have = common.setdefault(key, value)
            if key == "step":
                common[key] = max(have, value)
            elif not same(have, value):
                notes.append((f"{key}={value!r}: the group has one, {have!r}", each.name))
                if key == "lr" and rates:
                    several.append(f"{each.name} has lr={value!r}, {members[0].name} {have!r}")
    refuse(several, "has several learning rates in what is one group there")
    return common


def _their_state(
    part: Sequence[Sequence[Parameter]], options: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """The state dict of one optimizer of theirs."""
    state: dict[int, dict[str, Any]] = {}
    groups: list[dict[str, Any]] = []
    number = 0
    for members, common in zip(part, options, strict=True):
        keys = list(range(number, number + len(members)))
        number += len(members)
        schedule = members[0].read.schedule if members else {}
        groups.append({**common, **schedule, "params": keys})
        state.update({k: e.read.state for k, e in zip(keys, members, strict=True) if e.read.state})
    return {"state": state, "param_groups": groups}


# --- what was not carried ---------------------------------------------------------------------


def _grouped(notes: Iterable[tuple[str, str]]) -> list[str]:
    """One line for each note, with the parameters that it is about."""
    names: dict[str, list[str]] = {}
    for note, name in notes:
        names.setdefault(note, []).append(name)
    return [f"{note} ({_listed(having)})" for note, having in names.items()]


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{', '.join(names[:3])}{more}"


def _shown(lines: Sequence[str]) -> str:
    return "\n".join(["not carried:", *(f"- {line}" for line in lines)]) if lines else "all carried"
