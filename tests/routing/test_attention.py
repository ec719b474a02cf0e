"""Attention heads: each slice is the head that the model's attention really sees, nothing else."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

from muonkit import MuonW
from muonkit.routing.attention import AttentionHeads, HeadSlice, attention_heads
from muonkit.routing.routes import RoutingError, Rule, route
from tests.helpers.attention import MODELS, built
from tests.helpers.routing import Body, D, Holder, by_name

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence


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


# -- per_head=True --------------------------------------------------------------------------------

# The end of a parameter's name -> its view, where every head is a matrix.
VIEWS: dict[str, dict[str, str]] = {
    "gpt2": {
        "c_attn.weight": "transpose > split(rows=12)",
        "attn.c_proj.weight": "transpose > split(cols=4)",
    },
    "llama": {
        "q_proj.weight": "split(rows=4)",
        "k_proj.weight": "split(rows=2)",
        "v_proj.weight": "split(rows=2)",
        "o_proj.weight": "split(cols=4)",
    },
    "qwen3": {"q_proj.weight": "split(rows=4)", "k_proj.weight": "split(rows=2)"},
    "phi3": {"qkv_proj.weight": "split(rows=8)", "o_proj.weight": "split(cols=4)"},
    "gpt_neox": {"query_key_value.weight": "split(rows=12)", "dense.weight": "split(cols=4)"},
    "falcon multi-query": {"query_key_value.weight": "split(rows=6)"},
    "falcon grouped": {
        "query_key_value.weight": "split(rows=8)",
        "n.dense.weight": "split(cols=4)",
    },
    "falcon multi-head": {"query_key_value.weight": "split(rows=12)"},
    "deepseek_v3": {
        "q_b_proj.weight": "split(rows=4) > split(rows=8+4)",
        "kv_b_proj.weight": "split(rows=4) > split(rows=8+6)",
        "kv_a_proj_with_mqa.weight": "split(rows=16+4)",
        "q_a_proj.weight": "matrix",
        "o_proj.weight": "split(cols=4)",
    },
    "deepseek_v3 without q_lora": {
        "q_proj.weight": "split(rows=4) > split(rows=8+4)",
        "kv_b_proj.weight": "split(rows=4) > split(rows=8+6)",
    },
    "qwen3_next": {"q_proj.weight": "split(rows=8)", "k_proj.weight": "split(rows=2)"},
}


def test_the_views_are_of_all_models() -> None:
    assert VIEWS.keys() == MODELS.keys()


@pytest.mark.parametrize("name", MODELS)
def test_a_route_shows_the_heads_as_matrices(name: str) -> None:
    model = built(name)
    whole, routes = by_name(model), by_name(model, per_head=True)
    for end, view in VIEWS[name].items():
        (found,) = [r for r in routes.values() if r.name.endswith(end)]
        assert found.view == view, found.name
    (heads,) = attention_heads(model)
    of_heads = {part.param for part in (*heads.q, *heads.k, *heads.v, *heads.o)}
    for key, r in routes.items():
        assert (r == whole[key]) == (key not in of_heads)  # nothing else changes
        assert r.reason.startswith("per head: ") == (key in of_heads)
    assert str(len(heads.q)) in routes[heads.q[0].param].reason


def test_one_head_of_keys_and_values_stays_a_matrix() -> None:
    names = {"q_proj": D, "k_proj": 4, "v_proj": 4, "o_proj": D}
    layers = {name: nn.Linear(D, width) for name, width in names.items()}
    routes = by_name(Body(a=Holder(num_heads=2, **layers)), per_head=True)
    assert [routes[f"a.{name}.weight"].view for name in names] == [
        "split(rows=2)",
        "matrix",
        "matrix",
        "split(cols=2)",
    ]
    assert routes["a.k_proj.weight"].reason == "per head: 1 heads of k"


def test_heads_of_1x1_convolutions_are_cut_too() -> None:
    parts = {"to_qkv": nn.Conv2d(D, 24, 1), "to_out": nn.Conv2d(D, D, 1), "heads": 2}
    routes = by_name(Body(stem=nn.Conv2d(3, D, 3), a=Holder(**parts)), per_head=True)
    assert routes["a.to_qkv.weight"].view == "flatten > split(rows=6)"
    assert routes["a.to_out.weight"].view == "flatten > split(cols=2)"


def test_torchs_attention_is_cut_too() -> None:
    routes = by_name(Body(a=nn.TransformerEncoderLayer(32, 4, 64)), per_head=True)
    assert routes["a.self_attn.in_proj_weight"].view == "split(rows=12)"
    assert routes["a.self_attn.out_proj.weight"].view == "split(cols=4)"


def unknown(**attributes: object) -> nn.Module:
    names = ("to_q", "to_k", "to_v", "to_out")
    attention = [Holder(**{n: nn.Linear(D, D) for n in names}, **attributes) for _ in range(2)]
    return Body(blocks=nn.ModuleList(Holder(attn=each) for each in attention))


def test_heads_that_nothing_tells_are_refused_with_the_rules_to_write() -> None:
    model = unknown()
    with pytest.raises(RoutingError) as refused:
        MuonW(model, per_head=True)
    text = str(refused.value)
    assert "blocks.*.attn: nothing says how many heads it has: Holder and its config state" in text
    rules = [line.strip(" ,") for line in text.splitlines() if line.startswith("      Rule(")]
    assert rules == [
        "Rule('blocks.*.attn.to_q.weight', view='split(rows=HEADS)')",
        "Rule('blocks.*.attn.to_k.weight', view='split(rows=KV_HEADS)')",
        "Rule('blocks.*.attn.to_v.weight', view='split(rows=KV_HEADS)')",
        "Rule('blocks.*.attn.to_out.weight', view='split(cols=HEADS)')",
    ]
    written = [eval(rule.replace("KV_HEADS", "2").replace("HEADS", "4")) for rule in rules]
    routes = by_name(model, per_head=True, rules=written)
    assert routes["blocks.1.attn.to_q.weight"].view == "split(rows=4)"
    assert routes["blocks.0.attn.to_out.weight"].view == "split(cols=4)"


def test_heads_that_do_not_divide_are_refused() -> None:
    with pytest.raises(RoutingError, match=r"the 8 rows of .*to_q.weight do not divide by the 3"):
        route(unknown(num_heads=3), per_head=True)
    layers = {"q_proj": nn.Linear(D, D), "k_proj": nn.Linear(D, 6), "v_proj": nn.Linear(D, 6)}
    with pytest.raises(RoutingError, match=r"the 6 rows of .*k_proj.weight do not divide by the 4"):
        route(Body(a=Holder(num_heads=2, **layers)), per_head=True)
    with pytest.raises(RoutingError, match=r"4 heads of queries do not divide by 3 of keys"):
        route(Body(a=Holder(num_heads=4, **layers)), per_head=True)
    fused = Holder(qkv=nn.Linear(D, 3 * D), num_heads=3)
    with pytest.raises(
        RoutingError, match=r"the 24 rows of a.qkv.weight are no 3 heads of q and 3"
    ):
        route(Body(a=fused, config=SimpleNamespace(head_dim=4)), per_head=True)
    columns = Holder(
        num_heads=2, **{**layers, "k_proj": nn.Linear(D, D), "v_proj": nn.Linear(D, D)}
    )
    columns.o_proj = nn.Linear(6, D)
    with pytest.raises(RoutingError, match=r"the 6 columns of a.o_proj.weight are no 2 heads of 4"):
        route(Body(a=columns), per_head=True)


def test_without_attention_per_head_is_refused() -> None:
    with pytest.raises(
        RoutingError, match=r"no attention was found in Sequential.*split.cols=HEADS"
    ):
        MuonW(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 2)), per_head=True)


def test_per_head_is_for_what_is_routed() -> None:
    model = unknown(num_heads=2)
    with pytest.raises(TypeError, match=r"per_head or another scale.*per_head=True"):
        MuonW(route(model), per_head=True)
    with pytest.raises(TypeError, match="cannot be routed"):
        MuonW([model.last.weight], adamw_params=[model.last.bias], lr=0.1, per_head=True)  # type: ignore[union-attr]
    MuonW(route(model, per_head=True))


def test_a_rules_view_goes_before_per_head() -> None:
    rules = [
        Rule("*.0.attn.to_q.weight", view="matrix"),
        Rule("*.1.attn.to_q.weight", algorithm="adamw"),
        Rule("*.to_k.weight", options={"lr": 1e-4}),
    ]
    routes = by_name(unknown(num_heads=2), per_head=True, rules=rules)
    assert routes["blocks.0.attn.to_q.weight"].view == "matrix"
    assert routes["blocks.1.attn.to_q.weight"].view is None
    assert routes["blocks.0.attn.to_k.weight"].view == "split(rows=2)"


def test_a_frozen_layer_has_the_view_once_it_is_unfrozen() -> None:
    model = unknown(num_heads=2)
    model.blocks[0].attn.to_q.weight.requires_grad_(False)  # type: ignore[index, union-attr]
    route_of_it = by_name(model, per_head=True)["blocks.0.attn.to_q.weight"]
    assert route_of_it.unfrozen is not None
    assert route_of_it.unfrozen.view == "split(rows=2)"
