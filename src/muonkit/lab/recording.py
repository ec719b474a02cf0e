"""What ``muonkit.Monitor`` recorded, read from its JSON lines.

A recording that is still being written, or that a kill cut short, is read up to its last whole
line.
"""

import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from muonkit.diagnostics import FORMAT
from muonkit.lab.errors import LabError
from muonkit.lab.files import check_folder
from muonkit.lab.saved import check_recording
from muonkit.lab.store import Record
from muonkit.lab.train import RECORDING

Key = tuple[str, int]


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


@dataclass(frozen=True)
class Recording:
    """The samples of one run.

    Attributes:
        path: the file.
        header: the last one in it.
        matrices: the keys (name, index) of all matrices, in the order of the model's names.
        of: how many matrices the parameter of each is.
        samples: by step, ascending; of two of one step the later; without skipped steps.
        skipped: how many steps the optimizer left out among the sampled ones.
        is_cut: whether the last line was not written to its end.
    """

    path: Path
    header: Record
    matrices: tuple[Key, ...]
    of: dict[Key, int]
    samples: tuple[Record, ...]
    skipped: int
    is_cut: bool

    @property
    def steps(self) -> list[int]:
        return [sample["step"] for sample in self.samples]

    def label(self, key: Key) -> str:
        """``blocks.0.qkv [1/3]``: ``.weight`` says nothing, since every matrix is one."""
        name, index = key
        short = name.removesuffix(".weight")
        short = name if short.isdecimal() else short  # of a Sequential: "1" alone names nothing
        return f"{short} [{index + 1}/{self.of[key]}]" if self.of[key] > 1 else short

    def records(self, key: Key) -> list[Record | None]:
        """The matrix's record in every sample; None where it had no gradient."""
        found = []
        for sample in self.samples:
            of_key = (m for m in sample["matrices"] if (m["name"], m["index"]) == key)
            found.append(next(of_key, None))
        return found

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
    return run


def _lines(path: Path) -> tuple[list[Record], bool]:
    """The records of a file, and whether its last line was cut short."""
    try:
        lines = path.read_bytes().splitlines(keepends=True)
    except OSError as error:
        raise LabError(
            f"cannot read {path} ({error.strerror}): check the name and rights"
        ) from error
    records: list[Record] = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            if not isinstance(record, dict):
                raise ValueError("no object")
        except ValueError as error:
            # Only the last line can be one that was being written.
            if number == len(lines) and not line.endswith(b"\n"):
                return records, True
            raise LabError(
                f"{path}, line {number}, is no JSON object: this is no recording of "
                "muonkit.Monitor, or it is damaged; delete the line, or name another file"
            ) from error
        records.append(record)
    return records, False


def _natural(key: Key) -> tuple[Any, ...]:
    """Sorts ``blocks.10`` behind ``blocks.2``."""
    parts = re.split(r"(\d+)", key[0])
    return (*[(int(p), "") if p.isdecimal() else (-1, p) for p in parts], (key[1], ""))


def read(run: Path, pattern: str = "*") -> Recording:
    """The recording in ``run``, of the matrices whose names match ``pattern``.

    Args:
        run: a .jsonl file, or the folder of a run that has ``monitor.jsonl``.
        pattern: of parameters' names, as a shell's: ``*`` and ``?``.

    Raises:
        LabError: there is none, it is of another format, has no samples or no such matrix.
    """
    path = find(run)
    check_recording(path)
    records, is_cut = _lines(path)
    headers = [record for record in records if record.get("kind") == "header"]
    if not records or records[0].get("kind") != "header":
        begun = "its header was not written to its end" if is_cut else "it begins with no header"
        raise LabError(f"{path} is no recording of muonkit.Monitor: {begun}; name another file")
    for header in headers:
        if header.get("format") != FORMAT:
            raise LabError(
                f"{path} is of format {header.get('format')}, written by muonkit "
                f"{header.get('muonkit')}; this one reads format {FORMAT}: draw it with that "
                "version, or record anew"
            )
    try:
        recording = _recording(path, records, headers, is_cut)
        if not recording.samples:
            every = recording.header["every"]
            raise LabError(
                f"{path} has no samples that could be drawn ({recording.skipped} skipped steps): "
                f"one is taken at step 1 and at every multiple of {every}; train further"
            )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise LabError(
            f"{path} is damaged: a record lacks or has a wrong {error}; record anew"
        ) from error
    chosen = tuple(key for key in recording.matrices if fnmatchcase(key[0], pattern))
    if not chosen:
        names = ", ".join(dict.fromkeys(key[0] for key in recording.matrices[:3]))
        raise LabError(f"no matrix of {path} matches {pattern!r}: it has {names}, ...")
    return Recording(**{**vars(recording), "matrices": chosen})


def _recording(
    path: Path, records: Sequence[Record], headers: Sequence[Record], is_cut: bool
) -> Recording:
    of = {(m["name"], m["index"]): m["of"] for header in headers for m in header["matrices"]}
    samples = {record["step"]: record for record in records if record.get("kind") == "sample"}
    drawn = {step: sample for step, sample in samples.items() if not sample["skipped"]}
    for sample in drawn.values():
        for matrix in sample["matrices"]:
            of.setdefault((matrix["name"], matrix["index"]), matrix["index"] + 1)
    return Recording(
        path=path,
        header=headers[-1],
        matrices=tuple(sorted(of, key=_natural)),
        of=of,
        samples=tuple(drawn[step] for step in sorted(drawn)),
        skipped=len(samples) - len(drawn),
        is_cut=is_cut,
    )


def remarks(recording: Recording) -> list[str]:
    """What a reader of the pictures should know of the file."""
    said = []
    if recording.is_cut:
        said.append(
            f"{recording.path}: the last line was not written to its end (the run goes on, or was "
            "killed); what is before it is drawn"
        )
    if recording.skipped:
        said.append(f"{recording.skipped} sampled steps were skipped by the optimizer: not drawn")
    return said
