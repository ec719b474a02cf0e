"""Compare the optimizers on real data, everything tuned alike, and write docs/evidence.md from it.

    python benchmarks/evidence.py --task mnist --jobs 2
    python benchmarks/evidence.py --task cifar10 --seeds 3 -- --evaluations 4
    python benchmarks/evidence.py --quick

For each task it runs `muonkit compare`: every optimizer with its learning rate and its decay swept
on the same grids; and, where there is a public claim, AdamW at its default learning rate 1e-3,
untuned. What follows `--` goes to either. Stopped, the same command goes on. The figures are kept
in docs/evidence/TASK.json; the pictures beside them and the blocks of the page between
`<!-- begin: NAME -->` and `<!-- end: NAME -->` are made from those files, the text around them
by hand. `--page-only` draws and writes again and trains nothing.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean

from parts import Record, replace_block, table

from muonkit.lab import results
from muonkit.lab.optimizers import get_optimizer
from muonkit.lab.results import Curve, Figure, Outcome, p_value, rows, welch
from muonkit.lab.tasks import TASKS
from muonkit.lab.train import Result

ROOT = Path(__file__).resolve().parents[1]
PICTURES = {"step": "loss-steps.svg", "seconds": "loss-seconds.svg"}
UNTUNED = 1e-3


@dataclass(frozen=True)
class Plan:
    """One task: how it is compared, and what is claimed of it.

    Attributes:
        optimizers: muonw and adamw are needed.
        length: options of `muonkit compare` that say how long to train.
        seeds: runs per optimizer.
        points: values in each sweep's grid.
        sweep_seeds: seeds that choose in a sweep.
        claim: what a public tutorial says of MuonW against AdamW at its default learning rate,
            after as many epochs.
    """

    optimizers: tuple[str, ...]
    length: tuple[str, ...]
    seeds: int
    points: int
    sweep_seeds: int = 2
    claim: str | None = None


ALL = ("muonw", "normuon", "torch-muon-fp32", "adamw", "sgd")

PLANS: dict[str, Plan] = {
    "mnist": Plan(
        ALL,
        ("--epochs", "3"),
        seeds=5,
        points=5,
        claim="a loss 34% lower than AdamW's after 3 epochs on MNIST",
    ),
    "gpt": Plan(ALL, ("--steps", "400"), seeds=5, points=3),
    # torch.optim.Muon takes no convolutions.
    "cifar10": Plan(
        ("muonw", "normuon", "adamw", "sgd"),
        ("--epochs", "5", "--evaluations", "5"),
        seeds=5,
        points=3,
        claim="an accuracy of 80.79% against AdamW's 71.66% after 5 epochs on CIFAR-10",
    ),
}
QUICK = ("--steps", "6", "--seeds", "2", "--sweep-points", "3", "--evaluations", "2")


# --- running ---------------------------------------------------------------------------------


def merged(words: Sequence[str], further: Sequence[str]) -> list[str]:
    """``words`` with the options of ``further`` in the place of their own.

    Both are options with a value each, but for the flags in ``words``; a length is one option.
    """
    lengths = {"--steps", "--epochs"}
    again = {word for word in further if word.startswith("--")}
    again |= lengths if again & lengths else set()
    kept: list[str] = []
    for word in words:
        if kept and kept[-1] in again:
            kept.pop()  # the option whose value this is
        else:
            kept.append(word)
    return [*kept, *further]


def without_sweep(words: Sequence[str]) -> list[str]:
    """Options with a value each, but for those of a sweep."""
    pairs = zip(words[::2], words[1::2], strict=True)
    return [word for pair in pairs if not pair[0].startswith("--sweep") for word in pair]


def as_tuned(row: Record) -> list[str]:
    """The words that give an optimizer the rates and the decay of another comparison's row."""
    words = ["--lr", repr(row["lr"]), "--weight-decay", repr(row["weight_decay"])]
    if row.get("embedding_lr") is not None:
        words += ["--embedding-lr", repr(row["embedding_lr"])]
    return words


def compare(words: Sequence[str], out: Path) -> Record:
    """What `muonkit compare WORDS` finds, and the words; SystemExit with its status if it fails."""
    command = ["compare", *words]
    status = subprocess.run(
        [sys.executable, "-m", "muonkit.lab.cli", *command, "--out", str(out)], check=False
    ).returncode
    if status:
        raise SystemExit(status)
    found = json.loads((out / "summary.json").read_text())
    found["config"] = json.loads((out / "config.json").read_text())
    found["command"] = shlex.join(["muonkit", *command])
    return found


