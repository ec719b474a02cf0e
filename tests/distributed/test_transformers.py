"""transformers' own tensor and expert parallel plans: trained as one process trains the model.

Its plans leave DTensors: rows and columns, packed gate and up projections (`_StridedShard`), whole
experts, and with its FSDP plan both; norms and routers stay plain tensors, equal on all ranks.
"""

from __future__ import annotations

import functools
import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from muonkit import MuonW
from tests.helpers import zoo
from tests.helpers.ranks import Cases, Ranks

CASES = Cases(timeout=120.0, needs="transformers.distributed.expert_parallel")

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "intermediate_size": 64,
    "vocab_size": 64,
    "max_position_embeddings": 32,
}
EXPERTS: dict[str, Any] = {"num_experts_per_tok": 2}
FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": SIZES,
    "Mixtral": SIZES | EXPERTS | {"num_local_experts": 4},
    "Qwen3Moe": SIZES
    | EXPERTS
    # A layer of experts, and one without.
    | {
        "num_hidden_layers": 2,
        "num_experts": 4,
        "moe_intermediate_size": 32,
        "mlp_only_layers": [1],
    },
}

# The forward pass of a plan sums in another order; Muon's update of a gradient that is off by a few
# roundings is off by as many times its condition number, and AdamW's of a small gradient by more.
# Measured: 7e-5 of a parameter's largest magnitude after three steps, in an embedding. A shard that
# is orthogonalized for itself is off by 1e-1.
NEARLY = 3e-4


def _model(family: str) -> nn.Module:
    import transformers

    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**FAMILIES[family])
    model: nn.Module = getattr(transformers, f"{family}ForCausalLM")(config)
    return model.float()


def _train(model: nn.Module, variant: str) -> tuple[list[float], dict[str, torch.Tensor]]:
    optimizer = MuonW(model, lr=0.02, variant=variant, ns_dtype="float32")
    losses = []
    for step in range(3):
        tokens = torch.randint(0, 64, (4, 12), generator=torch.Generator().manual_seed(step))
        model.zero_grad()
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    found = {name: p.detach() for name, p in model.named_parameters()}
    return losses, {n: p.full_tensor() if isinstance(p, DTensor) else p for n, p in found.items()}


@functools.cache
def _alone(family: str, variant: str) -> tuple[list[float], dict[str, torch.Tensor]]:
    return _train(_model(family), variant)


def _distributed(family: str, **sizes: Any) -> Any:
    """The model under transformers' plan: what `from_pretrained(distributed_config=...)` does."""
    from transformers.distributed.configuration_utils import DistributedConfig

    model: Any = _model(family)
    config, _, meshes = model.prepare_distribute_model(DistributedConfig(**sizes))
    return model.maybe_distribute_model(model, config, meshes)


def _is_packed(model: nn.Module) -> bool:
    """Whether a rank has rows of the gate, and rows of the up projection, in one tensor."""
    placed = {n: p.placements for n, p in model.named_parameters() if isinstance(p, DTensor)}
    fused = [some for name, some in placed.items() if name.endswith("gate_up_proj")]
    return any(p.dim == 1 and getattr(p, "split_factor", 1) == 2 for some in fused for p in some)


@CASES.on(2, 4, family=list(FAMILIES), plan=["tp"])
@CASES.on(2, family=["Mixtral", "Qwen3Moe"], plan=["tp_ep"])
@CASES.on(4, family=["Mixtral"], plan=["fsdp_tp", "fsdp_ep"])
def trains_as_one_process(family: str, plan: str) -> None:
    size = dist.get_world_size()
    sizes = {
        "tp": {"tp_size": size, "tp_plan": "auto"},
        "tp_ep": {"tp_size": size, "ep_size": size},
        "fsdp_tp": {"tp_size": 2, "fsdp_size": size // 2},
        "fsdp_ep": {"tp_size": 2, "fsdp_size": size // 2, "ep_size": 2},
    }[plan]
    variant = "normuon" if family == "Mixtral" else "plain"
    model = _distributed(family, **sizes)
    assert _is_packed(model) == (family != "Llama" and "ep" not in plan)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "FSDP2-wrapped module", UserWarning)  # of views
        losses, parameters = _train(model, variant)
    expected, theirs = _alone(family, variant)
    assert losses == pytest.approx(expected, rel=1e-5)
    assert set(parameters) == set(theirs)
    for name, p in theirs.items():
        assert zoo.deviation(parameters[name], p) <= NEARLY, name


@pytest.mark.parametrize(("world_size", "case"), CASES.ids())
def test_a_plan_of_transformers(world_size: int, case: str, ranks: Ranks) -> None:
    ranks.outcome(world_size, case).check()
