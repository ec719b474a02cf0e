"""Whose state is whose: the positions of others' state dicts, and the names of a model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.optim import Optimizer

from muonkit.convert.values import read_parameter
from muonkit.groups import MOMENTUM
from muonkit.saved import without_wrappers

if TYPE_CHECKING:
    from muonkit.convert.formats import Format
    from muonkit.convert.values import Read

__all__ = ["Parameter", "named_of", "positions_of", "read_all", "refuse"]


@dataclass(frozen=True)
class Parameter:
    """One parameter, with what it has on the side that it goes to; `place` is the group that it
    comes from.
    """

    name: str
    param: Tensor
    algorithm: str
    read: Read
    place: int


class Named:
    """The parameters of a model, by name and by identity."""

    def __init__(self, items: Iterable[tuple[str, Tensor]]) -> None:
        self.by_name: dict[str, Tensor] = {}
        self.name_of: dict[int, str] = {}
        own = list(items)
        for name, p in own:  # a shared parameter has several names, and the first is its own
            self.name_of.setdefault(id(p), name)
            self.by_name.setdefault(name, p)
        for name, p in own:  # a part may be called as a wrapper is: names come before plain ones
            (plain,) = without_wrappers([name])
            self.by_name.setdefault(plain, p)

    def called(self, name: str) -> Tensor | None:
        """The model's parameter of this name, with or without those of wrappers."""
        (plain,) = without_wrappers([name])
        return self.by_name.get(name, self.by_name.get(plain))

    def find(self, item: Any) -> str:
        """The model's name of an entry in a list of parameters (a tensor or a name).

        Raises:
            ValueError: the model does not have it.
        """
        p = item[1] if isinstance(item, tuple) and len(item) == 2 else item
        if isinstance(p, str) and (found := self.called(p)) is not None:
            p = found
        if isinstance(p, Tensor) and id(p) in self.name_of:
            return self.name_of[id(p)]
        what = f"a tensor of shape {tuple(p.shape)}" if isinstance(p, Tensor) else repr(p)[:80]
        raise ValueError(f"the model has no parameter that is {what}")


def named_of(model: Any) -> Named:
    if isinstance(model, nn.Module):
        return Named(model.named_parameters(remove_duplicate=False))
    items = model.items() if isinstance(model, Mapping) else model
    return Named([(name, p) for name, p in items])


def positions_of(
    states: Any, params: Any, named: Named
) -> list[tuple[Mapping[str, Any], list[Any]]]:
    """(state dict, what its positions stand for, in order) of each of their optimizers."""
    alone = isinstance(states, Optimizer | Mapping)
    sources = [states] if alone else list(states)
    given: list[Any] = [params] if alone or params is None else list(params)
    if params is None:
        given = [None] * len(sources)
    if len(given) != len(sources):
        raise ValueError(
            f"there are {len(sources)} states, and params for {len(given)} of them: give a list of "
            "what each optimizer was made with"
        )
    pairs: list[tuple[Mapping[str, Any], list[Any]]] = []
    for source, items in zip(sources, given, strict=True):
        if isinstance(source, Optimizer):
            held: list[Any] = [p for group in source.param_groups for p in group["params"]]
            pairs.append((source.state_dict(), held))
            continue
        lacks = {"state", "param_groups"} - set(source)
        if lacks:
            flat = any(str(key).startswith(("state.", "param_groups.")) for key in source)
            remedy = (
                ": it is flattened; load it into an optimizer of theirs with "
                "set_optimizer_state_dict, and give that"
                if flat
                else ""
            )
            raise ValueError(f"no optimizer state dict: it lacks {sorted(lacks)}{remedy}")
        pairs.append((source, _in_order(source, items, named)))
    return pairs


