"""A large product of cases, run in part: every combination of a few arguments' values, not of all.

A test with the mark `sampled` runs the cases that show every pair of values of its arguments, and
one with `sampled(3)` those that show every three of them together: a fault lies in one value or in
two that meet, hardly ever in four. The rule draws nothing at random. Of the cases of a test the one
stays that shows most combinations which none before it has shown, and among equals the first by a
checksum of their ids, until all are shown. So the same cases run everywhere, each test takes its
own from the product, and a new value of an argument is covered without a word here.

A case of `helpers.ranks.Cases` has the values of its grid, and each function of them is a test of
its own here.

A test with the mark `whole` repeats at length, or under another condition, what others hold in
little: it is left out of a sampled run.

`MUONKIT_TEST_ALL=1` runs every case (`make test-all`). The sample is of what the command line has
left over: a case that is named there runs.
"""

from __future__ import annotations

import heapq
import itertools
import os
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import pytest

MARK, LONG = "sampled", "whole"
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
    shows = {case: set(combinations(values, together)) for case, values in cases.items()}
    # What a case shows anew becomes less as others stay, never more: one whose number, counted
    # again, is still the largest is the next.
    left = [(-len(new), zlib.crc32(case.encode()), case) for case, new in shows.items()]
    heapq.heapify(left)
    shown: set[tuple[Any, ...]] = set()
    kept = set()
    while left:
        _, order, case = heapq.heappop(left)
        entry = -len(shows[case] - shown), order, case
        if entry[0] and left and entry > left[0]:
            heapq.heappush(left, entry)
        elif entry[0]:
            kept.add(case)
            shown |= shows[case]
    return kept


def is_whole() -> bool:
    return os.environ.get(WHOLE, "0") not in ("", "0")


def sampled_items(items: list[pytest.Item], named: bool = False) -> list[pytest.Item]:
    """The items that run: those without a mark or without arguments all do.

    Args:
        named: whether the command line names single tests, which then run.
    """
    items = [item for item in items if named or item.get_closest_marker(LONG) is None]
    tests: dict[str, list[pytest.Item]] = {}
    for item in items:
        if item.get_closest_marker(MARK) and hasattr(item, "callspec"):
            tests.setdefault(test_of(item), []).append(item)
    left: set[str] = set()
    for some in tests.values():
        cases = {item.name: values_of(item) for item in some}
        kept = sample(cases, together_of(some[0]))
        left |= {item.nodeid for item in some if item.name not in kept}
    return [item for item in items if item.nodeid not in left]


def test_of(item: pytest.Item) -> str:
    """The test that an item is a case of."""
    function = getattr(item.callspec.params.get("case"), "function", None)  # type: ignore[attr-defined]
    return item.nodeid.partition("[")[0] + (f"[{function}]" if function else "")


def values_of(item: pytest.Item) -> dict[str, Any]:
    """The arguments of a case, with those that a case of several ranks has."""
    params: dict[str, Any] = item.callspec.params  # type: ignore[attr-defined]
    grid = getattr(params.get("case"), "values", None)
    if grid is None:
        return params
    return {**{name: value for name, value in params.items() if name != "case"}, **grid}


def together_of(item: pytest.Item) -> int:
    mark = item.get_closest_marker(MARK)
    assert mark is not None
    return int(mark.args[0]) if mark.args else 2
