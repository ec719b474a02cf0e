"""All runs of a comparison, in one folder that can be left and taken up at any moment."""

import hashlib
import json
import math
import shutil
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from rich import console as rich_console
from torch import nn

import muonkit
from muonkit._text import shortened, shown
from muonkit.lab import report
from muonkit.lab.errors import Interrupted, LabError
from muonkit.lab.files import is_there
from muonkit.lab.jobs import Workers
from muonkit.lab.loaders import OwnData
from muonkit.lab.objective import Place
from muonkit.lab.optimizers import FALLBACK, SCALE, get_optimizer
from muonkit.lab.output import Console
from muonkit.lab.own import said_of_seeds
from muonkit.lab.progress import Lines, reporter
from muonkit.lab.results import Curve, Outcome
from muonkit.lab.rules import for_all, routed, rules_of
from muonkit.lab.saved import MEASUREMENTS, RECORDING, Result, is_finished, read_result
from muonkit.lab.store import DATA, SOURCES, Folder, Record, write_atomically
from muonkit.lab.sweep import (
    POINTS,
    Trials,
    best_decay,
    best_rate,
    halved_decay,
    halved_rate,
    on_seeds,
    side_by_side,
)
from muonkit.lab.task import Budget, Task
from muonkit.lab.tasks import get_task
from muonkit.lab.train import Run, Setting, StopRequest, bytes_of, train


