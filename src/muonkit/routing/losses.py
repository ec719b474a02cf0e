"""Class weights that a loss, or a classifier with a margin, holds itself: ArcFace's, AM-softmax's,
proxies.
"""

from __future__ import annotations

import functools
import re
from typing import TYPE_CHECKING

import torch.nn as nn

from muonkit._torch import held_parameters
from muonkit.routing.linears import class_of, has_shape
from muonkit.routing.numbers import CLASSES, first_number
from muonkit.routing.places import CONVS, EMBEDDINGS, TRANSPOSED_CONVS, name_set
from muonkit.routing.verdicts import is_vector

if TYPE_CHECKING:
    from muonkit.routing.places import Site

__all__ = ["counts_classes", "gives_loss"]

_LAYERS = (nn.Linear, nn.Bilinear, *EMBEDDINGS, *CONVS, *TRANSPOSED_CONVS)
_LABELS = name_set("weight W w kernel")

_LOSS = r".*loss(_?(function|func|fn|layer))?|.*criterion"
_MARGIN = (
    r"(elastic_?|sub_?cent(er|re)_?)?(arc|cos|sphere|ada|mag|curricular|elastic|norm|uni|npc)"
    r"(_?neg)?_?face.*"
    r"|(arc|am|aam|add|additive|angular|sphere|cos|cosine|large)_?margin.*"
    r"|(a|l|am|aam|mv|norm|cosine|(additive_?|angular_?)*margin)?_?softmax(_?proto(type)?)?"
    r"|sphere_?product|ada_?cos|arc_?net|angle_?linear|mag_?linear|partial_?fc.*"
    r"|proxy_?(anchor|nca|gml).*|soft_?triple|cosine_?classifier"
)
# (A "ModelWithLoss" holds what a model holds.)
_CLASS = re.compile(rf"(?!.*with_?loss)({_LOSS}|{_MARGIN})", re.IGNORECASE)
_PLACE = re.compile(_LOSS)


@functools.lru_cache(maxsize=4096)
def _is_loss(kind: str) -> bool:
    return _CLASS.fullmatch(kind) is not None


def gives_loss(site: Site) -> bool:
    """Whether a module is a loss or a classifier with a margin: by its class, or one that this
    extends, or by its name in the model, if its class is none of torch's.
    """
    if any(_is_loss(kind.__name__) for kind in class_of(site.owner).__mro__):
        return True
    return _PLACE.fullmatch(site.owner_name) is not None and not isinstance(site.owner, _LAYERS)


def counts_classes(site: Site, param: nn.Parameter) -> bool:
    """Whether one side of a module's only matrix, and not both, is the number of classes that the
    module states.
    """
    if site.label not in _LABELS or isinstance(site.owner, _LAYERS) or param.ndim != 2:
        return False
    count = first_number([site.owner], CLASSES)
    others = (p for p in held_parameters(site.owner).values() if p is not param)
    return [extent == count for extent in param.shape].count(True) == 1 and not any(
        has_shape(p) and not is_vector(p) for p in others
    )
