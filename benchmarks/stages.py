"""Rank what stands around Muon: each stage alone, its learning rate and decay swept as plain's.

    python benchmarks/stages.py --task gpt --jobs 2
    python benchmarks/stages.py --task gpt --quick
    python benchmarks/stages.py --page-only

It runs `muonkit compare` with a sweep for every stage and for plain MuonW, keeps the figures in
docs/stages/TASK.json, and writes the block between `<!-- begin: stages -->` and
`<!-- end: stages -->` of docs/choosing.md from these files. What follows `--` goes to `compare`.
Stopped, the same command goes on. Losers stay in the table.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from evidence import QUICK, compare, merged, outcomes, split
from parts import Record, replace_block, table

from muonkit.lab.optimizers import OPTIMIZERS, get_optimizer
from muonkit.lab.results import Figure, figure, p_value, welch
from muonkit.lab.tasks import TASKS

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
    words = [task, "--optimizers", ",".join(options.optimizers), "--sweep", "--sweep-decay"]
    words += [*PLANS[task], "--jobs", str(options.jobs), "--threads", "1"]
    record = compare(
        merged(words, [*(QUICK if options.quick else ()), *options.further]), options.out / task
    )
    names = [row["optimizer"] for row in record["rows"]]
    record["state_bytes"] = {name: state_bytes(task, name) for name in names}
    options.results.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"kind": "stages", "task": task, **record}, indent=1) + "\n"
    (options.results / f"{task}.json").write_text(text)


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
        ms = figure([1e3 * r.seconds / r.steps for r in own])
        rows.append(
            (
                loss.mean if isinstance(loss, Figure) else float("inf"),
                [
                    "plain" if name == PLAIN else f"`{name}`",
                    f"{row['lr']:g}",
                    f"{row['weight_decay']:g}",
                    loss.text(4) if isinstance(loss, Figure) else "diverged",
                    p,
                    ms.text(1) if isinstance(ms, Figure) else "",
                    f"{record['state_bytes'][name] / 2**20:.2f}",
                ],
            )
        )
    rows.sort(key=lambda row: row[0])
    e, config = record["environment"], record["config"]
    said = (
        f"**{record['task']}**, {config['budget']}, {config['seeds']} seeds, mean ± standard "
        f"deviation; p against plain. `{record['command']}`: {e['processor']}, "
        f"{config.get('jobs', 1)} runs at a time with one thread each; torch {e['torch']}; "
        f"{e['written'][:10]}. ms: of a whole training step."
    )
    head = ["stage", "lr", "decay", "validation loss", "p", "ms", "state, MiB"]
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
    parser.add_argument("--page-only", action="store_true", help="train nothing")
    parser.add_argument("--out", type=Path, help="[default: runs/stages; -quick with --quick]")
    options = parser.parse_args(words)
    options.further, options.optimizers = further, options.optimizers.split(",")
    options.out = options.out or ROOT / "runs" / ("stages-quick" if options.quick else "stages")
    options.results = options.out if options.quick else ROOT / "docs" / "stages"
    if not options.page_only:
        for task in options.task or PLANS:
            run(task, options)
    guide = ROOT / "docs" / "choosing.md"
    written = page(guide.read_text(encoding="utf-8"), options.results)
    if options.quick:
        print(written[written.index("<!-- begin: stages") : written.index("<!-- end: stages")])
    else:
        guide.write_text(written, encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
