"""Shards that do not know their place: a rank has a part of a parameter, and nothing says which.

FSDP1 and DeepSpeed's ZeRO cut a vector of all parameters, wherever matrices begin; these are flat
shards, without rows or columns. Megatron's tensor parallelism, and torch's DDP over a mesh, keep
rows or columns as plain tensors, which look like whole matrices. All of them are known by the
attributes that they set, without an import.
"""

from __future__ import annotations

import sys
from typing import Any

from muonkit._torch import DTENSOR_BEFORE_DDP, FLAT_MARK, is_unsharded

__all__ = ["WHOLE", "flat_model", "unplaced_shard", "unsharded_part"]

WHOLE = (
    "Muon needs matrices whole, or in shards that know their place: shard with fully_shard "
    "(FSDP2), or take DDP and share the state out with zero=1"
)
_BESIDE_TP = (
    "Muon needs shards that know their place: keep the DTensors of parallelize_module, and for the "
    'data parallel axis take fully_shard(model, mesh=mesh["dp"]), or average the gradients over it '
    'yourself, with process_group=mesh["dp"]'
)


def unplaced_shard(p: Any) -> str | None:
    """Describes the shard that a parameter is, and says what to do; None for one that is none."""
    if (flat := _flat_shard(p)) is not None:
        return f"{flat}. {WHOLE}"
    if hasattr(p, DTENSOR_BEFORE_DDP):
        return (
            "this rank's part of a DTensor, which DistributedDataParallel(device_mesh=...) has "
            f"made a plain tensor. {_BESIDE_TP}"
        )
    if getattr(p, "tensor_model_parallel", False) and _megatron_divides(p):
        return f"this rank's part of a matrix that Megatron's tensor parallelism cuts. {_BESIDE_TP}"
    return None


def _megatron_divides(p: Any) -> bool:
    """Whether Megatron's ranks have parts of such a parameter: it marks them on a single rank too.
    Experts may be cut otherwise than the rest, and are not judged.
    """
    state: Any = sys.modules.get("megatron.core.parallel_state")
    size = getattr(state, "get_tensor_model_parallel_world_size", lambda: 1)
    return bool(getattr(p, "allreduce", True) and size() > 1)


def _flat_shard(p: Any) -> str | None:
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


def unsharded_part(model: Any) -> str | None:
    """Says in which module FSDP2 has no shards for now, and what to do; None where it has them
    everywhere. It trains the shards, which an optimizer that is made now would not hold.
    """
    for name, part in model.named_modules():
        if is_unsharded(part):
            return (
                "FSDP2 has put other tensors in the place of the shards of "
                f"{name or 'the model itself'}, as it leaves them after a forward, but trains the "
                "shards: make the optimizer before the first forward, or call reshard() of every "
                "FSDPModule in model.modules() first"
            )
    return None
