"""Pictures: loss curves against steps and against seconds, and what a step is predicted to cost."""

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import NamedTuple

from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from muonkit._text import shown
from muonkit.lab.errors import unknown
from muonkit.lab.optimizers import title_of
from muonkit.lab.pictures import Style, apart, human, rendered, style_of
from muonkit.lab.results import Outcome
from muonkit.lab.saved import Result
from muonkit.lab.store import Record

#: Parts of a bar: shades of one slate, which is no optimizer's colour.
_PARTS = (("#36456F", ""), ("#7386B5", "//"), ("#A7B4D4", ".."), ("#CBD3E7", "xx"))
_SIZE = (8.0, 4.8)
#: Points from one label at the curves' ends to the next: those of 9 points do not touch.
_LABEL = 12.0


def plain(text: str) -> str:
    """``text`` as matplotlib shows it letter by letter: dollars would begin mathematics."""
    return shown(text).replace("$", r"\$")


def _smoothed(values: Sequence[float], window: int) -> list[float]:
    """The mean of each value and the up to ``window`` − 1 before it."""
    # Each window anew: in a running sum, one exploded value would spoil all that follow.
    return [fmean(values[max(0, i + 1 - window) : i + 1]) for i in range(len(values))]


class Band(NamedTuple):
    """One optimizer's validation over its seeds, point by point.

    Attributes:
        x: steps or mean seconds.
        low, mean, high: of the losses; equal where there is one seed.
    """

    x: list[float]
    low: list[float]
    mean: list[float]
    high: list[float]


def band(outcomes: Sequence[Outcome], against: str) -> Band:
    """The curves of one optimizer's seeds as one; a seed that diverged ends it where it ends."""
    curves = [curve for _, curve in outcomes if curve.losses]
    count = min((len(curve.losses) for curve in curves), default=0)
    points = [[curve.losses[i] for curve in curves] for i in range(count)]
    places = [curve.steps if against == "step" else curve.seconds for curve in curves]
    return Band(
        [fmean(place[i] for place in places) for i in range(count)],
        [min(losses) for losses in points],
        [fmean(losses) for losses in points],
        [max(losses) for losses in points],
    )


