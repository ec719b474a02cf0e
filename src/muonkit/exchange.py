"""The exchange: moves rectangles of matrices to the ranks that compute them, and back.

It knows nothing of Muon. On one device a parameter is stored, lives and is computed in the same
place, so both directions are the identity and cost nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Exchange", "LocalExchange"]


class Exchange(Protocol):
    """Law: `to_params(to_owners(u))` is `u`."""

    def to_owners(self, u: Tensor) -> Tensor:
        """What this rank stores of a batch -> the whole matrices that it computes."""
        ...

    def to_params(self, o: Tensor) -> Tensor:
        """The inverse."""
        ...


class LocalExchange:
    """One device."""

    def to_owners(self, u: Tensor) -> Tensor:
        return u

    def to_params(self, o: Tensor) -> Tensor:
        return o
