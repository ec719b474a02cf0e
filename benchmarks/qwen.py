"""A Qwen-like language model: what PyTorch's change request for Muon claimed, tried here.

    python benchmarks/qwen.py --jobs 2        # the curves: docs/evidence/qwen.json, and the page
    python benchmarks/qwen.py --overhead      # the times of a step, added to the same file
    python benchmarks/qwen.py --page-only     # picture and tables from the file
    python benchmarks/qwen.py --quick         # a few steps, to see that it works

transformers' Qwen3 (RMS norm, grouped queries, QK norm, SwiGLU, tied head) of 2.4 M parameters on
the source of Python's standard library, bytes as tokens, with the lab's batches, schedule and
validation. Five optimizers: torch.optim.Muon beside AdamW; Moonlight's rule, as
tests/helpers/other_muons.py has it; MuonW with the scales "original" and "match_rms_adamw"; AdamW.
All multiply in float32, since the claim is of the rule and few CPUs have units for bfloat16; and
all decay gains too, as Moonlight's script does.

Claimed (github.com/pytorch/pytorch/pull/160213): torch's Muon has Moonlight's curve; with the
adjusted rate it converges better than without; a training is 2.5% slower than AdamW's. So on seed 0
the rates of AdamW, of MuonW and of MuonW with "original" are swept, a factor of two apart, widened
at an edge. Then, on every seed, each optimizer runs at its best rate, and the two scales at AdamW's
too. torch's and Moonlight's have MuonW's best rate, which has their unit. Beside the scale
"original" AdamW's part keeps the rate that it has beside the other one. And since a Muon gives the
table and the gains another step than the matrices, AdamW runs a second time with a rate of its own
for these, swept like the others.

A finished run is kept: the same command goes on where it was stopped.
"""

from __future__ import annotations

import copy
import functools
import json
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import harness
import machine
import torch
from curves import Runs, last, mean, picture, reached
from parts import Record, machine_line, replace_block, spread, table
from torch import Tensor, nn

from muonkit import MuonW, route
from muonkit.lab.data import Batch, stdlib_text
from muonkit.lab.objective import loss_of
from muonkit.lab.optimizers import BETAS, Float32Muon, Optimizer
from muonkit.lab.randomness import number_of
from muonkit.lab.sweep import Search, best_rate, side_by_side
from muonkit.lab.train import evaluate, lr_factor

ROOT = Path(__file__).resolve().parents[1]
FILE = ROOT / "docs" / "evidence" / "qwen.json"
QUICK = ROOT / "runs" / "qwen-quick.json"
PAGE = ROOT / "docs" / "evidence.md"
NOT_RUN = "Not yet run: `python benchmarks/qwen.py --jobs 2` and `--overhead` do it."
CONTEXT, BATCH, DECAY = 128, 8, 0.1
SIZES = {
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 32,
}
TITLES = {
    "muonw": 'MuonW, "match_rms_adamw"',
    "original": 'MuonW, "original"',
    "torch": "torch.optim.Muon and AdamW",
    "moonlight": "Moonlight's rule",
    "adamw": "AdamW",
    "adamw, two rates": "AdamW, a rate for the matrices and one for the rest",
    "muonw, AdamW's rate": 'MuonW, "match_rms_adamw", at AdamW\'s rate',
    "original, AdamW's rate": 'MuonW, "original", at AdamW\'s rate',
}
CLAIMED = ("muonw", "original", "torch", "moonlight", "adamw", "adamw, two rates")


class Key(NamedTuple):
    """One run: which optimizer, the rate of its matrices, that of the rest, and the seed."""

    optimizer: str
    lr: float
    adamw_lr: float
    seed: int


# --- the model and its optimizers ------------------------------------------------------------


