"""What several ranks do wrong: an error on all of them that says what and how to mend it."""

from __future__ import annotations

import copy
import functools
import os
import pickle
import re
import signal
import time
import types
import warnings
from collections.abc import Callable
from datetime import timedelta
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    FSDPModule,
    FullyShardedDataParallel,
    ShardingStrategy,
    fully_shard,
)
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

from muonkit import Muon, MuonW, RoutingError, route
from muonkit.distributed.machines import MACHINES
from muonkit.distributed.meshes import ascends
from tests.helpers import internals, measures, zoo
from tests.helpers.ranks import Cases, Ranks, run

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


def _with_one_name_in_two_groups() -> Muon:
    """The first of the two has no gradient on one rank, and is not hidden by the second."""
    groups = [{"params": [("same", _parameter(4, 6))]} for _ in range(2)]
    if dist.get_rank() == 1:
        groups[0]["params"][0][1].grad = None
    return Muon(groups, process_group=dist.group.WORLD)


def _with_a_placement() -> Muon:
    mesh = zoo.mesh((2,), ("dp",))
    return Muon([("cut", _sharded(mesh, Shard(dist.get_rank()), 4, 6))])


def _with_zero() -> Muon:
    return Muon([_parameter(4, 6)], process_group=dist.group.WORLD, zero=dist.get_rank())


def _with_an_algorithm() -> Muon:
    group = {"params": [_parameter(4, 6)], "algorithm": ["muon", "adamw"][dist.get_rank()]}
    return Muon([group], adamw_lr=0.1, process_group=dist.group.WORLD)


