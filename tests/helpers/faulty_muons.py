"""A plain Muon that keeps every law, and one for each fault that a law is there to find.

`plain("")` is it; `plain("eps")` the one with this fault. Ranks find them by
`tests/helpers/faulty_muons.py:SUBJECTS.NAME` (a space in a fault's name is a _ there).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from muonkit.testing import Subject

BETA = 0.9


class Box:
    """Something that torch.load refuses with weights_only=True."""


class Plain(Optimizer):
    """Muon on whole matrices, in float64, by one SVD each.

    Args:
        blocks: how many equal blocks the rows of every parameter are.
        fault: what it does wrong.
    """

    def __init__(
        self, params: Any, lr: float, weight_decay: float = 0.0, *, blocks: int = 1, fault: str = ""
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})
        self.blocks, self.fault, self.first_lr = blocks, fault, lr
        if fault == "steps on overflows":
            self._step_supports_amp_scaling = True

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.set_grad_enabled(self.fault != "closure without gradients"):
                loss = closure()
        with torch.no_grad():
            groups = self.param_groups
            for group in groups[:1] if self.fault == "first group only" else groups:
                together = self._norm_of_all(group) if self.fault == "one norm for all" else None
                for i, p in enumerate(group["params"]):
                    if self.fault == "decays own parameters only":
                        own = i % dist.get_world_size() == dist.get_rank()
                        self._train(p, group if own else {**group, "weight_decay": 0.0}, together)
                    elif self.fault != "own parameters only" or i % dist.get_world_size() == 0:
                        self._train(p, group, together)
        return None if self.fault == "loss is lost" else loss

    def _norm_of_all(self, group: dict[str, Any]) -> float:
        return math.hypot(
            *(float(p.grad.double().norm()) for p in group["params"] if p.grad is not None)
        )

    def _train(self, p: Tensor, group: dict[str, Any], together: float | None) -> None:
        fault = self.fault
        lr = self.first_lr if fault == "its own lr" else group["lr"]
        decay = (self.first_lr if fault == "decay at the first lr" else lr) * group["weight_decay"]
        if p.grad is None:
            if fault == "decay without gradient":
                p.mul_(1 - decay)
            if fault != "None is zeros" or "momentum" not in self.state[p]:
                return
        g = torch.zeros_like(p) if p.grad is None else p.grad
        if fault == "coupled decay":
            g = g + group["weight_decay"] * p
            decay = 0.0
        U = self._momentum(p, g)
        if fault == "writes to gradients":
            (g.to_local() if isinstance(g, DTensor) else g).mul_(0.5)
        if fault == "takes gradients away":
            p.grad = None
        if fault == "fails on empty shards" and isinstance(U, DTensor) and not U.to_local().numel():
            raise RuntimeError("an empty shard")
        if fault == "own shard" and isinstance(U, DTensor):
            local = self._direction(U.to_local()) if U.to_local().numel() else U.to_local()
            like = {"shape": U.shape, "stride": U.stride()}
            D = DTensor.from_local(local, U.device_mesh, U.placements, **like)
        elif isinstance(U, DTensor):
            whole = self._direction(U.full_tensor())
            if fault == "factor of a shard":
                whole *= self._factor(U.to_local().shape) / self._factor(U.shape)
            if fault == "gathers twice":
                U.full_tensor()
            D = distribute_tensor(whole, U.device_mesh, U.placements, src_data_rank=None)
        else:
            D = self._direction(U, together)
            if fault == "sends twice":
                for _ in range(4):
                    dist.all_reduce(D.clone())
        factor = self._factor(p.shape) if fault == "scaled decay" else 1.0
        p.mul_(1 - decay * factor)
        if fault == "promotes":
            p.data = p.data.float()
        if fault == "ascends":
            D = -D
        p.sub_((lr * D).to(p.dtype))

    def _momentum(self, p: Tensor, g: Tensor) -> Tensor:
        state, fault = self.state[p], self.fault
        if "momentum" not in state and fault == "aliased momentum":
            state["momentum"] = p.grad
            return g
        if fault == "boxed":
            state["box"] = Box()
        if fault == "whole state" and isinstance(g, DTensor):
            g = g.full_tensor()
        M = state.setdefault("momentum", torch.zeros_like(g))
        if fault == "strides":
            p.view(-1)
        M.lerp_(g, 0.5 if fault == "another momentum" else 1 - BETA)
        U = g.lerp(M, BETA)
        if fault == "normalized in place" or (
            fault == "normalized in place in bfloat16" and M.dtype is torch.bfloat16
        ):
            M.div_(M.norm().clamp_min(1e-30))
        if fault == "whole state" and isinstance(p, DTensor):
            U = distribute_tensor(U, p.device_mesh, p.placements, src_data_rank=None)
        return U

    def _direction(self, U: Tensor, together: float | None = None) -> Tensor:
        """The orthogonalized U times the factor of its shape."""
        fault = self.fault
        U = U.to(torch.float32 if fault == "narrow" else torch.float64)
        matrices = self._matrices(U)
        O = torch.stack([self._orthogonal(one.double(), together) for one in matrices])
        shape = U.shape if fault == "kernel factor" and U.ndim == 4 else None
        shape = U.shape if fault == "stack factor" and U.ndim == 3 else shape
        shape = U.shape if fault == "fused factor" and self.blocks > 1 else shape
        rows, cols = matrices.shape[-2:] if shape is None else shape[-2:]
        if fault == "stack factor" and shape is not None:
            rows, cols = shape[:2]
        if fault == "turned factor":
            rows, cols = cols, rows
        factor = math.sqrt(max(1.0, rows / cols))
        if fault == "batched over kernels" and U.ndim == 4:
            return factor * O.view(*U.shape[2:], *U.shape[:2]).permute(2, 3, 0, 1)
        return factor * O.reshape(U.shape)

    def _matrices(self, U: Tensor) -> Tensor:
        if U.ndim == 4 and self.fault == "batched over kernels":
            return U.permute(2, 3, 0, 1).flatten(0, 1)
        if U.ndim == 4 and self.fault == "view of convolutions":
            return U.view(1, len(U), -1)
        if U.ndim == 4:
            return U.reshape(1, len(U), -1)
        if U.ndim == 3:
            return U.flatten(0, 1)[None] if self.fault == "experts as one" else U
        blocks = 1 if self.fault == "fused as one" else self.blocks
        return U.reshape(blocks, -1, U.shape[-1])

    def _orthogonal(self, U: Tensor, together: float | None) -> Tensor:
        fault = self.fault
        largest = U.abs().max()
        if largest == 0:
            return U / largest if fault == "0 / 0" else U
        if fault == "overflows":
            return self._polar(U) * float(torch.isfinite(U.float().square().sum()))
        if fault in ("eps", "large eps"):
            # As where the norm is below eps five iterations do not get up to one.
            eps = 1e-7 if fault == "eps" else 1e-1
            return self._polar(U) * min(1.0, float(U.norm()) / eps)
        if together is not None:
            return self._polar(U) * float(U.norm()) / together
        if fault == "only normalized":
            return U / U.norm()
        if fault == "orthogonal factor of QR":
            Q = torch.linalg.qr(U if U.shape[0] >= U.shape[1] else U.mT).Q
            return Q if U.shape[0] >= U.shape[1] else Q.mT
        if fault == "turns squares" and U.shape[0] == U.shape[1]:
            U = U.mT
        return self._polar(U / largest)

    def _polar(self, U: Tensor) -> Tensor:
        rows, cols = U.shape
        if self.fault == "tall by rows" and rows > cols:
            return U / U.norm(dim=1, keepdim=True) / math.sqrt(rows / cols)
        if self.fault == "steeper for tall" and rows > cols:
            return self._polar(U.mT).mT + 0.5 * U / U.norm()
        left, values, right = torch.linalg.svd(U, full_matrices=False)
        kept = (values > 1e-5 * values[0]).double()
        if self.fault == "explodes on low rank" and not kept.all():
            kept *= 20
        return (left * kept) @ right

    def _factor(self, shape: Sequence[int]) -> float:
        return math.sqrt(max(1.0, shape[0] / math.prod(shape[1:])))

    def state_dict(self) -> dict[str, Any]:
        saved = super().state_dict()
        if self.fault == "no state saved":
            saved["state"] = {}
        return saved

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        made_with = [group["lr"] for group in self.param_groups]
        super().load_state_dict(state_dict)
        if self.fault == "keeps its own groups":
            for group, lr in zip(self.param_groups, made_with, strict=True):
                group["lr"] = lr
        if self.fault == "state keeps its dtype":
            for state in self.state.values():
                state["momentum"] = state["momentum"].float()

    def __getstate__(self) -> dict[str, Any]:
        kept = {**super().__getstate__(), "blocks": self.blocks, "fault": self.fault}
        kept["first_lr"] = self.first_lr
        if self.fault == "no state copied":
            kept["state"] = type(self.state)(dict)
        return kept


def plain(fault: str) -> Subject:
    make = functools.partial(Plain, fault=fault)

    def heads(params: list[nn.Parameter], blocks: int, *, lr: float, weight_decay: float) -> Plain:
        return make(params, lr, weight_decay, blocks=blocks)

    return Subject(
        make,
        fault or "a plain Muon",
        convolutions=True,
        experts=True,
        heads=heads,
        scale=lambda rows, cols: math.sqrt(max(1.0, rows / cols)),
        momentum=BETA,
        float64=True,
        products=torch.float64,
        ddp=make,
        fsdp2=make,
    )


FACTORS = {
    "the_factor_is_the_documented_one",
    "the_factor_of_a_convolution",
    "the_factor_of_an_expert",
    "the_factor_of_a_block",
}

# A fault, and the laws that it breaks: these, and no others.
FAULTS: dict[str, set[str]] = {
    "only normalized": {
        *FACTORS,
        "the_update_is_near_the_polar_factor",
        "singular_values_are_alike",
        "low_rank_is_bounded",
    },
    "one norm for all": {
        *FACTORS,
        "many_are_as_one_by_one",
        "no_gradient_no_change",
        "schedulers_reach_every_group",
    },
    "aliased momentum": {
        "momentum_is_not_the_gradient",
        "the_momentum_is_the_documented_one",
        "the_momentum_survives_in_bfloat16",
    },
    "writes to gradients": {"gradients_are_untouched"},
    "takes gradients away": {"gradients_are_untouched"},
    "coupled decay": {"decay_is_decoupled", "decay_follows_the_schedule"},
    "scaled decay": {"decay_is_decoupled"},
    "decay without gradient": {"no_gradient_no_decay"},
    "None is zeros": {"no_gradient_no_change", "no_gradient_no_decay"},
    "turned factor": {*FACTORS},
    "kernel factor": {"the_factor_of_a_convolution"},
    "stack factor": {"the_factor_of_an_expert"},
    "fused factor": {"the_factor_of_a_block"},
    "eps": {"tiny_gradients_are_nothing", "float64_keeps_its_range"},
    "overflows": {"huge_gradients_are_nothing", "float64_keeps_its_range"},
    "large eps": {
        "scale_of_gradient_is_nothing",
        "tiny_gradients_are_nothing",
        "float64_keeps_its_range",
    },
    "0 / 0": {"zero_moves_nothing", "decay_is_decoupled", "decay_follows_the_schedule"},
    "tall by rows": {
        "singular_values_are_alike",
        "low_rank_is_bounded",
        "zero_moves_nothing",
        "transpose_commutes",
    },
    "steeper for tall": {
        "transpose_commutes",
        "the_factor_of_an_expert",
        "the_factor_of_a_block",
    },
    "explodes on low rank": {"low_rank_is_bounded"},
    "experts as one": {"experts_are_separate"},
    "batched over kernels": {
        "a_convolution_is_a_matrix",
        "the_factor_of_a_convolution",
    },
    "view of convolutions": {"channels_last_is_nothing"},
    "fused as one": {"fused_blocks_are_separate"},
    "strides": {"channels_last_is_nothing", "strides_are_nothing"},
    "no state saved": {"a_resumed_run_goes_on", "a_state_loads_into_another_dtype"},
    "boxed": {"state_dicts_load_with_weights_only"},
    "state keeps its dtype": {"a_state_loads_into_another_dtype"},
    "no state copied": {"copies_train_alike"},
    "its own lr": {
        "schedulers_reach_every_group",
        "decay_follows_the_schedule",
        "groups_are_added_later",
    },
    "decay at the first lr": {"decay_follows_the_schedule"},
    "closure without gradients": {"closures_are_called_once"},
    "loss is lost": {"closures_are_called_once"},
    "first group only": {"groups_are_added_later"},
    "steps on overflows": {"an_overflow_leaves_no_trace"},
    "promotes": {
        "the_momentum_survives_in_bfloat16",
        "bfloat16_is_float32_rounded",
        "float64_keeps_its_range",
    },
    "normalized in place in bfloat16": {"the_momentum_survives_in_bfloat16"},
    "normalized in place": {
        "the_momentum_is_the_documented_one",
        "the_momentum_survives_in_bfloat16",
    },
    "narrow": {"float64_keeps_its_range"},
    "keeps its own groups": {"a_resumed_run_goes_on"},
    "ascends": {"the_update_is_near_the_polar_factor"},
    "orthogonal factor of QR": {"the_update_is_near_the_polar_factor"},
    "turns squares": {"the_update_is_near_the_polar_factor"},
    "another momentum": {"the_momentum_is_the_documented_one"},
}
RANK_FAULTS: dict[str, set[str]] = {
    "own shard": {"fsdp2_equals_one_process", "fsdp2_sends_no_more_than_an_all_gather"},
    "gathers twice": {"fsdp2_sends_no_more_than_an_all_gather"},
    "writes to gradients": {"sharded_gradients_are_untouched"},
    "takes gradients away": {"sharded_gradients_are_untouched"},
    "whole state": {
        "sharded_state_has_the_parameters_layout",
        "fsdp2_sends_no_more_than_an_all_gather",
    },
    "own parameters only": {"ddp_equals_one_process", "fsdp2_equals_one_process"},
    "decays own parameters only": {"ddp_equals_one_process", "fsdp2_equals_one_process"},
    "factor of a shard": {"fsdp2_equals_one_process"},
    "sends twice": {"ddp_sends_no_more_than_an_all_gather"},
}

# Judged with the tolerance of products in 16 bits, a factor is seen where it is off by much.
COARSE = dataclasses.replace(plain("factor of a shard"), products=torch.bfloat16)

# Where ranks find them.
SUBJECTS = SimpleNamespace(
    **{
        fault.replace(" ", "_") or "plain": plain(fault)
        for fault in ["", "fails on empty shards", *RANK_FAULTS]
    }
)
