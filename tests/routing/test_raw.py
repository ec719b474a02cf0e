"""Parameters that modules hold themselves, as public packages keep them: what a name, a shape and a
module's own widths say. Each class is written anew after the package that it names."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from muonkit.routing.attention import find_attention
from muonkit.routing.routes import RoutingError, Rule, route
from muonkit.routing.survey import survey
from tests.helpers.routing import Body, D, Holder, by_name, got, raw

ADAMW = ("adamw", None, False)
MATRIX = ("muon", "matrix", True)
TRANSPOSED = ("muon", "transpose", True)


@functools.cache
def class_named(cls: str) -> type[nn.Module]:
    return type(cls, (Holder,), {})


def named(cls: str, **attributes: object) -> nn.Module:
    """A module of a class of this name, which is the same for all."""
    return class_named(cls)(**attributes)


def part(module: nn.Module, label: str) -> tuple[str, str | None, bool]:
    return got(Body(part=module), f"part.{label}")


# -- layers of a class of one's own that states no widths -----------------------------------------


def own_layer(cls: str, label: str = "weight", *, bias: str = "", turned: bool = False) -> Any:
    """A maker of layers: inputs, outputs -> one of class `cls`, with its matrix under `label`."""

    def made(inputs: int, outputs: int) -> nn.Module:
        shape = (inputs, outputs) if turned else (outputs, inputs)
        vectors = {bias: raw(outputs)} if bias else {}
        return named(cls, **{label: raw(*shape)}, **vectors)

    return made


def language_model(layer: Any, table: Any, head: str) -> nn.Module:
    blocks = [
        Holder(
            norm=nn.LayerNorm(16),
            attn=Holder(num_heads=4, qkv=layer(16, 48), o_proj=layer(16, 16)),
            cross=Holder(num_heads=4, query=layer(16, 16), key=layer(16, 16), value=layer(16, 16)),
            mlp=Holder(gate_up_proj=layer(16, 64), down_proj=layer(32, 16)),
        )
        for _ in range(2)
    ]
    parts = {"pos_emb": table(32, 16), "layers": nn.ModuleList(blocks), head: layer(16, 100)}
    return Holder(embed_tokens=table(100, 16), **parts)


LAYERS = {
    "linear": own_layer("Linear"),  # as courses write it
    "W": own_layer("LinearLayer", "W", bias="b"),
    "bias": own_layer("Affine", bias="bias"),
    "turned": own_layer("Dense", "kernel", bias="bias", turned=True),
    "projection": own_layer("Projection"),
}


@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("head", ["lm_head", "output", "classifier", "decoder"])
@pytest.mark.parametrize("layer", LAYERS)
def test_ones_own_layers_are_routed_as_torchs(layer: str, head: str, per_head: bool) -> None:
    def table(rows: int, cols: int) -> nn.Module:
        return named("Lookup", weight=raw(rows, cols))

    def found(layer: Any, table: Any) -> list[tuple[str, str | None, bool | None]]:
        routes = route(language_model(layer, table, head), per_head=per_head)
        return [
            (r.algorithm, r.view and r.view.removeprefix("transpose").lstrip(" >"), r.decay)
            for r in routes
            if "norm" not in r.name and r.param.ndim == 2
        ]

    cut = found(LAYERS[layer], table)
    expected = found(lambda i, o: nn.Linear(i, o, bias=False), nn.Embedding)
    assert [(a, view or "matrix" if a == "muon" else None, d) for a, view, d in cut] == expected
    assert [algorithm for algorithm, _, _ in cut].count("adamw") == 3


def views(model: nn.Module, *, per_head: bool = False) -> dict[str, str | None]:
    routes = route(model, per_head=per_head)
    return {r.name: r.view if r.algorithm == "muon" else None for r in routes if r.param.ndim > 1}


TURNED = own_layer("Linear", turned=True)


def test_a_class_stores_all_its_matrices_in_one_way() -> None:
    """One bias, one name, one head or one chain speaks for the layers that say nothing."""

    def attention(layer: Any) -> nn.Module:
        return Holder(num_heads=4, qkv=layer(32, 96), o_proj=layer(32, 32))

    for other in (
        {"fc": own_layer("Linear", bias="bias", turned=True)(32, 48)},
        {"mlp": Holder(up_proj=TURNED(32, 64), down_proj=TURNED(64, 32))},
        {"mlp": Holder(w1=TURNED(32, 64), w2=TURNED(64, 32), w3=TURNED(32, 64))},
        {"embed": nn.Embedding(100, 32), "lm_head": TURNED(32, 100)},
        {"net": nn.Sequential(TURNED(32, 16), nn.ReLU(), TURNED(16, 8), nn.ReLU())},
    ):
        found = views(Body(attn=attention(TURNED), **other))
        assert found["attn.qkv.weight"] == "transpose > split(rows=3)"
        assert found["attn.o_proj.weight"] == "transpose"
        by_head = views(Body(attn=attention(TURNED), **other), per_head=True)
        assert by_head["attn.o_proj.weight"] == "transpose > split(cols=4)"


def test_what_may_be_stored_either_way_is_cut_by_its_name_alone() -> None:
    chain = nn.Sequential(*(m for i in (128, 32, 8) for m in (TURNED(i, i // 4), nn.ReLU())))
    assert set(views(Body(chain=chain)).values()) == {"transpose", None}
    # 48 is twice 24, and the other's inputs: were it cut, then along its own.
    pair = Body(a=TURNED(64, 48), b=Holder(fc2=own_layer("Dense", turned=True)(24, 32)))
    assert views(pair)["a.weight"] == "matrix"
    thing = own_layer("Thing", turned=True)
    cut = views(Body(qkv=thing(32, 96), gate_up_proj=thing(32, 128), fc1=thing(64, 48)))
    assert cut["qkv.weight"] == "transpose > split(rows=3)"
    assert cut["gate_up_proj.weight"] == "transpose > split(rows=2)"
    assert cut["fc1.weight"] == "matrix"
    with pytest.raises(RoutingError, match="nothing tells whether it is stored"):
        route(Body(kv=thing(32, 64)))


@pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning")
@pytest.mark.parametrize("norm", ["weight_norm", "old weight_norm", "spectral_norm", "prune"])
def test_a_head_of_ones_own_class_that_is_normed_or_pruned(norm: str) -> None:
    head = named("Linear", weight=nn.Parameter(torch.randn(100, 32)))
    head.forward = lambda x: x @ head.weight.T  # type: ignore[method-assign]
    wrap: Any = {
        "weight_norm": nn.utils.parametrizations.weight_norm,
        "old weight_norm": nn.utils.weight_norm,
        "spectral_norm": nn.utils.parametrizations.spectral_norm,
        "prune": lambda module: prune.l1_unstructured(module, "weight", 0.5),
    }[norm]
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), wrap(head))
    assert views(model).pop("0.weight") == "matrix"
    assert {view for name, view in views(model).items() if name != "0.weight"} == {None}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_layer_with_an_empty_place_and_compiled_blocks() -> None:
    """Children that are None, and such as have no length, are no children to count."""
    layer = named("Linear", weight=raw(32, 32))
    layer.register_module("adapter", None)
    block = torch.compile(Body(fc=nn.Linear(32, 32)))
    found = views(Holder(layer=layer, blocks=nn.ModuleList([block]), head=nn.Linear(32, 5)))
    assert found["layer.weight"] == found["blocks.0.fc.weight"] == "matrix"


@pytest.mark.parametrize(
    ("cls", "name", "held", "expected"),
    [
        ("Lookup", "tok_emb", {"weight": (100, 32), "bias": (32,)}, None),
        ("Lookup", "pos_emb", {"weight": (100, 32), "bias": (32,)}, None),
        ("Codebook", "codes", {"weight": (100, 32)}, None),
        ("VectorQuantizer", "vq", {"weight": (100, 32)}, None),
        ("Prototypes", "prototypes", {"weight": (100, 32)}, None),
        ("Vocab", "words", {"weight": (100, 32)}, None),
        ("PositionProjection", "where", {"weight": (100, 32)}, None),
        ("Embedder", "embedder", {"weight": (100, 32), "bias": (32,)}, None),
        ("QuantizedLinear", "fc", {"weight": (100, 32)}, "matrix"),
        ("PositionwiseDense", "fc", {"weight": (100, 32)}, "matrix"),
        ("Model", "part", {"codebook_weight": (100, 32)}, None),
        ("Model", "part", {"pos_weight": (100, 32)}, None),
        ("Model", "part", {"token_weight": (100, 32)}, None),
        ("Model", "part", {"query_weight": (32, 32)}, "matrix"),
    ],
)
def test_a_table_is_none_of_muons_whatever_holds_it(
    cls: str, name: str, held: dict[str, tuple[int, ...]], expected: str | None
) -> None:
    module = named(cls, **{label: raw(*shape) for label, shape in held.items()})
    label = next(iter(held))
    assert views(Body(**{name: module}))[f"{name}.{label}"] == expected


@pytest.mark.parametrize(
    ("given", "weight", "bias", "expected"),
    [
        ({"kernel_size": 4}, (32, 4), 32, None),
        ({"num_heads": 8}, (8, 8), 8, None),
        ({"num_embeddings": 100, "embedding_dim": 32}, (100, 32), 32, None),
        ({"num_experts": 8}, (128, 32), 128, "split(rows=8)"),
        ({}, (128, 32), 128, "matrix"),
    ],
)
def test_numbers_that_a_module_states_go_before_its_bias(
    given: dict[str, int], weight: tuple[int, int], bias: int, expected: str | None
) -> None:
    cls = "Experts" if "num_experts" in given else "Thing"
    part = named(cls, weight=raw(*weight), bias=raw(bias), **given)
    assert views(Body(part=part))["part.weight"] == expected


def test_a_triangular_matrix_with_a_bias_is_no_layer() -> None:
    weight = nn.Parameter(torch.randn(16, 16).tril())
    part = named("CausalLinear", weight=weight, bias=raw(16))
    assert views(Body(part=part))["part.weight"] is None


@pytest.mark.parametrize("name", ["head", "output", "policy", "predictor"])
def test_a_module_of_several_raw_matrices_is_no_head_as_a_whole(name: str) -> None:
    several = named("RawMLP", w1=raw(64, 32), w2=raw(32, 64), w3=raw(64, 32))
    found = views(Holder(fc=nn.Linear(32, 32), **{name: several}))
    assert [found[f"{name}.w{i}"] for i in (1, 2, 3)] == ["matrix"] * 3


def test_a_head_that_has_a_norm_or_a_layer_before_it() -> None:
    head = named("LMHead", norm=nn.LayerNorm(32), dense=nn.Linear(32, 32), weight=raw(100, 32))
    body = Holder(embed=nn.Embedding(100, 32), fc=nn.Linear(32, 32), lm_head=head)
    found = views(body)
    assert found["lm_head.weight"] is None
    assert found["lm_head.dense.weight"] == "matrix"


@pytest.mark.parametrize("label", ["W_head", "head_weight", "classifier", "classifier_weight"])
def test_a_raw_head_of_the_root_is_one_and_the_layer_before_it_is_hidden(label: str) -> None:
    found = views(Holder(embed=nn.Embedding(100, 32), fc=nn.Linear(32, 32), **{label: raw(9, 32)}))
    assert found[label] is None
    assert found["fc.weight"] == "matrix"


@pytest.mark.parametrize(
    "held",
    [
        {"weight_mu": (9, 32), "weight_sigma": (9, 32)},  # Rainbow's noisy layers
        {"base_weight": (9, 32), "spline_weight": (9, 32, 5)},  # a layer of splines
        {"W": (32, 9)},
    ],
)
def test_the_last_layer_of_a_class_that_states_its_widths_is_a_head(
    held: dict[str, tuple[int, ...]],
) -> None:
    weights = {label: raw(*shape) for label, shape in held.items()}
    layer = named("SplineLayer", in_features=32, out_features=9, **weights)
    found = views(nn.Sequential(nn.Linear(32, 32), nn.ReLU(), layer))
    assert found.pop("0.weight") == "matrix"
    assert set(found.values()) == {None}


def test_a_named_head_with_layers_is_its_last_layer_unless_it_holds_its_weight() -> None:
    classifier = Holder(W=raw(32, 32), fc=nn.Linear(32, 10))
    found = views(Holder(fc=nn.Linear(32, 32), classifier=classifier))
    assert found["classifier.fc.weight"] is None
    assert found["classifier.W"] == "matrix"


@pytest.mark.parametrize(
    ("cls", "name", "given", "shape"),
    [
        ("Conv", "pos_block", {"in_channels": 32, "out_channels": 16}, (16, 32, 3, 3)),
        ("LatentConv2d", "conv", {"in_channels": 32, "out_channels": 16}, (16, 32, 3, 3)),
        ("TokenChoiceExperts", "experts", {"num_experts": 4}, (4, 32, 16)),
        ("TokenMixer", "mixer", {}, (32, 32)),
        ("UserEncoder", "encoder", {}, (32, 32)),
        ("MemoryLayer", "layer", {}, (32, 32)),
        ("TokenRouter", "router", {}, (4, 32)),
    ],
)
def test_a_layer_of_a_class_whose_name_has_a_tables_word_is_a_layer(
    cls: str, name: str, given: dict[str, int], shape: tuple[int, ...]
) -> None:
    found = views(Body(**{name: named(cls, weight=raw(*shape), **given)}))
    assert found[f"{name}.weight"] is not None


@pytest.mark.parametrize(
    "layers",
    [
        lambda layer: {"fc1": layer(16, 48), "fc2": layer(24, 16)},
        lambda layer: {"net": nn.Sequential(layer(16, 64), nn.GLU(), layer(32, 16), nn.ReLU())},
        lambda layer: {"q": layer(32, 64), "k": layer(64, 64), "o": layer(64, 32)},
        lambda layer: {"experts": nn.ModuleList([Holder(up_proj=layer(32, 8))])},
        lambda layer: {"down": layer(32, 64), "up": layer(64, 32)},
    ],
)
def test_shapes_that_may_deceive_turn_no_class(layers: Any) -> None:
    found = views(Body(**layers(own_layer("Linear"))))
    assert not [view for view in found.values() if view and "transpose" in view]


def test_gains_and_functions_called_linear_are_no_last_layer() -> None:
    for last in (
        named("Affine", weight=raw(1, 10), bias=raw(1, 10)),
        named("PiecewiseLinearActivation", weight=raw(10, 7)),
        nn.ParameterDict({"weight": raw(4, 10), "bias": raw(10)}),
    ):
        model = Holder(fc=nn.Linear(32, 32), fc2=nn.Linear(32, 10), scale=last)
        assert views(model)["fc2.weight"] is None


def test_several_matrices_of_stated_widths_are_no_one_layer() -> None:
    cell = named("GRU", in_dim=32, out_dim=32, Wz=raw(32, 32), Wr=raw(32, 32), Wh=raw(32, 32))
    found = views(Holder(embed=nn.Embedding(9, 32), predictor=cell, joiner=nn.Linear(32, 100)))
    assert found["joiner.weight"] is None
    assert found["predictor.Wz"] == "matrix"


def test_a_word_that_begins_with_w_is_no_numbered_matrix() -> None:
    with pytest.raises(RoutingError, match="word_vectors"):
        route(Body(part=Holder(word_vectors=raw(100, 32), W1=raw(32, 16), b1=raw(16))))


def test_a_subclass_and_a_sharded_class_store_as_their_base_does() -> None:
    zero = type("ZeroLinear", (class_named("Linear"),), {})
    # As fully_shard makes them.
    sharded = type("FSDPLinear", (type("FSDPModule", (), {}), class_named("Linear")), {})
    parts = {"o_proj": zero(weight=raw(32, 32)), "out": sharded(weight=raw(32, 32))}
    found = views(Body(qkv=TURNED(32, 96), **parts))
    assert found["o_proj.weight"] == found["out.weight"] == "transpose"


def test_widths_that_are_not_sure_make_no_head_of_a_hidden_layer() -> None:
    chain = Holder(layers=nn.ModuleList([TURNED(8, 16), TURNED(16, 16), TURNED(16, 4)]))
    assert list(views(chain).values()) == ["transpose", "transpose", None]
    rnn = Holder(i2h=TURNED(8, 32), h2h=TURNED(32, 32), h2o=TURNED(32, 8))
    assert views(rnn)["h2h.weight"] == "matrix"


def test_a_layer_with_one_output_of_any_class_is_the_last() -> None:
    layer = own_layer("Layer", bias="bias", turned=True)
    found = views(Holder(l1=layer(8, 32), l2=layer(32, 32), l3=layer(32, 1)))
    assert found["l2.weight"] == "transpose"


def test_a_raw_logits_that_takes_nothing_is_no_head() -> None:
    model = Holder(fc=nn.Linear(8, 16), logits=raw(12, 10), fc2=nn.Linear(16, 3))
    with pytest.raises(RoutingError, match="logits"):
        route(model)
    assert (
        views(Holder(fc=nn.Linear(8, 16), W_head=raw(9, 9), fc2=nn.Linear(16, 3)))["fc2.weight"]
        is None
    )


def test_gates_of_a_cell_and_a_hidden_weight_of_a_classifier_are_no_heads() -> None:
    cell = Holder(input=named("Gate", W=raw(48, 32)), output=named("Gate", W=raw(48, 32)))
    found = views(Holder(emb=nn.Embedding(50, 32), cell=cell, fc=nn.Linear(32, 50)))
    assert found["cell.output.W"] == "matrix"
    head = Holder(weight=raw(16, 16), bias=raw(16), out=nn.Linear(16, 5))
    found = views(Holder(fc=nn.Linear(16, 16), classifier=head))
    assert found["classifier.weight"] == "matrix"
    assert found["classifier.out.weight"] is None


def test_places_whose_names_speak_of_time_or_mix_positions_hold_layers() -> None:
    embed = named("Layer", weight=raw(32, 16), bias=raw(32))
    mixer = named("Mixer", weight=raw(20, 20))
    found = views(Body(time_embed=embed, position_mix=mixer, part=Holder(latent_w=raw(9, 9))))
    assert found["time_embed.weight"] == found["position_mix.weight"] == "matrix"
    assert found["part.latent_w"] == "matrix"


def test_a_spectral_norm_on_a_weight_of_another_name() -> None:
    attention = Holder(num_heads=4, qkv=named("Linear", W=nn.Parameter(torch.randn(96, 32))))
    nn.utils.parametrizations.spectral_norm(attention.qkv, "W")
    assert "split(rows=3)" in views(Body(attn=attention)).values()


@pytest.mark.parametrize("prefix", ["", "FSDP", "Parametrized"])
def test_a_class_is_known_by_its_own_name_when_a_layer_is_sharded_by_itself(prefix: str) -> None:
    conv = class_named("Conv1D")  # Hugging Face's, in × out; a square one is told by its class only
    kind = type(f"{prefix}Conv1D", (type("FSDPModule", (), {}), conv), {}) if prefix else conv
    part = kind(nx=32, nf=32, weight=raw(32, 32), bias=raw(32))
    assert views(Body(part=part))["part.weight"] == "transpose"


def test_matrices_and_biases_as_d2l_numbers_them() -> None:
    found = views(Holder(W1=raw(784, 256), b1=raw(256), W2=raw(256, 10), b2=raw(10)))
    assert found == {"W1": "transpose", "W2": "transpose"}


def test_u_and_v_are_layers_beside_a_w_and_else_nobody_knows() -> None:
    recurrent = named("Cell", U=raw(32, 32), W=raw(32, 32), V=raw(16, 32))
    assert views(Body(cell=recurrent))["cell.U"] == "matrix"
    with pytest.raises(RoutingError, match=r"cell\.U"):
        route(Body(cell=named("Factors", U=raw(90, 8), V=raw(80, 8))))


def test_the_bias_of_ones_own_attention_is_found_by_its_name() -> None:
    layer = own_layer("LinearLayer", "W", bias="b")
    parts = {name: layer(32, 32) for name in ("q_proj", "k_proj", "v_proj", "o_proj")}
    model = Body(attn=Holder(num_heads=4, head_dim=8, **parts))
    _, _, unknown = find_attention(survey(model))
    (why,) = {each.why for each in unknown.values()}
    assert why == "nothing tells whether LinearLayer stores its matrices out × in or in × out"
    model = Body(attn=Holder(num_heads=4, head_dim=8, **parts), fc=layer(32, 48))
    (heads,), _, _ = find_attention(survey(model))
    assert {part.bias for part in (*heads.q, *heads.k)} == {"attn.q_proj.b", "attn.k_proj.b"}


@pytest.mark.parametrize("label", ["W", "w", "weights"])
def test_a_head_by_name_whatever_it_calls_its_weight(label: str) -> None:
    head = named("Thing", **{label: raw(100, 16)})
    body = Holder(embed=nn.Embedding(100, 16), fc=nn.Linear(16, 16), output=head)
    assert got(body, f"output.{label}")[0] == "adamw"


# -- tables, tokens and coefficients --------------------------------------------------------------


@pytest.mark.parametrize(
    ("label", "shape"),
    [
        ("mem_kv", (2, 4, D)),  # x-transformers
        ("mem_k", (4, 4, 16)),
        ("memory_tokens", (4, 16)),
        ("null_kv", (2, 4, D)),
        ("register_tokens", (4, 16)),
        ("latents", (16, 32)),  # Perceiver
        ("queries", (4, 3, D)),
        ("seed", (1, 4, 16)),  # Set Transformer
        ("att_src", (1, 4, 16)),  # PyG's GATConv
        ("attn_l", (1, 4, 16)),  # DGL's
        ("a", (1, 4, 16)),
        ("codevectors", (1, 20, 16)),  # wav2vec 2.0
        ("time_maa_x", (5, 1, 16)),
        ("r_w_bias", (4, 16)),
        ("rel_pos_w", (13, 16)),  # w is the width here
        ("height_rel", (13, 16)),  # BoTNet
        ("relative_position_bias_table", (49, 3)),  # Swin
        ("log_A_real", (16, 32)),  # S4D
        ("A_imag", (16, 32)),
        ("weight_sigma", (16, 32)),  # noisy nets
        ("static_alpha", (4, 5)),  # hyper-connections
        ("spline_scaler", (16, 9)),  # KAN
        ("coef", (16, 9, D)),
        ("comp", (9, 10)),  # RGCN's bases
        ("mixing", (4, 4)),
        ("W_pos", (16, 32)),
    ],
)
def test_what_no_layer_multiplies_by_goes_to_adamw_without_decay(
    label: str, shape: tuple[int, ...]
) -> None:
    assert part(Holder(**{label: raw(*shape)}), label) == ADAMW


@pytest.mark.parametrize(
    ("module", "label", "decay"),
    [
        (Holder(filters=raw(16, 1, 7)), "filters", False),
        (Holder(weight=raw(16, 1, 7)), "weight", True),
        (Holder(weight=raw(7, 16), kernel_size=7), "weight", True),
        (Holder(complex_weight=raw(9, 8, 16, 2)), "complex_weight", True),  # GFNet
        (named("SpectralConv2d", weights1=raw(9, 8, 16, 2)), "weights1", True),
        (named("SSKernelDiag", C=raw(16, 32)), "C", False),
        (nn.LayerNorm((3, 4, D)), "weight", False),
    ],
)
def test_filters_and_gains_of_several_dimensions(
    module: nn.Module, label: str, decay: bool
) -> None:
    assert part(module, label) == ("adamw", None, decay)


def test_a_mixture_of_heads_is_no_layer_and_a_triangular_matrix_neither() -> None:
    assert part(Holder(heads=12, reattn_weights=raw(12, 12)), "reattn_weights") == ADAMW
    lower = nn.Parameter(torch.ones(16, 16).tril())
    assert part(Holder(weight=lower), "weight") == ADAMW
    # An identity is triangular on both sides, as a recurrent weight may begin.
    assert part(Holder(weight=nn.Parameter(torch.eye(16))), "weight") == MATRIX
    assert part(Holder(weight=raw(16, 16)), "weight") == MATRIX
    with torch.device("meta"):
        assert part(Holder(weight=raw(16, 16)), "weight") == MATRIX


def test_a_bias_of_every_head_is_none_of_the_layers() -> None:
    """As TransformerLens and its courses write attention: W_Q is heads × d × d_head."""
    weights = {f"W_{n}": raw(4, 16, 8) for n in "QKV"} | {"W_O": raw(4, 8, 16)}
    biases = {f"b_{n}": raw(4, 8) for n in "QKV"}
    attention = Holder(cfg=Holder(n_heads=4, d_head=8), **weights, **biases)
    for name in biases:
        assert part(attention, name) == ADAMW
    assert part(attention, "W_Q") == ("muon", "experts > transpose", True)


def test_a_head_and_embeddings_named_by_letters() -> None:
    def block() -> nn.Module:
        return Holder(W_in=raw(16, 64), b_in=raw(64), W_out=raw(64, 16))

    def blocks() -> nn.ModuleList:
        return nn.ModuleList([block(), block()])

    apart = Holder(embed=named("Embed", W_E=raw(90, 16)), blocks=blocks())
    apart.unembed = Holder(W_U=raw(16, 90))
    assert got(apart, "embed.W_E") == got(apart, "unembed.W_U") == ("adamw", None, True)
    whole = Holder(W_E=raw(90, 16), W_pos=raw(8, 16), blocks=blocks(), W_U=raw(16, 90))
    assert got(whole, "W_E") == got(whole, "W_U") == ("adamw", None, True)
    assert got(whole, "W_pos") == ADAMW
    # Its bias says how a module stores its matrices.
    assert got(whole, "blocks.1.W_in") == got(whole, "blocks.1.W_out") == TRANSPOSED


# -- names are whole words, siblings are trained alike --------------------------------------------


@pytest.mark.parametrize("names", ["W_query W_key W_value", "query key value", "q k v", "Wq Wk Wv"])
def test_queries_beside_keys_are_projections(names: str) -> None:
    attention = Holder(**{name: raw(16, 16) for name in names.split()})
    found = by_name(Body(part=attention))
    assert {found[f"part.{name}"].algorithm for name in names.split()} == {"muon"}


@pytest.mark.parametrize("name", ["composer", "appositive", "openness"])
def test_a_word_inside_a_word_says_nothing(name: str) -> None:
    """ "pos" and "pe" are inside of these."""
    assert got(Body(**{name: nn.Embedding(9, D)}), f"{name}.weight") == ("adamw", None, True)


@pytest.mark.parametrize(
    "name", ["pos_embed", "wpe", "query_embed", "cls_token", "register_tokens"]
)
def test_positions_and_learned_tokens_are_alike_as_embedding_and_raw(name: str) -> None:
    model = Body(a=Holder(**{name: nn.Embedding(9, D)}), b=Holder(**{name: raw(9, D)}))
    found = by_name(model)
    for name_ in (f"a.{name}.weight", f"b.{name}"):
        assert (found[name_].algorithm, found[name_].decay) == ("adamw", False)


def test_an_embedding_of_the_vocabulary_of_tokens_decays() -> None:
    for name in ("embed_tokens", "token_embedding", "wte", "rel_emb"):
        assert got(Body(**{name: nn.Embedding(9, D)}), f"{name}.weight")[2]


# -- layers by evidence ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ins", "outs"),
    [
        ("in_channels", "out_channels"),  # PyG
        ("_in_feats", "_out_feats"),  # DGL
        ("in_features", "out_features"),
        ("input_size", "output_size"),  # Megatron
    ],
)
def test_a_linear_layer_of_another_library_is_one_by_its_widths(ins: str, outs: str) -> None:
    stored = {ins: 16, outs: 24}
    assert part(Holder(weight=raw(24, 16), **stored), "weight") == MATRIX
    assert part(Holder(weight=raw(16, 24), **stored), "weight") == ("muon", "transpose", True)
    assert part(Holder(core=raw(16, 24), **stored), "core") == ("muon", "transpose", True)
    # All heads in one: GATConv, GMMConv.
    assert part(Holder(g=raw(16, 5 * 24), **stored), "g") == ("muon", "transpose", True)


def test_fused_layers_of_another_library_are_cut() -> None:
    qkv = named("ColumnParallelLinear", weight=raw(48, 16), in_features=16, out_features=48)
    attention = Holder(qkv=qkv, proj=nn.Linear(16, 16))
    assert got(Body(attention=attention), "attention.qkv.weight")[1] == "split(rows=3)"


@pytest.mark.parametrize(
    ("attributes", "shape", "view"),
    [
        ({"in_channels": 16, "out_channels": 24, "num_relations": 5}, (5, 16, 24), "> transpose"),
        ({"in_channels": 16, "out_channels": 24, "num_relations": 5}, (5, 24, 16), ""),
        ({"in_channels": 8, "out_channels": 8, "num_types": 8}, (8, 8, 8), ""),
        ({"in_channels": 16, "out_channels": 24}, (2, 3, 16, 24), "> transpose"),
    ],
)
def test_stacks_of_matrices_by_relation(
    attributes: dict[str, Any], shape: tuple[int, ...], view: str
) -> None:
    expected = ("muon", f"experts {view}".strip(), True)
    assert part(Holder(weight=raw(*shape), **attributes), "weight") == expected


def test_a_convolution_of_ones_own_and_kan_are_linear_in_their_inputs_and_taps() -> None:
    conv = Holder(weight=raw(24, 16, 3, 3), in_channel=16, out_channel=24)
    assert part(conv, "weight") == ("muon", "flatten", True)
    kan = Holder(spline_weight=raw(24, 16, 9), in_features=16, out_features=24)
    assert part(kan, "spline_weight") == ("muon", "flatten", True)
    glow = Holder(weight=nn.Parameter(torch.linspace(0, 1, 256).reshape(16, 16, 1, 1)))
    assert part(glow, "weight") == ("muon", "flatten", True)


def test_projections_with_a_dimension_for_the_heads() -> None:
    xlnet = Holder(q=raw(32, 4, D), o=raw(32, 4, D), n_head=4, d_head=D)
    assert part(xlnet, "q") == ("muon", "flatten > transpose", True)
    assert part(xlnet, "o") == ("muon", "flatten", True)
    lens = Holder(W_Q=raw(4, 32, D), W_O=raw(4, D, 32), cfg=Holder(n_heads=4, d_head=D))
    assert part(lens, "W_Q") == ("muon", "experts > transpose", True)
    assert part(lens, "W_O") == ("muon", "experts > transpose", True)
    mobile = Holder(query_proj=raw(4, D, 32), out_proj=raw(32, 4, D), num_heads=4, key_dim=D)
    assert part(mobile, "query_proj") == ("muon", "experts", True)
    assert part(mobile, "out_proj") == ("muon", "flatten", True)


def test_the_error_offers_the_view_that_works() -> None:
    model = Body(part=Holder(core=raw(32, 4, D)))
    with pytest.raises(RoutingError, match=r"'flatten > transpose' if its first is the inputs"):
        route(model)
    found = by_name(model, rules=[Rule("part.core", view="flatten > transpose")])["part.core"]
    assert found.scale == pytest.approx(0.2 * 32**0.5)


@pytest.mark.parametrize("label", ["core", "x", "theta_table"])
def test_a_matrix_without_evidence_is_undecided(label: str) -> None:
    with pytest.raises(RoutingError, match="nothing says that it is the weight of a layer"):
        route(Body(part=Holder(**{label: raw(16, 24)})))


# -- one row --------------------------------------------------------------------------------------


def test_a_layer_with_one_output_is_trained_alike_wherever_it_stands() -> None:
    gate, value = nn.Linear(D, 1), nn.Linear(D, 1)
    model = Holder(gate=gate, fc=nn.Linear(D, D), value_head=value)
    found = by_name(model)
    for name in ("gate.weight", "value_head.weight"):
        assert (found[name].algorithm, found[name].decay) == ("adamw", True)


@pytest.mark.parametrize(
    ("layer", "name"),
    [
        (nn.Conv2d(D, 1, 3), "weight"),
        (nn.Linear(1, D), "weight"),
        (Holder(num_experts=4, w1=raw(4, 1, D)), "w1"),
        (Holder(weight=raw(1, 16), in_channels=16, out_channels=1), "weight"),
    ],
)
def test_a_matrix_is_judged_as_its_view_has_it(layer: nn.Module, name: str) -> None:
    """One row, or one column, is a vector."""
    model = Body(first=nn.Conv2d(3, D, 3), part=layer, after=nn.Linear(D, D))
    assert got(model, f"part.{name}") == ("adamw", None, True)


def test_a_weight_norms_gain_is_no_layer_with_one_input() -> None:
    fc = nn.utils.parametrizations.weight_norm(nn.Linear(D, 6))
    assert got(Body(fc=fc), "fc.parametrizations.weight.original0") == ADAMW
