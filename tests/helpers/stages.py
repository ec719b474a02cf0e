"""Stages and constraints by name, and the options that stand for them."""

from __future__ import annotations

from typing import Any, TypeAlias

from muonkit import Constraint, Stage
from muonkit.stages import STAGES

AnyStage: TypeAlias = str | Stage | Constraint

NAMES = ("plain", *(name for table in STAGES.values() for name in table))

# Several at once.
TOGETHER: dict[str, dict[str, Any]] = {
    "balanced": {"before": "muoneq", "after": ["normuon", "muon_plus"], "constraint": "hyperball"},
    "braked": {"after": "muon_plus", "constraint": ["relative_update", "radial_brake"]},
}


# Beside stages: what else a step may keep.
KEPT: dict[str, dict[str, Any]] = {
    "int8": {"momentum_dtype": "int8"},
    "int8 normuon": {"momentum_dtype": "int8", "after": "normuon"},
}


def stage_options(stage: AnyStage) -> dict[str, Any]:
    """The option for a stage or constraint, given by name or as an object; "plain" is none."""
    if isinstance(stage, Stage):
        return {"after": stage}
    if isinstance(stage, Constraint):
        return {"constraint": stage}
    if stage == "plain":
        return {}
    if stage in TOGETHER or stage in KEPT:
        return (TOGETHER | KEPT)[stage]
    return next({option: stage} for option, table in STAGES.items() if stage in table)
