"""The paired rounds that all timing scripts take, and the pages that are made from their files."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _importable() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        yield


def test_every_round_runs_each_once_in_an_order_that_rotates() -> None:
    import harness

    order: list[str] = []
    after: list[int] = []

    def task(name: str) -> float:
        order.append(name)
        return float(len(order))

    tasks = {name: lambda name=name: task(name) for name in "abc"}
    results = harness.paired(tasks, 4, after=after.append)
    assert "".join(order) == "abcbcacababc"
    assert results[1] == {"b": 4.0, "c": 5.0, "a": 6.0}
    assert after == [0, 1, 2, 3]
    assert harness.column(results, "a") == [1.0, 6.0, 8.0, 10.0]


def test_a_task_of_few_rounds_is_compared_within_these() -> None:
    import harness

    seconds = {"ours": iter((1.0, 2.0, 4.0)), "slow": iter((3.0,))}
    tasks = {name: values.__next__ for name, values in seconds.items()}
    results = harness.paired(tasks, 3, allowed={"slow": 1})
    assert harness.column(results, "ours") == [1.0, 2.0, 4.0]
    assert harness.ratios(results, "slow", "ours") == [3.0]
    assert harness.ratios(results, "ours", "ours") == [1.0, 1.0, 1.0]
    assert harness.quartiles([3.0]) == (3.0, 3.0, 3.0)
    assert harness.quartiles([4.0, 1.0, 3.0, 2.0, 5.0]) == (2.0, 3.0, 4.0)


@pytest.mark.parametrize("given", ["0", "-1", "two", "1.5"])
def test_a_number_of_rounds_that_measures_nothing_is_refused(
    given: str, capsys: pytest.CaptureFixture[str]
) -> None:
    import harness

    with pytest.raises(SystemExit):
        harness.parser(__doc__, rounds=3).parse_args([f"--rounds={given}"])
    assert f"at least 1, got '{given}'" in capsys.readouterr().err


def test_a_file_is_written_where_it_was_asked_for(tmp_path: Path) -> None:
    import harness

    harness.write(None, {})
    harness.write(tmp_path / "a" / "b.json", harness.rounded({"x": (1.23456789, 2)}))
    assert json.loads((tmp_path / "a" / "b.json").read_text()) == {"x": [1.2346, 2]}


def test_no_timing_loop_stands_beside_the_harness() -> None:
    """Clocks and quartiles are the harness's; a training's own parts are timed in train_overhead,
    whole trainings in seconds of wall time elsewhere.
    """
    own = {"harness.py", "train_overhead.py", "import_time.py"}
    own |= {"default_rate.py", "first_try.py", "width_transfer.py"}
    for script in sorted((ROOT / "benchmarks").glob("*.py")):
        text = script.read_text(encoding="utf-8")
        assert script.name in own or "perf_counter" not in text, script.name
        assert script.name == "harness.py" or "statistics.quantiles" not in text, script.name


def test_every_generated_block_is_what_the_files_make_of_it() -> None:
    import pages

    for path, text in pages.renewed().items():
        assert path.read_text(encoding="utf-8") == text, f"{path.name}: python benchmarks/pages.py"
    for page in ("performance.md", "distributed.md", "monitor.md", "kernels.md"):
        kinds = {
            each["kind"] for each in pages.read(sorted(pages.DOCS.glob(pages.PAGES[page].files)))
        }
        assert kinds == {kind for kind, _ in pages.PAGES[page].blocks.values()}


def test_the_readme_quotes_the_files() -> None:
    """The measured rows of "When Muon pays"."""
    import performance_page

    records = [
        json.loads(path.read_text(encoding="utf-8"))
        for path in sorted((ROOT / "docs/performance").glob("*.json"))
    ]
    quoted = [
        tuple(cell.strip() for cell in line.split("|")[2:6])
        for line in (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
        if re.match(r"\| .* \| .*(tokens|images) \|", line)
    ]
    measured = performance_page.whole_steps(records)
    assert sorted(measured) == sorted(quoted)
    (of_mnist,) = (each for each in measured if "images" in each[0])
    evidence = " ".join((ROOT / "docs/evidence.md").read_text(encoding="utf-8").split())
    _, muonw, adamw, ratio = of_mnist
    assert f"takes {muonw} with MuonW and {adamw} with AdamW, {ratio} times as long" in evidence


def test_a_file_that_was_measured_on_two_machines_names_both() -> None:
    import parts

    facts = {"command": "c", "cores": 2, "threads": 1, "capability": "AVX2", "system": "Linux"}
    facts |= {"torch": "2", "python": "3"}
    one, later, other = (
        {**facts, "cpu": cpu, "date": date}
        for cpu, date in (("A", "2026-01-01"), ("A", "2026-01-03"), ("B", "2026-01-02"))
    )
    runs = [{"machine": each} for each in (one, other, later)]
    said = parts.machine_line({"runs": runs})
    assert "on A, 2 cores, 1 thread, AVX2, Linux; torch 2, Python 3; 2026-01-01 to 2026" in said
    assert "-03 and on B, 2 cores, 1 thread, AVX2, Linux; torch 2, Python 3; 2026-01-02." in said
    # Runs of a file that is older than what they say of themselves have the file's.
    assert parts.machine_line({"machine": other, "runs": [{}, {"machine": one}]}).count(" on ") == 2
    assert parts.machine_line({"machine": one}).endswith("Python 3; 2026-01-01.")


def test_a_write_that_fails_leaves_the_file(tmp_path: Path) -> None:
    import harness

    path = tmp_path / "deep" / "x.json"
    harness.write(path, {"kept": 1})
    with pytest.raises(TypeError):
        harness.write(path, {"kept": object()})
    assert json.loads(path.read_text()) == {"kept": 1}


def test_runs_say_where_they_ran_and_a_setting_is_compared_to_the_last_digit(
    tmp_path: Path,
) -> None:
    from curves import Runs

    setting = {"lr": 1 / 7}
    runs = Runs(tmp_path / "x.json", "x", setting, ("seed",))
    runs.fill([(0,), (1,)], lambda seed: {"loss": 1 / 3}, jobs=2)
    again = Runs(tmp_path / "x.json", "x", setting, ("seed",))
    assert [run["seed"] for run in again.record["runs"]] == [0, 1]
    assert all("capability" in run["machine"] for run in again.record["runs"])
    assert again.record["runs"][0]["loss"] == 0.3333333
