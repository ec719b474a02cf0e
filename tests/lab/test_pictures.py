"""What all pictures share: labels that do not touch, human numbers, a dark form, bars from zero."""

from __future__ import annotations

import re
from itertools import pairwise

import pytest
from matplotlib.figure import Figure

from muonkit.lab import plots
from muonkit.lab.optimizers import OPTIMIZERS
from muonkit.lab.pictures import STYLES, apart, dark, human, rendered


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (4096, "4,096"),
        (4.09e3, "4,090"),
        (1234567.8, "1,234,568"),
        (999.7, "1,000"),
        (123.45, "123"),
        (2.5, "2.5"),
        (0, "0"),
        (0.0001234, "0.000123"),
        (1.234e-7, "0.000000123"),
    ],
)
def test_numbers_are_as_people_write_them(value: float, text: str) -> None:
    assert human(value) == text


@pytest.mark.parametrize(
    "places", [[], [1.0], [3.0, 1.0, 2.0], [5.0, 5.0, 5.0, 20.0], [0.0, 9.0, 9.5, 10.0, 11.0]]
)
def test_labels_do_not_touch_and_keep_their_order(places: list[float]) -> None:
    moved = apart(places, 2.0)
    by_place = sorted(range(len(places)), key=places.__getitem__)
    assert all(moved[b] - moved[a] >= 2.0 - 1e-9 for a, b in pairwise(by_place))
    # No further than needed: the mean of all stays.
    assert sum(moved) == pytest.approx(sum(places))


def test_every_optimizer_has_a_style_of_its_own() -> None:
    assert STYLES.keys() == OPTIMIZERS.keys()
    assert len({style.color for style in STYLES.values()}) == len(STYLES)


def test_the_dark_form_inverts_greys_and_keeps_colours() -> None:
    figure = Figure(figsize=(2, 2))
    axes = figure.add_subplot()
    axes.plot([1, 2], color=STYLES["muonw"].color)
    axes.plot([2, 1], color="#fffffe")  # a white that is to stay
    light = rendered(figure, "svg").decode()
    form = dark(light)
    assert "#ffffff" in light
    assert not re.search(r"#(?:ffffff|000000)", form)
    assert {"#1e2129", "#e6e7eb", "#0072b2", "#fffffe"} <= set(re.findall("#[0-9a-f]{6}", form))
    assert rendered(figure, "svg").decode() == light  # the same file from the same figure


@pytest.mark.parametrize("limits", [(-2.0, -0.3), (-2.0, 0.5), (0.0, 4.0)])
def test_losses_that_are_not_positive_have_a_linear_scale(limits: tuple[float, float]) -> None:
    axes = Figure().add_subplot()
    plots._scale(axes, limits)
    assert axes.get_yscale() == "linear"
    low, high = axes.get_ylim()
    assert low < limits[0] < limits[1] < high


def test_bars_begin_at_zero_and_have_human_numbers() -> None:
    axes = Figure().add_subplot()
    unit, parts = plots._readable("GB received", {"in": [4.0e-3, 1.0e-3], "out": [0.096e-3, 0.0]})
    assert unit == "MB received"
    plots._bars(axes, ["ours", "theirs"], unit, parts)
    assert axes.get_xlim()[0] == 0
    assert [text.get_text() for text in axes.texts] == ["4.1", "1"]
    assert axes.get_xscale() == "linear"
    unit, parts = plots._readable("GB of memory", {"state": [4096.0]})
    plots._bars(axes, ["ours"], unit, parts)
    assert axes.texts[-1].get_text() == "4,096"
    assert not [t for t in axes.get_xticklabels() if "e" in t.get_text()]
