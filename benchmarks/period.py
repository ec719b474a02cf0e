"""MuonBP (`period`): the time and the bytes of a step, and the loss of a training, beside period=1.

    python benchmarks/period.py step --json docs/distributed/period-step.json
    python benchmarks/period.py train --json docs/distributed/period-train.json

The ranks are processes of this machine, of one thread each, which speak gloo: what is sent is
copied from memory to memory, and costs less than in a network.

step: paired (harness.py). In every round each contender takes as many steps as its period has, so
that one of them is whole, on the same matrices; a step begins after a barrier and takes as long as
on the slowest rank: by the clock, and in seconds of the CPU, which tell the work also where others
use the machine. Layouts are fsdp2 (rows), tp (rows of what is taller than wide, columns of the
rest) and fsdp2_tp (both, 4 ranks). FLOPs are the busiest rank's. Bytes are counted, and have to be
those of the plan.

train: the lab's gpt under FSDP2 on two ranks, with the schedule, batches and learning rate of
`muonkit compare gpt`; every run has the loss of each step and the validation loss at its end.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import harness
import machine
import torch
import torch.distributed as dist
from distributed import CountSent, data_bytes
from gloo_ranks import run_on_ranks
from sets import SETS, Entry, gpt
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard

from muonkit import Muon, MuonW
from muonkit.lab.objective import loss_of
from muonkit.lab.optimizers import BETAS, SCALE, WEIGHT_DECAY
from muonkit.lab.randomness import number_of
from muonkit.lab.tasks import get_task
from muonkit.lab.train import lr_factor

PERIOD = 5
CHOICES: dict[str, list[Entry]] = {
    "gpt-12x128": SETS["gpt-12x128"],
    "gpt-4x384": gpt(4, 384),
    "tiny": gpt(1, 16),  # for the tests
}
LAYOUTS = {"fsdp2": (2, 4), "tp": (2, 4), "fsdp2_tp": (4,)}  # and their ranks
RUNS: dict[str, dict[str, Any]] = {
    "period=1": {},
    "period=5": {"period": PERIOD},
    "period=5, block_lr_factor=0.7": {"period": PERIOD, "block_lr_factor": 0.7},
    "blocks only": {"period": 10**9},  # after the first step
}

# --- a step ---------------------------------------------------------------------------------------


def parameters(entries: list[Entry], layout: str) -> list[nn.Parameter]:
    """Random matrices with gradients, in a layout over all ranks."""
    ranks = dist.get_world_size()
    shape = (ranks // 2, 2) if layout == "fsdp2_tp" else (ranks,)
    mesh = init_device_mesh("cpu", shape)
    made = []
    for number, (size, _) in enumerate(entries):
        torch.manual_seed(number)
        along = Shard(0 if size[0] > size[1] else 1)
        placements = {"fsdp2": [Shard(0)], "tp": [along], "fsdp2_tp": [Shard(0), Shard(1)]}[layout]
        locals_ = []
        for _ in range(2):
            part = torch.randn(size)
            for axis, placement in enumerate(placements):
                part = part.chunk(shape[axis], placement.dim)[mesh.get_local_rank(axis)]
            locals_.append(DTensor.from_local(part.contiguous(), mesh, placements, run_check=False))
        p = nn.Parameter(locals_[0])
        p.grad = locals_[1]
        made.append(p)
    return made


def steps(optimizer: Muon) -> list[tuple[float, float]]:
    """The seconds of each step of a period, the first of them whole, on this rank: by the clock,
    and of the CPU in all threads of the process.
    """
    seconds = []
    for _ in range(PERIOD):
        dist.barrier()
        cpu = time.process_time()
        clock = harness.timed(optimizer.step)
        seconds.append((clock, time.process_time() - cpu))
    return seconds


def bytes_sent(optimizer: Muon, period: int) -> list[int]:
    """The bytes that this rank sends in each of five steps.

    Raises:
        RuntimeError: they are not those of the plan.
    """
    found = []
    for number in range(PERIOD):
        with CountSent() as counter:
            optimizer.step()
        traffic = optimizer.plan(blocks=number % period != 0).traffic()
        planned = traffic.sent_in[dist.get_rank()] + traffic.sent_out[dist.get_rank()]
        if data_bytes(counter.sent) != planned:
            raise RuntimeError(f"sent {dict(counter.sent)}, planned {planned}, in step {number}")
        found.append(planned)
    return found


def step_case(name: str, layout: str, rounds: int, seconds: float) -> dict[str, Any]:
    optimizers = {
        f"period={period}": Muon(
            parameters(CHOICES[name], layout), lr=1e-3, ns_dtype="float32", period=period
        )
        for period in (1, PERIOD)
    }
    start = time.monotonic()
    sent = {
        each: bytes_sent(optimizer, int(each.partition("=")[2]))
        for each, optimizer in optimizers.items()
    }
    fitting = [max(3, min(rounds, int(seconds / (time.monotonic() - start))))]
    dist.broadcast_object_list(fitting)
    tasks: dict[str, Callable[[], list[tuple[float, float]]]] = {
        each: lambda optimizer=optimizer: steps(optimizer)  # type: ignore[misc]
        for each, optimizer in optimizers.items()
    }
    mine = harness.paired(tasks, fitting[0])
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, (mine, sent))
    return {
        "set": name,
        "layout": layout,
        "ranks": dist.get_world_size(),
        "rounds": fitting[0],
        "clock": times([its[0] for its in everyone], 0),
        "cpu": times([its[0] for its in everyone], 1),
        "flops": [
            max(optimizers[f"period={PERIOD}"].plan(blocks).traffic().flops)
            for blocks in (False, True)
        ],
        "bytes": {
            each: [sum(its[1][each][number] for its in everyone) for number in range(PERIOD)]
            for each in optimizers
        },
    }


def times(everyone: list[Any], which: int) -> dict[str, Any]:
    """The mean step without a period, and over it, within a round, the mean step of a period and
    its steps of blocks; a step takes as long as on the slowest rank.

    Args:
        everyone: by rank and round, the steps of each contender, as `steps` has them.
        which: 0 for the clock, 1 for the CPU.
    """
    rounds = []
    for by_rank in zip(*everyone, strict=True):
        found = {}
        for each in by_rank[0]:
            by_step = zip(*(one[each] for one in by_rank), strict=True)
            found[each] = [max(step[which] for step in some) for some in by_step]
        rounds.append(found)
    every = [statistics.mean(one["period=1"]) for one in rounds]
    period = [statistics.mean(one[f"period={PERIOD}"]) for one in rounds]
    blocks = [statistics.mean(one[f"period={PERIOD}"][1:]) for one in rounds]
    return {
        "ms": harness.ms(statistics.median(every)),
        "mean_of_period": harness.quartiles([b / a for a, b in zip(every, period, strict=True)]),
        "step_of_blocks": harness.quartiles([b / a for a, b in zip(every, blocks, strict=True)]),
        "seconds": rounds,
    }


# --- a training -----------------------------------------------------------------------------------


def train(run: str, seed: int, length: int) -> dict[str, Any]:
    """One run of the lab's gpt; both ranks have the whole record."""
    task, ranks, rank = get_task("gpt"), dist.get_world_size(), dist.get_rank()
    data = task.load()
    torch.manual_seed(number_of("weights", seed))
    model = task.build()
    mesh = init_device_mesh("cpu", (ranks,))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    rate = task.lr["muonw"]
    options = {"weight_decay": WEIGHT_DECAY, "adamw_betas": BETAS, "adjust_lr_fn": SCALE}
    optimizer = MuonW(model, lr=rate, ns_dtype="float32", **options, **RUNS[run])
    losses = []
    for step in range(length):
        for group in optimizer.param_groups:
            group["lr"] = rate * lr_factor(step, length)
        x, y = (each.chunk(ranks)[rank] for each in data.batch(seed, step, task.batch_size))
        loss, _ = loss_of(model, x, y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    total = torch.zeros(2, dtype=torch.float64)
    with torch.no_grad():
        for batch in data.validation():
            x, y = (each.chunk(ranks)[rank] for each in batch)
            mean, _ = loss_of(model, x, y)
            total += torch.tensor([mean.item() * y.numel(), y.numel()], dtype=torch.float64)
    dist.all_reduce(total)
    every = torch.stack(losses)
    dist.all_reduce(every)
    return {
        "run": run,
        "seed": seed,
        "steps": length,
        "validation": round((total[0] / total[1]).item(), 5),
        "losses": [round(loss, 4) for loss in (every / ranks).tolist()],
    }


# --- ranks ----------------------------------------------------------------------------------------


def run_tasks(tasks: list[tuple[str, Any]]) -> list[dict[str, Any]]:
    """On each rank: the results of these tasks."""
    results = []
    for kind, arguments in tasks:
        results.append((step_case if kind == "step" else train)(*arguments))
        if dist.get_rank() == 0:
            print(kind, *arguments, results[-1].get("validation", ""), flush=True)
    return results


def main() -> int:
    parser = harness.parser(__doc__, rounds=15, threads=False)
    parser.add_argument("what", choices=["step", "train"])
    parser.add_argument(
        "--set", nargs="+", choices=list(CHOICES), default=["gpt-12x128", "gpt-4x384"]
    )
    parser.add_argument("--ranks", nargs="+", type=int, choices=[2, 4], default=[2, 4])
    parser.add_argument("--seconds", type=float, default=30.0, help="for each case, about")
    parser.add_argument("--seeds", type=harness.at_least_one, default=3)
    parser.add_argument("--steps", type=harness.at_least_one, default=200)
    options = parser.parse_args()
    torch.set_num_threads(1)
    facts = machine.facts()
    record: dict[str, Any] = {"kind": f"period-{options.what}", "machine": facts, "period": PERIOD}
    if options.what == "train":
        record["runs"] = []
        for seed in range(options.seeds):
            record["runs"] += run_on_ranks(
                2, run_tasks, [("train", (run, seed, options.steps)) for run in RUNS]
            )
            harness.write(options.json, record)  # one that is stopped keeps what it has
    else:
        record["cases"] = []
        for ranks in options.ranks:
            record["cases"] += run_on_ranks(
                ranks,
                run_tasks,
                [
                    ("step", (name, layout, options.rounds, options.seconds))
                    for name in options.set
                    for layout, on in LAYOUTS.items()
                    if ranks in on
                ],
            )
            harness.write(options.json, harness.rounded(record))
    return 0


if __name__ == "__main__":
    sys.exit(main())
