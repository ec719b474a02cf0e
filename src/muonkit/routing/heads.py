"""Which layers are output heads: their results leave the model.

Three kinds of evidence, the strongest first: the model says so itself (`get_output_embeddings`),
a name says so, or the layer is the last of the model or of one of its towers. A tower is a part
whose result leaves the model by itself: an actor beside its critic, a generator beside its
discriminator, one of two models in a dict. A layer is hidden if it feeds another part, or stands in
a stack of blocks, in an attention or before an activation.
"""

from __future__ import annotations

import fnmatch
import itertools
import re
from typing import TYPE_CHECKING, Any

import torch.nn as nn

from muonkit._torch import held_parameters, own_parameters
from muonkit.routing.linears import has_shape
from muonkit.routing.names import ONE_ATTENDS, TWO_ATTEND, makes
from muonkit.routing.places import EMBEDDINGS, Models, name_set, weights
from muonkit.routing.verdicts import is_vector

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from muonkit.routing.places import Node

__all__ = ["TOWER", "find_heads", "given_heads"]

# Names of output heads. A strong name is a head wherever it stands. A weak one also occurs inside
# blocks (an attention "head", a "score" layer), so it counts only outside of stacks and attention,
# and only where no later layer takes what it gives.
_STRONG = re.compile(
    r"lm_head|(.*_)?classifiers?|(.*_)?logits|unembed(ding)?|embed_out|qa_outputs"
    r"|seq_relationship"
)
_WEAK = re.compile(
    r"(.*_)?heads?|heads?_.*|(.*_)?scores?|(.*_)?out|out_?c|output|output_(layer|projection)"
    r"|final_(layer|conv|proj)|out_(layer|conv)|(conv|layer|linear|fc)_(post|last|final)"
    r"|last_(layer|conv)|readout|(.*_)?predictors?|predict_.*|(.*_)?(pred|preds|predictions?)"
    r"|to_(pixels?|rgb)|(action|value|policy|q)_net|policy|value|actor|critic"
    r"|(class|bbox|box|mask)_embed|bbox_reg|heatmaps?|project_(hid|q)"
    r"|(visual|vision|image|text|audio)_projection"
)
# The last layers of two towers: of equal width neither feeds the other.
_TWINS = re.compile(r"(visual|vision|image|text|audio)_projection|project_(hid|q)")
_NO_HEAD = re.compile(
    r".*(attn|attention|multi|sa|pos|num)_?heads?|(.*_)?(to|attn|attention|norm|add|mlp|res|skip)_out"
)

# Parts that leave the model by themselves, wherever they are registered.
TOWER = re.compile(
    r"(net_?)?[GD](_?net)?(_?[ABXY12]|_[ABXY]2?[ABXY])?"
    r"|(gen(erator)?s?|disc(riminator)?s?)(_[ABXY]|_[ABXY]2?[ABXY])?"
    r"|(.*_)?(actor|critic|policy|value)s?(_.*)?|q[12]?(_?f(unc(tion)?)?)?_?[12]?"
    r"|decoders?|student|teacher|online|target"
)
_ENCODER = re.compile(r"(.*_)?enc(oder)?s?(_.*)?|backbone|features?|trunk|body|stem")


# Below these nothing is an output: attention, what prepares the input, what chooses experts.
_HIDDEN_ABOVE = re.compile(r".*(attn|attention)(_.*)?|(.*_)?(pre_?net|router|gate)")

# Names and classes of the blocks that a part of a model may consist of.
_STACKS = re.compile(r"(.*_)?(layers?|(res)?blocks?|h|stages?|flows?|transforms)")
_BLOCK_CLASS = re.compile(
    r"(block|layer|attention|attn|feed_?forward|ffn|experts?|bottleneck|stage|moe)$", re.IGNORECASE
)
_LAST_OF_BLOCK = name_set("down down_proj c_proj out_proj o_proj wo w2 w3 dense_4h_to_h linear2")
_MLPS = name_set("Mlp MLP SwiGLU GatedMLP GEGLU")

# Raw parameters that are output heads: CLIP's projections beside its embeddings and blocks.
_RAW_HEADS = re.compile(r"(text|image|visual|audio)_projection|lm_head|unembed(ding)?|proj|W_U")

# Raw output heads of a root module whose other parts are layers.
_RAW_OUTPUT = re.compile(r"(W_)?(head|classifier|logits)(_(weight|proj|matrix))?")

