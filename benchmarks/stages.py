"""Rank what stands around Muon: each stage alone, its learning rate and decay tuned as plain's.

    python benchmarks/stages.py --ranking gpt --jobs 2
    python benchmarks/stages.py --ranking gpt --times   # on a quiet machine; added to the file
    python benchmarks/stages.py --ranking gpt --quick
    python benchmarks/stages.py --page-only

It runs `muonkit compare` for plain MuonW and for each stage, with a sweep where the ranking has
one, keeps what each found in docs/stages/RANKING.json, and writes the block between
`<!-- begin: stages -->` and `<!-- end: stages -->` of docs/choosing.md from these files. What
follows `--` goes to `compare`.
Stopped, the same command goes on: a stage that the file has is not run again, on whichever machine.
Losers stay in the table. `--times` is apart, since what else the machine does then changes no loss:
whole training steps of all of them in one process, paired (harness.py), one thread.
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
import machine
import torch
from curves import Runs
from evidence import as_tuned, compare, machines, merged, outcomes, split
from parts import Record, machine_line, replace_block, spread, table

from muonkit.lab.data import Batch
from muonkit.lab.objective import loss_of
from muonkit.lab.optimizers import STAGES, get_optimizer
from muonkit.lab.results import Figure, figure, p_value, welch
from muonkit.lab.tasks import TASKS, get_task

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "docs" / "stages"
PLAIN = "muonw"
NAMES = tuple(STAGES)
# The same grids for all: three rates (more beyond an edge), then three decays, on seed 0.
SWEEP = ("--sweep", "--sweep-decay", "--sweep-full", "--sweep-points", "3")
SEEDS = ("--seeds", "3")
QUICK = ("--steps", "6", "--seeds", "2", "--evaluations", "2")
# The task of each ranking, and how long it trains.
RANKINGS: dict[str, tuple[str, ...]] = {
    "gpt": ("gpt", "--steps", "400"),
    "gpt-long": ("gpt", "--steps", "1600"),
    "cifar10": ("cifar10", "--epochs", "5"),
}
# A ranking that sweeps nothing has each stage at the rate and the decay that another one found: a
# sweep of it would be a hundred runs of ten minutes.
TUNED_BY = {"gpt-long": "gpt"}


def state_bytes(task: str, name: str) -> int:
    """Bytes of the optimizer's whole state, AdamW's part included."""
    model = TASKS[task].build()
    optimizer = get_optimizer(name).build(model, 1e-3)
    assert isinstance(optimizer, torch.optim.Optimizer)
    tensors = [t for state in optimizer.state.values() for t in state.values()]
    return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, torch.Tensor))


def kept(ranking: str, options: argparse.Namespace) -> Runs:
    """What the file of a ranking has: for each stage what `muonkit compare` found."""
    sweep = () if ranking in TUNED_BY else SWEEP
    words = [*RANKINGS[ranking], *sweep, *SEEDS, "--threads", "1"]
    words = merged(words, [*(QUICK if options.quick else ()), *options.further])
    setting = {"ranking": ranking, "words": words}
    return Runs(options.results / f"{ranking}.json", "stages", setting, ("stage",))


def tuned_before(name: str, ranking: str) -> list[str]:
    """The words that give a stage what another ranking found; none where this one sweeps.

    Raises:
        SystemExit: that ranking has not this stage.
    """
    if ranking not in TUNED_BY:
        return []
    file = FOLDER / f"{TUNED_BY[ranking]}.json"
    kept = json.loads(file.read_text(encoding="utf-8"))["runs"] if file.exists() else []
    for each in kept:
        if each["stage"] == name:
            (row,) = each["rows"]
            return as_tuned(row)
    raise SystemExit(f"{ranking} takes rates from {file}, which lacks {name}: run that one first")


def run(runs: Runs, options: argparse.Namespace) -> None:
    """Train what the file lacks, `--jobs` stages at a time; each is kept when it is done."""
    task, *words = runs.record["setting"]["words"]
    ranking = runs.record["setting"]["ranking"]

    def train(name: str) -> Record:
        tuned = tuned_before(name, ranking)
        found = compare([task, "--optimizers", name, *words, *tuned], options.out / ranking / name)
        return found | {"state_bytes": state_bytes(task, name)}

    runs.fill([(name,) for name in options.optimizers], train, options.jobs)


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
    """One table of a ranking, the lowest validation loss first."""
    stages = {each["stage"]: each for each in record["runs"]}
    losses = {
        name: [result.val_loss for result, _ in outcomes(found)] for name, found in stages.items()
    }
    rows: list[tuple[float, list[object]]] = []
    for name, found in stages.items():
        (row,) = found["rows"]
        loss = figure(losses[name])
        is_plain = name == PLAIN
        cells = [
            "plain" if is_plain else f"`{name}`",
            f"{row['lr']:g}",
            f"{row['weight_decay']:g}",
            loss.text(4) if isinstance(loss, Figure) else "diverged",
            "" if is_plain else p_value(welch(losses[name], losses[PLAIN])),
            f"{found['state_bytes'] / 2**20:.2f}",
        ]
        if "times" in record:
            of = record["times"].get(name)
            cells.append(f"{of['ms']:.0f}" if of else "")
            cells.append(spread(of["times_plain"]) if of and not is_plain else "")
        rows.append((loss.mean if isinstance(loss, Figure) else float("inf"), cells))
    rows.sort(key=lambda row: row[0])
    config, ranking = stages[PLAIN]["config"], record["setting"]["ranking"]
    left = [name for name in NAMES if name not in stages]
    said = (
        f"**{config['task']}**, {config['budget']}, {config['seeds']} seeds, mean ± standard "
        f"deviation; p against plain. `python benchmarks/stages.py --ranking {ranking}`, "
        f"which is `{stages[PLAIN]['command']}` for each: {machines(stages.values())}."
    )
    if ranking in TUNED_BY:
        said += (
            f" Not swept: each has the learning rate and the decay that `{TUNED_BY[ranking]}` "
            "found for it."
        )
    head = ["stage", "lr", "decay", "validation loss", "p", "state, MiB"]
    if "times" in record:
        head += ["ms", "times plain"]
        said += (
            " ms: of a whole training step, and times plain's in paired rounds (median and "
            f"quartiles), {machine_line({'machine': record['times_machine']})}"
        )
    if left:
        said += f" Not yet run: {', '.join(f'`{name}`' for name in left)}."
    return "\n\n".join([said, table(head, [cells for _, cells in rows])])


def page(text: str, folder: Path) -> str:
    """The page with the tables of all rankings that have plain's figures."""
    files = [folder / f"{ranking}.json" for ranking in RANKINGS]
    records = [json.loads(file.read_text(encoding="utf-8")) for file in files if file.exists()]
    blocks = [
        block(record) for record in records if PLAIN in (each["stage"] for each in record["runs"])
    ]
    return replace_block(text, "stages", "\n\n".join(blocks) or "Not yet run.")


