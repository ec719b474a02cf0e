"""What all timing scripts share: paired rounds, their spread, their arguments and their files.

A comparison is paired: every implementation is in one process, on the same data; every round runs
each of them once, in an order that rotates, so that a change of the machine's speed meets all.
Quoted are medians, and the ratios of two times of one round with their quartiles.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

T = TypeVar("T")
Spread = tuple[float, float, float]


def timed(function: Callable[[], object], times: int = 1) -> float:
    """Seconds of one call, the mean of `times` calls in a row."""
    start = time.perf_counter()
    for _ in range(times):
        function()
    return (time.perf_counter() - start) / times


def paired(
    tasks: Mapping[str, Callable[[], T]],
    rounds: int,
    *,
    allowed: Mapping[str, int] | None = None,
    after: Callable[[int], object] | None = None,
) -> list[dict[str, T]]:
    """What every task returned, for each round.

    Args:
        tasks: each measures one implementation once, and returns what it measured.
        allowed: rounds of a task that runs in the first few only; the others run in all.
        after: is called after every round with the round's number.
    """
    results = []
    for number in range(rounds):
        names = [name for name in tasks if number < (allowed or {}).get(name, rounds)]
        start = number % len(names)
        results.append({name: tasks[name]() for name in names[start:] + names[:start]})
        if after is not None:
            after(number)
    return results


def column(results: Sequence[Mapping[str, T]], name: str) -> list[T]:
    """What one task returned, in the rounds in which it ran."""
    return [each[name] for each in results if name in each]


def ratios(results: Sequence[Mapping[str, float]], name: str, base: str) -> list[float]:
    """The times of one task over those of another, in the rounds in which both ran."""
    return [each[name] / each[base] for each in results if name in each and base in each]


def quartiles(values: Sequence[float]) -> Spread:
    """Lower quartile, median, upper quartile; of a single value, three times that value."""
    if len(values) < 2:
        return (values[0],) * 3
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def ms(seconds: float | Sequence[float]) -> Any:
    """Seconds as milliseconds: one number, or a tuple of them."""
    return seconds * 1e3 if isinstance(seconds, float) else tuple(each * 1e3 for each in seconds)


def parser(
    doc: str | None, *, rounds: int | None = None, threads: bool = True
) -> argparse.ArgumentParser:
    """The arguments that a timing script has: --rounds, --threads, --json.

    Args:
        doc: the script's docstring, which --help prints.
        rounds: unless --rounds says otherwise; None for a script that counts in other units.
        threads: whether the script may choose torch's threads.
    """
    made = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    if rounds is not None:
        made.add_argument("--rounds", type=at_least_one, default=rounds)
    if threads:
        made.add_argument("--threads", type=at_least_one, default=torch.get_num_threads())
    made.add_argument("--json", type=Path, help="write what was measured to this file")
    return made


def at_least_one(text: str) -> int:
    """An argument's whole number.

    Raises:
        argparse.ArgumentTypeError: it is none, or below 1.
    """
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def write(path: Path | None, record: object, indent: int | None = 1) -> None:
    """Write the record where --json says; nothing without it. A kill leaves the file as it was."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f"{path.name}.part")
        part.write_text(json.dumps(record, indent=indent) + "\n", encoding="utf-8")
        part.replace(path)


def rounded(value: object, digits: int = 5) -> object:
    """Numbers to so many digits, so that a file of thousands of them can be read."""
    if isinstance(value, dict):
        return {key: rounded(each, digits) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(each, digits) for each in value]
    return float(f"{value:.{digits}g}") if isinstance(value, float) else value
