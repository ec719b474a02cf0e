"""Symmetric products at half the cost: only what lies on or below the diagonal is computed.

On CUDA and ROCm one Triton kernel does it (`muonkit.newton_schulz.triton`); everywhere else blocks
of rows in plain torch: halve the matrix until a block is small, compute the blocks on and below the
diagonal, mirror the others.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from muonkit.newton_schulz import triton as kernels
from muonkit.newton_schulz.dtypes import fastest_dtype
from muonkit.newton_schulz.scratch import scratch

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["KERNEL", "block_count", "general_product", "method", "symmetric_product"]

KERNEL = 0

# The smallest block of rows in plain torch; with smaller ones the products lose more of their rate
# than they save. Measured on a CPU, and on an H100 in float32 (docs/performance.md); a guess in 16
# bits on a GPU without the kernel, and elsewhere. In bfloat16 on a CPU with matrix units (AMX,
# measured from 384 to 4096 rows; BFMMLA, a guess) there are none: an orthogonalization in blocks of
# 96 takes 1.3 to 2.6 times as long.
_SMALLEST_BLOCK = {"cpu": 96, "cuda": 256}
_SMALLEST_BLOCK_ELSEWHERE = 1024
# Two blocks save a quarter of a product, about what cutting and mirroring cost for small ones.
_FEWEST_BLOCKS = 4


def block_count(m: int, dtype: torch.dtype, device: torch.device) -> int:
    """In how many blocks of rows a symmetric `(m, m)` product is computed on this device.

    The cost is (b + 1) / 2b of the general product's, exactly so where b divides m.
    """
    if kernels.pays(m, dtype, device):
        return kernels.row_blocks(m, dtype)
    if device.type == "cpu" and dtype == torch.bfloat16 and _multiplies_bfloat16(device):
        return 1
    smallest = _SMALLEST_BLOCK.get(device.type, _SMALLEST_BLOCK_ELSEWHERE)
    if device.type == "cuda" and dtype.itemsize == 2:
        smallest = _SMALLEST_BLOCK_ELSEWHERE
    blocks = 1
    while m >= 2 * smallest * blocks:
        blocks *= 2
    return blocks if blocks >= _FEWEST_BLOCKS else 1


def _multiplies_bfloat16(device: torch.device) -> bool:
    """Whether the device has units for it, which are then its fastest."""
    return fastest_dtype(device.type, device.index).dtype == torch.bfloat16


def method(X: Tensor) -> int:
    """How symmetric products of `(B, m, k)` tensors like X are computed: `KERNEL`, or in how many
    blocks; 1 is the general product, which alone can be differentiated.
    """
    if torch.is_grad_enabled() and X.requires_grad:
        return 1
    if kernels.pays(X.shape[-2], X.dtype, X.device):
        return KERNEL
    return block_count(X.shape[-2], X.dtype, X.device)


def symmetric_product(
    L: Tensor,
    R: Tensor,
    D: Tensor | None = None,
    *,
    alpha: float = 1.0,
    beta: float = 0.0,
    gamma: float = 0.0,
    blocks: int | None = None,
    name: str | None = None,
) -> Tensor:
    """alpha L R^T + beta D + gamma I, which the caller knows to be symmetric.

    It is for a Gram matrix (R is L) and for products of polynomials in one Gram matrix, which
    commute. The result is undefined unless the product is symmetric.

    Args:
        L: `(B, m, k)`.
        R: L itself, or symmetric, `(B, m, m)`.
        D: `(B, m, m)`, symmetric; None for beta = 0.
        blocks: what `method` says, where it was asked before.
        name: take the result's memory from `muonkit.newton_schulz.scratch` under this name, which
            none of L, R and D has; for a result that is not differentiated.

    Returns:
        `(B, m, m)`.
    """
    if blocks is None:
        blocks = method(L if L.requires_grad else R)
    if blocks == KERNEL:
        # Dense rows, or of a Gram matrix in 16 bits dense columns: its other variants are slower.
        tall = R is L and L.dtype.itemsize == 2 and L.mT.is_contiguous()
        rows = L if tall else L.contiguous()
        other = rows if R is L else R.contiguous()
        return kernels.symmetric_product(rows, other, D, alpha, beta, gamma)
    D = None if beta == 0 else D
    if blocks == 1:
        return general_product(L, R, D, alpha=alpha, beta=beta, gamma=gamma, name=name)
    C = _blocked(L, R, D, alpha, beta, blocks, name)
    if gamma:
        C.diagonal(dim1=-2, dim2=-1).add_(gamma)
    return C


def general_product(
    L: Tensor,
    R: Tensor,
    D: Tensor | None = None,
    *,
    alpha: float = 1.0,
    beta: float = 0.0,
    gamma: float = 0.0,
    name: str | None = None,
) -> Tensor:
    """`symmetric_product` by torch's own whole product, without choosing a way.

    For many small products, where choosing would take longer than multiplying.
    """
    right = L.mT if R is L else R
    if name is not None:
        C = _empty(name, (L.shape[0], L.shape[1], right.shape[2]), L)
        if D is None:
            _multiply(L, right, alpha, C)
        else:
            torch.baddbmm(D, L, right, beta=beta, alpha=alpha, out=C)
    elif D is not None:
        C = torch.baddbmm(D, L, right, beta=beta, alpha=alpha)
    else:
        C = torch.bmm(L, right)
        C = C if alpha == 1 else C * alpha
    if gamma:
        C.diagonal(dim1=-2, dim2=-1).add_(gamma)
    return C


def _blocked(
    L: Tensor,
    R: Tensor,
    D: Tensor | None,
    alpha: float,
    beta: float,
    blocks: int,
    name: str | None,
) -> Tensor:
    """The blocks on the diagonal, all in one batch; then, for every block size up to half of the
    matrix, the blocks below it: halves of a matrix, halves of the halves, ... in one batch each.
    """
    B, m, _ = L.shape
    more = -m % blocks
    if more:
        L, R = (torch.nn.functional.pad(t, (0, 0, 0, more)) for t in (L, R))
        D = None if D is None else torch.nn.functional.pad(D, (0, more, 0, more))
    D = None if D is None else D.expand(B, -1, -1)
    C = _empty(name, (B, m + more, m + more), L)
    h = (m + more) // blocks
    _store(C, _products(L, R, alpha, h, h, 0, 0), D, beta, h, 0)
    while h < m + more:
        lower = _store(C, _products(L, R, alpha, h, 2 * h, h, 0), D, beta, 2 * h, h)
        _at(C, lower.shape, 2 * h, 0, h).copy_(lower.mT)
        h *= 2
    return C[:, :m, :m].contiguous() if more else C


# `as_strided` throughout, one operation where views would take four: there are many small ones.


def _products(L: Tensor, R: Tensor, alpha: float, h: int, step: int, row: int, col: int) -> Tensor:
    """For j = 0, 1, ...: alpha times h rows of L from row + j step, times h rows of R, transposed,
    from col + j step; `(B, J, h, h)`.
    """
    B, m, k = L.shape
    J = m // step
    count = B * J
    if B == 1 or (L.stride(0) == m * L.stride(1) and R.stride(0) == m * R.stride(1)):
        # A contiguous result: torch hands all of the batch to BLAS at once, which spreads it over
        # the threads.
        T = _empty("block", (count, h, h), L)
        _, rows, cols = L.stride()
        lower = L.as_strided(
            (count, h, k), (step * rows, rows, cols), L.storage_offset() + row * rows
        )
        _, rows, cols = R.stride()
        upper = R.as_strided(
            (count, k, h), (step * rows, cols, rows), R.storage_offset() + col * rows
        )
        _multiply(lower, upper, alpha, T)
        return T.view(B, J, h, h)
    T = _empty("block", (B, J, h, h), L)
    for j in range(0, m, step):
        lower, upper = L[:, row + j : row + j + h], R[:, col + j : col + j + h]
        T[:, j // step] = torch.bmm(lower, upper.mT).mul_(alpha)
    return T


def _multiply(L: Tensor, R: Tensor, alpha: float, out: Tensor) -> None:
    """alpha L R, in memory whose contents do not matter."""
    if out.device.type == "mps":  # its baddbmm adds 0 x NaN, up to torch 2.13 (pytorch#187521)
        torch.bmm(L, R, out=out).mul_(alpha)
    else:
        torch.baddbmm(out, L, R, beta=0, alpha=alpha, out=out)


def _store(C: Tensor, T: Tensor, D: Tensor | None, beta: float, step: int, row: int) -> Tensor:
    """The j-th block of T, plus beta times D's there, to C at (row, 0) + j (step, step)."""
    place = _at(C, T.shape, step, row, 0)
    if D is None:
        return place.copy_(T)
    return torch.add(T, _at(D, T.shape, step, row, 0), alpha=beta, out=place)


def _at(C: Tensor, shape: tuple[int, ...], step: int, row: int, col: int) -> Tensor:
    """C's blocks at (row, col) + j (step, step); `(B, J, h, h)`."""
    batch, rows, cols = C.stride()
    strides = (batch, step * (rows + cols), rows, cols)
    return C.as_strided(shape, strides, C.storage_offset() + row * rows + col * cols)


def _empty(name: str | None, shape: tuple[int, ...], like: Tensor) -> Tensor:
    if name is None:
        return like.new_empty(shape)
    return scratch(name, shape, like.dtype, like.device)