class Qwen(nn.Module):
    """Tokens to logits, as the lab's functions want it."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        from transformers import Qwen3Config, Qwen3ForCausalLM

        torch.manual_seed(number_of("weights", seed))
        config = Qwen3Config(
            vocab_size=256, max_position_embeddings=CONTEXT, tie_word_embeddings=True, **SIZES
        )
        self.model = Qwen3ForCausalLM(config)

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.model(tokens, use_cache=False).logits
        return logits


def make(name: str, model: Qwen, lr: float, adamw_lr: float) -> Optimizer:
    """The optimizer of this name, with the same parameters to Muon under every name."""
    if name in ("muonw", "original"):
        scale = "match_rms_adamw" if name == "muonw" else "original"
        shared: dict[str, Any] = {"adamw_betas": BETAS, "decay_1d": True, "ns_dtype": "float32"}
        return MuonW(
            model, lr=lr, adamw_lr=adamw_lr, weight_decay=DECAY, adjust_lr_fn=scale, **shared
        )
    hidden = [each.param for each in route(model) if each.algorithm == "muon"]
    known = {id(p) for p in hidden}
    rest = [p for p in model.parameters() if id(p) not in known]
    adamw = {"lr": adamw_lr, "betas": BETAS, "weight_decay": DECAY, "fused": True}
    if name == "adamw":
        return torch.optim.AdamW([{"params": hidden, "lr": lr}, {"params": rest}], **adamw)
    if name == "torch":
        muon = torch.optim.Muon(hidden, lr=lr, weight_decay=DECAY, adjust_lr_fn="match_rms_adamw")
        return Float32Muon(muon, torch.optim.AdamW(rest, **adamw))
    sys.path.insert(0, str(ROOT))  # the tests are a package of the checkout
    from tests.helpers.other_muons import Moonlight

    assert lr == adamw_lr, "Moonlight's has one rate"
    return Moonlight(hidden, rest, lr=lr, wd=DECAY, adamw_betas=BETAS)


def train(key: Key, steps: int, evaluations: int) -> Record:
    """Every training loss, some validation losses, and the medians of a step's times."""
    torch.set_num_threads(1)
    data, model = stdlib_text(CONTEXT), Qwen(key.seed)
    optimizer = make(key.optimizer, model, key.lr, key.adamw_lr)
    peaks = [group["lr"] for group in optimizer.param_groups]
    validated = {round(i * steps / evaluations) for i in range(1, evaluations + 1)}
    losses, validation, taken = [], [[0, evaluate(model, data)[0]]], []
    for step in range(steps):
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * lr_factor(step, steps)
        loss, *seconds = one_step(model, optimizer, data.batch(key.seed, step, BATCH))
        losses.append(loss)
        taken.append(seconds)
        if step + 1 in validated:
            validation.append([step + 1, evaluate(model, data)[0]])
    whole, of_it = map(statistics.median, zip(*taken, strict=True))
    return {
        "loss": losses,
        "validation": validation,
        "step_ms": harness.ms(whole),
        "optimizer_ms": harness.ms(of_it),
    }


def one_step(model: Qwen, optimizer: Optimizer, batch: Batch) -> tuple[float, float, float]:
    """The loss of a training step, its seconds, and the optimizer's part of these."""
    losses = []

    def differentiate() -> None:
        optimizer.zero_grad()
        loss, _ = loss_of(model, *batch)
        loss.backward()
        losses.append(loss.item())

    before, of_it = harness.timed(differentiate), harness.timed(optimizer.step)
    return losses[0], before + of_it, of_it


# --- which runs ------------------------------------------------------------------------------


class Trainer:
    """Trains what a file has not, some runs at a time."""

    def __init__(self, runs: Runs, jobs: int, steps: int, evaluations: int) -> None:
        self.runs, self.jobs, self.length = runs, jobs, (steps, evaluations)

    def ensure(self, keys: Iterable[Key]) -> None:
        missing = [key for key in dict.fromkeys(keys) if self.runs.find(key) is None]
        if self.jobs == 1:
            for key in missing:
                self._add(key, train(key, *self.length))
            return
        with ProcessPoolExecutor(self.jobs, mp_context=get_context("spawn")) as pool:
            waiting = {pool.submit(train, key, *self.length): key for key in missing}
            for future in as_completed(waiting):
                self._add(waiting[future], future.result())

    def _add(self, key: Key, outcome: Record) -> None:
        run = self.runs.add(key, outcome)
        print(f"{key.optimizer} lr {key.lr:g}, {key.adamw_lr:g} seed {key.seed}: {last(run):.4f}",
              flush=True)  # fmt: skip

    def search(
        self, searches: Mapping[str, Search[float]], key_of: Callable[[str, float], Key]
    ) -> dict[str, float]:
        """The best rate by each of the searches, which go side by side."""

        def losses_of(wanted: Mapping[str, Sequence[float]]) -> dict[str, list[float]]:
            keys = {name: [key_of(name, lr) for lr in rates] for name, rates in wanted.items()}
            self.ensure(key for each in keys.values() for key in each)
            return {
                name: [
                    loss if (loss := last(self.runs.find(key) or {})) == loss else float("inf")
                    for key in each
                ]
                for name, each in keys.items()
            }

        return side_by_side(searches, losses_of)


def all_runs(trainer: Trainer, seeds: int) -> None:
    """Sweeps on seed 0, then every seed at what they chose, which goes into the record."""
    found = trainer.search(
        {"adamw": best_rate(0.002, 3), "muonw": best_rate(0.008, 3)},
        lambda name, lr: Key(name, lr, lr, 0),
    )
    beside = found["muonw"]
    # Of a matrix of 192 x 192 "original" makes an update 2.8 times smaller; of others up to 4.5.
    both = {"original": best_rate(4 * beside, 3), "rest": best_rate(8 * found["adamw"], 3)}
    matrices = found["adamw"]
    found |= trainer.search(
        both,
        lambda name, lr: (
            Key("adamw", matrices, lr, 0) if name == "rest" else Key(name, lr, beside, 0)
        ),
    )
    trainer.ensure(Key(*case, seed) for seed in range(seeds) for case in cases(found).values())
    trainer.runs.keep(chosen=found)


