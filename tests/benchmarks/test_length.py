"""How the lead changes with length: what was found is kept, and what is missing is said."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.paths import ROOT


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


def found(name: str, steps: int, worse: float) -> dict[str, Any]:
    """What `muonkit compare` gives for one optimizer: a line from 5 to 1 + worse, on two seeds."""
    end, lr = 1 + worse, 0.01
    points = [steps * part / 4 for part in range(5)]
    run = {
        "optimizer": name, "lr": lr, "diverged": False, "steps": steps, "train_loss": end,
        "accuracy": None, "seconds": 1.0, "step_ms": 4.0 if name == "muonw" else 7.0,
        "optimizer_ms": 1.5 if name == "muonw" else 0.5, "weight_decay": None,
        "embedding_lr": 0.04, "part": 1,
    }  # fmt: skip
    runs = []
    for seed in (0, 1):
        last = end + 0.01 * seed
        losses = [5 + (last - 5) * part / 4 for part in range(5)]
        curve = {"steps": points, "seconds": points, "losses": losses}
        runs.append(run | {"seed": seed, "val_loss": last, "curve": curve})
    row = {"optimizer": name, "lr": lr, "embedding_lr": 0.04, "weight_decay": 0.1}
    cpu = "another CPU" if name == "adamw-0.99" else "a CPU"
    facts = {"processor": cpu, "torch": "2", "written": "2026-11-28T00:00:00"}
    return {"rows": [row], "runs": runs, "sweep": runs, "environment": facts, "command": "x"}


def test_the_lead_is_over_the_better_adamw(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import length

    page, file = tmp_path / "page.md", tmp_path / "gpt-length.json"
    page.write_text("<!-- begin: gpt-length -->\n<!-- end: gpt-length -->\n")
    monkeypatch.setattr(length, "PAGE", page)
    monkeypatch.setattr(length, "FILE", file)
    asked = []
    worse = {"muonw": 0.0, "adamw": 2.0, "adamw-0.99": 1.0}

    def compare(words: list[str], out: Path) -> dict[str, Any]:
        asked.append(words)
        given = dict(itertools.pairwise(words))
        name, steps = given["--optimizers"], int(given["--steps"])
        if steps == 1600 and name == "adamw-0.99":
            raise SystemExit(130)
        return found(name, steps, worse[name])

    monkeypatch.setattr(length, "compare", compare)
    with pytest.raises(SystemExit):
        length.main(["--jobs", "1", "--steps", "400", "1600"])
    assert [words[0] for words in asked] == ["gpt"] * 6
    assert all("--sweep-embedding-lr" in words for words in asked)
    kept = json.loads(file.read_text())["runs"]
    assert [(each["steps"], each["optimizer"]) for each in kept] == [
        (400, "adamw"), (400, "adamw-0.99"), (400, "muonw"), (1600, "adamw"), (1600, "muonw"),
    ]  # fmt: skip
    asked.clear()
    # Not swept: with what 1,600 steps found.
    length.main(["--jobs", "1", "--steps", "4000", "--optimizers", "muonw"])
    (words,) = asked
    assert not any("sweep" in word for word in words)
    given = dict(itertools.pairwise(words))
    assert {
        "--lr": "0.01",
        "--embedding-lr": "0.04",
        "--weight-decay": "0.1",
    }.items() <= given.items()
    with pytest.raises(
        SystemExit, match=r"4000 steps take what 1600 found, which .* lacks for adamw-0.99"
    ):
        length.main(["--jobs", "1", "--steps", "4000", "--optimizers", "adamw-0.99"])
    asked.clear()
    length.main(["--page-only"])
    written = page.read_text()
    # From 5 down to 1 MuonW is at 2, where AdamW ends, after three quarters of the steps; with 2.5
    # ms of forward and backward for both a step takes 4 against 3, and so it took as long: the
    # seconds are of the AdamW that ran on MuonW's CPU. (1.005: the mean of both seeds.)
    assert "| 400 | 1.0050 ± 0.0071 | 2.0050 ± 0.0071 | `adamw-0.99` | 5e-05 | 300 ± 0 |" in written
    assert "| 1.33 | 1.00 |" in written
    assert "4,000 steps were not swept: each has the rates and the decay of 1,600." in written
    assert "Not yet run: 1,600 steps, `adamw-0.99`; 4,000 steps, `adamw`" in written
    assert "| 1,600 | 1.0050 ± 0.0071 | 3.0050 ± 0.0071 | `adamw` |" in written  # so far
    assert not asked
    apart = {name: found(name, 400, 1.0) for name in ("muonw", "adamw-0.99")}
    timed = length.on_the_same_cpu(apart, "adamw-0.99")
    assert timed is None
    assert length.lead(apart["muonw"], apart["adamw-0.99"], timed)[-1] == "—"
    monkeypatch.setattr(length, "FILE", tmp_path / "other.json")
    for steps in ("1600", "4000"):
        words = ["--jobs", "1", "--steps", steps, "--optimizers", "muonw"]
        length.main([*words, "--", "--sweep-points", "3"])
    swept, unswept = asked
    assert "--sweep-points" in swept
    assert not any("sweep" in word for word in unswept)
    asked.clear()
    # Two of them at a time, each with two of its own.
    words = ["--jobs", "4", "--steps", "400", "--optimizers", "muonw", "adamw"]
    length.main([*words, "--", "--sweep-points", "3"])
    assert [dict(itertools.pairwise(words))["--jobs"] for words in asked] == ["2", "2"]
    with pytest.raises(SystemExit, match="runs of another setting"):
        length.main(["--steps", "400", "--", "--seeds", "2"])
