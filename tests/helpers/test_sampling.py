"""The sample of a large product: what it shows, the same everywhere, and what it leaves alone."""

from __future__ import annotations

import itertools
import types
from typing import Any

import pytest

from tests.helpers import sampling

AXES = {"name": list("abcdefghij"), "form": [0, 1], "dtype": [2, 4, 8], "shape": [(3, 4), (4, 3)]}


def product(test: str = "test_it") -> dict[str, dict[str, Any]]:
    every = (dict(zip(AXES, values, strict=True)) for values in itertools.product(*AXES.values()))
    return {f"{test}[{'-'.join(map(str, case.values()))}]": case for case in every}


def shown(cases: list[dict[str, Any]], together: int) -> set[tuple[Any, ...]]:
    return {
        tuple((name, repr(case[name])) for name in names)
        for case in cases
        for names in itertools.combinations(sorted(case), min(together, len(case)))
    }


@pytest.mark.parametrize("together", [1, 2, 3, 4, 5])
def test_every_combination_is_shown(together: int) -> None:
    cases = product()
    kept = [cases[case] for case in sampling.sample(cases, together)]
    assert shown(kept, together) == shown(list(cases.values()), together)
    assert len(kept) == len(cases) if together >= len(AXES) else len(kept) < len(cases)


def test_the_same_cases_in_any_order_and_others_of_another_test() -> None:
    cases = product()
    backwards = dict(reversed(cases.items()))
    assert sampling.sample(cases) == sampling.sample(backwards)
    ids = {case.partition("[")[2] for case in sampling.sample(cases)}
    others = {case.partition("[")[2] for case in sampling.sample(product("test_that"))}
    assert ids != others
    # Among 120; the least that shows all pairs is 30, of the two longest arguments.
    assert 30 <= len(ids) <= 36


def test_the_sample_of_this_run_shows_what_its_tests_have(request: pytest.FixtureRequest) -> None:
    """Recounted here, from the items themselves: of the run in which this test stands."""
    run = {item.nodeid for item in request.session.items}
    tests: dict[str, list[pytest.Function]] = {}
    for item in request.config.stash[sampling.COLLECTED]:
        if isinstance(item, pytest.Function) and hasattr(item, "callspec"):
            tests.setdefault(sampling.test_of(item), []).append(item)
    for test, items in tests.items():
        if not sampling.is_whole():  # one parameter of a test may be marked, or all of it
            items = [item for item in items if not item.get_closest_marker(sampling.LONG)]
        if not items:
            continue
        whole = [sampling.values_of(item) for item in items]
        part = [sampling.values_of(item) for item in items if item.nodeid in run]
        if sampling.is_whole() or items[0].get_closest_marker(sampling.MARK) is None:
            assert len(part) == len(whole), test
        else:
            together = sampling.together_of(items[0])
            assert shown(part, together) == shown(whole, together), test


class Case:
    """What the rule asks of an item of pytest."""

    def __init__(self, name: str, mark: str | None, params: dict[str, Any] | None = None) -> None:
        self.name, self.nodeid, self.mark = name, f"test_x.py::{name}", mark
        if params is not None:
            self.callspec = types.SimpleNamespace(params=params)

    def get_closest_marker(self, name: str) -> pytest.Mark | None:
        return pytest.Mark(name, (), {}, _ispytest=True) if self.mark == name else None


def test_only_marked_products_are_sampled_and_in_their_order() -> None:
    marked = [Case(name, sampling.MARK, params) for name, params in product("test_it").items()]
    plain = [Case(name, None, params) for name, params in product("test_plain").items()]
    items: list[Any] = [Case("test_alone", sampling.MARK), *marked, *plain]
    left = sampling.sampled_items(items)
    assert left == [item for item in items if item in set(left)]
    kept = sampling.sample(product("test_it"))
    assert [item.name for item in left if item not in [items[0], *plain]] == [
        item.name for item in marked if item.name in kept
    ]
    assert {items[0], *plain} < set(left)


def test_a_case_that_is_named_runs() -> None:
    items: list[Any] = [Case(name, sampling.MARK, params) for name, params in product().items()]
    assert all(sampling.sampled_items([item]) == [item] for item in items)


def test_what_repeats_at_length_runs_when_all_do_or_when_it_is_named() -> None:
    items: list[Any] = [Case("test_short", None), Case("test_long", sampling.LONG)]
    assert sampling.sampled_items(items) == items[:1]
    assert sampling.sampled_items(items, named=True) == items


@pytest.mark.parametrize(
    ("value", "whole"), [(None, False), ("", False), ("0", False), ("1", True)]
)
def test_the_environment_asks_for_all(
    value: str | None, whole: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if value is None:
        monkeypatch.delenv(sampling.WHOLE, raising=False)
    else:
        monkeypatch.setenv(sampling.WHOLE, value)
    assert sampling.is_whole() is whole
