"""Which matrices one stored tensor fuses: q, k, v; gate and up; the experts of a mixture.

Muon orthogonalizes every matrix by itself, so a tensor that stacks several must be cut where they
meet. The cut is read from shapes wherever shapes prove it, from head counts next, from names last.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch.nn as nn

from muonkit._torch import held_parameters, own_modules, own_parameters
from muonkit.routing.names import KV, QKV, QKV_BY_HEAD, makes
from muonkit.routing.numbers import (
    CONFIGS,
    EXPERT_COUNTS,
    HEAD_DIM,
    HEADS,
    INPUTS,
    KV_HEADS,
    OUTPUTS,
    WIDTHS,
    first_number,
    number,
    stated,
)
from muonkit.routing.places import name_set

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from muonkit.routing.places import Site

__all__ = [
    "HeadCounts",
    "UnknownLayout",
    "expert_layout",
    "flat_expert_layout",
    "fused_layout",
    "head_counts",
    "is_by_head",
    "is_fused_qkv",
]

# Fused q, k, v in some models and something else in others: only if the shape says so too.
_QKV_PERHAPS = name_set("c_attn in_proj att_proj attn_proj attn_in_proj")
# In whatever name ("to_q_mlp"): see where it is used.
_ONE_OF_QKV = re.compile(r"(^|_)(q|k|v|query|key|value)(_|$)")
_GATE_UP = name_set("gate_up_proj gate_up up_gate_proj gate_and_up_proj w13 w12 w1_w3")
# A layer and the one that takes its output. Where the second takes half of what the first gives,
# the first fuses two matrices (gate and up of a GLU; x and z of a Mamba block).
_TAKES_OUTPUT = {
    "Wi": "Wo",
    "wi": "wo",
    "fc1": "fc2",
    "in_proj": "out_proj",
    "input_linear": "output_linear",
    "linear_in": "linear_out",
    "w12": "w3",
    "gate_up_proj": "down_proj",
    "gate_up": "down",
}

_KEY_DIM = ("key_dim", "dim_key", "head_k_dim", "qk_dim", "qk_head_dim", "d_k")
_VALUE_DIM = ("val_dim", "value_dim", "dim_value", "head_v_dim", "v_head_dim", "d_v", "d")
# Attributes by which LeViT's attention and its descendants are known: these store head by head.
_LEVIT = ("nh_kd", "key_attn_dim")
_EXPERT_NAME = re.compile(r"[Ee]xpert|MoE|Moe|MOE|(^|_)moe(_|$)")
_DOWN = re.compile(r"(^|_)(down|w2|wo|output|fc2|c_proj|dense_4h_to_h)(_|$)")
_UP = re.compile(r"(^|_)(up|gate|w1|w3|v1|wi|input|fc1|c_fc|w13|w12)(_|$)")


class UnknownLayout(ValueError):
    """A tensor that surely fuses several matrices, with nothing to tell where they meet."""


@dataclass(frozen=True)
class HeadCounts:
    """What a module or its config says about attention heads; None where it says nothing."""

    heads: int | None
    kv_heads: int | None
    head_dim: int | None


# -- 2-D: Linear and Hugging Face's Conv1D -------------------------------------------------------


def fused_layout(site: Site, rows: int, cols: int, *, sure: bool = True) -> tuple[str, str] | None:
    """Where a linear layer of `rows` outputs and `cols` inputs fuses several matrices.

    Args:
        sure: whether it is known that the outputs are the matrix's rows; where not, a layer is
            cut only if its name says that it fuses several.

    Returns:
        (split, reason), such as ("split(rows=3)", "fused q, k, v: 3 equal row blocks"), or None
        where nothing says that the layer is more than one matrix.

    Raises:
        UnknownLayout: fused by name, but neither shapes nor head counts tell how.
    """
    name = site.owner_name
    if not sure:
        return _fused_by_name(site, rows, cols)
    if is_by_head(site):
        return _by_head(site, rows, "fused q, k, v, stored head by head")
    if name in QKV:
        found = (
            _qkv_of_unequal_heads(site, rows)
            or _qkv_of_unequal_parts(site, rows, cols)
            or _qkv(site, rows, cols)
            or _qkv_by_partner(site, rows, cols)
        )
        return found or _by_head(site, rows, "fused q, k, v")
    if name in _QKV_PERHAPS:
        found = _state_space(site, rows) if name == "in_proj" else None
        if found is not None:
            return found
        found = _qkv(site, rows, cols)
        if found is None and name == "c_attn" and rows == 2 * cols:
            found = ("split(rows=2)", "fused k, v of cross-attention: 2 equal row blocks")
        if found is not None and name == "in_proj" and "ttention" not in type(site.parent).__name__:
            # LFM's gated convolution fuses three other matrices; they are cut the same way.
            found = found[0], "three fused matrices: row blocks"
        return found or _halves(site, rows)
    if name in KV:
        return _kv(site, rows, cols)
    # A shared q and k, as Reformer's, has no more rows than one of them.
    if name in ("qk", "to_qk", "qk_proj") and rows == 2 * cols:
        return "split(rows=2)", "fused q, k: 2 equal row blocks"
    if name == "kv_a_proj_with_mqa":
        # DeepSeek's latent of keys and values, and the rotated part of the keys beside it.
        rank, rotated = (number(site.parent, n) for n in ("kv_lora_rank", "qk_rope_head_dim"))
        if rank and rotated and rank + rotated == rows:
            return f"split(rows={rank}+{rotated})", "fused latent and rotated keys"
    if name == "x_proj":
        return _state_space(site, rows)
    if rows == 3 * cols and _is_unnamed_attention(site, cols):
        return "split(rows=3)", "fused q, k, v by shape: 3 equal row blocks"
    return _halves(site, rows)


def _fused_by_name(site: Site, rows: int, cols: int) -> tuple[str, str] | None:
    """For a matrix of which nothing says whether it is stored out × in, or in × out."""
    name = site.owner_name
    below = getattr(site.parent, _TAKES_OUTPUT.get(name, ""), None)
    if name in QKV or (name in _GATE_UP and below is None and rows != cols):
        # q, k and v together have more outputs than inputs; gate and up too, but in small experts.
        found = fused_layout(site, max(rows, cols), min(rows, cols)) if rows != cols else None
        if found is not None and rows > cols:
            return found
        if found is not None:
            return f"transpose > {found[0]}", f"{found[1]} (stored in × out)"
    if name in QKV | QKV_BY_HEAD | KV | _GATE_UP:
        raise UnknownLayout(
            f"several fused matrices, by the name {name}, but nothing tells whether it is stored "
            "out × in or in × out"
        )
    return None


def _qkv(site: Site, rows: int, cols: int) -> tuple[str, str] | None:
    """q, k, v one after the other; k and v smaller than q with grouped queries."""
    seen = head_counts(site)
    if seen.heads and seen.head_dim:
        q, kv = seen.heads * seen.head_dim, (seen.kv_heads or seen.heads) * seen.head_dim
        if q + 2 * kv == rows:
            return _sizes(q, kv)
    return _sizes(cols, cols) if rows == 3 * cols else None


def _qkv_by_partner(site: Site, rows: int, cols: int) -> tuple[str, str] | None:
    """The sizes of q, k and v from the layer beside, where head counts are not to be had."""
    # The output projection takes as many features as q has.
    for q in _widths_taken(site, cols):
        kv = (rows - q) // 2
        if rows > q and (rows - q) % 2 == 0 and q % kv == 0:
            return _sizes(q, kv)
    all_q, all_kv = (number(site.parent, n) for n in ("q_dim", "kv_dim"))
    if all_q and all_kv and all_q + 2 * all_kv == rows:
        return _sizes(all_q, all_kv)
    key, value = (number(site.parent, n) for n in ("key_dim", "value_dim"))
    if key and value and 2 * key + value == rows:  # linear attention
        return (
            f"split(rows={key}+{key}+{value})",
            "fused q, k, v: row blocks from key and value dim",
        )
    return None


def _qkv_of_unequal_heads(site: Site, rows: int) -> tuple[str, str] | None:
    """q, k and v of heads whose values are wider or narrower than their keys."""
    parent = site.parent
    heads = first_number([parent], HEADS)
    key, value = first_number([parent], _KEY_DIM), first_number([parent], _VALUE_DIM)
    if not heads or not key or not value or key == value or rows != heads * (2 * key + value):
        return None
    if any(hasattr(parent, name) for name in _LEVIT):
        sizes = "+".join([f"{key}+{key}+{value}"] * heads)
        return f"split(rows={sizes})", f"fused q, k, v, stored head by head: {heads} heads of each"
    # Pure whether a head's q, k and v lie together or those of all heads do.
    block = math.gcd(key, value)
    return f"split(rows={rows // block})", f"fused q, k, v of unequal widths: blocks of {block}"


def _qkv_of_unequal_parts(site: Site, rows: int, cols: int) -> tuple[str, str] | None:
    """q, k and v of vision models, one after the other, none as wide as the next."""
    heads = first_number([site.parent], HEADS) or 1
    all_qk, all_v, qk, v = (
        number(site.parent, n) or 0 for n in ("dim_out_qk", "dim_out_v", "dim_qk", "dim_v")
    )
    for parts, what in (
        ((all_qk, all_qk, all_v), "fused q, k, v of unequal widths"),
        ((heads * qk, qk, v), "fused q, k, v of a lambda layer: one k and v for all heads"),
        ((1, cols, cols), "fused scores, k and v of linear attention"),
    ):
        if all(parts) and len(set(parts)) > 1 and sum(parts) == rows:
            return f"split(rows={'+'.join(map(str, parts))})", what
    return None


def _kv(site: Site, rows: int, cols: int) -> tuple[str, str] | None:
    """k and v, by the layer that makes q beside them; k and v may be one and the same, too."""
    name = "query" if site.owner_name == "key_value" else site.owner_name.replace("kv", "q")
    partner = getattr(site.parent, name, None)
    q, seen = _out_features(site, partner), head_counts(site)
    halves = "split(rows=2)", "fused k, v: 2 equal row blocks"
    if q is not None:
        for value in _widths_taken(site, _in_features(site, partner) or cols):
            if rows == q + value:
                return (
                    halves
                    if q == value
                    else (f"split(rows={q}+{value})", "fused k, v of unequal widths")
                )
    head_dim = seen.head_dim or (q // seen.heads if q and seen.heads else None)
    fits = head_dim is not None and rows % (2 * head_dim) == 0 and (q or rows) % (rows // 2) == 0
    return halves if fits or rows == 2 * (q or cols) else None


def _state_space(site: Site, rows: int) -> tuple[str, str] | None:
    """A Mamba block's fused projections: (z, x, B, C, dt) of Mamba-2, (dt, B, C) of Mamba-1."""
    parent = [site.parent]
    state = first_number(parent, ("d_state", "ssm_state_size", "state_size"))
    rank = first_number(parent, ("dt_rank", "time_step_rank"))
    if state is None:
        return None
    if site.owner_name == "x_proj":
        if rank is None or rows != rank + 2 * state:
            return None
        return f"split(rows={rank}+{state}+{state})", "fused dt, B and C of a state-space block"
    inner = first_number(parent, ("d_ssm", "d_inner", "intermediate_size"))
    groups, heads = first_number(parent, ("ngroups", "n_groups")), first_number(parent, HEADS)
    if inner is None or groups is None or heads is None:
        return None
    sizes = [inner, inner, groups * state, groups * state, heads]
    rest = rows - sum(sizes)
    if rest > 0 and rest % 2 == 0 and hasattr(site.parent, "d_ssm"):
        sizes = [rest // 2, rest // 2, *sizes]  # a gated MLP beside, as mamba_ssm may have it
    elif rest != 0:
        return None
    cut = "+".join(map(str, sizes))
    return f"split(rows={cut})", "fused z, x, B, C and dt of a state-space block"


def _sizes(q: int, kv: int) -> tuple[str, str]:
    if q == kv:
        return "split(rows=3)", "fused q, k, v: 3 equal row blocks"
    return f"split(rows={q}+{kv}+{kv})", "fused q, k, v of grouped-query attention"


def _by_head(site: Site, rows: int, what: str) -> tuple[str, str]:
    """One block per head: pure in every order of q, k and v that keeps a head's rows together."""
    head_dim = head_counts(site).head_dim
    if not head_dim or rows % head_dim:
        raise UnknownLayout(
            f"{what}, but its {rows} rows cannot be cut: no head_dim that divides them was found "
            f"on {type(site.parent).__name__} or its config"
        )
    return f"split(rows={rows // head_dim})", f"{what}: one block per head (head_dim {head_dim})"


def is_by_head(site: Site) -> bool:
    """Whether a layer that fuses q, k and v has a group of heads after the other: Megatron's order
    by its names, and plain names over it: GPT-BigCode's multi-head form, and CodeGen.
    """
    if site.owner_name in QKV_BY_HEAD:
        return True
    if site.owner_name not in QKV | _QKV_PERHAPS:
        return False
    parent = site.parent
    codegen = type(parent).__name__.startswith("CodeGen")
    bigcode = type(parent).__name__.startswith("GPTBigCode")
    return codegen or (bigcode and getattr(parent, "multi_query", None) is False)


def is_fused_qkv(site: Site, rows: int, cols: int) -> bool:
    """Whether a linear layer surely makes the q, k and v of softmax attention."""
    name = site.owner_name
    if name in QKV or (name in QKV_BY_HEAD and name != "in_proj_qkvz"):
        return True
    if name in _QKV_PERHAPS:
        in_attention = site.parent is not None and "ttention" in type(site.parent).__name__
        return in_attention and rows != 2 * cols  # cross-attention's k and v
    return rows == 3 * cols and _is_unnamed_attention(site, cols)


def _is_unnamed_attention(site: Site, width: int) -> bool:
    if site.parent is None:
        return False
    # Where q, k or v has a layer of its own too, this layer is no fused one: the offsets of
    # deformable attention have three times the width by chance.
    if any(makes(name) or _ONE_OF_QKV.search(name) for name in own_modules(site.parent)):
        return False
    counts = any(number(site.parent, name) for name in HEADS)
    return counts and any(taken == width for taken in _widths_taken(site, width))


def _halves(site: Site, rows: int) -> tuple[str, str] | None:
    """Gate and up in one: by name unless the next layer takes it all, or as that takes half."""
    name = site.owner_name
    taken = _in_features(site, getattr(site.parent, _TAKES_OUTPUT.get(name, ""), None))
    if taken is None and isinstance(site.parent, nn.Sequential):
        return _halves_in_sequence(site, rows)
    if rows % 2 or (taken is not None and taken != rows // 2):
        return None
    if name in _GATE_UP or _is_glu(site):
        return "split(rows=2)", "fused gate and up: 2 equal row blocks"
    if taken is not None:
        return "split(rows=2)", f"two fused halves ({_TAKES_OUTPUT[name]} takes half of its output)"
    return None


def _is_glu(site: Site) -> bool:
    """Whether the parent is a gated linear unit (GEGLU, SwiGLU) with this one layer."""
    parent = site.parent
    return (
        parent is not None
        and type(parent).__name__.upper().endswith("GLU")
        and sum(_in_features(site, module) is not None for module in parent.modules()) == 1
    )


def _halves_in_sequence(site: Site, rows: int) -> tuple[str, str] | None:
    """Gate and up, where the next layer of a Sequential takes half of what this one gives."""
    beside = iter(own_modules(site.parent).values() if site.parent is not None else ())
    any(module is site.owner for module in beside)  # up to this one
    for module in beside:
        taken = _in_features(site, module)
        if taken is not None:
            break
        # What a linear layer gives is not halved where neighbours are pooled, or become positions.
        if isinstance(module, nn.Unflatten) or (
            site.owner in site.linears and "Pool" in type(module).__name__
        ):
            return None
    else:
        return None
    if rows != 2 * taken:
        return None
    return "split(rows=2)", "two fused halves (the next layer takes half of its output)"


def _widths_taken(site: Site, out: int) -> list[int]:
    """Input widths of the linear layers beside or below that give `out` features back."""
    widths = []
    for module in site.parent.modules() if site.parent is not None else ():
        taken, given = _in_features(site, module), _out_features(site, module)
        if module is not site.owner and taken is not None and given == out:
            widths.append(taken)
    return widths


def _in_features(site: Site, module: object) -> int | None:
    return first_number([module], INPUTS) or _linear_widths(site, module)[1]


def _out_features(site: Site, module: object) -> int | None:
    return first_number([module], OUTPUTS) or _linear_widths(site, module)[0]


def _linear_widths(site: Site, module: object) -> tuple[int | None, int | None]:
    """(outputs, inputs) of a linear layer, else (None, None)."""
    widths = site.linears.widths(module) if module in site.linears else None
    return widths or (None, None)


def head_counts(site: Site) -> HeadCounts:
    """From the parent itself, then from its config or the nearest config above it."""
    sources: list[object] = [site.parent]
    above = (stated(module, name) for module in reversed(site.ancestors) for name in CONFIGS)
    config = next((found for found in above if found is not None), None)
    # A model of text and pictures keeps the numbers of each in a config of its own.
    sources += [config, stated(config, "text_config")]
    heads, kv_heads = first_number(sources, HEADS), first_number(sources, KV_HEADS)
    # Linear attention has its own head sizes beside the config's; what divides both cuts
    # every block pure.
    key, value = (number(site.parent, name) for name in ("head_k_dim", "head_v_dim"))
    head_dim = math.gcd(key, value) if key and value else first_number(sources, HEAD_DIM)
    hidden = first_number(sources, WIDTHS)
    if head_dim is None and heads and hidden and hidden % heads == 0:
        head_dim = hidden // heads
    return HeadCounts(heads, kv_heads, head_dim)


# -- experts -------------------------------------------------------------------------------------


def expert_layout(site: Site, shape: Sequence[int]) -> tuple[str, str] | None:
    """The view of a stack of experts, (E, rows, cols) or (E, cols, rows); None if it is none.

    Raises:
        UnknownLayout: gate and up are fused, but along which dimension cannot be told.
    """
    if not _is_expert_stack(site, shape[0]):
        return None
    transposed, basis = _is_transposed(site, shape)
    view = "experts > transpose" if transposed else "experts"
    reason = f"{shape[0]} experts, stored {'in × out' if transposed else 'out × in'}{basis}"
    if not _fuses_gate_and_up(site, shape, transposed):
        return view, reason
    if transposed is None:
        raise UnknownLayout(
            "experts that fuse gate and up, but nothing tells which dimension holds the two"
        )
    if getattr(site.owner, "is_concatenated", True) is False:
        # Alternate rows cannot be cut as blocks; a pair stays one matrix.
        return view, f"{reason}; gate and up alternate, kept as one matrix"
    return f"{view} > split(rows=2)", f"{reason}, each fused gate and up"


def flat_expert_layout(site: Site, shape: Sequence[int]) -> tuple[str, str] | None:
    """The view of experts stacked in the rows of a 2-D tensor (DBRX, MegaBlocks): (E·m, n)."""
    count = _expert_count(site)
    if not count or not _EXPERT_NAME.search(site.owner_class) or shape[0] == count:
        return None
    if shape[0] % count:
        return None
    hidden = number(site.owner, "hidden_size")
    down = _DOWN.search(site.key) is not None
    # All of them are E·ffn × hidden, so a down projection is stored in × out.
    view = f"split(rows={count})" + (" > transpose" if down and shape[1] == hidden else "")
    return view, f"{count} experts, stacked in the rows"


def _is_expert_stack(site: Site, count: int) -> bool:
    if _expert_count(site) == count:
        return True
    names = (site.owner_class, site.owner_name, site.label)
    return any(_EXPERT_NAME.search(name) for name in names)


def _expert_count(site: Site) -> int | None:
    return first_number([site.owner], EXPERT_COUNTS)


def _is_transposed(site: Site, shape: Sequence[int]) -> tuple[bool | None, str]:
    """Whether an expert is stored in × out, and how we know; None if nothing tells."""
    flag = getattr(site.owner, "is_transposed", None)
    if isinstance(flag, bool):
        return flag, ""
    _, first, second = shape
    up, down = _partners(site)
    if up is not None and down is not None:
        # The second takes all or half of what the first gives; both have the model's width outside.
        stored_out_in = up[0] in (down[1], 2 * down[1]) and up[1] == down[0]
        stored_in_out = up[1] in (down[0], 2 * down[0]) and up[0] == down[1]
        if stored_out_in != stored_in_out:
            return stored_in_out, ""
    gives = first_number([site.owner], ("out_features", "output_size", "out_dim"))
    takes = first_number([site.owner], ("in_features", "input_size", "in_dim"))
    if gives and takes and gives != takes and {gives, takes} == {first, second}:
        return first == takes, ""
    sources = [site.owner, getattr(site.owner, "config", None)]
    hidden = first_number(sources, ("hidden_size", "d_model"))
    if hidden and first != second and hidden in (first, second):
        output_is_first = (first == hidden) == (_DOWN.search(site.key) is not None)
        return not output_is_first, ""
    return None, " (assumed)"


def _partners(site: Site) -> tuple[Sequence[int] | None, Sequence[int] | None]:
    """The expert shapes of the owner's up (or gate-and-up) and down stacks, as stored."""
    shapes = {k: p.shape[1:] for k, p in held_parameters(site.owner).items() if p.ndim == 3}
    up = _one(shape for key, shape in shapes.items() if _UP.search(key))
    down = _one(shape for key, shape in shapes.items() if _DOWN.search(key))
    return up, down


def _fuses_gate_and_up(site: Site, shape: Sequence[int], transposed: bool | None) -> bool:
    if site.key in _GATE_UP:
        return True
    _, down = _partners(site)
    partner = getattr(site.parent, _TAKES_OUTPUT.get(site.owner_name, ""), None)
    if site.label == "weight" and isinstance(partner, nn.Module):
        weight = own_parameters(partner).get("weight")
        down = weight.shape[1:] if weight is not None and weight.ndim == 3 else None
    if down is None or _UP.search(site.key) is None or transposed is None:
        return False
    gives = shape[2] if transposed else shape[1]
    takes = down[0] if transposed else down[1]
    return gives == 2 * takes


# -- small readers -------------------------------------------------------------------------------


def _one(shapes: Iterable[Sequence[int]]) -> Sequence[int] | None:
    """The shape, if all agree on one."""
    distinct = {tuple(shape) for shape in shapes}
    return distinct.pop() if len(distinct) == 1 else None
