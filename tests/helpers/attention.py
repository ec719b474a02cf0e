"""Small language models of transformers with every way that attention heads are stored."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

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


def built(name: str, layers: int = 1) -> nn.Module:
    """The model of this name with random weights, biases among them."""
    transformers = pytest.importorskip("transformers")
    transformers.logging.set_verbosity_error()
    family, options, _ = MODELS[name]
    depth = "n_layer" if "n_layer" in options else "num_hidden_layers"
    config = getattr(transformers, f"{family}Config")(**{**options, depth: layers})
    torch.manual_seed(0)
    model: nn.Module = transformers.AutoModelForCausalLM.from_config(
        config, attn_implementation="sdpa"
    )
    with torch.no_grad():
        for key, param in model.named_parameters():
            if key.endswith("bias"):
                param.normal_(std=0.1)
    return model.eval()