def _training(axes: Axes, x: str, runs: Sequence[Sequence[Record]], style: Style) -> None:
    """The training loss, smoothed, its mean over seeds: a thin line."""
    lines = []
    for records in runs:
        points = [r for r in records if r["kind"] == "train" and r["loss"] is not None]
        window = max(1, len(points) // 40)
        losses = _smoothed([r["loss"] for r in points], window)
        lines.append([(r[x], loss) for r, loss in zip(points, losses, strict=True)][window - 1 :])
    count = min(map(len, lines), default=0)
    axes.plot(
        [fmean(line[i][0] for line in lines) for i in range(count)],
        [fmean(line[i][1] for line in lines) for i in range(count)],
        color=style.color,
        linewidth=0.9,
        alpha=0.4,
    )


def loss_plot(
    title: str,
    against: str,
    outcomes: Sequence[Outcome],
    records: Mapping[str, Sequence[Record]],
    form: str = "png",
    unit: str = "nats",
) -> bytes:
    """The picture of all loss curves: for each optimizer the mean over seeds, and their range.

    Args:
        title: the heading.
        against: ``"step"`` or ``"seconds"``.
        outcomes: the runs to draw.
        records: each run's measurements, by optimizer and seed as ``"NAME/SEED"``; a run that has
            none is drawn without its training loss.
        form: "png" or "svg".
        unit: of the losses; empty where nobody knows.
    """
    figure = Figure(figsize=_SIZE, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    ends = []
    for place, (name, runs) in enumerate(_by_optimizer(outcomes).items()):
        style, losses = style_of(name, place), band(runs, against)
        _training(axes, against, [_of(records, result) for result, _ in runs], style)
        axes.fill_between(losses.x, losses.low, losses.high, color=style.color, alpha=0.2, lw=0)
        axes.plot(losses.x, losses.mean, style.dash, color=style.color, linewidth=2.0)
        diverged = any(result.diverged for result, _ in runs)
        label = f"{title_of(name)}, lr {runs[0][0].lr:g}" + (" (diverged)" if diverged else "")
        if losses.x:
            ends.append((losses.x[-1], losses.mean[-1], plain(label), style))
    _scale(axes, _limits(outcomes, records))
    axes.set_xlabel("step" if against == "step" else "seconds of training")
    axes.set_ylabel(f"cross-entropy, {unit}" if unit else "loss")
    several = max((len(runs) for runs in _by_optimizer(outcomes).values()), default=1) > 1
    of = "mean over seeds, shaded from the lowest to the highest" if several else "one seed"
    thin = "; thin: training, smoothed" if any(records.values()) else ""
    axes.set_title(plain(title), loc="left", fontsize="medium", pad=20)
    axes.annotate(
        f"bold: validation, {of}{thin}", (0, 1), xycoords="axes fraction", xytext=(0, 7),
        textcoords="offset points", fontsize="small", color="0.35",
    )  # fmt: skip
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlim(0, None)
    _name_ends(figure, axes, ends)
    return rendered(figure, form)


def _name_ends(figure: Figure, axes: Axes, ends: Sequence[tuple[float, float, str, Style]]) -> None:
    """Name every curve to the right of the axes, at the height of its end, without touching."""
    figure.draw_without_rendering()  # which settles the height of the axes
    points = [axes.transData.transform((x, y))[1] * 72 / figure.dpi for x, y, _, _ in ends]
    low, high = (y * 72 / figure.dpi for y in axes.get_window_extent().intervaly)
    points = apart([min(max(y, low), high) for y in points], _LABEL)
    for (x, y, label, style), height in zip(ends, points, strict=True):
        axes.annotate(
            label,
            (x, min(max(y, axes.get_ylim()[0]), axes.get_ylim()[1])),
            xytext=(1.02, (height - low) / (high - low)),
            textcoords="axes fraction",
            va="center",
            fontsize=9,
            color=style.color,
            annotation_clip=False,
            arrowprops={
                "arrowstyle": "-", "color": style.color, "linewidth": 0.8, "alpha": 0.6,
                "linestyle": style.dash, "shrinkA": 0, "shrinkB": 0,
            },
        )  # fmt: skip


def _scale(axes: Axes, limits: tuple[float, float] | None) -> None:
    """The limits of the losses, by factors where they are positive and span one of 4."""
    if not limits:
        return
    low, high = limits
    if low <= 0:  # as the negative of a reward or of a likelihood may be
        room = 0.05 * (high - low)
        axes.set_ylim(low - room, high + room)
        return
    if high / low > 4:
        axes.set_yscale("log")
        # Losses often span less than a decade, whose powers of ten would be one label or none.
        span = high / low
        subs = (1, 1.5, 2, 3, 5, 7) if span < 30 else (1, 2, 5) if span < 1e4 else (1,)
        axes.yaxis.set_major_locator(ticker.LogLocator(subs=subs, numticks=20))
        axes.yaxis.set_major_formatter(ticker.FuncFormatter(lambda loss, _: human(loss)))
        axes.yaxis.set_minor_locator(ticker.NullLocator())
    axes.set_ylim(low / 1.15, high * 1.15)


def _of(records: Mapping[str, Sequence[Record]], result: Result) -> Sequence[Record]:
    return records.get(f"{result.optimizer}/{result.seed}", ())


def _by_optimizer(outcomes: Sequence[Outcome]) -> dict[str, list[Outcome]]:
    """The runs of every optimizer, in the order of first appearance."""
    found: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        found.setdefault(outcome[0].optimizer, []).append(outcome)
    return found


def _limits(
    outcomes: Sequence[Outcome], records: Mapping[str, Sequence[Record]]
) -> tuple[float, float] | None:
    """Lowest and highest loss to show: from where the runs begin down to where the sound ones get.

    What explodes before it diverges would press all the others flat.
    """
    first = [curve.losses[0] for _, curve in outcomes if curve.losses]
    if not first:
        return None
    sound = [o for o in outcomes if not o[0].diverged] or outcomes
    shown = [loss for _, curve in sound for loss in curve.losses]
    for result, _ in sound:
        mine = [r for r in _of(records, result) if r["kind"] == "train"]
        window = max(1, len(mine) // 40)
        losses = [r["loss"] for r in mine if r["loss"] is not None]
        shown += _smoothed(losses, window)[window - 1 :]
    low = min((loss for loss in shown if loss <= max(first)), default=min(first))
    return low, max(first)


#: Units of a thousandth each, for bars that would all be small fractions of the first.
_SMALLER = {"seconds": ("ms", "µs"), "GB": ("MB", "kB"), "TB": ("GB", "MB")}


def _readable(
    unit: str, parts: Mapping[str, Sequence[float]]
) -> tuple[str, dict[str, list[float]]]:
    """The same lengths in a unit in which the longest bar is 1 or more, if there is one."""
    totals = [sum(lengths) for lengths in zip(*parts.values(), strict=True)]
    longest, factor = max(totals, default=0.0), 1.0
    first = unit.replace(",", " ").split()[0]
    name = first
    for smaller in _SMALLER.get(first, ()):
        if longest * factor >= 1 or not longest:
            break
        name, factor = smaller, factor * 1e3
    scaled = {part: [x * factor for x in lengths] for part, lengths in parts.items()}
    return name + unit.removeprefix(first), scaled


def bars_plot(
    title: str,
    names: Sequence[str],
    panels: Sequence[tuple[str, Mapping[str, Sequence[float]]]],
    form: str,
) -> bytes:
    """Panels of stacked horizontal bars side by side, the largest rank's, all from zero.

    Args:
        names: of the bars, from top to bottom.
        panels: the unit, and the parts of every bar.
        form: "png", "svg" or another that matplotlib writes.

    Raises:
        LabError: one that it does not.
    """
    figure = Figure(figsize=(14.0, 2.2 + 0.45 * len(names)), layout="constrained")
    forms = FigureCanvasAgg(figure).get_supported_filetypes()
    if form not in forms:
        raise unknown("kind of picture", form, forms)
    figure.suptitle(plain(title))
    for axes, (unit, parts) in zip(
        figure.subplots(1, len(panels), sharey=True), panels, strict=True
    ):
        _bars(axes, names, *_readable(unit, parts))
    return rendered(figure, form)


def _bars(
    axes: Axes, names: Sequence[str], unit: str, parts: Mapping[str, Sequence[float]]
) -> None:
    places = list(reversed(range(len(names))))
    start = [0.0] * len(names)
    for (part, lengths), (color, hatch) in zip(parts.items(), _PARTS, strict=False):
        axes.barh(
            places, lengths, left=start, color=color, hatch=hatch, label=part, edgecolor="white"
        )
        start = [a + b for a, b in zip(start, lengths, strict=True)]
    for place, length in zip(places, start, strict=True):
        axes.annotate(
            human(length), (length, place), va="center", xytext=(5, 0),
            textcoords="offset points", fontsize="small",
        )  # fmt: skip
    axes.set_xlim(0, 1.2 * max(*start, 1e-12))
    axes.set_yticks(places, list(map(plain, names)))
    axes.xaxis.set_major_locator(ticker.MaxNLocator(5))
    axes.xaxis.set_major_formatter(ticker.FuncFormatter(lambda length, _: human(length)))
    axes.set_xlabel(f"{unit}, largest rank")
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    # Above the bars: on them, a legend would hide one.
    axes.legend(fontsize="small", loc="lower left", bbox_to_anchor=(0, 1), ncols=2, frameon=False)
