"""Runs: fair, durable, and resumed bit for bit; what they come to; the folder they live in."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from muonkit.lab import data, plots, report
from muonkit.lab.cli import main
from muonkit.lab.compare import Chosen, Comparison, Session, comparison
from muonkit.lab.errors import Interrupted, LabError, TaskError
from muonkit.lab.optimizers import OPTIMIZERS
from muonkit.lab.progress import Lines
from muonkit.lab.report import caveat, notes
from muonkit.lab.results import Curve, Outcome, figure, rows, table, verdicts
from muonkit.lab.store import (
    Folder,
    MeasurementFile,
    read_summed,
    sum_of_file,
    write_sealed,
)
from muonkit.lab.sweep import best_rate
from muonkit.lab.tasks import TASKS, Budget
from muonkit.lab.train import Result, Run, Setting, StopRequest, Trainer, lr_factor, train
from tests.helpers import lab, warm
from tests.helpers.lab import Silent, losses, read_records, searched

STEPS = 150


# --- the same for every optimizer ---


class Recording:
    """Digits that remember which batches were asked for."""

    def __init__(self) -> None:
        self.digits = data.digits()
        self.description, self.fingerprint = self.digits.description, self.digits.fingerprint
        self.sums: list[float] = []

    def steps_per_epoch(self, batch_size: int) -> int:
        return self.digits.steps_per_epoch(batch_size)

    def go_to(self, seed: int, step: int) -> None:
        self.digits.go_to(seed, step)

    def batch(self, seed: int, step: int, size: int) -> data.Batch:
        x, y = self.digits.batch(seed, step, size)
        self.sums.append(x.double().sum().item())
        return x, y

    def validation(self) -> Iterator[data.Batch]:
        return self.digits.validation()


def test_every_optimizer_starts_equal_and_sees_the_same_batches(tmp_path: Path) -> None:
    seen = {}
    for name in OPTIMIZERS:
        recording = Recording()
        setting = Setting(TASKS["digits"], recording, steps=4, batch_size=32)
        run = Run(name, 1e-3, 0)
        trainer = Trainer(run, setting, tmp_path / name, StopRequest(), Silent())
        recording.sums.clear()  # of the warm-up's batch
        start = torch.cat([p.detach().flatten().clone() for p in trainer.model.parameters()])
        trainer.train()
        end = torch.cat([p.detach().flatten() for p in trainer.model.parameters()])
        assert not torch.equal(start, end), f"{name} trained nothing"
        seen[name] = (start.tolist(), recording.sums)
    assert all(value == seen["adamw"] for value in seen.values())


def test_seeds_differ_in_weights_and_batches(tmp_path: Path) -> None:
    setting = Setting(TASKS["digits"], data.digits(), steps=2, batch_size=32)
    first = [
        train(Run("adamw", 1e-3, seed), setting, tmp_path / str(seed), StopRequest(), Silent())
        for seed in (0, 1)
    ]
    assert first[0].train_loss != first[1].train_loss


@pytest.mark.parametrize("steps", [1, 2, 20, 333])
def test_the_learning_rate_rises_and_falls(steps: int) -> None:
    factors = [lr_factor(step, steps) for step in range(steps)]
    assert all(0 < factor <= 1 for factor in factors)
    assert max(factors) == 1
    peak = factors.index(1)
    assert factors[peak:] == sorted(factors[peak:], reverse=True)
    assert factors[: peak + 1] == sorted(factors[: peak + 1])


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_every_task_is_complete(task: Any) -> None:
    assert set(task.lr) == set(OPTIMIZERS)
    x = torch.randint(256, (2, 16)) if task.name == "gpt" else None
    if x is None:
        shape = {"digits": (2, 1, 8, 8), "mnist": (2, 1, 28, 28), "cifar10": (2, 3, 32, 32)}
        x = torch.randn(shape[task.name])
    model = task.build()
    assert model(x).shape[-1] == (256 if task.name == "gpt" else 10)
    for spec in OPTIMIZERS.values():
        if task.name == "cifar10" and spec.name.startswith("torch-muon"):
            continue  # it has convolutions only; see the test below
        optimizer = spec.build(model, 1e-3)
        held = [p for group in optimizer.param_groups for p in group["params"]]
        assert len({id(p) for p in held}) == len(held) == len(list(model.parameters()))


@pytest.mark.parametrize("name", ["torch-muon", "torch-muon-fp32"])
def test_torch_muon_without_a_matrix_is_refused_not_replaced_by_adamw(name: str) -> None:
    with pytest.raises(LabError, match=f"{name} has nothing to train here"):
        OPTIMIZERS[name].build(TASKS["cifar10"].build(), 1e-3)


# --- stopped and resumed ---


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Any, ...]]:
    """The measurements of two runs that nothing disturbed."""
    out = tmp_path_factory.mktemp("whole") / "out"
    assert main([*COMMAND, "--out", str(out)]) == 0
    return losses(out)


COMMAND = [
    "compare",
    "digits",
    "--steps",
    str(STEPS),
    "--threads",
    "1",
    "--checkpoint-every",
    "0.02",
    "--lr",
    "0.02",
]


def _begin(out: Path) -> warm.Command:
    return warm.Command(["-m", "muonkit.lab.cli", *COMMAND, "--out", str(out)])


def _wait_for(process: warm.Command, out: Path, optimizer: str, steps: int) -> None:
    """Return as soon as that run's checkpoint speaks of ``steps`` steps."""
    folder = out / "runs" / f"{optimizer}-lr0.02-seed0"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        measurements = folder / "measurements.jsonl"
        there = (folder / "checkpoint.pt").exists() and measurements.exists()
        if there and measurements.read_bytes().count(b"\n") >= steps:
            return
        assert process.poll() is None, process.communicate()[1].decode()
        time.sleep(0.002)
    raise AssertionError("the run did not get that far in two minutes")


