"""The lists of shapes against published sizes, against transformers' models, and routing."""

from __future__ import annotations

import fnmatch
from collections import Counter
from math import prod
from typing import TYPE_CHECKING, Any

import pytest
import torch

from muonkit.lab.errors import LabError
from muonkit.lab.plan_models import find_model, shape_of
from muonkit.lab.shapes import MODELS, ParameterShape, PublishedModel, published
from muonkit.routing.routes import route
from muonkit.views import blocks_of

if TYPE_CHECKING:
    from torch import nn

NAMES = sorted(MODELS)

# (what is published, half a unit of its last digit), but for Kimi K2: the published 1.04e12 is
# 0.0136e12 above what its weights hold; a prediction module of its shape, left out here as in
# DeepSeek-V3, would be 0.0172e12.
PUBLISHED = {
    "gpt2-124m": (124.4e6, 0.05e6),
    "llama-8b": (8.03e9, 0.005e9),
    "llama-70b": (70.6e9, 0.05e9),
    "qwen3-30b-a3b": (30.5e9, 0.05e9),
    "deepseek-v3": (671e9, 0.5e9),
    "kimi-k2": (1.04e12, 0.015e12),
}

# To the last element, as others count: the two largest by llama.cpp's n_params, whose count has the
# routers' correction biases (one per expert and sparse layer), which no gradient reaches.
COUNTED = {
    "gpt2-124m": 124_439_808,
    "llama-8b": 8_030_261_248,
    "llama-70b": 70_553_706_496,
    "qwen3-30b-a3b": 30_532_122_624,
    "deepseek-v3": 671_026_419_200 - 58 * 256,
    "kimi-k2": 1_026_408_232_448 - 60 * 384,
}


@pytest.fixture(params=NAMES)
def model(request: pytest.FixtureRequest) -> PublishedModel:
    return MODELS[request.param]


def test_the_size_is_the_published_one(model: PublishedModel) -> None:
    published, tolerance = PUBLISHED[model.name]
    assert abs(model.elements() - published) <= tolerance


def test_the_size_is_what_others_count(model: PublishedModel) -> None:
    assert model.elements() == COUNTED[model.name]


def test_names_are_distinct_and_as_many_as_counted(model: PublishedModel) -> None:
    names = Counter(name for p in model.parameters for name in p.names)
    assert max(names.values()) == 1
    assert len(names) == sum(p.count for p in model.parameters)
    assert not [name for name in names if "*" in name]


def test_the_elements_are_those_of_both_algorithms(model: PublishedModel) -> None:
    assert model.elements() == model.elements("muon") + model.elements("adamw")
    # All but the embedding and the head: no layer's matrices have been given to AdamW.
    vocabulary = sum(p.elements for p in model.parameters if p.role == "vocab")
    assert model.elements("adamw") - vocabulary < 0.01 * model.elements()


def test_views_cover_their_parameters(model: PublishedModel) -> None:
    for p in model.parameters:
        if p.view is not None:
            matrices = blocks_of(p.view, p.shape)
            assert sum(b.batch * b.rows * b.cols for b in matrices) == prod(p.shape)


def test_what_is_sharded_is_shared_out_evenly_among_eight(model: PublishedModel) -> None:
    for p in model.parameters:
        if p.tp_dim is not None and p.name != "transformer.wte.weight":  # 50,257 is odd
            assert p.shape[p.tp_dim] % 8 == 0, p


def test_roles_say_which_dimension_is_cut() -> None:
    def dims(model: str, name: str) -> tuple[int | None, int | None]:
        (found,) = [p for p in MODELS[model].parameters if p.name.endswith(name)]
        return found.tp_dim, found.ep_dim

    # Stored out x in, in x out, and E x out x in.
    assert dims("llama-8b", "q_proj.weight") == (0, None)
    assert dims("llama-8b", "o_proj.weight") == (1, None)
    assert dims("gpt2-124m", "c_attn.weight") == (1, None)
    assert dims("gpt2-124m", "mlp.c_proj.weight") == (0, None)
    assert dims("gpt2-124m", "c_attn.bias") == (0, None)
    assert dims("gpt2-124m", "mlp.c_proj.bias") == (None, None)
    assert dims("kimi-k2", "experts.gate_up_proj") == (1, 0)
    assert dims("kimi-k2", "experts.down_proj") == (2, 0)
    assert dims("kimi-k2", "mlp.gate.weight") == (None, None)
    assert dims("kimi-k2", "embed_tokens.weight") == (0, None)