@dataclass(frozen=True)
class Comparison:
    """What is asked for. Equal comparisons give equal losses, and share a folder.

    Attributes:
        task: a key of ``TASKS``, or where one of the user's own is.
        optimizers: keys of ``OPTIMIZERS``.
        lr: the learning rate of each of them, the centre of the grid when swept.
        sweep: whether the learning rate of each is chosen first.
        sweep_embedding_lr: whether the rate of embeddings and head is, after that.
        sweep_decay: whether the weight decay of each is, at last.
        full: whether every value in a sweep gets whole runs on all of its seeds.
        points: in the grid of each sweep.
        sweep_seeds: how many seeds choose in a sweep, 0, 1, …
        embedding_lr: the rate of embeddings and head, where it is another one than lr.
        weight_decay: those that are not the optimizer's default; the centre of the grid when swept.
        seeds: number of runs per optimizer, with the seeds 0, 1, …
        budget: length of a run.
        batch_size: examples per step.
        threads: CPU threads of a run; they decide the order of sums, hence the last bits.
        jobs: runs at a time, which the seconds depend on.
        evaluations: validations of a run; None: the task's.
        monitor: steps between samples of ``muonkit.Monitor``; None: it is not used.
        device: where runs are trained.
        rules: of routing, as ``--rule`` has them.
        record: the task itself, as it was when this was asked for.
    """

    task: str
    optimizers: tuple[str, ...]
    lr: Mapping[str, float]
    sweep: bool
    seeds: int
    budget: Budget
    batch_size: int
    threads: int
    sweep_decay: bool = False
    points: int = POINTS
    sweep_seeds: int = 1
    weight_decay: Mapping[str, float] = field(default_factory=dict)
    jobs: int = 1
    evaluations: int | None = None
    monitor: int | None = None
    device: str = "cpu"
    sweep_embedding_lr: bool = False
    full: bool = False
    embedding_lr: Mapping[str, float] = field(default_factory=dict)
    rules: tuple[str, ...] = ()
    record: Task | None = field(default=None, compare=False, repr=False)

    @property
    def chosen(self) -> Task:
        """The task."""
        return self.record or get_task(self.task)

    def config(self) -> Record:
        """What is asked for, and the model that the task has by now."""
        further = {
            "sweep_embedding_lr": self.sweep_embedding_lr,
            "sweep_decay": self.sweep_decay,
            "sweep_full": self.full,
            "embedding_lr": dict(self.embedding_lr),
            "sweep_points": self.points if self.points != POINTS else None,
            "sweep_seeds": self.sweep_seeds if self.sweep_seeds > 1 else None,
            "weight_decay": dict(self.weight_decay),
            "jobs": self.jobs if self.jobs > 1 else None,
            "evaluations": self.evaluations,
            "monitor": self.monitor,
            "device": self.device if self.device != "cpu" else None,
            "rules": list(self.rules),
        }
        return {
            "task": self.task,
            "model": self.chosen.model,
            "optimizers": list(self.optimizers),
            "lr": dict(self.lr),
            "sweep": self.sweep,
            "seeds": self.seeds,
            "budget": str(self.budget),
            "batch_size": self.batch_size,
            "threads": self.threads,
            **{name: value for name, value in further.items() if value},
        }

    def default_folder(self) -> Path:
        """A folder of its own for every configuration, so that the same command goes on."""
        text = json.dumps(self.config(), sort_keys=True)
        return Path("runs") / f"{self.chosen.label}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


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
    sweep_decay: bool = False,
    points: int = POINTS,
    sweep_seeds: int = 1,
    weight_decay: Mapping[str | None, float] | None = None,
    jobs: int = 1,
    evaluations: int | None = None,
    monitor: int | None = None,
    device: str = "cpu",
    sweep_embedding_lr: bool = False,
    full: bool = False,
    embedding_lr: Mapping[str | None, float] | None = None,
    rules: Sequence[str] = (),
) -> Comparison:
    """A checked :class:`Comparison`, the task's defaults filled in.

    Args:
        lr: learning rates by optimizer; the key None is for all that are not named.
        weight_decay, embedding_lr: likewise.
        rules: of routing, as ``--rule`` has them.
        threads: None: torch's number, or one of each run if there are several at a time.

    Raises:
        LabError: an unknown task or optimizer, one given twice, a learning rate or decay for none,
            a grid that has no middle, or a rule that is none.
    """
    chosen = get_task(task)
    if chosen.is_own and batch_size:
        raise LabError(
            f"--batch-size {batch_size}: the batches are those that {task} returns; change them "
            "there"
        )
    defaults = {name: get_optimizer(name).weight_decay for name in optimizers}
    if not optimizers or len(set(optimizers)) < len(optimizers):
        raise LabError(f"--optimizers {','.join(optimizers)}: name each optimizer once")
    if points < 3 or points % 2 == 0:
        raise LabError(
            f"--sweep-points {points}: the default is the middle of the grid; give an odd number, "
            "3 or more"
        )
    decays = _by_optimizer("--weight-decay", weight_decay, defaults)
    if sweep_decay and 0.0 in decays.values():
        raise LabError(
            "--weight-decay 0 with --sweep-decay: a grid around 0 is only 0; give another centre"
        )
    is_swept = sweep or sweep_decay or sweep_embedding_lr
    without = {
        "--sweep-full": full,
        f"--sweep-points {points}": points != POINTS,
        f"--sweep-seeds {sweep_seeds}": sweep_seeds != 1,
    }
    for option, is_given in without.items():
        if is_given and not is_swept:
            raise LabError(f"{option} without a sweep: give --sweep too")
    if sweep_embedding_lr and not any(get_optimizer(n).has_embedding_lr for n in optimizers):
        raise LabError(
            f"--sweep-embedding-lr: none of {','.join(optimizers)} has a rate of its own for "
            "embeddings; leave it out"
        )
    return Comparison(
        task=task,
        optimizers=tuple(optimizers),
        lr=_by_optimizer("--lr", lr, {name: chosen.lr[name] for name in optimizers}),
        sweep=sweep,
        seeds=seeds,
        budget=budget or chosen.budget,
        batch_size=batch_size or chosen.batch_size,
        threads=threads or (1 if jobs > 1 else torch.get_num_threads()),
        sweep_decay=sweep_decay,
        points=points,
        sweep_seeds=sweep_seeds,
        weight_decay={name: x for name, x in decays.items() if x != defaults[name]},
        jobs=jobs,
        evaluations=evaluations,
        monitor=monitor,
        device=device,
        sweep_embedding_lr=sweep_embedding_lr,
        full=full,
        embedding_lr=_embedding_rates(embedding_lr, optimizers),
        rules=for_all(rules),
        record=chosen,
    )


