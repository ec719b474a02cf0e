"""The curve of examples/train_gpt.py against AdamW's: docs/evidence/train-gpt.json, and the page.

    python benchmarks/gpt_recipe.py --seeds 2                      # at the example's own rates
    python benchmarks/gpt_recipe.py --seeds 3 --lr muonw=0.008,0.016,0.032 adamw=0.001,0.002,0.004
    python benchmarks/gpt_recipe.py --page-only                    # from the file

Every run is the example as its command starts it, on one thread. Embedding and head have the same
rate under both optimizers, which is higher than AdamW's for the matrices; so only the matrices are
trained otherwise. A finished run is kept: the same command goes on where it was stopped, and more
rates or seeds are added to those that are there.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import harness
import torch
from curves import Runs, last, mean, picture, reached
from parts import Record, machine_line, replace_block, table

ROOT = Path(__file__).resolve().parents[1]
FILE = ROOT / "docs" / "evidence" / "train-gpt.json"
PAGE = ROOT / "docs" / "evidence.md"
DEFAULTS = {"muonw": [0.016], "adamw": [0.002]}
TITLES = {"muonw": "MuonW", "adamw": "AdamW"}


def train(optimizer: str, lr: float, seed: int, steps: int, every: int) -> Record:
    """One run of the example, from its log."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log.jsonl"
        words = ["--optimizer", optimizer, "--lr", str(lr), "--seed", str(seed)]
        words += ["--steps", str(steps), "--every", str(every), "--validate-every", str(every)]
        done = subprocess.run(
            [sys.executable, "train_gpt.py", *words, "--log", str(log)],
            cwd=ROOT / "examples",
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
        )
        if done.returncode:
            raise SystemExit(f"examples/train_gpt.py {' '.join(words)}: exit {done.returncode}")
        facts, *lines = [json.loads(line) for line in log.read_text("utf-8").splitlines()]
    validated = [line for line in lines if "validation_loss" in line]
    return {
        "facts": facts,
        "loss": [line["loss"] for line in lines],
        "validation": [[line["step"], line["validation_loss"]] for line in validated],
        "seconds": validated[-1]["seconds"],
    }


def groups(record: Record) -> dict[tuple[str, float], list[Record]]:
    """The runs of each optimizer and rate."""
    found: dict[tuple[str, float], list[Record]] = {}
    for run in sorted(record["runs"], key=lambda run: (run["optimizer"] != "muonw", run["lr"])):
        found.setdefault((run["optimizer"], run["lr"]), []).append(run)
    return found


def best(record: Record, optimizer: str) -> tuple[float, list[Record]]:
    """The rate with the lowest mean of the last validation losses, and its runs."""
    rates = {lr: runs for (name, lr), runs in groups(record).items() if name == optimizer}
    return min(rates.items(), key=lambda item: sum(map(last, item[1])) / len(item[1]))


def block(record: Record) -> str:
    """Commands, table and picture."""
    facts = record["runs"][0]["facts"]
    goal = {run["seed"]: last(run) for run in best(record, "adamw")[1]}
    rows = []
    for (name, lr), runs in groups(record).items():
        steps = [reached(run, goal[run["seed"]]) for run in runs if run["seed"] in goal]
        is_ahead = name == "muonw" and steps and None not in steps
        rows.append(
            [
                TITLES[name],
                f"{lr:g}",
                len(runs),
                mean(map(last, runs)),
                mean((s for s in steps if s is not None), 0) if is_ahead else "—",
            ]
        )
    head = ["optimizer", "lr", "seeds", "validation loss", "steps to AdamW's best"]
    said = [
        machine_line(record),
        f"`python examples/train_gpt.py --steps {facts['steps']}`: {facts['parameters']:,} "
        f"parameters, batches of {facts['batch']} windows of {facts['context']} bytes, "
        f"embedding and head at {facts['embedding_lr']:g}, decay {facts['weight_decay']:g}.",
        table(head, rows),
        "![Validation loss of the GPT recipe against steps](evidence/train-gpt.svg)",
    ]
    return "\n\n".join(said)


def curves_of(record: Record) -> dict[str, list[Record]]:
    """For each optimizer the runs at its best rate, by what the picture calls them."""
    chosen = {name: best(record, name) for name in TITLES}
    return {f"{TITLES[name]}, lr {lr:g}": runs for name, (lr, runs) in chosen.items()}


def rates(words: list[str]) -> dict[str, list[float]]:
    """`muonw=0.01,0.02` and the like; an optimizer that is not named has the example's rate."""
    found = dict(DEFAULTS)
    for word in words:
        name, _, values = word.partition("=")
        if name not in DEFAULTS:
            raise SystemExit(f"--lr {word}: expected muonw=RATE,… or adamw=RATE,…")
        found[name] = [float(value) for value in values.split(",")]
    return found


def main(words: list[str] | None = None) -> int:
    parser = harness.parser(__doc__, threads=False)
    parser.add_argument("--seeds", type=harness.at_least_one, default=2)
    parser.add_argument("--steps", type=harness.at_least_one, default=200)
    parser.add_argument(
        "--every", type=harness.at_least_one, default=20, help="between validations"
    )
    parser.add_argument("--lr", nargs="+", default=[], metavar="OPTIMIZER=RATE,RATE,…")
    parser.add_argument("--page-only", action="store_true", help="train nothing")
    options = parser.parse_args(words)
    path = options.json or FILE
    if not options.page_only:
        torch.set_num_threads(1)  # as the example's; the file says so
        setting = {"steps": options.steps, "every": options.every}
        runs = Runs(path, "train-gpt", setting, ("optimizer", "lr", "seed"))
        for seed in range(options.seeds):
            for name, values in rates(options.lr).items():
                for lr in values:
                    key = (name, lr, seed)
                    run = runs.get(key, lambda key=key: train(*key, options.steps, options.every))
                    print(f"{name} lr {lr:g} seed {seed}: {last(run):.4f}", flush=True)
    record = json.loads(path.read_text(encoding="utf-8"))
    print(block(record))
    if path == FILE:
        picture(curves_of(record), FILE.with_suffix(".svg"))
        page = PAGE.read_text(encoding="utf-8")
        PAGE.write_text(replace_block(page, "train-gpt", block(record)), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