DIFFERENT: dict[str, tuple[Callable[[], Muon], str]] = {
    "lr": (_with_lr, "group 0's lr: 0.1 on rank 0, but group 0's lr: 0.2 on rank 1"),
    "tensor lr": (_with_a_tensor_as_lr, "group 0's lr: "),
    "variant": (_with_a_variant, "group 0's after: () on rank 0"),
    "cap": (_with_a_cap, "group 0's bytes_in_flight: 64 on rank 0"),
    "eps of adamw": (_with_an_option_of_adamw, "group 1's eps: 1e-08 on rank 0"),
    "shape": (_with_a_shape, "wide: (4, 6) in torch.float32"),
    "dtype": (_with_a_dtype, "half: (4, 6) in torch.bfloat16"),
    "dtype of gradients": (_with_a_gradients_dtype, "a gradient in torch.bfloat16"),
    "order": (_with_an_order, "the order of parameters: first on rank 0, but the order of"),
    "a parameter more": (_with_a_parameter_more, "p1: (4, 6)"),
    "a group more": (_with_a_group_more, "group 1's"),
    "one name in two groups": (
        _with_one_name_in_two_groups,
        "the ranks disagree: same: (4, 6) in torch.float32",
    ),
    "placement": (_with_a_placement, "cut: (4, 6)"),
    "zero": (_with_zero, "zero: 0 on rank 0, but zero: 1 on rank 1"),
    "algorithm": (_with_an_algorithm, "group 0's algorithm: 'muon' on rank 0"),
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


@CASES.on(4)
def plans_by_one_ranks_word_for_the_size_of_nodes() -> None:
    """Nodes of unequal size: by rank 0's it is cheaper to compute again, by the others' to send."""
    size = [2, 4, 4, 4][dist.get_rank()]
    internals.forget_nodes()  # other cases have asked
    rates = mock.patch.dict(MACHINES, {"cpu": (1e9, 1.0, 0.1)})
    with rates, mock.patch.dict(os.environ, {"LOCAL_WORLD_SIZE": str(size)}):
        model, optimizer = measures.make("hsdp")
        measures.train(model, optimizer, last=1)
    repeats = {tensor.repeat for plan in optimizer.plan().plans for tensor in plan.tensors}
    assert (0,) in repeats
    internals.forget_nodes()


@CASES.on(2)
def tells_that_one_rank_alone_unfroze_a_layer() -> None:
    """What it settles anew alone may wait for nobody."""
    model = zoo.Zoo()
    model.blocks[0].up.weight.requires_grad_(False)
    optimizer = Muon(zoo.param_groups(model), process_group=dist.group.WORLD, **measures.OPTIONS)
    zoo.set_gradients(model, 0, skip=("blocks.0.up.weight",))
    optimizer.step()
    if dist.get_rank() == 1:
        model.blocks[0].up.weight.requires_grad_(True)
        model.blocks[0].up.weight.grad = torch.ones_like(model.blocks[0].up.weight)
    with pytest.raises(RuntimeError, match=r"blocks\.0\.up\.weight: .*a gradient in .* on rank 1"):
        optimizer.step()


@CASES.on(2)
def tells_a_rank_that_clips_alone() -> None:
    model, optimizer = measures.make("zero1")
    zoo.set_gradients(model, 0)
    call = optimizer.step if dist.get_rank() else functools.partial(optimizer.clip_grad_norm_, 1.0)
    with pytest.raises(RuntimeError, match="this call: clip_grad_norm_ on rank 0, but this call: "):
        call()
    optimizer.step()


@CASES.on(2)
def tells_that_auto_is_another_dtype_elsewhere() -> None:
    """Rank 1 stands for a node whose CPUs multiply bfloat16 fastest, and rank 0 for one of AVX2."""
    have = {
        "amx_bf16": bool(dist.get_rank()),
        "amx_held_back": False,
        "avx512_bf16": False,
        "arm_bf16": False,
    }
    try:
        with pytest.MonkeyPatch.context() as patch:
            internals.cpu_has(patch, have)
            internals.forget_hardware()
            # It may be an option only that makes all matrices small, and so float32 on both.
            small = Muon([_parameter(4, 6)], process_group=dist.group.WORLD)
            with pytest.raises(
                RuntimeError, match=r'"auto" is float32 on rank 0, but .* for small'
            ):
                small.step()
            p = _parameter(96, 100)
            optimizer = Muon([p], process_group=dist.group.WORLD)
            with pytest.raises(RuntimeError) as error:
                optimizer.step()
    finally:
        internals.forget_hardware()
    assert torch.equal(p, torch.ones(96, 100))
    text = str(error.value)
    assert re.search(
        r"group 0's products: \w+ in float32, .* on rank 0, but .* in bfloat16, ", text
    )
    assert "ns_dtype='float32'" in text


def _group(*rank_sets: list[int]) -> dist.ProcessGroup:
    """The one of these that this rank is in."""
    (mine,) = (ranks for ranks in rank_sets if dist.get_rank() in ranks)
    return dist.new_group(mine, use_local_synchronization=True)


# --- layouts that cannot be -----------------------------------------------------------------------


@CASES.on(4)
def refuses_a_weight_of_zeros_of_which_every_rank_has_a_part() -> None:
    on = zoo.mesh((2, 2), ("dp", "tp"))
    some, none = (_sharded(on, Shard(0), 3, 6) for _ in range(2))  # the last rank has no row
    none.detach().zero_()
    some.detach().zero_()
    if dist.get_rank() == 1:  # one rank has an entry
        some.detach().to_local()[0, 0] = 1.0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Muon([some], constraint="hyperball")
        with pytest.raises(ValueError, match=r"\(3, 6\) is zero, and constraint='hyperball'"):
            Muon([some, none], constraint="hyperball")
    experts = _sharded(on, Shard(1), 2, 3, 6)
    Muon([{"params": [experts], "view": "experts"}], constraint="hyperball")
    experts.detach().to_local()[1] = 0.0
    with pytest.raises(ValueError, match=r"matrix 1 of .* is zero"):
        Muon([{"params": [experts], "view": "experts"}], constraint="hyperball")
    fused = _sharded(on, Shard(1), 7, 4)
    fused.detach().to_local()[3:] = 0.0
    with pytest.raises(ValueError, match=r"matrix 1 of .* is zero"):
        Muon([{"params": [fused], "view": "split(rows=3+4)"}], constraint="hyperball")


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


@CASES.on(2, original=[False, True])
def refuses_flat_shards_of_fsdp1(original: bool) -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 6))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is deprecated
        sharded = FullyShardedDataParallel(
            model, use_orig_params=original, device_id=torch.device("cpu")
        )
    remedy = r"shard with fully_shard \(FSDP2\)"
    with pytest.raises(RoutingError, match=rf"FSDP1 .* flat shards\. .*{remedy}"):
        MuonW(sharded, lr=0.1)
    # By hand, under its names too.
    with pytest.raises(ValueError, match=remedy):
        Muon(list(sharded.parameters()))
    with pytest.raises(ValueError, match=remedy):
        Muon([{"params": list(sharded.parameters()), "view": "flatten"}])


