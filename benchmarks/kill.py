"""Kill one rank of a training at a random moment; the others must end, and a resumed run agree.

    python benchmarks/kill.py --runs 20
    python benchmarks/kill.py --runs 4 --forked --layouts train_fsdp2:2 --json kill.json

Each run starts an example with checkpoints, kills a random rank (SIGKILL: no handler runs, as when
a machine is lost) at a random moment after its first step, and checks that

- every other rank ends by itself, with an error, within --timeout (and ten seconds to exit);
  a rank that was killed when the last checkpoint was written already is killed anew;
- the last checkpoint that carries the name of a whole one can be read, every tensor of it;
- the resumed run ends with the parameters and optimizer state of one never interrupted.

The ranks are started without torchrun, which ends all others itself when one dies: here they have
to notice. "Equal" is bit for bit, in every layout. (DDP is held to one order of sums, by the
example's --same-order. Without it, runs resumed on four ranks were seen to end up to 2e-4 of a
tensor's largest magnitude apart.)
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import random
import re
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import harness
import machine
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

EXAMPLES = Path(__file__).parents[1] / "examples"
LAYOUTS = ",".join(
    (
        "train_ddp --same-order:2",
        "train_fsdp2:2",
        "train_ddp --same-order:4",
        "train_ddp --same-order --reduce-scatter:4",
        "train_fsdp2:4",
        "train_fsdp2_tp:4",
        "train_dp_tp_zero1:4",
    )
)
EXIT_SECONDS = 10.0  # from an error to the end of the process
PRELOADED = [
    "torch.distributed.checkpoint.state_dict",
    "torch.distributed.fsdp",
    "torch.distributed.tensor.parallel",
    "torch.nn.parallel",
    "muonkit.lab.optimizers",
    "muonkit.lab.train",
]
START_SECONDS = 300.0  # imports and data, on a busy machine


@dataclass(frozen=True)
class Outcome:
    """One training, killed and resumed: checked, and equal bit for bit."""

    example: str
    ranks: int
    killed_rank: int
    after_step: int
    exit_codes: list[int]
    seconds_to_end: float
    checkpoint: int


class Failure(Exception):
    """What was promised and did not happen."""


class Forked(multiprocessing.get_context("forkserver").Process):  # type: ignore[misc]
    """A rank that is forked from a process which has imported torch, with the calls of `Popen`."""

    def __init__(self, script: Path, arguments: list[str], environment: dict[str, str], log: Path):
        super().__init__(target=run_script, args=(script, arguments, environment, log))
        self.start()

    def poll(self) -> int | None:
        code: int | None = self.exitcode
        return code

    def wait(self, timeout: float | None = None) -> int:
        self.join(timeout)
        if self.exitcode is None:
            raise subprocess.TimeoutExpired(str(self.name), timeout or 0.0)
        return int(self.exitcode)


def run_script(script: Path, arguments: list[str], environment: dict[str, str], log: Path) -> None:
    """In a forked rank: what ``python script arguments`` does."""
    with log.open("ab") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    os.environ.update(environment)
    sys.argv = [str(script), *arguments]
    sys.path.insert(0, str(script.parent))
    torch.set_num_threads(1)
    runpy.run_path(str(script), run_name="__main__")


def started(
    script: Path, arguments: list[str], environment: dict[str, str], log: Path
) -> subprocess.Popen[bytes]:
    """A rank with an interpreter of its own."""
    with log.open("ab") as output:
        return subprocess.Popen(
            [sys.executable, str(script), *arguments],
            env={**os.environ, **environment},
            stdout=output,
            stderr=subprocess.STDOUT,
        )


class Ranks:
    """The processes of one training, without an agent that would end them together."""

    def __init__(self, command: list[str], count: int, log: Path, forked: bool) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.log = log
        self.processes: list[Any] = []
        for rank in range(count):
            environment = {
                "RANK": str(rank),
                "WORLD_SIZE": str(count),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "OMP_NUM_THREADS": "1",
            }
            script = EXAMPLES / f"{command[0]}.py"
            own_log = log.with_suffix(f".{rank}")
            own_log.touch()
            start = Forked if forked else started
            self.processes.append(start(script, command[1:], environment, own_log))

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.kill()
            process.wait()

    def output(self, rank: int) -> str:
        return self.log.with_suffix(f".{rank}").read_text(errors="replace")

    def wait_for_step(self, step: int) -> None:
        """Until rank 0 has printed that step's loss."""
        deadline = time.monotonic() + START_SECONDS
        while not re.search(rf"^step +{step} ", self.output(0), re.MULTILINE):
            if time.monotonic() > deadline or any(p.poll() is not None for p in self.processes):
                raise Failure(f"step {step} was never reached:\n{self.tails()}")
            time.sleep(0.002)

    def wait(self, seconds: float) -> list[int]:
        """The exit codes."""
        deadline = time.monotonic() + seconds
        try:
            return [p.wait(max(0.0, deadline - time.monotonic())) for p in self.processes]
        except subprocess.TimeoutExpired as error:
            alive = [rank for rank, p in enumerate(self.processes) if p.poll() is None]
            raise Failure(
                f"ranks {alive} still run after {seconds:.0f} s:\n{self.tails()}"
            ) from error

    def tails(self) -> str:
        return "\n".join(f"rank {r}: {self.output(r)[-800:]}" for r in range(len(self.processes)))


