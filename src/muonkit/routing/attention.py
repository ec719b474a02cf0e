"""Attention heads: which rows of which parameter make each head's queries, keys and values, and
which columns take what it gives.

Heads are counted by the module itself, or by the nearest config above it; shapes prove the rest.
"""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import torch.nn as nn

from muonkit.routing.judge import Undecided, judge
from muonkit.routing.layouts import HeadCounts, head_counts, is_by_head, is_fused_qkv
from muonkit.routing.names import makes
from muonkit.routing.numbers import CONFIGS, HEADS, first_number, number, stated
from muonkit.routing.places import Site, name_set, unwrap
from muonkit.routing.rules import RoutingError
from muonkit.routing.survey import Survey, survey
from muonkit.routing.table import as_module
from muonkit.routing.verdicts import UnknownHeads
from muonkit.views import View

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

__all__ = [
    "AttentionHeads",
    "HeadSlice",
    "HeadView",
    "attention_heads",
    "find_attention",
]

_O = name_set(
    "o o_proj out out_proj proj c_proj dense to_out wo Wo w_o W_o lin_o out_lin out_linear o_lin "
    "linear_out linear_o output_proj proj_out output linear_proj attn_out att_out attn_proj fc_o"
)
# Multi-head latent attention: up-projections of queries, of keys and values, and what goes down.
_Q_UP = name_set("q_b_proj wq_b q_up_proj linear_q_up_proj")
_KV_UP = name_set("kv_b_proj wkv_b kv_up_proj linear_kv_up_proj")
_KV_DOWN = name_set("kv_a_proj_with_mqa wkv_a kv_down_proj linear_kv_down_proj")


class HeadSlice(NamedTuple):
    """What one head has of one parameter.

    Attributes:
        param: the parameter's name, as in `Route.name`.
        dim: the dim of the stored parameter along which the heads lie: 0 for the outputs of a
            Linear, 1 for those of Hugging Face's Conv1D (in × out).
        start, stop: the interval of that dim.
        bias: the name of the bias that has the same interval of its only dim; None without one,
            and for `AttentionHeads.o`, whose bias is of no head.
    """

    param: str
    dim: int
    start: int
    stop: int
    bias: str | None = None


@dataclass(frozen=True)
class AttentionHeads:
    """Where the heads of one attention module lie.

    Query head h reads the keys and values of head `h // (heads // kv_heads)`.

    Attributes:
        name: of the module, as in `Route.name`; for BERT's that of the part with the queries.
        module: the module itself.
        heads: of the queries.
        kv_heads: of keys and values; as many as `heads` in multi-head latent attention (MLA).
        head_dim: features of a query head, the rotated ones among them.
        q: a slice for each head; in MLA its part without rotation.
        k, v: a slice for each head of keys and values; in MLA `k` is the part without rotation.
        o: for each head the columns of the output projection; empty where none was found.
        q_rope: for each head the rotated part of the queries; MLA only.
        k_rope: the rotated part of the keys, one for all heads; MLA only.
    """

    name: str
    module: nn.Module = field(repr=False, compare=False)
    heads: int
    kv_heads: int
    head_dim: int
    q: tuple[HeadSlice, ...]
    k: tuple[HeadSlice, ...]
    v: tuple[HeadSlice, ...]
    o: tuple[HeadSlice, ...] = ()
    q_rope: tuple[HeadSlice, ...] = ()
    k_rope: tuple[HeadSlice, ...] = ()


class HeadView(NamedTuple):
    """How a parameter is cut so that every head is a matrix.

    Attributes:
        split: the last steps of its view; empty where there is one head.
        reason: in a few words.
    """

    split: str
    reason: str

    def within(self, view: str) -> str:
        """The view that has this cut in place of its own."""
        steps = [step for step in View.parse(view).steps if not step.startswith("split")]
        found = " > ".join([*steps, self.split] if self.split else steps)
        return found.removeprefix("matrix > ")


class _Unknown(ValueError):
    """The heads of a module whose queries and keys are known cannot be told."""


class _Layer(NamedTuple):
    """One linear layer of an attention module, with its weight in logical orientation."""

    key: int  # id of the weight
    site: Site
    rows: int
    cols: int
    view: str  # as judged
    biased: bool

    @property
    def transposed(self) -> bool:
        return "transpose" in View.parse(self.view).steps