@CASES.on(2)
def refuses_plain_tensors_that_ddp_made_of_dtensors() -> None:
    """They look like whole matrices, and are shards."""
    both = zoo.mesh((1, 2), ("dp", "tp"))
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 4))
    plan = {"0": ColwiseParallel(), "1": RowwiseParallel()}
    DistributedDataParallel(
        parallelize_module(model, both["tp"], plan), device_mesh=both["dp"], init_sync=False
    )
    weights = [layer.weight for layer in model]
    assert not any(isinstance(p, DTensor) for p in weights)
    said = r"part of a DTensor, which DistributedDataParallel.* take fully_shard\(model, mesh="
    with pytest.raises(ValueError, match=said):
        Muon(weights)
    with pytest.raises(RoutingError, match=rf"0\.weight .*{said}"):
        MuonW(model)
    Muon([{"params": weights, "algorithm": "adamw"}], adamw_lr=0.1)  # entry by entry is right


@CASES.on(2)
def refuses_whole_parameters_in_the_place_of_shards() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 4))
    fully_shard(model[1])
    fully_shard(model)
    with torch.no_grad():
        model(torch.ones(2, 4))  # FSDP2 leaves the root's parameters as they are in a forward
    with pytest.raises(
        RoutingError, match=r"place of the shards of the model itself.* reshard\(\)"
    ):
        MuonW(model, lr=0.1)
    for part in model.modules():
        if isinstance(part, FSDPModule):
            part.reshard()
    optimizer = MuonW(model, lr=0.1)
    assert all(isinstance(p, DTensor) for g in optimizer.param_groups for p in g["params"])
    model[1].unshard()
    with pytest.raises(RoutingError, match=r"place of the shards of 1, as"):
        route(model)


@CASES.on(4)
def refuses_the_smaller_mesh_that_a_forward_leaves() -> None:
    """`reshard_after_forward` as a number: shards on fewer ranks until the backward pass."""
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 4))
    for part in model:
        fully_shard(part, reshard_after_forward=2)
    fully_shard(model, reshard_after_forward=2)
    with torch.no_grad():
        model(torch.ones(2, 4))
    with pytest.raises(RoutingError, match=r"other tensors in the place of the shards of 0"):
        MuonW(model, lr=0.1)


@CASES.on(2)
def one_rank_alone_may_describe_what_was_sharded_since() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 4))
    optimizer = MuonW(model, lr=0.1)
    rows = optimizer.describe()
    fully_shard(model)
    new = dict(model.named_parameters())
    for group in optimizer.param_groups:
        group["params"] = [new[name] for name in group["param_names"]]
    if dist.get_rank() == 0:
        assert optimizer.describe() == rows
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()


@CASES.on(2)
def ranks_that_differ_in_what_they_ask_for_are_told() -> None:
    """None waits for another: these decide what is exchanged."""
    rank, world = dist.get_rank(), dist.group.WORLD
    p = _sharded(init_device_mesh("cpu", (2,)), Shard(0), 4, 6)
    torch.nn.init.ones_(p)
    with pytest.raises(
        RuntimeError, match=r"constraint:  on rank 0, but constraint: hyperball on rank 1"
    ):
        Muon([p], constraint="hyperball" if rank else ())
    optimizer = Muon([p])
    with pytest.raises(ValueError, match="there are ranks 0 to 1"):
        optimizer.consolidate_state_dict(to=5)
    with pytest.raises(RuntimeError, match="the rank with the whole state"):
        optimizer.consolidate_state_dict(to=rank)
    frozen = nn.Parameter(torch.ones(4, 4), requires_grad=rank == 0)
    frozen.grad = None if rank else torch.ones(4, 4)
    uneven = Muon([frozen], process_group=world)
    with pytest.raises(RuntimeError, match="nothing was changed"):
        uneven.step()


@CASES.on(2, algorithm=["muon", "adamw"])
def refuses_parameters_of_other_ranks(algorithm: str) -> None:
    parts = [_sharded(DeviceMesh("cpu", [rank]), Shard(0), 4, 6) for rank in (0, 1)]
    rank = dist.get_rank()
    said = rf"lies on ranks {1 - rank}, and this is rank {rank}.*of its stage"
    with pytest.raises(ValueError, match=said):
        Muon([{"params": parts, "algorithm": algorithm}], adamw_lr=0.1)


@CASES.on(2)
def refuses_a_mesh_whose_ranks_do_not_ascend() -> None:
    """torch itself disagrees about where its shards lie: `distribute_tensor` goes by the group."""
    backwards = DeviceMesh("cpu", [1, 0])
    with pytest.raises(ValueError, match=r"lies on ranks 1, 0 in this order.* ascend along every"):
        Muon([_sharded(backwards, Shard(0), 4, 6)])


