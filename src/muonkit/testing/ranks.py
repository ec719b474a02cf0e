"""Processes that speak gloo, one for each rank, in which functions are run one after the other.

A *case* is a module-level function without arguments (or a `functools.partial` of one) that every
rank runs; it may use `torch.distributed` at once.

Nothing here waits for ever: when a case has not ended in time, or goes on for `grace` seconds after
another rank raised or died, the Python stacks of the ranks that are still in it are reported and
all are killed. What would have followed in that group is reported as not run, with the reason.
"""

from __future__ import annotations

import contextlib
import faulthandler
import multiprocessing
import multiprocessing.connection
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
import torch.distributed as dist

__all__ = ["Case", "Outcome", "preload", "run"]

Case: TypeAlias = Callable[[], Any]

# Where the system has it, forked from a process that has imported torch once: a fresh interpreter
# takes 4 s of CPU per rank to import these, a fork 10 ms. No thread runs in that process and no
# group is made in it.
_METHOD = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
CONTEXT: Any = multiprocessing.get_context(_METHOD)


def preload() -> None:
    """What every process has that is begun after this; before the first one."""
    if _METHOD == "forkserver":
        CONTEXT.set_forkserver_preload(["torch.distributed.tensor", "muonkit.testing"])


@dataclass(frozen=True)
class Outcome:
    """What became of a case, by rank.

    Attributes:
        values: what each rank returned; None where it did not.
        errors: each rank's traceback, or why there is none; None where the case ended well.
        poisoned: whether the ranks are no longer in step, so that nothing can follow.
        ran: whether it was begun.
    """

    name: str
    values: tuple[Any, ...]
    errors: tuple[str | None, ...]
    poisoned: bool = False
    ran: bool = True

    @property
    def ok(self) -> bool:
        return all(error is None for error in self.errors)

    def report(self) -> str:
        """The errors, with equal ones told once."""
        ranks: dict[str, list[int]] = {}
        for rank, error in enumerate(self.errors):
            ranks.setdefault(error or "ended well\n", []).append(rank)
        parts = [f"case {self.name!r} on {len(self.errors)} ranks"]
        parts += [f"--- rank {', '.join(map(str, who))}: {what}" for what, who in ranks.items()]
        return "\n".join(parts)

    def check(self) -> tuple[Any, ...]:
        """The values of all ranks.

        Raises:
            AssertionError: the case failed on a rank; the message has every rank's error.
        """
        __tracebackhide__ = True
        if not self.ok:
            raise AssertionError(self.report())
        return self.values


def run(
    world_size: int,
    cases: Mapping[str, Case] | Sequence[Case],
    *,
    timeout: float = 120.0,
    grace: float = 5.0,
    init: bool = True,
    preload: Callable[[], None] = preload,
    failed: Callable[[Any], bool] = lambda value: False,
) -> dict[str, Outcome]:
    """Run the cases, one after the other, on `world_size` ranks that speak gloo.

    Args:
        cases: by name, or functions that have one.
        init: False for a process that knows nothing of ranks.
        timeout: seconds that one case may take.
        grace: seconds that the other ranks have to end a case that one rank left by an error.
        preload: called before the processes are begun.
        failed: whether a value says that a rank left the case by an error.
    """
    if not isinstance(cases, Mapping):
        cases = {case.__name__: case for case in cases}
    outcomes: dict[str, Outcome] = {}
    reason = ""
    assert init or world_size == 1
    preload()
    with _Processes(world_size, init) as processes:
        for name, case in cases.items():
            if reason:
                errors = (f"not run: {reason}\n",) * world_size
                outcomes[name] = Outcome(name, (None,) * world_size, errors, ran=False)
                continue
            outcomes[name] = outcome = processes.run(name, case, timeout, grace, failed)
            if not outcome.ok and not outcome.poisoned and init:
                # All ranks raised. That they did so at the same point is to be seen.
                outcome = processes.run(f"after {name}", _in_step, grace, grace, failed)
            if not outcome.ok and outcome.poisoned:
                reason = f"case {name!r} left the ranks out of step"
    return outcomes


def _in_step() -> None:
    total = torch.ones(())
    dist.all_reduce(total)
    assert total == dist.get_world_size()


