"""``muonkit monitor``: what a recording of ``muonkit.Monitor`` comes to, in tables and pictures."""

import math
import statistics
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from muonkit.lab.errors import LabError
from muonkit.lab.recording import FIGURES, Recording, read, remarks
from muonkit.lab.store import write_atomically
from muonkit.lab.train import RECORDING


def _extremes(recording: Recording) -> Iterator[list[str]]:
    """Of each figure in the last sample: lowest, median and highest, and whose they are."""
    for figure in FIGURES.values():
        last = [row[-1] for row in recording.values(figure)]
        there = {
            recording.label(key): value
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
            f"{there[low]:.3g}  {low}",
            f"{middle:.3g}",
            f"{there[high]:.3g}  {high}",
        ]


def show(console: Console, recording: Recording) -> None:
    """Print what the last sample says, in two short tables."""
    steps, last = recording.steps, recording.samples[-1]
    span = f"step {steps[0]}" if len(steps) == 1 else f"steps {steps[0]} to {steps[-1]}"
    groups = Table(title=f"{len(steps)} samples, {span}; of the last one, by group")
    for heading in ("algorithm", "members", "lr", "update / weight", "decay's share", "not finite"):
        groups.add_column(heading, justify="left" if heading == "algorithm" else "right")
    for group in last["groups"]:
        groups.add_row(
            str(group["algorithm"]),
            str(group["members"]),
            *(_text(group[name]) for name in ("lr", "update_to_weight", "decay_share")),
            str(sum(group["nonfinite"].values())),
        )
    console.print(groups)
    matrices = Table(title=f"{len(recording.matrices)} matrices, step {steps[-1]}")
    for heading in ("figure", "lowest", "median", "highest"):
        matrices.add_column(heading, justify="right" if heading == "median" else "left")
    for row in _extremes(recording):
        matrices.add_row(*map(escape, row))
    console.print(matrices)
    for line in remarks(recording):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _text(value: float | None) -> str:
    return "—" if value is None else f"{value:.3g}"


def draw(recording: Recording, title: str) -> dict[str, bytes]:
    """The pictures as PNG, by file name."""
    # Here, because it brings matplotlib, which takes a second that no error should wait for.
    from muonkit.lab import _monitor_plots as plots

    return {
        "monitor-layers.png": plots.heat_maps(recording, title),
        "monitor-spectra.png": plots.spectra(recording, title),
    }


def write(run: Path, out: Path | None, pattern: str, console: Console) -> None:
    """Draw the recording of ``run`` beside it, or in ``out``, and print the tables."""
    recording = read(run, pattern)
    folder = out or recording.path.parent
    if not folder.is_dir():
        raise LabError(f"--out {folder} is no folder: make it first")
    show(console, recording)
    of_run = recording.path.name == RECORDING
    title = recording.path.resolve().parent.name if of_run else recording.path.stem
    for name, image in draw(recording, title).items():
        write_atomically(folder / name, image)
        console.print(f"wrote {folder / name}", markup=False, highlight=False, soft_wrap=True)
