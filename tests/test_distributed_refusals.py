"""What several ranks do wrong: an error on all of them that says what and how to mend it."""

from __future__ import annotations

import copy
import functools
import os
import pickle
import signal
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

import distributed_measures as measures
import distributed_zoo as zoo
from distributed_helpers import Cases, Ranks, run
from muonkit import Muon, MuonW

CASES = Cases()


def _parameter(*shape: int, fill: float = 1.0) -> nn.Parameter:
    p = nn.Parameter(torch.full(shape, fill))
    p.grad = torch.ones(shape)
    return p


def _sharded(mesh: DeviceMesh, placement: Any, *shape: int) -> nn.Parameter:
    full = torch.ones(shape)
    placements = [placement] * mesh.ndim
    local = DTensor.from_local(full, mesh, [Replicate()] * mesh.ndim, run_check=False)
    p = nn.Parameter(local.redistribute(placements=placements))
    p.grad = DTensor.from_local(
        torch.ones_like(p.to_local()), mesh, placements, shape=p.shape, stride=p.stride()
    )
    return p


# --- ranks that are not about to do the same ------------------------------------------------------


def _with_lr() -> Muon:
    return Muon([_parameter(4, 6)], lr=0.1 * (1 + dist.get_rank()), process_group=dist.group.WORLD)


def _with_a_tensor_as_lr() -> Muon:
    lr = torch.tensor(0.1 * (1 + dist.get_rank()))
    return Muon([_parameter(4, 6)], lr=lr, process_group=dist.group.WORLD)


def _with_a_variant() -> Muon:
    variant = ["plain", "normuon"][dist.get_rank()]
    return Muon([_parameter(4, 6)], variant=variant, process_group=dist.group.WORLD)


def _with_a_cap() -> Muon:
    return Muon(
        [_parameter(4, 6) for _ in range(2)],
        bytes_in_flight=[64, 1024][dist.get_rank()],
        process_group=dist.group.WORLD,
    )


def _with_an_option_of_adamw() -> Muon:
    eps = [1e-8, 1e-6][dist.get_rank()]
    groups = [{"params": [_parameter(4, 6)]}, {"params": [_parameter(4)], "algorithm": "adamw"}]
    return Muon(groups, adamw_lr=0.1, adamw_eps=eps, process_group=dist.group.WORLD)


def _with_a_shape() -> Muon:
    shape = [(4, 6), (6, 4)][dist.get_rank()]
    return Muon([("wide", _parameter(*shape))], process_group=dist.group.WORLD)


def _with_a_dtype() -> Muon:
    p = _parameter(4, 6)
    if dist.get_rank() == 1:
        p = nn.Parameter(p.detach().bfloat16())
        p.grad = torch.ones(4, 6, dtype=torch.bfloat16)
    return Muon([("half", p)], process_group=dist.group.WORLD)


def _with_a_gradients_dtype() -> Muon:
    p = _parameter(4, 6)
    if dist.get_rank() == 1:
        p.grad_dtype = None
        p.grad = torch.ones(4, 6, dtype=torch.bfloat16)
    return Muon([("rounded", p)], process_group=dist.group.WORLD)


def _with_an_order() -> Muon:
    """Both are of one shape: nothing but the names tells them apart."""
    named = [("first", _parameter(4, 6)), ("second", _parameter(4, 6))]
    return Muon(named[:: 1 - 2 * dist.get_rank()], process_group=dist.group.WORLD)


def _with_a_parameter_more() -> Muon:
    params = [(f"p{i}", _parameter(4, 6)) for i in range(1 + dist.get_rank())]
    return Muon(params, process_group=dist.group.WORLD)


def _with_a_group_more() -> Muon:
    groups = [{"params": [_parameter(4, 6)]} for _ in range(1 + dist.get_rank())]
    return Muon(groups, process_group=dist.group.WORLD)


def _with_a_placement() -> Muon:
    mesh = zoo.mesh((2,), ("dp",))
    return Muon([("cut", _sharded(mesh, Shard(dist.get_rank()), 4, 6))])


