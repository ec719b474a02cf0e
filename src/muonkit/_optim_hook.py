"""A DDP communication hook that sends every part of a gradient only to the rank that needs it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from muonkit.placement import Box, slices, whole

if TYPE_CHECKING:
    from torch import Tensor
    from torch.distributed import GradBucket
    from torch.futures import Future

    from muonkit._optim_layout import Layout
    from muonkit.optim import Muon

__all__ = ["ddp_reduce_scatter_hook"]


def ddp_reduce_scatter_hook(optimizer: Muon, bucket: GradBucket) -> Future[Tensor]:
    """Average a bucket's gradients where the optimizer's state lives, and nowhere else.

    For DistributedDataParallel with ``zero=1``, which needs no more: every rank sends and receives
    (N-1)/N of the gradients, half of what DDP's all-reduce does. ::

        model = DistributedDataParallel(model)
        optimizer = MuonW(model, process_group=dist.group.WORLD, zero=1)
        model.register_comm_hook(optimizer, ddp_reduce_scatter_hook)

    What a rank does not need of `p.grad` is zero after the backward pass. So

    - several backward passes before a step belong under `model.no_sync()`, all but the last;
    - `clip_grad_norm_` would see this rank's part only. Take the norm over all ranks, and clip::

          norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
          square = norm.square()
          dist.all_reduce(square)
          clip_grads_with_norm_(model.parameters(), max_norm, square.sqrt())

      (scalar parameters, which every rank has whole, count once for each rank there).

    Args:
        optimizer: the state of `register_comm_hook`: `Muon` or `MuonW` of the same parameters, with
            the process group of the DDP module.
        bucket: DDP's.

    Returns:
        The future that DDP waits for: the bucket's buffer.

    Raises:
        ValueError: the optimizer shares nothing out over ranks.
    """
    layouts = optimizer._layouts
    domain = layouts.domain
    if domain is None or not layouts.zero:
        raise ValueError(
            "ddp_reduce_scatter_hook got an optimizer whose state every rank has whole, and which "
            "needs whole gradients: make it with process_group= and zero=1, or leave the hook out"
        )
    parts: list[list[Tensor]] = [[] for _ in range(domain.size)]
    rest: list[Tensor] = []
    for p, grad in zip(bucket.parameters(), bucket.gradients(), strict=True):
        layout = layouts.get(p)
        if layout is None or layout.lives == layout.stored:
            rest.append(grad)
            continue
        for position in range(domain.size):
            parts[position].append(grad[slices(_box(layout, p, position), whole(p.shape))])
    buffer = bucket.buffer()
    most = max(sum(part.numel() for part in some) for some in parts)
    packed = buffer.new_zeros(domain.size, most)
    for row, some in zip(packed, parts, strict=True):
        _copy(row, some, into=False)
    own = buffer.new_empty(most)
    scattered = torch.distributed.reduce_scatter_tensor(
        own, packed.view(-1), group=domain.group, async_op=True
    )
    together = torch.cat([grad.reshape(-1) for grad in rest]) if rest else buffer.new_empty(0)
    reduced = torch.distributed.all_reduce(together, group=domain.group, async_op=True)

    def put_back(_: Any) -> Tensor:
        buffer.zero_()
        _copy(own.div_(domain.size), parts[domain.position], into=True)
        _copy(together.div_(domain.size), rest, into=True)
        return buffer

    both = torch.futures.collect_all([scattered.get_future(), reduced.get_future()])
    return both.then(put_back)


def _box(layout: Layout, p: Tensor, position: int) -> Box:
    return layout.lives.box(tuple(p.shape), position)


def _copy(flat: Tensor, tensors: list[Tensor], into: bool) -> None:
    """Between one flat tensor and others, into these or out of them."""
    sizes = [tensor.numel() for tensor in tensors]
    if not tensors:
        return
    chunks = [
        chunk.view(tensor.shape)
        for chunk, tensor in zip(torch.split(flat[: sum(sizes)], sizes), tensors, strict=True)
    ]
    torch._foreach_copy_(*((tensors, chunks) if into else (chunks, tensors)))
