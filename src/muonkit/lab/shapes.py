"""The parameters of well-known models as numbers: shapes, views and roles, without a tensor.

``muonkit plan`` simulates a step from these lists. A list is worked out from the model's config in
Hugging Face's field names, so that transformers, where it is installed, builds the same model from
the same mapping (the tests compare them). Names and layout are those of transformers 5: experts
are one stacked parameter per projection, E x out x in, with gate and up fused.

Sources. The numbers are those of the ``config.json`` in these repositories on huggingface.co, read
from public copies (GPT-2's and DeepSeek-V3's are also transformers' defaults); the totals are what
the lists add up to, and the tests compare them with what others count:

    gpt2-124m        openai-community/gpt2         124,439,808 (the head is the embedding)
    llama-8b         meta-llama/Meta-Llama-3-8B    8,030,261,248
    llama-70b        meta-llama/Meta-Llama-3-70B   70,553,706,496
    qwen3-30b-a3b    Qwen/Qwen3-30B-A3B            30,532,122,624
    deepseek-v3      deepseek-ai/DeepSeek-V3       671,026,404,352 (arXiv 2412.19437)
    kimi-k2          moonshotai/Kimi-K2-Base       1,026,408,209,408 (arXiv 2507.20534)

Left out are the routers' correction biases (one number per expert and sparse layer; a buffer that
no gradient reaches) and DeepSeek-V3's multi-token prediction module (11.5e9 elements of its own by
README_WEIGHTS.md of its repository, which counts 671e9 without it). Kimi K2 is published as 1.04e12
and this list is 1.3% below. It is what the weights hold: Hugging Face counts 1,026,408,235,864 in
them, 23,040 of the difference being correction biases and 3,416 unexplained. One prediction module
of this shape would make it 1.0436e12, which may be where the 1.04 comes from.

Algorithm and view are what `muonkit.route` decides: embeddings, output heads, gains and biases go
to AdamW, all other matrices to Muon, mixture-of-experts *routers included* (E x hidden, as one
matrix).

Roles are those of transformers' tensor parallel plans, where it has one. It has none for GPT-2
(here as in Megatron-LM, arXiv 1909.08053) and none for multi-head latent attention (here as in
DeepSeek's own ``inference/model.py``: the down projections replicated, the up projections cut by
head). Embedding and head are cut by vocabulary, as there. Cuts are contiguous and look at no head
boundary: what counts for a plan is the size of a rank's rectangle.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Literal

from muonkit.views import View

__all__ = ["MODELS", "ModelShape", "ParameterShape", "PublishedModel", "Role", "published"]

Role = Literal["colwise", "rowwise", "vocab", "replicated"]
Config = Mapping[str, int]


@dataclass(frozen=True)
class ParameterShape:
    """One kind of parameter: one tensor, or one in each of some layers.

    Attributes:
        name: its dotted name; ``*`` stands for the index of the layer.
        shape: as stored.
        view: how it is a batch of matrices (see `muonkit.views`); None goes to AdamW.
        role: what tensor parallelism does with it: "colwise" cuts its outputs, "rowwise" its
            inputs, "vocab" the tokens of an embedding or head, "replicated" nothing.
        layers: the layers that have one; None if there is one in all.
    """

    name: str
    shape: tuple[int, ...]
    view: str | None = None
    role: Role = "replicated"
    layers: range | None = None

    @property
    def algorithm(self) -> Literal["muon", "adamw"]:
        return "adamw" if self.view is None else "muon"

    @property
    def count(self) -> int:
        """How many tensors there are of it."""
        return 1 if self.layers is None else len(self.layers)

    @property
    def names(self) -> tuple[str, ...]:
        """The name of each of them."""
        if self.layers is None:
            return (self.name,)
        return tuple(self.name.replace("*", str(layer), 1) for layer in self.layers)

    @property
    def elements(self) -> int:
        """The number of elements of all of them together."""
        return self.count * prod(self.shape)

    @property
    def tp_dim(self) -> int | None:
        """The dimension that tensor parallelism shards; None if each rank has it whole.

        Of experts it is a dimension of every expert: `Shard(1)` or `Shard(2)`.
        """
        if self.role == "replicated":
            return None
        if self.role == "vocab" or len(self.shape) == 1:
            return 0
        if "flatten" in self._steps:  # a convolution
            return 0 if self.role == "colwise" else 1
        outputs, inputs = len(self.shape) - 2, len(self.shape) - 1
        if "transpose" in self._steps:  # stored in x out: the outputs come last
            outputs, inputs = inputs, outputs
        return outputs if self.role == "colwise" else inputs

    @property
    def ep_dim(self) -> int | None:
        """The dimension that expert parallelism shards; None if this is no stack of experts."""
        return 0 if "experts" in self._steps else None

    @property
    def _steps(self) -> tuple[str, ...]:
        return () if self.view is None else View.parse(self.view).steps


@dataclass(frozen=True)
class ModelShape:
    """A model as `muonkit plan` sees it.

    Attributes:
        name: what is typed.
        parameters: every trainable one, each tied tensor once, in the order of the layers:
            embedding first, head last.
    """

    name: str
    parameters: tuple[ParameterShape, ...]

    @property
    def layers(self) -> int:
        """How many layers there are."""
        return max((p.layers.stop for p in self.parameters if p.layers is not None), default=0)

    def elements(self, algorithm: str | None = None) -> int:
        """The number of elements of all parameters, or of one algorithm's ("muon", "adamw")."""
        return sum(p.elements for p in self.parameters if algorithm in (None, p.algorithm))


