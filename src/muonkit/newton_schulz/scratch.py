"""Scratch memory: large temporaries on a CPU, kept from call to call.

malloc gives large blocks back to the system as soon as they are free, and a page that is written to
for the first time costs more than all the arithmetic on it. On GPUs torch's allocator keeps memory
itself.
"""

from __future__ import annotations

import math
import threading

import torch

__all__ = ["KEPT_BYTES", "is_kept", "scratch"]

# A buffer larger than this is not kept.
KEPT_BYTES = 64 * 2**20

# Smaller ones malloc keeps anyway.
_WORTH_KEEPING = 2**18


# As many views of the buffers are remembered: making one costs three operations of torch.
_REMEMBERED = 256


class _Kept(threading.local):
    def __init__(self) -> None:
        self.buffers: dict[str, torch.Tensor] = {}
        self.views: dict[tuple[str, tuple[int, ...], torch.dtype], torch.Tensor] = {}


_kept = _Kept()


def is_kept(nbytes: int, device: torch.device) -> bool:
    """Whether so much is kept; if not, `scratch` is `torch.empty`."""
    return device.type == "cpu" and _WORTH_KEEPING <= nbytes <= KEPT_BYTES


def scratch(
    name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """An uninitialized tensor, valid until this thread asks for scratch of the same name again.

    The caller does not change it but for its values: the same object may be given out again.
    """
    nbytes = math.prod(shape) * dtype.itemsize
    if torch.compiler.is_compiling() or not is_kept(nbytes, device):
        return torch.empty(shape, dtype=dtype, device=device)
    view = _kept.views.get((name, shape, dtype))
    if view is None:
        buffer = _kept.buffers.get(name)
        with torch.inference_mode(False):  # an inference tensor could not be written to outside
            if buffer is None or buffer.numel() < nbytes:
                buffer = _kept.buffers[name] = torch.empty(nbytes, dtype=torch.uint8, device=device)
                _kept.views.clear()  # some are of the buffer that was
            elif len(_kept.views) >= _REMEMBERED:
                _kept.views.clear()
            view = _kept.views[name, shape, dtype] = buffer[:nbytes].view(dtype).view(shape)
    return view
