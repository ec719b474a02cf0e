"""Which modules are linear layers, and what each takes and gives.

torch's say so by their class, graph libraries' and Megatron's by the widths that they state. What a
class of one's own holds says it where the class does not: a matrix and its bias, or a matrix alone
in a class called `Linear`. Such a class stores all its matrices in one way, out × in as torch does
or in × out; those of its layers that show which it is speak for the others.
"""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch.nn as nn

from muonkit._torch import held_parameters, own_modules, own_parameters
from muonkit.routing.numbers import (
    ENSEMBLES,
    EXPERT_COUNTS,
    HEADS,
    KERNEL_SIZES,
    first_number,
    widths_of,
)
from muonkit.routing.verdicts import is_vector

if TYPE_CHECKING:
    from collections.abc import Container, Iterable, Sequence

    from torch import Tensor

__all__ = ["EMBEDDING_CLASS", "Linears", "OwnLinear", "Standing", "class_of", "has_shape"]

EMBEDDING_CLASS = re.compile(r"Embedding|(?<!Patch)(?<!Un)Emb(ed)?$")
_NAMED = re.compile(
    r"(?!.*(nonlinear|bilinear|activation))(.*(linear|dense|proj|fully_?connected).*|(.*_)?fc.*)",
    re.IGNORECASE,
)
# Tables, whatever else their class is called; and what is none unless it is called a linear layer.
_TABLE = re.compile(r"Position(?!-?_?[Ww]ise)|Pos(Emb|Enc)|Codebook|Prototype")
_UNNAMED = re.compile(
    r"Norm|Quantiz|Memory|Lookup|Table|Vocab|Embedder|Transition|CRF|(User|Item|Token|Anchor|Vector|Code|Center)s?$"
)
# Places of tables: a matrix and a vector of the same width there are an embedding and its bias.
_TABLE_NAME = re.compile(
    r"(?!(time|timesteps?|t)_)(.*_)?(emb|embed|embeddings?|pos|positions?|wte|wpe|vocab|memory|codebook|lookup|table)(_tokens?)?"
    r"|(pos|tok|token)_.*|users?|items?|tokens?|anchors?"
)
_WEIGHTS = ("weight", "weights", "W", "w", "kernel")
_STORED = ("weight", "weight_v", "weight_orig")
_BIASES = ("bias", "b")

_POSITION_NAME = re.compile(r"pos|wpe")
# Layers of the same widths side by side, each with an input of its own.
_ENSEMBLE = re.compile(r"ensemble|(vectorized|parallel(ized)?|batch(ed)?)_?(linear|layer|fc)", re.I)
# Parts of one weight: of a distribution of it, of a function.
_PART = re.compile(r"(^|_)(mu|sigma|rho|mean|std|logvar|base|spline)(_|$)")
# Layers that give more than they take, in every model that has them, and such that give less.
_WIDENS = re.compile(r"(.*_)?qkv(_.*)?|up_proj|gate_proj|gate_up_proj|c_fc|c_attn")
_NARROWS = re.compile(r"down_proj")
_HEAD = re.compile(r"(.*_)?head|output|unembed(ding)?|decoder|classifier|logits|(fc|proj)_out")


@dataclass(frozen=True)
class OwnLinear:
    """A linear layer of a class that states no widths.

    Attributes:
        label: the name of its matrix.
        bias: the name of its bias, if it has one.
        turned: the matrix is stored in × out.
        sure: something says how it is stored; else it is taken to be as torch's are.
    """

    label: str
    bias: str | None
    outputs: int
    inputs: int
    turned: bool
    sure: bool


class Standing(NamedTuple):
    """A module, the one that holds it, its name there, and whether that is one of many experts."""

    module: nn.Module
    parent: nn.Module | None
    name: str
    among_experts: bool


