"""What a momentum in int8 is off by, costs and does to trainings, beside float32 and bfloat16.

    python benchmarks/int8.py --only errors --task gpt
    python benchmarks/int8.py --only step
    python benchmarks/int8.py --only losses --task gpt --task cifar10

*errors*: MuonW trains a task of the lab for 500 steps with its momentum in float32; beside it the
same gradients go into momenta that are rounded after every step. *step*: paired rounds
(harness.py). *losses*: `muonkit compare`; what follows `--` goes to it; stopped, the same command
goes on. Each part has its own file, docs/choosing/int8-PART.json, of which pages.py writes the
tables in docs/choosing.md.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import harness
import machine
import torch
from evidence import compare, merged, outcomes, split
from sets import SETS, Workload
from step import state_bytes
from torch import Tensor

from muonkit import MuonW, orthogonalize
from muonkit.int8 import LARGEST, Scales, block_extents, dequantized, quantize_, scale_shape
from muonkit.lab.objective import loss_of
from muonkit.lab.optimizers import BETAS, SCALE
from muonkit.lab.results import figure, welch
from muonkit.lab.tasks import TASKS
from muonkit.lab.train import lr_factor
from muonkit.views import blocks_of

ROOT = Path(__file__).resolve().parents[1]
FILES = ROOT / "docs" / "choosing"
KEPT = ("float32", "bfloat16", "int8")
MU = 0.95
LENGTHS = {
    "gpt": ("--steps", "200", "--evaluations", "5"),
    "cifar10": ("--epochs", "1", "--evaluations", "4"),
}


# --- errors ---------------------------------------------------------------------------------------


def nearest(M: Tensor, view: str) -> Tensor:
    """As muonkit keeps it."""
    kept = torch.zeros(M.shape, dtype=torch.int8)
    s = torch.zeros(scale_shape(view, M.shape))
    scales = Scales.of([s], block_extents(M.shape, s.shape))
    quantize_([kept], scales, torch.stack([M]))
    return dequantized([kept], scales, M.dtype)[0]


def stochastic(M: Tensor, view: str) -> Tensor:
    """The same blocks, rounded up or down by chance, so that the mean is kept."""
    shape = scale_shape(view, M.shape)
    s = M.abs()
    for dim, extent in enumerate(block_extents(M.shape, shape)):
        short = -M.shape[dim] % extent
        if short:
            s = torch.cat([s, s.narrow(dim, 0, 1).expand_as(s.narrow(dim, 0, short)) * 0], dim)
        s = s.unflatten(dim, (-1, extent)).amax(dim + 1)
    for dim, extent in enumerate(block_extents(M.shape, shape)):
        s = s.repeat_interleave(extent, dim).narrow(dim, 0, M.shape[dim])
    s = (s / LARGEST).clamp_min(1e-30)
    return (M / s + torch.rand_like(M)).floor().clamp_(-LARGEST, LARGEST) * s


ROUNDINGS: dict[str, Callable[[Tensor, str], Tensor]] = {
    "int8": nearest,
    "int8, stochastic rounding": stochastic,
    "bfloat16": lambda M, view: M.bfloat16().float(),
}


def matrices(tensor: Tensor, view: str) -> Tensor:
    (block,) = blocks_of(view, tensor.shape)
    return block.to_matrices(tensor)


def errors(task_name: str, steps: int, every: int = 100) -> dict[str, Any]:
    """Relative errors of momentum and update: the mean over matrices, and the worst one."""
    task = TASKS[task_name]
    data = task.load()
    torch.manual_seed(0)
    model = task.build()
    lr = task.lr["muonw"]
    optimizer = MuonW(model, lr=lr, adjust_lr_fn=SCALE, adamw_betas=BETAS)
    rates = [group["lr"] for group in optimizer.param_groups]
    muon = [group for group in optimizer.param_groups if group["algorithm"] == "muon"]
    params = [(p, group["view"]) for group in muon for p in group["params"]]
    rounded = {name: [torch.zeros_like(p) for p, _ in params] for name in ROUNDINGS}
    found: dict[str, list[list[float]]] = {name: [] for name in ROUNDINGS}
    for t in range(steps):
        loss, _ = loss_of(model, *data.batch(0, t, task.batch_size))
        optimizer.zero_grad()
        loss.backward()
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * lr_factor(t, steps)
        optimizer.step()
        look = t % every == every - 1
        off: dict[str, list[tuple[float, float]]] = {name: [] for name in ROUNDINGS}
        for i, (p, view) in enumerate(params):
            exact, G = optimizer.state[p]["momentum_buffer"], p.grad
            assert G is not None
            O = update(G, exact, view) if look else None
            for name, rounding in ROUNDINGS.items():
                M = rounded[name][i].lerp(G, 1 - MU)
                rounded[name][i] = rounding(M, view)
                if O is not None:
                    off[name].append((apart(M, exact), apart(update(G, M, view), O)))
        if look:
            for name, pairs in off.items():
                momentum, of_update = zip(*pairs, strict=True)
                mean = statistics.fmean
                found[name].append([mean(momentum), max(momentum), mean(of_update), max(of_update)])
            print(f"{task_name}: step {t + 1} of {steps}", file=sys.stderr, flush=True)
    names = ("momentum", "momentum_worst", "update", "update_worst")
    return {
        "steps": steps,
        "every": every,
        "rows": {
            name: dict(zip(names, map(statistics.fmean, zip(*rows, strict=True)), strict=True))
            for name, rows in found.items()
        },
    }


def update(G: Tensor, M: Tensor, view: str) -> Tensor:
    return orthogonalize(matrices(G.lerp(M, MU), view), ns_dtype="float32")


def apart(one: Tensor, other: Tensor) -> float:
    return ((one - other).norm() / other.norm()).item()


# --- step and losses ------------------------------------------------------------------------------


def step(name: str, rounds: int) -> dict[str, Any]:
    """Ratios to the time of a step with float32's momentum, and bytes of the state."""
    from options import build

    workload = Workload(SETS[name])
    made = {kept: build(workload, {"momentum_dtype": kept}) for kept in KEPT}
    for optimizer in made.values():
        optimizer.step()
    tasks = {kept: functools.partial(harness.timed, o.step) for kept, o in made.items()}
    results = harness.paired(tasks, rounds)
    rows = {
        kept: {
            "ms": harness.ms(statistics.median(harness.column(results, kept))),
            "ratio": harness.quartiles(harness.ratios(results, kept, KEPT[0])),
            "state": state_bytes(optimizer.state_dict()["state"]),
        }
        for kept, optimizer in made.items()
    }
    return {"set": name, "rounds": rounds, "rows": rows}


