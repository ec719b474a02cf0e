"""Scales: the shape of one matrix -> the factor on its learning rate.

An orthogonalized matrix has singular values near one whatever its shape; the scale turns that into
a step whose size means the same thing in every matrix of the model.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from muonkit._text import unknown

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["ADAMW_UNITS", "ROUTED", "SCALES", "scale_factor"]


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


SCALES: dict[str, Callable[[int, int], float]] = {
    "original": _original,
    "match_rms_adamw": _match_rms_adamw,
    "spectral": _spectral,
    "unit_rms": _unit_rms,
}


# Scales under which lr is the size of an entry's change, up to a constant, as AdamW's lr is.
ADAMW_UNITS = frozenset({"match_rms_adamw", "unit_rms"})

# The scale of a model that `MuonW` routes by itself.
ROUTED = "unit_rms"


def scale_factor(name: str | None, rows: int, cols: int) -> float:
    """The factor on lr for one matrix of `rows` outputs and `cols` inputs.

    Args:
        name: a key of `SCALES`; None means "original", as in torch.optim.Muon.

    Raises:
        ValueError: no such scale.
    """
    function = SCALES.get(name or "original")
    if function is None:
        # torch.optim.Muon's words first: this is its error for the same mistake.
        raise ValueError(
            f"Adjust learning rate function {name} is not supported: "
            + unknown("adjust_lr_fn", name, SCALES, ", or None for 'original'")
        )
    return function(rows, cols)
