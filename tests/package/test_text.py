"""Choices that are none of the documented ones: one wording, everywhere."""

from __future__ import annotations

import re

import torch

from muonkit._text import unknown
from tests.helpers.paths import SOURCE


def test_an_unknown_choice_is_told_with_what_was_got_and_what_there_is() -> None:
    told = "unknown variant 'x'; it is one of 'plain', 'normuon'"
    assert unknown("variant", "x", ["plain", "normuon"]) == told
    assert unknown("variant", "x", {"plain": 1, "normuon": 2}, ", or a Variant") == (
        f"{told}, or a Variant"
    )


def test_the_closest_choice_is_what_was_meant() -> None:
    assert unknown("variant", "normoun", ["plain", "normuon"]) == (
        "unknown variant 'normoun': did you mean 'normuon'? It is one of 'plain', 'normuon'"
    )


def test_whatever_was_got_is_told_in_one_short_line() -> None:
    for got in (None, 3, ["plain"], "a\nb", "x" * 10_000, torch.zeros(3, 3)):
        told = unknown("variant", got, ["plain"])
        assert "\n" not in told
        assert len(told) < 150


def test_no_other_place_words_it() -> None:
    pattern = re.compile(r"""f?["']unknown [a-z_{]""")
    found = {
        path.relative_to(SOURCE).as_posix()
        for path in SOURCE.rglob("*.py")
        if pattern.search(path.read_text(encoding="utf-8"))
    }
    assert found == {"_text.py"}
