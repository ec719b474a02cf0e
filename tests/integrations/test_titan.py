"""docs/trainers.md's torchtitan blocks on two ranks: sharded modules and DCP, and its container of
optimizers, for which a stand-in has what that class promises (it does not install beside torch's
CPU build).
"""

from __future__ import annotations

import contextlib
import sys
from dataclasses import dataclass
from types import ModuleType
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from tests.helpers import frameworks
from tests.helpers.ranks import Cases, Ranks, shared_folder

CASES = Cases(timeout=180.0)


class OptimizersContainer(torch.optim.Optimizer):
    """One optimizer or more for each part of a model; its state dict is flat, keyed by names."""

    optimizers: list[Any]
    model_parts: list[nn.Module]

    @dataclass(kw_only=True, slots=True)
    class Config:
        implementation: str = "fused"

    def _validate_params(self, params: list[nn.Parameter]) -> None:
        expected = [p for part in self.model_parts for p in part.parameters() if p.requires_grad]
        assert set(params) == set(expected)

    def _post_init(self, params: list[nn.Parameter]) -> None:
        super().__init__(params, {})

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for optimizer in self.optimizers:
            optimizer.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=set_to_none)

    def state_dict(self) -> dict[str, Any]:
        flat: dict[str, Any] = {}
        for optimizer in self.optimizers:
            saved = optimizer.state_dict()
            for group in saved["param_groups"]:
                for key, name in zip(group["params"], group["param_names"], strict=True):
                    for kind, tensor in saved["state"][key].items():
                        flat[f"state.{name}.{kind}"] = tensor
                    for option in group.keys() - {"params", "param_names"}:
                        flat[f"param_groups.{name}.{option}"] = group[option]
        return flat

    def load_state_dict(self, flat: dict[str, Any]) -> None:
        for optimizer in self.optimizers:
            saved = optimizer.state_dict()
            for group in saved["param_groups"]:
                names = group.pop("param_names")
                for key, name in zip(group["params"], names, strict=True):
                    for kind in saved["state"][key]:
                        saved["state"][key][kind] = flat[f"state.{name}.{kind}"]
                for option in group.keys() - {"params"}:
                    group[option] = flat[f"param_groups.{names[0]}.{option}"]
            optimizer.load_state_dict(saved)


@CASES.on(2)
def page_shards_saves_and_loads() -> None:
    start, loop, _ = frameworks.page("torchtitan")
    # Equality at float32's tolerance, whatever this CPU multiplies fastest.
    assert "MuonW(model, " in loop
    loop = loop.replace("MuonW(model, ", "MuonW(model, ns_dtype='float32', ")
    sharded: dict[str, Any] = {}
    with shared_folder() as folder, contextlib.chdir(folder):
        exec(start + loop, sharded)
    # The same lines without their ranks: every rank had the same batches.
    alone: dict[str, Any] = {}
    exec(start + loop.replace("fully_shard(", "str(").partition("model_state,")[0], alone)
    assert all(isinstance(p, DTensor) for p in sharded["model"].parameters())
    got, expected = frameworks.whole(sharded["model"]), frameworks.whole(alone["model"])
    assert frameworks.deviation(got, expected) <= frameworks.EXACT


@CASES.on(2)
def page_container_saves_and_loads() -> None:
    start, _, container = frameworks.page("torchtitan")
    titan = ModuleType("torchtitan.components.optimizer")
    titan.OptimizersContainer = OptimizersContainer  # type: ignore[attr-defined]
    names: dict[str, Any] = {}
    with mock.patch.dict(sys.modules, {titan.__name__: titan}):
        exec(start, names)
        # A dataclass looks its module up.
        names["__name__"] = titan.__name__
        exec(container, names)

    def made(lr: float) -> tuple[nn.Module, Any]:
        model = names["make_model"]()
        for layer in [*model, model]:
            fully_shard(layer)
        kind = names["MuonContainer"]
        return model, kind(kind.Config(lr=lr), model_parts=[model])

    def train(model: nn.Module, optimizers: Any) -> dict[str, Tensor]:
        for tokens in names["batches"]:
            optimizers.zero_grad()
            nn.functional.cross_entropy(model(tokens), tokens).backward()
            optimizers.step()
        return frameworks.whole(model)

    with shared_folder() as folder:
        model, optimizers = made(lr=2e-3)
        train(model, optimizers)
        saved = {"model": model.state_dict(), "optimizer": optimizers.state_dict()}
        dcp.save(saved, checkpoint_id=folder)
        expected = train(model, optimizers)
        model, optimizers = made(lr=0.5)
        train(model, optimizers)  # its state has to be there before it is loaded into
        saved = {"model": model.state_dict(), "optimizer": optimizers.state_dict()}
        dcp.load(saved, checkpoint_id=folder)
        model.load_state_dict(saved["model"])
        optimizers.load_state_dict(saved["optimizer"])
        assert frameworks.deviation(train(model, optimizers), expected) <= frameworks.SAME


@pytest.mark.parametrize(("world_size", "case"), CASES.ids())
def test_as_torchtitan_does(world_size: int, case: str, ranks: Ranks) -> None:
    ranks.outcome(world_size, case).check()
