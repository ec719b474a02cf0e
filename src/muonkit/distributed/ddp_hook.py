"""A DDP communication hook that sends every part of a gradient only to the rank that needs it.

(Annotations are evaluated here: DDP compares those of a hook with its own types.)
"""

import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from muonkit._torch import reduce_scatter
from muonkit.distributed.placement import Box, slices, whole

if TYPE_CHECKING:
    from muonkit.distributed.param_layout import Layout
    from muonkit.optim import Muon

__all__ = ["ddp_reduce_scatter_hook"]

# Builds of torch without torch.distributed have neither.
_GradBucket: Any = getattr(torch.distributed, "GradBucket", None)


def ddp_reduce_scatter_hook(
    optimizer: "Muon", bucket: _GradBucket
) -> torch.futures.Future[torch.Tensor]:
    """Average a bucket's gradients on the ranks that keep the optimizer's state, and nowhere else.

    For DistributedDataParallel with ``zero=1``, which needs no more: every rank sends and receives
    (N-1)/N of the gradients, half of what DDP's all-reduce does:

        model = DistributedDataParallel(model)
        optimizer = MuonW(model, process_group=dist.group.WORLD, zero=1)
        model.register_comm_hook(optimizer, ddp_reduce_scatter_hook)

    What a rank does not need of `p.grad` is zero after the backward pass. So

    - several backward passes before a step belong under `model.no_sync()`, all but the last; a
      backward pass onto gradients that were averaged already raises (to see that, gradients that
      were set to zero rather than to None are looked at, which waits for the device);
    - `torch.nn.utils.clip_grad_norm_` would see this rank's part only: use
      `optimizer.clip_grad_norm_`.

    Args:
        optimizer: the state of `register_comm_hook`: `Muon` or `MuonW` of the same parameters, with
            the process group of the DDP module.
        bucket: DDP's.

    Returns:
        The future that DDP waits for: the bucket's buffer.

    Raises:
        ValueError: the optimizer shares nothing out over ranks.
        RuntimeError: in a backward pass, onto gradients that were averaged already.
    """
    layouts = optimizer._layouts
    domain = layouts.domain
    if domain is None or not layouts.zero:
        raise ValueError(
            "ddp_reduce_scatter_hook got an optimizer whose state every rank has whole, and which "
            "needs whole gradients: make it with process_group= and zero=1, or leave the hook out"
        )
    layouts.scattered = True
    parts: list[list[Tensor]] = [[] for _ in range(domain.size)]
    rest: list[Tensor] = []
    for p, grad in zip(bucket.parameters(), bucket.gradients(), strict=True):
        known = layouts.averaged.get(id(p))
        if known is None or not known.is_of(p):
            known = layouts.averaged[id(p)] = _Averaged(p)
        known.yes = True
        layout = layouts.get(p)
        if layout is None or layout.state_placement == layout.param_placement:
            rest.append(grad)
            continue
        for position in range(domain.size):
            parts[position].append(grad[slices(_box(layout, p, position), whole(p.shape))])
    buffer: Tensor = bucket.buffer()
    # Before the sum, as DDP does it: of 16-bit gradients the sum may overflow, and the mean not.
    buffer.div_(domain.size)
    most = max(sum(part.numel() for part in some) for some in parts)
    packed = buffer.new_zeros(domain.size, most)
    for row, some in zip(packed, parts, strict=True):
        _copy(row, some, into=False)
    own = buffer.new_empty(most)
    scattered = reduce_scatter(own, packed.view(-1), domain.group)
    together = torch.cat([grad.reshape(-1) for grad in rest]) if rest else buffer.new_empty(0)
    reduced: Any = torch.distributed.all_reduce(together, group=domain.group, async_op=True)

    parts_came, rest_came = _future(scattered), _future(reduced)

    def put_back(_: Any) -> Tensor:
        # On a GPU a future is complete once its work is queued: this stream has to wait for both.
        parts_came.wait()
        rest_came.wait()
        buffer.zero_()
        _copy(own, parts[domain.position], into=True)
        _copy(together, rest, into=True)
        return buffer

    # Not of `collect_all`, whose callback runs on the stream of the backward pass.
    done: torch.futures.Future[Tensor] = rest_came.then(put_back)
    return done


class _Averaged:
    """Whether the gradient that a parameter has is one that the hook has averaged. A backward pass
    that added to it would add this rank's own to what is the mean in part, and zero elsewhere.
    """

    def __init__(self, p: Tensor) -> None:
        self.yes = False
        self._p = weakref.ref(p)
        p.register_hook(self._before_accumulation)  # type: ignore[no-untyped-call]

    def is_of(self, p: Tensor) -> bool:
        """Whether it knows this parameter: one that a framework replaced may have had its id."""
        return self._p() is p

    def _before_accumulation(self, grad: Tensor) -> None:
        p = self._p()
        if self.yes and p is not None and p.grad is not None and bool(p.grad.any()):
            raise RuntimeError(
                "a backward pass met gradients that ddp_reduce_scatter_hook has averaged in the "
                "one before: take all backward passes before a step but the last under 'with "
                "model.no_sync():', and call optimizer.zero_grad() after each step"
            )
        self.yes = False


def _future(work: Any) -> Any:
    """The work's future; one that is complete, after waiting, where the backend has none (gloo)."""
    try:
        return work.get_future()
    except RuntimeError:
        work.wait()
        future: torch.futures.Future[None] = torch.futures.Future()
        future.set_result(None)
        return future


def _box(layout: "Layout", p: Tensor, position: int) -> Box:
    return layout.state_placement.box(tuple(p.shape), position)


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
