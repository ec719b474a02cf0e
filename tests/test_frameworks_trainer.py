"""muonkit through transformers' Trainer: DDP with ZeRO-1, and FSDP2."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from torch.distributed.tensor import DTensor

import frameworks
from distributed_helpers import Cases, Ranks, shared_folder
from muonkit import MuonW

CASES = Cases()


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
    gathers: bool = True,
    seed: int = 0,
    state_dict_type: str = "FULL_STATE_DICT",
) -> Any:
    """A Trainer with `MuonW`, given to it as `optimizers` or made by it."""
    from torch.utils.data import SequentialSampler
    from transformers import Trainer, TrainingArguments

    class InOrder(Trainer):
        def _get_train_sampler(self, *_: Any) -> Any:
            return SequentialSampler(self.train_dataset)

    class Gathers(InOrder):
        def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
            self.optimizer.optimizer.consolidate_state_dict()
            super()._save_checkpoint(*args, **kwargs)

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
    if layout == "zero1":
        told |= {"process_group": dist.group.WORLD, "zero": 1}
    given: dict[str, Any] = (
        {"optimizers": (MuonW(model, **told), None)}
        if made == "optimizers"
        else {"optimizer_cls_and_kwargs": (lambda: MuonW, told)}
    )
    kind = Gathers if layout == "zero1" and gathers else InOrder
    return kind(model=model, args=arguments, train_dataset=frameworks.samples(), **given)


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


@pytest.fixture(scope="module")
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    pytest.importorskip("transformers")
    return Ranks(request, tmp_path_factory, CASES, timeout=180.0)


@pytest.mark.parametrize(("world_size", "case"), CASES.ids())
def test_through_the_trainer(world_size: int, case: str, ranks: Ranks) -> None:
    for apart, resumed in filter(None, ranks.outcome(world_size, case).check()):
        assert apart <= frameworks.EXACT
        assert resumed <= frameworks.SAME
