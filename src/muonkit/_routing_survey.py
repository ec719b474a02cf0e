"""What stands where in a model: the facts that routing judges, gathered in one walk.

A *site* is one place where a parameter is registered. A tied parameter has several sites, a
parametrized or wrapped one stands, for all that matters, where the plain one would. Nothing here
decides an algorithm.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch.nn as nn

from muonkit._torch import WRAPPERS, own_modules, own_parameters

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = [
    "LORA",
    "Site",
    "Survey",
    "is_conv",
    "is_depthwise",
    "name_set",
    "survey",
    "unwrap",
]


def name_set(text: str) -> frozenset[str]:
    """The names in a text, one set however many lines they take."""
    return frozenset(text.split())


CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)

# PEFT keeps the module it adapts under these.
_ADAPTED_COMPONENTS = ("base_layer", "original_module")

# torch.nn.utils' older weight_norm, spectral_norm and pruning rename the parameter they act on.
_RENAMED = {"weight_v": "weight", "weight_orig": "weight"}

# Names of output heads. A strong name is a head wherever it stands. A weak one also occurs inside
# blocks (an attention "head", a "score" layer), so it counts only outside repeated ones.
STRONG_HEADS = name_set(
    "lm_head classifier classifiers cls_classifier distillation_classifier logits to_logits "
    "unembed unembedding embed_out qa_outputs seq_relationship"
)
WEAK_HEADS = name_set("head heads score output output_layer output_projection final_layer fc_out")
_HEAD_SUFFIX = re.compile(r"(?<!multi)(?<!attn)(?<!attention)(?<!sa)(?<!pos)_heads?$")
# A composite "head" with these inside is an attention head.
_ATTENTION_CHILDREN = name_set("q k v qkv query key value q_proj k_proj v_proj to_q to_k to_v")

LORA = name_set(
    "lora_A lora_B lora_E lora_embedding_A lora_embedding_B lora_magnitude_vector "
    "hada_w1_a hada_w1_b hada_w2_a hada_w2_b lokr_w1 lokr_w1_a lokr_w1_b lokr_w2 lokr_w2_a "
    "lokr_w2_b lokr_t2 hada_t1 hada_t2 vera_A vera_B oft_r"
)


@dataclass(frozen=True, eq=False)
class Site:
    """One place where a parameter is registered.

    Attributes:
        name: the clean dotted name, wrappers' components removed.
        label: the parameter's own name; for a parametrized weight the name it stands for.
        owner: the module whose parameter it is; for a parametrized weight the module it serves.
        ancestors: the modules above the owner, from the root; adapters and wrappers left out.
        parts: the names of ancestors and owner below the root, so that
            `parts[-1]` is the owner's name and `len(parts) == len(ancestors)`.
    """

    name: str
    label: str
    owner: nn.Module
    ancestors: tuple[nn.Module, ...]
    parts: tuple[str, ...]

    @property
    def parent(self) -> nn.Module | None:
        """The module that holds the owner; None for the root."""
        return self.ancestors[-1] if self.ancestors else None

    @property
    def owner_name(self) -> str:
        """The owner's attribute name in its parent; empty for the root."""
        return self.parts[-1] if self.parts else ""

    @property
    def owner_class(self) -> str:
        """The class of the owner, for messages: without the prefix that parametrize adds."""
        return type(self.owner).__name__.removeprefix("Parametrized")

    @property
    def key(self) -> str:
        """What the parameter does, by name: `gate_up_proj` of both
        `experts.gate_up_proj` and `mlp.gate_up_proj.weight`."""
        return self.owner_name if self.label == "weight" else self.label


@dataclass
class Survey:
    """Every parameter of a model by identity, in registration order.

    Attributes:
        sites: id of the parameter -> its sites, the first registered first.
        params: id -> the parameter.
        heads: id -> why it is an output head.
        stem: id of the first convolution's weight, if the model begins with one.
    """

    sites: dict[int, list[Site]] = field(default_factory=dict)
    params: dict[int, nn.Parameter] = field(default_factory=dict)
    heads: dict[int, str] = field(default_factory=dict)
    stem: int | None = None


