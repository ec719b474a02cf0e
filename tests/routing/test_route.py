"""Routing, rule by rule: small modules, each with the verdict it must get."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from muonkit.routing.routes import RoutingError, Rule, route
from tests.helpers.routing import Body, D, Holder, by_name, got, raw

# -- vectors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("part", "label", "reason"),
    [
        (nn.LayerNorm(D), "weight", "norm gain"),
        (nn.BatchNorm2d(D), "bias", "norm bias"),
        (nn.Linear(D, D), "bias", "bias"),
        (nn.PReLU(), "weight", "scalar"),
        (Holder(logit_scale=nn.Parameter(torch.tensor(1.0))), "logit_scale", "scalar"),
        (Holder(gamma=raw(D)), "gamma", "vector"),
        (Holder(gamma=raw(D, 1, 1)), "gamma", "vector (stored as 8×1×1)"),
        (Holder(mix=raw(1, 1, D)), "mix", "vector (stored as 1×1×8)"),
        (Holder(gate=raw(D, 1)), "gate", "vector (stored as 8×1)"),
        (Holder(cls_token=raw(1, 1, D)), "cls_token", "learned token or position"),
        (Holder(nothing=raw(0, D)), "nothing", "empty"),
        (nn.MultiheadAttention(D, 2, add_bias_kv=True), "bias_k", "attention bias_k"),
        (nn.MultiheadAttention(D, 2), "in_proj_bias", "bias"),
    ],
)
def test_vectors_go_to_adamw_without_decay(part: nn.Module, label: str, reason: str) -> None:
    found = by_name(Body(part=part))[f"part.{label}"]
    assert (found.algorithm, found.view, found.decay) == ("adamw", None, False)
    assert found.reason == reason
    assert found.scale is None


@pytest.mark.parametrize(
    "label",
    [
        "pos_embed",
        "position_embeddings",
        "mask_token",
        "query_tokens",
        "rel_pos_h",
        "pe",
        "time_emb",
    ],
)
def test_pitfall_15_tables_of_tokens_and_positions(label: str) -> None:
    assert got(Body(part=Holder(**{label: raw(5, D)})), f"part.{label}") == ("adamw", None, False)


def test_a_relative_position_table_is_no_matrix() -> None:
    model = Body(attn=Holder(relative_position_bias_table=raw(49, 3)))
    assert got(model, "attn.relative_position_bias_table")[0] == "adamw"


# -- embeddings and heads ---------------------------------------------------------------------


@pytest.mark.parametrize("name", ["wte", "wpe", "embed", "tok_emb"])
@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
def test_pitfall_15_embeddings_by_class_whatever_their_name(name: str, kind: type) -> None:
    # Positions are trained alike, whether their table is an nn.Embedding or a raw parameter.
    expected = ("adamw", None, name != "wpe")
    assert got(Body(**{name: kind(10, D)}), f"{name}.weight") == expected


def test_an_embedding_of_unknown_class_is_told_by_its_class_name() -> None:
    class VocabParallelEmbedding(Holder):
        pass

    assert got(Body(e=VocabParallelEmbedding(weight=raw(10, D))), "e.weight")[0] == "adamw"


@pytest.mark.parametrize("head_first", [False, True])
def test_pitfall_16_tied_embedding_and_head_are_one_embedding(head_first: bool) -> None:
    embed, head = nn.Embedding(10, D), nn.Linear(D, 10, bias=False)
    head.weight = embed.weight
    parts = {"lm_head": head, "wte": embed} if head_first else {"wte": embed, "lm_head": head}
    model = Holder(**parts, fc=nn.Linear(D, D, bias=False))
    routes = route(model)
    assert [r.algorithm for r in routes] == ["adamw", "muon"]
    tied = routes[0]
    assert {tied.name, *tied.aliases} == {"wte.weight", "lm_head.weight"}
    assert "embedding, tied to the output head" in tied.reason
    claimed = [id(p) for group in routes.param_groups() for _, p in group["params"]]
    assert claimed.count(id(embed.weight)) == 1


def test_pitfall_16_a_module_used_twice_is_claimed_once() -> None:
    block = nn.Linear(D, D, bias=False)
    model = Holder(a=block, b=block, last=nn.Linear(D, 2))
    first = route(model)[0]
    assert (first.name, first.aliases, first.algorithm) == ("a.weight", ("b.weight",), "muon")


@pytest.mark.parametrize(
    "name", ["head", "lm_head", "classifier", "score", "logits", "unembed", "embed_out", "mlm_head"]
)
def test_pitfall_15_heads_by_name(name: str) -> None:
    # Registered first: only the name can tell.
    model = Holder(**{name: nn.Linear(D, 10)}, fc=nn.Linear(D, D))
    assert got(model, f"{name}.weight") == ("adamw", None, True)
    assert got(model, "fc.weight") == ("muon", "matrix", True)


def test_head_by_get_output_embeddings() -> None:
    class Model(Holder):
        def get_output_embeddings(self) -> nn.Module:
            return self.to_words

    model = Model(to_words=nn.Linear(D, 10), fc=nn.Linear(D, D))
    assert by_name(model)["to_words.weight"].reason == "output head (get_output_embeddings)"
    assert got(model, "fc.weight")[0] == "muon"


def test_the_last_linear_is_the_head_of_a_classifier() -> None:
    model = nn.Sequential(nn.Linear(4, D), nn.ReLU(), nn.Linear(D, D), nn.ReLU(), nn.Linear(D, 3))
    assert [r.algorithm for r in route(model) if r.name.endswith("weight")] == [
        "muon",
        "muon",
        "adamw",
    ]


def test_the_last_linear_of_a_classifier_in_a_container_beside_another() -> None:
    class Net(Holder):
        pass

    features = nn.Sequential(nn.Conv2d(3, D, 3), nn.ReLU(), nn.Conv2d(D, D, 3))
    tail = nn.Sequential(nn.Linear(D, D), nn.ReLU(), nn.Linear(D, 3))
    found = by_name(Net(features=features, tail=tail))
    assert found["tail.0.weight"].algorithm == "muon"
    assert found["tail.2.weight"].algorithm == "adamw"


@pytest.mark.parametrize("depth", [1, 3])
def test_the_last_linear_of_a_repeated_block_is_no_head(depth: int) -> None:
    class Block(Holder):
        pass

    blocks = nn.ModuleList(Block(up=nn.Linear(D, D), down=nn.Linear(D, D)) for _ in range(depth))
    assert all(r.algorithm == "muon" for r in route(Holder(blocks=blocks)) if r.param.ndim == 2)


def test_the_output_projection_of_attention_is_no_head() -> None:
    assert got(nn.MultiheadAttention(D, 2), "out_proj.weight") == ("muon", "matrix", True)


def test_attention_heads_are_no_output_heads() -> None:
    class Head(Holder):
        pass

    def head() -> Head:
        return Head(key=nn.Linear(D, 4), query=nn.Linear(D, 4), value=nn.Linear(D, 4))

    model = Body(sa_head=head(), heads=nn.ModuleList([head(), head()]), one_head=head())
    hidden = [r for r in route(model) if r.param.ndim == 2 and not r.name.startswith("last")]
    assert len(hidden) == 12
    assert {r.algorithm for r in hidden} == {"muon"}


def test_a_head_that_pools_by_attention_is_hidden() -> None:
    pool = Holder(attention=nn.MultiheadAttention(D, 2), fc=nn.Linear(D, D))
    assert got(Body(head=pool), "head.fc.weight") == ("muon", "matrix", True)


def test_composite_and_several_heads() -> None:
    classifier = nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.Linear(D, 3))
    model = Holder(
        classifier=classifier,
        heads=nn.ModuleDict({"depth": nn.Linear(D, 1), "kind": nn.Linear(D, 5)}),
        fc=nn.Linear(D, D),
    )
    found = by_name(model)
    heads = {n for n, r in found.items() if r.reason.startswith("output head")}
    assert heads == {"classifier.2.weight", "heads.depth.weight", "heads.kind.weight"}
    assert found["fc.weight"].algorithm == "muon"


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("name", ["head", "c3"])
def test_a_convolution_of_any_size_may_be_the_head(kernel: int, name: str) -> None:
    head = {name: nn.Conv2d(D, 5, kernel)}
    model = Holder(c1=nn.Conv2d(3, D, 3), c2=nn.Conv2d(D, D, 3), **head)
    assert got(model, f"{name}.weight") == ("adamw", None, True)
    assert got(model, "c2.weight") == ("muon", "flatten", True)


def test_a_backbone_without_head_keeps_its_last_linear() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        hidden_size=D, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    config.vocab_size = 10
    bert = transformers.BertModel(config)
    assert got(bert, "pooler.dense.weight") == ("muon", "matrix", True)
    found = by_name(Holder(bert=bert, fc=nn.Linear(D, 3)))
    assert found["fc.weight"].reason == "output head (last layer of the model)"
    assert found["bert.pooler.dense.weight"].algorithm == "muon"


# -- adapters -------------------------------------------------------------------------------------


def test_pitfall_15_own_lora_factors() -> None:
    found = by_name(Body(fc=Holder(weight=raw(D, D), lora_A=raw(2, D), lora_B=raw(D, 2))))
    assert found["fc.lora_A"].algorithm == found["fc.lora_B"].algorithm == "adamw"
    assert found["fc.weight"].algorithm == "muon"


def test_a_layer_inside_an_adapter_is_judged_where_it_stands() -> None:
    saved = Holder(
        original_module=nn.Linear(D, 24).requires_grad_(False),
        modules_to_save=nn.ModuleDict({"mine": nn.Linear(D, 24)}),
    )
    adapted = Holder(
        base_layer=nn.Linear(D, 24),
        lora_A=nn.ModuleDict({"mine": nn.Linear(D, 2)}),
        lora_B=nn.ModuleDict({"mine": nn.Linear(2, 24)}),
    )
    found = by_name(Body(a=Holder(qkv=saved), b=Holder(qkv=adapted)))
    assert found["a.qkv.modules_to_save.mine.weight"].view == "split(rows=3)"
    assert found["b.qkv.base_layer.weight"].view == "split(rows=3)"
    assert found["b.qkv.lora_B.mine.weight"].algorithm == "adamw"


def test_factors_in_a_parameter_dict_are_an_adapters() -> None:
    """So PEFT keeps LoRA's of an embedding, LoHa's, LoKr's and AdaLoRA's."""
    table = Holder(
        base_layer=nn.Embedding(11, D),
        lora_embedding_A=nn.ParameterDict({"mine": raw(2, 11)}),
        lora_embedding_B=nn.ParameterDict({"mine": raw(D, 2)}),
    )
    found = by_name(Body(table=table, fc=nn.Linear(D, D)))
    assert found["table.base_layer.weight"].reason == "embedding"
    for factor in ("lora_embedding_A", "lora_embedding_B"):
        route = found[f"table.{factor}.mine"]
        assert (route.algorithm, route.reason) == ("adamw", f"low-rank adapter factor ({factor})")


@pytest.mark.parametrize("on_class", [True, False])
def test_what_a_layer_lists_as_its_adapters_is_none_of_the_models_layers(on_class: bool) -> None:
    """PEFT's layers do, whatever the method."""

    class Adapted(Holder):
        adapter_layer_names = ("new_A", "new_B") if on_class else ()

    adapted = Adapted(
        base_layer=nn.Linear(D, D),
        new_A=nn.ModuleDict({"mine": nn.Linear(D, 3, bias=False)}),
        new_B=nn.ParameterDict({"x": raw(2, 3)}),
    )
    if not on_class:
        adapted.adapter_layer_names = ("new_A", "new_B")
    plain = by_name(Body(layer=nn.Linear(D, D)))
    found = by_name(Body(layer=adapted))
    assert found["layer.new_A.mine.weight"].reason == "adapter (new_A)"
    assert found["layer.new_B.x"].reason == "adapter (new_B)"
    assert found["layer.base_layer.weight"].reason == plain["layer.weight"].reason
    assert found["last.weight"].reason == plain["last.weight"].reason


