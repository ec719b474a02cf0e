"""Schedules: the polynomial coefficients of Newton-Schulz, one (a, b, c) per iteration.

One iteration is X <- aX + (bA + cA^2)X with A = XX^T: every singular value goes through the odd
polynomial a s + b s^3 + c s^5. A schedule is the sequence of these polynomials; it says for which
number of steps it was made and where the singular values land then.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, TypeAlias

from muonkit._compile import constant_result
from muonkit._text import unknown

__all__ = ["KELLER", "SCHEDULES", "SVD", "Coefficients", "Iterations", "Schedule", "resolve"]

Triple: TypeAlias = tuple[float, float, float]
Coefficients: TypeAlias = str | Triple | tuple[Triple, ...]

KELLER: Triple = (3.4445, -4.7750, 2.0315)
SVD = "svd"  # the exact orthogonal factor, by singular value decomposition

MAX_STEPS = 99  # torch.optim.Muon's bound
# How the tuple of a schedule's numbers begins, in a group.
_SPELLED = "schedule"

DEFAULT_STEPS = 5  # torch.optim.Muon's default; here also "as many as the schedule was made for"


@dataclass(frozen=True)
class Schedule:
    """A schedule: one of `SCHEDULES`, or one of your own as `ns_coefficients`.

    Attributes:
        table: the triples in order.
        tail: what steps beyond the table repeat; None if the table is the whole schedule.
        shortest: the least number of steps that makes sense. A schedule of *composed* minimax
            polynomials must not be cut: singular values up to 1.56 come out of four fifths of one.
        band: where singular values in [1e-3, 1] of the normalized input land after the default
            number of steps (exact arithmetic; a test holds those of `SCHEDULES`). Nothing reads it.
        margin: the input is divided by margin * its Frobenius norm.
        balanced: every row of the shorter side is first divided by √(sum of the magnitudes in its
            row of XX^T), which takes all singular values to at most 1 (AOL): a steeper start, and
            no exact function of the singular values, since rows are weighed anew. On square
            matrices the rows are those of the matrix as it is given, so that `f(G^T) = f(G)^T`
            holds for the others alone.
        strict: each polynomial explodes just above the interval that the one before maps to, so
            16-bit rounding makes the composition diverge.
        source: where the numbers come from.
    """

    table: tuple[Triple, ...]
    tail: Triple | None = None
    shortest: int = 1
    band: tuple[float, float] = (0.0, math.inf)
    source: str = ""
    margin: float = 1.0
    strict: bool = False
    balanced: bool = False

    def spelled(self) -> tuple[object, ...]:
        """The form in which param groups and state dicts keep the schedule: everything that decides
        the iterations, in plain numbers. `ns_coefficients` accepts this form too.
        """
        own = (_SPELLED, self.table, self.tail, self.shortest, self.margin, self.strict)
        return (*own, True) if self.balanced else own


@dataclass(frozen=True)
class Iterations:
    """What `resolve` returns: exactly the iterations to run."""

    triples: tuple[Triple, ...]
    margin: float = 1.0
    strict: bool = False
    exact: bool = False  # SVD instead
    balanced: bool = False


_POLAR_EXPRESS: tuple[Triple, ...] = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
)
_POLAR_EXPRESS_TAIL: Triple = (1.875, -1.25, 0.375)


def _safe(table: tuple[Triple, ...], s: float) -> tuple[Triple, ...]:
    """p(x) -> p(x / s): the same polynomials on an interval wider by the factor s."""
    return tuple((a / s, b / s**3, c / s**5) for a, b, c in table)


SCHEDULES: dict[str, Schedule] = {
    "keller": Schedule(
        (KELLER,) * 5, KELLER, 1, (0.470, 1.203), "Keller Jordan, blog 2024; torch.optim.Muon"
    ),
    "you": Schedule(
        (
            (4.0848, -6.8946, 2.9270),
            (3.9505, -6.3029, 2.6377),
            (3.7418, -5.5913, 2.3037),
            (2.8769, -3.1427, 1.2046),
            (2.8366, -3.0525, 1.2012),
        ),
        None,
        5,
        (0.474, 1.146),
        "You Jiacheng 2025",
    ),
    "polar_express": Schedule(
        _POLAR_EXPRESS,
        _POLAR_EXPRESS_TAIL,
        5,
        (0.876, 1.124),
        "arXiv 2505.16932, without a safety factor",
        strict=True,
    ),
    "polar_express_1.01": Schedule(
        _safe(_POLAR_EXPRESS, 1.01),
        _POLAR_EXPRESS_TAIL,
        5,
        (0.846, 1.124),
        "arXiv 2505.16932 with safety factor 1.01; Emerging-Optimizers",
    ),
    "polar_express_1.05": Schedule(
        _safe(_POLAR_EXPRESS[:5], 1.05),
        None,
        5,
        (0.728, 1.124),
        "arXiv 2505.16932 with safety factor 1.05; gram-newton-schulz",
    ),
    "polar_express_1.02": Schedule(
        (
            (8.156554524902461, -22.48329292557795, 15.878769915207462),
            (4.042929935166739, -2.808917465908714, 0.5000178451051316),
            (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
            (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
            (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
        ),
        None,
        5,
        (0.846, 1.142),
        "arXiv 2505.16932 with 2% baked in; modded-nanogpt, dion",
        margin=1.02,
    ),
    "cans": Schedule(
        (
            (8.4703, -25.1081, 18.6293),
            (4.1828, -3.1087, 0.5806),
            (3.9619, -2.9541, 0.5630),
            (3.2866, -2.4647, 0.5074),
            (2.2737, -1.6447, 0.4162),
        ),
        None,
        5,
        (0.884, 1.120),
        "CANS, arXiv 2506.10935; Emerging-Optimizers",
        strict=True,
    ),
    "cubic5": Schedule(
        (
            (3.3656576, -3.3420992, 0.0),
            (2.5744352, -1.4957376, 0.0),
            (2.5368962, -1.4312570, 0.0),
            (2.4418906, -1.2764040, 0.0),
            (2.2230472, -0.9630650, 0.0),
        ),
        None,
        5,
        (0.119, 1.301),
        "Emerging-Optimizers",
    ),
    "aol4": Schedule(
        (
            (3.9505, -6.3029, 2.6377),
            (3.7418, -5.5913, 2.3037),
            (2.8769, -3.1427, 1.2046),
            (2.8366, -3.0525, 1.2012),
        ),
        None,
        4,
        (0.120, 1.146),
        "Turbo-Muon, arXiv 2512.04632, as its authors' flash-newton-schulz has it",
        balanced=True,
    ),
    "deepseek_v4": Schedule(
        (KELLER,) * 8 + ((2.0, -1.5, 0.5),) * 2,
        None,
        10,
        (0.999, 1.001),
        "Emerging-Optimizers",
    ),
}


@constant_result
def resolve(coefficients: object, steps: int = DEFAULT_STEPS) -> Iterations:
    """The iterations that `ns_coefficients` and `ns_steps` stand for.

    Args:
        coefficients: a key of `SCHEDULES`, "svd", one triple (repeated `steps` times), a sequence
            of triples (one per step), or a `Schedule`.
        steps: number of iterations. The default, 5, also stands for the length of a schedule or
            sequence that has a fixed one.

    Raises:
        ValueError: unknown name, no triple, too few or too many steps for the schedule.
        TypeError: none of the above types.
    """
    if isinstance(coefficients, Schedule):
        coefficients = coefficients.spelled()
    coefficients = _tuples(coefficients)
    if isinstance(steps, bool) or not isinstance(steps, Integral):
        raise TypeError(f"ns_steps is a whole number, got {steps!r}")
    steps = int(steps)
    if not isinstance(coefficients, str | tuple):
        raise TypeError(
            "ns_coefficients is a name, a triple, a sequence of triples or a Schedule, got "
            f"{coefficients!r:.80}"
        )
    return _resolve(coefficients, steps)


def _tuples(value: object) -> object:
    """The same with tuples for lists: JSON and YAML have no tuples."""
    return tuple(map(_tuples, value)) if isinstance(value, list | tuple) else value


@functools.lru_cache(maxsize=256)
def _resolve(coefficients: str | tuple[object, ...], steps: int) -> Iterations:
    if not 1 <= steps <= MAX_STEPS:
        raise ValueError(f"Number of steps must be from 1 to {MAX_STEPS}, got ns_steps={steps}")
    if isinstance(coefficients, str):
        return _named(coefficients, steps)
    if coefficients and coefficients[0] == _SPELLED:
        return _scheduled("the schedule", _schedule(coefficients), steps)
    if coefficients and all(isinstance(c, Real) for c in coefficients):
        return Iterations((_triple(coefficients),) * steps)
    triples = tuple(_triple(c) for c in coefficients)
    if not triples:
        raise ValueError("ns_coefficients is empty: give at least one triple (a, b, c)")
    if steps not in (DEFAULT_STEPS, len(triples)):
        raise ValueError(
            f"ns_steps={steps} contradicts the {len(triples)} triples in ns_coefficients; "
            f"leave ns_steps out or give {len(triples)}"
        )
    return Iterations(triples)


def _triple(values: object) -> Triple:
    if (
        isinstance(values, tuple | list)
        and len(values) == 3
        and all(isinstance(v, Real) and math.isfinite(v) for v in values)
    ):
        return (float(values[0]), float(values[1]), float(values[2]))
    raise ValueError(f"Coefficients must be a tuple of exactly 3 values (finite), got {values!r}")


def _named(name: str, steps: int) -> Iterations:
    if name == SVD:
        return Iterations((), exact=True)
    schedule = SCHEDULES.get(name)
    if schedule is None:
        also = ", or (a, b, c) triples, or a Schedule"
        raise ValueError(unknown("ns_coefficients", name, [*SCHEDULES, SVD], also))
    return _scheduled(repr(name), schedule, steps)


def _schedule(spelled: tuple[Any, ...]) -> Schedule:
    """The schedule that is spelled like this, without what decides no iteration."""
    if len(spelled) not in (6, 7):
        raise ValueError(f"no schedule: {spelled!r:.80}; give Schedule(table, ...)")
    _, table, tail, shortest, margin, strict, *balanced = spelled
    triples = tuple(map(_triple, table)) if isinstance(table, tuple) else ()
    if not triples or not 1 <= shortest <= MAX_STEPS or not 1 <= margin < math.inf:
        raise ValueError(
            "a Schedule has at least one triple in its table, shortest from 1 to "
            f"{MAX_STEPS} and a margin of at least 1, got {len(triples)}, {shortest}, {margin}"
        )
    last = None if tail is None else _triple(tail)
    return Schedule(
        triples,
        last,
        shortest,
        margin=float(margin),
        strict=bool(strict),
        balanced=bool(balanced),
    )


def _scheduled(name: str, schedule: Schedule, steps: int) -> Iterations:
    table = schedule.table
    if schedule.tail is None:
        if steps not in (DEFAULT_STEPS, len(table)):
            raise ValueError(
                f"ns_steps={steps} would cut or stretch {name}, which is made for "
                f"{len(table)} steps; leave ns_steps out or give {len(table)}"
            )
        steps = len(table)
    elif steps < schedule.shortest:
        raise ValueError(
            f"ns_steps={steps} would cut {name} short, which needs at least "
            f"{schedule.shortest} steps; for fewer use 'keller'"
        )
    triples = table[:steps]
    if schedule.tail is not None:
        triples += (schedule.tail,) * (steps - len(triples))
    return Iterations(triples, schedule.margin, schedule.strict, balanced=schedule.balanced)
