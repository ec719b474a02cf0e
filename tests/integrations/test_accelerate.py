"""muonkit through Accelerate: DDP with ZeRO-1, and FSDP2, which makes the optimizer first and puts
other parameters in place of the ones that it was given.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from muonkit import MuonW
from tests.helpers import frameworks
from tests.helpers.ranks import Cases, Ranks, shared_folder

CASES = Cases(timeout=180.0, needs="accelerate")


@contextlib.contextmanager
def accelerator(layout: str, state_dict_type: str = "SHARDED_STATE_DICT") -> Iterator[Any]:
    """An Accelerator on this rank; its own state is one for all, and forgotten at the end."""
    from accelerate import Accelerator, FullyShardedDataParallelPlugin
    from accelerate.state import AcceleratorState, GradientState, PartialState
    from accelerate.utils import DistributedType

    options: dict[str, Any] = {}
    with frameworks.launched():
        state = PartialState(cpu=True)
        if layout == "fsdp2":
            # Accelerate shards on accelerators alone; what follows knows nothing of the device.
            state.distributed_type = DistributedType.MULTI_GPU
            options["fsdp_plugin"] = FullyShardedDataParallelPlugin(
                fsdp_version=2,
                reshard_after_forward=True,
                state_dict_type=state_dict_type,
                auto_wrap_policy="size_based_wrap",
                min_num_params=50,
                cpu_ram_efficient_loading=False,
            )
        try:
            yield Accelerator(cpu=True, **options)
        finally:
            AcceleratorState._reset_state(True)
            GradientState._reset_state()


def prepared(acc: Any, layout: str, seed: int = 0, **options: Any) -> tuple[nn.Module, Any]:
    model = frameworks.Model(seed)
    told = {"process_group": dist.group.WORLD, "zero": 1} if layout == "zero1" else {}
    optimizer = MuonW(model, **{**frameworks.OPTIONS, **told, **options})
    prepared: tuple[nn.Module, Any] = acc.prepare(model, optimizer)
    return prepared


def train(acc: Any, model: nn.Module, optimizer: Any, first: int, last: int) -> None:
    for step in range(first, last):
        optimizer.zero_grad()
        mine = frameworks.batch(step, dist.get_rank(), dist.get_world_size())
        acc.backward(model(**mine)["loss"])
        optimizer.step()


@CASES.on(2, layout=["zero1", "fsdp2"], variant=["plain", "normuon"])
def equals_one_process_and_resumes(layout: str, variant: str) -> tuple[float, float]:
    """(deviation from one process after 10 steps, from the uninterrupted run after a resume)"""
    from muonkit.integrations.accelerate import consolidate_before_save

    with accelerator(layout) as acc, shared_folder() as folder:
        model, optimizer = prepared(acc, layout, variant=variant)
        consolidate_before_save(acc, optimizer)
        train(acc, model, optimizer, 0, frameworks.SAVED_AFTER)
        acc.save_state(str(folder))
        acc.wait_for_everyone()
        train(acc, model, optimizer, frameworks.SAVED_AFTER, frameworks.STEPS)
        expected = frameworks.whole(model)
        for p in model.parameters():
            momentum = next(iter(optimizer.state[p].values()))
            assert isinstance(momentum, DTensor)
            assert isinstance(p, DTensor) == (layout == "fsdp2")
        acc.free_memory()
        model, optimizer = prepared(acc, layout, seed=1, variant=variant, lr=0.7)
        acc.load_state(str(folder))
        train(acc, model, optimizer, frameworks.SAVED_AFTER, frameworks.STEPS)
        resumed = frameworks.whole(model)
    return (
        frameworks.deviation(expected, frameworks.alone(variant)),
        frameworks.deviation(resumed, expected),
    )


@CASES.on(2)
def saves_fsdp2_whole() -> tuple[float, float]:
    """In one file, which rank 0 writes, and every rank takes its part of."""
    from muonkit.integrations.accelerate import consolidate_before_save

    with accelerator("fsdp2", "FULL_STATE_DICT") as acc, shared_folder() as folder:
        model, optimizer = prepared(acc, "fsdp2")
        consolidate_before_save(acc, optimizer)  # nothing, here
        train(acc, model, optimizer, 0, frameworks.SAVED_AFTER)
        acc.save_state(str(folder))
        acc.wait_for_everyone()
        train(acc, model, optimizer, frameworks.SAVED_AFTER, frameworks.STEPS)
        expected = frameworks.whole(model)
        acc.free_memory()
        model, optimizer = prepared(acc, "fsdp2", seed=1, lr=0.7)
        acc.load_state(str(folder))
        train(acc, model, optimizer, frameworks.SAVED_AFTER, frameworks.STEPS)
    return 0.0, frameworks.deviation(frameworks.whole(model), expected)


@CASES.on(2)
def refuses_a_state_that_rank_0_saved_alone() -> str:
    """Without the hook above; rank 0 has its own part, and every other rank the error."""
    with accelerator("zero1") as acc, shared_folder() as folder:
        model, optimizer = prepared(acc, "zero1")
        train(acc, model, optimizer, 0, 1)
        acc.save_state(str(folder))
        acc.wait_for_everyone()
        if dist.get_rank() == 0:
            acc.load_state(str(folder))
            return ""
        with pytest.raises(ValueError, match="part of rank 0, and this is rank 1") as error:
            acc.load_state(str(folder))
    return str(error.value)


@pytest.mark.parametrize(("world_size", "case"), CASES.ids())
def test_through_accelerate(world_size: int, case: str, ranks: Ranks) -> None:
    values = ranks.outcome(world_size, case).check()
    if case.startswith("refuses"):
        assert "optimizer.consolidate_state_dict() on all ranks" in values[1]
        return
    for apart, resumed in values:
        assert apart <= frameworks.EXACT
        assert resumed <= frameworks.SAME
