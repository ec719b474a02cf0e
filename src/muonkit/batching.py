"""Batches of the step: pieces of parameters, put together as whole matrices and taken apart.

A batch gives the step what its elementwise parts work on (`momentum_shards`, `param_shards`), and
turns these into whole matrices and back (`to_owners`, `to_params`). Here are the batches of
parameters that are whole on this rank, where nothing is sent; `distributed.sharded` has the others.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch

from muonkit._compile import copy_each_, scheduled
from muonkit.distributed.exchange import Pending
from muonkit.distributed.plan_batches import Item, make_batches
from muonkit.int8 import MomentumScale, Scales, dequantized, scale_region
from muonkit.newton_schulz.dtypes import is_small, size_decides
from muonkit.newton_schulz.scratch import scratch
from muonkit.selection import (
    by_rows,
    largest,
    line_norms,
    put,
    selected_shape,
    shape_of_fraction,
    take,
)
from muonkit.stages import kept_state
from muonkit.views import Block, blocks_of, row_blocks

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from muonkit.distributed.placement import Box

__all__ = [
    "Batch",
    "LocalBatch",
    "LocalParam",
    "MatrixRef",
    "MatrixStack",
    "MomentumShards",
    "ObservedBatch",
    "ParamShards",
    "join",
    "make",
    "multiply_",
    "norms_of",
    "place",
    "planned",
    "stacked",
]


class LocalParam(NamedTuple):
    """A rank's part of a parameter that has a gradient, each tensor a plain one.

    Attributes:
        param, grad, momentum: of one shape.
        variance: the stage's state, None where it keeps none.
        steps: how often the stage's state was updated, this time included.
        scale: of a momentum in int8.
        copies: the mesh axes along which ranks compute the same. Only equal ones share a batch:
            padding and companions change the last bits, and copies must not drift apart.
    """

    param: Tensor
    grad: Tensor
    momentum: Tensor
    variance: Tensor | None = None
    steps: Tensor | None = None
    copies: tuple[int, ...] = ()
    scale: MomentumScale | None = None


class MatrixRef(NamedTuple):
    """Which matrix one of a stack is.

    Attributes:
        param: that holds the matrix: the optimizer's, or this rank's part (`LocalParam.param`).
        box: where it lies in that.
        rows, cols: of the matrix; in the stack it may be padded.
        computed: rows and columns of what is orthogonalized of it (`muonkit.selection`).
    """

    param: Tensor
    box: Box
    rows: int
    cols: int
    computed: tuple[int, int]


class MomentumShards(NamedTuple):
    """Pieces of one shape whose momentum is kept on this rank.

    Attributes:
        grads, momenta: of every piece.
        dtype: the parameters'.
        only_kept: another rank, which has the same momentum, computes with it. These come last.
        scales: of momenta in int8.
    """

    grads: list[Tensor]
    momenta: list[Tensor]
    dtype: torch.dtype
    only_kept: bool = False
    scales: Scales | None = None

    def momentum(self) -> Tensor:
        """A copy of the momenta, stacked, as numbers."""
        if self.scales is None:
            return torch.stack(self.momenta)
        return dequantized(self.momenta, self.scales, self.scales.tensors[0].dtype)


class ParamShards(NamedTuple):
    """Pieces of parameters that this rank stores, of matrices of one shape; `cut`: of blocks that
    are less than a matrix of the view.
    """

    params: list[Tensor]
    rows: int
    cols: int
    cut: bool = False


class MatrixStack(NamedTuple):
    """Whole matrices of one shape, with what a stage keeps of them.

    Attributes:
        matrices: `(N, rows, cols)`, a view without padding.
        numbers: the matrices' numbers in the batch, in the order of `weight_norms`.
        variance: `(N, rows, 1)`, `(N, rows, cols)` or None, written to in place.
        steps: `(N, 1, 1)` or None.
    """

    matrices: Tensor
    numbers: slice | Tensor
    variance: Tensor | None
    steps: Tensor | None


class Batch(Protocol):
    """A batch as the step uses it. Law: `to_params(to_owners(u))` is `u`."""

    @property
    def momentum_shards(self) -> Sequence[MomentumShards]: ...
    @property
    def param_shards(self) -> Sequence[ParamShards]: ...

    def to_owners(self, u: Sequence[Tensor]) -> Pending[Sequence[Tensor]]:
        """Takes a stack `(N, *shape)` for each of `momentum_shards` that is not only kept, and
        gives the matrices that this rank computes: `(B, m, n)` in memory of their own, zeros where
        shapes were joined.
        """
        ...

    def line_norms(self, u: Sequence[Tensor]) -> Pending[Any]:
        """The norms of all lines of the stacks that `to_owners` takes, over all their shards."""
        ...

    def select_(self, norms: Any, mu: float | Tensor) -> None:
        """Take the lines of largest norms (`muonkit.selection`), and multiply them by mu in the
        momentum: from here on the matrices of `to_owners` are these lines, and `to_params` gives
        zeros for the others. A tensor mu has no dims.
        """
        ...

    def stacks(self, o: Sequence[Tensor]) -> Sequence[MatrixStack]:
        """The matrices of `to_owners` without padding, by shape, with the stage's state."""
        ...

    def keep(self, stacks: Sequence[MatrixStack]) -> Pending[None]:
        """Write the stage's state, as `stacks` has it now, back to the ranks that keep it."""
        ...

    def to_params(self, o: Sequence[Tensor]) -> Pending[Sequence[list[Tensor]]]:
        """The inverse of `to_owners`: for each of `param_shards`, what belongs to each piece."""
        ...

    def weight_norms(self) -> Pending[Tensor]:
        """The Frobenius norm of the weight of every matrix of the batch, over all its shards."""
        ...

    def scale_weights_(self, factors: Tensor) -> None:
        """Multiply the weights of every matrix by its factor, in the order of `weight_norms`."""
        ...


