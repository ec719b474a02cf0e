"""Parameters that a module of unknown class holds itself: what their names, their shapes and the
module's own numbers say of them.

Names are read as whole words (`W_query` is a weight, `query_tokens` are tokens), the last word
being what the thing is. Where nothing speaks for a matrix a parameter is undecided: raw tensors are
tokens, tables and coefficients as often as they are layers.
"""

from __future__ import annotations

import contextlib
import functools
import re
from typing import TYPE_CHECKING

import torch
import torch.nn as nn

from muonkit._torch import held_parameters, own_parameters
from muonkit.routing.layouts import expert_layout, flat_expert_layout, fused_layout
from muonkit.routing.linears import EMBEDDING_CLASS
from muonkit.routing.losses import counts_classes, gives_loss
from muonkit.routing.names import ROUTER
from muonkit.routing.numbers import (
    CONFIGS,
    EXPERT_COUNTS,
    HEAD_DIM,
    HEADS,
    KERNEL_SIZES,
    KV_HEADS,
    first_number,
    number,
    stated,
    widths_of,
)
from muonkit.routing.places import name_set
from muonkit.routing.verdicts import Undecided, Verdict, adamw, muon

if TYPE_CHECKING:
    from muonkit.routing.places import Site

__all__ = [
    "is_learned_tokens",
    "is_position",
    "is_token_or_position",
    "is_triangular",
    "judge_classes",
    "judge_raw",
]

# -- words ----------------------------------------------------------------------------------------

_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")

# Rows that are added at a place, or looked up by a distance.
_POSITION = name_set(
    "pos position positions positional posemb posembed posembedding posenc pe wpe ape rpe rpb "
    "rel relpos relative distance distances"
)
_EMBEDDING = name_set("emb embs embed embeds embedding embeddings unembed unembedding vocab")
# Modules that hold an embedding, of a class whose name does not say so.
_VOCABULARY = re.compile(
    r"(?!.*patch)(?!.*un)(?!(time|timesteps?|t)_)(.*_)?(embed|emb|embeds|embedding|embeddings)(_tokens?|_in)?|wte|vocab"
)
_TABLES = name_set("vocab vocabulary table lookup embedder item items user users")
_SURELY_TABLES = _TABLES | name_set(
    "token tokens tok codebook codebooks codevector codevectors prototype prototypes centroid "
    "centroids center centers dictionary pos position positions positional"
)
# Such are projected as often.
_ASKED = name_set("query queries probe probes rel relative pe")
# Rows that stand beside those of the input.
_TOKENS = name_set(
    "token tokens tok cls register registers mem memory memories null latent latents prompt "
    "prompts query queries probe probes slot slots seed seeds inducing anchor anchors prototype "
    "prototypes centroid centroids center centers codebook codebooks codevector codevectors "
    "codes codewords dictionary landmark landmarks quantizer quantizers"
)
# An nn.Embedding may hold such learned tokens too; its vocabulary is called "tokens" as well.
_LEARNED = name_set(
    "cls register registers latent latents prompt prompts query queries slot slots probe probes"
)
# Parameters that act entry by entry, tables of coefficients, and a state-space model's structure.
_ENTRIES = name_set(
    "scale scales scaling scaler scalers gamma gammas beta betas alpha alphas sigma sigmas rho "
    "std var logvar log temperature temp tau lambda lambdas gain gains norm offset offsets shift "
    "shifts decay freq freqs frequency frequencies phase phases mask masks affine grid coef "
    "coefs coeff coeffs coefficient coefficients comp delta dt real imag re im complex fourier "
    "spectral filter filters wavelet wavelets mix maa faaaa att attn attention tril triu tri "
    "lower upper causal cholesky chol layerscale mu mean loc"
)
_WHOLE_ENTRIES = name_set("scale_shift_table time_first A_logs A_b_log")
_WEIGHT = name_set(
    "weight weights w proj projs projection projections projector kernel kernels matrix matrices "
    "mat linear lin fc mlp ffn dense fn gate root wq wk wv wo wi wh wx wz wr wu wqkv ws"
)
# Names that only a layer's weight has. "w" is none of them: `rel_pos_w` is a table for the width.
_SURELY_WEIGHT = _WEIGHT - {"w", "gate", "root", "fn"}
_PROJECTION = name_set("proj projs projection projections projector linear lin fc mlp dense")
# A query beside keys or values is projected to; one that stands alone is a token.
_PARTNERS = {
    "query": ("key", "value"),
    "queries": ("keys", "values"),
    "q": ("k", "v"),
    "k": ("q", "v"),
    "v": ("q", "k"),
    "key": ("query", "value"),
    "value": ("query", "key"),
    "u": ("w",),
}

