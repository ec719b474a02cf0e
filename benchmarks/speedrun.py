"""CIFAR-10 to 94%, run by run: docs/evidence/cifar-speedrun.json, and its table on the page.

    python benchmarks/speedrun.py --optimizers muonw sgd --seeds 2 --jobs 2
    python benchmarks/speedrun.py --page-only

Every run is examples/cifar_speedrun.py as its command starts it. It takes 15 to 18 minutes of a
core with AMX, and 1.5 hours of one with AVX2: it is kept after every epoch in --out, and a finished
one in the file, so the same command goes on where it was stopped. What follows `--` goes to the
example. Each of the runs that go side by side (--jobs) has --threads threads.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import harness
import torch
from curves import Runs, mean
from parts import Record, machine_line, replace_block, table

ROOT = Path(__file__).resolve().parents[1]
FILE = ROOT / "docs" / "evidence" / "cifar-speedrun.json"
PAGE = ROOT / "docs" / "evidence.md"
GOAL, TRAIN_IMAGES = 0.94, 50_000
TITLES = {
    "muonw": "MuonW",
    "muon": "Muon, and SGD for biases and head",
    "sgd": "SGD, Nesterov, lookahead",
}
NOT_RUN = "Not yet run to its end: `python benchmarks/speedrun.py --seeds 2 --jobs 2` does it."


def train(optimizer: str, seed: int, out: Path, threads: int, further: list[str]) -> Record:
    """One run of the example, from its own file."""
    found = out / f"{optimizer}-seed{seed}.json"
    words = ["--optimizer", optimizer, "--first-seed", str(seed), "--json", str(found)]
    words += ["--checkpoint", str(out), *further]
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "cifar_speedrun.py"), *words],
        env={**os.environ, "OMP_NUM_THREADS": str(threads)},
    )
    if done.returncode:
        raise SystemExit(f"examples/cifar_speedrun.py {' '.join(words)}: exit {done.returncode}")
    (run,) = json.loads(found.read_text(encoding="utf-8"))["runs"]
    return {key: value for key, value in run.items() if key not in ("optimizer", "seed")}


def to_goal(run: Record) -> tuple[float, float] | None:
    """Epochs and seconds to the goal: by one view after an epoch, or by six at the end."""
    # The last epoch may be a part of one.
    whole = run["steps"] / (TRAIN_IMAGES // run["batch_size"])
    for each in run["epochs"]:
        if each["accuracy"] >= GOAL:
            return min(each["epoch"], whole), each["seconds"]
    return (whole, run["seconds"]) if run["accuracy"] >= GOAL else None


def block(record: Record) -> str:
    rows = []
    for name, title in TITLES.items():
        runs = [run for run in record["runs"] if run["optimizer"] == name]
        if not runs:
            continue
        at_goal = [found for run in runs if (found := to_goal(run))]
        rows.append(
            [
                title,
                len(runs),
                mean((run["accuracy"] * 100 for run in runs), 2),
                mean((run["accuracy_one_view"] * 100 for run in runs), 2),
                f"{len(at_goal)} of {len(runs)}",
                mean((epochs for epochs, _ in at_goal), 1) if at_goal else "—",
                mean((seconds for _, seconds in at_goal), 0) if at_goal else "—",
                mean((run["seconds"] for run in runs), 0),
                f"{runs[0]['flops']:.3g}",
                ", ".join(sorted({run["dtype"] for run in runs})),
            ]
        )
    head = ["optimizer", "seeds", "accuracy, %", "of one view, %", f"at {GOAL:.0%}",
            "epochs to it", "seconds to it", "seconds in all", "FLOPs of a run",
            "dtype"]  # fmt: skip
    each = "; ".join(
        f"{TITLES[run['optimizer']]}, seed {run['seed']}: "
        + ", ".join(f"{epoch['accuracy'] * 100:.2f}" for epoch in run["epochs"])
        for run in record["runs"]
    )
    said = f"Accuracy of one view after each epoch, in %: {each}."
    return "\n\n".join([machine_line(record), table(head, rows), said])


def main(words: list[str] | None = None) -> int:
    words = sys.argv[1:] if words is None else words
    at = words.index("--") if "--" in words else len(words)
    parser = harness.parser(__doc__, threads=False)
    parser.add_argument("--optimizers", nargs="+", choices=TITLES, default=["muonw", "sgd"])
    parser.add_argument("--seeds", type=harness.at_least_one, default=2)
    parser.add_argument("--jobs", type=harness.at_least_one, default=1, help="runs at a time")
    parser.add_argument("--threads", type=harness.at_least_one, default=1, help="of each run")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "speedrun")
    parser.add_argument("--page-only", action="store_true", help="train nothing")
    options, further = parser.parse_args(words[:at]), words[at + 1 :]
    path = options.json or FILE
    if not options.page_only:
        torch.set_num_threads(options.threads)  # what the file says of the machine
        setting = {"options": further, "threads": options.threads}
        runs = Runs(path, "speedrun", setting, ("optimizer", "seed"))
        keys = [(name, seed) for seed in range(options.seeds) for name in options.optimizers]
        ways = {"out": options.out, "threads": options.threads, "further": further}
        runs.fill(keys, functools.partial(train, **ways), options.jobs)
    if path.exists():
        print(block(json.loads(path.read_text(encoding="utf-8"))))
    if path == FILE:
        write_page()
    return 0


def write_page() -> None:
    made = block(json.loads(FILE.read_text(encoding="utf-8"))) if FILE.exists() else NOT_RUN
    page = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(replace_block(page, "cifar-speedrun", made), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