# The one matrix of a root, or of a part without layers, behind its encoder: classes of ArcFace's.
_RAW_WEIGHT = re.compile(r"weights?|W|w|kernel")

# Modules without weights after which a layer gives features, not an output.
_FEATURES_AFTER = (
    nn.ReLU,
    nn.LeakyReLU,
    nn.ELU,
    nn.GELU,
    nn.SiLU,
    nn.Mish,
    nn.Hardswish,
    nn.MaxPool1d,
    nn.MaxPool2d,
    nn.MaxPool3d,
)
_LISTS = (nn.ModuleList, nn.ModuleDict)


def find_heads(root: Node) -> tuple[dict[int, str], dict[int, str]]:
    """The output heads of a model.

    Returns:
        (heads, doubts): id of a weight -> why it is an output head, and id of a weight -> why it
        is none although it is the last of its model.
    """
    heads: dict[int, str] = {}
    for node in root.below():
        for why, modules in (
            ("get_output_embeddings", _output_embeddings(node.module)),
            ("adaptive softmax", _of_adaptive_softmax(node.module)),
        ):
            for param in (p for module in modules for p in own_parameters(module).values()):
                if param is not None and param.ndim == 2:
                    heads.setdefault(id(param), f"output head ({why})")
    search = _Search(root, frozenset(heads))
    for node in search.named:
        for layer in search.ends(node, named=True):
            _claim(heads, layer, f"named {node.name!r}")
    heads = search.raw | heads
    doubts: dict[int, str] = {}
    for model in search.models():
        layers = search.ends(model)
        part = None if heads else _doubt(model, layers)
        for layer in layers:
            why = _last_of(model, layer)
            doubt = part or _features(layer)
            if doubt is None or id(layer) in search.found:
                _claim(heads, layer, why)
            elif doubt == _GUESS:
                _claim(heads, layer, f"{doubt}: {why}")
            else:
                doubts |= {id(weight): doubt for weight in weights(layer)}
    return heads, doubts


def given_heads(root: Node, heads: Iterable[str | nn.Module]) -> dict[int, str]:
    """The output heads that a caller names: modules, or patterns of the names of modules.

    Raises:
        ValueError: a pattern or module that is none of this model's, or has no layer.
    """
    search = _Search(root, frozenset())
    found: dict[int, str] = {}
    for head in heads:
        by_name = isinstance(head, str)
        nodes = [
            node
            for node in root.below()
            if (
                fnmatch.fnmatchcase(node.path, head.removesuffix(".weight"))
                if isinstance(head, str)
                else any(place.module is head for place in node.places)
            )
        ]
        layers = [layer for node in nodes for layer in search.ends(node, named=True)]
        if not layers:
            what = repr(head) if by_name else f"a {type(head).__name__}"
            have = ", ".join(repr(n.path) for n in root.below() if n.is_layer)
            raise ValueError(
                f"heads has {what}, which {'has no layer' if nodes else 'is no module'} of this "
                f"model; the layers are {have[:300] or 'none'}. What is none is given to AdamW by "
                "a Rule(name, algorithm='adamw')"
            )
        for layer in layers:
            _claim(found, layer, "given in heads")
    return found


def _claim(heads: dict[int, str], layer: Node, why: str) -> None:
    for weight in weights(layer):
        heads.setdefault(id(weight), f"output head ({why})")


def _last_of(model: Node, layer: Node) -> str:
    """Where a layer is the last: in the model, or in which tower of it."""
    tower = layer
    while tower.parent is not None and tower.parent is not model:
        tower = tower.parent
    if model.parts:
        return f"last layer of {model.path!r}"
    if tower is layer or not model.kids or tower is model.main[-1]:
        return "last layer of the model"
    return f"last layer of {tower.path!r}"


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


def _of_adaptive_softmax(module: nn.Module) -> list[nn.Module]:
    """The layers that give logits: of the frequent classes, and of every cluster of rarer ones, in
    which a projection to fewer dimensions stands before it."""
    if not isinstance(module, nn.AdaptiveLogSoftmaxWithLoss):
        return []
    tails: Any = module.tail
    return [module.head, *(cluster[-1] for cluster in tails)]


# -- the search -------------------------------------------------------------------------------