def read(checkpoint: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint, whole, by name; an exception when a part is missing."""
    entries = FileSystemReader(checkpoint).read_metadata().state_dict_metadata.items()
    tensors = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in entries
        if isinstance(entry, TensorStorageMetadata)
    }
    dcp.load(tensors, checkpoint_id=checkpoint, no_dist=True)
    return tensors


def last_checkpoint(folder: Path) -> Path | None:
    """The newest folder with the name of a whole checkpoint."""
    whole = sorted(p for p in folder.glob("step-*") if re.fullmatch(r"step-\d+", p.name))
    return whole[-1] if whole else None


def deviation(
    found: dict[str, Tensor], expected: dict[str, Tensor], start: str
) -> tuple[float, str]:
    """Largest difference of the tensors named ``start``..., of each one's magnitude, and where."""
    names = [name for name in expected if name.startswith(start)]
    if found.keys() != expected.keys() or not names:
        raise Failure(f"other tensors: {sorted(found.keys() ^ expected.keys()) or start}")
    apart = []
    for name in names:
        a, b = found[name].double(), expected[name].double()
        if not bool(torch.isfinite(a).all()):
            raise Failure(f"{name} is not finite")
        scale = b.abs().max().clamp(min=torch.finfo(torch.float64).tiny)
        apart.append((float((a - b).abs().max() / scale), name))
    return max(apart)


class Training:
    """One example at one number of ranks, and its run that was never interrupted."""

    def __init__(self, example: str, count: int, options: argparse.Namespace, work: Path) -> None:
        self.example, self.count, self.options = example, count, options
        self.work = work / f"{example}-{count}"
        self.work.mkdir()
        whole = self.work / "whole"
        with self._start(whole) as ranks:
            ranks.wait_for_step(1)
            first = time.monotonic()
            ranks.wait_for_step(options.steps)
            self.step_seconds = (time.monotonic() - first) / (options.steps - 1)
            self._finish(ranks)
        self.expected = self._final(whole)

    def _start(self, folder: Path, *more: str) -> Ranks:
        o = self.options
        arguments = f"--steps {o.steps} --batch {o.batch} --every 1 --save-every {o.save_every}"
        arguments += f" --timeout {o.timeout}"
        return Ranks(
            [*self.example.split(), *arguments.split(), "--checkpoint", str(folder), *more],
            self.count,
            folder.with_name(folder.name + "".join(more) + ".log"),
            o.forked,
        )

    @staticmethod
    def _finish(ranks: Ranks) -> None:
        codes = ranks.wait(START_SECONDS)
        if any(codes):
            raise Failure(f"exit codes {codes}:\n{ranks.tails()}")

    def _final(self, folder: Path) -> dict[str, Tensor]:
        last = last_checkpoint(folder)
        if last is None or last.name != f"step-{self.options.steps:06}":
            raise Failure(f"the last checkpoint is {last}, expected step {self.options.steps}")
        return read(last)

    def kill_and_resume(self, number: int, draw: random.Random) -> Outcome:
        """One run; drawn again when all was done before the rank could be killed."""
        for attempt in itertools.count():
            folder = self.work / f"run-{number}-{attempt}"
            victim, step = draw.randrange(self.count), draw.randrange(1, self.options.steps - 1)
            codes, seconds = self._killed(folder, victim, step, draw.uniform(0, self.step_seconds))
            saved = self._sound(folder)
            if saved < self.options.steps:
                break
        if codes[victim] != -signal.SIGKILL or not all(codes):
            raise Failure(f"rank {victim} was killed, and the exit codes are {codes}")
        with self._start(folder, "--resume") as ranks:
            self._finish(ranks)
            going_on = f"going on from {folder / f'step-{saved:06}'}" in ranks.output(0)
            if going_on != (saved > 0):
                raise Failure(f"with checkpoint {saved}, the resumed run printed:\n{ranks.tails()}")
        found = self._final(folder)
        parameters, state = (
            deviation(found, self.expected, start) for start in ("model.", "optimizer.")
        )
        if parameters[0] or state[0]:
            raise Failure(f"the resumed run differs, relatively: {parameters}, {state}")
        return Outcome(self.example, self.count, victim, step, codes, round(seconds, 2), saved)

    def _killed(
        self, folder: Path, victim: int, step: int, delay: float
    ) -> tuple[list[int], float]:
        """The exit codes, and the seconds until the last of the other ranks had ended."""
        with self._start(folder) as ranks:
            ranks.wait_for_step(step)
            time.sleep(delay)
            ranks.processes[victim].kill()
            killed = time.monotonic()
            codes = ranks.wait(self.options.timeout + EXIT_SECONDS)
            return codes, time.monotonic() - killed

    def _sound(self, folder: Path) -> int:
        """The step of the last checkpoint, which was read; 0 when there is none yet."""
        last = last_checkpoint(folder)
        if last is None:
            return 0
        step = int(last.name.removeprefix("step-"))
        inside = int(read(last)["step"])
        if inside != step:
            raise Failure(f"{last} holds step {inside}")
        return step


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--runs", type=int, default=20, help="killed trainings, dealt over the layouts (20)")
    add("--layouts", default=LAYOUTS, help=f"EXAMPLE [OPTIONS]:RANKS,... ({LAYOUTS})")
    add("--steps", type=int, default=12, help="steps of a training (12)")
    add("--save-every", type=int, default=2, help="steps between checkpoints (2)")
    add("--batch", type=int, default=4, help="windows per step (4)")
    add("--timeout", type=float, default=30.0, help="of the process group, seconds (30)")
    add("--seed", type=int, default=0, help="of the moments and the ranks (0)")
    add("--forked", action="store_true", help="ranks forked from one process: seconds less for "
        "each, but they end without the interpreter's last steps")  # fmt: skip
    add("--json", type=Path, help="write the outcomes there")
    options = parser.parse_args()
    if options.steps < 3:
        parser.error(f"--steps {options.steps}: at least 3, a rank is killed between two of them")
    return options


def outcomes(options: argparse.Namespace, work: Path) -> Iterator[Outcome]:
    """The runs, one after another; ``Failure`` at the first that breaks a promise."""
    draw = random.Random(options.seed)
    layouts = [entry.rsplit(":", 1) for entry in options.layouts.split(",")]
    trainings: dict[int, Training] = {}
    for number in range(options.runs):
        which = number % len(layouts)
        if which not in trainings:
            example, count = layouts[which]
            trainings[which] = Training(example, int(count), options, work)
        yield trainings[which].kill_and_resume(number, draw)


def main() -> None:
    options = parse()
    warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)  # as meant
    done: list[Outcome] = []
    if options.forked:
        multiprocessing.get_context("forkserver").set_forkserver_preload(PRELOADED)
    print(f"{'example':40} ranks  killed  after step  exit codes      s to end  checkpoint")
    with tempfile.TemporaryDirectory() as work:
        try:
            for o in outcomes(options, Path(work)):
                done.append(o)
                print(
                    f"{o.example:40} {o.ranks:5} {o.killed_rank:7} {o.after_step:11}  "
                    f"{' '.join(map(str, o.exit_codes)):14} {o.seconds_to_end:9.1f} "
                    f"{o.checkpoint:11}",
                    flush=True,
                )
        except Failure as failure:
            raise SystemExit(f"FAILED in run {len(done) + 1}: {failure}") from failure
    slowest = max(o.seconds_to_end for o in done)
    print(
        f"{len(done)} runs: all other ranks ended with an error within {slowest:.1f} s, every "
        "checkpoint was whole, every resumed run was equal bit for bit"
    )
    if options.json:
        facts = machine.facts() | {"threads": 1}  # of each rank
        record = {"kind": "kill", "machine": facts, "runs": [asdict(o) for o in done]}
        harness.write(options.json, record)


if __name__ == "__main__":
    main()
