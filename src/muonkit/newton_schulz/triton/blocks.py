"""Block sizes: static tables, measured on an H100. No Triton here: they can be read without it."""

from __future__ import annotations

from typing import NamedTuple

import torch

__all__ = ["BLOCKS", "FEWEST_ROWS", "UNALIGNED", "Blocks", "choose", "kind_of", "tile_count"]


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


# Below, a launch takes the CPU longer than what it saves on the GPU. On an H100, as all of this
# file: docs/performance.md has the times.
FEWEST_ROWS = 256

# For every kind of product: for small matrices, and for those of which many tiles can be computed
# at once. Static, not autotuned: a tuner runs and synchronises at the first call, which a CUDA
# graph cannot capture, and may choose differently from one run to the next. All blocks of a kind
# give the same bits (benchmarks/kernel_blocks.py compares them), so the choice may depend on the
# size of the batch, and a batch is still rounded as its matrices are one at a time.
#
# A tile of t x t does t / 2 FLOPs (16 bits) for every byte that it reads, so a large matrix wants
# large tiles; but those on the diagonal are computed whole, which costs (T + 1) / T of the half for
# T = m / t rows of tiles, and a few large tiles leave multiprocessors idle. 128 x 128 with 4 warps
# is up to 1.13 times as fast for square products of 768 to 1024 rows, and spills (on sm_80 more).
BLOCKS: dict[str, tuple[Blocks, Blocks]] = {
    "16 bits": (Blocks(64, 64, 4, 3), Blocks(128, 64, 8, 4)),
    "tf32": (Blocks(64, 32, 4, 3), Blocks(128, 32, 8, 3)),
    # Full precision has no tensor cores on NVIDIA, where torch's own products are faster. On ROCm
    # it has; there these are reasoned and compiled without spills, not timed.
    "float32": (Blocks(64, 32, 8, 3), Blocks(64, 32, 8, 3)),
}
# For matrices of at most 32 rows.
SMALLEST = dict.fromkeys(BLOCKS, Blocks(32, 32, 4, 3))
# The larger ones are for more rows than this, or FEWEST_ROWS and twice as many columns of L, where
# there are so many tiles of them.
SMALL = 512
MANY = 64

# Where nothing is known of strides and alignment, every element has an address of its own: two
# registers each, and larger blocks spill. For up to 32 rows, and for more.
UNALIGNED = {"16 bits": (Blocks(32, 32, 4, 3), Blocks(64, 32, 4, 3))} | dict.fromkeys(
    ("tf32", "float32"), (Blocks(32, 16, 4, 3), Blocks(64, 16, 8, 3))
)

_BYTES = {"16 bits": 2, "tf32": 4, "float32": 4}
# Shared memory of a program on data-center GPUs from Hopper on.
_MOST_SHARED = 227 * 1024


def kind_of(dtype: torch.dtype, precision: str) -> str:
    """The kind of product: "16 bits", "tf32" or "float32".

    Args:
        precision: of float32, "tf32" or "ieee".
    """
    if dtype.itemsize == 2:
        return "16 bits"
    return "tf32" if precision == "tf32" else "float32"


def choose(
    batch: int, m: int, k: int, kind: str, aligned: bool = True, shared: int = _MOST_SHARED
) -> Blocks:
    """The blocks for so many products of `(m, k)` with their like, C of m rows.

    Args:
        kind: a key of `BLOCKS`.
        aligned: rows of all of them are dense and begin at multiples of 16 bytes.
        shared: bytes of shared memory that one program may have.
    """
    if not aligned:
        return UNALIGNED[kind][m > 32]
    small, large = BLOCKS[kind]
    if m <= 32:
        chosen = SMALLEST[kind]
    elif m > SMALL or (k >= 2 * m and m >= FEWEST_ROWS):
        chosen = large if batch * tile_count(m, large.tile) >= MANY else small
    else:
        chosen = small
    slices = 2 * chosen.tile * chosen.depth * _BYTES[kind]
    return chosen._replace(stages=max(1, min(chosen.stages, shared // slices)))


def tile_count(m: int, tile: int) -> int:
    """Tiles on and below the diagonal of an m x m matrix: programs for one matrix."""
    rows = -(-m // tile)
    return rows * (rows + 1) // 2
