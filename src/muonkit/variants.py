"""Variants: what happens to an orthogonalized matrix before it is applied.

A variant rewrites stacks of whole matrices of one shape, in logical orientation (rows = outputs)
and without padding; the scale and the learning rate come after it. With O = orthogonalize(U), v
zero before the first step and every norm over one matrix:

    plain     O                                                    no state
    normuon   v <- lerp(v, mean over columns of O², 1 - β2)        one v per row, β2 = 0.95
              Ô  = O / (√v + 1e-10);  O <- Ô · ‖O‖_F / ‖Ô‖_F
    adamuon   v <- lerp(v, O², 1 - β2)                             one v per entry, β2 = 0.999
              Ô  = O / (√(v / (1 - β2ᵗ)) + 1e-8);  O <- Ô · √min(rows, cols) / ‖Ô‖_F

Sources: NorMuon, arXiv 2510.05491 and its authors' normuon.py; AdaMuon, arXiv 2507.11005 and its
authors' adamuon.py.

Laws, for O as the orthogonalizer returns it (singular values of at most a few units): a zero matrix
stays zero and nothing becomes infinite or NaN; a stack gives what its matrices give one by one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

from muonkit._text import unknown

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["VARIANTS", "Variant", "check_variant"]

NORMUON_EPS = 1e-10
ADAMUON_EPS = 1e-8

# A smaller norm counts as none, so that a zero matrix is not 0/0 and no quotient overflows. In
# float32 a norm above it is exact: the square of 1e-15 is far from underflow.
NO_NORM = 1e-15


@dataclass(frozen=True)
class Variant:
    """One variant.

    `state` is what it keeps of each matrix: "none", "rows" (one number per row) or "entries" (one
    per entry); always zero at first. `beta2`, the weight of the past in it, is the default (None
    without state). `apply_(O, v, beta2, step)` rewrites O and v in place:

    - O: `(N, rows, cols)`, any strides, any float dtype; computed in float32 at least;
    - v: `(N, rows, 1)` for "rows", `(N, rows, cols)` for "entries", None for "none"; float32 or
      wider, any strides;
    - step: how often v is updated with this call, 1 in the first; a number, or a tensor (with
      torch.compile: a number is compiled in) that broadcasts to `(N, 1, 1)`.
    """

    state: Literal["none", "rows", "entries"]
    beta2: float | None
    apply_: Callable[[Tensor, Tensor | None, float, float | Tensor], None]


def _plain_(O: Tensor, v: Tensor | None, beta2: float, step: float | Tensor) -> None:
    pass


def _normuon_(O: Tensor, v: Tensor | None, beta2: float, step: float | Tensor) -> None:
    assert v is not None
    # Everything but the first and the last line is on one number per row: ‖O‖ and ‖Ô‖ follow from
    # the rows' norms, and O is read twice and written once.
    wide = torch.promote_types(O.dtype, v.dtype)
    norm = torch.linalg.vector_norm(O, dim=-1, keepdim=True, dtype=wide)
    v.lerp_((norm.square() / O.shape[-1]).to(v.dtype), 1 - beta2)
    divisor = v.sqrt().add_(NORMUON_EPS)
    before = torch.linalg.vector_norm(norm, dim=-2, keepdim=True)
    after = torch.linalg.vector_norm(norm / divisor, dim=-2, keepdim=True)
    O.mul_(before / after.clamp_min_(NO_NORM) / divisor)


def _adamuon_(O: Tensor, v: Tensor | None, beta2: float, step: float | Tensor) -> None:
    assert v is not None
    v.mul_(beta2).addcmul_(O, O, value=1 - beta2)
    # √(v / c) + ε = (√v + ε√c) / √c, and the norm takes the factor √c out again: the correction c
    # of the bias is left in ε alone.
    correction = 1 - beta2**step
    # One temporary, of v's dtype: fresh memory costs a CPU more than the arithmetic.
    quotient = v.sqrt().add_(ADAMUON_EPS * correction**0.5).reciprocal_().mul_(O)
    norm = torch.linalg.vector_norm(quotient, dim=(-2, -1), keepdim=True)
    target = min(O.shape[-2:]) ** 0.5
    O.copy_(quotient.mul_(target / norm.clamp_min_(NO_NORM)))


VARIANTS: dict[str, Variant] = {
    "plain": Variant("none", None, _plain_),
    "normuon": Variant("rows", 0.95, _normuon_),
    "adamuon": Variant("entries", 0.999, _adamuon_),
}


def check_variant(name: str) -> Variant:
    """The variant of this name.

    Raises:
        ValueError: not a key of `VARIANTS`.
    """
    if not isinstance(name, str) or name not in VARIANTS:
        raise ValueError(unknown("variant", name, VARIANTS))
    return VARIANTS[name]
