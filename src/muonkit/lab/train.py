"""One run: one optimizer, one learning rate, one seed; durable, and bit for bit resumable."""

import math
import signal
import statistics
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NoReturn

import torch
from torch import nn

import muonkit
from muonkit._text import shortened
from muonkit.lab import files
from muonkit.lab.data import Data
from muonkit.lab.errors import Interrupted, LabError, TaskError
from muonkit.lab.objective import CPU, CROSS_ENTROPY, Objective, Place
from muonkit.lab.optimizers import Optimizer, get_optimizer
from muonkit.lab.progress import Reporter
from muonkit.lab.randomness import seed_all, seeded
from muonkit.lab.rules import rules_of
from muonkit.lab.saved import (
    CHECKPOINT,
    MEASUREMENTS,
    is_finished,
    read_checkpoint,
    read_recording,
    read_result,
    write_checkpoint,
    write_result,
)
from muonkit.lab.saved import RECORDING as RECORDING
from muonkit.lab.saved import Result as Result
from muonkit.lab.store import Folder, MeasurementFile, Record
from muonkit.lab.task import Task
from muonkit.lab.user import users

WARMUP = 0.05
#: The share of the steps whose mean training loss is called the final one.
FINAL_SHARE = 0.05


@dataclass(frozen=True)
class Run:
    """What tells one run from another in a comparison.

    A weight decay or an embedding_lr of None is the optimizer's usual one, and a part of 1 is the
    whole length: these are named nowhere, so that one run has one key, whether they were chosen or
    never asked for.

    Attributes:
        optimizer: a key of ``OPTIMIZERS``.
        lr: the peak learning rate.
        seed: of weights, batches and all else that is random.
        weight_decay: of matrices and tables.
        embedding_lr: the peak learning rate of embeddings and head.
        part: a short run of a sweep has 1/part of the steps.
    """

    optimizer: str
    lr: float
    seed: int
    weight_decay: float | None = None
    embedding_lr: float | None = None
    part: int = 1

    @property
    def _named(self) -> dict[str, float]:
        """What it has beside optimizer, lr and seed."""
        further = {
            "embedding_lr": self.embedding_lr,
            "weight_decay": self.weight_decay,
            "part": self.part if self.part != 1 else None,
        }
        return {name: value for name, value in further.items() if value is not None}

    @property
    def key(self) -> str:
        """The run's name on disk."""
        short = {"embedding_lr": "emb", "weight_decay": "wd", "part": "part"}
        further = "".join(f"-{short[name]}{value!r}" for name, value in self._named.items())
        return f"{self.optimizer}-lr{self.lr!r}{further}-seed{self.seed}"

    @property
    def title(self) -> str:
        words = {"embedding_lr": "embedding lr", "weight_decay": "decay", "part": "steps 1 /"}
        further = "".join(f" {words[name]} {value:g}" for name, value in self._named.items())
        return f"{self.optimizer} lr {self.lr:g}{further} seed {self.seed}"

    def fields(self) -> Record:
        """As a line of measurements begins."""
        return {"optimizer": self.optimizer, "lr": self.lr, "seed": self.seed, **self._named}

    def build(self, model: nn.Module, rules: Sequence[str] = ()) -> Optimizer:
        """The optimizer of this run for ``model``."""
        spec = get_optimizer(self.optimizer)
        rates = self.lr, self.weight_decay, self.embedding_lr
        return spec.build(model, *rates, rules_of(rules))


@dataclass(frozen=True)
class Setting:
    """What all runs of a comparison share."""

    task: Task
    data: Data
    steps: int
    batch_size: int
    checkpoint_seconds: float = 15.0
    evaluations: int | None = None  # None: the task's
    monitor: int | None = None  # steps between samples of muonkit.Monitor; None: it is not used
    place: Place = CPU
    source: str | None = None  # of the user's task, as the comparison began; None: it is ours
    rules: tuple[str, ...] = ()  # of routing, as --rule has them

    @property
    def evaluation_steps(self) -> frozenset[int]:
        """Counts of steps after which the model is validated; 0 and the last are among them."""
        count = min(self.evaluations or self.task.evaluations, self.steps)
        return frozenset(round(i * self.steps / count) for i in range(count + 1))

    def of(self, run: Run) -> "Setting":
        """The setting of one of the runs: a short one is validated at its ends only."""
        if run.part == 1:
            return self
        return replace(self, steps=max(1, round(self.steps / run.part)), evaluations=1)

    def identity(self, run: Run) -> Record:
        """All that a run's numbers depend on, but versions and the machine: nothing else may be
        gone on with.
        """
        decay = run.weight_decay
        default = get_optimizer(run.optimizer).weight_decay
        further = {
            "source": self.source,
            "device": self.place.device,
            "embedding_lr": run.embedding_lr,
            "rules": list(self.rules) or None,
        }
        return {
            **{name: x for name, x in further.items() if x not in (None, "cpu")},
            "task": self.task.name,
            "model": self.task.model,
            "data": self.data.fingerprint,
            "optimizer": run.optimizer,
            "lr": run.lr,
            "weight_decay": default if decay is None else decay,
            "seed": run.seed,
            "steps": self.steps,
            "batch_size": self.batch_size,
            "evaluations": len(self.evaluation_steps),
            "monitor": self.monitor,
            "threads": torch.get_num_threads(),
        }


