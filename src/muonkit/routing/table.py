"""The routes of a model: what every parameter gets and why, as a table and as param groups."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeGuard, overload

import torch.nn as nn
from torch import Tensor

from muonkit._text import shown
from muonkit.options import spelled
from muonkit.routing.places import Models, starred, unwrap
from muonkit.routing.rules import RoutingError
from muonkit.routing.survey import survey
from muonkit.scale import ROUTED, Scale

__all__ = ["Algorithm", "Route", "Routes", "as_module", "is_models", "shape_of"]

Algorithm = Literal["muon", "adamw", "frozen", "ignore"]

_COLUMNS = ("name", "shape", "view", "algorithm", "scale", "decay", "reason")


@dataclass(frozen=True)
class Route:
    """What one parameter gets.

    Attributes:
        name: the dotted name, without what torch.compile, DDP and FSDP put in front.
        aliases: the other names of the same tensor, if it is tied or shared.
        shape: the parameter's shape, as stored.
        algorithm: "muon", "adamw", "frozen" (requires_grad is False) or "ignore" (a `Rule` leaves
            it out: the optimizer does not hold it).
        view: how the parameter is a batch of matrices (see `muonkit.views`); None unless "muon".
        decay: whether weight decay applies.
        scale: the factor on lr of its matrices, one number, or one per block where blocks differ;
            None unless "muon".
        reason: why, in a few words.
        options: further hyperparameters for its param group, from a `Rule`.
        param: the parameter itself.
        unfrozen: of a frozen parameter what it gets once its requires_grad is True again; None
            where that cannot be decided, or could not be trained.
    """

    name: str
    aliases: tuple[str, ...]
    shape: tuple[int, ...]
    algorithm: Algorithm
    view: str | None
    decay: bool
    scale: float | tuple[float, ...] | None
    reason: str
    options: Mapping[str, object] = field(hash=False)
    param: nn.Parameter = field(repr=False, compare=False)
    unfrozen: Route | None = field(default=None, repr=False, compare=False)


class Routes(Sequence[Route]):
    """The routes of a model, in registration order. `print` it to see the table, where layers that
    repeat are one line each.
    """

    def __init__(self, routes: Sequence[Route], scale: str | Scale = ROUTED) -> None:
        self._routes = tuple(routes)
        self.scale = scale  # what the table's scales are, unless a rule says otherwise

    @overload
    def __getitem__(self, index: int) -> Route: ...
    @overload
    def __getitem__(self, index: slice) -> Routes: ...
    def __getitem__(self, index: int | slice) -> Route | Routes:
        if isinstance(index, slice):
            return Routes(self._routes[index], self.scale)
        return self._routes[index]

    def __len__(self) -> int:
        return len(self._routes)

    def __iter__(self) -> Iterator[Route]:
        return iter(self._routes)

    def __repr__(self) -> str:
        return f"<Routes: {self.summary()}>"

    def __str__(self) -> str:
        return self.table()

    def table(self, *, fold: bool = True) -> str:
        """The routes as text, and the counts as the last line.

        Args:
            fold: parameters that differ only in the index of a layer share a line, which counts
                them and has `*` for the index (so the name is a pattern for a `Rule`); False:
                every parameter has a line.
        """
        rows = [_COLUMNS, *map(_cells, self)]
        counts = Counter(_cells(route, starred) for route in self)
        if fold and len(counts) < len(self):
            lines_of: dict[
                tuple[str, ...], tuple[str, ...]
            ] = {}  # in the order of their first parameters
            for route in self:
                kind = _cells(route, starred)
                row = kind if counts[kind] > 1 else _cells(route)
                lines_of.setdefault(kind, (f"{counts[kind]}×", *row))
            rows = [("count", *_COLUMNS), *lines_of.values()]
        rows = [tuple(map(shown, row)) for row in rows]
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = ["  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)) for r in rows]
        lines.insert(1, "  ".join("-" * width for width in widths))
        return "\n".join([*(line.rstrip() for line in lines), self.summary()])

    def summary(self) -> str:
        """Parameters and elements per algorithm, in one line."""
        counts = [
            f"{name}: {count:,} parameters, {elements:,} elements"
            for name, (count, elements) in self._counts().items()
        ]
        return "; ".join(counts)

    def to_json(self) -> str:
        """The routes as JSON text: {"routes": [...], "summary": {...}}, without the tensors.

        Option values that JSON does not know are written as their repr.
        """
        rows = [
            {
                "name": r.name,
                "aliases": r.aliases,
                "shape": r.shape,
                "algorithm": r.algorithm,
                "view": r.view,
                "decay": r.decay,
                "scale": r.scale,
                "reason": r.reason,
                "options": {key: spelled(value) for key, value in r.options.items()},
            }
            for r in self
        ]
        summary = {
            name: {"parameters": count, "elements": elements}
            for name, (count, elements) in self._counts().items()
        }
        return json.dumps({"routes": rows, "summary": summary}, indent=2, default=repr)

    def param_groups(self) -> list[dict[str, Any]]:
        """Param groups for `Muon`: {"params": [(name, parameter), ...], "algorithm",
        "view" (muon only), "decay" (False stands for weight_decay 0), **options}.

        Parameters that agree in all but themselves share a group; groups come in the order of
        their first parameter. A frozen parameter is in the group that trains it once it is
        unfrozen: an optimizer leaves it alone until then.
        """
        groups: list[dict[str, Any]] = []
        for r in (each.unfrozen if each.algorithm == "frozen" else each for each in self):
            if r is None or r.algorithm == "ignore":
                continue
            key: dict[str, Any] = {"algorithm": r.algorithm, "decay": r.decay, **r.options}
            if r.view is not None:
                key["view"] = r.view
            group = next((g for g in groups if _same_key(g, key)), None)
            if group is None:
                group = {"params": [], **key}
                groups.append(group)
            group["params"].append((r.name, r.param))
        return groups

    def of(self, part: nn.Module | Mapping[str, nn.Module]) -> Routes:
        """The routes of a part of the model, such as one stage of a pipeline: what routing decided
        with the whole model in view, under the part's own names.

        The part's parameters are found by identity, or, where it was copied, by their names in the
        whole model: a copy from which layers were deleted keeps those.

        Raises:
            RoutingError: the part has a parameter that is not of this model.
        """
        facts = survey(unwrap(as_module(part)), [])
        by_param = {id(r.param): r for r in self}
        by_name = {name: r for r in self for name in (r.name, *r.aliases)}
        routes = []
        for key, param in facts.params.items():
            names = [site.name for site in facts.sites[key]]
            same = by_param.get(key) or next((by_name[n] for n in names if n in by_name), None)
            if same is None or shape_of(param) != same.shape:
                raise RoutingError(
                    f"{names[0]} {shape_of(param)} of {type(part).__name__} is no parameter of the "
                    "model that was routed, neither by identity nor by its name and shape: route "
                    "the whole model that the part was taken from"
                )
            routes.append(_moved(same, names, param))
        return Routes(routes, self.scale)

    def _counts(self) -> dict[str, tuple[int, int]]:
        counts = {}
        for algorithm in ("muon", "adamw", "frozen", "ignore"):
            sizes = [_elements(r.param) for r in self if r.algorithm == algorithm]
            if sizes or algorithm != "ignore":
                counts[algorithm] = (len(sizes), sum(sizes))
        return counts


def _elements(param: nn.Parameter) -> int:
    return 0 if isinstance(param, nn.parameter.UninitializedParameter) else param.numel()


def _moved(route: Route, names: Sequence[str], param: nn.Parameter) -> Route:
    """The same decision for a parameter at another place."""
    unfrozen = route.unfrozen and _moved(route.unfrozen, names, param)
    return replace(route, name=names[0], aliases=tuple(names[1:]), param=param, unfrozen=unfrozen)


def _same_key(group: Mapping[str, Any], key: Mapping[str, Any]) -> bool:
    # Compared by spelling too: 1 is not True. A tensor is only itself: it may be filled later.
    have = {name: value for name, value in group.items() if name != "params"}
    return have.keys() == key.keys() and all(
        have[name] is value
        or (
            not isinstance(value, Tensor)
            and type(have[name]) is type(value)
            and repr(have[name]) == repr(value)
        )
        for name, value in key.items()
    )


def _cells(route: Route, spell: Callable[[str], str] = str) -> tuple[str, ...]:
    """A row of the table, the names as `spell` writes them."""
    also = f" (also {', '.join(map(spell, route.aliases))})" if route.aliases else ""
    scales = route.scale if isinstance(route.scale, tuple) else (route.scale,)
    return (
        spell(route.name),
        "×".join(map(str, route.shape)) or "scalar",
        route.view or "-",
        route.algorithm,
        "/".join("-" if scale is None else f"{scale:.4g}" for scale in scales),
        "-" if route.algorithm in ("frozen", "ignore") else "yes" if route.decay else "no",
        route.reason + also,
    )


def as_module(model: nn.Module | Mapping[str, nn.Module]) -> nn.Module:
    """The model, or the one that holds the models of a dict.

    Raises:
        TypeError: it is neither.
    """
    if isinstance(model, nn.Module):
        return model
    if not is_models(model):
        raise TypeError(
            f"route() takes an nn.Module or a dict of them by name, got {type(model).__name__}"
        )
    return Models(model)


def is_models(model: object) -> TypeGuard[Mapping[str, nn.Module]]:
    """Whether this is a dict of models by name."""
    return (
        isinstance(model, Mapping)
        and len(model) > 0
        and all(isinstance(k, str) and isinstance(v, nn.Module) for k, v in model.items())
    )


def shape_of(param: nn.Parameter) -> tuple[int, ...]:
    lazy = isinstance(param, nn.parameter.UninitializedParameter)
    return () if lazy else tuple(param.shape)
