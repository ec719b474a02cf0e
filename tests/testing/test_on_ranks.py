"""The laws on ranks: ours keeps them, and each planted fault breaks its own and no others."""

from __future__ import annotations

import pytest
import torch

from muonkit.testing import LAWS, Finding
from muonkit.testing.rank_laws import on_this_rank
from tests.helpers import sampling
from tests.helpers.faulty_muons import RANK_FAULTS
from tests.helpers.paths import ROOT
from tests.helpers.ranks import CaseName, Cases, Ranks

CASES = Cases()
WHOLE = sampling.is_whole()
OURS = f"{ROOT}/benchmarks/conformance_subjects.py"
FAULTY = f"{ROOT}/tests/helpers/faulty_muons.py"


def laws_on(world_size: int) -> list[str]:
    return [name for name, law in LAWS.items() if law.world_size == world_size]


def _tried(spec: str) -> list[Finding]:
    return [on_this_rank(spec, name) for name in laws_on(torch.distributed.get_world_size())]


@CASES.on(2, name=["muon", "muonw"])
@CASES.on(4, name=["muon", "muonw"] if WHOLE else ["muonw"])
def ours(name: str) -> list[Finding]:
    return _tried(f"{OURS}:{name}")


@CASES.on(2, fault=["", *RANK_FAULTS])
@CASES.on(4, fault=[""] if WHOLE else [])
def plain(fault: str) -> list[Finding]:
    return _tried(f"{FAULTY}:SUBJECTS.{fault.replace(' ', '_') or 'plain'}")


@pytest.mark.parametrize(("world_size", "case"), CASES.ids())
def test_laws(world_size: int, case: CaseName, ranks: Ranks) -> None:
    fault = case.values.get("fault", "")
    of_all = ranks.outcome(world_size, case).check()
    broken = {found.law for one in of_all for found in one if found.verdict != "pass"}
    laws = {f"{law}-on-{world_size}-ranks" for law in RANK_FAULTS.get(fault, ())}
    assert broken == laws & set(laws_on(world_size)), [str(found) for found in of_all[0]]


def test_every_law_on_ranks_is_broken_by_a_fault() -> None:
    named = {name.partition("-")[0] for name, law in LAWS.items() if law.world_size}
    assert set().union(*RANK_FAULTS.values()) == named
