"""The one table of options: what it says is what the constructor, the docs and the groups have."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import nn

from muonkit import Muon, MuonW
from muonkit.options import DEFAULTS, FILLS, OF_ALGORITHM, OPTIONS
from tests.helpers import option_table


def test_the_constructor_has_these_arguments_with_these_defaults_in_this_order() -> None:
    arguments = dict(inspect.signature(Muon).parameters)
    assert list(arguments) == ["params", *(row.name for row in OPTIONS)]
    assert {row.name: row.default for row in OPTIONS} == {
        name: argument.default for name, argument in arguments.items() if name != "params"
    }


def test_groups_have_the_options_of_their_algorithm() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 3))
    for group in MuonW(model).param_groups:
        own = set(OF_ALGORITHM[group["algorithm"]])
        others = {row.name for row in OPTIONS} - own
        assert own <= group.keys()
        assert not others & group.keys()


def test_adamws_arguments_fill_its_groups() -> None:
    p = nn.Parameter(torch.zeros(3))
    given = {"adamw_lr": 0.5, "adamw_betas": (0.1, 0.2), "adamw_eps": 0.3, "adamw_wd": 0.4}
    assert given.keys() == set(FILLS.values())
    (group,) = Muon([{"params": [p], "algorithm": "adamw"}], **given).param_groups
    assert {name: group[key] for key, name in FILLS.items()} == given


def test_every_option_of_muon_is_passed_on_by_muonw() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 3))
    own = inspect.signature(MuonW).parameters
    for name in DEFAULTS:
        if name not in own:
            MuonW(model, **{name: DEFAULTS[name]})
    with pytest.raises(TypeError, match=r"ns_form.*zero"):
        MuonW(model, nesterow=True)


def test_the_page_is_the_tables() -> None:
    renew = "run python -m tests.helpers.option_table"
    assert option_table.PAGE.read_text(encoding="utf-8") == option_table.page(), renew


def test_the_guide_has_a_row_for_every_option() -> None:
    guide = (option_table.PAGE.parents[1] / "choosing.md").read_text(encoding="utf-8")
    table = guide[: guide.index("Each is said like this")]
    without_choice = {"eps"}  # no effect
    missing = {row.name for row in OPTIONS if f"`{row.name}`" not in table} - without_choice
    assert missing == set()