_NUMBERED = re.compile(r"[Ww](\d+|_\w+)?")
_POSITION_CLASS = re.compile(r"Position(?!-?_?[Ww]ise)|PosEmb|PosEnc")
_EMBEDDING_LABEL = name_set("weight weights W w kernel embedding embeddings table W_E")
_SPECTRAL_CLASS = re.compile(r"Fourier|Spectral|FNO|FFT|Frequency|GlobalFilter")
_STATE_SPACE_CLASS = re.compile(r"SSM|S4|S5|SSKernel|LRU|StateSpace|Mamba|HiPPO|Hippo")
_STATE_SPACE = name_set("A B C D E P Q Lambda log_A A_log B_re B_im C_re C_im")

# How many matrices of its widths a module has, in graph libraries.
_COUNTS = ("num_types", "num_relations", "num_rels", "num_bases", "num_edge_types", "num_stacks")
_HEAD_WIDTHS = (*HEAD_DIM, "block_width", "key_dim", "value_dim", "head_k_dim", "head_v_dim")


@functools.lru_cache(maxsize=4096)
def words_of(name: str) -> tuple[str, ...]:
    """The words of a name in lower case, without numbers: ("w", "query") of `W_query`."""
    return tuple(word.lower() for word in _WORD.findall(name))


def is_position(name: str) -> bool:
    """Whether a table of this name belongs to positions."""
    # "rel" alone is a relation of a knowledge graph as often.
    return not (_POSITION - {"rel"}).isdisjoint(words_of(name))


def is_token_or_position(label: str) -> bool:
    """Whether a vector of this name stands for a token or a place."""
    return not (_POSITION | _EMBEDDING | _TOKENS).isdisjoint(words_of(label))


def is_learned_tokens(name: str) -> bool:
    """Whether an embedding of this name has tokens of the model's own, not of a vocabulary."""
    return not _LEARNED.isdisjoint(words_of(name))


# -- the rules ------------------------------------------------------------------------------------


def judge_raw(site: Site, param: nn.Parameter) -> Verdict:
    """The verdict on a parameter of two dimensions or more, none of a known layer.

    Raises:
        Undecided: nothing says what it is.
        UnknownLayout: it fuses experts in a way that cannot be told.
    """
    found = _by_name(site, param) or _by_shape(site, param)
    if found is not None:
        return found
    matrix = "flatten" if param.ndim > 2 else "matrix"
    if all(extent == 1 for extent in param.shape[2:]):
        return _matrix(site, param, matrix)
    layout = _stack(site, param) or _by_head(site, param)
    if layout is None:
        raise Undecided("which of its dimensions form a matrix does not follow from its module")
    return muon(*layout)


def judge_classes(site: Site, param: nn.Parameter) -> Verdict | None:
    """The verdict on the matrices of a loss or of a classifier with a margin: an output head, where
    their names say nothing else. None for those of other modules.
    """
    if not gives_loss(site) and not counts_classes(site, param):
        return None
    return _by_name(site, param) or adamw(f"output head (classes of {site.owner_class})")


