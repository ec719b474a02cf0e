"""A training that begins again after one that ended with an error: the callbacks go on."""

from __future__ import annotations

import importlib
import json
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from muonkit import Muon


@pytest.mark.parametrize("trainer", ["transformers", "lightning"])
def test_a_monitor_is_made_anew_where_a_training_ended_with_an_error(
    trainer: str, tmp_path: Path
) -> None:
    pytest.importorskip(trainer)
    integration: Any = importlib.import_module(f"muonkit.integrations.{trainer}")
    p = torch.nn.Parameter(torch.ones(4, 6))
    p.grad = torch.ones(4, 6)
    optimizer = Muon([p])
    recording = tmp_path / "muon.jsonl"
    callback = integration.MonitorCallback(every=1, to=recording, spectra=())

    def begin(step: int) -> None:
        if trainer == "transformers":
            state = types.SimpleNamespace(global_step=step)
            callback.on_train_begin(None, state, None, optimizer=optimizer)
        else:
            at = types.SimpleNamespace(global_step=step, optimizers=[optimizer], loggers=[])
            callback.on_train_start(at, None)

    begin(0)
    optimizer.step()
    first = callback.monitor
    begin(1)  # as with auto_find_batch_size, or after Ctrl-C in a notebook
    optimizer.step()
    assert first.step == 1
    assert callback.monitor.step == 2
    callback.on_train_end(*[None] * (3 if trainer == "transformers" else 2))
    if trainer == "lightning":  # which tells of an error, so that the file is closed at once
        begin(2)
        callback.on_exception(None, None, KeyboardInterrupt())
        assert not callback.monitor._sinks
    lines = list(map(json.loads, recording.read_text().splitlines()))
    assert [line["step"] for line in lines if "step" in line] == [1, 2]
