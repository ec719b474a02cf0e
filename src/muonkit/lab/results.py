"""What came out: one row per optimizer, each figure a mean over seeds.

*To AdamW's final loss*: for each seed, the first point of the validation curve (straight lines
between validations) that is at or below the loss at which AdamW's curve of the same seed ends.

*p*: of Welch's t-test (Welch, Biometrika 1947: two-sided, the variances not taken to be equal) of
the final figures of an optimizer's seeds against those of AdamW's.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from muonkit.lab.optimizers import get_optimizer, title_of
from muonkit.lab.saved import Result
from muonkit.lab.store import Record

REFERENCE = "adamw"

# The same forward and backward passes take about the same time in all runs. Where one optimizer's
# took this many times another's, something else used the machine, and seconds do not compare.
_UNEVEN = 1.25


@dataclass(frozen=True)
class Figure:
    """Mean and standard deviation (n − 1) over seeds; ``of`` < ``runs`` where some have none."""

    mean: float
    std: float | None
    of: int
    runs: int

    def text(self, digits: int = 4, unit: float = 1.0) -> str:
        """As the tables show it: ``1.2345 ± 0.0012 (2/3)``."""
        shown = f"{self.mean * unit:,.{digits}f}"
        if self.std is not None:
            shown += f" ± {self.std * unit:,.{digits}f}"
        return shown if self.of == self.runs else f"{shown} ({self.of}/{self.runs})"


def figure(values: Sequence[float | None]) -> Figure | None:
    """The mean of the values that are there; None when none is."""
    there = [value for value in values if value is not None]
    if not there:
        return None
    std = statistics.stdev(there) if len(there) > 1 else None
    return Figure(statistics.fmean(there), std, len(there), len(values))


def welch(ours: Sequence[float | None], theirs: Sequence[float | None]) -> float | None:
    """The p-value of Welch's t-test; None with fewer than two values, or none that differ."""
    # Here, because it takes half a second that no error should wait for.
    from scipy.stats import ttest_ind_from_stats  # type: ignore[import-untyped]

    samples = [[value for value in values if value is not None] for values in (ours, theirs)]
    if any(len(sample) < 2 for sample in samples) or all(len(set(s)) == 1 for s in samples):
        return None
    figures = [(statistics.fmean(s), statistics.stdev(s), len(s)) for s in samples]
    return float(ttest_ind_from_stats(*figures[0], *figures[1], equal_var=False).pvalue)


@dataclass(frozen=True)
class Curve:
    """A run's validation losses against steps and against seconds of training."""

    steps: list[float]
    seconds: list[float]
    losses: list[float]

    @classmethod
    def of(cls, records: Sequence[Record]) -> "Curve":
        points = [r for r in records if r["kind"] == "validation" and r["loss"] is not None]
        return cls(
            [float(r["step"]) for r in points],
            [float(r["seconds"]) for r in points],
            [float(r["loss"]) for r in points],
        )

    def reaches(self, loss: float) -> tuple[float, float] | None:
        """Steps and seconds at which the curve first is at or below ``loss``; None if never."""
        for i, value in enumerate(self.losses):
            if value > loss:
                continue
            if i == 0:
                return self.steps[0], self.seconds[0]
            before = self.losses[i - 1]
            share = (before - loss) / (before - value)
            return (
                self.steps[i - 1] + share * (self.steps[i] - self.steps[i - 1]),
                self.seconds[i - 1] + share * (self.seconds[i] - self.seconds[i - 1]),
            )
        return None


@dataclass(frozen=True)
class Row:
    """One optimizer in the table. None: there is no such figure.

    ``val_loss_p`` and ``accuracy_p`` are the p-values against AdamW. ``reference_seconds`` are of
    AdamW's whole runs, of the seeds that came to its final loss.
    """

    optimizer: str
    lr: float
    weight_decay: float
    seeds: int
    diverged: int
    train_loss: Figure | None
    val_loss: Figure | None
    accuracy: Figure | None
    steps_to_reference: Figure | None
    seconds_to_reference: Figure | None
    step_ms: Figure | None
    optimizer_ms: Figure | None
    seconds: Figure | None
    val_loss_p: float | None
    accuracy_p: float | None
    embedding_lr: float | None = None
    lowest_val_loss: Figure | None = None
    reference_seconds: Figure | None = None


