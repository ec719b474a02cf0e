"""Variants: what happens to an orthogonalized matrix before it is applied.

A variant rewrites stacks of whole matrices of one shape, in logical orientation (rows = outputs)
and without padding; the scale and the learning rate come after it. With O = orthogonalize(U), v
zero before the first step and every norm over one matrix:

    plain     O                                                    no state
    normuon   v <- lerp(v, mean over columns of O², 1 - β2)        one v per row, β2 = 0.95
              Ô  = O / (√v + 1e-10);  O <- Ô · ‖O‖_F / ‖Ô‖_F
    adamuon   v <- lerp(v, O², 1 - β2)                             one v per entry, β2 = 0.999
              Ô  = O / (√(v / (1 - β2ᵗ)) + 1e-8);  O <- Ô · √min(rows, cols) / ‖Ô‖_F

A variant of one's own is an object, `Muon(..., variant=Variant("clip_rows", clip_rows_))`; it needs
nothing else, and gives the same result in every layout, since it only sees whole matrices.

Sources: NorMuon, arXiv 2510.05491 and its authors' normuon.py; AdaMuon, arXiv 2507.11005 and its
authors' adamuon.py.

Laws, for O as the orthogonalizer returns it (singular values of at most a few units): a zero matrix
stays zero and nothing becomes infinite or NaN; a stack gives what its matrices give one by one.
`tests/optim/test_variants.py` holds every row of `VARIANTS` to them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

import torch

from muonkit._text import unknown
from muonkit.views import row_shape

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["PLAIN", "VARIANTS", "Variant", "check_variant", "kept_shape", "variant_of"]

State: TypeAlias = Literal["none", "rows", "entries"]

NORMUON_EPS = 1e-10
ADAMUON_EPS = 1e-8

# A smaller norm counts as none, so that a zero matrix is not 0/0 and no quotient overflows. In
# float32 a norm above it is exact: the square of 1e-15 is far from underflow.
NO_NORM = 1e-15


@dataclass(frozen=True)
class Variant:
    """One variant: a name, a function on stacks of whole matrices, and what it keeps of each.

    Attributes:
        name: an identifier. State dicts have it in the variant's place, ranks compare it, and
            `describe()` and the Monitor tell it.
        apply_: `apply_(O, v, beta2, step)` rewrites O and v in place:

            - O: `(N, rows, cols)`, any strides, any float dtype; computed in float32 at least;
            - v: `(N, rows, 1)` for "rows", `(N, rows, cols)` for "entries", None for "none";
              float32 or wider, any strides;
            - beta2: the group's `variant_beta2`, or the default below; 0.0 where there is neither;
            - step: how often v is updated with this call, 1 in the first, 0 where there is no v; a
              number, or a tensor (with torch.compile: a number is compiled in) that broadcasts to
              `(N, 1, 1)`.
        state: "none", "rows" (one number per row) or "entries" (one per entry); zero at first.
        beta2: the default weight of the past in v; None where it is no average.

    A new one is tried on small stacks of zeros on the CPU (a kernel for another device needs a way
    around it there): by the laws above, these stay zero.

    Raises:
        TypeError: `apply_` cannot be called like this, or returns another tensor than O.
        ValueError: no identifier, an unknown state, beta2 outside of [0, 1), or zero matrices do
            not stay zero.
    """

    name: str
    apply_: Callable[[Tensor, Tensor | None, float, float | Tensor], Any]
    state: State = "none"
    beta2: float | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name.isidentifier():
            raise ValueError(f"a variant's name is an identifier, got {self.name!r:.80}")
        if self.state not in get_args(State):
            raise ValueError(
                unknown(f"state of variant {self.name!r}", self.state, get_args(State))
            )
        if self.beta2 is not None and not 0 <= self.beta2 < 1:
            raise ValueError(f"beta2 of variant {self.name!r} is in [0, 1), got {self.beta2!r}")
        _try(self)

    def __repr__(self) -> str:
        # Without the function's address: ranks compare this, and plans depend on the state.
        return f"Variant({self.name!r}, state={self.state!r}, beta2={self.beta2!r})"

    def __deepcopy__(self, memo: object) -> Variant:
        return self  # it cannot change


def _try(variant: Variant) -> None:
    """Refuse a function of another form, on stacks of zeros in the dtypes that a step has."""
    form = f"variant {variant.name!r} is a function apply_(O, v, beta2, step), which rewrites O"
    sizes = {"rows": (2, 3, 1), "entries": (2, 3, 4)}
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        O = torch.zeros(2, 3, 4, dtype=dtype, device="cpu")
        v = None
        if variant.state in sizes:
            kept = torch.promote_types(dtype, torch.float32)
            v = torch.zeros(sizes[variant.state], dtype=kept, device="cpu")
        try:
            returned = variant.apply_(O, v, variant.beta2 or 0.0, 1)
        except (TypeError, RuntimeError) as error:
            raise TypeError(
                f"{form}, called with four arguments; on matrices in {dtype} it failed: {error}"
            ) from error
        if returned is not None and returned is not O:
            what = type(returned).__name__
            raise TypeError(f"{form} in place; it returned a {what}: write O.copy_(...) with it")
        if O.any() or (v is not None and not v.isfinite().all()):
            raise ValueError(
                f"variant {variant.name!r} makes of a matrix of zeros one that is not zero, or not "
                "finite: divide by a norm with .clamp_min(1e-15), which leaves zero at zero"
            )


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


PLAIN = Variant("plain", _plain_)

# The names that the option `variant` accepts.
VARIANTS: dict[str, Variant] = {
    variant.name: variant
    for variant in (
        PLAIN,
        Variant("normuon", _normuon_, "rows", 0.95),
        Variant("adamuon", _adamuon_, "entries", 0.999),
    )
}


def variant_of(choice: str | Variant) -> Variant:
    """The variant that the option stands for: itself, or the one of this name."""
    return choice if isinstance(choice, Variant) else VARIANTS[choice]


def kept_shape(state: str, view: str, shape: Sequence[int]) -> tuple[int, ...]:
    """The shape of what a variant with this `state`, "rows" or "entries", keeps for a parameter."""
    return row_shape(view, shape) if state == "rows" else tuple(shape)


def check_variant(choice: str | Variant) -> Variant:
    """`variant_of`, of whatever was given.

    Raises:
        ValueError: neither a key of `VARIANTS` nor a `Variant`, or one with the name of another.
    """
    if isinstance(choice, Variant):
        named = VARIANTS.get(choice.name, choice)
        if named is not choice and named != choice:
            raise ValueError(
                f"the name of {choice!r} is that of muonkit's own {named!r}, and a state dict "
                "could not tell them apart: give it another name"
            )
        return choice
    if not isinstance(choice, str) or choice not in VARIANTS:
        also = (
            ", or a muonkit.Variant(name, function). One that a state dict names is given to the "
            "optimizer that loads it, as variant="
        )
        raise ValueError(unknown("variant", choice, VARIANTS, also))
    return VARIANTS[choice]