@dataclass
class _Found:
    """The layers of one attention module by what they make."""

    site: Site  # of the first: its parent is the attention module
    name: str
    q: _Layer | None = None
    k: _Layer | None = None
    v: _Layer | None = None
    kv: _Layer | None = None
    qkv: _Layer | None = None
    q_up: _Layer | None = None
    kv_up: _Layer | None = None
    kv_down: _Layer | None = None
    o: _Layer | None = None

    @property
    def is_attention(self) -> bool:
        latent = self.kv_up is not None and (self.q or self.q_up) is not None
        apart = self.q is not None and (self.kv or (self.k and self.v)) is not None
        return self.qkv is not None or latent or apart

    def refuse_unknown_storage(self) -> None:
        """Raise where nothing says which side of a matrix has the heads."""
        every = (self.q, self.k, self.v, self.kv, self.qkv, self.q_up, self.kv_up, self.o)
        for layer in every:
            own = None if layer is None else layer.site.linears.own(layer.site.owner)
            if layer is not None and own is not None and not own.sure:
                raise _Unknown(
                    f"nothing tells whether {layer.site.owner_class} stores its matrices out × in "
                    "or in × out"
                )

    def unknown(self, why: str) -> dict[int, UnknownHeads]:
        """The weights that have heads, where it is not known which."""
        layers: list[tuple[_Layer | None, str]]
        if self.qkv is not None:
            layers = [(self.qkv, "rows=ALL_HEADS")]
        elif self.kv_up is not None:
            layers = [(self.q_up or self.q, "rows=HEADS"), (self.kv_up, "rows=HEADS")]
        else:
            layers = [(self.q, "rows=HEADS"), (self.k, "rows=KV_HEADS"), (self.v, "rows=KV_HEADS")]
            layers.append((self.kv, "rows=2*KV_HEADS"))
        layers.append((self.o, "cols=HEADS"))
        return {
            layer.key: UnknownHeads(
                self.name, why, HeadView(f"split({cut})", why).within(layer.view)
            )
            for layer, cut in layers
            if layer is not None
        }


def attention_heads(model: nn.Module | Mapping[str, nn.Module]) -> tuple[AttentionHeads, ...]:
    """The heads of every attention module of a model, in registration order.

    Raises:
        RoutingError: a module has queries and keys, but nothing tells how many heads.
    """
    found, _, unknown = find_attention(survey(unwrap(as_module(model)), []))
    if unknown:
        lines = dict.fromkeys(f"{each.module}: {each.why}" for each in unknown.values())
        raise RoutingError("\n".join(lines))
    return tuple(found)


def find_attention(
    facts: Survey,
) -> tuple[list[AttentionHeads], dict[int, HeadView], dict[int, UnknownHeads]]:
    """The heads of all attention modules; for each weight (by id) the view that has them as
    matrices; and the weights of the modules whose heads are unknown.
    """
    found: list[AttentionHeads] = []
    views: dict[int, HeadView] = {}
    unknown: dict[int, UnknownHeads] = {}
    for module in _modules(facts):
        try:
            module.refuse_unknown_storage()
            heads, cuts = _latent(module) if module.kv_up else _plain(module)
        except _Unknown as error:
            unknown |= module.unknown(str(error))
            continue
        found.append(heads)
        views |= cuts
    return found, views, unknown


# -- which layers belong together -----------------------------------------------------------------


def _modules(facts: Survey) -> list[_Found]:
    """The attention modules, with their layers."""
    at: dict[tuple[str, ...], _Found] = {}
    named = {site.name for sites in facts.sites.values() for site in sites}
    outputs: list[_Layer] = []
    for key, sites in facts.sites.items():
        layer = _layer(facts, key, sites, named)
        if layer is None:
            continue
        what = _kind(layer.site, layer.rows, layer.cols)
        if what == "o":
            outputs.append(layer)
        elif what is not None:
            place = _place(layer.site)
            module = at.setdefault(place, _Found(layer.site, ".".join(place)))
            if getattr(module, what) is None:
                setattr(module, what, layer)
    for layer in outputs:
        beside = _places_of_output(layer.site, at)
        taking = next((at[place] for place in beside if place in at), None)
        if taking is not None and taking.o is None:
            taking.o = layer
    return [module for module in at.values() if module.is_attention]


