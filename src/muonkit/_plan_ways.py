"""Ways: what is planned for, and between which ranks each matrix goes. Pure Python, no tensors."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, NamedTuple

from muonkit.placement import Box, Placement, Where, box_size, intersection, pieces

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

__all__ = ["Matrix", "Stored", "Way", "alike", "sources", "targets"]


class Stored(NamedTuple):
    """A parameter, as far as the plan needs to know it.

    Attributes:
        name: for messages.
        shape: the logical one.
        stored: where the parameter lies.
        lives: where its momentum lies: within `stored`, on the same mesh.
        repeat: mesh axes along which the same is computed again, rather than shared out and sent.
        state_shape, state_lives: of the variant's state, where it keeps one.
    """

    name: str
    shape: tuple[int, ...]
    stored: Placement
    lives: Placement
    repeat: tuple[int, ...] = ()
    state_shape: tuple[int, ...] = ()
    state_lives: Placement | None = None


class Matrix(NamedTuple):
    """One matrix of a parameter.

    Attributes:
        tensor: the parameter's index.
        box: of the parameter, which holds it.
        flops: that it costs to orthogonalize.
        state_box: of the variant's state, which belongs to it.
    """

    tensor: int
    box: Box
    flops: int
    state_box: Box | None = None


def sources(lives: Placement, shape: tuple[int, ...], box: Box, owner: int) -> dict[int, Box]:
    """Who sends which part of a box to its owner: the owner itself what it has; of several copies
    the one that has the owner's place among the copies.
    """
    return Way(lives, shape, box, lives.copies()).others(owner)


def targets(
    stored: Placement, shape: tuple[int, ...], box: Box, owner: int, repeat: tuple[int, ...]
) -> dict[int, Box]:
    """Who gets which part of a box from its owner: all who store it, and have none of their own
    repetition.
    """
    return Way(stored, shape, box, repeat).others(owner)


class Way(NamedTuple):
    """One way of a matrix: between its owner and the ranks on which its parts lie.

    Attributes:
        place: where the tensor lies whose box it is.
        shape: of the tensor.
        axes: mesh axes along which an owner deals with ranks of its own coordinates only.
    """

    place: Placement
    shape: tuple[int, ...]
    box: Box
    axes: tuple[int, ...]

    def others(self, owner: int) -> dict[int, Box]:
        """Who exchanges which part of the box with this owner."""
        parts = pieces(self.place, self.shape, self.box, self.place.where(owner, self.axes))
        return {position: piece.box for piece in parts for position in piece.positions}

    def part(self, position: int) -> Box | None:
        """What the rank at this position has of the box."""
        return intersection(_own_box(self.place, self.shape, position), self.box)

    def counts(self, position: int, owner: int) -> bool:
        """Whether this owner deals with the rank at this position, if that has a part."""
        return not self.axes or (
            self.place.where(position, self.axes) == self.place.where(owner, self.axes)
        )

    def sizes(self, where: Where) -> dict[int, int]:
        """The elements that each of an owner's others has; the owner's coordinates are `where`."""
        parts = pieces(self.place, self.shape, self.box, where)
        return {position: box_size(piece.box) for piece in parts for position in piece.positions}


@functools.lru_cache(maxsize=1 << 12)
def _own_box(place: Placement, shape: tuple[int, ...], position: int) -> Box:
    return place.box(shape, position)


def alike(tensors: Sequence[Stored], matrices: Sequence[Matrix]) -> list[int]:
    """For each matrix, the first one that lies on the ranks as it does: of an equal parameter, and
    elsewhere at most along dims that nothing cuts (experts of a stack, on all of its ranks).
    """
    kinds: dict[Stored, int] = {}
    kind = [kinds.setdefault(tensor._replace(name=""), len(kinds)) for tensor in tensors]
    cuts = [{axis.dim for axis in (*tensor.lives.axes, *tensor.stored.axes)} for tensor in kinds]
    first: dict[tuple[Any, ...], int] = {}
    like = []
    for i, (tensor, box, _, state_box) in enumerate(matrices):
        cut = cuts[kind[tensor]]
        key = (kind[tensor], *_ends(box, cut), *_ends(state_box or (), cut))
        like.append(first.setdefault(key, i))
    return like


def _ends(box: Box, cut: Collection[int | None]) -> list[tuple[int, int] | int]:
    """Where a box lies along the dims that are cut, and its lengths along the others."""
    return [(a, b) if dim in cut else b - a for dim, (a, b) in enumerate(box)]
