"""The names that public code gives to the layers which make q, k and v of an attention, and to what
chooses experts.
"""

from __future__ import annotations

import functools
import re

from muonkit.routing.places import name_set

__all__ = ["KV", "ONE_ATTENDS", "QKV", "QKV_BY_HEAD", "ROUTER", "TWO_ATTEND", "makes"]

# A module with one of the first, or with two of the second, attends.
ONE_ATTENDS = name_set("qkv to_qkv to_kv q_proj")
TWO_ATTEND = name_set("q k v query key value k_proj v_proj to_q to_k to_v")

# Surely q, k and v in one.
QKV = name_set(
    "qkv qkv_proj proj_qkv wqkv Wqkv W_qkv w_qkv to_qkv attn_qkv qkv_linear qkv_layer "
    "in_proj_qkv qkv_projection"
)
# Stored head by head (Megatron's order: GPT-NeoX, Bloom, Falcon, Persimmon, Qwen3-Next).
QKV_BY_HEAD = name_set("query_key_value linear_qkv in_proj_qkvz")
KV = name_set(
    "kv to_kv kv_proj proj_kv Wkv wkv W_kv w_kv kv_linear linear_kv lin_kv kv_layer key_value"
)

# The layer, or the class of the layer, that scores experts.
ROUTER = re.compile(r"[Rr]outer|TopKGate")

_AFFIXES = r"(?:(?:to|proj|linear|lin|fc|w|W)_?)?(?:{})(?:_?(?:proj|lin|linear|layer|attn))?"
_ONE = {
    "q": re.compile(_AFFIXES.format("q|query")),
    "k": re.compile(_AFFIXES.format("k|key")),
    "v": re.compile(_AFFIXES.format("v|value")),
}


@functools.lru_cache(maxsize=4096)
def makes(name: str) -> str:
    """Which of q, k and v a layer of this name makes: "qkv", "kv", "q", "k", "v", or "" for none.

    Outside of an attention a layer may have such a name too: a critic's "value".
    """
    if name in QKV or name in QKV_BY_HEAD:
        return "qkv"
    if name in KV:
        return "kv"
    return next((what for what, names in _ONE.items() if names.fullmatch(name)), "")
