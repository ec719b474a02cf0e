"""Routing: which parameter is trained by what, in which view, and why.

`route(model)` claims every parameter of a model exactly once. Hidden matrices go to Muon;
embeddings, output heads, vectors and what else is no hidden matrix go to AdamW. It judges by module
type and identity first and by names last, prints as a table, and raises where it cannot tell;
a `Rule` settles such a case, and overrides any other.
"""

from __future__ import annotations

import contextlib
import json
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeGuard, overload

import torch.nn as nn
from torch import Tensor

from muonkit._shards import WHOLE, flat_model
from muonkit._text import shown, unknown
from muonkit.options import spelled
from muonkit.routing.judge import Undecided, Verdict, is_vector, judge
from muonkit.routing.places import Models, Site, unwrap
from muonkit.routing.remedies import UNDECIDED, Open, open_message, warning_message
from muonkit.routing.rules import HYPERPARAMETERS, RoutingError, Rule, choose_rules
from muonkit.routing.survey import Survey, survey
from muonkit.scale import ROUTED, SCALES, Scale, check_scale, scale_factor
from muonkit.views import View

__all__ = ["Route", "Routes", "RoutingError", "Rule", "route"]

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
    """The routes of a model, in registration order. `print` it to see the table."""

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
            if same is None or _shape(param) != same.shape:
                raise RoutingError(
                    f"{names[0]} {_shape(param)} of {type(part).__name__} is no parameter of the "
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


def _cells(route: Route) -> tuple[str, ...]:
    also = f" (also {', '.join(route.aliases)})" if route.aliases else ""
    scales = route.scale if isinstance(route.scale, tuple) else (route.scale,)
    return (
        route.name,
        "×".join(map(str, route.shape)) or "scalar",
        route.view or "-",
        route.algorithm,
        "/".join("-" if scale is None else f"{scale:.4g}" for scale in scales),
        "-" if route.algorithm in ("frozen", "ignore") else "yes" if route.decay else "no",
        route.reason + also,
    )


@dataclass(frozen=True)
class _Asked:
    """The arguments of `route` that each parameter's route depends on."""

    scale: str | Scale
    decay_1d: bool
    undecided: str


class _Unsettled(RoutingError):
    """A parameter that nothing decides."""

    def __init__(self, found: Open) -> None:
        super().__init__(found.sentence(found.site.name))
        self.found = found


def route(
    model: nn.Module | Mapping[str, nn.Module],
    rules: Sequence[Rule] | None = (),
    *,
    scale: str | Scale = ROUTED,
    decay_1d: bool = False,
    undecided: str = "raise",
    heads: Iterable[str | nn.Module] | None = None,
) -> Routes:
    """Decide for every parameter of `model` which algorithm trains it, and in which view.

    Args:
        model: any module; `torch.compile`, DistributedDataParallel and the like are looked through.
            Several models come as a dict, whose keys begin their parameters' names.
        rules: overrides; for each parameter the first rule that matches decides.
        scale: the learning-rate scale that the table shows, and that `MuonW` uses: a key of
            `muonkit.scale.SCALES` or a function (rows, cols) -> float; a rule's option
            "adjust_lr_fn" goes before it
            ([all names](options.md#one-thing-several-names): docs/api/options.md).
        decay_1d: decay gains, biases and other vectors too, where no rule decides.
        undecided: what becomes of parameters of which nothing tells whether they are hidden
            matrices, or which matrices: "raise" (one error with all of them and the lines that
            settle them) or "adamw" (AdamW trains them, and a warning names them).
        heads: the output heads, where the search errs: modules, or patterns of their names; of a
            module of several layers the last. [] says that there is none, as in a part of a model;
            for a stage of a pipeline `route(whole).of(stage)` knows it too.

    Raises:
        RoutingError: the model has no parameters, or none that is trainable; parameters that
            cannot be judged, are not initialized, or are flat shards; a rule that decides nothing,
            or whose view does not fit.
        ValueError: no such scale, no such choice for `undecided`, or `heads` has what is no layer
            of the model.

    Warns:
        UserWarning: undecided="adamw", and there are such parameters.
    """
    model = as_module(model)
    if isinstance(heads, str | nn.Module):
        raise TypeError("heads is a list of modules or names: put the one in brackets")
    if callable(scale):
        check_scale(scale)
    elif scale not in SCALES:
        raise ValueError(unknown("scale", scale, SCALES))
    if undecided not in ("raise", "adamw"):
        raise ValueError(unknown("undecided", undecided, ("raise", "adamw")))
    if flat := flat_model(model):
        raise RoutingError(f"{type(model).__name__}: {flat}. {WHOLE}")
    facts = survey(unwrap(model), None if heads is None else list(heads))
    if not facts.params:
        raise RoutingError(f"{type(model).__name__} has no parameters: nothing to optimize")
    if not any(param.requires_grad for param in facts.params.values()):
        raise RoutingError(
            f"all {len(facts.params)} parameters of {type(model).__name__} are frozen: "
            "call requires_grad_(True) on those to train"
        )
    found = _route_all(unwrap(model), facts, rules or (), _Asked(scale, decay_1d, undecided))
    guessed = [r.name for r in found if r.algorithm == "adamw" and r.reason.startswith(UNDECIDED)]
    if guessed:
        warnings.warn(warning_message(guessed), UserWarning, stacklevel=2)
    return found


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


def _route_all(model: nn.Module, facts: Survey, rules: Sequence[Rule], asked: _Asked) -> Routes:
    chosen = choose_rules(facts, rules)
    routes: list[Route] = []
    unsettled: list[Open] = []
    errors: list[str] = []
    for key in facts.params:
        try:
            routes.append(_route_one(facts, key, chosen.get(key), asked))
        except _Unsettled as error:
            unsettled.append(error.found)
        except RoutingError as error:
            errors.append(str(error))
    if errors:
        raise RoutingError("\n".join(errors))
    if unsettled:
        raise RoutingError(open_message(model, unsettled, [r.name for r in routes]))
    if not any(r.algorithm in ("muon", "adamw") for r in routes):
        raise RoutingError(
            f"the rules leave out every trainable parameter of {type(model).__name__}: "
            "nothing to optimize"
        )
    return Routes(routes, asked.scale)


def _route_one(facts: Survey, key: int, rule: Rule | None, asked: _Asked) -> Route:
    if not facts.params[key].requires_grad:
        return _untrained(facts, key, "frozen", _unfrozen(facts, key, rule, asked))
    if rule is not None and rule.algorithm == "ignore":
        return _untrained(facts, key, "ignore", str(rule))
    return _trained(facts, key, rule, asked)


def _unfrozen(facts: Survey, key: int, rule: Rule | None, asked: _Asked) -> Route | None:
    param = facts.params[key]
    left_out = rule is not None and rule.algorithm == "ignore"
    quantized = not (param.is_floating_point() and param.dtype.itemsize >= 2)
    if left_out or (quantized and not param.is_complex()):
        return None
    with contextlib.suppress(RoutingError):
        return _trained(facts, key, rule, asked)
    return None


def _untrained(
    facts: Survey, key: int, algorithm: Literal["frozen", "ignore"], why: Route | str | None
) -> Route:
    """The route of a parameter that stands in the table only, for now or for good."""
    param, sites = facts.params[key], facts.sites[key]
    return Route(
        name=sites[0].name,
        aliases=tuple(site.name for site in sites[1:]),
        shape=_shape(param),
        algorithm=algorithm,
        view=None,
        decay=False,
        scale=None,
        reason=why if isinstance(why, str) else "frozen (requires_grad=False)",
        options={},
        param=param,
        unfrozen=why if isinstance(why, Route) else None,
    )


def _shape(param: nn.Parameter) -> tuple[int, ...]:
    lazy = isinstance(param, nn.parameter.UninitializedParameter)
    return () if lazy else tuple(param.shape)


def _trained(facts: Survey, key: int, rule: Rule | None, asked: _Asked) -> Route:
    param, sites = facts.params[key], facts.sites[key]
    options = dict(rule.options) if rule else {}
    verdict = _verdict(facts, key, rule, asked)
    algorithm: Algorithm = "muon" if verdict.algorithm == "muon" else "adamw"
    foreign = sorted(options.keys() - HYPERPARAMETERS[algorithm])
    if foreign:
        raise RoutingError(
            f"{rule} gives {foreign} to {sites[0].name}, which {algorithm} trains and has "
            f"{', '.join(sorted(HYPERPARAMETERS[algorithm]))}; make the rule match less"
        )
    decay = verdict.decay or (asked.decay_1d and rule is None and algorithm == "adamw")
    if not decay:  # how much the others decay
        options.pop("weight_decay", None)
    return Route(
        name=sites[0].name,
        aliases=tuple(site.name for site in sites[1:]),
        shape=_shape(param),
        algorithm=algorithm,
        view=verdict.view,
        decay=decay,
        scale=_scale(verdict, param, options.get("adjust_lr_fn", asked.scale)),
        reason=verdict.reason,
        options=options,
        param=param,
    )


def _verdict(facts: Survey, key: int, rule: Rule | None, asked: _Asked) -> Verdict:
    param, sites = facts.params[key], facts.sites[key]
    judged: Verdict | None
    try:
        judged = judge(sites, param, facts)
    except Undecided as error:
        judged = None
        settled = rule is not None and (rule.algorithm is not None or rule.view is not None)
        if not settled and asked.undecided == "adamw" and not error.final:
            judged = Verdict("adamw", None, not is_vector(param), f"{UNDECIDED}{error}")
        elif error.final or not settled:
            raise _Unsettled(Open(sites[0], param, error)) from error
    if rule is None:
        assert judged is not None
        return judged
    if judged is not None and rule.algorithm == "muon" and judged.view is None:
        with contextlib.suppress(Undecided):
            judged = replace(judged, view=judge(sites, param, facts, hidden=True).view)
    return _overridden(sites[0], param, judged, rule)


def _overridden(site: Site, param: nn.Parameter, judged: Verdict | None, rule: Rule) -> Verdict:
    """The judged verdict with what the rule says laid over it."""
    algorithm = rule.algorithm or ("muon" if rule.view else None)
    decay = judged.decay if judged else not is_vector(param)
    view = judged.view if judged else None
    if algorithm == "adamw":
        view = None
    elif algorithm == "muon":
        view = (str(rule.view) if rule.view else view) or ("matrix" if param.ndim == 2 else None)
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
