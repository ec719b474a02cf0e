"""Muon as a drop-in for torch.optim.Muon: signature, numbers, errors, state dicts."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch
from torch import nn

from muonkit import Muon

SHAPES = [(48, 32), (32, 48), (40, 40), (96, 16), (16, 96)]


def twins(dtype: torch.dtype, seed: int = 0) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    generator = torch.Generator().manual_seed(seed)
    one = [nn.Parameter(torch.randn(s, generator=generator).mul(0.02).to(dtype)) for s in SHAPES]
    return one, [nn.Parameter(p.detach().clone()) for p in one]


def run(
    theirs: torch.optim.Optimizer,
    ours: torch.optim.Optimizer,
    a: list[nn.Parameter],
    b: list[nn.Parameter],
    steps: int = 4,
    seed: int = 1,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for p, q in zip(a, b, strict=True):
            p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
            q.grad = p.grad.clone()
        theirs.step()
        ours.step()


def test_signature_begins_with_torchs() -> None:
    theirs = list(inspect.signature(torch.optim.Muon).parameters.values())
    ours = list(inspect.signature(Muon).parameters.values())[: len(theirs)]
    assert [(p.name, p.default, p.kind) for p in ours] == [
        (p.name, p.default, p.kind) for p in theirs
    ]


OPTIONS: list[dict[str, object]] = [
    {},
    {"nesterov": False},
    {"adjust_lr_fn": "match_rms_adamw", "weight_decay": 0.0},
    {"adjust_lr_fn": "original", "momentum": 0.5},
    {"ns_coefficients": (2.0, -1.5, 0.5), "ns_steps": 12},
    {"lr": torch.tensor(0.02)},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_same_call_gives_the_same_numbers(options: dict[str, object]) -> None:
    """With torch's cast to bf16 undone, by float64: nothing is left but fp32 rounding of ours."""
    a, b = twins(torch.float32)
    reference = [p.detach().double().requires_grad_() for p in a]
    options = {"lr": 0.02, **options}
    ours = Muon(b, **options, ns_dtype="float32")  # type: ignore[arg-type]
    momenta = [torch.zeros_like(p) for p in reference]
    generator = torch.Generator().manual_seed(1)
    for _ in range(4):
        for i, (p, q) in enumerate(zip(reference, b, strict=True)):
            q.grad = torch.randn(p.shape, generator=generator)
            _torch_step(p, momenta[i], q.grad.double(), {**ours.defaults, **options})
        ours.step()
    for p, q in zip(reference, b, strict=True):
        # Four updates of RMS lr * scale / sqrt(max), each right to 1e-5 of itself.
        assert (p - q.double()).norm() <= 2e-5 * (p - a[0].new_zeros(())).norm()


def _torch_step(p: torch.Tensor, momentum: torch.Tensor, g: torch.Tensor, o: dict) -> None:
    """torch/optim/_muon.py, line by line, without its cast."""
    from torch.optim._muon import _adjust_lr

    momentum.lerp_(g, 1 - o["momentum"])
    X = g.lerp(momentum, o["momentum"]) if o["nesterov"] else momentum.clone()
    X = X.T if p.size(0) > p.size(1) else X
    X = X / X.norm().clamp(min=o["eps"])
    a, b, c = o["ns_coefficients"]
    for _ in range(o["ns_steps"]):
        A = X @ X.T
        X = a * X + (b * A + c * A @ A) @ X
    X = X.T if p.size(0) > p.size(1) else X
    lr = float(o["lr"])
    with torch.no_grad():
        p.mul_(1 - lr * o["weight_decay"])
        p.sub_(_adjust_lr(lr, o["adjust_lr_fn"], p.shape) * X)


# How far ours in bf16 is from torch's, relative to the distance travelled: the difference of two
# bf16 roundings of the same iterations (torch also normalizes in bf16, ours in fp32).
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [
        (torch.float64, 0.03),
        (torch.float32, 0.03),
        # bf16 weights: each update is rounded to 2^-9 of the weight once more, on both sides.
        (torch.bfloat16, 0.04),
    ],
)
@pytest.mark.parametrize("options", OPTIONS[:4], ids=str)
def test_parity_as_shipped(
    dtype: torch.dtype, tolerance: float, options: dict[str, object]
) -> None:
    a, b = twins(dtype)
    start = [p.detach().clone() for p in a]
    options = {"lr": 0.02, **options}
    theirs = torch.optim.Muon(a, **options)  # type: ignore[arg-type]
    ours = Muon(b, **options, ns_dtype="bfloat16")  # type: ignore[arg-type]
    if dtype == torch.bfloat16 and options.get("nesterov") is False:
        pytest.skip("torch 2.13 overwrites its momentum here: test_pitfall_1 in test_optim.py")
    run(theirs, ours, a, b)
    for p, q, p0 in zip(a, b, start, strict=True):
        assert (p - q).norm() <= tolerance * (p - p0).norm()


def test_errors_are_torchs_types_and_words() -> None:
    p = [nn.Parameter(torch.zeros(3, 3))]
    for options in (
        {"lr": -1.0},
        {"momentum": -1.0},
        {"weight_decay": -1.0},
        {"adjust_lr_fn": "nope"},
        {"lr": torch.ones(2)},
    ):
        with pytest.raises(ValueError) as theirs:
            torch.optim.Muon(p, **options)  # type: ignore[arg-type]
        with pytest.raises(ValueError) as ours:
            Muon(p, **options)  # type: ignore[arg-type]
        said = str(theirs.value).partition(" should")[0]
        assert str(ours.value).startswith(said)
    with pytest.raises(ValueError, match="only supports 2D parameters"):
        Muon([nn.Parameter(torch.zeros(3))])


@pytest.mark.parametrize("direction", ["torch to ours", "ours to torch"])
def test_state_dicts_load_both_ways(direction: str) -> None:
    a, b = twins(torch.float32)
    theirs, ours = torch.optim.Muon(a, lr=0.02), Muon(b, lr=0.03, ns_dtype="bfloat16")
    run(theirs, ours, a, b)
    with torch.no_grad():
        for p, q in zip(a, b, strict=True):
            q.copy_(p)
    if direction == "torch to ours":
        ours.load_state_dict(copy.deepcopy(theirs.state_dict()))
        assert ours.param_groups[0]["lr"] == 0.02
        assert ours.param_groups[0]["ns_dtype"] == "bfloat16"  # torch's has none: ours is kept
    else:
        theirs.load_state_dict(copy.deepcopy(ours.state_dict()))
        assert theirs.param_groups[0]["lr"] == 0.03
    for p, q in zip(a, b, strict=True):
        assert torch.equal(theirs.state[p]["momentum_buffer"], ours.state[q]["momentum_buffer"])
    start = [p.detach().clone() for p in a]
    run(theirs, ours, a, b, steps=2, seed=2)
    for p, q, p0 in zip(a, b, start, strict=True):
        assert (p - q).norm() <= 0.03 * (p - p0).norm()
