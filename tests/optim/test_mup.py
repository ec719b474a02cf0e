"""muP: what `mup.init_` and `mup.route` do to each role, what they refuse, and that sizes stay.

The coordinate check trains the same models at several widths for a few steps: with muP what each
layer gives, and what a step changes of it, keeps its size; without, it does not.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F

from muonkit import Muon, MuonW, Rule, mup, route
from muonkit.lab.models import GPT
from muonkit.newton_schulz.coefficients import SCHEDULES
from muonkit.routing.routes import Route, RoutingError
from muonkit.views import blocks_of
from tests.helpers.optim import VIEWED, parameter


class Holder(nn.Module):
    """One parameter of any shape."""

    def __init__(self, p: nn.Parameter) -> None:
        super().__init__()
        self.core = p


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 8)
        self.body = nn.Linear(8, 8)
        self.head = nn.Linear(8, 10, bias=False)
        self.head.weight = self.embed.weight


def gpt(width: int, seed: int = 0) -> GPT:
    torch.manual_seed(seed)
    return GPT(32, 16, width, layers=2, heads=width // 16)


def norms(spec: str, p: Tensor) -> list[tuple[float, float, float]]:
    """(largest, smallest singular value, sqrt(out / in)) of every matrix of a parameter."""
    found = []
    for block in blocks_of(spec, tuple(p.shape)):
        for matrix in block.to_matrices(block.region(p.detach())):
            values = torch.linalg.svdvals(matrix.double())
            found.append((values[0].item(), values[-1].item(), math.sqrt(block.rows / block.cols)))
    return found


# -- initialisation -------------------------------------------------------------------------------


@pytest.mark.parametrize(("view", "shape"), VIEWED)
def test_every_matrix_of_a_view_gets_the_spectral_norm(view: str, shape: tuple[int, ...]) -> None:
    model = Holder(parameter(*shape))
    mup.init_(model, [Rule("core", view=view)], init="orthogonal")
    for largest, smallest, target in norms(view, model.core):
        # Semi-orthogonal up to float32's rounding.
        assert largest == pytest.approx(target, rel=1e-5)
        assert smallest == pytest.approx(target, rel=1e-5)


def test_orthogonal_matrices_are_drawn_evenly_in_sign() -> None:
    torch.manual_seed(0)
    model = Holder(parameter(400, 4, 3))
    mup.init_(model, [Rule("core", view="experts")], init="orthogonal")
    # Entries have RMS 0.58, a mean of 400 a deviation of 0.029; QR's own signs give -0.5.
    assert abs(model.core[:, 0, 0].mean().item()) < 5 * 0.029


def test_gaussian_init_has_the_spectral_norm_and_normal_entries() -> None:
    model = gpt(128)
    mup.init_(model)
    seen = 0
    for r in route(model):
        if r.algorithm == "muon":
            assert r.view is not None
            for largest, smallest, target in norms(r.view, r.param):
                # The edge of the spectrum fluctuates by about rows^(-2/3) around it: 4% at 128.
                assert largest == pytest.approx(target, rel=0.08)
                assert smallest < 0.5 * target  # no orthogonal matrix
                seen += 1
    assert seen == 2 * (3 + 1 + 2)  # in each layer q, k, v apart, out, up, down


def test_embeddings_heads_and_vectors() -> None:
    model = gpt(128)
    with torch.no_grad():
        model.norm.weight.fill_(1.5)
    mup.init_(model)
    # Deviations of at least 2,048 draws: 2% off by chance, so 10% is far outside.
    assert model.tokens.weight.std().item() == pytest.approx(1.0, rel=0.1)
    assert model.positions.weight.std().item() == pytest.approx(1.0, rel=0.1)
    assert model.head.weight.std().item() == pytest.approx(1 / 128, rel=0.1)
    assert bool((model.norm.weight == 1.5).all())

    before = model.tokens.weight.detach().clone()
    mup.init_(model, embedding_std=None, head_std=0.0)
    assert torch.equal(model.tokens.weight, before)
    assert not model.head.weight.any()


def test_init_follows_its_generator_and_returns_the_model() -> None:
    one, two = gpt(32, seed=0), gpt(32, seed=1)
    for model in (one, two):
        assert mup.init_(model, generator=torch.Generator().manual_seed(5)) is model
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        assert torch.equal(a, b)


def test_init_of_16_bit_weights_is_rounded_once() -> None:
    model = gpt(32).to(torch.bfloat16)
    mup.init_(model, init="orthogonal", generator=torch.Generator().manual_seed(0))
    exact = gpt(32)
    mup.init_(exact, init="orthogonal", generator=torch.Generator().manual_seed(0))
    for r in route(exact):
        if r.algorithm == "muon":
            assert torch.equal(model.get_parameter(r.name), r.param.to(torch.bfloat16))


def test_frozen_parameters_stay() -> None:
    model = gpt(32)
    model.blocks[0].up.weight.requires_grad_(False)
    before = model.blocks[0].up.weight.clone()
    mup.init_(model)
    assert torch.equal(model.blocks[0].up.weight, before)
    routes = {r.name: r for r in mup.route(model, base_width=32, lr=0.1)}
    assert routes["blocks.0.up.weight"].algorithm == "frozen"
    assert not routes["blocks.0.up.weight"].options


# -- learning rates and decay ---------------------------------------------------------------------


def groups_of(routes: Any) -> dict[str, dict[str, Any]]:
    """The optimizer's group of every parameter, by name."""
    optimizer = MuonW(routes)
    return {name: group for group in optimizer.param_groups for name in group["param_names"]}


