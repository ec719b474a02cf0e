"""The models that ``muonkit plan`` takes: well-known ones by name, and the user's own."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import get_args

import torch
from torch import nn

from muonkit.lab.errors import LabError, unknown
from muonkit.lab.rules import routed
from muonkit.lab.shapes import MODELS, ModelShape, ParameterShape, Role
from muonkit.lab.specs import load_model
from muonkit.routing.rules import Rule

__all__ = ["find_model", "parse_roles", "shape_of"]

#: What comes before a layer's number, and the number.
_LAYER = re.compile(r"(?:^|.*?\.)\d+(?=\.)")

#: Styles of transformers' tensor parallel plans by the words in their names.
_STYLES: tuple[tuple[str, Role], ...] = (
    ("embedding", "vocab"),
    ("colwise", "colwise"),
    ("rowwise", "rowwise"),
)


def find_model(
    spec: str, roles: Mapping[str, Role] | None = None, rules: Sequence[Rule] = ()
) -> ModelShape:
    """The model of this name, or the user's own.

    Args:
        spec: a key of `muonkit.lab.shapes.MODELS`, or what `muonkit.lab.specs.load_model` takes.
            The user's model is built on the meta device; in memory if it cannot be built there.
        roles: what tensor parallelism does with parameters, by patterns of their names.
        rules: for routing the user's model.

    Raises:
        LabError: there is no such model, it cannot be built, or it cannot be routed.
    """
    if spec in MODELS:
        if roles or rules:
            raise LabError(
                f"{spec} is a list of shapes that are routed and cut already: leave --tp and "
                "--rule out, or name a model of your own"
            )
        return MODELS[spec]
    try:
        with torch.device("meta"):
            model = load_model(spec)
    except LabError as error:
        if ":" not in spec and get_close_matches(spec, MODELS, n=1, cutoff=0.5):
            raise unknown("model", spec, MODELS) from error
        model = load_model(spec)
    return shape_of(spec, model, roles, rules)


def shape_of(
    name: str,
    model: nn.Module,
    roles: Mapping[str, Role] | None = None,
    rules: Sequence[Rule] = (),
) -> ModelShape:
    """A module's trainable parameters as shapes, with the views that routing gives them.

    Layers are the numbered children of the outermost containers (``layers.3``, ``blocks.0``), in
    the order of their parameters. Tensor parallelism cuts what `roles` says and what a
    transformers model's own ``tp_plan`` does.

    Raises:
        LabError: the model cannot be routed, or a pattern of `roles` matches
            no parameter.
    """
    trained = [r for r in routed(model, rules) if r.algorithm in ("muon", "adamw")]
    styles = _styles(model)
    unused = set(roles or ())
    layers: dict[str, int] = {}
    parameters: list[ParameterShape] = []
    for r in trained:
        role: Role = styles.get(_pattern(r.name)) or styles.get(
            _pattern(_module(r.name)), "replicated"
        )
        for pattern, chosen in (roles or {}).items():
            if fnmatchcase(r.name, pattern):
                unused.discard(pattern)
                role = chosen
        if role == "rowwise" and len(r.shape) == 1:
            role = "replicated"  # the bias of a sum over ranks is added once
        found = _LAYER.match(r.name)
        layer = None if found is None else layers.setdefault(found[0], len(layers))
        among = None if layer is None else range(layer, layer + 1)
        parameters.append(ParameterShape(r.name, r.shape, r.view, role, among))
    if unused:
        raise LabError(
            f"--tp: no parameter of {name} is called {sorted(unused)[0]!r}; `muonkit route` prints "
            "the names"
        )
    return ModelShape(name, tuple(parameters))


def parse_roles(texts: Sequence[str]) -> dict[str, Role]:
    """``PATTERN=colwise`` and the like.

    Raises:
        LabError: not written like that, or an unknown role.
    """
    roles: dict[str, Role] = {}
    for text in texts:
        pattern, equals, name = text.partition("=")
        if not pattern or not equals:
            raise LabError(f"--tp {text!r}: write PATTERN=ROLE, for example '*.wq.weight=colwise'")
        for role in get_args(Role):
            if role == name:
                roles[pattern] = role
                break
        else:
            raise unknown("role", name, get_args(Role))
    return roles


def _styles(model: nn.Module) -> dict[str, Role]:
    """The tensor parallel plan that a transformers model has, by names with ``*`` for numbers."""
    plan = getattr(model, "tp_plan", None)
    if not isinstance(plan, Mapping):
        return {}
    roles: dict[str, Role] = {}
    for name, style in plan.items():
        for word, role in _STYLES:
            if word in str(style):
                roles[str(name)] = role
                break
    return roles


def _pattern(name: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name)


def _module(name: str) -> str:
    return name.rpartition(".")[0]
