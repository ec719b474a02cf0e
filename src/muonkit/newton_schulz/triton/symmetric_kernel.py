"""The Triton kernel of `symmetric_product` and its launch. Importing this imports Triton."""

# Triton ships no types, its language is not typed Python, and it may not be installed at all.
# mypy: disable-error-code="import-not-found, import-untyped, no-untyped-call"
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from muonkit.newton_schulz.triton.blocks import choose, kind_of, tile_count

__all__ = ["GROUP", "kernel", "launch", "start_driver", "tile_of"]

# Rows of tiles that are walked together: programs that run at the same time then share their slices
# of L and R in the L2 cache. 8 is the value of Triton's own matrix product tutorial.
GROUP = 8

MOST_PROGRAMS = 2**31 - 1  # of a grid's first axis; the others end at 65535

INTEGERS = ["m", "k"] + [f"{step}_{name}" for name in "LRD" for step in ("batch", "row", "col")]


@triton.jit
def row_of(t):
    """The row i of entry t of a lower triangle counted row by row: i(i+1)/2 <= t, t < 2^31."""
    # Below 2^31 the root is below 2^17, and float32 (also the approximate root of the hardware) is
    # off by far less than one: a correction of one either way makes it exact.
    i = ((tl.sqrt((8 * t + 1).to(tl.float32)) - 1) * 0.5).to(tl.int64)
    i = tl.where(i * (i + 1) // 2 > t, i - 1, i)
    return tl.where((i + 1) * (i + 2) // 2 <= t, i + 1, i)


@triton.jit
def tile_of(t, T, GROUP: tl.constexpr):
    """The t-th tile (i, j), i >= j, of T rows of tiles, in bands of GROUP rows.

    A band is a rectangle, walked column by column, and the triangle at its right end. Each band
    has the numbers that counting row by row gives it, which is how the band of t is found.
    """
    first = row_of(t) // GROUP * GROUP
    height = tl.minimum(T - first, GROUP)
    t = t - first * (first + 1) // 2
    u = tl.maximum(t - first * height, 0)
    row = row_of(u)
    inside = t < first * height
    i = tl.where(inside, first + t % height, first + row)
    j = tl.where(inside, t // height, first + u - row * (row + 1) // 2)
    return i, j


# One compiled variant for all sizes and strides: without the two lists Triton would compile anew
# for every pattern of integers that are 1 or divisible by 16, and for every alignment of four
# pointers. VECTOR says instead what is known of the alignment. The annotations make every size and
# stride 64 bits wide, and with them every offset.
@triton.jit(
    do_not_specialize=[*INTEGERS, "alpha", "beta", "gamma"],
    do_not_specialize_on_alignment=["L", "R", "D", "C"],
)
def kernel(
    L,
    R,
    D,
    C,
    m: tl.int64,
    k: tl.int64,
    batch_L: tl.int64,
    row_L: tl.int64,
    col_L: tl.int64,
    batch_R: tl.int64,
    row_R: tl.int64,
    col_R: tl.int64,
    batch_D: tl.int64,
    row_D: tl.int64,
    col_D: tl.int64,
    alpha: tl.float32,
    beta: tl.float32,
    gamma: tl.float32,
    TILE: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
    VECTOR: tl.constexpr,
    TALL: tl.constexpr,
    WHOLE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """C = alpha L R^T + beta D + gamma I, one tile of one matrix and its mirror image a program.

    VECTOR: elements in 16 bytes where rows are dense and sizes, strides and addresses are multiples
        of 16 bytes; else 1: nothing is assumed.
    TALL: not the rows of L and R but their columns are dense, and begin there.
    WHOLE: k is a multiple of DEPTH, so no column is masked in the loop.
    """
    T = tl.cdiv(m, TILE)
    tiles = T * (T + 1) // 2
    pid = tl.program_id(0).to(tl.int64)
    batch = pid // tiles
    i, j = tile_of(pid % tiles, T, GROUP)

    L += batch * batch_L
    R += batch * batch_R
    C += batch * m * m
    if D is not None:
        D += batch * batch_D
    if VECTOR > 1:
        # Says what the host has checked: addresses advance by 16 bytes, so loads and stores may be
        # as wide. Dividing and multiplying leaves the value and shows the factor to the compiler.
        L, R, C = tl.multiple_of(L, 16), tl.multiple_of(R, 16), tl.multiple_of(C, 16)
        m = m // VECTOR * VECTOR
        if TALL:
            col_L, col_R = col_L // VECTOR * VECTOR, col_R // VECTOR * VECTOR
            row_L, row_R = 1, 1
        else:
            k = k // VECTOR * VECTOR
            row_L, row_R = row_L // VECTOR * VECTOR, row_R // VECTOR * VECTOR
            col_L, col_R = 1, 1
        if D is not None:
            D = tl.multiple_of(D, 16)
            col_D = 1
            row_D = row_D // VECTOR * VECTOR

    rows = i * TILE + tl.arange(0, TILE)
    cols = j * TILE + tl.arange(0, TILE)
    depth = tl.arange(0, DEPTH).to(tl.int64)
    total = tl.zeros((TILE, TILE), dtype=tl.float32)
    if TALL:
        at_L = L + depth[:, None] * col_L + rows[None, :]
        at_R = R + depth[:, None] * col_R + cols[None, :]
        for start in range(0, k, DEPTH):
            exists_L, exists_R = rows[None, :] < m, cols[None, :] < m
            if not WHOLE:
                exists = depth[:, None] < k - start
                exists_L, exists_R = exists & exists_L, exists & exists_R
            left = tl.load(at_L, mask=exists_L, other=0.0)
            right = tl.load(at_R, mask=exists_R, other=0.0)
            total = tl.dot(tl.trans(left), right, total, input_precision=PRECISION)
            at_L += DEPTH * col_L
            at_R += DEPTH * col_R
    else:
        # Beyond the last row the last one is read again: its products are not stored.
        at_L = L + tl.minimum(rows, m - 1)[:, None] * row_L + depth[None, :] * col_L
        at_R = R + tl.minimum(cols, m - 1)[:, None] * row_R + depth[None, :] * col_R
        for start in range(0, k, DEPTH):
            if WHOLE:
                left, right = tl.load(at_L), tl.load(at_R)
            else:
                exists = depth[None, :] < k - start
                left = tl.load(at_L, mask=exists, other=0.0)
                right = tl.load(at_R, mask=exists, other=0.0)
            total = tl.dot(left, tl.trans(right), total, input_precision=PRECISION)
            at_L += DEPTH * col_L
            at_R += DEPTH * col_R

    value = alpha * total
    inside = (rows[:, None] < m) & (cols[None, :] < m)
    if D is not None:
        at_D = D + rows[:, None] * row_D + cols[None, :] * col_D
        value += beta * tl.load(at_D, mask=inside, other=0.0).to(tl.float32)
    value += tl.where(rows[:, None] == cols[None, :], gamma, 0.0)
    value = value.to(C.dtype.element_ty)
    mirrored = tl.trans(value)
    if i == j:
        # Rounding of a product of two commuting matrices is not symmetric: the lower half counts.
        value = tl.where(rows[:, None] >= cols[None, :], value, mirrored)
    else:
        exists = (cols[:, None] < m) & (rows[None, :] < m)
        tl.store(C + cols[:, None] * m + rows[None, :], mirrored, mask=exists)
    tl.store(C + rows[:, None] * m + cols[None, :], value, mask=inside)


def start_driver() -> None:
    """Load what Triton launches kernels with; it compiles a part of that, in C, the first time.

    Raises:
        RuntimeError and others of Triton's: it cannot.
    """
    triton.runtime.driver.active.get_current_target()


def launch(
    L: Tensor,
    R: Tensor,
    D: Tensor | None,
    C: Tensor,
    scalars: tuple[float, float, float],
    precision: str,
) -> None:
    """Fill C, a contiguous `(B, m, m)`, on its device's current stream; nothing is allocated.

    Raises:
        ValueError: more programs than a grid holds.
    """
    batch, m, k = L.shape
    vector = 16 // L.dtype.itemsize
    results = (C,) if D is None else (D, C)
    tall = R is L and not _aligned(L, vector) and _aligned(L.mT, vector)
    if not tall and not (_aligned(L, vector) and _aligned(R, vector)):
        vector = 1
    elif m % vector or not all(_aligned(tensor, vector) for tensor in results):
        vector, tall = 1, False
    blocks = choose(batch, m, k, kind_of(L.dtype, precision), vector > 1, _shared(L.device))
    programs = batch * tile_count(m, blocks.tile)
    if programs > MOST_PROGRAMS:
        raise ValueError(
            f"{batch} matrices of {m} rows need {programs} programs, a grid has at most "
            f"{MOST_PROGRAMS}: split the batch"
        )
    strides = [*L.stride(), *R.stride(), *((0, 0, 0) if D is None else D.stride())]
    arguments: list[Any] = [L, R, D, C, m, k, *strides, *map(float, scalars)]
    with torch.cuda.device_of(L):
        kernel[(programs,)](
            *arguments,
            TILE=blocks.tile,
            DEPTH=blocks.depth,
            GROUP=GROUP,
            VECTOR=vector,
            TALL=tall,
            WHOLE=vector > 1 and k % blocks.depth == 0,
            PRECISION=precision,
            num_warps=blocks.warps,
            num_stages=blocks.stages,
        )


@functools.cache
def _shared(device: torch.device) -> int:
    """Bytes of shared memory that one program may have on this device."""
    if device.type != "cuda":
        return 2**30  # Triton's interpreter
    properties = torch.cuda.get_device_properties(device)
    return int(getattr(properties, "shared_memory_per_block_optin", 64 * 1024))


def _aligned(tensor: Tensor, vector: int) -> bool:
    """Whether every row is dense, from one multiple of 16 bytes (`vector` elements) to another."""
    # The stride of a dimension of size 1 is arbitrary, and never used.
    batch, row, col = (
        s if n > 1 else 0 for s, n in zip(tensor.stride(), tensor.shape, strict=True)
    )
    dense = col == 1 and row % vector == 0 and batch % vector == 0
    return dense and tensor.shape[2] % vector == 0 and tensor.data_ptr() % 16 == 0