DIFFERENT: dict[str, tuple[Callable[[], Muon], str]] = {
    "lr": (_with_lr, "group 0's lr: 0.1 on rank 0, but group 0's lr: 0.2 on rank 1"),
    "tensor lr": (_with_a_tensor_as_lr, "group 0's lr: "),
    "variant": (_with_a_variant, "group 0's variant: 'plain' on rank 0"),
    "cap": (_with_a_cap, "group 0's bytes_in_flight: 64 on rank 0"),
    "eps of adamw": (_with_an_option_of_adamw, "group 1's eps: 1e-08 on rank 0"),
    "shape": (_with_a_shape, "wide: (4, 6) in torch.float32"),
    "dtype": (_with_a_dtype, "half: (4, 6) in torch.bfloat16"),
    "dtype of gradients": (_with_a_gradients_dtype, "a gradient in torch.bfloat16"),
    "order": (_with_an_order, "first: (4, 6) in torch.float32"),
    "a parameter more": (_with_a_parameter_more, "p1: (4, 6)"),
    "a group more": (_with_a_group_more, "group 1's"),
    "placement": (_with_a_placement, "cut: (4, 6)"),
}

if not hasattr(Tensor, "grad_dtype"):  # torch 2.9: a gradient has its parameter's dtype
    del DIFFERENT["dtype of gradients"]


@CASES.on(2, what=list(DIFFERENT))
def tells_what_differs(what: str) -> str:
    optimizer = DIFFERENT[what][0]()
    params = [p for group in optimizer.param_groups for p in group["params"]]
    before = [zoo.part_of(p.detach()).clone() for p in params]
    with pytest.raises(RuntimeError, match="the ranks disagree: ") as error:
        optimizer.step()
    for p, tensor in zip(params, before, strict=True):
        assert torch.equal(zoo.part_of(p.detach()), tensor)
        assert not any(
            zoo.part_of(value).any()
            for value in optimizer.state[p].values()
            if isinstance(value, Tensor)
        )
    return str(error.value)


@CASES.on(2)
def goes_on_after_ranks_disagreed() -> None:
    """The scheduler of one rank was late; then it is mended."""
    model, optimizer = measures.make("zero1")
    measures.train(model, optimizer, last=2)
    for group in optimizer.param_groups:
        group["lr"] *= 1 + dist.get_rank()
    zoo.set_gradients(model, 2)
    with pytest.raises(RuntimeError, match="lr: "):
        optimizer.step()
    for group in optimizer.param_groups:
        group["lr"] /= 1 + dist.get_rank()
    measures.train(model, optimizer, 2)
    for far, name in measures.deviations(model, optimizer, measures.alone("plain")).values():
        assert far <= 1e-6, name


def _group(*rank_sets: list[int]) -> dist.ProcessGroup:
    """The one of these that this rank is in."""
    (mine,) = (ranks for ranks in rank_sets if dist.get_rank() in ranks)
    return dist.new_group(mine, use_local_synchronization=True)


# --- layouts that cannot be -----------------------------------------------------------------------


@CASES.on(2)
def refuses_a_partial_parameter() -> None:
    mesh = zoo.mesh((2,), ("dp",))
    partial = DTensor.from_local(torch.ones(4, 6), mesh, [Partial()], run_check=False)
    with pytest.raises(ValueError, match=r"sums has the placement .*redistribute it before"):
        Muon([("sums", nn.Parameter(partial))])


@CASES.on(2)
def refuses_a_partial_parameter_of_adamw() -> None:
    mesh = zoo.mesh((2,), ("dp",))
    partial = nn.Parameter(DTensor.from_local(torch.ones(4), mesh, [Partial()], run_check=False))
    group = {"params": [("sums", partial)], "algorithm": "adamw", "lr": 0.1}
    with pytest.raises(ValueError, match=r"sums has the placement .*redistribute it before"):
        Muon([{"params": [("w", _sharded(mesh, Shard(0), 4, 6))]}, group])


@CASES.on(4)
def refuses_meshes_of_different_ranks() -> None:
    everyone = init_device_mesh("cpu", (4,))
    half = DeviceMesh.from_group(_group([0, 1], [2, 3]), "cpu")
    on_all = ("on all", _sharded(everyone, Shard(0), 8, 6))
    on_half = ("on half", _sharded(half, Shard(0), 8, 6))
    for named in ([on_all, on_half], [on_half, on_all]):
        with pytest.raises(ValueError, match=r"on (half|all) lies on ranks .* others") as error:
            Muon(named)
        assert "make an optimizer for each set" in str(error.value)


@CASES.on(4)
def refuses_a_process_group_that_is_no_axis() -> None:
    both = zoo.mesh((2, 2), ("dp", "tp"))
    crosswise = _group([0, 3], [1, 2])
    for zero in (0, 1):
        with pytest.raises(ValueError, match=r"process_group \(ranks .*\) is no axis"):
            Muon([_sharded(both["tp"], Shard(0), 4, 6)], process_group=crosswise, zero=zero)


