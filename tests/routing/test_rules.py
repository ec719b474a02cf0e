"""Rules that override routing, and what the routes can be turned into."""

from __future__ import annotations

import copy
import json
import pickle
import re
from typing import Any

import pytest
import torch
from torch import nn

from muonkit import Muon, MuonW
from muonkit.options import OF_ALGORITHM
from muonkit.routing.routes import Route, Routes, RoutingError, Rule, route
from muonkit.scale import scale_factor

D = 8


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.zeros(4, 16, D))
        self.core = nn.Parameter(torch.zeros(4, 16, D))


class Model(nn.Module):
    """An embedding, two hidden layers, a norm and a tied head."""

    def __init__(self) -> None:
        super().__init__()
        self.wte = nn.Embedding(10, D)
        self.fc1 = nn.Linear(D, D)
        self.fc2 = nn.Linear(D, 2 * D)
        self.norm = nn.LayerNorm(2 * D)
        self.head = nn.Linear(D, 10, bias=False)
        self.head.weight = self.wte.weight


def found(*rules: Rule, model: nn.Module | None = None) -> dict[str, Route]:
    return {r.name: r for r in route(model or Model(), rules)}


# -- matching ----------------------------------------------------------------------------------


def first_layer(name: str, param: nn.Parameter, owner: nn.Module) -> bool:
    return name.startswith("fc1") and param.ndim == 2 and isinstance(owner, nn.Linear)


@pytest.mark.parametrize(
    ("match", "names"),
    [
        ("fc?.weight", {"fc1.weight", "fc2.weight"}),
        ("*.bias", {"fc1.bias", "fc2.bias", "norm.bias"}),
        (re.compile(r"^fc\d\.w"), {"fc1.weight", "fc2.weight"}),
        (nn.LayerNorm, {"norm.weight", "norm.bias"}),
        (first_layer, {"fc1.weight"}),
        ("head.weight", {"wte.weight"}),  # the tied tensor by its other name
    ],
)
def test_rules_match_by_pattern_expression_class_and_predicate(match: Any, names: set[str]) -> None:
    routes = found(Rule(match, options={"lr": 1e-4}))
    assert {name for name, r in routes.items() if r.options} == names


def test_a_class_rule_reaches_the_module_behind_a_parametrization() -> None:
    class Special(nn.Linear):
        pass

    model = nn.Sequential(nn.utils.parametrizations.weight_norm(Special(D, D)), nn.Linear(D, 2))
    routes = found(Rule(Special, algorithm="adamw"), model=model)
    assert routes["0.parametrizations.weight.original1"].algorithm == "adamw"


def test_patterns_are_case_sensitive_and_match_whole_names() -> None:
    for pattern in ("FC1.weight", "fc1"):
        with pytest.raises(RoutingError, match="matches no parameter"):
            found(Rule(pattern, algorithm="adamw"))


def test_a_rule_that_matches_nothing_raises_and_shows_names() -> None:
    with pytest.raises(RoutingError, match=r"Rule\('fc3\*'\) matches no parameter.*wte\.weight"):
        found(Rule("fc3*", algorithm="adamw"))


def test_the_first_rule_that_matches_decides() -> None:
    routes = found(Rule("fc1.weight", algorithm="adamw"), Rule("fc*.weight", decay=False))
    assert (routes["fc1.weight"].algorithm, routes["fc1.weight"].decay) == ("adamw", True)
    assert (routes["fc2.weight"].algorithm, routes["fc2.weight"].decay) == ("muon", False)


def test_a_rule_behind_a_wider_one_raises() -> None:
    with pytest.raises(RoutingError, match=r"Rule\('fc1\.\*'\) \(number 2\) never decides"):
        found(Rule("fc*", decay=True), Rule("fc1.*", decay=False))


# -- overriding --------------------------------------------------------------------------------


def test_rules_change_only_what_they_say() -> None:
    before, after = found(), found(Rule("fc1.weight", decay=False))
    assert after["fc1.weight"].view == before["fc1.weight"].view == "matrix"
    assert after["fc1.weight"].reason == "Rule('fc1.weight'); hidden linear layer"
    for name in before.keys() - {"fc1.weight"}:
        assert after[name].reason == before[name].reason


def test_a_view_implies_muon_and_sets_the_scale() -> None:
    routed = found(Rule("wte.weight", view="split(rows=2)"))["wte.weight"]
    assert (routed.algorithm, routed.view) == ("muon", "split(rows=2)")
    assert routed.scale == pytest.approx(8**0.5)
    unequal = found(Rule("fc2.weight", view="split(rows=12+4)"))["fc2.weight"]
    assert unequal.scale == pytest.approx((12**0.5, 8**0.5))


