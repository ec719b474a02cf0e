"""What the scripts share that train several runs: a file that grows run by run, and their picture.

A file holds `kind`, `setting` and `runs`; a run is what its `key` names, the `machine` that it ran
on, and what came of it, with `validation` as [steps, loss] pairs. The file's own `machine` is that
of runs which say none.
"""

from __future__ import annotations

import itertools
import json
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import harness
import machine
from parts import Record

Key = tuple[Any, ...]


def begun(path: Path, empty: Record) -> Record:
    """What a file has of the setting in `empty`; where there is no file, that.

    Raises:
        SystemExit: the file is of another setting.
    """
    if not path.exists():
        return empty
    kept: Record = json.loads(path.read_text(encoding="utf-8"))
    # As JSON gives it back: tuples as lists.
    if kept["setting"] != json.loads(json.dumps(empty["setting"])):
        raise SystemExit(
            f"{path} has runs of another setting ({kept['setting']}): delete it to begin "
            "anew, ask for that setting, or, where there is --json, name another file"
        )
    return kept


class Runs:
    """The runs of one setting in one file; what it has is not trained again.

    Raises:
        SystemExit: the file is of another setting.
    """

    def __init__(self, path: Path, kind: str, setting: Record, names: Sequence[str]) -> None:
        self.path, self.names, self._lock = path, names, threading.Lock()
        self.record = begun(path, {"kind": kind, "setting": setting, "runs": []})

    def find(self, key: Key) -> Record | None:
        found = [run for run in self.record["runs"] if self._key(run) == key]
        return found[0] if found else None

    def get(self, key: Key, train: Callable[[], Record]) -> Record:
        """The run of this key: kept, or else trained and kept."""
        return self.find(key) or self.add(key, train())

    def add(self, key: Key, outcome: Record) -> Record:
        facts = machine.facts()
        run = {**dict(zip(self.names, key, strict=True)), **outcome, "machine": facts}
        with self._lock:
            self.record["runs"].append(run)
            self.record["runs"].sort(key=self._key)
            self.record.setdefault("machine", facts)
            self.keep()
        return run

    def fill(self, keys: Iterable[Key], train: Callable[..., Record], jobs: int) -> None:
        """Train those that are missing, `jobs` at a time: `train(*key)`, each in processes of its
        own. Each is kept as soon as it is done.
        """
        with ThreadPoolExecutor(jobs) as pool:
            waiting = {pool.submit(train, *key): key for key in keys if self.find(key) is None}
            for future in as_completed(waiting):
                self.add(waiting[future], future.result())

    def keep(self, **more: Any) -> None:
        """Write the file anew, with what is given beside the runs."""
        self.record |= more
        # A setting is compared with what is asked for, digit by digit.
        short = {**harness.rounded(self.record, 7), "setting": self.record["setting"]}
        harness.write(self.path, short, indent=None)

    def _key(self, run: Record) -> Key:
        return tuple(run[name] for name in self.names)


def last(run: Record) -> float:
    """The validation loss at the end."""
    value: float = run["validation"][-1][1]
    return value


def mean(values: Iterable[float], digits: int = 3) -> str:
    """Mean ± standard deviation; of a single value, that value."""
    found = list(values)
    spread = f" ± {stdev(found):.{digits}f}" if len(found) > 1 else ""
    return f"{fmean(found):z.{digits}f}{spread}"


def reached(run: Record, loss: float) -> float | None:
    """Steps until the validation loss was as low as `loss`, by straight lines between points."""
    points = run["validation"]
    for (s0, l0), (s1, l1) in itertools.pairwise(points):
        if l1 <= loss < l0:
            return float(s0 + (s1 - s0) * (l0 - loss) / (l0 - l1))
    return None


def picture(curves: Mapping[str, Sequence[Record]], path: Path) -> None:
    """Validation loss against steps: a line for each name, the mean over its runs."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from muonkit.lab.pictures import STYLES, rendered

    figure = Figure(figsize=(8, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for (name, runs), style in zip(curves.items(), STYLES.values(), strict=False):
        steps = [step for step, _ in runs[0]["validation"]]
        by_run = ([loss for _, loss in run["validation"]] for run in runs)
        losses = [fmean(each) for each in zip(*by_run, strict=True)]
        axes.plot(steps, losses, style.dash, color=style.color, marker=style.marker, markersize=3,
                  label=name)  # fmt: skip
    axes.set(xlabel="step", ylabel="validation loss, nats per byte")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    path.write_bytes(rendered(figure, path.suffix.removeprefix(".")))