def _by_name(site: Site, param: nn.Parameter) -> Verdict | None:
    label, owner = site.label, site.owner_class
    words = set(words_of(label))
    last = words_of(label)[-1:]
    positional = not words.isdisjoint(_POSITION) and _SURELY_WEIGHT.isdisjoint(last)
    named = label.endswith(("bias", "biases")) or label.startswith("bias_")
    if named or _has_its_own_weight(site, param):
        if not positional:
            return adamw("bias (a table of them)", decay=False)
    elif _is_projected(site, param):
        return None  # its name says what it gives
    embedded = not words.isdisjoint(_EMBEDDING) and _PROJECTION.isdisjoint(last)
    kind = words_of(owner)[-1:]
    unstated = param.ndim == 2 and first_number([site.owner], EXPERT_COUNTS) is None
    unstated = unstated and widths_of(site.owner) is None
    if label == "weight" and unstated and _WEIGHT.isdisjoint(words_of(site.owner_name)[-1:]):
        # What the module is called says what a thing called "weight" is.
        place = words_of(site.owner_name)[-1:]
        if is_position(site.owner_name) and not (_POSITION | _EMBEDDING).isdisjoint(place):
            return adamw("learned token or position", decay=False)
        if _VOCABULARY.fullmatch(site.owner_name) or not _TABLES.isdisjoint(kind):
            return adamw(f"embedding ({owner})")
        if not (_TOKENS - _ASKED).isdisjoint(kind):
            return adamw("learned token or position", decay=False)
    is_weight = last in (("weight",), ("w",), ("matrix",)) and len(words) == 2
    if is_weight and unstated and not _SURELY_TABLES.isdisjoint(words):
        return adamw("learned token or position", decay=False)
    tokens = not words.isdisjoint(_TOKENS) and words.isdisjoint(_WEIGHT)
    if positional or embedded or tokens or _POSITION_CLASS.search(owner):
        return adamw("learned token or position", decay=False)
    if _is_embedding(site, param):
        return adamw(f"embedding ({owner})")
    entries = not words.isdisjoint(_ENTRIES) and (not last or last[0] not in _WEIGHT)
    mean_of_weight = last == ("mu",) and not words.isdisjoint(_WEIGHT)
    if label in _WHOLE_ENTRIES or (entries and not mean_of_weight):
        return adamw(f"elementwise parameter of {owner}", decay=False)
    if label in _STATE_SPACE and _STATE_SPACE_CLASS.search(owner):
        return adamw(f"state-space parameter of {owner}", decay=False)
    spectral = _SPECTRAL_CLASS.search(owner) or not words.isdisjoint(("complex", "spectral"))
    if spectral and param.shape[-1] == 2 and param.ndim > 2:
        return adamw("spectral filter (real and imaginary parts)")
    return None


def _has_its_own_weight(site: Site, param: nn.Parameter) -> bool:
    """Whether a `b_Q` stands beside a `W_Q` of one dimension more: a bias of every head."""
    if not site.label.startswith(("b_", "B_")):
        return False
    own = own_parameters(site.owner)
    beside = (own.get(f"{letter}{site.label[1:]}") for letter in "Ww")
    return any(other is not None and other.ndim == param.ndim + 1 for other in beside)


def _is_projected(site: Site, param: nn.Parameter) -> bool:
    """Whether the module holds this for queries beside one for keys or values (`W_query` and
    `W_key`, `q` and `v`): siblings, which are trained alike."""
    words = words_of(site.label)
    siblings = {
        words_of(name)
        for name, other in own_parameters(site.owner).items()
        if other is not None and other is not param and other.ndim == param.ndim == 2
    }
    return any(
        (*words[:i], partner, *words[i + 1 :]) in siblings
        for i, word in enumerate(words)
        for partner in _PARTNERS.get(word, ())
    )