def losses(task: str, out: Path, further: Sequence[str]) -> dict[str, Any]:
    words = [task, "--optimizers", "muonw,int8", *LENGTHS[task], "--seeds", "3", "--jobs", "1"]
    record = compare(merged([*words, "--threads", "1"], further), out / task)
    results = [result for result, _ in outcomes(record)]
    own = {n: [r.val_loss for r in results if r.optimizer == n] for n in ("muonw", "int8")}
    return {
        "command": record["command"],
        "budget": record["config"]["budget"],
        "seeds": record["config"]["seeds"],
        "float32": own["muonw"],
        "int8": own["int8"],
        "p": welch(own["int8"], own["muonw"]),
        "text": {name: figure(values).text(4) for name, values in own.items()},
    }


def main(words: Sequence[str]) -> None:
    words, further = split(words)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=("errors", "step", "losses"), required=True)
    parser.add_argument("--task", choices=list(LENGTHS), action="append", help="may be repeated")
    parser.add_argument("--steps", type=int, default=500, help="of errors")
    parser.add_argument("--set", choices=list(SETS), default="gpt-2x384", help="of step")
    parser.add_argument("--rounds", type=int, default=15, help="of step")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "int8", help="of losses")
    parser.add_argument("--json", type=Path, help="[default: docs/choosing/int8-PART.json]")
    options = parser.parse_args(words)
    torch.set_num_threads(1)
    file = options.json or FILES / f"int8-{options.only}.json"
    measure: dict[str, Callable[[str], dict[str, Any]]] = {
        "errors": lambda task: errors(task, options.steps, min(100, options.steps)),
        "step": lambda name: step(name, options.rounds),
        "losses": lambda task: losses(task, options.out, further),
    }
    for name in [options.set] if options.only == "step" else options.task or LENGTHS:
        found = {**harness.rounded(measure[options.only](name)), "machine": machine.facts()}
        record = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        rows = {**record.get("rows", {}), name: found}
        kind = f"int8-{options.only}"
        harness.write(file, {"kind": kind, "rows": rows})


if __name__ == "__main__":
    main(sys.argv[1:])