class _Search:
    """The layers that give what leaves a module, by its structure and its heads' names."""

    def __init__(self, root: Node, stated: frozenset[int]) -> None:
        """`stated` are the ids of the weights that the model itself calls its output heads."""
        self.root = root
        self.in_stack = {id(kid) for node in root.below() for kid in _blocks(node)}
        self.named = [node for node in root.below() if self._is_named(node)]
        self.found = {id(node) for node in self.named} | {
            id(node) for node in root.below() if stated.intersection(map(id, weights(node)))
        }
        self.holders: set[int] = set()  # the nodes that hold their head themselves
        self.raw = dict(self._raw_heads())

    def models(self) -> list[Node]:
        """The models whose ends are searched: the root, or what it holds where it is a list of
        models."""
        root = self.root
        kids = root.main
        lists = isinstance(root.module, (Models, *_LISTS))
        composite = kids and not any(kid.is_layer for kid in kids)
        if not lists or not composite or any(id(kid) in self.in_stack for kid in kids):
            return [root]
        return [k for k in kids if not (_is_encoder(k) and any(not _is_encoder(o) for o in kids))]

    def _is_named(self, node: Node) -> bool:
        name = node.name
        above = list(node.above())
        if not node.parts or _NO_HEAD.fullmatch(name):
            return False
        if any(_HIDDEN_ABOVE.fullmatch(each.name) for each in above):
            return False
        if _STRONG.fullmatch(name):
            return not name.startswith("pre_")
        if not _WEAK.fullmatch(name) or (makes(name) and _attends(node.parent)):
            return False
        # A model that names its output itself may call a hidden transform "head" (ModernBERT does).
        if any(
            id(each) in self.in_stack or _attends(each) or _output_embeddings(each.module)
            for each in above
        ):
            return False
        return not self._is_taken(node)

    def _is_taken(self, node: Node) -> bool:
        """Whether a later part takes what this one gives."""
        branch = node
        for above in node.above():
            kids = above.main
            leaves = (
                branch is not node and TOWER.fullmatch(branch.name) and node.gives != node.takes
            )
            if branch in kids and not leaves:
                for kid in kids[kids.index(branch) + 1 :]:
                    twins = _TWINS.fullmatch(branch.name) and _TWINS.fullmatch(kid.name)
                    if not twins and not kid.serves and _goes_into(node, kid):
                        return True
            branch = above
        return False

    def _raw_heads(self) -> Iterator[tuple[int, str]]:
        """(id, why) of the parameters that a module holds itself and that are output heads."""
        for node in self.root.below():
            own = _matrices(node)
            matrices = list(own)
            # A module that holds one matrix, which is a head whatever it is called; beside layers,
            # as a norm and what stands before it, it is called its weight.
            is_strong = _STRONG.fullmatch(node.name) and not node.name.startswith("pre_")
            alone = not node.main if is_strong else not node.kids and id(node) in self.found
            alone = alone and not _has_twin(node)
            holds = alone or (
                is_strong and matrices == ["weight"] and _ends_in(own["weight"], node)
            )
            held = holds and not node.is_layer and len(matrices) == 1
            if held:
                self.holders.add(id(node))
            for label in matrices:
                param = own[label]
                named = _RAW_HEADS.fullmatch(label) is not None
                if _is_output_of_root(node, label) and param.ndim == 2:
                    self.holders.add(id(node))
                    yield id(param), f"output head (named {label!r})"
                    continue
                weighs = matrices == [label] and _RAW_WEIGHT.fullmatch(label) and param.ndim == 2
                known = node.is_layer or isinstance(node.module, EMBEDDINGS)
                encoder = _encoder_before(node) if weighs and not known else None
                if encoder is not None and encoder.gives in param.shape:
                    self.holders.add(id(encoder))
                    if not _goes_on(node, param, encoder.gives):
                        yield id(param), f"output head (takes what {encoder.name!r} gives)"
                        continue
                if not (named or held) or param.ndim != 2:
                    continue
                holds_blocks = any(id(each) in self.in_stack for each in node.below())
                in_a_block = any(id(each) in self.in_stack for each in (node, *node.above()))
                holds_blocks |= label == "W_U" and hasattr(node.module, "W_E")
                if not in_a_block and ((named and holds_blocks) or held):
                    name = label if named else node.name
                    yield id(param), f"output head (named {name!r})"

    def ends(self, node: Node, *, named: bool = False) -> list[Node]:
        """The layers whose results leave `node`; `named` where a name calls it a head."""
        if id(node) in self.holders and not (named and node.is_layer):
            return []
        if node.is_layer:
            return [node]
        kids = node.main
        if not kids or _gives_hidden(node, named=named):
            return []
        if isinstance(node.module, _LISTS):
            return self._ends_of_list(node, kids, named)
        if isinstance(node.module, nn.Sequential):
            return [] if _ends_in_features(node) or self._hides(kids[-1]) else self.ends(kids[-1])
        return self._ends_of_module(node, kids)

    def _hides(self, kid: Node) -> bool:
        return id(kid) in self.in_stack

    def _ends_of_list(self, node: Node, kids: list[Node], named: bool) -> list[Node]:
        if id(node) in self.found:  # a list of heads
            return [end for kid in kids for end in self.ends(kid, named=True)]
        single = all(kid.layers == 1 for kid in kids)
        if any(self._hides(kid) for kid in kids) and not (named and single):
            return []
        if _is_chain(kids):
            equal = len(kids) > 1 and len({kid.widths for kid in kids}) == 1
            return [] if equal and not named else self.ends(kids[-1])
        return [end for kid in kids if not _is_fed_on(kid, kids) for end in self.ends(kid)]

    def _ends_of_module(self, node: Node, kids: list[Node]) -> list[Node]:
        second = self._second_names(kids)
        main = [kid for kid in kids if not kid.serves and kid not in second]
        if not main:
            return []
        last = main[-1]
        heads = [kid for kid in main if id(kid) in self.found]
        holders = [kid for kid in main if any(id(n) in self.found for n in kid.below())]
        ends: list[Node] = []
        if not self._hides(last) and (not holders or last in holders or TOWER.fullmatch(last.name)):
            ends += self.ends(last)
        beside = heads or ([last] if ends else [])
        for kid in main:
            if kid in heads or self._hides(kid) or (kid is last and ends):
                continue
            tower = TOWER.fullmatch(kid.name) and not kid.is_layer
            if tower or any(_is_parallel(kid, other, main) for other in beside):
                ends += self.ends(kid)
        return ends

    def _second_names(self, kids: Sequence[Node]) -> list[Node]:
        """The kids that only name a part of what stands before them: `features` beside the whole
        `model`. What leaves them goes on in that.
        """
        layers = [_layers_of(kid) for kid in kids]
        second = []
        for i, (kid, own) in enumerate(zip(kids, layers, strict=True)):
            if TOWER.fullmatch(kid.name) or any(id(n) in self.found for n in kid.below()):
                continue
            wholes = [other for other, its in zip(kids[:i], layers[:i], strict=True) if own < its]
            if any(self._goes_on_in(kid, whole) for whole in wholes):
                second.append(kid)
        return second

    def _goes_on_in(self, kid: Node, whole: Node) -> bool:
        ends = {end.module for end in self.ends(whole)}
        return bool(ends) and ends.isdisjoint(end.module for end in self.ends(kid))


