"""The experiment of docs/qk-clip.md goes on after a stop, and the page says what its file has."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.paths import ROOT

PAGE = ROOT / "docs" / "qk-clip.md"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import qk_clip

    return qk_clip


def test_the_page_and_what_it_claims_are_the_files(script: Any) -> None:
    record, page = script.read(script.FILE), PAGE.read_text(encoding="utf-8")
    assert script.runs_table(record) in page
    assert script.overhead_table(record) in page
    runs = {(run["clip"], run["seed"]): run for run in record["runs"]}
    seeds = {seed for _, seed in runs}
    assert len(seeds) == 3
    for seed in seeds:
        without, clipped = runs[False, seed], runs[True, seed]
        first_above = next(i for i, most in enumerate(without["max_logit"]) if most > 1000)
        assert first_above < 67
        # The first steps grow fastest; later ones overshoot by half of tau at the most.
        assert max(clipped["max_logit"][12:]) < 1.55 * record["setting"]["tau"]
        assert clipped["validation_loss"] < without["validation_loss"]
        assert clipped["loss"][-1] < clipped["loss"][9]


def test_a_stopped_experiment_goes_on(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def train(seed: int, tau: float, lr: float, steps: int) -> dict[str, Any]:
        asked.append((seed, tau))
        return {"validation_loss": 1.0}

    class Here:
        """One process is enough for a function that does nothing."""

        def __init__(self, jobs: int) -> None: ...
        def __enter__(self) -> Here:
            return self

        def __exit__(self, *_: object) -> None: ...
        def submit(self, function: Any, *args: Any) -> Any:
            from concurrent.futures import Future

            done: Future[Any] = Future()
            done.set_result(function(*args))
            return done

    monkeypatch.setattr(script, "ProcessPoolExecutor", Here)
    monkeypatch.setattr(script, "train", train)
    options = argparse.Namespace(lr=0.1, steps=2, tau=5.0, seeds=1, jobs=1)
    script.measure(tmp_path / "x.json", options)
    script.measure(tmp_path / "x.json", argparse.Namespace(**{**vars(options), "seeds": 2}))
    assert asked == [(0, script.NEVER), (0, 5.0), (1, script.NEVER), (1, 5.0)]
    assert len(script.read(tmp_path / "x.json")["runs"]) == 4
    other = argparse.Namespace(**{**vars(options), "lr": 0.2})
    with pytest.raises(SystemExit, match="runs of another setting"):
        script.measure(tmp_path / "x.json", other)
    script.measure(tmp_path / "y.json", argparse.Namespace(**{**vars(options), "lr": 1 / 7}))
    script.measure(tmp_path / "y.json", argparse.Namespace(**{**vars(options), "lr": 1 / 7}))
    assert len(asked) == 6


def test_a_run_has_every_step(script: Any) -> None:
    run = script.train(0, 1e-3, 0.1, 2)
    assert len(run["loss"]) == len(run["max_logit"]) == 2
    assert run["heads_clipped"][0] == 16
