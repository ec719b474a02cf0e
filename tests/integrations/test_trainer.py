"""muonkit through transformers' Trainer: DDP with ZeRO-1, and FSDP2."""

from __future__ import annotations

import contextlib
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from muonkit import MuonW
from tests.helpers import frameworks
from tests.helpers.ranks import Cases, Ranks, shared_folder

CASES = Cases(timeout=180.0, needs="transformers")


@contextlib.contextmanager
def launched(layout: str) -> Iterator[None]:
    from accelerate.state import AcceleratorState, GradientState, PartialState
    from accelerate.utils import DistributedType

    with frameworks.launched():
        state = PartialState(cpu=True)
        if layout == "fsdp2":
            # Accelerate shards on accelerators alone; what follows knows nothing of the device.
            state.distributed_type = DistributedType.MULTI_GPU
        try:
            yield
        finally:
            AcceleratorState._reset_state(True)
            GradientState._reset_state()


def trainer(
    folder: Path,
    layout: str,
    made: str,
    seed: int = 0,
    state_dict_type: str = "FULL_STATE_DICT",
) -> Any:
    """A Trainer with `MuonW`, given to it as `optimizers` or made by it."""
    from torch.utils.data import SequentialSampler
    from transformers import Trainer, TrainingArguments

    from muonkit.integrations.transformers import (
        ConsolidateBeforeSave,
        MonitorCallback,
        muonw,
    )

    class InOrder(Trainer):
        def _get_train_sampler(self, *_: Any) -> Any:
            return SequentialSampler(self.train_dataset)

    options: dict[str, Any] = {}
    if layout == "fsdp2":
        options["fsdp"] = True
        options["fsdp_config"] = {
            "version": 2,
            "auto_wrap_policy": "SIZE_BASED_WRAP",
            "min_num_params": 50,
            "state_dict_type": state_dict_type,
        }
        options["accelerator_config"] = {"use_configured_state": True}
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=frameworks.BATCH // dist.get_world_size(),
        max_steps=frameworks.STEPS,
        save_steps=frameworks.SAVED_AFTER,
        save_strategy="steps",
        learning_rate=frameworks.OPTIONS["lr"],
        weight_decay=frameworks.OPTIONS["weight_decay"],
        adam_beta2=0.95,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        logging_strategy="no",
        seed=0,
        **options,
    )
    model = frameworks.Model(seed)
    told = dict(frameworks.OPTIONS)
    if made != "optimizers":  # which are the arguments', above
        del told["lr"], told["weight_decay"]
    if layout == "zero1":
        told |= {"process_group": dist.group.WORLD, "zero": 1}
    given: dict[str, Any] = (
        {"optimizers": (MuonW(model, **told), None)}
        if made == "optimizers"
        else {"optimizer_cls_and_kwargs": muonw(arguments, **told)}
    )
    return InOrder(
        model=model,
        args=arguments,
        train_dataset=frameworks.samples(),
        callbacks=[
            MonitorCallback(every=2, to=folder / "muon.jsonl", spectra=()),
            ConsolidateBeforeSave(),
        ],
        **given,
    )


def runs_and_resumes(layout: str, made: str, **options: Any) -> tuple[float, float]:
    """(deviation from one process after 10 steps, from the uninterrupted run after a resume)"""
    with shared_folder() as folder:
        with launched(layout):
            one = trainer(folder, layout, made, **options)
            one.train()
            expected = frameworks.whole(one.model)
            for p in one.model.parameters():
                assert isinstance(p, DTensor) == (layout == "fsdp2")
                assert isinstance(next(iter(one.optimizer.state[p].values())), DTensor)
        with launched(layout):
            other = trainer(folder / "resumed", layout, made, seed=1, **options)
            other.train(resume_from_checkpoint=str(folder / f"checkpoint-{frameworks.SAVED_AFTER}"))
            resumed = frameworks.whole(other.model)
        lines = (folder / "resumed" / "muon.jsonl").read_text().splitlines()
        samples = [sample for sample in map(json.loads, lines) if "step" in sample]
        # Counted from the beginning of the training.
        assert [sample["step"] for sample in samples] == [6, 8, 10]
    return (
        frameworks.deviation(expected, frameworks.alone()),
        frameworks.deviation(resumed, expected),
    )


@CASES.on(2, made=["optimizers", "by the Trainer"])
def equals_one_process_with_zero1(made: str) -> tuple[float, float]:
    return runs_and_resumes("zero1", made)