@dataclass(frozen=True)
class _Found:
    """One such layer, before it is known how its class stores matrices."""

    at: Standing
    label: str
    bias: str | None
    shape: tuple[int, int]
    width: int | None

    @property
    def kind(self) -> type:
        return class_of(self.at.module)

    @property
    def by_bias(self) -> bool | None:
        """Whether its matrix is stored in × out, if its bias says."""
        rows, cols = self.shape
        return None if self.width is None or rows == cols else self.width == cols

    @property
    def by_name(self) -> bool | None:
        """Whether its matrix is stored in × out, if its name says."""
        rows, cols = self.shape
        name, parent = self.at.name, self.at.parent
        if self.at.among_experts:  # which may be narrower than the model
            return None
        gated = parent is not None and {"w1", "w2", "w3"} <= own_modules(parent).keys()
        if rows != cols and (_WIDENS.fullmatch(name) or (gated and name in ("w1", "w3"))):
            return rows < cols
        narrows = _NARROWS.fullmatch(name) or (gated and name == "w2")
        return rows > cols if rows != cols and narrows else None

    def by_vocabulary(self, tables: Container[tuple[int, int]]) -> bool | None:
        """Whether its matrix is stored in × out, if it has the shape of a table: a head."""
        rows, cols = self.shape
        if not _HEAD.fullmatch(self.at.name) or rows == cols:
            return None
        if ((rows, cols) in tables) == ((cols, rows) in tables):
            return None
        return (cols, rows) in tables

    def before(self, after: _Found) -> bool | None:
        """Whether its matrix is stored in × out, if the next layer of a list says, which takes all
        or half of what this one gives."""
        parent = self.at.parent
        if self.kind is not after.kind or parent is not after.at.parent:
            return None
        if not isinstance(parent, (nn.Sequential, nn.ModuleList)):
            return None
        as_torch = self.shape[0] in (after.shape[1], 2 * after.shape[1])
        turned = self.shape[1] in (after.shape[0], 2 * after.shape[0])
        return turned if as_torch != turned else None


class Linears:
    """The linear layers among a model's modules."""

    def __init__(self, places: Sequence[Standing]) -> None:
        found: dict[int, _Found] = {}
        for place in places:
            if id(place.module) not in found and (one := _find(place)) is not None:
                found[id(place.module)] = one
        stored = _storages(list(found.values()), _tables(places))
        self._own: dict[int, OwnLinear] = {}
        for key, one in found.items():
            # A subclass stores its own as the class does that it extends.
            is_turned = next((stored[k] for k in one.kind.__mro__ if k in stored), None)
            if is_turned is None and one.label == "kernel":
                is_turned = True  # as Flax and Keras have it
            outputs, inputs = one.shape[::-1] if is_turned else one.shape
            self._own[key] = OwnLinear(
                one.label, one.bias, outputs, inputs, bool(is_turned), is_turned is not None
            )

    def own(self, module: object) -> OwnLinear | None:
        """What a module is, if it is a linear layer that states no widths."""
        return self._own.get(id(module))

    def widths(self, module: object) -> tuple[int, int] | None:
        """(outputs, inputs) of a layer: by its own word, or a linear layer's by its parameters."""
        own = self.own(module)
        return widths_of(module) if own is None else (own.outputs, own.inputs)

    def is_sure(self, module: object) -> bool:
        """Whether it is known which of the widths of a layer is which."""
        own = self.own(module)
        return own is None or own.sure or own.outputs == own.inputs

    def __contains__(self, module: object) -> bool:
        """Whether it is a linear layer."""
        if isinstance(module, nn.Linear) or self.own(module) is not None:
            return True
        widths = widths_of(module)
        if widths is None or not isinstance(module, nn.Module):
            return False
        both = (widths, widths[::-1])
        weights = [p for p in self.weights(module) if has_shape(p)]
        return any(tuple(p.shape) in both for p in weights) or _stack_of(module) is not None

    def weights(self, module: nn.Module) -> list[nn.Parameter]:
        """The weights of a layer: one, unless it says what it takes and gives and holds several of
        these widths, as a layer of splines or one with noise in its weight does.
        """
        own = self.own(module)
        weight = _weight_of(module, "weight" if own is None else own.label)
        if weight is None:
            weight = _stack_of(module)
        if weight is not None:
            return [weight]
        widths = widths_of(module)
        if widths is None or any(kid is not None for kid in own_modules(module).values()):
            return []
        both = (widths, widths[::-1])
        own_ones = {
            label: p
            for label, p in held_parameters(module).items()
            if has_shape(p) and tuple(p.shape[:2]) in both and not is_vector(p)
        }
        are_one = len(own_ones) == 1 or all(map(_PART.search, own_ones))
        return list(own_ones.values()) if are_one else []


def _weight_of(module: nn.Module, label: str = "weight") -> nn.Parameter | None:
    """The parameter that holds a layer's weight: of a weight norm's two, the direction."""
    own = own_parameters(module)
    found = [own.get(stored) for stored in (label, *_STORED)]
    lists = own_modules(module).get("parametrizations")
    if isinstance(lists, nn.ModuleDict) and label in lists:
        found += own_parameters(lists[label]).values()
    return max((p for p in found if p is not None), key=_size, default=None)


def _stack_of(module: nn.Module) -> nn.Parameter | None:
    """The weight of an ensemble of linear layers, E × in × out or E × out × in."""
    if not (_ENSEMBLE.search(class_of(module).__name__) or first_number([module], ENSEMBLES)):
        return None
    weight = next((w for label in _WEIGHTS if (w := _weight_of(module, label)) is not None), None)
    widths = widths_of(module)
    if weight is None or widths is None or not has_shape(weight) or weight.ndim != 3:
        return None
    return weight if weight.shape[1:] in (widths, widths[::-1]) else None


