"""The experiments of docs/learning-rate.md: they go on after a kill, say what they say, fill the
page.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.paths import ROOT

PAGE = ROOT / "docs" / "learning-rate.md"


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sklearn")
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


@pytest.fixture
def rates() -> Any:
    import default_rate

    return default_rate


@pytest.fixture
def first() -> Any:
    import first_try

    return first_try


def test_every_rule_and_both_bests_are_run_and_a_killed_sweep_goes_on(
    rates: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = dataclasses.replace(rates.CASES["digits"], steps=(2,))
    monkeypatch.setattr(rates, "CASES", {"digits": short})
    # A valley for each optimizer, in the place of trainings: AdamW's at 8e-3, MuonW's elsewhere.
    monkeypatch.setattr(
        rates,
        "train",
        lambda task, steps, point, seed: (
            abs(point.rest - 3)
            if point.kind == "adamw"
            else (point.matrices - 5) ** 2 + (point.rest - 2) ** 2 / 10
        ),
    )
    path = tmp_path / "runs.jsonl"
    rates.measure(path, ["digits"], 0, 3)
    with path.open("a") as file:
        file.write('{"kind": "muonw", "wid')  # killed while it wrote
    rates.measure(path, ["digits"], 0, None)
    runs = rates.rate_runs.read(path)
    points = [rates.Point(r["kind"], r["matrices"], r["rest"]) for r in runs]
    assert len(points) == len(set(points))
    losses = rates.losses_of(runs, "digits", 2)
    assert rates.tuned(losses).rest == 3
    best = min(rates.plane(losses), key=losses.__getitem__)
    beside = [rates.Point("muonw", best.matrices + d, best.rest) for d in (-1, 1)]
    assert all(losses[p] > losses[best] for p in beside)
    (case,) = rates.summarise(runs).values()
    assert case["adamw"] == {"rate": 8e-3, "loss": 0}
    # From 1e-3, "unit_rms": 2^log2(5) times 1e-3 for the matrices, 1e-3 for the rest.
    expected = (math.log2(5) - 5) ** 2 + 4 / 10 - losses[best]
    assert case["regret"]['matrices × 5, `"unit_rms"`']["1e-3"] == pytest.approx(expected, abs=1e-4)
    before = path.read_text()
    rates.measure(path, ["digits"], 0, None)
    assert path.read_text() == before


def test_rates_and_decay_of_a_point_are_what_its_kind_says(rates: Any) -> None:
    model = rates.CASES["digits"].build()
    for kind, decay in (("muonw", 1e-3), ("muonw, own decay", 4e-3)):
        optimizer = rates.optimizer_of(rates.Point(kind, 2, 0), model)
        for group in optimizer.param_groups:
            if group["algorithm"] == "muon":
                assert (group["lr"], group["adjust_lr_fn"]) == (4e-3, "match_rms_adamw")
                assert group["lr"] * group["weight_decay"] == pytest.approx(decay * 0.1)
            else:
                assert group["lr"] == 1e-3


def test_the_rule_of_the_table_is_what_muonw_does(rates: Any) -> None:
    """The row "unit_rms" was run as match_rms_adamw at five times the rate, a fifth of the decay;
    after three steps both are the same to the rounding of float32.
    """
    from muonkit import MuonW

    def trained(build: Any) -> list[torch.Tensor]:
        torch.manual_seed(0)
        model = rates.CASES["digits"].build()
        optimizer = build(model)
        for step in range(3):
            optimizer.zero_grad()
            loss, _ = rates.loss_of(model, *rates.loaded("digits").batch(0, step, 16))
            loss.backward()
            optimizer.step()
        return list(model.parameters())

    point = rates.RULES['matrices × 5, `"unit_rms"`'](0)
    run = trained(lambda model: rates.optimizer_of(point, model))
    default = trained(lambda model: MuonW(model, lr=1e-3))
    for p, q in zip(run, default, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-7)


def test_a_short_run_of_each_kind_trains(rates: Any) -> None:
    for point in (
        rates.Point("adamw", None, 2),
        rates.Point("muonw", 2, 2),
        rates.Point("muonw, warm", 2, 2),
    ):
        # Ten classes: chance is ln 10 = 2.30, and twenty steps are enough to be below it.
        assert rates.train("digits", 20, point, 0) < 2.25
    assert rates.train("digits", 20, rates.Point("muonw", 60, 60), 0) > 2.25


@pytest.mark.parametrize(
    "name",
    ["language model", "diffusion", "graph", "policy gradient", "proximal policy"],
)  # the autoencoder needs MNIST
def test_every_script_trains_all_of_its_model_with_either_optimizer(first: Any, name: str) -> None:
    script = first.SCRIPTS[name]
    for column in ("theirs", "MuonW"):
        made: list[tuple[torch.optim.Optimizer, list[torch.Tensor]]] = []

        def make(model: torch.nn.Module, column: str = column, made: Any = made) -> Any:
            optimizer = first.COLUMNS[column](script)(model)
            made.append((optimizer, [p.detach().clone() for p in model.parameters()]))
            return optimizer

        torch.manual_seed(0)
        # Sixteen steps are one rollout of the proximal policy.
        figure = script.run(make, 16 if name == "proximal policy" else 2)
        assert math.isfinite(figure)
        ((optimizer, before),) = made
        after = {id(p) for group in optimizer.param_groups for p in group["params"]}
        assert len(after) == len(before)
        assert all(optimizer.state[p] for g in optimizer.param_groups for p in g["params"])


def test_what_diverged_is_said(first: Any, tmp_path: Path) -> None:
    path = tmp_path / "first_try.jsonl"
    name = "graph"
    for column in first.COLUMNS:
        for seed, figure in enumerate((50.0, math.inf if column == "MuonW" else 60.0)):
            line = {"script": name, "optimizer": column, "seed": seed, "figure": figure}
            line["setting"] = first.setting(first.SCRIPTS[name])
            first.rate_runs.append(path, line, "figure")
    row = first.table(first.read(path)).splitlines()[-1]
    assert "1 of 2 diverged" in row
    assert "55.0 ± 7.1" in row


def test_the_page_shows_the_recorded_runs(rates: Any, first: Any) -> None:
    text = PAGE.read_text()
    summary = rates.summarise(rates.rate_runs.read(rates.FOLDER / "runs.jsonl"))
    assert set(summary) == {f"{t}, {s} steps" for t, c in rates.CASES.items() for s in c.steps}
    assert rates.rules_table(summary) in text
    assert rates.cases_table(summary) in text
    runs = first.read(first.RUNS)
    assert len(runs) == len(first.SCRIPTS) * len(first.COLUMNS) * first.SEEDS
    assert first.table(runs) in text
