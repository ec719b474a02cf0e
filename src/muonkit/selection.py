"""Selection: of a matrix's momentum only some lines are orthogonalized in a step (Dion2).

With `fraction` f below 1, for a momentum M of `rows` x `cols`, mu the option `momentum`:

    M    <- M + G
    S     = the k = ceil(f * lines) lines of M with the largest ℓ1 norms
    U     = M[S];  M[S] <- mu * M[S]                                        (error feedback)
    O     = orthogonalize(U), which has k lines
    W    <- W - lr * weight_decay * W;  W[S] <- W[S] - lr * scale(rows, cols) * O

Lines are rows of a wide or square matrix, and columns of a tall one: those of its shorter side,
where FLOPs fall by f² (1/16 at f = 1/4). Where a stage keeps a number per row (NorMuon) they are
rows of all matrices, and of its numbers those of S are used and updated. Of equal norms the first
line is taken.

M is a sum with feedback, and no average: a line that is not taken keeps all of its past, one that
is taken mu of it. The scale of M has no meaning, since the orthogonalized matrix does not depend on
it. There is no look-ahead (`nesterov` has no effect), and decay is of the whole weight.

`selection` says among which lines the largest are looked for: "global", among all of a matrix, the
same in every layout; or "local", among those that a rank keeps of it (ceil(f * n) of n): then f of
the bytes are sent, and the result depends on the layout.

Source: Dion2, arXiv 2512.16928, and its authors' dion2.py and nordion2.py, whose "local" takes rows
of a tall matrix too where ranks have rows of it.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

from muonkit._compile import constant_result
from muonkit.stages import kept_by, kept_state

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

__all__ = [
    "SELECTIONS",
    "by_rows",
    "check_selection",
    "count_of",
    "largest",
    "line_norms",
    "lines_are_rows",
    "put",
    "selected_shape",
    "selects",
    "shape_of_fraction",
    "sums_of_magnitudes",
    "take",
]

SELECTIONS = ("global", "local")


def selects(group: Mapping[str, Any]) -> bool:
    """Whether a step of this group orthogonalizes some lines only."""
    return bool(group["fraction"] < 1)


def by_rows(group: Mapping[str, Any], rows: int, cols: int) -> bool:
    """Whether the lines of matrices of this shape are rows; else they are columns."""
    return lines_are_rows(rows, cols, kept_state(group))


def lines_are_rows(rows: int, cols: int, stage_state: str) -> bool:
    """Whether the lines of a matrix are rows, given what a stage keeps of it."""
    return rows <= cols or stage_state == "rows"


@constant_result
def count_of(fraction: float, lines: int) -> int:
    """How many of so many lines are taken: ceil(fraction · lines).

    (0.07 · 100 is 7.000000000000001 in binary, and not 8 lines.)
    """
    return max(1, math.ceil(round(fraction * lines, 6)))


def selected_shape(group: Mapping[str, Any], rows: int, cols: int) -> tuple[int, int]:
    """The shape of what is orthogonalized of a matrix that is selected from as a whole."""
    return shape_of_fraction(group["fraction"], kept_state(group), rows, cols)


def shape_of_fraction(fraction: float, stage_state: str, rows: int, cols: int) -> tuple[int, int]:
    """`selected_shape` of a group with this fraction whose stages keep this."""
    if fraction >= 1:
        return rows, cols
    if lines_are_rows(rows, cols, stage_state):
        return count_of(fraction, rows), cols
    return rows, count_of(fraction, cols)


def line_norms(matrices: Tensor, rows: bool) -> Tensor:
    """The ℓ1 norms of the lines of `(N, rows, cols)`: `(N, lines)`, in float32 at least."""
    return sums_of_magnitudes(matrices, [-1 if rows else -2])


def sums_of_magnitudes(tensor: Tensor, dims: list[int]) -> Tensor:
    """Over these dims, in float32 at least. (On CPUs vector_norm is four to ten times slower.)"""
    wide = torch.promote_types(tensor.dtype, torch.float32)
    return tensor.abs().sum(dims, dtype=wide)


def largest(norms: Tensor, cells: Sequence[tuple[int, int, int]]) -> Tensor:
    """The lines with the largest norms, ascending.

    Args:
        norms: `(N, lines)`.
        cells: (start, stop, k): of the lines in [start, stop) the k largest are taken.

    Returns:
        `(N, sum of all k)`, of int64.
    """
    found = []
    for start, stop, k in cells:
        # Not topk, which takes any of equal ones: all ranks, and all devices, take the first.
        order = torch.sort(norms[:, start:stop], dim=-1, descending=True, stable=True).indices
        found.append(order[:, :k].sort(dim=-1).values + start)
    return found[0] if len(found) == 1 else torch.cat(found, dim=-1)


def take(matrices: Tensor, lines: Tensor, rows: bool) -> Tensor:
    """These lines of each matrix, in memory of their own.

    Args:
        matrices: `(N, rows, cols)`, any strides.
        lines: `(N, k)`.
        rows: whether lines are rows.

    Returns:
        `(N, k, cols)`, or `(N, rows, k)`.
    """
    if rows and matrices.is_contiguous():  # whole rows are copied as such
        count, _, cols = matrices.shape
        return matrices.flatten(0, 1).index_select(0, _flat(matrices, lines)).view(count, -1, cols)
    if not rows and matrices.device.type == "cpu" and not torch.compiler.is_compiling():
        # A fifth of gather's time.
        each = zip(matrices.unbind(), lines.unbind(), strict=True)
        return torch.stack([matrix.index_select(1, some) for matrix, some in each])
    return torch.take_along_dim(matrices, lines.unsqueeze(-1 if rows else -2), -2 if rows else -1)


def put(taken: Tensor, lines: Tensor, rows: bool, count: int) -> Tensor:
    """The inverse of `take`: matrices of `count` lines, zero in all but these."""
    n, height, width = taken.shape
    whole = taken.new_zeros((n, count, width) if rows else (n, height, count))
    if rows:
        whole.flatten(0, 1).index_copy_(0, _flat(whole, lines), taken.flatten(0, 1))
        return whole
    return whole.scatter_(-1, lines.unsqueeze(-2).expand_as(taken), taken)


def _flat(matrices: Tensor, lines: Tensor) -> Tensor:
    """Rows of each matrix as rows of all matrices one below the other."""
    first = torch.arange(len(matrices), device=lines.device) * matrices.shape[1]
    return (lines + first[:, None]).flatten()


def check_selection(group: Mapping[str, Any]) -> None:
    """Compare the two options with what they may be; a graph may do so before each step.

    Raises:
        TypeError: fraction is no number.
        ValueError: it is out of (0, 1], or below 1 beside a stage that keeps a state per entry.
    """
    fraction = group["fraction"]
    if isinstance(fraction, bool) or not isinstance(fraction, (int, float)):
        raise TypeError(
            f"fraction is a number in (0, 1], and says how many lines a step takes: {fraction!r}"
        )
    if not 0 < fraction <= 1:  # also for NaN
        raise ValueError(
            f"fraction should be in (0, 1] but is: {fraction!r}; 0.25 orthogonalizes a quarter of "
            "the lines of each matrix in a step, 1 all of them"
        )
    if fraction < 1 and group["momentum_dtype"] == "int8":
        raise ValueError(
            f"fraction={fraction!r} takes lines out of the momentum, which may cut the blocks that "
            "momentum_dtype='int8' keeps a scale for; give momentum_dtype='bfloat16', or fraction=1"
        )
    if fraction < 1 and kept_state(group) == "entries":
        stage = kept_by(group)
        assert stage is not None
        raise ValueError(
            f"{stage.name} averages every entry, from the first step on, and fraction={fraction!r} "
            "updates some of them in a step: take after='normuon', whose numbers are per row, or "
            "fraction=1"
        )
