"""LoRA-Muon keeps the laws of its paper, and the page on fine-tuning says what its file has."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from tests.helpers.paths import ROOT

pytest.importorskip("transformers")
pytest.importorskip("peft")
PAGE = ROOT / "docs" / "finetuning.md"
LR = 0.02


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import finetune
    import lora_muon

    return finetune, lora_muon


def _changes(lora_muon: Any, scale: float = 1.0) -> list[torch.Tensor]:
    """Of A Bᵀ in one step: by A alone, by B alone, and in all."""
    torch.manual_seed(0)
    A = torch.randn(12, 3).double().mul_(scale).requires_grad_()
    B_T = torch.randn(3, 9).double().div_(scale).requires_grad_()
    target = torch.randn(12, 9).double()
    optimizer = lora_muon.LoRAMuon([(A, B_T)], LR)
    (A @ B_T * target).sum().backward()
    A0, B0 = A.detach().clone(), B_T.detach().clone()
    optimizer.step()
    dA, dB = A.detach() - A0, B_T.detach() - B0
    return [dA @ B0, A0 @ dB, A.detach() @ B_T.detach() - A0 @ B0]


def test_each_factor_moves_the_product_by_half_the_rate(scripts: Any) -> None:
    for change in _changes(scripts[1])[:2]:
        found = torch.linalg.svdvals(change)[:3] / (LR / 2)
        # Five iterations of the default schedule end between these.
        assert found.min() > 0.65
        assert found.max() < 1.25


def test_scales_of_the_factors_that_cancel_change_nothing(scripts: Any) -> None:
    one, other = _changes(scripts[1])[2], _changes(scripts[1], scale=30.0)[2]
    # The iterations are in float32.
    assert torch.allclose(one, other, rtol=0, atol=1e-5 * float(one.abs().max()))


def test_a_factor_of_zeros_is_left_where_it_is_until_the_other_has_moved(scripts: Any) -> None:
    A, B_T = torch.zeros(12, 3, requires_grad=True), torch.randn(3, 9, requires_grad=True)
    before = B_T.detach().clone()
    optimizer = scripts[1].LoRAMuon([(A, B_T)], LR)
    for moved in (False, True):
        optimizer.zero_grad()
        ((A @ B_T - 1.0) ** 2).sum().backward()
        optimizer.step()
        assert torch.isfinite(A).all()
        assert torch.equal(B_T, before) is not moved
        assert bool(A.any())


def test_the_page_has_what_the_file_says(scripts: Any) -> None:
    finetune, _ = scripts
    if not finetune.FILE.exists():
        pytest.skip("not yet run")
    record = json.loads(finetune.FILE.read_text(encoding="utf-8"))
    assert finetune.block(record) in PAGE.read_text(encoding="utf-8")
    for base, method in {(run["base"], run["method"]) for run in record["runs"]}:
        runs = finetune.runs_of(record, base, method)
        rates = sorted({run["lr"] for run in runs})
        best = finetune.chosen(runs)
        assert {run["seed"] for run in best} == set(range(record["setting"]["seeds"]))
        assert rates[0] < best[0]["lr"] < rates[-1], "the best rate is not at an edge"