def _layers_of(node: Node) -> frozenset[nn.Module]:
    return frozenset(each.module for each in node.below() if each.is_layer)


_GUESS = "a guess"


def _doubt(model: Node, layers: list[Node]) -> str | None:
    """Why the last layer of a model that has no other head may be hidden, if so: a block or a stage
    is a part of a model, and what leaves it goes on into the next."""
    if len(layers) != 1 or isinstance(model.module, nn.Sequential):
        return None
    kind = type(model.module).__name__
    width, out = model.takes, layers[0].gives
    if _BLOCK_CLASS.search(kind) or (layers[0].name in _LAST_OF_BLOCK and width == out):
        return "last layer of a block, not of a model"
    return _GUESS if kind in _MLPS and width == out else None


def _features(layer: Node) -> str | None:
    """Why a last convolution gives features, if so: an output has fewer channels than it."""
    taken, given = layer.widths
    if not layer.is_convolution or taken is None or given is None:
        return None
    if layer.name == "fc":
        return None  # a classifier of 1000 classes, on fewer channels (DLA)
    return "last convolution, but it does not narrow" if given >= max(taken, 5) else None


# -- what a module is -------------------------------------------------------------------------


def _is_output_of_root(node: Node, label: str) -> bool:
    """Whether a root with layers or embeddings holds its output head by this name."""
    if node.parent is not None or not _RAW_OUTPUT.fullmatch(label):
        return False
    # It takes what the last layer gives.
    given = node.main[-1].gives if node.main else None
    tables = (n.module for n in node.below() if isinstance(n.module, EMBEDDINGS))
    widths = {given} if node.main else {table.embedding_dim for table in tables}
    param = own_parameters(node.module)[label]
    return param is not None and not widths.isdisjoint(param.shape)