def _places_of_output(
    site: Site, attention: Iterable[tuple[str, ...]]
) -> Iterator[tuple[str, ...]]:
    """Where the q, k and v may be whose heads this layer takes: beside it; beside the Sequential
    that it is in; or, as BERT's, beside the part "output" that has it.
    """
    here = _place(site)
    yield here
    if here and here[-1] in _O and site.owner_name == "0":
        yield here[:-1]
    if here[-1:] == ("output",) and "att" in "".join(here[-2:-1]):
        yield from (place for place in attention if place[:-1] == here[:-1])


def _place(site: Site) -> tuple[str, ...]:
    """The path of the module that a layer belongs to: torch's attention holds its own weights."""
    return site.parts if isinstance(site.owner, nn.MultiheadAttention) else site.parts[:-1]


def _layer(facts: Survey, key: int, sites: list[Site], named: set[str]) -> _Layer | None:
    param, site = facts.params[key], sites[0]
    if isinstance(param, nn.parameter.UninitializedParameter) or param.ndim < 2:
        return None
    if site.label != "weight" and not isinstance(site.owner, nn.MultiheadAttention):
        return None
    if _kind(site, *param.shape[:2]) is None and _kind(site, *param.shape[1::-1]) is None:
        return None
    try:
        view = judge(sites, param, facts, hidden=True).view
    except Undecided:
        view = "matrix" if param.ndim == 2 else None
    if view is None or "experts" in view or any(extent != 1 for extent in param.shape[2:]):
        return None
    transposed = "transpose" in View.parse(view).steps
    rows, cols = param.shape[:2][::-1] if transposed else param.shape[:2]
    return _Layer(key, site, rows, cols, view, _bias_name(site) in named)


def _bias_name(site: Site) -> str | None:
    """What the bias beside a weight is called, if there is one."""
    own = site.linears.own(site.owner)
    if own is not None:
        path, dot, _ = site.name.rpartition(".")
        return None if own.bias is None else f"{path}{dot}{own.bias}"
    bias = re.sub(r"weight$", "bias", site.name)
    return None if bias == site.name else bias


_OF_TORCH = {
    "in_proj_weight": "qkv",
    "q_proj_weight": "q",
    "k_proj_weight": "k",
    "v_proj_weight": "v",
}


def _kind(site: Site, rows: int, cols: int) -> str | None:
    """What a linear layer of these outputs and inputs makes, by its name."""
    if is_fused_qkv(site, rows, cols):
        return "qkv"
    if isinstance(site.owner, nn.MultiheadAttention):
        return _OF_TORCH.get(site.label)
    name = site.owner_name
    made = makes(name)
    if made and made != "qkv":
        return made
    for kind, names in (("q_up", _Q_UP), ("kv_up", _KV_UP), ("kv_down", _KV_DOWN)):
        if name in names:
            return kind
    in_output = name == "0" and len(site.parts) > 1 and site.parts[-2] in _O  # to_out.0
    return "o" if name in _O or in_output else None


# -- where the heads lie --------------------------------------------------------------------------


def _plain(module: _Found) -> tuple[AttentionHeads, dict[int, HeadView]]:
    """Queries, keys and values apart or fused, with as many heads of keys or fewer (GQA, MQA)."""
    heads, counts = _counts(module)
    if module.qkv is not None:
        q, k, v, kv_heads, head_dim = _fused(module.qkv, heads, counts)
        what = f"{heads} heads of q, {kv_heads} of k and v"
        cuts = {module.qkv.key: _rows_view(module.qkv, head_dim, what)}
    else:
        q, k, v, kv_heads, head_dim, cuts = _apart(module, heads, counts)
    value_dim = v[0].stop - v[0].start
    o = _outputs(module, heads, value_dim, cuts)
    found = AttentionHeads(module.name, _module_of(module), heads, kv_heads, head_dim, q, k, v, o)
    return found, cuts


_Parts = tuple[HeadSlice, ...]