def _size(param: nn.Parameter) -> int:
    # A lazy module's weight has no shape yet; routing refuses it later, by name.
    return param.numel() if has_shape(param) else 0


def has_shape(param: Tensor) -> bool:
    """Whether a parameter is no lazy module's that has not run."""
    return not isinstance(param, nn.parameter.UninitializedParameter)


def class_of(module: nn.Module) -> type:
    """The class; of a parametrized or sharded module the one that it had before."""
    kind = type(module)
    for before in kind.__mro__[1:]:
        if kind.__name__ in (f"Parametrized{before.__name__}", f"FSDP{before.__name__}"):
            kind = before
    return kind


def _find(place: Standing) -> _Found | None:
    """A module that holds one matrix and vectors, and nothing else, if a bias of one of the
    matrix's sides, or the name of its class, says that it is a linear layer.
    """
    module, kind = place.module, class_of(place.module).__name__
    kids = {name for name, kid in own_modules(module).items() if kid is not None}
    if isinstance(module, (nn.Linear, nn.Embedding, nn.ParameterDict)):
        return None
    if kids - {"parametrizations"}:
        return None
    if widths_of(module) is not None or _TABLE.search(kind) or EMBEDDING_CLASS.search(kind):
        return None
    if first_number([module], ("num_embeddings", *EXPERT_COUNTS, *KERNEL_SIZES)) is not None:
        return None
    label = _label(module)
    weight = None if label is None else _weight_of(module, label)
    if label is None or weight is None or weight.ndim != 2:
        return None
    rows, cols = weight.shape
    if rows == cols == first_number([module, place.parent], HEADS):
        return None  # it mixes attention heads
    own = held_parameters(module)
    bias = next((name for name in _BIASES if name in own), None)
    width = None if bias is None else own[bias].numel()
    is_named = _NAMED.fullmatch(kind) is not None
    if width is not None and width not in (rows, cols):
        return None
    is_table = _UNNAMED.search(kind) or _TABLE_NAME.fullmatch(place.name)
    if not is_named and (width is None or is_table):
        return None
    return _Found(place, label, bias, (rows, cols), width)


def _label(module: nn.Module) -> str | None:
    """The name of the one matrix that a module holds beside vectors."""
    own = held_parameters(module)
    if not all(map(has_shape, own.values())):
        return None
    lists = own_modules(module).get("parametrizations")
    names = [name for name, p in own.items() if not is_vector(p)]
    names += list(own_modules(lists)) if isinstance(lists, nn.ModuleDict) else []
    if not names and _NAMED.fullmatch(class_of(module).__name__):  # with one output or input
        names = [name for name, p in own.items() if p.ndim == 2 and name in (*_WEIGHTS, *_STORED)]
    elif not names and any(own[name].numel() == 1 for name in _BIASES if name in own):
        # A gain has a bias of its own length, a layer with one output has one of one entry.
        names = [name for name, p in own.items() if p.ndim == 2 and p.numel() > 1]
    if len(names) != 1:
        return None
    label = "weight" if names[0] in _STORED else names[0]
    return label if label in _WEIGHTS else None


def _tables(places: Iterable[Standing]) -> set[tuple[int, int]]:
    """The shapes of the embeddings: tokens × width."""
    tables = (
        own_parameters(place.module).get("weight")
        for place in places
        if EMBEDDING_CLASS.search(class_of(place.module).__name__)
        and not _POSITION_NAME.search(place.name)
    )
    return {
        (table.shape[0], table.shape[1])
        for table in tables
        if table is not None and has_shape(table) and table.ndim == 2
    }


def _storages(found: Sequence[_Found], tables: Container[tuple[int, int]]) -> dict[type, bool]:
    """By class, whether matrices are stored in × out, where its layers agree: those with a bias are
    asked first, then heads, names, and layers that stand one after the other.
    """
    pairs = list(itertools.pairwise(found))
    asked = (
        [(one.kind, one.by_bias) for one in found],
        [(one.kind, one.by_vocabulary(tables)) for one in found],
        [(one.kind, one.by_name) for one in found],
        [(one.kind, one.before(after)) for one, after in pairs],
    )
    stored: dict[type, bool] = {}
    for answers in asked:
        votes: dict[type, set[bool]] = {}
        for kind, turned in answers:
            if turned is not None and kind not in stored:
                votes.setdefault(kind, set()).add(turned)
        stored |= {kind: turned.pop() for kind, turned in votes.items() if len(turned) == 1}
    return stored