def _encoder_before(node: Node) -> Node | None:
    """The part with layers that a model ends in, where `node` is the model or a part of it without
    layers that comes after, if that part is called an encoder.
    """
    if _is_whole(node) and node.main:
        before = node.main
    elif node.parent is not None and _is_whole(node.parent) and not node.main:
        beside = list(node.parent.kids.values())
        before = [kid for kid in beside[: beside.index(node)] if kid.layers]
        if node.parent.main != before:
            return None
    else:
        return None
    return before[-1] if before and _is_encoder(before[-1]) else None


def _is_whole(node: Node) -> bool:
    """Whether a node is the root, or all that a root's wrappers hold."""
    above = node.parent
    if above is None:
        return True
    return (
        _is_whole(above)
        and above.main == [node]
        and not isinstance(above.module, (nn.Sequential, *_LISTS))
        and not held_parameters(above.module)
        and not any(held_parameters(kid.module) for kid in above.kids.values() if kid is not node)
    )


def _goes_on(node: Node, matrix: nn.Parameter, given: int | None) -> bool:
    """Whether what the one raw matrix of a part makes of the width `given` goes on: into a norm, or
    into another raw matrix beside it; of a square one also into an activation.
    """
    if node.parent is None:
        return False
    beside = list(node.parent.kids.values())
    is_square = matrix.shape[0] == matrix.shape[1]
    made = {given} if is_square else set(matrix.shape) - {given}
    for kid in beside[beside.index(node) + 1 :]:
        if _is_norm(kid) and made & {p.numel() for p in held_parameters(kid.module).values()}:
            return True
        if is_square and isinstance(kid.module, _FEATURES_AFTER):
            return True
    others = [kid for kid in beside if kid is not node and not kid.layers]
    shapes = [p.shape for kid in others for p in _matrices(kid).values()]
    # One of the same shape is another head, as a second task's; of square ones each is the next's.
    return any(made & set(shape) for shape in shapes if is_square or shape != matrix.shape)


def _matrices(node: Node) -> dict[str, nn.Parameter]:
    """The parameters that a module holds itself, without vectors and those that have no shape."""
    held = held_parameters(node.module).items()
    return {label: p for label, p in held if has_shape(p) and not is_vector(p)}


def _has_twin(node: Node) -> bool:
    """Whether one of its kind stands beside it, as the gates of a cell do."""
    beside = node.parent.kids.values() if node.parent is not None else ()
    return any(type(kid.module) is type(node.module) for kid in beside if kid is not node)


def _ends_in(weight: nn.Parameter, node: Node) -> bool:
    """Whether a module that holds a weight beside layers ends in it, not in one of them: a head
    gives more or less than it takes."""
    square = weight.shape[0] == weight.shape[1]
    return not square or all(kid.gives == kid.takes for kid in node.main)


def _is_encoder(node: Node) -> bool:
    return bool(_ENCODER.fullmatch(node.name)) or type(node.module).__name__.endswith("Encoder")


def _attends(node: Node | None) -> bool:
    """Whether a composite has layers that make q, k and v: what it gives is hidden."""
    if node is None:
        return False
    if isinstance(node.module, nn.MultiheadAttention):
        return True
    if not ONE_ATTENDS.isdisjoint(node.kids) or len(TWO_ATTEND.intersection(node.kids)) >= 2:
        return True
    # A critic has an "fc_q" and an "fc_v", a retriever a "query_proj" and a "key_proj".
    return set("qkv") == {each for kid in node.main if kid.is_layer for each in makes(kid.name)}


def _gives_hidden(node: Node, *, named: bool) -> bool:
    """Attention, recurrence, and backbones that return hidden states; a head that pools by
    attention."""
    if _attends(node) or (named and any(_attends(each) for each in node.below())):
        return True
    return isinstance(node.module, (nn.RNNBase, nn.RNNCellBase)) or _is_headless(node.module)


def _is_headless(module: nn.Module) -> bool:
    """A Hugging Face backbone: what it returns are hidden states, so its last layer is hidden."""
    if not hasattr(type(module), "base_model_prefix"):
        return False
    return getattr(module, "base_model", None) is module and not _output_embeddings(module)