@CASES.on(2)
def refuses_what_is_no_process_group() -> None:
    p = _parameter(4, 6)
    for given in ("world", 2, dist.GroupMember.NON_GROUP_MEMBER):
        with pytest.raises(TypeError, match=r"group\.WORLD, after init_process_group"):
            Muon([p], process_group=given)
    with pytest.raises(ValueError, match=r'mesh of 2 axes.*mesh\["dp"\]'):
        Muon([p], process_group=zoo.mesh((2, 1), ("dp", "tp")))


@CASES.on(2)
def refuses_zero_without_ranks_to_share_with() -> None:
    model = zoo.Zoo()
    with pytest.raises(ValueError, match=r"process_group=torch\.distributed\.group\.WORLD"):
        Muon(zoo.param_groups(model), zero=1)
    for zero in (2, 3, -1, True, "1"):
        with pytest.raises(ValueError, match="zero should be 0"):
            Muon(zoo.param_groups(model), process_group=dist.group.WORLD, zero=zero)


@CASES.on(2, layout=["ddp", "zero1", "fsdp2"])
def refuses_to_be_pickled(layout: str) -> None:
    _, optimizer = measures.make(layout)
    for copied in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError, match=r"save its state_dict\(\)"):
            copied(optimizer)


@CASES.on(2)
def adds_no_group_that_lies_elsewhere() -> None:
    mesh = zoo.mesh((2,), ("dp",))
    optimizer = Muon([("w", _sharded(mesh, Shard(0), 4, 6))])
    mine = DeviceMesh.from_group(_group([0], [1]), "cpu")
    with pytest.raises(ValueError, match="lies on ranks"):
        optimizer.add_param_group({"params": [("v", _sharded(mine, Shard(0), 4, 6))]})
    assert len(optimizer.param_groups) == 1
    optimizer.step()


# --- ranks that are no longer there ---------------------------------------------------------------


def dies_in_an_exchange(layout: str) -> str:
    """The last rank is killed when its part of an exchange is due, in the second step."""
    model, optimizer = measures.make(layout)
    measures.train(model, optimizer, last=1)
    zoo.set_gradients(model, 1)
    if dist.get_rank() == dist.get_world_size() - 1:
        original, calls = dist.all_to_all_single, iter(range(10))

        def deadly(*args: Any, **options: Any) -> Any:
            if next(calls) == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **options)

        dist.all_to_all_single = deadly
    with pytest.raises(RuntimeError, match="an exchange between ranks broke off") as error:
        optimizer.step()
    return str(error.value)


def hangs_before_a_step() -> str:
    """One rank does not come: the group's timeout ends the wait of the other."""
    group = dist.new_group(timeout=timedelta(seconds=2))
    optimizer = MuonW(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), process_group=group, zero=1)
    for p in (p for g in optimizer.param_groups for p in g["params"]):
        p.grad = torch.ones_like(p)
    if dist.get_rank() == 1:
        time.sleep(8)
        return ""
    before = time.monotonic()
    with pytest.raises(RuntimeError, match="an exchange between ranks broke off") as error:
        optimizer.step()
    assert time.monotonic() - before < 7
    return str(error.value)


@pytest.mark.parametrize("layout", ["zero1", "fsdp2_tp"])
def test_the_others_end_when_a_rank_dies_in_an_exchange(layout: str) -> None:
    case = functools.partial(dies_in_an_exchange, layout)
    outcome = run(4, {"dies": case}, timeout=60, grace=20)["dies"]
    assert "SIGKILL" in (outcome.errors[3] or "")
    for error, message in zip(outcome.errors[:3], outcome.values[:3], strict=True):
        assert error is None, outcome.report()
        assert "last checkpoint" in message


def test_the_others_end_when_a_rank_does_not_come() -> None:
    outcome = run(2, [hangs_before_a_step], timeout=60, grace=20)["hangs_before_a_step"]
    assert outcome.errors[0] is None, outcome.report()
    assert "last checkpoint" in outcome.values[0]


# --- the tests ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    return Ranks(request, tmp_path_factory, CASES)


@pytest.mark.parametrize(("world_size", "case"), CASES.ids())
def test_ranks_are_told(world_size: int, case: str, ranks: Ranks) -> None:
    values = ranks.outcome(world_size, case).check()
    if not case.startswith("tells"):
        assert values == (None,) * world_size
        return
    said = DIFFERENT[case.split("-", 1)[1]][1]
    for message in values:
        assert message == values[0]
        assert said in message
        assert "nothing was changed" in message