@pytest.mark.parametrize("width", [32, 64, 256])
def test_only_the_head_has_multipliers(width: int) -> None:
    groups = groups_of(
        mup.route(gpt(width), base_width=64, lr=0.1, adamw_lr=0.02, weight_decay=0.3)
    )
    for name, group in groups.items():
        head, hidden = name == "head.weight", group["algorithm"] == "muon"
        factor = 64 / width if head else 1.0
        assert group["lr"] == pytest.approx((0.1 if hidden else 0.02) * factor)
        if "norm" in name or "position" in name:
            assert group["weight_decay"] == 0.0
        else:
            assert group["weight_decay"] == pytest.approx(0.3 / factor)
        if hidden:
            assert group["adjust_lr_fn"] == "spectral"
    assert {g["algorithm"] for g in groups.values()} == {"muon", "adamw"}


def test_what_a_step_forgets_is_the_same_in_every_group_and_at_every_width() -> None:
    for decay, expected in (("constant", 0.05 * 0.2), ("width", 0.05 * 0.2 / 4)):
        routes = mup.route(gpt(128), base_width=32, lr=0.05, weight_decay=0.2, decay=decay)
        decayed = [g for g in groups_of(routes).values() if g["weight_decay"]]
        assert len(decayed) == 2 + 2 * 4  # the table, the head, and four matrices a layer
        for group in decayed:
            assert group["lr"] * group["weight_decay"] == pytest.approx(expected)


def test_a_scheduler_keeps_the_ratios() -> None:
    optimizer = MuonW(mup.route(gpt(64), base_width=16, lr=0.1))
    before = [group["lr"] for group in optimizer.param_groups]
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5)
    assert [group["lr"] for group in optimizer.param_groups] == [0.5 * lr for lr in before]


def test_a_rule_goes_before_mup_and_the_groups_serve_a_plain_muon() -> None:
    rules = [
        Rule("head.weight", options={"lr": 0.7, "weight_decay": 0.4}),
        Rule("blocks.0.up.weight", algorithm="adamw", options={"lr": 0.6}),
    ]
    routes = mup.route(gpt(32), rules, base_width=16, lr=0.1)
    groups = groups_of(routes)
    assert (groups["head.weight"]["lr"], groups["head.weight"]["weight_decay"]) == (0.7, 0.4)
    assert groups["blocks.0.up.weight"]["lr"] == 0.6
    optimizer = Muon(routes.param_groups())
    scales = {g["adjust_lr_fn"] for g in optimizer.param_groups if g["algorithm"] == "muon"}
    assert scales == {"spectral"}


def test_a_width_is_given_where_it_does_not_follow() -> None:
    rules = [Rule("core", view="matrix")]
    routes = mup.route(Holder(parameter(6, 10)), rules, base_width=5, width=10, lr=0.1)
    assert routes[0].options["lr"] == 0.1
    with pytest.raises(ValueError, match="it has no output head; give width="):
        mup.route(Holder(parameter(6, 10)), rules, base_width=5, lr=0.1, decay="width")
    two = nn.ModuleDict({"a_head": nn.Linear(8, 3), "b_head": nn.Linear(4, 3)})
    with pytest.raises(ValueError, match=r"a_head.weight has 8, b_head.weight has 4\); give width"):
        mup.route(two, base_width=4, lr=0.1)
    heads = {r.name: r.options["lr"] for r in mup.route(two, base_width=4, width=8, lr=0.1)}
    assert heads["a_head.weight"] == heads["b_head.weight"] == pytest.approx(0.05)


