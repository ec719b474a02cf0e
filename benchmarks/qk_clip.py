"""QK-clip on a GPT whose attention logits explode: with and without it, and what it costs.

    python benchmarks/qk_clip.py --seeds 3 --jobs 2       # the curves: docs/evidence/qk-clip.json
    python benchmarks/qk_clip.py --overhead               # the times, added to the same file
    python benchmarks/qk_clip.py --page-only              # picture and tables from the file

The lab's `gpt` task (byte-level, width 128, 4 layers of 4 heads) with MuonW at `--lr`, eight times
its tuned rate, and no decay, which is what makes the logits grow. The learning rate of AdamW's
parameters is the tuned one. Both kinds of run see the same batches and begin with the same weights;
the one without QK-clip measures the same way, with a tau that nothing reaches. Logits are the
largest of all heads and layers in a step's batch, before that step's clipping. A finished run is
kept: the same command goes on where it was stopped.

The overhead is that of steps at the tuned rate, paired (harness.py): no QK-clip, every step, every
tenth step (a tenth of the measured difference of steps that measure: the others only count).
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import math
import statistics
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import harness
import machine
import torch
from curves import Runs
from parts import Record, machine_line, replace_block, spread, table

from muonkit import MuonW, QKClip
from muonkit.lab.data import stdlib_text
from muonkit.lab.models import GPT
from muonkit.lab.objective import loss_of
from muonkit.lab.tasks import get_task
from muonkit.lab.train import evaluate

DOCS = Path(__file__).parents[1] / "docs"
FILE = DOCS / "evidence" / "qk-clip.json"
PAGE = DOCS / "qk-clip.md"
NEVER = 1e30  # a tau that only measures
CONTEXT = 128
LIMIT = 1000.0


def train(seed: int, tau: float, lr: float, steps: int) -> Record:
    """Loss and largest logit of every step, and the validation loss at the end."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    data, task = stdlib_text(CONTEXT), get_task("gpt")
    model = GPT(256, CONTEXT)
    optimizer = MuonW(
        model,
        lr=lr,
        adamw_lr=task.lr["muonw"],
        weight_decay=0.0,
        adjust_lr_fn="match_rms_adamw",
        adamw_betas=(0.9, 0.95),
    )
    qk_clip = QKClip(model, optimizer, tau)
    losses, logits, clipped = [], [], []
    for step in range(steps):
        x, y = data.batch(seed, step, task.batch_size)
        optimizer.zero_grad()
        loss, _ = loss_of(model, x, y)
        loss.backward()
        optimizer.step()
        assert qk_clip.latest is not None
        losses.append(loss.item())
        logits.append(max(float(most.max()) for most in qk_clip.latest["max_logits"].values()))
        clipped.append(sum(int((eta < 1).sum()) for eta in qk_clip.latest["eta"].values()))
    return {
        "loss": losses,
        "max_logit": logits,
        "heads_clipped": clipped,
        "validation_loss": evaluate(model, data)[0],
    }


def measure(path: Path, options: argparse.Namespace) -> None:
    """The runs that the file has not, each written when it is done."""
    setting = {"lr": options.lr, "steps": options.steps, "tau": options.tau}
    runs = Runs(path, "qk-clip", setting, ("clip", "seed"))
    torch.set_num_threads(1)  # as every run's; the file says so
    with ProcessPoolExecutor(options.jobs) as pool:

        def trained(clip: bool, seed: int) -> Record:
            tau = options.tau if clip else NEVER
            return pool.submit(train, seed, tau, options.lr, options.steps).result()

        keys = [(clip, seed) for seed in range(options.seeds) for clip in (False, True)]
        runs.fill(keys, trained, options.jobs)


def read(path: Path) -> Record:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


# --- overhead -------------------------------------------------------------------------------------


