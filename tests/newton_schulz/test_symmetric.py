"""Symmetric products: equal to float64's general ones, with the products above the diagonal left
out.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from muonkit.newton_schulz.scratch import KEPT_BYTES, scratch
from muonkit.newton_schulz.symmetric import block_count, symmetric_product

SHAPES = [(1, 1, 1), (1, 16, 16), (3, 17, 40), (2, 48, 5), (1, 64, 200), (2, 101, 33)]
BLOCKS = [1, 2, 4, 8]
# Relative to the sum of magnitudes: k + 2 roundings of a sum, at most 202 * 2^-24 = 1.2e-5 and
# usually its square root; 16 bits round the result.
TOLERANCE = {
    torch.float64: 1e-14,
    torch.float32: 2e-6,
    torch.bfloat16: 2**-8,
    torch.float16: 2**-11,
}


def operands(shape: tuple[int, int, int], layout: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    B, m, k = shape
    generator = torch.Generator().manual_seed(m + k)
    X = torch.randn(B, m, k, generator=generator, dtype=torch.float64).to(dtype)
    S = torch.randn(B, m, m, generator=generator, dtype=torch.float64)
    if layout == "transposed":
        X = X.mT.contiguous().mT
    elif layout == "sliced":
        X = torch.cat([X, X], 2)[:, :, :k]
    elif layout == "expanded":
        X = X[:1].expand(B, m, k)
    return X, (S + S.mT).to(dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "sliced", "expanded"])
@pytest.mark.parametrize("blocks", BLOCKS)
def test_equals_the_general_product(blocks: int, layout: str, dtype: torch.dtype) -> None:
    for shape, with_d in itertools.product(SHAPES, (False, True)):
        X, D = operands(shape, layout, dtype)
        before = X.clone(), D.clone()
        alpha, beta, gamma = (1.0, 0.0, 0.0) if not with_d else (-1.5, 0.75, 3.5)
        C = symmetric_product(
            X, X, D if with_d else None, alpha=alpha, beta=beta, gamma=gamma, blocks=blocks
        )
        wide, eye = X.double(), torch.eye(shape[1], dtype=torch.float64)
        expected = alpha * wide @ wide.mT + beta * D.double() + gamma * eye
        magnitudes = abs(alpha) * wide.abs() @ wide.abs().mT + D.double().abs() + gamma
        assert C.shape == expected.shape
        assert C.dtype == dtype
        # Three roundings of the result in 16 bits: of the product, of D's sum, of the diagonal's.
        assert ((C.double() - expected).abs() <= 3 * TOLERANCE[dtype] * magnitudes).all(), shape
        assert torch.equal(X, before[0])
        assert torch.equal(D, before[1])


@pytest.mark.parametrize("blocks", BLOCKS)
def test_factors_may_lie_apart(blocks: int) -> None:
    """Each factor is read by its own strides: here one batch is dense and the other is not."""
    X, _ = operands((3, 64, 64), "contiguous", torch.float64)
    G = X @ X.mT
    strided = torch.stack([G, torch.zeros_like(G)], 1)[:, 0]
    for L, R in ((G, strided), (strided, G)):
        torch.testing.assert_close(symmetric_product(L, R, blocks=blocks), G @ G)


@pytest.mark.parametrize("blocks", BLOCKS)
def test_what_is_added_may_be_one_for_all(blocks: int) -> None:
    X, _ = operands((3, 64, 64), "contiguous", torch.float64)
    some = torch.randn(5, 64, 64, dtype=torch.float64)
    D = (some + some.mT)[1:2]  # in memory that goes on behind it
    C = symmetric_product(X, X, D, beta=0.5, blocks=blocks)
    torch.testing.assert_close(C, X @ X.mT + 0.5 * D)


@pytest.mark.parametrize("blocks", BLOCKS)
def test_what_is_above_the_diagonal_is_not_computed(blocks: int) -> None:
    X = torch.randn(2, 64, 48)
    with FlopCounterMode(display=False) as counted:
        C = symmetric_product(X, X, blocks=blocks)
    assert counted.get_total_flops() * 2 * blocks == 2 * 2 * 64 * 64 * 48 * (blocks + 1)
    if blocks > 1:
        # ... but mirrored: a factor that is not symmetric shows which half was computed.
        L = torch.randn(1, 64, 64)
        C = symmetric_product(L, torch.eye(64)[None], blocks=blocks)
        assert torch.equal(C[0, 32:, :32], L[0, 32:, :32])
        assert torch.equal(C[0, :32, 32:], L[0, 32:, :32].mT)


def test_commuting_factors() -> None:
    X = torch.randn(2, 40, 60, dtype=torch.float64)
    A = X @ X.mT / 60
    P = 2 * torch.eye(40, dtype=torch.float64) - A + A @ A
    for blocks in BLOCKS:
        torch.testing.assert_close(symmetric_product(P, A, blocks=blocks), P @ A)


def test_a_nan_stays_in_its_matrix() -> None:
    X = torch.randn(3, 32, 20)
    X[1, 4, 5] = float("nan")
    C = symmetric_product(X, X, blocks=4)
    assert C[1].isnan().any()
    assert C[[0, 2]].isfinite().all()


def test_derivatives_take_the_general_product() -> None:
    X = torch.randn(1, 400, 3, requires_grad=True)
    symmetric_product(X, X, X.detach() @ X.detach().mT, beta=0.5, gamma=1.0).sum().backward()
    assert X.grad is not None


def test_block_counts_of_the_cpu() -> None:
    cpu = torch.device("cpu")
    counts = [block_count(m, torch.float32, cpu) for m in (1, 191, 192, 383, 384, 768, 1024, 4096)]
    assert counts == [1, 1, 1, 1, 4, 8, 8, 32]


def test_scratch_is_kept_by_name_and_never_shared_between_names() -> None:
    cpu = torch.device("cpu")
    one = scratch("test one", (600, 600), torch.float32, cpu)
    other = scratch("test other", (600, 600), torch.float32, cpu)
    assert one.data_ptr() != other.data_ptr()
    again = scratch("test one", (300, 600), torch.float64, cpu)
    assert again.data_ptr() == one.data_ptr()
    assert again.shape == (300, 600)
    assert again.dtype == torch.float64
    grown = scratch("test one", (900, 600), torch.float32, cpu)
    assert scratch("test one", (600, 600), torch.float32, cpu).data_ptr() == grown.data_ptr()
    large = scratch("test one", (KEPT_BYTES // 4 + 1,), torch.float32, cpu)
    assert large.data_ptr() not in (one.data_ptr(), grown.data_ptr())
    small = [scratch("test one", (3,), torch.float32, cpu) for _ in range(2)]
    assert small[0].data_ptr() != small[1].data_ptr()