# -- what is refused ------------------------------------------------------------------------------


def test_tied_embeddings_are_refused_or_taken_for_embeddings() -> None:
    for call in (lambda: mup.init_(Tied()), lambda: mup.route(Tied(), base_width=8, lr=0.1)):
        with pytest.raises(RoutingError, match=r"embed.weight .*at once.*tied='embedding'"):
            call()
    model = Tied()
    mup.init_(model, tied="embedding", embedding_std=3.0)
    assert model.embed.weight.std().item() == pytest.approx(3.0, rel=0.4)  # of 80 draws: 5 sigma
    routes = mup.route(model, base_width=4, width=8, lr=0.1, tied="embedding")
    assert groups_of(routes)["embed.weight"]["lr"] == 0.1


def _overruled() -> tuple[nn.Module, list[Rule]]:
    return gpt(32), [Rule("blocks.1.up.weight", algorithm="adamw")]


def _bilinear() -> tuple[nn.Module, list[Rule]]:
    return nn.ModuleDict({"mix": nn.Bilinear(4, 4, 4), "head": nn.Linear(4, 2)}), []


def _adapter() -> tuple[nn.Module, list[Rule]]:
    model = nn.ModuleDict({"lora_A": nn.Linear(8, 2, bias=False), "head": nn.Linear(8, 2)})
    return model, []


@pytest.mark.parametrize("make", [_overruled, _bilinear, _adapter])
def test_a_growing_matrix_of_adamws_needs_an_lr(
    make: Callable[[], tuple[nn.Module, list[Rule]]],
) -> None:
    model, rules = make()
    with pytest.raises(RoutingError, match=r"muP has no rule for .*give its lr with Rule\('"):
        mup.route(model, rules, base_width=8, lr=0.1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"base_width": 0}, "base_width should be a whole number of at least 1 but is: 0"),
        ({"base_width": 1.5}, "base_width should be a whole number"),
        ({"width": True}, "width should be a whole number"),
        ({"decay": "none"}, "unknown decay 'none'; it is one of 'constant', 'width'"),
        ({"tied": "yes"}, "unknown tied 'yes'; it is one of 'refuse', 'embedding'"),
        ({"tied": ["yes"]}, r"unknown tied \['yes'\]"),
        ({"lr": "0.1"}, "lr should be a number but is: '0.1'"),
        ({"lr": None}, "lr should be a number but is: None"),
        ({"adamw_lr": True}, "adamw_lr should be a number but is: True"),
        ({"lr": torch.tensor(0.1)}, r"lr should be a number but is: tensor\(0.1"),
        ({"weight_decay": float("nan")}, "weight_decay should be >= 0 and finite but is: nan"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        mup.route(gpt(32), **{"base_width": 16, "lr": 0.1, **options})


def test_another_scale_and_another_init_are_refused() -> None:
    rule = Rule("blocks.*", options={"adjust_lr_fn": "original"})
    with pytest.raises(RoutingError, match=r"adjust_lr_fn='original', and muP's is 'spectral'"):
        mup.route(gpt(32), [Rule("*.up.weight", options=rule.options)], base_width=16, lr=0.1)
    with pytest.raises(ValueError, match="unknown init 'zero'; it is one of"):
        mup.init_(gpt(32), init="zero")
    with pytest.raises(TypeError, match="head_std should be a number but is: None"):
        mup.init_(gpt(32), head_std=None)  # type: ignore[arg-type]


def _parametrized() -> nn.Module:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2))
    torch.nn.utils.parametrizations.weight_norm(model[0])
    return model


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: gpt(32).to("meta"), "on the meta device: call model.to_empty"),
        (_parametrized, "part of a parametrized weight: call mup.init_ before"),
    ],
)
def test_weights_that_cannot_be_set_are_refused(
    make: Callable[[], nn.Module], message: str
) -> None:
    model = make()
    with pytest.raises(RoutingError, match=message):
        mup.init_(model)


def test_a_sharded_weight_is_refused_by_init_and_routed() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = fully_shard(gpt(32), mesh=init_device_mesh("cpu", (1,)))
        with pytest.raises(RoutingError, match=r"sharded \(a DTensor\).*before sharding"):
            mup.init_(model)
        routes = mup.route(model, base_width=16, lr=0.1)
        assert {r.name: r.options["lr"] for r in routes}["head.weight"] == pytest.approx(0.05)
    finally:
        dist.destroy_process_group()