def cases(chosen: Mapping[str, float]) -> dict[str, tuple[str, float, float]]:
    """What runs on every seed, by its title: optimizer, rate of the matrices, rate of the rest."""
    ours, theirs = chosen["muonw"], chosen["adamw"]
    return {
        "muonw": ("muonw", ours, ours),
        "original": ("original", chosen["original"], ours),
        "torch": ("torch", ours, ours),
        "moonlight": ("moonlight", ours, ours),
        "adamw": ("adamw", theirs, theirs),
        "adamw, two rates": ("adamw", theirs, chosen["rest"]),
        "muonw, AdamW's rate": ("muonw", theirs, theirs),
        "original, AdamW's rate": ("original", theirs, theirs),
    }


# --- the step's share of the time ------------------------------------------------------------


def overhead(rounds: int, windows: int) -> Record:
    """Whole training steps of all optimizers in turn; Moonlight's has our products, so not its."""
    data, first = stdlib_text(CONTEXT), Qwen(0)
    tasks = {}
    for name in ("muonw", "torch", "adamw"):
        model = copy.deepcopy(first)
        optimizer = make(name, model, 1e-3, 1e-3)
        tasks[name] = functools.partial(one_step, model, optimizer, data.batch(0, 0, windows))
        tasks[name]()
    taken = harness.paired(tasks, rounds)
    whole, of_it = ([{name: each[i] for name, each in r.items()} for r in taken] for i in (1, 2))

    def medians(results: list[dict[str, float]]) -> dict[str, float]:
        return {n: harness.ms(statistics.median(harness.column(results, n))) for n in tasks}

    ratio = {n: harness.quartiles(harness.ratios(whole, n, "adamw")) for n in ("muonw", "torch")}
    found = {"step_ms": medians(whole), "optimizer_ms": medians(of_it), "ratio": ratio}
    return {"windows": windows, "rounds": rounds, **found}


# --- the page --------------------------------------------------------------------------------


def runs_of(record: Record) -> dict[str, list[Record]]:
    """The runs of all seeds, by the title of the case."""
    fields = ("optimizer", "lr", "adamw_lr")
    return {
        title: [run for run in record["runs"] if tuple(run[f] for f in fields) == case]
        for title, case in cases(record["chosen"]).items()
    }


def better_adamw(found: Mapping[str, list[Record]]) -> str:
    """That with one rate or that with two, by the mean of the seeds."""
    means = {n: statistics.fmean(map(last, found[n])) for n in ("adamw", "adamw, two rates")}
    return min(means, key=means.__getitem__)


def curves_table(record: Record) -> str:
    found = runs_of(record)
    rival = better_adamw(found)
    goal = {run["seed"]: last(run) for run in found[rival]}
    rows = []
    for title, runs in found.items():
        steps = [reached(run, goal[run["seed"]]) for run in runs]
        rows.append(
            [
                TITLES[title],
                f"{runs[0]['lr']:g}",
                f"{runs[0]['adamw_lr']:g}",
                len(runs),
                mean(map(last, runs), 4),
                mean([s for s in steps if s is not None], 0) if None not in steps else "—",
                f"{statistics.fmean(r['optimizer_ms'] / r['step_ms'] for r in runs):.0%}",
            ]
        )
    with_rates = " with two rates" if rival != "adamw" else ""
    head = ["optimizer", "lr of matrices", "lr of the rest", "seeds", "validation loss",
            f"steps to the loss of AdamW{with_rates}", "optimizer's share of a step"]  # fmt: skip
    return table(head, rows)


def deviations_table(record: Record) -> str:
    """How far losses of the same rule at the same rate are apart, over all seeds."""
    found = runs_of(record)
    ours = {run["seed"]: run["loss"] for run in found["muonw"]}
    steps = len(next(iter(ours.values())))
    marks = [step for step in (20, 100, steps) if step <= steps]
    rows = []
    for name in ("torch", "moonlight"):
        apart = [[abs(a - b) for a, b in zip(run["loss"], ours[run["seed"]], strict=True)]
                 for run in found[name]]  # fmt: skip
        both = zip(found[name], found["muonw"], strict=True)
        ends = [last(run) - last(mine) for run, mine in both]
        rows.append([TITLES[name], *(f"{max(max(each[:mark]) for each in apart):.1e}"
                                     for mark in marks), mean(ends, 4)])  # fmt: skip
    head = ["against MuonW", *(f"largest difference of losses to step {mark}" for mark in marks),
            "validation loss at the end, difference"]  # fmt: skip
    return table(head, rows)


