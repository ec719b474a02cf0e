"""Where the modules and parameters of a model stand, as a plain tree.

Wrappers and adapters leave no trace in it: a wrapped, parametrized or adapted layer stands where
the plain one would. Nothing here decides an algorithm.
"""

from __future__ import annotations

import functools
import re
import weakref
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, cast

import torch.nn as nn

from muonkit._torch import WRAPPERS, own_modules, own_parameters
from muonkit.routing.linears import class_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from muonkit.routing.linears import Linears

__all__ = [
    "CONVS",
    "LORA",
    "TRANSPOSED_CONVS",
    "Models",
    "Node",
    "Place",
    "Site",
    "is_conv",
    "is_depthwise",
    "name_set",
    "sites_of",
    "starred",
    "tree",
    "unwrap",
    "walk",
    "weights",
]


def name_set(text: str) -> frozenset[str]:
    """The names in a text, one set however many lines they take."""
    return frozenset(text.split())


EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED_CONVS = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)

# PEFT keeps the module it adapts under these.
_ADAPTED_COMPONENTS = ("base_layer", "original_module")

# torch.nn.utils' older weight_norm, spectral_norm and pruning rename the parameter they act on.
_RENAMED = {"weight_v": "weight", "weight_orig": "weight"}

_INDEX = re.compile(r"(?<=\.)\d+(?=\.)|^\d+(?=\.)")

# Parts that serve the others, and give nothing that leaves the model.
_SIDE = re.compile(
    r".*(ada_?ln|modulation|film|norm|rotary|drop|pool|router).*|(.*_)?(gate|act)|se|.*excit.*"
    r"|(.*_)?(time|timesteps?|t|sigma|noise|pos|cond|label|y|c|context|text|rel)_?(mlp|emb\w*|enc\w*)"
    r"|(.*_)?(embedder|embeddings?|embed|emb)"
)
_HEAD_EMBED = re.compile(r"(class|bbox|box|mask)_embed")

