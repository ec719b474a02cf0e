"""What the lab's tests share: a silent reporter, short readings of a run, small data files."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from muonkit.lab.monitor_plots import _edges as edges
from muonkit.lab.monitor_plots import _norm as norm
from muonkit.lab.monitor_plots import _spread as spread
from muonkit.lab.plots import _limits as limits
from muonkit.lab.plots import _smoothed as smoothed
from muonkit.lab.progress import Lines
from muonkit.lab.report import _side_by_side as side_by_side
from muonkit.lab.store import Record, parse_lines
from muonkit.lab.sweep import Search
from muonkit.lab.train import Trainer

__all__ = [
    "CIFAR_BATCHES",
    "Silent",
    "advance",
    "edges",
    "limits",
    "losses",
    "norm",
    "read_records",
    "searched",
    "side_by_side",
    "smoothed",
    "spread",
    "write_cifar",
]

# As they are published.
CIFAR_BATCHES = [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]


class Silent(Lines):
    """A reporter that keeps what it is told."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, line: str) -> None:
        self.said.append(line)


def read_records(path: Path) -> list[Record]:
    return parse_lines(path.read_bytes())


def losses(folder: Path) -> list[tuple[Any, ...]]:
    """Every measured number but the times, in order."""
    records = read_records(folder / "measurements.jsonl")
    return [
        (r["optimizer"], r["lr"], r["seed"], r["kind"], r["step"], r["loss"], r.get("accuracy"))
        for r in records
    ]


def searched(search: Search, loss_at: Callable[[float], float]) -> tuple[float, list[float]]:
    """What a search finds where ``loss_at`` is the loss, and the values it tried."""
    tried: list[float] = []
    values = next(search)
    while True:
        tried.extend(values)
        try:
            values = search.send([loss_at(value) for value in values])
        except StopIteration as end:
            return end.value, tried


def write_cifar(path: Path, cut: str = "", drop: str = "", label: int = 9) -> Path:
    """A small file as the published one; its damage is as the arguments say."""
    record = bytes([label]) + bytes(3072)
    with tarfile.open(path, "w:gz", compresslevel=1) as tar:
        for name in CIFAR_BATCHES:
            content = record * 10_000
            content = content[:-5] if name == cut else content
            if name != drop:
                member = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return path


def advance(trainer: Trainer, steps: int, saved_after: int | None = None) -> None:
    """The beginning of a run, as a kill would leave it: so many steps, with their evaluations.

    Args:
        saved_after: write the checkpoint after this step; by default after the last.
    """
    trainer._evaluate()
    for step in range(1, steps + 1):
        trainer._one_step()
        if trainer.step in trainer.setting.evaluation_steps:
            trainer._evaluate()
        if step == (saved_after or steps):
            trainer.save()
    trainer.file.close()
