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

The processes are those of muonkit.testing.ranks: a case that does not end is killed, with every
rank's stack shown.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import itertools
import os
import pickle
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
import torch.distributed as dist

from muonkit.testing import ranks
from muonkit.testing.ranks import Case, Outcome
from tests.helpers.warm import preload

__all__ = [
    "CaseName",
    "Cases",
    "Outcome",
    "Ranks",
    "counted_collectives",
    "once",
    "run",
    "shared_folder",
]

T = TypeVar("T")

# With what all tests' processes have.
run = functools.partial(ranks.run, preload=preload)


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
