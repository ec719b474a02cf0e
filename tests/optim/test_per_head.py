"""per_head=True: each head moves as it would alone, and all heads of a shape move in one batch."""

from __future__ import annotations

from collections.abc import Callable
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from muonkit import Monitor, MuonW, orthogonalize, step
from muonkit.views import blocks_of
from tests.helpers.attention import MODELS, built

LR, DECAY, MU = 0.1, 0.3, 0.9
Heads = Callable[[Tensor], list[Tensor]]


def rows(count: int, *parts: int) -> Heads:
    """`count` heads of equal size, each of these parts one below the other."""

    def cut(w: Tensor) -> list[Tensor]:
        heads = w.view(count, -1, w.shape[1])
        return [part for head in heads for part in head.split(parts or (heads.shape[1],))]

    return cut


def columns(count: int) -> Heads:
    return lambda w: list(w.chunk(count, 1))


# Written apart from views and routes: the matrices of each weight, by the end of its name. All of
# them share memory with the weight.
HEADS: dict[str, dict[str, Heads]] = {
    "gpt2": {
        "c_attn.weight": lambda w: [h for part in w.T.chunk(3) for h in part.chunk(4)],
        "attn.c_proj.weight": lambda w: list(w.T.chunk(4, 1)),
    },
    "llama": {
        "q_proj.weight": rows(4),
        "k_proj.weight": rows(2),
        "v_proj.weight": rows(2),
        "o_proj.weight": columns(4),
    },
    "qwen3": {
        "q_proj.weight": rows(4),
        "k_proj.weight": rows(2),
        "v_proj.weight": rows(2),
        "o_proj.weight": columns(4),
    },
    # One head of keys and one of values after the four of the queries.
    "falcon multi-query": {"query_key_value.weight": rows(6), "dense.weight": columns(4)},
    # Two groups of two heads of queries, one of keys, one of values.
    "falcon grouped": {"query_key_value.weight": rows(2, 8, 8, 8, 8), "n.dense.weight": columns(4)},
    "deepseek_v3": {
        "q_b_proj.weight": rows(4, 8, 4),
        "kv_b_proj.weight": rows(4, 8, 6),
        "kv_a_proj_with_mqa.weight": rows(1, 16, 4),
        "o_proj.weight": columns(4),
    },
}


def set_gradients(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype)


@pytest.mark.parametrize("name", HEADS)
def test_a_head_moves_as_its_slice_does_alone(name: str) -> None:
    """In float64: to rounding, though heads are padded and computed together."""
    model = built(name).double()
    weights = dict(model.named_parameters())
    optimizer = MuonW(model, LR, DECAY, MU, per_head=True)
    parameters = {
        key: (cut, weights[key].detach().clone(), torch.zeros_like(weights[key]))
        for end, cut in HEADS[name].items()
        for key in weights
        if key.endswith(end)
    }
    assert len(parameters) == len(HEADS[name])
    for seed in range(3):
        set_gradients(model, seed)
        optimizer.step()
        for key, (cut, W, M) in parameters.items():
            G = weights[key].grad
            assert G is not None
            M.mul_(MU).add_(G, alpha=1 - MU)
            U = (1 - MU) * G + MU * M
            W.mul_(1 - LR * DECAY)
            for head, u in zip(cut(W), cut(U), strict=True):
                # "unit_rms": entries of the update have RMS one, by the shape of one head.
                head.sub_(LR * max(u.shape) ** 0.5 * orthogonalize(u))
    for key, (_, W, _) in parameters.items():
        torch.testing.assert_close(weights[key].detach(), W, rtol=1e-10, atol=1e-10, msg=key)