Outcome = tuple[Result, Curve]


def _row(outcomes: Sequence[Outcome], reference: Sequence[Result]) -> Row:
    results = [result for result, _ in outcomes]
    first = results[0]
    ends = {result.seed: result.val_loss for result in reference if result.val_loss is not None}
    reached = [
        None if result.diverged else curve.reaches(ends.get(result.seed, -math.inf))
        for result, curve in outcomes
    ]
    took = {result.seed: result.seconds for result in reference}
    came = [result.seed for result, point in zip(results, reached, strict=True) if point]
    against = reference if first.optimizer != REFERENCE else []
    decay = first.weight_decay
    return Row(
        optimizer=first.optimizer,
        lr=first.lr,
        weight_decay=get_optimizer(first.optimizer).weight_decay if decay is None else decay,
        seeds=len(results),
        diverged=sum(result.diverged for result in results),
        train_loss=figure([result.train_loss for result in results]),
        val_loss=figure([result.val_loss for result in results]),
        accuracy=figure([result.accuracy for result in results]),
        steps_to_reference=figure([point and point[0] for point in reached]),
        seconds_to_reference=figure([point and point[1] for point in reached]),
        step_ms=figure([result.step_ms for result in results]),
        optimizer_ms=figure([result.optimizer_ms for result in results]),
        seconds=figure([result.seconds for result in results]),
        val_loss_p=welch([r.val_loss for r in results], [r.val_loss for r in against]),
        accuracy_p=welch([r.accuracy for r in results], [r.accuracy for r in against]),
        embedding_lr=first.embedding_lr,
        lowest_val_loss=figure(
            [None if r.val_loss is None else min(c.losses, default=None) for r, c in outcomes]
        ),
        reference_seconds=figure([took[seed] for seed in came]),
    )


def rows(outcomes: Sequence[Outcome]) -> list[Row]:
    """One row per optimizer, in the order of first appearance."""
    reference = [result for result, _ in outcomes if result.optimizer == REFERENCE]
    names = list(dict.fromkeys(result.optimizer for result, _ in outcomes))
    return [_row([o for o in outcomes if o[0].optimizer == name], reference) for name in names]


