"""TensorBoard: scalars of everything, histograms of singular values."""

from __future__ import annotations

import os
from typing import Any

import torch

from muonkit.monitor.trackers.flat import histograms, load, scalars

__all__ = ["TensorBoard"]


class TensorBoard:
    """A sink of `muonkit.Monitor`.

    Args:
        to: the folder for the event file, or a `torch.utils.tensorboard.SummaryWriter` that there
            is; that one is flushed, and left open.

    Raises:
        ImportError: tensorboard is not installed.
    """

    def __init__(self, to: str | os.PathLike[str] | Any) -> None:
        load("tensorboard", "tensorboard")
        self.writer: Any = to
        self._owned = isinstance(to, str | os.PathLike)
        if self._owned:
            writer = load("torch.utils.tensorboard", "tensorboard").SummaryWriter
            self.writer = writer(os.fspath(to))

    def __call__(self, sample: dict[str, Any]) -> None:
        step = sample["step"]
        for name, value in scalars(sample).items():
            self.writer.add_scalar(f"muon/{name}", value, step)
        for name, values in histograms(sample).items():
            self.writer.add_histogram(f"muon/{name}", torch.tensor(values), step)
        self.writer.flush()

    def close(self) -> None:
        if self._owned:
            self.writer.close()