def _in_order(saved: Mapping[str, Any], items: Any, named: Named) -> list[Any]:
    """The parameters that the keys in a state dict's groups stand for, one for each key.

    Raises:
        ValueError: they cannot be told, or `items` says other than the names in the state dict.
    """
    groups = saved["param_groups"]
    keys = [key for group in groups for key in group["params"]]
    if keys and all(isinstance(key, str) for key in keys):
        return keys
    names = [name for group in groups for name in group.get("param_names") or ()]
    if items is None:
        if len(names) == len(keys):
            return names
        raise ValueError(
            "the state dict has positions and no names: give params=, what the optimizer that "
            "saved it was made with, in the same order (parameters, names or param groups), or "
            "give the optimizer itself"
        )
    listed = _flat(items)
    if len(listed) != len(keys):
        raise ValueError(
            f"params has {len(listed)} parameters, and the state dict {len(keys)} in "
            f"{len(groups)} groups: give all that the optimizer was made with, in its order"
        )
    if len(names) == len(keys):
        for name, item in zip(names, listed, strict=True):
            known = named.called(name) is not None
            if known and named.find(name) != (other := named.find(item)):
                raise ValueError(
                    f"params has {other} where the state dict has the name {name}: leave params= "
                    "out, and its names decide; or delete 'param_names' from its groups"
                )
    return listed


def _flat(items: Any) -> list[Any]:
    listed: list[Any] = []
    for item in [items] if isinstance(items, Tensor | Mapping) else items:
        listed += _flat(item["params"]) if isinstance(item, Mapping) else [item]
    return listed


def read_all(
    form: Format, sources: Sequence[tuple[Mapping[str, Any], list[Any]]], named: Named
) -> list[Parameter]:
    """Every parameter of the other optimizer, converted.

    Raises:
        ValueError: all that does not fit.
    """
    problems: list[str] = []
    found: dict[str, Parameter] = {}
    seen: set[str] = set()
    for place, (group, state, items) in enumerate(_groups_of(sources)):
        ordered = _in_their_order(form, group, state, items, named)
        for item, key in zip(ordered, group["params"], strict=True):
            name = ""
            try:
                name = named.find(item)
                p, twice = named.by_name[name], name in seen
                seen.add(name)
                if twice:
                    raise ValueError("it is in two places of theirs")
                read = read_parameter(form, p, group, state.get(key) or {})
                found[name] = Parameter(name, p, form.sides[read.side].algorithm, read, place)
            except ValueError as error:
                problems.append(f"{name}: {error}" if name else str(error))
    trained = [name for name in named.name_of.values() if named.by_name[name].requires_grad]
    missing = [name for name in trained if name not in seen]
    if missing:
        problems.append(
            f"the model trains {', '.join(missing)}, and theirs has no such parameter: for a part "
            "of a model, give as the model a dict of the parameters (by name) that theirs has"
        )
    refuse(problems, "cannot be converted")
    return list(found.values())


def _groups_of(
    sources: Sequence[tuple[Mapping[str, Any], list[Any]]],
) -> Iterable[tuple[Mapping[str, Any], Mapping[Any, Any], list[Any]]]:
    """(group, state of its optimizer, what its keys stand for) of all groups, in order."""
    for saved, items in sources:
        rest = iter(items)
        for group in saved["param_groups"]:
            yield group, saved["state"], [next(rest) for _ in group["params"]]


def _in_their_order(
    form: Format,
    group: Mapping[str, Any],
    state: Mapping[Any, Mapping[str, Any]],
    items: list[Any],
    named: Named,
) -> list[Any]:
    """The parameters of a group in the order that its optimizer had, which may have sorted them.

    The shapes of the state decide. Where they fit both orders, the two orders are the same, since
    the sort keeps the order of parameters of one size.
    """
    if not form.by_size:
        return items
    shapes = [
        tuple(value.shape)
        if isinstance(value := (state.get(key) or {}).get(MOMENTUM), Tensor)
        else None
        for key in group["params"]
    ]
    try:
        sized = [(named.by_name[named.find(item)].shape, item) for item in items]
    except ValueError:
        return items  # which is refused in a moment
    by_size = sorted(sized, key=lambda pair: pair[0], reverse=True)

    def fits(pairs: Sequence[tuple[Any, Any]]) -> bool:
        both = zip(pairs, shapes, strict=True)
        return all(shape in (None, tuple(size)) for (size, _), shape in both)

    return [item for _, item in by_size] if fits(by_size) and not fits(sized) else items


def refuse(problems: Sequence[str], what: str) -> None:
    if problems:
        listed = "".join(f"\n- {line}" for line in problems)
        raise ValueError(f"the optimizer state {what}, and nothing was changed:{listed}")