def _by_optimizer(
    option: str, given: Mapping[str | None, float] | None, defaults: Mapping[str, float]
) -> dict[str, float]:
    """The value of every optimizer: its own, else the one for all, else its default."""
    given = given or {}
    for stranger in given.keys() - {None, *defaults}:
        raise LabError(
            f"{option} names {stranger!r}, which is not compared: add it to --optimizers "
            f"({','.join(defaults)})"
        )
    return {name: given.get(name, given.get(None, x)) for name, x in defaults.items()}


def _embedding_rates(
    given: Mapping[str | None, float] | None, optimizers: Sequence[str]
) -> dict[str, float]:
    """The embeddings' rates that were given, by optimizer; of those that can have one."""
    can = [name for name in optimizers if get_optimizer(name).has_embedding_lr]
    cannot = [name for name in optimizers if name in (given or {}) and name not in can]
    if cannot or (given and not can):
        names = cannot or list(optimizers)
        raise LabError(
            f"--embedding-lr: {', '.join(names)} {'has' if len(names) == 1 else 'have'} one rate "
            "for all parameters"
        )
    rates = _by_optimizer("--embedding-lr", given, dict.fromkeys(can, math.nan))
    return {name: rate for name, rate in rates.items() if not math.isnan(rate)}


@dataclass(frozen=True)
class Chosen:
    """What a run of an optimizer has beside its seed: as asked for, or as a sweep found it."""

    lr: float
    embedding_lr: float | None
    weight_decay: float | None

    def run(self, optimizer: str, seed: int = 0) -> Run:
        return Run(optimizer, self.lr, seed, self.weight_decay, self.embedding_lr)


#: Yields runs, is sent the loss of each, returns what it found.
Choice = Generator[list[Run], Sequence[float], Chosen]


def _as_runs(
    search: Trials[float], run_of: Callable[[float], Run]
) -> Generator[list[Run], Sequence[float], float]:
    """``search``, asking for the runs that its trials are."""
    losses = None
    while True:
        try:
            trials = search.send(losses)  # type: ignore[arg-type]
        except StopIteration as end:
            return float(end.value)
        losses = yield [replace(run_of(t.value), seed=t.seed, part=t.part) for t in trials]


def _other(value: float, usual: float) -> float | None:
    """None for what is the usual value anyway."""
    return None if value == usual else value


