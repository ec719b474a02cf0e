"""MuonW: a whole model in one optimizer, routed by itself or split by hand."""

from __future__ import annotations

import gc
import pickle
import weakref

import pytest
import torch
from torch import nn

from muonkit import Muon, MuonW, RoutingError, Rule, route


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.up = nn.Linear(8, 16)
        self.down = nn.Linear(16, 8)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 20, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        return self.head(self.norm(x + self.down(self.up(x).relu())))


def algorithms(optimizer: Muon) -> dict[str, tuple[str, float]]:
    return {
        name: (group["algorithm"], group["weight_decay"])
        for group in optimizer.param_groups
        for name in group["param_names"]
    }


def test_the_whole_model_is_claimed_once_with_the_right_decay() -> None:
    model = Tiny()
    assert algorithms(MuonW(model)) == {
        "embed.weight": ("adamw", 0.1),
        "up.weight": ("muon", 0.1),
        "up.bias": ("adamw", 0.0),
        "down.weight": ("muon", 0.1),
        "down.bias": ("adamw", 0.0),
        "norm.weight": ("adamw", 0.0),
        "norm.bias": ("adamw", 0.0),
        "head.weight": ("adamw", 0.1),
    }


def test_decay_of_adamw_and_of_vectors_can_be_asked_for() -> None:
    said = algorithms(MuonW(Tiny(), weight_decay=0.2, adamw_wd=0.05, decay_1d=True))
    assert said["up.weight"] == ("muon", 0.2)
    assert {decay for name, (kind, decay) in said.items() if kind == "adamw"} == {0.05}


def test_lr_scale_betas() -> None:
    optimizer = MuonW(Tiny(), lr=1e-3, adamw_lr=5e-4, adamw_betas=(0.8, 0.9), adamw_eps=1e-6)
    for group in optimizer.param_groups:
        if group["algorithm"] == "muon":
            assert (group["lr"], group["adjust_lr_fn"]) == (1e-3, "unit_rms")
        else:
            assert (group["lr"], group["betas"], group["eps"]) == (5e-4, (0.8, 0.9), 1e-6)
    assert {g["lr"] for g in MuonW(Tiny(), lr=1e-3).param_groups} == {1e-3}


def test_another_scale_needs_adamws_own_lr() -> None:
    with pytest.raises(ValueError, match="adamw_lr"):
        MuonW(Tiny(), lr=0.02, adjust_lr_fn="original")
    MuonW(Tiny(), lr=0.02, adjust_lr_fn="original", adamw_lr=3e-4)
    with pytest.raises(ValueError, match=r"adjust_lr_fn is 'match_rms_adamw' or 'unit_rms'; add"):
        MuonW(Tiny(), lr=0.02, adjust_lr_fn="spectral")


def rates(optimizer: torch.optim.Optimizer) -> dict[str, list[tuple[object, ...]]]:
    """What sets the size of a step, by algorithm: each once, in the order of the groups."""
    found: dict[str, list[tuple[object, ...]]] = {"muon": [], "adamw": []}
    for group in optimizer.param_groups:
        said = (group["lr"], group.get("adjust_lr_fn"))
        if said not in found[group["algorithm"]]:
            found[group["algorithm"]].append(said)
    return found


def test_the_default_rate_is_adamws_and_matrices_move_by_it() -> None:
    """One number in all groups, so that whatever writes one number into all of them (a loop of the
    user's own, OneCycleLR's max_lr) leaves the matrices' step in proportion to AdamW's.
    """
    assert rates(MuonW(Tiny())) == {"muon": [(2e-3, "unit_rms")], "adamw": [(2e-3, None)]}
    assert rates(MuonW(route(Tiny()))) == rates(MuonW(Tiny()))
    optimizer = MuonW(Tiny(), lr=3e-3, adamw_lr=1e-4)
    assert rates(optimizer) == {"muon": [(3e-3, "unit_rms")], "adamw": [(1e-4, None)]}
    for scale in ("match_rms_adamw", "unit_rms"):
        optimizer = MuonW(Tiny(), lr=2e-3, adjust_lr_fn=scale)
        assert rates(optimizer) == {"muon": [(2e-3, scale)], "adamw": [(2e-3, None)]}
    # The drop-in has torch's.
    assert Muon([torch.ones(2, 2)]).param_groups[0]["adjust_lr_fn"] is None


def test_schedulers_leave_the_matrices_step_in_proportion() -> None:
    schedulers = torch.optim.lr_scheduler
    for make in (
        lambda o: schedulers.OneCycleLR(o, max_lr=0.01, total_steps=10),
        lambda o: schedulers.CyclicLR(o, 0.001, 0.01, step_size_up=3),
        lambda o: schedulers.CosineAnnealingLR(o, 10),
        lambda o: schedulers.LambdaLR(o, lambda step: 1 / (1 + step)),
    ):
        model = Tiny()
        optimizer = MuonW(model, ns_coefficients="svd", weight_decay=0.0)
        scheduler = make(optimizer)
        for _ in range(4):
            for p in model.parameters():
                p.grad = torch.randn_like(p)
            before = model.up.weight.detach().clone()
            (adamw,) = {g["lr"] for g in optimizer.param_groups if g["algorithm"] == "adamw"}
            optimizer.step()
            moved = (before - model.up.weight.detach()).square().mean().sqrt().item()
            assert moved == pytest.approx(adamw, rel=1e-3)  # float32 of weights 1,000 times larger
            scheduler.step()


