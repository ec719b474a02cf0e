"""Ranks on machines of different kinds, whose optimizers exchange nothing (plain DDP): where "auto"
is not the same dtype on all of them, copies would drift apart.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor, Shard

from muonkit import Muon, MuonW
from muonkit.distributed.meshes import make_domain
from muonkit.newton_schulz import dtypes as _orthogonalize_dtype
from tests.helpers import internals, zoo
from tests.helpers.ranks import Cases, Ranks, run, shared_folder

CASES = Cases()


@contextlib.contextmanager
def multiplying(dtype: str) -> Iterator[None]:
    """As on a CPU that multiplies fastest in this dtype."""
    found = {
        "amx_bf16": dtype == "bfloat16",
        "amx_held_back": False,
        "avx512_bf16": False,
        "arm_bf16": False,
    }
    before = _orthogonalize_dtype.cpu_capabilities
    try:
        _orthogonalize_dtype.cpu_capabilities = lambda: found  # type: ignore[assignment]
        internals.forget_hardware()
        yield
    finally:
        _orthogonalize_dtype.cpu_capabilities = before
        internals.forget_hardware()


def mixed() -> contextlib.AbstractContextManager[None]:
    return multiplying(["float32", "bfloat16"][dist.get_rank()])


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 96), nn.ReLU(), nn.Linear(96, 96), nn.Linear(96, 4))


def stepped(optimizer: torch.optim.Optimizer, count: int = 1) -> None:
    for _ in range(count):
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad = torch.ones_like(p)
        optimizer.step()


def told(error: pytest.ExceptionInfo[RuntimeError]) -> None:
    answers = ["float32", "bfloat16 (float32 for small matrices)"]
    mine, other = answers[:: 1 - 2 * dist.get_rank()]
    text = str(error.value)
    assert f"is {mine} on rank {dist.get_rank()}" in text, text
    assert f"{other} on rank {1 - dist.get_rank()}:" in text, text
    assert 'ns_dtype="float32"' in text


@CASES.on(2, compiled=[False, True])
def mixed_nodes_are_told_before_anything_is_written(compiled: bool) -> None:
    with mixed():
        optimizer = MuonW(model(), lr=0.1)
        dist.barrier()  # as the first backward pass of DDP: all have made theirs
        params = [p for group in optimizer.param_groups for p in group["params"]]
        before = [p.detach().clone() for p in params]
        if compiled:
            optimizer.step = torch.compile(optimizer.step, backend="eager")  # type: ignore
        for _ in range(2):  # whoever catches it and goes on is told again
            with pytest.raises(RuntimeError) as error:
                stepped(optimizer)
            told(error)
        assert all(torch.equal(a, b) for a, b in zip(before, params, strict=True))
        state = [t for s in optimizer.state.values() for t in s.values() if t.ndim]
        assert state
        assert not any(t.any() for t in state)


@CASES.on(2, compiled=[False, True])
def equal_nodes_step_and_ask_once(compiled: bool) -> None:
    with internals.requests_counted() as requests:
        # A shape that no other case has, where ranks have told different dtypes.
        optimizer = Muon([nn.Parameter(torch.ones(111 + compiled, 99))], lr=0.1)
        if compiled:
            optimizer.step = torch.compile(optimizer.step, backend="eager")  # type: ignore
        dist.barrier()
        stepped(optimizer)
        # A rank's word and count at construction and once more at the first step (the process
        # group might be a new one), and a look at each other answer.
        assert len(requests) <= 6, requests
        del requests[:]
        stepped(optimizer, 3)
        assert not requests


@CASES.on(2)
def nothing_is_refused_where_auto_is_the_same() -> None:
    rank = dist.get_rank()
    with mixed():
        for options in ({"ns_dtype": "float32"}, {"ns_coefficients": "svd"}):
            stepped(MuonW(model(), lr=0.1, **options))
        stepped(MuonW(model(), lr=0.1, ns_coefficients="polar_express"))  # always float32
        stepped(MuonW(model().double(), lr=0.1))  # always float64
        # Stages of a pipeline: nobody's copies.
        stage = nn.Parameter(torch.ones(100, 96))
        optimizer = Muon([(f"stage{rank}.weight", stage)], lr=0.1)
        dist.barrier()
        stepped(optimizer)


@CASES.on(2)
def what_is_compared_is_the_hardware_whatever_the_options() -> None:
    """Equal ranks are not refused for options, nor unequal ones let go on after an edit of them."""
    rank = dist.get_rank()
    with multiplying("bfloat16"):  # with AMX the dtype depends on the shape that is computed
        for number, options in enumerate(
            ({"fraction": [1.0, 0.25][rank]}, {"view": ["matrix", "split(rows=2)"][rank]})
        ):
            group = {"params": [nn.Parameter(torch.ones(128, 130 + number))], **options}
            optimizer = Muon([group], lr=0.1)
            dist.barrier()
            stepped(optimizer)
        optimizer = Muon([nn.Parameter(torch.ones(128, 132))], lr=0.1)
        dist.barrier()
        optimizer.param_groups[0]["fraction"] = 0.25
        stepped(optimizer)
    with mixed():
        optimizer = Muon([nn.Parameter(torch.ones(128, 133))], lr=0.1, ns_dtype="float32")
        dist.barrier()
        stepped(optimizer, 2)
        optimizer.param_groups[0]["ns_dtype"] = "auto"
        some_rank_refuses(optimizer)
        optimizer = Muon([nn.Parameter(torch.ones(64, 134))], lr=0.1)  # small on both
        dist.barrier()
        some_rank_refuses(optimizer)
        thawed = nn.Parameter(torch.ones(128, 136), requires_grad=False)
        optimizer = Muon([thawed], lr=0.1)
        dist.barrier()
        if not rank:  # whoever steps first is told too
            with pytest.raises(RuntimeError) as error:
                stepped(optimizer)
            told(error)
        dist.barrier()
        frozen = nn.Parameter(torch.ones(96, 135), requires_grad=False)
        doubles = nn.Parameter(torch.ones(96, 135, dtype=torch.float64))
        optimizer = Muon([frozen, doubles], lr=0.1)
        dist.barrier()
        doubles.grad = torch.ones_like(doubles)
        optimizer.step()  # frozen, and float64 everywhere


@CASES.on(2)
def a_matrix_on_ranks_is_not_rounded_by_its_companions() -> None:
    """With AMX: whichever of them a rank owns, and however they are laid out."""
    shapes = ((64, 128), (128, 64), (128, 128), (96, 200))
    torch.manual_seed(0)
    gradients = [torch.randn(*shape) for shape in shapes]

    def moved(some: list[torch.Tensor], **options: Any) -> list[torch.Tensor]:
        params = [nn.Parameter(torch.zeros_like(g)) for g in some]
        optimizer = Muon(params, lr=1.0, **options)
        for p, g in zip(params, some, strict=True):
            p.grad = g.clone()
        optimizer.step()
        return [p.detach() for p in params]

    with multiplying("bfloat16"):
        alone = [moved([g])[0] for g in gradients]
        for zero in (0, 1):
            shared = moved(gradients, process_group=dist.group.WORLD, zero=zero)
            for one, other in zip(alone[:2], shared[:2], strict=True):
                assert (one - other).norm() <= 1e-5 * one.norm()


@CASES.on(2)
def ranks_that_share_a_step_compare_it_too() -> None:
    """Where what is computed, a shard's selected rows, has a shape that no rank states."""
    with mixed():
        shard = torch.ones(49, 100)
        mesh = zoo.mesh((2,), ("dp",))
        p = nn.Parameter(DTensor.from_local(shard, mesh, [Shard(0)], run_check=False))
        optimizer = Muon([p], lr=0.1, fraction=0.965, selection="local")
        p.grad = DTensor.from_local(shard, mesh, [Shard(0)], run_check=False)
        with pytest.raises(RuntimeError, match=r'group 0\'s products.*"auto" is'):
            optimizer.step()


