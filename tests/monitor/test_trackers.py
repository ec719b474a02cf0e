"""The monitor's sinks: what each tracker was given, read back with its own means where it has any.

trackio is not among the locked packages (it wants an older pillow than they have): its sink is
held to the calls that it makes, on a stand-in module of a few lines, and read back where it is
installed.
"""

from __future__ import annotations

import importlib.util
import json
import os
import struct
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from muonkit import Monitor, Muon, MuonW
from muonkit.monitor.trackers.flat import histograms, scalars
from muonkit.monitor.trackers.tensorboard import TensorBoard
from muonkit.monitor.trackers.trackio import Trackio
from muonkit.monitor.trackers.wandb import WandB
from tests.helpers.optim import parameter, set_gradients
from tests.helpers.paths import ROOT


def sampled(to: Any, steps: int = 3) -> list[dict[str, Any]]:
    """Samples of a training with a fused projection and an AdamW parameter."""
    qkv, gain = parameter(12, 4), parameter(4, seed=1)
    optimizer = Muon(
        [
            {"params": [("qkv", qkv)], "view": "split(rows=3)"},
            {"params": [("gain", gain)], "algorithm": "adamw", "lr": 0.1},
        ]
    )
    samples: list[dict[str, Any]] = []
    with Monitor(optimizer, every=2, to=[to, samples.append]):
        for t in range(steps):
            set_gradients([qkv, gain], t)
            optimizer.step()
    return samples


def test_every_number_has_a_name_of_its_own() -> None:
    sample = sampled(lambda _: None)[-1]
    numbers = scalars(sample)
    one = sample["matrices"][1]
    assert numbers["matrix/qkv[1]/update_rms"] == one["update_rms"]
    assert (
        numbers["matrix/qkv[1]/momentum/stable_rank"] == one["spectra"]["momentum"]["stable_rank"]
    )
    assert numbers["parameter/gain/lr"] == 0.1
    assert numbers["group/0 muon/weight_decay"] == 0.1
    assert numbers["rank/0/bytes_to_owners"] == 0
    assert all(isinstance(value, float | int) for value in numbers.values())
    assert len(histograms(sample)) == 9
    # What is None has no number.
    sample["matrices"][1] = {**one, "update_rms": None, "spectra": {"weight": None}}
    assert "matrix/qkv[1]/update_rms" not in scalars(sample)
    assert len(histograms(sample)) == 6