def test_stopped_and_killed_it_ends_as_if_nothing_had_happened(
    tmp_path: Path, reference: list[tuple[Any, ...]], capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    process = _begin(out)
    _wait_for(process, out, "muonw", 20)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=60)[1].decode()
    assert process.returncode == 130
    assert "Traceback" not in said
    last = said.splitlines()[-1]
    stopped = re.search(r"stopped at step (\d+) of muonw.*the same command goes on", last)
    assert stopped, said

    process = _begin(out)
    _wait_for(process, out, "adamw", 37)
    process.kill()
    said = process.communicate()[1].decode()
    assert f"goes on at step {stopped[1]}/{STEPS}" in said
    assert not (out / "runs" / "adamw-lr0.02-seed0" / "result.json").exists()
    assert not (out / "report.html").exists()

    capsys.readouterr()
    assert main([*COMMAND, "--out", str(out)]) == 0
    assert "adamw lr 0.02 seed 0: goes on at step" in capsys.readouterr().err
    assert losses(out) == reference
    assert not list(out.rglob("*.pt"))
    assert not list(out.rglob("*.tmp"))


def test_lines_after_the_checkpoint_are_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "measurements.jsonl"
    file = MeasurementFile(path)
    file.append({"step": 1})
    known = file.sync()
    file.append({"step": 2})
    file.close()
    with path.open("ab") as torn:
        torn.write(b'{"step": 3')
    file = MeasurementFile(path, read_summed(path, known, 1000))
    file.append({"step": 2, "again": True})
    whole = file.sync()
    file.close()
    assert read_records(path) == [{"step": 1}, {"step": 2, "again": True}]
    assert whole == sum_of_file(path, 1000)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_optimizer_resumes_exactly(tmp_path: Path, optimizer: str) -> None:
    setting = Setting(TASKS["digits"], data.digits(), 8, 32, checkpoint_seconds=0)
    run = Run(optimizer, 1e-2, 0)
    whole = train(run, setting, tmp_path / "whole", StopRequest(), Silent())
    # A checkpoint after 5 of the 8 steps, as a kill would leave it.
    first = Trainer(run, setting, tmp_path / "cut", StopRequest(), Silent())
    lab.advance(first, 5)
    again = Trainer(run, setting, tmp_path / "cut", StopRequest(), Silent())
    assert again.step == 5
    resumed = again.train()
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    assert (resumed.train_loss, resumed.val_loss) == (whole.train_loss, whole.val_loss)


