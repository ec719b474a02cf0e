"""What the evidence rests on: decays swept like rates, p-values, torch's Muon in float32, processes
side by side that change no loss, and the page that is written from the figures.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import sys
import time
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from muonkit.lab import optimizers
from muonkit.lab.cli import main
from muonkit.lab.errors import RunError
from muonkit.lab.optimizers import OPTIMIZERS
from muonkit.lab.results import Curve, rows, table, welch
from muonkit.lab.sweep import best_decay, best_rate
from muonkit.lab.train import Result, Run
from tests.helpers import warm
from tests.helpers.lab import losses, read_records, searched
from tests.helpers.paths import BENCHMARKS, DOCS

# --- optimizers ---


def _stepped(name: str, weight_decay: float | None = None, steps: int = 3) -> list[torch.Tensor]:
    """The parameters of an MLP after some steps along fixed gradients."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 32), nn.GELU())
    model.append(nn.Linear(32, 4))
    optimizer = OPTIMIZERS[name].build(model, 0.02, weight_decay)
    for group in optimizer.param_groups:
        if "ns_dtype" in group:  # whatever this CPU multiplies fastest
            group["ns_dtype"] = "float32"
    for _ in range(steps):
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


def _distance(a: Sequence[torch.Tensor], b: Sequence[torch.Tensor]) -> float:
    return max((x - y).abs().max().item() for x, y in zip(a, b, strict=True))


def test_torch_muon_in_float32_is_ours_and_bfloat16_is_not() -> None:
    """Same algorithm, same scale: they differ by float32's rounding (five products of sums of 32
    terms, amplified at most 3.4445 times each: below 1e-5 of a step of 0.02·0.2·√32), where
    bfloat16's is a thousand times larger.
    """
    ours = _stepped("muonw")
    assert _distance(ours, _stepped("torch-muon-fp32")) < 1e-6
    assert _distance(ours, _stepped("torch-muon")) > 1e-4


def test_the_cast_is_a_copy_in_float32_and_a_cast_again_after_the_step() -> None:
    momentum = torch.ones(3)
    with optimizers._Float32Casts():
        cast = momentum.bfloat16()
    assert cast.dtype == torch.float32
    cast.zero_()  # as torch's loop, which divides it in place
    assert torch.equal(momentum, torch.ones(3))
    _stepped("torch-muon-fp32")
    assert torch.ones(1).bfloat16().dtype == torch.bfloat16


def test_a_torch_that_casts_in_another_way_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.optim import _muon

    monkeypatch.setattr(_muon, "_zeropower_via_newtonschulz", lambda grad, *_: grad)
    with pytest.raises(RunError, match=r"found no bfloat16\(\) to change"):
        _stepped("torch-muon-fp32")


def test_normuon_is_the_stage() -> None:
    optimizer = OPTIMIZERS["normuon"].build(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), 0.01)
    assert {g["after"] for g in optimizer.param_groups if g["algorithm"] == "muon"} == {
        ("normuon",)
    }
    assert _distance(_stepped("normuon"), _stepped("muonw")) > 1e-3


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_weight_decay_is_applied_and_none_is_the_default(name: str) -> None:
    default = OPTIMIZERS[name].weight_decay
    assert _distance(_stepped(name), _stepped(name, default)) == 0
    # Weights of up to 0.25, three steps at lr 0.02: up to 3·0.02·|Δdecay|·0.25, a third at least.
    assert _distance(_stepped(name), _stepped(name, default + 1)) > 0.005


def test_a_decay_names_its_run_and_the_default_names_none() -> None:
    assert Run("sgd", 0.1, 2).key == "sgd-lr0.1-seed2"
    assert Run("sgd", 0.1, 2, 5e-3).key == "sgd-lr0.1-wd0.005-seed2"
    assert "weight_decay" not in Run("sgd", 0.1, 2).fields()
    assert Run("sgd", 0.1, 2, 5e-3).fields()["weight_decay"] == 5e-3


# --- sweeps ---


@pytest.mark.parametrize("points", [3, 5, 7])
@pytest.mark.parametrize("centre", [0.1, 5e-4])
def test_decays_reach_from_a_tenth_to_ten_times_and_no_further(points: int, centre: float) -> None:
    found, tried = searched(best_decay(centre, points), lambda decay: decay)
    assert found == pytest.approx(centre / 10)
    assert len(tried) == points
    assert centre in tried
    assert max(tried) == pytest.approx(10 * centre)


def test_three_points_widen_by_one() -> None:
    found, tried = searched(best_rate(0.01, 3), lambda lr: -lr)
    assert found == 0.08
    assert tried == [0.005, 0.01, 0.02, 0.04, 0.08]