def _is_embedding(site: Site, param: nn.Parameter) -> bool:
    if site.label in _EMBEDDING_LABEL and EMBEDDING_CLASS.search(site.owner_class):
        return True
    if site.label == "W_E" and not {"W_U", "W_pos"}.isdisjoint(own_parameters(site.owner)):
        return True
    rows, cols = (number(site.owner, n) for n in ("num_embeddings", "embedding_dim"))
    return rows is not None and tuple(param.shape) == (rows, cols)


def _by_shape(site: Site, param: nn.Parameter) -> Verdict | None:
    """The verdict on a shape that no layer's weight has; None for any other shape."""
    shape, experts = tuple(param.shape), None
    stored = "×".join(map(str, shape))
    if param.ndim == 3:
        experts = expert_layout(site, shape)
    if experts is not None:
        return muon(*experts)
    if _has_its_own_bias(site, param):
        return adamw(f"elementwise parameter of {site.owner_class}: its bias has its shape")
    if param.ndim == 2:
        flat = flat_expert_layout(site, shape)
        if flat is not None:
            return muon(*flat)
        count = first_number([site.owner], EXPERT_COUNTS)
        if shape[0] == count and shape[1] not in (widths_of(site.owner) or (shape[1],)):
            return adamw(f"{count} experts, each flattened to a row")
    elif shape[0] == 1:
        return adamw(f"broadcast over the batch (stored as {stored})", decay=False)
    elif shape[1] == 1:
        return adamw(f"per-channel filters (stored as {stored})")
    sides = tuple(extent for extent in shape if extent != 1)
    kernels = {number(site.owner, name) for name in KERNEL_SIZES} - {None}
    if len(sides) == 2 and kernels.intersection(sides) and widths_of(site.owner) is None:
        return adamw("per-channel filters (one side is the kernel size)")
    if param.ndim == 2 and max(sides) < 8:
        return adamw(f"small table ({stored})", decay=False)
    heads = first_number([site.owner, site.parent], (*HEADS, *KV_HEADS))
    if heads is not None and sides == (heads, heads):
        return adamw("mixes attention heads", decay=False)
    if is_triangular(param):
        return adamw("triangular matrix", decay=False)
    return None


def _has_its_own_bias(site: Site, param: nn.Parameter) -> bool:
    """Whether a bias of the same shape stands beside: then the two act entry by entry, as in an
    embedding of numbers."""
    return any(
        name.startswith("bias") and other is not None and other.shape == param.shape
        for name, other in own_parameters(site.owner).items()
        if other is not param
    )


def is_triangular(param: nn.Parameter) -> bool:
    """Exactly zero on one side of the diagonal, and on that one only."""
    if param.ndim != 2 or param.shape[0] != param.shape[1] or hasattr(param, "device_mesh"):
        return False
    if param.is_meta:
        return False
    with torch.no_grad(), contextlib.suppress(RuntimeError):  # a fake tensor has no values
        lower, upper = param.tril(-1).any().item(), param.triu(1).any().item()
        return bool(lower != upper)
    return False


def _matrix(site: Site, param: nn.Parameter, view: str) -> Verdict:
    """A raw parameter of two sides: a layer if its module's widths, its name or its siblings say
    so."""
    owner = site.owner_class
    if ROUTER.search(owner) or ROUTER.search(site.key):
        return muon(view, f"router ({owner})")
    turned, how = _by_widths(site, param) or (_by_bias(site, param), None)
    if turned:
        view = "transpose" if view == "matrix" else f"{view} > transpose"
    rows, cols = reversed(param.shape[:2]) if turned else param.shape[:2]
    # Where no widths are stated nothing says which side is which.
    sure = how is not None
    fused = fused_layout(site, rows, cols, sure=sure) if site.label == "weight" else None
    if fused is not None:
        return muon(fused[0] if view == "matrix" else f"{view} > {fused[0]}", fused[1])
    if how is not None:
        return muon(view, f"matrix of {owner}{how}")
    words = set(words_of(site.label))
    factors = site.label in ("U", "V") and "W" in own_parameters(site.owner)
    if not words.isdisjoint(_WEIGHT) or factors or _is_projected(site, param):
        return muon(view, f"matrix of {owner}")
    raise Undecided("nothing says that it is the weight of a layer")


