"""The page of the conformance suite is what its files make, and ours breaks no law in them."""

from __future__ import annotations

from typing import Any

import pytest

from muonkit.testing import LAWS
from tests.helpers.paths import ROOT


@pytest.fixture
def conformance(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import conformance

    return conformance


def test_the_page_is_what_the_files_make(conformance: Any) -> None:
    page = conformance.PAGE.read_text(encoding="utf-8")
    assert conformance.renewed(page, conformance.read()) == page, (
        "run python benchmarks/conformance.py --page"
    )


def test_the_files_have_all_laws_and_all_implementations(conformance: Any) -> None:
    records = conformance.read()
    assert {record["optimizer"] for record in records} == set(conformance.ENTRIES)
    for record in records:
        assert [row["law"] for row in record["laws"]] == list(LAWS), record["optimizer"]


def test_ours_breaks_none(conformance: Any) -> None:
    for record in conformance.read():
        if record["optimizer"] in ("muon", "muonw"):
            assert {row["verdict"] for row in record["laws"]} == {"pass"}


def test_what_is_said_of_a_law_names_one(conformance: Any) -> None:
    names = {name.partition("-")[0] for name in LAWS}
    for entry in conformance.ENTRIES.values():
        assert {*entry.known, *entry.notes} <= names
