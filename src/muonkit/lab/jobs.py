"""Several runs of a comparison at a time, each in a process of its own.

A process has its own random numbers, threads and data, so its losses are those it has alone. Its
seconds are not: the processes share memory and caches.
"""

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any, Self

import torch
from rich.console import Console

from muonkit.lab.errors import Interrupted, LabError, RunError
from muonkit.lab.objective import Place
from muonkit.lab.progress import Lines, Reporter
from muonkit.lab.saved import Result
from muonkit.lab.store import Folder
from muonkit.lab.tasks import get_task
from muonkit.lab.train import Run, Setting, StopRequest, train

#: How often a worker looks whether it should stop, and its parent whether it was told to.
_SECONDS = 0.1


@dataclass(frozen=True)
class _Recipe:
    """A setting without its data, which every process loads for itself."""

    task: str
    steps: int
    batch_size: int
    checkpoint_seconds: float
    evaluations: int | None
    monitor: int | None
    device: str
    source: str | None
    read: str | None  # the source as it was read, of which `source` may be a later edition
    fingerprint: str
    rules: tuple[str, ...]
    threads: int

    def setting(self) -> Setting:
        torch.set_num_threads(self.threads)
        task = get_task(self.task)
        if task.source != self.read:
            raise LabError(f"{self.task} was edited meanwhile: give the command again")
        data = task.load()
        if data.fingerprint != self.fingerprint:
            raise LabError(f"the data of {self.task} changed meanwhile: give the command again")
        return Setting(
            task,
            data,
            self.steps,
            self.batch_size,
            self.checkpoint_seconds,
            self.evaluations,
            self.monitor,
            Place(self.device),
            self.source,
            self.rules,
        )


class _Notes(Lines):
    """What a run has to say, kept until it is over; its progress is not."""

    def __init__(self) -> None:
        super().__init__(Console(quiet=True))
        self.said: list[str] = []
        self.note = ""

    def evaluated(self, step: int, loss: float, accuracy: float | None) -> None: ...

    def end(self, note: str) -> None:
        self.note = note

    def say(self, line: str) -> None:
        self.said.append(line)


class _Worker:
    """What a process keeps from run to run."""

    def __init__(self, told: Event) -> None:
        self.told = told
        self.stop = StopRequest()
        self.busy = threading.Lock()
        self.setting: Setting | None = None
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        """Stop the run when told to, and end when there is no parent any more."""
        parent = multiprocessing.parent_process()
        while parent is not None and parent.is_alive():
            self.stop.received = self.told.is_set()
            time.sleep(_SECONDS)
        self.stop.received = True
        with self.busy:  # the run stops at the end of its step, with a checkpoint
            os._exit(1)

    def train(self, run: Run, recipe: _Recipe, folder: Path) -> tuple[Result, _Notes]:
        with self.busy:
            if self.told.is_set():
                raise Interrupted(f"stopped before {run.title}")
            self.setting = self.setting or recipe.setting()
            notes = _Notes()
            return train(run, self.setting, folder, self.stop, notes), notes


_worker: _Worker


def _begin(told: Event, folder: str) -> None:
    """Once in every process."""
    global _worker
    os.chdir(folder)  # relative names, of the user's task and of --out, are as in the parent
    # Ctrl-C reaches every process of a terminal's group; what it means, the parent alone decides.
    if hasattr(os, "setpgrp"):
        os.setpgrp()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _worker = _Worker(told)


def _train(run: Run, recipe: _Recipe, folder: Path) -> tuple[Result, list[str], str]:
    result, notes = _worker.train(run, recipe, folder)
    return result, notes.said, notes.note


@contextmanager
def _deaf() -> Iterator[None]:
    """Processes that begin in this block do not hear Ctrl-C, from their first moment on; this one
    hears at the block's end what was sent meanwhile.
    """
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class Workers:
    """Processes that train the runs of one comparison. Use it as a context manager."""

    def __init__(self, jobs: int, setting: Setting, folder: Folder, stop: StopRequest) -> None:
        self.folder, self.stop = folder, stop
        self.recipe = _Recipe(
            setting.task.name,
            setting.steps,
            setting.batch_size,
            setting.checkpoint_seconds,
            setting.evaluations,
            setting.monitor,
            setting.place.device,
            setting.source,
            setting.task.source,
            setting.data.fingerprint,
            setting.rules,
            torch.get_num_threads(),
        )
        # Not a fork of this process: torch's threads do not survive it. But of one that has only
        # imported torch, which takes seconds: once, and not in each of them.
        forks = "forkserver" in multiprocessing.get_all_start_methods()
        context: Any = multiprocessing.get_context("forkserver" if forks else "spawn")
        if forks:
            context.set_forkserver_preload([__name__])
        self._told = context.Event()
        self._pool = ProcessPoolExecutor(jobs, context, _begin, (self._told, os.getcwd()))
        self._steps = setting.steps

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._told.set()
        self._pool.shutdown(cancel_futures=True)

    def train(self, runs: Sequence[Run], reporter: Reporter) -> list[Result]:
        """The results of ``runs``, in their order.

        Raises:
            Interrupted: the user stopped it; every run in progress has its checkpoint.
            RunError: a process died.
            LabError: what a run raised.
        """
        with _deaf():  # they import torch for seconds before `_begin`
            waiting = {
                self._pool.submit(_train, run, self.recipe, self.folder.run(run.key)): run
                for run in runs
            }
        results: dict[Run, Result] = {}
        while waiting:
            done, _ = wait(waiting, timeout=_SECONDS, return_when=FIRST_COMPLETED)
            if self.stop.received:
                self._told.set()
            for future in done:
                run = waiting.pop(future)
                try:
                    results[run], said, note = future.result()
                except BrokenProcessPool as error:
                    raise RunError(
                        "a process of --jobs was killed, perhaps for want of memory: the same "
                        "command goes on from the last checkpoints"
                    ) from error
                for line in said:
                    reporter.say(line)
                reporter.start(run.title, 0, self._steps)
                reporter.end(note)
        if self.stop.received:
            raise Interrupted(f"stopped after {len(runs)} runs")
        return [results[run] for run in runs]