def test_an_own_scale_is_the_one_shown() -> None:
    routes = found(Rule("fc2.weight", options={"adjust_lr_fn": "spectral"}))
    assert routes["fc2.weight"].scale == pytest.approx(2**0.5)


def test_an_unknown_own_scale_is_refused() -> None:
    with pytest.raises(ValueError, match=r"unknown adjust_lr_fn .* it is one of"):
        found(Rule("fc2.weight", options={"adjust_lr_fn": "big"}))


def test_muon_keeps_the_view_that_was_judged() -> None:
    model = nn.Sequential(nn.Conv2d(3, D, 3), nn.Conv2d(D, D, 3))
    assert found(Rule("1.weight", algorithm="muon"), model=model)["1.weight"].view == "flatten"
    # A stem that a rule sends to Muon has the view that it would have as a hidden layer.
    assert found(Rule("0.weight", algorithm="muon"), model=model)["0.weight"].view == "flatten"
    depthwise = nn.Sequential(nn.Conv2d(3, D, 3), nn.Conv2d(D, D, 3, groups=D))
    with pytest.raises(RoutingError, match=r"needs a view of its 4 dimensions: 'flatten'"):
        found(Rule("1.weight", algorithm="muon"), model=depthwise)
    assert found(Rule("1.weight", view="flatten"), model=depthwise)["1.weight"].view == "flatten"


def test_a_vector_is_no_matrix() -> None:
    with pytest.raises(RoutingError, match="a 1-D parameter is no matrix"):
        found(Rule("fc1.bias", algorithm="muon"))


def test_a_view_that_does_not_fit_names_the_parameter() -> None:
    with pytest.raises(RoutingError, match=r"Rule\('fc1\.weight'\) on fc1\.weight: .*3 equal part"):
        found(Rule("fc1.weight", view="split(rows=3)"))


def test_decay_follows_a_rule_onto_unknown_tensors() -> None:
    model = nn.Sequential(Experts(), nn.Linear(D, 2))
    routes = found(Rule("0.core", algorithm="adamw"), model=model)
    assert (routes["0.core"].decay, routes["0.up"].view) == (True, "experts")


