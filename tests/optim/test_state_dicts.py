"""State dicts: names and structure are the model's own, and what is missing is said."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR

from muonkit import Muon, MuonW
from tests.helpers.optim import mlp, momentum_of, parameter, set_gradients, train
from tests.helpers.pipeline import train_by_name, trained

FLAT = StateDictOptions(flatten_optimizer_state_dict=True)
VARIANTS = ["plain", "normuon", "adamuon"]


def structure(optimizer: Muon) -> list[Any]:
    keys = ("algorithm", "view", "name", "param_names")
    return [
        [[group.get(key) for key in keys], list(group["params"])]
        for group in optimizer.param_groups
    ]


def assert_same_state(one: Muon, its: nn.Module, other: Muon, others: nn.Module) -> None:
    there = dict(others.named_parameters())
    for name, p in its.named_parameters():
        mine, theirs = one.state[p], other.state[there[name]]
        assert set(mine) == set(theirs), name
        assert mine
        for kind, value in mine.items():
            assert value.dtype == theirs[kind].dtype, (name, kind)
            assert torch.equal(value, theirs[kind]), (name, kind)


# --- put together from parts, and taken apart -----------------------------------------------------


@pytest.mark.parametrize("variant", ["plain", "normuon"])
@pytest.mark.parametrize("saved", [("abcd",), ("ab", "cd"), ("a", "bc", "d")])
@pytest.mark.parametrize("loaded", [("abcd",), ("abc", "d")])
def test_pitfall_42_a_flattened_state_of_stages_is_loaded_by_other_stages(
    saved: tuple[str, ...], loaded: tuple[str, ...], variant: str
) -> None:
    """As torchtitan saves pipelines. The names in it are those of the stage that was saved."""
    state: dict[str, Any] = {}
    for names in saved:
        model, optimizer = trained(names, range(2), variant=variant)
        state |= get_optimizer_state_dict(model, optimizer, options=FLAT)
    for names in loaded:
        model, optimizer = trained(names, range(2), variant=variant)
        expected = copy.deepcopy((model, optimizer))
        own = structure(optimizer)
        train_by_name(model, optimizer, [7])  # another state, to be replaced
        model.load_state_dict(expected[0].state_dict())
        set_optimizer_state_dict(model, optimizer, dict(state), options=FLAT)
        assert structure(optimizer) == own
        assert_same_state(optimizer, model, expected[1], expected[0])
        train_by_name(model, optimizer, [2])
        train_by_name(*expected, [2])
        for p, q in zip(model.parameters(), expected[0].parameters(), strict=True):
            assert torch.equal(p, q)


@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize("flat", [True, False])
def test_a_state_goes_on_under_a_scheduler_that_cycles_momentum(flat: bool, steps: int) -> None:
    """Every group has a momentum once the scheduler is made; in a step AdamW's becomes beta1."""

    def made() -> tuple[nn.Module, MuonW, OneCycleLR]:
        model = mlp()
        optimizer = MuonW(model)
        return model, optimizer, OneCycleLR(optimizer, max_lr=0.1, total_steps=10)

    def go_on(model: nn.Module, optimizer: MuonW, scheduler: OneCycleLR, seeds: range) -> None:
        for seed in seeds:
            train(model, optimizer, 1, seed=seed)
            scheduler.step()

    first, second = made(), made()
    go_on(*first, range(steps))
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    saved = get_optimizer_state_dict(*first[:2], options=options)
    second[0].load_state_dict(first[0].state_dict())
    set_optimizer_state_dict(*second[:2], copy.deepcopy(saved), options=options)
    second[2].load_state_dict(first[2].state_dict())
    for each in (first, second):
        go_on(*each, range(steps, steps + 3))
    for p, q in zip(first[0].parameters(), second[0].parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("when", ["in the state dict", "after it is loaded"])
def test_betas_that_are_edited_win_over_what_a_scheduler_left(when: str) -> None:
    model = mlp()
    optimizer = MuonW(model)
    scheduler = OneCycleLR(optimizer, max_lr=0.1, total_steps=10)
    train(model, optimizer, 1)
    scheduler.step()
    saved = copy.deepcopy(optimizer.state_dict())
    other = MuonW(model)
    plain = other.state_dict()["param_groups"]
    assert not any("momentum" in g for g in plain if g["algorithm"] == "adamw")

    def edit(groups: list[dict[str, Any]]) -> None:
        for group in groups:
            if group["algorithm"] == "adamw":
                group["betas"] = (0.5, 0.6)

    if when == "in the state dict":
        edit(saved["param_groups"])
    other.load_state_dict(saved)
    if when == "after it is loaded":
        edit(other.param_groups)
    train(model, other, 1)
    betas = {g["betas"] for g in other.param_groups if g["algorithm"] == "adamw"}
    assert betas == {(0.5, 0.6)}


# torch 2.9 looks for all keys itself, and raises a KeyError that names the first.
OUR_WORDS = pytest.mark.skipif(
    torch.__version__.startswith("2.9."), reason="torch 2.9 refuses before it asks the optimizer"
)


@OUR_WORDS
def test_a_stage_that_is_missing_is_named() -> None:
    state = get_optimizer_state_dict(*trained("ab", range(1)), options=FLAT)
    model, optimizer = trained("abc", range(1))
    kept = copy.deepcopy(optimizer.state_dict()["state"])
    with pytest.raises(ValueError, match=r"no state for c\.up\.weight, which is trained here"):
        set_optimizer_state_dict(model, optimizer, state, options=FLAT)
    for key, entry in optimizer.state_dict()["state"].items():
        for kind, value in entry.items():
            assert torch.equal(value, kept[key][kind])


@OUR_WORDS
def test_a_tensor_that_is_missing_is_named() -> None:
    state = get_optimizer_state_dict(*trained("ab", range(1)), options=FLAT)
    model, optimizer = trained("ab", range(1))
    for kind, name in (("exp_avg_sq", "a.up.bias"), ("step", "b.norm.weight")):
        less = {key: value for key, value in state.items() if key != f"state.{name}.{kind}"}
        with pytest.raises(ValueError, match=rf"for {name}, no {kind}: it was saved by another"):
            set_optimizer_state_dict(model, optimizer, less, options=FLAT)


# --- by name --------------------------------------------------------------------------------------


def test_layers_in_another_order_are_matched_by_name() -> None:
    """They have the same shapes: by position each would get another's momentum, in silence."""
    model, optimizer = trained("abcd", range(2))
    other, its_optimizer = trained("dbac", range(1))
    own = structure(its_optimizer)
    its_optimizer.load_state_dict(optimizer.state_dict())
    assert structure(its_optimizer) == own
    assert_same_state(its_optimizer, other, optimizer, model)


def test_parts_that_are_registered_in_another_order_are_matched_by_name() -> None:
    """Groups are made in the order of the parts; two of one algorithm change places too."""

    def model(first: bool) -> nn.Module:
        torch.manual_seed(0)
        parts: dict[str, nn.Module] = {
            "emb": nn.Embedding(7, 6),
            "up": nn.Linear(6, 8),
            "norm": nn.LayerNorm(8),
            "down": nn.Linear(8, 6),
            "head": nn.Linear(6, 7),
        }
        return nn.ModuleDict(parts if first else dict(reversed(parts.items())))

    one, other = model(True), model(False)
    heads = {"heads": ["head"], "lr": 1e-3}
    saved, loaded = MuonW(one, **heads), MuonW(other, **heads)
    for p in one.parameters():
        p.grad = torch.randn_like(p)
    saved.step()
    assert [g["name"] for g in saved.param_groups] != [g["name"] for g in loaded.param_groups]
    loaded.load_state_dict(saved.state_dict())
    there = dict(other.named_parameters())
    for name, p in one.named_parameters():
        for key, value in saved.state[p].items():
            torch.testing.assert_close(loaded.state[there[name]][key], value, rtol=0, atol=0)


@pytest.mark.parametrize("foreign", ["SGD", "AdamW", "Moonlight's"])
def test_what_another_optimizer_saved_is_no_state_of_muons(foreign: str) -> None:
    p = parameter(6, 4)
    if foreign == "SGD":
        other: Any = torch.optim.SGD([p], lr=0.1, momentum=0.9)
    else:
        other = torch.optim.AdamW([p], lr=0.1) if foreign == "AdamW" else torch.optim.Muon([p])
    if foreign != "AdamW":  # which has no state before its first step
        p.grad = torch.randn_like(p)
        other.step()
    saved = other.state_dict()
    if foreign == "Moonlight's":
        saved["param_groups"][0]["wd"] = 0.1
    ours = Muon([p], lr=0.02)
    with pytest.raises(ValueError, match="it was saved by another optimizer") as raised:
        ours.load_state_dict(saved)
    assert "Nothing was loaded" in str(raised.value)
    assert ours.param_groups[0]["lr"] == 0.02


@pytest.mark.parametrize("wrapped", [False, True])
def test_wrappers_are_no_part_of_a_name(wrapped: bool) -> None:
    def spelled(optimizer: Muon, wrap: bool) -> dict[str, Any]:
        state = copy.deepcopy(optimizer.state_dict())
        for group in state["param_groups"]:
            names = group["param_names"]
            group["param_names"] = [
                f"module.module._orig_mod.{n.replace('.', '._checkpoint_wrapped_module.', 1)}"
                if wrap
                else n
                for n in names
            ]
        return state

    model, optimizer = trained("ab", range(2))
    other, its_optimizer = trained("ba", range(1))
    if wrapped:  # the one that loads
        for group in its_optimizer.param_groups:
            group["param_names"] = [f"module.{name}" for name in group["param_names"]]
    its_optimizer.load_state_dict(spelled(optimizer, not wrapped))
    assert_same_state(its_optimizer, other, optimizer, model)


def test_other_names_are_refused_or_left_out() -> None:
    _, optimizer = trained("ab", range(2))
    other, its_optimizer = trained("xy", range(1))
    before = copy.deepcopy(its_optimizer.state_dict()["state"])
    state = optimizer.state_dict()
    with pytest.raises(ValueError, match=r"it has a\.\S+, .* and lacks x\.") as e:
        its_optimizer.load_state_dict(state)
    assert "delete 'param_names'" in str(e.value)
    for key, entry in its_optimizer.state_dict()["state"].items():
        for kind, value in entry.items():
            assert torch.equal(value, before[key][kind])
    for group in state["param_groups"]:
        del group["param_names"]
    its_optimizer.load_state_dict(state)
    weight = other["x"].up.weight
    assert torch.equal(momentum_of(its_optimizer, weight), state["state"][0]["momentum_buffer"])
    assert "x.up.weight" in its_optimizer.param_groups[0]["param_names"]


def test_names_that_two_models_share_are_loaded_by_position() -> None:
    params = [(name, parameter(4, 4, seed=i)) for i, name in enumerate("abab")]
    optimizer, other = Muon(params), Muon([(n, nn.Parameter(p.detach())) for n, p in params])
    set_gradients([p for _, p in params])
    optimizer.step()
    other.load_state_dict(optimizer.state_dict())
    for p, q in zip(*(each.param_groups[0]["params"] for each in (optimizer, other)), strict=True):
        assert torch.equal(momentum_of(other, q), momentum_of(optimizer, p))
    moved = Muon([params[i] for i in (0, 2, 1, 3)])
    with pytest.raises(ValueError, match=r"several parameters of one name, a, b, .*another order"):
        moved.load_state_dict(optimizer.state_dict())


def test_a_model_with_more_layers_is_named() -> None:
    _, optimizer = trained("abc", range(1))
    _, smaller = trained("ab", range(1))
    with pytest.raises(ValueError, match=r"it has c\..* has not, and lacks nothing\."):
        smaller.load_state_dict(optimizer.state_dict())


def test_a_hook_may_give_them_our_names() -> None:
    """As torch's manual says for checkpoints of a model whose parameters were called otherwise."""
    model, optimizer = trained("ab", range(2))
    other, its_optimizer = trained("ba", range(1))
    state = copy.deepcopy(optimizer.state_dict())
    for group in state["param_groups"]:
        group["param_names"] = [f"old.{name}" for name in group["param_names"]]

    def rename(_: torch.optim.Optimizer, given: dict[str, Any]) -> None:
        given["param_groups"] = [
            {**g, "param_names": [n.removeprefix("old.") for n in g["param_names"]]}
            for g in given["param_groups"]
        ]

    its_optimizer.register_load_state_dict_pre_hook(rename)
    for _ in range(2):  # nothing of ours is left behind it
        its_optimizer.load_state_dict(state)
        assert_same_state(its_optimizer, other, optimizer, model)


def test_without_names_it_goes_by_position_and_gets_none() -> None:
    named, bare = mlp(), mlp()
    one = Muon([{"params": [p for p in named.parameters() if p.ndim == 2]}], lr=0.1)
    two = Muon([("w", p) for p in bare.parameters() if p.ndim == 2], lr=0.1)
    for taker, giver in ((one, two), (two, one)):
        before = structure(taker)
        set_gradients([p for g in giver.param_groups for p in g["params"]], 5)
        giver.step()
        taker.load_state_dict(giver.state_dict())
        assert structure(taker) == before
    assert "param_names" not in one.param_groups[0]


def test_torchs_checkpoint_does_not_rename() -> None:
    model = mlp()
    matrices = [(f"w{i}", p) for i, p in enumerate(model.parameters()) if p.ndim == 2]
    theirs = torch.optim.Muon(matrices, lr=0.1)
    set_gradients([p for _, p in matrices])
    theirs.step()
    ours = Muon(matrices[::-1], lr=0.1)
    ours.load_state_dict(theirs.state_dict())
    for _, p in matrices:
        assert torch.equal(momentum_of(ours, p), theirs.state[p]["momentum_buffer"])
    assert ours.param_groups[0]["param_names"] == [name for name, _ in matrices[::-1]]


# --- what is missing ------------------------------------------------------------------------------


def test_a_missing_state_is_named_and_nothing_is_loaded() -> None:
    model = mlp()
    optimizer = MuonW(model)
    train(model, optimizer, 1)
    state = copy.deepcopy(optimizer.state_dict())
    train(model, optimizer, 1, seed=3)
    kept = copy.deepcopy(optimizer.state_dict()["state"])
    del state["state"][1]
    with pytest.raises(ValueError, match=r"no state for 2\.weight, which is trained here"):
        optimizer.load_state_dict(state)
    assert torch.equal(
        optimizer.state_dict()["state"][0]["momentum_buffer"], kept[0]["momentum_buffer"]
    )


def test_a_layer_that_was_frozen_when_saved_begins_at_zero() -> None:
    """As the error says: frozen while the state is loaded."""
    model = mlp()
    model[2].requires_grad_(False)
    optimizer = MuonW([p for p in model.parameters() if p.ndim == 2], adamw_params=[], lr=0.1)
    set_gradients([model[0].weight])
    optimizer.step()
    state = copy.deepcopy(optimizer.state_dict())
    model[2].requires_grad_(True)
    other = MuonW([p for p in model.parameters() if p.ndim == 2], adamw_params=[], lr=0.1)
    with pytest.raises(ValueError, match="freeze it while the state is loaded"):
        other.load_state_dict(state)
    model[2].requires_grad_(False)
    other.load_state_dict(state)
    model[2].requires_grad_(True)
    set_gradients(list(model.parameters()))
    other.step()
    assert momentum_of(other, model[2].weight).abs().sum() > 0


def test_torchs_optimizers_have_no_state_of_what_had_no_gradient() -> None:
    used, idle = parameter(4, 4), parameter(4, 4)
    theirs = torch.optim.Muon([used, idle])
    set_gradients([used])
    theirs.step()
    ours = Muon([used, idle])
    ours.load_state_dict(theirs.state_dict())
    assert torch.equal(momentum_of(ours, used), theirs.state[used]["momentum_buffer"])
    assert momentum_of(ours, idle).count_nonzero() == 0  # there, on all ranks, for whoever saves


@pytest.mark.parametrize(
    ("theirs", "key", "what"),
    [
        (functools.partial(torch.optim.AdamW, amsgrad=True), "amsgrad", "amsgrad=True"),
        (
            functools.partial(torch.optim.Adam, weight_decay=0.1),
            "decoupled_weight_decay",
            "a weight decay in the gradient",
        ),
    ],
)
def test_what_our_adamw_does_not_do_is_not_loaded_without_a_word(
    theirs: Callable[..., torch.optim.Optimizer], key: str, what: str
) -> None:
    p = parameter(4, 4)
    plain = theirs([p], lr=0.1)
    set_gradients([p])
    plain.step()
    ours = Muon([{"params": [p], "algorithm": "adamw", "lr": 0.5}])
    state = plain.state_dict()
    with pytest.raises(ValueError, match=f"{what}.*delete '{key}'"):
        ours.load_state_dict(state)
    assert ours.param_groups[0]["lr"] == 0.5
    del state["param_groups"][0][key]
    ours.load_state_dict(state)
    assert torch.equal(ours.state[p]["exp_avg"], plain.state[p]["exp_avg"])
    plain_adam = torch.optim.Adam([p], lr=0.1)  # no decay: the same in both
    plain_adam.step()
    ours.load_state_dict(plain_adam.state_dict())


@pytest.mark.parametrize("variant", VARIANTS[1:])
@pytest.mark.parametrize("whose", ["torch", "ours"])
def test_a_plain_state_in_another_variant(variant: str, whose: str) -> None:
    """The error says what is missing, and what it says can be done."""
    p = parameter(6, 4)
    plain = (torch.optim.Muon if whose == "torch" else Muon)([p], lr=0.1)
    set_gradients([p])
    plain.step()
    optimizer = Muon([p], lr=0.1, variant=variant)
    with pytest.raises(
        ValueError, match=f"no second_momentum_buffer, which after='{variant}' keeps"
    ) as e:
        optimizer.load_state_dict(plain.state_dict())
    assert f"set group['after'] = '{variant}'" in str(e.value)
    optimizer = Muon([p], lr=0.1)
    optimizer.load_state_dict(plain.state_dict())
    for group in optimizer.param_groups:
        group["after"] = variant
    set_gradients([p], 1)
    optimizer.step()
    assert optimizer.state[p]["step"] == 1
    assert optimizer.state[p]["second_momentum_buffer"].count_nonzero() > 0


def test_a_tensor_lr_that_a_state_dict_shares_is_each_groups_own() -> None:
    saved = torch.optim.Muon(
        [{"params": [parameter(4, 4)]}, {"params": [parameter(4, 4)]}], lr=torch.tensor(0.5)
    )
    params = [parameter(4, 4), parameter(4, 4)]
    optimizer = Muon([{"params": [p]} for p in params], lr=torch.tensor(0.5))
    set_gradients([p for group in saved.param_groups for p in group["params"]])
    saved.step()
    optimizer.load_state_dict(saved.state_dict())
    LambdaLR(optimizer, [lambda _: 1.0, lambda _: 0.5])
    assert [float(group["lr"]) for group in optimizer.param_groups] == [0.5, 0.25]


@pytest.mark.parametrize("stepped", [False, True])
def test_a_stage_that_was_turned_on_is_saved_whole(stepped: bool) -> None:
    """Before every parameter took a step with it, as an expert without tokens takes none."""
    params = [parameter(6, 4), parameter(4, 4)]
    optimizer = Muon(params, lr=0.1)
    set_gradients(params)
    optimizer.step()
    optimizer.param_groups[0]["after"] = ("normuon",)
    if stepped:
        set_gradients(params[:1], 1)
        params[1].grad = None
        optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    assert all("second_momentum_buffer" in state for state in saved["state"].values())
    for other in (optimizer, Muon(params, after="normuon"), Muon(params)):
        other.load_state_dict(saved)
        assert [int(other.state[p]["step"]) for p in params] == [int(stepped), 0]


def test_another_variants_state_says_which_it_is() -> None:
    p = parameter(6, 4)
    saved = Muon([p], variant="normuon")
    with pytest.raises(ValueError, match="it was saved with after='normuon'; make the optim"):
        Muon([p], variant="adamuon").load_state_dict(saved.state_dict())
    # A plain one has nothing that it could lack: it goes on as it was saved.
    plain = Muon([p])
    plain.load_state_dict(saved.state_dict())
    assert plain.param_groups[0]["after"] == ("normuon",)
    less = copy.deepcopy(saved.state_dict())
    del less["state"][0]["second_momentum_buffer"]
    with pytest.raises(ValueError, match="no second_momentum_buffer"):
        Muon([p]).load_state_dict(less)


# --- dtypes and devices ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_nan_in_a_state_changes_no_dtype(dtype: torch.dtype) -> None:
    """A run that has gone wrong is looked at after it is loaded."""
    p = parameter(4, 4, dtype=torch.bfloat16)
    optimizer = Muon([p], momentum_dtype=dtype, variant="normuon")
    set_gradients([p])
    optimizer.step()
    for kind in ("momentum_buffer", "second_momentum_buffer"):
        optimizer.state[p][kind].view(-1)[1] = float("nan")
    before = {kind: value.clone() for kind, value in optimizer.state[p].items()}
    other = Muon([parameter(4, 4, dtype=torch.bfloat16)], momentum_dtype=dtype, variant="normuon")
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for kind, value in next(iter(other.state.values())).items():
        assert value.dtype == before[kind].dtype, kind
        torch.testing.assert_close(value, before[kind], rtol=0, atol=0, equal_nan=True)


def test_what_is_loaded_is_ready_at_once() -> None:
    """Counts that are numbers or of another dtype are tensors before the next step."""
    model = mlp()
    optimizer = MuonW(model, variant="normuon")
    train(model, optimizer, 2)
    state = copy.deepcopy(optimizer.state_dict())
    for entry in state["state"].values():
        if "step" in entry:
            entry["step"] = int(entry["step"])
    optimizer.load_state_dict(state)
    for entry in optimizer.state.values():
        if "step" in entry:
            assert entry["step"].dtype == torch.float32
            assert entry["step"] == 2


# --- one process ----------------------------------------------------------------------------------


def test_consolidating_on_one_process_changes_nothing() -> None:
    model = mlp()
    optimizer = MuonW(model)
    train(model, optimizer, 1)
    optimizer.consolidate_state_dict()
    state = optimizer.state_dict()["state"]
    assert state[0]["momentum_buffer"] is momentum_of(optimizer, model[0].weight)
    with pytest.raises(ValueError, match="there are ranks 0 to 0"):
        optimizer.consolidate_state_dict(to=1)
