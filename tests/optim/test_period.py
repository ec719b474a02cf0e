"""The options `period` and `block_lr_factor` in one process; tests/distributed has the ranks."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn

from muonkit import Muon, MuonW, Rule
from muonkit.period import PERIOD_STEP, count_, in_blocks


def weight() -> nn.Parameter:
    torch.manual_seed(0)
    p = nn.Parameter(torch.randn(6, 4))
    p.grad = torch.randn(6, 4)
    return p


@pytest.mark.parametrize("key", ["period", "block_lr_factor"])
@pytest.mark.parametrize("value", [0, -1, 2.5, True, "5", None, float("nan")])
def test_values_out_of_range_are_refused(key: str, value: Any) -> None:
    if key == "block_lr_factor" and value in (0, 2.5, True):
        Muon([weight()], block_lr_factor=value)
        return
    said = key.split("_", maxsplit=1)[0]
    with pytest.raises((ValueError, TypeError), match=said):
        Muon([weight()], **{key: value})
    p = weight()
    optimizer = Muon([p])
    optimizer.param_groups[0][key] = value
    before = p.detach().clone()
    with pytest.raises((ValueError, TypeError), match=f"{said}.*nothing was changed"):
        optimizer.step()
    assert torch.equal(p, before)


@pytest.mark.parametrize("after", [(), "normuon", "adamuon"])
def test_one_process_takes_whole_steps_with_any_period(after: Any) -> None:
    one, other = weight(), weight()
    plain = Muon([one], after=after)
    periodic = Muon([other], after=after, period=3, block_lr_factor=0.1)
    for _ in range(4):
        plain.step()
        periodic.step()
    assert torch.equal(one, other)
    assert periodic.param_groups[0][PERIOD_STEP] == 0  # counted where ranks step together
    assert periodic.plan().traffic() == periodic.plan(blocks=True).traffic()


def test_the_count_is_in_state_dicts_copies_and_older_ones() -> None:
    optimizer = Muon([weight()], period=4)
    group = optimizer.param_groups[0]
    count_(optimizer.param_groups)
    assert group[PERIOD_STEP] == 1
    assert in_blocks(group)
    other = Muon([weight()], period=2)
    other.load_state_dict(optimizer.state_dict())
    assert (other.param_groups[0]["period"], other.param_groups[0][PERIOD_STEP]) == (4, 1)
    assert copy.deepcopy(other).param_groups[0][PERIOD_STEP] == 1
    older = optimizer.state_dict()
    for key in ("period", "block_lr_factor", PERIOD_STEP):
        del older["param_groups"][0][key]
    third = Muon([weight()], period=2)
    third.load_state_dict(older)
    assert (third.param_groups[0]["period"], third.param_groups[0][PERIOD_STEP]) == (2, 0)
    third.step()
    for key in ("period", "block_lr_factor", PERIOD_STEP):
        del third.param_groups[0][key]
    unpickled = pickle.loads(pickle.dumps(third.state_dict()))
    assert PERIOD_STEP not in unpickled["param_groups"][0]


def test_all_groups_count_together() -> None:
    one, two, three = weight(), weight(), weight()
    optimizer = Muon([{"params": [one], "period": 3}, {"params": [two]}])
    for _ in range(4):
        count_(optimizer.param_groups)
    optimizer.add_param_group({"params": [three], "period": 2})
    assert [group[PERIOD_STEP] for group in optimizer.param_groups] == [4, 4, 4]
    assert list(map(in_blocks, optimizer.param_groups)) == [True, False, False]
    plain = Muon([weight()])
    count_(plain.param_groups)
    assert plain.param_groups[0][PERIOD_STEP] == 0


def test_a_rule_gives_a_layer_its_own_period() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3))
    rule = Rule("1.weight", options={"period": 1, "block_lr_factor": 0.5})
    optimizer = MuonW(model, period=5, rules=[rule])
    periods = {g["period"] for g in optimizer.param_groups if g["algorithm"] == "muon"}
    assert periods == {1, 5}
    assert all(PERIOD_STEP not in g for g in optimizer.param_groups if g["algorithm"] == "adamw")
    assert {row["period"] for row in optimizer.describe() if "period" in row} == {1, 5}
