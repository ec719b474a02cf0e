"""What `muonkit.Monitor` costs a training, paired in one process.

    python benchmarks/monitor_overhead.py                      # the lab's gpt task
    python benchmarks/monitor_overhead.py --width 384 --layers 6 --pairs 200

Two copies of one training take their steps in turn on the same batches, the second with a monitor
that samples every `--every` steps and writes JSON lines (pairs as in harness.py). Quoted are the
median step, what a sampled step takes longer than its partner, and what the others do. The overhead
at a given `every` is (extra of a sample + (every - 1) * hooks) / (every * step), where `hooks` is
the time of the hooks between samples, in a loop: the paired difference of two steps, also printed,
is mostly the machine's noise.
"""

from __future__ import annotations

import copy
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import harness
import machine
import torch
from train_overhead import WARM_UP, Training, add_model_options

from muonkit import Monitor
from muonkit.lab.data import stdlib_text
from muonkit.lab.models import GPT
from muonkit.lab.tasks import get_task

CALLS = 10_000


def measure(
    trainings: list[Training], monitor: Monitor, pairs: int, targets: list[int]
) -> dict[str, Any]:
    """Seconds of paired steps; the second of the trainings has the monitor."""
    bare, watched = trainings
    for training in trainings:
        training.block(WARM_UP)
    steps, samples, others = [], [], []
    named = {"bare": bare, "watched": watched}
    tasks = {name: lambda each=each: sum(each.step()) for name, each in named.items()}
    sampled: list[bool] = []
    results = harness.paired(
        tasks, pairs, after=lambda _: sampled.append(monitor.step % monitor.every == 0)
    )
    for seconds, is_sample in zip(results, sampled, strict=True):
        steps.append(seconds["bare"])
        (samples if is_sample else others).append(seconds["watched"] - seconds["bare"])
    hooks = _hooks(watched.optimizer, monitor)
    step, sample = statistics.median(steps), statistics.median(samples)
    return {
        "step_ms": harness.ms(step),
        "sample_ms": harness.ms(harness.quartiles(samples)),
        "other_ms": harness.ms(harness.quartiles(others)),
        "hooks_us": hooks * 1e6,
        "overhead": {n: (sample + (n - 1) * hooks) / (n * step) for n in targets},
    }


def _hooks(optimizer: Any, monitor: Monitor) -> float:
    """Seconds that the hooks of a step between samples take."""
    every, monitor.every = monitor.every, sys.maxsize
    (before,) = optimizer._optimizer_step_pre_hooks.values()
    (after,) = optimizer._optimizer_step_post_hooks.values()
    seconds = min(
        harness.timed(lambda: (before(optimizer, (), {}), after(optimizer, (), {})), CALLS)
        for _ in range(5)
    )
    monitor.every = every
    return seconds


def main() -> int:
    parser = harness.parser(__doc__)
    add_model_options(parser)
    parser.add_argument("--pairs", type=harness.at_least_one, default=120)
    parser.add_argument(
        "--every",
        type=harness.at_least_one,
        default=5,
        help="while it is measured; odd, so that samples meet both orders of a pair",
    )
    options = parser.parse_args()
    if options.pairs < 2 * options.every:
        parser.error(f"--pairs {options.pairs} has no two samples at --every {options.every}")
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    batch_size = options.batch_size or get_task("gpt").batch_size
    data = stdlib_text(options.context)
    model = GPT(256, options.context, options.width, options.layers, options.heads)
    trainings = [Training("muonw", copy.deepcopy(model), data, batch_size) for _ in range(2)]
    with (
        tempfile.TemporaryDirectory() as folder,
        Monitor(trainings[1].optimizer, options.every, Path(folder) / "run.jsonl") as monitor,
    ):
        result = measure(trainings, monitor, options.pairs, [10, 100, 1000])
        matrices = len(monitor.header["matrices"])
    record = {
        "kind": "monitor",
        "machine": machine.facts(),
        "model": {k: getattr(options, k) for k in ("width", "layers", "heads", "context")},
        "matrices": matrices,
        "tokens": batch_size * options.context,
        "pairs": options.pairs,
        **result,
    }
    show(record)
    harness.write(options.json, record)
    return 0


def show(record: dict[str, Any]) -> None:
    model = record["model"]
    print(
        f"GPT, width {model['width']}, {model['layers']} layers, {record['matrices']} matrices, "
        f"{record['tokens']} tokens a step; {record['machine']['threads']} threads; "
        f"{record['pairs']} pairs of steps"
    )
    low, middle, high = record["sample_ms"]
    print(f"  a step takes {record['step_ms']:.1f} ms")
    print(f"  a sampled one {middle:.1f} [{low:.1f}, {high:.1f}] ms more")
    low, middle, high = record["other_ms"]
    print(
        f"  another {middle:.1f} [{low:.1f}, {high:.1f}] ms more; hooks {record['hooks_us']:.1f} µs"
    )
    for every, overhead in record["overhead"].items():
        print(f"  overhead at every={every}: {overhead:.2%}")


if __name__ == "__main__":
    sys.exit(main())
