"""The report: a terminal table, PNGs, JSONL, and one HTML file that needs nothing beside it."""

import base64
import json
import os
import platform
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from itertools import groupby
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from jinja2 import Environment, PackageLoader, StrictUndefined
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

import muonkit
from muonkit._text import shown
from muonkit.lab.errors import LabError
from muonkit.lab.optimizers import SCALE, Facts, Given, get_optimizer, title_of
from muonkit.lab.pictures import dark
from muonkit.lab.results import NOTES, Advice, Outcome, advice, rows, transposed, verdicts
from muonkit.lab.rules import rules_of
from muonkit.lab.saved import Result
from muonkit.lab.store import Record, write_atomically, write_json
from muonkit.lab.task import Task
from muonkit.lab.train import WARMUP
from muonkit.routing.remedies import UNDECIDED


def environment() -> dict[str, str]:
    """Where the numbers were made: versions, processor, threads."""
    return {
        "muonkit": muonkit.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()}",
        "processor": _processor(),
        "cores": str(os.cpu_count()),
        "threads": str(torch.get_num_threads()),
        "written": datetime.now().astimezone().isoformat(timespec="seconds"),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    for line in lines:
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


@dataclass(frozen=True)
class Material:
    """All a report is made of.

    Attributes:
        config: the comparison's configuration.
        summary: the task in a line.
        data: the data in a line.
        routing: the routing table of the model.
        outcomes: the runs that count (of a sweep, those with the chosen learning rates).
        attempts: every run, the sweep's included.
        swept: the runs among which the sweeps chose.
        spent: what the sweeps took, in lines.
        records: the measurements of each of ``outcomes``, by ``"NAME/SEED"``.
        recordings: what the monitor wrote on seed 0, by the run's title.
        caveats: what to keep in mind beside the verdict.
        unit: what losses are in; empty where nobody knows.
        has_complex: whether the model has complex parameters.
    """

    config: Record
    summary: str
    data: str
    routing: str
    outcomes: Sequence[Outcome]
    attempts: Sequence[Outcome]
    records: dict[str, list[Record]]
    recordings: Mapping[str, Path] = field(default_factory=dict)
    caveats: Sequence[str] = ()
    unit: str = "nats"
    swept: Sequence[Outcome] = ()
    spent: Sequence[str] = ()
    has_complex: bool = False


def notes(config: Record, unit: str = "nats") -> str:
    """What the table's figures mean."""
    jobs, every = config.get("jobs", 1), config.get("monitor")
    losses = f"Losses are cross-entropies in {unit}." if unit else "Losses are the task's own."
    said = [losses, NOTES]
    muons = [title_of(name) for name in config.get("optimizers", ()) if get_optimizer(name).scaled]
    if muons:
        said.append(
            f'lr of {_and(muons)}: in units of adjust_lr_fn="{SCALE}", where an entry of a hidden '
            "matrix moves by about 0.2 lr in a step; MuonW's own default is another unit."
        )
    if jobs > 1:
        said.append(f"{jobs} runs were trained at a time: times are those of a loaded machine.")
    if every:
        said.append(f"Seconds include the monitor's samples, every {every} steps.")
    return " ".join(said)


def _and(names: Sequence[str]) -> str:
    *most, last = names
    return f"{', '.join(most)} and {last}" if most else last


def caveat(config: Record, task: Task) -> str:
    """That default learning rates were taken to another length or batch; empty if none were."""
    defaults = [name for name in config["optimizers"] if config["lr"][name] == task.lr[name]]
    own = str(task.budget), task.batch_size
    if config["sweep"] or not defaults:
        return ""
    if task.is_own:
        return (
            f"The learning rates of {_and([title_of(name) for name in defaults])} are defaults "
            "that nobody has tuned for this task, and another optimizer may win with others: "
            "--sweep chooses them, --lr sets them."
        )
    if (config["budget"], config["batch_size"]) == own:
        return ""
    batch = f" with batches of {task.batch_size}" if config["batch_size"] != task.batch_size else ""
    return (
        f"The learning rates of {_and([title_of(name) for name in defaults])} are defaults for "
        f"{task.budget}{batch}. In runs like these others may be better, and another optimizer may "
        "win with them: --sweep chooses them, --lr sets them."
    )


