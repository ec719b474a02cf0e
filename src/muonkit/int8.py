"""A momentum in int8: whole numbers in blocks of neighbours, and a scale for each block.

    s <- max |M| / 127 over a block;  Q <- round(M / s);  M is read as Q * s

(Linear quantization by blocks, which the authors of arXiv 2509.23106 found to suffice for Muon;
rounded to nearest.) A block is at most `MOST` elements that follow one another in a row as it is
stored: of the last dim, or of all dims but the first where the last ones are short (kernels of a
convolution). What lies apart along dim 0 is never joined, so what is cut there has whole blocks
(only rows of fewer than `LEAST` elements share one, within an expert). Which elements share a block
depends on the parameter's shape and view alone, and never on the layout: every layout
computes what one process computes, and checkpoints travel.

The scales are a state tensor of their own with the parameter's dims, of which the blocks shorten
one, and take one value of those after it::

    parameter (1024, 768)        blocks (1, 96)          scales (1024, 8)
    parameter (64, 32, 3, 3)     blocks (1, 8, 3, 3)     scales (64, 4, 1, 1)
    parameter (8, 512, 1024)     blocks (1, 1, 64)       scales (8, 512, 16)

A block of zeros has the scale 0. One with an entry that is not finite has a scale that is not
finite, and is NaN wherever it is read.
"""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from muonkit._compile import constant_result, copy_each_
from muonkit.newton_schulz.scratch import scratch
from muonkit.views import Block, View

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = [
    "MomentumScale",
    "Scales",
    "block_extents",
    "dequantized",
    "is_scaled",
    "quantize_",
    "scale_cut",
    "scale_region",
    "scale_shape",
    "update_",
]

LARGEST = 127  # -128 is left out: a number and its negative are kept alike

# Elements of a block. With four bytes of a scale for at least LEAST elements of one byte the state
# takes at most 0.27 of float32's.
MOST, LEAST = 128, 50
# Fewer, where the view cuts rows in short pieces, would save less than half of what bfloat16 does.
FEWEST = 8
# Among block lengths, one that this many ranks (or a divisor) can share evenly is preferred.
_RANKS = 16


class MomentumScale(NamedTuple):
    """The scales of a rank's part of a parameter's momentum.

    Attributes:
        tensor: one value for each block.
        block: the extent of a block along every dim.
    """

    tensor: Tensor
    block: tuple[int, ...]


class Scales(NamedTuple):
    """The scales of pieces of one shape.

    Attributes:
        tensors: for each piece, the scales of its blocks.
        dims: how many trailing dims a block extends along.
        length: elements of a block; the last one of a row may have fewer.
    """

    tensors: list[Tensor]
    dims: int
    length: int

    @staticmethod
    def of(tensors: list[Tensor], block: Sequence[int]) -> Scales:
        dims = 1
        for extent in block[1:-1]:
            dims += extent > 1 or dims > 1
        return Scales(tensors, dims, math.prod(block))


# --- which elements share a block -----------------------------------------------------------------


def scale_shape(spec: str, shape: Sequence[int]) -> tuple[int, ...]:
    """The shape of the scales of a parameter of this shape under this view.

    Raises:
        ValueError: the view does not fit, or cuts rows in pieces too short for blocks.
    """
    return _constant_scale_shape(spec, tuple(shape))


