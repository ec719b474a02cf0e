"""Flat shards: parameters of which a rank has some elements, but no rows or columns.

FSDP1 and DeepSpeed's ZeRO cut a vector of all parameters, wherever matrices begin. They are known
by the attributes that they set, without an import of either.
"""

from __future__ import annotations

import sys
from typing import Any

from muonkit._torch import FLAT_MARK

__all__ = ["WHOLE", "flat_model", "flat_shard"]

WHOLE = (
    "Muon needs matrices whole, or in shards that know their place: shard with fully_shard "
    "(FSDP2), or take DDP and share the state out with zero=1"
)


def flat_shard(p: Any) -> str | None:
    """Describes the flat shard that a parameter is; None for a parameter that is none."""
    if hasattr(p, "ds_id"):  # and ds_shape, ds_status; its own data is empty between two passes
        shape = tuple(getattr(p, "ds_shape", ()))
        return f"a flat part of a parameter {shape} that DeepSpeed's ZeRO-3 has sharded"
    if getattr(p, FLAT_MARK, False):
        return "FSDP1's FlatParameter, a vector of several parameters"
    return None


def flat_model(model: Any) -> str | None:
    """Whose flat shards the parameters of a module are; None where nothing is known of any."""
    module = sys.modules.get("torch.distributed.fsdp")
    fsdp1: Any = getattr(module, "FullyShardedDataParallel", None)
    for part in model.modules() if fsdp1 is not None else ():
        # Without shards, and with use_orig_params, parameters have their own shapes.
        strategy = getattr(getattr(part, "sharding_strategy", None), "name", "")
        if isinstance(part, fsdp1) and strategy != "NO_SHARD":
            return "FSDP1 (FullyShardedDataParallel) has cut its parameters into flat shards"
    return None
