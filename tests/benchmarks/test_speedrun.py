"""The speed-run's table has what its file has."""

from __future__ import annotations

import importlib
import json
from typing import Any

import pytest

from tests.helpers.paths import BENCHMARKS, DOCS

PAGE = DOCS / "evidence.md"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


def test_the_speedrun_is_what_its_file_says(script: Any) -> None:
    speedrun = script("speedrun")
    file = speedrun.FILE
    record = json.loads(file.read_text(encoding="utf-8")) if file.exists() else None
    expected = speedrun.NOT_RUN if record is None else speedrun.block(record)
    assert expected in PAGE.read_text(encoding="utf-8")


def test_the_speedruns_table_has_epochs_and_seconds_to_the_goal(script: Any) -> None:
    speedrun = script("speedrun")

    def run(optimizer: str, seed: int, *accuracies: float) -> dict[str, Any]:
        epochs = [
            {"epoch": i + 1, "accuracy": accuracy, "seconds": 60.0 * (i + 1)}
            for i, accuracy in enumerate(accuracies[:-1])
        ]
        found = {"accuracy": accuracies[-1], "accuracy_one_view": accuracies[-2], "flops": 2.83e14}
        found["dtype"] = "bfloat16"
        found |= {"batch_size": 2000, "steps": 47}  # of 25 an epoch: the second is no whole one
        return {**found, "optimizer": optimizer, "seed": seed, "epochs": epochs, "seconds": 130.0}

    runs = [run("muonw", 0, 0.9, 0.941, 0.945), run("muonw", 1, 0.9, 0.93, 0.941)]
    runs.append(run("sgd", 0, 0.8, 0.9, 0.91))
    machine = {"command": "c", "cpu": "x", "cores": 2, "threads": 1, "capability": "AVX2"}
    machine |= {"system": "Linux", "torch": "2", "python": "3", "date": "today"}
    text = speedrun.block({"machine": machine, "runs": runs})
    assert "| MuonW | 2 | 94.30 ± 0.28 | 93.55 ± 0.78 | 2 of 2 | 1.9 ± 0.0 | 125 ± 7 |" in text
    assert "| SGD, Nesterov, lookahead | 1 | 91.00 | 90.00 | 0 of 1 | — | — | 130 |" in text
    assert "| 2.83e+14 | bfloat16 |" in text
    assert "MuonW, seed 0: 90.00, 94.10; " in text
