"""The examples at several ranks give the losses of one process, and survive a killed rank.

The ranks are forked from a process that has imported torch (`distributed_helpers.run`); one run is
by `torchrun`, as the examples' own commands are.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import io
import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

from tests.helpers.paths import ROOT
from tests.helpers.ranks import counted_collectives, run

EXAMPLES = ROOT / "examples"
# Small, and still through a warm-up, a step at the peak, and decay.
SHORT = ["--steps", "4", "--every", "1", "--batch", "4"]
# Losses are printed with six decimals. Ranks sum in another order than one process does: in six
# steps of every layout that changed no loss by more than 1e-6, the last decimal.
TOLERANCE = 1e-5


def losses(output: str) -> dict[int, float]:
    found = re.findall(r"^step +(\d+)  loss ([\d.]+)$", output, re.MULTILINE)
    return {int(step): float(loss) for step, loss in found}


def printed(example: str, *arguments: str) -> str:
    """What the example prints in this process: without ranks, or as one of `run`'s."""
    output = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(output):
        patch.syspath_prepend(str(EXAMPLES))
        patch.setattr(sys, "argv", [example, *SHORT, *arguments])
        if dist.is_initialized():
            # As torchrun says it; but the group is there already, and outlives the example.
            patch.setenv("WORLD_SIZE", str(dist.get_world_size()))
            patch.setattr(dist, "init_process_group", lambda *_, **__: None)
            patch.setattr(dist, "destroy_process_group", lambda *_, **__: None)
        runpy.run_path(str(EXAMPLES / f"{example}.py"), run_name="__main__")
    return output.getvalue()


@functools.cache
def alone(example: str, *arguments: str) -> dict[int, float]:
    """The losses of one process."""
    return losses(printed(example, *arguments))


def on_ranks(count: int, example: str, *arguments: str) -> str:
    """What rank 0 printed; the others print nothing."""
    name = " ".join([example, *arguments])
    outcome = run(count, {name: functools.partial(printed, example, *arguments)}, timeout=120)
    first, *others = outcome[name].check()
    assert not any(others)
    return str(first)


@pytest.mark.whole  # under torchrun they run below
@pytest.mark.parametrize(("example", "ranks"), [("train_fsdp2", 2), ("train_dp_tp_zero1", 4)])
def test_losses_are_those_of_one_process(example: str, ranks: int) -> None:
    expected = alone(example)
    assert list(expected) == [1, 2, 3, 4]
    assert losses(on_ranks(ranks, example)) == pytest.approx(expected, abs=TOLERANCE)


def test_losses_under_torchrun_are_those_of_one_process() -> None:
    command = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [sys.executable, "-m", *command, str(EXAMPLES / "train_ddp.py"), *SHORT],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    expected = alone("train_ddp")
    assert list(expected) == [1, 2, 3, 4]
    assert losses(done.stdout) == pytest.approx(expected, abs=TOLERANCE)


def printed_and_scattered(*arguments: str) -> tuple[str, int]:
    """As `printed`, of train_ddp, with the bytes that this rank sent by reduce-scatter."""
    with counted_collectives() as calls:
        output = printed("train_ddp", *arguments)
    return output, sum(sent for name, sent in calls if name.startswith("reduce_scatter"))


def test_reduce_scatter_sends_half_of_the_gradients_and_gives_the_losses_of_one_process() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLES))
        model = importlib.import_module("common").gpt(0)
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    cases = {
        "whole": printed_and_scattered,
        "scattered": functools.partial(printed_and_scattered, "--reduce-scatter"),
    }
    found = {name: outcome.check() for name, outcome in run(2, cases, timeout=120).items()}
    assert [sent for _, sent in found["whole"]] == [0, 0]
    # Four steps, one of two halves; a bucket's halves are made as long as the longer one.
    for _, sent in found["scattered"]:
        assert sent == pytest.approx(4 * size / 2, rel=0.01)
    expected = alone("train_ddp")
    for ranks in found.values():
        assert losses(ranks[0][0]) == pytest.approx(expected, abs=TOLERANCE)