class _Processes:
    """The processes of one group, seen from the test: one pipe, log and stack file for each."""

    def __init__(self, world_size: int, init: bool = True) -> None:
        self.world_size, self._init = world_size, init
        self._told: dict[Path, int] = {}

    def __enter__(self) -> _Processes:
        self._folder = tempfile.TemporaryDirectory(prefix="ranks-")
        self._path = Path(self._folder.name)
        self._pipes, self._processes = [], []
        for rank in range(self.world_size):
            ours, theirs = CONTEXT.Pipe()
            process = CONTEXT.Process(
                target=_serve,
                args=(rank, self.world_size, self._path, theirs, self._init),
                daemon=True,
            )
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)
        return self

    def __exit__(self, *exception: object) -> None:
        for pipe in self._pipes:
            pipe.close()  # an idle rank ends by itself
        deadline = time.monotonic() + (0.0 if any(exception) else 2.0)
        for process in self._processes:
            process.join(max(0.0, deadline - time.monotonic()))
            process.kill()
            process.join()
        self._folder.cleanup()

    def run(
        self,
        name: str,
        case: Case,
        timeout: float,
        grace: float,
        failed: Callable[[Any], bool],
    ) -> Outcome:
        deadline = time.monotonic() + timeout
        self._told = {path: path.stat().st_size for path in self._path.glob("*[0-9]")}
        answers: dict[int, tuple[Any, str | None]] = {}
        lost: dict[int, str] = {}
        request = pickle.dumps(case)
        for rank, pipe in enumerate(self._pipes):
            try:
                pipe.send_bytes(request)
            except OSError:
                lost[rank] = self._death(rank)
        while len(answers) + len(lost) < self.world_size:
            waiting = [r for r in range(self.world_size) if r not in answers and r not in lost]
            ready = multiprocessing.connection.wait(
                [self._pipes[r] for r in waiting], max(0.0, deadline - time.monotonic())
            )
            if not ready:
                lost |= self._stacks(waiting, timeout)
            for rank in (r for r in waiting if self._pipes[r] in ready):
                try:
                    answers[rank] = pickle.loads(self._pipes[rank].recv_bytes())
                except (EOFError, OSError):
                    lost[rank] = self._death(rank)
                value, error = answers.get(rank, (None, None))
                if rank in lost or error is not None or failed(value):
                    deadline = min(deadline, time.monotonic() + grace)
        values = tuple(answers.get(rank, (None, None))[0] for rank in range(self.world_size))
        errors = tuple(
            lost[rank] if rank in lost else answers[rank][1] for rank in range(self.world_size)
        )
        poisoned = bool(lost) or 0 < sum(error is not None for error in errors) < self.world_size
        return Outcome(name, values, errors, poisoned)

    def _death(self, rank: int) -> str:
        process = self._processes[rank]
        process.join(5.0)
        code = process.exitcode
        how = (
            f"killed by {signal.Signals(-code).name}" if code and code < 0 else f"exit code {code}"
        )
        return f"the process died ({how})\n{self._new('stack', rank)}{self._new('log', rank)}"

    def _new(self, kind: str, rank: int) -> str:
        """What this rank has written since the case began."""
        path = self._path / f"{kind}{rank}"
        if not path.exists():  # it never got so far: its main module could not be imported anew
            return "" if kind == "log" else "it died before it had begun\n"
        return path.read_bytes()[self._told.get(path, 0) :].decode(errors="replace")

    def _stacks(self, ranks: list[int], seconds: float) -> dict[int, str]:
        """What these ranks are doing; they are killed after it, since nothing can follow."""
        for rank in ranks:
            with contextlib.suppress(ProcessLookupError, TypeError):
                os.kill(self._processes[rank].pid, signal.SIGUSR1)
        time.sleep(0.5)  # the handler writes at once, in C, whatever the rank waits for
        stacks = {rank: self._new("stack", rank) for rank in ranks}
        for rank in ranks:
            self._processes[rank].kill()
        return {
            rank: f"still running after {seconds:g} s, or when another rank had failed:\n{stack}"
            for rank, stack in stacks.items()
        }


def _serve(
    rank: int,
    world_size: int,
    path: Path,
    pipe: multiprocessing.connection.Connection,
    init: bool,
) -> None:
    """The life of a rank: receive a case, run it, answer with its value or its traceback."""
    _die_with_parent()
    stacks = open(path / f"stack{rank}", "w")  # noqa: SIM115 (faulthandler needs it for ever)
    faulthandler.enable(stacks)
    faulthandler.register(signal.SIGUSR1, stacks, all_threads=True)
    with open(path / f"log{rank}", "w") as log:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(log.fileno(), stream.fileno())
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # a host name may not resolve
    torch.set_num_threads(1)
    if init:
        dist.init_process_group(
            "gloo", init_method=f"file://{path}/rendezvous", rank=rank, world_size=world_size
        )
    while True:
        try:
            request = pipe.recv_bytes()
        except (EOFError, OSError):
            # Not by way of the interpreter's end: that may wait for the other ranks.
            os._exit(0)
        pipe.send_bytes(pickle.dumps(_attempt(request)))


def _attempt(request: bytes) -> tuple[Any, str | None]:
    torch.manual_seed(0)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            # torch 2.9's own checkpoints warn of themselves.
            warnings.filterwarnings("ignore", "TypedStorage is deprecated", UserWarning)
            # torch 2.9 warns so of tensors that its own weak references outlive.
            warnings.filterwarnings("ignore", "Deallocating Tensor that still", UserWarning)
            value = pickle.loads(request)()
            pickle.dumps(value)
    # pytest's own failures are no Exceptions.
    except BaseException:
        return None, traceback.format_exc()
    return value, None


def _die_with_parent() -> None:
    """A test process that is killed takes the ranks with it (where the system can)."""
    import ctypes

    if sys.platform == "linux":
        set_signal_of_parents_death = 1
        ctypes.CDLL(None).prctl(set_signal_of_parents_death, signal.SIGKILL)
