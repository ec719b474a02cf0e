"""Parameters and options that change after the optimizer was made, where ranks share them: the
exact step all the same, or an error on every rank before anything is written.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from muonkit import Muon
from tests.helpers import measures, zoo
from tests.helpers.measures import EXACT, assert_equals_one_process, assert_unchanged, bits
from tests.helpers.ranks import Cases, Ranks

CASES = Cases()

# Those of which the optimizer is told nothing: it can be made before them.
PLACED_LATER = ["fsdp2", "hsdp", "tp", "fsdp2_tp", "hsdp_tp"]


def swap(model: nn.Module, optimizer: Muon) -> None:
    """What frameworks do after they have sharded the model: the groups' parameters, in place."""
    new = dict(model.named_parameters())
    for group in optimizer.param_groups:
        group["params"] = [new[name] for name in group["param_names"]]


def made_before(layout: str, steps: int, **options: Any) -> tuple[nn.Module, Muon]:
    """An optimizer of the whole model, some steps, then the layout."""
    model = zoo.Zoo(0, 1)
    optimizer = Muon(zoo.param_groups(model), **{**measures.OPTIONS, **options})
    measures.train(model, optimizer, 0, steps)
    assert not zoo.LAYOUTS[layout].apply(model)
    swap(model, optimizer)
    return model, optimizer


@CASES.on(4, layout=PLACED_LATER, variant=["plain", "normuon"], steps=[0, 2])
def sharded_after_the_optimizer_was_made(layout: str, variant: str, steps: int) -> None:
    model, optimizer = made_before(layout, steps, variant=variant)
    measures.train(model, optimizer, steps)
    assert len(optimizer.state) == len(list(model.parameters()))
    assert_equals_one_process(model, optimizer, variant)


@CASES.on(2, 4)
def sharded_and_put_together_again() -> None:
    model, optimizer = made_before("fsdp2", 1)
    measures.train(model, optimizer, 1, 2)
    whole = zoo.Zoo(0, 1)
    full = {name: p.full_tensor() for name, p in model.named_parameters()}
    whole.load_state_dict(full, strict=False)
    swap(whole, optimizer)
    measures.train(whole, optimizer, 2)
    assert not any(isinstance(v, DTensor) for s in optimizer.state.values() for v in s.values())
    assert_equals_one_process(whole, optimizer)


@CASES.on(2)
def state_dicts_and_plans_of_replaced_parameters() -> None:
    model, optimizer = made_before("fsdp2", 1)
    assert optimizer.plan().ranks == 2
    model, optimizer = made_before("fsdp2", 1)
    held = optimizer.state_dict()["state"]
    assert len(held) == len(list(model.parameters()))
    assert all(isinstance(s["momentum_buffer"], DTensor) for s in held.values() if len(s) == 1)
    model, optimizer = made_before("fsdp2", 1)
    zoo.set_gradients(model, 0)
    norm = optimizer.clip_grad_norm_(1e9)
    alone = zoo.Zoo(0, 1)
    zoo.set_gradients(alone, 0)
    expected = torch.nn.utils.clip_grad_norm_(alone.parameters(), 1e9)
    assert abs(norm / expected - 1) < EXACT


@CASES.on(2, layout=["ddp", "zero1", "fsdp2"])
def unfrozen_later(layout: str) -> None:
    names = ("qkv.weight", "up.weight", "norm.weight")
    model, told = zoo.build(layout)
    late = [p for name, p in model.named_parameters() if name.endswith(names)]
    for p in late:
        p.requires_grad_(False)
    optimizer = Muon(zoo.param_groups(model), **measures.OPTIONS, **told)
    assert not any(p in optimizer.state for p in late)
    for p in late:
        p.requires_grad_(True)
    measures.train(model, optimizer)
    assert_equals_one_process(model, optimizer)


@CASES.on(2, layout=["ddp", "zero1", "fsdp2"])
def refused_on_one_rank_refused_on_all(layout: str) -> None:
    model, optimizer = measures.make(layout)
    measures.train(model, optimizer, 0, 1)
    before = bits(model, optimizer)
    group = next(g for g in optimizer.param_groups if g["algorithm"] == "muon")
    own = group["adjust_lr_fn"]
    mine = dist.get_rank() == 1
    if mine:
        group["adjust_lr_fn"] = "typo"
    zoo.set_gradients(model, 1)
    error, message = (ValueError, "typo.*nothing") if mine else (RuntimeError, "refused: .*typo")
    with pytest.raises(error, match=message):
        optimizer.step()
    assert_unchanged(model, optimizer, before)
    group["adjust_lr_fn"] = own
    measures.train(model, optimizer, 1)
    assert_equals_one_process(model, optimizer)