class Session:
    """One go at a comparison: the runs that are missing, then the report."""

    def __init__(self, asked: Comparison, setting: Setting, folder: Folder, lines: Lines) -> None:
        self.asked, self.setting, self.folder, self.lines = asked, setting, folder, lines
        self.stop = StopRequest()
        self.results: dict[Run, Result] = {}
        self.swept: list[Run] = []
        self.trained = False  # whether any run was, this time
        self.expected = 0
        self.workers: Workers | None = None

    @contextmanager
    def working(self) -> Iterator[None]:
        """Hear signals in this block, and have the processes that --jobs asks for."""
        with self.stop.listening(), ExitStack() as stack:
            if self.asked.jobs > 1:
                workers = Workers(self.asked.jobs, self.setting, self.folder, self.stop)
                self.workers = stack.enter_context(workers)
            yield

    def run(self, runs: Sequence[Run]) -> list[Result]:
        """The results of ``runs``, each trained at most once."""
        missing = [run for run in dict.fromkeys(runs) if run not in self.results]
        self.expected += len(missing)
        self.lines.expect(self.expected)
        results = self._one_by_one(missing) if self.workers is None else self._at_once(missing)
        self.results.update(zip(missing, results, strict=True))
        return [self.results[run] for run in runs]

    def _is_new(self, run: Run) -> bool:
        return not is_finished(self.folder.run(run.key))

    def _one_by_one(self, runs: Sequence[Run]) -> Iterator[Result]:
        for run in runs:
            self.trained |= self._is_new(run)
            yield train(run, self.setting, self.folder.run(run.key), self.stop, self.lines)
            if self.stop.received:
                raise Interrupted(f"stopped after {run.title}")

    def _at_once(self, runs: Sequence[Run]) -> list[Result]:
        assert self.workers is not None
        self.trained |= any(map(self._is_new, runs))
        return self.workers.train(runs, self.lines)

    def _search(
        self, is_rate: bool, centre: float, run_of: Callable[[float], Run]
    ) -> Generator[list[Run], Sequence[float], float]:
        """The best value around ``centre``, of a rate or of a decay."""
        points, seeds = self.asked.points, self.asked.sweep_seeds
        if self.asked.full:
            search = on_seeds((best_rate if is_rate else best_decay)(centre, points), seeds)
        else:
            search = (halved_rate if is_rate else halved_decay)(centre, points, seeds)
        return _as_runs(search, run_of)

    def _choose(self, name: str) -> Choice:
        """The rates and the decay of an optimizer, swept where that is asked for."""
        asked, spec = self.asked, get_optimizer(name)
        found = Chosen(asked.lr[name], asked.embedding_lr.get(name), asked.weight_decay.get(name))
        if asked.sweep:
            lr = yield from self._search(True, found.lr, lambda x: replace(found, lr=x).run(name))
            found = replace(found, lr=lr)
            self._say_found(name, found, "lr", lr)
        if asked.sweep_embedding_lr and spec.has_embedding_lr:
            at, usual = found, spec.embedding_rate(found.lr)
            rate = yield from self._search(
                True,
                spec.embedding_rate(at.lr, at.embedding_lr),
                lambda x: replace(at, embedding_lr=_other(x, usual)).run(name),
            )
            found = replace(at, embedding_lr=_other(rate, usual))
            self._say_found(name, found, "embedding lr", rate)
        if asked.sweep_decay:
            last, default = found, spec.weight_decay
            decay = yield from self._search(
                False,
                spec.decay(last.weight_decay),
                lambda x: replace(last, weight_decay=_other(x, default)).run(name),
            )
            found = replace(last, weight_decay=_other(decay, default))
            self._say_found(name, found, "weight decay", decay)
        return found

    def _say_found(self, name: str, chosen: Chosen, what: str, value: float) -> None:
        run, spec, field = chosen.run(name), get_optimizer(name), what.replace(" ", "_")
        losses, tried = [], []
        for other, result in self.results.items():
            if replace(other, seed=0) == run:
                losses.append(result.val_loss)
            if replace(other, seed=0, part=1, **{field: getattr(run, field)}) == run:
                rate = spec.embedding_rate(other.lr, other.embedding_lr)
                decay = spec.decay(other.weight_decay)
                tried.append({"lr": other.lr, "embedding_lr": rate, "weight_decay": decay}[field])
        is_sound = losses and None not in losses
        found = "has the lowest validation loss" if is_sound else "is kept: every run diverged"
        edges = {min(tried): "smallest", max(tried): "largest"} if tried else {}
        if is_sound and value in edges:
            found += f", and is the {edges[value]} that was tried"
        self.lines.say(f"{name}: {what} {value:g} {found}")

    def _losses(self, runs: Sequence[Run]) -> list[float]:
        """The validation loss of each; inf where it diverged."""
        return [math.inf if x.val_loss is None else x.val_loss for x in self.run(runs)]

    def _chosen(self) -> dict[str, Chosen]:
        """Sweep all optimizers, side by side, and return the choice of each."""

        def losses_of(wanted: dict[str, list[Run]]) -> dict[str, list[float]]:
            found = iter(self._losses([run for runs in wanted.values() for run in runs]))
            return {name: [next(found) for _ in runs] for name, runs in wanted.items()}

        return side_by_side({name: self._choose(name) for name in self.asked.optimizers}, losses_of)

    def all_runs(self) -> list[Run]:
        """Train everything; the runs that count, by optimizer and seed."""
        chosen = self._chosen()
        self.swept = list(self.results)
        for line in self.spent():
            self.lines.say(line)
        runs = [chosen[name].run(name, seed) for seed in range(self.asked.seeds) for name in chosen]
        self.run(runs)
        return sorted(runs, key=lambda run: (self.asked.optimizers.index(run.optimizer), run.seed))

    def spent(self) -> list[str]:
        """What the sweeps took, in a line for each optimizer; nothing where there was none."""
        said = []
        for name in self.asked.optimizers if self.swept else ():
            results = [self.results[run] for run in self.swept if run.optimizer == name]
            steps = sum(result.steps for result in results)
            said.append(
                f"{name}: its sweep took {len(results)} runs, {steps:,} steps (as many as "
                f"{steps / self.setting.steps:.3g} whole runs), "
                f"{sum(result.seconds for result in results):,.1f} s of training"
            )
        return said

    def outcome(self, run: Run) -> tuple[Outcome, list[Record], bytes]:
        """A finished run's figures and curve, and its measurements, read and as they are."""
        folder = self.folder.run(run.key)
        identity = self.setting.of(run).identity(run)
        result, records, content = read_result(folder, identity, run.fields())
        return (result, Curve.of(records)), records, content


