"""The Qwen-like model's optimizers, sweeps and page."""

from __future__ import annotations

import importlib
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.paths import BENCHMARKS, DOCS

PAGE = DOCS / "evidence.md"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


@pytest.fixture
def qwen(script: Any) -> Any:
    pytest.importorskip("transformers")
    return script("qwen")


@pytest.fixture
def tiny(qwen: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The same script with a model and data that take milliseconds."""
    small = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    small |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    monkeypatch.setattr(qwen, "SIZES", small)
    monkeypatch.setattr(qwen, "stdlib_text", lambda context: _Text())
    return qwen


def test_the_qwen_like_models_page_is_what_its_file_says(qwen: Any) -> None:
    expected = qwen.block(qwen.read(qwen.FILE)) if qwen.FILE.exists() else qwen.NOT_RUN
    assert expected in PAGE.read_text(encoding="utf-8")


def test_three_of_the_five_optimizers_are_one_rule(tiny: Any) -> None:
    names = ("muonw", "torch", "moonlight", "original", "adamw")
    runs = {name: tiny.train(tiny.Key(name, 0.01, 0.01, 0), 3, 1) for name in names}
    ours = runs["muonw"]
    assert [step for step, _ in ours["validation"]] == [0, 3]
    assert 0 < ours["optimizer_ms"] < ours["step_ms"]
    # Two steps along the same momenta, summed in another order: float32 rounds a loss of 5.5 so.
    for name in ("torch", "moonlight"):
        assert runs[name]["loss"] == pytest.approx(ours["loss"], rel=1e-5)
    for name in ("original", "adamw"):
        assert runs[name]["loss"][0] == ours["loss"][0]
        assert abs(runs[name]["loss"][2] - ours["loss"][2]) > 1e-3


def test_adamw_may_have_a_rate_for_the_matrices_and_one_for_the_rest(tiny: Any) -> None:
    model = tiny.Qwen(0)
    optimizer = tiny.make("adamw", model, 0.001, 0.016)
    rates = {id(p): g["lr"] for g in optimizer.param_groups for p in g["params"]}
    assert len(rates) == len(list(model.parameters()))
    for name, p in model.named_parameters():
        of_rest = "embed" in name or p.ndim < 2
        assert rates[id(p)] == (0.016 if of_rest else 0.001), name


class _Text:
    """Random bytes, as windows."""

    def batch(self, seed: int, step: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        rng = torch.Generator().manual_seed(1 + step)
        x = torch.randint(0, 16, (2, 17), generator=rng)
        return x[:, :-1], x[:, 1:]

    def validation(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        return [self.batch(0, -1, 2)]


def test_the_searches_train_each_run_once_and_choose_the_lowest(
    qwen: Any, script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = []
    best = {"adamw": 0.004, "muonw": 0.008, "original": 0.032, "torch": 0.008, "moonlight": 0.008}

    def train(key: Any, steps: int, evaluations: int) -> dict[str, Any]:
        trained.append(key)
        end = 1.5 + abs(math.log2(key.lr / best[key.optimizer])) + 0.1 * key.seed
        if key.optimizer == "adamw":  # its rest wants twice the rate of its matrices
            end += 0.2 * abs(math.log2(key.adamw_lr / key.lr / 2))
        times = {"step_ms": 100.0, "optimizer_ms": 20.0}
        return {"loss": [5.0, end], "validation": [[0, 5.0], [2, end]], **times}

    monkeypatch.setattr(qwen, "train", train)
    path = tmp_path / "qwen.json"
    runs = script("curves").Runs(path, "qwen", {"steps": 2}, qwen.Key._fields)
    qwen.all_runs(qwen.Trainer(runs, 1, 2, 1), seeds=2)
    record = qwen.read(path)
    assert record["chosen"] == {"adamw": 0.004, "muonw": 0.008, "original": 0.032, "rest": 0.008}
    assert len(trained) == len(set(trained)) == len(record["runs"])
    for seed in (0, 1):
        cases = qwen.cases(record["chosen"]).values()
        assert {qwen.Key(*case, seed) for case in cases} <= set(trained)
    text = qwen.block(record)
    assert "steps to the loss of AdamW with two rates" in text
    assert "| AdamW | 0.004 | 0.004 | 2 | 1.7500 ± 0.0707 | — | 20% |" in text
    assert "one for the rest | 0.004 | 0.008 | 2 | 1.5500 ± 0.0707 | 2 ± 0 | 20% |" in text
    assert '| MuonW, "original", at AdamW\'s rate | 0.004 | 0.004 | 2 | 4.5500' in text
    assert "; AdamW: 0.001: 3.7000, 0.002: 2.7000, **0.004: 1.7000**, 0.008: 2.7000; " in text
    assert "rest under AdamW: 0.004: 1.7000, **0.008: 1.5000**, 0.016: 1.7000, 0.032:" in text


def test_whole_steps_are_timed_in_turn(tiny: Any) -> None:
    found = tiny.overhead(2, 2)
    assert found["ratio"].keys() == {"muonw", "torch"}
    for name, whole in found["step_ms"].items():
        assert 0 < found["optimizer_ms"][name] < whole
    text = tiny.overhead_table({"overhead": [found]})
    assert "| 2 × 128 | torch.optim.Muon and AdamW |" in text
