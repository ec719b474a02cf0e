"""Routing: which parameter is trained by what, in which view, and why.

`route(model)` claims every parameter of a model exactly once. Hidden matrices go to Muon;
embeddings, output heads, vectors and what else is no hidden matrix go to AdamW. It judges by module
type and identity first and by names last, prints as a table, and raises where it cannot tell;
a `Rule` settles such a case, and overrides any other.
"""

from __future__ import annotations

import contextlib
import fnmatch
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, overload

import torch.nn as nn
from torch import Tensor

from muonkit._routing_judge import Undecided, Verdict, is_vector, judge
from muonkit._routing_places import Site, unwrap
from muonkit._routing_survey import Survey, survey
from muonkit._shards import WHOLE, flat_model
from muonkit._text import shown
from muonkit.options import OF_ALGORITHM
from muonkit.scale import SCALES, scale_factor
from muonkit.views import View

__all__ = ["Route", "Routes", "RoutingError", "Rule", "route"]

Algorithm = Literal["muon", "adamw", "frozen"]
Predicate = Callable[[str, nn.Parameter, nn.Module], bool]

_RESERVED = frozenset({"params", "algorithm", "view", "decay"})
_HYPERPARAMETERS = {algorithm: frozenset(keys) for algorithm, keys in OF_ALGORITHM.items()}
_OPTIONS = _HYPERPARAMETERS["muon"] | _HYPERPARAMETERS["adamw"]
_COLUMNS = ("name", "shape", "view", "algorithm", "scale", "decay", "reason")


class RoutingError(ValueError):
    """A model or a rule that cannot be routed; the message names the parameter and the remedy."""


