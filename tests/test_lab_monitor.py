"""Recordings of muonkit.Monitor: read as they are, drawn, refused with the remedy; and those that
``muonkit compare --monitor`` makes, which change no loss and survive a stop.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import muonkit
from muonkit.lab import _monitor_plots as plots
from muonkit.lab.cli import main
from muonkit.lab.data import digits
from muonkit.lab.errors import LabError
from muonkit.lab.monitor import draw
from muonkit.lab.recording import FIGURES, find, read
from muonkit.lab.tasks import TASKS
from muonkit.lab.train import Run, Setting, StopRequest, Trainer, train
from test_lab_compare import Silent, losses

Record = dict[str, Any]


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
    assert plots._edges([1, 10, 20]) == [0.0, 5.5, 15.0, 25.0]
    assert plots._edges([7]) == [6.5, 7.5]


def test_colours_span_what_there_is() -> None:
    norm = plots._norm([0.5, math.nan, 2.0], is_log=True)
    assert 0 < norm(0.5) < norm(1.0) < norm(2.0) < 1
    assert norm(1.0) == pytest.approx(0.5)  # half-way by factors
    assert plots._norm([0.0, 2.0], is_log=True)(1.0) == 0.5  # no factor from 0
    assert plots._norm([math.nan], is_log=False)(0.5) == 0.5


def test_matrices_for_the_spectra_are_spread_over_the_model() -> None:
    keys = [(f"layers.{i}", 0) for i in range(40)]
    chosen = plots._spread(keys, 6)
    assert len(set(chosen)) == 6
    assert (chosen[0], chosen[-1]) == (keys[0], keys[-1])
    assert plots._spread(keys[:2], 6) == keys[:2]


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
        (_other_format, "is of format 2, written by muonkit"),
        (_no_header, "it begins with no header; name another file"),
        (_no_samples, "has no samples that could be drawn (0 skipped steps)"),
        (_only_skipped, "(1 skipped steps): one is taken at step 1 and at every multiple of 3"),
        (_lacks_steps, "is damaged: a record lacks or has a wrong 'step'; record anew"),
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
        (b"", "it begins with no header"),
        (b'{"kind": "hea', "its header was not written to its end"),
        (b"\x89PNG\r\n\x1a\n", "line 1, is no JSON object"),
        (b"[1]\n", "line 1, is no JSON object"),
        (b'{"kind": "header", "format": 1}\n', "is damaged: a record lacks"),
    ],
)
def test_another_file_is_no_recording(
    content: bytes, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "x.jsonl").write_bytes(content)
    _refused(tmp_path / "x.jsonl", message, capsys)


def test_damage_in_the_middle_is_not_taken_for_a_kill(
    recorded: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parts = recorded.read_bytes().splitlines(keepends=True)
    recorded.write_bytes(parts[0] + parts[1][:50] + b"\n" + parts[2])
    _refused(recorded, "line 2, is no JSON object", capsys)


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
    first._evaluate()
    for step in range(11):
        first._one_step()
        if first.step in setting().evaluation_steps:
            first._evaluate()
        if step == 7:
            first.save()  # at 8 steps; the samples of 9 are lost with the steps
    first.file.close()
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
    assert len(re.findall("<img src=.data:image/png;base64,iVBOR", page)) == 4
    assert "What muonw lr 0.004 seed 0 did" in page
    # A recording that is damaged afterwards is said, and the comparison is reported all the same.
    (out / "runs" / key / "monitor.jsonl").write_text("no recording\n")
    assert main([*command, "--out", str(out)]) == 0
    page = (out / "report.html").read_text()
    assert len(re.findall("<img src=.data:image/png;base64,iVBOR", page)) == 2
    assert "draw a copy that lies in no run" in page
    assert main([*command[:-2], "--out", str(out)]) == 2
    assert "holds a comparison with monitor = 4, not null" in capsys.readouterr().err


def test_pictures_are_the_same_each_time(recorded: Path) -> None:
    assert draw(read(recorded), "x") == draw(read(recorded), "x")