LORA = name_set(
    "lora_A lora_B lora_E lora_embedding_A lora_embedding_B lora_magnitude_vector lora_a lora_b "
    "lora_down lora_mid lora_up lora_matrix_A lora_matrix_B "
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
        linears: the linear layers of the model.
    """

    name: str
    label: str
    owner: nn.Module
    ancestors: tuple[nn.Module, ...]
    parts: tuple[str, ...]
    linears: Linears

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
        """The name of the owner's class, without the prefix that parametrize or FSDP2 adds."""
        return class_of(self.owner).__name__

    @property
    def adapter(self) -> str | None:
        """The name of the adapter that the parameter belongs to, where it does to one: `lora_A`."""
        # The whole name: the parts are without a ParameterDict's, in which PEFT keeps factors.
        return _adapter(self.name.split("."), (*self.ancestors, self.owner))

    @property
    def key(self) -> str:
        """The name that tells what the parameter does: `gate_up_proj` for both
        `experts.gate_up_proj` and `mlp.gate_up_proj.weight`.
        """
        return self.owner_name if self.label == "weight" else self.label


@dataclass(frozen=True, eq=False)
class Place:
    """One module at one path; the same module may stand in several."""

    name: str
    module: nn.Module
    ancestors: tuple[nn.Module, ...]
    parts: tuple[str, ...]


@dataclass(eq=False)
class Node:
    """One module of the tree: what stands at one path when wrappers and adapters are left out.

    Attributes:
        parts: the path from the root; empty for the root itself.
        module: the module that stands there.
        places: all modules of this path: an adapted layer's copies share it.
        to_parent: to the node above, which the tree's root keeps: no cycle, so that a model is
            freed when its last user lets go of it. None for the root.
        kids: the nodes below, in registration order.
        linears: the linear layers of the model.
    """

    parts: tuple[str, ...]
    module: nn.Module
    places: list[Place]
    linears: Linears
    to_parent: weakref.ref[Node] | None = None
    kids: dict[str, Node] = field(default_factory=dict)

    @property
    def parent(self) -> Node | None:
        """The node above; None for the root."""
        return None if self.to_parent is None else self.to_parent()

    @property
    def name(self) -> str:
        """The attribute name in the parent; empty for the root."""
        return self.parts[-1] if self.parts else ""

    @property
    def path(self) -> str:
        """The dotted path from the root; empty for the root."""
        return ".".join(self.parts)

    def above(self) -> Iterator[Node]:
        """The nodes above, from the parent to the root."""
        node = self.parent
        while node is not None:
            yield node
            node = node.parent

    def below(self) -> Iterator[Node]:
        """The node itself and all below it, in registration order."""
        yield self
        for kid in self.kids.values():
            yield from kid.below()

    @functools.cached_property
    def is_layer(self) -> bool:
        """A layer of which one asks what it takes and gives: linear, or a convolution."""
        if self.is_convolution:
            return not is_depthwise(self.module)
        return self.is_linear

    @property
    def is_linear(self) -> bool:
        """A linear layer."""
        return self.module in self.linears

    @property
    def is_convolution(self) -> bool:
        """A convolution, transposed ones among them."""
        return isinstance(self.module, (*CONVS, *TRANSPOSED_CONVS))

    @functools.cached_property
    def layers(self) -> int:
        """How many layers it is or holds."""
        return self.is_layer + sum(kid.layers for kid in self.kids.values())

    @functools.cached_property
    def main(self) -> list[Node]:
        """The kids that are or hold layers."""
        return [kid for kid in self.kids.values() if kid.layers]

    @functools.cached_property
    def serves(self) -> bool:
        """By its name it serves other parts, and gives nothing that leaves the model."""
        return bool(_SIDE.fullmatch(self.name)) and not _HEAD_EMBED.fullmatch(self.name)

    @functools.cached_property
    def kind(self) -> tuple[object, ...]:
        """Its class; of a plain container its contents' too: a feature extractor and a classifier
        are both nn.Sequential."""
        if isinstance(self.module, (nn.Sequential, nn.ModuleList, nn.ModuleDict)):
            return (type(self.module), *(kid.kind for kid in self.kids.values()))
        return (type(self.module),)

    @functools.cached_property
    def widths(self) -> tuple[int | None, int | None]:
        """The widths of what it takes and gives, where its layers tell; in registration order."""
        module = self.module
        if isinstance(module, nn.MultiheadAttention):
            return module.embed_dim, module.embed_dim
        if isinstance(module, (nn.RNNBase, nn.RNNCellBase)):
            return module.input_size, module.hidden_size
        if isinstance(module, EMBEDDINGS):
            return None, module.embedding_dim
        if not self.linears.is_sure(module):
            return None, None
        own = self.linears.widths(module)
        if own is not None:
            return own[1], own[0]
        kids = [kid.widths for kid in self.kids.values() if not kid.serves]
        taken = next((width for width, _ in kids if width is not None), None)
        given = next((width for _, width in reversed(kids) if width is not None), None)
        return taken, given

    @property
    def takes(self) -> int | None:
        """The width of what it takes."""
        return self.widths[0]

    @property
    def gives(self) -> int | None:
        """The width of what it gives."""
        return self.widths[1]


class Models(nn.Module):
    """Several models by name, as one: what `route` makes of a dict of modules."""

    def __init__(self, models: Mapping[str, nn.Module]) -> None:
        super().__init__()
        # add_module would refuse names of attributes ("type") and names with dots.
        cast("dict[str, nn.Module | None]", own_modules(self)).update(models)


def starred(name: str) -> str:
    """A parameter's name with `*` for the indices of layers: `h.*.attn.weight`."""
    return _INDEX.sub("*", name)


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


def walk(root: nn.Module) -> Iterator[Place]:
    """Every module at every path, in registration order; a cycle is entered once."""
    yield from _walk("", (root,), ())


def _walk(name: str, chain: tuple[nn.Module, ...], parts: tuple[str, ...]) -> Iterator[Place]:
    module = chain[-1]
    yield Place(name, module, *_effective(chain, parts))
    for child_name, child in own_modules(module).items():
        if child is None or any(child is above for above in chain):
            continue
        clean = child_name not in WRAPPERS
        child_path = f"{name}.{child_name}".lstrip(".") if clean else name
        yield from _walk(child_path, (*chain, child), (*parts, child_name))


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


def tree(places: list[Place], linears: Linears) -> Node:
    """The places as a tree, without adapters' factors and parametrizations."""
    root = Node((), places[0].module, [], linears)
    nodes: dict[tuple[str, ...], Node] = {(): root}
    for place in places:
        adapter = _adapter(place.parts, (*place.ancestors, place.module))
        if adapter is not None or "parametrizations" in place.parts:
            continue
        node = nodes.get(place.parts)
        if node is None:
            parent = nodes[place.parts[:-1]]
            node = Node(place.parts, place.module, [], linears, weakref.ref(parent))
            nodes[place.parts] = node
            parent.kids[place.parts[-1]] = node
        node.places.append(place)
        if isinstance(place.module, (nn.ModuleDict, nn.ModuleList)) and len(node.places) > 1:
            continue  # the list of an adapter's copies is none of the model's
        node.module = place.module
    return root


def _adapter(names: Iterable[str], modules: Iterable[nn.Module]) -> str | None:
    """The adapter that one of the names is of: LoRA's and its like have names of their own, and
    PEFT's adapted layers list those of any method.

    Args:
        names: of a path, below the root.
        modules: that stand along it.
    """
    listed: set[str] = set()
    for module in modules:
        of_class = getattr(type(module), "adapter_layer_names", ())
        listed.update(vars(module).get("adapter_layer_names", of_class))
    return next((name for name in names if name in LORA or name in listed), None)


def sites_of(place: Place, linears: Linears) -> Iterator[tuple[nn.Parameter, Site]]:
    """The parameters that a place's module holds itself, each with its site."""
    for label, param in own_parameters(place.module).items():
        if param is not None:
            yield param, _site(place, label, linears)


def _site(place: Place, label: str, linears: Linears) -> Site:
    name = f"{place.name}.{label}".lstrip(".")
    owner, ancestors, parts = place.module, place.ancestors, place.parts
    if len(parts) >= 2 and parts[-2] == "parametrizations" and label.startswith("original"):
        # owner.parametrizations.weight.original1 stands for owner.weight.
        own = linears.own(ancestors[-2])
        stood_for = "weight" if own is not None and own.label == parts[-1] else parts[-1]
        return Site(name, stood_for, ancestors[-2], ancestors[:-2], parts[:-2], linears)
    if isinstance(owner, nn.ParameterList) and ancestors:
        # A list says nothing itself: its parameters are the owner's, under the list's name.
        return Site(name, parts[-1], ancestors[-1], ancestors[:-1], parts[:-1], linears)
    if isinstance(owner, nn.ParameterDict) and ancestors:
        return Site(name, label, ancestors[-1], ancestors[:-1], parts[:-1], linears)
    if (linear := linears.own(owner)) is not None and label == linear.label:
        return Site(name, "weight", owner, ancestors, parts, linears)
    return Site(name, _RENAMED.get(label, label), owner, ancestors, parts, linears)


# -- layers -----------------------------------------------------------------------------------


def is_conv(module: object) -> bool:
    """A convolution, not a transposed one."""
    return isinstance(module, CONVS)


def is_depthwise(module: nn.Module) -> bool:
    """One filter per input channel: its weight is a list of filters, not a matrix."""
    groups, channels = getattr(module, "groups", 1), getattr(module, "in_channels", 1)
    return bool(groups > 1 and groups == channels)


def weights(node: Node) -> list[nn.Parameter]:
    """The parameters that hold a layer's weight, of every copy: of a weight norm's two, the
    direction."""
    return [param for place in node.places for param in node.linears.weights(place.module)]