def show(console: Console, material: Material) -> None:
    """Print the verdict and the results: a column per optimizer, in as many tables as the width of
    the console asks for.
    """
    outcomes = material.outcomes
    for said in (*verdicts(outcomes, material.unit), *material.caveats):
        console.print(said, highlight=False, markup=False)
    headings, lines = transposed(rows(outcomes))
    first, *columns = [list(map(shown, column)) for column in zip(headings, *lines, strict=True)]
    title = f"muonkit compare {shown(material.config['task'])}"
    for some in _side_by_side(first, columns, console.width):
        # Cells are `Text`, since rich reads plain strings in a table as markup.
        filled = Table(title=Text(title))
        filled.add_column(Text(first[0]), no_wrap=True)
        for column in some:
            filled.add_column(Text(column[0]), justify="right", no_wrap=True)
        for cells in list(zip(first, *some, strict=True))[1:]:
            filled.add_row(*map(Text, cells))
        console.print(filled)
    console.print(notes(material.config, material.unit), highlight=False, markup=False)
    for each in material.spent:
        console.print(shown(each), highlight=False, markup=False)
    found = advice(outcomes)
    if found is not None:
        advised = f"In your script: {title_of(found.optimizer)}. {found.said}"
        console.print(f"\n{advised}\n", highlight=False, markup=False)
        code = in_script(material, found.optimizer)
        console.print(code, highlight=False, markup=False, soft_wrap=True)


def _side_by_side(
    first: Sequence[str], columns: Sequence[list[str]], width: int
) -> list[list[list[str]]]:
    """The columns in tables that fit a width, each after the first; rich would cut figures."""

    def taken(column: Sequence[str]) -> int:
        return max(map(cell_len, column)) + 3  # a space on each side, and a line

    tables: list[list[list[str]]] = []
    left = 0
    for column in columns:
        if not tables or taken(column) > left:
            tables.append([])
            left = width - 1 - taken(first)
        tables[-1].append(column)
        left -= taken(column)
    return tables


def _point(result: Result) -> tuple[str, float, float, float, int]:
    """What a sweep varies."""
    spec = get_optimizer(result.optimizer)
    rate = spec.embedding_rate(result.lr, result.embedding_lr)
    return result.optimizer, result.lr, rate, spec.decay(result.weight_decay), result.part


def _swept(material: Material) -> list[Result]:
    """The runs among which the sweeps chose."""
    results = [result for result, _ in material.swept]
    return sorted(results, key=lambda result: (*_point(result), result.seed))


def _mean(losses: Sequence[float | None]) -> str:
    sound = [loss for loss in losses if loss is not None]
    return f"{fmean(sound):.4f}" if len(sound) == len(losses) else "diverged"


def _sweep_table(material: Material) -> tuple[list[str], list[list[str]]]:
    """Headings, and a line for each value that was tried; columns that say nothing are left out."""
    chosen = {_point(result) for result, _ in material.outcomes}
    swept = _swept(material)
    lines = []
    for point, group in groupby(swept, _point):
        results = list(group)
        name, lr, rate, decay, part = point
        lines.append(
            {
                "optimizer": name,
                "lr": f"{lr:g}",
                "embedding lr": f"{rate:g}",
                "weight decay": f"{decay:g}",
                "steps": "all" if part == 1 else f"1/{part}",
                "seeds": str(len(results)),
                "train loss": _mean([result.train_loss for result in results]),
                "val loss": _mean([result.val_loss for result in results]),
                "": "chosen" if point in chosen else "",
            }
        )
    silent = set()
    if all(result.embedding_lr is None for result in swept):
        silent.add("embedding lr")
    silent |= {n for n in ("steps", "seeds") if len({line[n] for line in lines}) < 2}
    headings = [name for name in (lines[0] if lines else {}) if name not in silent]
    return headings, [[line[name] for name in headings] for line in lines]


def _sweep_title(config: Record) -> str:
    return (
        "Learning rates and weight decays tried"
        if config.get("sweep_decay")
        else "Learning rates tried"
    )


def _advised(material: Material, found: Advice | None) -> list[str]:
    """Every optimizer that was compared, the one to take first."""
    names = list(dict.fromkeys(result.optimizer for result, _ in material.outcomes))
    return sorted(names, key=lambda name: found is None or name != found.optimizer)


def _sweep_note(config: Record) -> str:
    """How the sweeps chose."""
    seeds = config.get("sweep_seeds", 1)
    swept = {
        "learning rates": config["sweep"],
        "rates of embeddings and head": config.get("sweep_embedding_lr"),
        "weight decays": config.get("sweep_decay"),
    }
    what = ", then of the ".join(name for name, is_swept in swept.items() if is_swept)
    if config.get("sweep_full"):
        on = "On seed 0" if seeds == 1 else f"Means over the first {seeds} seeds"
        return f"{on}, in whole runs. Of the {what}, that with the lowest loss was taken."
    more = f", and of the better two on the first {seeds} seeds" if seeds > 1 else ""
    return (
        "By halving: rates in short runs on seed 0 (steps: 1/N of all), then the best and its "
        f"neighbours in whole runs{more}. Of the {what}, that with the lowest validation loss in "
        "whole runs was taken."
    )


