"""Output heads are what leaves the model, stems what meets its input; parts have neither."""

from __future__ import annotations

import copy
import itertools
import re

import pytest
import torch
from torch import nn

from muonkit import Muon, MuonW, Rule, route
from muonkit.routing.routes import RoutingError
from tests.helpers.routing import D, Holder, by_name, raw


def heads(model: nn.Module, **kwargs: object) -> set[str]:
    """The layers that are routed as output heads."""
    found = by_name(model, **kwargs)
    return {
        name.removesuffix(".weight")
        for name, r in found.items()
        if r.reason.startswith("output head")
    }


def stems(model: nn.Module) -> set[str]:
    return {n.removesuffix(".weight") for n, r in by_name(model).items() if "(stem)" in r.reason}


def mlp(*widths: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(widths):
        layers += [nn.Linear(a, b), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


class Block(Holder):
    """A block of a transformer as far as its widths go."""

    def __init__(self) -> None:
        super().__init__(
            attention=Holder(q=nn.Linear(D, D), k=nn.Linear(D, D), v=nn.Linear(D, D)),
            up=nn.Linear(D, 4 * D),
            down=nn.Linear(4 * D, D),
        )


def blocks(count: int = 2) -> nn.ModuleList:
    return nn.ModuleList(Block() for _ in range(count))


# -- several heads --------------------------------------------------------------------------------


def final_layer() -> nn.Module:
    """A diffusion transformer's: the modulation is registered after the layer that it serves."""
    return Holder(
        linear=nn.Linear(D, 5), adaLN_modulation=nn.Sequential(nn.SiLU(), nn.Linear(D, 2 * D))
    )


SEVERAL = {
    "policy and value": ({"policy": nn.Linear(D, 4), "value": nn.Linear(D, 1)}, "policy value"),
    "two without names": ({"a": nn.Linear(D, 4), "b": nn.Linear(D, 2)}, "a b"),
    "class and box": (
        {"labels_classifier": nn.Linear(D, 9), "box_predictor": nn.Linear(D, 4)},
        "labels_classifier box_predictor",
    ),
    "one of two named": (
        {"boxes": nn.Linear(D, 4), "class_head": nn.Linear(D, 9)},
        "boxes class_head",
    ),
    "composites": ({"cls": mlp(D, 16, 9), "box": mlp(D, 16, 4)}, "cls.2 box.2"),
    "lists of heads": (
        {"class_embed": nn.ModuleList([nn.Linear(D, 9), nn.Linear(D, 9)])},
        "class_embed.0 class_embed.1",
    ),
    "a modulation beside it": ({"final_layer": final_layer()}, "final_layer.linear"),
    "dead reckoning": ({"head": nn.Linear(D, 5), "head_dist": nn.Linear(D, 5)}, "head head_dist"),
    "predictions": (
        {"predict_state": nn.Linear(D, 5), "predict_action": mlp(D, 16, 3)},
        "predict_state predict_action.2",
    ),
    "a projection out": ({"proj_out": nn.Linear(D, 16)}, "proj_out"),
    "a 3 × 3 convolution": ({"norm": nn.GroupNorm(1, D), "conv": nn.Conv2d(D, 3, 3)}, "conv"),
    "a transposed one": ({"up": nn.ConvTranspose2d(D, 3, 4)}, "up"),
    "in a Sequential": (
        {"tail": nn.Sequential(nn.Conv2d(D, 4 * D, 3), nn.Conv2d(D, 3, 3))},
        "tail.1",
    ),
    "one row": ({"conv_post": nn.Conv1d(D, 1, 7)}, "conv_post"),
}


@pytest.mark.parametrize("case", SEVERAL)
def test_every_layer_that_leaves_the_model_is_a_head(case: str) -> None:
    parts, expected = SEVERAL[case]
    model = Holder(first=nn.Linear(4, D), blocks=blocks(), **copy.deepcopy(parts))
    assert heads(model) == set(expected.split())


HIDDEN = {
    "attention's own projection": Holder(
        to_q=nn.Linear(D, D), to_k=nn.Linear(D, D), to_out=nn.Linear(D, D)
    ),
    "output.dense": Holder(
        attention=Holder(
            inner=Holder(query=nn.Linear(D, D), key=nn.Linear(D, D)),
            output=Holder(dense=nn.Linear(D, D)),
        )
    ),
    "a prenet's last layer": Holder(
        prenet=Holder(layers=nn.ModuleList([nn.Linear(D, 2 * D)]), final_layer=nn.Linear(2 * D, D))
    ),
    "a router's classifier": Holder(router=Holder(classifier=nn.Linear(D, 4))),
    "a time embedding": Holder(time_mlp=mlp(1, D, D)),
}


@pytest.mark.parametrize("case", HIDDEN)
@pytest.mark.parametrize("last", [False, True], ids=["first", "last"])
def test_what_serves_other_parts_is_no_head(case: str, last: bool) -> None:
    parts = {"part": copy.deepcopy(HIDDEN[case]), "head": nn.Linear(D, 3)}
    order = reversed(parts) if last else iter(parts)
    assert heads(Holder(**{name: parts[name] for name in order})) == {"head"}


def test_a_convolution_named_head_before_the_classifier_is_hidden() -> None:
    model = Holder(
        conv_stem=nn.Conv2d(3, D, 3), conv_head=nn.Conv2d(D, 64, 1), classifier=nn.Linear(64, 10)
    )
    assert heads(model) == {"classifier"}


def test_a_square_convolution_named_last_before_the_classifier_is_hidden() -> None:
    conv = nn.Conv2d(D, D, 1)
    for last in (conv, nn.Sequential(conv, nn.ReLU())):
        head = Holder(last_conv=last, fc=nn.Linear(D, 10))
        assert heads(Holder(stem=nn.Conv2d(3, D, 3), head=head)) == {"head.fc"}


def test_a_transform_named_head_before_the_classifier_is_hidden() -> None:
    model = Holder(
        blocks=blocks(),
        head=Holder(dense=nn.Linear(D, D), norm=nn.LayerNorm(D)),
        classifier=nn.Linear(D, 3),
    )
    assert heads(model) == {"classifier"}


@pytest.mark.parametrize(
    "after", [nn.ReLU(), nn.BatchNorm2d(5), nn.LayerNorm(5), nn.MaxPool2d(2)], ids=type
)
def test_a_layer_before_an_activation_a_norm_or_a_pooling_gives_features(after: nn.Module) -> None:
    model = nn.Sequential(nn.Conv2d(6, D, 3), nn.ReLU(), nn.Conv2d(D, 5, 3), after)
    assert heads(model) == set()
    assert heads(nn.Sequential(*model[:3], nn.Tanh())) == {"2"}


def test_a_last_convolution_that_does_not_narrow_gives_features() -> None:
    found = by_name(Holder(a=nn.Conv2d(3, D, 3), b=nn.Conv2d(D, 2 * D, 3)))
    assert found["b.weight"].algorithm == "muon"
    assert "does not narrow" in found["b.weight"].reason


# -- towers ---------------------------------------------------------------------------------------


class Tower(Holder):
    def __init__(self, *widths: int) -> None:
        a, b, c = widths
        super().__init__(fc1=nn.Linear(a, b), fc2=nn.Linear(b, c))


TOWERS = {
    "a trunk in a dict": (
        nn.ModuleDict({"trunk": mlp(8, 16, D), "moves": nn.Linear(D, 4), "worth": nn.Linear(D, 1)}),
        "moves worth",
    ),
    "heads as wide as the model": (
        Holder(body=mlp(4, D, D), heads=nn.ModuleList([nn.Linear(D, D), nn.Linear(D, D)])),
        "heads.0 heads.1",
    ),
    "encoder, decoder": (Holder(encoder=mlp(20, 16, 4), decoder=mlp(4, 16, 20)), "decoder.2"),
    "actor, critic": (Holder(actor=mlp(8, 16, 3), critic=mlp(8, 16, 1)), "actor.2 critic.2"),
    "actor, critic of its actions": (
        Holder(actor=Tower(8, 16, 3), critic=Tower(11, 16, 1)),
        "actor.fc2 critic.fc2",
    ),
    "critic first": (
        Holder(critic=mlp(8, 16, 1), actor_mean=mlp(8, 16, 3)),
        "actor_mean.2 critic.2",
    ),
    "two towers": (Holder(user=mlp(20, 16, 6), item=mlp(30, 16, 6)), "user.2 item.2"),
    "a list": (nn.ModuleList([mlp(8, 16, 4), mlp(8, 16, 4)]), "0.2 1.2"),
    "a list of a class": (nn.ModuleList([Tower(8, 16, 4), Tower(8, 16, 4)]), "0.fc2 1.fc2"),
    "a dict": (nn.ModuleDict({"net": mlp(8, 16, 4), "other": Tower(8, 16, 4)}), "net.2 other.fc2"),
    "generator, discriminator": (
        nn.ModuleDict({"G": mlp(4, 16, 20), "D": mlp(20, 16, 1)}),
        "G.2 D.2",
    ),
    "a shared trunk": (
        Holder(
            extract=Holder(
                policy_net=nn.Sequential(nn.Linear(9, D), nn.Tanh()),
                value_net=nn.Sequential(nn.Linear(9, D), nn.Tanh()),
            ),
            action_net=nn.Linear(D, 4),
            value_net=nn.Linear(D, 1),
        ),
        "action_net value_net",
    ),
    "mean and deviation": (
        Holder(fc1=nn.Linear(9, D), fc_mean=nn.Linear(D, 3), fc_logstd=nn.Linear(D, 3)),
        "fc_mean fc_logstd",
    ),
    "an early head": (
        Holder(encoder=Holder(fc=nn.Linear(9, D), head=nn.Linear(D, 4)), decoder=mlp(4, 16, 9)),
        "decoder.2",
    ),
    "an auxiliary head": (
        Holder(
            backbone=Holder(fc=nn.Linear(9, D), aux_head=nn.Linear(D, 3)), decoder=mlp(D, 16, 9)
        ),
        "backbone.aux_head decoder.2",
    ),
    "latents are hidden": (
        Holder(
            encoder=mlp(20, 16, D),
            fc_mu=nn.Linear(D, 4),
            fc_var=nn.Linear(D, 4),
            decoder=mlp(4, 16, 20),
        ),
        "decoder.2",
    ),
}


@pytest.mark.parametrize("case", TOWERS)
def test_pitfall_47_the_last_layer_of_every_tower_is_a_head(case: str) -> None:
    model, expected = TOWERS[case]
    assert heads(model) == set(expected.split())


def test_an_adaptive_softmax_has_a_head_for_every_cluster_of_classes() -> None:
    softmax = nn.AdaptiveLogSoftmaxWithLoss(D, 60, [10, 30], div_value=2.0)
    model = Holder(table=nn.Embedding(60, D), blocks=blocks(), softmax=softmax)
    assert heads(model) == {"softmax.head", "softmax.tail.0.1", "softmax.tail.1.1"}
    assert by_name(model)["softmax.tail.0.0.weight"].algorithm == "muon"
    assert heads(softmax) == {"head", "tail.0.1", "tail.1.1"}


def named(name: str, **own: object) -> nn.Module:
    """A module of a class of this name that holds these tensors, parts and numbers."""
    kind = type(name, (Holder,), {})
    module: nn.Module = kind(
        **{label: raw(*v) if isinstance(v, tuple) else v for label, v in own.items()}
    )
    return module


MARGINS = {
    "ArcFace, classes first": named("ArcFaceLoss", weight=(60, D)),
    "ArcFace, classes last": named("ElasticArcFace", kernel=(D, 60)),
    "sub-centers": named("SubCenterArcFace", weight=(60, 3, D)),
    "a layer that states its widths": named(
        "ArcMarginProduct", weight=(60, D), in_features=D, out_features=60
    ),
    "speakers, beside a cross entropy": named(
        "aamsoftmax", weight=(60, D), ce=nn.CrossEntropyLoss()
    ),
    "a loss of any name": named("LossFunction", W=(60, D)),
    "proxies": named("Proxy_Anchor", proxies=(60, D)),
    "a class that extends one": type("Speakers", (type(named("ArcFace")),), {})(w=raw(D, 60)),
    "a count of classes": named("Angles", num_classes=60, weight=(60, D)),
}


@pytest.mark.parametrize("case", MARGINS)
@pytest.mark.parametrize("first", [True, False], ids=["the loss first", "the model first"])
def test_class_weights_of_a_loss_are_a_head_and_change_no_other_layer(
    case: str, first: bool
) -> None:
    loss = MARGINS[case]
    ((label, _),) = [(n, p) for n, p in loss.named_parameters() if p.ndim > 1]
    net = {"fc1": nn.Linear(20, 16), "net": mlp(16, 16, D)}
    parts = {"second": loss, **net} if first else {**net, "second": loss}
    for model in (
        Holder(**parts),
        nn.Sequential(*net.values(), loss),
        {"net": nn.Sequential(*net.values()), "second": loss},
    ):
        found = by_name(model)  # type: ignore[arg-type]
        place = "2" if isinstance(model, nn.Sequential) else "second"
        own = found[f"{place}.{label}"].reason
        as_layer = hasattr(loss, "in_features") and own == "output head (last layer of the model)"
        assert as_layer or own == f"output head (classes of {type(loss).__name__})"
        hidden = [r.algorithm for r in found.values() if r.shape in ((16, 20), (16, 16))]
        assert hidden == ["muon", "muon"]


def test_what_only_looks_like_class_weights_of_a_loss_is_none() -> None:
    centers = by_name(named("CenterLoss", centers=(60, D), log_vars=(60, D)))
    assert not any(r.reason.startswith("output head") or r.decay for r in centers.values())
    wrapped = named("ModelWithLoss", weight=(16, 20), fc=nn.Linear(16, 3))
    assert by_name(wrapped)["weight"].algorithm == "muon"
    square = named("Square", num_classes=D, weight=(D, D))
    assert by_name(Holder(a=square, fc=nn.Linear(D, 3)))["a.weight"].algorithm == "muon"
    # Layers of torch's are judged as such, whatever they are called.
    called = Holder(pre_softmax=nn.Linear(D, D), type_loss=nn.Linear(D, D), fc=nn.Linear(D, 3))
    assert heads(called) == {"fc"}
    assert by_name(named("ClassEmbedding", num_classes=60, weight=(60, D)))["weight"].reason == (
        "embedding (ClassEmbedding)"
    )


class Classes(nn.Module):
    """A classifier of a user's own, which says nothing of its widths."""

    def __init__(self, *shape: int, name: str = "weight") -> None:
        super().__init__()
        self.register_parameter(name, nn.Parameter(torch.randn(*shape)))


@pytest.mark.parametrize("name", ["weight", "W", "kernel"])
@pytest.mark.parametrize("shape", [(100, D), (D, 100)])
def test_one_raw_matrix_behind_an_encoder_is_the_head(shape: tuple[int, int], name: str) -> None:
    """ArcFace's classes: the encoder's own last layer is hidden then."""

    def encoder() -> nn.Module:
        return mlp(20, D, D)

    in_root = Classes(*shape, name=name)
    in_root.backbone = encoder()
    assert heads(in_root) == {name}
    behind = Holder(encoder=encoder(), margin=Classes(*shape, name=name))
    assert heads(behind) == {f"margin.{name}".removesuffix(".weight")}
    # It takes something else, stands before it or a layer, or the encoder is none by its name.
    between = Holder(encoder=encoder(), margin=Classes(*shape, name=name), fc=nn.Linear(D, 3))
    assert heads(between) == {"fc"}
    other = Holder(encoder=encoder(), margin=Classes(100, D + 1, name=name))
    before = Holder(margin=Classes(*shape, name=name), encoder=encoder())
    unnamed = Holder(layers=encoder(), margin=Classes(*shape, name=name))
    for model, last in ((other, "encoder.2"), (before, "encoder.2"), (unnamed, "layers.2")):
        assert heads(model) == {last}


def test_a_raw_matrix_behind_an_encoder_is_the_head_in_a_wrapper_and_beside_a_loss() -> None:
    def model(**more: nn.Module) -> nn.Module:
        classes = Classes(100, D)
        for name, part in more.items():
            setattr(classes, name, part)
        return Holder(backbone=mlp(20, D, D), margin=classes)

    in_root = Classes(100, D)
    in_root.backbone = mlp(20, D, D)
    for whole, head in (
        (Holder(model=in_root), "model"),
        (Holder(model=Holder(net=in_root), criterion=nn.CrossEntropyLoss()), "model.net"),
        (Holder(model=model()), "model.margin"),
        (model(ce=nn.CrossEntropyLoss()), "margin"),
        (model(drop=nn.Dropout(0.1)), "margin"),
        (nn.ModuleDict({"backbone": mlp(20, D, D), "margin": Classes(100, D)}), "margin"),
    ):
        assert heads(whole) == {head}, head
    for classes in (20, 100):  # a second task's, or centers of the same classes
        two = Holder(backbone=mlp(20, D, D), a=Classes(100, D), b=Classes(classes, D))
        assert heads(two) == {"a", "b"}
    # What stands after it is of the encoder, or of nobody.
    for after in (nn.ReLU(), nn.BatchNorm1d(D), Classes(5, 7)):
        assert heads(Holder(backbone=mlp(20, D, D), a=Classes(100, D), b=after)) == {"a"}
    assert heads(Holder(backbone=mlp(20, D, D), a=Classes(D, D), b=Classes(5, 7))) == {"a"}
    # A class of torch's says what it is: an embedding, as a codebook, is no classes.
    for table in (nn.Embedding(100, D), nn.EmbeddingBag(100, D)):
        assert heads(Holder(backbone=mlp(20, D, D), margin=table)) == {"backbone.2"}
    # What has another part with a matrix of its own is no mere wrapper.
    around = Holder(model=in_root, other=Classes(7, 9))
    assert by_name(around)["model.weight"].algorithm == "muon"
    # Of a part of its own with layers, of a layer, or with a second matrix it is none.
    for margin in (model(fc=nn.Linear(D, D)), Holder(backbone=mlp(20, D, D), margin=nn.GRU(D, D))):
        assert "margin" not in heads(margin)
    several = Classes(100, D)
    several.register_parameter("centers", nn.Parameter(torch.randn(100, D)))
    assert "margin" not in heads(Holder(backbone=mlp(20, D, D), margin=several))


def test_raw_matrices_that_follow_one_another_behind_an_encoder_are_hidden() -> None:
    """Graph convolutions in one's own writing: all but the last are hidden, wherever they stand."""
    encoder = nn.Linear(20, D)
    square = {f"conv{n}": Classes(D, D) for n in range(3)}
    found = by_name(Holder(encoder=encoder, **square, out=Classes(D, 7)))
    assert {found[f"conv{n}.weight"].algorithm for n in range(3)} == {"muon"}
    wide = heads(Holder(encoder=encoder, conv1=Classes(D, 2 * D), conv2=Classes(2 * D, 7)))
    assert wide == set()  # nor is the encoder the last layer: what it gives goes on
    for after in (nn.LayerNorm(D), nn.ReLU()):
        one = Classes(D, D, name="W")
        assert heads(Holder(encoder=encoder, conv=one, after=after)) == set()
    normed = Holder(encoder=encoder, conv=Classes(2 * D, D), norm=nn.LayerNorm(2 * D))
    assert heads(normed) == set()


def test_the_head_of_another_tower_stays_one_beside_a_raw_matrix() -> None:
    decoder, encoder = mlp(D, 2 * D, 20), mlp(20, D, D)
    model = Holder(decoder=decoder, backbone=encoder)
    model.register_parameter("weight", nn.Parameter(torch.randn(100, D)))
    assert heads(model) == {"decoder.2", "weight"}


class EnsembleLinear(Holder):
    """As many linear layers side by side, as critics and models of dynamics have them."""

    def __init__(self, inputs: int, outputs: int, turned: bool = True) -> None:
        sides = (inputs, outputs) if turned else (outputs, inputs)
        super().__init__(in_features=inputs, out_features=outputs, weight=raw(5, *sides))
        self.bias = raw(5, 1, outputs)


@pytest.mark.parametrize("outputs", [1, 3])
@pytest.mark.parametrize("turned", [True, False], ids=["in × out", "out × in"])
def test_the_last_layer_of_an_ensemble_is_a_head(outputs: int, turned: bool) -> None:
    layers = [EnsembleLinear(20, D, turned), nn.ReLU(), EnsembleLinear(D, outputs, turned)]
    assert heads(Holder(critic=nn.Sequential(*layers))) == {"critic.2"}
    model = Holder(nn1=layers[0], nn2=layers[2])
    assert heads(model) == heads(model, heads=["nn2"]) == {"nn2"}
    assert by_name(model)["nn1.weight"].view == ("experts > transpose" if turned else "experts")
    # A relational layer has a matrix beside its stack, and both are trained alike.
    both = by_name(Holder(in_channels=D, out_channels=9, weight=raw(4, D, 9), root=raw(D, 9)))
    assert both["weight"].algorithm == both["root"].algorithm


def test_two_siblings_of_a_kind_are_not_yet_blocks() -> None:
    class Net(Holder):
        pass

    model = Net(first=Tower(8, 16, D), second=Tower(D, 16, 3))
    assert heads(model) == {"second.fc2"}


def test_models_in_a_dict_are_routed_and_trained_under_their_names() -> None:
    models = {"G": mlp(4, 16, 20), "type": Tower(20, 16, 1), "a.b": mlp(4, 8, 2)}
    assert heads(models) == {"G.2", "type.fc2", "a.b.2"}  # type: ignore[arg-type]
    optimizer = MuonW(models, lr=0.01)
    names = {name for group in optimizer.param_groups for name in group["param_names"]}
    assert names == {f"{key}.{n}" for key, m in models.items() for n, _ in m.named_parameters()}
    before = [p.detach().clone() for m in models.values() for p in m.parameters()]
    sum((p**2).sum() + p.sum() for m in models.values() for p in m.parameters()).backward()
    optimizer.step()
    after = [p for m in models.values() for p in m.parameters()]
    assert all(not torch.equal(a, b) for a, b in zip(after, before, strict=True))


@pytest.mark.parametrize("wrong", [{}, {"G": 1}, {1: nn.Linear(2, 2)}, [nn.Linear(2, 2)]])
def test_what_is_no_model_is_refused(wrong: object) -> None:
    with pytest.raises(TypeError, match=r"takes an nn\.Module or a dict of them by name"):
        route(wrong)  # type: ignore[arg-type]


def test_raw_projections_of_two_towers_are_heads() -> None:
    model = Holder(
        visual=Holder(conv=nn.Conv2d(3, D, 4), blocks=blocks(), proj=raw(D, 4)),
        transformer=Holder(blocks=blocks()),
        text_projection=raw(D, 4),
    )
    assert heads(model) == {"visual.proj", "text_projection"}


# -- parts of a model -----------------------------------------------------------------------------


class DecoderLayer(Block):
    pass


PARTS = {
    "a stage": Holder(layers=nn.ModuleDict({"2": Block()})),
    "a stage of several": Holder(
        embed=None, layers=nn.ModuleDict({"2": Block(), "3": Block()}), norm=nn.LayerNorm(D)
    ),
    "a list": nn.ModuleList([Block(), Block()]),
    "a Sequential": nn.Sequential(Block(), Block()),
    "a Sequential of one": nn.Sequential(Block()),
    "a block": Block(),
    "a block by its class": DecoderLayer(),
    "torch's": nn.TransformerEncoderLayer(D, 2, 4 * D),
    "torch's decoder": nn.TransformerDecoder(nn.TransformerDecoderLayer(D, 2, 4 * D), 2),
    "an attention": Holder(
        to_q=nn.Linear(D, D), to_k=nn.Linear(D, D), to_v=nn.Linear(D, D), to_out=nn.Linear(D, D)
    ),
}


@pytest.mark.parametrize("case", PARTS)
def test_pitfall_39_no_layer_of_a_block_is_a_head(case: str) -> None:
    assert heads(PARTS[case]) == set()
    assert all(r.algorithm == "muon" for r in route(PARTS[case]) if r.param.ndim == 2)


@pytest.mark.parametrize(
    "names",
    ["wq wk wv", "q_lin k_lin v_lin", "query_proj key_proj value_proj", "Wqkv", "query_key_value"],
)
def test_the_last_layer_of_an_attention_is_hidden_however_q_k_and_v_are_named(names: str) -> None:
    each = names.split()
    mixer = Holder(**{name: nn.Linear(D, 3 * D // len(each)) for name in each}, out=nn.Linear(D, D))
    mixer.head_dim = D
    model = Holder(embed=nn.Embedding(10, D), mixer=mixer, norm=nn.LayerNorm(D), fc=nn.Linear(D, 2))
    assert heads(model) == {"fc"}


def test_a_second_name_of_a_part_is_not_where_the_model_ends() -> None:
    """grad-cam's target layer, transfer learning's features, the encoder of an autoencoder."""

    def mlp() -> nn.Sequential:
        sizes = (4, D, D)
        hidden = [m for a, b in itertools.pairwise(sizes) for m in (nn.Linear(a, b), nn.ReLU())]
        return nn.Sequential(*hidden, nn.Linear(D, 3))

    target, cut, renamed = mlp(), mlp(), mlp()
    assert heads(Holder(model=target, target_layer=target[2])) == {"model.4"}
    assert heads(Holder(model=cut, features=nn.Sequential(*cut[:-1]))) == {"model.4"}
    assert heads(Holder(features=nn.Sequential(*renamed[:-1]), model=renamed)) == {"model.4"}
    auto = Holder(
        encoder=nn.Sequential(nn.Linear(20, D), nn.ReLU(), nn.Linear(D, 3)),
        decoder=nn.Sequential(nn.Linear(3, D), nn.ReLU(), nn.Linear(D, 20)),
    )
    expected = {f"ae.{name}" for name in heads(auto)}
    assert heads(Holder(ae=auto, encoder=auto.encoder)) == expected
    blocks = nn.ModuleList([nn.Linear(4, D), Block(), Block(), nn.Linear(D, 3)])
    assert len(heads(Holder(layers=blocks, top=blocks[-1]))) == 1
    net = mlp()
    assert heads(Holder(net=net, loss=Holder(model=net, proj=nn.Linear(3, 4)))) == {
        "net.4",
        "loss.proj",
    }
    generator, critic = mlp(), nn.Sequential(nn.Linear(3, D), nn.ReLU(), nn.Linear(D, 1))
    gan = Holder(G=generator, D=critic, gan=nn.Sequential(generator, critic))
    assert heads(gan) == {"G.4", "D.2"}


@pytest.mark.parametrize(
    ("body", "ends"),
    [
        ("fc1", {"fc_policy": 3, "fc_value": 1}),
        ("fc1", {"fc_q": 4, "fc_v": 1}),
        ("fc1", {"q_layer": 4, "v_layer": 1, "policy_layer": 4}),
        ("encoder", {"query_proj": 2, "key_proj": 2}),
    ],
)
def test_names_of_q_k_and_v_are_heads_where_nothing_attends(
    body: str, ends: dict[str, int]
) -> None:
    layers = {name: nn.Linear(D, width) for name, width in ends.items()}
    assert heads(Holder(**{body: nn.Linear(4, D)}, **layers)) == set(ends)


@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
def test_a_raw_head_beside_nothing_but_embeddings(kind: type[nn.Module]) -> None:
    model = Holder(embed=kind(50, D))
    model.head = raw(D, 50)
    assert by_name(model)["head"].reason.startswith("output head")


def test_the_table_says_why_a_blocks_last_layer_is_hidden_and_that_a_guess_is_one() -> None:
    assert "last layer of a block" in by_name(Block())["down.weight"].reason

    class MLP(Holder):
        pass

    found = by_name(MLP(fc1=nn.Linear(D, 16), fc2=nn.Linear(16, D)))
    assert found["fc2.weight"].reason == "output head (a guess: last layer of the model)"


def whole() -> nn.Module:
    return Holder(
        embed=nn.Embedding(10, D),
        layers=nn.ModuleDict({str(i): Block() for i in range(3)}),
        decide=nn.Linear(D, 10, bias=False),
    )


def test_a_part_has_the_routes_that_the_whole_gives_it() -> None:
    model = whole()
    routes = route(model, [Rule("layers.1.up.weight", options={"lr": 0.5})], scale="spectral")
    of_whole = {r.name: r for r in routes}
    block = model.layers["1"]  # type: ignore[index]
    part = routes.of(block)
    assert part.scale == "spectral"
    assert {r.name for r in part} == {name for name, _ in block.named_parameters()}
    for r in part:
        same = of_whole[f"layers.1.{r.name}"]
        assert (r.algorithm, r.view, r.options, r.reason) == (
            same.algorithm,
            same.view,
            same.options,
            same.reason,
        )
    MuonW(part, lr=0.1, adamw_lr=0.01)


def test_a_copied_stage_is_known_by_its_names() -> None:
    routes = route(whole())
    stage = copy.deepcopy(whole())
    stage.embed = None
    del stage.layers["0"], stage.layers["1"]  # type: ignore[operator]
    part = routes.of(stage)
    assert {r.name for r in part} == {name for name, _ in stage.named_parameters()}
    assert all(any(r.param is p for p in stage.parameters()) for r in part)
    assert {r.name for r in part if r.reason.startswith("output head")} == {"decide.weight"}
    optimizer = MuonW(part, lr=0.1)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in stage.parameters()}


@pytest.mark.parametrize("part", [nn.Linear(3, 3), Holder(layers=nn.ModuleDict({"7": Block()}))])
def test_a_part_of_another_model_is_refused(part: nn.Module) -> None:
    with pytest.raises(RoutingError, match="is no parameter of the model that was routed"):
        route(whole()).of(part)


# -- heads by hand --------------------------------------------------------------------------------


def test_heads_are_given_by_name_by_pattern_by_module_or_as_none() -> None:
    model = Holder(a=mlp(4, D, 6), b=nn.ModuleList([nn.Linear(6, 3), nn.Linear(6, 5)]), c=Block())
    assert heads(model, heads=["a"]) == {"a.2"}
    assert heads(model, heads=["a.0"]) == {"a.0"}
    assert heads(model, heads=["b.*", model.a]) == {"b.0", "b.1", "a.2"}
    assert heads(model, heads=["c.down.weight"]) == {"c.down"}
    assert heads(model, heads=[]) == set()
    groups = MuonW(model, lr=0.1, heads=["a"]).param_groups
    trained = {n: g["algorithm"] for g in groups for n in g["param_names"]}
    assert trained["a.2.weight"] == "adamw"
    assert trained["b.1.weight"] == "muon"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["z"], "heads has 'z', which is no module of this model; the layers are 'a', 'b'"),
        ([nn.Linear(2, 2)], "heads has a Linear, which is no module"),
        (["norm"], "heads has 'norm', which has no layer of this model"),
    ],
)
def test_heads_that_the_model_has_not_are_refused(given: list[object], message: str) -> None:
    model = Holder(a=nn.Linear(4, D), norm=nn.LayerNorm(D), b=nn.Linear(D, 2))
    with pytest.raises(ValueError, match=re.escape(message)):
        route(model, heads=given)  # type: ignore[arg-type]


def test_heads_beside_routes_or_parameters_are_refused() -> None:
    model = mlp(4, D, 2)
    with pytest.raises(TypeError, match="heads is a list"):
        route(model, heads="a")
    with pytest.raises(TypeError, match=r"heads=\['2'\]"):
        MuonW(route(model), lr=0.1, heads=["2"])
    with pytest.raises(TypeError, match="cannot be routed"):
        MuonW(model.parameters(), lr=0.1, heads=["2"])
    with pytest.raises(TypeError, match=r"modules in a list.*MuonW\(\{\"G\": G, \"D\": D\}\)"):
        MuonW([model, mlp(4, D, 2)], lr=0.1)  # type: ignore[list-item]
    with pytest.raises(TypeError, match=r"got a module \(\w+\).*write MuonW\(model\)"):
        Muon(model)  # type: ignore[arg-type]
    assert not hasattr(Muon, "heads")


# -- stems ----------------------------------------------------------------------------------------


def test_every_layer_that_takes_the_raw_input_is_a_stem() -> None:
    branches = Holder(b1=nn.Conv2d(3, D, 1), b3=nn.Conv2d(3, D, 3), hidden=nn.Conv2d(D, D, 3))
    assert stems(Holder(branches=branches, fc=nn.Linear(D, 2))) == {"branches.b1", "branches.b3"}
    depth = nn.Sequential(nn.Conv2d(1, D, 3), nn.ReLU(), nn.Conv2d(D, D, 3))
    rgb = nn.Sequential(nn.Conv2d(3, D, 3), nn.ReLU(), nn.Conv2d(D, D, 3))
    assert stems(Holder(rgb=rgb, depth=depth, fc=nn.Linear(D, 2))) == {"rgb.0", "depth.0"}


def test_a_convolution_that_an_earlier_one_feeds_is_no_stem() -> None:
    assert stems(nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Conv2d(3, D, 3))) == {"0"}
    nested = nn.Sequential(nn.Sequential(nn.Conv2d(1, 3, 3)), nn.Sequential(nn.Conv2d(3, D, 3)))
    assert stems(nested) == {"0.0"}


