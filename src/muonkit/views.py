"""Views: how a parameter is a batch of matrices.

A view is a short string that lives in the param group, so that it is saved with the optimizer's
state and can be written by hand:

    matrix                        a 2-D parameter, out x in
    flatten                       a convolution: out x (in * kh * kw)
    experts                       E x m x n: E matrices
    ... > transpose               stored in x out (Hugging Face's Conv1D)
    ... > split(rows=3)           three equal blocks of rows (fused QKV), or one per head
    ... > split(rows=512+128+128) blocks of rows of these sizes (grouped-query attention)
    ... > split(cols=2)           the same for columns

Steps compose from left to right and speak of the *logical* matrix, rows = outputs: after
`transpose`, `split(rows=...)` cuts what is stored as columns. A view that begins with `transpose`
or `split` begins with an unwritten `matrix`.

The view drives the orthogonalization, the learning-rate scale and the variants' norms together;
nothing else in muonkit looks at a parameter's shape.
"""

from __future__ import annotations

import functools
import math
import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from muonkit._compile import constant_result

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

__all__ = ["Block", "View", "blocks_of"]

_FIRST = ("matrix", "flatten", "experts")
_OPTIONS = (
    "'matrix', 'flatten', 'experts', each optionally followed by ' > transpose', "
    "' > split(rows=N)', ' > split(rows=a+b+...)' or ' > split(cols=...)'"
)
_SPLIT = re.compile(r"split\(\s*(rows|cols)\s*=\s*(\d+(?:\s*\+\s*\d+)*)\s*\)")


@dataclass(frozen=True)
class Block:
    """One region of a parameter, seen as a batch of equal matrices.

    `index` cuts the region out of the parameter (always a view of its memory) and `shape` is the
    region's; it holds `batch` matrices of `rows` outputs and `cols` inputs, one after the other,
    each stored transposed if `transposed`.
    """

    index: tuple[slice, ...]
    shape: tuple[int, ...]
    batch: int
    rows: int
    cols: int
    transposed: bool = False

    def region(self, tensor: Tensor) -> Tensor:
        """The block's part of `tensor` (which has the parameter's shape); shares its memory."""
        return tensor[self.index] if self.index else tensor

    def to_matrices(self, regions: Tensor) -> Tensor:
        """A region, or N of them stacked `(N, *shape)`, as `(N * batch, rows, cols)`.

        Shares memory where the strides allow it.
        """
        if self.transposed:
            return regions.reshape(-1, self.cols, self.rows).mT
        return regions.reshape(-1, self.rows, self.cols)

    def to_regions(self, matrices: Tensor) -> Tensor:
        """The inverse of `to_matrices`: `(N * batch, rows, cols)` as `(N, *shape)`."""
        stored = matrices.mT if self.transposed else matrices
        return stored.reshape(-1, *self.shape)


@dataclass(frozen=True)
class View:
    """A parsed view; `str(view)` is its canonical spelling."""

    steps: tuple[str, ...]

    @staticmethod
    def parse(spec: str) -> View:
        """Read a view from its spelling.

        Raises:
            TypeError: `spec` is not a string.
            ValueError: it is not one of the spellings above.
        """
        if not isinstance(spec, str):
            raise TypeError(f"a view is a string, got {type(spec).__name__}; one of {_OPTIONS}")
        return View._parse(spec)

    @staticmethod
    @functools.lru_cache(maxsize=1024)
    def _parse(spec: str) -> View:
        steps = ["".join(step.split()) for step in spec.split(">")]
        if steps[0] not in _FIRST:
            steps.insert(0, "matrix")
        for step in steps[1:]:
            if step != "transpose" and not _SPLIT.fullmatch(step):
                raise ValueError(f"unknown view {spec!r}: expected {_OPTIONS}")
        return View(tuple(steps))

    def __str__(self) -> str:
        return " > ".join(self.steps)

    def blocks(self, shape: Sequence[int]) -> tuple[Block, ...]:
        """The blocks of a parameter of this shape; together they cover it exactly once.

        Raises:
            ValueError: the view does not fit the shape.
        """
        return _blocks(self, tuple(shape))


