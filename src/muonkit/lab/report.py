"""The report: a terminal table, PNGs, JSONL, and one HTML file that needs nothing beside it."""

import base64
import json
import os
import platform
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path

import torch
from jinja2 import Environment, PackageLoader, StrictUndefined
from rich.console import Console
from rich.table import Table

import muonkit
from muonkit.lab.results import NOTES, Outcome, Row, rows, table
from muonkit.lab.store import Record, write_atomically, write_json


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
        records: the measurements of each of ``outcomes``, by ``"NAME/SEED"``.
    """

    config: Record
    summary: str
    data: str
    routing: str
    outcomes: Sequence[Outcome]
    attempts: Sequence[Outcome]
    records: dict[str, list[Record]]


def show(console: Console, task: str, lines: Sequence[Row]) -> None:
    """Print the table of results: a column per optimizer, so that it fits 80 characters."""
    headings, cells = table(lines)
    shown = Table(title=f"muonkit compare {task}")
    shown.add_column(headings[0], no_wrap=True)
    for row in cells:
        shown.add_column(row[0], justify="right", no_wrap=True)
    for i, heading in enumerate(headings[1:], start=1):
        shown.add_row(heading, *(row[i] for row in cells))
    console.print(shown)
    console.print(NOTES, highlight=False)


def _sweep_table(attempts: Sequence[Outcome]) -> list[list[str]]:
    swept = [result for result, _ in attempts if result.seed == 0]
    swept.sort(key=lambda result: (result.optimizer, result.lr))
    return [
        [
            result.optimizer,
            f"{result.lr:g}",
            "diverged" if result.train_loss is None else f"{result.train_loss:.4f}",
            "diverged" if result.val_loss is None else f"{result.val_loss:.4f}",
        ]
        for result in swept
    ]


def write(folder: Path, material: Material) -> Path:
    """Write the PNGs, ``summary.json`` and ``report.html`` to ``folder``; the report's path."""
    # Here, because it brings matplotlib, which takes a second that no error should wait for.
    from muonkit.lab.plots import loss_plot

    task = material.config["task"]
    lines = rows(material.outcomes)
    images = {}
    for against, name in (("step", "loss-steps.png"), ("seconds", "loss-seconds.png")):
        title = f"{task}: {material.summary}"
        image = loss_plot(title, against, material.outcomes, material.records)
        write_atomically(folder / name, image)
        images[against] = "data:image/png;base64," + base64.b64encode(image).decode()
    headings, cells = table(lines)
    templates = Environment(
        loader=PackageLoader("muonkit.lab"), autoescape=True, undefined=StrictUndefined
    )
    page = templates.get_template("report.html.j2").render(
        task=task,
        summary=material.summary,
        data=material.data,
        notes=NOTES,
        headings=headings,
        cells=cells,
        images=images,
        sweep=_sweep_table(material.attempts) if material.config["sweep"] else [],
        config={name: json.dumps(value) for name, value in material.config.items()},
        environment=environment(),
        command=shlex.join(["muonkit", *sys.argv[1:]]),
        routing=material.routing,
    )
    report = folder / "report.html"
    write_atomically(report, page.encode())
    # Last: a folder with a summary counts as finished.
    summary = {"rows": [asdict(row) for row in lines], "environment": environment()}
    write_json(folder / "summary.json", summary)
    return report
