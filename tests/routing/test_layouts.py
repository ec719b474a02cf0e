"""Routing of tensors that hold several matrices: fused layers, recurrent gates, experts."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest
from torch import nn

from muonkit.routing.routes import RoutingError, Rule, route
from tests.helpers.routing import Body, D, Holder, by_name, got, raw

if TYPE_CHECKING:
    from collections.abc import Callable

# -- fused and transposed linear layers -----------------------------------------------------------


def attention(name: str, rows: int, cls: str = "Attention", **attributes: object) -> nn.Module:
    kind = type(cls, (Holder,), {})
    return Body(a=kind(**{name: nn.Linear(D, rows), "proj": nn.Linear(D, D)}, **attributes))


@pytest.mark.parametrize("name", ["qkv", "Wqkv", "to_qkv", "c_attn", "in_proj", "qkv_proj"])
def test_pitfall_11_fused_qkv_by_name_and_shape(name: str) -> None:
    assert got(attention(name, 3 * D), f"a.{name}.weight") == ("muon", "split(rows=3)", True)


def test_pitfall_11_fused_qkv_without_a_name_by_head_count_and_partner() -> None:
    assert got(attention("inner", 3 * D, num_heads=2), "a.inner.weight")[1] == "split(rows=3)"
    # The same shapes without a head count are any wide layer.
    assert got(attention("inner", 3 * D), "a.inner.weight")[1] == "matrix"


def test_pitfall_11_the_output_projection_is_not_split() -> None:
    assert got(attention("qkv", 3 * D, num_heads=2), "a.proj.weight")[1] == "matrix"


def test_grouped_query_attention_by_head_counts() -> None:
    model = attention("qkv_proj", 16, num_heads=4, num_key_value_heads=2, head_dim=2)
    assert got(model, "a.qkv_proj.weight")[1] == "split(rows=8+4+4)"
    assert by_name(model)["a.qkv_proj.weight"].scale == pytest.approx(0.2 * 8**0.5)
    spectral = by_name(model, scale="spectral")["a.qkv_proj.weight"].scale
    assert spectral == pytest.approx((1.0, 0.5**0.5, 0.5**0.5))


def test_head_counts_go_before_a_width_of_three_inputs() -> None:
    model = attention("qkv", 24, num_heads=8, num_key_value_heads=2, head_dim=2)
    assert got(model, "a.qkv.weight")[1] == "split(rows=16+4+4)"


def test_grouped_query_attention_by_the_config_above() -> None:
    config = SimpleNamespace(
        num_attention_heads=4, num_key_value_heads=1, hidden_size=D, head_dim=2
    )
    model = attention("Wqkv", 12)
    model.config = config  # type: ignore[assignment]
    assert got(model, "a.Wqkv.weight")[1] == "split(rows=8+2+2)"


def test_grouped_query_attention_by_the_output_projection() -> None:
    assert got(attention("qkv", 12), "a.qkv.weight")[1] == "split(rows=8+2+2)"


def test_fused_qkv_of_unknown_layout_raises_and_a_rule_settles_it() -> None:
    model = attention("qkv", 13)
    with pytest.raises(RoutingError, match=r"a\.qkv\.weight \(13, 8\)[^$]*Rule\('a\.qkv\.weight'"):
        route(model)
    settled = by_name(model, rules=[Rule("a.qkv.weight", view="split(rows=7+3+3)")])
    assert settled["a.qkv.weight"].view == "split(rows=7+3+3)"


def test_1x1_convolutions_fuse_qkv_too() -> None:
    parts = {"to_qkv": nn.Conv2d(D, 24, 1), "to_out": nn.Conv2d(D, D, 1), "heads": 2}
    model = Body(stem=nn.Conv2d(3, D, 3), a=Holder(**parts))
    assert got(model, "a.to_qkv.weight")[1] == "flatten > split(rows=3)"


@pytest.mark.parametrize(
    ("name", "rows", "attributes", "split"),
    [
        ("qkv", 6 + 6 + 10, {"dim_out_qk": 6, "dim_out_v": 10}, "6+6+10"),
        ("qkv", 4 * 3 + 3 + 5, {"num_heads": 4, "dim_qk": 3, "dim_v": 5}, "12+3+5"),
        ("qkv_proj", 1 + 2 * D, {}, f"1+{D}+{D}"),
        ("kv_a_proj_with_mqa", 7, {"kv_lora_rank": 5, "qk_rope_head_dim": 2}, "5+2"),
        ("qk", 2 * D, {}, "2"),
    ],
    ids=["bottleneck attention", "lambda layer", "linear attention", "latent keys", "q and k"],
)
def test_parts_of_unequal_sizes_are_cut_where_their_module_says(
    name: str, rows: int, attributes: dict[str, int], split: str
) -> None:
    assert got(attention(name, rows, **attributes), f"a.{name}.weight")[1] == f"split(rows={split})"


def test_a_width_of_three_inputs_beside_a_value_projection_is_no_fused_qkv() -> None:
    # Deformable attention's offsets: two coordinates by heads, levels and points.
    offsets = attention("offsets", 3 * D, num_heads=2, value_proj=nn.Linear(D, D))
    assert got(offsets, "a.offsets.weight")[1] == "matrix"
    offsets = attention("offsets", 3 * D, num_heads=2, wq=nn.Linear(D, D))
    assert got(offsets, "a.offsets.weight")[1] == "matrix"


def test_fused_gate_and_up() -> None:
    def mlp(name: str, next_name: str, takes: int) -> str | None:
        part = Holder(**{name: nn.Linear(D, 32), next_name: nn.Linear(takes, D)})
        return got(Body(mlp=part), f"mlp.{name}.weight")[1]

    assert mlp("gate_up_proj", "down_proj", 16) == "split(rows=2)"
    assert mlp("gate_up_proj", "down_proj", 32) == "matrix"
    assert mlp("fc1", "fc2", 16) == "split(rows=2)"
    assert mlp("fc1", "fc2", 32) == "matrix"


SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "vocab_size": 100,
}


@pytest.mark.parametrize(
    ("family", "config", "name", "view"),
    [
        ("GPTNeoX", SMALL, "query_key_value", "split(rows=12)"),
        (
            "Bloom",
            {"hidden_size": 32, "n_layer": 1, "n_head": 4},
            "query_key_value",
            "split(rows=12)",
        ),
        ("Falcon", SMALL, "query_key_value", "split(rows=6)"),
        ("Phi3", SMALL | {"num_key_value_heads": 2}, "qkv_proj", "split(rows=32+16+16)"),
        ("Phi3", SMALL | {"num_key_value_heads": 2}, "gate_up_proj", "split(rows=2)"),
        ("Mixtral", SMALL | {"num_local_experts": 4}, "gate_up_proj", "experts > split(rows=2)"),
        ("GptOss", SMALL | {"num_local_experts": 4}, "experts.gate_up_proj", "experts > transpose"),
        ("GptOss", SMALL | {"num_local_experts": 4}, "experts.down_proj", "experts > transpose"),
        ("Mamba", {"hidden_size": 32, "num_hidden_layers": 1}, "in_proj", "split(rows=2)"),
    ],
)
def test_fused_layers_of_transformers(
    family: str, config: dict[str, int], name: str, view: str
) -> None:
    transformers = pytest.importorskip("transformers")
    transformers.logging.set_verbosity_error()
    cls = getattr(transformers, f"{family}Config")
    model = getattr(transformers, f"{family}ForCausalLM")(
        cls(**{"vocab_size": 100, "pad_token_id": 0, **config})
    )
    found = [r for r in route(model) if r.name.removesuffix(".weight").endswith(name)]
    assert [r.view for r in found] == [view]


def test_a_linear_stored_in_by_out_is_transposed() -> None:
    fc = nn.Linear(D, 24)
    fc.weight = raw(D, 24)
    assert got(Body(fc=fc, fc2=nn.Linear(24, D)), "fc.weight") == ("muon", "transpose", True)


# -- attention and recurrent layers ---------------------------------------------------------------


def test_pitfall_11_multihead_attention() -> None:
    assert got(Body(a=nn.MultiheadAttention(D, 2)), "a.in_proj_weight")[1] == "split(rows=3)"
    separate = Body(a=nn.MultiheadAttention(D, 2, kdim=4, vdim=6))
    views = {r.view for r in route(separate) if "proj_weight" in r.name}
    assert views == {"matrix"}


@pytest.mark.parametrize(
    ("layer", "view"),
    [
        (nn.LSTM(D, 5, proj_size=3), "split(rows=4)"),
        (nn.GRU(D, 5, bidirectional=True), "split(rows=3)"),
        (nn.RNN(D, 5), "matrix"),
    ],
)
def test_recurrent_layers(layer: nn.Module, view: str) -> None:
    found = {r.name: r for r in route(Body(rnn=layer))}
    for name, r in found.items():
        if "weight_hr" in name:
            assert r.view == "matrix"
        elif "weight_" in name:
            assert r.view == view
        elif name.startswith("rnn.bias"):
            assert (r.algorithm, r.decay, r.reason) == ("adamw", False, "bias")


@pytest.mark.parametrize(("cell", "view"), [(nn.LSTMCell, "split(rows=4)"), (nn.RNNCell, "matrix")])
def test_recurrent_cells(cell: Callable[[int, int], nn.Module], view: str) -> None:
    assert got(Body(cell=cell(D, 5)), "cell.weight_hh")[1] == view


def test_bilinear_forms_go_to_adamw() -> None:
    found = by_name(Body(b=nn.Bilinear(4, 5, 6)))["b.weight"]
    assert (found.algorithm, found.reason) == ("adamw", "bilinear form")


# -- experts --------------------------------------------------------------------------------------


def experts(**parts: object) -> nn.Module:
    return Body(moe=type("TinyExperts", (Holder,), {})(**parts))


def test_pitfall_12_experts_are_a_batch_of_matrices() -> None:
    model = experts(up_proj=raw(4, 16, D), down_proj=raw(4, D, 16))
    assert got(model, "moe.up_proj") == ("muon", "experts", True)
    assert by_name(model)["moe.up_proj"].scale == pytest.approx(0.2 * 16**0.5)


def test_pitfall_12_experts_by_count_alone() -> None:
    model = Body(ffn=Holder(num_experts=4, a=raw(4, 16, D)))
    assert got(model, "ffn.a")[1] == "experts"


def test_experts_that_fuse_gate_and_up_in_either_orientation() -> None:
    stored = experts(gate_up_proj=raw(4, 2 * 6, D), down_proj=raw(4, D, 6))
    assert got(stored, "moe.gate_up_proj")[1] == "experts > split(rows=2)"
    assert got(stored, "moe.down_proj")[1] == "experts"
    turned = experts(gate_up_proj=raw(4, D, 2 * 6), down_proj=raw(4, 6, D))
    assert got(turned, "moe.gate_up_proj")[1] == "experts > transpose > split(rows=2)"
    assert got(turned, "moe.down_proj")[1] == "experts > transpose"


def test_experts_whose_fused_dimension_is_unknown_raise() -> None:
    with pytest.raises(RoutingError, match=r"moe\.gate_up_proj \(4, 12, 8\) of TinyExperts"):
        route(experts(gate_up_proj=raw(4, 12, D)))


def test_pitfall_12_experts_stacked_in_the_rows() -> None:
    model = experts(num_experts=4, hidden_size=D, w1=raw(24, D), w2=raw(24, D))
    assert got(model, "moe.w1")[1] == "split(rows=4)"
    assert got(model, "moe.w2")[1] == "split(rows=4) > transpose"


def test_biases_of_experts_are_biases() -> None:
    model = experts(down_proj=raw(4, D, 6), down_proj_bias=raw(4, D), num_experts=4)
    assert got(model, "moe.down_proj_bias") == ("adamw", None, False)


def test_relative_attention_biases_are_biases() -> None:
    assert got(Body(attn=Holder(bias_u=raw(2, 4))), "attn.bias_u") == ("adamw", None, False)


def test_parameters_of_a_list_are_judged_as_their_owners() -> None:
    class AxialPositionEmbeddings(Holder):
        pass

    tables = nn.ParameterList([raw(4, 1, D), raw(1, 4, D)])
    model = Body(pe=AxialPositionEmbeddings(weights=tables), ws=nn.ParameterList([raw(4, D)]))
    assert got(model, "pe.weights.0") == ("adamw", None, False)
    assert got(model, "ws.0") == ("muon", "matrix", True)


def test_a_wide_gate_is_no_router() -> None:
    found = by_name(Body(gate=nn.Linear(D, D), moe=Holder(gate=nn.Linear(D, 2))))
    assert found["gate.weight"].reason == "hidden linear layer"
    assert found["moe.gate.weight"].reason == "router (Linear)"


def test_routers_and_unknown_matrices_say_whose_they_are() -> None:
    class TopKRouter(Holder):
        pass

    found = by_name(Body(gate=TopKRouter(weight=raw(4, D)), x=Holder(proj=raw(5, D))))
    assert found["gate.weight"].reason == "router (TopKRouter)"
    assert (found["x.proj"].view, found["x.proj"].reason) == ("matrix", "matrix of Holder")


# -- fused layers, by the layers beside them ------------------------------------------------------


@pytest.mark.parametrize(
    ("q", "kv", "takes", "heads", "view"),
    [
        (12, 24, 12, {}, "split(rows=2)"),  # x-transformers, Perceiver: an inner width of its own
        (16, 8, 16, {"heads": 4}, "split(rows=2)"),  # one head of k and v for all of q's
        (16, 4, 16, {"num_heads": 4}, "matrix"),  # k and v are one
        (12, 32, 20, {}, "split(rows=12+20)"),  # values of another width
    ],
)
@pytest.mark.parametrize(
    "names", ["to_q to_kv", "q kv", "q_proj kv_proj", "Wq Wkv", "query key_value"]
)
def test_fused_keys_and_values_by_the_layer_of_the_queries(
    q: int, kv: int, takes: int, heads: dict[str, int], view: str, names: str
) -> None:
    to_q, to_kv = names.split()
    parts = {to_q: nn.Linear(D, q), to_kv: nn.Linear(10, kv), "to_out": nn.Linear(takes, D)}
    assert got(Body(a=Holder(**parts, **heads)), f"a.{to_kv}.weight")[1] == view


def test_fused_keys_and_values_of_1x1_convolutions() -> None:
    parts = {"to_q": nn.Conv2d(D, 12, 1), "to_kv": nn.Conv2d(D, 24, 1)}
    model = Body(stem=nn.Conv2d(3, D, 3), a=Holder(**parts, to_out=nn.Conv2d(12, D, 1)))
    assert got(model, "a.to_kv.weight")[1] == "flatten > split(rows=2)"


def test_heads_whose_values_are_wider_than_their_keys() -> None:
    sizes = {"num_heads": 2, "key_dim": 4, "d": 8}
    levit = attention("qkv", 2 * (4 + 4 + 8), **sizes, nh_kd=8)
    assert got(levit, "a.qkv.weight")[1] == "split(rows=4+4+8+4+4+8)"
    # Whether head by head or not: blocks of 4 rows are pure in both orders.
    assert got(attention("qkv", 2 * (4 + 4 + 8), **sizes), "a.qkv.weight")[1] == "split(rows=8)"
    together = attention("in_proj_qkvz", 48, head_k_dim=4, head_v_dim=8, num_heads=2)
    assert got(together, "a.in_proj_qkvz.weight")[1] == "split(rows=12)"


def test_state_space_blocks_are_cut_in_what_they_fuse() -> None:
    """Mamba-2's (z, x, B, C, dt), by mamba_ssm's names and Hugging Face's; Mamba's (dt, B, C)."""
    own = {"d_ssm": 16, "d_state": 4, "ngroups": 2, "nheads": 4, "d_inner": 16}
    theirs = {"intermediate_size": 16, "ssm_state_size": 4, "n_groups": 2, "num_heads": 4}
    rows = 2 * 16 + 2 * 2 * 4 + 4
    for numbers in (own, theirs):
        mixer = Holder(in_proj=nn.Linear(D, rows), out_proj=nn.Linear(16, D), **numbers)
        assert got(Body(a=mixer), "a.in_proj.weight")[1] == "split(rows=16+16+8+8+4)"
    beside = Holder(in_proj=nn.Linear(D, rows + 12), **own)
    assert got(Body(a=beside), "a.in_proj.weight")[1] == "split(rows=6+6+16+16+8+8+4)"
    first = Holder(x_proj=nn.Linear(16, 3 + 2 * 4), dt_rank=3, d_state=4)
    assert got(Body(a=first), "a.x_proj.weight")[1] == "split(rows=3+4+4)"
    other = Holder(x_proj=nn.Linear(16, 12), dt_rank=3, d_state=4)
    assert got(Body(a=other), "a.x_proj.weight")[1] == "matrix"


def test_gated_linear_units_are_two_halves() -> None:
    net = nn.Sequential(nn.Linear(D, 24), nn.GELU(), nn.LayerNorm(12), nn.Linear(12, D))
    plain = nn.Sequential(nn.Linear(D, 24), nn.GELU(), nn.Linear(24, D))
    geglu = type("GEGLU", (Holder,), {})(proj=nn.Linear(D, 24))
    three = type("SwiGLU", (Holder,), {})(
        w1=nn.Linear(D, 24), w2=nn.Linear(D, 24), w3=nn.Linear(24, D)
    )
    positions = nn.Sequential(nn.Linear(D, 24), nn.Unflatten(1, (12, 2)), nn.Conv1d(12, D, 2))
    pooled = nn.Sequential(nn.Linear(D, 24), nn.MaxPool1d(2), nn.Linear(12, D))
    model = Body(
        net=net,
        plain=plain,
        ff=nn.Sequential(geglu, nn.Linear(12, D)),
        three=three,
        positions=positions,
        pooled=pooled,
    )
    found = by_name(model)
    assert found["net.0.weight"].view == found["ff.0.proj.weight"].view == "split(rows=2)"
    for whole in ("plain.0", "three.w1", "positions.0", "pooled.0"):
        assert found[f"{whole}.weight"].view == "matrix"