def test_a_state_dict_keeps_the_scale_and_rate_it_was_made_with() -> None:
    """What was trained before "unit_rms" was the default goes on as it would have."""
    trained = MuonW(Tiny(), lr=3e-4, adjust_lr_fn="match_rms_adamw")
    resumed = MuonW(Tiny(), lr=1e-2)
    resumed.load_state_dict(trained.state_dict())
    assert rates(resumed) == {"muon": [(3e-4, "match_rms_adamw")], "adamw": [(3e-4, None)]}
    again = pickle.loads(pickle.dumps(trained))
    assert rates(again) == rates(trained)


@pytest.mark.parametrize(("scale", "rms"), [(None, 0.1), ("match_rms_adamw", 0.02)])
def test_every_matrix_moves_by_the_same_rms(scale: str | None, rms: float) -> None:
    """lr, or 0.2 lr as AdamW late in long trainings: whatever the shape of the matrix."""
    model = Tiny()
    optimizer = MuonW(model, lr=0.1, weight_decay=0.0, ns_coefficients="svd", adjust_lr_fn=scale)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer.step()
    for name in ("up.weight", "down.weight"):
        moved = before[name] - model.get_parameter(name).detach()
        assert moved.square().mean().sqrt().item() == pytest.approx(rms, rel=1e-4)


def test_it_trains() -> None:
    torch.manual_seed(0)
    model = Tiny()
    optimizer = MuonW(model, lr=1e-2)
    tokens = torch.arange(20)
    losses = []
    for _ in range(100):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(tokens), (tokens * 7 + 3) % 20)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 < losses[0]


def test_routes_and_rules() -> None:
    model = Tiny()
    rules = [Rule("up.weight", algorithm="adamw"), Rule("down.*", options={"lr": 1e-5})]
    by_model = algorithms(MuonW(model, rules=rules))
    assert by_model == algorithms(MuonW(route(model, rules)))
    assert by_model["up.weight"][0] == "adamw"
    optimizer = MuonW(model, rules=rules)
    lrs = {n: g["lr"] for g in optimizer.param_groups for n in g["param_names"]}
    assert lrs["down.weight"] == lrs["down.bias"] == 1e-5
    assert lrs["up.bias"] == 2e-3
    with pytest.raises(TypeError, match=r"give these to route\(model, rules"):
        MuonW(route(model), rules=rules)


def test_a_model_without_hidden_matrices_warns_and_trains() -> None:
    model = nn.Sequential(nn.Embedding(5, 4), nn.LayerNorm(4))
    with pytest.warns(UserWarning, match="no hidden matrix.*AdamW trains all"):
        optimizer = MuonW(model, lr=0.1)
    before = model[0].weight.detach().clone()
    model(torch.arange(5)).pow(3).sum().backward()
    optimizer.step()
    assert not torch.equal(model[0].weight, before)


def test_nothing_to_train_is_an_error() -> None:
    with pytest.raises(RoutingError):
        MuonW(nn.ReLU())
    with pytest.raises(RoutingError):
        MuonW(Tiny().requires_grad_(False))


def test_parameters_alone_cannot_be_routed() -> None:
    model = Tiny()
    with pytest.raises(TypeError, match=r"MuonW\(model\)"):
        MuonW(model.parameters())
    with pytest.raises(TypeError, match="it routes itself"):
        MuonW(model, adamw_params=[model.head.weight])


def test_split_by_hand() -> None:
    model = Tiny()
    hidden = [model.up.weight, model.down.weight]
    rest = [p for p in model.parameters() if not any(p is h for h in hidden)]
    optimizer = MuonW(hidden, lr=0.02, adamw_params=rest, adamw_lr=3e-4)
    muon, adamw = optimizer.param_groups
    assert (muon["lr"], muon["adjust_lr_fn"], muon["weight_decay"]) == (0.02, None, 0.0)
    assert (adamw["lr"], adamw["weight_decay"]) == (3e-4, 0.0)
    with pytest.raises(ValueError, match="adamw_lr"):
        MuonW(hidden, lr=0.02, adamw_params=rest)
    with pytest.raises(TypeError, match=r"needs lr: .* Keller Jordan used 0\.02"):
        MuonW(hidden, adamw_params=rest, adamw_lr=3e-4)
    with pytest.raises(ValueError, match="more than one"):
        MuonW(hidden, lr=0.02, adamw_params=[*rest, hidden[0]], adamw_lr=3e-4)


def test_pitfall_18_what_muon_trains_can_be_read_back() -> None:
    rows = MuonW(Tiny(), ns_dtype="float32").describe()
    muon = [row for row in rows if row["algorithm"] == "muon"]
    assert [(r["matrices"], r["rows"], r["cols"]) for r in muon] == [(1, 16, 8), (1, 8, 16)]
    assert {r["ns_form"] for r in muon} == {"gram"}  # n = 2m
    assert {r["ns_dtype"] for r in muon} == {"torch.float32"}
    assert muon[0]["lr"] == pytest.approx(2e-3 * 4)


@pytest.mark.parametrize("per_head", [False, True])
def test_a_model_is_freed_with_its_last_user_as_under_adamw(per_head: bool) -> None:
    """Also where a training script has turned the garbage collector off."""
    MuonW(Tiny())  # what torch imports with its first optimizer keeps hold of that one's frames
    gc.collect()
    gc.disable()
    try:
        model = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16), nn.Linear(8, 3))
        optimizer = MuonW(model, per_head=per_head)
        held = [weakref.ref(model), weakref.ref(optimizer), *map(weakref.ref, model.parameters())]
        del model, optimizer
        assert [ref() for ref in held] == [None] * len(held)
    finally:
        gc.enable()
