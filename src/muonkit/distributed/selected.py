"""Selected lines of matrices that ranks have parts of: which they are, on every rank alike.

The norm of a line is a sum over all its shards. Every rank adds what it has of each line to one
vector, the same for all; the ranks add the vectors up, and each finds the largest by itself. So no
rank is told which lines another has taken, and all sizes are known before a step (`Lines`).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch

from muonkit.distributed.exchange import Pending, add_up
from muonkit.selection import largest, sums_of_magnitudes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from muonkit.distributed.exchange import Domain
    from muonkit.distributed.placement import Box
    from muonkit.distributed.plan import Plan
    from muonkit.distributed.transfers import Lines

__all__ = ["BucketLines", "SelectedLines", "lines_of"]


def lines_of(plan: Plan, matrix: int) -> Lines:
    lines = plan.matrices[matrix].lines
    assert lines is not None
    return lines


class _Pieces(NamedTuple):
    """What is known of a stack of this rank's pieces of momenta.

    Attributes:
        matrices, boxes: of each piece.
        numbers: `(N, lines)`: where the lines of each piece are in the vector of norms.
    """

    matrices: list[int]
    boxes: list[Box]
    numbers: Tensor


class BucketLines:
    """The lines of a bucket's matrices in one vector; the same in every step.

    Copies of a parameter that ranks train independently (`PlannedTensor.repeat`) have places of
    their own.

    Args:
        matrices: of the bucket, in its order.
        stacks: (matrix, box) of each piece of each stack of this rank's momenta, first of those
            that go to owners; the pieces of a stack have one shape, and lines along the same dims.
    """

    def __init__(
        self,
        plan: Plan,
        domain: Domain,
        matrices: Sequence[int],
        stacks: Sequence[Sequence[tuple[int, Box]]],
    ) -> None:
        self.plan, self.domain = plan, domain
        self._first: dict[int, int] = {}
        self.total = 0
        alike: dict[tuple[tuple[int, int, int], ...], list[int]] = {}
        for matrix in matrices:
            lines = lines_of(plan, matrix)
            count = lines.cells[-1][1]
            copies, mine = plan.apart(matrix, domain.position)
            self._first[matrix] = self.total + mine * count
            self.total += copies * count
            alike.setdefault(lines.cells, []).append(matrix)
        device = domain.device
        self.kinds = [
            (cells, some, self._numbers(some, cells[-1][1]).to(device))
            for cells, some in alike.items()
        ]
        self.pieces = [self._pieces(stack) for stack in stacks]

    def _numbers(self, matrices: Sequence[int], count: int) -> Tensor:
        first = torch.tensor([self._first[matrix] for matrix in matrices], device="cpu")
        return first[:, None] + torch.arange(count, device="cpu")

    def _pieces(self, stack: Sequence[tuple[int, Box]]) -> _Pieces:
        numbers = []
        for matrix, box in stack:
            whole = self.plan.matrices[matrix].box
            dims = lines_of(self.plan, matrix).dims
            lengths = [whole[dim][1] - whole[dim][0] for dim in dims]
            all_of_them = self._numbers([matrix], math.prod(lengths)).view(lengths)
            mine = [slice(box[d][0] - whole[d][0], box[d][1] - whole[d][0]) for d in dims]
            numbers.append(all_of_them[tuple(mine)].flatten())
        matrices, boxes = map(list, zip(*stack, strict=True))
        return _Pieces(matrices, boxes, torch.stack(numbers).to(self.domain.device))

    def norms(self, stacks: Sequence[Tensor]) -> Pending[Tensor]:
        """The ℓ1 norms of all lines, over all ranks.

        Args:
            stacks: of this rank's pieces of momenta that go to owners: of copies one does.
        """
        # Parts in float32 add up in float64 to the same number in whatever order (they differ by
        # less than 2^29, or the smaller one has no say): copies cannot come to other lines.
        vector = torch.zeros(self.total, dtype=torch.float64, device=self.domain.device)
        for stack, pieces in zip(stacks, self.pieces, strict=False):
            dims = lines_of(self.plan, pieces.matrices[0]).dims
            over = [dim for dim in range(1, stack.ndim) if dim - 1 not in dims]
            sums = sums_of_magnitudes(stack, over) if over else stack.abs()
            vector.index_add_(0, pieces.numbers.flatten(), sums.to(vector).flatten())
        return Pending(vector, [add_up(self.domain, vector)])


class SelectedLines:
    """The lines that one step takes of a bucket's matrices.

    Args:
        norms: of all lines, as `BucketLines.norms` gives them.
    """

    def __init__(self, bucket: BucketLines, norms: Tensor) -> None:
        self._bucket, self._plan = bucket, bucket.plan
        self._lines: dict[int, Tensor] = {}
        self._taken = torch.zeros(bucket.total, dtype=torch.bool, device=norms.device)
        for cells, matrices, numbers in bucket.kinds:
            lines = largest(norms[numbers], cells)
            self._taken.index_fill_(0, numbers.gather(1, lines).flatten(), True)
            self._lines.update(zip(matrices, lines.unbind(), strict=True))

    def of(self, matrix: int) -> Tensor:
        """The lines of a matrix, `(k,)`, ascending."""
        return self._lines[matrix]

    def keep_(self, momenta: Sequence[Sequence[Tensor]], mu: float | Tensor) -> None:
        """Multiply what this rank has of these lines by mu, in the momentum."""
        kept: dict[torch.dtype, Tensor] = {}
        for some, pieces in zip(momenta, self._bucket.pieces, strict=True):
            wide = torch.promote_types(some[0].dtype, torch.float32)
            if wide not in kept:
                kept[wide] = torch.ones_like(self._taken, dtype=wide).masked_fill_(self._taken, mu)
            dims = lines_of(self._plan, pieces.matrices[0]).dims
            shape = [length if dim in dims else 1 for dim, length in enumerate(some[0].shape)]
            factors = kept[wide][pieces.numbers].view(-1, *shape).to(some[0].device)
            torch._foreach_mul_(list(some), list(factors.unbind()))

    def take(self, stacks: Sequence[Tensor]) -> list[Tensor]:
        """The selected lines of each stack; the whole stack where whole matrices travel."""
        taken = []
        for stack, pieces in zip(stacks, self._bucket.pieces, strict=False):
            along = lines_of(self._plan, pieces.matrices[0]).sent
            if along is None:
                taken.append(stack)
                continue
            each = zip(pieces.matrices, pieces.boxes, strict=True)
            lines = torch.stack([self.inside(matrix, box) for matrix, box in each])
            shape = [len(lines), *[1] * (stack.ndim - 1)]
            shape[along + 1] = lines.shape[1]
            taken.append(torch.take_along_dim(stack, lines.view(shape).to(stack.device), along + 1))
        return taken

    def inside(self, matrix: int, box: Box) -> Tensor:
        """The lines that are in a part of the matrix that travels without the others, counted from
        its first.
        """
        planned, lines = self._plan.matrices[matrix], lines_of(self._plan, matrix)
        assert lines.sent is not None
        first = planned.box[lines.sent][0]
        start, stop = planned.taken(box)[lines.sent]
        return self._lines[matrix][start - first : stop - first] - (box[lines.sent][0] - first)