def run(task: str, plan: Plan, options: argparse.Namespace) -> None:
    """Train what is missing of one task, and keep the figures and pictures."""
    seeds = options.seeds or plan.seeds
    # --threads by name, so that the same command goes on on another machine.
    shared = [*plan.length, "--seeds", str(seeds), "--jobs", str(options.jobs), "--threads", "1"]
    further = [*(QUICK if options.quick else ()), *options.further]
    optimizers = options.optimizers or ",".join(plan.optimizers)
    words = [task, "--optimizers", optimizers, "--sweep", "--sweep-decay", "--sweep-full"]
    words += ["--sweep-points", str(plan.points), "--sweep-seeds", str(plan.sweep_seeds)]
    out = options.out / task
    record = compare(merged([*words, *shared], further), out)
    if plan.claim:
        words = [task, "--optimizers", "adamw", "--lr", f"adamw={UNTUNED!r}", *shared]
        words = merged(words, without_sweep(further))
        record["untuned"] = compare(words, options.out / f"{task}-untuned")
        budgets = [r["config"]["budget"] for r in (record, record["untuned"])]
        if budgets[0] != budgets[1]:
            raise ValueError(f"{task}: tuned runs of {budgets[0]}, untuned ones of {budgets[1]}")
    options.results.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"kind": "evidence", "task": task, **record}, indent=1) + "\n"
    (options.results / f"{task}.json").write_text(text)


# --- the page --------------------------------------------------------------------------------


def outcomes(record: Record) -> list[Outcome]:
    """The runs that count, as the lab had them."""
    found = []
    for run in record["runs"]:
        figures = {name: value for name, value in run.items() if name != "curve"}
        found.append((Result(**figures), Curve(**run["curve"])))
    return found


def _untuned(record: Record) -> list[Outcome]:
    """AdamW's untuned runs, where a claim asked for them, under a name of their own."""
    if "untuned" not in record:
        return []
    decay = get_optimizer("adamw").weight_decay
    return [
        (replace(result, optimizer="adamw, untuned", weight_decay=decay), curve)
        for result, curve in outcomes(record["untuned"])
    ]


def _commands(record: Record) -> str:
    e = record["environment"]
    command = record["command"]
    cores = f"{e['cores']} core{'s' if e['cores'] != '1' else ''}"
    jobs = record["config"].get("jobs", 1)
    at_once = f"{jobs} runs at a time" if jobs > 1 else "one run at a time"
    return (
        f"`{command}`: {e['processor']}, {cores}, {at_once} with {record['config']['threads']} "
        f"thread each; muonkit {e['muonkit']}, torch {e['torch']}, Python {e['python']}; "
        f"{e['written'][:10]}."
    )


def machines(found: Iterable[Record]) -> str:
    """On what, and when, each of several comparisons ran."""
    facts = (record["environment"] for record in found)
    return "; ".join(
        sorted({f"{e['processor']}, torch {e['torch']}, {e['written'][:10]}" for e in facts})
    )


def _bold(text: str, is_best: bool) -> str:
    return f"**{text}**" if is_best else text


def sweep_table(record: Record) -> str:
    """What was tried, means over the seeds that chose: learning rates with the default decay, then
    decays.
    """
    lines = []
    for row in record["rows"]:
        name, default = row["optimizer"], get_optimizer(row["optimizer"]).weight_decay
        tried = [r for r in record["sweep"] if r["optimizer"] == name]
        losses: dict[tuple[float, float | None], list[float]] = {}
        for r in tried:
            loss = math.inf if r["val_loss"] is None else r["val_loss"]
            losses.setdefault((r["lr"], r["weight_decay"]), []).append(loss)
        means = {point: fmean(values) for point, values in losses.items()}
        rates = {lr: mean for (lr, decay), mean in means.items() if decay is None}
        decays = {
            default if decay is None else decay: mean
            for (lr, decay), mean in means.items()
            if lr == row["lr"]
        }
        cells = []
        for values, chosen in ((rates, row["lr"]), (decays, row["weight_decay"])):
            shown = [
                _bold(f"{x:g}: {f'{loss:.4f}' if loss < math.inf else 'diverged'}", x == chosen)
                for x, loss in sorted(values.items())
            ]
            cells.append(", ".join(shown))
        lines.append([name, *cells, len(tried)])
    head = ["optimizer", "learning rate: validation loss", "weight decay: validation loss", "runs"]
    return table(head, lines)


def task_block(record: Record) -> str:
    headings, cells = results.transposed(rows([*outcomes(record), *_untuned(record)]))
    task, seeds = record["task"], record["config"]["seeds"]
    picture = f"evidence/{task}-{PICTURES['step']}"
    swept = record["config"].get("sweep_seeds", 1)
    chosen_on = "seed 0" if swept == 1 else f"the first {swept} seeds (means)"
    said = [
        _commands(record),
        f"{record['config']['budget']}, batches of {record['config']['batch_size']}, {seeds} "
        f"seed{'s' if seeds != 1 else ''}, mean ± standard deviation. p: against AdamW, tuned.",
        table(headings, cells),
        f"Tried on {chosen_on}, the chosen ones in bold:",
        sweep_table(record),
        f"![Validation loss of each optimizer against steps]({picture})",
    ]
    return "\n\n".join(said)


def _of(name: str, record: Record) -> list[Result]:
    return [result for result, _ in outcomes(record) if result.optimizer == name]


def _column(results: Sequence[Result], figure: str) -> list[float | None]:
    return [getattr(result, figure) for result in results]