class Streamed(Recording):
    """Notes where it was told to go; fails at one step, as a loader whose workers have ended."""

    def __init__(self, stop: StopRequest | None = None) -> None:
        super().__init__()
        self.stop, self.asked = stop, 0
        self.gone_to: list[tuple[int, int]] = []

    def go_to(self, seed: int, step: int) -> None:
        self.gone_to.append((seed, step))
        self.asked = 0

    def batch(self, seed: int, step: int, size: int) -> data.Batch:
        if self.stop is not None and step == 3:
            self.stop.received = True
            raise TaskError("a worker exited")
        self.asked += 1
        return super().batch(seed, step, size)


def test_a_loader_that_ctrl_c_has_ended_leaves_a_checkpoint_which_is_gone_on_from(
    tmp_path: Path,
) -> None:
    stop, run = StopRequest(), Run("muonw", 1e-2, 0)
    setting = Setting(TASKS["digits"], Streamed(stop), 6, 32)
    with pytest.raises(Interrupted, match="stopped at step 3"):
        train(run, setting, tmp_path, stop, Silent())
    streamed = Streamed()
    again = Trainer(
        run, Setting(TASKS["digits"], streamed, 6, 32), tmp_path, StopRequest(), Silent()
    )
    assert again.step == 3
    again.train()
    assert streamed.gone_to == [(0, 3)]  # before the first step that is timed
    assert streamed.asked == 3


# --- divergence, sweep ---