# -- convolutions ---------------------------------------------------------------------------------


@pytest.mark.parametrize("conv", [nn.Conv1d, nn.Conv2d, nn.Conv3d])
def test_first_depthwise_grouped_and_hidden_convolutions(conv: type) -> None:
    model = Body(
        a=conv(6, D, 3),
        b=conv(D, D, 3, groups=D),
        c=conv(D, D, 3, groups=2),
        d=conv(D, 12, 3),
        e=conv(D, 4, 3, groups=4),
    )
    found = by_name(model)
    assert found["a.weight"].reason == "first convolution (stem)"
    assert found["b.weight"].reason == "depthwise convolution"
    assert (found["c.weight"].view, found["d.weight"].view) == (
        "flatten > split(rows=2)",
        "flatten",
    )
    assert found["e.weight"].reason == "grouped convolution with one filter per group"
    assert all(found[f"{n}.weight"].decay for n in "abcde")


def test_a_convolution_after_an_embedding_is_a_stem_only_if_it_takes_an_image() -> None:
    def view_of(inputs: int) -> str:
        parts = {"embed": nn.Embedding(10, D), "conv": nn.Conv2d(inputs, D, 3)}
        return got(Body(**parts), "conv.weight")[0]

    assert view_of(3) == "adamw"
    assert view_of(D) == "muon"