def test_tensorboard_reads_back_what_was_measured(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    samples = sampled(TensorBoard(tmp_path))
    events = EventAccumulator(str(tmp_path), size_guidance={"scalars": 0, "histograms": 0})
    events.Reload()
    for name in scalars(samples[0]):
        read = [(event.step, event.value) for event in events.Scalars(f"muon/{name}")]
        # Event files have float32.
        expected = [(s["step"], pytest.approx(scalars(s)[name], rel=1e-6)) for s in samples]
        assert read == expected, name
    drawn = events.Histograms("muon/matrix/qkv[0]/weight")
    assert [event.step for event in drawn] == [1, 2]
    assert drawn[0].histogram_value.num == 17
    spectrum = samples[0]["matrices"][0]["spectra"]["weight"]
    assert drawn[0].histogram_value.max == pytest.approx(spectrum["max"], rel=1e-6)


def test_a_tensorboard_writer_of_ones_own_stays_open(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(tmp_path)) as writer:
        sampled(TensorBoard(writer))
        writer.add_scalar("mine", 1.0, 1)


def wandb_history(path: Path) -> list[dict[str, Any]]:
    """What a run logged. Its file is a LevelDB log: blocks of 32 KiB, in which each part of a
    record has a head of 7 bytes (checksum, length, type: 1 is whole, 2 to 4 first, middle, last).
    """
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, part, rows = path.read_bytes(), 7, b"", []
    while at + 7 <= len(data):
        left = 2**15 - at % 2**15
        if left < 7:
            at += left
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        part += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            record = Record.FromString(part)
            part = b""
            if record.WhichOneof("record_type") == "history":
                items = record.history.item
                rows.append(
                    {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in items}
                )
    return rows


@pytest.mark.whole
def test_wandb_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    for name in ("WANDB_DIR", "WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.setenv("WANDB_MODE", "offline")
    # Its service is a process of its own, which a busy machine may not start in 30 s.
    monkeypatch.setenv("WANDB_X_SERVICE_WAIT", "200")
    monkeypatch.setenv("WANDB_SILENT", "true")
    samples = sampled(WandB(project="muonkit"))
    wandb.teardown()  # its service may still be writing
    (path,) = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    history = wandb_history(path)
    assert [row["muon/step"] for row in history] == [1, 2]
    for row, sample in zip(history, samples, strict=True):
        for name, value in scalars(sample).items():
            assert row[f"muon/{name}"] == pytest.approx(value)
        assert sum(row["muon/matrix/qkv[0]/weight/sigma/values"]) == 17


class FakeRun:
    """As trackio.Run: what is logged, and whether it was finished."""

    def __init__(self, **options: Any) -> None:
        self.options, self.logged, self.finished = options, [], False

    def log(self, metrics: dict[str, Any], step: int | None = None) -> None:
        self.logged.append((step, metrics))

    def finish(self) -> None:
        self.finished = True


def test_trackio_is_called_as_its_documentation_says(monkeypatch: pytest.MonkeyPatch) -> None:
    fake: Any = types.ModuleType("trackio")
    fake.init, fake.Histogram = FakeRun, tuple
    monkeypatch.setitem(sys.modules, "trackio", fake)
    sink = Trackio(project="muonkit", name="one")
    samples = sampled(sink)
    assert sink.run.options == {"project": "muonkit", "name": "one"}
    assert [step for step, _ in sink.run.logged] == [1, 2]
    _, metrics = sink.run.logged[-1]
    assert metrics["muon/group/0 muon/update_norm"] == samples[-1]["groups"][0]["update_norm"]
    assert len(metrics["muon/matrix/qkv[0]/update/sigma"]) == 17
    assert sink.run.finished
    mine = FakeRun()
    sampled(Trackio(mine))
    assert len(mine.logged) == 2
    assert not mine.finished


# A process of its own: trackio reads its folder when it is imported.
TRACKIO = """
import json, sys
from tests.monitor.test_trackers import sampled, scalars
from muonkit.monitor.trackers.trackio import Trackio
samples = sampled(Trackio(project="muonkit", name="one"))
from trackio.sqlite_storage import SQLiteStorage
rows = SQLiteStorage.get_logs("muonkit", "one")
assert [row["step"] for row in rows] == [1, 2]
for row, sample in zip(rows, samples, strict=True):
    for name, value in scalars(sample).items():
        assert abs(row[f"muon/{name}"] - value) <= 1e-9 * abs(value), name
    assert sum(row["muon/matrix/qkv[0]/weight/sigma"]["values"]) == 17
"""


def test_trackio_reads_back_what_was_measured(tmp_path: Path) -> None:
    if importlib.util.find_spec("trackio") is None:
        pytest.skip("pip install trackio")
    done = subprocess.run(
        [sys.executable, "-c", TRACKIO],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "TRACKIO_DIR": str(tmp_path)},
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("name", "make"),
    [("tensorboard", lambda: TensorBoard("runs")), ("wandb", WandB), ("trackio", Trackio)],
)
def test_a_tracker_that_is_not_installed(
    name: str, make: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, name, None)  # as if it were not there
    with pytest.raises(ImportError, match=f"pip install {name}$") as caught:
        make()
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_no_tracker_is_imported_before_its_sink_is_made() -> None:
    import subprocess

    code = (
        "import sys; import muonkit.monitor.trackers.tensorboard, muonkit.monitor.trackers.wandb, "
        "muonkit.monitor.trackers.trackio; "
        "print(sorted({'tensorboard', 'wandb', 'trackio'} & set(sys.modules)))"
    )
    shown = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=120
    )
    assert shown.stdout.strip() == "[]"


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(8, 4), nn.Linear(4, 6), nn.Linear(6, 4), nn.Linear(4, 8))


