"""One parameter -> one verdict, by module type and identity first and by name last.

`judge` reads as the list of rules that docs/routing-tables.md shows at work: the first that knows
the parameter decides. A new kind of layer is one more function here.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
import torch.nn as nn

from muonkit._shards import WHOLE, unplaced_shard
from muonkit._torch import FLAT_PARAMETER, own_parameters
from muonkit.routing.layouts import UnknownLayout, fused_layout
from muonkit.routing.names import ROUTER
from muonkit.routing.numbers import number, widths_of
from muonkit.routing.places import (
    EMBEDDINGS,
    LORA,
    TRANSPOSED_CONVS,
    is_conv,
    is_depthwise,
    name_set,
)
from muonkit.routing.raw import (
    is_learned_tokens,
    is_position,
    is_token_or_position,
    is_triangular,
    judge_classes,
    judge_raw,
)
from muonkit.routing.verdicts import Undecided, Verdict, adamw, is_vector, muon
from muonkit.views import View

if TYPE_CHECKING:
    from muonkit.routing.places import Site
    from muonkit.routing.survey import Survey

__all__ = ["Undecided", "Verdict", "is_vector", "judge"]


_GAINS = name_set("weight scale gamma g gain")
_NORM_CLASS = re.compile(r"Norm(alization)?(\dd)?$")
_RNN_WEIGHT = re.compile(r"weight_(ih|hh|hr)(_l\d+)?(_reverse)?")


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
        if isinstance(site.owner, EMBEDDINGS) and site.label == "weight":
            return _embedding(site, param, id(param) in facts.heads)
    site = sites[0]
    if param.is_complex():
        return adamw("complex: real and imaginary parts by themselves", decay=not is_vector(param))
    if id(param) in facts.heads and not hidden:
        return adamw(facts.heads[id(param)])
    if id(param) in facts.stems and not hidden and not is_vector(param):
        return adamw(facts.stems[id(param)])
    try:
        verdict = _as_viewed(
            _adapter(site, param)
            or _vector(site, param)
            or _without_class(site)
            or _norm(site)
            or judge_classes(site, param)
            or _layer(site, param)
            or judge_raw(site, param),
            param,
        )
    except UnknownLayout as error:
        raise Undecided(str(error)) from error
    if id(param) in facts.doubts and verdict.algorithm == "muon":
        return replace(verdict, reason=f"{verdict.reason} ({facts.doubts[id(param)]})")
    return verdict


def _as_viewed(verdict: Verdict, param: nn.Parameter) -> Verdict:
    """A matrix is what its view has of it: of one row or column it is a vector, and Muon would do
    no more than normalize its gradient."""
    if verdict.view is None:
        return verdict
    blocks = View.parse(verdict.view).blocks(param.shape)
    if any(min(block.rows, block.cols) > 1 for block in blocks):
        return verdict
    one = "output" if all(block.rows == 1 for block in blocks) else "input"
    return adamw(f"{verdict.reason}, with one {one}")


def _refuse_shards(site: Site, param: nn.Parameter) -> None:
    """A matrix seen as a 1-D shard would go to AdamW unnoticed (docs/pitfalls.md, 18)."""
    if (shard := unplaced_shard(param)) is not None:
        raise Undecided(f"is {shard}", final=True)
    matrix_layer = isinstance(site.owner, (nn.Linear, *EMBEDDINGS)) or is_conv(site.owner)
    # A part of a parametrized weight, as weight norm's gain, is none of the layer's own.
    matrix_layer = matrix_layer and own_parameters(site.owner).get(site.label) is param
    flat = None
    if FLAT_PARAMETER in site.label:
        flat = "a vector of several parameters (FSDP1)"
    elif matrix_layer and site.label == "weight" and param.ndim < 2:
        flat = f"a {param.ndim}-D piece of a matrix (a flat shard)"
    if flat is not None:
        raise Undecided(f"is {flat}. {WHOLE}", final=True)


def _without_class(site: Site) -> Verdict | None:
    """Refuse a weight whose module has lost its class. TorchScript and torch.export keep a module's
    parameters without it: an embedding, a layer and an output head all look alike.
    """
    maker = "torch.jit" if isinstance(site.owner, torch.jit.ScriptModule) else None
    if any(_is_exported(module) for module in (*site.ancestors, site.owner)):
        maker = "torch.export"
    if maker is None:
        return None
    raise Undecided(
        f"{maker} has dropped the class of its module; route the model as it was before, which "
        "has the same parameters"
    )


def _is_exported(module: nn.Module) -> bool:
    return any(each.__module__.startswith("torch.export.") for each in type(module).__mro__)


def _adapter(site: Site, param: nn.Parameter) -> Verdict | None:
    adapter = site.adapter
    if adapter == "lora_magnitude_vector":
        return adamw("DoRA magnitude", decay=False)
    if adapter in LORA:
        return adamw(f"low-rank adapter factor ({adapter})", decay=param.ndim > 1)
    if adapter is None or is_vector(param):
        return None
    return adamw(f"adapter ({adapter})")


# -- vectors --------------------------------------------------------------------------------------


def _embedding(site: Site, param: nn.Parameter, is_head: bool) -> Verdict:
    """An nn.Embedding; positions and learned tokens are trained as raw ones are."""
    tied = ", tied to the output head" if is_head else ""
    name = site.owner_name
    if is_position(name):
        return adamw(f"positional embedding{tied}", decay=False)
    if param.shape[0] == 1 or is_learned_tokens(name):
        return adamw(f"embedding of learned tokens{tied}", decay=False)
    return adamw(f"embedding{tied}")


def _norm(site: Site) -> Verdict | None:
    """A gain or bias with the several dimensions that it normalizes over."""
    if _NORM_CLASS.search(site.owner_class) and site.label in _GAINS | {"bias", "beta"}:
        return adamw(f"norm {'gain' if site.label in _GAINS else 'bias'}", decay=False)
    return None


def _vector(site: Site, param: nn.Parameter) -> Verdict | None:
    if not is_vector(param):
        return None
    if param.ndim > 1 and param.numel() and _is_weight(site, param):
        if is_depthwise(site.owner):
            return adamw("depthwise convolution")
        return adamw(f"layer with one {'output' if param.shape[0] == 1 else 'input'}")
    return adamw(_vector_reason(site, param), decay=False)


def _is_weight(site: Site, param: nn.Parameter) -> bool:
    """Whether this is the weight of a layer, which decays however few rows it has."""
    # A weight norm's gain is called a weight too, but does not have the layer's widths.
    return site.label == "weight" and _has_widths(site, param)


def _has_widths(site: Site, param: nn.Parameter) -> bool:
    """Whether a parameter begins with its layer's outputs and inputs."""
    widths, groups = site.linears.widths(site.owner), number(site.owner, "groups") or 1
    if widths is None:
        return False
    out, inputs = widths
    return tuple(param.shape[:2]) in ((out, inputs // groups), (inputs, out // groups))


def _vector_reason(site: Site, param: nn.Parameter) -> str:
    label = site.label
    if "Norm" in site.owner_class:
        return "norm gain" if label in _GAINS else "norm bias" if "b" in label else "norm vector"
    if isinstance(site.owner, nn.MultiheadAttention) and label in ("bias_k", "bias_v"):
        return f"attention {label}"
    if param.numel() == 0:
        return "empty"
    if is_token_or_position(label):
        return "learned token or position"
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
        return adamw("bilinear form")
    if isinstance(owner, nn.Linear):
        return _linear(site, param, (owner.out_features, owner.in_features))
    if site.owner_class == "Conv1D" and hasattr(owner, "nf") and param.ndim == 2:
        return _stored_transposed(site, param, "Hugging Face Conv1D, stored in × out")
    if is_conv(owner):
        return _conv(site)
    if isinstance(owner, TRANSPOSED_CONVS):
        return _conv_transpose(owner)
    own = site.linears.own(owner)
    if own is not None and not is_triangular(param):
        return _linear(site, param, (own.outputs, own.inputs), turned=own.turned, sure=own.sure)
    # The linear layers of graph libraries and the like say how wide they are.
    widths = widths_of(owner)
    if widths is not None and param.ndim == 2 and _has_widths(site, param):
        return _linear(site, param, widths)
    return None


def _attention(site: Site) -> Verdict | None:
    if site.label == "in_proj_weight":
        return muon("split(rows=3)", "fused q, k, v: 3 equal row blocks")
    if site.label in ("q_proj_weight", "k_proj_weight", "v_proj_weight"):
        return muon("matrix", "attention projection")
    return None


def _recurrent(site: Site, param: nn.Parameter, owner: nn.Module) -> Verdict | None:
    match = _RNN_WEIGHT.fullmatch(site.label)
    if match is None:
        return None
    gates = param.shape[0] // int(getattr(owner, "hidden_size", param.shape[0]))
    if match[1] == "hr" or gates == 1:
        return muon("matrix", "recurrent layer")
    return muon(f"split(rows={gates})", f"recurrent layer: {gates} gates")


def _linear(
    site: Site,
    param: nn.Parameter,
    widths: tuple[int, int],
    *,
    turned: bool = False,
    sure: bool = True,
) -> Verdict | None:
    """A linear layer of these (outputs, inputs); `turned`: stored in × out, as any is whose shape
    says so; not `sure`: nothing says how."""
    if tuple(param.shape) == widths[::-1] and (turned or widths[0] != widths[1]):
        return _stored_transposed(site, param, f"{site.owner_class}, stored in × out")
    if tuple(param.shape) != widths:
        return None  # another storage under a Linear's name: judged as a raw parameter
    if is_position(site.owner_name) and site.owner_name.endswith("bias"):
        return adamw("positional bias per head, of one-hot distances", decay=False)
    fused = fused_layout(site, *widths, sure=sure)
    if fused is not None:
        return muon(*fused)
    # A router gives one number per expert, which a gate of a hidden width does not.
    narrow_gate = site.owner_name == "gate" and 4 * widths[0] <= widths[1]
    if narrow_gate or ROUTER.search(f"{site.owner_name} {site.owner_class}"):
        return muon("matrix", f"router ({site.owner_class})")
    own = "" if isinstance(site.owner, nn.Linear) else f" ({site.owner_class})"
    return muon("matrix", f"hidden linear layer{own}")


def _stored_transposed(site: Site, param: nn.Parameter, reason: str) -> Verdict:
    cols, rows = param.shape
    fused = fused_layout(site, rows, cols)
    if fused is None:
        return muon("transpose", reason)
    return muon(f"transpose > {fused[0]}", f"{fused[1]} ({reason})")


def _conv(site: Site) -> Verdict:
    owner = site.owner
    assert isinstance(owner, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
    if is_depthwise(owner):
        return adamw("depthwise convolution")
    if owner.groups > 1:
        if owner.out_channels == owner.groups:
            return adamw("grouped convolution with one filter per group")
        return muon(f"flatten > split(rows={owner.groups})", f"{owner.groups} convolution groups")
    if all(extent == 1 for extent in owner.kernel_size):
        fused = fused_layout(site, owner.out_channels, owner.in_channels)
        if fused is not None:
            return muon(f"flatten > {fused[0]}", f"{fused[1]} (1×1 convolution)")
    return muon("flatten", "hidden convolution")


def _conv_transpose(owner: nn.Module) -> Verdict:
    groups = int(getattr(owner, "groups", 1))
    if groups == 1:
        return muon("flatten > transpose", "transposed convolution, stored in × out")
    if is_depthwise(owner):
        return adamw("depthwise convolution")
    return muon(
        f"flatten > split(rows={groups}) > transpose", f"{groups} transposed convolution groups"
    )