def test_compare_sweeps_rates_then_decays_and_keeps_both(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    words = [
        "--optimizers",
        "adamw,sgd",
        "--steps",
        "12",
        "--sweep",
        "--sweep-decay",
        "--sweep-full",
    ]
    words += ["--sweep-points", "3", "--seeds", "2", "--out", str(out)]
    assert main(["compare", "digits", *words]) == 0
    summary = json.loads((out / "summary.json").read_text())
    for row in summary["rows"]:
        name, default = row["optimizer"], OPTIMIZERS[row["optimizer"]].weight_decay
        tried = [r for r in summary["sweep"] if r["optimizer"] == name]
        rates = {r["lr"]: r["val_loss"] for r in tried if r["weight_decay"] is None}
        decays = {
            default if r["weight_decay"] is None else r["weight_decay"]: r["val_loss"]
            for r in tried
            if r["lr"] == row["lr"]
        }
        assert rates[row["lr"]] == min(rates.values())
        assert len(tried) == len(rates) + 2  # the default decay was tried with the rates
        assert sorted(decays) == pytest.approx([default / 10, default, default * 10])
        assert decays[row["weight_decay"]] == min(decays.values())
        # The runs that count have the decay that was chosen, in their names and lines too.
        chosen = None if row["weight_decay"] == default else row["weight_decay"]
        for run in (r for r in summary["runs"] if r["optimizer"] == name):
            assert run["weight_decay"] == chosen
            key = Run(name, run["lr"], run["seed"], chosen).key
            lines = read_records(out / "runs" / key / "measurements.jsonl")
            assert all(line.get("weight_decay") == chosen for line in lines)
    page = (out / "report.html").read_text()
    assert "Learning rates and weight decays tried" in page
    assert page.count("<td>chosen</td>") == 2
    assert "weight decay" in capsys.readouterr().out


def test_weight_decay_by_hand(tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ["--optimizers", "adamw,sgd", "--steps", "3", "--weight-decay", "sgd=0,adamw=0.1"]
    assert main(["compare", "digits", *words, "--out", str(out)]) == 0
    assert sorted(path.name for path in (out / "runs").iterdir()) == [
        "adamw-lr0.004-seed0",
        "sgd-lr0.1-wd0.0-seed0",
    ]
    assert json.loads((out / "config.json").read_text())["weight_decay"] == {"sgd": 0.0}


# --- p-values ---


def test_welch_by_the_formula() -> None:
    """t, its degrees of freedom and p, written out; scipy's distribution and nothing else of it."""
    # Here, because it takes two seconds of every process that collects the tests.
    import scipy.stats

    a, b = [1.0, 1.2, 1.1, 0.9], [1.5, 1.9, 1.4]
    mean = [sum(x) / len(x) for x in (a, b)]
    error = [
        sum((x - m) ** 2 for x in xs) / (len(xs) - 1) / len(xs)
        for xs, m in zip((a, b), mean, strict=True)
    ]
    t = (mean[0] - mean[1]) / sum(error) ** 0.5
    freedom = sum(error) ** 2 / (error[0] ** 2 / 3 + error[1] ** 2 / 2)
    expected = 2 * scipy.stats.t.sf(abs(t), freedom)
    assert welch(a, b) == pytest.approx(expected, rel=1e-9)
    assert welch([*a, None], b) == welch(a, b)


@pytest.mark.parametrize(("a", "b"), [([1.0], [1.0, 2.0]), ([1.0, 1.0], [2.0, 2.0]), ([], [])])
def test_no_p_value_of_one_seed_or_none_that_differ(a: list[float], b: list[float]) -> None:
    assert welch(a, b) is None


def _outcome(name: str, seed: int, loss: float, accuracy: float | None) -> tuple[Result, Curve]:
    result = Result(name, 0.1, seed, False, 10, loss, loss, accuracy, 1.0, 1.0, 1.0)
    return result, Curve([0, 10], [0, 1], [5.0, loss])


def test_p_values_are_against_adamw_and_shown_where_there_are_any() -> None:
    outcomes = [_outcome("adamw", s, 2 + s / 10, 0.5 + s / 50) for s in range(3)]
    outcomes += [_outcome("muonw", s, 1 + s / 10, 0.9) for s in range(3)]
    adamw, muonw = rows(outcomes)
    assert adamw.val_loss_p is None
    assert muonw.val_loss_p == pytest.approx(welch([1, 1.1, 1.2], [2, 2.1, 2.2]), rel=1e-9)
    assert muonw.accuracy_p is not None
    assert muonw.accuracy_p < 0.01
    headings, cells = table([adamw, muonw])
    shown = dict(zip(headings, cells[1], strict=True))
    assert shown["p of val loss"] == "3e-04"
    assert "p of val loss" not in table(rows([_outcome("adamw", 0, 1.0, None)]))[0]


# --- processes side by side ---


@pytest.fixture(scope="module", autouse=True)
def _warm() -> None:
    """The processes of `--jobs` are forked from the one that the tests' others are."""
    warm.start()


COMMAND = ["compare", "digits", "--optimizers", "muonw,adamw", "--seeds", "2", "--threads", "1"]


@pytest.mark.whole
def test_runs_side_by_side_give_the_losses_of_runs_one_by_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*COMMAND, "--steps", "20", "--sweep", "--sweep-points", "3"]
    assert main([*words, "--out", str(tmp_path / "one")]) == 0
    capsys.readouterr()
    assert main([*words, "--jobs", "2", "--out", str(tmp_path / "two")]) == 0
    told = capsys.readouterr()
    assert losses(tmp_path / "one") == losses(tmp_path / "two")
    assert "times are those of a loaded machine" in " ".join(told.out.split())
    assert "muonw lr 0.004 steps 1 / 4 seed 0: val loss" in told.err
    page = (tmp_path / "two" / "report.html").read_text()
    assert "times are those of a loaded machine" in page
    assert "a loaded machine" not in (tmp_path / "one" / "report.html").read_text()
    # What is wrong with a run is the command's error, whoever found it.
    (result, *_) = (tmp_path / "two" / "runs").glob("adamw-*-seed1/result.json")
    result.write_text("{}")
    assert main([*words, "--jobs", "2", "--out", str(tmp_path / "two")]) == 2
    assert "the same command trains that run anew" in capsys.readouterr().err.splitlines()[-1]


def _begin(out: Path, **options: Any) -> warm.Command:
    # Steps enough that a run is still going on when the test has seen it begin.
    words = [*COMMAND, "--steps", "60", "--jobs", "2", "--checkpoint-every", "0.02"]
    return warm.Command(["-m", "muonkit.lab.cli", *words, "--out", str(out)], **options)


def _wait_for_checkpoints(process: warm.Command, out: Path, count: int) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if len(list(out.glob("runs/*/checkpoint.pt"))) >= count:
            return
        assert process.poll() is None, process.communicate()[1].decode()
        time.sleep(0.002)
    raise AssertionError("the runs did not begin in two minutes")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Any, ...]]:
    out = tmp_path_factory.mktemp("whole") / "out"
    assert main([*COMMAND, "--steps", "60", "--out", str(out)]) == 0
    return losses(out)


