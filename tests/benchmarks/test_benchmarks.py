"""The benchmarks run, measure what they say, and the page is written from their files.

No time is asserted. Each script runs once, on tiny input, in a process of its own (`warm`).
"""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from muonkit.newton_schulz.coefficients import SCHEDULES
from tests.helpers import warm
from tests.helpers.paths import ROOT

BENCHMARKS = ROOT / "benchmarks"


@pytest.fixture(scope="module", autouse=True)
def _importable() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield


def run(script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    return warm.run([str(BENCHMARKS / script), *map(str, arguments)])


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The JSON file of a script on tiny input; each script runs once."""
    folder = tmp_path_factory.mktemp("measured")
    gpt = "--width 16 --layers 1 --heads 2 --context 16 --batch-size 2 --blocks 3 --steps 1"
    commands: dict[str, list[object]] = {
        "step": [
            "--set",
            "tiny",
            "--rounds",
            2,
            "--probes",
            1,
            "--only",
            NAMES,
            "--plot",
            folder / "step.svg",
        ],
        "errors": ["--quick", "--schedules", "keller", "polar_express_1.05"],
        "train_overhead": gpt.split(),
        "monitor_overhead": [*gpt.split()[:10], "--pairs", 6, "--every", 2],
    }

    def file(script: str) -> Path:
        path = folder / f"{script}.json"
        if not path.exists():
            done = run(f"{script}.py", *commands[script], "--threads", 1, "--json", path)
            assert done.returncode == 0, done.stdout + done.stderr
        return path

    return file


# What compiles takes a minute even on the tiny set, so it is not run here.
NAMES = "muonkit standard,torch,torch fp32,pytorch_optimizer fp32,optimuon fp32"


def test_step_measures_every_implementation(measured: Callable[[str], Path]) -> None:
    record = json.loads(measured("step").read_text())
    assert record["kind"] == "step"
    assert record["machine"]["torch"] == torch.__version__
    result = record["sets"]["tiny"]
    assert result["rows"].keys() | result["absent"].keys() == {"muonkit", *NAMES.split(",")}
    assert {"muonkit", "muonkit standard", "torch", "torch fp32"} <= result["rows"].keys()
    assert all(reason.startswith("not installed") for reason in result["absent"].values())
    for name, row in result["rows"].items():
        assert len(row["seconds"]) == row["rounds"] == 2, name
        assert row["times_muonkit"] == sorted(row["times_muonkit"])
        assert row["operations"] > 0
        assert row["calls"] >= 15  # three products in each of five iterations
        assert row["peak_bytes"] > 0
        # Momentum of every element, in float32; some keep a step count too.
        assert row["state_bytes"] >= 4 * result_elements()
        share = result["limit_ms"] / row["ms"]
        assert row["share_of_limit"] == pytest.approx(share)
    assert result["rows"]["muonkit"]["times_muonkit"] == [1.0, 1.0, 1.0]
    assert "</svg>" in (measured("step").parent / "step.svg").read_text()


def result_elements() -> int:
    from sets import TINY

    return sum(torch.Size(entry.shape).numel() for entry in TINY["tiny"])


def test_peers_take_the_same_step(measured: Callable[[str], Path]) -> None:
    """float32 rounds at 1e-7 and the iterations amplify that by less than 1,000; bf16 at 4e-3."""
    rows = json.loads(measured("step").read_text())["sets"]["tiny"]["rows"]
    assert rows["muonkit"]["distance_of_first_step"] == 0
    assert rows["muonkit standard"]["distance_of_first_step"] < 1e-4
    assert rows["torch fp32"]["distance_of_first_step"] < 1e-4  # the cast was changed ...
    assert 1e-3 < rows["torch"]["distance_of_first_step"] < 1e-1  # ... and is there as shipped
    assert rows["torch"]["given_as_matrices"] == ["experts", "flatten"]
    assert rows["muonkit"]["given_as_matrices"] == []


def test_a_slow_peer_runs_once_and_a_hopeless_one_not_at_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import step
    from sets import TINY

    monkeypatch.setattr(step.machine, "PRODUCTS", ((64, 64, 64),))
    slow = step.Limits(rounds=3, budget=0.0, longest=1e9)
    result = step.measure(TINY["tiny"], ["muonkit", "torch fp32", "torch"], slow)
    assert {name: row["rounds"] for name, row in result["rows"].items()} == {
        "muonkit": 3,
        "torch fp32": 1,
        "torch": 1,
    }
    hopeless = step.Limits(rounds=1, longest=0.0)
    result = step.measure(TINY["tiny"], ["muonkit", "torch fp32"], hopeless)
    assert list(result["rows"]) == ["muonkit"]
    assert result["absent"]["torch fp32"].startswith("not run: a step would take about")
    assert result["best_peer"] is None


def test_the_sets_are_what_they_are_called() -> None:
    from sets import SETS, cheapest_flops, matrices, standard_flops

    counts = {name: len(matrices(entries)) for name, entries in SETS.items()}
    assert counts["gpt2-small"] == 48
    assert counts["resnet-20"] == 18
    assert counts["moe"] == 48
    assert counts["llama"] == 28
    # 30 and 90 m^3 general, 20 and 38 m^3 with symmetric products and one restart, alpha = 1 and 4.
    for alpha, general, symmetric in ((1, 30, 20), (4, 90, 38)):
        for shape in ((64, 64 * alpha), (64 * alpha, 64)):
            assert standard_flops([(shape, "matrix")]) == general * 64**3
            assert cheapest_flops([(shape, "matrix")]) == symmetric * 64**3
    conv, rows = ((32, 16, 3, 3), "flatten"), ((3, 32, 144), "experts")
    assert 3 * cheapest_flops([conv]) == cheapest_flops([rows])


def test_everyone_steps_on_the_same_memory() -> None:
    from sets import TINY, Workload

    workload = Workload(TINY["tiny"])
    whole = workload.parameters({"matrix", "flatten", "experts"})
    pieces = workload.parameters({"matrix"})
    assert [tuple(p.shape) for p, _ in whole] == [e.shape for e in TINY["tiny"]]
    assert all(p.ndim == 2 and view == "matrix" for p, view in pieces)
    assert sum(p.numel() for p, _ in pieces) == sum(p.numel() for p, _ in whole)
    with torch.no_grad():
        for p, _ in pieces:
            p.fill_(7.0)
    assert all(bool((p == 7.0).all()) for p, _ in whole)
    assert not workload.gradients_changed()
    pieces[0][0].grad.zero_()  # type: ignore[union-attr]
    assert workload.gradients_changed()
    workload.restore_gradients()
    assert not workload.gradients_changed()


def test_a_cast_that_is_not_there_is_not_changed_silently() -> None:
    from peers import recast

    def half(x: torch.Tensor) -> torch.Tensor:
        return x.half()

    with pytest.raises(LookupError, match=r"has no 'x\.bfloat16\(\)'"):
        recast(half, **{"x.bfloat16()": "x"})
    assert recast(half, **{"x.half()": "x"})(torch.ones(1)).dtype == torch.float32


def test_a_patch_is_gone_after_the_step() -> None:
    from peers import PEERS, Implementation
    from sets import TINY, Workload
    from torch.optim import _muon

    shipped = _muon._zeropower_via_newtonschulz
    Implementation(PEERS["torch fp32"], Workload(TINY["tiny"]).parameters({"matrix"})).step()
    assert _muon._zeropower_via_newtonschulz is shipped


def test_every_package_is_pinned() -> None:
    from peers import PEERS

    pinned = set(
        re.findall(r"^([\w-]+)==", (BENCHMARKS / "requirements-peers.txt").read_text(), re.M)
    )
    packages = {peer.package.replace("_", "-") for peer in PEERS.values() if peer.package}
    assert packages <= pinned


def test_errors_are_of_every_form(measured: Callable[[str], Path]) -> None:
    from errors import FORMS

    record = json.loads(measured("errors").read_text())
    assert record["kind"] == "errors"
    assert record["failures"] == []
    assert {case["form"] for case in record["cases"]} == set(FORMS)
    keys = [(row["dtype"], row["spectrum"], row["form"]) for row in record["rows"]]
    assert len(set(keys)) == len(keys) == 3 * 5 * len(FORMS)
    for row in record["rows"]:
        assert row["keller"] <= row["error"]
        assert 0.5 < row["sigma"] < 1.5
        if row["form"] == "standard":
            assert row["times_standard"] == 1


def test_pitfall_7_no_form_is_out_of_bounds_in_any_dtype() -> None:
    """All schedules that are made for 16 bits, all spectra: no singular value over 1.5, and gram no
    further from float64 than twice standard in 16 bits.
    """
    import errors

    safe = [name for name, schedule in SCHEDULES.items() if not schedule.strict]
    dtypes = ["float32", "bfloat16", "float16"]
    assert errors.failures(errors.measure(safe, dtypes, quick=True)) == []


def test_errors_finds_what_is_out_of_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    import errors

    good = errors.measure(["keller"], ["bfloat16"], quick=True)
    assert errors.failures(good) == []
    monkeypatch.setitem(errors.FORMS, "broken", errors.FORMS["standard"])
    exact_step = errors.orthogonalize

    def broken(G: torch.Tensor, ns_form: str, **options: Any) -> torch.Tensor:
        O = exact_step(G, ns_form="standard", **options)
        return O * 1.6 if ns_form == "broken" else O

    monkeypatch.setattr(errors, "orthogonalize", broken)
    found = errors.failures(errors.measure(["keller"], ["bfloat16"], quick=True))
    assert any("largest singular value" in line for line in found)
    assert any("times standard's" in line for line in found)
    assert all(line.startswith("broken") for line in found)
    monkeypatch.setattr(errors, "orthogonalize", lambda G, **_: G * float("nan"))
    found = errors.failures(errors.measure(["keller"], ["bfloat16"], quick=True))
    forms = len(errors.FORMS)
    assert len(found) == forms * len(errors.QUICK_SHAPES) * 5 * 2  # both bounds, every case


def test_overhead_pairs_whole_steps(measured: Callable[[str], Path]) -> None:
    record = json.loads(measured("train_overhead").read_text())
    assert record["kind"] == "overhead"
    assert record["tokens"] == 32
    assert 0 < record["hidden"] < record["parameters"]
    for name in ("muonw", "adamw"):
        assert len(record[name]["seconds"]) == 3
        assert 0 < record[name]["share"] < 1
    assert record["ratio"] == sorted(record["ratio"])


def test_options_are_all_measured_and_cost_the_state_they_say() -> None:
    import options
    from sets import TINY, matrices

    rows = options.measure(TINY["tiny"], rounds=2)
    assert rows.keys() == options.OPTIONS.keys()
    assert rows["the defaults"]["ratio"] == (1.0, 1.0, 1.0)
    assert all(row["peak"] > 0 for row in rows.values())
    elements = sum(m * n for m, n in matrices(TINY["tiny"]))
    rows_of_all = sum(m for m, _ in matrices(TINY["tiny"]))
    assert rows["the defaults"]["state"] == 4 * elements
    assert rows['momentum_dtype="bfloat16"']["state"] == 2 * elements
    # The second moment, and a count of steps for each parameter: less than a number for each row.
    more = rows['after="normuon"']["state"] - 4 * elements
    assert 4 * rows_of_all < more < 8 * rows_of_all
    assert 8 * elements < rows['after="adamuon"']["state"] < 8 * elements + 4 * rows_of_all


def test_monitor_overhead_pairs_steps(measured: Callable[[str], Path]) -> None:
    record = json.loads(measured("monitor_overhead").read_text())
    assert record["matrices"] == 6  # query, key, value and three more
    assert record["sample_ms"] == sorted(record["sample_ms"])
    assert record["overhead"]["10"] > record["overhead"]["1000"]
    assert record["hooks_us"] > 0


@pytest.fixture
def page(tmp_path: Path) -> Path:
    path = tmp_path / "performance.md"
    path.write_text((ROOT / "docs" / "performance.md").read_text())
    return path


def outside(text: str) -> str:
    return re.sub(r"(<!-- begin: (\w+) -->).*?(<!-- end: \2 -->)", r"\1\3", text, flags=re.S)


def test_the_page_is_written_from_the_files(measured: Callable[[str], Path], page: Path) -> None:
    files = [measured(name) for name in ("step", "errors", "train_overhead")]
    before = page.read_text()
    done = run("pages.py", *files, "--page", page)
    assert done.returncode == 0, done.stderr
    text = page.read_text()
    assert outside(text) == outside(before)
    assert "Not measured yet" not in text
    tiny = json.loads(files[0].read_text())["sets"]["tiny"]
    for name, row in tiny["rows"].items():
        assert f"| {name} | {row['products']} | {row['ms']:.2f} |" in text
    for name, reason in tiny["absent"].items():
        assert f"- **{name}**: {reason}" in text
    overhead = json.loads(files[2].read_text())
    assert f"| {overhead['ratio'][1]:.3f} [" in text
    for row in json.loads(files[1].read_text())["rows"]:
        assert (
            f"| {row['dtype']} | {row['spectrum']} | {row['form']} | {row['keller']:.1e} |" in text
        )
    for table in re.findall(r"(?:^\|.*\|\n)+", text, flags=re.M):
        assert len({line.count("|") for line in table.splitlines()}) == 1  # no ragged rows
    # Written again from some of the files, the rest stays.
    assert run("pages.py", files[2], "--page", page).returncode == 0
    assert page.read_text() == text


def test_the_page_refuses_what_it_does_not_know(
    measured: Callable[[str], Path], page: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other.json"
    other.write_text('{"kind": "weather"}')
    before = page.read_text()
    for files, said in (([other], "'weather'"), ([tmp_path / "none.json"], "No such file")):
        done = run("pages.py", *files, "--page", page)
        assert done.returncode == 2
        assert said in done.stderr
        assert page.read_text() == before
    page.write_text(before.replace("<!-- end: overhead -->", ""))
    done = run("pages.py", measured("train_overhead"), "--page", page)
    assert done.returncode == 2
    assert "put both markers" in done.stderr


def test_calls_inside_a_registered_operation_are_counted() -> None:
    import peers
    import step
    from sets import TINY, Workload

    @torch.library.custom_op("muonkit_test::twice", mutates_args=())
    def twice(x: torch.Tensor) -> torch.Tensor:
        return (x + x).clone()

    class Stepping:
        def step(self) -> None:
            twice(torch.ones(1024))

    peer = peers.Peer("counted", lambda given: Stepping())
    workload = Workload(TINY["tiny"])
    made = peers.Implementation(peer, workload.parameters({"matrix"}))
    runner = step.Runner(peer, made, workload, 0.0, [], False)
    calls, peak = step.profile(runner)
    assert calls == 3  # ones, add, clone; not the empty and fill_ that ones calls
    assert step.operations(runner) == 2  # ones and the registered operation
    assert 3 * 4096 >= peak >= 2 * 4096


@pytest.mark.whole
def test_what_a_gpu_is_asked_runs_to_its_end_without_one(tmp_path: Path) -> None:
    done = run("gpu.py", "--device", "cpu", "--rounds", 2, "--json", tmp_path / "gpu.json")
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads((tmp_path / "gpu.json").read_text())
    assert record["good"]
    assert record["dry"]
    import performance_page

    said = performance_page.gpu_step_block([record])
    for part in ("| gpt2-small", "times plain: normuon", "most memory", "compiled"):
        assert part in said
