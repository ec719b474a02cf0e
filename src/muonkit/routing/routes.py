"""Routing: which parameter is trained by what, in which view, and why.

`route(model)` claims every parameter of a model exactly once. Hidden matrices go to Muon;
embeddings, output heads, vectors and what else is no hidden matrix go to AdamW. It judges by module
type and identity first and by names last, prints as a table, and raises where it cannot tell;
a `Rule` settles such a case, and overrides any other.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch.nn as nn

from muonkit._shards import WHOLE, flat_model, unsharded_part
from muonkit._text import unknown
from muonkit.routing.judge import Undecided, Verdict, is_vector, judge
from muonkit.routing.places import Site, unwrap
from muonkit.routing.remedies import (
    UNDECIDED,
    Open,
    heads_message,
    open_message,
    warning_message,
)
from muonkit.routing.rules import (
    HYPERPARAMETERS,
    RoutingError,
    Rule,
    RuleMisfitError,
    choose_rules,
    misfits_message,
)
from muonkit.routing.survey import Survey, survey
from muonkit.routing.table import Algorithm, Route, Routes, as_module, shape_of
from muonkit.scale import ROUTED, SCALES, Scale, check_scale, scale_factor
from muonkit.views import View

if TYPE_CHECKING:
    from muonkit.routing.attention import HeadView
    from muonkit.routing.verdicts import UnknownHeads

__all__ = ["Route", "Routes", "RoutingError", "Rule", "route"]


@dataclass(frozen=True)
class _Asked:
    """The arguments of `route` that each parameter's route depends on."""

    scale: str | Scale
    decay_1d: bool
    undecided: str
    head_views: Mapping[int, HeadView]  # of attention's weights, where each head is a matrix
    unknown_heads: Mapping[int, UnknownHeads]


class _NoHeads(RoutingError):
    """A weight of attention whose heads cannot be told."""

    def __init__(self, name: str, found: UnknownHeads) -> None:
        super().__init__(f"{name}: {found.why}")
        self.name, self.found = name, found


class _Unsettled(RoutingError):
    """A parameter that nothing decides."""

    def __init__(self, found: Open) -> None:
        super().__init__(found.sentence(found.site.name))
        self.found = found


def route(
    model: nn.Module | Mapping[str, nn.Module],
    rules: Rule | Sequence[Rule] | None = (),
    *,
    scale: str | Scale = ROUTED,
    decay_1d: bool = False,
    undecided: str = "raise",
    heads: Iterable[str | nn.Module] | None = None,
    per_head: bool = False,
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
        per_head: make every attention head a matrix of its own: of q, k and v (fused or apart) by
            rows, of the output projection by columns; in multi-head latent attention the rotated
            part of a head and the other are two. The heads are counted by the attention module or
            by its config. A rule's view goes before it.

    Raises:
        RoutingError: the model has no parameters, or none that is trainable; parameters that
            cannot be judged, are not initialized, are shards that do not know their place (FSDP1's
            or DeepSpeed's, plain tensors of tensor parallelism), or are whole for now (FSDP2's
            after a forward); a rule that decides nothing, or whose view does not fit; per_head
            where nothing tells the heads.
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
    if unsharded := unsharded_part(model):
        raise RoutingError(f"{type(model).__name__}: {unsharded}")
    facts = survey(unwrap(model), None if heads is None else list(heads))
    if not facts.params:
        raise RoutingError(f"{type(model).__name__} has no parameters: nothing to optimize")
    if not any(param.requires_grad for param in facts.params.values()):
        raise RoutingError(
            f"all {len(facts.params)} parameters of {type(model).__name__} are frozen: "
            "call requires_grad_(True) on those to train"
        )
    head_views, unknown_heads = _head_views(unwrap(model), facts) if per_head else ({}, {})
    asked = _Asked(scale, decay_1d, undecided, head_views, unknown_heads)
    found = _route_all(unwrap(model), facts, rules or (), asked)
    guessed = [r.name for r in found if r.algorithm == "adamw" and r.reason.startswith(UNDECIDED)]
    if guessed:
        warnings.warn(warning_message(guessed), UserWarning, stacklevel=2)
    return found


def _head_views(
    model: nn.Module, facts: Survey
) -> tuple[dict[int, HeadView], dict[int, UnknownHeads]]:
    """How per_head=True cuts the weights of attention, and those that it cannot cut."""
    from muonkit.routing.attention import find_attention  # few ask for it

    _, views, unknown = find_attention(facts)
    if not views and not unknown:
        raise RoutingError(
            f"per_head=True, but no attention was found in {type(model).__name__}: by its names "
            "nothing makes queries, keys and values. Leave per_head out, or cut heads by hand: "
            "Rule(name, view='split(rows=HEADS)'), and view='split(cols=HEADS)' for what takes "
            "their outputs"
        )
    return views, unknown


def _route_all(
    model: nn.Module, facts: Survey, rules: Rule | Sequence[Rule], asked: _Asked
) -> Routes:
    chosen = choose_rules(facts, rules)
    routes: list[Route] = []
    unsettled: list[Open] = []
    misfits: list[RuleMisfitError] = []
    headless: list[_NoHeads] = []
    errors: list[str] = []
    for key in facts.params:
        try:
            routes.append(_route_one(facts, key, chosen.get(key), asked))
        except _Unsettled as error:
            unsettled.append(error.found)
        except RuleMisfitError as error:
            misfits.append(error)
        except _NoHeads as error:
            headless.append(error)
        except RoutingError as error:
            errors.append(str(error))
    if misfits:
        errors.append(misfits_message(misfits))
    if headless:
        errors.append(heads_message({error.name: error.found for error in headless}))
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
        shape=shape_of(param),
        algorithm=algorithm,
        view=None,
        decay=False,
        scale=None,
        reason=why if isinstance(why, str) else "frozen (requires_grad=False)",
        options={},
        param=param,
        unfrozen=why if isinstance(why, Route) else None,
    )


