"""Routing rules as a command line has them: ``--rule 'PATTERN=adamw'``."""

import re
from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

import muonkit
from muonkit.lab.errors import LabError
from muonkit.views import View

# A name may have a "=", and so may a view: the first one counts that an algorithm follows.
_RULE = re.compile(r"(.+?)=(?:(adamw|ignore|muon)|muon:(.*))", re.DOTALL)


def rule_of(text: str) -> muonkit.Rule:
    """``PATTERN=adamw``, ``PATTERN=ignore`` or ``PATTERN=muon[:VIEW]`` as a routing rule.

    Raises:
        LabError: it is none of these, or the view is none.
    """
    found = _RULE.fullmatch(text)
    if found:
        algorithm: Any
        pattern, algorithm, view = found.groups()
        try:
            return muonkit.Rule(pattern, algorithm=algorithm or "muon", view=view or None)
        except ValueError as error:
            raise LabError(f"--rule {text!r}: {error}") from error
    raise LabError(
        f"--rule {text!r}: write PATTERN=adamw, PATTERN=ignore, PATTERN=muon or "
        "PATTERN=muon:VIEW, for example '*.router.weight=adamw'"
    )


def rules_of(texts: Iterable[str] | None) -> tuple[muonkit.Rule, ...]:
    """`rule_of` of each, in order."""
    return tuple(rule_of(text) for text in texts or ())


def for_all(texts: Sequence[str]) -> tuple[str, ...]:
    """The rules of a comparison, in which every optimizer has to train the same parameters.

    Raises:
        LabError: one is no rule, or leaves parameters out.
    """
    for text, rule in zip(texts, rules_of(texts), strict=True):
        if rule.algorithm == "ignore":
            raise LabError(
                f"--rule {text!r}: in a comparison every optimizer trains the same parameters; "
                "call requires_grad_(False) on those where the model is made"
            )
    return tuple(texts)


def routed(model: nn.Module, rules: Sequence[muonkit.Rule] = (), **options: Any) -> muonkit.Routes:
    """`muonkit.route`, whose errors are the user's.

    Raises:
        LabError: the model cannot be routed by these rules and options.
    """
    try:
        return muonkit.route(model, rules, **options)
    except ValueError as error:
        raise LabError(" ".join(str(error).split())) from error


def in_script(rules: Iterable[muonkit.Rule]) -> str:
    """Rules of a command line as Python, for a script that has imported `Rule`; empty where there
    are none.
    """
    written = []
    for rule in rules:
        chosen = f'view="{View.parse(rule.view)}"' if rule.view else f'algorithm="{rule.algorithm}"'
        written.append(f"Rule({str(rule.match)!r}, {chosen})")
    return f"rules=[{', '.join(written)}]" if written else ""
