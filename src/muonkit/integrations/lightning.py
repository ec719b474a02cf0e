"""Lightning: a monitor that writes to the Trainer's loggers::

    trainer = lightning.Trainer(callbacks=[MonitorCallback(every=100)])

The optimizer needs nothing of this: `configure_optimizers` returns `MuonW(self)`, and checkpoints
with `zero=1` are whole, since Lightning calls `consolidate_state_dict` by itself.
"""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback

from muonkit.integrations._trainers import unwrapped
from muonkit.monitor.monitor import Monitor
from muonkit.monitor.trackers.flat import scalars

__all__ = ["MonitorCallback"]


class MonitorCallback(Callback):
    """A `muonkit.Monitor` of the Trainer's first optimizer, with that one's arguments.

    `monitor` is the Monitor itself; what it measures goes to the Trainer's loggers, as
    `muon/matrix/blocks.0.qkv.weight/update_rms` and the like, unless `to` says where else.
    """

    def __init__(self, every: int = 100, to: Any = None, **options: Any) -> None:
        self._every, self._to, self._options = every, to, options
        self.monitor: Monitor | None = None

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        def log(sample: dict[str, Any]) -> None:
            numbers = {f"muon/{name}": value for name, value in scalars(sample).items()}
            for logger in trainer.loggers:
                logger.log_metrics(numbers, step=sample["step"])

        self.on_train_end(trainer, pl_module)  # of a training that ended with an error
        options = {"start": trainer.global_step, **self._options}
        optimizer = unwrapped(trainer.optimizers[0])
        to = log if self._to is None else self._to
        self.monitor = Monitor(optimizer, self._every, to, **options)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        if self.monitor is not None:
            self.monitor.close()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self.on_train_end(trainer, pl_module)
