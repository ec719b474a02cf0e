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
    ... > split(rows=8) > split(rows=128+64)
                                  each of eight blocks cut again (the two parts of an MLA head)

Steps compose from left to right and speak of the *logical* matrix, rows = outputs: after
`transpose`, `split(rows=...)` cuts what is stored as columns. A view that begins with `transpose`
or `split` begins with an unwritten `matrix`.

The view drives the orthogonalization, the learning-rate scale and the stages' norms together;
nothing else in muonkit looks at a parameter's shape.
"""

from __future__ import annotations

import functools
import itertools
import math
import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from muonkit._compile import constant_result
from muonkit._text import unknown

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

__all__ = ["Block", "View", "blocks_of", "line_dims", "row_blocks", "row_shape"]

_FIRST = ("matrix", "flatten", "experts")
_CHAINED = ", or several of them, as in 'experts > split(rows=2)'"
_OPTIONS = (
    "'matrix', 'flatten', 'experts', each optionally followed by ' > transpose', "
    "' > split(rows=N)', ' > split(rows=a+b+...)' or ' > split(cols=...)'"
)
# What a step looks like; the first three can only be the first one.
_FORMS = (*_FIRST, "transpose", "split(rows=N)", "split(rows=a+b+...)", "split(cols=N)")
_SPLIT = re.compile(r"split\(\s*(rows|cols)\s*=\s*(\d+(?:\s*\+\s*\d+)*)\s*\)")


@dataclass(frozen=True)
class Block:
    """One region of a parameter, seen as a batch of equal matrices.

    `index` cuts the region out of the parameter (always a view of its memory) and `shape` is the
    region's; it holds `batch` matrices of `rows` outputs and `cols` inputs, one after the other,
    each stored transposed if `transposed`.

    Where equal pieces of a dim do not lie one after the other in memory (heads side by side in the
    columns), `pieces` is (dim, length of a piece): the region has one more dim, its first, that
    counts them.
    """

    index: tuple[slice, ...]
    shape: tuple[int, ...]
    batch: int
    rows: int
    cols: int
    transposed: bool = False
    pieces: tuple[int, int] | None = None

    def region(self, tensor: Tensor) -> Tensor:
        """The block's part of `tensor` (which has the parameter's shape); shares its memory."""
        if self.pieces is not None:
            dim, length = self.pieces
            counted = torch.unflatten(tensor, dim, (tensor.shape[dim] // length, length))
            tensor = counted.movedim(dim, 0)
        return tensor[self.index] if self.index else tensor

    def boxes(self) -> tuple[tuple[tuple[int, int], ...], ...]:
        """Where each matrix lies in the parameter: a [start, stop) for every dim."""
        found = self._boxes_of_region()
        if self.pieces is None:
            return found
        dim, length = self.pieces
        return tuple(
            tuple(
                (start + number * length, stop + number * length) if i == dim else (start, stop)
                for i, (start, stop) in enumerate(box)
            )
            for (number, _), *box in found
        )

    def _boxes_of_region(self) -> tuple[tuple[tuple[int, int], ...], ...]:
        stored = (self.cols, self.rows) if self.transposed else (self.rows, self.cols)
        dim = next(
            d
            for d, length in enumerate(self.shape)
            if length % stored[0] == 0
            and math.prod(self.shape[d + 1 :]) == stored[1]
            and math.prod(self.shape[:d]) * (length // stored[0]) == self.batch
        )
        steps = [*[1] * dim, stored[0], *self.shape[dim + 1 :]]
        starts = [cut.start for cut in self.index] or [0] * len(self.shape)
        corners = itertools.product(
            *[range(a, a + n, step) for a, n, step in zip(starts, self.shape, steps, strict=True)]
        )
        return tuple(
            tuple((a, a + step) for a, step in zip(corner, steps, strict=True))
            for corner in corners
        )

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
    """A parsed view; `str(view)` is its canonical spelling.

    Raises:
        TypeError: it is given a spelling, which `View.parse` reads.
    """

    steps: tuple[str, ...]

    def __post_init__(self) -> None:
        if isinstance(self.steps, str):
            raise TypeError(f"View takes a tuple of steps; write View.parse({self.steps!r})")

    @staticmethod
    def parse(spec: str | View) -> View:
        """Read a view from its spelling; a view is one already.

        Raises:
            TypeError: `spec` is neither a string nor a view.
            ValueError: it is not one of the spellings above.
        """
        if isinstance(spec, View):
            spec = str(spec)  # one that was made by hand is looked at, too
        if not isinstance(spec, str):
            raise TypeError(f"a view is a string, got {type(spec).__name__}; one of {_OPTIONS}")
        return View._parse(spec)

    @staticmethod
    @functools.lru_cache(maxsize=1024)
    def _parse(spec: str) -> View:
        steps = ["".join(step.split()) for step in spec.split(">")]
        if len(steps) == 1 and not _is_step(steps[0], _FIRST):
            raise ValueError(unknown("view", spec, _FORMS, _CHAINED))
        for i, step in enumerate(steps):
            if not _is_step(step, () if i else _FIRST):
                forms = _FORMS[len(_FIRST) if i else 0 :]
                raise ValueError(unknown(f"step in the view {spec!r}:", step, forms))
        if steps[0] not in _FIRST:
            steps.insert(0, "matrix")
        return View(tuple(steps))

    def __str__(self) -> str:
        return " > ".join(self.steps)

    def blocks(self, shape: Sequence[int]) -> tuple[Block, ...]:
        """The blocks of a parameter of this shape; together they cover it exactly once.

        Raises:
            ValueError: the view does not fit the shape.
        """
        return _blocks(self, tuple(shape))


def _is_step(step: str, others: Sequence[str]) -> bool:
    return step in others or step == "transpose" or bool(_SPLIT.fullmatch(step))


def blocks_of(spec: str, shape: Sequence[int]) -> tuple[Block, ...]:
    """`View.parse(spec).blocks(shape)`; under torch.compile too."""
    if torch.compiler.is_compiling():
        # Tuples of numbers are the constants that the compiler takes; it guards on spec and shape.
        return tuple([Block(*fields) for fields in _constant_fields(spec, tuple(shape))])
    return View.parse(spec).blocks(shape)


@constant_result
def _constant_fields(spec: str, shape: tuple[int, ...]) -> tuple[tuple[Any, ...], ...]:
    return _fields(View.parse(spec).blocks(shape))


def _fields(blocks: Sequence[Block]) -> tuple[tuple[Any, ...], ...]:
    return tuple(tuple(vars(block).values()) for block in blocks)


def row_shape(spec: str, shape: Sequence[int]) -> tuple[int, ...]:
    """The shape of a tensor that has one number per matrix row of a parameter of this shape.

    It has the parameter's dimensions. Those that hold rows, or a batch of matrices, keep their
    size; one that holds columns has as many as the view cuts it in, 1 where it does not cut (and
    a parameter without entries has none)::

        matrix                  (out, in)        -> (out, 1)
        transpose               (in, out)        -> (1, out)
        flatten                 (out, in, h, w)  -> (out, 1, 1, 1)
        experts > transpose     (E, in, out)     -> (E, 1, out)
        split(cols=2)           (out, in)        -> (out, 2)

    Raises:
        ValueError: the view does not fit the shape.
    """
    return _constant_row_shape(spec, tuple(shape))


@constant_result
def _constant_row_shape(spec: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    return _row_geometry(View.parse(spec), shape)[0]


def row_blocks(spec: str, shape: Sequence[int]) -> tuple[Block, ...]:
    """The blocks of the tensor that `row_shape` describes; under torch.compile too.

    One for each of `blocks_of(spec, shape)`, in the same order, with its batch and rows, and one
    column: `to_matrices` gives `(N * batch, rows, 1)` in the order of the parameter's matrices.
    """
    if torch.compiler.is_compiling():
        return tuple([Block(*fields) for fields in _constant_row_fields(spec, tuple(shape))])
    return _row_geometry(View.parse(spec), tuple(shape))[1]


@constant_result
def _constant_row_fields(spec: str, shape: tuple[int, ...]) -> tuple[tuple[Any, ...], ...]:
    return _fields(_row_geometry(View.parse(spec), shape)[1])


@functools.lru_cache(maxsize=4096)
def _row_geometry(view: View, shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[Block, ...]]:
    """`row_shape` and `row_blocks`.

    A view cuts rows and columns independently, so along a dimension that holds columns the blocks
    are segments, the same ones in every row: a segment becomes one place.
    """
    blocks = _blocks(view, shape)
    sizes = list(shape)
    regions = [list(b.shape) for b in blocks]
    indices = [list(b.index) for b in blocks]
    pieces = blocks[0].pieces  # all of them have the same, since all were cut by the same step
    for dim in _column_dims(view, blocks[0].transposed, len(shape)):
        at = dim if pieces is None else dim + 1
        # A block of columns that are stored as rows is a batch (see `_split`): several segments.
        counts = [
            b.shape[at] // b.cols if b.transposed and b.cols else min(b.shape[at], 1)
            for b in blocks
        ]
        starts = [b.index[at].start if b.index else 0 for b in blocks]
        place, size = {}, 0
        for start, count in sorted(set(zip(starts, counts, strict=True))):
            place[start] = size
            size += count
        for region, index, start, count in zip(regions, indices, starts, counts, strict=True):
            region[at] = count
            if index:
                index[at] = slice(place[start], place[start] + count)
        if pieces is not None and pieces[0] == dim:
            sizes[dim] = shape[dim] // pieces[1] * size
            pieces = dim, size
        else:
            sizes[dim] = size
    rows = [
        replace(b, index=tuple(index), shape=tuple(region), cols=1, pieces=pieces)
        for b, index, region in zip(blocks, indices, regions, strict=True)
    ]
    return tuple(sizes), tuple(rows)


def line_dims(spec: str, block: Block, ndim: int, rows: bool) -> range:
    """The dimensions of a parameter that hold the rows, or the columns, of its logical matrices.

    Args:
        block: any of the view's.
        ndim: of the parameter.
    """
    return _column_dims(View.parse(spec), block.transposed != rows, ndim)


def _column_dims(view: View, transposed: bool, ndim: int) -> range:
    """The dimensions that hold the columns of the logical matrices."""
    first = ndim - 2 if view.steps[0] == "experts" else 0
    return range(first, first + 1) if transposed else range(first + 1, ndim)


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
        blocks = [part for block in blocks for part in _split(view, shape, block, match[1], sizes)]
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


def _split(
    view: View, shape: Sequence[int], block: Block, axis: str, sizes: list[int]
) -> list[Block]:
    """Cut a block's logical rows or columns, in `sizes[0]` equal parts or in the given sizes.

    Args:
        shape: of the parameter.
    """
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
    if len(sizes) == 1:
        return [block]
    cuts_stored_rows = (axis == "rows") != block.transposed
    equal = len(set(sizes)) == 1
    if cuts_stored_rows and equal:
        # Equal blocks of stored rows are a batch already: no slicing, one Block.
        return [_resized(block, axis, sizes[0], batch=block.batch * len(sizes))]
    dim = _dim_of(view, block, cuts_stored_rows)
    if equal or block.shape[dim] != length:
        # The same cuts all along the dim: pieces are counted by a dim of their own.
        in_pieces = _in_pieces(block, shape, dim, sizes[0] if equal else length)
        if in_pieces is not None and equal:
            return [_resized(in_pieces, axis, sizes[0], batch=block.batch * len(sizes))]
        if in_pieces is not None:
            block, dim = in_pieces, dim + 1
    first = block.index[dim].start if block.index else 0
    before = block.shape[dim] // length  # blocks of a batch that were cut before
    parts = []
    for start in range(first, first + block.shape[dim], length):
        for size in sizes:
            index = list(block.index or (slice(0, extent) for extent in block.shape))
            index[dim] = slice(start, start + size)
            start += size
            region = tuple(cut.stop - cut.start for cut in index)
            batch = block.batch // before
            parts.append(_resized(block, axis, size, index=tuple(index), shape=region, batch=batch))
    return parts


def _in_pieces(block: Block, shape: Sequence[int], dim: int, length: int) -> Block | None:
    """The block with pieces of this length of a dim counted by a dim of their own; None where
    another dim is counted so already, or the block has only a part of the dim.

    Args:
        shape: of the parameter.
    """
    if block.pieces is not None or block.shape[dim] != shape[dim]:
        return None
    count = shape[dim] // length
    region = (count, *block.shape[:dim], length, *block.shape[dim + 1 :])
    index = block.index
    if index:
        index = (slice(0, count), *index[:dim], slice(0, length), *index[dim + 1 :])
    return replace(block, index=index, shape=region, pieces=(dim, length))


def _resized(block: Block, axis: str, size: int, **changes: Any) -> Block:
    rows, cols = (size, block.cols) if axis == "rows" else (block.rows, size)
    return replace(block, rows=rows, cols=cols, **changes)


def _dim_of(view: View, block: Block, stored_rows: bool) -> int:
    """The dimension of the region that holds a matrix's stored rows, or columns."""
    if view.steps[0] == "experts":
        return len(block.shape) - (2 if stored_rows else 1)
    first = 0 if block.pieces is None else 1
    if not stored_rows and math.prod(block.shape[first + 2 :]) != 1:
        raise ValueError(
            f"view {str(view)!r} cuts the dimensions that 'flatten' joins in shape "
            f"{block.shape}, where a block is not one region; cut the first dimension, or "
            "reshape the parameter"
        )
    return first if stored_rows else first + 1
