"""The step is the written algorithm, matrix by matrix, and leaves everything else alone."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from muonkit import Muon, MuonW, View, orthogonalize
from muonkit.scale import SCALES, scale_factor
from tests.helpers.optim import VIEWED, mlp, momentum_of, parameter, set_gradients

# --- the step is the algorithm ----------------------------------------------------------------


@pytest.mark.parametrize("adjust_lr_fn", [None, *SCALES])
@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize(("view", "shape"), VIEWED)
def test_each_matrix_of_the_view_gets_the_written_step(
    view: str, shape: tuple[int, ...], nesterov: bool, adjust_lr_fn: str | None
) -> None:
    """A plain float64 transcription, one matrix at a time (pitfalls 9, 11, 12: the scale too)."""
    lr, decay, mu = 0.1, 0.3, 0.9
    p = parameter(*shape, dtype=torch.float64)
    optimizer = Muon(
        [{"params": [p], "view": view}], lr, decay, mu, nesterov, adjust_lr_fn=adjust_lr_fn
    )
    W, M = p.detach().clone(), torch.zeros(shape, dtype=torch.float64)
    for t in range(3):
        set_gradients([p], t)
        optimizer.step()
        assert p.grad is not None
        M = mu * M + (1 - mu) * p.grad
        U = (1 - mu) * p.grad + mu * M if nesterov else M
        W = W - lr * decay * W
        for block in View.parse(view).blocks(shape):
            matrices = block.to_matrices(block.region(U))
            O = torch.stack([orthogonalize(matrix) for matrix in matrices])
            step = lr * scale_factor(adjust_lr_fn, block.rows, block.cols) * O
            block.region(W).sub_(block.to_regions(step)[0])
    torch.testing.assert_close(p.detach(), W, rtol=1e-9, atol=1e-9)


def test_pitfall_9_a_convolution_is_scaled_by_its_matrix() -> None:
    conv = parameter(64, 16, 3, 3)
    optimizer = Muon([{"params": [conv], "view": "flatten"}], adjust_lr_fn="spectral")
    assert optimizer.describe()[0]["scale"] == pytest.approx((64 / (16 * 9)) ** 0.5)


def test_pitfall_10_equal_shapes_are_not_mixed() -> None:
    """Several same-shaped parameters in one group equal each alone."""
    together = [parameter(8, 3, 2, 2, seed=i) for i in range(3)]
    alone = [nn.Parameter(p.detach().clone()) for p in together]
    optimizer = Muon([{"params": together, "view": "flatten"}], lr=0.1)
    singles = [Muon([{"params": [p], "view": "flatten"}], lr=0.1) for p in alone]
    for t in range(2):
        set_gradients(together, t)
        for p, q in zip(together, alone, strict=True):
            assert p.grad is not None
            q.grad = p.grad.clone()
        optimizer.step()
        for single in singles:
            single.step()
    for p, q in zip(together, alone, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("view", ["split(rows=12)", "split(rows=3) > split(rows=4)"])
def test_pitfall_11_one_head_does_not_move_the_others(view: str) -> None:
    qkv = parameter(48, 16)
    louder = nn.Parameter(qkv.detach().clone())
    set_gradients([qkv])
    assert qkv.grad is not None
    louder.grad = qkv.grad.clone()
    louder.grad[4:8] *= 100
    for p in (qkv, louder):
        Muon([{"params": [p], "view": view}], lr=0.1).step()
    torch.testing.assert_close(louder, qkv, rtol=1e-5, atol=1e-6)


def test_pitfall_12_experts_are_separate_matrices() -> None:
    stack = parameter(4, 6, 10)
    singles = [nn.Parameter(matrix.clone()) for matrix in stack.detach()]
    set_gradients([stack])
    assert stack.grad is not None
    for single, g in zip(singles, stack.grad, strict=True):
        single.grad = g.clone()
    Muon([{"params": [stack], "view": "experts"}], lr=0.1).step()
    Muon(singles, lr=0.1).step()
    torch.testing.assert_close(stack.detach(), torch.stack([s.detach() for s in singles]))


def test_pitfall_13_channels_last() -> None:
    torch.manual_seed(0)
    plain = nn.Conv2d(3, 8, 3)
    last = copy.deepcopy(plain).to(memory_format=torch.channels_last)
    images = torch.randn(2, 3, 9, 9)
    for conv, x in ((plain, images), (last, images.to(memory_format=torch.channels_last))):
        optimizer = Muon([{"params": [conv.weight], "view": "flatten"}], lr=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            conv(x).square().mean().backward()
            optimizer.step()
    assert last.weight.stride() != plain.weight.stride()
    torch.testing.assert_close(last.weight, plain.weight, rtol=1e-4, atol=1e-5)


def test_pitfall_14_the_scale_is_applied_once() -> None:
    p = parameter(64, 16)
    before = p.detach().clone()
    set_gradients([p])
    Muon([p], lr=1.0, weight_decay=0.0, ns_coefficients="svd", adjust_lr_fn="original").step()
    values = torch.linalg.svdvals(before - p.detach())
    torch.testing.assert_close(values, torch.full((16,), 2.0), rtol=1e-4, atol=0)


@given(
    rows=st.integers(1, 7),
    cols=st.integers(1, 7),
    exponent=st.integers(-30, 30),
    transposed=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_pitfalls_2_and_24_any_magnitude_and_stride_steps_alike(
    rows: int, cols: int, exponent: int, transposed: bool, seed: int
) -> None:
    """The update depends on neither the gradient's scale nor the strides."""
    p = parameter(rows, cols, seed=seed)
    q = nn.Parameter(p.detach().T.contiguous().T) if transposed else copy.deepcopy(p)
    set_gradients([p], seed)
    assert p.grad is not None
    q.grad = p.grad * 10.0**exponent
    for x in (p, q):
        optimizer = Muon([x], lr=0.1)
        optimizer.step()
        assert momentum_of(optimizer, x).is_contiguous()
    # The worst of these draws are nearly singular, where fp32 rounding moves O by up to 1e-3.
    torch.testing.assert_close(p, q, rtol=0, atol=2e-3)


