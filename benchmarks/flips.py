"""Flip single bits in every file of a finished and of an interrupted `muonkit compare`.

    python benchmarks/flips.py --flips 200
    python benchmarks/flips.py --flips 20 --json flips.json

After each flip the same command is given again. It must either refuse the file in one line that
names it, and change nothing, or come to the same table and the same losses: then it was a byte that
nobody reads. Anything else ends the script. The flips are spread evenly over each file's bytes;
which of the eight bits is drawn from a fixed seed.

Files that are written only (the report, its pictures, the summary) are damaged all at once, one bit
in each: whatever is done with them, the table stays. Pictures are not drawn anew here, which would
be most of the time and of no influence.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import random
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import harness

from muonkit.lab import cli
from muonkit.lab.compare import compare, comparison
from muonkit.lab.output import Console
from muonkit.lab.progress import Lines
from muonkit.lab.store import parse_lines
from muonkit.lab.tasks import TASKS, Budget, get_task
from muonkit.lab.train import Run, Setting, StopRequest, Trainer

STEPS, EVALUATIONS, EVERY = 12, 3, 4
NAMES = ("adamw", "muonw")
UNREAD = ("measurements.jsonl", "summary.json", "report.html", "*.png", "*.svg")
#: Rows of the table that a clock decides.
TIMES = ("s to AdamW's loss", "ms/step", "of it optimizer", "s in all")

Outcome = str
REFUSED, LEFT_OUT, SAME = "refused", "left out of the report", "nobody reads it"


class Silent(Exception):
    """A flip that was not noticed, or noticed in another way than it should be."""


def given(out: Path) -> tuple[int, str, str]:
    """Exit status, standard output and standard error of the command: `compare digits` with the
    settings above. Its words are not read anew each time, which would be half of the time.
    """
    asked = comparison(
        "digits",
        NAMES,
        budget=Budget(STEPS, "steps"),
        evaluations=EVALUATIONS,
        monitor=EVERY,
        threads=1,
    )
    said, told = (Console(file=io.StringIO(), width=120) for _ in range(2))
    status = 0
    try:
        compare(asked, out, checkpoint_seconds=1e3, progress=told, output=said)
    except Exception as error:
        text, status = cli._line(error)
        told.tell(text)
    return status, said.file.getvalue(), told.file.getvalue()


def numbers(out: Path, table: str) -> tuple[list[str], list[dict[str, Any]]]:
    """All that the command came to, but for times."""
    rows = [line for line in table.splitlines() if not any(name in line for name in TIMES)]
    rows = [row for row in rows if "nothing was trained" not in row]
    records = parse_lines((out / "measurements.jsonl").read_bytes())
    for record in records:
        for name in ("seconds", "step_ms", "optimizer_ms"):
            record.pop(name, None)
    return rows, records


def finished(out: Path) -> None:
    status, _, told = given(out)
    if status:
        raise SystemExit(told)


def interrupt(out: Path) -> None:
    """Make of the finished comparison one that was stopped in the middle of its second run."""
    for path in [p for pattern in UNREAD for p in out.glob(pattern)]:
        path.unlink()
    (folder,) = (out / "runs").glob("muonw-*")
    shutil.rmtree(folder)
    task = get_task("digits")
    setting = Setting(task, task.load(), STEPS, task.batch_size, 1e3, EVALUATIONS, EVERY)
    run = Run("muonw", task.lr["muonw"], 0)
    trainer = Trainer(run, setting, folder, StopRequest(), Lines(Console(quiet=True)))
    trainer._evaluate()
    for _ in range(STEPS // 2):
        trainer._one_step()
        if trainer.step in setting.evaluation_steps:
            trainer._evaluate()
    trainer.save()
    trainer._one_step()  # what a kill would leave behind the checkpoint
    trainer.file.close()
    if trainer.monitor is not None:
        trainer.monitor.close()


def places(size: int, count: int, name: str) -> Iterator[tuple[int, int]]:
    """``count`` (byte, bit), evenly over the file; all eight bits come up."""
    draw = random.Random(name)
    for i in range(count):
        yield (2 * i + 1) * size // (2 * count), draw.randrange(8)


class Folder:
    """A comparison's folder, damaged and put right again."""

    def __init__(self, sound: Path, out: Path) -> None:
        self.sound, self.out = sound, out
        self._again()
        status, table, told = given(out)
        if status:
            raise SystemExit(told)
        self.expected, self.table = numbers(out, table), table
        self.is_finished = "nothing was trained" in " ".join(table.split())
        self._again()

    def _again(self) -> None:
        shutil.rmtree(self.out, ignore_errors=True)
        shutil.copytree(self.sound, self.out)

    def files(self) -> list[str]:
        """Every file with a byte in it, by its name below the folder."""
        every = (p for p in self.sound.rglob("*") if p.is_file() and p.stat().st_size)
        return sorted(p.relative_to(self.sound).as_posix() for p in every)

    def is_read(self, name: str) -> bool:
        return not any((self.sound / name) in self.sound.glob(pattern) for pattern in UNREAD)

    def flip(self, *flips: tuple[str, int, int]) -> Outcome:
        """What comes of these flips of one bit in one file each.

        Raises:
            Silent: other numbers, or an error that is not one line with the file's name.
        """
        for name, place, bit in flips:
            content = bytearray((self.sound / name).read_bytes())
            content[place] ^= 1 << bit
            (self.out / name).write_bytes(content)
        status, table, told = given(self.out)
        what = f"{[f'{name}, byte {place}, bit {bit}' for name, place, bit in flips]}"
        names = [str(self.out / name) for name, _, _ in flips]
        if status:
            lines = [line for line in told.splitlines() if line.startswith("error: ")]
            if status != 2 or len(lines) != 1 or not any(n in lines[0] for n in names):
                raise Silent(f"{what}: status {status}, said {told!r}")
            if "delete" not in lines[0]:
                raise Silent(f"{what}: no remedy in {lines[0]!r}")
            self._check_untouched({name for name, _, _ in flips})
            for name, _, _ in flips:
                shutil.copy2(self.sound / name, self.out / name)
            return REFUSED
        # Of a finished comparison the times are in its results, and so the same too.
        same = table == self.table if self.is_finished else True
        if not same or numbers(self.out, table) != self.expected:
            raise Silent(f"{what}: the table was {table}")
        self._again()
        is_said = any("left out" in line and names[0] in line for line in told.splitlines())
        return LEFT_OUT if is_said else SAME

    def _check_untouched(self, but: set[str]) -> None:
        for name in self.files():
            is_other = name not in but and self.is_read(name)
            if is_other and (self.out / name).read_bytes() != (self.sound / name).read_bytes():
                raise Silent(f"{name} was written to, though {but} was refused")


