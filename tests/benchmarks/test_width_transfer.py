"""The experiment of docs/mup.md: it goes on after a kill, fits what it says, fills the page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import warm
from tests.helpers.pages import read_blocks
from tests.helpers.paths import ROOT

PAGE = ROOT / "docs" / "mup.md"
RUNS = ROOT / "docs" / "mup" / "runs.jsonl"


@pytest.fixture(autouse=True)
def experiment(monkeypatch: pytest.MonkeyPatch) -> Any:
    pytest.importorskip("matplotlib")
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import width_transfer

    return width_transfer


def test_the_vertex_of_a_parabola_is_found_between_the_points(experiment: Any) -> None:
    found = experiment.best([(x, 2 + (x + 4.3) ** 2) for x in (-6.0, -5.0, -4.0, -3.0)])
    assert (found["grid"], found["inside"]) == (-4.0, True)
    assert found["vertex"] == pytest.approx(-4.3)  # three points determine it
    at_the_edge = experiment.best([(x, x) for x in (-6.0, -5.0)])
    assert not at_the_edge["inside"]
    assert "vertex" not in at_the_edge


def test_a_killed_experiment_goes_on(
    experiment: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    points = [("mup", 32, -4.0), ("standard", 32, -4.0), ("standard", 32, 60.0)]
    monkeypatch.setattr(experiment, "grid", lambda widths: iter(points))
    setting = {**experiment.SETTING, "layers": 1, "context": 8, "batch": 2, "steps": 3}
    monkeypatch.setattr(experiment, "SETTING", setting)
    path = tmp_path / "runs.jsonl"
    experiment.measure(path, (32,), 1)
    assert [r["kind"] for r in experiment.read(path)] == ["mup"]
    with path.open("a") as file:
        file.write('{"kind": "standard", "wid')  # killed while it wrote
    experiment.measure(path, (32,), None)
    runs = experiment.read(path)
    assert [(r["kind"], r["width"], r["log2_lr"]) for r in runs] == points
    # Two runs of finite loss, below that of a wrong certainty, and one at a rate of 2^60.
    assert all(0 < r["loss"] < 20 for r in runs[:2])
    assert runs[2]["loss"] is None or runs[2]["loss"] > 20
    before = path.read_text()
    experiment.measure(path, (32,), None)
    assert path.read_text() == before


def test_runs_of_another_setting_are_left_out(experiment: Any, tmp_path: Path) -> None:
    path = tmp_path / "runs.jsonl"
    path.write_text(json.dumps({"setting": {**experiment.SETTING, "steps": 1}}) + "\n")
    assert experiment.read(path) == []


def test_the_page_shows_the_recorded_runs(experiment: Any) -> None:
    runs = experiment.read(RUNS)
    points = [(r["kind"], r["width"], r["log2_lr"]) for r in runs]
    assert len(set(points)) == len(points)
    assert set(points) >= set(experiment.grid())
    assert experiment.table(experiment.summarise(runs)) in PAGE.read_text()


def test_the_pages_blocks_run() -> None:
    code = "\n".join(b.text for b in read_blocks(PAGE.read_text()) if b.language == "python")
    assert code.count("mup.init_(") == 2
    done = warm.run(["-c", code])
    assert done.returncode == 0, done.stderr
