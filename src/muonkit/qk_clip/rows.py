"""Which rows of which parameters QK-clip scales, by which head's logits, to what power of η."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor, nn

from muonkit._text import shown, unknown
from muonkit.routing.attention import attention_heads
from muonkit.routing.places import unwrap
from muonkit.routing.routes import RoutingError
from muonkit.routing.survey import survey

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from muonkit.routing.attention import AttentionHeads, HeadSlice
    from muonkit.routing.places import Site

__all__ = ["Attention", "Scaled", "attentions_of"]

#: For each name of a parameter, as in `Route.name`, its place, and all places that it has.
_Places = dict[str, "tuple[Site, list[Site]]"]

# What normalizes each head's q or k before the product. DeepSeek's q_a_layernorm and kv_a_layernorm
# normalize the latent that heads are made of: these have other names.
_NORM = re.compile(
    r"(q|k|qk|query|key)_?(layer_?|rms_?)?norm|(layer_?|rms_?)?norm_?(q|k|qk|query|key)"
    r"|(q|k|query|key)_?(ln|rms)|(ln|rms)_?(q|k|query|key)"
)


@dataclass(eq=False)
class Scaled:
    """One parameter that holds q or k, or both.

    Attributes:
        module, label: where it is now: frameworks replace parameters.
        path: its name in the model.
        dim: the dim that the heads lie along.
        group: for every entry of that dim the heads whose η scales it; -1 where none does.
        power: for every entry what power of η.
        is_bias: of the layer that makes q or k.
    """

    module: nn.Module
    label: str
    path: str
    dim: int
    group: list[int]
    power: list[float]
    is_bias: bool

    def parameter(self) -> Tensor:
        found: Tensor = getattr(self.module, self.label)
        return found


@dataclass(eq=False)
class Attention:
    """One attention module.

    Attributes:
        name: in the model.
        module: the part that calls torch's attention.
        heads: of the queries.
        kv_heads: of the keys; query head h reads key head h // (heads // kv_heads).
        query: the parameter that has the rows of q, and their interval for each head.
        scaled: every parameter that is scaled.
    """

    name: str
    module: nn.Module
    heads: int
    kv_heads: int
    query: tuple[Scaled, list[tuple[int, int]]]
    scaled: list[Scaled]


def attentions_of(
    model: nn.Module, heads: Sequence[AttentionHeads] | None, alpha: float
) -> list[Attention]:
    """The attention modules of a model, as described or as its config says.

    Raises:
        ValueError: there is none; one whose q or k are normalized by head.
        RoutingError: a module has queries and keys, but nothing tells how many heads.
    """
    try:
        found = attention_heads(model) if heads is None else tuple(heads)
    except RoutingError as error:
        raise RoutingError(
            f"{error}\nset such an attribute on the module, or give QKClip heads=[AttentionHeads("
            "...)] (muonkit.routing.attention), which names the rows of q and k for each head"
        ) from None
    if not found:
        raise ValueError(
            f"QK-clip found no attention module in {type(model).__name__}, by the names of q, k "
            "and v: heads=[AttentionHeads(...)] says where the heads of each are "
            "(muonkit.routing.attention)"
        )
    places = {
        site.name: (site, sites)
        for sites in survey(unwrap(model), []).sites.values()
        for site in sites
    }
    modules = [each.module for each in found]
    if len(set(map(id, modules))) != len(modules):
        raise ValueError("heads describes one attention module twice, which would be clipped twice")
    return [_attention(places, each, alpha) for each in found]


def _attention(places: _Places, heads: AttentionHeads, alpha: float) -> Attention:
    _check_heads(heads)
    for name, child in heads.module.named_modules():  # Flux has both norms in a part of their own
        if _NORM.fullmatch(name.rpartition(".")[2]) and not isinstance(child, nn.Identity):
            raise ValueError(
                f"{shown(heads.name)} normalizes q or k by {name} (QK-norm), so that scaling their "
                "rows changes no logit, and the gains of the norms bound the logits by themselves: "
                "train this model without QKClip; heads=[...] with other modules leaves it out"
            )
    shared = heads.heads // heads.kv_heads
    scaled: dict[str, Scaled] = {}
    for slices, power, per_group in (
        (heads.q, alpha, shared),
        (heads.q_rope, 1.0, shared),
        (heads.k, 1 - alpha, 1),
    ):
        for i, part in enumerate(slices):
            _mark(places, heads.module, scaled, part, i // per_group, power)
    for path in scaled:
        if "base_layer" in path.split("."):
            raise ValueError(
                f"{shown(path)} has an adapter (LoRA) beside it, which is not scaled with it: "
                "train this model without QKClip, or merge the adapter; heads=[...] leaves "
                "modules out"
            )
    query = scaled[heads.q[0].param], [(part.start, part.stop) for part in heads.q]
    return Attention(
        heads.name, heads.module, heads.heads, heads.kv_heads, query, list(scaled.values())
    )


def _check_heads(heads: AttentionHeads) -> None:
    """Raises:
    ValueError: the description of an attention contradicts itself.
    """
    count, kv = heads.heads, heads.kv_heads
    if not (count > 0 and kv > 0 and count % kv == 0):
        raise ValueError(
            f"{shown(heads.name)} has heads={count} and kv_heads={kv}, expected a multiple of "
            "kv_heads, both above 0"
        )
    for what, slices, expected in (
        ("q", heads.q, count),
        ("q_rope", heads.q_rope, count if heads.q_rope else 0),
        ("k", heads.k, kv),
    ):
        if len(slices) != expected:
            raise ValueError(
                f"{shown(heads.name)} has {len(slices)} slices of {what}, expected {expected}: one "
                "for each head"
            )


def _mark(
    places: _Places,
    attention: nn.Module,
    scaled: dict[str, Scaled],
    part: HeadSlice,
    group: int,
    power: float,
) -> None:
    """Note that these rows, and those of the bias, are scaled with a group's η."""
    for path, dim in _with_bias(part):
        if path not in scaled:
            if path not in places:
                raise ValueError(unknown("parameter that holds heads", path, places))
            site, everywhere = places[path]
            for other in everywhere:
                if attention not in (other.owner, *other.ancestors):
                    raise ValueError(
                        f"{shown(path)} and {shown(other.name)} are one parameter, which two "
                        "attention modules would clip each by its own logits: leave both out, "
                        "heads=[...]"
                    )
            length = getattr(site.owner, site.label).shape[dim]
            scaled[path] = Scaled(
                site.owner,
                site.label,
                path,
                dim,
                [-1] * length,
                [0.0] * length,
                is_bias=path == part.bias,
            )
        rows = scaled[path]
        if part.stop > len(rows.group):
            raise ValueError(
                f"{shown(path)} has {len(rows.group)} entries along dim {dim}, expected the heads "
                f"within it, got {part}"
            )
        mine = range(part.start, part.stop)
        if part.start < 0 or not mine or any(rows.group[row] != -1 for row in mine):
            raise ValueError(
                f"{shown(path)}: expected rows of its own from 0 for every head, got {part}"
            )
        for row in mine:
            rows.group[row], rows.power[row] = group, power


def _with_bias(part: HeadSlice) -> Iterable[tuple[str, int]]:
    yield part.param, part.dim
    if part.bias is not None:
        yield part.bias, 0