@pytest.mark.whole
def test_four_ranks_give_the_losses_of_one_process_which_goes_on_from_their_checkpoint(
    tmp_path: Path,
) -> None:
    example, folder, steps = "train_fsdp2_tp", tmp_path / "checkpoints", ("--steps", "6")
    expected = alone(example, *steps)
    save = (*steps, "--checkpoint", str(folder), "--save-every", "2")
    assert losses(on_ranks(4, example, *save)) == pytest.approx(expected, abs=TOLERANCE)
    # The last two are kept, and nothing half written is.
    assert sorted(p.name for p in folder.iterdir()) == ["step-000004", "step-000006"]
    # As if the last had not been finished.
    (folder / "step-000006").rename(folder / "step-000006.part")
    again = printed(example, *save, "--resume")
    assert f"going on from {folder / 'step-000004'}" in again
    # Step 5's loss is of the parameters in the checkpoint, step 6's of the momentum too.
    remaining = {step: expected[step] for step in (5, 6)}
    assert losses(again) == pytest.approx(remaining, abs=TOLERANCE)
    assert sorted(p.name for p in folder.iterdir()) == ["step-000004", "step-000006"]


def test_separate_projections_are_the_same_model() -> None:
    fused, separate = (alone(name) for name in ("train_ddp", "train_fsdp2_tp"))
    assert separate == pytest.approx(fused, abs=TOLERANCE)


def test_checkpoints_of_another_run_are_not_written_over(tmp_path: Path) -> None:
    (tmp_path / "step-000002").mkdir()
    with pytest.raises(SystemExit, match="--resume"):
        printed("train_ddp", "--checkpoint", str(tmp_path))


def test_a_checkpoint_with_a_flipped_bit_is_refused(tmp_path: Path) -> None:
    save = ("--checkpoint", str(tmp_path), "--save-every", "2")
    printed("train_ddp", *save)
    last = tmp_path / "step-000004"
    parts = sorted(last.iterdir())
    assert len(parts) == 3  # what is where, one rank's part, and the sums
    for part in parts:
        sound = part.read_bytes()
        part.write_bytes(sound[:40] + bytes([sound[40] ^ 1]) + sound[41:])
        with pytest.raises(SystemExit, match=f"{last} is damaged .*: delete {last}, to go on"):
            printed("train_ddp", *save, "--resume", "--steps", "6")
        part.write_bytes(sound)
    assert losses(printed("train_ddp", *save, "--resume", "--steps", "5")).keys() == {5}


def test_checkpoints_are_in_the_order_of_their_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    checkpoints = importlib.import_module("common").Checkpoints(tmp_path, 0)
    for step in ("000050", "999950", "1000000", "1000050.part"):
        (tmp_path / f"step-{step}").mkdir()
    assert [path.name for path in checkpoints._whole()] == [
        "step-000050",
        "step-999950",
        "step-1000000",
    ]
    assert checkpoints.latest().name == "step-1000000"


# --- train_gpt.py ---

SMALL = [
    "--width",
    "32",
    "--layers",
    "2",
    "--heads",
    "2",
    "--context",
    "32",
    "--steps",
    "6",
    "--validate-every",
    "3",
]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(Path(__file__).read_text(encoding="utf-8"), encoding="utf-8")
    return path


