"""State dicts: what is taken of one that is loaded, and how the parts of several ranks become one.

Hyperparameters come from the state dict. Names and structure (algorithm, view, which parameters)
are the model's own: a state dict only says which of its entries belongs to which of them.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from muonkit._text import shown
from muonkit._torch import WRAPPERS, whole_tensor
from muonkit.distributed.exchange import check_ranks_agree
from muonkit.distributed.layout import is_a_part, is_dtensor, local
from muonkit.groups import (
    MOMENTUM,
    SCALE,
    STEP,
    VARIANCE,
    keeps_int8,
    parameter_names,
    spell_,
    state_shapes,
)
from muonkit.int8 import is_scaled
from muonkit.options import spelled, unspelled
from muonkit.stages import kept_by, stages_of
from muonkit.validate import validate_options

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from muonkit.distributed.layout import Layouts

__all__ = ["merge_saved", "spelled_groups", "whole_state", "without_wrappers"]

# Keys of a group that describe the model, beside its parameters.
_STRUCTURE = ("algorithm", "view", "name", "param_names")

_DDP = "module."  # what it puts before every name

_WHOLE = (
    "call optimizer.consolidate_state_dict() on all ranks before rank 0 saves "
    "optimizer.state_dict(), or save and load with torch.distributed.checkpoint and "
    "get_state_dict, set_state_dict: both go from any number of ranks to any other"
)


_OTHER_GROUPS = (
    "Build the optimizer with the groups (model, rules, optimizer) that it was saved with; what "
    "another optimizer has saved has to be put into the form of optimizer.state_dict() first. "
    "Nothing was loaded"
)


def spelled_groups(state_dict: dict[str, Any]) -> dict[str, Any]:
    """The state dict with the names of stages and functions in their place: any process can
    load names, `torch.load(weights_only=True)` among them.

    A group whose momentum a scheduler cycles has one, AdamW's too: torch looks in flattened state
    dicts for whatever the groups of a fresh optimizer have, once its scheduler is made.
    """
    groups = [
        {key: value if key == "params" else spelled(value) for key, value in group.items()}
        for group in state_dict["param_groups"]
    ]
    for group in groups:
        if group["algorithm"] == "adamw" and "max_momentum" in group:  # see `adopt_momentum`
            group.setdefault("momentum", group["betas"][0])
    return {**state_dict, "param_groups": groups}


# --- loading ----------------------------------------------------------------------------------


def merge_saved(
    groups: Sequence[dict[str, Any]],
    state_dict: dict[str, Any],
    state: Mapping[Tensor, Mapping[str, Any]],
) -> dict[str, Any]:
    """The state dict as it is loaded: each group with what it lacks from ours, with our structure,
    and with its entries in the order of our parameters.

    Args:
        state: this optimizer's.

    Raises:
        ValueError: it is another model's or another optimizer's, has options out of range, lacks
            the state of a parameter, or holds the part of another rank.
    """
    missing = {"state", "param_groups"} - set(state_dict)
    if missing:
        raise ValueError(f"no optimizer state dict: it lacks {sorted(missing)}")
    saved_groups = _by_names(groups, state_dict["param_groups"])
    for number, (own, saved) in enumerate(zip(groups, saved_groups, strict=False)):
        if saved.get("algorithm", own["algorithm"]) != own["algorithm"]:
            raise ValueError(
                f"group {number} of the state dict is trained by {saved['algorithm']}, here by "
                f"{own['algorithm']}; build the optimizer with the routes it was saved with"
            )
    if len(groups) != len(saved_groups):
        raise ValueError(
            "loaded state dict has a different number of parameter groups: "
            f"{_kinds(saved_groups)}, where this optimizer has {_kinds(groups)}. {_OTHER_GROUPS}"
        )
    merged = []
    for number, (own, saved) in enumerate(zip(groups, saved_groups, strict=True)):
        _refuse_foreign(number, own, saved)
        _refuse_other_adam(number, saved)
        keys = _in_our_order(number, own, saved)
        if len(keys) != len(own["params"]):
            raise ValueError(
                "loaded state dict contains a parameter group that doesn't match the size of "
                f"optimizer's group: group {number} has {len(keys)} parameters in it, and "
                f"{len(own['params'])} here. {_OTHER_GROUPS}"
            )
        structure = {key: own[key] for key in _STRUCTURE if key in own}
        saved = dict(saved)
        spell_(saved)
        if own["algorithm"] == "adamw" and "betas" in saved:
            saved.pop("momentum", None)  # beta1, once more: `spelled_groups`
        group = unspelled({**own, **saved, **structure}, own)
        if "param_names" not in own:
            group.pop("param_names", None)
        validate_options(group)
        for name, p, key in zip(parameter_names(own), own["params"], keys, strict=True):
            entry = state_dict["state"].get(key) or {}
            if not entry and p.requires_grad and state.get(p):
                _refuse_absent(name, key, saved)
            if entry:
                _check_entry(name, p, own, group, entry)
                kinds = [kind for kind in state_shapes(p, group) if kind in entry]
                _check_parts(name, kinds, entry, state.get(p) or {})
        merged.append({**group, "params": keys})
    return {**state_dict, "param_groups": merged}


def _by_names(
    groups: Sequence[Mapping[str, Any]], saved_groups: Sequence[Mapping[str, Any]]
) -> Sequence[Mapping[str, Any]]:
    """The saved groups in the order of ours, where each has the names of one of ours: groups are
    made in the order in which a model registers its parts.
    """

    def names(group: Mapping[str, Any]) -> frozenset[str]:
        return frozenset(without_wrappers(group.get("param_names") or ()))

    saved = {names(group): group for group in saved_groups}
    ours = [names(group) for group in groups]
    if len(saved) == len(saved_groups) == len(ours) and saved.keys() == set(ours):
        return [saved[each] for each in ours]
    return saved_groups


# What other optimizers have in a group, and neither Muon nor AdamW has.
_FOREIGN = ("dampening", "momentum_decay", "alpha", "rho", "lr_decay", "lambd", "etas", "wd")


def _refuse_foreign(number: int, own: Mapping[str, Any], saved: Mapping[str, Any]) -> None:
    """Refuse a group that another optimizer saved, whose state has names that ours has too."""
    if "algorithm" in saved or "use_muon" in saved:
        return
    foreign = (*_FOREIGN, "betas") if own["algorithm"] == "muon" else _FOREIGN
    found = [key for key in foreign if key in saved]
    if found:
        raise ValueError(
            f"group {number} of the state dict has {found[0]!r}, which no group of "
            f"{own['algorithm']} has: it was saved by another optimizer. muonkit.convert knows "
            "those of other Muons; else begin without its state. Nothing was loaded"
        )


def _refuse_other_adam(number: int, saved: Mapping[str, Any]) -> None:
    """Refuse a group of torch's that was trained by what our AdamW has not: amsgrad's maxima, decay
    through the gradient (torch.optim.Adam's).
    """
    through_gradient = saved.get("decoupled_weight_decay", True) is False
    for what, key, other in (
        ("amsgrad=True", "amsgrad", bool(saved.get("amsgrad"))),
        ("a weight decay in the gradient", "decoupled_weight_decay",
         through_gradient and saved.get("weight_decay", 0) != 0),
    ):  # fmt: skip
        if other:
            raise ValueError(
                f"group {number} of the state dict was trained with {what}, which muonkit's AdamW "
                f"does not do: go on with torch's, or delete {key!r} from the group, to train on "
                "without. Nothing was loaded"
            )


def _in_our_order(number: int, own: Mapping[str, Any], saved: Mapping[str, Any]) -> list[Any]:
    """The keys of a saved group's state, one for each of our parameters: by name where both sides
    have names, else by position.

    Raises:
        ValueError: it has other names than ours, or the same in another order where some are alike.
    """
    keys, names, ours = list(saved["params"]), saved.get("param_names"), own.get("param_names")
    if not names or not ours or len(names) != len(keys) or any(isinstance(k, str) for k in keys):
        # What torch.distributed.checkpoint.state_dict hands over is by name already, in our order;
        # the names in it are those of one of the parts that it was put together from.
        return keys
    for plain in (list, without_wrappers):
        theirs, here = plain(names), plain(ours)
        if theirs == here:  # two models in one group may have the same names
            return keys
        if Counter(theirs) == Counter(here) and len(set(here)) == len(here):
            where = dict(zip(theirs, keys, strict=True))
            return [where[name] for name in here]
    theirs, here = without_wrappers(names), without_wrappers(ours)
    if Counter(theirs) == Counter(here):
        twice = [name for name, count in Counter(here).items() if count > 1]
        raise ValueError(
            f"group {number} of the state dict has several parameters of one name, "
            f"{_listed(twice)}, and names in another order than here: give its parameters in the "
            "order that they were saved in. Nothing was loaded"
        )
    lacks = [name for name in here if name not in set(theirs)]
    other = [name for name in theirs if name not in set(here)]
    remedy = (
        "If they are the same parameters in the same order under other names, delete 'param_names' "
        "from the groups of the state dict: it is then loaded by position"
        if len(theirs) == len(here)
        else _OTHER_GROUPS
    )
    raise ValueError(
        f"group {number} of the state dict was saved from parameters of other names: it has "
        f"{_listed(other)} that this group has not, and lacks {_listed(lacks)}. {remedy}"
    )


def without_wrappers(names: Iterable[str]) -> list[str]:
    """Names as they are in a model that nobody has wrapped."""
    plain = [".".join(part for part in n.split(".") if part not in WRAPPERS) for n in names]
    while plain and all(name.startswith(_DDP) for name in plain):
        plain = [name.removeprefix(_DDP) for name in plain]
    return plain


def _refuse_absent(name: str, key: Any, saved: Mapping[str, Any]) -> None:
    """Refuse a state dict of ours that has nothing for a parameter that is trained here.

    Ours has a state for every parameter that was not frozen. torch's optimizers have none for one
    that never had a gradient; and where the key is a name, torch was told to allow it.
    """
    if "algorithm" in saved and not isinstance(key, str):
        raise ValueError(
            f"the state dict has no state for {name}, which is trained here; if it was frozen when "
            "the state was saved, freeze it while the state is loaded (requires_grad_(False)), and "
            "it begins at zero once it is trained; nothing was loaded"
        )


def _check_entry(
    name: str,
    p: Tensor,
    own: Mapping[str, Any],
    merged: Mapping[str, Any],
    entry: Mapping[str, Any],
) -> None:
    """Refuse the state of a parameter that lacks something, or was made for another shape."""
    # A flattened state dict that lacks a tensor has an empty dict in its place.
    there = [kind for kind, value in entry.items() if not isinstance(value, dict)]
    if not there:
        raise ValueError(
            f"the state dict has no state for {name}, which is trained here: a part of the model "
            "is missing in it, or the parameter was frozen when it was saved; load the states of "
            "all parts together, or freeze the parameter while the state is loaded "
            "(requires_grad_(False)). Nothing was loaded"
        )
    for group in (own, merged):
        shapes = state_shapes(p, group)
        shapes.pop(SCALE, None)
        counted = group["algorithm"] == "adamw" or VARIANCE in shapes
        for kind in (*shapes, *((STEP,) if counted else ())):
            if kind not in there:
                raise ValueError(_incomplete(name, kind, there, group))
        for kind, shape in shapes.items():
            if not isinstance(entry[kind], Tensor) or tuple(entry[kind].shape) != shape:
                raise ValueError(_misshapen(name, kind, entry[kind], p, shape, own, merged))
    if own["algorithm"] == "muon":
        _check_int8(name, own, merged, entry)


def _check_int8(
    name: str, own: Mapping[str, Any], merged: Mapping[str, Any], entry: Mapping[str, Any]
) -> None:
    """Refuse a momentum in int8 without its scales, and numbers that stand for one."""
    momentum, scale = entry[MOMENTUM], entry.get(SCALE)
    if momentum.dtype == torch.int8:
        if not isinstance(scale, Tensor) or not is_scaled(momentum.shape, scale.shape):
            has = f"of shape {tuple(scale.shape)}" if isinstance(scale, Tensor) else "not there"
            raise ValueError(
                f"the state dict's momentum for {name} is in int8, and its {SCALE} is {has}: "
                "without the scales of its blocks it says nothing. Nothing was loaded"
            )
    elif keeps_int8(merged) and not keeps_int8(own):
        # torch.distributed.checkpoint copies what was saved into tensors of this optimizer's
        # dtypes, and asks for no tensor that this optimizer has not.
        raise ValueError(
            f"the state dict was saved with momentum_dtype='int8', and its momentum for {name} is "
            f"{momentum.dtype}, without scales: make the optimizer with momentum_dtype='int8', "
            f"load the state, and set group['momentum_dtype'] = {own['momentum_dtype']!r} in its "
            "muon groups. Nothing was loaded"
        )


def _incomplete(name: str, kind: str, there: Sequence[str], group: Mapping[str, Any]) -> str:
    has = f"the state dict has {', '.join(map(str, there))} for {name}, no {kind}"
    if group["algorithm"] == "muon" and MOMENTUM in there:
        option, stage = _keeping(group)
        return (
            f"{has}, which {option}={stage!r} keeps: it was saved with other stages. Make the "
            "optimizer with those (without any, it keeps the momentum alone) and load the state; "
            f"then set group[{option!r}] = {stage!r} in its muon groups, and the {kind} begins at "
            "zero. Nothing was loaded"
        )
    return f"{has}: it was saved by another optimizer than {group['algorithm']}"


def _misshapen(
    name: str,
    kind: str,
    value: Any,
    p: Tensor,
    shape: tuple[int, ...],
    own: Mapping[str, Any],
    merged: Mapping[str, Any],
) -> str:
    got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
    wants = f"the state dict's {kind} for {name} has shape {got}, the parameter {tuple(p.shape)} "
    if kind == VARIANCE and _keeping(own) != _keeping(merged):
        (option, here), (saved_option, saved) = _keeping(own), _keeping(merged)
        return (
            f"{wants}wants {shape} with {option}={here!r}: it was saved with "
            f"{saved_option}={saved!r}; make the optimizer with that one. Nothing was loaded"
        )
    return f"{wants}wants {shape}; it was saved from another model"


def _keeping(group: Mapping[str, Any]) -> tuple[str, str]:
    """The option and the name of the stage of a group that keeps a state."""
    stage = kept_by(group)
    if stage is None:
        return "after", "none"
    option = "before" if stage in stages_of(group).before else "after"
    return option, stage.name


def _check_parts(
    name: str, kinds: Iterable[str], entry: Mapping[str, Any], state: Mapping[str, Any]
) -> None:
    """Refuse what other ranks left behind, before anything is loaded.

    Raises:
        ValueError: a tensor lies on several ranks, and this one has not its own part of it, or
            cannot get at the others' where it needs them.
    """
    for kind in kinds:
        tensor: Any = entry[kind]
        own: Any = state.get(kind)
        if not is_a_part(tensor):
            continue
        mesh, here = tensor.device_mesh, own.device_mesh if is_dtensor(own) else None
        if not _is_own_part(tensor):
            whose, this = (_named(mesh, at) for at in (mesh.get_coordinate(), _place(mesh)))
            raise ValueError(
                f"the {kind} of {name} in the state dict lies on {mesh.size()} ranks: it is the "
                f"part of {whose}, and this is {this}. To save the whole state, {_WHOLE}. Nothing "
                "was loaded"
            )
        if here is not None and mesh.size() != here.size():
            raise ValueError(
                f"a state that was saved by {mesh.size()} ranks as it lay on them is loaded by "
                f"{here.size()}: {_WHOLE}. Nothing was loaded"
            )
        if here != mesh and not _is_reachable(mesh):
            raise ValueError(
                f"the {kind} of {name} was saved as it lay on {mesh.size()} ranks, in another "
                f"layout than here: {_WHOLE}. Nothing was loaded"
            )


def _is_own_part(tensor: Any) -> bool:
    """Whether this rank has the part of a DTensor that it would have by its placements.

    A mesh knows the place of its rank on it, and a pickled one that of the rank that pickled it.
    """
    saved_at, here = tensor.device_mesh.get_coordinate(), _place(tensor.device_mesh)
    if saved_at is None or here is None:
        return False
    along = zip(here, saved_at, tensor.placements, strict=True)
    return all(one == other or placement.is_replicate() for one, other, placement in along)


def _place(mesh: Any) -> tuple[int, ...] | None:
    """This rank's place on a mesh, whoever made it; None where it has none."""
    dist = torch.distributed
    if not (dist.is_available() and dist.is_initialized()):
        return None
    try:
        found = (mesh.mesh == dist.get_rank()).nonzero().tolist()
    except RuntimeError:  # cut from a mesh that has not this rank
        return None
    return tuple(found[0]) if found else None


def _is_reachable(mesh: Any) -> bool:
    """Whether a collective along each axis of a mesh goes to its ranks.

    A mesh that another run has pickled has the names of that run's process groups, which here are
    no group's, or another group's.
    """
    coordinate, dist = tuple(mesh.get_coordinate()), torch.distributed
    for axis in range(mesh.ndim):
        along = mesh.mesh[(*coordinate[:axis], slice(None), *coordinate[axis + 1 :])]
        try:
            ranks = dist.get_process_group_ranks(mesh.get_group(axis))
        except (RuntimeError, ValueError, KeyError, AssertionError, AttributeError):
            return False
        if sorted(ranks) != sorted(along.tolist()):
            return False
    return True


def _named(mesh: Any, place: Sequence[int] | None) -> str:
    if place is None:
        return "no rank of these"
    number = 0
    for n, index in zip(mesh.shape, place, strict=True):
        number = number * n + index
    return f"rank {number}"


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{', '.join(map(shown, names[:3]))}{more}" if names else "nothing"


def _kinds(groups: Sequence[Mapping[str, Any]]) -> str:
    """Groups in words, as "2 groups (parameters in muon: 12, adamw: 5)"."""
    kinds = [
        f"{shown(group.get('name', f'group {number}'))}: {len(group['params'])}"
        for number, group in enumerate(groups)
    ]
    more = f" and {len(kinds) - 8} more" if len(kinds) > 8 else ""
    noun = "group" if len(kinds) == 1 else "groups"
    return f"{len(kinds)} {noun} (parameters in {', '.join(kinds[:8])}{more})"


# --- saving -----------------------------------------------------------------------------------


def whole_state(
    groups: Sequence[Mapping[str, Any]],
    state: Mapping[Any, Mapping[str, Any]],
    layouts: Layouts,
    to: int,
) -> dict[Any, dict[str, Any]] | None:
    """Every parameter's state as plain tensors in logical shape, on the CPU of one rank.

    One tensor at a time is whole on the other ranks.

    Returns:
        None on the other ranks, and on all where every rank has everything already.

    Raises:
        ValueError: there is no such rank.
        RuntimeError: the ranks have the state of other parameters.
    """
    domain, dist = layouts.domain, torch.distributed
    position, size = (0, 1) if domain is None else (domain.position, domain.size)
    if domain is None and dist.is_available() and dist.is_initialized():
        position, size = dist.get_rank(), dist.get_world_size()
    if domain is not None:
        compared = [("the rank with the whole state", str(to)), *_to_compare(groups, state)]
        check_ranks_agree(domain, compared, _OTHERS, call="consolidate_state_dict")
    if not 0 <= to < size:
        raise ValueError(f"consolidate_state_dict(to={to}): there are ranks 0 to {size - 1}")
    if not any(is_dtensor(value) for entry in state.values() for value in entry.values()):
        return None
    whole: dict[Any, dict[str, Any]] = {}
    for p in (p for group in groups for p in group["params"] if p in state):
        # In one order on all ranks, whatever order they were loaded in.
        values = {key: _whole(state[p][key], position == to) for key in sorted(state[p])}
        if position == to:
            whole[p] = values
    return whole if position == to else None


_OTHERS = {"": "all ranks call consolidate_state_dict together, with the same state; none was sent"}


def _to_compare(
    groups: Sequence[Mapping[str, Any]], state: Mapping[Any, Mapping[str, Any]]
) -> list[tuple[str, str]]:
    def said(entry: Mapping[str, Any] | None) -> str:
        if entry is None:
            return "none"
        parts = {key: entry[key].placements for key in entry if is_a_part(entry[key])}
        return ", ".join(f"{key} {parts.get(key, '')}".strip() for key in sorted(entry))

    return [
        (f"the state of {name}", said(state.get(p)))
        for group in groups
        for name, p in zip(parameter_names(group), group["params"], strict=True)
    ]


def _whole(value: Any, wanted: bool) -> Any:
    if not isinstance(value, Tensor):
        return value
    if is_a_part(value):
        value = whole_tensor(value)
    return local(value).detach().to("cpu", copy=True) if wanted else None
