"""One run: one optimizer, one learning rate, one seed; durable, and bit for bit resumable."""

import copy
import io
import math
import os
import signal
import statistics
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import muonkit
from muonkit.lab.data import Data, generator
from muonkit.lab.errors import Interrupted, LabError
from muonkit.lab.optimizers import Optimizer, get_optimizer
from muonkit.lab.progress import Reporter
from muonkit.lab.store import (
    Folder,
    MeasurementFile,
    Record,
    read_json,
    read_records,
    write_atomically,
    write_json,
)
from muonkit.lab.tasks import Task

WARMUP = 0.05
#: What the monitor writes, beside the measurements.
RECORDING = "monitor.jsonl"
#: The share of the steps whose mean training loss is called the final one.
FINAL_SHARE = 0.05


@dataclass(frozen=True)
class Run:
    """What tells one run from another in a comparison.

    A weight decay of None is the optimizer's default: it is named nowhere, so that one run has
    one key, whether its decay was chosen or never asked for.
    """

    optimizer: str
    lr: float
    seed: int
    weight_decay: float | None = None

    @property
    def key(self) -> str:
        """The run's name on disk."""
        decay = "" if self.weight_decay is None else f"-wd{self.weight_decay!r}"
        return f"{self.optimizer}-lr{self.lr!r}{decay}-seed{self.seed}"

    @property
    def title(self) -> str:
        decay = "" if self.weight_decay is None else f" decay {self.weight_decay:g}"
        return f"{self.optimizer} lr {self.lr:g}{decay} seed {self.seed}"

    def fields(self) -> Record:
        """As a line of measurements begins."""
        named = asdict(self)
        if self.weight_decay is None:
            del named["weight_decay"]
        return named

    def build(self, model: nn.Module) -> Optimizer:
        """The optimizer of this run for ``model``."""
        return get_optimizer(self.optimizer).build(model, self.lr, self.weight_decay)


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

    @property
    def evaluation_steps(self) -> frozenset[int]:
        """Counts of steps after which the model is validated; 0 and the last are among them."""
        count = min(self.evaluations or self.task.evaluations, self.steps)
        return frozenset(round(i * self.steps / count) for i in range(count + 1))


@dataclass(frozen=True)
class Result:
    """The figures of one finished run. Losses in nats per target.

    ``seconds`` is the time of the training steps (batch, forward, backward, optimizer), without
    validation and checkpoints. A diverged run has no final figures. A weight decay of None is the
    optimizer's default.
    """

    optimizer: str
    lr: float
    seed: int
    diverged: bool
    steps: int
    train_loss: float | None
    val_loss: float | None
    accuracy: float | None
    seconds: float
    step_ms: float
    optimizer_ms: float
    weight_decay: float | None = None


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