def test_dense_and_sparse_layers_take_turns() -> None:
    deepseek = {p.name: p for p in MODELS["deepseek-v3"].parameters}
    assert deepseek["model.layers.*.mlp.up_proj.weight"].names[-1] == (
        "model.layers.2.mlp.up_proj.weight"
    )
    experts = deepseek["model.layers.*.mlp.experts.down_proj"]
    assert experts.names[0] == "model.layers.3.mlp.experts.down_proj"
    assert experts.count == 58


def test_an_unknown_model_is_refused_with_the_names() -> None:
    assert find_model("kimi-k2") is MODELS["kimi-k2"]
    with pytest.raises(LabError, match=r"did you mean 'llama-70b'\? .*deepseek-v3"):
        find_model("llama-70")


# -- against transformers -------------------------------------------------------------------------


def shortened(model: PublishedModel) -> PublishedModel:
    """The same in full width, with one sparse layer, or two layers of one kind."""
    key = "n_layer" if model.architecture == "gpt2" else "num_hidden_layers"
    layers = max(2, model.config.get("first_k_dense_replace", 0) + 1)
    config = {**model.config, key: layers}
    return published(model.name, model.architecture, config, model.source)


def built(model: PublishedModel) -> nn.Module:
    transformers: Any = pytest.importorskip("transformers")
    transformers.logging.set_verbosity_error()
    config = transformers.AutoConfig.for_model(model.architecture, **model.config)
    with torch.device("meta"):
        made: nn.Module = transformers.AutoModelForCausalLM.from_config(config)
    return made


def test_routing_says_the_same_of_transformers_model(model: PublishedModel) -> None:
    short = shortened(model)
    routed = {r.name: (r.shape, r.view, r.algorithm) for r in route(built(short))}
    listed = {name: (p.shape, p.view, p.algorithm) for p in short.parameters for name in p.names}
    assert listed == routed


# transformers' names of styles, less what concerns activations and gradients only.
STYLES = {
    "colwise": "colwise",
    "packed_colwise": "colwise",
    "rowwise": "rowwise",
    "replicated_with_grad_allreduce": "replicated",
    "colwise_gather_output": "vocab",
}


def planned_styles(module: nn.Module, parameters: tuple[ParameterShape, ...]) -> dict[str, str]:
    """The styles of transformers' own plan, by name in the list; modules have no parameters."""
    config: Any = module.config
    plan = {f"model.{key}": style for key, style in config.base_model_tp_plan.items()}
    plan |= getattr(type(module), "_tp_plan", None) or {}
    return {
        p.name: style
        for p in parameters
        for key, style in plan.items()
        if fnmatch.fnmatchcase(p.name.removesuffix(".weight"), key)
    }


@pytest.mark.parametrize(
    ("name", "least"), [("llama-8b", 8), ("qwen3-30b-a3b", 9), ("deepseek-v3", 9), ("kimi-k2", 9)]
)
def test_roles_are_those_of_transformers_plan(name: str, least: int) -> None:
    short = shortened(MODELS[name])
    styles = planned_styles(built(short), short.parameters)
    assert len(styles) >= least  # a plan that names nothing of ours would compare nothing
    roles = {p.name: p.role for p in short.parameters}
    assert {key: roles[key] for key in styles} == {k: STYLES[s] for k, s in styles.items()}


@pytest.mark.parametrize("name", ["llama-8b", "qwen3-30b-a3b"])
def test_a_users_model_becomes_the_list_of_the_same_model(name: str) -> None:
    """Shapes, views, what tensor and expert parallelism cut, and the layers."""
    short = shortened(MODELS[name])
    read = shape_of("mine", built(short))
    listed = {
        each: (p.shape, p.view, p.tp_dim, p.ep_dim, None if p.layers is None else layer)
        for p in short.parameters
        for layer, each in enumerate(p.names, p.layers.start if p.layers else 0)
    }
    found = {
        p.name: (p.shape, p.view, p.tp_dim, p.ep_dim, p.layers.start if p.layers else None)
        for p in read.parameters
    }
    assert found == listed
    assert read.layers == short.layers