@CASES.on(2, state_dict_type=["FULL_STATE_DICT", "SHARDED_STATE_DICT"])
def equals_one_process_with_fsdp2(state_dict_type: str) -> tuple[float, float]:
    """The Trainer makes the optimizer, then the model is sharded."""
    return runs_and_resumes("fsdp2", "by the Trainer", state_dict_type=state_dict_type)


@CASES.on(2)
def trainer_takes_no_optimizer_under_fsdp() -> None:
    with (
        launched("fsdp2"),
        shared_folder() as folder,
        pytest.raises(RuntimeError, match="not allowed"),
    ):
        trainer(folder, "fsdp2", "optimizers")


def one_step(zero: int) -> Any:
    model = frameworks.Model()
    optimizer = MuonW(model, process_group=dist.group.WORLD, zero=zero, **frameworks.OPTIONS)
    model(**frameworks.batch(0))["loss"].backward()
    optimizer.step()
    return optimizer


@CASES.on(2)
def consolidates_whatever_asks_for_the_save() -> None:
    from muonkit.integrations.transformers import ConsolidateBeforeSave

    def whole() -> bool:
        state = optimizer.state_dict()["state"]
        return all(type(t) is Tensor for entry in state.values() for t in entry.values())

    optimizer = one_step(zero=1)
    here, callback = {"optimizer": SimpleNamespace(optimizer=optimizer)}, ConsolidateBeforeSave()
    steps = SimpleNamespace(save_only_model=False, save_strategy="steps")
    best = SimpleNamespace(save_only_model=False, save_strategy="best")
    state, no, yes = (
        SimpleNamespace(global_step=1),
        SimpleNamespace(should_save=False),
        SimpleNamespace(should_save=True),
    )
    rank_0 = dist.get_rank() == 0
    callback.on_step_end(steps, state, no, **here)
    callback.on_evaluate(steps, state, no, **here)
    assert not whole()
    # A callback behind this one had it saved: said at once, and not when somebody loads it.
    with pytest.raises(RuntimeError, match=r"the last of callbacks=\[...\]"):
        callback.on_save(steps, state, yes, **here)
    callback.on_step_end(steps, state, yes, **here)
    assert whole() == rank_0
    callback.on_save(steps, state, yes, **here)
    optimizer.step()
    assert not whole()
    state.global_step = 2
    callback.on_evaluate(best, state, no, **here)  # what decides whether this is saved
    assert whole() == rank_0
    callback.on_save(best, state, yes, **here)
    # Where every rank has everything, nobody has to be the last.
    ConsolidateBeforeSave().on_save(steps, state, yes, optimizer=one_step(zero=0))


@CASES.on(2, layout=["zero1", "fsdp2"])
def page_trains_and_resumes(layout: str) -> None:
    """The blocks of docs/trainers.md, as a launcher of two ranks would run them."""
    start, model, _, _, zero1, fsdp2 = frameworks.page("transformers' Trainer")
    names: dict[str, Any] = {}
    with (
        launched(layout),
        shared_folder() as folder,
        contextlib.chdir(folder),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")  # the Trainer's, on pinned memory
        exec(start + model + "from muonkit.integrations.transformers import muonw", names)
        names["recipe"] |= {"use_cpu": True, "report_to": [], "disable_tqdm": True}
        names["recipe"]["accelerator_config"] = {"use_configured_state": layout == "fsdp2"}
        exec({"zero1": zero1, "fsdp2": fsdp2}[layout], names)
        trainer = names["trainer"]
        assert trainer.state.global_step == 4
        assert trainer.state.log_history[-1]["train_loss"] < 5.0
        optimizer = trainer.optimizer.optimizer
        assert {group["lr"] for group in optimizer.param_groups} == {0.0}  # decayed to the end
        algorithms = {group["algorithm"] for group in optimizer.param_groups}
        assert algorithms == {"muon", "adamw"}
        for p in trainer.model.parameters():
            assert isinstance(p, DTensor) == (layout == "fsdp2")
            assert isinstance(next(iter(optimizer.state[p].values())), DTensor)


@pytest.mark.parametrize(("world_size", "case"), CASES.ids())
def test_through_the_trainer(world_size: int, case: str, ranks: Ranks) -> None:
    for apart, resumed in filter(None, ranks.outcome(world_size, case).check()):
        assert apart <= frameworks.EXACT
        assert resumed <= frameworks.SAME