def _apart(
    module: _Found, heads: int, counts: HeadCounts
) -> tuple[_Parts, _Parts, _Parts, int, int, dict[int, HeadView]]:
    q = module.q
    assert q is not None
    wide = head_dim = _divided(q, heads, "heads of queries")
    # Twice a head's features: a gate lies beside the queries of each head, as Qwen3-Next's.
    gate = ""
    if counts.head_dim is not None and wide == 2 * counts.head_dim:
        head_dim, gate = wide // 2, ", each with its gate"
    cuts = {q.key: _rows_view(q, head_dim, f"{heads} heads of q{gate}")}
    if module.kv is not None:
        k, v, kv_heads = _keys_and_values(module.kv, counts, heads, head_dim)
        sizes = [head_dim] * kv_heads + [v[0].stop - v[0].start] * kv_heads
        cuts[module.kv.key] = _sizes_view(module.kv, sizes, f"{kv_heads} heads of k and v")
    else:
        keys, values = module.k, module.v
        assert keys is not None
        assert values is not None
        kv_heads = _divided(keys, head_dim, "features of a head")
        value_dim = _divided(values, kv_heads, "heads of keys and values")
        k, v = _slices(keys, head_dim, kv_heads), _slices(values, value_dim, kv_heads)
        cuts[keys.key] = _rows_view(keys, head_dim, f"{kv_heads} heads of k")
        cuts[values.key] = _rows_view(values, value_dim, f"{kv_heads} heads of v")
    if heads % kv_heads:
        raise _Unknown(f"{heads} heads of queries do not divide by {kv_heads} of keys and values")
    return _slices(q, head_dim, heads, step=wide), k, v, kv_heads, head_dim, cuts


def _keys_and_values(
    layer: _Layer, counts: HeadCounts, heads: int, head_dim: int
) -> tuple[_Parts, _Parts, int]:
    """Slices of one tensor that holds all keys, then all values."""
    kv_heads = heads if layer.rows == 2 * head_dim * heads else counts.kv_heads or heads
    value_dim = _divided(layer, kv_heads, "heads of keys and values") - head_dim
    if value_dim < 1:
        raise _Unknown(
            f"the {layer.rows} rows of {layer.site.name} are too few for {kv_heads} heads of "
            f"{head_dim} features of keys, and as many of values"
        )
    v = _slices(layer, value_dim, kv_heads, first=kv_heads * head_dim)
    return _slices(layer, head_dim, kv_heads), v, kv_heads