@CASES.on(2, layout=["zero1", "fsdp2"])
def a_part_of_another_shape_is_refused_on_all(layout: str) -> None:
    """Of the state on one rank alone, as a wrong load leaves it: the others do not wait for it."""
    model, optimizer = measures.make(layout)
    measures.train(model, optimizer, last=1)
    before = bits(model, optimizer)
    mine = dist.get_rank() == 1
    momentum = optimizer.state[model.blocks[0].up.weight]["momentum_buffer"]
    own = momentum._local_tensor
    if mine:
        momentum._local_tensor = own.new_zeros(own.shape[0] + 1, *own.shape[1:])
    zoo.set_gradients(model, 1)
    words = "of the momentum_buffer of .*, and should have"
    error, message = (ValueError, words) if mine else (RuntimeError, f"refused: .*{words}")
    with pytest.raises(error, match=message):
        optimizer.step()
    momentum._local_tensor = own
    assert_unchanged(model, optimizer, before)
    measures.train(model, optimizer, 1)
    assert_equals_one_process(model, optimizer)


@CASES.on(2, later=["loaded", "other_layout"])
def a_stage_that_was_left_is_taken_up_again(later: str) -> None:
    """What it kept is laid out anew by nobody, so it begins anew, its count of steps too."""
    mesh = init_device_mesh("cpu", (2,))
    whole = torch.arange(24.0).reshape(6, 4)
    groups = {"process_group": dist.group.WORLD, "zero": 1} if later == "loaded" else {}
    place = functools.partial(distribute_tensor, whole, mesh)
    p = nn.Parameter(whole.clone() if groups else place([Shard(1)]))
    optimizer = Muon([("p", p)], lr=0.1, after="normuon", **groups)
    (group,) = optimizer.param_groups

    def step() -> None:
        (p,) = group["params"]
        p.grad = torch.ones_like(p)
        optimizer.step()

    step()
    group["after"] = ()
    step()
    if later == "loaded":
        optimizer.consolidate_state_dict()
        saved = [optimizer.state_dict()]
        dist.broadcast_object_list(saved)
        optimizer.load_state_dict(saved[0])
        (group,) = optimizer.param_groups
    else:
        group["params"] = [nn.Parameter(place([Shard(0)]))]
        step()
    assert list(optimizer.state[group["params"][0]]) == ["momentum_buffer"]
    group["after"] = ("normuon",)
    step()
    state = optimizer.state[group["params"][0]]
    assert state["step"] == 1
    assert state["second_momentum_buffer"].to_local().shape == (3, 1)


@CASES.on(2, after=["fully_shard", "load_state_dict"])
def parameters_that_were_replaced_are_missed(after: str) -> None:
    """The groups hold what nobody trains any more: as in one process, every step says so."""
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 4))
    if after == "fully_shard":
        optimizer = Muon([layer.weight for layer in model], process_group=dist.group.WORLD)
        fully_shard(model)
    else:
        fully_shard(model)
        optimizer = Muon([layer.weight for layer in model])
        copies = {name: p.detach().clone() for name, p in model.state_dict().items()}
        model.load_state_dict(copies, assign=True)
    model(torch.ones(2, 4)).sum().backward()
    with pytest.warns(UserWarning, match="no parameter of the optimizer has a gradient"):
        optimizer.step()


@CASES.on(2)
def a_plan_that_cannot_be_made_is_told() -> None:
    model, optimizer = measures.make("zero1")
    zoo.set_gradients(model, 0)
    mine = dist.get_rank() == 1
    with pytest.MonkeyPatch.context() as patch:
        if mine:
            patch.setattr(
                "muonkit.optim.PlannedStep", lambda *_: (_ for _ in ()).throw(KeyError("it"))
            )
        error, message = (KeyError, "it") if mine else (RuntimeError, "refused: 'it' on rank 1")
        with pytest.raises(error, match=message):
            optimizer.step()
    optimizer.step()


@CASES.on(2)
def a_clipping_that_is_refused_is_told() -> None:
    model, optimizer = measures.make("zero1")
    zoo.set_gradients(model, 0)
    mine, p = dist.get_rank() == 1, model.blocks[0].up.weight
    dense = p.grad
    if mine:
        p.grad = dense.to_sparse()
    error, message = (RuntimeError, "sparse gradients") if mine else (RuntimeError, "refused: .*sp")
    with pytest.raises(error, match=message):
        optimizer.clip_grad_norm_(1.0)
    p.grad = dense
    optimizer.clip_grad_norm_(1.0)


@CASES.on(2)
def clips_half_precision_beyond_the_range_of_its_square() -> None:
    """A norm of 1,000 and its square, 1e6: float16 ends at 65,504."""
    p = torch.nn.Parameter(torch.zeros(10, 10, dtype=torch.float16))
    p.grad = torch.full_like(p, 100.0)
    optimizer = Muon([p], process_group=dist.group.WORLD)
    assert float(optimizer.clip_grad_norm_(10.0)) == pytest.approx(1000.0)
    # Of float16's 11 bits.
    torch.testing.assert_close(p.grad.float(), torch.ones(10, 10), rtol=2**-10, atol=0)


@pytest.mark.sampled
@pytest.mark.parametrize(("world_size", "case"), CASES.ids())
def test_on_ranks(world_size: int, case: str, ranks: Ranks) -> None:
    ranks.outcome(world_size, case).check()
