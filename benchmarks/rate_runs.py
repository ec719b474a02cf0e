"""Finished runs as JSON lines, one each, so that a killed benchmark goes on where it was.

Shared by default_rate.py and first_try.py.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

__all__ = ["append", "read"]


def read(path: Path, figure: str = "loss") -> list[dict[str, Any]]:
    """The lines of a file, none if there is no file; one that a kill cut off is no run.

    A run whose figure is null diverged: it is infinite here.
    """
    runs = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            run = json.loads(line)
        except json.JSONDecodeError:
            continue
        runs.append({**run, figure: math.inf if run[figure] is None else run[figure]})
    return runs


def append(path: Path, run: dict[str, Any], figure: str = "loss") -> None:
    """Write one run down; JSON has no infinity, so a diverged run's figure is null."""
    path.parent.mkdir(exist_ok=True)
    value = run[figure]
    line = json.dumps({**run, figure: round(value, 5) if math.isfinite(value) else None})
    with path.open("a") as file:
        # A line that a kill cut off must not swallow ours.
        cut = path.stat().st_size and not path.read_bytes().endswith(b"\n")
        file.write("\n" * bool(cut) + line + "\n")