@CASES.on(2)
def one_rank_alone_waits_for_nobody() -> None:
    with mixed():
        if dist.get_rank() == 1:
            stepped(Muon([nn.Parameter(torch.ones(105, 99))], lr=0.1), 2)
    dist.barrier()


def some_rank_refuses(optimizer: Muon) -> None:
    """Take a step, which at least one of the ranks refuses."""
    failed = torch.zeros(1)
    try:
        stepped(optimizer)
    except RuntimeError:
        failed += 1
    dist.all_reduce(failed)
    assert failed >= 1


@CASES.on(2)
def added_parameters_are_compared_too() -> None:
    with mixed():
        first = nn.Parameter(torch.ones(104, 97, dtype=torch.float64))
        optimizer = Muon([first], lr=0.1)
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(104, 97))]})
        dist.barrier()
        # What was added is told at the first step; the last to tell it sees the other.
        some_rank_refuses(optimizer)


@CASES.on(2)
def a_process_group_that_comes_later_or_again() -> None:
    rank = dist.get_rank()
    with shared_folder() as folder, mixed():
        dist.barrier()
        dist.destroy_process_group()
        early = Muon([nn.Parameter(torch.ones(109, 98))], lr=0.1)
        _init(folder / "one", rank)
        some_rank_refuses(early)
        # A group of another life: what was told in the first is not held against it.
        dist.destroy_process_group()
        _init(folder / "two", rank)
        with multiplying("float32"):
            optimizer = Muon([nn.Parameter(torch.ones(109, 98))], lr=0.1)
            dist.barrier()
            stepped(optimizer)


def _init(path: Any, rank: int) -> None:
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)


def _plays_a_rank() -> None:
    from torch.testing._internal.distributed.fake_pg import FakeStore

    for store in (FakeStore(), dist.HashStore()):
        dist.init_process_group("fake", store=store, rank=0, world_size=64)
        stepped(MuonW(model(), lr=0.1), 2)
        dist.destroy_process_group()


def test_a_process_that_plays_a_rank_of_many_steps() -> None:
    run(1, [_plays_a_rank], init=False)["_plays_a_rank"].check()


def _has_other_devices() -> None:
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=2)
    # DDP wants no `torch.cuda.set_device`: the current device is another rank's then.
    own = torch.device("cuda", 1)
    assert make_domain(dist.group.WORLD, [0, 1], "cuda", own).device == own
    params = [nn.Parameter(torch.ones(9, 2, device=device)) for device in ("cpu", "meta")]
    with pytest.raises(ValueError, match=r"several devices.* on cpu.* on meta.*an optimizer for"):
        Muon(params, lr=0.1, process_group=dist.group.WORLD)
    assert Muon(params, lr=0.1).plan().ranks == 1
    optimizer = Muon(params[:1], lr=0.1, process_group=dist.group.WORLD)
    with pytest.raises(ValueError, match="several devices"):
        optimizer.add_param_group({"params": params[1:]})
    dist.destroy_process_group()


def test_buffers_are_where_the_parameters_are_and_these_on_one_device() -> None:
    run(1, [_has_other_devices], init=False)["_has_other_devices"].check()


@pytest.mark.parametrize(("world_size", "case"), CASES.ids())
def test_on_ranks(world_size: int, case: str, ranks: Ranks) -> None:
    ranks.outcome(world_size, case).check()
