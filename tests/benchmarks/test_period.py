"""benchmarks/period.py runs, and counts what it says. No time is asserted."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.paths import BENCHMARKS

ALL = 12 * 16 * 16 * 4  # bytes of gpt(1, 16) in float32


def measured(tmp_path: Path, *words: str) -> dict[str, Any]:
    path = tmp_path / "period.json"
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "period.py"), *words, "--json", str(path)],
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    record: dict[str, Any] = json.loads(path.read_text())
    return record


@pytest.mark.whole
def test_the_bytes_of_a_period_are_a_fifth(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = measured(tmp_path, "step", "--set", "tiny", "--rounds", "1", "--seconds", "1")
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import distributed_page

    places = [(case["layout"], case["ranks"]) for case in record["cases"]]
    assert places == [("fsdp2", 2), ("tp", 2), ("fsdp2", 4), ("tp", 4), ("fsdp2_tp", 4)]
    for case in record["cases"]:
        n = case["ranks"]
        every, periodic = (case["bytes"][f"period={p}"] for p in (1, 5))
        # All ranks together send 2 (N - 1) / N of all bytes, whatever the balance is.
        assert every == [2 * (n - 1) / n * ALL] * 5
        assert periodic == [every[0], 0, 0, 0, 0]
    table = distributed_page.period_block([record])
    assert table.count("\n| ") == 5 + 2
    assert "period=5" in table


@pytest.mark.whole
def test_a_training_is_one_run_after_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = measured(tmp_path, "train", "--seeds", "1", "--steps", "2")
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import distributed_page
    import period

    assert [run["run"] for run in record["runs"]] == list(period.RUNS)
    first = {run["losses"][0] for run in record["runs"]}
    assert len(first) == 1
    assert all(len(run["losses"]) == 2 for run in record["runs"])
    assert distributed_page.period_losses_block([record]).count("\n| ") == len(period.RUNS) + 2