def flips_of(folder: Folder, count: int) -> Iterator[tuple[str, Counter[Outcome]]]:
    """For every file, and for all that are not read together, how often each outcome came up."""
    sizes = {name: (folder.sound / name).stat().st_size for name in folder.files()}
    read = [name for name in sizes if folder.is_read(name)]
    for name in read:
        found = places(sizes[name], count, name)
        yield name, Counter(folder.flip((name, *place)) for place in found)
    unread = [name for name in sizes if name not in read]
    if unread:
        every = zip(*(places(sizes[name], count, name) for name in unread), strict=True)
        rounds = (
            [(name, *place) for name, place in zip(unread, places_of, strict=True)]
            for places_of in every
        )
        yield ", ".join(unread), Counter(folder.flip(*flips) for flips in rounds)


@contextlib.contextmanager
def quick() -> Iterator[None]:
    """In this block no picture is drawn, and the data are read once."""
    task = get_task("digits")
    data = task.load()
    with (
        mock.patch.dict(TASKS, digits=replace(task, load=lambda: data)),
        mock.patch("muonkit.lab.plots.loss_plot", return_value=b"picture"),
        mock.patch("muonkit.lab.monitor.draw", return_value={"monitor-layers.png": b"picture"}),
    ):
        yield


def folders(work: Path) -> Iterator[tuple[str, Folder]]:
    """A finished comparison, and the same interrupted, each to be damaged."""
    sound, out = work / "sound", work / "out"
    finished(sound)
    yield "finished", Folder(sound, out)
    interrupt(sound)
    yield "interrupted", Folder(sound, out)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--flips", type=int, default=200, help="in each file (200)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep the counts")
    options = parser.parse_args(arguments)
    kept: dict[str, dict[str, dict[str, int]]] = {}
    with tempfile.TemporaryDirectory() as work, quick():
        for title, folder in folders(Path(work)):
            for name, counts in flips_of(folder, options.flips):
                kept.setdefault(title, {})[name] = dict(counts)
                shown = ", ".join(f"{count} {outcome}" for outcome, count in counts.items())
                print(f"{title}: {name}: {shown}", flush=True)
    harness.write(options.json, kept)


if __name__ == "__main__":
    main()