def main(words: Sequence[str]) -> None:
    words, further = split(words)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--ranking", choices=list(RANKINGS), action="append", help="may be repeated"
    )
    parser.add_argument("--optimizers", default=",".join(NAMES), help="fewer of them")
    parser.add_argument("--jobs", type=int, default=2, help="stages at a time, one thread each")
    parser.add_argument("--quick", action="store_true", help="a few steps, to see that it works")
    parser.add_argument("--times", action="store_true", help="time steps instead, of what was run")
    parser.add_argument("--rounds", type=harness.at_least_one, default=25, help="of --times")
    parser.add_argument("--page-only", action="store_true", help="train nothing")
    parser.add_argument("--out", type=Path, help="[default: runs/stages; -quick with --quick]")
    options = parser.parse_args(words)
    options.further, options.optimizers = further, options.optimizers.split(",")
    options.out = options.out or ROOT / "runs" / ("stages-quick" if options.quick else "stages")
    options.results = options.out if options.quick else FOLDER
    for ranking in () if options.page_only else options.ranking or RANKINGS:
        runs = kept(ranking, options)
        if options.times:
            names = [each["stage"] for each in runs.record["runs"]]
            times = time_steps(RANKINGS[ranking][0], names, options.rounds)
            runs.keep(times=times, times_machine=machine.facts())
        else:
            run(runs, options)
    guide = ROOT / "docs" / "choosing.md"
    written = page(guide.read_text(encoding="utf-8"), options.results)
    if options.quick:
        print(written[written.index("<!-- begin: stages") : written.index("<!-- end: stages")])
    else:
        guide.write_text(written, encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