def logged(path: Path) -> list[dict[str, float]]:
    """Every line of the log but the seconds, which are of no two runs the same."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


@pytest.mark.parametrize("optimizer", ["muonw", "adamw"])
def test_a_resumed_gpt_has_the_losses_of_one_that_was_never_stopped(
    optimizer: str, text: Path, tmp_path: Path
) -> None:
    folder, log = tmp_path / "checkpoints", tmp_path / "log.jsonl"
    words = [*SMALL, "--optimizer", optimizer, "--text", str(text), "--log", str(log)]
    words += ["--checkpoint", str(folder), "--save-every", "2"]
    printed("train_gpt", *words)
    expected = logged(log)
    assert [line.get("step") for line in expected] == [None, 1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in expected if "validation_loss" in line] == [3, 6]
    assert expected[-1]["validation_loss"] < expected[3]["validation_loss"] < expected[1]["loss"]
    # As if it had been killed in its sixth step, amidst a line.
    (folder / "step-000006").rename(folder / "step-000006.part")
    log.write_text(log.read_text(encoding="utf-8")[:-20], encoding="utf-8")
    assert losses(printed("train_gpt", *words, "--resume")).keys() == {5, 6}
    assert logged(log) == expected


def test_a_log_of_another_run_is_refused_and_left_as_it_is(text: Path, tmp_path: Path) -> None:
    save = ["--checkpoint", str(tmp_path / "a"), "--save-every", "2", "--text", str(text)]
    own, other = tmp_path / "own.jsonl", tmp_path / "other.jsonl"
    printed("train_gpt", *SMALL, *save, "--log", str(own))
    lines = own.read_text(encoding="utf-8").splitlines(keepends=True)
    told = {
        "seed, lr": [json.dumps({**json.loads(lines[0]), "lr": 9.0, "seed": 5}) + "\n", *lines[1:]],
        "a step is missing": lines[:-1],
    }
    more = [*SMALL, *save, "--resume", "--steps", "9"]
    for what, written in told.items():
        other.write_text("".join(written), encoding="utf-8")
        with pytest.raises(
            SystemExit, match=r"is not the log of this run's first 6 steps"
        ) as error:
            printed("train_gpt", *more, "--log", str(other))
        assert all(word in str(error.value) for word in what.split(", "))
        assert other.read_text(encoding="utf-8") == "".join(written)
    printed("train_gpt", *more, "--log", str(own))
    assert [line.get("step") for line in logged(own)] == [None, *range(1, 10)]


def test_a_gpt_on_two_ranks_has_the_losses_of_one_process(text: Path) -> None:
    words = (*SMALL, "--tied", "--text", str(text), "--ns-dtype", "float32")
    expected = losses(printed("train_gpt", *words))
    assert losses(on_ranks(2, "train_gpt", *words)) == pytest.approx(expected, abs=TOLERANCE)


def test_the_rate_of_a_gpt_rises_stays_and_falls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    factor = importlib.import_module("train_gpt").lr_factor
    found = [factor(step, 8, 0.25, 0.5) for step in range(8)]
    assert found == [0.5, 1.0, 1.0, 1.0, 1.0, 0.75, 0.5, 0.25]


@pytest.mark.parametrize(
    ("content", "words", "told"),
    [
        (b"too short", SMALL, r"--text has 9 bytes.* longer than a window of 32 bytes"),
        (b"a" * 1000, ["--width", "30"], r"--width 30 is not 4 heads"),
        (None, SMALL, r"--text .*: No such file"),
    ],
)
def test_what_a_gpt_cannot_be_trained_on_is_told(
    content: bytes | None, words: list[str], told: str, tmp_path: Path
) -> None:
    path = tmp_path / "other.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SystemExit, match=told):
        printed("train_gpt", *words, "--text", str(path), "--context", "32")


@pytest.mark.parametrize("option", ["--every", "--save-every", "--steps", "--layers"])
def test_a_number_of_nothing_is_refused(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        printed("train_gpt", option, "0")
    told = f"argument {option}: expected a whole number of at least 1, got '0'"
    assert told in capsys.readouterr().err


def test_a_killed_rank_ends_all_and_the_resumed_run_is_equal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One run of ``benchmarks/kill.py``, which raises at the first promise that is broken."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    arguments = "--runs 1 --forked --layouts train_ddp:2 --steps 6 --save-every 2"
    monkeypatch.setattr(sys, "argv", ["kill.py", *arguments.split()])
    importlib.import_module("kill").main()
    assert "1 runs: all other ranks ended with an error" in capsys.readouterr().out
