"""Parts of the pages' generated blocks: tables, machines, spreads, and how a block is replaced."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

Record = dict[str, Any]


def table(head: Sequence[str], rows: Iterable[Sequence[object]], left: int = 1) -> str:
    """A Markdown table; so many columns to the left, the others to the right."""
    lines = [head, [*["---"] * left, *["--:"] * (len(head) - left)], *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def machine_line(record: Record) -> str:
    """The command, and on what, and when, it ran: every machine of a file's runs."""
    runs = record.get("runs", ())
    own = [run["machine"] for run in runs if "machine" in run]
    if len(own) < len(runs) or not runs:
        own.insert(0, record["machine"])
    dates: dict[str, list[str]] = {}
    for each in own:
        dates.setdefault(_machine(each), []).append(each["date"])
    on = " and on ".join(
        f"{name}; {min(found)}" + (f" to {max(found)}" if max(found) != min(found) else "")
        for name, found in dates.items()
    )
    return f"`{own[-1]['command']}` on {on}."


def _machine(m: Record) -> str:
    cores = f"{m['cores']} core{'s' if m['cores'] != 1 else ''}"
    threads = f"{m['threads']} thread{'s' if m['threads'] != 1 else ''}"
    return (
        f"{m['cpu']}, {cores}, {threads}, {m['capability']}, {m['system']}; torch {m['torch']}, "
        f"Python {m['python']}"
    )


def machine_lines(records: Iterable[Record]) -> str:
    """A list in Markdown: one command and its machine each."""
    return "\n".join(f"- {machine_line(record)}" for record in records)


def spread(quartiles: Sequence[float], digits: int = 2) -> str:
    low, middle, high = quartiles
    return f"{middle:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def mib(value: float | None) -> str:
    return "" if value is None else f"{value / 2**20:.1f}"


def replace_block(page: str, name: str, content: str) -> str:
    """The page with ``content`` between the markers of the block ``name``.

    Raises:
        ValueError: the page is without the markers.
    """
    begin, end = f"<!-- begin: {name} -->", f"<!-- end: {name} -->"
    if page.count(begin) != 1 or page.count(end) != 1 or page.index(end) < page.index(begin):
        raise ValueError(
            f"the page needs {begin!r} once and {end!r} once after it: put both markers where "
            "the table belongs"
        )
    block = f"{begin}\n{content}\n{end}"
    pattern = re.escape(begin) + ".*?" + re.escape(end)
    return re.sub(pattern, lambda _: block, page, flags=re.DOTALL)
