"""Recordings of muonkit.Monitor: read as they are, drawn, refused with the remedy; and those that
``muonkit compare --monitor`` makes, which change no loss and survive a stop.
"""

from __future__ import annotations

import gzip
import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import muonkit
from muonkit.lab import monitor_plots as plots
from muonkit.lab.cli import main
from muonkit.lab.data import digits
from muonkit.lab.errors import LabError
from muonkit.lab.monitor import draw
from muonkit.lab.recording import FIGURES, find, read
from muonkit.lab.tasks import TASKS
from muonkit.lab.train import Run, Setting, StopRequest, Trainer, train
from tests.helpers import lab, warm
from tests.helpers.lab import Silent, losses

Record = dict[str, Any]


@pytest.fixture(autouse=True)
def _coarse(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures of a third of the width take a third less time; what is in them is the same."""
    monkeypatch.setattr("muonkit.lab.pictures.DPI", 40)


@pytest.fixture
def recorded(tmp_path: Path) -> Path:
    """Seven steps of an MLP with three hidden matrices, sampled at 1, 3 and 6."""
    torch.manual_seed(0)
    sizes = (6, 8, 10, 8, 4)
    layers = [nn.Linear(a, b) for a, b in pairwise(sizes)]
    model = nn.Sequential(*layers)
    optimizer = muonkit.MuonW(model, lr=0.02)
    path = tmp_path / "monitor.jsonl"
    with muonkit.Monitor(optimizer, every=3, to=path):
        for _ in range(7):
            optimizer.zero_grad()
            model(torch.randn(5, 6)).square().mean().backward()
            optimizer.step()
    return path


def lines(path: Path) -> list[Record]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def rewrite(path: Path, change: Callable[[list[Record]], Any]) -> None:
    """The file again, with its records changed in place."""
    records = lines(path)
    change(records)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


# --- reading ---


def test_a_recording_is_read_as_it_was_written(recorded: Path) -> None:
    found, written = read(recorded), lines(recorded)
    assert read(recorded.parent) == found
    assert found.steps == [1, 3, 6]
    assert set(found.matrices) == {(m["name"], m["index"]) for m in written[0]["matrices"]}
    assert list(found.matrices) == sorted(found.matrices)
    for figure in FIGURES.values():
        values = found.values(figure)
        for key, row in zip(found.matrices, values, strict=True):
            for value, sample in zip(row, written[1:], strict=True):
                (matrix,) = [m for m in sample["matrices"] if (m["name"], m["index"]) == key]
                assert value == figure.of(matrix)


def test_layers_are_in_the_order_of_their_numbers(recorded: Path) -> None:
    def rename(records: list[Record]) -> None:
        for record in records:
            for matrix, name in zip(record["matrices"], ("b.10.w", "b.9.w", "b.0.w"), strict=False):
                matrix["name"] = name

    rewrite(recorded, rename)
    numbers = [int(re.findall(r"\d+", name)[0]) for name, _ in read(recorded).matrices]
    assert numbers == sorted(numbers)


def test_the_later_sample_of_a_step_counts_and_skipped_ones_do_not(recorded: Path) -> None:
    def change(records: list[Record]) -> None:
        again = json.loads(json.dumps(records[2]))
        for matrix in again["matrices"]:
            matrix["orthogonality_error"] = 0.125
        records.append(again)
        records[3].update(skipped=True, matrices=[], parameters=[], groups=[])

    rewrite(recorded, change)
    found = read(recorded)
    assert (found.steps, found.skipped) == ([1, 3], 1)
    assert {row[1] for row in found.values(FIGURES["orthogonality"])} == {0.125}


def test_a_matrix_is_named_with_its_part(recorded: Path) -> None:
    found = read(recorded)
    assert [found.label(key) for key in found.matrices] == ["0.weight", "1.weight", "2.weight"]
    split = replace(found, of={("blocks.0.qkv.weight", 1): 3})
    assert split.label(("blocks.0.qkv.weight", 1)) == "blocks.0.qkv [2/3]"


# --- pictures ---


def test_the_command_draws_beside_the_recording(
    recorded: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["monitor", str(recorded.parent)]) == 0
    shown = capsys.readouterr().out
    for name in ("monitor-layers.png", "monitor-spectra.png"):
        assert (recorded.parent / name).read_bytes().startswith(b"\x89PNG")
        assert f"wrote {recorded.parent / name}" in shown
    found = read(recorded)
    last = [row[-1] for row in found.values(FIGURES["update-to-weight"])]
    highest = found.label(found.matrices[last.index(max(last))])
    assert f"{max(last):.3g}  {highest}" in shown
    assert "3 samples, steps 1 to 6" in shown
    assert "not written to its end" not in shown


def test_what_a_kill_left_is_drawn_and_said(
    recorded: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recorded.write_bytes(recorded.read_bytes()[:-40])
    assert main(["monitor", str(recorded), "--out", str(recorded.parent)]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "the last line was not written to its end" in shown
    assert "2 samples, steps 1 to 3" in shown
    assert (recorded.parent / "monitor-layers.png").exists()


def _zero(records: list[Record]) -> None:
    for sample in records[1:]:
        for matrix in sample["matrices"]:
            matrix.update(update_to_weight=None, orthogonality_error=None)
            matrix["spectra"] = dict.fromkeys(matrix["spectra"])


def _no_spectra(records: list[Record]) -> None:
    for sample in records[1:]:
        for matrix in sample["matrices"]:
            matrix["spectra"] = {}


def _some_without_gradient(records: list[Record]) -> None:
    del records[1]["matrices"][0]
    records[2]["matrices"].clear()


def _many(records: list[Record]) -> None:
    for record in records:
        record["matrices"] = [
            {**matrix, "name": f"layers.{i}.{matrix['name']}"}
            for i in range(80)
            for matrix in record["matrices"]
        ]


def _one_sample(records: list[Record]) -> None:
    del records[2:]


def _singular(records: list[Record]) -> None:
    for sample in records[1:]:
        for matrix in sample["matrices"]:
            matrix["update_to_weight"] = 0.0
            matrix["spectra"]["momentum"]["quantiles"][:5] = [0.0] * 5


@pytest.mark.parametrize(
    "change", [_zero, _no_spectra, _some_without_gradient, _many, _one_sample, _singular]
)
def test_figures_that_are_not_there_leave_a_picture(
    change: Callable[[list[Record]], None], recorded: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rewrite(recorded, change)
    assert main(["monitor", str(recorded)]) == 0
    for name in ("monitor-layers.png", "monitor-spectra.png"):
        assert (recorded.parent / name).read_bytes().startswith(b"\x89PNG")
    if change in (_zero, _no_spectra):
        assert "—" in capsys.readouterr().out


def test_cells_lie_around_their_samples_and_do_not_overlap() -> None:
    assert lab.edges([1, 10, 20]) == [0.0, 5.5, 15.0, 25.0]
    assert lab.edges([7]) == [6.5, 7.5]


def test_colours_span_what_there_is() -> None:
    norm = lab.norm([0.5, math.nan, 2.0], is_log=True)
    assert 0 < norm(0.5) < norm(1.0) < norm(2.0) < 1
    assert norm(1.0) == pytest.approx(0.5)  # half-way by factors
    assert lab.norm([0.0, 2.0], is_log=True)(1.0) == 0.5  # no factor from 0
    assert lab.norm([math.nan], is_log=False)(0.5) == 0.5


def test_matrices_for_the_spectra_are_spread_over_the_model() -> None:
    keys = [(f"layers.{i}", 0) for i in range(40)]
    chosen = lab.spread(keys, 6)
    assert len(set(chosen)) == 6
    assert (chosen[0], chosen[-1]) == (keys[0], keys[-1])
    assert lab.spread(keys[:2], 6) == keys[:2]


def test_layers_are_chosen_by_name(recorded: Path) -> None:
    assert [name for name, _ in read(recorded, "1.*").matrices] == ["1.weight"]
    with pytest.raises(LabError, match=r"no matrix of .* matches 'x\*': it has 0.weight, 1.wei"):
        read(recorded, "x*")


# --- what is refused ---


def _other_format(records: list[Record]) -> None:
    records[0]["format"] = 2


def _no_header(records: list[Record]) -> None:
    del records[0]


def _no_samples(records: list[Record]) -> None:
    del records[1:]


def _only_skipped(records: list[Record]) -> None:
    del records[2:]
    records[1].update(skipped=True, matrices=[])


def _lacks_steps(records: list[Record]) -> None:
    del records[1]["step"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_other_format, "line 1: it is of format 2, written by muonkit"),
        (_no_header, "line 1: it begins with no header, expected the header of a recording"),
        (_no_samples, "has no samples that could be drawn (0 skipped steps)"),
        (_only_skipped, "(1 skipped steps): one is taken at step 1 and at every multiple of 3"),
        (_lacks_steps, "line 2: step is missing, expected a whole number"),
    ],
)
def test_a_recording_that_cannot_be_drawn_is_an_error_of_one_line(
    change: Callable[[list[Record]], None],
    message: str,
    recorded: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    rewrite(recorded, change)
    _refused(recorded, message, capsys)


def _refused(run: Path, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    around = run.parent if run.parent.exists() else run.parent.parent
    before = sorted(around.rglob("*"))
    assert main(["monitor", str(run)]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    (line,) = told.err.splitlines()
    assert line.startswith("error: ")
    assert message in line
    assert sorted(around.rglob("*")) == before


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "has no samples that could be drawn"),
        (b'{"kind": "hea', "line 1: its header was not written to its end"),
        (b"\x89PNG\r\n\x1a\n", "line 1: it is not UTF-8, expected a JSON object in UTF-8"),
        (b"[1]\n", "line 1: it is a list, no JSON object"),
        (b'{"kind": "header", "format": 1}\n', "line 1: every is missing"),
    ],
)
def test_another_file_is_no_recording(
    content: bytes, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "x.jsonl").write_bytes(content)
    _refused(tmp_path / "x.jsonl", message, capsys)


# --- crafted ones ---

HEAD = (
    b'{"kind": "header", "format": 1, "muonkit": "0.1.0", "every": 3, '
    b'"matrices": [{"name": "a", "index": 0, "of": 1}]}\n'
)
SKIPPED = b'{"kind": "sample", "step": 3, "skipped": true, "groups": [], "matrices": []}\n'


def a_sample(matrix: str = "", group: str = "", sample: str = "") -> bytes:
    """A header and a sample, with keys put in place of those that are there, or beside them."""

    def put(record: Record, text: str) -> str:
        whole = {key: json.dumps(value) for key, value in record.items()}
        whole |= dict(part.split(": ", 1) for part in text.split(" ;; ") if part)
        return "{" + ", ".join(f'"{k}": {v}' for k, v in whole.items() if v != "-") + "}"

    spectrum = {"stable_rank": 2.0, "quantiles": [0.5, 1.0, 2.0]}
    one = put(
        {
            "name": "a",
            "index": 0,
            "update_to_weight": 0.1,
            "orthogonality_error": 0.3,
            "spectra": {"momentum": spectrum, "update": spectrum},
        },
        matrix,
    )
    of_group = put(
        {"algorithm": "muon", "members": 1, "lr": 0.1, "nonfinite": {"weight": 0}}, group
    )
    parts = f"groups: [{of_group}] ;; matrices: [{one}]" + (f" ;; {sample}" if sample else "")
    line = put({"kind": "sample", "step": 1, "skipped": False}, parts)
    return HEAD + line.encode() + b"\n"


# What is wrong with a recording, the line that is named, and what is said of it.
WRONG: dict[str, tuple[bytes, int, str]] = {
    "no JSON": (HEAD + b"oops\n", 2, "it is no JSON, expected a JSON object in UTF-8"),
    "an empty line": (HEAD + b"\n" + SKIPPED, 2, "it is no JSON"),
    "a number": (HEAD + b"17\n", 2, "it is 17, no JSON object"),
    "a text": (HEAD + b'"\\u001b[31m"\n', 2, "it is '\\x1b[31m', no JSON object"),
    "null": (b"null\n", 1, "it is null, no JSON object"),
    "two records in a line": (HEAD[:-1] + SKIPPED, 1, "it is no JSON"),
    "a torn line in the middle": (HEAD + SKIPPED[:30] + b"\n" + SKIPPED, 2, "it is no JSON"),
    "foreign text at the end": (HEAD + SKIPPED + b"bye", 3, "it is no JSON"),
    "zeros at the end": (HEAD + SKIPPED + bytes(9), 3, "it is no JSON"),
    "Latin-1": (HEAD + '{"kind": "\xe9"}\n'.encode("latin-1"), 2, "it is not UTF-8"),
    "UTF-16": (HEAD.decode().encode("utf-16"), 1, "it is not UTF-8"),
    "UTF-8 with a mark": (b"\xef\xbb\xbf" + HEAD, 1, "it is no JSON"),
    "gzip": (gzip.compress(HEAD), 1, "it is not UTF-8"),
    "deep lists": (HEAD + b"[" * 10**5 + b"\n", 2, "it is nested too deeply"),
    "deep objects": (HEAD + b'{"a": ' * 10**5 + b"\n", 2, "it is nested too deeply"),
    "deep and closed": (
        a_sample("spectra: " + "[" * 10**5 + "]" * 10**5),
        2,
        "it is nested too deeply",
    ),
    "NaN": (a_sample("update_to_weight: NaN"), 2, "NaN is no JSON, expected a finite number"),
    "infinity": (a_sample(group="lr: -Infinity"), 2, "-Infinity is no JSON"),
    "a key twice": (
        a_sample().replace(b'"step": 1', b'"step": 1, "step": 2'),
        2,
        "'step' is there",
    ),
    "no kind": (HEAD + b'{"step": 1}\n', 2, "kind is missing, expected text"),
    "a kind that is a number": (HEAD + b'{"kind": 1}\n', 2, "kind is 1, expected text"),
    "an unknown kind": (HEAD + b'{"kind": "x"}\n', 2, "kind is 'x', expected header, sample or"),
    "no header": (SKIPPED, 1, "it begins with no header"),
    "a format that is true": (
        HEAD.replace(b'": 1,', b'": true,', 1),
        1,
        "format is true, expected",
    ),
    "a format that is text": (HEAD.replace(b'": 1,', b'": "1",', 1), 1, "format is '1', expected"),
    "a newer format": (HEAD.replace(b'": 1,', b'": 2,', 1), 1, "it is of format 2, written by"),
    "a format of digits": (
        HEAD.replace(b'": 1,', b'": ' + b"9" * 5000 + b",", 1),
        1,
        "it is no JSON",
    ),
    "matrices that are an object": (
        HEAD[: HEAD.index(b"[")] + b"{}}\n",
        1,
        "matrices is an object, expected a list",
    ),
    "a matrix that is a number": (
        HEAD[: HEAD.index(b"[")] + b"[3]}\n",
        1,
        "matrices[0] is 3, expected an object",
    ),
    "a matrix without its count": (HEAD.replace(b', "of": 1', b""), 1, "matrices[0].of is missing"),
    "every that is a list": (HEAD.replace(b'"every": 3', b'"every": [3]'), 1, "every is a list"),
    "a later header that is wrong": (HEAD + HEAD.replace(b"1}", b"-1}"), 2, "matrices[0].of is -1"),
    "no step": (a_sample(sample="step: -"), 2, "step is missing"),
    "a step that is text": (a_sample(sample='step: "1"'), 2, "step is '1', expected a whole"),
    "a fractional step": (a_sample(sample="step: 1.5"), 2, "step is 1.5, expected a whole number"),
    "a negative step": (a_sample(sample="step: -7"), 2, "step is -7"),
    "a huge step": (a_sample(sample=f"step: 1{'0' * 400}"), 2, "step is 1000000000000…000000000"),
    "skipped that is a number": (
        a_sample(sample="skipped: 0"),
        2,
        "skipped is 0, expected true or",
    ),
    "no matrices": (a_sample(sample="matrices: -"), 2, "matrices is missing, expected a list"),
    "matrices that are null": (a_sample(sample="matrices: null"), 2, "matrices is null"),
    "groups that are text": (a_sample(sample='groups: "muon"'), 2, "groups is 'muon', expected a"),
    "a group that is a list": (a_sample(sample="groups: [[]]"), 2, "groups[0] is a list"),
    "a group without members": (a_sample(group="members: -"), 2, "groups[0].members is missing"),
    "an algorithm that is a list": (
        a_sample(group="algorithm: []"),
        2,
        "groups[0].algorithm is a l",
    ),
    "a count of text": (
        a_sample(group='nonfinite: {"weight": "many"}'),
        2,
        "groups[0].nonfinite.weight is 'many'",
    ),
    "a rate of text": (
        a_sample(group='lr: "fast"'),
        2,
        "groups[0].lr is 'fast', expected a finite",
    ),
    "a name that is a number": (a_sample("name: 5"), 2, "matrices[0].name is 5, expected text"),
    "a name that is null": (a_sample("name: null"), 2, "matrices[0].name is null"),
    "no name": (a_sample("name: -"), 2, "matrices[0].name is missing"),
    "an index of text": (a_sample('index: "0"'), 2, "matrices[0].index is '0'"),
    "a negative index": (a_sample("index: -1"), 2, "matrices[0].index is -1"),
    "a figure of text": (
        a_sample('update_to_weight: "\\u001b[2J\\n"'),
        2,
        "update_to_weight is '\\x1b[2J\\n', expec",
    ),
    "a figure that is true": (
        a_sample("orthogonality_error: true"),
        2,
        "orthogonality_error is true",
    ),
    "a figure out of range": (a_sample("update_to_weight: 1e999"), 2, "update_to_weight is inf"),
    "a figure no float holds": (
        a_sample(f"orthogonality_error: 1{'0' * 400}"),
        2,
        "orthogonality_error is 10000",
    ),
    "a negative figure": (a_sample("update_to_weight: -1.0"), 2, "update_to_weight is -1.0"),
    "spectra that are a list": (a_sample("spectra: []"), 2, "matrices[0].spectra is a list"),
    "a spectrum of text": (
        a_sample('spectra: {"update": "x"}'),
        2,
        "matrices[0].spectra.update is 'x', expected an",
    ),
    "quantiles that are a number": (
        a_sample('spectra: {"update": {"quantiles": 3}}'),
        2,
        "update.quantiles is 3, expected a l",
    ),
    "a quantile of text": (
        a_sample('spectra: {"momentum": {"quantiles": [1, "2"]}}'),
        2,
        "momentum.quantiles[1] is '2'",
    ),
    "a stable rank that is an object": (
        a_sample('spectra: {"momentum": {"stable_rank": {}}}'),
        2,
        "stable_rank is an object",
    ),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_recording_is_one_line_that_says_where(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content, number, message = WRONG[kind]
    path = tmp_path / "x.jsonl"
    path.write_bytes(content)
    _refused(path, f"{path}, line {number}: ", capsys)
    path.write_bytes(content)
    with pytest.raises(LabError) as caught:
        read(path)
    assert message in str(caught.value)
    assert ", expected " in str(caught.value)
    assert str(caught.value).isprintable()


def test_the_same_matrix_twice_is_refused(tmp_path: Path) -> None:
    line = json.loads(a_sample().splitlines()[1])
    line["matrices"] *= 2
    (tmp_path / "x.jsonl").write_bytes(HEAD + json.dumps(line).encode() + b"\n")
    with pytest.raises(
        LabError, match=r"line 2: matrices\[1\] is 'a' number 0 again, expected each"
    ):
        read(tmp_path / "x.jsonl")


NAMES = (
    r"$\frac",
    "$x$ and $y_{",
    "\x1b[31mred\x1b[0m",
    "two\nlines\r",
    "[red]markup[/] [bold",
    "trailing\\",
    ":smile: \U0001f600 \u4e2d\u6587",
    "\u202eright to left",
    "\ud800 alone",
    "\x00\x07",
    "",
    "long." * 5000,
    "layer." + "9" * 5000,
    "\u0663\u0664",
)


def named_so(records: list[Record]) -> None:
    for record in records:
        like = record["matrices"][0]
        record["matrices"] = [{**like, "name": name} for name in NAMES]
        for group in record.get("groups", ()):
            group["algorithm"] = NAMES[2] + NAMES[4]


def far_numbers(records: list[Record]) -> None:
    """Up to what a float is, and an integer where a float is usual."""
    for k, sample in enumerate(records[1:]):
        sample["step"] = (1, 10**6, 2**53)[k]
        for i, matrix in enumerate(sample["matrices"]):
            matrix["update_to_weight"] = (5e-324, 1.7e308, 10**300)[(i + k) % 3]
            matrix["orthogonality_error"] = (1.7e308, 0, 1)[(i + k) % 3]
            matrix["spectra"]["momentum"] = {"stable_rank": 1e308, "quantiles": [1e308, 5e-324]}
            matrix["spectra"]["update"]["quantiles"] = [1.7e308, None, 0.0]


def nothing_but_names(records: list[Record]) -> None:
    """As with `fields=()`, and keys that nobody knows."""
    for sample in records[1:]:
        sample["matrices"] = [{"name": "a", "index": 0, "what": [{}]}]
        sample["groups"] = [{"algorithm": "muon", "members": 1, "\x1b": None}]
        del sample["parameters"], sample["ranks"]


def empty_lists(records: list[Record]) -> None:
    for sample in records[1:]:
        for matrix in sample["matrices"]:
            matrix["spectra"] = {"momentum": {"quantiles": []}, "update": {"quantiles": [None]}}
        sample["groups"] = []


@pytest.mark.parametrize("change", [named_so, far_numbers, nothing_but_names, empty_lists])
def test_an_odd_recording_is_drawn(
    change: Callable[[list[Record]], None], recorded: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever is no mistake has its pictures, and prints nothing that a terminal would obey."""
    rewrite(recorded, change)
    assert main(["monitor", str(recorded)]) == 0
    told = capsys.readouterr()
    assert told.err == ""
    assert all(line.isprintable() for line in told.out.splitlines())
    if change is named_so:
        assert r"\x1b[31mred\x1b[0m[red]markup[/] [bold" in told.out
    for name in ("monitor-layers.png", "monitor-spectra.png"):
        assert (recorded.parent / name).read_bytes().startswith(b"\x89PNG")


def test_names_are_drawn_letter_by_letter(recorded: Path) -> None:
    """No formula is made of them, and every text that is drawn prints."""
    from matplotlib.backends.backend_agg import RendererAgg

    rewrite(recorded, named_so)
    drawn: list[str] = []
    real = RendererAgg.draw_text

    def seen(self: Any, gc: Any, x: Any, y: Any, s: str, *more: Any, **named: Any) -> None:
        drawn.append(s)
        real(self, gc, x, y, s, *more, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RendererAgg, "draw_text", seen)
        patch.setattr(RendererAgg, "draw_mathtext", None)  # logarithmic axes alone have formulas
        plots.heat_maps(read(recorded), "$a$ title \x1b")
    assert {r"$\frac", "$x$ and $y_{", r"\x1b[31mred\x1b[0m", r"\ud800 alone"} <= set(drawn)
    assert r"$a$ title \x1b" in drawn
    assert all(text.isprintable() for text in drawn)


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_a_stream_without_the_letters_loses_nothing(encoding: str, recorded: Path) -> None:
    """The command's own process: no picture is lost, nor the status, with an odd name besides."""
    folder = recorded.parent / "η"
    folder.mkdir()
    words = ["-m", "muonkit", "monitor", str(recorded), "--out", str(folder)]
    command = warm.Command(words, env={**os.environ, "PYTHONIOENCODING": encoding})
    out, err = command.communicate(200)
    assert command.returncode == 0, err
    assert sorted(path.name for path in folder.iterdir()) == [
        "monitor-layers.png",
        "monitor-spectra.png",
    ]
    assert err == b""
    shown = out.decode(encoding)
    word = {"ascii": "update / weight, ||eta O|| / ||W||", "utf-8": "update / weight, ‖ηO‖ / ‖W‖"}
    assert word.get(encoding, "||eta O||") in shown
    rows = [line for line in shown.splitlines() if "weight, " in line or "orthogonality" in line]
    assert len({len(row) for row in rows}) == 1  # what is spelled is spelled before it is measured


def test_a_pipe_that_nobody_reads_loses_no_picture(recorded: Path) -> None:
    command = [sys.executable, "-m", "muonkit", "monitor", str(recorded)]
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, timeout=200)
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, b"")
    assert (recorded.parent / "monitor-spectra.png").exists()