def _said_of_seeds(asked: Comparison, setting: Setting) -> str:
    """What there is to say of the seeds of the user's own task, where there are several."""
    if max(asked.seeds, asked.sweep_seeds) == 1 or not isinstance(setting.data, OwnData):
        return ""
    return said_of_seeds(setting.task, setting.data)


def _material(session: Session, runs: Sequence[Run], seeds: str) -> report.Material:
    measured = {run: session.outcome(run) for run in session.results}
    text = b"".join(content for _, _, content in measured.values())
    write_atomically(session.folder.path / MEASUREMENTS, text)
    task = session.setting.task
    model = task.build()
    recorded = [(run, session.folder.run(run.key) / RECORDING) for run in runs if run.seed == 0]
    return report.Material(
        config=session.folder.config(),
        summary=task.summary,
        data=session.setting.data.description,
        routing=str(_routes(model, session.asked.rules)),
        outcomes=[measured[run][0] for run in runs],
        attempts=[outcome for outcome, _, _ in measured.values()],
        swept=[measured[run][0] for run in session.swept],
        spent=session.spent(),
        records={f"{run.optimizer}/{run.seed}": measured[run][1] for run in runs},
        recordings={run.title: path for run, path in recorded if is_there(path)},
        caveats=[each for each in (report.caveat(session.asked.config(), task), seeds) if each],
        unit=task.unit,
        has_complex=any(p.is_complex() for p in model.parameters()),
    )


def _routes(model: nn.Module, rules: Sequence[str]) -> muonkit.Routes:
    """As every Muon of a comparison goes by them."""
    return routed(model, rules_of(rules), scale=SCALE, undecided=FALLBACK)


def _check_data(folder: Folder, fingerprint: str) -> None:
    """The data of a resumed comparison must be those it began with."""
    begun = folder.config().get(DATA)
    if begun != fingerprint:
        raise LabError(
            f"{folder.path} was begun on other data (fingerprint {shortened(begun, 40)}, now "
            f"{fingerprint}): choose another folder with --out, or delete it"
        )


def _check_source(folder: Folder, task: Task, same_task: bool) -> list[str]:
    """The editions of the user's task that the folder's runs may be of, the first one first.

    Raises:
        LabError: it was edited since, and nobody said that what is trained is the same.
    """
    assert task.source is not None
    found = folder.config().get(SOURCES)
    known = [each for each in found if isinstance(each, str)] if isinstance(found, list) else []
    if task.source in known:
        return known
    if not same_task:
        raise LabError(
            f"{task.name} was edited since {folder.path} was begun: --same-task goes on with its "
            f"{folder.begun()} runs, if what is trained is the same (a crash was mended); else "
            "choose another folder with --out, or delete it"
        )
    return [*known, task.source]


def _check_room(folder: Path, model: nn.Module, asked: Comparison, steps: int) -> None:
    """Refuse a folder on a disk that is too full for what will be written.

    Raises:
        LabError: it is.
    """
    tensors = bytes_of(model)
    # The model and two moments, the checkpoint beside the one that it replaces; a line of 300 bytes
    # for each step, twice; the pictures.
    lines = 2 * 300 * steps * asked.seeds * len(asked.optimizers)
    needed = asked.jobs * 2 * 3 * tensors + lines + (1 << 23)
    place = next(each for each in (folder, *folder.absolute().parents) if each.exists())
    free = shutil.disk_usage(place).free
    if free < needed:
        raise LabError(
            f"{folder} needs about {needed / 1e6:,.0f} MB, and its disk has {free / 1e6:,.0f} MB "
            "free: make room, or choose another folder with --out"
        )