def test_the_factory_reads_the_training_arguments() -> None:
    pytest.importorskip("transformers")
    from muonkit.integrations.transformers import MuonWFactory, muonw

    args = types.SimpleNamespace(
        learning_rate=0.125, weight_decay=0.25, adam_beta1=0.5, adam_beta2=0.75, adam_epsilon=0.5
    )
    adamw = {"lr": 0.125, "weight_decay": 0.25, "betas": (0.5, 0.75), "eps": 0.5}

    def groups(optimizer: Any) -> dict[str, dict[str, Any]]:
        assert type(optimizer) is MuonW
        # The matrices' and the embedding's; others are not decayed.
        return {g["algorithm"]: g for g in optimizer.param_groups if g["weight_decay"]}

    kind, options = muonw(args, momentum=0.5)
    # As transformers calls it, as axolotl does (with the two of AdamW by its names), as a partial.
    for optimizer in (
        kind()(model(), **options),
        MuonWFactory()(model(), args, momentum=0.5, betas=(0.5, 0.75), eps=0.5),
        MuonWFactory()(model(), momentum=0.5, **adamw),
    ):
        got = groups(optimizer)
        assert {key: got["adamw"][key] for key in adamw} == adamw
        muon = {"lr": 0.125, "weight_decay": 0.25, "momentum": 0.5}
        assert {key: got["muon"][key] for key in muon} == muon
    # What is said goes before what is read, AdamW's by either name.
    for said in ({"betas": (0.0, 0.5)}, {"adamw_betas": (0.0, 0.5)}):
        kind, options = muonw(args, lr=0.5, weight_decay=1.0, **said)
        got = groups(kind()(model(), **options))
        assert (got["muon"]["lr"], got["muon"]["weight_decay"]) == (0.5, 1.0)
        assert got["adamw"]["betas"] == (0.0, 0.5)


def test_what_is_not_ours_is_refused_by_its_name() -> None:
    from muonkit.integrations._trainers import unwrapped

    inner = MuonW(model())
    wrapped = types.SimpleNamespace(optimizer=types.SimpleNamespace(optimizer=inner))
    assert unwrapped(wrapped) is inner
    other = types.SimpleNamespace(optimizer=torch.optim.AdamW(model().parameters()))
    with pytest.raises(TypeError, match=r"the trainer has AdamW: give it MuonW\(model\)"):
        unwrapped(other)


def test_timm_makes_it_by_name() -> None:
    reason = "timm, and the torchvision that it needs, have no build for this torch"
    optim = pytest.importorskip("timm.optim", reason=reason, exc_type=ImportError)
    from muonkit.integrations.timm import register

    register()
    register()  # twice is once
    made = model()
    made.no_weight_decay = lambda: {"0.*"}
    options = {"lr": 0.125, "weight_decay": 0.25, "betas": (0.5, 0.75), "eps": 0.5}
    optimizer = optim.create_optimizer_v2(made, opt="muonw", **options)
    assert type(optimizer) is MuonW
    named = {
        name: (group["algorithm"], group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for name in group["param_names"]
    }
    assert named["0.weight"] == ("adamw", 0.125, 0.0)
    assert named["1.weight"] == named["2.weight"] == ("muon", 0.125, 0.25)
    assert named["3.weight"] == ("adamw", 0.125, 0.25)
    assert all(group.get("betas", (0.5, 0.75)) == (0.5, 0.75) for group in optimizer.param_groups)
    # One rate for each layer; timm's schedulers move them together.
    made.group_matcher = lambda coarse: {"stem": r"^0", "blocks": r"^(\d+)"}
    optimizer = optim.create_optimizer_v2(made, opt="muonw", layer_decay=0.5, **options)
    rates = {name: group["lr"] for group in optimizer.param_groups for name in group["param_names"]}
    assert len(set(rates.values())) > 2
    assert rates["1.weight"] == rates["2.weight"] / 2
    with pytest.raises(ValueError, match="give lr too"):
        optim.create_optimizer_v2(made, opt="muonw", layer_decay=0.5)
    with pytest.raises(TypeError, match=r"MuonW\(model\)"):
        optim.create_optimizer_v2(made.parameters(), opt="muonw", lr=0.125)
    assert type(optim.create_optimizer_v2(made, opt="adamw", lr=0.125)) is torch.optim.AdamW
