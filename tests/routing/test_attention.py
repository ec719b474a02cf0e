"""Attention heads: each slice is the head that the model's attention really sees, nothing else."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

from muonkit.routing.attention import AttentionHeads, HeadSlice, attention_heads
from muonkit.routing.routes import RoutingError
from tests.helpers.routing import Body, D, Holder

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "vocab_size": 100,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
OLD: dict[str, Any] = {
    "vocab_size": 100,
    "n_embd": 32,
    "n_layer": 1,
    "n_head": 4,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LATENT = SMALL | {
    "num_key_value_heads": 4,
    "moe_intermediate_size": 24,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 6,
    "first_k_dense_replace": 1,
}
# family, configuration, (query heads, heads of keys and values, features of a query head)
MODELS: dict[str, tuple[str, dict[str, Any], tuple[int, int, int]]] = {
    "gpt2": ("GPT2", OLD, (4, 4, 8)),
    "llama": ("Llama", SMALL | {"num_key_value_heads": 2, "attention_bias": True}, (4, 2, 8)),
    "qwen3": ("Qwen3", SMALL | {"num_key_value_heads": 2, "head_dim": 16}, (4, 2, 16)),
    "phi3": ("Phi3", SMALL | {"num_key_value_heads": 2}, (4, 2, 8)),
    "gpt_neox": ("GPTNeoX", SMALL, (4, 4, 8)),
    "falcon multi-query": ("Falcon", SMALL | {"alibi": False, "bias": True}, (4, 1, 8)),
    "falcon grouped": (
        "Falcon",
        SMALL | {"alibi": False, "new_decoder_architecture": True, "num_kv_heads": 2},
        (4, 2, 8),
    ),
    "falcon multi-head": ("Falcon", SMALL | {"alibi": False, "multi_query": False}, (4, 4, 8)),
    "deepseek_v3": ("DeepseekV3", LATENT | {"q_lora_rank": 12}, (4, 4, 12)),
    "deepseek_v3 without q_lora": ("DeepseekV3", LATENT | {"q_lora_rank": None}, (4, 4, 12)),
    "qwen3_next": (
        "Qwen3Next",
        SMALL
        | {"num_key_value_heads": 2, "head_dim": 8, "num_experts": 4, "moe_intermediate_size": 24}
        | {"shared_expert_intermediate_size": 24, "layer_types": ["full_attention"]}
        | {"num_experts_per_tok": 2},
        (4, 2, 8),
    ),
}


def built(name: str) -> nn.Module:
    """The model of this name with random weights, biases among them."""
    transformers = pytest.importorskip("transformers")
    family, options, _ = MODELS[name]
    config = getattr(transformers, f"{family}Config")(**options)
    torch.manual_seed(0)
    model: nn.Module = transformers.AutoModelForCausalLM.from_config(
        config, attn_implementation="sdpa"
    )
    with torch.no_grad():
        for key, param in model.named_parameters():
            if key.endswith("bias"):
                param.normal_(std=0.1)
    return model.eval()


@pytest.fixture
def attended(monkeypatch: pytest.MonkeyPatch) -> list[tuple[torch.Tensor, ...]]:
    """What scaled_dot_product_attention is given: q, k, v of each call."""
    calls: list[tuple[torch.Tensor, ...]] = []
    attend = nn.functional.scaled_dot_product_attention

    def watched(q: Any, k: Any, v: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append((q.detach(), k.detach(), v.detach()))
        return attend(q, k, v, *args, **kwargs)

    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", watched)
    return calls


def scaled(model: nn.Module, slices: Sequence[HeadSlice], factor: float) -> None:
    for part in slices:
        param = model.get_parameter(part.param)
        param.narrow(part.dim, part.start, part.stop - part.start).mul_(factor)
        if part.bias is not None:
            model.get_parameter(part.bias)[part.start : part.stop].mul_(factor)


def parts(heads: AttentionHeads) -> Iterator[tuple[int, int, tuple[HeadSlice, ...]]]:
    """(0, 1 or 2 for q, k, v; the head; its slices)."""
    for i, (main, rotated) in enumerate(
        [(heads.q, heads.q_rope), (heads.k, heads.k_rope), (heads.v, ())]
    ):
        for h, part in enumerate(main):
            own = rotated[h : h + 1] if len(rotated) == len(main) else ()
            yield i, h, (part, *own)


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_a_slice_is_what_attention_sees_as_that_head(
    name: str, attended: list[tuple[torch.Tensor, ...]]
) -> None:
    model = built(name)
    (heads,) = attention_heads(model)
    assert (heads.heads, heads.kv_heads, heads.head_dim) == MODELS[name][2]
    assert heads.module is model.get_submodule(heads.name)
    ids = torch.arange(3, 15)[None]
    model(ids)
    before = attended.pop()
    # A norm of the queries and keys takes a factor out again; what it does to zero stays.
    normed = any("norm" in key for key, _ in heads.module.named_children()) and not heads.q_rope
    for i, h, slices in parts(heads):
        factor = 0.0 if normed or (heads.q_rope and i < 2) else 3.0
        kept = {s.param: model.get_parameter(s.param).clone() for s in slices}
        kept |= {s.bias: model.get_parameter(s.bias).clone() for s in slices if s.bias}
        scaled(model, slices, factor)
        model(ids)
        after = attended.pop()
        for key, value in kept.items():
            model.get_parameter(key).copy_(value)
        group = before[i].shape[1] // len((heads.q, heads.k, heads.v)[i])
        for j, (old, new) in enumerate(zip(before, after, strict=True)):
            for head in range(old.shape[1]):
                expected = old[:, head]
                if j == i and head // group == h:  # attention may be given repeated keys
                    expected = factor * expected
                    if i == 1 and heads.k_rope:  # the rotated keys are all heads' own
                        expected = old[:, head].clone()
                        expected[..., : slices[0].stop - slices[0].start] = 0
                torch.testing.assert_close(new[:, head], expected, msg=f"{name}, {i}, {h}")


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_the_columns_of_the_output_take_one_head_each(name: str) -> None:
    model = built(name)
    (heads,) = attention_heads(model)
    assert len(heads.o) == heads.heads
    names = {part.param for part in heads.o}
    (only,) = names
    shape = model.get_parameter(only).shape
    dims = {part.dim for part in heads.o}
    assert dims == {0 if name == "gpt2" else 1}
    (dim,) = dims
    bounds = [(part.start, part.stop) for part in heads.o]
    width = shape[dim] // heads.heads
    assert bounds == [(h * width, (h + 1) * width) for h in range(heads.heads)]
    assert all(part.bias is None for part in heads.o)


def test_torchs_attention_counts_its_heads_itself() -> None:
    layer = nn.TransformerEncoderLayer(32, 4, 64)
    (heads,) = attention_heads(Body(a=layer))
    assert (heads.name, heads.heads, heads.kv_heads) == ("a.self_attn", 4, 4)
    assert heads.k[1] == HeadSlice(
        "a.self_attn.in_proj_weight", 0, 40, 48, "a.self_attn.in_proj_bias"
    )
    assert heads.o[3] == HeadSlice("a.self_attn.out_proj.weight", 1, 24, 32)
    apart = nn.MultiheadAttention(32, 2, kdim=16, vdim=8, bias=False)
    (heads,) = attention_heads(Body(a=apart))
    assert heads.q[1] == HeadSlice("a.q_proj_weight", 0, 16, 32)
    assert heads.v[1] == HeadSlice("a.v_proj_weight", 0, 16, 32)


def test_a_config_within_a_config_is_read() -> None:
    q, k, v = (nn.Linear(D, width) for width in (16, 8, 8))
    model = Body(layer=Holder(attn=Holder(q_proj=q, k_proj=k, v_proj=v, o_proj=nn.Linear(16, D))))
    model.config = SimpleNamespace(text_config=SimpleNamespace(num_attention_heads=4))  # type: ignore[assignment]
    (heads,) = attention_heads(model)
    assert (heads.heads, heads.kv_heads, heads.head_dim, len(heads.o)) == (4, 2, 4, 4)


def test_unknown_heads_are_refused_by_name() -> None:
    names = ("to_q", "to_k", "to_v")
    model = Body(attn=Holder(**{name: nn.Linear(D, D) for name in names}))
    with pytest.raises(RoutingError, match="attn: nothing says how many heads it has: Holder and"):
        attention_heads(model)
    model.attn.num_heads = 3  # type: ignore[union-attr, assignment]
    with pytest.raises(RoutingError, match=r"the 8 rows of attn\.to_q\.weight do not divide by"):
        attention_heads(model)


def test_a_model_without_attention_has_none() -> None:
    assert attention_heads(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2))) == ()