@dataclass(frozen=True)
class Route:
    """What one parameter gets.

    Attributes:
        name: the dotted name, without what torch.compile, DDP and FSDP put in front.
        aliases: the other names of the same tensor, if it is tied or shared.
        shape: the parameter's shape, as stored.
        algorithm: "muon", "adamw", or "frozen" (requires_grad is False).
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


@dataclass(frozen=True)
class Rule:
    """An override: parameters that `match` get what is given here; the rest stays as judged.

    Args:
        match: a name pattern (`"*.experts.*"`, as in fnmatch, case matters), a compiled regular
            expression (`search`ed in the name), a module class (the parameters its instances own
            directly), or a predicate `(name, parameter, owning module) -> bool`. A tied parameter
            matches by any of its names.
        algorithm: "muon" or "adamw". To freeze, call `requires_grad_(False)` instead.
        view: a view; implies algorithm="muon".
        decay: whether weight decay applies.
        options: param group hyperparameters, such as {"lr": 1e-4}: any option of its algorithm.
            "weight_decay" is for those of its parameters that decay: gains and biases do not,
            unless decay=True.

    Raises:
        RoutingError: the rule overrides nothing, or contradicts itself.
        TypeError: `match` is none of the four kinds.
    """

    match: str | re.Pattern[str] | type[nn.Module] | Predicate
    algorithm: Literal["muon", "adamw"] | None = None
    view: str | None = None
    decay: bool | None = None
    options: Mapping[str, object] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        if not isinstance(self.match, (str, re.Pattern)) and not callable(self.match):
            raise TypeError(
                f"Rule.match is a name pattern, a compiled regular expression, a module class or a "
                f"predicate; got {type(self.match).__name__}"
            )
        if isinstance(self.match, type) and not issubclass(self.match, nn.Module):
            raise TypeError(f"Rule.match: {self.match.__name__} is no nn.Module class")
        if self.algorithm not in (None, "muon", "adamw"):
            raise RoutingError(
                f"{self} has algorithm={self.algorithm!r}, expected 'muon' or 'adamw'; "
                "to freeze a parameter call requires_grad_(False)"
            )
        if self.view is not None:
            if self.algorithm == "adamw":
                raise RoutingError(
                    f"{self} gives a view to AdamW, which has none: drop one of them"
                )
            try:
                View.parse(self.view)
            except ValueError as error:
                raise RoutingError(f"{self}: {error}") from error
        unknown = sorted(self.options.keys() - _OPTIONS - _RESERVED)
        if unknown:
            raise RoutingError(
                f"{self} has options {unknown}, which no param group has; they are "
                f"{', '.join(sorted(_OPTIONS))}"
            )
        reserved = sorted(_RESERVED.intersection(self.options))
        if reserved:
            raise RoutingError(
                f"{self} has options {reserved}, which routing sets; give them as Rule arguments"
            )
        if self.decay is False and "weight_decay" in self.options:
            raise RoutingError(
                f"{self} says decay=False and weight_decay={self.options['weight_decay']!r}; give "
                "one of them"
            )
        if (self.algorithm, self.view, self.decay) == (None, None, None) and not self.options:
            raise RoutingError(f"{self} overrides nothing: give algorithm, view, decay or options")

    def __str__(self) -> str:
        return f"Rule({_spell(self.match)})"

    def matches(self, name: str, param: nn.Parameter, owner: nn.Module) -> bool:
        """Whether the parameter that `owner` registers under the clean `name` is meant."""
        if isinstance(self.match, str):
            return fnmatch.fnmatchcase(name, self.match)
        if isinstance(self.match, re.Pattern):
            return self.match.search(name) is not None
        if isinstance(self.match, type):
            return isinstance(owner, self.match)
        return bool(self.match(name, param, owner))


def _spell(match: object) -> str:
    if isinstance(match, re.Pattern):
        return f"re {match.pattern!r}"
    return repr(match) if isinstance(match, str) else str(getattr(match, "__name__", match))


class Routes(Sequence[Route]):
    """The routes of a model, in registration order. `print` it to see the table."""

    def __init__(self, routes: Sequence[Route], scale: str = "match_rms_adamw") -> None:
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
        """The table, one parameter a line, and the counts as its last line."""
        rows = [_COLUMNS, *(tuple(map(shown, _cells(route))) for route in self)]
        widths = [max(len(row[i]) for row in rows) for i in range(len(_COLUMNS))]
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
                "options": dict(r.options),
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
            if r is None:
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

    def _counts(self) -> dict[str, tuple[int, int]]:
        counts = {}
        for algorithm in ("muon", "adamw", "frozen"):
            sizes = [r.param.numel() for r in self if r.algorithm == algorithm]
            counts[algorithm] = (len(sizes), sum(sizes))
        return counts


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


def _cells(route: Route) -> tuple[str, ...]:
    also = f" (also {', '.join(route.aliases)})" if route.aliases else ""
    scales = route.scale if isinstance(route.scale, tuple) else (route.scale,)
    return (
        route.name,
        "×".join(map(str, route.shape)) or "scalar",
        route.view or "-",
        route.algorithm,
        "/".join("-" if scale is None else f"{scale:.4g}" for scale in scales),
        "-" if route.algorithm == "frozen" else "yes" if route.decay else "no",
        route.reason + also,
    )


def route(
    model: nn.Module,
    rules: Sequence[Rule] = (),
    *,
    scale: str = "match_rms_adamw",
    decay_1d: bool = False,
) -> Routes:
    """Decide for every parameter of `model` which algorithm trains it, and in which view.

    Args:
        model: any module; `torch.compile`, DistributedDataParallel and the like are looked through.
        rules: overrides; for each parameter the first rule that matches decides.
        scale: the name of the learning-rate scale that the table shows (a key of
            `muonkit.scale.SCALES`), and that `MuonW` uses; a rule's option "adjust_lr_fn" goes
            before it.
        decay_1d: decay gains, biases and other vectors too, where no rule decides.

    Raises:
        RoutingError: the model has no parameters, or none that is trainable; a parameter that
            cannot be judged, or is a flat shard of one; a rule that decides nothing, or whose view
            does not fit.
        ValueError: no such scale.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"route() takes an nn.Module, got {type(model).__name__}")
    if scale not in SCALES:
        raise ValueError(f"unknown scale {scale!r}; one of {', '.join(map(repr, SCALES))}")
    if flat := flat_model(model):
        raise RoutingError(f"{type(model).__name__}: {flat}. {WHOLE}")
    facts = survey(unwrap(model))
    if not facts.params:
        raise RoutingError(f"{type(model).__name__} has no parameters: nothing to optimize")
    if not any(param.requires_grad for param in facts.params.values()):
        raise RoutingError(
            f"all {len(facts.params)} parameters of {type(model).__name__} are frozen: "
            "call requires_grad_(True) on those to train"
        )
    chosen = _choose_rules(facts, rules)
    routes, errors = [], []
    for key in facts.params:
        try:
            routes.append(_route_one(facts, key, chosen.get(key), scale, decay_1d))
        except RoutingError as error:
            errors.append(error)
    if errors:
        more = f" ({len(errors) - 1} more like it)" if len(errors) > 1 else ""
        raise RoutingError(f"{errors[0]}{more}") from errors[0]
    return Routes(routes, scale)


