"""`muonkit.convert`: a training goes on as it would have, in both directions; what does not fit is
refused as a whole, and what is lost is told.
"""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from muonkit import Muon, MuonW, convert
from tests.helpers import other_muons
from tests.helpers.other_muons import SOURCES, Keller, Moonlight
from tests.helpers.ranks import Cases, Ranks


class Model(nn.Module):
    """An embedding, hidden matrices that widen and narrow, vectors, a head; never run."""

    def __init__(self, convolutions: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(10, 8)
        self.up, self.down = nn.Linear(8, 24), nn.Linear(24, 16)
        self.square = nn.Linear(16, 16, bias=False)
        self.norm, self.head = nn.LayerNorm(16), nn.Linear(16, 10, bias=False)
        if convolutions:  # one that widens, and one whose kernel is no square
            self.point, self.strip = nn.Conv2d(3, 9, 1), nn.Conv2d(5, 4, (4, 1))

    def parts(self) -> tuple[list[Tensor], list[Tensor]]:
        """The hidden matrices, and the rest."""
        named = list(self.named_parameters())
        hidden = [p for n, p in named if p.ndim > 1 and not n.startswith(("embed", "head"))]
        return hidden, [p for _, p in named if all(p is not q for q in hidden)]


def train(model: nn.Module, optimizers: list[Any], first: int, last: int) -> None:
    for t in range(first, last):
        generator = torch.Generator().manual_seed(t)
        for p in model.parameters():
            grad = torch.randn(p.shape, generator=generator)
            sharded = isinstance(p, DTensor)
            p.grad = distribute_tensor(grad, p.device_mesh, p.placements) if sharded else grad
        for optimizer in optimizers:
            optimizer.step()


def saved(optimizers: list[Optimizer]) -> list[dict[str, Any]]:
    """As they come out of files that are loaded with weights_only."""
    file = io.BytesIO()
    torch.save([each.state_dict() for each in optimizers], file)
    file.seek(0)
    loaded: list[dict[str, Any]] = torch.load(file, weights_only=True)
    return loaded


def names_in(model: nn.Module, optimizers: list[Optimizer]) -> list[list[str]]:
    """What the positions of each state dict stand for."""
    name = {id(p): n for n, p in model.named_parameters()}
    return [[name[id(p)] for g in o.param_groups for p in g["params"]] for o in optimizers]


def assert_went_on(model: nn.Module, other: nn.Module, start: nn.Module) -> None:
    for (name, p), q, s in zip(
        model.named_parameters(), other.parameters(), start.parameters(), strict=True
    ):
        # Sums and products in float32, in another order. Five polynomials of slope 3.4445 at zero
        # multiply a rounding in the direction of a small singular value by up to 485: 485 * 2^-24
        # is 3e-5 of an update; measured up to 5e-5. A momentum, a scale, a decay or a count that is
        # off by its factor is off by 1e-3 and more after five steps.
        worst = float((p - q).detach().abs().max() / (p - s).detach().abs().max())
        assert worst <= 2e-4, f"{name}: {worst:.1e}"


@pytest.fixture(autouse=True)
def _torchs_products_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    def exact(grad: Tensor, coefficients: Any, steps: int, eps: float) -> Tensor:
        return other_muons.exactly(grad, coefficients, steps)

    monkeypatch.setattr("torch.optim._muon._zeropower_via_newtonschulz", exact)


@pytest.mark.parametrize("name", SOURCES)
def test_a_training_goes_on_as_it_would_have(name: str) -> None:
    """From theirs to ours, and from ours back to theirs, five steps after five."""
    form, make, convolutions = SOURCES[name]
    model = Model(convolutions)
    theirs = make(*model.parts())
    train(model, theirs, 0, 5)
    ours, back, start = (copy.deepcopy(model) for _ in range(3))
    states, params = saved(theirs), names_in(model, theirs)
    taken = convert.to_muonkit(form, states, ours, params, ns_dtype="float32")
    train(model, theirs, 5, 10)
    train(ours, [taken.optimizer], 5, 10)
    assert_went_on(model, ours, start)
    # Whatever is told here is told of the format, and of no parameter.
    assert list(taken.not_carried) == list(convert.FORMATS[form].assumed)
    if convert.FORMATS[form].layout == "none":
        with pytest.raises(ValueError, match="is read alone"):
            convert.from_muonkit(form, taken.optimizer)
        return
    passed_on = convert.to_muonkit(form, states, back, params).optimizer
    again = make(*back.parts())
    exported = convert.from_muonkit(form, passed_on, theirs=again)
    for optimizer, state in zip(again, exported.state_dicts, strict=True):
        optimizer.load_state_dict(state)
    train(back, again, 5, 10)
    assert_went_on(model, back, start)
    assert exported.not_carried == ()


def test_the_groups_of_an_export_make_their_optimizers() -> None:
    model = Model()
    hidden, rest = model.parts()
    optimizer = MuonW(model, lr=1e-3, ns_dtype="float32")
    train(model, [optimizer], 0, 5)
    start = copy.deepcopy(model)
    for form, make in (
        ("torch", lambda groups: [torch.optim.Muon(groups[0]), AdamW(groups[1])]),
        ("keller", lambda groups: [Keller(groups[0])]),
    ):
        theirs = copy.deepcopy(model)
        same = copy.deepcopy(optimizer.state_dict())
        copied = MuonW(theirs, lr=1e-3, ns_dtype="float32")
        copied.load_state_dict(same)
        exported = convert.from_muonkit(form, copied)
        optimizers = make(exported.param_groups)  # type: ignore[no-untyped-call]
        for each, state in zip(optimizers, exported.state_dicts, strict=True):
            each.load_state_dict(state)
        on = copy.deepcopy(model)
        straight = MuonW(on, lr=1e-3, ns_dtype="float32")
        straight.load_state_dict(same)
        train(on, [straight], 5, 10)
        train(theirs, optimizers, 5, 10)
        # Keller Jordan's has one scale: the learning rate of each shape makes up for it.
        assert_went_on(on, theirs, start)
    assert len(hidden) + len(rest) == len(list(model.parameters()))


def test_one_of_ours_takes_the_state_and_the_hyperparameters() -> None:
    form, make, _ = SOURCES["torch, as a sum would be"]
    model = Model()
    theirs = make(*model.parts())
    train(model, theirs, 0, 5)
    ours, start = copy.deepcopy(model), copy.deepcopy(model)
    optimizer = MuonW(ours, lr=7.0, weight_decay=3.0, ns_dtype="float32")
    params = names_in(model, theirs)
    convert.to_muonkit(form, saved(theirs), ours, params, optimizer=optimizer)
    assert len(optimizer.param_groups) == 3
    train(model, theirs, 5, 10)
    train(ours, [optimizer], 5, 10)
    assert_went_on(model, ours, start)
    kept = MuonW(ours, lr=7.0)
    convert.to_muonkit(form, theirs, model, optimizer=MuonW(model), hyperparameters=False)
    convert.to_muonkit(form, saved(theirs), ours, params, optimizer=kept, hyperparameters=False)
    assert {group["lr"] for group in kept.param_groups} == {7.0}
    assert float(kept.state[ours.head.weight]["step"]) == 10


def test_neither_side_writes_into_the_other() -> None:
    form, make, _ = SOURCES["keller with its Adam"]
    model = Model()
    theirs = make(*model.parts())
    train(model, theirs, 0, 2)
    before = copy.deepcopy(theirs[0].state_dict()["state"])
    optimizer = convert.to_muonkit(form, theirs, model).optimizer
    train(model, [optimizer], 2, 4)
    assert_equal(theirs[0].state_dict()["state"], before)
    before = copy.deepcopy(optimizer.state_dict()["state"])
    theirs[0].load_state_dict(convert.from_muonkit(form, optimizer, theirs=theirs).state_dicts[0])
    train(model, theirs, 4, 6)
    assert_equal(optimizer.state_dict()["state"], before)


def assert_equal(one: dict[Any, Any], other: dict[Any, Any]) -> None:
    assert one.keys() == other.keys()
    for key in one:
        torch.testing.assert_close(one[key], other[key], rtol=0, atol=0)


def test_a_schedule_goes_on() -> None:
    """Their scheduler's state fits ours: groups are theirs, in their order."""
    form, make, _ = SOURCES["keller with its Adam"]
    model = Model()
    (theirs,) = make(*model.parts())
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(theirs, 20)
    for t in range(5):
        train(model, [theirs], t, t + 1)
        schedule.step()
    ours, start = copy.deepcopy(model), copy.deepcopy(model)
    params = names_in(model, [theirs])[0]
    taken = convert.to_muonkit(form, theirs.state_dict(), ours, params, ns_dtype="float32")
    again = torch.optim.lr_scheduler.CosineAnnealingLR(taken.optimizer, 20)
    again.load_state_dict(schedule.state_dict())
    for t in range(5, 10):
        for each, optimizer, scheduler in (
            (model, theirs, schedule),
            (ours, taken.optimizer, again),
        ):
            train(each, [optimizer], t, t + 1)
            scheduler.step()
    assert_went_on(model, ours, start)


def test_a_schedule_goes_on_in_one_of_ours_that_is_given() -> None:
    model = Model()
    theirs: list[Any] = [
        torch.optim.Muon(model.parts()[0], lr=0.02),
        AdamW(model.parts()[1], lr=3e-4),
    ]
    schedules = [LambdaLR(each, lambda epoch: 1 - epoch / 10) for each in theirs]
    for t in range(5):
        train(model, theirs, t, t + 1)
        for schedule in schedules:
            schedule.step()
    ours = copy.deepcopy(model)
    states, params = saved(theirs), names_in(model, theirs)
    given = MuonW(ours, lr=2e-3)
    for optimizer in (
        convert.to_muonkit("torch", states, ours, params, optimizer=given).optimizer,
        convert.to_muonkit("torch", states, ours, params).optimizer,
    ):
        going_on = LambdaLR(optimizer, lambda epoch: 1 - epoch / 10, schedules[0].last_epoch - 1)
        for left in (5, 4):  # tenths
            for group in optimizer.param_groups:
                first = 0.02 if group["algorithm"] == "muon" else 3e-4
                assert group["lr"] == pytest.approx(first * left / 10)
            train(ours, [optimizer], 5, 6)
            going_on.step()


@pytest.mark.parametrize("form", ["torch", "keller", "moonlight"])
def test_a_view_that_theirs_have_not_keeps_the_size_of_an_update(form: str) -> None:
    class Attends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.attn = nn.MultiheadAttention(32, 4, bias=False)
            self.up, self.head = nn.Linear(32, 32, bias=False), nn.Linear(32, 5, bias=False)

    model = Attends()
    options = {"ns_dtype": "float32", "ns_coefficients": "svd"}
    scale = "match_rms_adamw"  # Moonlight's one learning rate is for AdamW's part too
    ours = MuonW(model, lr=2e-3, weight_decay=0.0, adjust_lr_fn=scale, **options)
    train(model, [ours], 0, 3)
    back = copy.deepcopy(model)
    exported = convert.from_muonkit(form, ours)
    assert "the view 'matrix > split(rows=3)', which is 'matrix' there" in str(exported)
    # Read again, it is ours with their views and learning rates.
    name_of = {id(p): name for name, p in model.named_parameters()}
    names = [
        [name_of[id(p)] for group in groups for p in group["params"]]
        for groups in exported.param_groups
    ]
    states = list(exported.state_dicts)
    again = convert.to_muonkit(form, states, back, names, ns_dtype="float32").optimizer
    for group in again.param_groups:
        if group["algorithm"] == "muon":
            group["ns_coefficients"] = "svd"
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    train(model, [ours], 3, 4)
    train(back, [again], 3, 4)
    for (name, p), q in zip(model.named_parameters(), back.parameters(), strict=True):
        mine, theirs = ((each.detach() - before[name]).square().mean().sqrt() for each in (p, q))
        # An orthogonal factor has the same mean square in any direction; the head is AdamW's.
        assert float(theirs / mine) == pytest.approx(1, rel=2e-3), name


def test_the_momentum_of_a_fraction_is_a_sum() -> None:
    """Of gradients that do not change, the average is one of them, and the sum 1 / (1 - mu)."""
    mu = 0.9
    for form, times in (("torch", 1), ("dion", 1 / (1 - mu))):
        model = Model()
        ours = Muon(
            [(n, p) for n, p in model.named_parameters() if n == "square.weight"],
            fraction=0.5,
            momentum=mu,
        )
        grad = torch.randn(16, 16)
        ours.state[model.square.weight]["momentum_buffer"].copy_(grad / (1 - mu))
        (state,) = convert.from_muonkit(form, ours).state_dicts
        key = "momentum" if form == "dion" else "momentum_buffer"
        torch.testing.assert_close(state["state"][0][key], grad * times)
        part = {"square.weight": model.square.weight}
        back = convert.to_muonkit(form, state, part, list(part), fraction=0.25).optimizer
        summed = back.state[model.square.weight]["momentum_buffer"]
        torch.testing.assert_close(summed, grad / (1 - mu))
        whole = convert.to_muonkit(form, state, part, list(part)).optimizer
        torch.testing.assert_close(whole.state[model.square.weight]["momentum_buffer"], grad)


def test_a_part_that_is_called_as_a_wrapper_is_keeps_its_own_state() -> None:
    class Backbone(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = nn.ModuleDict({"proj": nn.Linear(16, 16, bias=False)})
            self.proj = nn.Linear(16, 16, bias=False)

    model = Backbone()
    theirs = torch.optim.Muon(model.parameters())
    train(model, [theirs], 0, 2)
    ours = copy.deepcopy(model)
    optimizer = convert.to_muonkit("torch", theirs.state_dict(), ours, model_names(ours)).optimizer
    for p, q in zip(model.parameters(), ours.parameters(), strict=True):
        here, there = optimizer.state[q]["momentum_buffer"], theirs.state[p]["momentum_buffer"]
        torch.testing.assert_close(here, there, rtol=0, atol=0)


def model_names(model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_parameters()]


def test_params_that_contradict_the_names_in_a_state_are_refused() -> None:
    model = nn.Sequential(*(nn.Linear(8, 8, bias=False) for _ in range(3)))
    theirs = torch.optim.Muon(model.named_parameters())
    train(model, [theirs], 0, 2)
    names = model_names(model)
    with pytest.raises(
        ValueError, match=r"params has 2\.weight where the state dict has the name 0"
    ):
        convert.to_muonkit("torch", theirs.state_dict(), model, names[::-1])
    convert.to_muonkit("torch", theirs.state_dict(), model, names)
    renamed = theirs.state_dict()
    renamed["param_groups"][0]["param_names"] = ["a", "b", "c"]  # another model's
    convert.to_muonkit("torch", renamed, model, names)


def test_how_their_step_is_computed_stays_theirs() -> None:
    model = Model()
    hidden, rest = model.parts()
    theirs: list[Any] = [torch.optim.Muon(hidden), AdamW(rest, foreach=False)]
    ours = MuonW(model, adjust_lr_fn="original", lr=0.02, adamw_lr=3e-4)
    exported = convert.from_muonkit("torch", ours, theirs=theirs)
    theirs[1].load_state_dict(exported.state_dicts[1])
    assert theirs[1].param_groups[0]["foreach"] is False


def test_ranks_that_saved_their_own_matrices_are_one_state() -> None:
    """Keller Jordan's for several ranks sorts a group by size, and rank r of N keeps the state of
    every N-th matrix from the r-th.
    """
    model = Model(convolutions=True)
    hidden, rest = model.parts()
    by_size = sorted(hidden, key=lambda p: p.size(), reverse=True)
    assert [id(p) for p in by_size] == [id(p) for p in hidden]
    theirs = Keller([{"params": by_size, "use_muon": True}, {"params": rest, "use_muon": False}])
    train(model, [theirs], 0, 5)
    whole = theirs.state_dict()
    state = whole["state"].items()
    ranks = [
        {**whole, "state": {k: v for k, v in state if k >= len(hidden) or k % 2 == rank}}
        for rank in range(2)
    ]
    ours, start = copy.deepcopy(model), copy.deepcopy(model)
    called = [*ours.parts()[0][::-1], *ours.parts()[1]]  # before it sorted them
    one = convert.joined(ranks)
    taken = convert.to_muonkit("keller", one, ours, called, ns_dtype="float32")
    train(model, [theirs], 5, 10)
    train(ours, [taken.optimizer], 5, 10)
    assert_went_on(model, ours, start)
    with pytest.raises(ValueError, match="other groups"):
        convert.joined([whole, {**whole, "param_groups": whole["param_groups"][:1]}])


def test_names_go_before_positions() -> None:
    """A state dict with names needs no `params`, in whatever order it is, and whoever wrapped the
    model that it is from.
    """
    model = Model()
    named = [(f"module.{n}", p) for n, p in model.named_parameters()]
    hidden = [pair for pair in named if any(pair[1] is q for q in model.parts()[0])]
    rest = [pair for pair in named if any(pair[1] is q for q in model.parts()[1])]
    theirs: list[Any] = [torch.optim.Muon(hidden[::-1]), AdamW(rest[::-1])]
    train(model, theirs, 0, 5)
    ours, start = copy.deepcopy(model), copy.deepcopy(model)
    copies = [ours, copy.deepcopy(ours)]
    # Torch's checkpoints have names for keys, and all optimizers in one.
    states = [saved(theirs), copy.deepcopy(get_optimizer_state_dict(model, theirs))]
    train(model, theirs, 5, 10)
    for each, state in zip(copies, states, strict=True):
        taken = convert.to_muonkit("torch", state, each, ns_dtype="float32")
        train(each, [taken.optimizer], 5, 10)
        assert_went_on(model, each, start)


# --- several ranks ----------------------------------------------------------------------------

CASES = Cases()


def trained_alone() -> tuple[Model, Optimizer, Model, Model]:
    """A model and its optimizer after five steps, and two copies of the model."""
    model = Model()
    (theirs,) = SOURCES["keller with its Adam"][1](*model.parts())
    train(model, [theirs], 0, 5)
    return model, theirs, copy.deepcopy(model), copy.deepcopy(model)


@CASES.on(2)
def the_state_of_one_process_goes_to_shards_and_back() -> None:
    model, theirs, ours, start = trained_alone()
    params = names_in(model, [theirs])[0]
    fully_shard(ours, mesh=init_device_mesh("cpu", (2,)))
    taken = convert.to_muonkit("keller", theirs.state_dict(), ours, params, ns_dtype="float32")
    assert isinstance(taken.optimizer.state[ours.up.weight]["momentum_buffer"], DTensor)
    train(model, [theirs], 5, 8)
    train(ours, [taken.optimizer], 5, 8)
    whole = copy.deepcopy(start)
    whole.load_state_dict({name: p.full_tensor() for name, p in ours.named_parameters()})
    assert_went_on(model, whole, start)
    taken.optimizer.consolidate_state_dict()
    if dist.get_rank() == 0:
        exported = convert.from_muonkit("keller", taken.optimizer)
        names = {id(p): name for name, p in ours.named_parameters()}
        groups = exported.param_groups[0]
        for group in groups:
            group["params"] = [whole.get_parameter(names[id(p)]) for p in group["params"]]
        again = Keller(groups)
        again.load_state_dict(exported.state_dicts[0])
        train(model, [theirs], 8, 10)
        train(whole, [again], 8, 10)
        assert_went_on(model, whole, start)


@CASES.on(2)
def zero_shares_out_the_state_of_one_process() -> None:
    model, theirs, ours, start = trained_alone()
    params = names_in(model, [theirs])[0]
    options = {"process_group": dist.group.WORLD, "zero": 1, "ns_dtype": "float32"}
    taken = convert.to_muonkit("keller", theirs.state_dict(), ours, params, **options)
    train(model, [theirs], 5, 10)
    train(ours, [taken.optimizer], 5, 10)
    assert_went_on(model, ours, start)
    with pytest.raises(ValueError, match="consolidate_state_dict"):
        convert.from_muonkit("keller", taken.optimizer)


@pytest.mark.parametrize(("world_size", "case"), CASES.ids())
def test_on_ranks(world_size: int, case: str, ranks: Ranks) -> None:
    ranks.outcome(world_size, case).check()


# --- what is refused, as a whole --------------------------------------------------------------


def trained(name: str = "torch") -> tuple[Model, list[Optimizer]]:
    model = Model()
    theirs = SOURCES[name][1](*model.parts())
    train(model, theirs, 0, 2)
    return model, theirs


def test_all_that_does_not_fit_is_listed_and_nothing_is_loaded() -> None:
    model, theirs = trained()
    states, params = saved(theirs), names_in(model, theirs)
    del states[1]["state"][0]["exp_avg_sq"]
    states[0]["state"][0]["momentum_buffer"] = torch.zeros(3, 3)
    states[0]["state"][1]["momentum_buffer"] = torch.zeros(16, 24, dtype=torch.int8)
    params[1][-1] = "lm_head.weight"
    optimizer = MuonW(model)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match="nothing was changed") as raised:
        convert.to_muonkit("torch", states, model, params, optimizer=optimizer)
    for line in (
        "- up.weight: its momentum_buffer has shape (3, 3), and (24, 8) is wanted",
        "- down.weight: its momentum_buffer is torch.int8",
        "- embed.weight: its state has step, exp_avg, and lacks exp_avg_sq",
        "- the model has no parameter that is 'lm_head.weight'",
        "- the model trains head.weight, and theirs has no such parameter",
    ):
        assert line in str(raised.value)
    assert_equal(optimizer.state_dict()["state"], before["state"])


def test_positions_without_names_say_what_to_give() -> None:
    model, theirs = trained()
    states, params = saved(theirs), names_in(model, theirs)
    with pytest.raises(ValueError, match="give params="):
        convert.to_muonkit("torch", states, model)
    with pytest.raises(ValueError, match="params has 2 parameters, and the state dict 3 in 1"):
        convert.to_muonkit("torch", states, model, [params[0][:2], params[1]])
    with pytest.raises(ValueError, match="there are 2 states, and params for 1"):
        convert.to_muonkit("torch", states, model, params[:1])
    with pytest.raises(ValueError, match=r"no optimizer state dict: it lacks \['param_groups"):
        convert.to_muonkit("torch", {"state": {}}, model)


def test_another_algorithm_or_parameter_than_the_optimizers_is_refused() -> None:
    model, theirs = trained()
    by_hand = Muon(
        [{"params": [model.head.weight]}, {"params": model.parts()[1][:1], "algorithm": "adamw"}],
        adamw_lr=1e-3,
    )
    with pytest.raises(ValueError, match="does not fit the optimizer") as raised:
        convert.to_muonkit("torch", theirs, model, optimizer=by_hand)
    assert "trained by adamw there and by muon in the optimizer" in str(raised.value)
    assert "- up.weight: theirs has it, and the optimizer does not" in str(raised.value)


def test_several_values_in_one_group_of_the_optimizer_are_refused() -> None:
    model, theirs = trained()  # AdamW's two groups have two learning rates, and MuonW one
    with pytest.raises(ValueError, match="several values where the optimizer has one") as raised:
        convert.to_muonkit("torch", theirs, model, optimizer=MuonW(model, decay_1d=True))
    assert "group 'adamw': lr=0.001: the group has one, 0.03" in str(raised.value)


def test_arguments_that_do_not_go_together_are_refused() -> None:
    model, theirs = trained()
    with pytest.raises(ValueError, match="unknown format 'Torch': did you mean 'torch'"):
        convert.to_muonkit("Torch", theirs, model)
    with pytest.raises(TypeError, match="lr come from the states"):
        convert.to_muonkit("torch", theirs, model, lr=0.1)
    with pytest.raises(TypeError, match="adamw_wd come from the states"):
        convert.to_muonkit("torch", theirs, model, adamw_wd=0.1)
    with pytest.raises(TypeError, match="an optimizer, and ns_dtype beside it"):
        convert.to_muonkit("torch", theirs, model, optimizer=MuonW(model), ns_dtype="float32")


def test_what_theirs_cannot_train_is_refused() -> None:
    model = Model(convolutions=True)
    with pytest.raises(ValueError, match="cannot be converted to 'torch'") as raised:
        convert.from_muonkit("torch", MuonW(model))
    # The other one is a stem, and AdamW's.
    assert "- strip.weight: Muon trains 2-D parameters alone there" in str(raised.value)
    model, theirs = trained("dion")
    theirs[0].param_groups[1]["algorithm"] = "lion"
    with pytest.raises(ValueError, match=r"embed\.weight: it is trained by 'lion' there"):
        convert.to_muonkit("dion", theirs, model)
    with pytest.raises(ValueError, match="several learning rates in what is one group there"):
        convert.from_muonkit("moonlight", MuonW(model, lr=1e-3, adamw_lr=1e-4))


# --- what was not carried ---------------------------------------------------------------------


def test_what_is_lost_is_told() -> None:
    model = Model()
    hidden, rest = model.parts()
    theirs: list[Any] = [torch.optim.Muon(hidden), AdamW(rest, amsgrad=True)]
    train(model, theirs, 0, 2)
    theirs[0].param_groups[0]["cautious"] = True
    for p in hidden:
        theirs[0].state[p]["master_copy"] = p.detach().double()
    del theirs[1].state[model.head.weight]
    taken = convert.to_muonkit("torch", theirs, model)
    told = str(taken)
    for line in (
        "- the state's 'master_copy' (up.weight, down.weight, square.weight)",
        "- cautious=True (up.weight, down.weight, square.weight)",
        "- amsgrad=True (embed.weight, up.bias, down.bias and 3 more)",
        "- the state's 'max_exp_avg_sq' (embed.weight, up.bias, down.bias and 2 more)",
        "- a state: it had none, and begins at zero (head.weight)",
    ):
        assert line in told, told
    assert len(taken.not_carried) == 5
    # Also where ours had something else before.
    head = MuonW(model)
    train(model, [head], 2, 3)
    options = {"optimizer": head, "hyperparameters": False}
    convert.to_muonkit("torch", theirs, model, **options)
    assert all(not value.any() for value in head.state[model.head.weight].values())


def test_what_theirs_cannot_say_is_told() -> None:
    model = Model()
    options: dict[str, Any] = {"after": "normuon", "ns_coefficients": "polar_express"}
    optimizer = MuonW(model, cautious=True, nesterov=False, maximize=True, **options)
    muon = "(up.weight, down.weight, square.weight)"
    exported = convert.from_muonkit("keller", optimizer)
    for line in (
        f"- nesterov=False: always True there {muon}",
        f"- ns_coefficients='polar_express': always (3.4445, -4.775, 2.0315) there {muon}",
        f"- cautious=True {muon}",
        f"- after=('normuon',) {muon}",
        f"- the state's 'second_momentum_buffer' {muon}",
        "- maximize=True (embed.weight, head.weight, up.weight and 6 more)",
    ):
        assert line in str(exported)
    exported = convert.from_muonkit("torch", Muon(model.parts()[0], ns_coefficients="you"))
    assert "ns_coefficients='you': Keller Jordan's there" in str(exported)
    assert len(exported.param_groups) == 1
    assert str(convert.from_muonkit("torch", MuonW(model))) == "all carried"
    lost = {"nonfinite": "skip", "period": 4, "block_lr_factor": 0.5}
    said = str(convert.from_muonkit("torch", MuonW(model, **lost)))
    assert all(name in said for name in lost)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_momentum_keeps_its_dtype(dtype: torch.dtype) -> None:
    """Of float32 weights; and moments that were wider than the weights are told of."""
    model, theirs = trained("keller")
    states, params = saved(theirs), names_in(model, theirs)
    for entry in states[0]["state"].values():
        entry["momentum_buffer"] = entry["momentum_buffer"].to(dtype)
    optimizer = convert.to_muonkit("keller", states, model, params).optimizer
    kept = optimizer.state[model.up.weight]["momentum_buffer"]
    assert kept.dtype == dtype
    torch.testing.assert_close(kept, states[0]["state"][0]["momentum_buffer"], rtol=0, atol=0)
    half = copy.deepcopy(model).to(torch.bfloat16)
    told = str(convert.to_muonkit("keller", saved(theirs), half, params))
    assert "AdamW's first moment: torch.float32 there, torch.bfloat16 here (embed.weight" in told


def test_a_sum_is_computed_in_float32() -> None:
    """An average in bfloat16, times 20 and divided by 20: off by two roundings, not by a wrong
    factor (0.05 is 0.0501 in bfloat16, which repeated conversions would add up to).
    """
    model = Model().to(torch.bfloat16)
    hidden, rest = model.parts()
    theirs = Moonlight(hidden, rest)
    for p in hidden:
        theirs.state[p]["momentum_buffer"] = torch.randn(p.shape).to(torch.bfloat16)
    taken = convert.to_muonkit("moonlight", theirs, model).optimizer
    for p in hidden:
        total = theirs.state[p]["momentum_buffer"].double()
        here = taken.state[p]["momentum_buffer"].double()
        assert ((here / total) / (1 - 0.95) - 1).abs().max() <= 2**-8