@dataclass(frozen=True)
class PublishedModel(ModelShape):
    """A well-known model.

    Attributes:
        architecture: transformers' ``model_type``, a key of the table of builders below.
        config: the fields of its ``config.json`` that the shapes depend on.
        source: where `config` was read: a repository on huggingface.co.
    """

    architecture: str
    config: Config
    source: str


def published(name: str, architecture: str, config: Config, source: str) -> PublishedModel:
    """The model of an architecture with this configuration."""
    return PublishedModel(name, _BUILDERS[architecture](config), architecture, config, source)


# -- architectures --------------------------------------------------------------------------------


def _gpt2(c: Config) -> tuple[ParameterShape, ...]:
    """Matrices are stored in x out (Conv1D), q, k, v are fused, and all have biases."""
    d, layers, h = c["n_embd"], range(c["n_layer"]), "transformer.h.*."

    def vector(name: str, size: int, role: Role = "replicated") -> ParameterShape:
        return ParameterShape(h + name, (size,), role=role, layers=layers)

    def matrix(name: str, inputs: int, outputs: int, role: Role) -> tuple[ParameterShape, ...]:
        view = "transpose > split(rows=3)" if name.endswith("c_attn") else "transpose"
        weight = ParameterShape(h + f"{name}.weight", (inputs, outputs), view, role, layers)
        # The bias of a sum over ranks is added once, so it is not cut.
        return weight, vector(f"{name}.bias", outputs, role if role == "colwise" else "replicated")

    return (
        ParameterShape("transformer.wte.weight", (c["vocab_size"], d), role="vocab"),
        ParameterShape("transformer.wpe.weight", (c["n_positions"], d)),
        vector("ln_1.weight", d),
        vector("ln_1.bias", d),
        *matrix("attn.c_attn", d, 3 * d, "colwise"),
        *matrix("attn.c_proj", d, d, "rowwise"),
        vector("ln_2.weight", d),
        vector("ln_2.bias", d),
        *matrix("mlp.c_fc", d, 4 * d, "colwise"),
        *matrix("mlp.c_proj", 4 * d, d, "rowwise"),
        ParameterShape("transformer.ln_f.weight", (d,)),
        ParameterShape("transformer.ln_f.bias", (d,)),
    )