class StopRequest:
    """Set by the first Ctrl-C or SIGTERM; the run then stops at the end of its step."""

    def __init__(self) -> None:
        self.received = False

    def _receive(self, number: int, frame: object) -> None:
        if self.received:
            raise KeyboardInterrupt
        self.received = True

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Hear signals in this block (only the main thread of a process can)."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        numbers = (signal.SIGINT, signal.SIGTERM)
        before = [signal.signal(number, self._receive) for number in numbers]
        try:
            yield
        finally:
            for number, handler in zip(numbers, before, strict=True):
                signal.signal(number, handler)


def lr_factor(step: int, steps: int) -> float:
    """The share of the peak learning rate at ``step`` (from 0): linear warm-up, linear decay."""
    warmup = max(1, round(WARMUP * steps))
    return min((step + 1) / warmup, (steps - step) / max(1, steps - warmup), 1.0)


def evaluate(
    model: nn.Module, data: Data, objective: Objective = CROSS_ENTROPY, place: Place = CPU
) -> tuple[float, float | None]:
    """Validation loss, the mean over targets, and the share of right answers if there are classes.

    The global random numbers are the same at every validation: where a loss draws some, it is no
    other one for that.
    """
    loss = right = count = 0.0
    has_classes = True
    model.eval()
    with torch.no_grad(), seeded("validation"):
        for batch in data.validation():
            with place.autocast():
                found = objective.measure(model, place.moved(batch))
            loss += found.loss.item() * found.count
            count += found.count
            has_classes &= found.right is not None
            right += found.right or 0
    model.train()
    return loss / count, right / count if has_classes else None


def _finite(value: float) -> float | None:
    """JSON has no NaN: a loss that is none is written as null."""
    return value if math.isfinite(value) else None


def bytes_of(model: nn.Module) -> int:
    """Bytes of the model's tensors."""
    tensors = [*model.state_dict().values(), *_unsaved_buffers(model).values()]
    return sum(x.nbytes for x in tensors if isinstance(x, torch.Tensor))


def _unsaved_buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    """What its state dict leaves out (``persistent=False``): a mean that it keeps by itself."""
    saved = model.state_dict()
    return {name: buffer for name, buffer in model.named_buffers() if name not in saved}


def _set_buffers(model: nn.Module, values: Mapping[str, torch.Tensor]) -> None:
    """Set such buffers, of whatever shape: a module may grow them, or make them when it is run."""
    for name, value in values.items():
        path, _, label = name.rpartition(".")
        owner = model.get_submodule(path)
        here = dict(owner.named_buffers(recurse=False)).get(label)
        if here is not None and here.shape == value.shape:
            here.copy_(value)
        else:
            place = next(model.parameters()).device if here is None else here.device
            owner.register_buffer(label, value.to(place), persistent=False)


def warm_up(run: Run, setting: Setting) -> None:
    """One step of a model that is thrown away.

    The first step of a process also pays for late imports and first allocations, seconds that
    belong to no optimizer and would shift its whole curve.
    """
    model = setting.task.build().to(setting.place.device)
    optimizer = run.build(model, setting.rules)
    differentiate(model, run, 0, setting)
    optimizer.step()
    setting.place.wait()


def differentiate(model: nn.Module, run: Run, step: int, setting: Setting) -> torch.Tensor:
    """The loss of the batch of this step, whose gradients are then in the model."""
    place, task = setting.place, setting.task
    batch = place.moved(setting.data.batch(run.seed, step, setting.batch_size))
    with place.autocast():
        loss = task.objective.loss(model, batch)
    with users(f"the backward pass of {task.name}"):
        loss.backward()  # type: ignore[no-untyped-call]
    return loss


