"""Stages, constraints and selections by name, and the options that stand for them."""

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

# Selections (`muonkit.selection`), the same in every layout.
SELECTED: dict[str, dict[str, Any]] = {
    "dion2": {"fraction": 0.25},
    "nordion2": {"fraction": 0.4, "after": "normuon"},
    "dion2_braked": {
        "fraction": 0.5,
        "before": "muoneq",
        "after": "muon_plus",
        "constraint": "radial_brake",
    },
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
    for table in (TOGETHER, SELECTED, KEPT):
        if stage in table:
            return table[stage]
    return next({option: stage} for option, table in STAGES.items() if stage in table)
