"""The ranking of stages: the table on docs/choosing.md is what its files say."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
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


LOSSES = {"muonw": [1.5, 1.6, 1.7], "normuon": [1.1, 1.2, 1.3]}


def _compared(words: list[str], out: Path) -> dict[str, Any]:
    """What `muonkit compare` finds, as far as the table reads it."""
    name = words[words.index("--optimizers") + 1]
    assert out.name == name
    curve = {"steps": [], "val_loss": [], "accuracy": [], "seconds": []}
    found = [
        {"optimizer": name, "seed": seed, "val_loss": loss, "curve": curve}
        for seed, loss in enumerate(LOSSES[name])
    ]
    return {
        "rows": [{"optimizer": name, "lr": 0.01, "weight_decay": 0.1}],
        "runs": found,
        "config": {"task": "gpt", "budget": "6 steps", "seeds": 3},
        "environment": {"processor": "Z80", "torch": "2.13.0", "written": "2026-11-28T00:00"},
        "command": " ".join(["muonkit", "compare", *words]),
    }


@pytest.fixture
def ranked(script: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Any]:
    """Ranks stages with `_compared` for trainings; returns those that were trained and the file."""
    trained: list[str] = []

    def compare(words: list[str], out: Path) -> dict[str, Any]:
        trained.append(out.name)
        return _compared(words, out)

    def outcomes(record: dict[str, Any]) -> list[tuple[Any, None]]:
        return [(argparse.Namespace(val_loss=run["val_loss"]), None) for run in record["runs"]]

    monkeypatch.setattr(script, "compare", compare)
    monkeypatch.setattr(script, "outcomes", outcomes)
    monkeypatch.setattr(script, "state_bytes", lambda task, name: 2**20)

    def ranked(names: list[str], further: list[str], ranking: str = "gpt") -> Any:
        trained.clear()
        options = argparse.Namespace(
            results=tmp_path, out=tmp_path / "runs", optimizers=names, jobs=2, quick=True
        )
        options.further = further
        script.run(script.kept(ranking, options), options)
        file = tmp_path / f"{ranking}.json"
        return sorted(trained), json.loads(file.read_text(encoding="utf-8"))

    return ranked


def test_a_stage_that_is_done_is_not_trained_again(script: Any, ranked: Callable[..., Any]) -> None:
    assert ranked(["normuon"], [])[0] == ["normuon"]
    trained, record = ranked(["muonw", "normuon"], [])
    assert trained == ["muonw"]
    lines = [line for line in script.block(record).splitlines() if line.startswith("| ")]
    assert [line.split("|")[1].strip() for line in lines[2:]] == ["`normuon`", "plain"]
    assert "1.2000 ± 0.1000" in lines[2]
    assert "Not yet run: `adamuon`, " in script.block(record)
    assert "ms" not in script.block(record)
    timed = {"muonw": {"ms": 20.0, "times_plain": [1.0, 1.0, 1.0]}}
    timed_on = record["runs"][0]["machine"] | {"cpu": "another CPU"}
    with_times = script.block(record | {"times": timed, "times_machine": timed_on})
    assert "| 20 |" in with_times
    assert "another CPU" in with_times
    with pytest.raises(SystemExit, match="delete it to begin anew"):
        ranked(["muonw"], ["--seeds", "4"])


def test_a_ranking_without_a_sweep_has_what_another_found(
    script: Any, ranked: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(script, "FOLDER", tmp_path)
    with pytest.raises(SystemExit, match=r"gpt\.json, which lacks muonw: run that one first"):
        ranked(["muonw"], [], "gpt-long")
    ranked(["muonw"], [])
    trained, record = ranked(["muonw"], [], "gpt-long")
    assert trained == ["muonw"]
    assert "--lr 0.01 --weight-decay 0.1" in record["runs"][0]["command"]
    assert "--sweep" not in record["runs"][0]["command"]
    assert "Not swept: each has the learning rate and the decay that `gpt` found" in script.block(
        record
    )