def in_script(material: Material, name: str) -> str:
    """The lines of a script that make an optimizer as it was compared, and its schedule."""
    result = next(result for result, _ in material.outcomes if result.optimizer == name)
    spec = get_optimizer(name)
    decay, rules = spec.decay(result.weight_decay), rules_of(material.config.get("rules"))
    lines = spec.lines(
        Given(result.lr, decay, result.embedding_lr, rules),
        Facts(UNDECIDED in material.routing, material.has_complex),
    )
    steps = max(result.steps for result, _ in material.outcomes)
    several = "optimizers = (" in lines
    made = "torch.optim.lr_scheduler.LambdaLR({}, factor)"
    schedule = (
        f"schedulers = [{made.format('each')} for each in optimizers]"
        if several
        else f"scheduler = {made.format('optimizer')}"
    )
    imports = "" if "import torch\n" in lines else "import torch\n"
    return (
        f"{imports}{lines}"
        f"steps = {steps}  # of the whole training; the schedule's step follows the optimizer's\n"
        f"warmup = max(1, round({WARMUP} * steps))\n"
        "down = max(1, steps - warmup)\n"
        "factor = lambda step: min((step + 1) / warmup, (steps - step) / down, 1)\n"
        f"{schedule}\n"
    )


def _inline(svg: bytes) -> dict[str, str]:
    """A picture's light and dark form, as addresses that hold all of it."""
    text = svg.decode("utf-8")
    return {
        name: "data:image/svg+xml;base64," + base64.b64encode(form.encode()).decode()
        for name, form in (("light", text), ("dark", dark(text)))
    }


def _drawn(
    folder: Path, title: str, path: Path, say: Callable[[str], None] = print
) -> dict[str, Any]:
    """A run's recording: its pictures, written beside the report's too, or why there are none,
    which is also said.
    """
    from muonkit.lab.monitor import draw
    from muonkit.lab.recording import normal, read, remarks

    try:
        recording = read(path)
        images = {form: draw(recording, title, form) for form in ("png", "svg")}
    except LabError as error:  # a run that is well is not to be lost for its recording
        say(f"the recording of {title} is left out: {error}")
        return {"title": title, "remarks": [str(error)], "images": []}
    name = path.parent.name
    for file, image in images["png"].items():
        write_atomically(folder / f"{name}-{file}", image)
    return {
        "title": title,
        "remarks": [*remarks(recording), *normal(recording)],
        "images": [_inline(image) for image in images["svg"].values()],
    }


def write(folder: Path, material: Material, say: Callable[[str], None] = print) -> Path:
    """Write the pictures, ``summary.json`` and ``report.html`` to ``folder``; the report's path.

    What is left out of the report is told to ``say``.
    """
    # Here, because it brings matplotlib, which takes a second that no error should wait for.
    from muonkit.lab.plots import loss_plot

    task = material.config["task"]
    lines = rows(material.outcomes)
    images = {}
    for against, name in (("step", "loss-steps"), ("seconds", "loss-seconds")):
        title = f"{task}: {material.summary}"
        for form in ("png", "svg"):
            image = loss_plot(
                title, against, material.outcomes, material.records, form, material.unit
            )
            write_atomically(folder / f"{name}.{form}", image)
        images[against] = _inline(image)
    headings, cells = transposed(lines)
    sweep_headings, sweep = _sweep_table(material)
    found = advice(material.outcomes)
    templates = Environment(
        loader=PackageLoader("muonkit.lab"), autoescape=True, undefined=StrictUndefined
    )
    page = templates.get_template("report.html.j2").render(
        task=task,
        verdicts=verdicts(material.outcomes, material.unit),
        caveats=material.caveats,
        summary=material.summary,
        data=material.data,
        notes=notes(material.config, material.unit),
        headings=headings,
        cells=cells,
        images=images,
        recordings=[
            _drawn(folder, title, path, say) for title, path in material.recordings.items()
        ],
        sweep=sweep,
        sweep_headings=sweep_headings,
        sweep_title=_sweep_title(material.config) if sweep else "",
        sweep_note=_sweep_note(material.config) if sweep else "",
        spent=material.spent,
        advice=found and f"{title_of(found.optimizer)}. {found.said}",
        scripts={title_of(name): in_script(material, name) for name in _advised(material, found)},
        config={name: json.dumps(value) for name, value in material.config.items()},
        environment=environment(),
        command=shlex.join(["muonkit", *sys.argv[1:]]),
        routing=material.routing,
    )
    report = folder / "report.html"
    # Lone surrogates are what Python makes of bytes in a command line that are no UTF-8.
    write_atomically(report, page.encode("utf-8", "backslashreplace"))
    # Last: a folder with a summary counts as finished.
    summary = {
        "rows": [asdict(row) for row in lines],
        "runs": [asdict(result) | {"curve": asdict(curve)} for result, curve in material.outcomes],
        "sweep": [asdict(result) for result in _swept(material)],
        "environment": environment(),
    }
    write_json(folder / "summary.json", summary)
    return report