class ObservedBatch(Batch, Protocol):
    """A batch as an observer (a Monitor) reads it, beside what the step uses."""

    def gathered(self, tensors: Sequence[Tensor]) -> Pending[Sequence[Tensor]]:
        """As `to_owners`, for any tensors that are sharded as the momentum is: to be read, in full
        precision, and without the stage's state.
        """
        ...

    def weights(self) -> Sequence[list[Tensor]]:
        """For each of `momentum_shards`, the parameters' values in the same places."""
        ...

    def sources(self) -> Sequence[Sequence[MatrixRef]]:
        """The matrices that `to_owners` gives, in its order; equal shapes side by side."""
        ...

    def with_all_lines(self, o: Sequence[Tensor]) -> Sequence[Tensor]:
        """The matrices of `to_owners`, zero where their lines were not selected: as `gathered`."""
        ...


class _Part(NamedTuple):
    """Regions of one geometry, each `block.batch` matrices, with what belongs to them.

    `size` is the shape of what is orthogonalized of each matrix: some of its rows if `by_rows`,
    else of its columns, or all.
    """

    block: Block
    stage_block: Block
    size: tuple[int, int]
    by_rows: bool
    origins: list[tuple[Tensor, Block]]  # of each region: the parameter, and where in it
    params: list[Tensor]
    grads: list[Tensor]
    momenta: list[Tensor]
    variances: list[Tensor]
    steps: list[Tensor]
    scales: list[MomentumScale]

    def momentum_shards(self) -> MomentumShards:
        scales = None
        if self.scales:
            scales = Scales.of([each.tensor for each in self.scales], self.scales[0].block)
        return MomentumShards(self.grads, self.momenta, self.params[0].dtype, scales=scales)