def _choose_rules(facts: Survey, rules: Sequence[Rule]) -> dict[int, Rule]:
    """The deciding rule of every parameter that has one; every rule has to decide something."""
    chosen: dict[int, Rule] = {}
    if isinstance(rules, Rule):
        raise TypeError("rules is a sequence of rules: put the one in brackets")
    for position, rule in enumerate(rules):
        if not isinstance(rule, Rule):
            raise TypeError(f"rules are muonkit.Rule objects, got {type(rule).__name__}")
        matched = [
            key
            for key, sites in facts.sites.items()
            if any(rule.matches(site.name, facts.params[key], site.owner) for site in sites)
        ]
        if not matched:
            names = [sites[0].name for sites in facts.sites.values()]
            raise RoutingError(
                f"{rule} matches no parameter; the names are {', '.join(names[:5])}"
                f"{', …' if len(names) > 5 else ''} (print(route(model)) shows them all)"
            )
        if chosen.keys() >= set(matched):
            raise RoutingError(
                f"{rule} (number {position + 1}) never decides: earlier rules match all of its "
                f"{len(matched)} parameters; put the special rule first"
            )
        for key in matched:
            chosen.setdefault(key, rule)
    return chosen


def _route_one(facts: Survey, key: int, rule: Rule | None, scale: str, decay_1d: bool) -> Route:
    if not facts.params[key].requires_grad:
        return _frozen(facts, key, rule, scale, decay_1d)
    return _trained(facts, key, rule, scale, decay_1d)


def _frozen(facts: Survey, key: int, rule: Rule | None, scale: str, decay_1d: bool) -> Route:
    param, sites = facts.params[key], facts.sites[key]
    unfrozen = None
    if param.is_floating_point() and param.dtype.itemsize >= 2:  # others are quantized
        with contextlib.suppress(RoutingError):
            unfrozen = _trained(facts, key, rule, scale, decay_1d)
    lazy = isinstance(param, nn.parameter.UninitializedParameter)
    return Route(
        name=sites[0].name,
        aliases=tuple(site.name for site in sites[1:]),
        shape=() if lazy else tuple(param.shape),
        algorithm="frozen",
        view=None,
        decay=False,
        scale=None,
        reason="frozen (requires_grad=False)",
        options={},
        param=param,
        unfrozen=unfrozen,
    )


def _trained(facts: Survey, key: int, rule: Rule | None, scale: str, decay_1d: bool) -> Route:
    param, sites = facts.params[key], facts.sites[key]
    options = dict(rule.options) if rule else {}
    verdict = _verdict(facts, key, rule)
    algorithm: Algorithm = "muon" if verdict.algorithm == "muon" else "adamw"
    foreign = sorted(options.keys() - _HYPERPARAMETERS[algorithm])
    if foreign:
        raise RoutingError(
            f"{rule} gives {foreign} to {sites[0].name}, which {algorithm} trains and has "
            f"{', '.join(sorted(_HYPERPARAMETERS[algorithm]))}; make the rule match less"
        )
    decay = verdict.decay or (decay_1d and rule is None and algorithm == "adamw")
    if not decay:  # how much the others decay
        options.pop("weight_decay", None)
    lazy = isinstance(param, nn.parameter.UninitializedParameter)
    return Route(
        name=sites[0].name,
        aliases=tuple(site.name for site in sites[1:]),
        shape=() if lazy else tuple(param.shape),
        algorithm=algorithm,
        view=verdict.view,
        decay=decay,
        scale=_scale(verdict, param, options.get("adjust_lr_fn", scale)),
        reason=verdict.reason,
        options=options,
        param=param,
    )


