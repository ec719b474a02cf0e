"""The examples' losses at several ranks beside those of one process, as a table and a plot.

    python benchmarks/example_losses.py --json losses.json --plot losses.svg
    python benchmarks/example_losses.py --only "FSDP2, 2" --steps 40

Every run is an example as its command starts it, at its defaults: one model, one schedule, and one
sequence of global batches, cut over the data-parallel ranks. So every difference is rounding: ranks
sum gradients and products in another order than one process does, and training magnifies it from
step to step. How much, without any ranks, shows the run named `CONTROL`: one process with the
projections of queries, keys and values apart, which is the same mathematics in other products.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import harness
import machine

EXAMPLES = Path(__file__).parents[1] / "examples"
REFERENCE = "1 process"
CONTROL = "1 process, projections apart"
#: Name in the table: the example with its options, and its ranks.
RUNS = {
    REFERENCE: ("train_ddp", 1),
    CONTROL: ("train_fsdp2_tp", 1),
    "DDP ZeRO-1, 2": ("train_ddp", 2),
    "DDP ZeRO-1, reduce-scatter, 2": ("train_ddp --reduce-scatter", 2),
    "FSDP2, 2": ("train_fsdp2", 2),
    "FSDP2 x TP, 4": ("train_fsdp2_tp", 4),
    "DP x TP ZeRO-1, 4": ("train_dp_tp_zero1", 4),
}


def run(example: str, ranks: int, steps: int) -> dict[str, Any]:
    """The printed loss of every step, and the command; one thread for each rank."""
    script, *options = example.split()
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    end = [f"{script}.py", *options, "--steps", str(steps), "--every", "1"]
    done = subprocess.run(
        [sys.executable, *(start if ranks > 1 else []), *end],
        cwd=EXAMPLES,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
    )
    found = re.findall(r"^step +\d+  loss (\S+)$", done.stdout, re.MULTILINE)
    if done.returncode or len(found) != steps:
        raise SystemExit(f"{' '.join(end)} on {ranks} ranks: exit code {done.returncode} after "
                         f"{len(found)} of {steps} steps")  # fmt: skip
    return {
        "command": " ".join(
            [f"torchrun --nproc-per-node {ranks}" if ranks > 1 else "python", *end]
        ),
        "ranks": ranks,
        "losses": [float(loss) for loss in found],
    }


def deviations(runs: Mapping[str, Any]) -> dict[str, list[float]]:
    """|loss - loss of one process| by step, for every other run."""
    expected = runs[REFERENCE]["losses"]
    return {
        name: [round(abs(a - b), 6) for a, b in zip(record["losses"], expected, strict=True)]
        for name, record in runs.items()
        if name != REFERENCE
    }


def table(runs: Mapping[str, Any], every: int) -> str:
    """The losses of every so many steps, and each run's largest deviation over all steps."""
    steps = len(runs[REFERENCE]["losses"])
    rows = [["step", *runs], ["--:"] * (len(runs) + 1)]
    for step in sorted({1, *range(every, steps, every), steps}):
        rows.append([str(step), *(f"{r['losses'][step - 1]:.6f}" for r in runs.values())])
    for upto in sorted({min(every, steps), steps}):
        worst = {name: max(values[:upto]) for name, values in deviations(runs).items()}
        cells = (f"{worst[name]:.0e}" if name in worst else "" for name in runs)
        rows.append([f"largest deviation to step {upto}", *cells])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def plot(runs: Mapping[str, Any], path: Path) -> None:
    """Losses above, deviations from one process below, over steps."""
    # Here, because it takes a second that the table need not wait for.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from muonkit.lab.pictures import rendered

    figure = Figure(figsize=(8, 6), layout="constrained")
    FigureCanvasAgg(figure)
    above, below = figure.subplots(2, sharex=True)
    steps = range(1, len(runs[REFERENCE]["losses"]) + 1)
    apart = deviations(runs)
    for number, (name, record) in enumerate(runs.items()):
        # Curves lie on one another: the first ones are drawn wider, and stay visible.
        width = 1.0 + 1.2 * (len(runs) - 1 - number)
        style = {"color": f"C{number}", "label": name}
        above.plot(steps, record["losses"], linewidth=width, **style)
        if name in apart:
            # The losses are printed with six decimals; a logarithm has no zero.
            floored = [max(value, 5e-7) for value in apart[name]]
            below.plot(steps, floored, ".", markersize=2 * width, **style)
    above.set_ylabel("loss, nats per byte")
    above.legend(fontsize="small")
    below.set_yscale("log")
    below.set_ylabel("|loss - loss of one process|, 0 as 5e-7")
    below.set_xlabel("step")
    path.write_bytes(rendered(figure, path.suffix.removeprefix(".")))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--steps", type=int, default=200, help="of every run (200)")
    add("--every", type=int, default=20, help="steps between the table's rows (20)")
    add("--only", nargs="+", metavar="RUN", help=f"beside {REFERENCE!r}: {', '.join(RUNS)}")
    add("--json", type=Path, help="write losses and facts there")
    add("--plot", type=Path, help="draw losses and deviations there")
    options = parser.parse_args()
    if unknown := sorted({*(options.only or ())} - {*RUNS}):
        parser.error(f"--only {unknown[0]!r}: expected {', '.join(map(repr, RUNS))}")
    runs = {}
    for name, (example, ranks) in RUNS.items():
        if options.only is None or name in {REFERENCE, *options.only}:
            began = time.monotonic()
            runs[name] = run(example, ranks, options.steps)
            print(f"{name}: {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
    print(table(runs, options.every))
    if options.json:
        largest = {name: max(values) for name, values in deviations(runs).items()}
        facts = machine.facts() | {"threads": 1}  # of each rank
        record: dict[str, Any] = {"kind": "losses", "machine": facts}
        record |= {"largest_deviation": largest, "runs": runs}
        harness.write(options.json, record, indent=None)
    if options.plot:
        plot(runs, options.plot)


if __name__ == "__main__":
    main()