def test_an_error_about_an_odd_path_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["monitor", str(tmp_path / "a\nb\x1b[31m")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert r"a\nb\x1b[31m" in line
    assert line.isprintable()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no named pipes")
def test_a_pipe_is_not_waited_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.mkfifo(tmp_path / "x.jsonl")
    _refused(tmp_path / "x.jsonl", "is neither file nor folder", capsys)


def test_an_end_is_said(recorded: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with recorded.open("a") as file:
        file.write('{"kind": "end", "step": 9, "max_bytes": 100}\n')
    assert main(["monitor", str(recorded)]) == 0
    assert "it ended at step 6, since the file had reached" in capsys.readouterr().out


def test_reading_is_linear_in_what_is_read(tmp_path: Path) -> None:
    """By count: twice the matrices, or twice the samples, are twice the calls of anything."""

    def calls(matrices: int, samples: int) -> int:
        head, line = map(json.loads, a_sample().splitlines())
        named = [{"name": f"m.{i}", "index": 0, "of": 1} for i in range(matrices)]
        head["matrices"] = named
        line["matrices"] = [{**line["matrices"][0], **name} for name in named]
        records = [head, *({**line, "step": 1 + step} for step in range(samples))]
        path = tmp_path / "x.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        count = 0

        def counted(frame: Any, event: str, argument: Any) -> None:
            nonlocal count
            count += event in ("call", "c_call")

        sys.setprofile(counted)
        try:
            recording = read(path)
            for figure in FIGURES.values():
                recording.values(figure)
        finally:
            sys.setprofile(None)
        return count

    once = calls(20, 20)
    for twice in (calls(40, 20), calls(20, 40)):
        assert twice <= 2.1 * once


def test_damage_in_the_middle_is_not_taken_for_a_kill(
    recorded: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parts = recorded.read_bytes().splitlines(keepends=True)
    recorded.write_bytes(parts[0] + parts[1][:50] + b"\n" + parts[2])
    _refused(recorded, "line 2: it is no JSON", capsys)


def test_a_folder_without_a_recording(
    recorded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _refused(tmp_path / "absent", "there is no", capsys)
    (tmp_path / "empty").mkdir()
    _refused(tmp_path / "empty", "has no monitor.jsonl: name the folder of a run", capsys)
    run = tmp_path / "whole" / "runs" / "muonw-lr0.1-seed0"
    run.mkdir(parents=True)
    recorded.rename(run / "monitor.jsonl")
    assert find(tmp_path / "whole") == run / "monitor.jsonl"  # the only one
    other = run.with_name("muonw-lr0.2-seed0")
    shutil.copytree(run, other)
    _refused(tmp_path / "whole", f"holds 2 recordings: name the run, for example {run}", capsys)
    assert main(["monitor", str(run), "--out", str(tmp_path / "nowhere")]) == 2
    assert "nowhere is no folder: make it first" in capsys.readouterr().err


# --- compare --monitor ---


def setting(**changes: Any) -> Setting:
    return Setting(TASKS["digits"], digits(), 20, 32, **changes)


@pytest.mark.parametrize("name", ["muonw", "normuon"])
def test_a_monitor_changes_no_loss(name: str, tmp_path: Path) -> None:
    run = Run(name, 0.01, 0)
    train(run, setting(), tmp_path / "without", StopRequest(), Silent())
    train(run, setting(monitor=4), tmp_path / "with", StopRequest(), Silent())
    assert losses(tmp_path / "with") == losses(tmp_path / "without")
    assert not (tmp_path / "without" / "monitor.jsonl").exists()
    assert read(tmp_path / "with").steps == [1, 4, 8, 12, 16, 20]


def test_others_have_no_monitor(tmp_path: Path) -> None:
    train(Run("adamw", 0.01, 0), setting(monitor=4), tmp_path, StopRequest(), Silent())
    assert not (tmp_path / "monitor.jsonl").exists()


@pytest.mark.parametrize("damage", ["", "torn line", "no checkpoint", "short"])
def test_a_recording_goes_on_as_if_nothing_had_happened(damage: str, tmp_path: Path) -> None:
    run, whole, cut = Run("muonw", 0.01, 0), tmp_path / "whole", tmp_path / "cut"
    train(run, setting(monitor=3), whole, StopRequest(), Silent())
    first = Trainer(run, setting(monitor=3), cut, StopRequest(), Silent())
    lab.advance(first, 11, saved_after=8)  # the samples of 9 are lost with the steps
    assert first.monitor is not None
    first.monitor.close()
    path = cut / "monitor.jsonl"
    if damage == "torn line":
        path.write_bytes(path.read_bytes() + b'{"kind": "sam')
    elif damage == "no checkpoint":
        (cut / "checkpoint.pt").unlink()
    elif damage == "short":
        path.write_bytes(path.read_bytes()[:-20])
    train(run, setting(monitor=3), cut, StopRequest(), Silent())
    assert losses(cut) == losses(whole)
    assert path.read_bytes() == (whole / "monitor.jsonl").read_bytes()


@pytest.mark.whole
def test_compare_shows_the_pictures_of_seed_0(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    command = ["compare", "digits", "--steps", "8", "--seeds", "2", "--monitor", "4"]
    assert main([*command, "--out", str(out)]) == 0
    assert "the monitor's samples, every 4 steps" in " ".join(capsys.readouterr().out.split())
    key = "muonw-lr0.004-seed0"
    for name in (f"{key}-monitor-layers.png", f"{key}-monitor-spectra.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    assert (out / "runs" / "muonw-lr0.004-seed1" / "monitor.jsonl").exists()
    page = (out / "report.html").read_text()
    assert len(re.findall("<img src=.data:image/svg.xml;base64,", page)) == 4
    assert "What muonw lr 0.004 seed 0 did" in page
    assert "0.5 to 0.6 is normal" in page
    # A recording that is damaged afterwards is said, and the comparison is reported all the same.
    (out / "runs" / key / "monitor.jsonl").write_text("no recording\n")
    assert main([*command, "--out", str(out)]) == 0
    page = (out / "report.html").read_text()
    assert len(re.findall("<img src=.data:image/svg.xml;base64,", page)) == 2
    assert "draw a copy that lies in no run" in page
    assert main([*command[:-2], "--out", str(out)]) == 2
    assert "holds a comparison with monitor = 4, not null" in capsys.readouterr().err


def test_pictures_are_the_same_each_time(recorded: Path) -> None:
    assert draw(read(recorded), "x") == draw(read(recorded), "x")
