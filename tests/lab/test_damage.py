"""Damage: torn files of a run and runs that explode are named, and leave the rest well."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from muonkit.lab import plots
from muonkit.lab.cli import main
from muonkit.lab.data import digits
from muonkit.lab.errors import DataError, Interrupted, LabError
from muonkit.lab.results import Curve
from muonkit.lab.store import read_sealed, write_sealed
from muonkit.lab.tasks import TASKS
from muonkit.lab.train import Run, Setting, StopRequest, Trainer, train
from tests.helpers import lab
from tests.helpers.lab import Silent, losses, read_records, write_cifar


def setting(steps: int = 40) -> Setting:
    return Setting(TASKS["digits"], digits(), steps, 32)


def interrupted(folder: Path) -> Run:
    """A run that stopped half-way, with its checkpoint."""
    run = Run("adamw", 0.004, 0)
    trainer = Trainer(run, setting(), folder, StopRequest(), Silent())
    lab.advance(trainer, 20)
    return run


@pytest.mark.parametrize("damage", ["empty", "truncated", "other", "no lines", "torn line"])
def test_a_damaged_checkpoint_is_refused_with_the_remedy(damage: str, tmp_path: Path) -> None:
    run = interrupted(tmp_path / "run")
    train(run, setting(), tmp_path / "whole", StopRequest(), Silent())
    checkpoint, lines = tmp_path / "run/checkpoint.pt", tmp_path / "run/measurements.jsonl"
    named = checkpoint
    if damage == "empty":
        checkpoint.write_bytes(b"")
    elif damage == "truncated":
        checkpoint.write_bytes(checkpoint.read_bytes()[:1000])
    elif damage == "other":
        checkpoint.write_bytes(b"not a checkpoint")
    else:
        content, named = lines.read_bytes(), lines
        lines.write_bytes(b"" if damage == "no lines" else content[:-40])
    before = {path: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    with pytest.raises(LabError, match=f"{named}.*delete the folder.*trains that run anew"):
        train(run, setting(), tmp_path / "run", StopRequest(), Silent())
    after = {path: path.read_bytes() for path in before}
    assert after == before, "what is damaged may be of use yet"
    shutil.rmtree(tmp_path / "run")  # the remedy
    train(run, setting(), tmp_path / "run", StopRequest(), Silent())
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


@pytest.mark.parametrize(
    "damage", ["{}", "[]", "no json", '{"val_loss": "low"}', "extra", "no lines", "fewer lines"]
)
def test_a_damaged_result_is_an_error_with_the_remedy(damage: str, tmp_path: Path) -> None:
    run = Run("adamw", 0.004, 0)
    train(run, setting(), tmp_path, StopRequest(), Silent())
    result, lines = tmp_path / "result.json", tmp_path / "measurements.jsonl"
    named = result
    if damage == "no lines":
        lines.unlink()
        named = lines
    elif damage == "fewer lines":
        lines.write_bytes(b"".join(lines.read_bytes().splitlines(keepends=True)[:-3]))
        named = lines
    elif damage == "extra":
        write_sealed(result, {**read_sealed(result), "version": 9})
    else:
        result.write_text(damage)
    with pytest.raises(LabError, match=f"{named}.*delete the folder"):
        train(run, setting(), tmp_path, StopRequest(), Silent())


def test_a_stop_on_the_step_that_diverges_does_not_lose_the_divergence(tmp_path: Path) -> None:
    class AtOnce(StopRequest):
        """Ctrl-C during the very step whose loss is no number."""

        def __init__(self) -> None:
            super().__init__()
            self.received = True

    run = Run("sgd", 1e30, 0)
    for steps in (1, 40):
        whole = train(run, setting(steps), tmp_path / f"w{steps}", StopRequest(), Silent())
        for _ in range(50):  # stop after every single step
            try:
                stopped = train(run, setting(steps), tmp_path / f"s{steps}", AtOnce(), Silent())
                break
            except Interrupted:
                continue
        assert losses(tmp_path / f"s{steps}") == losses(tmp_path / f"w{steps}")
        assert stopped.diverged == whole.diverged
    assert whole.diverged


def test_a_run_that_explodes_does_not_press_the_others_flat(tmp_path: Path) -> None:
    outcomes, records = [], {}
    for name, lr in (("muonw", 0.004), ("adamw", 1e6), ("sgd", 30.0)):
        result = train(Run(name, lr, 0), setting(), tmp_path / name, StopRequest(), Silent())
        records[f"{name}/0"] = read_records(tmp_path / name / "measurements.jsonl")
        outcomes.append((result, Curve.of(records[f"{name}/0"])))
    limits = lab.limits(outcomes, records)
    assert limits is not None
    low, high = limits
    sound = outcomes[0][1].losses
    assert 0 < low <= min(sound)
    assert high == max(curve.losses[0] for _, curve in outcomes) < 4
    assert plots.loss_plot("t", "step", outcomes, records)[:4] == b"\x89PNG"
    assert lab.smoothed([1.0, 1e27, 1.0, 1.0, 1.0], 2)[-1] == 1.0


def test_a_cifar_file_with_one_wrong_bit_is_refused(tmp_path: Path) -> None:
    path = write_cifar(tmp_path / "cifar-10-binary.tar.gz")
    from muonkit.lab.data import read_cifar

    read_cifar(path)
    whole = path.read_bytes()
    # The checksum stands for the data here: these are zeros, among which a wrong bit of the packed
    # file can still stand for the same zeros.
    for damaged in (whole[:-8] + bytes([whole[-8] ^ 1]) + whole[-7:], whole[:-4]):
        path.write_bytes(damaged)
        with pytest.raises(DataError):
            read_cifar(path)


def test_brackets_in_a_path_are_printed_as_they_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "o_[red]x[/b]"
    words = ["compare", "digits", "--steps", "3", "--optimizers", "adamw", "--out", str(out)]
    assert main(words) == 0
    first = capsys.readouterr().out
    assert f"report: {out}/report.html" in first
    assert "nothing was trained" not in first
    assert main(words) == 0
    assert "nothing was trained" in capsys.readouterr().out


def test_a_wrong_rule_is_the_users_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["route", "gpt2", "--rule", "a.weight=muon:bogus"]) == 2
    assert capsys.readouterr().err.startswith(
        "error: --rule 'a.weight=muon:bogus': Rule('a.weight'): unknown view 'bogus'"
    )
