"""Which learning rate should MuonW have where AdamW stood? `python benchmarks/default_rate.py`.

Four of the lab's tasks, made small, at two lengths each. AdamW is swept first, then MuonW, over
the rate of its matrices and that of its AdamW part separately: that plane holds every rule that a
default could be (both rates raised together, the matrices' alone, with their decay or without),
beginning from AdamW's tuned rate, its default, or what language models are given. A rule's regret
is its validation loss minus the lowest of the plane, in nats.

Each finished run is a line of docs/learning-rate/runs.jsonl: a killed command goes on where it was.
Then docs/learning-rate/default_rate.json and the tables of docs/learning-rate.md are written. The
runs take about 40 minutes of one busy core. All rates are in units of the scale "match_rms_adamw",
so nothing here depends on MuonW's default.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache, partial
from itertools import islice
from pathlib import Path
from typing import Any

import machine
import rate_runs
import torch
from parts import replace_block
from torch import nn

from muonkit import MuonW
from muonkit.lab import data, models
from muonkit.lab.objective import loss_of
from muonkit.lab.optimizers import BETAS, WEIGHT_DECAY, get_optimizer
from muonkit.lab.train import lr_factor

PAGE = Path(__file__).parents[1] / "docs" / "learning-rate.md"
FOLDER = PAGE.with_suffix("")

UNIT = 1e-3  # AdamW's default in torch; rates below are powers of two of it
DEFAULT, LANGUAGE = 0, -2  # 1e-3, and what of the grid is nearest to 3e-4
SWEEP = range(-2, 4)  # of AdamW's rate
DIAGONAL = range(-2, 5)  # of MuonW with one rate
RATIOS = (1, 2, 3)  # log2 of the matrices' rate over AdamW's
CHOSEN = math.log2(5)  # "unit_rms" over "match_rms_adamw": tried once the others were
FIRST = 1  # 2e-3, the README's first rate
WARM = (8.0, 500)  # a warm start's first factor, and the steps in which it falls by e


@dataclass(frozen=True)
class Case:
    """One task, small enough for seconds a run."""

    load: Callable[[], data.Data]
    build: Callable[[], nn.Module]
    batch: int
    steps: tuple[int, ...]
    dear: tuple[int, ...] = ()  # of these lengths only the rules that are in question are run


CASES = {
    "digits": Case(data.digits, partial(models.mlp, 64, 128, 10, 2), 64, (100, 400)),
    "mnist": Case(data.mnist, partial(models.mlp, 784, 128, 10, 3), 64, (150, 600)),
    "gpt": Case(
        partial(data.stdlib_text, 32),
        partial(models.GPT, 256, 32, 64, 2, 2),
        16,
        (100, 400),
        (400,),
    ),
    "cifar10": Case(data.cifar10, partial(models.ConvNet, 10, 8), 32, (75, 200), (75, 200)),
}
_VALIDATED = 2000  # images, or all windows of text


@dataclass(frozen=True, order=True)
class Point:
    """A run's rates, as powers of two of `UNIT`.

    `kind` is "adamw" (matrices is None); "muonw", whose matrices decay with the rate of the rest;
    "muonw, own decay", with their own; or "muonw, warm", whose matrices' rate begins `WARM` times
    higher.
    """

    kind: str
    matrices: float | None
    rest: float


@cache
def loaded(task: str) -> data.Data:
    return CASES[task].load()


def optimizer_of(point: Point, model: nn.Module) -> torch.optim.Optimizer:
    rest = UNIT * 2.0**point.rest
    if point.matrices is None:
        return get_optimizer("adamw").build(model, rest)  # type: ignore[return-value]
    rate = UNIT * 2.0**point.matrices
    own = point.kind == "muonw, own decay"
    return MuonW(
        model,
        lr=rate,
        weight_decay=WEIGHT_DECAY * (1.0 if own else rest / rate),
        adjust_lr_fn="match_rms_adamw",
        adamw_lr=rest,
        adamw_betas=BETAS,
        adamw_wd=WEIGHT_DECAY,
    )


def train(task: str, steps: int, point: Point, seed: int) -> float:
    """Validation loss after a run, in nats; infinite if it diverged."""
    case, source = CASES[task], loaded(task)
    torch.manual_seed(seed)
    model = case.build()
    optimizer = optimizer_of(point, model)
    peaks = [group["lr"] for group in optimizer.param_groups]
    for step in range(steps):
        factor = lr_factor(step, steps)
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            warm = point.kind == "muonw, warm" and group.get("algorithm") == "muon"
            first = 1 + (WARM[0] - 1) * math.exp(-step / WARM[1]) if warm else 1.0
            group["lr"] = peak * factor * first
        optimizer.zero_grad()
        loss, _ = loss_of(model, *source.batch(seed, step, case.batch))
        if not math.isfinite(loss.item()):
            return math.inf
        loss.backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        batches = islice(source.validation(), max(1, _VALIDATED // 1000) if task != "gpt" else None)
        return statistics.fmean(loss_of(model, x, y)[0].item() for x, y in batches)


# --- what is run -----------------------------------------------------------------------------

Losses = dict[Point, float]


def setting(task: str, steps: int) -> str:
    """What a run depends on beside its point and seed; runs of another setting are left out."""
    case = CASES[task]
    shape = ", ".join(map(str, getattr(case.build, "args", ())))
    return f"{task}({shape}), batches of {case.batch}, {steps} steps, decay {WEIGHT_DECAY}"


def losses_of(runs: Sequence[dict[str, Any]], task: str, steps: int) -> Losses:
    """The mean over seeds of every point of one task and length."""
    found: dict[Point, list[float]] = {}
    for run in runs:
        if run["setting"] == setting(task, steps):
            point = Point(run["kind"], run["matrices"], run["rest"])
            found.setdefault(point, []).append(run["loss"])
    return {point: statistics.fmean(losses) for point, losses in found.items()}


def tuned(losses: Losses) -> Point:
    """AdamW's best."""
    return min((p for p in losses if p.kind == "adamw"), key=losses.__getitem__)