def test_a_diverging_run_ends_early_and_the_others_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    command = ["compare", "digits", "--optimizers", "sgd,adamw", "--steps", "30"]
    assert main([*command, "--lr", "sgd=1e20", "--seeds", "2", "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "diverged" in shown
    results = [json.loads(path.read_text()) for path in sorted(out.rglob("result.json"))]
    assert [result["diverged"] for result in results] == [False, False, True, True]
    assert all(result["steps"] < 30 for result in results if result["diverged"])
    for line in (out / "measurements.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


@pytest.mark.parametrize(
    ("optimum", "runs", "best"),
    [(0.01, 5, 0.01), (0.018, 5, 0.02), (0.04, 7, 0.04), (0.0012, 7, 0.00125), (1e3, 9, 0.64)],
)
def test_the_sweep_finds_the_best_rate_and_widens_at_the_edge(
    optimum: float, runs: int, best: float
) -> None:
    found, tried = searched(best_rate(0.01), lambda lr: math.log(lr / optimum) ** 2)
    assert found == best
    assert len(tried) == len(set(tried)) == runs


def test_a_sweep_walks_away_from_divergence() -> None:
    found, _ = searched(best_rate(0.01), lambda lr: math.inf if lr > 0.001 else 1 / lr)
    assert found == 0.000625
    found, tried = searched(best_rate(0.01), lambda lr: math.inf)
    assert found == min(tried)
    assert len(tried) == 9


def test_compare_sweeps_on_seed_0_and_reports_it(tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ["--optimizers", "adamw", "--steps", "12", "--sweep", "--sweep-full", "--seeds", "2"]
    assert main(["compare", "digits", *words, "--out", str(out)]) == 0
    results = [json.loads(path.read_text()) for path in out.rglob("result.json")]
    first = {r["lr"]: r["val_loss"] for r in results if r["seed"] == 0}
    assert len(first) >= 5
    (second,) = [r for r in results if r["seed"] == 1]
    assert first[second["lr"]] == min(first.values())
    page = (out / "report.html").read_text()
    assert "2.263" in page, "the scale that the runs had, not MuonW's default"
    assert "Learning rates tried" in page
    assert all(f"<td>{lr:g}</td>" in page for lr in first)


class Known(Session):
    """A session whose runs end with the losses of a table, by learning rate and seed."""

    def __init__(self, asked: Comparison, losses: dict[float, tuple[float | None, ...]]) -> None:
        self.asked, self.losses = asked, losses
        self.lines, self.results = Lines(Console(quiet=True)), {}

    def run(self, runs: Sequence[Run]) -> list[Result]:
        found = [self.losses[run.lr][run.seed] for run in runs]
        return [
            Result(run.optimizer, run.lr, run.seed, x is None, 1, x, x, None, 0.0, 0.0, 0.0)
            for run, x in zip(runs, found, strict=True)
        ]


def test_the_mean_chooses_and_one_that_diverges_counts_as_infinite() -> None:
    losses = {
        0.001: (2.0, 2.0),
        0.002: (1.0, 1.0),
        0.004: (0.9, 1.3),
        0.008: (0.5, None),
        0.016: (0.6, 0.6),
    }
    for seeds, best in ((2, 0.002), (1, 0.008)):
        asked = comparison(
            *("digits", ["adamw"]),
            lr={"adamw": 0.004},
            sweep=True,
            full=True,
            points=3,
            sweep_seeds=seeds,
        )
        assert Known(asked, losses)._chosen() == {"adamw": Chosen(best, None, None)}


def test_compare_sweeps_over_several_seeds_and_reports_their_means(tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ["--optimizers", "adamw,sgd", "--steps", "6", "--lr", "sgd=1e18,adamw=0.004"]
    words += ["--sweep", "--sweep-full", "--sweep-points", "3"]
    words += ["--sweep-seeds", "2", "--seeds", "3"]
    assert main(["compare", "digits", *words, "--out", str(out)]) == 0
    summary = json.loads((out / "summary.json").read_text())
    assert {r["seed"] for r in summary["sweep"]} == {0, 1}
    adamw, sgd = (
        [r for r in summary["sweep"] if r["optimizer"] == name] for name in ("adamw", "sgd")
    )
    means = {
        lr: sum(r["val_loss"] for r in adamw if r["lr"] == lr) / 2
        for lr in {r["lr"] for r in adamw}
    }
    assert summary["rows"][0]["lr"] == min(means, key=lambda lr: means[lr])
    assert len(adamw) == 2 * len(means)
    assert all(r["diverged"] for r in sgd)
    page = (out / "report.html").read_text()
    assert "Means over the first 2 seeds" in page
    assert all(f"<td>{mean:.4f}</td>" in page for mean in means.values())
    assert page.count("<td>chosen</td>") == 2


# --- figures ---


def _result(optimizer: str, seed: int, val_loss: float | None) -> Result:
    gone = val_loss is None
    return Result(optimizer, 0.1, seed, gone, 100, val_loss, val_loss, None, 10.0, 100.0, 20.0)


def test_a_curve_reaches_a_loss_on_the_line_between_validations() -> None:
    curve = Curve([0, 10, 20], [0, 2, 4], [4.0, 2.0, 1.0])
    assert curve.reaches(3.0) == (5, 1)
    assert curve.reaches(2.0) == (10, 2)
    assert curve.reaches(1.5) == (15, 3)
    assert curve.reaches(5.0) == (0, 0)
    assert curve.reaches(0.5) is None


def test_each_seed_is_held_against_adamw_of_the_same_seed() -> None:
    curves = {
        ("muonw", 0): Curve([0, 10], [0, 1], [4.0, 1.0]),
        ("muonw", 1): Curve([0, 10], [0, 1], [4.0, 3.0]),
        ("adamw", 0): Curve([0, 10], [0, 1], [4.0, 2.5]),
        ("adamw", 1): Curve([0, 10], [0, 1], [4.0, 2.0]),
    }
    outcomes = [(_result(n, s, curve.losses[-1]), curve) for (n, s), curve in curves.items()]
    muonw, adamw = rows(outcomes)
    assert muonw.steps_to_reference is not None
    assert muonw.steps_to_reference.text(0) == "5 (1/2)"
    assert adamw.steps_to_reference is not None
    assert adamw.steps_to_reference.mean == 10
    assert muonw.val_loss is not None
    assert muonw.val_loss.text() == "2.0000 ± 1.4142"


def test_one_seed_has_no_deviation_and_no_reference_no_figure() -> None:
    (row,) = rows([(_result("sgd", 0, 0.00123456), Curve([0], [0], [1.0]))])
    headings, ((*cells,),) = table([row])
    shown = dict(zip(headings, cells, strict=True))
    assert shown["val loss"] == "0.001235"
    assert shown["steps to AdamW's loss"] == "—"
    assert "accuracy, %" not in shown
    assert figure([None, None]) is None


def test_all_seeds_diverged_says_so() -> None:
    (row,) = rows([(_result("sgd", 0, None), Curve([0], [0], [1.0]))])
    headings, (cells,) = table([row])
    assert dict(zip(headings, cells, strict=True))["train loss"] == "diverged"


def _outcome(name: str, seed: int, losses: list[float], second: float = 0.1) -> Outcome:
    """A run of ten steps a validation, which ends at its last loss."""
    steps = [10.0 * i for i in range(len(losses))]
    curve = Curve(steps, [second * step for step in steps], losses)
    result = _result(name, seed, losses[-1])
    return replace(result, steps=int(steps[-1]), seconds=curve.seconds[-1]), curve


def _slowed(outcome: Outcome, times: float) -> Outcome:
    """The same run, each step of which took this many times as long, but for its optimizer."""
    result, curve = outcome
    return replace(result, step_ms=times * result.step_ms), curve


@pytest.mark.parametrize(
    ("outcomes", "said"),
    [
        (
            [_outcome("muonw", 0, [4, 2, 1]), _outcome("adamw", 0, [4, 3, 2])],
            ["MuonW reached AdamW's final loss in 10 of 20 steps, 1.0 of 2.0 s; one seed."],
        ),
        (  # slower in seconds
            [_outcome("muonw", 0, [4, 2, 1], 0.4), _outcome("adamw", 0, [4, 3, 2])],
            [
                "MuonW reached AdamW's final loss in 10 of 20 steps, but 4.0 s where AdamW took "
                "2.0 s in all; one seed."
            ],
        ),
        (  # another program took the machine from AdamW's run
            [_outcome("muonw", 0, [4, 2, 1]), _slowed(_outcome("adamw", 0, [4, 3, 2]), 1.5)],
            [
                "MuonW reached AdamW's final loss in 10 of 20 steps; one seed. The seconds do not "
                "compare: forward and backward took 80 ms a step in its runs and 130 ms in "
                "AdamW's, so something else used this machine."
            ],
        ),
        (
            [_outcome("adamw", 0, [4, 2, 1]), _outcome("sgd", 0, [4, 3, 2])],
            [
                "SGD did not reach AdamW's final loss in 20 steps: it ended at 2.0000 nats, AdamW "
                "at 1.0000; one seed."
            ],
        ),
        (  # MuonW first; some seeds only, and no difference that could not be chance
            [
                *(_outcome("sgd", seed, [4, 3, 3]) for seed in (0, 1)),
                _outcome("adamw", 0, [4, 3, 2]),
                _outcome("adamw", 1, [4, 3, 2.2]),
                _outcome("muonw", 0, [4, 2, 1]),
                _outcome("muonw", 1, [4, 4, 3]),
            ],
            [
                "MuonW reached AdamW's final loss with 1 of 2 seeds in 10 of 20 steps, 1.0 of 2.0 "
                "s; the final losses may differ by chance (p = 0.937).",
                "SGD did not reach AdamW's final loss in 20 steps: it ended at 3.0000 nats, AdamW "
                "at 2.1000; mean of 2 seeds; the final losses may differ by chance (p = 0.070).",
            ],
        ),
        (  # AdamW overfits: whatever comes to its final loss is no better for it
            [_outcome("adamw", 0, [4, 2, 1, 3.5, 4]), _outcome("muonw", 0, [4, 3, 2.5, 5, 6])],
            [
                "MuonW's lowest validation loss was 2.5000 nats, AdamW's 1.0000; one seed. AdamW's "
                "rose again, to 4.0000 at the end (as MuonW's may: 6.0000): train for fewer steps."
            ],
        ),
        (  # AdamW is where it ends long before it does, and stays: no rise
            [
                _outcome("adamw", 0, [2, 1, 0.5, 0.49, 0.51, 0.495, 0.505]),
                _outcome("muonw", 0, [2, 0.5, 0.4, 0.4, 0.4, 0.4, 0.4]),
            ],
            ["MuonW reached AdamW's final loss in 10 of 60 steps, 1.0 of 6.0 s; one seed."],
        ),
        (  # MuonW does
            [_outcome("adamw", 0, [4, 3, 2]), _outcome("muonw", 0, [4, 1, 3])],
            [
                "MuonW reached AdamW's final loss in 7 of 20 steps, 0.7 of 2.0 s; one seed; then "
                "it rose: it ended at 3.0000 nats, AdamW at 2.0000."
            ],
        ),
        (
            [_outcome("sgd", 0, [4, 3, 2]), _outcome("muonw", 0, [4, 2, 1])],
            ["MuonW ended at the lowest validation loss, 1.0000 nats; one seed."],
        ),
        ([_outcome("adamw", 0, [4, 3])], ["AdamW ended at 3.0000 nats; one seed."]),
    ],
)
def test_the_verdict_is_a_sentence_for_each_optimizer(
    outcomes: list[Outcome], said: list[str]
) -> None:
    assert verdicts(outcomes) == said


def test_no_figure_is_cut_however_many_optimizers_and_narrow_the_console() -> None:
    first, columns = ["", "val loss"], [[name, "1.2345 ± 0.0012"] for name in "abcdef"]
    for width in (30, 60, 80, 200):
        tables = lab.side_by_side(first, columns, width)
        assert [column for some in tables for column in some] == columns
        taken = [len("val loss") + 4 + sum(len(cells[1]) + 3 for cells in some) for some in tables]
        assert all(each <= width for each in taken)
    assert len(tables) == 1


def test_the_verdict_of_runs_that_diverged() -> None:
    lost = (_result("muonw", 0, None), Curve([0], [0], [1.0]))
    assert verdicts([lost]) == ["Every run diverged."]
    assert verdicts([lost, _outcome("adamw", 0, [4, 3])]) == ["MuonW diverged with its only seed."]
    # It came to AdamW's loss before it diverged: the table says no number of steps.
    lost = (_result("muonw", 0, None), Curve([0, 10], [0, 1], [4.0, 1.0]))
    assert rows([lost, _outcome("adamw", 0, [4, 3])])[0].steps_to_reference is None
    # With some seeds: they are no silent part of a mean, nor is AdamW's where it is left out.
    lost = (_result("muonw", 0, None), Curve([0], [0], [4.0]))
    others = [_outcome("muonw", 1, [4, 2, 1]), _outcome("adamw", 0, [4, 3, 2])]
    assert verdicts([lost, *others, _outcome("adamw", 1, [4, 3, 2])]) == [
        "MuonW reached AdamW's final loss with 1 of 2 seeds in 10 of 100 steps, 1.0 of 2.0 s. "
        "MuonW diverged with 1 of 2 seeds."
    ]
    risen = [_outcome("adamw", seed, [4, 2, 1, 3.5, 4]) for seed in (0, 1)]
    assert verdicts([lost, _outcome("muonw", 1, [4, 3, 2, 3, 3.5]), *risen])[0].startswith(
        "MuonW's lowest validation loss was 2.0000 nats, AdamW's 1.0000; one seed. MuonW diverged"
    )
    gone = (_result("adamw", 1, None), Curve([0], [0], [1.0]))
    sound = [_outcome("muonw", 0, [4, 3]), _outcome("muonw", 1, [4, 3])]
    assert verdicts([*sound, _outcome("adamw", 0, [4, 1]), gone]) == [
        "MuonW ended at the lowest validation loss, 3.0000 nats; mean of 2 seeds. AdamW diverged "
        "with 1 of 2 seeds."
    ]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({}, ""),
        ({"budget": Budget(20, "epochs"), "batch_size": 64}, ""),
        ({"budget": Budget(5, "steps")}, "of MuonW, SGD and AdamW are defaults for 20 epochs."),
        ({"batch_size": 32}, "defaults for 20 epochs with batches of 64. In runs like these"),
        ({"budget": Budget(5, "steps"), "lr": {"muonw": 1.0}}, "of SGD and AdamW are defaults"),
        ({"budget": Budget(5, "steps"), "lr": {None: 1.0}}, ""),
        ({"budget": Budget(5, "steps"), "sweep": True}, ""),
    ],
)
def test_rates_of_another_length_are_told(options: dict[str, Any], named: str) -> None:
    config = comparison("digits", ["muonw", "sgd", "adamw"], **options).config()
    told = caveat(config, TASKS["digits"])
    assert named in told
    assert bool(told) == bool(named)


def test_the_unit_of_a_rate_is_told_where_a_muon_is_compared() -> None:
    unit = 'lr of MuonW and torch.optim.Muon: in units of adjust_lr_fn="match_rms_adamw"'
    assert unit in notes(comparison("digits", ["muonw", "adamw", "torch-muon"]).config())
    assert "adjust_lr_fn" not in notes(comparison("digits", ["adamw", "sgd"]).config())


def test_seeds_are_drawn_as_their_mean_and_range() -> None:
    runs = [_outcome("muonw", 0, [4, 3, 2]), _outcome("muonw", 1, [4, 2, 1, 1], second=0.3)]
    drawn = plots.band(runs, "seconds")
    assert drawn.x == [0, 2, 4]  # mean seconds, as far as both have losses
    assert (drawn.low, drawn.mean, drawn.high) == ([4, 2, 1], [4, 2.5, 1.5], [4, 3, 2])


# --- the report ---


def test_the_report_needs_nothing_beside_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "a" / "b"
    command = ["compare", "digits", "--steps", "20", "--out", str(out)]
    assert main(command) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"report: {out / 'report.html'}"
    page = (out / "report.html").read_text()
    sources = re.findall(r"""(?:src|href)\s*=\s*["']([^"']*)""", page)
    assert len(sources) == 2
    assert all(source.startswith("data:image/svg+xml;base64,") for source in sources)
    assert page.count('<source srcset="data:image/svg+xml;base64,') == 2  # for a dark system
    assert "url(" not in page
    verdict = page.index('<p class="verdict">MuonW ')
    assert verdict < page.index("<picture>") < page.index("<table>")
    # Transposed, as in the terminal: a column for each optimizer.
    heading = page[page.index("<thead>") : page.index("</thead>")]
    assert re.findall(r">(\w+)</th>", heading) == ["optimizer", "muonw", "adamw"]
    for part in ("muonw", "adamw", "batch_size", "hidden linear layer", torch.__version__):
        assert part in page
    for name in ("loss-steps.png", "loss-seconds.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    kinds = [r["kind"] for r in read_records(out / "measurements.jsonl")]
    assert kinds.count("train") == 2 * 20
    assert kinds.count("validation") == 2 * 21
    # Once more: nothing is trained, the report is written anew, and it says so.
    (out / "report.html").unlink()
    assert main(command) == 0
    assert "was finished already: nothing was trained" in capsys.readouterr().out
    assert (out / "report.html").exists()


def test_what_a_page_shows_is_escaped(tmp_path: Path) -> None:
    curve = Curve([0, 1], [0, 1], [2.0, 1.0])
    material = report.Material(
        config={"task": "<script>", "sweep": False},
        summary="a & b",
        data="",
        routing="<no tag>",
        outcomes=[(_result("adamw", 0, 1.0), curve)],
        attempts=[],
        records={"adamw/0": []},
    )
    page = report.write(tmp_path, material).read_text()
    assert "<script>" not in page
    assert "&lt;no tag&gt;" in page


# --- the folder ---


def _asked(**changes: object) -> dict[str, object]:
    return {"task": "digits", "seeds": 1, **changes}


def test_a_folder_belongs_to_one_configuration(tmp_path: Path) -> None:
    folder = Folder(tmp_path / "out")
    assert folder.check(_asked()) is False
    folder.create(_asked())
    assert folder.check(_asked()) is True
    with pytest.raises(LabError, match=r"comparison with seeds = 1, not 2: choose another"):
        folder.check(_asked(seeds=2))
    with pytest.raises(LabError, match=r"comparison with jobs = null, not 2: choose another"):
        folder.check(_asked(jobs=2))
    folder = Folder(tmp_path / "loaded")
    folder.create(_asked(jobs=2))
    with pytest.raises(LabError, match=r"comparison with jobs = 2, not null: choose another"):
        folder.check(_asked())


def test_foreign_files_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(LabError, match=r"holds other files \(thesis.tex\)"):
        Folder(tmp_path).check(_asked())
    (tmp_path / "thesis.tex").unlink()
    (tmp_path / ".config.json.tmp").write_text("{")  # what a kill may leave of our own
    assert Folder(tmp_path).check(_asked()) is False


def test_a_file_is_no_folder_and_nothing_lies_below_one(tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.write_text("")
    with pytest.raises(LabError, match="is a file: choose another folder"):
        Folder(plain).check(_asked())
    with pytest.raises(LabError, match=r"cannot write to .*choose another folder"):
        Folder(plain / "below").create(_asked())


def test_two_processes_do_not_share_a_folder(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    with (
        folder.locked(),
        pytest.raises(LabError, match="another muonkit is running"),
        Folder(tmp_path).locked(),
    ):
        pass
    with folder.locked():
        pass


def test_a_folder_that_another_command_finished_meanwhile_is_not_taken_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its check was before the data of this one were there."""
    out = tmp_path / "out"
    command = ["compare", "digits", "--optimizers", "adamw", "--out", str(out), "--steps"]
    create = Folder.create

    def after_another(self: Folder, config: Any) -> None:
        monkeypatch.setattr(Folder, "create", create)
        assert main([*command, "2"]) == 0
        self.create(config)

    monkeypatch.setattr(Folder, "create", after_another)
    assert main([*command, "3"]) == 2
    assert "holds a comparison with budget" in capsys.readouterr().err
    assert json.loads((out / "config.json").read_text())["budget"] == "2 steps"


def test_other_data_are_noticed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    command = ["compare", "digits", "--steps", "3", "--optimizers", "adamw", "--out", str(out)]
    assert main(command) == 0
    config = Folder(out).config()
    write_sealed(out / "config.json", {**config, "data": "0123"})
    capsys.readouterr()
    assert main(command) == 2
    assert "was begun on other data" in capsys.readouterr().err


def test_evaluations_are_even_and_include_both_ends() -> None:
    setting = Setting(TASKS["digits"], data.digits(), 7, 32)
    assert setting.evaluation_steps == frozenset(range(8))
    longer = replace(setting, steps=200)
    assert len(longer.evaluation_steps) == 21
    assert {0, 200} <= longer.evaluation_steps
    assert replace(longer, evaluations=4).evaluation_steps == {0, 50, 100, 150, 200}


def test_the_environment_is_recorded() -> None:
    assert report.environment()["threads"] == str(torch.get_num_threads())
    assert report.environment()["cores"] == str(os.cpu_count())
