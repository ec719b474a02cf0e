"""Pictures: loss curves against steps and against seconds, and what a step is predicted to cost."""

import io
from collections.abc import Mapping, Sequence
from itertools import cycle
from statistics import fmean

from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from muonkit._text import shown
from muonkit.lab.errors import unknown
from muonkit.lab.results import Outcome
from muonkit.lab.store import Record

#: Okabe and Ito's colours, told apart with every common kind of colour vision; with a dash
#: pattern and a marker each, also in black and white.
_STYLES = (
    ("#0072B2", "-", "o"),
    ("#D55E00", "--", "s"),
    ("#009E73", "-.", "^"),
    ("#CC79A7", ":", "D"),
    ("#E69F00", "-", "v"),
    ("#56B4E9", "--", "P"),
)
_HATCHES = ("", "//", "..", "xx")
_SIZE, _DPI = (8.0, 4.8), 130


def plain(text: str) -> str:
    """``text`` as matplotlib shows it letter by letter: dollars would begin mathematics."""
    return shown(text).replace("$", r"\$")


def _smoothed(values: Sequence[float], window: int) -> list[float]:
    """The mean of each value and the up to ``window`` − 1 before it."""
    # Each window anew: in a running sum, one exploded value would spoil all that follow.
    return [fmean(values[max(0, i + 1 - window) : i + 1]) for i in range(len(values))]


def _training(axes: Axes, x: str, records: Sequence[Record], color: str, dash: str) -> None:
    points = [r for r in records if r["kind"] == "train" and r["loss"] is not None]
    window = max(1, len(points) // 40)
    axes.plot(
        [r[x] for r in points[window - 1 :]],
        _smoothed([r["loss"] for r in points], window)[window - 1 :],
        color=color,
        linestyle=dash,
        linewidth=1.0,
        alpha=0.45,
    )


def loss_plot(
    title: str, against: str, outcomes: Sequence[Outcome], records: dict[str, list[Record]]
) -> bytes:
    """The PNG of all loss curves.

    Args:
        title: the heading.
        against: ``"step"`` or ``"seconds"``.
        outcomes: the runs to draw; runs of one optimizer share a colour.
        records: each run's measurements, by optimizer and seed as ``"NAME/SEED"``.
    """
    canvas_figure = Figure(figsize=_SIZE, dpi=_DPI, layout="constrained")
    canvas = FigureCanvasAgg(canvas_figure)
    axes = canvas_figure.add_subplot()
    styles = cycle(_STYLES)
    style = {result.optimizer: (result.lr, next(styles)) for result, _ in _first(outcomes)}
    heads = _first(outcomes)
    for result, curve in outcomes:
        lr, (color, dash, marker) = style[result.optimizer]
        _training(axes, against, records[f"{result.optimizer}/{result.seed}"], color, dash)
        is_first = (result, curve) in heads
        name = f"{result.optimizer}, lr {lr:g}" + (" (diverged)" if result.diverged else "")
        axes.plot(
            curve.steps if against == "step" else curve.seconds,
            curve.losses,
            color=color,
            linestyle=dash,
            marker=marker,
            markersize=4,
            linewidth=1.8,
            label=plain(name) if is_first else None,
        )
    limits = _limits(outcomes, records)
    if limits and limits[1] / max(limits[0], 1e-9) > 4:
        axes.set_yscale("log")
        # Losses often span less than a decade, whose powers of ten would be one label or none.
        axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 1.5, 2, 3, 5, 7), numticks=20))
        axes.yaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
        axes.yaxis.set_minor_formatter(ticker.NullFormatter())
    if limits:
        axes.set_ylim(limits[0] / 1.15, limits[1] * 1.15)
    axes.set_xlabel("step" if against == "step" else "seconds of training")
    axes.set_ylabel("cross-entropy, nats")
    axes.set_title(plain(title))
    axes.grid(alpha=0.3, which="both")
    axes.legend(title="validation (bold), training (thin, smoothed)")
    image = io.BytesIO()
    canvas.print_png(image)  # type: ignore[no-untyped-call]
    return image.getvalue()


def _limits(
    outcomes: Sequence[Outcome], records: dict[str, list[Record]]
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
        mine = [r for r in records[f"{result.optimizer}/{result.seed}"] if r["kind"] == "train"]
        window = max(1, len(mine) // 40)
        losses = [r["loss"] for r in mine if r["loss"] is not None]
        shown += _smoothed(losses, window)[window - 1 :]
    low = min((loss for loss in shown if loss <= max(first)), default=min(first))
    return max(low, 1e-9), max(first)


def _first(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """The first run of each optimizer."""
    seen: dict[str, Outcome] = {}
    for outcome in outcomes:
        seen.setdefault(outcome[0].optimizer, outcome)
    return list(seen.values())


def bars_plot(
    title: str,
    names: Sequence[str],
    panels: Sequence[tuple[str, Mapping[str, Sequence[float]]]],
    form: str,
) -> bytes:
    """Panels of stacked horizontal bars side by side, the largest rank's.

    Args:
        names: of the bars, from top to bottom.
        panels: the unit, and the parts of every bar.
        form: "png", "svg" or another that matplotlib writes.

    Raises:
        LabError: one that it does not.
    """
    figure = Figure(figsize=(13.0, 1.8 + 0.45 * len(names)), dpi=_DPI, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    forms = canvas.get_supported_filetypes()
    if form not in forms:
        raise unknown("kind of picture", form, forms)
    figure.suptitle(plain(title))
    places = list(reversed(range(len(names))))
    for axes, (unit, parts) in zip(
        figure.subplots(1, len(panels), sharey=True), panels, strict=True
    ):
        start = [0.0] * len(names)
        for (part, lengths), (color, _, _), hatch in zip(
            parts.items(), _STYLES, _HATCHES, strict=False
        ):
            axes.barh(
                places, lengths, left=start, color=color, hatch=hatch, label=part, edgecolor="white"
            )
            start = [a + b for a, b in zip(start, lengths, strict=True)]
        for place, length in zip(places, start, strict=True):
            axes.annotate(
                f" {length:.3g}",
                (length, place),
                va="center",
                xytext=(2, 0),
                textcoords="offset points",
                fontsize="small",
            )
        axes.set_xlim(0, 1.15 * max(*start, 1e-12))
        axes.set_yticks(places, list(map(plain, names)))
        axes.set_xlabel(f"{unit}, largest rank")
        axes.grid(axis="x", alpha=0.3)
        axes.set_axisbelow(True)
        axes.legend(fontsize="small")
    image = io.BytesIO()
    figure.savefig(image, format=form)
    return image.getvalue()