def _llama(c: Config) -> tuple[ParameterShape, ...]:
    layers = range(c["num_hidden_layers"])
    mlp = _gated_mlp("mlp", c["hidden_size"], c["intermediate_size"], layers)
    return _decoder(c, (*_attention(c, c["hidden_size"] // c["num_attention_heads"]), *mlp))


def _qwen3_moe(c: Config) -> tuple[ParameterShape, ...]:
    """Every layer has experts (decoder_sparse_step 1), none has a shared one."""
    layers = range(c["num_hidden_layers"])
    return _decoder(
        c,
        (
            *_attention(c, c["head_dim"]),
            _in_layers("self_attn.q_norm.weight", (c["head_dim"],), layers),
            _in_layers("self_attn.k_norm.weight", (c["head_dim"],), layers),
            *_experts(c, c["num_experts"], layers),
        ),
    )


def _deepseek_v3(c: Config) -> tuple[ParameterShape, ...]:
    """The first layers are dense; the others have routed and shared experts."""
    dense = range(c["first_k_dense_replace"])
    sparse = range(len(dense), c["num_hidden_layers"])
    hidden, shared = c["hidden_size"], c["moe_intermediate_size"] * c["n_shared_experts"]
    return _decoder(
        c,
        (
            *_latent_attention(c),
            *_gated_mlp("mlp", hidden, c["intermediate_size"], dense),
            *_experts(c, c["n_routed_experts"], sparse),
            *_gated_mlp("mlp.shared_experts", hidden, shared, sparse),
        ),
    )


# -- what they share ------------------------------------------------------------------------------


def _decoder(c: Config, inside: tuple[ParameterShape, ...]) -> tuple[ParameterShape, ...]:
    """Embedding, two norms per layer beside what is `inside` it, a last norm, an untied head."""
    hidden, layers = c["hidden_size"], range(c["num_hidden_layers"])
    return (
        ParameterShape("model.embed_tokens.weight", (c["vocab_size"], hidden), role="vocab"),
        *inside,
        _in_layers("input_layernorm.weight", (hidden,), layers),
        _in_layers("post_attention_layernorm.weight", (hidden,), layers),
        ParameterShape("model.norm.weight", (hidden,)),
        ParameterShape("lm_head.weight", (c["vocab_size"], hidden), role="vocab"),
    )


def _attention(c: Config, head_dim: int) -> tuple[ParameterShape, ...]:
    """Grouped-query attention, its projections apart and without biases."""
    hidden, layers = c["hidden_size"], range(c["num_hidden_layers"])
    q, kv = c["num_attention_heads"] * head_dim, c["num_key_value_heads"] * head_dim
    return (
        _matrix("self_attn.q_proj.weight", q, hidden, "colwise", layers),
        _matrix("self_attn.k_proj.weight", kv, hidden, "colwise", layers),
        _matrix("self_attn.v_proj.weight", kv, hidden, "colwise", layers),
        _matrix("self_attn.o_proj.weight", hidden, q, "rowwise", layers),
    )


def _latent_attention(c: Config) -> tuple[ParameterShape, ...]:
    """Multi-head latent attention (arXiv 2405.04434); one rotary key serves all heads."""
    hidden, layers, heads = (
        c["hidden_size"],
        range(c["num_hidden_layers"]),
        c["num_attention_heads"],
    )
    q_rank, kv_rank, value = c["q_lora_rank"], c["kv_lora_rank"], c["v_head_dim"]
    plain, rotary = c["qk_nope_head_dim"], c["qk_rope_head_dim"]
    q, kv, down = heads * (plain + rotary), heads * (plain + value), kv_rank + rotary
    latent = f"split(rows={kv_rank}+{rotary})"
    return (
        _matrix("self_attn.q_a_proj.weight", q_rank, hidden, "replicated", layers),
        _in_layers("self_attn.q_a_layernorm.weight", (q_rank,), layers),
        _matrix("self_attn.q_b_proj.weight", q, q_rank, "colwise", layers),
        _in_layers(
            "self_attn.kv_a_proj_with_mqa.weight", (down, hidden), layers, latent, "replicated"
        ),
        _in_layers("self_attn.kv_a_layernorm.weight", (kv_rank,), layers),
        _matrix("self_attn.kv_b_proj.weight", kv, kv_rank, "colwise", layers),
        _matrix("self_attn.o_proj.weight", hidden, heads * value, "rowwise", layers),
    )


def _gated_mlp(at: str, hidden: int, inner: int, layers: range) -> tuple[ParameterShape, ...]:
    return (
        _matrix(f"{at}.gate_proj.weight", inner, hidden, "colwise", layers),
        _matrix(f"{at}.up_proj.weight", inner, hidden, "colwise", layers),
        _matrix(f"{at}.down_proj.weight", hidden, inner, "rowwise", layers),
    )


def _experts(c: Config, experts: int, layers: range) -> tuple[ParameterShape, ...]:
    """The stacks of routed experts, and the router that chooses between them."""
    hidden, inner = c["hidden_size"], c["moe_intermediate_size"]
    gate_up, fused = (experts, 2 * inner, hidden), "experts > split(rows=2)"
    down = (experts, hidden, inner)
    return (
        _in_layers("mlp.experts.gate_up_proj", gate_up, layers, fused, "colwise"),
        _in_layers("mlp.experts.down_proj", down, layers, "experts", "rowwise"),
        _matrix("mlp.gate.weight", experts, hidden, "replicated", layers),
    )


def _matrix(name: str, outputs: int, inputs: int, role: Role, layers: range) -> ParameterShape:
    return _in_layers(name, (outputs, inputs), layers, "matrix", role)


def _in_layers(
    name: str,
    shape: tuple[int, ...],
    layers: range,
    view: str | None = None,
    role: Role = "replicated",
) -> ParameterShape:
    return ParameterShape(f"model.layers.*.{name}", shape, view, role, layers)


_BUILDERS: dict[str, Callable[[Config], tuple[ParameterShape, ...]]] = {
    "gpt2": _gpt2,
    "llama": _llama,
    "qwen3_moe": _qwen3_moe,
    "deepseek_v3": _deepseek_v3,
}

# -- models ---------------------------------------------------------------------------------------

_GPT2 = {"vocab_size": 50257, "n_positions": 1024, "n_embd": 768, "n_layer": 12, "n_head": 12}

_LLAMA_8B = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}

_LLAMA_70B = _LLAMA_8B | {
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
}

_QWEN3_30B_A3B = {
    "vocab_size": 151936,
    "hidden_size": 2048,
    "moe_intermediate_size": 768,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
}

_DEEPSEEK_V3 = {
    "vocab_size": 129280,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 61,
    "first_k_dense_replace": 3,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
}

# The architecture is DeepSeek-V3's: half the heads, half as many experts again, one dense layer.
_KIMI_K2 = _DEEPSEEK_V3 | {
    "vocab_size": 163840,
    "first_k_dense_replace": 1,
    "num_attention_heads": 64,
    "num_key_value_heads": 64,
    "n_routed_experts": 384,
}

MODELS: dict[str, PublishedModel] = {
    model.name: model
    for model in (
        published("gpt2-124m", "gpt2", _GPT2, "openai-community/gpt2"),
        published("llama-8b", "llama", _LLAMA_8B, "meta-llama/Meta-Llama-3-8B"),
        published("llama-70b", "llama", _LLAMA_70B, "meta-llama/Meta-Llama-3-70B"),
        published("qwen3-30b-a3b", "qwen3_moe", _QWEN3_30B_A3B, "Qwen/Qwen3-30B-A3B"),
        published("deepseek-v3", "deepseek_v3", _DEEPSEEK_V3, "deepseek-ai/DeepSeek-V3"),
        published("kimi-k2", "deepseek_v3", _KIMI_K2, "moonshotai/Kimi-K2-Base"),
    )
}
