"""The recipes' scripts: their files grow run by run, and the page says what they have."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.paths import BENCHMARKS, DOCS

PAGE = DOCS / "evidence.md"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


def test_a_file_of_runs_grows_and_is_of_one_setting(script: Any, tmp_path: Path) -> None:
    curves, path = script("curves"), tmp_path / "runs.json"
    trained = []

    def train(key: tuple[str, int]) -> dict[str, Any]:
        trained.append(key)
        return {"validation": [[0, 4.0], [10, 2.0 - key[1]]]}

    for _ in range(2):
        runs = curves.Runs(path, "test", {"steps": 10, "sizes": (1, 2)}, ("optimizer", "seed"))
        for key in (("muonw", 1), ("adamw", 0)):
            runs.get(key, lambda key=key: train(key))
    assert trained == [("muonw", 1), ("adamw", 0)]
    record = json.loads(path.read_text())
    assert [run["optimizer"] for run in record["runs"]] == ["adamw", "muonw"]
    assert [curves.last(run) for run in record["runs"]] == [2.0, 1.0]
    assert curves.reached(record["runs"][0], 3.0) == 5
    assert curves.reached(record["runs"][0], 1.0) is None
    with pytest.raises(SystemExit, match="another setting"):
        curves.Runs(path, "test", {"steps": 11}, ("optimizer", "seed"))


def test_the_gpt_recipe_is_what_its_file_says(script: Any) -> None:
    recipe = script("gpt_recipe")
    record = json.loads(recipe.FILE.read_text(encoding="utf-8"))
    assert recipe.block(record) in PAGE.read_text(encoding="utf-8")
    assert recipe.FILE.with_suffix(".svg").exists()


def test_rates_of_the_gpt_recipe_are_given_by_name(script: Any) -> None:
    recipe = script("gpt_recipe")
    assert recipe.rates(["adamw=0.001,0.002"]) == {"muonw": [0.016], "adamw": [0.001, 0.002]}
    with pytest.raises(SystemExit, match="muonw=RATE"):
        recipe.rates(["sgd=1"])