def test_a_refused_init_changes_nothing() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 2))
    torch.nn.utils.parametrizations.weight_norm(model[1])
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(RoutingError):
        mup.init_(model)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_the_groups_of_a_meta_model_are_made() -> None:
    routes = mup.route(gpt(64).to("meta"), base_width=32, lr=0.1)
    assert {r.name: r.options["lr"] for r in routes}["head.weight"] == pytest.approx(0.05)


# -- the coordinate check -------------------------------------------------------------------------

WIDTHS = (32, 64, 128, 256)
TOKENS = torch.randint(32, (4, 17), generator=torch.Generator().manual_seed(0))


MATRICES = ("attention.qkv", "attention.out", "up", "down")


def with_mup(model: nn.Module) -> MuonW:
    mup.init_(model)
    return MuonW(mup.route(model, base_width=64, lr=0.05, weight_decay=0.0))


def without(model: nn.Module) -> MuonW:
    return MuonW(model, lr=0.02, weight_decay=0.0)


def outputs(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Every module's output, by name."""
    found: dict[str, Tensor] = {}
    handles = [
        m.register_forward_hook(lambda _m, _a, out, name=name: found.update({name: out.detach()}))
        for name, m in model.named_modules()
    ]
    with torch.no_grad():
        model(x)
    for handle in handles:
        handle.remove()
    return found


def changes(setup: Callable[[nn.Module], MuonW], width: int, steps: int = 3) -> dict[str, float]:
    """RMS of what a few steps change of every module's output."""
    model = gpt(width)
    optimizer = setup(model)
    x, y = TOKENS[:, :-1], TOKENS[:, 1:]
    before = outputs(model, x)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(x).flatten(0, 1), y.flatten()).backward()
        optimizer.step()
    after = outputs(model, x)
    return {name: (after[name] - before[name]).square().mean().sqrt().item() for name in before}