def test_transposed_convolutions() -> None:
    model = Body(
        a=nn.ConvTranspose2d(D, 6, 3),
        b=nn.ConvTranspose2d(D, 6, 3, groups=2),
        c=nn.ConvTranspose2d(D, D, 3, groups=D),
    )
    assert got(model, "a.weight") == ("muon", "flatten > transpose", True)
    assert got(model, "b.weight") == ("muon", "flatten > split(rows=2) > transpose", True)
    assert got(model, "c.weight") == ("adamw", None, True)


def test_scale_is_that_of_the_view_not_of_the_kernel() -> None:
    """A 3×3 convolution: out 16, in 8·9 = 72 (pitfall 9)."""
    model = Body(stem=nn.Conv2d(3, D, 3), conv=nn.Conv2d(D, 16, 3))
    found = by_name(model)["conv.weight"]
    assert found.scale == pytest.approx(0.2 * 72**0.5)
    assert by_name(model, scale="spectral")["conv.weight"].scale == pytest.approx((16 / 72) ** 0.5)


# -- parametrizations and wrappers ----------------------------------------------------------------


def test_weight_norm_is_judged_by_the_module_it_serves() -> None:
    norm = nn.utils.parametrizations.weight_norm
    model = Body(fc=norm(nn.Linear(D, 6)), stem=norm(nn.Conv2d(3, D, 3)), conv=nn.Conv2d(D, D, 3))
    name = "fc.parametrizations.weight.original"
    assert got(model, f"{name}0") == ("adamw", None, False)
    assert got(model, f"{name}1") == ("muon", "matrix", True)
    stem = by_name(model)["stem.parametrizations.weight.original1"]
    assert stem.reason == "first convolution (stem)"


