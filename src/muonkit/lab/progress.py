"""What is shown while runs go on: bars on a terminal, plain lines elsewhere."""

from types import TracebackType
from typing import Protocol, Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from muonkit._text import shown


class Reporter(Protocol):
    """Told of everything that happens; nothing it does changes a result."""

    def expect(self, runs: int) -> None:
        """There will be ``runs`` runs in all."""

    def start(self, title: str, step: int, steps: int) -> None:
        """A run begins, or goes on, at ``step``."""

    def advance(self, step: int, loss: float) -> None:
        """A step was done."""

    def evaluated(self, step: int, loss: float, accuracy: float | None) -> None:
        """The validation loss (and share of right answers) after ``step`` steps."""

    def end(self, note: str) -> None:
        """The run is over; ``note`` says how."""

    def say(self, line: str) -> None:
        """A line for the user."""


class Lines:
    """Plain lines, for logs and pipes: one per validation."""

    _title, _steps, _loss = "", 0, float("nan")

    def __init__(self, console: Console) -> None:
        self._console = console

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...

    def expect(self, runs: int) -> None: ...

    def start(self, title: str, step: int, steps: int) -> None:
        self._title, self._steps, self._loss = title, steps, float("nan")
        if step:
            self.say(f"{title}: goes on at step {step}/{steps}")

    def advance(self, step: int, loss: float) -> None:
        self._loss = loss

    def evaluated(self, step: int, loss: float, accuracy: float | None) -> None:
        right = "" if accuracy is None else f", accuracy {accuracy:.2%}"
        train = "" if self._loss != self._loss else f"train loss {self._loss:.4f}, "
        self.say(f"{self._title}: step {step}/{self._steps}, {train}val loss {loss:.4f}{right}")

    def end(self, note: str) -> None:
        self.say(f"{self._title}: {note}")

    def say(self, line: str) -> None:
        self._console.print(shown(line), highlight=False, markup=False, soft_wrap=True)


class Bars(Lines):
    """One bar for all runs and one for the run in progress."""

    def __init__(self, console: Console) -> None:
        super().__init__(console)
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[losses]}", markup=False),
            console=console,
        )
        self._all = self._progress.add_task("all runs", total=0, losses="")
        self._run: TaskID | None = None
        self._val = ""

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def expect(self, runs: int) -> None:
        self._progress.update(self._all, total=runs)

    def start(self, title: str, step: int, steps: int) -> None:
        self._title, self._steps, self._val = title, steps, ""
        self._run = self._progress.add_task(title, total=steps, completed=step, losses="")

    def advance(self, step: int, loss: float) -> None:
        if self._run is not None:
            losses = f"train {loss:.3f}{self._val}"
            self._progress.update(self._run, completed=step, losses=losses)

    def evaluated(self, step: int, loss: float, accuracy: float | None) -> None:
        self._val = f"  val {loss:.3f}" + ("" if accuracy is None else f"  {accuracy:.1%}")

    def end(self, note: str) -> None:
        if self._run is not None:
            self._progress.remove_task(self._run)
            self._run = None
        self._progress.advance(self._all)
        self.say(f"{self._title}: {note}")


def reporter(console: Console) -> Lines:
    """Bars when ``console`` is a terminal, else lines. Use it as a context manager."""
    return Bars(console) if console.is_terminal else Lines(console)