@pytest.mark.parametrize("name", ["patch_embed", "to_patch_embedding", "patch_embedding"])
def test_a_linear_patch_embedding_is_one_as_a_convolutional_one_is(name: str) -> None:
    def model(embed: nn.Module) -> nn.Module:
        return Holder(**{name: embed}, blocks=blocks(), head=nn.Linear(D, 3))

    assert stems(model(nn.Linear(48, D))) == {name}
    assert stems(model(nn.Conv2d(3, D, 4, 4))) == {name}
    assert stems(model(nn.Sequential(nn.LayerNorm(48), nn.Linear(48, D)))) == {f"{name}.1"}


def test_each_generator_and_discriminator_of_a_cyclegan_is_a_tower() -> None:
    def generator() -> nn.Module:
        return Holder(model=nn.Sequential(nn.Conv2d(3, D, 7), nn.ReLU(), nn.Conv2d(D, 3, 7)))

    names = "netG_A", "netG_B"
    model = Holder(
        **{name: generator() for name in names},
        netD_A=Holder(model=nn.Sequential(nn.Conv2d(3, D, 4), nn.ReLU(), nn.Conv2d(D, 1, 4))),
        netD_B=Holder(model=nn.Sequential(nn.Conv2d(3, D, 4), nn.ReLU(), nn.Conv2d(D, 1, 4))),
    )
    every = (*names, "netD_A", "netD_B")
    assert heads(model) == {f"{name}.model.2" for name in every}
    assert stems(model) == {f"{name}.model.0" for name in every}


def test_a_property_that_raises_says_nothing() -> None:
    class Unready(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(D, D))

        @property
        def in_features(self) -> int:
            raise RuntimeError("not set up")

    model = Holder(first=nn.Linear(4, D), part=Unready(), last=nn.Linear(D, 3))
    assert by_name(model)["part.weight"].algorithm == "muon"
    assert heads(model) == {"last"}


def test_a_part_may_be_a_dict_of_models() -> None:
    one, other = mlp(4, D, 3), mlp(4, D, 3)
    part = route({"one": one, "other": other}).of({"one": one})
    assert part[0].name == "one.0.weight"
    assert part[-2].algorithm == "adamw"