def test_frozen_parameters_stay_frozen() -> None:
    model = Model()
    model.fc1.requires_grad_(False)
    routes = found(Rule("fc1.*", decay=False), model=model)
    assert (routes["fc1.weight"].algorithm, routes["fc1.weight"].options) == ("frozen", {})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "overrides nothing"),
        ({"algorithm": "sgd"}, "one of 'muon', 'adamw', 'ignore'; to freeze"),
        ({"algorithm": "frozen"}, "requires_grad_"),
        ({"algorithm": "adamw", "view": "matrix"}, "gives a view to AdamW"),
        ({"view": "cube"}, "unknown view"),
        ({"options": {"view": "matrix"}}, "which routing sets"),
    ],
)
def test_rules_that_contradict_themselves(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(RoutingError, match=message):
        Rule("fc1.*", **arguments)


@pytest.mark.parametrize("match", [3, int, None])
def test_rules_that_match_by_nothing_known(match: Any) -> None:
    with pytest.raises(TypeError, match=r"Rule\.match"):
        Rule(match, decay=False)


# -- what routes turn into -----------------------------------------------------------------------


def test_param_groups_merge_what_agrees_and_keep_the_order() -> None:
    model = Model()
    routes = route(model, [Rule("fc1.weight", options={"lr": 1e-4})])
    groups = routes.param_groups()
    names = [[name for name, _ in group.pop("params")] for group in copy.copy(groups)]
    assert names == [
        ["wte.weight"],
        ["fc1.weight"],
        ["fc1.bias", "fc2.bias", "norm.weight", "norm.bias"],
        ["fc2.weight"],
    ]
    assert groups == [
        {"algorithm": "adamw", "decay": True},
        {"algorithm": "muon", "decay": True, "view": "matrix", "lr": 1e-4},
        {"algorithm": "adamw", "decay": False},
        {"algorithm": "muon", "decay": True, "view": "matrix"},
    ]


def test_param_groups_hold_the_parameters_themselves() -> None:
    model = Model()
    pairs = [pair for group in route(model).param_groups() for pair in group["params"]]
    named = dict(model.named_parameters())
    assert {name: id(p) for name, p in pairs} == {name: id(p) for name, p in named.items()}


def test_groups_with_tensor_options_stand_apart() -> None:
    rate = torch.tensor(1e-3)
    rules = [Rule("fc1.weight", options={"lr": rate}), Rule("fc2.weight", options={"lr": rate})]
    groups = [g for g in route(Model(), rules).param_groups() if "lr" in g]
    assert len(groups) == 1
    assert groups[0]["lr"] is rate


def test_the_table_aligns_and_ends_with_the_counts() -> None:
    lines = str(route(Model())).splitlines()
    assert lines[0].split() == ["name", "shape", "view", "algorithm", "scale", "decay", "reason"]
    starts = {line.index(word) for line, word in zip(lines[2:-1], ALGORITHMS, strict=True)}
    assert starts == {lines[0].index("algorithm")}
    # fc1 8·8 and fc2 16·8; wte 10·8, the biases 8 and 16, the norm 16 and 16.
    assert lines[-1] == (
        "muon: 2 parameters, 192 elements; adamw: 5 parameters, 136 elements; "
        "frozen: 0 parameters, 0 elements"
    )
    assert "(also head.weight)" in lines[2]


class Deep(nn.Module):
    """Layers that repeat, one of which is wider than the others, before a head of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.h = nn.ModuleList(nn.ModuleDict({"fc": nn.Linear(D, D)}) for _ in range(11))
        self.h.append(nn.ModuleDict({"fc": nn.Linear(D, 2 * D)}))
        self.head = nn.Linear(2 * D, 2)


def test_layers_that_repeat_are_one_line_each_in_the_table() -> None:
    routes = route(Deep(), [Rule("h.3.fc.bias", decay=True)])
    lines = [line.split() for line in str(routes).splitlines()[2:-1]]
    assert [(line[0], line[1]) for line in lines] == [
        ("11×", "h.*.fc.weight"),
        ("10×", "h.*.fc.bias"),
        ("1×", "h.3.fc.bias"),
        ("1×", "h.11.fc.weight"),
        ("1×", "h.11.fc.bias"),
        ("1×", "head.weight"),
        ("1×", "head.bias"),
    ]
    assert sum(int(line[0].removesuffix("×")) for line in lines) == len(routes)
    whole = routes.table(fold=False).splitlines()
    assert [line.split()[0] for line in whole] == [
        "name",
        "-" * 14,
        *(r.name for r in routes),
        "muon:",
    ]
    assert whole[-1] == str(routes).splitlines()[-1] == routes.summary()


def test_a_rule_that_fits_none_of_many_is_told_once() -> None:
    with pytest.raises(RoutingError) as caught:
        route(Deep(), [Rule("h.*.fc.weight", view="split(rows=3)")])
    told = str(caught.value).splitlines()
    assert len(told) == 2, "one for each reason: 8 rows, 16 rows"
    assert told[0].startswith(
        "Rule('h.*.fc.weight') on h.0.fc.weight, h.1.fc.weight, h.2.fc.weight and 8 others: view "
    )
    assert told[1].startswith("Rule('h.*.fc.weight') on h.11.fc.weight: view ")


ALGORITHMS = ["adamw", "muon", "adamw", "muon", "adamw", "adamw", "adamw"]


def test_json_round_trip() -> None:
    model = Model()
    model.fc1.bias.requires_grad_(False)
    rule = Rule("fc2.weight", view="split(rows=12+4)", options={"lr": torch.tensor(1), "eps": 1e-4})
    routes = route(model, [rule])
    data = json.loads(routes.to_json())
    assert [row["name"] for row in data["routes"]] == [r.name for r in routes]
    for row, r in zip(data["routes"], routes, strict=True):
        assert tuple(row["shape"]) == r.shape
        assert tuple(row["aliases"]) == r.aliases
        assert (row["algorithm"], row["view"], row["decay"], row["reason"]) == (
            r.algorithm,
            r.view,
            r.decay,
            r.reason,
        )
        assert row["scale"] == (list(r.scale) if isinstance(r.scale, tuple) else r.scale)
    assert data["routes"][3]["options"] == {"lr": "tensor(1)", "eps": 1e-4}
    assert data["summary"]["frozen"] == {"parameters": 1, "elements": 8}


def test_routes_are_a_sequence_and_can_be_copied() -> None:
    routes = route(Model())
    assert isinstance(routes[1:3], Routes)
    assert [r.name for r in routes[1:3]] == ["fc1.weight", "fc1.bias"]
    assert repr(routes).startswith("<Routes: muon: 2 parameters")
    again = pickle.loads(pickle.dumps(routes))
    assert list(again) == list(routes)
    assert "Parameter" not in repr(routes[0])


def test_routing_leaves_the_model_alone() -> None:
    model = Model()
    model.fc1 = nn.utils.parametrizations.spectral_norm(model.fc1)
    model.train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    # Reading a spectrally normed weight would run a power iteration.
    route(model)
    after = model.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before)


def test_options_are_hyperparameters_of_the_algorithm_that_gets_them() -> None:
    with pytest.raises(RoutingError, match=r"unknown option 'learning_rate'.*'lr', 'maximize'"):
        Rule("fc1.weight", options={"learning_rate": 1e-9})
    with pytest.raises(RoutingError, match=r"gives \['ns_steps'\] to fc1.bias, which adamw trains"):
        route(Model(), [Rule("fc1.*", options={"ns_steps": 7})])


def test_one_rule_needs_no_brackets() -> None:
    rule = Rule("fc1.weight", algorithm="adamw")
    assert list(route(Model(), rule)) == list(route(Model(), [rule]))
    assert list(route(Model(), rule)) != list(route(Model()))


def test_the_scale_in_the_table_is_the_one_that_is_used() -> None:
    routes = route(Model(), [Rule("fc2.weight", options={"adjust_lr_fn": None})], scale="spectral")
    shown = {r.name: r.scale for r in routes}
    optimizer = MuonW(routes, adamw_lr=0.1)
    for group in optimizer.param_groups:
        for name, p in zip(group["param_names"], group["params"], strict=True):
            if group["algorithm"] == "muon":
                assert shown[name] == scale_factor(group["adjust_lr_fn"], *p.shape)
    with pytest.raises(TypeError, match=r"route\(model, rules, scale='original'"):
        MuonW(routes, adjust_lr_fn="original", adamw_lr=0.1)


def test_decay_1d_leaves_to_rules_what_they_decide() -> None:
    routes = route(Model(), [Rule("fc1.bias", decay=False)], decay_1d=True)
    assert {r.name for r in routes if not r.decay} == {"fc1.bias"}


def test_pitfall_41_every_option_of_a_group_may_stand_in_a_rule() -> None:
    """By the one table of options; the values are those that the groups have anyway."""
    model = Model()
    for group in MuonW(model).param_groups:
        algorithm = group["algorithm"]
        name = group["param_names"][0]
        for key in OF_ALGORITHM[algorithm]:
            if key == "weight_decay" and group["weight_decay"] == 0:
                continue
            rule = Rule(name, options={key: group[key]})
            own = next(
                g for g in MuonW(model, rules=[rule]).param_groups if name in g["param_names"]
            )
            assert own[key] == group[key]


def test_pitfall_48_a_rules_decay_is_for_what_decays() -> None:
    model = Model()
    rules = [Rule("*", options={"weight_decay": 0.01})]
    told = {r.name: r.decay for r in route(model, rules)}
    assert True in told.values()
    assert False in told.values()
    for group in MuonW(model, rules=rules).param_groups:
        for name in group["param_names"]:
            assert group["weight_decay"] == (0.01 if told[name] else 0.0)
    forced = MuonW(model, rules=[Rule("*", decay=True, options={"weight_decay": 0.01})])
    assert {group["weight_decay"] for group in forced.param_groups} == {0.01}
    with pytest.raises(RoutingError, match=r"decay=False and weight_decay=0\.3"):
        Rule("*", decay=False, options={"weight_decay": 0.3})
    with pytest.raises(ValueError, match=r"decay=False and weight_decay=0\.3"):
        Muon([{"params": [nn.Parameter(torch.zeros(2, 2))], "decay": False, "weight_decay": 0.3}])


@pytest.mark.parametrize("where", ["argument", "group"])
def test_an_eps_without_effect_warns(where: str) -> None:
    p = nn.Parameter(torch.zeros(2, 2))
    with pytest.warns(UserWarning, match="eps=1e-06 has no effect on Muon"):
        Muon([p], eps=1e-6) if where == "argument" else Muon([{"params": [p], "eps": 1e-6}])
    adamw = Muon([{"params": [p], "algorithm": "adamw", "lr": 0.1, "eps": 1e-6}])
    assert adamw.param_groups[0]["eps"] == 1e-6


@pytest.mark.parametrize("key", ["lr", "weight_decay"])
def test_rules_tensors_stay_separate(key: str) -> None:
    """Two rules with tensors of one value: each may be filled by itself."""
    model = nn.Sequential(*(nn.Linear(4, 4, bias=False) for _ in range(3)), nn.Linear(4, 2))
    first, second = torch.tensor(0.1), torch.tensor(0.1)
    rules = [Rule(f"{i}.weight", options={key: t}) for i, t in enumerate((first, second, first))]
    groups = MuonW(model, rules=rules).param_groups
    of = {name: group[key] for group in groups for name in group["param_names"]}
    assert of["0.weight"] is of["2.weight"] is first
    assert of["1.weight"] is second
