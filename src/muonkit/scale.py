"""Scales: the shape of one matrix -> the factor on its learning rate.

An orthogonalized matrix has singular values near one whatever its shape; the scale turns that into
a step whose size means the same thing in every matrix of the model.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeAlias

from muonkit._text import unknown

__all__ = ["ADAMW_UNITS", "ROUTED", "SCALES", "Scale", "check_scale", "scale_factor", "scale_name"]

Scale: TypeAlias = Callable[[int, int], float]


def _original(rows: int, cols: int) -> float:
    # Keller Jordan's: the step's spectral norm is lr, more for matrices that widen.
    return math.sqrt(max(1.0, rows / cols))


def _match_rms_adamw(rows: int, cols: int) -> float:
    # Moonlight (arXiv 2502.16982, eq. 4): the step's RMS is 0.2 lr, as AdamW's late in a long
    # training, so its learning rate and decay carry over there. A semi-orthogonal matrix has RMS
    # 1/sqrt(max).
    return 0.2 * math.sqrt(max(rows, cols))


def _unit_rms(rows: int, cols: int) -> float:
    # The step's RMS is lr, as AdamW's in its first steps, where an entry moves by lr with the
    # gradient's sign. The constant is from benchmarks/default_rate.py.
    return math.sqrt(max(rows, cols))


def _spectral(rows: int, cols: int) -> float:
    # muP's spectral condition (arXiv 2310.17813): RMS-to-RMS operator norm of the step is lr.
    return math.sqrt(rows / cols)


# The names that the option `adjust_lr_fn`, and `route`'s `scale`, accept.
SCALES: dict[str, Scale] = {
    "original": _original,
    "match_rms_adamw": _match_rms_adamw,
    "spectral": _spectral,
    "unit_rms": _unit_rms,
}


# Scales under which lr is the size of an entry's change, up to a constant, as AdamW's lr is.
ADAMW_UNITS = frozenset({"match_rms_adamw", "unit_rms"})

# The scale of a model that `MuonW` routes by itself.
ROUTED = "unit_rms"


def scale_factor(scale: str | Scale | None, rows: int, cols: int) -> float:
    """The factor on lr for one matrix of `rows` outputs and `cols` inputs.

    Args:
        scale: a key of `SCALES`, or a function like theirs; None means "original", as in
            torch.optim.Muon.

    Raises:
        ValueError: no such scale.
    """
    if not rows or not cols:
        return 1.0  # of nothing
    if callable(scale):
        return scale(rows, cols)
    function = SCALES.get(scale or "original")
    if function is None:
        # torch.optim.Muon's words first: this is its error for the same mistake.
        also = (
            ", None for 'original', or a function (rows, cols) -> float. One that a state dict "
            "names is given to the optimizer that loads it, as adjust_lr_fn="
        )
        raise ValueError(
            f"Adjust learning rate function {scale} is not supported: "
            + unknown("adjust_lr_fn", scale, SCALES, also)
        )
    return function(rows, cols)


def scale_name(scale: Scale) -> str:
    """The name that stands for a scale function in state dicts, records and between ranks."""
    return str(getattr(scale, "__name__", type(scale).__name__))


def check_scale(scale: str | Scale | None, rows: int = 1, cols: int = 1) -> None:
    """Try a scale on a matrix's shape.

    Raises:
        ValueError: no such scale, a function with the name of another scale, or a factor that is
            negative or not finite.
        TypeError: the function cannot be called like this, or returns no number.
    """
    if not callable(scale):
        scale_factor(scale, rows, cols)
        return
    name = scale_name(scale)
    if name in SCALES and SCALES[name] is not scale:
        raise ValueError(
            f"the function {name} has the name of one of muonkit's own scales, and a state dict "
            "could not tell them apart: give it another name"
        )
    form = f"adjust_lr_fn {name} is a function (rows, cols) -> float of one matrix's shape"
    try:
        factor = scale_factor(scale, rows, cols)
    except TypeError as error:
        raise TypeError(f"{form}; called with ({rows}, {cols}) it failed: {error}") from error
    if isinstance(factor, bool) or not isinstance(factor, (int, float)):
        raise TypeError(f"{form}; of ({rows}, {cols}) it returned {factor!r:.80}")
    if not 0 <= factor < math.inf:
        raise ValueError(f"{form}, finite and not negative; of ({rows}, {cols}) it is {factor}")
