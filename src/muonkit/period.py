"""MuonBP's period: in which steps a group's matrices are orthogonalized whole.

    t mod P = 0   O   = orthogonalize(U)            of the whole matrix
                  W  <- W - lr * (weight_decay * W + scale(rows, cols) * O)
    else          O_r = orthogonalize(U_r)          of each rank's own block, r by r
                  W_r <- W_r - lr * (weight_decay * W_r + factor * scale(rows_r, cols_r) * O_r)

t counts the group's steps from 0. Khaled et al. 2025, "MuonBP: Faster Muon via Block-Periodic
Orthogonalization", arXiv 2510.16981.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

__all__ = ["PERIOD_STEP", "count_", "has_period", "in_blocks"]

#: The key of Muon's groups that has t: the number of the next step, counted from 0 while any group
#: has a period. State dicts have it; ranks compare it.
PERIOD_STEP = "period_step"


def has_period(group: Mapping[str, Any]) -> bool:
    """Whether some steps of a group are steps of blocks."""
    return bool(group["algorithm"] == "muon" and group["period"] > 1)


def in_blocks(group: Mapping[str, Any]) -> bool:
    """Whether the group's next step is one of blocks."""
    return has_period(group) and bool(group.get(PERIOD_STEP, 0) % group["period"])


def count_(groups: Iterable[dict[str, Any]]) -> None:
    """Count a step that ranks take together: in all groups, so that they stay in step with one
    another, whichever of their parameters has a gradient.
    """
    groups = [group for group in groups if group["algorithm"] == "muon"]
    if any(has_period(group) for group in groups):
        for group in groups:
            group[PERIOD_STEP] = group.get(PERIOD_STEP, 0) + 1
