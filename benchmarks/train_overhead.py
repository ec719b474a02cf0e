"""A whole training step with MuonW against fused AdamW, paired in one process.

    python benchmarks/train_overhead.py                       # the lab's gpt task
    python benchmarks/train_overhead.py --width 384 --layers 6 --context 256 --json overhead.json
    python benchmarks/train_overhead.py --task mnist
    python benchmarks/train_overhead.py --task mnist --beside dion2   # a third optimizer

Model and data are those of one of the lab's tasks (`muonkit compare gpt`), the optimizers those
that it compares, each at its default learning rate: MuonW, and torch.optim.AdamW(fused=True),
torch's fastest. Both train their own copy of one initial model on the same batches. A block is a
few steps of one optimizer; the blocks are paired (harness.py). Quoted are medians over blocks, and
the ratio within a pair of blocks with its quartiles. `share` is the optimizer's part of a step.
"""

from __future__ import annotations

import argparse
import copy
import functools
import statistics
import sys
import time
from typing import Any

import harness
import machine
import torch
from torch import nn

from muonkit import route
from muonkit.lab.data import Data, stdlib_text
from muonkit.lab.models import GPT
from muonkit.lab.objective import loss_of
from muonkit.lab.optimizers import OPTIMIZERS, get_optimizer
from muonkit.lab.tasks import TASKS, get_task

SEED = 0
WARM_UP = 2  # steps; the first ones also allocate


class Training:
    """One model, its optimizer, and the seconds of its steps."""

    def __init__(
        self, name: str, model: nn.Module, data: Data, batch_size: int, task: str = "gpt"
    ) -> None:
        self.model = model
        self.optimizer = get_optimizer(name).build(model, get_task(task).lr[name])
        self.data = data
        self.batch_size = batch_size
        self.done = 0

    def step(self) -> tuple[float, float]:
        """Seconds of forward and backward, and of the optimizer."""
        x, y = self.data.batch(SEED, self.done, self.batch_size)
        self.done += 1
        start = time.perf_counter()
        self.optimizer.zero_grad()
        loss, _ = loss_of(self.model, x, y)
        loss.backward()
        middle = time.perf_counter()
        self.optimizer.step()
        return middle - start, time.perf_counter() - middle

    def block(self, steps: int) -> tuple[float, float]:
        """Mean seconds of a step, and of the optimizer's part of it."""
        parts = [self.step() for _ in range(steps)]
        optimizer = sum(o for _, o in parts) / steps
        return sum(f for f, _ in parts) / steps + optimizer, optimizer


def measure(trainings: dict[str, Training], blocks: int, steps: int) -> dict[str, Any]:
    """Medians of each, and the ratios of MuonW's blocks to AdamW's."""
    for training in trainings.values():
        training.block(WARM_UP)
    tasks = {n: functools.partial(each.block, steps) for n, each in trainings.items()}
    taken = harness.paired(tasks, blocks)
    whole, optimizer = ([{n: pair[i] for n, pair in r.items()} for r in taken] for i in (0, 1))
    result: dict[str, Any] = {}
    for name in trainings:
        pairs = harness.column(taken, name)
        result[name] = {
            "step_ms": harness.ms(statistics.median(step for step, _ in pairs)),
            "optimizer_ms": harness.ms(statistics.median(part for _, part in pairs)),
            "share": statistics.median(part / step for step, part in pairs),
            "seconds": [step for step, _ in pairs],
        }
    for name in trainings.keys() - {"muonw", "adamw"}:
        result[f"ratio_{name}"] = harness.quartiles(harness.ratios(whole, name, "adamw"))
    result["ratio"] = harness.quartiles(harness.ratios(whole, "muonw", "adamw"))
    result["ratio_optimizer"] = harness.quartiles(harness.ratios(optimizer, "muonw", "adamw"))
    return result


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Those of the lab's `gpt` task: which GPT, on how much."""
    parser.add_argument("--batch-size", type=int, help="default: the task's")
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--context", type=int, default=128)


def main() -> int:
    parser = harness.parser(__doc__)
    add_model_options(parser)
    parser.add_argument("--task", choices=TASKS, default="gpt", help="all but gpt as they are")
    parser.add_argument("--beside", choices=OPTIMIZERS, help="another of the lab's optimizers")
    parser.add_argument("--blocks", type=harness.at_least_one, default=15)
    parser.add_argument("--steps", type=harness.at_least_one, default=5, help="in a block")
    options = parser.parse_args()
    if options.width % options.heads:
        parser.error(f"--width {options.width} is no multiple of --heads {options.heads}")
    torch.set_num_threads(options.threads)
    torch.manual_seed(SEED)
    task = get_task(options.task)
    batch_size = options.batch_size or task.batch_size
    if options.task == "gpt":
        data: Data = stdlib_text(options.context)
        model: nn.Module = GPT(256, options.context, options.width, options.layers, options.heads)
        size = {k: getattr(options, k) for k in ("width", "layers", "heads", "context")}
        unit, count = "tokens", batch_size * options.context
    else:
        data, model = task.load(), task.build()
        size = {"summary": task.summary}
        unit, count = "images", batch_size
    trainings = {
        name: Training(name, copy.deepcopy(model), data, batch_size, options.task)
        for name in dict.fromkeys(("muonw", "adamw", options.beside or "muonw"))
    }
    result = measure(trainings, options.blocks, options.steps)
    hidden = sum(r.param.numel() for r in route(model) if r.algorithm == "muon")
    record = {
        "kind": "overhead",
        "machine": machine.facts(),
        "task": options.task,
        "model": size,
        "batch_size": batch_size,
        unit: count,
        "parameters": sum(p.numel() for p in model.parameters()),
        "hidden": hidden,
        "blocks": options.blocks,
        "steps": options.steps,
        **result,
    }
    show(record)
    harness.write(options.json, record)
    return 0


def what_and_how_much(record: dict[str, Any]) -> tuple[str, str]:
    """The model, and what a step takes, in words."""
    m = record["model"]
    if "summary" in m:
        return m["summary"].partition(" (")[0], f"{record['images']:,} images"
    return (
        f"GPT, {m['layers']} layers, d = {m['width']}, context {m['context']}",
        f"{record['tokens']:,} tokens",
    )


def show(record: dict[str, Any]) -> None:
    model, size = what_and_how_much(record)
    print(
        f"{model}: {record['parameters'] / 1e6:.2f} M parameters ({record['hidden'] / 1e6:.2f} M "
        f"by Muon), {size} a step; "
        f"{record['machine']['threads']} threads; {record['blocks']} blocks of {record['steps']}"
    )
    for name in [name for name in record if name in OPTIMIZERS]:
        r = record[name]
        print(
            f"  {name:6} step {r['step_ms']:9.2f} ms, optimizer {r['optimizer_ms']:8.2f} ms "
            f"({r['share']:.1%})"
        )
    low, middle, high = record["ratio"]
    print(f"  a step with MuonW takes {middle:.3f} [{low:.3f}, {high:.3f}] of AdamW's")


if __name__ == "__main__":
    sys.exit(main())
