"""Which layers meet the raw input: the stems, which AdamW trains like embeddings.

The model's first convolution is one, and so is every convolution or patch embedding that nothing
in the model feeds: the first of a second tower, each branch that takes the image itself.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from muonkit.routing.heads import TOWER
from muonkit.routing.places import CONVS, EMBEDDINGS, is_conv, is_depthwise, weights

if TYPE_CHECKING:
    from muonkit.routing.places import Node

__all__ = ["find_stems"]

# Sounds and pictures have up to three channels. Four are a picture's too where a name says so:
# latents of diffusion models also have four.
_RAW_CHANNELS = 3
_STEM = re.compile(r"(^|_)stem$|patch_embed")
_PATCHES = re.compile(
    r"(.*_)?(patch_?(embed\w*|proj\w*)|patchify)|embeds|x_embed(der)?|vision_embed_tokens"
    r"|embed_(state|action|return)s?|(value|input)_(embedding|projection)"
)


def find_stems(root: Node) -> dict[int, str]:
    """id of a weight -> why it is a stem."""
    stems: dict[int, str] = {}
    something_before = False
    for node in root.below():
        module = node.module
        if isinstance(module, CONVS) and not is_depthwise(module):
            named = any(_STEM.search(part) for part in node.parts[-2:])
            raw = module.in_channels <= _RAW_CHANNELS + named and not _is_fed(node)
            if not something_before or raw:
                stems |= {id(w): "first convolution (stem)" for w in weights(node)}
            something_before = True
        elif node.is_linear and _is_patch_embedding(node):
            stems |= {id(w): "linear embedding of the input (stem)" for w in weights(node)}
            something_before = True
        elif node.is_linear or isinstance(module, EMBEDDINGS):
            something_before = True
    return stems


def _is_fed(node: Node) -> bool:
    """Whether an earlier part gives what the node takes."""
    branch = node
    for above in node.above():
        for kid in above.kids.values():
            if kid is branch:
                break
            given = kid.gives
            taken = given == branch.takes == node.takes
            if taken and given != 1 and not TOWER.fullmatch(branch.name):
                return True
        branch = above
    return False


def _is_patch_embedding(node: Node) -> bool:
    """The first layer of what is named a patch embedding."""
    for each in (node, *node.above()):
        if _PATCHES.fullmatch(each.name):
            first = next(n for n in each.below() if n.is_linear or is_conv(n.module))
            return first is node
    return False