def plane(losses: Losses) -> list[Point]:
    """MuonW's points, of which the best is what a regret is measured against."""
    return [p for p in losses if p.kind == "muonw" and p.matrices is not None]


def bases(losses: Losses) -> dict[str, float]:
    """The rates of AdamW that somebody may come with, as powers of two of `UNIT`."""
    return {"0.25e-3": LANGUAGE, "1e-3": DEFAULT, "AdamW's best": tuned(losses).rest}


def wanted(losses: Losses, dear: bool) -> Iterator[Point]:
    """The points of one task and length that are to be run, given those that were."""
    adamw = [p.rest for p in losses if p.kind == "adamw"]
    yield from (Point("adamw", None, rest) for rest in SWEEP)
    if not set(SWEEP) <= set(adamw):
        return
    best = tuned(losses).rest
    yield from (Point("adamw", None, best + d) for d in (-1, 1))
    yield from (Point("muonw", rate, rate) for rate in sorted({*DIAGONAL, best, best + 1}))
    if not dear:
        for base in sorted(set(bases(losses).values())):
            yield from (Point("muonw", base + ratio, base) for ratio in (0, *RATIOS))
        yield Point("muonw, own decay", DEFAULT + 2, DEFAULT)
        yield from (Point("muonw, warm", base, base) for base in sorted({DEFAULT, best}))
    if not {Point("muonw", rate, rate) for rate in DIAGONAL} <= losses.keys():
        return
    # Beside the best of the plane, until there is none better.
    at = min((p for p in plane(losses) if p.matrices == round(p.matrices)), key=losses.__getitem__)
    assert at.matrices is not None
    yield from (Point("muonw", at.matrices + d, at.rest) for d in (-1, 1))
    for base in sorted({DEFAULT, FIRST, best} if dear else {*bases(losses).values(), FIRST}):
        yield Point("muonw", base + CHOSEN, base)
    if dear:
        yield from (Point("muonw", DEFAULT + ratio, DEFAULT) for ratio in RATIOS)


def missing(path: Path, task: str, steps: int, seed: int) -> Point | None:
    """The next point to run, if any."""
    runs = [r for r in rate_runs.read(path) if r["seed"] == seed]
    losses = losses_of(runs, task, steps)
    dear = steps in CASES[task].dear
    return next((point for point in wanted(losses, dear) if point not in losses), None)


def measure(path: Path, tasks: Sequence[str], seed: int, limit: int | None) -> None:
    """Run what is missing, at most `limit` runs."""
    count = 0
    for task, steps in ((t, s) for t in tasks for s in CASES[t].steps):
        while (point := missing(path, task, steps, seed)) is not None:
            if limit is not None and count >= limit:
                return
            count += 1
            loaded(task)
            start = time.perf_counter()
            loss = train(task, steps, point, seed)
            record = {"setting": setting(task, steps), **asdict(point), "seed": seed, "loss": loss}
            rate_runs.append(path, {**record, "seconds": round(time.perf_counter() - start, 1)})
            print(f"{task} {steps} {point}: {loss:.4f}", flush=True)


# --- what came out ---------------------------------------------------------------------------

