"""Accelerate: whole checkpoints with ZeRO-1, in whatever way the script is launched::

model, optimizer, data = accelerator.prepare(model, MuonW(model, ...), data)
consolidate_before_save(accelerator, optimizer)
"""

from __future__ import annotations

from typing import Any

from muonkit.integrations._trainers import consolidate, unwrapped

__all__ = ["consolidate_before_save"]


def consolidate_before_save(accelerator: Any, *optimizers: Any) -> Any:
    """Make `accelerator.save_state` save the whole state where `zero=1` shards it: Accelerate
    writes what rank 0 has. Nothing is done in one process and under FSDP2.

    Args:
        accelerator: an `accelerate.Accelerator`.
        optimizers: as `accelerator.prepare` returned them.

    Returns:
        The hook's handle, whose `remove()` takes it back.

    Raises:
        TypeError: one of the optimizers is not of muonkit.
    """
    inner = [unwrapped(optimizer) for optimizer in optimizers]

    def before(*_: Any) -> None:
        for optimizer in inner:
            consolidate(optimizer)

    return accelerator.register_save_state_pre_hook(before)