@pytest.mark.parametrize(
    ("ranks", "right"),
    [
        ([[0, 2], [1, 3]], True),
        ([[0, 1], [3, 2]], False),
        ([[2, 3], [0, 1]], False),
        ([[[0, 1], [2, 3]], [[4, 5], [6, 7]]], True),
        ([[[0, 1], [2, 3]], [[4, 5], [7, 6]]], False),
        ([[[0, 1], [6, 7]], [[4, 5], [2, 3]]], False),
        ([[5], [7]], True),
    ],
)
def test_ranks_ascend_along_every_axis(ranks: Any, right: bool) -> None:
    tensor = torch.tensor(ranks)
    mesh: Any = types.SimpleNamespace(mesh=tensor, shape=tuple(tensor.shape))
    assert ascends(mesh) == right


@CASES.on(2)
def takes_fsdp1_without_shards() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 6))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sharded = FullyShardedDataParallel(
            model,
            use_orig_params=True,
            sharding_strategy=ShardingStrategy.NO_SHARD,
            device_id=torch.device("cpu"),
        )
    optimizer = MuonW(sharded, lr=0.1)
    sharded(torch.ones(2, 6) + dist.get_rank()).sum().backward()
    optimizer.step()
    assert [r.view for r in route(sharded)].count("matrix") == 2


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


@CASES.on(2)
def is_not_shared_by_a_group_that_was_refused() -> None:
    """The optimizer is each rank's own until a group is added that several share."""
    mesh = zoo.mesh((2,), ("tp",))
    optimizer = Muon([("w", _parameter(4, 6))])
    cut = {"params": [("cut", _sharded(mesh, Shard(1), 8, 249))], "momentum_dtype": "int8"}
    with pytest.raises(ValueError, match="keeps a scale"):
        optimizer.add_param_group(cut)
    assert optimizer.plan().ranks == 1
    if dist.get_rank() == 0:
        optimizer.step()  # which the other rank does not take
    assert not optimizer._step_supports_amp_scaling
    optimizer.add_param_group({"params": [("v", _sharded(mesh, Shard(0), 4, 6))]})
    assert optimizer.plan().ranks == 2
    assert optimizer._step_supports_amp_scaling  # as of one that was made with the group


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


def skips_a_step(kind: str) -> str:
    """Rank 1 leaves one step out, and meets the other's in its next forward or backward pass."""
    group = dist.new_group(timeout=timedelta(seconds=3))
    model = zoo.Zoo()
    if kind == "fsdp2":
        zoo.fsdp(model, DeviceMesh.from_group(group, "cpu"))
        optimizer = Muon(zoo.param_groups(model), **measures.OPTIONS)
        trained: nn.Module = model
    else:
        told = {"process_group": group, "zero": int(kind == "zero1"), **measures.OPTIONS}
        optimizer = Muon(zoo.param_groups(model), **told)
        trained = DistributedDataParallel(model, process_group=group)
    with pytest.raises(RuntimeError) as error:
        _train_but_one(model, trained, optimizer, clip=kind == "clipped")
    return str(error.value)


def _train_but_one(model: nn.Module, trained: nn.Module, optimizer: Muon, clip: bool) -> None:
    for step in range(4):
        model.zero_grad()
        trained(zoo.tokens()).backward()
        if dist.get_rank() == 1 and step == 1:
            continue
        if clip:
            optimizer.clip_grad_norm_(1.0)
        optimizer.step()


@pytest.mark.parametrize("kind", ["ddp", "zero1", "fsdp2", "clipped"])
def test_a_rank_that_skips_a_step_ends_all_with_an_error(kind: str) -> None:
    case = functools.partial(skips_a_step, kind)
    outcome = run(2, {"skips": case}, timeout=60, grace=30)["skips"]
    assert outcome.errors == (None, None), outcome.report()
    assert "skipped this step" in outcome.values[0]


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


@pytest.mark.parametrize(("world_size", "case"), CASES.ids())
def test_ranks_are_told(world_size: int, case: str, ranks: Ranks) -> None:
    values = ranks.outcome(world_size, case).check()
    if not case.startswith("tells_what"):
        assert values == (None,) * world_size
        return
    said = DIFFERENT[case.split("-", 1)[1]][1]
    for message in values:
        assert message == values[0]
        assert said in message
        assert "nothing was changed" in message