def _trained(facts: Survey, key: int, rule: Rule | None, asked: _Asked) -> Route:
    param, sites = facts.params[key], facts.sites[key]
    options = dict(rule.options) if rule else {}
    verdict = _verdict(facts, key, rule, asked)
    algorithm: Algorithm = "muon" if verdict.algorithm == "muon" else "adamw"
    foreign = sorted(options.keys() - HYPERPARAMETERS[algorithm])
    if foreign:
        known = ", ".join(sorted(HYPERPARAMETERS[algorithm]))
        raise RuleMisfitError(
            f"{rule} gives {foreign} to",
            sites[0].name,
            f", which {algorithm} trains and has {known}; make the rule match less",
        )
    decay = verdict.decay or (asked.decay_1d and rule is None and algorithm == "adamw")
    if not decay:  # how much the others decay
        options.pop("weight_decay", None)
    return Route(
        name=sites[0].name,
        aliases=tuple(site.name for site in sites[1:]),
        shape=shape_of(param),
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
    if judged is not None and rule is not None and rule.algorithm == "muon" and not judged.view:
        with contextlib.suppress(Undecided):
            judged = replace(judged, view=judge(sites, param, facts, hidden=True).view)
    if judged is not None and not (rule and (rule.view or rule.algorithm == "adamw")):
        judged = _with_heads(judged, sites[0].name, key, asked)
    if rule is None:
        assert judged is not None
        return judged
    return _overridden(sites[0], param, judged, rule)


def _with_heads(verdict: Verdict, name: str, key: int, asked: _Asked) -> Verdict:
    """The verdict with every head a matrix, where that was asked for."""
    if verdict.view is None:
        return verdict
    if key in asked.unknown_heads:
        raise _NoHeads(name, asked.unknown_heads[key])
    cut = asked.head_views.get(key)
    if cut is None:
        return verdict
    return replace(verdict, view=cut.within(verdict.view), reason=f"per head: {cut.reason}")


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
            raise RuleMisfitError(f"{rule} sends", site.name, _no_view(param))
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
            raise RuleMisfitError(f"{rule} on", site.name, f": {error}") from error
    return verdict


def _no_view(param: nn.Parameter) -> str:
    at = f" {tuple(param.shape)} to Muon"
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