@constant_result
def _constant_scale_shape(spec: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    return _scale_shape(View.parse(spec), shape)


@functools.lru_cache(maxsize=4096)
def _scale_shape(view: View, shape: tuple[int, ...]) -> tuple[int, ...]:
    blocks = view.blocks(shape)
    if 0 in shape:
        return shape
    dim, unit = len(shape) - 1, 1
    bounds = _bounds(blocks, shape, dim)
    while dim > 1 and unit * shape[dim] < LEAST and len(bounds) == 2:
        unit *= shape[dim]
        dim -= 1
        bounds = _bounds(blocks, shape, dim)
    length = shape[dim]
    piece = math.gcd(*bounds)  # every cut of the view is at a multiple of it
    fitting = [k for k in range(1, MOST // unit + 1) if piece % k == 0]
    long = [k for k in fitting if k * unit >= LEAST or k == length]
    if long:
        extent = max(long, key=lambda k: (math.gcd(length // k, _RANKS), k))
    elif piece == length:
        count = -(-length // (MOST // unit))
        extent = -(-length // count)
    else:
        extent = max(fitting)
    if extent * unit < FEWEST and piece != length:
        raise ValueError(
            f"view {str(view)!r} cuts a dim of {length} in pieces that share no block of at least "
            f"{FEWEST} elements, and momentum_dtype='int8' keeps a scale for each block; "
            "momentum_dtype='bfloat16' in its group (or Rule(..., options={'momentum_dtype': "
            "'bfloat16'})) takes two bytes per element instead"
        )
    return (*shape[:dim], -(-length // extent), *[1] * (len(shape) - dim - 1))


def _bounds(blocks: Sequence[Block], shape: tuple[int, ...], dim: int) -> set[int]:
    """Where matrices begin and end along a dim."""
    found = {0, shape[dim]}
    for block in blocks:
        for box in block.boxes():
            found.update(box[dim])
    return found


def block_extents(shape: Sequence[int], scales: Sequence[int]) -> tuple[int, ...]:
    """The extent of a block along every dim, by the shapes of a whole parameter and its scales."""
    pairs = zip(shape, scales, strict=True)
    return tuple([max(1, -(-n // count)) if count else 1 for n, count in pairs])


def is_scaled(shape: Sequence[int], scales: Sequence[int]) -> bool:
    """Whether these may be the shapes of a momentum and of its scales, under whatever view."""
    if len(shape) != len(scales):
        return False
    extents = block_extents(shape, scales)
    if tuple(-(-n // k) for n, k in zip(shape, extents, strict=True)) != tuple(scales):
        return False
    cut = next((dim for dim, k in enumerate(extents) if k > 1), len(shape))
    return tuple(scales[cut + 1 :]) == (1,) * (len(shape) - cut - 1)


def scale_cut(cut: Sequence[slice], block: Sequence[int]) -> tuple[slice, ...]:
    """The index of a piece's scales, by the index of the piece; its ends are those of blocks."""
    return tuple([slice(a.start // k, -(-a.stop // k)) for a, k in zip(cut, block, strict=True)])


def scale_region(block: Block, scale: MomentumScale) -> MomentumScale:
    """The scales of the region that `Block.region` cuts out of a momentum."""
    tensor, extents = scale
    if block.pieces is not None:
        dim, length = block.pieces
        count = length // extents[dim]
        tensor = torch.unflatten(tensor, dim, (tensor.shape[dim] // count, count)).movedim(dim, 0)
        extents = (1, *extents)
    return MomentumScale(
        tensor[scale_cut(block.index, extents)] if block.index else tensor, extents
    )


# --- the arithmetic -------------------------------------------------------------------------------


def _blocks(M: Tensor, scales: Scales) -> list[Tensor]:
    """A stack `(N, *shape)` in blocks `(..., blocks of a row, elements)`, sharing its memory: the
    whole ones, and where the last one of a row is shorter, these.
    """
    # (Not one expression over padded rows: torch 2.13's compiler reads beyond their end.)
    rows, length = M.flatten(-scales.dims), scales.length
    count, over = divmod(rows.shape[-1], length)
    found = []
    if count:
        found.append(rows[..., : count * length].view(*rows.shape[:-1], count, length))
    if over:
        found.append(rows[..., count * length :].unsqueeze(-2))
    return found


def _split(s: Tensor, blocks: Sequence[Tensor]) -> Sequence[Tensor]:
    """Values of all blocks of a row, `(..., blocks of a row, 1)`, as `_blocks` has them."""
    return torch.split(s, [part.shape[-2] for part in blocks], dim=-2)


def _read_(M: Tensor, scales: Scales) -> None:
    """Multiply the numbers that were kept by the scales."""
    if M.numel():
        s = torch.stack(scales.tensors).flatten(-scales.dims).unsqueeze(-1)
        blocks = _blocks(M, scales)
        for part, factor in zip(blocks, _split(s, blocks), strict=True):
            part.mul_(factor)


def dequantized(momenta: Sequence[Tensor], scales: Scales, dtype: torch.dtype) -> Tensor:
    """The momenta, stacked `(N, *shape)`, in a floating-point dtype."""
    M = torch.stack(list(momenta)).to(dtype)
    _read_(M, scales)
    return M


def quantize_(momenta: Sequence[Tensor], scales: Scales, M: Tensor) -> None:
    """Write a stack `(N, *shape)` to the momenta, in int8, and to their scales.

    Args:
        M: row-major; its memory is used, and its values are lost.
    """
    if not M.numel():
        return
    blocks = _blocks(M, scales)
    largest = [
        torch.maximum(part.amax(-1, keepdim=True), -part.amin(-1, keepdim=True)) for part in blocks
    ]
    s = (torch.cat(largest, -2) / LARGEST).to(scales.tensors[0].dtype)
    # Where s is zero or NaN all will be read as that, whatever is kept; where it is infinite, all
    # that is kept is zero, and read as NaN. What int8 becomes of a NaN is not defined.
    for part, some in zip(blocks, _split(s, blocks), strict=True):
        part.div_(some)
    M.round_().clamp_(-LARGEST, LARGEST).nan_to_num_(0.0)
    copy_each_(momenta, M.unbind())
    copy_each_(scales.tensors, s.reshape(len(M), *scales.tensors[0].shape).unbind())


def update_(
    momenta: Sequence[Tensor],
    scales: Scales,
    U: Tensor,
    kept: float | Tensor,
    new: float | Tensor,
    nesterov: bool,
) -> Tensor:
    """The momentum's part of a step (`muonkit.step`): M <- lerp(M, G, new) is kept in int8, and
    what is returned is computed of M before it was rounded.

    Args:
        U: the gradients G, stacked, in memory that may be written to.

    Returns:
        lerp(G, M, kept), or M, in U's dtype.
    """
    G = U.to(torch.promote_types(U.dtype, torch.float32))
    if torch.compiler.is_compiling():
        M = torch.stack(list(momenta)).to(G.dtype)
    else:
        M = scratch("momentum", tuple(G.shape), G.dtype, G.device)
        torch._foreach_copy_(M.unbind(), list(momenta))
    _read_(M, scales)
    M.lerp_(G, new)
    G = G.lerp_(M, kept) if nesterov else G.copy_(M)
    quantize_(momenta, scales, M)
    return G.to(U.dtype)