@pytest.mark.whole
def test_side_by_side_they_stop_and_go_on(
    tmp_path: Path, undisturbed: list[tuple[Any, ...]]
) -> None:
    out = tmp_path / "out"
    process = _begin(out)
    _wait_for_checkpoints(process, out, 2)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=120)[1].decode()
    assert process.returncode == 130
    assert "Traceback" not in said
    assert "the same command goes on from there" in said.splitlines()[-1]

    process = _begin(out)
    _wait_for_checkpoints(process, out, 2)
    process.kill()
    process.communicate()
    # The orphans end by themselves, and let go of their runs.
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        again = _begin(out)
        said = again.communicate(timeout=200)[1].decode()
        if again.returncode == 0:
            break
        assert "another muonkit is running in" in said
    assert again.returncode == 0
    assert "goes on at step" in said
    assert losses(out) == undisturbed


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="children are read from /proc")
def test_ctrl_c_while_the_processes_begin_stops_in_one_line(tmp_path: Path) -> None:
    process = _begin(tmp_path / "out", new_session=True)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    deadline = time.monotonic() + 120
    found: list[str] = []
    while time.monotonic() < deadline and not any(map(_is_spawned, found)):
        assert process.poll() is None, process.communicate()[1].decode()
        found = children.read_text().split()
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal sends it: to all of them
    said = process.communicate(timeout=120)[1].decode()
    assert process.returncode == 130, said
    assert "Traceback" not in said
    assert "the same command goes on from" in said.splitlines()[-1]


def _is_spawned(pid: str) -> bool:
    try:
        return b"forkserver import main" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:  # it has ended
        return False


def _die(*_: object) -> None:
    os._exit(1)


def test_a_killed_process_is_named_with_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("muonkit.lab.jobs._train", _die)
    words = [*COMMAND, "--steps", "5", "--jobs", "2", "--out", str(tmp_path / "out")]
    assert main(words) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: a process of --jobs was killed")


# --- the page of evidence ---


