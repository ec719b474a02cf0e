"""``muonkit monitor``: what a recording of ``muonkit.Monitor`` comes to, in tables and pictures."""

import math
import statistics
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from muonkit._text import shortened, shown
from muonkit.lab.errors import LabError
from muonkit.lab.recording import FIGURES, Recording, normal, read, remarks
from muonkit.lab.store import write_atomically
from muonkit.lab.train import RECORDING

#: For streams that have not the letter, as those of LANG=C or of Windows' code pages.
_SPELLED = {
    "—": "-",
    "−": "-",
    "‖": "||",
    "…": "...",
    "η": "eta ",
    "σ": "sigma",
    "ᵀ": "^T",
    "√": "sqrt ",
}


def fitting(text: object, encoding: str) -> Text:
    """The text as one line in letters that the stream has; it is never read as markup."""
    line = shown(text)
    try:
        line.encode(encoding)
    except UnicodeEncodeError:
        line = "".join(_SPELLED.get(c, c) if _lacks(encoding, c) else c for c in line)
        line = line.encode(encoding, "backslashreplace").decode(encoding)
    return Text(line)


def _lacks(encoding: str, letter: str) -> bool:
    return letter.encode(encoding, "ignore") == b""


def _extremes(recording: Recording) -> Iterator[list[str]]:
    """Lowest, median and highest value of each figure in the last sample, with their matrices."""
    for figure in FIGURES.values():
        last = [row[-1] for row in recording.values(figure)]
        there = {
            key: value
            for key, value in zip(recording.matrices, last, strict=True)
            if math.isfinite(value)
        }
        if not there:
            yield [figure.label, "—", "—", "—"]
            continue
        low, high = min(there, key=there.__getitem__), max(there, key=there.__getitem__)
        middle = statistics.median(there.values())
        yield [
            figure.label,
            f"{there[low]:.3g}  {recording.label(low)}",
            f"{middle:.3g}",
            f"{there[high]:.3g}  {recording.label(high)}",
        ]


def show(console: Console, recording: Recording) -> None:
    """Print what the last sample says, in two short tables."""
    steps, last = recording.steps, recording.samples[-1]
    span = f"step {steps[0]}" if len(steps) == 1 else f"steps {steps[0]} to {steps[-1]}"
    groups = [
        [
            shortened(group["algorithm"], 40),
            str(group["members"]),
            *(_text(group[name]) for name in ("lr", "update_to_weight", "decay_share")),
            str(group["nonfinite"]),
        ]
        for group in last.groups
    ]
    headings = ("algorithm", "members", "lr", "update / weight", "decay's share", "not finite")
    title = f"{len(steps)} samples, {span}; of the last one, by group"
    _table(console, title, headings, groups, right=headings[1:])
    title = f"{len(recording.matrices)} matrices, step {steps[-1]}"
    columns = ("figure", "lowest", "median", "highest")
    _table(console, title, columns, _extremes(recording), right=("median",))
    for line in (*remarks(recording), *normal(recording)):
        _say(console, line)


def _table(
    console: Console,
    title: str,
    headings: Sequence[str],
    rows: Iterable[Sequence[str]],
    right: Sequence[str],
) -> None:
    table = Table(title=fitting(title, console.encoding))
    for heading in headings:
        table.add_column(heading, justify="right" if heading in right else "left")
    for row in rows:
        table.add_row(*(fitting(cell, console.encoding) for cell in row))
    console.print(table)


def _say(console: Console, line: str) -> None:
    console.print(fitting(line, console.encoding), highlight=False, soft_wrap=True)


def _text(value: float | None) -> str:
    return "—" if value is None else f"{value:.3g}"


def draw(recording: Recording, title: str, form: str = "png") -> dict[str, bytes]:
    """The pictures, "png" or "svg", by file name."""
    # Here, because it brings matplotlib, which takes a second that no error should wait for.
    from muonkit.lab import monitor_plots as plots

    return {
        f"monitor-layers.{form}": plots.heat_maps(recording, title, form),
        f"monitor-spectra.{form}": plots.spectra(recording, title, form),
    }


def write(run: Path, out: Path | None, pattern: str, console: Console) -> None:
    """Draw the recording of ``run`` beside it, or in ``out``, then print the tables."""
    recording = read(run, pattern)
    folder = out or recording.path.parent
    if not folder.is_dir():
        raise LabError(f"--out {folder} is no folder: make it first")
    of_run = recording.path.name == RECORDING
    title = recording.path.resolve().parent.name if of_run else recording.path.stem
    # First the pictures: whatever happens to what is printed, they are there.
    images = draw(recording, title)
    for name, image in images.items():
        write_atomically(folder / name, image)
    try:
        show(console, recording)
        for name in images:
            _say(console, f"wrote {folder / name}")
    except SystemExit:  # rich's, where nobody reads the pipe any more: what was to do is done
        pass
