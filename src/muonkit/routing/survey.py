"""What a model says about its parameters: where each stands, which heads and stems it has.

A parameter is known by its identity, so a tied one has several sites. Nothing here decides an
algorithm.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from muonkit.routing.heads import find_heads, given_heads
from muonkit.routing.linears import Linears, Standing
from muonkit.routing.places import sites_of, tree, walk
from muonkit.routing.stems import find_stems

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch.nn as nn

    from muonkit.routing.places import Place, Site

__all__ = ["Survey", "survey"]


@dataclass
class Survey:
    """Every parameter of a model by identity, in registration order.

    Attributes:
        sites: id of the parameter -> its sites, the first registered first.
        params: id -> the parameter.
        heads: id -> why it is an output head.
        stems: id -> why it is a stem: a layer that meets the input.
        doubts: id of a hidden layer's weight -> why it is no output head although it is the last.
    """

    sites: dict[int, list[Site]] = field(default_factory=dict)
    params: dict[int, nn.Parameter] = field(default_factory=dict)
    heads: dict[int, str] = field(default_factory=dict)
    stems: dict[int, str] = field(default_factory=dict)
    doubts: dict[int, str] = field(default_factory=dict)


def survey(model: nn.Module, heads: Sequence[str | nn.Module] | None = None) -> Survey:
    """Gather sites, heads and stems of an unwrapped model.

    Args:
        model: a module, wrappers taken off (`muonkit.routing.places.unwrap`).
        heads: the output heads, by hand: modules or patterns of their names; None searches them.

    Raises:
        ValueError: `heads` has what is no layer of this model.
    """
    places = list(walk(model))
    linears = Linears([_standing(place) for place in places])
    found = Survey()
    for place in places:
        for param, site in sites_of(place, linears):
            found.params.setdefault(id(param), param)
            found.sites.setdefault(id(param), []).append(site)
    root = tree(places, linears)
    if heads is None:
        found.heads, found.doubts = find_heads(root)
    else:
        found.heads = given_heads(root, heads)
    found.stems = find_stems(root)
    return found


def _standing(place: Place) -> Standing:
    parent = place.ancestors[-1] if place.ancestors else None
    among = (*place.parts, *(type(module).__name__ for module in place.ancestors))
    among_experts = any("expert" in name.lower() for name in among)
    return Standing(place.module, parent, place.parts[-1] if place.parts else "", among_experts)
