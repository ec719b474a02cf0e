"""Block sizes: a static table. No Triton here: the table can be read where there is none."""

from __future__ import annotations

from typing import NamedTuple

import torch

__all__ = ["BLOCKS", "UNALIGNED", "Blocks", "choose", "tile_count"]


class Blocks(NamedTuple):
    """How one kernel is cut.

    Args:
        tile: rows and columns of the square tile of C that one program computes.
        depth: columns of L and R that are multiplied at a time.
        warps: warps (wavefronts on ROCm) of 32 (64) threads in a program.
        stages: depth of the software pipeline: how many slices of L and R are in flight.
    """

    tile: int
    depth: int
    warps: int
    stages: int


# (largest m, blocks) by bytes of an element; the first row that m fits is taken. Static, not
# autotuned: a tuner runs and synchronises at the first call, which a CUDA graph cannot capture, and
# may choose differently from one run to the next, which changes rounding. By m alone and not by the
# size of the batch, so that a batch is rounded as its matrices are one at a time; k has no say.
#
# Reasoned and compiled, not timed. A tile of t x t does t / 2 FLOPs (16 bits) for every byte that
# it reads, so a large matrix wants large tiles; but the tiles on the diagonal are computed whole,
# which costs (T + 1) / T of the half for T = m / t rows of tiles, so a small one wants small tiles.
# 128 x 128 with 8 warps keeps 64 sums a thread; 3 stages of 64 columns are 96 KiB, which also fits
# the 99 KiB of sm_86 and sm_89. float32 in full precision has no tensor cores on NVIDIA: operands
# pass through registers, and 64 x 64 with 8 warps is the largest that compiles without spills in
# every variant (128 x 128, and 64 x 64 with 4 warps, spill in some).
BLOCKS: dict[int, tuple[tuple[float, Blocks], ...]] = {
    2: (
        (32, Blocks(32, 64, 4, 3)),
        (512, Blocks(64, 64, 4, 3)),
        (float("inf"), Blocks(128, 64, 8, 3)),
    ),
    4: (
        (32, Blocks(32, 32, 4, 3)),
        (float("inf"), Blocks(64, 32, 8, 3)),
    ),
}

# Where nothing is known of strides and alignment, every element has an address of its own: two
# registers each, and larger blocks spill.
UNALIGNED: dict[int, tuple[tuple[float, Blocks], ...]] = {
    2: (
        (32, Blocks(32, 32, 4, 3)),
        (float("inf"), Blocks(64, 32, 8, 3)),
    ),
    4: (
        (32, Blocks(32, 16, 4, 3)),
        (float("inf"), Blocks(64, 16, 8, 3)),
    ),
}


def choose(m: int, dtype: torch.dtype, aligned: bool) -> Blocks:
    """The blocks for matrices C of m rows.

    Args:
        dtype: of L, R and C.
        aligned: rows of all of them are dense and begin at multiples of 16 bytes.
    """
    rows = (BLOCKS if aligned else UNALIGNED)[dtype.itemsize]
    return next(blocks for largest, blocks in rows if m <= largest)


def tile_count(m: int, tile: int) -> int:
    """Tiles on and below the diagonal of an m x m matrix: programs for one matrix."""
    rows = -(-m // tile)
    return rows * (rows + 1) // 2