def _script() -> Any:
    """benchmarks/evidence.py as a module."""
    path = BENCHMARKS / "evidence.py"
    spec = importlib.util.spec_from_file_location("evidence", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["evidence"] = module  # its dataclasses look there
    spec.loader.exec_module(module)
    return module


def _run_warm(command: list[str], check: bool) -> Any:
    """`subprocess.run` of a Python that has imported torch already."""
    assert command[0] == sys.executable
    assert not check
    ended = warm.run(command[1:])
    print(ended.stderr, file=sys.stderr)
    return ended


@pytest.fixture
def evidence(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(BENCHMARKS)
    module = _script()
    plan = module.Plan(
        ("muonw", "adamw"),
        ("--epochs", "1"),
        seeds=2,
        points=3,
        claim="twice the accuracy",
    )
    monkeypatch.setattr(module, "PLANS", {"digits": plan})
    monkeypatch.setattr(module, "subprocess", types.SimpleNamespace(run=_run_warm))
    yield module
    del sys.modules["evidence"]


PAGE = "by hand\n<!-- begin: {0} -->\nstale\n<!-- end: {0} -->\n"


def test_options_are_replaced_and_a_length_is_one_option(evidence: Any) -> None:
    words = ["mnist", "--sweep", "--epochs", "3", "--seeds", "5"]
    assert evidence.merged(words, []) == words
    assert evidence.merged(words, ["--steps", "9"]) == [
        *("mnist", "--sweep", "--seeds", "5", "--steps", "9")
    ]


def test_evidence_end_to_end(evidence: Any, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(PAGE.format("digits") + PAGE.format("claims"))
    words = ["--out", str(tmp_path / "runs"), "--results", str(tmp_path / "kept")]
    words += ["--page", str(page), "--jobs", "1"]
    assert evidence.main([*words, "--page-only"]) == 0
    assert page.read_text().count(evidence.NOT_RUN) == 2

    # The untuned one has no sweep, so none of its options.
    further = ["--steps", "15", "--sweep-seeds", "1", "--evaluations", "3"]
    assert evidence.main([*words, "--", *further]) == 0
    kept = json.loads((tmp_path / "kept" / "digits.json").read_text())
    assert "</svg>" in (tmp_path / "kept" / "digits-loss-steps.svg").read_text()
    text = page.read_text()
    assert text.count("by hand") == 2
    assert "stale" not in text
    assert "muonkit compare digits --optimizers muonw,adamw --sweep --sweep-decay" in text
    assert "--epochs" not in text
    assert "--sweep-seeds 1" in kept["command"]
    assert "sweep" not in kept["untuned"]["command"]
    # Every figure is one of the runs', and what was untuned is not among the tuned.
    losses_of = {
        name: [r["val_loss"] for r in record["runs"] if r["optimizer"] == "adamw"]
        for name, record in (("tuned", kept), ("untuned", kept["untuned"]))
    }
    assert losses_of["tuned"] != losses_of["untuned"]
    assert [r["lr"] for r in kept["untuned"]["runs"]] == [1e-3, 1e-3]
    for values in losses_of.values():
        assert f"{sum(values) / 2:.4f}" in text
    ours = [r["val_loss"] for r in kept["runs"] if r["optimizer"] == "muonw"]
    share = 1 - sum(ours) / sum(losses_of["untuned"])
    assert f"| {abs(share):.1%} {'lower' if share >= 0 else 'higher'} |" in text
    assert "**Claimed: twice the accuracy.** Here, after 15 steps, 2 seeds:" in text
    assert evidence.main([*words, "--page-only"]) == 0
    assert page.read_text() == text


def test_the_sweep_is_shown_by_its_means(evidence: Any) -> None:
    losses = {(0.01, None): (1.0, 2.0), (0.02, None): (0.5, None), (0.01, 1.0): (1.25, 1.25)}
    sweep = [
        {"optimizer": "adamw", "lr": lr, "weight_decay": decay, "val_loss": loss}
        for (lr, decay), seeds in losses.items()
        for loss in seeds
    ]
    rows = [{"optimizer": "adamw", "lr": 0.01, "weight_decay": 1.0}]
    text = evidence.sweep_table({"rows": rows, "sweep": sweep})
    assert "| adamw | **0.01: 1.5000**, 0.02: diverged | 0.1: 1.5000, **1: 1.2500** | 6 |" in text


def test_tuned_and_untuned_of_other_lengths_are_refused(
    evidence: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    budgets = iter(["3 epochs", "1 epoch"])
    monkeypatch.setattr(
        evidence, "compare", lambda words, out: {"config": {"budget": next(budgets)}}
    )
    assert evidence.main(["--out", str(tmp_path), "--results", str(tmp_path)]) == 2
    assert "digits: tuned runs of 3 epochs, untuned ones of 1 epoch" in capsys.readouterr().err


def test_the_page_in_the_repository_has_every_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    module = _script()
    page = (DOCS / "evidence.md").read_text()
    kept = module.kept(DOCS / "evidence")
    assert module.write_page(page, kept) == page, "write it: benchmarks/evidence.py --page-only"
