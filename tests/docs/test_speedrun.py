"""The speed-run's parts do what its page says, and a stopped run goes on exactly."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from muonkit.lab.data import ImageData
from tests.helpers.paths import ROOT

SMALL = ["--batch-size", "50", "--epochs", "2", "--widths", "8", "16", "16"]


@pytest.fixture(scope="module")
def photographs() -> ImageData:
    """300 smooth pictures of ten kinds, a hundred of them to test with."""
    rng = torch.Generator().manual_seed(0)
    kinds = torch.randn(10, 3, 4, 4, generator=rng)
    labels = torch.arange(300) % 10
    coarse = kinds[labels] + 0.3 * torch.randn(300, 3, 4, 4, generator=rng)
    smooth = nn.functional.interpolate(coarse, 32, mode="bilinear")
    noisy = smooth + 0.1 * torch.randn(300, 3, 32, 32, generator=rng)
    x = (128 + 50 * noisy).clamp(0, 255).to(torch.uint8)
    half = (0.5, 0.5, 0.5)
    return ImageData("pictures", x[:200], labels[:200], x[200:], labels[200:], half, half)


@pytest.fixture
def speedrun(monkeypatch: pytest.MonkeyPatch, photographs: ImageData) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    module = importlib.import_module("cifar_speedrun")
    monkeypatch.setattr(module, "cifar10", lambda: photographs)
    return module


def images_of(speedrun: Any) -> Any:
    return speedrun.load(speedrun.arguments([]))


def test_whitened_patches_have_unit_second_moments(speedrun: Any) -> None:
    images = images_of(speedrun)
    x = images.normalized(images.train_x)
    filters = speedrun.whitening(x, eps=0.0)
    assert torch.equal(filters[12:], -filters[:12])
    y = nn.functional.conv2d(x.double(), filters[:12].double()).transpose(0, 1).flatten(1)
    moments = (y @ y.T / y.shape[1]).float()
    # The smallest eigenvalue is 1e-4 of the largest, and float32 has it to 1e-3 of itself.
    assert torch.allclose(moments, torch.eye(12), atol=2e-3)
    # With eps a direction of little but noise is not blown up to the same size.
    assert (speedrun.whitening(x, eps=1.0).norm() < filters.norm() / 2).item()


def test_images_are_moved_and_flipped_as_drawn(speedrun: Any) -> None:
    x = torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8)
    shifts = torch.tensor([[2, 2, 0, 3], [2, 2, 4, 2]])
    y = speedrun.moved(x, shifts, torch.tensor([False, True, False, False]))
    assert torch.equal(y[0], x[0])
    assert torch.equal(y[1], x[1].flip(-1))
    assert torch.equal(y[2, :, 2:, :-2], x[2, :, :-2, 2:])
    assert torch.equal(y[2, :, 0], y[2, :, 4])  # reflected at the border
    assert torch.equal(y[3, :, :-1], x[3, :, 1:])


def test_every_other_epoch_is_the_mirror_of_the_one_before(
    speedrun: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = images_of(speedrun)
    flips = []
    plain = speedrun.moved

    def spied(x: Tensor, shifts: Tensor, flipped: Tensor) -> Tensor:
        flips.append(dict(zip(map(str, x.flatten(1).tolist()), flipped.tolist(), strict=True)))
        return plain(x, shifts, flipped)

    monkeypatch.setattr(speedrun, "moved", spied)
    for epoch in range(3):
        assert sum(len(y) for _, y in images.batches(0, epoch, 200)) == 200
    first, second, third = flips
    assert first == third != second
    assert all(second[image] != flipped for image, flipped in first.items())
    assert 60 < sum(first.values()) < 140


def test_views_are_weighed_and_flips_are_averaged(speedrun: Any) -> None:
    x = torch.randn(2, 3, 8, 8)
    found = speedrun.views(x)
    assert sum(weight for weight, _ in found) == 1
    assert [weight for weight, _ in found] == [0.25, 0.25, 0.125, 0.125, 0.125, 0.125]
    assert torch.equal(found[0][1], x)
    for (_, view), (_, mirror) in zip(found[::2], found[1::2], strict=True):
        assert torch.equal(mirror, view.flip(-1))
    # Moved by one pixel each, one way and the other.
    assert torch.equal(found[2][1][:, :, 1:, 1:], x[:, :, :-1, :-1])
    assert torch.equal(found[4][1][:, :, :-1, :-1], x[:, :, 1:, 1:])


@pytest.mark.parametrize(
    ("optimizer", "dtype"),
    [("muonw", "bf16"), ("muonw", "fp32"), ("muon", "fp32"), ("sgd", "fp32")],
)
def test_it_learns_and_a_stopped_run_goes_on_exactly(
    optimizer: str, dtype: str, speedrun: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [*SMALL, "--optimizer", optimizer, "--dtype", dtype]
    words += ["--json", str(tmp_path / "found.json")]

    def run(folder: str) -> dict[str, Any]:
        assert speedrun.main([*words, "--checkpoint", str(tmp_path / folder)]) == 0
        (found,) = json.loads((tmp_path / "found.json").read_text())["runs"]
        seconds = [found.pop("seconds"), *(each.pop("seconds") for each in found["epochs"])]
        assert min(seconds) > 0
        kept: dict[str, Any] = found
        return kept

    expected = run("whole")
    assert [each["step"] for each in expected["epochs"]] == [4, 8]
    assert expected["epochs"][1]["train_loss"] < expected["epochs"][0]["train_loss"] < 2.4
    assert expected["flops"] > 0
    # Killed in its second epoch.
    with monkeypatch.context() as patch:
        first = speedrun.Run.one_epoch

        def killed(self: Any, epoch: int) -> None:
            if epoch == 1:
                raise KeyboardInterrupt
            first(self, epoch)

        patch.setattr(speedrun.Run, "one_epoch", killed)
        with pytest.raises(KeyboardInterrupt):
            run("stopped")
    assert run("stopped") == expected
    assert run("stopped") == expected  # a finished run is not trained again
    with pytest.raises(SystemExit, match="other options"):
        speedrun.main(
            [*words, "--widths", "8", "8", "8", "--checkpoint", str(tmp_path / "stopped")]
        )


def test_products_are_of_the_dtype_that_is_asked_for(
    speedrun: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def logits(*words: str) -> Tensor:
        run = speedrun.Run(images_of(speedrun), speedrun.arguments([*SMALL, *words]), 0)
        x, y = next(run.images.batches(0, 0, 50))
        kept: Tensor = run.loss(x, y)[1]
        return kept

    exact, coarse = logits("--dtype", "fp32"), logits("--dtype", "bf16")
    far = ((coarse - exact).norm() / exact.norm()).item()
    assert 1e-4 < far < 0.1  # a few roundings of bf16, 4e-3 each
    for has_amx, expected in ((True, coarse), (False, exact)):
        told = {"amx_bf16": has_amx}
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda told=told: told, raising=False)
        assert torch.equal(logits(), expected)


def test_muons_filters_keep_their_norm_and_the_bias_stops(speedrun: Any) -> None:
    options = speedrun.arguments([*SMALL, "--epochs", "4"])
    run = speedrun.Run(images_of(speedrun), options, 0)
    norms = [p.norm().item() for p in run.model.filters()]
    x, y = next(run.images.batches(0, 0, 50))
    run.step = run.shares.bias - 1
    biases = []
    for _ in range(3):
        run.one_step(x, y)
        biases.append(run.model.whiten.bias.detach().clone())
    assert [p.norm().item() for p in run.model.filters()] == pytest.approx(norms, rel=1e-5)
    assert biases[0].norm() > 0
    assert torch.equal(biases[1], biases[0])
    assert torch.equal(biases[2], biases[0])


def test_the_slow_mean_is_what_is_left(speedrun: Any) -> None:
    model = nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        model.weight.fill_(0.0)
        lookahead = speedrun.Lookahead(model, 10)
        for step in range(1, 11):
            model.weight.add_(1.0)
            lookahead.after(step)
    # After five steps: 5·(1 - 0.95^5/8); after ten, the mean of that and five more.
    five = 5 * (1 - 0.95**5 / 8)
    ten = five + (1 - 0.95**5) * 5
    assert model.weight.item() == pytest.approx(ten, rel=1e-5)