@dataclass(frozen=True, eq=False)
class _Place:
    """One module at one path; the same module may stand in several."""

    name: str
    module: nn.Module
    ancestors: tuple[nn.Module, ...]
    parts: tuple[str, ...]


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside `torch.compile`, DistributedDataParallel, DataParallel, AveragedModel."""
    while True:
        children = dict(model.named_children())
        inner = next((children[c] for c in WRAPPERS if c in children), None)
        if inner is None and list(children) == ["module"] and not own_parameters(model):
            # A user's own single-child model is told apart by its name in the children alone;
            # taking it off changes nothing but the prefix "module.".
            inner = children["module"]
        if inner is None:
            return model
        model = inner


def survey(model: nn.Module) -> Survey:
    """Gather sites, heads and stem of an unwrapped model."""
    places = list(_walk(model))
    found = Survey()
    for place in places:
        for label, param in own_parameters(place.module).items():
            if param is not None:
                found.params.setdefault(id(param), param)
                found.sites.setdefault(id(param), []).append(_site(place, label))
    found.heads = _heads(places)
    found.stem = _stem(places)
    return found


def _walk(root: nn.Module) -> Iterator[_Place]:
    """Every module at every path, in registration order; a cycle is entered once."""

    def visit(name: str, chain: tuple[nn.Module, ...], parts: tuple[str, ...]) -> Iterator[_Place]:
        module = chain[-1]
        yield _Place(name, module, *_effective(chain, parts))
        for child_name, child in own_modules(module).items():
            if child is None or any(child is above for above in chain):
                continue
            clean = child_name not in WRAPPERS
            child_path = f"{name}.{child_name}".lstrip(".") if clean else name
            yield from visit(child_path, (*chain, child), (*parts, child_name))

    yield from visit("", (root,), ())


def _effective(
    chain: tuple[nn.Module, ...], parts: tuple[str, ...]
) -> tuple[tuple[nn.Module, ...], tuple[str, ...]]:
    """Ancestors and names with adapters and wrappers taken out.

    `fc1.base_layer` stands where `fc1` stood, and so does `fc1.modules_to_save.default`.
    """
    modules: list[nn.Module] = [chain[0]]
    names: list[str] = []
    skip_key = False
    for part, module in zip(parts, chain[1:], strict=True):
        if skip_key or part in WRAPPERS or part in _ADAPTED_COMPONENTS:
            modules[-1] = module
            skip_key = False
        elif part == "modules_to_save":
            modules[-1] = module
            skip_key = True  # the next component is the adapter's name
        else:
            modules.append(module)
            names.append(part)
    return tuple(modules[:-1]), tuple(names)


def _site(place: _Place, label: str) -> Site:
    name = f"{place.name}.{label}".lstrip(".")
    owner, ancestors, parts = place.module, place.ancestors, place.parts
    if len(parts) >= 2 and parts[-2] == "parametrizations" and label.startswith("original"):
        # owner.parametrizations.weight.original1 stands for owner.weight.
        return Site(name, parts[-1], ancestors[-2], ancestors[:-2], parts[:-2])
    if isinstance(owner, nn.ParameterList) and ancestors:
        # A list says nothing itself: its parameters are the owner's, under the list's name.
        return Site(name, parts[-1], ancestors[-1], ancestors[:-1], parts[:-1])
    return Site(name, _RENAMED.get(label, label), owner, ancestors, parts)


# -- convolutions -----------------------------------------------------------------------------


def is_conv(module: object) -> bool:
    """A convolution, not a transposed one."""
    return isinstance(module, CONVS)


def is_depthwise(module: nn.Module) -> bool:
    """One filter per input channel: its weight is a list of filters, not a matrix."""
    groups, channels = getattr(module, "groups", 1), getattr(module, "in_channels", 1)
    return bool(groups > 1 and groups == channels)


def _weight(place: _Place) -> nn.Parameter | None:
    """The parameter that holds a module's weight: of a weight norm's two, the direction."""
    module = place.module
    found = [own_parameters(module).get(k) for k in ("weight", "weight_v", "weight_orig")]
    lists = own_modules(module).get("parametrizations")
    if isinstance(lists, nn.ModuleDict) and "weight" in lists:
        found += own_parameters(lists["weight"]).values()
    return max((p for p in found if p is not None), key=_size, default=None)


def _size(param: nn.Parameter) -> int:
    # A lazy module's weight has no shape yet; routing refuses it later, by name.
    return 0 if isinstance(param, nn.parameter.UninitializedParameter) else param.numel()


def _stem(places: list[_Place]) -> int | None:
    """The first convolution, if it is what the input meets or takes at most four channels."""
    something_before = False
    for place in places:
        module = place.module
        if isinstance(module, CONVS) and not is_depthwise(module):
            first = not something_before or module.in_channels <= 4
            return id(_weight(place)) if first else None
        if is_conv(module) or isinstance(module, (nn.Linear, nn.Embedding, nn.EmbeddingBag)):
            something_before = True
    return None


# -- output heads -----------------------------------------------------------------------------


def _heads(places: list[_Place]) -> dict[int, str]:
    """Heads by identity, then by name; only then the last Linear of a model that has neither."""
    repeated = _repeated_modules(places)
    heads: dict[int, str] = {}
    for place in places:
        for module in _output_embeddings(place.module):
            for param in own_parameters(module).values():
                if param is not None and param.ndim == 2:
                    heads.setdefault(id(param), "output head (get_output_embeddings)")
    for place in places:
        if _is_head_name(place, repeated):
            for inside in _head_modules(place, places):
                reason = f"output head (named {place.parts[-1]!r})"
                heads.setdefault(id(_weight(inside)), reason)
    if not heads:
        last = _last_linear(places, repeated)
        if last is not None:
            heads[id(_weight(last))] = "output head (last Linear of the model)"
    return heads


def _output_embeddings(module: nn.Module) -> list[nn.Module]:
    getter = getattr(type(module), "get_output_embeddings", None)
    if getter is None:
        return []
    try:
        head = getter(module)
    except (AttributeError, NotImplementedError):
        return []  # models without a head say so in these ways
    if isinstance(head, nn.ModuleList):
        return list(head)
    return [head] if isinstance(head, nn.Module) else []


def _is_head_name(place: _Place, repeated: set[int]) -> bool:
    # A LoRA factor of a head is a LoRA factor, and stands below the head's name.
    if not place.parts or LORA.intersection(place.parts):
        return False
    name = place.parts[-1]
    if name in STRONG_HEADS:
        return True
    weak = name in WEAK_HEADS or _HEAD_SUFFIX.search(name) is not None
    # A model that names its output itself may call a hidden transform "head" (ModernBERT does).
    return weak and not any(
        id(above) in repeated or _output_embeddings(above) for above in place.ancestors
    )


def _head_modules(place: _Place, places: list[_Place]) -> list[_Place]:
    """The layers of a module named as a head that give the output: itself, every layer of a list
    of layers, or the last of a composite one."""
    if _is_output_layer(place.module):
        return [place]
    below = [
        p for p in places if any(a is place.module for a in p.ancestors) and not _is_lora(p.parts)
    ]
    if isinstance(place.module, (nn.ModuleList, nn.ModuleDict)):
        return [p for p in below if p.ancestors[-1] is place.module and _is_output_layer(p.module)]
    # An attention head, or a head that pools by attention: what it gives is hidden.
    if any(
        p.parts[-1] in _ATTENTION_CHILDREN or isinstance(p.module, nn.MultiheadAttention)
        for p in below
    ):
        return []
    layers = [p for p in below if _is_output_layer(p.module)]
    blocks = _repeated_modules(below)
    inner = layers[-1].ancestors[len(place.parts) + 1 :] if layers else ()
    return layers[-1:] if not any(id(a) in blocks for a in inner) else []


def _is_lora(parts: tuple[str, ...]) -> bool:
    return not LORA.isdisjoint(parts)


def _is_output_layer(module: nn.Module) -> bool:
    if isinstance(module, nn.Linear):
        return True
    return isinstance(module, CONVS) and all(k == 1 for k in module.kernel_size)


def _last_linear(places: list[_Place], repeated: set[int]) -> _Place | None:
    linears = [p for p in places if isinstance(p.module, nn.Linear) and not _is_lora(p.parts)]
    if not linears:
        return None
    last = linears[-1]
    inside_block = any(id(above) in repeated for above in last.ancestors)
    inside_attention = any(isinstance(above, nn.MultiheadAttention) for above in last.ancestors)
    headless = any(_is_headless(above) for above in last.ancestors)
    return None if inside_block or inside_attention or headless else last


def _is_headless(module: nn.Module) -> bool:
    """A Hugging Face backbone: what it returns are hidden states, so its last Linear is hidden."""
    if not hasattr(type(module), "base_model_prefix"):
        return False
    return getattr(module, "base_model", None) is module and not _output_embeddings(module)


def _repeated_modules(places: list[_Place]) -> set[int]:
    """Modules that have a sibling of their kind, or stand in a ModuleList: blocks of a stack.

    Plain containers are of one kind only if their contents are; a feature extractor and a
    classifier are both nn.Sequential.
    """
    repeated: set[int] = set()
    seen: set[int] = set()
    for place in places:
        if id(place.module) in seen:
            continue
        seen.add(id(place.module))
        children = [c for c in own_modules(place.module).values() if c is not None]
        kinds = Counter(_kind(child) for child in children)
        in_list = isinstance(place.module, nn.ModuleList)
        repeated |= {id(child) for child in children if in_list or kinds[_kind(child)] > 1}
    return repeated


def _kind(module: nn.Module) -> tuple[object, ...]:
    if isinstance(module, _CONTAINERS):
        return (type(module), *(_kind(child) for child in module.children()))
    return (type(module),)