# --- what the step leaves alone ---------------------------------------------------------------


@pytest.mark.parametrize("maximize", [True, False])
@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pitfalls_1_and_3_gradient_and_momentum_are_not_aliased(
    dtype: torch.dtype, nesterov: bool, maximize: bool
) -> None:
    for view, shape in VIEWED:
        p = parameter(*shape, dtype=dtype)
        options = {"lr": 0.1, "nesterov": nesterov, "maximize": maximize}
        optimizer = Muon([{"params": [p], "view": view}], ns_dtype=dtype, **options)
        set_gradients([p])
        assert p.grad is not None
        before = p.grad.clone()
        optimizer.step()
        assert torch.equal(p.grad, before)
        expected = torch.zeros_like(before).lerp_(-before if maximize else before, 1 - 0.95)
        assert torch.equal(momentum_of(optimizer, p), expected)


def test_pitfall_1_is_real_in_torch() -> None:
    """Why ours differs from torch.optim.Muon there: delete this when torch mends it."""
    p = parameter(6, 6, dtype=torch.bfloat16)
    theirs = torch.optim.Muon([p], nesterov=False)
    set_gradients([p])
    assert p.grad is not None
    theirs.step()
    expected = torch.zeros_like(p.grad).lerp_(p.grad, 1 - 0.95)
    assert not torch.equal(theirs.state[p]["momentum_buffer"], expected)


def test_pitfall_19_no_gradient_no_step() -> None:
    model = mlp()
    optimizer = MuonW(model, lr=0.1, weight_decay=0.5)
    idle = [model[2].weight, model[4].weight, model[0].bias]
    before = [p.detach().clone() for p in idle]
    set_gradients([p for p in model.parameters() if not any(p is q for q in idle)])
    moved = model[0].weight.detach().clone()
    optimizer.step()
    assert all(torch.equal(p, b) for p, b in zip(idle, before, strict=True))
    for p in idle:
        assert not any(value.any() for value in optimizer.state[p].values())
    assert not torch.equal(model[0].weight, moved)


def test_pitfall_4_a_zero_gradient_moves_nothing() -> None:
    for view, shape in VIEWED:
        p = parameter(*shape)
        before = p.detach().clone()
        p.grad = torch.zeros_like(p)
        Muon([{"params": [p], "view": view}], weight_decay=0.0).step()
        assert torch.equal(p, before)


def test_cautious_decay_only_where_the_update_shrinks() -> None:
    p = parameter(8, 8)
    before = p.detach().clone()
    set_gradients([p])
    plain, cautious = copy.deepcopy(p), copy.deepcopy(p)
    plain.grad, cautious.grad = p.grad, p.grad
    Muon([plain], lr=0.1, weight_decay=0.0).step()
    Muon([cautious], lr=0.1, weight_decay=0.5, cautious=True).step()
    shrinks = (before - plain.detach()) * before > 0
    assert shrinks.any()
    assert not shrinks.all()
    expected = plain.detach() - 0.1 * 0.5 * before * shrinks
    torch.testing.assert_close(cautious.detach(), expected)


def test_maximize_is_the_negative_gradient() -> None:
    for algorithm in ("muon", "adamw"):
        p = parameter(6, 6)
        q = copy.deepcopy(p)
        set_gradients([p])
        assert p.grad is not None
        q.grad = -p.grad
        Muon([{"params": [p], "algorithm": algorithm, "lr": 0.1}], maximize=True).step()
        Muon([{"params": [q], "algorithm": algorithm, "lr": 0.1}]).step()
        torch.testing.assert_close(p, q)


# --- exactly what was asked for ---


def test_pitfall_8_svd_is_never_exchanged_for_newton_schulz() -> None:
    for shape in ((6, 6), (4, 9), (9, 4)):
        p = parameter(*shape)
        before = p.detach().clone()
        set_gradients([p])
        Muon([p], lr=1.0, weight_decay=0.0, ns_coefficients="svd").step()
        values = torch.linalg.svdvals(before - p.detach())
        torch.testing.assert_close(values / values[0], torch.ones_like(values), rtol=1e-4, atol=0)