class LocalBatch:
    """Regions that are whole on this rank: what one call orthogonalizes.

    Args:
        rows, cols: of every matrix; smaller ones are padded with zeros.
    """

    def __init__(self, rows: int, cols: int, parts: list[_Part]) -> None:
        self.rows, self.cols, self.parts = rows, cols, parts
        self.momentum_shards = [part.momentum_shards() for part in parts]
        self.param_shards = [ParamShards(p.params, p.block.rows, p.block.cols) for p in parts]
        self.lines: list[Tensor] = []  # for each part `(N * batch, k)`, once they are selected

    def to_owners(self, u: Sequence[Tensor]) -> Pending[list[Tensor]]:
        return Pending([join(self, u)])

    def gathered(self, tensors: Sequence[Tensor]) -> Pending[list[Tensor]]:
        matrices = []
        for part, stack in zip(self.parts, tensors, strict=True):
            matrices.append(part.block.to_matrices(stack))
        return Pending([_padded(matrices)])

    def weights(self) -> list[list[Tensor]]:
        return [part.params for part in self.parts]

    def sources(self) -> list[list[MatrixRef]]:
        return [
            [
                MatrixRef(param, box, block.rows, block.cols, part.size)
                for part in self.parts
                for param, block in part.origins
                for box in block.boxes()
            ]
        ]

    def line_norms(self, u: Sequence[Tensor]) -> Pending[list[Tensor]]:
        norms = []
        for part, stack in zip(self.parts, u, strict=True):
            norms.append(line_norms(part.block.to_matrices(stack), part.by_rows))
        return Pending(norms)

    def select_(self, norms: Sequence[Tensor], mu: float | Tensor) -> None:
        for part, each in zip(self.parts, norms, strict=True):
            taken = part.size[0 if part.by_rows else 1]
            lines = largest(each, [(0, each.shape[-1], taken)])
            chosen = torch.zeros_like(each, dtype=torch.bool).scatter_(-1, lines, True)
            kept = torch.ones_like(each).masked_fill_(chosen, scheduled(mu, each))
            kept = kept.unsqueeze(-1 if part.by_rows else -2)
            kept = kept.expand(-1, part.block.rows, part.block.cols)
            torch._foreach_mul_(part.momenta, list(part.block.to_regions(kept).unbind()))
            self.lines.append(lines)

    def stacks(self, o: Sequence[Tensor]) -> list[MatrixStack]:
        stacks = []
        start = 0
        for number, (part, matrices) in enumerate(zip(self.parts, self._places(o[0]), strict=True)):
            numbers = slice(start, start + len(part.params) * part.block.batch)
            start += len(part.params) * part.block.batch
            variance = steps = None
            if part.variances:
                variance = part.stage_block.to_matrices(torch.stack(part.variances))
                if self.lines:
                    variance = take(variance, self.lines[number], rows=True)
            if part.steps:
                steps = torch.stack(part.steps).repeat_interleave(part.block.batch)
                steps = steps.to(matrices.device).reshape(-1, 1, 1)
            stacks.append(MatrixStack(matrices, numbers, variance, steps))
        return stacks

    def to_params(self, o: Sequence[Tensor]) -> Pending[list[list[Tensor]]]:
        return Pending(
            [
                list(part.block.to_regions(matrices).unbind())
                for part, matrices in zip(self.parts, self._with_all_lines(o[0]), strict=True)
            ]
        )

    def with_all_lines(self, o: Sequence[Tensor]) -> list[Tensor]:
        return [_padded(self._with_all_lines(o[0]))]

    def _with_all_lines(self, whole: Tensor) -> list[Tensor]:
        """For each part its matrices, `(N * batch, rows, cols)`, zero where none was taken."""
        places = self._places(whole)
        if not self.lines:
            return places
        full = []
        for part, matrices, lines in zip(self.parts, places, self.lines, strict=True):
            count = part.block.rows if part.by_rows else part.block.cols
            full.append(put(matrices, lines, part.by_rows, count))
        return full

    def keep(self, stacks: Sequence[MatrixStack]) -> Pending[None]:
        """Write the stage's state back."""
        for number, (part, whole) in enumerate(zip(self.parts, stacks, strict=True)):
            if whole.variance is None:
                continue
            variance = whole.variance
            if self.lines:
                before = part.stage_block.to_matrices(torch.stack(part.variances))
                variance = before.scatter(-2, self.lines[number].unsqueeze(-1), variance)
            copy_each_(part.variances, part.stage_block.to_regions(variance).unbind())
        return Pending(None)

    def _weights(self) -> list[Tensor]:
        """The weight of every matrix of the batch, where it is kept."""
        weights = []
        for part in self.parts:
            for param, block in part.origins:
                for box in block.boxes():
                    weights.append(param[tuple([slice(a, b) for a, b in box])])
        return weights

    def weight_norms(self) -> Pending[Tensor]:
        return Pending(norms_of(self._weights()))

    def scale_weights_(self, factors: Tensor) -> None:
        multiply_(self._weights(), factors)

    def _places(self, whole: Tensor) -> list[Tensor]:
        """For each part a view of its matrices, `(N * batch, *size)`, in the whole batch."""
        places = []
        start = 0
        for part in self.parts:
            stop = start + len(part.params) * part.block.batch
            some = whole if len(self.parts) == 1 else whole[start:stop]
            places.append(place(some, *part.size))
            start = stop
        return places


