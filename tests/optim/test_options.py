"""The one table of options: what it says is what the constructor, the docs and the groups have."""

from __future__ import annotations

import inspect
import re

import pytest
import torch
from torch import nn

from muonkit import Muon, MuonW, Rule, route
from muonkit._text import one_of
from muonkit.distributed.machines import MACHINES
from muonkit.options import CHOICES, DEFAULTS, FILLS, OF_ALGORITHM, OPTIONS
from muonkit.scale import ROUTED, SCALES
from muonkit.stages import AFTER, STAGES, Stage
from tests.helpers import option_table


def test_the_constructor_has_these_arguments_with_these_defaults_in_this_order() -> None:
    arguments = dict(inspect.signature(Muon).parameters)
    assert arguments.pop("variant").default is None  # another name of `after`
    assert list(arguments) == ["params", *(row.name for row in OPTIONS)]
    assert {row.name: row.default for row in OPTIONS} == {
        name: argument.default for name, argument in arguments.items() if name != "params"
    }


def test_a_constructor_has_no_more_than_26_keyword_arguments() -> None:
    """Those that it names, beside those that change the algorithm; `MuonW` passes on Muon's."""
    others = {*STAGES, "fraction", "selection", "period", "block_lr_factor"}
    for kind, first in ((Muon, "params"), (MuonW, "model")):
        named = [
            argument.name
            for argument in inspect.signature(kind).parameters.values()
            if argument.kind is not argument.VAR_KEYWORD and argument.name not in (first, *others)
        ]
        assert len(named) <= 26, named


def test_the_ranks_arguments_are_one_group() -> None:
    ranks = [row.name for row in OPTIONS if row.ranks]
    assert sorted(ranks) == [
        "block_lr_factor",
        "exchange_dtype",
        "period",
        "process_group",
        "replicas",
        "zero",
    ]
    names = [row.name for row in OPTIONS]
    first = names.index(ranks[0])
    assert names[first : first + len(ranks)] == ranks
    section = (Muon.__doc__ or "").partition("Keyword Args: Over several ranks")[2]
    section = section.partition("Where ranks share")[0]
    assert sorted(re.findall(r"^ {8}(\w+):", section, re.MULTILINE)) == sorted(ranks)


def test_docstrings_lead_to_the_table_of_names() -> None:
    anchor = "options.md#one-thing-several-names"
    for documented in (Muon, MuonW, Rule, route):
        assert anchor in (documented.__doc__ or "")
    page = option_table.PAGE.read_text(encoding="utf-8")
    names = page.partition("## One thing, several names")[2]
    for name in ("scale", "adjust_lr_fn", "decay", "weight_decay", "adamw_wd", "decay_1d"):
        assert f"| `{name}`" in names


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
    table = guide[: guide.index("```python")]  # the first of the page
    without_choice = {"eps"}  # no effect
    missing = {row.name for row in OPTIONS if f"`{row.name}`" not in table} - without_choice
    assert missing == set()


def test_every_choice_of_the_table_is_one_and_nothing_else_is() -> None:
    p = nn.Parameter(torch.ones(4, 3))
    for name, choices in CHOICES.items():
        for choice in choices:
            # Some schedules are made for one number of steps, and need float32.
            Muon([p], **{"ns_dtype": "float32", name: choice})
        what = "Adjust learning rate" if name == "adjust_lr_fn" else f"unknown {name}"
        listed = ", ".join(map(repr, choices))
        with pytest.raises(ValueError, match=f"^{what} .*{re.escape(listed)}"):
            Muon([p], **{name: "typo"})


def test_choices_that_are_looked_up_are_the_dict_where_they_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert CHOICES["adjust_lr_fn"] is SCALES
    assert CHOICES["after"] is AFTER
    monkeypatch.setitem(AFTER, "own", Stage("own", lambda O, v, beta2, step: None))
    assert Muon([nn.Parameter(torch.zeros(4, 3))], after="own").describe()[0]["after"] == "own"


def test_the_command_line_offers_what_the_tables_have() -> None:
    typer = pytest.importorskip("typer")
    from muonkit.lab.cli import DTYPES, app
    from muonkit.lab.plan import assumptions
    from muonkit.lab.plan_layouts import LAYOUTS
    from muonkit.lab.shapes import MODELS

    commands = typer.main.get_command(app).commands
    offered = {
        "plan": {
            "exchange_dtype": CHOICES["exchange_dtype"],
            "after": CHOICES["after"],
            "replicas": CHOICES["replicas"],
            "selection": CHOICES["selection"],
            "dtype": DTYPES,
            "device": MACHINES,
            "layout": LAYOUTS,
        },
        "route": {"adjust_lr_fn": CHOICES["adjust_lr_fn"]},
    }
    # Of an option of `Muon` that a command has, nothing is left out above.
    for command, options in offered.items():
        own = {parameter.name: parameter for parameter in commands[command].params}
        assert options.keys() >= own.keys() & CHOICES.keys()
        for name, choices in options.items():
            assert one_of(choices) in own[name].help
            if name in DEFAULTS:
                default = ROUTED if command == "route" else DEFAULTS[name]
                assert own[name].default == ("none" if default == () else default)
    assert ", ".join(MODELS) in commands["plan"].help
    for name in ("exchange_dtype", "after", "replicas", "selection", "dtype", "device"):
        for choice in offered["plan"][name]:
            assumptions(**{name: choice})
