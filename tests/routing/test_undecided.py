"""What routing cannot decide, what a user leaves out, and what is no model at all: one message with
the line to write."""

from __future__ import annotations

import re
import warnings
from typing import Any

import pytest
import torch
from torch import nn

from muonkit import Muon, MuonW, RoutingError, Rule, mup, route
from tests.helpers.routing import Body, D, Holder, by_name, raw


def open_model() -> nn.Module:
    """Four parameters of which nothing is known, in two modules of a class that nobody knows."""
    return Body(
        thing=Holder(core=raw(2, 3, 4), odd=raw(9, 10)),
        layers=nn.ModuleList(Holder(core=raw(2, 3, 4)) for _ in range(2)),
        fc=nn.Linear(D, D),
    )


OPEN = ["thing.core", "thing.odd", "layers.0.core", "layers.1.core"]


def rules_of(message: str) -> list[Rule]:
    """What a reader pastes: the text of the message from `rules=[` to `]`."""
    start, end = message.index("rules=["), message.index("\n  ]")
    rules: list[Rule] = eval(message[start + len("rules=") : end] + "]", {"Rule": Rule})
    return rules


# -- undecided ------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [route, MuonW])
def test_pitfall_49_one_error_names_all_and_its_rules_settle_them(make: Any) -> None:
    model = open_model()
    with pytest.raises(RoutingError) as error:
        make(model)
    message = str(error.value)
    for name in OPEN:
        shape = tuple(model.get_parameter(name).shape)
        assert f"{name} {shape} of Holder" in message
    assert "undecided='adamw'" in message
    assert "fc.weight" not in message
    rules = rules_of(message)
    found = by_name(model, rules=rules)
    assert {n for n, r in found.items() if r.reason.startswith("Rule")} == set(OPEN)
    assert all(found[name].algorithm == "adamw" for name in OPEN)
    assert {n: r for n, r in found.items() if n not in OPEN}.keys() >= {"fc.weight"}
    MuonW(model, rules=rules)


def test_many_of_a_kind_are_one_line_and_one_rule() -> None:
    """A deep model: a pattern stands for all layers, and for nothing that is decided."""
    layers = nn.ModuleList(Holder(**{"core[x]": raw(2, 3, 4)}) for _ in range(30))
    layers.append(Holder(**{"core[x]": raw(4)}))
    model = Body(layers=layers, tops=nn.ModuleList(Holder(core=raw(2, 3, 4)) for _ in range(30)))
    with pytest.raises(RoutingError, match=r"cannot route 60 of the 63 parameters") as error:
        route(model)
    message = str(error.value)
    assert "tops.*.core (2, 3, 4) of Holder: " in message
    assert "(30 such)" in message
    found = by_name(model, rules=rules_of(message))
    settled = {n for n, r in found.items() if r.reason.startswith("Rule")}
    assert len(settled) == 60
    assert "layers.30.core[x]" not in settled


@pytest.mark.parametrize("make", [route, MuonW])
def test_undecided_adamw_trains_them_with_adamw_and_names_them_once(make: Any) -> None:
    model = open_model()
    with pytest.warns(UserWarning, match="undecided=") as caught:
        make(model, undecided="adamw")
    told = [str(w.message) for w in caught if "undecided='adamw'" in str(w.message)]
    assert len(told) == 1
    assert all(name in told[0] for name in OPEN)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = by_name(model, undecided="adamw")
    for name in OPEN:
        assert (found[name].algorithm, found[name].decay) == ("adamw", True)
        assert found[name].reason.startswith("undecided: ")
    assert found["fc.weight"].algorithm == "muon"


def test_undecided_adamw_is_silent_where_all_is_decided_and_leaves_rules_their_word() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        route(Body(fc=nn.Linear(D, D)), undecided="adamw")
        rules = [Rule("*core", view="experts"), Rule("*odd", algorithm="adamw")]
        found = {r.name: r for r in route(open_model(), rules, undecided="adamw")}
    assert found["thing.core"].algorithm == "muon"


def test_a_frozen_parameter_of_which_nothing_is_known_waits_with_adamw_without_a_word() -> None:
    model = Body(thing=Holder(core=raw(2, 3, 4).requires_grad_(False)))
    assert by_name(model)["thing.core"].unfrozen is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        waiting = by_name(model, undecided="adamw")["thing.core"].unfrozen
    assert waiting is not None
    assert waiting.algorithm == "adamw"


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature:UserWarning")
def test_undecided_adamw_trains_nothing_that_has_no_shape_or_is_a_flat_shard() -> None:
    flat = nn.Linear(D, D)
    flat.weight = nn.Parameter(torch.zeros(D * D))
    model = Body(fc=nn.LazyLinear(D), gc=flat)
    with pytest.raises(RoutingError) as error:
        route(model, undecided="adamw")
    for words in ("fc.weight of", "fc.bias of", "run one batch", r"gc.weight (64,) of Linear is a"):
        assert words in str(error.value)
    assert "rules=[" not in str(error.value)


