"""Scratch memory: large temporaries on a CPU, kept from call to call.

malloc gives large blocks back to the system as soon as they are free, and a page that is written to
for the first time costs more than all the arithmetic on it. On GPUs torch's allocator keeps memory
itself.
"""

from __future__ import annotations

import math
import threading

import torch

__all__ = ["KEPT_BYTES", "scratch"]

# A buffer larger than this is not kept.
KEPT_BYTES = 64 * 2**20

# Smaller ones malloc keeps anyway.
_WORTH_KEEPING = 2**18


class _Kept(threading.local):
    def __init__(self) -> None:
        self.buffers: dict[str, torch.Tensor] = {}


_kept = _Kept()


def scratch(
    name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """An uninitialized tensor, valid until this thread asks for scratch of the same name again."""
    nbytes = math.prod(shape) * dtype.itemsize
    compiling = torch.compiler.is_compiling()
    if compiling or device.type != "cpu" or not _WORTH_KEEPING <= nbytes <= KEPT_BYTES:
        return torch.empty(shape, dtype=dtype, device=device)
    buffer = _kept.buffers.get(name)
    if buffer is None or buffer.numel() < nbytes:
        buffer = _kept.buffers[name] = torch.empty(nbytes, dtype=torch.uint8)
    return buffer[:nbytes].view(dtype).view(shape)
