"""The one table of options: everything that `Muon`, its param groups, rules and step plans list.

A new option is one row here, an argument of `Muon` of the same name and default, and its use: the
constructor's defaults, the keys of groups, what a `Rule` may say, what `MuonW` passes on, what an
older pickle lacks, what ranks compare, what a plan depends on, what the command line offers and the
table of docs/api/options.md are derived from the rows.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, NamedTuple

from muonkit.newton_schulz.coefficients import DEFAULT_STEPS, KELLER, SCHEDULES, SVD
from muonkit.newton_schulz.dtypes import NS_DTYPES
from muonkit.newton_schulz.forms import FORMS
from muonkit.scale import SCALES, scale_name
from muonkit.selection import SELECTIONS
from muonkit.stages import AFTER, BEFORE, CONSTRAINTS, STAGES, Constraint, Stage, listed

__all__ = [
    "ADAMW",
    "CHOICES",
    "DEFAULTS",
    "FILLS",
    "MUON",
    "OF_ALGORITHM",
    "OPTIONS",
    "OPTION_KEYS",
    "OTHER_NAMES",
    "PLANNING",
    "STRUCTURE",
    "Option",
    "spelled",
    "take_other_names_",
    "unspelled",
]


class Option(NamedTuple):
    """One option.

    Attributes:
        name: of the argument of `Muon`, and of the key in groups.
        default: of the argument.
        owners: the algorithms whose groups have it; none for what only the optimizer has.
        text: what it is, in a line.
        plans: whether a step's plan depends on it.
        fills: the key of AdamW's groups that it is the default of.
        choices: the names that may stand there: the dict itself where one looks them up.
        also: what else may stand there.
        ranks: whether it matters only where several ranks share parameters.
    """

    name: str
    default: Any
    owners: tuple[str, ...]
    text: str
    plans: bool = False
    fills: str | None = None
    choices: Collection[str] = ()
    also: str = ""
    ranks: bool = False


_BOTH, _MUON = ("muon", "adamw"), ("muon",)
_DTYPES = ("auto", *NS_DTYPES)

# In the order of the constructor's arguments.
OPTIONS = (
    Option("lr", 1e-3, _BOTH, "the learning rate, in units of the scale"),
    Option("weight_decay", 0.1, _BOTH, "decoupled decay per unit of lr"),
    Option("momentum", 0.95, _MUON, "weight of the past in the average of gradients"),
    Option("nesterov", True, _MUON, "look ahead by one gradient"),
    Option(
        "ns_coefficients",
        KELLER,
        _MUON,
        "the polynomials of Newton-Schulz",
        plans=True,
        choices=(*SCHEDULES, SVD),
        also="a triple, a tuple of triples, a `Schedule`",
    ),
    Option("eps", 1e-7, _BOTH, "AdamW's; of Muon torch's argument, without effect"),
    Option("ns_steps", DEFAULT_STEPS, _MUON, "iterations", plans=True),
    Option(
        "adjust_lr_fn",
        None,
        _MUON,
        "the scale: a factor on lr by a matrix's shape",
        choices=SCALES,
        also="a function (rows, cols) -> float",
    ),
    Option(
        "ns_form",
        "auto",
        _MUON,
        "in which order the products are taken",
        plans=True,
        choices=("auto", *FORMS),
    ),
    Option("ns_dtype", "auto", _MUON, "dtype of the matrix products", plans=True, choices=_DTYPES),
    Option(
        "momentum_dtype",
        "auto",
        _MUON,
        "dtype that the momentum is kept in",
        plans=True,
        choices=_DTYPES,
    ),
    Option("bytes_in_flight", None, _MUON, "cap on what is computed together", plans=True),
    Option(
        "before",
        (),
        _MUON,
        "what happens to the momentum before it is orthogonalized",
        plans=True,
        choices=BEFORE,
        also="a `Stage`, several in a list",
    ),
    Option(
        "after",
        (),
        _MUON,
        "what happens to the orthogonalized matrix",
        plans=True,
        choices=AFTER,
        also="a `Stage`, several in a list",
    ),
    Option(
        "constraint",
        (),
        _MUON,
        "how large update and weight may be",
        plans=True,
        choices=CONSTRAINTS,
        also="a `Constraint`, several in a list",
    ),
    Option("stage_beta2", None, _MUON, "weight of the past in the average that a stage keeps"),
    Option(
        "fraction",
        1.0,
        _MUON,
        "of the rows of each matrix, how many a step orthogonalizes (Dion2)",
        plans=True,
    ),
    Option(
        "selection",
        "global",
        _MUON,
        "among which rows a fraction is looked for",
        plans=True,
        choices=SELECTIONS,
    ),
    Option(
        "exchange_dtype",
        "auto",
        _MUON,
        "dtype on the way between ranks",
        plans=True,
        choices=("auto", "float32", "bfloat16"),
        ranks=True,
    ),
    Option(
        "replicas",
        "auto",
        _MUON,
        "compute again, or send, along replicated axes",
        plans=True,
        choices=("auto", "recompute", "split"),
        ranks=True,
    ),
    Option("process_group", None, (), "the ranks that have copies of the parameters", ranks=True),
    Option("zero", 0, (), "1 shards the state over these ranks (ZeRO-1)", ranks=True),
    Option(
        "period",
        1,
        _MUON,
        "steps from one whole orthogonalization to the next; each rank's own block between",
        ranks=True,
    ),
    Option("block_lr_factor", 1.0, _MUON, "factor on lr in the steps between", ranks=True),
    Option("maximize", False, _BOTH, "ascend instead of descend"),
    Option("cautious", False, _MUON, "decay only where the update shrinks the weight too"),
    Option(
        "nonfinite",
        "propagate",
        _BOTH,
        "what a gradient that is not finite does",
        choices=("propagate", "skip", "raise"),
    ),
    Option("adamw_lr", None, (), "lr of AdamW's groups", fills="lr"),
    Option("adamw_betas", (0.9, 0.95), (), "betas of AdamW's groups", fills="betas"),
    Option("adamw_eps", 1e-8, (), "eps of AdamW's groups", fills="eps"),
    Option("adamw_wd", None, (), "weight_decay of AdamW's groups", fills="weight_decay"),
)

# How a group's parameters are trained at all: never taken from a state dict, nor from a rule.
STRUCTURE = ("algorithm", "view")

# The defaults that the constructor gives to `torch.optim.Optimizer`.
DEFAULTS = {row.name: row.default for row in OPTIONS if row.owners or row.fills}

# Option -> the names that it accepts, where it is a choice of names.
CHOICES = {row.name: row.choices for row in OPTIONS if row.choices}

# Key of AdamW's groups -> the argument that is its default.
FILLS = {row.fills: row.name for row in OPTIONS if row.fills}

# Options that only one of the two algorithms has.
MUON = tuple(row.name for row in OPTIONS if row.owners == _MUON)
ADAMW = tuple(
    key for key in FILLS if not any(row.name == key and "adamw" in row.owners for row in OPTIONS)
)

OF_ALGORITHM = {
    "muon": tuple(row.name for row in OPTIONS if "muon" in row.owners),
    "adamw": (*(row.name for row in OPTIONS if "adamw" in row.owners), *ADAMW),
}

# All that a group may say, beside its parameters.
OPTION_KEYS = (*STRUCTURE, *OF_ALGORITHM["muon"], *ADAMW)

# Keys of a group that a step's plan depends on.
PLANNING = (*STRUCTURE, *(row.name for row in OPTIONS if row.plans))


def spelled(value: Any) -> Any:
    """An option's value as state dicts, records and the comparison of ranks have it.

    A stage, a constraint or a function becomes its name; every other value stays as it is.
    """
    if isinstance(value, (Stage, Constraint)):
        return value.name
    if isinstance(value, (tuple, list)) and any(isinstance(v, (Stage, Constraint)) for v in value):
        return tuple(spelled(each) for each in value)
    return scale_name(value) if callable(value) else value


def unspelled(group: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """A saved group, with the objects of this optimizer's group where it has their names."""
    objects = {key: value for key, value in own.items() if spelled(value) is not value}
    filled = dict(group)
    for key, value in objects.items():
        if key in STAGES:
            named = {spelled(each): each for each in listed(value)}
            filled[key] = tuple(named.get(each, each) for each in listed(group.get(key)))
        elif group.get(key) == spelled(value):
            filled[key] = value
    return filled


#: Names that are accepted in an option's place, in arguments, groups, rules and state dicts.
OTHER_NAMES = {"variant": "after", "variant_beta2": "stage_beta2"}


def take_other_names_(options: dict[str, Any]) -> None:
    """Give options that are there under another name their own.

    Raises:
        ValueError: one is there under both names.
    """
    for other, name in OTHER_NAMES.items():
        if other not in options:
            continue
        value = options.pop(other)
        if other == "variant" and isinstance(value, str) and value == "plain":
            value = ()
        if name in options and listed(options[name]) != listed(value):
            raise ValueError(
                f"{other}={spelled(value)!r} is another name of {name}, which is given too, as "
                f"{spelled(options[name])!r}: give one of them"
            )
        options[name] = value
