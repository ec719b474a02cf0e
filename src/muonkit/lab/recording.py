"""What ``muonkit.Monitor`` recorded, read from its JSON lines.

A recording that is still being written, or that a kill cut short, is read up to its last whole
line. It may come from anywhere: every line is checked for what is read of it, and the first wrong
one is an error of one line that says where it is and what was expected.
"""

import math
import re
import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

from muonkit._text import shortened
from muonkit.lab import recording_lines as lines
from muonkit.lab.errors import LabError
from muonkit.lab.files import check_folder
from muonkit.lab.saved import check_recording
from muonkit.lab.store import Record
from muonkit.lab.train import RECORDING

Key = tuple[str, int]

#: Characters of a name that pictures and tables show.
_NAME = 60


@dataclass(frozen=True)
class Figure:
    """A number of every matrix in every sample, one of ``FIGURES``.

    Attributes:
        label: with its unit, as axes and tables show it.
        of: the number in a matrix's record; KeyError or TypeError where there is none.
        is_log: whether its values are told apart by factors.
    """

    label: str
    of: Callable[[Record], Any]
    is_log: bool


FIGURES: dict[str, Figure] = {
    "update-to-weight": Figure(
        "update / weight, ‖ηO‖ / ‖W‖", lambda matrix: matrix["update_to_weight"], True
    ),
    "stable-rank": Figure(
        "stable rank of the momentum",
        lambda matrix: matrix["spectra"]["momentum"]["stable_rank"],
        True,
    ),
    "orthogonality": Figure(
        "orthogonality error, ‖OOᵀ − I‖ / √min(m, n)",
        lambda matrix: matrix["orthogonality_error"],
        False,
    ),
}


class Sample(NamedTuple):
    """What is read of a sample: its step, its groups' records, and those of its matrices."""

    step: int
    groups: list[Record]
    matrices: dict[Key, Record]


@dataclass(frozen=True)
class Recording:
    """The samples of one run.

    Attributes:
        path: the file.
        every: steps from sample to sample, as the last header has it.
        matrices: the keys (name, index) of all matrices, in the order of the model's names.
        of: how many matrices the parameter of each is.
        samples: by step, ascending; of two of one step the later; without skipped steps.
        skipped: how many steps the optimizer left out among the sampled ones.
        is_cut: whether the last line was not written to its end.
        is_full: whether it ends because the file had reached the monitor's ``max_bytes``.
    """

    path: Path
    every: int
    matrices: tuple[Key, ...]
    of: dict[Key, int]
    samples: tuple[Sample, ...]
    skipped: int
    is_cut: bool
    is_full: bool

    @property
    def steps(self) -> list[int]:
        return [sample.step for sample in self.samples]

    def label(self, key: Key) -> str:
        """``blocks.0.qkv [1/3]``: ``.weight`` says nothing, since every matrix is one.

        What does not print is escaped, and the middle of a long name left out.
        """
        name, index = key
        short = name.removesuffix(".weight")
        short = name if short.isdecimal() else short  # of a Sequential: "1" alone names nothing
        short = shortened(short, _NAME)
        return f"{short} [{index + 1}/{self.of[key]}]" if self.of[key] > 1 else short

    def records(self, key: Key) -> list[Record | None]:
        """The matrix's record in every sample; None where it had no gradient."""
        return [sample.matrices.get(key) for sample in self.samples]

    def values(self, figure: Figure) -> list[list[float]]:
        """(matrices, samples): the figure, NaN where there is none."""
        return [[_number(figure, record) for record in self.records(key)] for key in self.matrices]


def _number(figure: Figure, record: Record | None) -> float:
    try:
        value = figure.of(record) if record is not None else None
    except (KeyError, TypeError):  # spectra that were not asked for, or of a zero matrix
        value = None
    return math.nan if value is None else float(value)


# --- reading ---------------------------------------------------------------------------------