def _fused(
    layer: _Layer, heads: int, counts: HeadCounts
) -> tuple[_Parts, _Parts, _Parts, int, int]:
    """q, k and v of one tensor: one after the other, or a group of heads after the other."""
    for kv_heads in dict.fromkeys((counts.kv_heads or heads, heads)):
        total = heads + 2 * kv_heads
        head_dim = layer.rows // total
        if (
            layer.rows % total == 0
            and heads % kv_heads == 0
            and counts.head_dim in (None, head_dim)
        ):
            break
    else:
        stated = f" of {counts.head_dim} features" if counts.head_dim else ""
        raise _Unknown(
            f"the {layer.rows} rows of {layer.site.name} are no {heads} heads of q and "
            f"{counts.kv_heads or heads} of k and v{stated}"
        )
    groups, order = 1, "qkv"
    if is_by_head(layer.site):
        groups = kv_heads
        if type(layer.site.parent).__name__.startswith("CodeGen"):
            # The ranks that it was trained on, whatever runs it now.
            groups, order = number(layer.site.parent, "mp_num") or 4, "qvk"
            if heads % groups:
                raise _Unknown(f"{heads} heads are not shared by {groups} groups of them")
    sizes = {"q": heads // groups, "k": kv_heads // groups, "v": kv_heads // groups}
    places: dict[str, list[HeadSlice]] = {"q": [], "k": [], "v": []}
    every = iter(_slices(layer, head_dim, total))
    for _, what in itertools.product(range(groups), order):
        places[what] += itertools.islice(every, sizes[what])
    q, k, v = (tuple(places[what]) for what in "qkv")
    return q, k, v, kv_heads, head_dim


def _latent(module: _Found) -> tuple[AttentionHeads, dict[int, HeadView]]:
    """Multi-head latent attention: the rotated and the other part of a head are matrices of their
    own, as they are in the equations."""
    parent = module.site.parent
    sources = (parent, *(stated(parent, name) for name in CONFIGS))
    nope, rope, value = (
        first_number(sources, [name])
        for name in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
    )
    q, kv = module.q_up or module.q, module.kv_up
    assert q is not None
    assert kv is not None
    heads, _ = _counts(module)
    if not (nope and rope and value):
        raise _Unknown(
            "it has a latent of keys and values, but nothing states qk_nope_head_dim, "
            "qk_rope_head_dim and v_head_dim"
        )
    for layer, of_head in ((q, nope + rope), (kv, nope + value)):
        if layer.rows != heads * of_head:
            raise _Unknown(
                f"the {layer.rows} rows of {layer.site.name} are no {heads} heads of {of_head}"
            )
    cuts = {
        q.key: _parts_view(q, heads, (nope, rope), f"{heads} heads of q, and their rotated parts"),
        kv.key: _parts_view(kv, heads, (nope, value), f"{heads} heads of k and v"),
    }
    o = _outputs(module, heads, value, cuts)
    down = module.kv_down
    k_rope: _Parts = ()
    if down is not None and down.rows > rope:
        k_rope = _slices(down, rope, 1, first=down.rows - rope)
    found = AttentionHeads(
        module.name,
        _module_of(module),
        heads,
        heads,
        nope + rope,
        q=_slices(q, nope, heads, step=nope + rope),
        k=_slices(kv, nope, heads, step=nope + value),
        v=_slices(kv, value, heads, first=nope, step=nope + value),
        o=o,
        q_rope=_slices(q, rope, heads, first=nope, step=nope + rope),
        k_rope=k_rope,
    )
    return found, cuts


def _counts(module: _Found) -> tuple[int, HeadCounts]:
    """How many heads the queries have, and what else is said of heads."""
    owner = module.site.owner
    if isinstance(owner, nn.MultiheadAttention):
        return owner.num_heads, HeadCounts(owner.num_heads, owner.num_heads, owner.head_dim)
    counts = head_counts(module.site)
    if counts.heads is None:
        raise _Unknown(
            f"nothing says how many heads it has: {type(module.site.parent).__name__} and its "
            f"config state none of {', '.join(HEADS)}"
        )
    return counts.heads, counts


def _module_of(module: _Found) -> nn.Module:
    if isinstance(module.site.owner, nn.MultiheadAttention):
        return module.site.owner
    assert module.site.parent is not None
    return module.site.parent


def _outputs(module: _Found, heads: int, value_dim: int, cuts: dict[int, HeadView]) -> _Parts:
    """The columns of the output projection."""
    layer = module.o
    if layer is None:
        return ()
    if layer.cols != heads * value_dim:
        raise _Unknown(
            f"the {layer.cols} columns of {layer.site.name} are no {heads} heads of {value_dim}"
        )
    split = f"split(cols={heads})" if heads > 1 else ""
    cuts[layer.key] = HeadView(split, f"columns of {heads} heads")
    return _slices(layer, value_dim, heads, columns=True)


def _divided(layer: _Layer, parts: int, what: str) -> int:
    if layer.rows % parts:
        raise _Unknown(
            f"the {layer.rows} rows of {layer.site.name} do not divide by the {parts} {what}"
        )
    return layer.rows // parts


def _slices(
    layer: _Layer,
    size: int,
    count: int,
    *,
    first: int = 0,
    step: int | None = None,
    columns: bool = False,
) -> _Parts:
    bias = _bias_name(layer.site) if layer.biased and not columns else None
    dim = int(layer.transposed != columns)
    starts = [first + i * (step or size) for i in range(count)]
    return tuple(HeadSlice(layer.site.name, dim, a, a + size, bias) for a in starts)


def _rows_view(layer: _Layer, size: int, reason: str) -> HeadView:
    count = layer.rows // size
    return HeadView(f"split(rows={count})" if count > 1 else "", reason)


def _sizes_view(layer: _Layer, sizes: Sequence[int], reason: str) -> HeadView:
    if len(set(sizes)) == 1:
        return _rows_view(layer, sizes[0], reason)
    return HeadView(f"split(rows={'+'.join(map(str, sizes))})", reason)


def _parts_view(layer: _Layer, heads: int, sizes: tuple[int, int], reason: str) -> HeadView:
    if len(set(sizes)) == 1:
        return _rows_view(layer, sizes[0], reason)
    return HeadView(f"split(rows={heads}) > split(rows={sizes[0]}+{sizes[1]})", reason)
