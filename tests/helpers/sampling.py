"""A large product of cases, run in part: every combination of a few arguments' values, not of all.

A test with the mark `sampled` runs the cases that show every pair of values of its arguments, and
one with `sampled(3)` those that show every three of them together: a fault lies in one value or in
two that meet, hardly ever in four. The rule draws nothing at random. The cases of a test are taken
in the order of a checksum of their ids, and one stays if it shows a combination that none before it
has shown. So the same cases run everywhere, each test takes its own from the product, and a new
value of an argument is covered without a word here.

`MUONKIT_TEST_ALL=1` runs every case (`make test-all`). The sample is of what the command line has
left over: a case that is named there runs.
"""

from __future__ import annotations

import itertools
import os
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import pytest

MARK = "sampled"
WHOLE = "MUONKIT_TEST_ALL"
# What the command line left over, before sampling: for the test of the rule.
COLLECTED = pytest.StashKey[list[pytest.Item]]()


def combinations(values: Mapping[str, Any], together: int) -> Iterator[tuple[Any, ...]]:
    """Every `together` of the arguments with their values; all of them if they are fewer."""
    named = sorted((name, repr(value)) for name, value in values.items())
    return itertools.combinations(named, min(together, len(named)))


def sample(cases: Mapping[str, Mapping[str, Any]], together: int = 2) -> set[str]:
    """The ids of the cases that stay.

    Args:
        cases: of one test, by their ids: the arguments' values, each told by its `repr`.
        together: of how many arguments every combination of values stays that the cases have.
    """
    shown: set[tuple[Any, ...]] = set()
    kept = set()
    for case in sorted(cases, key=lambda case: (zlib.crc32(case.encode()), case)):
        new = set(combinations(cases[case], together)) - shown
        if new:
            kept.add(case)
            shown |= new
    return kept


def is_whole() -> bool:
    return os.environ.get(WHOLE, "0") not in ("", "0")


def sampled_items(items: list[pytest.Item]) -> list[pytest.Item]:
    """The items that run: those without the mark or without arguments all do."""
    tests: dict[str, list[pytest.Item]] = {}
    for item in items:
        if item.get_closest_marker(MARK) and hasattr(item, "callspec"):
            tests.setdefault(item.nodeid.partition("[")[0], []).append(item)
    left: set[str] = set()
    for some in tests.values():
        cases = {item.name: item.callspec.params for item in some}  # type: ignore[attr-defined]
        kept = sample(cases, together_of(some[0]))
        left |= {item.nodeid for item in some if item.name not in kept}
    return [item for item in items if item.nodeid not in left]


def together_of(item: pytest.Item) -> int:
    mark = item.get_closest_marker(MARK)
    assert mark is not None
    return int(mark.args[0]) if mark.args else 2