def find(run: Path) -> Path:
    """The file of a recording: ``run`` itself, or ``monitor.jsonl`` in it.

    Raises:
        LabError: there is none.
    """
    if run.is_dir():
        if (run / RECORDING).is_file():
            return run / RECORDING
        inside = sorted(run.glob(f"runs/*/{RECORDING}"))
        for path in inside:  # pictures are written beside it
            check_folder(path.parents[1])
            check_folder(path.parent)
        if len(inside) == 1:
            return inside[0]
        if inside:
            raise LabError(
                f"{run} holds {len(inside)} recordings: name the run, for example "
                f"{inside[0].parent}"
            )
        raise LabError(
            f"{run} has no {RECORDING}: name the folder of a run that was recorded, by muonkit "
            f'compare --monitor N or muonkit.Monitor(optimizer, to=".../{RECORDING}")'
        )
    if not run.exists():
        raise LabError(f"there is no {run}: name a .jsonl of muonkit.Monitor, or a run's folder")
    if not run.is_file():  # a pipe would be waited for
        raise LabError(f"{run} is neither file nor folder: name a .jsonl of muonkit.Monitor")
    return run


def _natural(key: Key) -> tuple[Any, ...]:
    """Sorts ``blocks.10`` behind ``blocks.2``."""
    parts = re.split("([0-9]+)", key[0])
    # By the number's length first: int() refuses thousands of digits.
    numbers = ((len(part.lstrip("0")), part.lstrip("0")) for part in parts[1::2])
    return (*zip(parts[::2], [*numbers, (0, "")], strict=True), key[1])


def read(run: Path, pattern: str = "*") -> Recording:
    """The recording in ``run``, of the matrices whose names match ``pattern``.

    The file is read once, line by line; of a sample what pictures and tables show is kept.

    Args:
        run: a .jsonl file, or the folder of a run that has ``monitor.jsonl``.
        pattern: of parameters' names, as a shell's: ``*`` and ``?``.

    Raises:
        LabError: there is none, it is of another format or damaged, has no samples or no such
            matrix.
    """
    path = find(run)
    check_recording(path)
    content = lines.Content()
    for line in lines.records(path):
        content.add(line)
    of = content.of
    drawn = {step: sample for step, sample in content.samples.items() if sample is not None}
    skipped = len(content.samples) - len(drawn)
    if not drawn:
        raise LabError(
            f"{path} has no samples that could be drawn ({skipped} skipped steps): "
            f"one is taken at step 1 and at every multiple of {content.every}; train further"
        )
    matrices = tuple(sorted(of, key=_natural))
    recording = Recording(
        path=path,
        every=content.every,
        matrices=matrices,
        of=of,
        samples=tuple(Sample(step, *drawn[step]) for step in sorted(drawn)),
        skipped=skipped,
        is_cut=content.is_cut,
        is_full=content.is_full,
    )
    chosen = tuple(key for key in matrices if fnmatchcase(key[0], pattern))
    if not chosen:
        names = ", ".join(dict.fromkeys(shortened(key[0], _NAME) for key in matrices[:3]))
        raise LabError(f"no matrix of {path} matches {pattern!r}: it has {names}, ...")
    return replace(recording, matrices=chosen)


def remarks(recording: Recording) -> list[str]:
    """What a reader of the pictures should know of the file."""
    said = []
    if recording.is_cut:
        said.append(
            f"{recording.path}: the last line was not written to its end (the run goes on, or was "
            "killed); what is before it is drawn"
        )
    if recording.is_full:
        said.append(
            f"{recording.path}: it ended at step {recording.steps[-1]}, since the file had reached "
            "the monitor's max_bytes"
        )
    if recording.skipped:
        said.append(f"{recording.skipped} sampled steps were skipped by the optimizer: not drawn")
    return said


def normal(recording: Recording) -> list[str]:
    """What is normal of the last sample, for a reader who has not seen others."""
    last = [row[-1] for row in recording.values(FIGURES["orthogonality"])]
    there = [value for value in last if math.isfinite(value)]
    if not there:
        return []
    middle = statistics.median(there)
    return [
        f"Orthogonality error {middle:.2f} (median): 0.5 to 0.6 is normal with the default, five "
        "of Keller Jordan's steps: they leave singular values between 0.7 and 1.2, the smallest "
        "below. Near 1 most of them stay small (more ns_steps lift more); the schedule svd gives "
        "0. docs/monitor.md says what the other figures tell."
    ]
