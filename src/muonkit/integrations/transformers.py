"""transformers' Trainer, and those made of it (TRL's, axolotl's): MuonW from their arguments, whole
checkpoints with ZeRO-1, a monitor::

    from muonkit.integrations.transformers import ConsolidateBeforeSave, muonw

    trainer = Trainer(model, args, ..., optimizer_cls_and_kwargs=muonw(args))
    trainer = Trainer(  # DDP with ZeRO-1
        model, args, ...,
        optimizer_cls_and_kwargs=muonw(args, process_group=dist.group.WORLD, zero=1),
        callbacks=[ConsolidateBeforeSave()],
    )
"""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from muonkit.integrations._trainers import consolidate, rank_0_has_a_part, unwrapped
from muonkit.monitor.monitor import Monitor
from muonkit.muonw import MuonW

__all__ = ["ConsolidateBeforeSave", "MonitorCallback", "MuonWFactory", "muonw"]


class MuonWFactory:
    """Makes MuonW of a model. transformers calls `MuonWFactory()(model, **options)`, axolotl
    `MuonWFactory()(model, training_args, **options)`.

    What the options do not say is read from the TrainingArguments: lr, weight decay, and AdamW's
    betas and epsilon. `betas` and `eps` among the options are AdamW's; all others are `MuonW`'s.
    """

    def __call__(self, model: Any, training_args: Any = None, **options: Any) -> MuonW:
        read: dict[str, Any] = {}
        if training_args is not None:
            read = {
                "lr": training_args.learning_rate,
                "weight_decay": training_args.weight_decay,
                "betas": (training_args.adam_beta1, training_args.adam_beta2),
                "eps": training_args.adam_epsilon,
            }
        for name in ("betas", "eps"):
            for told in (read, options):
                if name in told:
                    told[f"adamw_{name}"] = told.pop(name)
        return MuonW(model, **{**read, **options})


def muonw(training_args: Any, **options: Any) -> tuple[type[MuonWFactory], dict[str, Any]]:
    """A Trainer's `optimizer_cls_and_kwargs`: MuonW with these options, and with the lr, weight
    decay, betas and epsilon of the TrainingArguments where the options do not say them.

    Raises:
        TypeError: they are no TrainingArguments.
    """
    if not hasattr(training_args, "learning_rate"):
        raise TypeError(
            f"muonw() takes the Trainer's TrainingArguments, got {type(training_args).__name__}: "
            "write Trainer(model, args, optimizer_cls_and_kwargs=muonw(args)); the Trainer gives "
            "the model itself"
        )
    return MuonWFactory, {"training_args": training_args, **options}


class ConsolidateBeforeSave(TrainerCallback):  # type: ignore[misc]
    """Makes a Trainer's checkpoints whole with `zero=1`, where it saves the state of rank 0 alone.

    The last of the callbacks, so that it knows what the others want saved. It does nothing where
    nothing is to be done (one process, FSDP2).

    Raises:
        RuntimeError: a callback behind this one asked for a save; its checkpoint has a part.
    """

    _step: int | None = None  # whose state rank 0 has whole

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if control.should_save and not args.save_only_model:
            consolidate(kwargs["optimizer"])
            self._step = state.global_step

    on_epoch_end = on_step_end

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # Whether this was the best is known only after it, and then it is saved at once.
        if args.save_strategy == "best" and kwargs["optimizer"] is not None:
            consolidate(kwargs["optimizer"])
            self._step = state.global_step

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        missed = self._step != state.global_step and not args.save_only_model
        if missed and rank_0_has_a_part(unwrapped(kwargs["optimizer"])):
            raise RuntimeError(
                f"the checkpoint of step {state.global_step} has rank 0's part of the optimizer's "
                "state alone: a callback behind ConsolidateBeforeSave asked for it; make "
                "ConsolidateBeforeSave() the last of callbacks=[...]"
            )


class MonitorCallback(TrainerCallback):  # type: ignore[misc]
    """A `muonkit.Monitor` of a Trainer's training, with that one's arguments; its steps are the
    Trainer's. `monitor` is the Monitor itself."""

    def __init__(self, *args: Any, **options: Any) -> None:
        self._arguments = args, options
        self.monitor: Monitor | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.on_train_end(args, state, control)  # of a training that ended with an error
        given, options = self._arguments
        start = {"start": state.global_step}
        self.monitor = Monitor(unwrapped(kwargs["optimizer"]), *given, **{**start, **options})

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.monitor is not None:
            self.monitor.close()
