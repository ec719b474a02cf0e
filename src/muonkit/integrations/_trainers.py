"""Shared by the trainers' integrations: unwrap the optimizer, consolidate ZeRO-1's state."""

from __future__ import annotations

from typing import Any

from muonkit.distributed.layout import is_dtensor
from muonkit.optim import Muon

__all__ = ["consolidate", "rank_0_has_a_part", "unwrapped"]


def unwrapped(optimizer: Any) -> Muon:
    """The optimizer inside a trainer's wrappers (Accelerate's, Fabric's, Lightning's).

    Raises:
        TypeError: there is none of muonkit's.
    """
    inner = optimizer
    while not isinstance(inner, Muon) and hasattr(inner, "optimizer"):
        inner = inner.optimizer
    if not isinstance(inner, Muon):
        raise TypeError(
            f"this is for muonkit's Muon and MuonW, but the trainer has {type(inner).__name__}: "
            "give it MuonW(model), or leave this out"
        )
    return inner


def rank_0_has_a_part(optimizer: Muon) -> bool:
    """Whether rank 0's `state_dict()` has one part of the state of whole parameters (ZeRO-1).

    Not so where the parameters are sharded too (FSDP2, TP): there a trainer puts the parts of all
    ranks together by itself, and a whole state on one of them would be of another kind.
    """
    if any(is_dtensor(p) for group in optimizer.param_groups for p in group["params"]):
        return False
    return any(is_dtensor(t) for entry in optimizer.state.values() for t in entry.values())


def consolidate(optimizer: Any) -> None:
    """Make rank 0's `state_dict()` whole where it is not; on all ranks together."""
    inner = unwrapped(optimizer)
    if rank_0_has_a_part(inner):
        inner.consolidate_state_dict()