def loss_of(model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy in nats, and the logits as (targets, classes)."""
    logits = model(x).flatten(0, -2)
    return F.cross_entropy(logits, y.flatten()), logits


def evaluate(model: nn.Module, data: Data) -> tuple[float, float]:
    """Validation loss in nats per target, and the share of right answers."""
    loss = right = count = 0.0
    model.eval()
    with torch.no_grad():
        for x, y in data.validation():
            mean, logits = loss_of(model, x, y)
            loss += mean.item() * y.numel()
            right += (logits.argmax(-1) == y.flatten()).sum().item()
            count += y.numel()
    model.train()
    return loss / count, right / count


def _finite(value: float) -> float | None:
    """JSON has no NaN: a loss that is none is written as null."""
    return value if math.isfinite(value) else None


def warm_up(run: Run, setting: Setting) -> None:
    """One step of a model that is thrown away.

    The first step of a process also pays for late imports and first allocations, seconds that
    belong to no optimizer and would shift its whole curve.
    """
    model = setting.task.build()
    optimizer = run.build(model)
    loss, _ = loss_of(model, *setting.data.batch(run.seed, 0, setting.batch_size))
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()


class Trainer:
    """The state of one run in progress."""

    def __init__(
        self, run: Run, setting: Setting, folder: Path, stop: StopRequest, reporter: Reporter
    ) -> None:
        self.run, self.setting, self.folder = run, setting, folder
        self.stop, self.reporter = stop, reporter
        warm_up(run, setting)
        # The seed alone decides the initial weights, so they are the same for every optimizer.
        torch.manual_seed(generator("weights", run.seed).initial_seed())
        self.model = setting.task.build()
        self.optimizer = run.build(self.model)
        self.peaks = [float(group["lr"]) for group in self.optimizer.param_groups]
        self.step = 0
        self.seconds = 0.0
        folder.mkdir(parents=True, exist_ok=True)
        self.records: list[Record] = []
        self.watched = 0  # bytes of the recording that the checkpoint knows
        self.file = MeasurementFile(folder / "measurements.jsonl", self._resume())
        self.monitor = self._watch()

    # --- going on ---

    @property
    def _checkpoint(self) -> Path:
        return self.folder / "checkpoint.pt"

    def _resume(self) -> int:
        """Take up the checkpoint, if there is a sound one; the length of its measurements."""
        if not self._checkpoint.exists():
            return 0
        # Whatever is wrong with a file shows as any exception at all: the run starts over then.
        try:
            saved: dict[str, Any] = torch.load(self._checkpoint, weights_only=True)
            records = read_records(self.folder / "measurements.jsonl", saved["length"])
            model, optimizer = copy.deepcopy((self.model, self.optimizer))
            model.load_state_dict(saved["model"])
            optimizer.load_state_dict(saved["optimizer"])
            step, seconds, length = int(saved["step"]), float(saved["seconds"]), saved["length"]
            torch.set_rng_state(saved["rng"])
        except Exception as error:
            self.reporter.say(
                f"{self._checkpoint} is damaged ({type(error).__name__}): "
                f"{self.run.title} starts over"
            )
            return 0
        self.model, self.optimizer = model, optimizer
        self.watched = int(saved.get("watched", 0))
        self.step, self.seconds, self.records = step, seconds, records
        return int(length)

    def _watch(self) -> muonkit.Monitor | None:
        """The monitor of muonkit's own optimizers, if asked for; its file as long as it was."""
        if self.setting.monitor is None or not isinstance(self.optimizer, muonkit.Muon):
            return None
        path = self.folder / RECORDING
        if path.exists():
            # The monitor does not wait for the disk: after a power cut there may be less.
            os.truncate(path, min(self.watched, path.stat().st_size))
        return muonkit.Monitor(self.optimizer, self.setting.monitor, path, start=self.step)

    def save(self) -> None:
        """Replace the checkpoint by one of this moment."""
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "rng": torch.get_rng_state(),
            "step": self.step,
            "seconds": self.seconds,
            # Before the state: a checkpoint must never speak of lines that are not on disk.
            "length": self.file.sync(),
            "watched": (self.folder / RECORDING).stat().st_size if self.monitor else 0,
        }
        content = io.BytesIO()
        torch.save(state, content)
        write_atomically(self._checkpoint, content.getvalue())

    # --- training ---

    def train(self) -> Result:
        """Go on to the end, or to divergence.

        Raises:
            Interrupted: the user stopped it; the checkpoint is up to date.
        """
        try:
            return self._train()
        finally:
            self.file.close()
            if self.monitor is not None:
                self.monitor.close()

    def _train(self) -> Result:
        self.reporter.start(self.run.title, self.step, self.setting.steps)
        diverged = False
        if not self.records:
            diverged = not self._evaluate()
        saved = time.monotonic()
        while self.step < self.setting.steps and not diverged:
            diverged = not self._one_step()
            if self.step in self.setting.evaluation_steps and not diverged:
                diverged = not self._evaluate()
            if diverged:
                break  # no checkpoint: it would not know, and the run would go on from NaN
            if self.stop.received:
                self.save()
                raise Interrupted(f"stopped at step {self.step} of {self.run.title}")
            if time.monotonic() - saved >= self.setting.checkpoint_seconds:
                self.save()
                saved = time.monotonic()
        return self._finish(diverged)

    def _one_step(self) -> bool:
        """One step of training; False when its loss is not finite."""
        setting = self.setting
        factor = lr_factor(self.step, setting.steps)
        for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
            group["lr"] = peak * factor
        start = time.perf_counter()
        x, y = setting.data.batch(self.run.seed, self.step, setting.batch_size)
        loss, _ = loss_of(self.model, x, y)
        loss.backward()  # type: ignore[no-untyped-call]
        value = loss.item()
        before = time.perf_counter()
        if math.isfinite(value):
            self.optimizer.step()
        self.optimizer.zero_grad()
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
        loss, right = evaluate(self.model, self.setting.data)
        accuracy = right if self.setting.task.accuracy else None
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
        self.file.sync()
        result = summarise(self.run, self.records, diverged, self.seconds)
        write_json(self.folder / "result.json", asdict(result))
        self._checkpoint.unlink(missing_ok=True)
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


def _finished(folder: Path) -> Result:
    """The result in a run's folder.

    Raises:
        LabError: it is damaged, or its measurements are, or both are of another version.
    """
    try:
        result = Result(**read_json(folder / "result.json"))
        records = read_records(folder / "measurements.jsonl")
        steps = sum(record["kind"] == "train" for record in records)
        figures = (result.train_loss, result.val_loss)
        sound = all(isinstance(x, float) or (x is None and result.diverged) for x in figures)
        if steps != result.steps or not sound:
            raise ValueError(f"{steps} steps measured of {result.steps}, losses {figures}")
    except (OSError, ValueError, TypeError, KeyError, LabError) as error:
        raise LabError(
            f"{folder} is damaged or of another version ({' '.join(str(error).split()):.120}): "
            "delete it, and the same command trains that run again"
        ) from error
    return result


def train(
    run: Run, setting: Setting, folder: Path, stop: StopRequest, reporter: Reporter
) -> Result:
    """The result of ``run``: read from ``folder`` when it is there, else trained (further)."""
    finished = folder / "result.json"
    if finished.exists():
        result = _finished(folder)
        reporter.start(run.title, 0, setting.steps)
        reporter.end("finished earlier")
        return result
    folder.mkdir(parents=True, exist_ok=True)
    # A worker outlives a killed parent by a step or so; meanwhile the run is still its own.
    with Folder(folder).locked():
        return Trainer(run, setting, folder, stop, reporter).train()