def test_undecided_is_one_of_two_and_is_routes_own() -> None:
    with pytest.raises(ValueError, match="unknown undecided 'muon'; it is one of 'raise', 'adamw'"):
        route(Body(), undecided="muon")
    with pytest.raises(TypeError, match=r"give these to route\(model, .*undecided='adamw'"):
        MuonW(route(Body(fc=nn.Linear(D, D))), undecided="adamw")


# -- left out -------------------------------------------------------------------------------------


class Quantizer(nn.Module):
    """Its codebook is moved by the module itself, and yet a parameter that asks for gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(D, D)
        self.codebook = raw(2, 16, D)
        self.last = nn.Linear(D, 2)


LEFT_OUT = [Rule("codebook", algorithm="ignore")]


def test_a_rule_leaves_a_parameter_out() -> None:
    model = Quantizer()
    routes = route(model, LEFT_OUT)
    left = {r.name: r for r in routes}["codebook"]
    assert (left.algorithm, left.view, left.decay, left.scale) == ("ignore", None, False, None)
    assert left.reason == "Rule('codebook')"
    assert routes.summary().endswith("; ignore: 1 parameters, 256 elements")
    optimizer = MuonW(model, rules=LEFT_OUT)
    held = {name for group in optimizer.param_groups for name in group["param_names"]}
    assert held == {"body.weight", "body.bias", "last.weight", "last.bias"}
    before = model.codebook.detach().clone()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert torch.equal(model.codebook, before)
    # Saved and loaded without it.
    again = MuonW(Quantizer(), rules=LEFT_OUT)
    again.load_state_dict(optimizer.state_dict())
    assert len(again.state) == 4


def test_what_is_left_out_stays_so_when_frozen_and_under_mup() -> None:
    model = Quantizer()
    model.codebook.requires_grad_(False)
    frozen = {r.name: r for r in route(model, LEFT_OUT)}["codebook"]
    assert (frozen.algorithm, frozen.unfrozen) == ("frozen", None)
    routes = mup.route(Quantizer(), LEFT_OUT, base_width=D, lr=0.1)
    assert {r.name: r.algorithm for r in routes}["codebook"] == "ignore"


@pytest.mark.parametrize(
    "arguments", [{"view": "experts"}, {"decay": True}, {"options": {"lr": 1e-3}}]
)
def test_what_is_left_out_is_not_told_how_to_be_trained(arguments: dict[str, Any]) -> None:
    with pytest.raises(RoutingError, match=r"leaves its parameters out.*drop algorithm='ignore'"):
        Rule("codebook", algorithm="ignore", **arguments)


def test_leaving_out_everything_leaves_nothing_to_optimize() -> None:
    with pytest.raises(RoutingError, match="leave out every trainable parameter of Quantizer"):
        route(Quantizer(), [Rule("*", algorithm="ignore")])


# -- bad input ------------------------------------------------------------------------------------


def test_no_rules_may_be_none() -> None:
    model = Body(fc=nn.Linear(D, D))
    assert list(route(model, None)) == list(route(model, rules=()))
    assert len(MuonW(model, rules=None).param_groups) == 3


def _exported(model: nn.Module, x: torch.Tensor) -> nn.Module:
    return torch.export.export(model, (x,)).module()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize(
    ("make", "maker"),
    [
        (lambda model, x: torch.jit.script(model), "torch.jit"),
        (lambda model, x: torch.jit.trace(model, x), "torch.jit"),
        (_exported, "torch.export"),
        (lambda model, x: nn.Sequential(_exported(model, x)), "torch.export"),
    ],
)
def test_a_module_whose_class_was_dropped_is_routed_as_it_was_before(make: Any, maker: str) -> None:
    """An embedding, a layer and an output head look alike in it: none is taken for a matrix."""
    layers = (nn.Linear(n, m) for n, m in ((8, 12), (12, 12), (12, 7)))
    model = nn.Sequential(nn.Embedding(11, 8), *layers)
    routes = route(model)
    made = make(model, torch.zeros(2, dtype=torch.int64))
    with pytest.raises(RoutingError, match=rf"{maker} has dropped the class") as error:
        MuonW(made)
    assert "bias" not in str(error.value)
    route(made, rules_of(str(error.value)))
    with pytest.warns(UserWarning, match="undecided="):
        assert all(r.algorithm == "adamw" for r in route(made, undecided="adamw"))
    before = dict(zip(model.state_dict(), model.parameters(), strict=True))
    assert {r.name: id(r.param) for r in routes} == {n: id(p) for n, p in before.items()}
    assert {id(p) for p in made.parameters()} == {id(p) for p in before.values()}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_scripted_module_without_parameters_changes_no_route() -> None:
    plain = Body(fc=nn.Linear(D, D), act=nn.ReLU(), gc=nn.Linear(D, D))
    scripted = Body(fc=nn.Linear(D, D), act=torch.jit.script(nn.ReLU()), gc=nn.Linear(D, D))
    assert [r.reason for r in route(scripted)] == [r.reason for r in route(plain)]


def test_adamws_eps_is_refused_with_its_name() -> None:
    model = Body(fc=nn.Linear(D, D))
    with pytest.raises(TypeError, match=r"eps=1e-08.*AdamW's is called adamw_eps"):
        MuonW(model, eps=1e-8)
    with pytest.raises(TypeError, match="adamw_eps"):
        MuonW([model.fc.weight], lr=0.1, adamw_params=[model.last.weight], adamw_lr=0.1, eps=1e-6)
    MuonW(model, eps=1e-7)  # torch.optim.Muon's default
    with pytest.raises(TypeError, match="adamw_betas"):
        MuonW(model, betas=(0.9, 0.99))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (lambda m: m.parameters(), r"parameters \(generator\)"),
        (lambda m: list(m.parameters()), r"parameters \(list\)"),
        (lambda m: [{"params": list(m.parameters())}], r"parameters \(list\)"),
        (lambda m: {"params": list(m.parameters())}, r"parameters \(dict\)"),
        (lambda m: dict(m.named_parameters()), r"parameters \(dict\)"),
        (lambda m: m.fc.weight, "a parameter"),
    ],
)
def test_parameters_in_place_of_a_model(given: Any, words: str) -> None:
    """As a framework passes them that makes optimizers of params."""
    model = Body(fc=nn.Linear(D, D))
    with pytest.raises(TypeError, match=rf"MuonW got {words}.*MuonW\(model\); .*lambda params: "):
        MuonW(given(model))


def test_a_model_of_one_layer_or_without_matrices_warns_with_the_line_to_write() -> None:
    with pytest.warns(UserWarning, match=r"rules=\[Rule\('weight', view='matrix'\)\]"):
        MuonW(nn.Linear(D, D))
    optimizer = MuonW(nn.Linear(D, D), rules=[Rule("weight", view="matrix")])
    assert optimizer.param_groups[0]["algorithm"] == "muon"
    with pytest.warns(UserWarning, match="no hidden matrix in the model"):
        MuonW(nn.LayerNorm(D))


def test_a_rule_that_matches_nothing_says_what_it_may_have_meant() -> None:
    model = Body(blocks=nn.ModuleList([nn.Linear(D, D)]))
    with pytest.raises(RoutingError, match=r"Rule\('\*blocks.0\*'\) would match"):
        route(model, [Rule("blocks.0", decay=True)])
    with pytest.raises(RoutingError, match=r"close to it: blocks\.0\.weight"):
        route(model, [Rule("block.0.weight", decay=True)])
    with pytest.raises(RoutingError, match="matches no parameter; the names are"):
        route(model, [Rule(re.compile("nowhere"), decay=True)])


@pytest.mark.parametrize("dim", [None, 0])
def test_the_gain_of_a_parametrized_layer_is_no_shard(dim: int | None) -> None:
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(D, D), dim=dim)
    found = by_name(Body(fc=layer))
    assert found["fc.parametrizations.weight.original0"].algorithm == "adamw"
    assert found["fc.parametrizations.weight.original1"].algorithm == "muon"


def test_two_rules_for_the_same_parameters_name_each_other() -> None:
    model = Body(fc=nn.Linear(D, D))
    rules = [Rule("fc.weight", algorithm="muon"), Rule("fc.w*", algorithm="adamw")]
    expected = r"Rule\('fc\.w\*'\) \(number 2\) never decides.*Rule\('fc\.weight'\).*make one rule"
    with pytest.raises(RoutingError, match=expected):
        route(model, rules)


def test_a_plain_optimizer_takes_the_groups_of_a_route_with_parameters_left_out() -> None:
    groups = route(Quantizer(), LEFT_OUT).param_groups()
    optimizer = Muon(groups, adjust_lr_fn="match_rms_adamw")
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 4
