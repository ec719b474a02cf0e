"""Rules: what a user says of parameters, laid over what routing judges."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import torch.nn as nn

from muonkit._text import shown, unknown
from muonkit.options import OF_ALGORITHM, take_other_names_
from muonkit.routing.remedies import unmatched_message
from muonkit.views import View

if TYPE_CHECKING:
    from muonkit.routing.survey import Survey

__all__ = [
    "HYPERPARAMETERS",
    "RoutingError",
    "Rule",
    "RuleMisfitError",
    "choose_rules",
    "misfits_message",
]

Predicate = Callable[[str, nn.Parameter, nn.Module], bool]

_RESERVED = frozenset({"params", "algorithm", "view", "decay"})
HYPERPARAMETERS = {algorithm: frozenset(keys) for algorithm, keys in OF_ALGORITHM.items()}
_OPTIONS = HYPERPARAMETERS["muon"] | HYPERPARAMETERS["adamw"]


class RoutingError(ValueError):
    """A model or a rule that cannot be routed; the message names the parameter and the remedy."""


class RuleMisfitError(RoutingError):
    """A rule that does not fit a parameter: one that fits none of many is told once."""

    def __init__(self, before: str, name: str, after: str) -> None:
        super().__init__(f"{before} {name}{after}")
        self.parts, self.name = (before, after), name


def misfits_message(errors: Sequence[RuleMisfitError]) -> str:
    """A line for each reason, with the parameters that share it."""
    names: dict[tuple[str, str], list[str]] = {}
    for error in errors:
        names.setdefault(error.parts, []).append(error.name)
    return "\n".join(
        f"{before} {_listed(found)}{after}" for (before, after), found in names.items()
    )


def _listed(names: Sequence[str]) -> str:
    if len(names) > 4:
        return f"{', '.join(map(shown, names[:3]))} and {len(names) - 3} others"
    return ", ".join(map(shown, names))


@dataclass(frozen=True)
class Rule:
    """An override: parameters that `match` get what is given here; the rest stays as judged.

    Args:
        match: a name pattern (`"*.experts.*"`, as in fnmatch, case matters), a compiled regular
            expression (`search`ed in the name), a module class (the parameters its instances own
            directly), or a predicate `(name, parameter, owning module) -> bool`. A tied parameter
            matches by any of its names.
        algorithm: "muon", "adamw", or "ignore": no algorithm of this optimizer trains them, it does
            not hold them, and its state dicts are whole without them (codebooks with updates of
            their own, what another optimizer trains). To freeze, call `requires_grad_(False)`.
        view: a view (`muonkit.View`, or its spelling); implies algorithm="muon".
        decay: whether weight decay applies; "weight_decay" among the options says how much
            ([all names](options.md#one-thing-several-names): docs/api/options.md).
        options: param group hyperparameters, such as {"lr": 1e-4}: any option of its algorithm.
            "weight_decay" is for those of its parameters that decay: gains and biases do not,
            unless decay=True.

    Raises:
        RoutingError: the rule overrides nothing, or contradicts itself.
        TypeError: `match` is none of the four kinds.
    """

    match: str | re.Pattern[str] | type[nn.Module] | Predicate
    algorithm: Literal["muon", "adamw", "ignore"] | None = None
    view: str | View | None = None
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
        if self.algorithm not in (None, "muon", "adamw", "ignore"):
            freeze = "; to freeze a parameter call requires_grad_(False)"
            told = unknown("algorithm", self.algorithm, ("muon", "adamw", "ignore"), freeze)
            raise RoutingError(f"{self}: {told}")
        if self.algorithm == "ignore" and (self.view or self.decay is not None or self.options):
            raise RoutingError(
                f"{self} leaves its parameters out, and says how they are trained: drop "
                "algorithm='ignore', or view, decay and options"
            )
        if isinstance(self.view, View):
            object.__setattr__(self, "view", str(self.view))
        if self.view is not None:
            if self.algorithm == "adamw":
                raise RoutingError(
                    f"{self} gives a view to AdamW, which has none: drop one of them"
                )
            try:
                View.parse(self.view)
            except ValueError as error:
                raise RoutingError(f"{self}: {error}") from error
        options = dict(self.options)
        try:
            take_other_names_(options)
        except ValueError as error:
            raise RoutingError(f"{self}: {error}") from error
        object.__setattr__(self, "options", options)
        foreign = sorted(self.options.keys() - _OPTIONS - _RESERVED)
        if foreign:
            raise RoutingError(f"{self}: {unknown('option', foreign[0], sorted(_OPTIONS))}")
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


def choose_rules(facts: Survey, rules: Rule | Sequence[Rule]) -> dict[int, Rule]:
    """The deciding rule of every parameter that has one; every rule has to decide something."""
    chosen: dict[int, Rule] = {}
    if isinstance(rules, Rule):
        rules = [rules]
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
            raise RoutingError(unmatched_message(rule, rule.match, names))
        if chosen.keys() >= set(matched):
            deciding = {id(chosen[key]): chosen[key] for key in matched}
            raise RoutingError(
                f"{rule} (number {position + 1}) never decides: earlier rules match all of its "
                f"{len(matched)} parameters ({', '.join(map(str, deciding.values()))}); put the "
                "special rule first, or make one rule of those that match the same"
            )
        for key in matched:
            chosen.setdefault(key, rule)
    return chosen