def power(values: list[float]) -> float:
    """The slope of log value against log width, by least squares."""
    x = torch.tensor(WIDTHS, dtype=torch.float64).log()
    y = torch.tensor(values, dtype=torch.float64).log()
    return (((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum()).item()


def test_what_steps_change_keeps_its_size_with_mup_and_grows_without() -> None:
    powers = {}
    for setup in (with_mup, without):
        measured = [changes(setup, width) for width in WIDTHS]
        powers[setup.__name__] = {
            name: power([m[name] for m in measured]) for name in measured[0] if measured[0][name]
        }
    # A constant is a power of 0, the next candidates are 0.5 and 1; narrow models are a little off.
    assert len(powers["with_mup"]) == len(powers["without"]) == 21
    assert max(map(abs, powers["with_mup"].values())) < 0.15
    grown = {name: p for name, p in powers["without"].items() if p > 0.4}
    # All matrices and the logits; norms and looked-up rows cannot grow.
    assert {f"blocks.{i}.{name}" for i in (0, 1) for name in MATRICES} | {"head"} <= set(grown)


def test_updates_have_the_spectral_norm_lr_sqrt_out_over_in() -> None:
    for width in (32, 128):
        model = gpt(width)
        optimizer = with_mup(model)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        F.cross_entropy(model(TOKENS[:, :-1]).flatten(0, 1), TOKENS[:, 1:].flatten()).backward()
        optimizer.step()
        for r in route(model):
            if r.algorithm == "muon":
                assert r.view is not None
                for largest, _, target in norms(r.view, r.param - before[r.name]):
                    low, high = SCHEDULES["keller"].band
                    assert 0.99 * low < largest / (0.05 * target) < 1.01 * high  # and rounding


def test_coordinates_are_the_rms_of_every_modules_output() -> None:
    model = nn.Sequential(nn.Embedding(5, 4), nn.Identity(), nn.Linear(4, 2))
    with torch.no_grad():
        model[0].weight.fill_(3.0)
    found = mup.coordinates(model, torch.arange(5))
    assert set(found) == {"", "0", "1", "2"}
    assert found["0"] == found["1"] == pytest.approx(3.0)
    assert found[""] == found["2"]
    assert not model[0]._forward_hooks


def test_activations_keep_their_size_at_the_start() -> None:
    sizes = [mup.coordinates(with_init(width), TOKENS[:, :-1]) for width in WIDTHS]
    for name in sizes[0]:
        # Logits start at 1/sqrt(width) and are O(1) after a step (Tensor Programs V, appendix).
        expected = -0.5 if name in ("", "head") else 0.0
        assert power([s[name] for s in sizes]) == pytest.approx(expected, abs=0.15), name


def with_init(width: int) -> nn.Module:
    return mup.init_(gpt(width))


@pytest.mark.parametrize("index", [0, 3])
def test_rows_of_padding_stay_zero(index: int) -> None:
    embedding = nn.Embedding(7, 16, padding_idx=index)
    mup.init_(nn.Sequential(embedding, nn.Linear(16, 16), nn.Linear(16, 5)))
    assert embedding.weight[index].count_nonzero() == 0
    assert embedding.weight.count_nonzero() == 6 * 16


@pytest.mark.parametrize("options", [{"head_std": -1.0}, {"embedding_std": math.nan}])
def test_deviations_out_of_range_change_nothing(options: dict[str, float]) -> None:
    model = nn.Sequential(nn.Embedding(7, 16), nn.Linear(16, 16), nn.Linear(16, 5))
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(ValueError, match="should be >= 0 and finite but is"):
        mup.init_(model, **options)
    assert all(map(torch.equal, before, model.parameters()))


class Conv1D(nn.Module):
    """Of transformers: stored in × out."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight, self.bias = nn.Parameter(torch.ones(nx, nf)), nn.Parameter(torch.zeros(nf))


class Critics(nn.Module):
    """An ensemble of linear layers, E × in × out."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.in_features, self.out_features, self.ensemble_size = inputs, outputs, 5
        self.weight = nn.Parameter(torch.ones(5, inputs, outputs))


HEADS = {
    "linear": lambda w: nn.Linear(w, 50),
    "stored in × out": lambda w: Conv1D(50, w),
    "one output": lambda w: nn.Linear(w, 1),
    "1×1 convolution": lambda w: nn.Conv2d(w, 3, 1),
    "3×3 convolution": lambda w: nn.Conv2d(w, 3, 3),
    "transposed convolution": lambda w: nn.ConvTranspose2d(w, 3, 4, 2, 1),
    "ensemble": lambda w: Critics(w, 3),
}


@pytest.mark.parametrize("head", HEADS)
def test_a_head_is_scaled_by_what_it_takes_however_it_is_stored(head: str) -> None:
    def model(width: int) -> nn.Module:
        return nn.ModuleDict(
            {"up": nn.Linear(8, width), "fc": nn.Linear(width, width), "head": HEADS[head](width)}
        )

    def head_of(width: int) -> Route:
        routes = mup.route(model(width), base_width=64, lr=0.01, weight_decay=0.1)
        return next(r for r in routes if r.name == "head.weight")

    for width in (64, 256):
        options = head_of(width).options
        assert options["lr"] == pytest.approx(0.01 * 64 / width)
        assert options["weight_decay"] == pytest.approx(0.1 * width / 64)
    narrow, wide = (
        mup.init_(model(w), generator=torch.Generator().manual_seed(0)) for w in (64, 1024)
    )
    stds = [float(dict(m.named_parameters())["head.weight"].detach().std()) for m in (narrow, wide)]
    # (64 entries and more: a deviation is off by up to a quarter.)
    assert stds[0] / stds[1] == pytest.approx(16, rel=0.25)


def test_a_hidden_layer_with_one_output_learns_as_a_head_does() -> None:
    for width in (64, 256):
        model = nn.ModuleDict(
            {
                "up": nn.Linear(8, width),
                "moe": nn.ModuleDict(
                    {"gate": nn.Linear(width, 1, bias=False), "fc": nn.Linear(width, width)}
                ),
                "head": nn.Linear(width, 5),
            }
        )
        routes = {r.name: r for r in mup.route(model, base_width=64, lr=0.01, weight_decay=0.1)}
        assert routes["moe.gate.weight"].options["lr"] == pytest.approx(0.01 * 64 / width)
        assert routes["moe.gate.weight"].options["weight_decay"] == pytest.approx(0.1 * width / 64)
        gate = dict(model.named_parameters())["moe.gate.weight"]
        kept = gate.detach().clone()
        mup.init_(model)
        assert torch.equal(gate, kept)


def test_no_width_is_asked_for_where_nothing_depends_on_it() -> None:
    tied = nn.ModuleDict({"emb": nn.Embedding(50, 64), "head": nn.Linear(64, 50, bias=False)})
    tied["head"].weight = tied["emb"].weight  # type: ignore[assignment]
    assert mup.route(tied, base_width=32, lr=0.02, tied="embedding")
    with pytest.raises(ValueError, match="width does not follow"):
        mup.route(tied, base_width=32, lr=0.02, tied="embedding", decay="width")