def _table_console() -> Console:
    """Standard output; in a file or pipe rich would otherwise assume 80 columns and cut."""
    console = Console()
    return console if console.is_terminal else Console(width=120)


def _checked(
    asked: Comparison, folder: Folder, checkpoint_seconds: float, same_task: bool
) -> tuple[Setting, Record]:
    """What all runs share, and the configuration to store; whatever is not fit is refused here,
    before anything is written.
    """
    task = asked.chosen
    _check_config(asked, folder)  # before the data, which may take a while
    data = task.load()
    is_counted = asked.budget.unit == "steps" and task.is_own  # whose loader may have no length
    steps = asked.budget.steps(1 if is_counted else data.steps_per_epoch(asked.batch_size))
    model = task.build()
    if asked.rules:
        _routes(model, asked.rules)
    for name, lr in asked.lr.items():
        rates = Chosen(lr, asked.embedding_lr.get(name), asked.weight_decay.get(name))
        rates.run(name).build(model, asked.rules)
    stored = asked.config() | {DATA: data.fingerprint}
    sources = _check_contents(asked, folder, data.fingerprint, same_task)
    if task.is_own:
        stored[SOURCES] = sources
    _check_room(folder.path, model, asked, steps)
    first = stored[SOURCES][0] if task.is_own else None
    setting = Setting(
        task,
        data,
        steps,
        asked.batch_size,
        checkpoint_seconds,
        asked.evaluations,
        asked.monitor,
        Place(asked.device),
        first,
        asked.rules,
    )
    return setting, stored


def _check_config(asked: Comparison, folder: Folder) -> bool:
    return folder.check(asked.config(), loose=("model",) if asked.chosen.is_own else ())


def _check_contents(
    asked: Comparison, folder: Folder, fingerprint: str, same_task: bool
) -> list[str]:
    """See that the folder is free, or holds this comparison with these data, and return the sources
    that the user's task has had. Changes nothing.
    """
    task = asked.chosen
    # With no run begun there is nothing to lose: the user's task may have been mended meanwhile.
    if _check_config(asked, folder) and (folder.begun() or not task.is_own):
        _check_data(folder, fingerprint)
        if task.is_own:
            return _check_source(folder, task, same_task)
    return [] if task.source is None else [task.source]


def compare(
    asked: Comparison,
    out: Path | None = None,
    *,
    checkpoint_seconds: float = 15.0,
    same_task: bool = False,
    progress: rich_console.Console | None = None,
    output: rich_console.Console | None = None,
) -> Path:
    """Run ``asked`` (what is missing of it) in ``out``, print the table, write the report.

    Args:
        out: the folder; made when it is missing, taken up when it holds the same comparison.
        checkpoint_seconds: time between two checkpoints of the run in progress.
        same_task: what the user's task trains is what it was, though its source was edited.
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
    torch.set_num_threads(asked.threads)
    setting, stored = _checked(asked, folder, checkpoint_seconds, same_task)
    folder.create(stored)
    with folder.locked(), reporter(progress) as lines:
        # Another command may have been quicker, and be at its end.
        _check_contents(asked, folder, setting.data.fingerprint, same_task)
        if folder.config() != stored:
            folder.configure(stored)
        if asked.chosen.is_own:
            lines.say(
                f"{asked.task}: {setting.data.description}; {setting.steps:,} steps a run, on "
                f"{asked.device}"
            )
        seeds = _said_of_seeds(asked, setting)
        if seeds:
            lines.say(seeds)
        session = Session(asked, setting, folder, lines)
        with session.working():
            runs = session.all_runs()
            material = _material(session, runs, seeds)
        path = report.write(folder.path, material, lines.say)
    report.show(output, material)
    if not session.trained:
        said = f"{shown(folder.path)} was finished already: nothing was trained"
        output.print(said, soft_wrap=True, markup=False)
    output.print(f"report: {shown(path)}", soft_wrap=True, highlight=False, markup=False)
    return path
