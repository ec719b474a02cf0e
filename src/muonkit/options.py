"""The one table of options: everything that `Muon`, its param groups, rules and step plans list.

A new option is one row here, an argument of `Muon` of the same name and default, and its use: the
constructor's defaults, the keys of groups, what a `Rule` may say, what `MuonW` passes on, what an
older pickle lacks, what ranks compare, what a plan depends on and the table of
docs/api/options.md are derived from the rows.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from muonkit.newton_schulz.coefficients import DEFAULT_STEPS, KELLER

__all__ = [
    "ADAMW",
    "DEFAULTS",
    "FILLS",
    "MUON",
    "OF_ALGORITHM",
    "OPTIONS",
    "OPTION_KEYS",
    "PLANNING",
    "STRUCTURE",
    "Option",
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
    """

    name: str
    default: Any
    owners: tuple[str, ...]
    text: str
    plans: bool = False
    fills: str | None = None


_BOTH, _MUON = ("muon", "adamw"), ("muon",)

# In the order of the constructor's arguments.
OPTIONS = (
    Option("lr", 1e-3, _BOTH, "the learning rate, in units of the scale"),
    Option("weight_decay", 0.1, _BOTH, "decoupled decay per unit of lr"),
    Option("momentum", 0.95, _MUON, "weight of the past in the average of gradients"),
    Option("nesterov", True, _MUON, "look ahead by one gradient"),
    Option("ns_coefficients", KELLER, _MUON, "the polynomials of Newton-Schulz", plans=True),
    Option("eps", 1e-7, _BOTH, "AdamW's; of Muon torch's argument, without effect"),
    Option("ns_steps", DEFAULT_STEPS, _MUON, "iterations", plans=True),
    Option("adjust_lr_fn", None, _MUON, "the scale: a factor on lr by a matrix's shape"),
    Option("ns_form", "auto", _MUON, "in which order the products are taken", plans=True),
    Option("ns_dtype", "auto", _MUON, "dtype of the matrix products", plans=True),
    Option("momentum_dtype", "auto", _MUON, "dtype that the momentum is kept in", plans=True),
    Option("bytes_in_flight", None, _MUON, "cap on what is computed together", plans=True),
    Option("variant", "plain", _MUON, "what happens to the orthogonalized matrix", plans=True),
    Option("variant_beta2", None, _MUON, "weight of the past in the variant's average"),
    Option("exchange_dtype", "auto", _MUON, "dtype on the way between ranks", plans=True),
    Option("replicas", "auto", _MUON, "compute again, or send, along replicated axes", plans=True),
    Option("process_group", None, (), "the ranks that have copies of the parameters"),
    Option("zero", 0, (), "1 shares the state out over these ranks"),
    Option("maximize", False, _BOTH, "ascend instead of descend"),
    Option("cautious", False, _MUON, "decay only where the update shrinks the weight too"),
    Option("nonfinite", "propagate", _BOTH, "what a gradient that is not finite does"),
    Option("adamw_lr", None, (), "lr of AdamW's groups", fills="lr"),
    Option("adamw_betas", (0.9, 0.95), (), "betas of AdamW's groups", fills="betas"),
    Option("adamw_eps", 1e-8, (), "eps of AdamW's groups", fills="eps"),
    Option("adamw_wd", None, (), "weight_decay of AdamW's groups", fills="weight_decay"),
)

# How a group's parameters are trained at all: never taken from a state dict, nor from a rule.
STRUCTURE = ("algorithm", "view")

# What the constructor gives `torch.optim.Optimizer` as defaults.
DEFAULTS = {row.name: row.default for row in OPTIONS if row.owners or row.fills}

# Key of AdamW's groups -> the argument that is its default.
FILLS = {row.fills: row.name for row in OPTIONS if row.fills}

# Of one algorithm alone.
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

# What of a group a step's plan depends on.
PLANNING = (*STRUCTURE, *(row.name for row in OPTIONS if row.plans))
