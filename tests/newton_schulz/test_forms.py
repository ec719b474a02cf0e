"""Forms: FLOPs are as published, restarts keep rounding in bounds, auto is the cheapest."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from muonkit import orthogonalize
from muonkit.newton_schulz.coefficients import KELLER, SCHEDULES
from muonkit.newton_schulz.forms import FORMS, choose_form, product_flops, segments
from muonkit.newton_schulz.orthogonalizer import choose
from tests.helpers import internals

FIVE = (KELLER,) * 5
INF = math.inf


@pytest.mark.parametrize("alpha", [1, 2, 3, 4])
@pytest.mark.parametrize(
    ("restarts", "general", "symmetric"),
    [
        ((1, 2, 3, 4), lambda a: 20 * a + 10, lambda a: 15 * a + 5),
        ((2,), lambda a: 8 * a + 28, lambda a: 6 * a + 14),
        ((2, 3), lambda a: 12 * a + 22, lambda a: 9 * a + 11),
        ((), lambda a: 4 * a + 34, lambda a: 3 * a + 17),
    ],
)
def test_flops_are_the_published_ones(alpha, restarts, general, symmetric) -> None:
    m = 64
    assert product_flops(m, alpha * m, FIVE, restarts, 1) == general(alpha) * m**3
    assert product_flops(m, alpha * m, FIVE, restarts, INF) == symmetric(alpha) * m**3


def test_restarts_are_those_that_rounding_needs() -> None:
    for name, schedule in SCHEDULES.items():
        gram = FORMS["gram"]
        if len(schedule.table) == 5:
            assert gram(schedule.table, 4) == gram(schedule.table, 8) == (2,), name
            assert gram(schedule.table, 2) == (1, 2, 3), name
    assert FORMS["gram"](SCHEDULES["deepseek_v4"].table, 4) == (1, 4, 7)
    assert FORMS["standard"](FIVE, 4) == (1, 2, 3, 4)


triples = st.lists(
    st.tuples(st.floats(0.1, 12), st.floats(-30, 0), st.floats(0, 20)), min_size=1, max_size=12
).map(tuple)


@given(triples, st.sampled_from([2, 4, 8]))
def test_no_segment_lets_errors_grow_beyond_the_limit(given_triples, itemsize: int) -> None:
    restarts = FORMS["gram"](given_triples, itemsize)
    parts = segments(given_triples, restarts)
    assert tuple(triple for part in parts for triple in part) == given_triples
    for part in parts:
        growth = math.prod(max(1.0, a * a) for a, _, _ in part[:-1])
        assert growth <= (20 if itemsize == 2 else 200)
        assert itemsize > 2 or len(part) == 1 or part is parts[-1]


@given(triples, st.integers(1, 40), st.integers(0, 100), st.sampled_from([1, 2, 4, 8]))
def test_auto_has_the_fewest_flops(given_triples, m: int, more: int, blocks: int) -> None:
    def flops(form: str) -> int:
        chosen = choose_form(form, m, m + more, given_triples, 4, blocks)
        assert form in ("auto", chosen.form)
        return product_flops(m, m + more, given_triples, chosen.restarts, blocks)

    assert flops("auto") == min(flops("standard"), flops("gram"))


def test_auto_is_standard_for_squares_and_gram_for_wide_ones() -> None:
    for blocks in (1, 4, 8):
        assert choose_form("auto", 768, 768, FIVE, 4, blocks).form == "standard"
        assert choose_form("auto", 768, 3072, FIVE, 4, blocks).form == "gram"


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [(96, 96), (64, 160), (160, 64), (96, 37), (53, 200)])
@pytest.mark.parametrize("smallest", [100, 24, 12])
def test_flops_are_counted_exactly(
    form: str, shape: tuple[int, int], smallest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What torch multiplies is what `choose` says, and at most 1.1 times the symmetric figure."""
    internals.smallest_block(monkeypatch, "cpu", smallest)
    choice = choose(KELLER, 5, form, "float32", torch.float32, torch.device("cpu"), *shape)
    m, n = sorted(shape)
    fits = int(math.log2(max(m / smallest, 1)))
    assert choice.blocks == (2**fits if fits >= 2 else 1)
    with FlopCounterMode(display=False) as counted:
        internals.evaluate(torch.randn(3, *shape), choice.triples, form)
    if m % choice.blocks == 0:
        assert counted.get_total_flops() == 3 * choice.flops
    assert counted.get_total_flops() <= 1.1 * 3 * choice.flops
    assert choice.flops == product_flops(m, n, FIVE, choice.restarts, choice.blocks)


def test_a_cubic_schedule_squares_nothing() -> None:
    cubic = SCHEDULES["cubic5"].table
    assert product_flops(10, 10, cubic, (1, 2, 3, 4), 1) == 5 * 4 * 1000


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("m", [64, 70])  # where blocks fit, the result itself is scratch
def test_forms_agree_in_blocks_too(m: int, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    G = torch.randn(3, m, 130, dtype=torch.float64)
    G[1, 40:] = 0
    internals.all_in_scratch(monkeypatch)
    whole = orthogonalize(G, ns_form="standard", ns_dtype="float64")
    internals.smallest_block(monkeypatch, "cpu", 8)
    for X, expected in ((G, whole), (G.mT, whole.mT)):
        O = orthogonalize(X, ns_form=form, ns_dtype="float64")
        # float64's rounding, 1e-16, grown by up to 200 within a segment and 484 by the schedule.
        assert (O - expected).norm() / whole.norm() < 1e-10