def sweep_line(record: Record) -> str:
    chosen = record["chosen"]
    on_seed_0 = [run for run in record["runs"] if run["seed"] == 0]
    swept = {
        "muonw": ("muonw", "lr", lambda run: run["lr"] == run["adamw_lr"]),
        "adamw": ("adamw", "lr", lambda run: run["lr"] == run["adamw_lr"]),
        "original": ("original", "lr", lambda run: run["adamw_lr"] == chosen["muonw"]),
        "rest": ("adamw", "adamw_lr", lambda run: run["lr"] == chosen["adamw"]),
    }
    said = []
    for name, (optimizer, field, belongs) in swept.items():
        tried = sorted(
            (run[field], last(run))
            for run in on_seed_0
            if run["optimizer"] == optimizer and belongs(run)
        )
        cells = (f"**{lr:g}: {loss:.4f}**" if lr == chosen[name] else f"{lr:g}: {loss:.4f}"
                 for lr, loss in tried)  # fmt: skip
        said.append(f"{TITLES.get(name, 'the rest under AdamW')}: {', '.join(cells)}")
    return "Tried on seed 0 (rate: validation loss): " + "; ".join(said) + "."


def overhead_table(record: Record) -> str:
    rows = []
    for each in record["overhead"]:
        for name, ratio in each["ratio"].items():
            whole, of_it = each["step_ms"][name], each["optimizer_ms"][name]
            rows.append([f"{each['windows']} × {CONTEXT}", TITLES[name], f"{whole:.0f}",
                         f"{of_it:.0f} ({of_it / whole:.0%})",
                         f"{each['step_ms']['adamw']:.0f}", spread(ratio)])  # fmt: skip
    head = ["bytes in a batch", "optimizer", "ms/step", "of it optimizer", "AdamW's ms/step",
            "ratio to AdamW's"]  # fmt: skip
    return table(head, rows, left=2)


def block(record: Record) -> str:
    setting = record["setting"]
    said = [
        machine_line(record),
        f"{setting['steps']} steps, batches of {BATCH} windows of {CONTEXT} bytes, decay {DECAY}.",
        curves_table(record),
        deviations_table(record),
        sweep_line(record),
        "![Validation loss of the Qwen-like model against steps](evidence/qwen.svg)",
    ]
    if "overhead" in record:
        paired = {"machine": record["overhead_machine"]}
        said += [f"Whole training steps, in turn: {machine_line(paired)}", overhead_table(record)]
    return "\n\n".join(said)


def write_page() -> None:
    made = NOT_RUN
    if FILE.exists() and "chosen" in (record := read(FILE)):
        made = block(record)
        found = runs_of(record)
        curves = {f"{TITLES[name]}, lr {found[name][0]['lr']:g}": found[name] for name in CLAIMED}
        picture(curves, FILE.with_suffix(".svg"))
    page = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(replace_block(page, "qwen", made), encoding="utf-8")


def read(path: Path) -> Record:
    record: Record = json.loads(path.read_text(encoding="utf-8"))
    return record


def main(words: list[str] | None = None) -> int:
    parser = harness.parser(__doc__, rounds=30)
    parser.add_argument("--seeds", type=harness.at_least_one, default=2)
    parser.add_argument("--steps", type=harness.at_least_one, default=400)
    parser.add_argument("--jobs", type=harness.at_least_one, default=1, help="runs at a time")
    parser.add_argument("--overhead", action="store_true", help="times instead of curves")
    parser.add_argument("--page-only", action="store_true", help="train nothing")
    parser.add_argument("--quick", action="store_true", help=f"3 steps, into {QUICK.name}")
    options = parser.parse_args(words)
    path = options.json or (QUICK if options.quick else FILE)
    steps, evaluations = (3, 1) if options.quick else (options.steps, 10)
    setting = {"steps": steps, "context": CONTEXT, "batch": BATCH, "decay": DECAY, "sizes": SIZES}
    runs = None if options.page_only else Runs(path, "qwen", setting, Key._fields)
    if runs and options.overhead:
        torch.set_num_threads(options.threads)
        measured = [overhead(1 if options.quick else options.rounds, n) for n in (BATCH, 4 * BATCH)]
        runs.keep(overhead=measured, overhead_machine=machine.facts())
    elif runs:
        torch.set_num_threads(1)  # as every run's; the file says so
        all_runs(Trainer(runs, options.jobs, steps, evaluations), options.seeds)
    if path.exists() and "chosen" in (record := read(path)):
        print(block(record))
    if path == FILE:
        write_page()
    return 0


if __name__ == "__main__":
    sys.exit(main())
