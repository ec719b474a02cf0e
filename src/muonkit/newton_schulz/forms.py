"""Forms: in which order the products of Newton-Schulz are taken. Pure Python, no tensors.

The polynomial of one iteration is p(A) X with A = XX^T and p(A) = aI + bA + cA^2. All p of a
schedule are polynomials in one Gram matrix and commute, so a run of iterations (a *segment*) may be
evaluated on A alone, m x m however wide X is, and multiplied onto X once, at its end:

    A <- XX^T                               m^2 n   symmetric
    P = aI + bA + cA^2                      m^3     symmetric, in every iteration
    Q <- PQ                                 m^3     symmetric, not in a segment's first
    A <- PAP                                2 m^3   symmetric, not in a segment's last
    X <- QX                                 2 m^2 n

(in multiply-adds of general products; a symmetric one costs half). Between segments the form
*restarts*: A is taken from X anew. The standard form restarts at every iteration, the Gram form
(Gram Newton-Schulz, Dao AI Lab 2026) as rarely as rounding allows.
"""

from __future__ import annotations

import functools
import itertools
from typing import TYPE_CHECKING, NamedTuple

from muonkit._text import unknown

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["FORMS", "Evaluation", "check_form", "choose_form", "product_flops", "segments"]

# The growth that a rounding error may have within a segment. Where X is rank-deficient, rounding
# leaves an error in A that PAP multiplies by about a^2 in every iteration; the true values grow by
# less, and X meets the error only at the segment's end. Measured against float64
# (benchmarks/errors.py) over all schedules, full-rank, power-law, rank m/2, m/8, 1, constant and
# spiked matrices, 64 x 256 to 768 x 3072. In float32 a growth of up to 200 (one restart in five
# iterations) keeps the error below 5e-4 wherever the standard form's is; 2e4 (no restart) gives
# 1e-3 for rank 1 in general products, 2e-2 in blocks, which are not all summed in one order, and
# 3e-1 for a constant matrix. In 16 bits the errors of every segment but the last are amplified by
# the iterations after it too: one segment of two iterations, at the end, keeps the error within
# twice the standard form's (1.8); two such segments give 4 times (cubic5), one of three iterations
# 10 times (keller).
_GROWTH = 200.0
_GROWTH_16_BITS = 20.0

Triples = tuple[tuple[float, float, float], ...]


class Evaluation(NamedTuple):
    """How one polynomial is evaluated on one shape.

    Attributes:
        form: a key of `FORMS`.
        restarts: the iterations (from 0) before which A is taken from X anew, ascending, without
            the first.
    """

    form: str
    restarts: tuple[int, ...]


def _standard(triples: Triples, itemsize: int) -> tuple[int, ...]:
    return tuple(range(1, len(triples)))


def _gram(triples: Triples, itemsize: int) -> tuple[int, ...]:
    """As few restarts as the growth of rounding errors allows; long segments at the end.

    The end is where they are safe: the first polynomials of most schedules are the steepest.
    """
    if itemsize == 2:
        pair = len(triples) > 1 and triples[-2][0] ** 2 <= _GROWTH_16_BITS
        return tuple(range(1, len(triples) - 1 if pair else len(triples)))
    restarts: list[int] = []
    growth = 1.0
    for i in reversed(range(len(triples) - 1)):
        growth *= max(1.0, triples[i][0] ** 2)
        if growth > _GROWTH:
            restarts.append(i + 1)
            growth = 1.0
    return tuple(reversed(restarts))


FORMS: dict[str, Callable[[Triples, int], tuple[int, ...]]] = {
    "standard": _standard,
    "gram": _gram,
}


def choose_form(
    ns_form: str, m: int, n: int, triples: Triples, itemsize: int, blocks: int
) -> Evaluation:
    """The evaluation that `ns_form` stands for; "auto" is the one with the fewest FLOPs.

    Args:
        m, n: rows and columns of the matrix, m <= n.
        triples: the schedule, one (a, b, c) per iteration.
        itemsize: bytes per element of the dtype of the products.
        blocks: see `product_flops`.

    Raises:
        ValueError: not a key of `FORMS` nor "auto".
    """
    check_form(ns_form)
    return _choose(ns_form, m, n, triples, itemsize, blocks)


def check_form(ns_form: str) -> None:
    """Raises:
    ValueError: not a key of `FORMS` nor "auto".
    """
    if not isinstance(ns_form, str) or ns_form not in ("auto", *FORMS):
        raise ValueError(unknown("ns_form", ns_form, ["auto", *FORMS]))


@functools.lru_cache(maxsize=4096)
def _choose(
    ns_form: str, m: int, n: int, triples: Triples, itemsize: int, blocks: int
) -> Evaluation:
    names = FORMS if ns_form == "auto" else [ns_form]
    evaluations = [Evaluation(name, FORMS[name](triples, itemsize)) for name in names]
    # The first of equals is the standard form, whose rounding is the smaller one.
    return min(evaluations, key=lambda e: product_flops(m, n, triples, e.restarts, blocks))


def segments(triples: Triples, restarts: Sequence[int]) -> list[Triples]:
    """The iterations between restarts."""
    bounds = [0, *restarts, len(triples)]
    return [triples[i:j] for i, j in itertools.pairwise(bounds)]


def product_flops(m: int, n: int, triples: Triples, restarts: Sequence[int], blocks: float) -> int:
    """FLOPs of the matrix products for one m x n matrix, m <= n (a multiply-add is two).

    Args:
        blocks: number of row blocks of a symmetric product: of b x b blocks, those on and below the
            diagonal are computed, (b + 1) / 2b of the general product. 1 is the general product;
            infinity the limit, half of it.
    """
    share = 0.5 * (1 + 1 / blocks)
    flops = 0.0
    for segment in segments(triples, restarts):
        squares = sum(1 for _, _, c in segment if c != 0)
        symmetric = m * m * n + (squares + 3 * (len(segment) - 1)) * m**3
        flops += 2 * share * symmetric + 2 * m * m * n
    return round(flops)