def _verdict(facts: Survey, key: int, rule: Rule | None) -> Verdict:
    param, sites = facts.params[key], facts.sites[key]
    judged: Verdict | None
    try:
        judged = judge(sites, param, facts)
    except Undecided as error:
        judged = None
        lazy = isinstance(param, nn.parameter.UninitializedParameter)
        if lazy or rule is None or (rule.algorithm is None and rule.view is None):
            raise RoutingError(_undecided(sites[0], param, error)) from error
    if rule is None:
        assert judged is not None
        return judged
    if judged is not None and rule.algorithm == "muon" and judged.view is None:
        with contextlib.suppress(Undecided):
            judged = replace(judged, view=judge(sites, param, facts, hidden=True).view)
    return _overridden(sites[0], param, judged, rule)


def _undecided(site: Site, param: nn.Parameter, error: Undecided) -> str:
    if isinstance(param, nn.parameter.UninitializedParameter):
        return f"{site.name} of {site.owner_class} {error}"
    if param.ndim < 2:
        return f"{site.name} {tuple(param.shape)} of {site.owner_class} {error}"
    views = "view='split(rows=a+b+...)'"
    if param.ndim > 2:
        views = "view='experts' if its last two are, view='flatten' if its first is the outputs"
    return (
        f"cannot route {site.name} {tuple(param.shape)} of {site.owner_class}: {error}. "
        f"Settle it with Rule({site.name!r}, ...): {views}, or algorithm='adamw'"
    )


def _overridden(site: Site, param: nn.Parameter, judged: Verdict | None, rule: Rule) -> Verdict:
    """The judged verdict with what the rule says laid over it."""
    algorithm = rule.algorithm or ("muon" if rule.view else None)
    decay = judged.decay if judged else not is_vector(param)
    view = judged.view if judged else None
    if algorithm == "adamw":
        view = None
    elif algorithm == "muon":
        view = rule.view or view or ("matrix" if param.ndim == 2 else None)
        if view is None:
            raise RoutingError(_no_view(site, param, rule))
    verdict = Verdict(
        algorithm or (judged.algorithm if judged else "adamw"),
        view,
        decay if rule.decay is None else rule.decay,
        f"{rule}" + (f"; {judged.reason}" if judged else ""),
    )
    if verdict.view is not None:
        try:
            View.parse(verdict.view).blocks(param.shape)
        except ValueError as error:
            raise RoutingError(f"{rule} on {site.name}: {error}") from error
    return verdict


def _no_view(site: Site, param: nn.Parameter, rule: Rule) -> str:
    at = f"{rule} sends {site.name} {tuple(param.shape)} to Muon"
    if param.ndim < 2:
        return f"{at}, but a {param.ndim}-D parameter is no matrix: use algorithm='adamw'"
    return (
        f"{at}, which needs a view of its {param.ndim} dimensions: 'flatten', 'experts', "
        "each optionally with ' > transpose' or ' > split(rows=...)'"
    )


def _scale(verdict: Verdict, param: nn.Parameter, name: Any) -> float | tuple[float, ...] | None:
    """The factor on lr of every matrix: one number where all agree."""
    if verdict.view is None:
        return None
    blocks = View.parse(verdict.view).blocks(param.shape)
    factors = tuple(scale_factor(name, block.rows, block.cols) for block in blocks)
    return factors[0] if len(set(factors)) == 1 else factors
