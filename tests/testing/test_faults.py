"""No law that cannot fail: each fault breaks the laws that are there for it, and no others."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from muonkit import Muon
from muonkit.testing import LAWS, Subject, check
from tests.helpers import sampling
from tests.helpers.faulty_muons import FAULTS, plain

ALONE = [name for name, law in LAWS.items() if not law.world_size]


def test_every_law_is_broken_by_a_fault() -> None:
    assert set().union(*FAULTS.values()) == set(ALONE)


def test_what_never_moves_a_weight_breaks_every_law_on_what_it_moves() -> None:
    class Still(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            return closure() if closure is not None else None

    def still(params: Any, *_: Any, lr: float, weight_decay: float) -> Still:
        return Still(params, lr=lr)

    findings = check(dataclasses.replace(plain(""), make=still, heads=still))
    assert {finding.law for finding in findings if finding.verdict != "fail"} == {
        "zero_moves_nothing",
        "gradients_are_untouched",
        "no_gradient_no_decay",
        "state_dicts_load_with_weights_only",
    }


def test_a_plain_muon_keeps_them() -> None:
    assert [str(finding) for finding in check(plain("")) if finding.verdict != "pass"] == []


@pytest.mark.parametrize(
    ("law", "options"),
    [
        ("the_momentum_is_the_documented_one", {"momentum": 0.94}),
        ("the_momentum_is_the_documented_one", {"momentum": 0.96}),
        ("the_momentum_is_the_documented_one", {"momentum": 0.94, "nesterov": False}),
        ("singular_values_are_alike", {"ns_steps": 2}),
        ("singular_values_are_alike", {"ns_steps": 3}),
    ],
    ids=str,
)
def test_what_is_nearly_right_breaks_a_law_with_coarse_products(
    law: str, options: dict[str, Any]
) -> None:
    nesterov = options.get("nesterov", True)

    def subject(**given: Any) -> Subject:
        def make(params: Any, *, lr: float, weight_decay: float) -> Muon:
            return Muon(params, lr=lr, weight_decay=weight_decay, ns_dtype="bfloat16", **given)

        return Subject(make, momentum=0.95, nesterov=nesterov, products=torch.bfloat16)

    (right,) = check(subject(nesterov=nesterov), [law])
    (wrong,) = check(subject(**options), [law])
    assert (right.verdict, wrong.verdict) == ("pass", "fail")


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_breaks_its_laws_and_no_others(fault: str) -> None:
    # In `make test` a third of the others, each fault another one; in `make test-all` all of them.
    turn = list(FAULTS).index(fault)
    names = [
        name
        for i, name in enumerate(ALONE)
        if name in FAULTS[fault] or sampling.is_whole() or (i + turn) % 3 == 0
    ]
    findings = check(plain(fault), names)
    assert {finding.law for finding in findings if finding.verdict == "fail"} == FAULTS[fault]
    for finding in findings:
        if finding.verdict == "fail":
            assert finding.input, f"{finding} does not say on which input"
            assert finding.message
