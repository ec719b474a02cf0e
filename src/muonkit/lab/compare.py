"""All runs of a comparison, in one folder that can be left and taken up at any moment."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from rich.console import Console

import muonkit
from muonkit.lab import report
from muonkit.lab.errors import Interrupted, LabError
from muonkit.lab.optimizers import get_optimizer
from muonkit.lab.progress import Lines, reporter
from muonkit.lab.results import Curve, Outcome, rows
from muonkit.lab.store import Folder, Record, read_json, read_records, write_atomically
from muonkit.lab.sweep import best_rate
from muonkit.lab.tasks import Budget, get_task
from muonkit.lab.train import Result, Run, Setting, StopRequest, train


@dataclass(frozen=True)
class Comparison:
    """What is asked for. Equal comparisons give equal losses, and share a folder.

    Attributes:
        task: a key of ``TASKS``.
        optimizers: keys of ``OPTIMIZERS``.
        lr: the learning rate of each of them, the centre of the grid when swept.
        sweep: whether the learning rate of each is chosen on seed 0 first.
        seeds: number of runs per optimizer, with the seeds 0, 1, …
        budget: length of a run.
        batch_size: examples per step.
        threads: CPU threads; they decide the order of sums, hence the last bits.
    """

    task: str
    optimizers: tuple[str, ...]
    lr: Mapping[str, float]
    sweep: bool
    seeds: int
    budget: Budget
    batch_size: int
    threads: int

    def config(self) -> Record:
        return {
            "task": self.task,
            "optimizers": list(self.optimizers),
            "lr": dict(self.lr),
            "sweep": self.sweep,
            "seeds": self.seeds,
            "budget": str(self.budget),
            "batch_size": self.batch_size,
            "threads": self.threads,
        }

    def default_folder(self) -> Path:
        """A folder of its own for every configuration, so that the same command goes on."""
        text = json.dumps(self.config(), sort_keys=True)
        return Path("runs") / f"{self.task}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def comparison(
    task: str,
    optimizers: Sequence[str],
    *,
    lr: Mapping[str | None, float] | None = None,
    sweep: bool = False,
    seeds: int = 1,
    budget: Budget | None = None,
    batch_size: int | None = None,
    threads: int | None = None,
) -> Comparison:
    """A checked :class:`Comparison`, the task's defaults filled in.

    Args:
        lr: learning rates by optimizer; the key None is for all that are not named.

    Raises:
        LabError: an unknown task or optimizer, one given twice, or a learning rate for none.
    """
    chosen = get_task(task)
    given = dict(lr or {})
    for name in optimizers:
        get_optimizer(name)
    if not optimizers or len(set(optimizers)) < len(optimizers):
        raise LabError(f"--optimizers {','.join(optimizers)}: name each optimizer once")
    for stranger in given.keys() - {None, *optimizers}:
        raise LabError(
            f"--lr names {stranger!r}, which is not compared: add it to --optimizers "
            f"({','.join(optimizers)})"
        )
    rates = {name: given.get(name, given.get(None, chosen.lr[name])) for name in optimizers}
    return Comparison(
        task=task,
        optimizers=tuple(optimizers),
        lr=rates,
        sweep=sweep,
        seeds=seeds,
        budget=budget or chosen.budget,
        batch_size=batch_size or chosen.batch_size,
        threads=threads or torch.get_num_threads(),
    )


class Session:
    """One go at a comparison: the runs that are missing, then the report."""

    def __init__(self, asked: Comparison, setting: Setting, folder: Folder, lines: Lines) -> None:
        self.asked, self.setting, self.folder, self.lines = asked, setting, folder, lines
        self.stop = StopRequest()
        self.results: dict[Run, Result] = {}
        self.trained = False  # whether any run was, this time
        self.expected = 0

    def run(self, run: Run) -> Result:
        """The result of ``run``, trained at most once."""
        if run not in self.results:
            folder = self.folder.run(run.key)
            self.trained |= not (folder / "result.json").exists()
            self.results[run] = train(run, self.setting, folder, self.stop, self.lines)
            if self.stop.received:
                raise Interrupted(f"stopped after {run.title}")
        return self.results[run]

    def attempt(self, optimizer: str, lr: float) -> Result:
        """One point of a sweep."""
        return self.run(Run(optimizer, lr, 0))

    def expect(self, more: int) -> None:
        self.expected += more
        self.lines.expect(self.expected)

    def all_runs(self) -> list[Run]:
        """Train everything; the runs that count, by optimizer and seed."""
        rates = dict(self.asked.lr)
        if self.asked.sweep:
            for name, centre in rates.items():
                rates[name] = best_rate(centre, partial(self.attempt, name), self.expect)
                self.lines.say(f"{name}: lr {rates[name]:g} has the lowest validation loss")
        runs = [
            Run(name, lr, seed) for seed in range(self.asked.seeds) for name, lr in rates.items()
        ]
        self.expect(sum(run not in self.results for run in runs))
        for run in runs:
            self.run(run)
        return sorted(runs, key=lambda run: (self.asked.optimizers.index(run.optimizer), run.seed))

    def outcome(self, run: Run) -> tuple[Outcome, list[Record]]:
        records = read_records(self.folder.run(run.key) / "measurements.jsonl")
        return (self.results[run], Curve.of(records)), records


def _material(session: Session, runs: Sequence[Run]) -> report.Material:
    measured = {run: session.outcome(run) for run in session.results}
    text = b"".join(
        (session.folder.run(run.key) / "measurements.jsonl").read_bytes() for run in measured
    )
    write_atomically(session.folder.path / "measurements.jsonl", text)
    task = session.setting.task
    return report.Material(
        config=session.asked.config() | {"data": session.setting.data.fingerprint},
        summary=task.summary,
        data=session.setting.data.description,
        routing=str(muonkit.route(task.build())),
        outcomes=[measured[run][0] for run in runs],
        attempts=[outcome for outcome, _ in measured.values()],
        records={f"{run.optimizer}/{run.seed}": measured[run][1] for run in runs},
    )


def _check_data(folder: Folder, fingerprint: str) -> None:
    """The data of a resumed comparison must be those it began with."""
    begun = read_json(folder.path / "config.json").get("data")
    if begun != fingerprint:
        raise LabError(
            f"{folder.path} was begun on other data (fingerprint {begun}, now {fingerprint}): "
            "choose another folder with --out, or delete it"
        )


def _table_console() -> Console:
    """Standard output; in a file or pipe rich would otherwise assume 80 columns and cut."""
    console = Console()
    return console if console.is_terminal else Console(width=120)


def compare(
    asked: Comparison,
    out: Path | None = None,
    *,
    checkpoint_seconds: float = 15.0,
    progress: Console | None = None,
    output: Console | None = None,
) -> Path:
    """Run ``asked`` (what is missing of it) in ``out``, print the table, write the report.

    Args:
        out: the folder; made when it is missing, taken up when it holds the same comparison.
        checkpoint_seconds: time between two checkpoints of the run in progress.
        progress: where progress goes (default: standard error).
        output: where the table goes (default: standard output).

    Returns:
        The path of ``report.html``.

    Raises:
        LabError: the folder or the data are not fit; before anything is written.
        Interrupted: the user stopped it; calling again goes on.
    """
    progress, output = progress or Console(stderr=True), output or _table_console()
    folder = Folder(out or asked.default_folder())
    begun = folder.check(asked.config())
    task = get_task(asked.task)
    torch.set_num_threads(asked.threads)
    data = task.load()
    per_epoch = data.steps_per_epoch(asked.batch_size)
    setting = Setting(
        task, data, asked.budget.steps(per_epoch), asked.batch_size, checkpoint_seconds
    )
    for name, lr in asked.lr.items():
        get_optimizer(name).build(task.build(), lr)  # refused here, before anything is written
    if begun:
        _check_data(folder, data.fingerprint)
    folder.create(asked.config() | {"data": data.fingerprint})
    with folder.locked(), reporter(progress) as lines:
        session = Session(asked, setting, folder, lines)
        with session.stop.listening():
            runs = session.all_runs()
            material = _material(session, runs)
        path = report.write(folder.path, material)
    report.show(output, asked.task, rows(material.outcomes))
    if not session.trained:
        said = f"{folder.path} was finished already: nothing was trained"
        output.print(said, soft_wrap=True, markup=False)
    output.print(f"report: {path}", soft_wrap=True, highlight=False, markup=False)
    return path