def _by_widths(site: Site, param: nn.Parameter) -> tuple[bool, str] | None:
    """Whether a parameter of two sides is stored in × out, by the widths that its module states;
    None where they are others. One side may be several times as wide (heads, kernels)."""
    widths = widths_of(site.owner)
    if widths is None:
        return None
    out, inputs = widths
    rows, cols = param.shape[:2]
    if rows == cols and rows in widths:
        return False, ""
    if cols == inputs and rows % out == 0:
        return False, ", stored out × in"
    if rows == inputs and cols % out == 0:
        return True, ", stored in × out"
    return None


def _by_bias(site: Site, param: nn.Parameter) -> bool:
    """Whether it is stored in × out by biases: that of a `W1` or `W_in` is `b1` or `b_in`, and a
    module stores all such in one way."""
    if not _NUMBERED.fullmatch(site.label) or param.ndim != 2:
        return False
    own = held_parameters(site.owner)
    told = {
        bias.numel() == matrix.shape[1]
        for label, matrix in own.items()
        if _NUMBERED.fullmatch(label) and matrix.ndim == 2 and matrix.shape[0] != matrix.shape[1]
        if (bias := own.get(f"b{label[1:]}")) is not None and bias.numel() in matrix.shape
    }
    return told == {True}


def _stack(site: Site, param: nn.Parameter) -> tuple[str, str] | None:
    """The layout of a convolution or of a stack of matrices, by its module's own widths."""
    widths = widths_of(site.owner)
    if widths is None:
        return None
    shape, owner = tuple(param.shape), site.owner_class
    turned = widths[::-1]
    counted = shape[0] in {number(site.owner, name) for name in _COUNTS}
    if shape[:2] == widths and not counted:
        return "flatten", f"out × in × {'×'.join(map(str, shape[2:]))} of {owner}"
    if shape[:2] == turned and "Transpose" in owner:
        return "flatten > transpose", f"transposed convolution of {owner}"
    if shape[-2] == shape[-1] and shape[-1] in widths:
        return "experts", f"matrices of {owner}"
    if shape[-2:] == widths:
        return "experts", f"matrices of {owner}, stored out × in"
    if shape[-2:] == turned:
        return "experts > transpose", f"matrices of {owner}, stored in × out"
    return None


def _by_head(site: Site, param: nn.Parameter) -> tuple[str, str] | None:
    """The layout of attention's projections with a dimension for the heads."""
    if param.ndim != 3:
        return None
    configs = [found for name in CONFIGS if (found := stated(site.owner, name)) is not None]
    sources = [site.owner, *configs]
    counts = {number(s, n) for s in sources for n in (*HEADS, *KV_HEADS)} - {None}
    head_widths = {number(s, n) for s in sources for n in _HEAD_WIDTHS} - {None}
    words = set(words_of(site.label))
    gives = not words.isdisjoint(("o", "out", "output", "wo"))
    takes = not words.isdisjoint(("q", "k", "v", "r", "query", "key", "value", "wq", "wk", "wv"))
    first, second, third = param.shape
    if first in counts and second == third and second in head_widths:
        return "experts", "one square matrix per head (block diagonal)"
    if gives == takes:
        return None
    if second in counts and third in head_widths:
        # (d, heads, d_head): XLNet's, one matrix.
        view = "flatten" if gives else "flatten > transpose"
        return view, "attention projection of all heads"
    if first not in counts or (second in head_widths) == (third in head_widths):
        return None
    # Plain where what it gives comes first: a head's width, or of the output the model's.
    plain = (second in head_widths) == takes
    return "experts" if plain else "experts > transpose", "attention projections, one per head"