def overhead(rounds: int, context: int) -> Record:
    """Paired steps of one model: without QK-clip, and with it in every step."""
    torch.manual_seed(0)
    data, task = stdlib_text(context), get_task("gpt")
    first = GPT(256, context)
    steps = {}
    for name in ("without", "with"):
        model = copy.deepcopy(first)
        optimizer = MuonW(model, lr=task.lr["muonw"], adjust_lr_fn="match_rms_adamw")
        if name == "with":
            QKClip(model, optimizer)
        batches = (data.batch(0, i, task.batch_size * CONTEXT // context) for i in range(10**9))
        steps[name] = functools.partial(_step, model, optimizer, batches)
    for step in steps.values():
        harness.timed(step, 2)
    results = harness.paired(
        {n: functools.partial(harness.timed, s) for n, s in steps.items()}, rounds
    )
    extra = harness.quartiles([each["with"] - each["without"] for each in results])
    ratio = harness.quartiles(harness.ratios(results, "with", "without"))
    return {
        "context": context,
        "batch": task.batch_size * CONTEXT // context,
        "rounds": rounds,
        "step_ms": harness.ms(statistics.median(harness.column(results, "without"))),
        "extra_ms": harness.ms(extra),
        "ratio": ratio,
        "ratio_every_10": tuple(1 + (each - 1) / 10 for each in ratio),
    }


def _step(model: Any, optimizer: Any, batches: Any) -> None:
    optimizer.zero_grad()
    loss_of(model, *next(batches))[0].backward()
    optimizer.step()


# --- the page -------------------------------------------------------------------------------------


def runs_table(record: Record) -> str:
    """One line for each seed and kind."""
    rows = []
    for run in record["runs"]:
        logits, losses = run["max_logit"], run["loss"]
        over = next((i + 1 for i, most in enumerate(logits) if most > LIMIT), None)
        late = logits[len(logits) // 10 :]
        rows.append(
            (
                f"tau = {record['setting']['tau']:g}" if run["clip"] else "none",
                run["seed"],
                f"{logits[-1]:.0f}",
                f"{max(late):.0f}",
                "never" if over is None else f"step {over}",
                f"{statistics.fmean(losses[-10:]):.3f}",
                f"{run['validation_loss']:.3f}",
            )
        )
    head = (
        "QK-clip",
        "seed",
        "last logit",
        "largest after the first tenth",
        f"above {LIMIT:g}",
        "training loss, last 10 steps",
        "validation loss",
    )
    return f"{machine_line(record)}\n\n{table(head, rows)}"


def overhead_table(record: Record) -> str:
    rows = [
        (
            f"{each['batch']} × {each['context']}",
            f"{each['step_ms']:.0f} ms",
            f"{spread(each['extra_ms'], 1)} ms",
            spread(each["ratio"], 3),
            spread(each["ratio_every_10"], 3),
        )
        for each in record["overhead"]
    ]
    head = ("batch × context", "step without", "more with it", "ratio, every step", "every 10th")
    on = machine_line({"machine": record["overhead_machine"]})
    return f"{on}\n\n{table(head, rows)}"


def plot(record: Record) -> Any:
    """Largest logit and loss against steps."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    tau = record["setting"]["tau"]
    for clip, color, dash, label in (
        (False, "#A0456B", "--", "without"),
        (True, "#1B9E9E", "-", f"QKClip, tau = {tau:g}"),
    ):
        runs = [run for run in record["runs"] if run["clip"] == clip]
        for i, run in enumerate(runs):
            steps = range(1, len(run["loss"]) + 1)
            style = {"color": color, "linestyle": dash, "alpha": 0.8, "linewidth": 1.3}
            left.plot(steps, run["max_logit"], label=label if i == 0 else None, **style)
            smooth = [statistics.fmean(run["loss"][max(0, s - 10) : s]) for s in steps]
            right.plot(steps, smooth, label=label if i == 0 else None, **style)
    left.set(yscale="log", xlabel="step", ylabel="largest attention logit of a step")
    left.axhline(tau, color="#808080", linewidth=0.8)
    right.set(xlabel="step", ylabel="training loss, nats per byte (mean of 10 steps)")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    left.legend(frameon=False)
    return figure


def write_page(record: Record) -> None:
    from muonkit.lab.pictures import rendered

    FILE.with_suffix(".svg").write_bytes(rendered(plot(record), "svg"))
    page = replace_block(PAGE.read_text(encoding="utf-8"), "qk-clip", runs_table(record))
    if "overhead" in record:
        page = replace_block(page, "qk-clip-overhead", overhead_table(record))
    PAGE.write_text(page, encoding="utf-8")


def main() -> int:
    parser = harness.parser(__doc__, rounds=60)
    parser.add_argument("--seeds", type=harness.at_least_one, default=3)
    parser.add_argument("--steps", type=harness.at_least_one, default=120)
    parser.add_argument("--jobs", type=harness.at_least_one, default=1)
    parser.add_argument("--lr", type=float, default=8 * get_task("gpt").lr["muonw"])
    parser.add_argument("--tau", type=float, default=100.0)
    parser.add_argument("--overhead", action="store_true", help="times instead of curves")
    parser.add_argument("--page-only", action="store_true", help="train nothing")
    options = parser.parse_args()
    if not 0 < options.tau < math.inf:
        parser.error(f"--tau is above 0, got {options.tau}")
    path = options.json or FILE
    if options.overhead:
        torch.set_num_threads(options.threads)
        measured = [overhead(options.rounds, context) for context in (128, 1024)]
        # Read after the measurement: the curves may have come meanwhile.
        # What is there of the curves, whatever they are of.
        found = {"overhead": measured, "overhead_machine": machine.facts()}
        harness.write(path, {**read(path), **harness.rounded(found)}, indent=None)
    elif not options.page_only:
        measure(path, options)
    record = read(path)
    print(runs_table(record) if "runs" in record else "no runs yet")
    if "overhead" in record:
        print(overhead_table(record))
    if path == FILE and "runs" in record:
        write_page(record)
    return 0


if __name__ == "__main__":
    sys.exit(main())