@pytest.mark.parametrize("name", HEADS)
def test_pitfall_11_a_heads_gradient_changes_no_other(name: str) -> None:
    model = built(name)
    optimizer = MuonW(model, LR, 0.0, per_head=True)
    weights = dict(model.named_parameters())
    before = {key: p.detach().clone() for key, p in weights.items()}
    state = {key: p.detach().clone() for key, p in weights.items()}
    updates = []
    for factor in (1.0, 100.0):
        with torch.no_grad():
            for key, p in weights.items():
                p.copy_(state[key])
        optimizer = MuonW(model, LR, 0.0, per_head=True)
        set_gradients(model, 0)
        for end, cut in HEADS[name].items():
            for key, p in weights.items():
                if key.endswith(end):
                    assert p.grad is not None
                    cut(p.grad)[1].mul_(factor)
        optimizer.step()
        updates.append({key: p.detach() - before[key] for key, p in weights.items()})
    for key in weights:
        torch.testing.assert_close(updates[0][key], updates[1][key], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", HEADS)
def test_heads_of_one_shape_are_one_call(name: str) -> None:
    """Not one per head, nor one per parameter."""
    model = built(name, layers=3)
    calls: list[int] = []

    def counted(matrices: Tensor, *options: object) -> Tensor:
        calls.append(len(matrices))
        return ORTHOGONALIZE(matrices, *options)  # type: ignore[arg-type]

    counts = {}
    for per_head in (False, True):
        optimizer = MuonW(model, LR, per_head=per_head)
        set_gradients(model, 0)
        calls.clear()
        with mock.patch.object(step, "orthogonalize_", counted):
            optimizer.step()
        counts[per_head] = len(calls), sum(calls)
        shapes = set()
        for group in optimizer.param_groups:
            if group["algorithm"] == "muon":
                for p in group["params"]:
                    blocks = blocks_of(group["view"], tuple(p.shape))
                    shapes |= {(group["view"], b.rows, b.cols) for b in blocks}
                    # One region of memory for all heads, two where a head has two parts.
                    assert len(blocks) <= 3
    assert counts[True][1] > counts[False][1]
    # A group is computed by itself: its view is one of its hyperparameters.
    assert counts[True][0] <= len(shapes)


ORTHOGONALIZE = step.orthogonalize_


@pytest.mark.parametrize(
    "variant",
    [
        "plain",
        pytest.param("normuon", marks=pytest.mark.whole),
        pytest.param("adamuon", marks=pytest.mark.whole),
    ],
)
def test_the_compiled_step_is_the_eager_one(variant: str) -> None:
    torch._dynamo.reset()
    eager, compiled = built("deepseek_v3"), built("deepseek_v3")
    optimizers = [MuonW(m, LR, per_head=True, variant=variant) for m in (eager, compiled)]
    steps = [optimizers[0].step, torch.compile(optimizers[1].step, backend="eager")]
    for seed in range(2):
        for model, take in zip((eager, compiled), steps, strict=True):
            set_gradients(model, seed)
            take()
    for p, q in zip(eager.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_a_variant_keeps_a_number_for_each_row_of_a_head() -> None:
    model = built("llama")
    optimizer = MuonW(model, LR, per_head=True, variant="normuon")
    set_gradients(model, 0)
    optimizer.step()
    shapes = {
        name.split(".")[-2]: tuple(optimizer.state[p]["second_momentum_buffer"].shape)
        for name, p in model.named_parameters()
        if "self_attn" in name and p.ndim == 2
    }
    # The output projection's rows are as many as there are heads, one for each.
    assert shapes == {"q_proj": (32, 1), "k_proj": (16, 1), "v_proj": (16, 1), "o_proj": (32, 4)}


def test_a_monitor_sees_the_heads() -> None:
    model = built("llama")
    optimizer = MuonW(model, LR, per_head=True)
    with Monitor(optimizer, every=1) as monitor:
        set_gradients(model, 0)
        optimizer.step()
    assert monitor.latest is not None
    shapes = [
        each["shape"]
        for each in monitor.header["matrices"]
        if each["name"].endswith("o_proj.weight")
    ]
    assert shapes == [[32, 8]] * 4
    assert {name for name in MODELS} >= set(HEADS)
