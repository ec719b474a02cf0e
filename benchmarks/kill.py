"""Kill one rank of a training at a random moment; the others must end, and a resumed run agree.

    python benchmarks/kill.py --runs 20
    python benchmarks/kill.py --runs 4 --layouts train_fsdp2:2 --json kill.json

Each run starts an example with checkpoints, kills a random rank (SIGKILL: no handler runs, as when
a machine is lost) at a random moment after its first step, and checks that

- every other rank ends by itself, with an error, within --timeout (and ten seconds to exit);
- the last checkpoint that carries the name of a whole one can be read, every tensor of it;
- the resumed run ends with the parameters and optimizer state of one never interrupted.

The ranks are started without torchrun, which ends all others itself when one dies: here they have
to notice. "Equal" is bit for bit where sums over ranks have one order. DDP's have not: its first
step after a start sums in other buckets than the later ones, which among three or more ranks is
another order. There the largest deviation, relative to the tensor's largest magnitude, is held to
--tolerance. Both are printed.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

EXAMPLES = Path(__file__).parents[1] / "examples"
LAYOUTS = "train_ddp:2,train_fsdp2:2,train_dp_tp_zero1:2,train_ddp:4,train_fsdp2_tp:4"
EXIT_SECONDS = 10.0  # from an error to the end of the process
START_SECONDS = 300.0  # imports and data, on a busy machine


@dataclass(frozen=True)
class Outcome:
    """One killed and resumed training. ``deviation`` is relative, 0 where equal bit for bit."""

    example: str
    ranks: int
    killed_rank: int
    after_step: int
    exit_codes: list[int]
    seconds_to_end: float
    checkpoint: int
    parameter_deviation: float
    state_deviation: float


class Failure(Exception):
    """What was promised and did not happen."""


class Ranks:
    """The processes of one training, without an agent that would end them together."""

    def __init__(self, example: str, count: int, arguments: list[str], log: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.log = log
        self.processes = []
        for rank in range(count):
            environment = {
                **os.environ,
                "RANK": str(rank),
                "WORLD_SIZE": str(count),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "OMP_NUM_THREADS": "1",
            }
            with log.with_suffix(f".{rank}").open("wb") as output:
                self.processes.append(
                    subprocess.Popen(
                        [sys.executable, str(EXAMPLES / f"{example}.py"), *arguments],
                        env=environment,
                        stdout=output,
                        stderr=subprocess.STDOUT,
                    )
                )

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


def deviation(found: dict[str, Tensor], expected: dict[str, Tensor], start: str) -> float:
    """Largest difference of the tensors named ``start``..., relative to each one's magnitude."""
    names = [name for name in expected if name.startswith(start)]
    if found.keys() != expected.keys() or not names:
        raise Failure(f"other tensors: {sorted(found.keys() ^ expected.keys()) or start}")
    worst = 0.0
    for name in names:
        a, b = found[name].double(), expected[name].double()
        if not bool(torch.isfinite(a).all()):
            raise Failure(f"{name} is not finite")
        scale = b.abs().max().clamp(min=torch.finfo(torch.float64).tiny)
        worst = max(worst, float((a - b).abs().max() / scale))
    return worst


class Training:
    """One example at one number of ranks, and its run that was never interrupted."""

    def __init__(self, example: str, count: int, options: argparse.Namespace, work: Path) -> None:
        self.example, self.count, self.options = example, count, options
        self.work = work / f"{example}-{count}"
        self.work.mkdir()
        whole = self.work / "whole"
        with self._start(whole) as ranks:
            ranks.wait_for_step(1)
            started = time.monotonic()
            self._finish(ranks)
            self.step_seconds = (time.monotonic() - started) / (options.steps - 1)
        self.expected = self._final(whole)

    def _start(self, folder: Path, *more: str) -> Ranks:
        o = self.options
        arguments = f"--steps {o.steps} --batch {o.batch} --every 1 --save-every {o.save_every}"
        arguments += f" --timeout {o.timeout}"
        return Ranks(
            self.example,
            self.count,
            [*arguments.split(), "--checkpoint", str(folder), *more],
            folder.with_name(folder.name + "".join(more) + ".log"),
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
        folder = self.work / f"run-{number}"
        victim, step = draw.randrange(self.count), draw.randrange(1, self.options.steps - 1)
        delay = draw.uniform(0, self.step_seconds)
        with self._start(folder) as ranks:
            ranks.wait_for_step(step)
            time.sleep(delay)
            ranks.processes[victim].kill()
            killed = time.monotonic()
            codes = ranks.wait(self.options.timeout + EXIT_SECONDS)
            seconds = time.monotonic() - killed
        if codes[victim] == 0:
            return self.kill_and_resume(number + 1000, draw)
        if not all(codes):
            raise Failure(f"rank {victim} was killed, and the exit codes are {codes}")
        saved = self._sound(folder)
        with self._start(folder, "--resume") as ranks:
            self._finish(ranks)
            going_on = f"going on from {folder / f'step-{saved:06}'}" in ranks.output(0)
            if going_on != (saved > 0):
                raise Failure(f"with checkpoint {saved}, the resumed run printed:\n{ranks.tails()}")
        found = self._final(folder)
        return Outcome(
            self.example,
            self.count,
            victim,
            step,
            codes,
            round(seconds, 2),
            saved,
            deviation(found, self.expected, "model."),
            deviation(found, self.expected, "optimizer."),
        )

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
    add("--layouts", default=LAYOUTS, help=f"EXAMPLE:RANKS,... ({LAYOUTS})")
    add("--steps", type=int, default=12, help="steps of a training (12)")
    add("--save-every", type=int, default=2, help="steps between checkpoints (2)")
    add("--batch", type=int, default=4, help="windows per step (4)")
    add("--timeout", type=float, default=30.0, help="of the process group, seconds (30)")
    add("--tolerance", type=float, default=1e-5, help="for more than two ranks (1e-5)")
    add("--seed", type=int, default=0, help="of the moments and the ranks (0)")
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
        outcome = trainings[which].kill_and_resume(number, draw)
        worst = max(outcome.parameter_deviation, outcome.state_deviation)
        if worst > (0.0 if outcome.ranks == 2 else options.tolerance):
            raise Failure(f"{outcome}: the resumed run differs by {worst:.1e}")
        yield outcome


def main() -> None:
    options = parse()
    warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)  # as meant
    done = []
    print("example            ranks  killed  after step  exit codes      s to end  checkpoint  "
          "parameters  state")  # fmt: skip
    with tempfile.TemporaryDirectory() as work:
        try:
            for o in outcomes(options, Path(work)):
                done.append(o)
                print(
                    f"{o.example:18} {o.ranks:5} {o.killed_rank:7} {o.after_step:11}  "
                    f"{' '.join(map(str, o.exit_codes)):14} {o.seconds_to_end:9.1f} "
                    f"{o.checkpoint:11} {o.parameter_deviation:11.1e} {o.state_deviation:6.1e}",
                    flush=True,
                )
        except Failure as failure:
            raise SystemExit(f"FAILED in run {len(done) + 1}: {failure}") from failure
    worst = max(max(o.parameter_deviation, o.state_deviation) for o in done)
    slowest = max(o.seconds_to_end for o in done)
    print(
        f"{len(done)} runs: all other ranks ended with an error within {slowest:.1f} s, every "
        f"checkpoint was whole, every resumed run was equal (largest deviation {worst:.1e})"
    )
    if options.json:
        options.json.write_text(json.dumps([asdict(o) for o in done], indent=2) + "\n")


if __name__ == "__main__":
    main()
