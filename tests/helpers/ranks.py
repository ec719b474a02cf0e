"""Run test cases on several ranks: one group of processes per world size, many cases in it.

A *case* is a module-level function without arguments (or a `functools.partial` of one) that every
rank runs; it may use `torch.distributed` at once. A test module registers its cases in `CASES` and
reads what became of them, each as a test of its own, from the fixture `ranks` (tests/conftest.py)::

    CASES = Cases()

    @CASES.on(2, 4, dtype=["float32", "bfloat16"])
    def sums(dtype: str) -> None:
        ...

    @pytest.mark.parametrize(("world_size", "case"), CASES.ids())
    def test_on_ranks(world_size, case, ranks):
        ranks.outcome(world_size, case).check()

The processes of a module end with it: what a case leaves behind (process groups that one rank made
and another did not, what a framework keeps) would be met by the cases of another module.

Nothing here waits for ever: when a case has not ended in time, or goes on for `grace` seconds after
another rank raised or died, the Python stacks of the ranks that are still in it are reported and
all are killed. What would have followed in that group is reported as not run, with the reason.
"""

from __future__ import annotations

import contextlib
import faulthandler
import fcntl
import functools
import itertools
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
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
import torch.distributed as dist

from tests.helpers.warm import CONTEXT, preload

Case = Callable[[], Any]
T = TypeVar("T")

# Forked from a process that has imported torch once: a fresh interpreter takes 4 s of CPU per rank
# to import these, a fork 10 ms. No thread runs in that process and no group is made in it.


@dataclass(frozen=True)
class Outcome:
    """What became of a case, by rank.

    Attributes:
        values: what each rank returned; None where it did not.
        errors: each rank's traceback, or why there is none; None where the case ended well.
        poisoned: whether the ranks are no longer in step, so that nothing can follow.
    """

    name: str
    values: tuple[Any, ...]
    errors: tuple[str | None, ...]
    poisoned: bool = False

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


class CaseName(str):
    """The name of a case, with the function and the values that it is made of."""

    function: str
    values: dict[str, Any]

    def __new__(cls, function: str, values: dict[str, Any]) -> CaseName:
        name = super().__new__(cls, "-".join([function, *map(str, values.values())]))
        name.function, name.values = function, values
        return name

    def __getnewargs__(self) -> tuple[str, dict[str, Any]]:  # type: ignore[override]
        return self.function, self.values


class Cases:
    """The cases of a test module, by world size and name.

    Args:
        timeout: seconds that one case may take.
        needs: a package without which the module is skipped.
    """

    def __init__(self, *, timeout: float = 120.0, needs: str | None = None) -> None:
        self.timeout, self.needs = timeout, needs
        self.by_world_size: dict[int, dict[CaseName, Case]] = {}

    def on(self, *world_sizes: int, **grid: Sequence[Any]) -> Callable[[Any], Any]:
        """Register a function for these world sizes, once for every combination of `grid`."""

        def register(function: Callable[..., Any]) -> Callable[..., Any]:
            for size, values in itertools.product(world_sizes, itertools.product(*grid.values())):
                arguments = dict(zip(grid, values, strict=True))
                name = CaseName(function.__name__, arguments)
                cases = self.by_world_size.setdefault(size, {})
                assert name not in cases, f"two cases are called {name!r}"
                cases[name] = functools.partial(function, **arguments)
            return function

        return register

    def ids(self) -> list[tuple[int, CaseName]]:
        return [(size, name) for size, cases in self.by_world_size.items() for name in cases]


class Ranks:
    """The outcomes of a module's cases: those selected are run when the first is asked for.

    With pytest-xdist one worker runs them, and the others wait for its outcomes and read them.
    """

    def __init__(
        self, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
    ) -> None:
        self._factory, self._module = tmp_path_factory, request.module.__name__
        self._cases: Cases = request.module.CASES
        if self._cases.needs is not None:
            pytest.importorskip(self._cases.needs)
        self._outcomes: dict[int, dict[str, Outcome]] = {}
        self._selected = {
            (params.get("world_size"), params.get("case"))
            for item in request.session.items
            if getattr(item, "module", None) is request.module
            and (params := getattr(getattr(item, "callspec", None), "params", None))
        }

    def outcome(self, world_size: int, case: str) -> Outcome:
        if world_size not in self._outcomes:
            self._outcomes[world_size] = self._all(world_size)
        return self._outcomes[world_size][case]

    def _all(self, world_size: int) -> dict[str, Outcome]:
        cases = {
            name: case
            for name, case in self._cases.by_world_size[world_size].items()
            if (world_size, name) in self._selected
        }
        name = f"{self._module}-{world_size}"
        timeout = self._cases.timeout
        return once(self._factory, name, lambda: run(world_size, cases, timeout=timeout))