def place(whole: Tensor, rows: int, cols: int) -> Tensor:
    """The view of `rows` x `cols` matrices in padded ones `(N, m, n)`; tall ones lie transposed."""
    if (rows, cols) == tuple(whole.shape[1:]):
        return whole
    return whole[:, :cols, :rows].mT if rows > cols else whole[:, :rows, :cols]


_Batches = list[tuple[int, int, list[tuple[int, Block, Block]]]]


def planned(
    params: Sequence[Tensor], group: dict[str, Any], copies: Sequence[tuple[int, ...]] | None = None
) -> _Batches:
    """Rows, columns, and (index of the parameter, block, block of the stage's state) of every
    batch: rows and columns of what is orthogonalized.
    """
    # Plain loops: torch.compile cannot trace comprehensions that nest.
    kinds = []
    for index, p in enumerate(params):
        kinds.append((tuple(p.shape), p.dtype, p.device, copies[index] if copies else ()))
    plan = _planned if torch.compiler.is_compiling() else _kept_plan
    asked = group["view"], kept_state(group), group["fraction"], group["bytes_in_flight"]
    return plan(tuple(kinds), *asked, size_decides(group["ns_dtype"], "cpu"))


def _planned(
    params: tuple[tuple[tuple[int, ...], torch.dtype, torch.device, tuple[int, ...]], ...],
    view: str,
    stage_state: str,
    fraction: float,
    cap: int | None,
    small_apart: bool,
) -> _Batches:
    items: list[Item] = []
    blocks: list[tuple[int, Block, Block]] = []
    for index, (shape, dtype, device, copies) in enumerate(params):
        whole = blocks_of(view, shape)
        of_state = row_blocks(view, shape) if stage_state == "rows" else whole
        for block, rows in zip(whole, of_state, strict=True):
            if block.batch * block.rows * block.cols:
                size = shape_of_fraction(fraction, stage_state, block.rows, block.cols)
                # The cap is on whole matrices, from which lines are taken.
                whole_size = block.rows * block.cols * dtype.itemsize
                itemsize = -(-whole_size // (size[0] * size[1]))
                # A matrix is in the dtype of its own shape, whatever it is computed with.
                small = small_apart and device.type == "cpu" and is_small(*size)
                key = dtype, device, copies, small
                items.append(Item(key, device.type, block.batch, *size, itemsize))
                blocks.append((index, block, rows))
    batches = make_batches(tuple(items), cap)
    return [(b.rows, b.cols, [blocks[i] for i in b.positions]) for b in batches]


_kept_plan = functools.lru_cache(maxsize=256)(_planned)  # nobody writes to what it returns


def make(entries: Sequence[LocalParam], group: dict[str, Any]) -> list[LocalBatch]:
    """The batches of a step over these parameters."""
    batches = []
    copies = [entry.copies for entry in entries]
    for rows, cols, blocks in planned([entry.param for entry in entries], group, copies):
        parts: dict[tuple[Any, ...], _Part] = {}
        for index, block, stage_block in blocks:
            entry = entries[index]
            shape = block.shape, block.batch, block.rows, block.cols, block.transposed
            scale = None if entry.scale is None else scale_region(block, entry.scale)
            geometry = *shape, entry.grad.dtype, None if scale is None else scale.block
            if geometry not in parts:
                computed = selected_shape(group, block.rows, block.cols)
                of_rows = by_rows(group, block.rows, block.cols)
                lists: list[list[Any]] = [[] for _ in range(7)]
                parts[geometry] = _Part(block, stage_block, computed, of_rows, *lists)
            part = parts[geometry]
            part.origins.append((entry.param, block))
            part.params.append(block.region(entry.param))
            part.grads.append(block.region(entry.grad))
            part.momenta.append(block.region(entry.momentum))
            if entry.variance is not None:
                part.variances.append(stage_block.region(entry.variance))
            if entry.steps is not None:
                part.steps.append(entry.steps)
            if scale is not None:
                part.scales.append(scale)
        batches.append(LocalBatch(rows, cols, list(parts.values())))
    return batches


def join(batch: LocalBatch, stacks: Sequence[Tensor]) -> Tensor:
    """The parts' regions, stacked `(N, *region shape)`, as one `(B, rows, cols)`: of each matrix
    the selected lines.
    """
    matrices = [
        part.block.to_matrices(stack) for part, stack in zip(batch.parts, stacks, strict=True)
    ]
    if batch.lines:
        each = zip(matrices, batch.lines, batch.parts, strict=True)
        matrices = [take(whole, lines, part.by_rows) for whole, lines, part in each]
    return _padded(matrices, batch.rows, batch.cols)


def _padded(matrices: list[Tensor], m: int = 0, n: int = 0) -> Tensor:
    """Stacks of matrices as one `(B, m, n)`; by default the least that holds them."""
    if not m and len(matrices) > 1:
        m = max([min(each.shape[1:]) for each in matrices])
        n = max([max(each.shape[1:]) for each in matrices])
    if len(matrices) == 1 and not m:
        return matrices[0]
    if all(each.shape[1:] == (m, n) for each in matrices):
        return matrices[0] if len(matrices) == 1 else torch.cat(matrices)
    count, dtype = 0, matrices[0].dtype
    for each in matrices:
        count += len(each)
        dtype = torch.promote_types(dtype, each.dtype)  # parts differ where gradients do
    whole = matrices[0].new_zeros(count, m, n, dtype=dtype)
    start = 0
    for each in matrices:
        stop = start + len(each)
        place(whole[start:stop], each.shape[1], each.shape[2]).copy_(each)
        start = stop
    return whole


def norms_of(weights: list[Tensor]) -> Tensor:
    """The Frobenius norm of each of these tensors, in float32 at least."""
    dtype = torch.promote_types(weights[0].dtype, torch.float32)
    return torch.stack(torch._foreach_norm(weights, 2, dtype=dtype))


def multiply_(weights: list[Tensor], factors: Tensor) -> None:
    """Multiply each of these tensors by its number, in the number's precision."""
    for weight, factor in zip(weights, factors.to(weights[0].device).unbind(), strict=True):
        if weight.dtype == factor.dtype:
            weight.mul_(factor)
        else:
            weight.copy_(weight * factor.reshape([1] * weight.ndim))


def stacked(tensors: list[Tensor], alone: bool) -> Tensor:
    """A copy of the tensors; of one stack at a time the memory is scratch."""
    first = tensors[0]
    plain = type(first) in (torch.Tensor, torch.nn.Parameter)
    if not alone or torch.compiler.is_compiling() or not plain:
        return torch.stack(tensors)
    shape = (len(tensors), *first.shape)
    return torch.stack(tensors, out=scratch("update", shape, first.dtype, first.device))
