"""How MuonW's lead over AdamW changes with the length of a training, both tuned alike.

    python benchmarks/length.py --jobs 2
    python benchmarks/length.py --steps 4000 --optimizers muonw adamw --jobs 2
    python benchmarks/length.py --quick
    python benchmarks/length.py --page-only

For each length it runs `muonkit compare gpt` with one optimizer at a time: the learning rate, a
rate of its own for embeddings and head, and the weight decay are swept, for all of them alike, and
then every seed is trained. A length of TUNED_BY is not swept: it takes what a shorter one found.
AdamW is there with a beta2 of 0.95 and of 0.99. What each found is kept
in docs/evidence/gpt-length.json, and the block `gpt-length` of docs/evidence.md is written from it.
What follows `--` goes to `compare`. Stopped, the same command goes on, on whichever machine: what
the file has is not trained again.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

import harness
from curves import Runs
from evidence import as_tuned, compare, machines, merged, outcomes, split, without_sweep
from parts import Record, replace_block, table

from muonkit.lab.results import Figure, figure, p_value, welch

ROOT = Path(__file__).resolve().parents[1]
FILE = ROOT / "docs" / "evidence" / "gpt-length.json"
PAGE = ROOT / "docs" / "evidence.md"
OURS, RIVALS = "muonw", ("adamw", "adamw-0.99")
LENGTHS = (400, 1600, 4000)
# A sweep of twenty runs of 4,000 steps would be three hours of two cores, for each optimizer.
TUNED_BY = {4000: 1600}
SWEEP = ("--sweep", "--sweep-embedding-lr", "--sweep-decay")
WORDS = (*SWEEP, "--seeds", "3", "--threads", "1")
TASK = "gpt"
QUICK_TASK, QUICK = "digits", ("--sweep-points", "3", "--seeds", "2", "--evaluations", "2")


def kept(path: Path, options: argparse.Namespace) -> Runs:
    """What the file has, by length and optimizer: what `muonkit compare` found."""
    task, few = (QUICK_TASK, QUICK) if options.quick else (TASK, ())
    words = [task, *merged(WORDS, [*few, *options.further])]
    return Runs(path, "gpt-length", {"words": words}, ("steps", "optimizer"))


def tuned_before(runs: Runs, steps: int, name: str) -> list[str]:
    """The words that give an optimizer what a shorter length found.

    Raises:
        SystemExit: that length has not this optimizer.
    """
    found = runs.find((TUNED_BY[steps], name))
    if found is None:
        raise SystemExit(
            f"{steps} steps take what {TUNED_BY[steps]} found, which {runs.path} lacks for {name}: "
            f"run --steps {TUNED_BY[steps]} first, or leave it out of --optimizers"
        )
    (row,) = found["rows"]
    return as_tuned(row)


def run(runs: Runs, options: argparse.Namespace) -> None:
    """Train what the file lacks, one length after another, `--jobs` runs at a time."""
    words = runs.record["setting"]["words"]
    task, *rest = (word for word in words if word not in SWEEP)
    unswept = [task, *without_sweep(rest)]
    # A length may take what a shorter one found.
    for steps in sorted(options.steps):
        keys = [(steps, name) for name in options.optimizers if runs.find((steps, name)) is None]
        jobs_of_each = max(1, options.jobs // max(1, len(keys)))

        def train(steps: int, name: str, jobs: int = jobs_of_each) -> Record:
            asked = ["--steps", str(steps), "--optimizers", name, "--jobs", str(jobs)]
            out = options.out / f"{steps}-{name}"
            if steps not in TUNED_BY:
                return compare([*words, *asked], out)
            return compare([*unswept, *asked, *tuned_before(runs, steps, name)], out)

        runs.fill(keys, train, options.jobs)


def losses(found: Record) -> list[float | None]:
    return [result.val_loss for result, _ in outcomes(found)]


def best_rival(found: dict[str, Record]) -> str | None:
    """The AdamW with the lowest mean loss of those that were run; None where all diverged."""
    there = [name for name in RIVALS if name in found]
    means = {name: loss.mean for name in there if (loss := figure(losses(found[name])))}
    return min(means, key=means.__getitem__) if means else None


def lead(ours: Record, theirs: Record, timed: Record | None) -> list[str]:
    """Steps in which MuonW reaches the rival's final loss of the same seed; times fewer than it
    took; and times fewer seconds, forward and backward taking what they took where that was least:
    they are the same for both, and only what else a machine does tells them apart. A dash where a
    seed did not reach it.

    Args:
        timed: an AdamW whose seconds are of the CPU that MuonW's are of; None: there is none.
    """
    ends = {result.seed: result.val_loss for result, _ in outcomes(theirs)}
    reached = []
    for result, curve in outcomes(ours):
        end = ends[result.seed]
        point = None if end is None else curve.reaches(end)
        reached.append(None if point is None else point[0])
    steps = figure(reached)
    if steps is None or None in reached:
        return ["—" if steps is None else steps.text(0), "—", "—"]
    fewer = max(result.steps for result, _ in outcomes(theirs)) / steps.mean
    if timed is None:
        return [steps.text(0), f"{fewer:.2f}", "—"]
    both = [[result for result, _ in outcomes(found)] for found in (ours, timed)]
    passes = min(fmean(r.step_ms - r.optimizer_ms for r in results) for results in both)
    mine, other = (passes + fmean(r.optimizer_ms for r in results) for results in both)
    return [steps.text(0), f"{fewer:.2f}", f"{fewer * other / mine:.2f}"]


def on_the_same_cpu(found: dict[str, Record], rival: str) -> Record | None:
    """An AdamW that ran on MuonW's kind of CPU, the rival if it did: its beta2 is nothing to its
    seconds, and times of two kinds of CPU are not to be divided.
    """
    cpu = found[OURS]["environment"]["processor"]
    there = (found[name] for name in (rival, *RIVALS) if name in found)
    return next((each for each in there if each["environment"]["processor"] == cpu), None)


def said_of(loss: Figure | None) -> str:
    return "diverged" if loss is None else loss.text(4)


def block(record: Record) -> str:
    """A table of the lengths, and one of what every sweep chose."""
    by_length: dict[int, dict[str, Record]] = {}
    for each in record["runs"]:
        by_length.setdefault(each["steps"], {})[each["optimizer"]] = each
    leads: list[list[str]] = []
    for steps, found in sorted(by_length.items()):
        if OURS not in found or not (rival := best_rival(found)):
            continue
        ours, theirs = losses(found[OURS]), losses(found[rival])
        cells = [f"{steps:,}", said_of(figure(ours)), said_of(figure(theirs)), f"`{rival}`"]
        reached = lead(found[OURS], found[rival], on_the_same_cpu(found, rival))
        leads.append([*cells, p_value(welch(ours, theirs)), *reached])
    chosen: list[list[str]] = []
    for each in record["runs"]:
        (row,) = each["rows"]
        apart = row["embedding_lr"]
        rates = row["lr"], row["lr"] if apart is None else apart, row["weight_decay"]
        cells = [f"{each['steps']:,}", f"`{each['optimizer']}`", *(f"{x:g}" for x in rates)]
        chosen.append([*cells, said_of(figure(losses(each))), f"{len(each['sweep'])}"])
    left = [
        f"{steps:,} steps, `{name}`"
        for steps in LENGTHS
        for name in (OURS, *RIVALS)
        if name not in by_length.get(steps, {})
    ]
    words = " ".join(record["setting"]["words"])
    said = (
        f"`muonkit compare {words}` of each, by `python benchmarks/length.py`: "
        f"{machines(record['runs'])}. Mean ± standard deviation over seeds. Seconds are reckoned "
        "with the same forward and backward for both, the shorter of theirs, on one kind of CPU."
    )
    for steps in sorted(TUNED_BY.keys() & by_length.keys()):
        said += (
            f" {steps:,} steps were not swept: each has the rates and the decay of "
            f"{TUNED_BY[steps]:,}."
        )
    said += f" Not yet run: {'; '.join(left)}." if left else ""
    head = ["steps", "MuonW", "AdamW", "which", "p", "steps to AdamW's loss"]
    head += ["times fewer steps", "times fewer seconds"]
    tried = ["steps", "optimizer", "lr", "embeddings' lr", "decay", "validation loss", "runs tried"]
    parts = [said, table(head, leads)] if leads else [said]
    return "\n\n".join([*parts, "What the sweeps chose:", table(tried, chosen)])


def main(words: Sequence[str]) -> None:
    words, further = split(words)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--steps", type=harness.at_least_one, nargs="+", default=list(LENGTHS), help="lengths"
    )
    names = (OURS, *RIVALS)
    parser.add_argument("--optimizers", nargs="+", choices=names, default=list(names))
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, a thread each")
    parser.add_argument("--quick", action="store_true", help="a few steps, to see that it works")
    parser.add_argument("--page-only", action="store_true", help="train nothing")
    parser.add_argument("--out", type=Path, help="[default: runs/length; -quick with --quick]")
    options = parser.parse_args(words)
    options.further = further
    if options.quick:
        options.steps = [4, 8]
    options.out = options.out or ROOT / "runs" / ("length-quick" if options.quick else "length")
    runs = kept(options.out / "length.json" if options.quick else FILE, options)
    if not options.page_only:
        run(runs, options)
    written = block(runs.record) if runs.record["runs"] else "Not yet run."
    if options.quick:
        print(written)
    else:
        PAGE.write_text(replace_block(PAGE.read_text(encoding="utf-8"), "gpt-length", written))


if __name__ == "__main__":
    main(sys.argv[1:])