def test_a_parametrized_head_stays_a_head() -> None:
    head = nn.utils.parametrizations.spectral_norm(nn.Linear(D, 10))
    model = Holder(head=head, fc=nn.Linear(D, D))
    assert got(model, "head.parametrizations.weight.original") == ("adamw", None, True)


def mlp() -> nn.Module:
    return Holder(wte=nn.Embedding(10, D), fc=nn.Linear(D, D), lm_head=nn.Linear(D, 10))


def compiled(model: nn.Module) -> nn.Module:
    """Wrapped as by torch.compile; nothing runs, so the backend does not matter."""
    wrapped: nn.Module = torch.compile(model, backend="eager")  # type: ignore[assignment]
    return wrapped


def test_compile_and_ddp_prefixes_are_taken_off() -> None:
    class DistributedDataParallel(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

    plain = mlp()
    expected = [(r.name, r.algorithm, r.view) for r in route(plain)]
    for wrapped in (
        compiled(plain),
        DistributedDataParallel(plain),
        DistributedDataParallel(compiled(plain)),
        compiled(DistributedDataParallel(plain)),
        torch.optim.swa_utils.AveragedModel(plain),
    ):
        assert isinstance(wrapped, nn.Module)
        assert [(r.name, r.algorithm, r.view) for r in route(wrapped)] == expected


def test_a_compiled_submodule_keeps_its_clean_name() -> None:
    model = mlp()
    model.fc = compiled(model.fc)  # type: ignore[arg-type]
    assert "fc.weight" in by_name(model)


# -- what cannot be routed ------------------------------------------------------------------------


def test_pitfall_17_an_unknown_tensor_raises_and_names_the_rules_that_settle_it() -> None:
    model = Body(thing=Holder(core=raw(2, 3, 4)))
    with pytest.raises(RoutingError) as error:
        route(model)
    for part in ("thing.core", "(2, 3, 4)", "Holder", "view='experts'", "algorithm='adamw'"):
        assert part in str(error.value)
    for rule in (Rule("thing.core", view="experts"), Rule("thing.core", algorithm="adamw")):
        assert len(route(model, [rule])) == 3


def test_pitfall_17_frozen_parameters_are_listed_and_wait_in_their_groups() -> None:
    model = mlp()
    model.fc.requires_grad_(False)
    routes = route(model)
    frozen = [r.name for r in routes if r.algorithm == "frozen"]
    assert frozen == ["fc.weight", "fc.bias"]
    waiting = {n: g for g in routes.param_groups() for n, _ in g["params"] if n in frozen}
    assert {n: g["algorithm"] for n, g in waiting.items()} == {
        "fc.weight": "muon",
        "fc.bias": "adamw",
    }
    model.fc.requires_grad_(True)
    assert got(model, "fc.weight") == ("muon", "matrix", True)


def test_nothing_to_train_raises() -> None:
    with pytest.raises(RoutingError, match="ReLU has no parameters"):
        route(nn.ReLU())
    with pytest.raises(RoutingError, match="all 2 parameters of Linear are frozen"):
        route(nn.Linear(3, 3).requires_grad_(False))


def test_pitfall_18_one_dimensional_shards_raise() -> None:
    model = mlp()
    model.fc.weight = nn.Parameter(torch.zeros(32))  # type: ignore[union-attr]
    with pytest.raises(RoutingError, match=r"fc\.weight \(32,\) of Linear is a 1-D piece of a mat"):
        route(model)
    with pytest.raises(RoutingError, match="fully_shard"):
        route(Holder(_flat_param=raw(64)))


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature:UserWarning")
def test_lazy_modules_are_to_be_run_first() -> None:
    model = Body(fc=nn.LazyLinear(D))
    for rules in ([], [Rule("fc.weight", algorithm="muon")]):
        with pytest.raises(RoutingError, match="run one batch through"):
            route(model, rules)


def test_bad_arguments() -> None:
    with pytest.raises(TypeError, match=r"takes an nn\.Module or a dict"):
        route([])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="unknown scale 'big'; it is one of 'original'"):
        route(mlp(), scale="big")
    with pytest.raises(TypeError, match=r"rules are muonkit\.Rule objects, got str"):
        route(mlp(), ["fc*"])  # type: ignore[list-item]
