"""Rank what stands around Muon: each stage alone, its learning rate and decay swept as plain's.

    python benchmarks/stages.py --task gpt --jobs 2
    python benchmarks/stages.py --task gpt --times      # on a quiet machine; added to the file
    python benchmarks/stages.py --task gpt --quick
    python benchmarks/stages.py --page-only

It runs `muonkit compare` with a sweep for every stage and for plain MuonW, keeps the figures in
docs/stages/TASK.json, and writes the block between `<!-- begin: stages -->` and
`<!-- end: stages -->` of docs/choosing.md from these files. What follows `--` goes to `compare`.
Stopped, the same command goes on. Losers stay in the table. `--times` is apart, since what else the
machine does then changes no loss: whole training steps of all of them in one process, paired
(harness.py), one thread.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

import harness
import torch
from evidence import QUICK, compare, merged, outcomes, split
from parts import Record, replace_block, spread, table

from muonkit.lab.data import Batch
from muonkit.lab.objective import loss_of
from muonkit.lab.optimizers import OPTIMIZERS, get_optimizer
from muonkit.lab.results import Figure, figure, p_value, welch
from muonkit.lab.tasks import TASKS, get_task

ROOT = Path(__file__).resolve().parents[1]
PLAIN = "muonw"
NAMES = (
    PLAIN,
    *(name for name in OPTIMIZERS if name not in (PLAIN, "adamw", "sgd") and "torch" not in name),
)
# The same grids for all: three rates (more beyond an edge), then three decays, on seed 0.
PLANS: dict[str, tuple[str, ...]] = {
    "gpt": ("--steps", "400", "--seeds", "3", "--sweep-points", "3"),
    "cifar10": ("--epochs", "5", "--seeds", "3", "--sweep-points", "3"),
}


def state_bytes(task: str, name: str) -> int:
    """Bytes of the optimizer's whole state, AdamW's part included."""
    model = TASKS[task].build()
    optimizer = get_optimizer(name).build(model, 1e-3)
    assert isinstance(optimizer, torch.optim.Optimizer)
    tensors = [t for state in optimizer.state.values() for t in state.values()]
    return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, torch.Tensor))


def run(task: str, options: argparse.Namespace) -> None:
    words = [
        task,
        "--optimizers",
        ",".join(options.optimizers),
        "--sweep",
        "--sweep-decay",
        "--sweep-full",
    ]
    words += [*PLANS[task], "--jobs", str(options.jobs), "--threads", "1"]
    record = compare(
        merged(words, [*(QUICK if options.quick else ()), *options.further]), options.out / task
    )
    names = [row["optimizer"] for row in record["rows"]]
    record["state_bytes"] = {name: state_bytes(task, name) for name in names}
    file = options.results / f"{task}.json"
    if file.exists():
        record["times"] = json.loads(file.read_text()).get("times", {})
    keep(file, task, record)


def keep(file: Path, task: str, record: Record) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({**record, "kind": "stages", "task": task}, indent=1) + "\n"
    file.write_text(text)


def time_steps(name: str, optimizers: Sequence[str], rounds: int) -> Record:
    """Milliseconds of a training step of each, and times plain's."""
    torch.set_num_threads(1)
    task = get_task(name)
    data = task.load()
    steps = {}
    for each in dict.fromkeys((PLAIN, *optimizers)):
        torch.manual_seed(0)
        model = task.build()
        optimizer = get_optimizer(each).build(model, task.lr["muonw"])
        batch = data.batch(0, 0, task.batch_size)
        steps[each] = functools.partial(_timed_step, model, optimizer, batch)
        steps[each]()  # the first makes what later ones keep
    found = harness.paired(steps, rounds)
    return {
        each: {
            "ms": harness.ms(statistics.median(harness.column(found, each))),
            "times_plain": harness.quartiles(harness.ratios(found, each, PLAIN)),
        }
        for each in steps
    }


def _timed_step(model: torch.nn.Module, optimizer: torch.optim.Optimizer, batch: Batch) -> float:
    def step() -> None:
        optimizer.zero_grad()
        loss, _ = loss_of(model, *batch)
        loss.backward()
        optimizer.step()

    return harness.timed(step)


def block(record: Record) -> str:
    """One table of a task, the lowest validation loss first."""
    results = [result for result, _ in outcomes(record)]
    rows: list[tuple[float, list[object]]] = []
    plain = [r for r in results if r.optimizer == PLAIN]
    for row in record["rows"]:
        name = row["optimizer"]
        own = [r for r in results if r.optimizer == name]
        loss = figure([r.val_loss for r in own])
        p = (
            ""
            if name == PLAIN
            else p_value(welch([r.val_loss for r in own], [r.val_loss for r in plain]))
        )
        times = record.get("times", {}).get(name)
        rows.append(
            (
                loss.mean if isinstance(loss, Figure) else float("inf"),
                [
                    "plain" if name == PLAIN else f"`{name}`",
                    f"{row['lr']:g}",
                    f"{row['weight_decay']:g}",
                    loss.text(4) if isinstance(loss, Figure) else "diverged",
                    p,
                    f"{times['ms']:.0f}" if times else "",
                    spread(times["times_plain"]) if times and name != PLAIN else "",
                    f"{record['state_bytes'][name] / 2**20:.2f}",
                ],
            )
        )
    rows.sort(key=lambda row: row[0])
    e, config = record["environment"], record["config"]
    said = (
        f"**{record['task']}**, {config['budget']}, {config['seeds']} seeds, mean ± standard "
        f"deviation; p against plain. `{record['command']}`: {e['processor']}, "
        f"torch {e['torch']}, {e['written'][:10]}. ms: of a whole training step, and times plain's "
        "in paired rounds (median and quartiles), one thread."
    )
    head = ["stage", "lr", "decay", "validation loss", "p", "ms", "times plain", "state, MiB"]
    return "\n\n".join([said, table(head, [cells for _, cells in rows])])


def page(text: str, folder: Path) -> str:
    files = [folder / f"{task}.json" for task in PLANS]
    blocks = [block(json.loads(file.read_text())) for file in files if file.exists()]
    return replace_block(text, "stages", "\n\n".join(blocks) or "Not yet run.")


def main(words: Sequence[str]) -> None:
    words, further = split(words)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--task", choices=list(PLANS), action="append", help="may be repeated")
    parser.add_argument("--optimizers", default=",".join(NAMES), help="muonw is needed")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--quick", action="store_true", help="a few steps, to see that it works")
    parser.add_argument("--times", action="store_true", help="time steps instead, of what was run")
    parser.add_argument("--rounds", type=harness.at_least_one, default=25, help="of --times")
    parser.add_argument("--page-only", action="store_true", help="train nothing")
    parser.add_argument("--out", type=Path, help="[default: runs/stages; -quick with --quick]")
    options = parser.parse_args(words)
    options.further, options.optimizers = further, options.optimizers.split(",")
    options.out = options.out or ROOT / "runs" / ("stages-quick" if options.quick else "stages")
    options.results = options.out if options.quick else ROOT / "docs" / "stages"
    for task in () if options.page_only else options.task or PLANS:
        if not options.times:
            run(task, options)
            continue
        file = options.results / f"{task}.json"
        record = json.loads(file.read_text())
        names = [row["optimizer"] for row in record["rows"]]
        keep(file, task, record | {"times": time_steps(task, names, options.rounds)})
    guide = ROOT / "docs" / "choosing.md"
    written = page(guide.read_text(encoding="utf-8"), options.results)
    if options.quick:
        print(written[written.index("<!-- begin: stages") : written.index("<!-- end: stages")])
    else:
        guide.write_text(written, encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
