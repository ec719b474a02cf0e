"""The ranking of stages: the table on docs/choosing.md is what its files say."""

from __future__ import annotations

from typing import Any

import pytest

from tests.helpers.paths import ROOT


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import stages

    return stages


def test_the_page_is_what_the_files_make_it(script: Any) -> None:
    guide = (ROOT / "docs" / "choosing.md").read_text(encoding="utf-8")
    assert script.page(guide, ROOT / "docs" / "stages") == guide


def test_steps_are_timed_beside_plain_ones(script: Any) -> None:
    found = script.time_steps("digits", ["normuon"], rounds=2)
    assert list(found) == [script.PLAIN, "normuon"]
    assert found[script.PLAIN]["times_plain"] == (1.0, 1.0, 1.0)
    assert all(each["ms"] > 0 for each in found.values())
