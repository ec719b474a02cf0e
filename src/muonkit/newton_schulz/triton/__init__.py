"""Triton kernels for GPUs: one operation, C = alpha L R^T + beta D + gamma I with C symmetric.

Only the tiles on and below the diagonal are computed, each stored twice. Triton is imported when a
kernel is first asked for, not with this package.
"""

from __future__ import annotations

import functools
import importlib
import warnings
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from muonkit.newton_schulz.triton.blocks import FEWEST_ROWS, choose, kind_of

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["DTYPES", "available", "pays", "precision", "row_blocks", "symmetric_product"]

# Dtypes that the kernel multiplies. Sums are float32, in which float64 would lose its precision.
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def available(device: torch.device) -> bool:
    """Whether `symmetric_product` can run for tensors on this device. Never raises; cached.

    True on NVIDIA GPUs from Ampere on (before it, bf16 is not multiplied natively) and on ROCm,
    where Triton can be imported and can launch kernels. A Triton that cannot, for want of a C
    compiler as in some small container images, is warned of once.
    """
    return device.type == "cuda" and _gpu_available(device.index)


@functools.cache
def _gpu_available(index: int | None) -> bool:
    try:
        if torch.version.hip is None and torch.cuda.get_device_capability(index) < (8, 0):
            return False
        kernel = importlib.import_module("muonkit.newton_schulz.triton.symmetric_kernel")
    except Exception:
        # Whatever a broken driver or installation raises: there is no kernel then.
        return False
    return _can_launch(kernel.start_driver)


@functools.cache
def _can_launch(start_driver: Callable[[], None]) -> bool:
    """Asked before anything is computed: at the first launch a step would be half done."""
    try:
        start_driver()
    except Exception as error:
        warnings.warn(
            f"Triton cannot launch kernels here ({type(error).__name__}: {error}): muonkit takes "
            "torch's own products, which are slower. Triton needs a C compiler (gcc or clang) and "
            "Python's headers.",
            stacklevel=2,
        )
        return False
    return True


def pays(m: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether `symmetric_product` can run here, and is faster than torch's own products, for C of m
    rows, its launch included: from 256 rows on, and on NVIDIA in 16 bits or tf32
    (docs/performance.md has the times).
    """
    if m < FEWEST_ROWS or dtype not in DTYPES or not available(device):
        return False
    return dtype.itemsize == 2 or torch.version.hip is not None or precision(dtype) == "tf32"


def row_blocks(m: int, dtype: torch.dtype) -> int:
    """In how many blocks of rows many dense `(m, m)` products are computed where the kernel runs;
    1 where they are too small for it.
    """
    if m < FEWEST_ROWS:
        return 1
    return -(-m // choose(m, m, m, kind_of(dtype, precision(dtype))).tile)


def precision(dtype: torch.dtype) -> str:
    """How products of float32 are taken: exact, unless torch was told that tf32 is good enough."""
    # ROCm knows tf32 on some chips only, and refuses it on the others: exact everywhere.
    allowed = dtype == torch.float32 and torch.version.hip is None
    return "tf32" if allowed and torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def symmetric_product(
    L: Tensor, R: Tensor, D: Tensor | None, alpha: float, beta: float, gamma: float
) -> Tensor:
    """C = alpha L R^T + beta D + gamma I, by half the products.

    The caller promises that C is symmetric: R is L, or L and R are polynomials in one Gram matrix;
    D is symmetric. Only what is on and below the diagonal is computed, and C is exactly symmetric
    whatever was promised. Sums are in float32; float32 is multiplied in full precision unless
    `torch.backends.cuda.matmul` allows tf32. One kernel, no host synchronisation, nothing allocated
    but C, the same bits every time.

    Args:
        L, R: `(B, m, k)`, any strides, of one dtype of `DTYPES` and on one device that is
            `available`. Rows that are dense and begin at multiples of 16 bytes are fastest; so are
            the columns of L where R is L, in 16 bits.
        D: `(B, m, m)` of the same dtype, or None. As in `torch.baddbmm`, it is not read where beta
            is 0.

    Returns:
        `(B, m, m)`, contiguous, in the input dtype.

    Raises:
        ValueError: shapes that do not fit.
        TypeError: a dtype not in `DTYPES`, or several dtypes or devices.
    """
    _check(L, R, D)
    C = L.new_empty((L.shape[0], L.shape[1], L.shape[1]))
    if C.numel():
        from muonkit.newton_schulz.triton.symmetric_kernel import launch

        scalars = (alpha, beta, gamma)
        launch(L, R, D if beta != 0 else None, C, scalars, precision(L.dtype))
    return C


def _check(L: Tensor, R: Tensor, D: Tensor | None) -> None:
    if L.ndim != 3 or L.shape != R.shape:
        raise ValueError(
            "symmetric_product expects L and R of one shape (B, m, k), got "
            f"{tuple(L.shape)} and {tuple(R.shape)}"
        )
    square = (L.shape[0], L.shape[1], L.shape[1])
    if D is not None and tuple(D.shape) != square:
        raise ValueError(f"symmetric_product expects D of shape {square}, got {tuple(D.shape)}")
    given = [L, R] if D is None else [L, R, D]
    kinds = {(tensor.dtype, tensor.device) for tensor in given}
    if len(kinds) > 1 or L.dtype not in DTYPES:
        got = ", ".join(f"{tensor.dtype} on {tensor.device}" for tensor in given)
        raise TypeError(
            "symmetric_product expects float32, bfloat16 or float16, one dtype on one device, got "
            f"{got}; use torch.baddbmm for others"
        )
