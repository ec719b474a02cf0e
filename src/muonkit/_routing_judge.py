"""One parameter -> one verdict, by module type and identity first and by name last.

`judge` reads as the list of rules that docs/routing-tables.md shows at work: the first that knows
the parameter decides. A new kind of layer is one more function here.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch.nn as nn

from muonkit._routing_layout import (
    UnknownLayout,
    expert_layout,
    flat_expert_layout,
    fused_layout,
)
from muonkit._routing_places import LORA, is_conv, is_depthwise, name_set
from muonkit._shards import WHOLE, flat_shard
from muonkit._torch import FLAT_PARAMETER

if TYPE_CHECKING:
    from muonkit._routing_places import Site
    from muonkit._routing_survey import Survey

__all__ = ["Undecided", "Verdict", "is_vector", "judge"]

_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
_TRANSPOSED_CONVS = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)

# Raw parameters that stand for tokens or positions: rows are looked up or added, never multiplied.
_TOKEN_OR_POSITION = re.compile(
    r"(^|_)(pos|position|positions|positional|pe|wpe)(_|$)|pos_?emb|pos_?enc|rel(ative)?_pos"
    r"|position_bias|(^|_)(token|tokens|query|queries|latent|latents|prompt|prompts)$"
    r"|(^|_)emb(ed|eds|edding|eddings)?$|(^|_)emb_rel"
)
_POSITION = re.compile(r"pos|(^|_)w?pe$|relative")
_POSITION_CLASS = re.compile(r"Position|PosEmb|PosEnc")
_EMBEDDING_CLASS = re.compile(r"Embedding|EmbeddingTable")
# 2-D raw parameters that act element by element: state-space rates, gains stored as tables.
_ELEMENTWISE = name_set(
    "A_log A_logs A_b_log time_decay time_first gamma beta scale layer_scale layerscale "
    "scale_shift_table"
)
_ROUTER = re.compile(r"[Rr]outer|TopKGate")
_GAINS = name_set("weight scale gamma g gain")
_RNN_WEIGHT = re.compile(r"weight_(ih|hh|hr)(_l\d+)?(_reverse)?")


@dataclass(frozen=True)
class Verdict:
    """What becomes of a parameter. `view` is None exactly where `algorithm` is "adamw"."""

    algorithm: str
    view: str | None
    decay: bool
    reason: str


class Undecided(ValueError):
    """No rule knows this parameter; the message says what is missing.

    Attributes:
        final: no algorithm can train it as it is, so that no `Rule` settles it.
    """

    def __init__(self, message: str, *, final: bool = False) -> None:
        super().__init__(message)
        self.final = final


def judge(
    sites: list[Site], param: nn.Parameter, facts: Survey, *, hidden: bool = False
) -> Verdict:
    """The verdict on one trainable parameter, from all the places where it stands.

    `hidden` asks what it would get as a hidden layer, whether it is a head or stem or not.

    Raises:
        Undecided: no safe choice exists.
    """
    if isinstance(param, nn.parameter.UninitializedParameter):
        raise Undecided(
            "is not initialized: run one batch through the lazy module first", final=True
        )
    # A tied tensor is an embedding, whatever else it is (docs/pitfalls.md, 16).
    for site in sites:
        _refuse_shards(site, param)
        if isinstance(site.owner, _EMBEDDINGS) and site.label == "weight":
            kind = "positional embedding" if _POSITION.search(site.owner_name) else "embedding"
            tied = ", tied to the output head" if id(param) in facts.heads else ""
            return _adamw(f"{kind}{tied}")
    site = sites[0]
    if id(param) in facts.heads and not hidden:
        return _adamw(facts.heads[id(param)])
    if id(param) in facts.stems and not hidden and not is_vector(param):
        return _adamw(facts.stems[id(param)])
    try:
        verdict = (
            _low_rank_adapter(site)
            or _vector(site, param)
            or _layer(site, param)
            or _raw(site, param)
        )
    except UnknownLayout as error:
        raise Undecided(str(error)) from error
    if id(param) in facts.doubts and verdict.algorithm == "muon":
        return replace(verdict, reason=f"{verdict.reason} ({facts.doubts[id(param)]})")
    return verdict


def is_vector(param: nn.Parameter) -> bool:
    """At most one dimension is not one: nothing to orthogonalize, however it is stored."""
    return sum(extent != 1 for extent in param.shape) <= 1 or param.numel() == 0


def _adamw(reason: str, *, decay: bool = True) -> Verdict:
    return Verdict("adamw", None, decay, reason)


def _muon(view: str, reason: str) -> Verdict:
    return Verdict("muon", view, True, reason)


def _refuse_shards(site: Site, param: nn.Parameter) -> None:
    """A matrix seen as a 1-D shard would go to AdamW unnoticed (docs/pitfalls.md, 18)."""
    matrix_layer = isinstance(site.owner, (nn.Linear, *_EMBEDDINGS)) or is_conv(site.owner)
    flat = flat_shard(param)
    if flat is None and FLAT_PARAMETER in site.label:
        flat = "a vector of several parameters (FSDP1)"
    if flat is None and matrix_layer and site.label == "weight" and param.ndim < 2:
        flat = f"a {param.ndim}-D piece of a matrix (a flat shard)"
    if flat is not None:
        raise Undecided(f"is {flat}. {WHOLE}", final=True)


def _low_rank_adapter(site: Site) -> Verdict | None:
    adapter = next((part for part in (*site.parts, site.label) if part in LORA), None)
    if adapter is None:
        return None
    if adapter == "lora_magnitude_vector":
        return _adamw("DoRA magnitude", decay=False)
    return _adamw(f"low-rank adapter factor ({adapter})")


# -- vectors --------------------------------------------------------------------------------------


def _vector(site: Site, param: nn.Parameter) -> Verdict | None:
    if not is_vector(param):
        return None
    return _adamw(_vector_reason(site, param), decay=False)


def _vector_reason(site: Site, param: nn.Parameter) -> str:
    label = site.label
    if "Norm" in site.owner_class:
        return "norm gain" if label in _GAINS else "norm bias" if "b" in label else "norm vector"
    if isinstance(site.owner, nn.MultiheadAttention) and label in ("bias_k", "bias_v"):
        return f"attention {label}"
    if param.numel() == 0:
        return "empty"
    if _TOKEN_OR_POSITION.search(label):
        return "token or positional"
    if label.startswith("bias") or label.endswith("bias"):
        return "bias"
    if param.numel() == 1:
        return "scalar"
    stored = "×".join(map(str, param.shape))
    return "vector" if param.ndim == 1 else f"vector (stored as {stored})"


# -- layers whose class says what they are ----------------------------------------------------


def _layer(site: Site, param: nn.Parameter) -> Verdict | None:
    owner = site.owner
    if isinstance(owner, nn.MultiheadAttention):
        return _attention(site)
    if isinstance(owner, (nn.RNNBase, nn.RNNCellBase)):
        return _recurrent(site, param, owner)
    if site.label != "weight":
        return None
    if isinstance(owner, nn.Bilinear):
        return _adamw("bilinear form")
    if isinstance(owner, nn.Linear):
        return _linear(site, param, stored=(owner.out_features, owner.in_features))
    if type(owner).__name__ == "Conv1D" and hasattr(owner, "nf") and param.ndim == 2:
        return _stored_transposed(site, param, "Hugging Face Conv1D, stored in × out")
    if is_conv(owner):
        return _conv(site)
    if isinstance(owner, _TRANSPOSED_CONVS):
        return _conv_transpose(owner)
    return None


def _attention(site: Site) -> Verdict | None:
    if site.label == "in_proj_weight":
        return _muon("split(rows=3)", "fused q, k, v: 3 equal row blocks")
    if site.label in ("q_proj_weight", "k_proj_weight", "v_proj_weight"):
        return _muon("matrix", "attention projection")
    return None


def _recurrent(site: Site, param: nn.Parameter, owner: nn.Module) -> Verdict | None:
    match = _RNN_WEIGHT.fullmatch(site.label)
    if match is None:
        return None
    gates = param.shape[0] // int(getattr(owner, "hidden_size", param.shape[0]))
    if match[1] == "hr" or gates == 1:
        return _muon("matrix", "recurrent layer")
    return _muon(f"split(rows={gates})", f"recurrent layer: {gates} gates")


def _linear(site: Site, param: nn.Parameter, stored: tuple[int, int]) -> Verdict | None:
    if tuple(param.shape) == stored[::-1] and stored[0] != stored[1]:
        return _stored_transposed(site, param, f"{site.owner_class}, stored in × out")
    if tuple(param.shape) != stored:
        return None  # another storage under a Linear's name: judged as a raw parameter
    fused = fused_layout(site, *stored)
    if fused is not None:
        return _muon(*fused)
    # A router gives one number per expert, which a gate of a hidden width does not.
    narrow_gate = site.owner_name == "gate" and 4 * stored[0] <= stored[1]
    if narrow_gate or _ROUTER.search(f"{site.owner_name} {site.owner_class}"):
        return _muon("matrix", f"router ({site.owner_class})")
    return _muon("matrix", "hidden linear layer")


def _stored_transposed(site: Site, param: nn.Parameter, reason: str) -> Verdict:
    cols, rows = param.shape
    fused = fused_layout(site, rows, cols)
    if fused is None:
        return _muon("transpose", reason)
    return _muon(f"transpose > {fused[0]}", f"{fused[1]} ({reason})")


def _conv(site: Site) -> Verdict:
    owner = site.owner
    assert isinstance(owner, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
    if is_depthwise(owner):
        return _adamw("depthwise convolution")
    if owner.groups > 1:
        if owner.out_channels == owner.groups:
            return _adamw("grouped convolution with one filter per group")
        return _muon(f"flatten > split(rows={owner.groups})", f"{owner.groups} convolution groups")
    if all(extent == 1 for extent in owner.kernel_size):
        fused = fused_layout(site, owner.out_channels, owner.in_channels)
        if fused is not None:
            return _muon(f"flatten > {fused[0]}", f"{fused[1]} (1×1 convolution)")
    return _muon("flatten", "hidden convolution")


def _conv_transpose(owner: nn.Module) -> Verdict:
    groups = int(getattr(owner, "groups", 1))
    if groups == 1:
        return _muon("flatten > transpose", "transposed convolution, stored in × out")
    if is_depthwise(owner):
        return _adamw("depthwise convolution")
    return _muon(
        f"flatten > split(rows={groups}) > transpose", f"{groups} transposed convolution groups"
    )


# -- parameters that a module of unknown class holds itself ------------------------------------


def _raw(site: Site, param: nn.Parameter) -> Verdict:
    label, owner = site.label, site.owner_class
    table_of_biases = label.endswith(("bias", "biases")) or label.startswith("bias_")
    if table_of_biases and not _TOKEN_OR_POSITION.search(label):
        return _adamw("bias (a table of them)", decay=False)
    if _TOKEN_OR_POSITION.search(label) or _POSITION_CLASS.search(owner):
        return _adamw("token or positional", decay=False)
    if _EMBEDDING_CLASS.search(owner) and label in ("weight", "embedding", "embeddings", "table"):
        return _adamw(f"embedding ({owner})")
    if label in _ELEMENTWISE:
        return _adamw(f"elementwise parameter of {owner}", decay=False)
    if param.ndim == 2:
        return _raw_matrix(site, param)
    experts = expert_layout(site, param.shape) if param.ndim == 3 else None
    if experts is not None:
        return _muon(*experts)
    raise Undecided("which of its dimensions form a matrix does not follow from its module")


def _raw_matrix(site: Site, param: nn.Parameter) -> Verdict:
    experts = flat_expert_layout(site, param.shape)
    if experts is not None:
        return _muon(*experts)
    if _ROUTER.search(site.owner_class) or _ROUTER.search(site.key):
        return _muon("matrix", f"router ({site.owner_class})")
    return _muon("matrix", f"matrix of {site.owner_class}")
