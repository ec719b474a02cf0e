"""Weights & Biases: scalars of everything, histograms of singular values."""

from __future__ import annotations

from typing import Any

from muonkit.monitor.trackers.flat import histograms, load, scalars

__all__ = ["WandB"]


class WandB:
    """A sink of `muonkit.Monitor`.

    Its metrics have an axis of their own, `muon/step`, so that they do not meddle with the steps
    that the training counts.

    Args:
        run: a run of `wandb.init` that there is, and that is not finished here; None makes one.
        init: arguments for `wandb.init` where it is made here; `close` finishes it.

    Raises:
        ImportError: wandb is not installed.
    """

    def __init__(self, run: Any = None, **init: Any) -> None:
        self._wandb = load("wandb", "wandb")
        self._owned = run is None
        self.run = self._wandb.init(**init) if self._owned else run
        self.run.define_metric("muon/step")
        self.run.define_metric("muon/*", step_metric="muon/step")

    def __call__(self, sample: dict[str, Any]) -> None:
        numbers = {f"muon/{name}": value for name, value in scalars(sample).items()}
        drawn = {
            f"muon/{name}/sigma": self._wandb.Histogram(values)
            for name, values in histograms(sample).items()
        }
        self.run.log({"muon/step": sample["step"], **numbers, **drawn})

    def close(self) -> None:
        if self._owned:
            self.run.finish()
