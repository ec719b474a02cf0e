"""Class weights that a loss, or a classifier with a margin, holds itself: ArcFace's, AM-softmax's,
proxies. They are an output head, and what a model gives to them is hidden.
"""

from __future__ import annotations

import re

import torch.nn as nn

from muonkit._torch import held_parameters
from muonkit.routing.linears import class_of
from muonkit.routing.numbers import first_number
from muonkit.routing.places import name_set
from muonkit.routing.raw import is_token_or_position
from muonkit.routing.verdicts import is_vector

__all__ = ["class_weights"]

# Classes and parts of a model that classify. (A model "WithLoss" holds what a model holds; nGPT's
# hidden layers are called NormLinear.)
_NAMED = re.compile(
    r"(?!.*with_?loss).*(loss(_?(function|func|fn|layer))?|criterion|softmax)|metric_fc"
    r"|(arc|cos|sphere|ada|mag|curricular|elastic|norm|uni|combined|sub_?cent(er|re)_?arc)_?face.*"
    r"|(arc|am|aam|add|additive|angular|sphere|cos|cosine|large|sub_?cent(er|re)_?arc)_?margin.*"
    r"|sphere_?product|ada_?cos|arc_?net|angle_?linear|mag_?linear|partial_?fc.*|proxy_?(anchor|nca).*",
    re.IGNORECASE,
)
_COUNTS = (
    "num_classes",
    "num_class",
    "n_classes",
    "n_class",
    "nclasses",
    "nb_classes",
    "number_classes",
    "class_num",
    "classnum",
    "cls_num",
)
_LABELS = name_set("weight weights W w kernel")


def class_weights(module: nn.Module, name: str) -> dict[str, nn.Parameter]:
    """The parameters with a row or column for each class, by label, of a module that holds them
    beside no other part: its class, its name in the model, or the number of classes that it states
    says so.
    """
    own = {label: p for label, p in held_parameters(module).items() if _is_matrix(p)}
    named = any(map(_NAMED.fullmatch, (class_of(module).__name__, name)))
    count = first_number([module], _COUNTS)
    found = {
        label: p
        for label, p in own.items()
        if not is_token_or_position(label)
        and (named or (len(own) == 1 and label in _LABELS and _counts(p, count)))
    }
    return {} if any(True for kid in module.children() for _ in kid.parameters()) else found


def _is_matrix(param: nn.Parameter) -> bool:
    return not isinstance(param, nn.parameter.UninitializedParameter) and not is_vector(param)


def _counts(param: nn.Parameter, count: int | None) -> bool:
    """Whether one side is the number of classes, and not both."""
    return param.ndim == 2 and [extent == count for extent in param.shape].count(True) == 1
