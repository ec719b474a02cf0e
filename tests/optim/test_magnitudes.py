"""Gradients of any magnitude in any dtype: a finite update of full size."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from muonkit import Muon

WEIGHTS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("kept", ["auto", "float16", "bfloat16", "float32", "int8"])
@pytest.mark.parametrize(
    ("dtype", "scale"),
    [
        (dtype, scale)
        for dtype in WEIGHTS
        for scale in (1e-7, 1e-3, 6e4, 1e6, 1e30)
        if scale <= torch.finfo(dtype).max
    ],
)
def test_pitfall_44_an_update_has_its_full_size(
    dtype: torch.dtype, scale: float, kept: str, nesterov: bool
) -> None:
    """Whatever the momentum is kept in. Five Keller steps leave singular values in [0.68, 1.14], so
    two updates of lr 1 along the same direction move an 8 x 8 matrix by at least 2 * 0.68 * sqrt(8)
    in the Frobenius norm; 3 leaves room for directions that were rounded.
    """
    p = nn.Parameter(torch.zeros(8, 8, dtype=dtype))
    options = {"momentum_dtype": kept, "nesterov": nesterov, "ns_dtype": "float32"}
    optimizer = Muon([p], lr=1.0, weight_decay=0.0, nonfinite="raise", **options)
    torch.manual_seed(0)
    gradient = torch.randn(8, 8, dtype=torch.float64).clamp(-1, 1)
    for _ in range(2):
        p.grad = (gradient * scale).to(dtype)
        optimizer.step()
    assert torch.isfinite(p).all()
    assert 3 < p.detach().double().norm().item() < 2 * 1.2 * 8**0.5
    assert torch.isfinite(optimizer.state[p]["momentum_buffer"]).all()


def test_a_nan_stays_one_in_a_float16_momentum() -> None:
    p = nn.Parameter(torch.zeros(4, 4))
    optimizer = Muon([p], momentum_dtype="float16")
    p.grad = torch.full((4, 4), float("nan"))
    optimizer.step()
    assert optimizer.state[p]["momentum_buffer"].isnan().all()


@pytest.mark.parametrize("dense", [True, False])
def test_a_float16_gradient_that_lies_otherwise_changes_nobodys_numbers(dense: bool) -> None:
    """AdamW's eps is zero in float16: computed there, an entry without a gradient is 0/0."""
    params = [nn.Parameter(torch.ones(6, 4, dtype=torch.float16)) for _ in range(2)]
    optimizer = Muon([{"params": params, "algorithm": "adamw", "lr": 0.1}])
    gradient = torch.zeros(6, 4, dtype=torch.float16)
    gradient[0] = 1.0
    for _ in range(2):
        params[0].grad = gradient.clone()
        params[1].grad = gradient.clone() if dense else gradient.t().contiguous().t()
        assert dense or params[1].grad.stride() != params[1].stride()
        optimizer.step()
    assert torch.isfinite(params[0]).all()
    assert torch.equal(params[0], params[1])


def test_a_float16_parameter_that_lies_otherwise_is_computed_in_float32() -> None:
    storage = torch.ones(12, 4, dtype=torch.float16)
    p, q = nn.Parameter(storage[::2]), nn.Parameter(torch.ones(6, 4, dtype=torch.float16))
    optimizer = Muon([{"params": [p, q], "algorithm": "adamw", "lr": 0.1}])
    for _ in range(3):
        for each in (p, q):
            each.grad = torch.zeros(6, 4, dtype=torch.float16)
            each.grad[0] = 1.0
        optimizer.step()
    assert torch.isfinite(p).all()
    # Both are computed in float32 and rounded once a step, by kernels of another order of sums.
    torch.testing.assert_close(p.detach(), q.detach(), rtol=2**-10, atol=0)
    assert torch.equal(storage[1::2], torch.ones(6, 4, dtype=torch.float16))
