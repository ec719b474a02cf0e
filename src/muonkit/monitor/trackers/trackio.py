"""Trackio: scalars of everything, histograms of singular values."""

from __future__ import annotations

from typing import Any

from muonkit.monitor.trackers.flat import histograms, load, scalars

__all__ = ["Trackio"]


class Trackio:
    """A sink of `muonkit.Monitor`.

    Args:
        run: a run of `trackio.init` that there is, and that is not finished here; None makes one.
        init: arguments for `trackio.init` where it is made here (`project=` is needed); `close`
            finishes it.

    Raises:
        ImportError: trackio is not installed.
    """

    def __init__(self, run: Any = None, **init: Any) -> None:
        self._trackio = load("trackio", "trackio")
        self._owned = run is None
        self.run = self._trackio.init(**init) if self._owned else run

    def __call__(self, sample: dict[str, Any]) -> None:
        numbers = {f"muon/{name}": value for name, value in scalars(sample).items()}
        drawn = {
            f"muon/{name}/sigma": self._trackio.Histogram(values)
            for name, values in histograms(sample).items()
        }
        self.run.log({**numbers, **drawn}, step=sample["step"])

    def close(self) -> None:
        if self._owned:
            self.run.finish()
