"""The plan: which matrices are computed together. Pure Python, no tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterable

__all__ = ["BYTES_IN_FLIGHT", "Item", "make_batches"]

# Cap on the bytes of one batch of matrices, above which no batch grows (but a single parameter may
# be larger); the transient peak of a step is a small multiple of the largest batch.
BYTES_IN_FLIGHT = 256 * 2**20


class Item(NamedTuple):
    """One block of one parameter, as far as the plan needs to know it.

    Attributes:
        position: where it stands in the caller's list.
        key: what must be equal for two items to be computed together.
        nbytes: bytes of its matrices.
    """

    position: int
    key: Hashable
    nbytes: int


def make_batches(items: Iterable[Item], cap: int = BYTES_IN_FLIGHT) -> list[list[Item]]:
    """Group items of equal key, in order of appearance, with at most `cap` bytes in a batch.

    An item larger than the cap is a batch of its own.
    """
    open_batches: dict[Hashable, list[Item]] = {}
    sizes: dict[Hashable, int] = {}
    batches: list[list[Item]] = []
    for item in items:
        if item.key not in open_batches or sizes[item.key] + item.nbytes > cap:
            open_batches[item.key] = []
            sizes[item.key] = 0
            batches.append(open_batches[item.key])
        open_batches[item.key].append(item)
        sizes[item.key] += item.nbytes
    return batches