class Trainer:
    """The state of one run in progress."""

    def __init__(
        self, run: Run, setting: Setting, folder: Path, stop: StopRequest, reporter: Reporter
    ) -> None:
        self.run, self.setting, self.folder = run, setting, folder
        self.stop, self.reporter = stop, reporter
        self.step = 0
        try:
            warm_up(run, setting)
        except TaskError as error:
            raise self._located(error) from error
        self.model = setting.task.make(run.seed).to(setting.place.device)
        self.optimizer = run.build(self.model, setting.rules)
        self.peaks = [float(group["lr"]) for group in self.optimizer.param_groups]
        self.seconds = 0.0
        files.make_folder(folder)
        self.identity = setting.identity(run)
        self.records: list[Record] = []
        # All that is to be gone on with is read before anything is written: the first damage that
        # is found leaves every file as it was.
        content, known = self._resume()
        recorded = read_recording(folder, known) if self._is_watched else b""
        self.file = MeasurementFile(folder / MEASUREMENTS, content)
        self.monitor = self._watch(recorded)

    # --- going on ---

    def _resume(self) -> tuple[bytes, Record | None]:
        """Take up the checkpoint, if there is one: its measurements, and the recording's sum.

        Raises:
            LabError: it is damaged, or of another run.
        """
        tensors = bytes_of(self.model)
        saved = read_checkpoint(self.folder, self.identity, self.run.fields(), tensors)
        if saved is None:
            return b"", None
        try:
            self.model.load_state_dict(saved.state["model"])
            _set_buffers(self.model, saved.state.get("buffers", {}))
            self.optimizer.load_state_dict(saved.state["optimizer"])
        except Exception as error:  # each of them raises what it likes
            raise LabError(
                f"{self.folder / CHECKPOINT} cannot be gone on with ({shortened(error, 80)}), it "
                f"may be of another muonkit: delete the folder {self.folder} (its steps so far are "
                "lost), and the same command trains that run anew"
            ) from error
        self.step, self.seconds, self.records = saved.step, saved.seconds, saved.records
        return saved.content, saved.recording

    @property
    def _is_watched(self) -> bool:
        return self.setting.monitor is not None and isinstance(self.optimizer, muonkit.Muon)

    def _watch(self, recorded: bytes) -> muonkit.Monitor | None:
        """The monitor of muonkit's own optimizers, if asked for; its file as long as it was."""
        if self.setting.monitor is None or not isinstance(self.optimizer, muonkit.Muon):
            return None
        path = self.folder / RECORDING
        # Anew, whatever stood there: the monitor itself follows links.
        files.begin(path, recorded).close()
        return muonkit.Monitor(self.optimizer, self.setting.monitor, path, start=self.step)

    def save(self) -> None:
        """Replace the checkpoint by one of this moment."""
        write_checkpoint(
            self.folder,
            self.identity,
            {
                "model": self.model.state_dict(),
                "buffers": _unsaved_buffers(self.model),
                "optimizer": self.optimizer.state_dict(),
            },
            step=self.step,
            seconds=self.seconds,
            # Before the state: a checkpoint must never speak of lines that are not on disk.
            measurements=self.file.sync(),
            is_recorded=self.monitor is not None,
        )

    # --- training ---

    def train(self) -> Result:
        """Go on to the end, or to divergence.

        Raises:
            Interrupted: the user stopped it; the checkpoint is up to date.
        """
        try:
            return self._train()
        except TaskError as error:
            raise self._located(error) from error
        finally:
            self.file.close()
            if self.monitor is not None:
                self.monitor.close()

    def _located(self, error: TaskError) -> TaskError:
        """The same, at its step, and what to do: the last checkpoint is as it was."""
        located = TaskError(
            f"{error}, at step {self.step} of {self.run.title}: mend it, and the same command goes "
            "on from the last checkpoint, if there is one yet (after a change of the task's file "
            "with --same-task)"
        )
        located.trace, located.exit_status = error.trace, 1
        return located

    def _train(self) -> Result:
        self.reporter.start(self.run.title, self.step, self.setting.steps)
        diverged = False
        if not self.records:
            diverged = not self._evaluate()
        if self.step:
            self.setting.data.go_to(self.run.seed, self.step)
        saved = time.monotonic()
        while self.step < self.setting.steps and not diverged:
            try:
                diverged = not self._one_step()
            except TaskError:
                # Ctrl-C ends the workers of a loader too, unless they were forked.
                if self.stop.received:
                    self._interrupt()
                raise
            if self.step in self.setting.evaluation_steps and not diverged:
                diverged = not self._evaluate()
            if diverged:
                break  # no checkpoint: it would not know, and the run would go on from NaN
            if self.stop.received:
                self._interrupt()
            if time.monotonic() - saved >= self.setting.checkpoint_seconds:
                self.save()
                saved = time.monotonic()
        return self._finish(diverged)

    def _interrupt(self) -> NoReturn:
        self.save()
        raise Interrupted(f"stopped at step {self.step} of {self.run.title}")

    def _one_step(self) -> bool:
        """One step of training; False when its loss is not finite."""
        setting = self.setting
        factor = lr_factor(self.step, setting.steps)
        for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
            group["lr"] = peak * factor
        # What dropout draws is a function of seed and step too.
        seed_all("step", self.run.seed, self.step)
        start = time.perf_counter()
        value = differentiate(self.model, self.run, self.step, setting).item()
        setting.place.wait()
        before = time.perf_counter()
        if math.isfinite(value):
            self.optimizer.step()
        self.optimizer.zero_grad()
        setting.place.wait()
        end = time.perf_counter()
        self.step += 1
        self.seconds += end - start
        self._record(
            "train",
            loss=_finite(value),
            step_ms=round((end - start) * 1e3, 4),
            optimizer_ms=round((end - before) * 1e3, 4),
        )
        self.reporter.advance(self.step, value)
        return math.isfinite(value)

    def _evaluate(self) -> bool:
        """Validate; False when the loss is not finite."""
        task = self.setting.task
        loss, right = evaluate(self.model, self.setting.data, task.objective, self.setting.place)
        if not self.step and not math.isfinite(loss):
            raise TaskError(f"no optimizer can begin with a validation loss of {loss}")
        accuracy = right if task.accuracy else None
        self._record("validation", loss=_finite(loss), accuracy=accuracy)
        self.reporter.evaluated(self.step, loss, accuracy)
        return math.isfinite(loss)

    def _record(self, kind: str, **values: object) -> None:
        # json.dumps prints the shortest digits that give the same float back: nothing is lost.
        record = {**self.run.fields(), "kind": kind, "step": self.step, **values}
        record["seconds"] = round(self.seconds, 6)
        self.records.append(record)
        self.file.append(record)

    def _finish(self, diverged: bool) -> Result:
        result = summarise(self.run, self.records, diverged, self.seconds)
        is_recorded, measured = self.monitor is not None, self.file.sync()
        write_result(self.folder, self.identity, result, measured, is_recorded=is_recorded)
        note = f"diverged at step {self.step}" if diverged else f"val loss {result.val_loss:.4f}"
        self.reporter.end(f"{note} after {self.seconds:.1f} s of training")
        return result


