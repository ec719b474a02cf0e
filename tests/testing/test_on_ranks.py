"""The laws on ranks: ours keeps them, and each planted fault breaks its own and no others."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from muonkit.testing import LAWS, Finding, rank_laws
from muonkit.testing.rank_laws import counted_bytes, on_this_rank
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


@CASES.on(2)
def coarsely_judged() -> Finding:
    return on_this_rank(f"{FAULTY}:COARSE", "fsdp2_equals_one_process-on-2-ranks")


@CASES.on(2)
def bytes_of_collectives() -> dict[str, int]:
    """Of 1,000 bytes, to and from rank 0."""
    me, sent = dist.get_rank(), {}
    one = torch.zeros(250)
    two = [torch.zeros(250) for _ in range(2)]
    for name, collective in {
        "gather": lambda: dist.gather(one, two if me == 0 else None),
        "scatter": lambda: dist.scatter(one, two if me == 0 else None),
        "reduce": lambda: dist.reduce(one, 0),
        "broadcast": lambda: dist.broadcast(one, 0),
        "all_reduce": lambda: dist.all_reduce(one),
        "all_gather": lambda: dist.all_gather(two, one),
    }.items():
        with counted_bytes() as counted:
            collective()
        sent[name] = sum(counted)
    return sent


BYTES, COARSE = (
    next(one for one in CASES.ids() if one[1] == name)
    for name in ("bytes_of_collectives", "coarsely_judged")
)


@pytest.mark.parametrize(("world_size", "case"), [COARSE])
def test_a_factor_of_a_shard_is_seen_at_the_tolerance_of_16_bits(
    world_size: int, case: CaseName, ranks: Ranks
) -> None:
    assert {one.verdict for one in ranks.outcome(world_size, case).check()} == {"fail"}


@pytest.mark.parametrize(("world_size", "case"), [BYTES])
def test_bytes_of_a_collective_are_counted_once(
    world_size: int, case: CaseName, ranks: Ranks
) -> None:
    root, other = ranks.outcome(world_size, case).check()
    together = {name: root[name] + other[name] for name in root}
    assert together == {
        **dict.fromkeys(("gather", "scatter", "reduce", "broadcast"), 1000),
        **dict.fromkeys(("all_reduce", "all_gather"), 2000),
    }
    assert (root["gather"], other["gather"]) == (0, 1000)
    assert (root["scatter"], other["scatter"]) == (1000, 0)


def test_an_error_on_one_rank_is_told_and_the_next_law_is_tried(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(rank_laws, "GRACE", 1.0)
    laws = [
        "fsdp2_equals_one_process-on-4-ranks",
        "ddp_sends_no_more_than_an_all_gather-on-4-ranks",
    ]
    one, other = rank_laws.check_on_ranks(f"{FAULTY}:SUBJECTS.fails_on_empty_shards", 4, laws)
    found = {finding.law: finding for finding in (one, other)}
    assert "RuntimeError: an empty shard" in found[laws[0]].message
    assert found[laws[1]].verdict == "pass"


@pytest.mark.parametrize(
    ("world_size", "case"), [one for one in CASES.ids() if one not in (BYTES, COARSE)]
)
def test_laws(world_size: int, case: CaseName, ranks: Ranks) -> None:
    fault = case.values.get("fault", "")
    of_all = ranks.outcome(world_size, case).check()
    broken = {found.law for one in of_all for found in one if found.verdict != "pass"}
    laws = {f"{law}-on-{world_size}-ranks" for law in RANK_FAULTS.get(fault, ())}
    assert broken == laws & set(laws_on(world_size)), [str(found) for found in of_all[0]]


def test_every_law_on_ranks_is_broken_by_a_fault() -> None:
    named = {name.partition("-")[0] for name, law in LAWS.items() if law.world_size}
    assert set().union(*RANK_FAULTS.values()) == named