def transposed(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """`table` with a column for each optimizer, which fits 80 characters and a telephone."""
    headings, cells = table(rows)
    first, *figures = zip(headings, *cells, strict=True)
    return list(first), [list(line) for line in figures]


def verdicts(outcomes: Sequence[Outcome], unit: str = "nats") -> list[str]:
    """What came out in a sentence for each optimizer, against AdamW; MuonW's is the first.

    Args:
        outcomes: the runs that count.
        unit: what the losses are in; empty where nobody knows.
    """
    unit = f" {unit}" if unit else ""
    lines = rows(outcomes)
    steps = max((result.steps for result, _ in outcomes), default=0)
    reference = next((row for row in lines if row.optimizer == REFERENCE), None)
    if reference is None or reference.val_loss is None or reference.diverged:
        return [_lowest(lines, unit)]
    others = [row for row in lines if row is not reference]
    others.sort(key=lambda row: row.optimizer != "muonw")
    if not others:
        return [_lowest(lines, unit)]
    if _rises(outcomes):
        return [_risen_verdict(row, reference, unit) for row in others]
    return [_verdict(row, reference, steps, unit) for row in others]


def _seeds(count: int) -> str:
    return "one seed" if count == 1 else f"mean of {count} seeds"


def _is_sound(row: Row) -> bool:
    """Whether no run of it diverged."""
    return row.val_loss is not None and not row.diverged


def _diverged(row: Row) -> str:
    """Of a row in which some runs diverged."""
    of = "its only seed" if row.seeds == 1 else f"{row.diverged} of {row.seeds} seeds"
    return f"{title_of(row.optimizer)} diverged with {of}"


def _rises(outcomes: Sequence[Outcome]) -> bool:
    """Whether AdamW's curve was at its final loss long before its end, and lower between: what
    reaches that loss is no better for it.
    """
    shares, rises = [], []
    for result, curve in outcomes:
        if result.optimizer == REFERENCE and result.val_loss is not None and curve.losses:
            point = curve.reaches(result.val_loss)
            if point is not None and result.steps:
                shares.append(point[0] / result.steps)
                lowest = min(curve.losses)
                fell = max(curve.losses[0] - lowest, 0.0)
                rises.append(result.val_loss - lowest > _NOISE * fell)
    return bool(shares) and statistics.fmean(shares) < _LONG_BEFORE and sum(rises) * 2 > len(rises)


_LONG_BEFORE = 0.75  # of the steps
_NOISE = 0.05  # of what a curve fell, by which it may rise


def _lowest(lines: Sequence[Row], unit: str) -> str:
    """Where there is no AdamW to be compared with."""
    there = [row for row in lines if row.val_loss is not None]
    if not there:
        return "Every run diverged."
    best = min(there, key=lambda row: (not _is_sound(row), _mean(row.val_loss)))
    loss = _shown_loss(_mean(best.val_loss))
    lowest = "ended at" if len(lines) == 1 else "ended at the lowest validation loss,"
    said = f"{title_of(best.optimizer)} {lowest} {loss}{unit}; {_seeds(best.seeds - best.diverged)}"
    lost = [_diverged(row) for row in lines if not _is_sound(row)]
    return f"{said}. {'; '.join(lost)}." if lost else f"{said}."


def _risen_verdict(row: Row, reference: Row, unit: str) -> str:
    """Where AdamW's final loss is no measure: by the lowest losses."""
    name = title_of(row.optimizer)
    ours, theirs = row.lowest_val_loss, reference.lowest_val_loss
    if ours is None or theirs is None or row.val_loss is None:
        return f"{_diverged(row)}."
    lost = f" {_diverged(row)}." if row.diverged else ""
    return (
        f"{name}'s lowest validation loss was {_shown_loss(ours.mean)}{unit}, AdamW's "
        f"{_shown_loss(theirs.mean)}; {_seeds(ours.of)}.{lost} AdamW's rose again, to "
        f"{_shown_loss(_mean(reference.val_loss))} at the end (as {name}'s may: "
        f"{_shown_loss(row.val_loss.mean)}): train for fewer steps."
    )


def _verdict(row: Row, reference: Row, steps: int, unit: str) -> str:
    name, theirs = title_of(row.optimizer), reference.val_loss
    assert theirs is not None
    if row.val_loss is None:
        return f"{_diverged(row)}."
    digits = _decimals(min(row.val_loss.mean, theirs.mean))
    ours = f"{row.val_loss.mean:.{digits}f}{unit}"
    ends = f"it ended at {ours}, AdamW at {theirs.mean:.{digits}f}"
    lost = f". {_diverged(row)}" if row.diverged else ""
    chance = ""
    if row.val_loss_p is not None and row.val_loss_p >= 0.05:
        chance = f"; the final losses may differ by chance (p = {p_value(row.val_loss_p)})"
    reached, took, whole = row.steps_to_reference, row.seconds_to_reference, row.reference_seconds
    if reached is None or took is None or whole is None:
        count = _seeds(row.seeds - row.diverged)
        said = f"{name} did not reach AdamW's final loss in {steps:,} steps: {ends}"
        return f"{said}; {count}{chance}{lost}."
    if row.val_loss.mean > theirs.mean:
        rose = "then it rose: " if reached.of == reached.runs else ""
        chance = f"; {rose}{ends}{chance}"
    digits = 1 if whole.mean >= 1 else 3
    if took.mean <= whole.mean:
        time = f"{took.mean:,.{digits}f} of {whole.mean:,.{digits}f} s"
    else:
        time = f"but {took.mean:,.{digits}f} s where AdamW took {whole.mean:,.{digits}f} s in all"
    some, count = "", f"; {_seeds(reached.of)}"
    if reached.of < reached.runs:
        some = f" with {reached.of} of {reached.runs} seeds"
        count = "" if reached.of == 1 else f"; mean of these {reached.of}"
    said = f"{name} reached AdamW's final loss{some} in {reached.mean:,.0f} of {steps:,} steps"
    apart = _uneven(row, reference)
    if apart:
        return f"{said}{count}{chance}{lost}. {apart}"
    return f"{said}, {time}{count}{chance}{lost}."


def _uneven(row: Row, reference: Row) -> str:
    """Why the seconds of two optimizers do not compare; empty where they do."""
    ours, theirs = _passes(row), _passes(reference)
    least, most = min(ours, theirs), max(ours, theirs)
    if least <= 0 or most == math.inf or most < _UNEVEN * least:
        return ""
    return (
        f"The seconds do not compare: forward and backward took {ours:,.3g} ms a step in its runs "
        f"and {theirs:,.3g} ms in AdamW's, so something else used this machine."
    )


def _passes(row: Row) -> float:
    """Milliseconds of forward and backward in a step; infinite where nobody knows."""
    if row.step_ms is None or row.optimizer_ms is None:
        return math.inf
    return row.step_ms.mean - row.optimizer_ms.mean


def _shown_loss(loss: float) -> str:
    return f"{loss:.{_decimals(loss)}f}"


def _decimals(loss: float) -> int:
    """Four decimals, and for small losses as many as show four digits."""
    return min(9, max(4, 3 - math.floor(math.log10(loss)))) if loss > 0 else 4


@dataclass(frozen=True)
class Advice:
    """What to train with, by what was measured.

    Attributes:
        optimizer: the one that came to AdamW's final loss in the fewest seconds, else AdamW.
        said: why, or that nothing pays.
    """

    optimizer: str
    said: str


def advice(outcomes: Sequence[Outcome]) -> Advice | None:
    """What to train with; None where every optimizer had a run that diverged."""
    lines = rows(outcomes)
    sound = list(filter(_is_sound, lines))
    lost = "; ".join(_diverged(row) for row in lines if not _is_sound(row))
    reference = next((row for row in sound if row.optimizer == REFERENCE), None)
    if not sound:
        return None
    if reference is None:
        best = min(sound, key=lambda row: _mean(row.val_loss))
        left = f", of those without a run that diverged. {lost}" if lost else ""
        return Advice(best.optimizer, f"It ended at the lowest validation loss{left}.")
    others = [row for row in sound if row is not reference]
    if not others:
        return Advice(REFERENCE, f"{lost}." if lost else "Nothing else was compared.")
    if _rises(outcomes):
        best = min(sound, key=lambda row: _mean(row.lowest_val_loss))
        return Advice(
            best.optimizer,
            f"It had the lowest validation loss, {_shown_loss(_mean(best.lowest_val_loss))}, but "
            "the loss rose again by the end (AdamW's at least): train for fewer steps.",
        )
    there = [row for row in others if _reached(row)]
    if not there:
        return Advice(REFERENCE, _never_reached(others))
    if any(_uneven(row, reference) for row in there):
        steps = max(r.steps for r, _ in outcomes if r.optimizer == REFERENCE)
        return _reckoned(there, reference, steps)
    best = min(there, key=_seconds)
    if _seconds(best) < _mean(reference.seconds):
        said = "It came to AdamW's final loss in the fewest seconds."
        if _mean(best.val_loss) > _mean(reference.val_loss):
            said += " Its loss rose after that: stop it there, or train for fewer steps."
        return Advice(best.optimizer, said)
    return Advice(
        REFERENCE,
        f"{title_of(best.optimizer)} does not pay in seconds here: to AdamW's final loss it needed "
        f"{_steps(best):,.0f} steps, but {_shown_seconds(_seconds(best))} s where AdamW took "
        f"{_shown_seconds(_mean(reference.seconds))} s, since its step takes "
        f"{_mean(best.step_ms):,.3g} ms and AdamW's {_mean(reference.step_ms):,.3g} ms.",
    )


def _reckoned(there: Sequence[Row], reference: Row, steps: int) -> Advice:
    """Where something else used the machine in some runs: forward and backward, which are the same
    for all, take what they took where that was least.
    """
    passes = min(_passes(row) for row in (*there, reference))

    def seconds(row: Row, count: float) -> float:
        return count * (passes + _mean(row.optimizer_ms)) / 1e3

    best = min(there, key=lambda row: seconds(row, _steps(row)))
    ours, theirs = seconds(best, _steps(best)), seconds(reference, steps)
    reckoned = (
        f"something else used this machine, so this is reckoned with {passes:,.3g} ms of forward "
        f"and backward for both, and their own {_mean(best.optimizer_ms):,.3g} and "
        f"{_mean(reference.optimizer_ms):,.3g} ms"
    )
    if ours < theirs:
        return Advice(
            best.optimizer,
            f"It comes to AdamW's final loss in {_shown_seconds(ours)} s where AdamW takes "
            f"{_shown_seconds(theirs)} s: {reckoned}.",
        )
    return Advice(
        REFERENCE,
        f"{title_of(best.optimizer)} does not pay in seconds here: to AdamW's final loss it needed "
        f"{_steps(best):,.0f} steps, {_shown_seconds(ours)} s where AdamW takes "
        f"{_shown_seconds(theirs)} s: {reckoned}.",
    )


def _never_reached(others: Sequence[Row]) -> str:
    """What to say where nothing came to AdamW's final loss with every seed."""
    some = [row for row in others if row.steps_to_reference is not None]
    if not some:
        names = " or ".join(title_of(row.optimizer) for row in others)
        one = all(row.seeds == 1 for row in others)
        few = ", with one seed (--seeds 3 tells more)" if one else ""
        return (
            f"{names} does not pay here, neither in steps nor in seconds: AdamW's final loss was "
            f"not reached{few}."
        )
    said = (
        f"{title_of(row.optimizer)} came to AdamW's final loss with {row.steps_to_reference.of} of "
        f"{row.seeds} seeds"
        for row in some
        if row.steps_to_reference is not None
    )
    return f"That another one pays is not shown here: {', '.join(said)}."


def _reached(row: Row) -> bool:
    """Whether it came to AdamW's final loss with every seed."""
    reached = row.steps_to_reference
    return reached is not None and reached.of == reached.runs


def _mean(figure: Figure | None) -> float:
    return math.inf if figure is None else figure.mean


def _steps(row: Row) -> float:
    return _mean(row.steps_to_reference)


def _seconds(row: Row) -> float:
    return _mean(row.seconds_to_reference)


def _shown_seconds(seconds: float) -> str:
    return f"{seconds:,.1f}" if seconds >= 1 else f"{seconds:.3f}"


def p_value(p: float | None) -> str:
    return "—" if p is None else f"{p:.3f}" if p >= 0.001 else f"{p:.0e}"


def _embedding_rates(rows: Sequence[Row]) -> list[str]:
    """Those of all rows, once any has one of its own."""
    if all(row.embedding_lr is None for row in rows):
        return ["—"] * len(rows)
    rates = (get_optimizer(r.optimizer).embedding_rate(r.lr, r.embedding_lr) for r in rows)
    return [f"{rate:g}" for rate in rates]


def table(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Headings and cells as text; what no row has is left out: accuracy, p-values."""

    def loss(row: Row, figure: Figure | None) -> str:
        if row.diverged == row.seeds:
            return "diverged"
        return "—" if figure is None else figure.text(_decimals(figure.mean))

    def plain(figure: Figure | None, digits: int, unit: float = 1.0) -> str:
        return "—" if figure is None else figure.text(digits, unit)

    columns = {
        "optimizer": [row.optimizer for row in rows],
        "lr": [f"{row.lr:g}" for row in rows],
        "embedding lr": _embedding_rates(rows),
        "weight decay": [f"{row.weight_decay:g}" for row in rows],
        "train loss": [loss(row, row.train_loss) for row in rows],
        "val loss": [loss(row, row.val_loss) for row in rows],
        "p of val loss": [p_value(row.val_loss_p) for row in rows],
        "accuracy, %": [plain(row.accuracy, 2, 100) for row in rows],
        "p of accuracy": [p_value(row.accuracy_p) for row in rows],
        "steps to AdamW's loss": [plain(row.steps_to_reference, 0) for row in rows],
        "s to AdamW's loss": [plain(row.seconds_to_reference, 1) for row in rows],
        "ms/step": [plain(row.step_ms, 2) for row in rows],
        "of it optimizer": [plain(row.optimizer_ms, 2) for row in rows],
        "s in all": [plain(row.seconds, 1) for row in rows],
    }
    for name in ("embedding lr", "accuracy, %", "p of val loss", "p of accuracy"):
        if set(columns[name]) == {"—"}:
            del columns[name]
    return list(columns), [list(cells) for cells in zip(*columns.values(), strict=True)]


NOTES = (
    "Train loss: mean over the last 5% of the steps. "
    "To AdamW's loss: where the validation curve first reaches the loss AdamW's ends at, same "
    "seed; — if never. ms/step: median. Seconds: training steps only, validation left out. "
    "±: standard deviation over seeds; (n/N): n of N seeds have the figure. "
    "p: Welch's t-test against AdamW over seeds."
)
