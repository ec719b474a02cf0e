"""Batches of the step: regions of parameters, put together as whole matrices and taken apart."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from muonkit.plan import Item, make_batches
from muonkit.views import Block, blocks_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

__all__ = ["Batch", "Part", "join", "make", "planned", "take_apart"]


class Part(NamedTuple):
    """Regions of one geometry, each `block.batch` matrices, with what belongs to them."""

    block: Block
    params: list[Tensor]
    grads: list[Tensor]
    momenta: list[Tensor]


class Batch(NamedTuple):
    """What one call orthogonalizes: `rows` x `cols` matrices, smaller ones padded with zeros."""

    rows: int
    cols: int
    parts: list[Part]


def planned(
    params: Sequence[Tensor], group: dict[str, Any]
) -> list[tuple[int, int, list[tuple[int, Block]]]]:
    """Rows, columns, and (index of the parameter, block) of every batch."""
    # Plain loops: torch.compile cannot trace comprehensions that nest.
    items: list[Item] = []
    blocks: list[tuple[int, Block]] = []
    for index, p in enumerate(params):
        for block in blocks_of(group["view"], tuple(p.shape)):
            if block.batch * block.rows * block.cols:
                key = (p.dtype, p.device)
                shape = block.batch, block.rows, block.cols
                items.append(Item(key, p.device.type, *shape, p.element_size()))
                blocks.append((index, block))
    batches = make_batches(tuple(items), group["bytes_in_flight"])
    return [(b.rows, b.cols, [blocks[i] for i in b.positions]) for b in batches]


def make(params: Sequence[Tensor], momenta: Sequence[Tensor], group: dict[str, Any]) -> list[Batch]:
    """The batches of a step over these parameters, all of which have a gradient."""
    batches = []
    for rows, cols, blocks in planned(params, group):
        parts: dict[tuple[Any, ...], Part] = {}
        for index, block in blocks:
            p, grad = params[index], params[index].grad
            assert grad is not None
            shape = block.shape, block.batch, block.rows, block.cols, block.transposed
            geometry = *shape, grad.dtype
            if geometry not in parts:
                parts[geometry] = Part(block, [], [], [])
            parts[geometry].params.append(block.region(p))
            parts[geometry].grads.append(block.region(grad))
            parts[geometry].momenta.append(block.region(momenta[index]))
        batches.append(Batch(rows, cols, list(parts.values())))
    return batches


def join(batch: Batch, stacks: Sequence[Tensor]) -> Tensor:
    """The parts' regions, stacked `(N, *region shape)`, as one `(B, rows, cols)`."""
    matrices = [
        part.block.to_matrices(stack) for part, stack in zip(batch.parts, stacks, strict=True)
    ]
    if all(m.shape[1:] == (batch.rows, batch.cols) for m in matrices):
        return matrices[0] if len(matrices) == 1 else torch.cat(matrices)
    count, dtype = 0, matrices[0].dtype
    for m in matrices:
        count += len(m)
        dtype = torch.promote_types(dtype, m.dtype)  # parts differ where gradients do
    whole = matrices[0].new_zeros(count, batch.rows, batch.cols, dtype=dtype)
    for m, place in zip(matrices, _places(batch, whole), strict=True):
        place.copy_(m)
    return whole


def take_apart(batch: Batch, whole: Tensor) -> list[list[Tensor]]:
    """The inverse of `join`: for each part, its regions."""
    return [
        list(part.block.to_regions(place).unbind())
        for part, place in zip(batch.parts, _places(batch, whole), strict=True)
    ]


def _places(batch: Batch, whole: Tensor) -> list[Tensor]:
    """For each part, where its matrices `(N * batch, rows, cols)` are in the whole."""
    places = []
    start = 0
    for part in batch.parts:
        block = part.block
        stop = start + len(part.params) * block.batch
        place = whole if len(batch.parts) == 1 else whole[start:stop]
        if (block.rows, block.cols) != (batch.rows, batch.cols):
            if block.rows > block.cols:
                place = place[:, : block.cols, : block.rows].mT
            else:
                place = place[:, : block.rows, : block.cols]
        places.append(place)
        start = stop
    return places
