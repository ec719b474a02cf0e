"""Pictures of a recording: matrices against steps, and spectra before and after.

Colours are matplotlib's cividis and viridis, which are told apart with every common kind of colour
vision and in black and white. Grey is where there is no figure.
"""

import math
import warnings
from collections.abc import Sequence
from itertools import pairwise
from typing import TypeVar

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure

from muonkit._text import shortened
from muonkit.lab.pictures import rendered
from muonkit.lab.recording import FIGURES, Recording
from muonkit.lab.recording import Figure as Quantity
from muonkit.lab.store import Record

T = TypeVar("T")

_ROW = 0.2  # inches: room for a name of 8 points
#: More rows than this are named one in several; each stays a row of the map.
_NAMED = 100
#: Matrices in the picture of spectra, spread evenly over the model, and samples of each.
_SHOWN, _CURVES = 6, 40


#: The largest value that is drawn, and the smallest but 0: beyond these, axes overflow.
_LARGEST, _SMALLEST = 1e100, 1e-100


def _drawn(figure: Figure, form: str) -> bytes:
    with warnings.catch_warnings():
        # A name may have letters that the font lacks: they are drawn as boxes.
        warnings.filterwarnings("ignore", "Glyph .* missing from", UserWarning)
        return rendered(figure, form)


def _literal(text: str) -> str:
    """A text that matplotlib takes for no formula."""
    return text.replace("$", r"\$")


def _within(value: float) -> float:
    """The value as it is drawn; NaN stays."""
    return value if value == 0 else max(min(value, _LARGEST), _SMALLEST)


def _norm(values: Sequence[float], is_log: bool) -> Normalize:
    """The range of colours; by factors only where all values allow it."""
    there = [value for value in values if math.isfinite(value)]
    if not there:
        return Normalize(0.0, 1.0)
    low, high = min(there), max(there)
    if is_log and low > 0:
        return LogNorm(low / 1.001, high * 1.001)
    return Normalize(min(low, 0.0), high if high > 0 else 1.0)


def _edges(steps: Sequence[int]) -> list[float]:
    """The borders of the cells: half-way between samples."""
    inner = [(a + b) / 2 for a, b in pairwise(steps)]
    first = inner[0] - steps[0] if inner else 0.5
    last = steps[-1] - inner[-1] if inner else 0.5
    return [max(steps[0] - first, 0.0), *inner, steps[-1] + last]


def _heat_map(axes: Axes, recording: Recording, quantity: Quantity) -> None:
    values = [[_within(value) for value in row] for row in recording.values(quantity)]
    norm = _norm([value for row in values for value in row], quantity.is_log)
    rows = [place - 0.5 for place in range(len(values) + 1)]
    axes.set_facecolor("0.85")
    mesh = axes.pcolormesh(
        _edges(recording.steps), rows, values, cmap="cividis", norm=norm, rasterized=True
    )
    axes.invert_yaxis()
    axes.set_xlabel("step")
    axes.set_title(quantity.label, fontsize="medium")
    bar = axes.figure.colorbar(mesh, ax=axes, location="bottom", shrink=0.9, pad=0.01)
    if isinstance(norm, LogNorm):
        ticks = _ticks(norm)
        bar.set_ticks(ticks, labels=[f"{tick:.2g}" for tick in ticks])
        bar.minorticks_off()
        bar.set_label("logarithmic", fontsize="small")


def _ticks(norm: Normalize) -> list[float]:
    """Five values a constant factor apart: a narrow range has no power of ten."""
    assert norm.vmin is not None
    assert norm.vmax is not None
    low, high = math.log10(norm.vmin), math.log10(norm.vmax)
    return [10 ** (low + (high - low) * i / 4) for i in range(5)]


def heat_maps(recording: Recording, title: str, form: str = "png") -> bytes:
    """The picture of every figure: a row for each matrix, the first layer on top, against steps."""
    count = len(recording.matrices)
    height = 2.4 + _ROW * min(max(count, 8), _NAMED)
    figure = Figure(figsize=(5.0 * len(FIGURES), height), layout="constrained")
    figure.suptitle(_literal(shortened(title, 80)))
    panels = figure.subplots(1, len(FIGURES), sharey=True, squeeze=False)[0]
    for axes, quantity in zip(panels, FIGURES.values(), strict=True):
        _heat_map(axes, recording, quantity)
    named = range(0, count, math.ceil(count / _NAMED))
    labels = [_literal(recording.label(recording.matrices[place])) for place in named]
    panels[0].set_yticks(list(named), labels, fontsize=8)
    return _drawn(figure, form)


def _quantiles(record: Record | None, kind: str) -> list[float] | None:
    spectrum = ((record or {}).get("spectra") or {}).get(kind)
    return None if spectrum is None else spectrum["quantiles"]


def _spread(items: Sequence[T], count: int) -> list[T]:
    """At most ``count`` of the items, evenly from the first to the last."""
    if len(items) <= count:
        return list(items)
    return [items[round(i * (len(items) - 1) / (count - 1))] for i in range(count)]


def _curves(
    axes: Axes, records: Sequence[Record | None], kind: str, steps: Sequence[int], norm: Normalize
) -> None:
    """One line a sample: singular values from the smallest to the largest."""
    for step, record in _spread(list(zip(steps, records, strict=True)), _CURVES):
        values = _quantiles(record, kind)
        if not values or values[-1] is None:
            continue
        scale = values[-1] if kind == "momentum" else 1.0
        shares = [i / max(1, len(values) - 1) for i in range(len(values))]
        shown = [_within(value / scale) if value and scale else math.nan for value in values]
        axes.plot(shares, shown, color=colormaps["viridis"](norm(step)), linewidth=1.2)
    if not axes.lines:
        axes.text(0.5, 0.5, "not recorded", ha="center", va="center", transform=axes.transAxes)
    axes.grid(alpha=0.3)


def spectra(recording: Recording, title: str, form: str = "png") -> bytes:
    """The picture of the momentum's singular values beside those of the update made of it."""
    keys = _spread(recording.matrices, _SHOWN)
    steps = recording.steps
    norm = Normalize(steps[0], max(steps[-1], steps[0] + 1))
    figure = Figure(figsize=(10.0, 1.6 + 1.9 * len(keys)), layout="constrained")
    figure.suptitle(_literal(shortened(title, 80)))
    panels = figure.subplots(len(keys), 2, sharex=True, squeeze=False)
    for key, (before, after) in zip(keys, panels, strict=True):
        records = recording.records(key)
        _curves(before, records, "momentum", steps, norm)
        _curves(after, records, "update", steps, norm)
        if before.lines:
            before.set_yscale("log")
        before.set_ylabel("σ / largest σ")
        after.set_ylabel("σ")
        after.axhline(1.0, color="0.3", linewidth=0.8, linestyle="--")
        after.set_ylim(bottom=0.0)
        before.set_title(
            f"{_literal(recording.label(key))}: momentum", fontsize="medium", loc="left"
        )
        after.set_title("update, orthogonalized", fontsize="medium", loc="left")
    for axes in panels[-1]:
        axes.set_xlabel("share of the singular values, smallest to largest")
    figure.colorbar(
        ScalarMappable(norm, "viridis"), ax=list(panels.flat), label="step", shrink=0.6, aspect=40
    )
    return _drawn(figure, form)