def blocks_of(spec: str, shape: Sequence[int]) -> tuple[Block, ...]:
    """`View.parse(spec).blocks(shape)`; under torch.compile too."""
    if torch.compiler.is_compiling():
        # Tuples of numbers are the constants that the compiler takes; it guards on spec and shape.
        return tuple([Block(*fields) for fields in _constant_fields(spec, tuple(shape))])
    return View.parse(spec).blocks(shape)


@constant_result
def _constant_fields(spec: str, shape: tuple[int, ...]) -> tuple[tuple[Any, ...], ...]:
    return tuple(tuple(vars(block).values()) for block in View.parse(spec).blocks(shape))


@functools.lru_cache(maxsize=4096)
def _blocks(view: View, shape: tuple[int, ...]) -> tuple[Block, ...]:
    blocks = [_first_block(view, shape)]
    for step in view.steps[1:]:
        if step == "transpose":
            blocks = [
                replace(b, rows=b.cols, cols=b.rows, transposed=not b.transposed) for b in blocks
            ]
            continue
        match = _SPLIT.fullmatch(step)
        assert match is not None  # parse() let it through
        sizes = [int(size) for size in match[2].split("+")]
        blocks = [part for block in blocks for part in _split(view, block, match[1], sizes)]
    return tuple(blocks)


def _first_block(view: View, shape: tuple[int, ...]) -> Block:
    ndim = len(shape)
    first = view.steps[0]
    needed = {"matrix": "exactly 2", "flatten": "at least 2", "experts": "at least 3"}[first]
    fits = {"matrix": ndim == 2, "flatten": ndim >= 2, "experts": ndim >= 3}[first]
    if not fits:
        raise ValueError(
            f"view {str(view)!r} needs {needed} dimensions, got shape {shape}; "
            f"the views are {_OPTIONS}"
        )
    if first == "experts":
        return Block((), shape, math.prod(shape[:-2]), shape[-2], shape[-1])
    return Block((), shape, 1, shape[0], math.prod(shape[1:]))


def _split(view: View, block: Block, axis: str, sizes: list[int]) -> list[Block]:
    """Cut a block's logical rows or columns, in `sizes[0]` equal parts or in the given sizes."""
    length = block.rows if axis == "rows" else block.cols
    if len(sizes) == 1:
        count = sizes[0]
        if count < 1 or length % count:
            raise ValueError(
                f"view {str(view)!r} cuts {length} {axis} in {count} equal parts, which does not "
                f"go evenly; give the sizes: split({axis}=a+b+...)"
            )
        sizes = [length // count] * count
    if sum(sizes) != length or min(sizes) < 1:
        raise ValueError(
            f"view {str(view)!r} gives sizes {sizes}, sum {sum(sizes)}, for {length} {axis}: "
            "they must be positive and sum to it"
        )
    cuts_stored_rows = (axis == "rows") != block.transposed
    if cuts_stored_rows and len(set(sizes)) == 1:
        # Equal blocks of stored rows are a batch already: no slicing, one Block.
        return [_resized(block, axis, sizes[0], batch=block.batch * len(sizes))]
    dim = _dim_of(view, block, length, cuts_stored_rows)
    parts, start = [], block.index[dim].start if block.index else 0
    for size in sizes:
        index = list(block.index or (slice(0, extent) for extent in block.shape))
        index[dim] = slice(start, start + size)
        start += size
        shape = tuple(s.stop - s.start for s in index)
        parts.append(_resized(block, axis, size, index=tuple(index), shape=shape))
    return parts


def _resized(block: Block, axis: str, size: int, **changes: Any) -> Block:
    rows, cols = (size, block.cols) if axis == "rows" else (block.rows, size)
    return replace(block, rows=rows, cols=cols, **changes)


def _dim_of(view: View, block: Block, length: int, stored_rows: bool) -> int:
    """The dimension of the region that holds a matrix's stored rows, or columns."""
    if view.steps[0] == "experts":
        dim = len(block.shape) - (2 if stored_rows else 1)
    else:
        dim = 0 if stored_rows else 1
        if not stored_rows and len(block.shape) > 2:
            raise ValueError(
                f"view {str(view)!r} cuts the dimensions that 'flatten' joins in shape "
                f"{block.shape}, where a block is not one region; cut the first dimension, or "
                "reshape the parameter"
            )
    if block.shape[dim] != length:
        raise ValueError(
            f"view {str(view)!r} cuts a batch of equal blocks in unequal ones; "
            "put the unequal split first"
        )
    return dim
