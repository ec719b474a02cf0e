"""What may happen to an optimizer's parameters and options after it was made: each ends in the
exact step, or in an error before anything is written.
"""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import CyclicLR, OneCycleLR

import muonkit
from muonkit import Muon, MuonW
from tests.helpers.optim import mlp, momentum_of, parameter, set_gradients, train

FP32: dict[str, Any] = {"lr": 0.05, "weight_decay": 0.1, "ns_dtype": "float32"}


def everything(optimizer: Muon) -> dict[str, Any]:
    """A copy of all that a refused step must leave as it was."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    return {
        "values": [p.detach().clone() for p in params],
        "state": [
            {key: copy.deepcopy(value) for key, value in optimizer.state.get(p, {}).items()}
            for p in params
        ],
    }


def assert_equal(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert len(one["values"]) == len(other["values"])
    for a, b in zip(one["values"], other["values"], strict=True):
        assert torch.equal(a, b)
    for a, b in zip(one["state"], other["state"], strict=True):
        assert a.keys() == b.keys()
        for key, value in a.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(b[key])), key


def replaced(model: nn.Module) -> dict[Tensor, Tensor]:
    """New parameters of the same values in the model, as a framework puts them in."""
    new = {}
    for module in model.modules():
        for name, p in list(module.named_parameters(recurse=False)):
            fresh = nn.Parameter(p.detach().clone())
            new[p] = fresh
            setattr(module, name, fresh)
    return new


# --- replaced parameters --------------------------------------------------------------------------


def swap(optimizer: Muon, new: dict[Tensor, Tensor]) -> None:
    for group in optimizer.param_groups:
        group["params"] = [new[p] for p in group["params"]]


@pytest.mark.parametrize("variant", ["plain", "normuon", "adamuon"])
def test_pitfall_34_replaced_parameters_go_on_with_their_state(variant: str) -> None:
    model, other = mlp(), mlp()
    optimizer = MuonW(model, **FP32, variant=variant)
    expected = MuonW(other, **FP32, variant=variant)
    train(model, optimizer, 2)
    train(other, expected, 2)
    swap(optimizer, replaced(model))
    train(model, optimizer, 2, seed=2)
    train(other, expected, 2, seed=2)
    assert_equal(everything(optimizer), everything(expected))


@pytest.mark.parametrize(
    "call",
    [
        lambda o: o.state_dict(),
        lambda o: o.plan(),
        lambda o: o.clip_grad_norm_(1.0),
        lambda o: o.load_state_dict(o.state_dict()),
        lambda o: o.add_param_group({"params": [("more", parameter(4, 4))], "algorithm": "muon"}),
    ],
)
def test_whatever_is_called_first_settles_and_lets_go_of_what_is_gone(
    call: Callable[[Muon], Any],
) -> None:
    model = mlp()
    optimizer = MuonW(model, **FP32)
    gone = [weakref.ref(p) for p in model.parameters()]
    swap(optimizer, replaced(model))
    call(optimizer)
    assert {p for p in optimizer.state if isinstance(p, Tensor)} >= set(model.parameters())
    gc.collect()
    assert [ref() for ref in gone] == [None] * len(gone)


def test_what_the_groups_hold_now_is_described_without_settling() -> None:
    """To settle may take all ranks, and one alone may ask for this."""
    model = mlp()
    optimizer = MuonW(model, **FP32)
    kept, rows = dict(optimizer.state), optimizer.describe()
    swap(optimizer, replaced(model))
    assert optimizer.describe() == rows
    assert optimizer.state.keys() == kept.keys()


def test_reordered_and_removed_parameters_keep_their_own_state() -> None:
    params = [parameter(4, 6, seed=i) for i in range(3)]
    optimizer = Muon(params, **FP32)
    set_gradients(params)
    optimizer.step()
    kept = {p: momentum_of(optimizer, p).clone() for p in params}
    group = optimizer.param_groups[0]
    group["params"] = [params[2], params[0]]
    optimizer.plan()
    assert set(optimizer.state) == {params[0], params[2]}
    for p in (params[0], params[2]):
        assert torch.equal(momentum_of(optimizer, p), kept[p])
    group["params"].append(params[1])  # put in again: begins anew
    optimizer.plan()
    assert not momentum_of(optimizer, params[1]).any()


def test_named_parameters_are_found_by_name() -> None:
    model = mlp()
    optimizer = MuonW(model, **FP32)
    train(model, optimizer, 1)
    momentum = {n: optimizer.state[p] for n, p in model.named_parameters()}
    new = replaced(model)
    for group in optimizer.param_groups:  # another length: positions say nothing
        dropped = len(group["params"]) > 1
        group["params"] = [new[p] for p in group["params"][dropped:]]
        group["param_names"] = group["param_names"][dropped:]
    optimizer.plan()
    for group in optimizer.param_groups:
        for name, p in zip(group["param_names"], group["params"], strict=True):
            key = "momentum_buffer" if group["algorithm"] == "muon" else "exp_avg"
            assert torch.equal(optimizer.state[p][key], momentum[name][key])


def test_names_go_before_positions() -> None:
    params = [(f"p{i}", parameter(4, 4, seed=i)) for i in range(3)]
    optimizer = Muon(params, **FP32)
    set_gradients([p for _, p in params])
    optimizer.step()
    momentum = {name: momentum_of(optimizer, p) for name, p in params}
    group = optimizer.param_groups[0]
    order = [2, 0, 1]
    group["params"] = [nn.Parameter(group["params"][i].detach().clone()) for i in order]
    group["param_names"] = [f"p{i}" for i in order]
    optimizer.plan()
    for name, p in zip(group["param_names"], group["params"], strict=True):
        assert torch.equal(momentum_of(optimizer, p), momentum[name])
    group["params"] = group["params"][::-1]  # and not its names
    with pytest.raises(ValueError, match="reordered, and 'param_names' were not"):
        optimizer.state_dict()


def test_names_that_two_models_share_tell_nothing() -> None:
    """A generator's and a discriminator's named parameters in one group: positions tell."""
    params = [(f"p{i % 2}", parameter(4, 4, seed=i)) for i in range(4)]
    optimizer = Muon(params, **FP32)
    set_gradients([p for _, p in params])
    optimizer.step()
    momentum = [momentum_of(optimizer, p) for _, p in params]
    group = optimizer.param_groups[0]
    group["params"] = [nn.Parameter(p.detach().clone()) for p in group["params"]]
    optimizer.plan()
    for p, before in zip(group["params"], momentum, strict=True):
        assert torch.equal(momentum_of(optimizer, p), before)


def test_a_step_refuses_names_that_are_not_as_many_as_the_parameters() -> None:
    params = [(f"p{i}", parameter(4, 4, seed=i)) for i in range(3)]
    optimizer = Muon(params, **FP32)
    set_gradients([p for _, p in params])
    optimizer.step()
    before = [p.detach().clone() for _, p in params]
    optimizer.param_groups[0]["param_names"] = ["p0", "p1"]
    with pytest.raises(ValueError, match="3 parameters and 2 names"):
        optimizer.step()
    assert all(torch.equal(p, was) for (_, p), was in zip(params, before, strict=True))


def test_what_is_held_already_need_not_be_added() -> None:
    model = mlp()
    model[2].requires_grad_(False)
    optimizer = MuonW(model, **FP32)
    model[2].requires_grad_(True)
    with pytest.raises(ValueError, match=r"2\.weight is in 'muon' already.*nothing need be added"):
        optimizer.add_param_group({"params": [model[2].weight], "algorithm": "muon"})


def test_what_cannot_be_mapped_is_refused() -> None:
    params = [parameter(4, 6, seed=i) for i in range(3)]
    optimizer = Muon(params, **FP32)
    before = list(optimizer.state.items())
    optimizer.param_groups[0]["params"] = [parameter(4, 6, seed=5), parameter(4, 6, seed=6)]
    set_gradients(optimizer.param_groups[0]["params"])
    with pytest.raises(ValueError, match=r"nothing says which stands for which.*nothing was chang"):
        optimizer.step()
    assert all(optimizer.state[p] is state for p, state in before)
    optimizer.param_groups[0]["params"] = [parameter(6, 4), *params[1:]]
    with pytest.raises(ValueError, match=r"shape \(6, 4\).*made for \(4, 6\).*reset_state"):
        optimizer.state_dict()


# --- resized parameters ---------------------------------------------------------------------------


def embedding_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(20, 8), nn.Linear(8, 8), nn.Linear(8, 20))


def backward(model: nn.Module, tokens: int) -> None:
    model.zero_grad()
    model(torch.arange(tokens)).logsumexp(-1).mean().backward()


@pytest.mark.parametrize("index", [0, 1, 2])
def test_pitfall_36_a_resized_parameter_is_refused_before_anything_is_written(index: int) -> None:
    model = embedding_model()
    optimizer = MuonW(model, **FP32)
    backward(model, 20)
    optimizer.step()
    weight = model[index].weight
    weight.data = torch.cat([weight.data, torch.zeros(3, weight.shape[1])])
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    before = everything(optimizer)
    for call in (optimizer.step, optimizer.state_dict, optimizer.plan):
        with pytest.raises(ValueError, match=rf"{index}\.weight has the shape .*reset_state"):
            call()
    assert_equal(everything(optimizer), before)
    optimizer.reset_state([weight])
    optimizer.step()
    assert (weight[-3:] != 0).any()


def test_a_reset_state_is_zero_and_the_others_are_kept() -> None:
    model = mlp()
    optimizer = MuonW(model, **FP32, variant="normuon")
    train(model, optimizer, 2)
    kept = momentum_of(optimizer, model[0].weight).clone()
    optimizer.reset_state([model[2].weight])
    state = optimizer.state[model[2].weight]
    assert not any(value.any() for value in state.values())
    assert torch.equal(momentum_of(optimizer, model[0].weight), kept)
    optimizer.reset_state()
    assert not momentum_of(optimizer, model[0].weight).any()
    with pytest.raises(ValueError, match=r"no param group holds"):
        optimizer.reset_state([parameter(12, 24)])


def test_a_gradient_of_the_shape_before_is_refused() -> None:
    model = mlp()
    optimizer = MuonW(model, **FP32)
    set_gradients(list(model.parameters()))
    bias = model[0].bias
    bias.data = torch.zeros(30)
    optimizer.reset_state([bias])
    before = everything(optimizer)
    with pytest.raises(ValueError, match=r"0\.bias is \(30,\).*its gradient \(24,\)"):
        optimizer.step()
    assert_equal(everything(optimizer), before)


@pytest.mark.parametrize("key", ["momentum_buffer", "exp_avg", "exp_avg_sq"])
def test_a_state_of_another_shape_is_refused(key: str) -> None:
    model = mlp()
    optimizer = MuonW(model, **FP32)
    train(model, optimizer, 1)
    p = model[2].weight if key == "momentum_buffer" else model[2].bias
    optimizer.state[p][key] = torch.zeros(3)
    before = everything(optimizer)
    with pytest.raises(ValueError, match=rf"wants a {key} of shape .*reset_state"):
        optimizer.step()
    assert_equal(everything(optimizer), before)


# --- one step or none -----------------------------------------------------------------------------

EDITS: list[tuple[str, dict[str, Any], str]] = [
    ("muon", {"adjust_lr_fn": "typo"}, "adjust_lr_fn"),
    ("muon", {"momentum": 1.5}, "momentum should be"),
    ("muon", {"ns_coefficients": "typo"}, "typo"),
    ("muon", {"ns_dtype": "int8"}, "ns_dtype"),
    ("muon", {"ns_form": "typo"}, "typo"),
    ("muon", {"after": "typo"}, "after"),
    ("muon", {"view": "split(rows=7)"}, "equal parts"),
    ("muon", {"view": "experts"}, "experts"),
    ("muon", {"momentum_dtype": "int4"}, "momentum_dtype"),
    ("muon", {"lr": float("nan")}, "Learning rate"),
    ("muon", {"bytes_in_flight": 0}, "bytes_in_flight"),
    ("muon", {"maximize": "q"}, "maximize should be"),
    ("muon", {"nesterov": "False"}, "nesterov should be"),
    ("muon", {"cautious": None}, "cautious should be"),
    ("adamw", {"maximize": "q"}, "maximize should be"),
    ("adamw", {"lr": -1.0}, "Learning rate"),
    ("adamw", {"betas": (0.9, 1.5)}, "betas"),
    ("adamw", {"betas": None}, "betas"),
    ("adamw", {"weight_decay": "much"}, "weight decay"),
    ("adamw", {"algorithm": "muon"}, "has no"),
    ("muon", {"algorithm": "adamw"}, "has no"),
    ("muon", {"algorithm": "sgd"}, "algorithm"),
]


@pytest.mark.parametrize(("kind", "edit", "message"), EDITS)
def test_options_edited_later_are_refused_before_the_first_write(
    kind: str, edit: dict[str, Any], message: str
) -> None:
    model = mlp()
    optimizer = MuonW(model, **FP32, variant="normuon")
    train(model, optimizer, 1)
    group = [g for g in optimizer.param_groups if g["algorithm"] == kind][-1]
    own = {key: group[key] for key in edit}
    group.update(edit)
    set_gradients(list(model.parameters()))
    before = everything(optimizer)
    with pytest.raises((ValueError, TypeError), match=message):
        optimizer.step()
    assert_equal(everything(optimizer), before)
    group.update(own)
    optimizer.step()


@pytest.mark.parametrize("kind", ["muon", "adamw"])
def test_an_option_that_was_deleted_is_named(kind: str) -> None:
    model = mlp()
    optimizer = MuonW(model, **FP32)
    group = next(g for g in optimizer.param_groups if g["algorithm"] == kind)
    del group["lr"]
    set_gradients(list(model.parameters()))
    with pytest.raises(ValueError, match="has no 'lr'"):
        optimizer.step()


def test_sparse_gradients_and_foreign_dtypes_are_refused_before_the_first_write() -> None:
    model = embedding_model()
    optimizer = MuonW(model, **FP32, variant="normuon")
    backward(model, 20)
    optimizer.step()
    before = everything(optimizer)
    model[2].bias.grad = model[2].bias.grad.to_sparse()
    with pytest.raises(RuntimeError, match=r"sparse gradients: 2\.bias"):
        optimizer.step()
    assert_equal(everything(optimizer), before)
    model[2].bias.grad = None
    model[1].weight.grad = None
    values = model[1].weight.data
    model[1].weight.data = values.to(torch.float8_e4m3fn)
    model[1].weight.grad = torch.zeros(8, 8, dtype=torch.float8_e4m3fn)
    with pytest.raises(ValueError, match=r"1\.weight is torch\.float8_e4m3fn"):
        optimizer.step()
    model[1].weight.grad = None
    model[1].weight.data = values
    assert_equal(everything(optimizer), before)


# --- frozen and unfrozen --------------------------------------------------------------------------


def test_pitfall_43_a_layer_that_is_unfrozen_later_is_trained() -> None:
    model, other = mlp(), mlp()
    model[2].requires_grad_(False)
    optimizer, expected = MuonW(model, **FP32), MuonW(other, **FP32)
    assert model[2].weight not in optimizer.state
    assert sum(row.get("matrices", 0) for row in optimizer.describe()) == 1
    assert len(optimizer.state_dict()["state"]) == len(list(model.parameters())) - 2
    model[2].requires_grad_(True)
    train(model, optimizer, 2)
    train(other, expected, 2)
    assert_equal(everything(optimizer), everything(expected))


def test_a_frozen_parameter_that_has_a_gradient_is_trained_and_said_to_be() -> None:
    frozen, other = parameter(4, 4), parameter(4, 6)
    frozen.requires_grad_(False)
    set_gradients([frozen, other])
    before = frozen.clone()
    optimizer = Muon([frozen, other])
    optimizer.step()
    assert not torch.equal(frozen, before)
    assert sum(row["matrices"] for row in optimizer.describe()) == 2
    assert sum(optimizer.plan().traffic().matrices) == 2


def test_a_layer_may_be_frozen_and_unfrozen_again() -> None:
    model = mlp()
    optimizer = MuonW(model, **FP32)
    train(model, optimizer, 1)
    kept = momentum_of(optimizer, model[2].weight).clone()
    model[2].requires_grad_(False)
    model.zero_grad()
    model(torch.randn(3, 12)).sum().backward()
    optimizer.step()
    assert torch.equal(momentum_of(optimizer, model[2].weight), kept)
    reset = Muon([parameter(3, 3)], **FP32)
    reset.param_groups[0]["params"].append(parameter(4, 4).requires_grad_(False))
    reset.plan()  # settled while it is frozen
    model[2].requires_grad_(True)
    train(model, optimizer, 1)
    assert not torch.equal(momentum_of(optimizer, model[2].weight), kept)


def test_a_quantized_frozen_layer_is_left_out() -> None:
    model = mlp()
    weight = nn.Parameter(torch.zeros(12, 24, dtype=torch.uint8), requires_grad=False)
    model[2].weight = weight
    optimizer = MuonW(model, **FP32)
    assert all(p is not weight for group in optimizer.param_groups for p in group["params"])


def test_nothing_to_train_warns() -> None:
    optimizer = Muon([parameter(4, 4)], **FP32)
    with pytest.warns(UserWarning, match="no parameter of the optimizer has a gradient"):
        optimizer.step()


def test_a_group_without_an_algorithm_is_answered_with_the_line_to_write() -> None:
    model = mlp()
    optimizer = MuonW(model, **FP32)
    module = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 4))
    with pytest.raises(ValueError, match=r"for group in muonkit\.route\(module\)\.param_groups\("):
        optimizer.add_param_group({"params": list(module.parameters())})
    for group in muonkit.route(module).param_groups():
        optimizer.add_param_group(group)
    train(module, optimizer, 1)
    assert all(p in optimizer.state for p in module.parameters())


# --- names and schedulers -------------------------------------------------------------------------


def test_every_group_has_a_name_of_its_own() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(8, 8))
    model.append(nn.Linear(8, 2))
    optimizer = MuonW(model)
    names = [group["name"] for group in optimizer.param_groups]
    assert sorted(names) == ["adamw", "adamw no decay", "muon", "muon flatten"]
    optimizer.add_param_group({"params": [("more", parameter(4, 4))], "algorithm": "muon"})
    bias = [("bias", parameter(4))]
    optimizer.add_param_group({"params": bias, "algorithm": "adamw", "name": "mine"})
    assert [group["name"] for group in optimizer.param_groups[-2:]] == ["muon 2", "mine"]
    assert [g["name"] for g in Muon([parameter(3, 3)]).param_groups] == ["muon"]
    more = [("other", parameter(4, 4))]
    with pytest.raises(TypeError, match="name is a string"):
        optimizer.add_param_group({"params": more, "algorithm": "muon", "name": 3})
    state = optimizer.state_dict()
    for group in state["param_groups"]:
        group["name"] = "theirs"
    optimizer.load_state_dict(state)
    assert optimizer.param_groups[0]["name"] != "theirs"


@pytest.mark.parametrize("kind", ["one_cycle", "cyclic"])
def test_schedulers_of_momentum_cycle_beta1_as_torch_has_it(kind: str) -> None:
    def scheduler(optimizer: torch.optim.Optimizer) -> Any:
        if kind == "one_cycle":
            return OneCycleLR(optimizer, max_lr=0.1, total_steps=10)
        return CyclicLR(optimizer, base_lr=0.01, max_lr=0.1, step_size_up=3)

    model, other = mlp(), mlp()
    optimizer = MuonW(model, **FP32)
    torchs = torch.optim.AdamW(other.parameters(), betas=(0.9, 0.95))
    ours, theirs = scheduler(optimizer), scheduler(torchs)
    for t in range(6):
        train(model, optimizer, 1, seed=t)
        train(other, torchs, 1, seed=t)
        for group in optimizer.param_groups:
            if group["algorithm"] == "adamw":
                assert group["betas"] == torchs.param_groups[0]["betas"]
                assert "momentum" not in group
            else:
                assert group["momentum"] == torchs.param_groups[0]["betas"][0]
                assert "betas" not in group
        ours.step()
        theirs.step()
