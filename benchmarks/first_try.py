"""MuonW in six scripts as a stranger would try it: `python benchmarks/first_try.py`.

Every script of `first_scripts.py` is trained with the optimizer that it has, and with MuonW in its
place: by the README's rule, at the learning rate that the script has, and there with the scale
"match_rms_adamw", once at that rate and once at four times it. Nothing is tuned. Each finished run
is a line of docs/learning-rate/first_try.jsonl: a killed command goes on where it was. Then the
table of docs/learning-rate.md is written. The runs took half an hour of one busy core.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import rate_runs
import torch
from first_scripts import SCRIPTS, Make, Script
from parts import replace_block
from torch import nn

from muonkit import MuonW

PAGE = Path(__file__).parents[1] / "docs" / "learning-rate.md"
RUNS = PAGE.with_suffix("") / "first_try.jsonl"
SEEDS = 3


def _muonw(script: Script, factor: float, scale: str | None) -> Make:
    said = {} if script.weight_decay is None else {"weight_decay": script.weight_decay}

    def make(model: nn.Module) -> torch.optim.Optimizer:
        return MuonW(model, lr=factor * script.lr, adjust_lr_fn=scale, **said)

    return make


def _by_the_rule(script: Script) -> Make:
    """AdamW's default becomes 2e-3; a rate that somebody chose is doubled, in Moonlight's scale."""
    by_default = script.lr == 1e-3
    return _muonw(script, 2, "unit_rms" if by_default else "match_rms_adamw")


# What is tried in every script.
COLUMNS: dict[str, Callable[[Script], Make]] = {
    "theirs": lambda script: script.theirs,
    "MuonW by the rule": _by_the_rule,
    "MuonW": lambda script: _muonw(script, 1, "unit_rms"),
    "match_rms_adamw": lambda script: _muonw(script, 1, "match_rms_adamw"),
    "match_rms_adamw, 4 × lr": lambda script: _muonw(script, 4, "match_rms_adamw"),
}


HEADS = (
    "its optimizer",
    "MuonW by the rule",
    '`"unit_rms"`, lr as it is',
    '`"match_rms_adamw"`, lr as it is',
    '`"match_rms_adamw"`, 4 × lr',
)


def setting(script: Script) -> str:
    """What a run depends on beside its column and seed; runs of another setting are left out."""
    return f"{script.summary}; {script.settings}; {script.steps} steps"


def run(name: str, column: str, seed: int) -> dict[str, Any]:
    """One training: its line."""
    script, start = SCRIPTS[name], time.perf_counter()
    torch.manual_seed(seed)
    try:
        figure = script.run(COLUMNS[column](script), script.steps)
    except FloatingPointError:
        figure = math.inf
    return {
        "script": name,
        "optimizer": column,
        "seed": seed,
        "figure": figure,
        "seconds": round(time.perf_counter() - start, 1),
        "setting": setting(script),
    }


def measure(path: Path, names: Sequence[str], seeds: int) -> None:
    """Run what is missing."""
    done = {(r["script"], r["optimizer"], r["seed"], r["setting"]) for r in read(path)}
    for seed in range(seeds):
        for name in names:
            for column in COLUMNS:
                if (name, column, seed, setting(SCRIPTS[name])) not in done:
                    line = run(name, column, seed)
                    rate_runs.append(path, line, "figure")
                    print(*line.values(), flush=True)


def read(path: Path) -> list[dict[str, Any]]:
    """The finished runs of the scripts as they are."""
    runs = rate_runs.read(path, "figure")
    return [r for r in runs if r["setting"] == setting(SCRIPTS[r["script"]])]


def _cell(values: Sequence[float]) -> str:
    lost = sum(not math.isfinite(v) for v in values)
    if lost:
        return f"{lost} of {len(values)} diverged"
    mean = statistics.fmean(values)
    digits = 3 if mean < 10 else 1
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{mean:.{digits}f} ± {spread:.{digits}f}"


def table(runs: Sequence[dict[str, Any]]) -> str:
    """Every script's figure with every optimizer as Markdown, the best mean in bold."""
    lines = [
        "| script | its settings | figure | " + " | ".join(HEADS) + " |",
        "|---|---|---|" + "--:|" * len(COLUMNS),
    ]
    for name, script in SCRIPTS.items():
        found = {
            c: [r["figure"] for r in runs if (r["script"], r["optimizer"]) == (name, c)]
            for c in COLUMNS
        }
        if not all(found.values()):
            continue
        sign = -1 if script.higher else 1
        best = min(found, key=lambda c: sign * statistics.fmean(found[c]))
        cells = [f"**{_cell(v)}**" if c == best else _cell(v) for c, v in found.items()]
        arrow = "higher is better" if script.higher else "lower is better"
        head = f"{name}: {script.summary} | `{script.settings}`, {script.steps} steps"
        lines.append(f"| {head} | {script.figure} ({arrow}) | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scripts", nargs="+", choices=SCRIPTS, default=list(SCRIPTS))
    parser.add_argument("--seeds", type=int, default=SEEDS)
    options = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    measure(RUNS, options.scripts, options.seeds)
    PAGE.write_text(replace_block(PAGE.read_text(), "first try", table(read(RUNS))))


if __name__ == "__main__":
    main()