def _ends_in_features(node: Node) -> bool:
    """A Sequential whose last layer has an activation, a pooling or a norm behind it."""
    kids = list(node.kids.values())
    after = kids[kids.index(node.main[-1]) + 1 :]
    return any(isinstance(kid.module, _FEATURES_AFTER) or _is_norm(kid) for kid in after)


def _blocks(parent: Node) -> list[Node]:
    """The kids that are blocks of a stack: in a list of their like, each as wide at its end as at
    its beginning or feeding the next; or beside siblings of their kind."""
    if isinstance(parent.module, _LISTS) and all(kid.is_layer for kid in parent.main):
        equal = len(parent.main) > 1 and len({kid.widths for kid in parent.main}) == 1
        return parent.main if equal and _is_residual(parent.main[0]) else []
    composite = [kid for kid in parent.main if not kid.is_layer]
    alike: dict[tuple[object, ...], list[Node]] = {}
    for kid in composite:
        alike.setdefault(kid.kind, []).append(kid)
    return [kid for kid in composite if _is_block(kid, parent, alike[kid.kind])]


def _is_block(node: Node, parent: Node, alike: list[Node]) -> bool:
    residual = _is_residual(node)
    own_class = not isinstance(node.module, (nn.Sequential, *_LISTS))
    if isinstance(parent.module, _LISTS):
        stack = bool(_STACKS.fullmatch(parent.name))
        if len(alike) == 1:
            return own_class and (residual or stack)
        return residual or stack or (own_class and _chains(alike))
    if isinstance(parent.module, nn.Sequential):
        return own_class and node.layers > 1 and (len(alike) > 1 or residual)
    if TOWER.fullmatch(node.name):
        return False
    return node.layers > 1 and (len(alike) > 2 or (len(alike) == 2 and residual))


def _is_residual(node: Node) -> bool:
    width, out = node.widths
    return width is not None and width == out and width > 1


def _chains(kids: Sequence[Node]) -> bool:
    """Whether any of them may take what the one before it gives."""
    pairs = itertools.pairwise(kids)
    return any(_takes(b, a) for a, b in pairs)


def _is_chain(kids: Sequence[Node]) -> bool:
    """Whether every one takes what the one before it gives."""
    if len({kid.kind for kid in kids}) != 1:
        return False
    return all(_takes(b, a) for a, b in itertools.pairwise(kids))


def _takes(later: Node, earlier: Node) -> bool:
    given, taken = earlier.gives, later.takes
    return given is None or taken is None or given == taken > 1


def _is_parallel(kid: Node, head: Node, siblings: Sequence[Node]) -> bool:
    """Whether `kid` gives an output beside `head`: it is of the same kind, takes the same width or
    gives the same, stands beside it, and nothing later takes what it gives."""
    if kid is head or (makes(kid.name) and _attends(kid.parent)) or kid.is_layer != head.is_layer:
        return False
    if kid.is_layer and type(kid.module) is not type(head.module):
        return False
    (taken, given), (head_taken, head_given) = kid.widths, head.widths
    if None in (taken, given, head_taken, head_given) or given == head_taken:
        return False
    first, last = sorted((siblings.index(kid), siblings.index(head)))
    between = [each.takes for each in siblings[first + 1 : last]]
    alike = taken == head_taken or given == head_given
    beside = all(width in (taken, head_taken) for width in between)
    return alike and beside and not _is_normed(kid) and not _is_fed_on(kid, siblings)


def _goes_into(node: Node, later: Node) -> bool:
    """Whether a later part takes what `node` gives.

    Of two that take the same width only a name tells a chain from two heads, or that they are not
    of one kind: a convolution before a linear layer.
    """
    if later.takes != node.gives:
        return False
    last = next((each for each in reversed(list(node.below())) if each.is_layer), later)
    other_kind = later.is_layer and later.is_convolution != last.is_convolution
    return later.takes != node.takes or other_kind or _STRONG.fullmatch(later.name) is not None


def _is_fed_on(kid: Node, siblings: Sequence[Node]) -> bool:
    given = kid.gives
    later = siblings[siblings.index(kid) + 1 :]
    return given is not None and given > 1 and any(each.takes == given for each in later)


def _is_normed(kid: Node) -> bool:
    """Whether the next module normalizes what `kid` gives: then it is hidden."""
    assert kid.parent is not None
    beside = list(kid.parent.kids.values())
    after = beside[beside.index(kid) + 1 :][:1]
    return any(map(_is_norm, after))


def _is_norm(node: Node) -> bool:
    return "Norm" in type(node.module).__name__
