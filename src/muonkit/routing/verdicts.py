"""The outcome of routing for one parameter: a verdict, or that nothing decides about it, or about
its heads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch.nn as nn

__all__ = ["Undecided", "UnknownHeads", "Verdict", "adamw", "is_vector", "muon"]


@dataclass(frozen=True)
class Verdict:
    """How a parameter is trained. `view` is None exactly where `algorithm` is "adamw"."""

    algorithm: str
    view: str | None
    decay: bool
    reason: str


class Undecided(ValueError):
    """No rule knows this parameter; the message says what is missing.

    Attributes:
        final: no algorithm can train it as it is, so that no `Rule` settles it.
    """

    def __init__(self, message: str, *, final: bool = False) -> None:
        super().__init__(message)
        self.final = final


class UnknownHeads(NamedTuple):
    """A weight of an attention module whose heads cannot be told.

    Attributes:
        module: its name.
        why: they cannot be told.
        view: that would cut the weight, with words in place of the numbers that are missing.
    """

    module: str
    why: str
    view: str


def adamw(reason: str, *, decay: bool = True) -> Verdict:
    """AdamW trains it."""
    return Verdict("adamw", None, decay, reason)


def muon(view: str, reason: str) -> Verdict:
    """Muon trains it, in this view."""
    return Verdict("muon", view, True, reason)


def is_vector(param: nn.Parameter) -> bool:
    """At most one dimension is not one: nothing to orthogonalize, however it is stored."""
    return is_vector_shape(param.shape)


def is_vector_shape(shape: Sequence[int]) -> bool:
    """Whether a parameter of this shape is a vector; one without entries is."""
    return sum(extent != 1 for extent in shape) <= 1 or 0 in shape