def summarise(run: Run, records: list[Record], diverged: bool, seconds: float) -> Result:
    """The figures of a run from its measurements."""
    steps = [r for r in records if r["kind"] == "train"]
    last = [r for r in records if r["kind"] == "validation"][-1]
    final = [r["loss"] for r in steps[-max(1, round(FINAL_SHARE * len(steps))) :]]
    return Result(
        **asdict(run),
        diverged=diverged,
        steps=len(steps),
        train_loss=None if diverged else statistics.fmean(final),
        val_loss=None if diverged else last["loss"],
        accuracy=None if diverged else last["accuracy"],
        seconds=round(seconds, 6),
        step_ms=statistics.median(r["step_ms"] for r in steps) if steps else 0.0,
        optimizer_ms=statistics.median(r["optimizer_ms"] for r in steps) if steps else 0.0,
    )


def train(
    run: Run, setting: Setting, folder: Path, stop: StopRequest, reporter: Reporter
) -> Result:
    """The result of ``run``: read from ``folder`` when it is there, else trained (further).

    Raises:
        LabError: what is in ``folder`` is damaged, or of another run.
        Interrupted: the user stopped it; the checkpoint is up to date.
    """
    files.make_folder(folder)
    setting = setting.of(run)
    if is_finished(folder):
        result, _, _ = read_result(folder, setting.identity(run), run.fields())
        reporter.start(run.title, 0, setting.steps)
        reporter.end("finished earlier")
        return result
    # A worker outlives a killed parent by a step or so; meanwhile the run is still its own.
    with Folder(folder).locked():
        return Trainer(run, setting, folder, stop, reporter).train()