# What AdamW's rate becomes: by name, the point of a base.
RULES: dict[str, Callable[[float], Point]] = {
    "AdamW, for comparison": lambda base: Point("adamw", None, base),
    'both, `"match_rms_adamw"`': lambda base: Point("muonw", base, base),
    "both × 2": lambda base: Point("muonw", base + 1, base + 1),
    "both × 4": lambda base: Point("muonw", base + 2, base + 2),
    "both × 8": lambda base: Point("muonw", base + 3, base + 3),
    "matrices × 2": lambda base: Point("muonw", base + 1, base),
    "matrices × 4": lambda base: Point("muonw", base + 2, base),
    'matrices × 5, `"unit_rms"`': lambda base: Point("muonw", base + CHOSEN, base),
    "matrices × 8": lambda base: Point("muonw", base + 3, base),
    "matrices × 4, their decay too": lambda base: Point("muonw, own decay", base + 2, base),
    "matrices × 8, falling by e in 500 steps": lambda base: Point("muonw, warm", base, base),
}
Summary = dict[str, dict[str, Any]]


def summarise(runs: Sequence[dict[str, Any]]) -> Summary:
    """By task and length: the bests, and the regret of every rule from every base, in nats."""
    found: Summary = {}
    for task, steps in ((t, s) for t in CASES for s in CASES[t].steps):
        losses = losses_of(runs, task, steps)
        if not any(p.kind == "adamw" for p in losses) or not plane(losses):
            continue
        best = min(plane(losses), key=losses.__getitem__)
        froms = {**bases(losses), "2e-3": FIRST}
        regrets = {
            name: {
                base: losses[rule(at)] - losses[best]
                for base, at in froms.items()
                if rule(at) in losses
            }
            for name, rule in RULES.items()
        }
        found[f"{task}, {steps} steps"] = {
            "adamw": {"rate": rate(tuned(losses).rest), "loss": losses[tuned(losses)]},
            "muonw": {
                "matrices": rate(best.matrices or 0),
                "rest": rate(best.rest),
                "loss": losses[best],
            },
            "regret": regrets,
        }
    return found


def rate(log2: float) -> float:
    return float(f"{UNIT * 2**log2:.3g}")


def rules_table(summary: Summary) -> str:
    """Worst and mean regret over all tasks and lengths, of every rule from every base."""
    columns = ["0.25e-3", "1e-3", "2e-3", "AdamW's best"]
    lines = [
        "| what AdamW's rate becomes | " + " | ".join(f"from {c}" for c in columns) + " |",
        "|---|" + "--:|" * len(columns),
    ]
    for name in RULES:
        cells = []
        for base in columns:
            regrets = [case["regret"][name].get(base) for case in summary.values()]
            whole = [r for r in regrets if r is not None]
            of = "" if len(whole) == len(summary) else f" ({len(whole)} of {len(summary)})"
            cells.append(f"{max(whole):.2f}, {statistics.fmean(whole):.2f}{of}" if whole else "-")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def cases_table(summary: Summary) -> str:
    """For every task and length: the best rates and losses, and the losses at AdamW's default."""
    match, unit = 'both, `"match_rms_adamw"`', 'matrices × 5, `"unit_rms"`'
    shown = [("AdamW, for comparison", "1e-3"), (match, "1e-3"), (unit, "1e-3"), (unit, "2e-3")]
    lines = [
        "| task | AdamW's best | MuonW's best, matrices and rest | AdamW, 1e-3 | "
        '`"match_rms_adamw"`, 1e-3 | `"unit_rms"`, 1e-3 | `"unit_rms"`, 2e-3 |',
        "|---|" + "--:|" * 6,
    ]
    for task, case in summary.items():
        adamw, best = case["adamw"], case["muonw"]
        cells = [
            f"{adamw['loss']:.3f} at {adamw['rate']:g}",
            f"{best['loss']:.3f} at {best['matrices']:g}, {best['rest']:g}",
        ]
        for name, base in shown:
            regret = case["regret"][name].get(base)
            cells.append("-" if regret is None else f"{best['loss'] + regret:.3f}")
        lines.append(f"| {task} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def write(runs: Sequence[dict[str, Any]]) -> None:
    """JSON, and the tables between the page's markers."""
    summary = summarise(runs)
    text = json.dumps({"machine": machine.facts(), "cases": summary}, indent=1)
    (FOLDER / "default_rate.json").write_text(text + "\n")
    page = replace_block(PAGE.read_text(), "rules", rules_table(summary))
    PAGE.write_text(replace_block(page, "cases", cases_table(summary)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=int, help="stop after so many new runs, and write nothing")
    options = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    path = FOLDER / "runs.jsonl"
    measure(path, options.tasks, options.seed, options.limit)
    if options.limit is None:
        write(rate_runs.read(path))


if __name__ == "__main__":
    main()
