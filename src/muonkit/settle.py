"""Settling: what the groups hold now, and whose state each of it goes on with.

A parameter's identity is not constant: frameworks make the optimizer first, shard the model and
replace the parameters in the groups; layers are unfrozen; embeddings are resized in place. So what
was found out of the parameters is remembered here together with them, and found out anew where the
groups hold anything else.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any, NamedTuple

from muonkit._shards import WHOLE
from muonkit._text import shown
from muonkit.groups import is_trained, own_names

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    import torch
    from torch import Tensor

__all__ = ["Known", "is_settled", "known_of", "predecessors", "trained_of"]

_REMEDY = (
    "Resize parameters before the optimizer is made, or begin their state anew: "
    "optimizer.reset_state([parameter])"
)


class Known(NamedTuple):
    """One group's parameters as they were settled.

    Attributes:
        params, names, shapes: in the group's order.
        named: whether the names are the model's; else they are numbers.
        trained: whether a layout and state were made; a frozen parameter has none.
    """

    params: list[Tensor]
    names: list[str]
    shapes: list[torch.Size]
    trained: list[bool]
    named: bool


def trained_of(groups: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The groups without the parameters that are frozen."""
    trained = []
    for group in groups:
        named = zip(own_names(group), group["params"], strict=True)
        some = [(name, p) for name, p in named if is_trained(p)]
        names, params = [name for name, _ in some], [p for _, p in some]
        trained.append({**group, "params": params, "param_names": names})
    return trained


def known_of(groups: Sequence[Mapping[str, Any]]) -> list[Known]:
    """The groups as they are now."""
    return [
        Known(
            list(group["params"]),
            own_names(group),
            [p.shape for p in group["params"]],
            [is_trained(p) for p in group["params"]],
            bool(group.get("param_names")),
        )
        for group in groups
    ]


def is_settled(groups: Sequence[Mapping[str, Any]], known: Sequence[Known]) -> bool:
    """Whether the groups hold what was settled. Every step asks."""
    if len(groups) != len(known):
        return False
    for group, before in zip(groups, known, strict=True):
        params = group["params"]
        if len(params) != len(before.params):
            return False
        for p, q, shape, trained in zip(
            params, before.params, before.shapes, before.trained, strict=True
        ):
            if p is not q or p.shape != shape or not (trained or not is_trained(p)):
                return False
    return True


def predecessors(
    groups: Sequence[Mapping[str, Any]],
    known: Sequence[Known],
    state: Mapping[Tensor, Mapping[str, Any]],
    reset: Iterable[Tensor] = (),
) -> dict[Tensor, Tensor]:
    """Maps every parameter that goes on with a state to the parameter that had this state.

    A parameter that was there before keeps its state. A new one takes the place of one that is
    gone: the one of the same name where groups have names, else the one at the same position.

    Args:
        state: by parameter, as before. A parameter without state (it was frozen, or somebody took
            it out) may come back in any shape.
        reset: parameters that begin anew.

    Raises:
        ValueError: a parameter, or the one in its place, has another shape than its state; a vector
            stands for all of a group's parameters; or parameters are new, others are gone, and
            nothing says which stands for which.
    """
    _refuse_flat(groups, known)
    begun = set(reset)
    shapes = {p: s for k in known for p, s in zip(k.params, k.shapes, strict=True)}
    names = {p: n for k in known for p, n in zip(k.params, k.names, strict=True)}
    now = {
        p: name
        for group in groups
        for p, name in zip(group["params"], own_names(group), strict=True)
    }
    gone = {p: None for p in shapes if p not in now}
    new = {p: None for p in now if p not in shapes}
    before = {p: p for p in now if p in shapes}
    _check_names(groups, known)
    for pairs in (_by_name(groups, known, gone), _by_position(groups, known)):
        for p, old in pairs:
            if p in new and old in gone:
                before[p] = old
                del new[p], gone[old]
    unclear = [shown(now[p]) for p in new if p not in begun]
    if unclear and gone:
        raise ValueError(
            f"the groups hold {', '.join(unclear[:5])} now, and {_some(gone, names)} no more, and "
            "nothing says which stands for which: replace the parameters of a group position by "
            "position, or keep 'param_names' beside them; nothing was changed"
        )
    for p, old in before.items():
        if p not in begun and p.shape != shapes[old] and state.get(old):
            raise ValueError(
                f"{shown(now[p])} has the shape {tuple(p.shape)}, its state was made for "
                f"{tuple(shapes[old])}: it was resized after the optimizer was made; nothing was "
                f"changed. {_REMEDY}"
            )
    return {p: old for p, old in before.items() if p not in begun}


def _refuse_flat(groups: Sequence[Mapping[str, Any]], known: Sequence[Known]) -> None:
    """Refuse what DeepSpeed's ZeRO-1 and -2 put in place of a group's parameters: this rank's part
    of a vector of them all.
    """
    for group, before in zip(groups, known, strict=False):
        params = group["params"]
        if len(params) != 1 or params[0].ndim != 1 or any(params[0] is p for p in before.params):
            continue
        if len(before.params) != 1 or before.shapes[0] != params[0].shape:
            raise ValueError(
                f"a group holds one vector of {params[0].numel()} elements in place of the "
                f"{len(before.params)} parameters that it had: a flat part of them, as DeepSpeed's "
                f"ZeRO-1 and ZeRO-2 make it, which has no matrices; nothing was changed. {WHOLE}"
            )


def _check_names(groups: Sequence[Mapping[str, Any]], known: Sequence[Known]) -> None:
    """Refuse names that stayed where they were while parameters were reordered.

    Raises:
        ValueError: a parameter stands under the name of another.
    """
    owner = _by_their_names(known)
    names = {p: name for name, p in owner.items()}
    for group in groups:
        for name, p in zip(group.get("param_names") or (), group["params"], strict=False):
            if p in names and name in owner and owner[name] is not p:
                raise ValueError(
                    f"the parameter {shown(names[p])} stands under the name {shown(name)} in its "
                    "group: 'params' were reordered, and 'param_names' were not; change both "
                    "together; nothing was changed"
                )


def _by_their_names(known: Sequence[Known]) -> dict[str, Tensor]:
    """The settled parameters of groups that have names, by name; two models in one optimizer may
    have the same names, which then tell nothing.
    """
    named = [
        (name, p)
        for before in known
        if before.named
        for name, p in zip(before.names, before.params, strict=True)
    ]
    count = Counter(name for name, _ in named)
    return {name: p for name, p in named if count[name] == 1}


def _by_position(
    groups: Sequence[Mapping[str, Any]], known: Sequence[Known]
) -> list[tuple[Tensor, Tensor]]:
    return [
        pair
        for group, before in zip(groups, known, strict=False)
        if len(group["params"]) == len(before.params)
        for pair in zip(group["params"], before.params, strict=True)
    ]


def _by_name(
    groups: Sequence[Mapping[str, Any]], known: Sequence[Known], gone: Iterable[Tensor]
) -> list[tuple[Tensor, Tensor]]:
    left = set(gone)
    of_name = {name: p for name, p in _by_their_names(known).items() if p in left}
    return [
        (p, of_name[name])
        for group in groups
        if group.get("param_names")
        for name, p in zip(group["param_names"], group["params"], strict=True)
        if name in of_name
    ]


def _some(params: Iterable[Tensor], names: Mapping[Tensor, str]) -> str:
    return ", ".join([shown(names[p]) for p in params][:5])