def _against(figure: str, ours: Figure, theirs: Figure) -> str:
    if figure == "accuracy":
        return f"{(ours.mean - theirs.mean) * 100:+.2f} points"
    share = 1 - ours.mean / theirs.mean
    return f"{abs(share):.1%} {'lower' if share >= 0 else 'higher'}"


def _mean(figure: str, value: Figure) -> str:
    return value.text(2, 100) + "%" if figure == "accuracy" else value.text(4)


def claim_block(record: Record, claim: str) -> str:
    """The claim, and a table of MuonW against AdamW untuned and tuned."""
    ours = _of("muonw", record)
    rivals = {
        f"AdamW, lr {UNTUNED:g}, untuned": _of("adamw", record["untuned"]),
        "AdamW, tuned": _of("adamw", record),
    }
    lines = []
    for figure in ("train_loss", "val_loss", "accuracy"):
        mine = results.figure(_column(ours, figure))
        for name, rival in rivals.items():
            theirs = results.figure(_column(rival, figure))
            cells = ["—", "—", "—", "—"]
            if mine is not None and theirs is not None:
                p = p_value(welch(_column(ours, figure), _column(rival, figure)))
                cells = [_mean(figure, mine), _mean(figure, theirs)]
                cells += [_against(figure, mine, theirs), p]
            lines.append([figure.replace("_", " "), name, *cells])
    head = ["figure", "MuonW, tuned, against", "MuonW", "AdamW", "MuonW's is", "p"]
    seeds = f"{len(ours)} seed{'s' if len(ours) != 1 else ''}"
    said = f"**Claimed: {claim}.** Here, after {record['config']['budget']}, {seeds}:"
    return "\n\n".join([said, table(head, lines), _commands(record["untuned"])])


NOT_RUN = "Not yet run."


def draw(record: Record, folder: Path) -> None:
    """The pictures of a task's validation curves, from its figures."""
    # Here, because it brings matplotlib.
    from muonkit.lab.plots import loss_plot

    title = f"{record['task']}: {TASKS[record['task']].summary}"
    for against, name in PICTURES.items():
        image = loss_plot(title, against, outcomes(record), {}, "svg")
        (folder / f"{record['task']}-{name}").write_bytes(image)


def write_page(page: str, records: dict[str, Record]) -> str:
    """The page with every block renewed; a task without figures says that it was not run."""
    claims = []
    for task, plan in PLANS.items():
        record = records.get(task)
        page = replace_block(page, task, NOT_RUN if record is None else task_block(record))
        if plan.claim is not None and record is not None:
            claims.append(claim_block(record, plan.claim))
        elif plan.claim is not None:
            claims.append(f"**Claimed: {plan.claim}.** {NOT_RUN}")
    return replace_block(page, "claims", "\n\n".join(claims))


def kept(folder: Path) -> dict[str, Record]:
    """The figures of every task that has any."""
    files = {task: folder / f"{task}.json" for task in PLANS}
    return {task: json.loads(file.read_text()) for task, file in files.items() if file.exists()}


def split(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """The words before `--`, and those after it, which go to `muonkit compare`."""
    at = words.index("--") if "--" in words else len(words)
    return list(words[:at]), list(words[at + 1 :])


def arguments(words: Sequence[str]) -> argparse.Namespace:
    words, further = split(words)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--task", choices=list(PLANS), action="append", help="may be repeated")
    parser.add_argument("--seeds", type=int, help="runs per optimizer")
    parser.add_argument(
        "--optimizers", metavar="A,B,...", help="fewer of them; muonw and adamw are needed"
    )
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--quick", action="store_true", help="a few steps, to see that it works")
    parser.add_argument("--page-only", action="store_true", help="train nothing")
    parser.add_argument("--out", type=Path, help="[default: runs/evidence; -quick with --quick]")
    parser.add_argument("--results", type=Path, help="[default: docs/evidence; OUT with --quick]")
    parser.add_argument(
        "--page", type=Path, help="[default: docs/evidence.md; a copy with --quick]"
    )
    options = parser.parse_args(words)
    options.further = further
    options.out = options.out or ROOT / "runs" / ("evidence-quick" if options.quick else "evidence")
    options.results = options.results or (
        options.out if options.quick else ROOT / "docs" / "evidence"
    )
    return options


def main(words: Sequence[str] | None = None) -> int:
    options = arguments(sys.argv[1:] if words is None else words)
    source = ROOT / "docs" / "evidence.md"
    page = options.page or (options.out / "evidence.md" if options.quick else source)
    try:
        if not options.page_only:
            for task in options.task or PLANS:
                run(task, PLANS[task], options)
        text = (page if page.exists() else source).read_text()
        records = kept(options.results)
        for record in records.values():
            draw(record, options.results)
        page.write_text(write_page(text, records))
    except (OSError, ValueError) as error:  # JSONDecodeError is a ValueError
        print(f"evidence.py: {error}", file=sys.stderr)
        return 2
    print(f"page: {page}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
