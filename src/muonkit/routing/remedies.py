"""What routing says where it cannot decide: every parameter concerned, and the line to write."""

from __future__ import annotations

import difflib
import glob
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from muonkit._text import shown
from muonkit.routing.places import starred

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from muonkit.routing.places import Site
    from muonkit.routing.verdicts import Undecided, UnknownHeads

__all__ = [
    "UNDECIDED",
    "Open",
    "heads_message",
    "open_message",
    "unmatched_message",
    "warning_message",
]

# How the reason begins where AdamW trains a parameter because nothing decides about it.
UNDECIDED = "undecided: "

# Where more are open than this, those that differ in an index only are told on one line.
_MOST_LINES = 20

_VIEWS = {
    2: "view='matrix' if it is a layer's weight, view='split(rows=a+b+...)' if it fuses several",
    3: "view='experts' if its last two dimensions are matrices (out × in; 'experts > transpose': "
    "in × out), view='flatten' if its first is the outputs of a layer, view='flatten > transpose' "
    "if its first is the inputs",
}


@dataclass(frozen=True)
class Open:
    """A parameter that nothing decides: where it stands, and why not."""

    site: Site
    param: nn.Parameter
    error: Undecided

    @property
    def shape(self) -> str:
        lazy = isinstance(self.param, nn.parameter.UninitializedParameter)
        return "" if lazy else f" {tuple(self.param.shape)}"

    def sentence(self, name: str) -> str:
        """What is unknown about the parameter, or about all that the pattern `name` stands for."""
        joint = "" if self.error.final else ":"
        return f"{shown(name)}{self.shape} of {self.site.owner_class}{joint} {self.error}"


def open_message(model: nn.Module, found: Sequence[Open], others: Sequence[str]) -> str:
    """All that is open in one text, with the lines that settle it.

    Args:
        others: the names of the parameters that are decided, which no rule offered may match.
    """
    kinds = _kinds(found, others)
    count = f"{len(found)} of the {len(found) + len(others)} parameters of {type(model).__name__}"
    lines = [f"cannot route {count}:"]
    for pattern, first, times in kinds:
        lines.append(f"  {first.sentence(pattern)}" + (f" ({times} such)" if times > 1 else ""))
    can_be_settled = [(pattern, first) for pattern, first, _ in kinds if not first.error.final]
    if can_be_settled:
        lines += [
            "undecided='adamw', an argument of MuonW and of route, trains "
            f"{'it' if len(found) == 1 else 'them all'} with AdamW; rules decide one by one:",
            "  rules=[",
            *(f"      Rule({_escaped(p)!r}, algorithm='adamw')," for p, _ in can_be_settled),
            "  ]",
        ]
        dims = {min(first.param.ndim, 3) for _, first in can_be_settled}
        views = [text for ndim, text in _VIEWS.items() if ndim in dims]
        offers = "; ".join([*views, "algorithm='ignore' if it is not to be trained here"])
        lines.append(f"In place of algorithm='adamw': {offers}.")
    return "\n".join(lines)


def warning_message(names: Sequence[str]) -> str:
    """The warning that undecided='adamw' gives."""
    listed = ", ".join(map(shown, names))
    return (
        f"undecided='adamw': AdamW trains {listed}: nothing says whether "
        f"{'it is a hidden matrix' if len(names) == 1 else 'they are hidden matrices'}; "
        "Rule(name, algorithm='adamw') says so for good, Rule(name, view=...) gives it to Muon"
    )


def heads_message(found: Mapping[str, UnknownHeads]) -> str:
    """The weights, by name, that per_head=True cannot cut, with the rules that do."""
    why = dict.fromkeys(
        f"  {shown(starred(f'{each.module}.')[:-1]) or 'the model'}: {shown(each.why)}"
        for each in found.values()
    )
    rules = dict.fromkeys(
        f"      Rule({_escaped(starred(name))!r}, view={each.view!r}),"
        for name, each in found.items()
    )
    return "\n".join(
        [
            "per_head=True, but the heads of some attention cannot be told:",
            *why,
            "rules cut them, with numbers for HEADS (of queries), KV_HEADS (of keys, and of",
            "values) and ALL_HEADS (of all three); a view without a split leaves one whole:",
            "  rules=[",
            *rules,
            "  ]",
        ]
    )


def unmatched_message(rule: object, match: object, names: Sequence[str]) -> str:
    """A rule that matches no parameter: what it may have meant."""
    meant = ""
    if isinstance(match, str):
        core = match.strip("*.")
        if core and any(core in name for name in names):
            meant = f"; Rule('*{core}*') would match (a pattern is of the whole name)"
        elif near := difflib.get_close_matches(match, names, 3, 0.5):
            meant = f"; close to it: {', '.join(near)}"
    more = ", …" if len(names) > 5 else ""
    return (
        f"{rule} matches no parameter{meant}; the names are {', '.join(names[:5])}{more} "
        "(print(route(model)) shows them all)"
    )


def _kinds(found: Sequence[Open], others: Sequence[str]) -> list[tuple[str, Open, int]]:
    """(name or pattern, the first that it stands for, how many they are)."""
    if len(found) <= _MOST_LINES:
        return [(each.site.name, each, 1) for each in found]
    kinds = Counter(map(_kind, found))
    taken = set(map(starred, others))
    firsts: dict[str, Open] = {}
    rows = []
    for each in found:
        kind = _kind(each)
        if kinds[kind] == 1 or kind[0] in taken:
            rows.append((each.site.name, each, 1))
        elif kind[0] not in firsts:
            firsts[kind[0]] = each
            rows.append((kind[0], each, kinds[kind]))
        elif _kind(firsts[kind[0]]) != kind:
            rows.append((each.site.name, each, 1))
    return rows


def _kind(each: Open) -> tuple[str, str, str, str]:
    return (starred(each.site.name), each.shape, each.site.owner_class, str(each.error))


def _escaped(pattern: str) -> str:
    """A name as a pattern: `*` stands for the indices that were taken out."""
    return "*".join(map(glob.escape, pattern.split("*")))