def once(tmp_path_factory: pytest.TempPathFactory, name: str, make: Callable[[], T]) -> T:
    """What `make` returns: called by one of the pytest workers, read by the others."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    path = shared / f"{name}.pickle"
    with open(shared / "ranks.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            path.write_bytes(pickle.dumps(make()))
    value: T = pickle.loads(path.read_bytes())
    return value


def run(
    world_size: int,
    cases: Mapping[str, Case] | Sequence[Case],
    *,
    timeout: float = 120.0,
    grace: float = 5.0,
    init: bool = True,
) -> dict[str, Outcome]:
    """Run the cases, one after the other, on `world_size` ranks that speak gloo.

    Args:
        cases: by name, or functions that have one.
        init: False for a process that knows nothing of ranks.
        timeout: seconds that one case may take.
        grace: seconds that the other ranks have to end a case that one rank left by an error.
    """
    if not isinstance(cases, Mapping):
        cases = {case.__name__: case for case in cases}
    outcomes: dict[str, Outcome] = {}
    reason = ""
    assert init or world_size == 1
    with _Processes(world_size, init) as processes:
        for name, case in cases.items():
            if reason:
                errors = (f"not run: {reason}\n",) * world_size
                outcomes[name] = Outcome(name, (None,) * world_size, errors)
                continue
            outcomes[name] = outcome = processes.run(name, case, timeout, grace)
            if not outcome.ok and not outcome.poisoned and init:
                # All ranks raised. That they did so at the same point is to be seen.
                outcome = processes.run(f"after {name}", _in_step, grace, grace)
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
        preload()
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

    def run(self, name: str, case: Case, timeout: float, grace: float) -> Outcome:
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
                if rank in lost or answers[rank][1] is not None:
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
    from torch.multiprocessing import _prctl_pr_set_pdeathsig

    with contextlib.suppress(Exception):
        _prctl_pr_set_pdeathsig(signal.SIGKILL)


@contextlib.contextmanager
def shared_folder() -> Iterator[Path]:
    """A new folder for all ranks, that is there until all of them have left it."""
    with contextlib.ExitStack() as stack:
        name: list[Any] = [None]
        if dist.get_rank() == 0:
            name = [stack.enter_context(tempfile.TemporaryDirectory(prefix="shared-"))]
        dist.broadcast_object_list(name, src=0)
        yield Path(name[0])
        dist.barrier()


@contextlib.contextmanager
def counted_collectives() -> Iterator[list[tuple[str, int]]]:
    """The name and the bytes *sent* of every collective that this rank calls inside.

    A rank's own part of an exchange is not counted: it leaves no rank.
    """
    calls: list[tuple[str, int]] = []
    originals = {name: getattr(dist, name) for name in _SENT}

    def counting(name: str) -> Callable[..., Any]:
        @functools.wraps(originals[name])
        def call(*args: Any, **kwargs: Any) -> Any:
            calls.append((name, _SENT[name](*args, **kwargs)))
            return originals[name](*args, **kwargs)

        return call

    try:
        for name in _SENT:
            setattr(dist, name, counting(name))
        yield calls
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)


def _sent_all_to_all(
    output: torch.Tensor,
    input: torch.Tensor,
    output_split_sizes: list[int] | None = None,
    input_split_sizes: list[int] | None = None,
    group: dist.ProcessGroup | None = None,
    async_op: bool = False,
) -> int:
    size, me = dist.get_world_size(group), dist.get_rank(group)
    row = input[0].numel() * input.element_size() if len(input) else 0
    splits = input_split_sizes or [len(input) // size] * size
    return row * (sum(splits) - splits[me])


def _sent_all_gather(
    output: torch.Tensor,
    input: torch.Tensor,
    group: dist.ProcessGroup | None = None,
    async_op: bool = False,
) -> int:
    return input.numel() * input.element_size() * (dist.get_world_size(group) - 1)


def _sent_reduce_scatter(
    output: torch.Tensor,
    input: torch.Tensor,
    op: Any = None,
    group: dist.ProcessGroup | None = None,
    async_op: bool = False,
) -> int:
    return output.numel() * output.element_size() * (dist.get_world_size(group) - 1)


# By every name that this torch has: 2.13 renamed the last two and warns of the old names.
_SENT: dict[str, Callable[..., int]] = {
    name: sent
    for name, sent in {
        "all_to_all_single": _sent_all_to_all,
        "all_gather_into_tensor": _sent_all_gather,
        "all_gather_single": _sent_all_gather,
        "reduce_scatter_tensor": _sent_reduce_scatter,
        "reduce_scatter_single": _sent_reduce_scatter,
    }.items()
    if hasattr(dist, name)
}
