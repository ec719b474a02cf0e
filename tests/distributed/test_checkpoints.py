"""Checkpoints: saved under one layout, loaded under any other, and the run goes on as if it had
never stopped.
"""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor

from muonkit import Muon
from tests.helpers import measures, sampling, zoo
from tests.helpers import pipeline as stages
from tests.helpers.ranks import Cases, Outcome, Ranks, once, run, shared_folder

CASES = Cases()


# --- every layout to every other ------------------------------------------------------------------


class Place(NamedTuple):
    """A number of ranks and a layout on them."""

    ranks: int
    layout: str

    def __str__(self) -> str:
        return f"{self.layout}@{self.ranks}"


ALONE = Place(1, "single")
FSDP2_TP, ZERO1 = Place(4, "fsdp2_tp"), Place(2, "zero1")
PLACES = [
    ALONE,
    ZERO1,
    Place(4, "ddp"),
    Place(4, "hsdp"),
    FSDP2_TP,
    Place(4, "dp_tp_zero1"),
    Place(4, "ep_fsdp2_of_experts"),
]


class Trip(NamedTuple):
    """From the checkpoint of one place to the run that goes on at another."""

    variant: str
    saved: Place
    loaded: Place

    def __str__(self) -> str:
        return f"{self.variant}-{self.saved}-{self.loaded}"

    def folder(self, base: Path) -> Path:
        return base / f"{self.variant}-{self.saved}"


# A checkpoint does not say where it comes from: all of them are loaded in one process, and one of
# them in all places (in a whole run in two places, and two of them; benchmarks/layouts.py has the
# rest). NorMuon's has the plain variant's state, and one tensor more.
TRIPS = [
    Trip("normuon", saved, loaded)
    for saved in PLACES
    for loaded in PLACES
    if saved == FSDP2_TP
    or loaded == ALONE
    or (saved == ALONE and loaded in (ZERO1, FSDP2_TP))
    or (sampling.is_whole() and (saved == ALONE or loaded == ZERO1))
] + [
    Trip(variant, FSDP2_TP, loaded)
    for variant in ("plain", "nordion2")
    for loaded in (ALONE, ZERO1, FSDP2_TP)
]
STOPOVER = "by way of two ranks"


def travel(base: Path, trips: list[Trip]) -> dict[str, Outcome]:
    """Save everywhere, load everywhere: the deviations of every trip, by its name.

    Also one with a stopover: the first steps on FSDP2 x TP, the next on two ranks of DDP with
    ZeRO-1, the last ones on one process.
    """
    variants = sorted({trip.variant for trip in trips})
    saves: dict[int, dict[str, Any]] = {1: {}, 2: {}, 4: {}}
    loads: dict[int, dict[str, Any]] = {1: {}, 2: {}, 4: {}}
    for trip in trips:
        folder, (ranks, layout) = trip.folder(base), trip.saved
        saves[ranks][folder.name] = functools.partial(measures.save, folder, layout, trip.variant)
        loads[trip.loaded.ranks][str(trip)] = functools.partial(
            measures.resumed, folder, trip.loaded.layout, trip.variant
        )
    for variant in variants:
        first = Trip(variant, FSDP2_TP, ZERO1).folder(base)
        second = base / f"{variant}-stopover"
        loads[2][f"{variant}-stops"] = functools.partial(
            measures.stop_over, first, second, ZERO1.layout, variant
        )
        loads[1][f"{variant}-{STOPOVER}"] = functools.partial(
            measures.resumed, second, ALONE.layout, variant, done=measures.SAVED_AFTER + 1
        )
    outcomes: dict[str, Outcome] = {}
    for ranks, cases in ((1, saves[1]), (2, saves[2]), (4, saves[4] | loads[4]), (2, loads[2])):
        outcomes |= run(ranks, cases, init=ranks > 1)
    return outcomes | run(1, loads[1], init=False)


@pytest.fixture(scope="module")
def trips(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    folder = tmp_path_factory.mktemp("checkpoints")
    return once(tmp_path_factory, "trips", lambda: travel(folder, TRIPS))


@pytest.mark.parametrize("trip", TRIPS, ids=str)
def test_a_run_goes_on_in_any_layout(trip: Trip, trips: dict[str, Outcome]) -> None:
    trips[trip.folder(Path()).name].check()
    for apart in trips[str(trip)].check():
        measures.assert_close(apart)
        if trip.saved == trip.loaded == ALONE:
            assert max(apart.values()) == 0


@pytest.mark.parametrize("variant", ["plain", "normuon", "nordion2"])
def test_a_run_goes_on_from_rank_to_rank(variant: str, trips: dict[str, Outcome]) -> None:
    trips[f"{variant}-stops"].check()
    for apart in trips[f"{variant}-{STOPOVER}"].check():
        measures.assert_close(apart)


# --- other ways to save ---------------------------------------------------------------------------


def _bits(model: torch.nn.Module, optimizer: Muon) -> dict[str, torch.Tensor]:
    """A copy of all that this rank has."""
    return {
        f"{kind} {name}": zoo.part_of(tensor).detach().clone()
        for kind, some in measures.tensors_of(model, optimizer).items()
        for name, tensor in some.items()
    }


def _assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


@CASES.on(4, layout=["fsdp2_tp", "zero1"])
def saves_while_the_run_goes_on(layout: str) -> None:
    """What is written is what was there at the call, bit for bit, whatever the next steps do."""
    writers = dist.new_group(backend="gloo")
    with shared_folder() as folder:
        model, optimizer = measures.make(layout, variant="normuon")
        measures.train(model, optimizer, last=2)
        before = _bits(model, optimizer)
        saving = dcp.async_save(
            measures.checkpoint(model, optimizer), checkpoint_id=folder, process_group=writers
        )
        measures.train(model, optimizer, 2)
        after = _bits(model, optimizer)
        saving.result()
        model, optimizer = measures.load(folder, layout, "normuon")
    _assert_same(_bits(model, optimizer), before)
    measures.train(model, optimizer, 2)
    _assert_same(_bits(model, optimizer), after)


@CASES.on(2, layout=["ddp", "zero1", "fsdp2"])
def loads_its_own_plain_state_dict(layout: str) -> None:
    model, optimizer = measures.make(layout, variant="normuon")
    measures.train(model, optimizer, last=2)
    with shared_folder() as folder:
        path = folder / f"rank{dist.get_rank()}"
        torch.save([model.state_dict(), optimizer.state_dict()], path)
        saved = torch.load(path, weights_only=layout == "ddp")
    resumed, its_optimizer = measures.make(layout, seed=1, lr=0.7, variant="normuon")
    resumed.load_state_dict(saved[0])
    its_optimizer.load_state_dict(saved[1])
    _assert_same(_bits(resumed, its_optimizer), _bits(model, optimizer))
    for some in ((model, optimizer), (resumed, its_optimizer)):
        measures.train(*some, 2)
    _assert_same(_bits(resumed, its_optimizer), _bits(model, optimizer))


@CASES.on(2, layout=["zero1", "ddp"], variant=["plain", "normuon"])
def takes_its_part_of_what_one_process_saved(layout: str, variant: str) -> None:
    alone, its_optimizer = measures.make("single", variant=variant)
    measures.train(alone, its_optimizer, last=2)
    model, optimizer = measures.make(layout, seed=1, variant=variant)
    model.load_state_dict(alone.state_dict())
    optimizer.load_state_dict(copy.deepcopy(its_optimizer.state_dict()))
    measures.check_state(model, optimizer)
    if layout == "zero1":
        momentum = optimizer.state[model.blocks[0].proj.weight]["momentum_buffer"]
        assert isinstance(momentum, DTensor)
        assert zoo.part_of(momentum).shape == (zoo.DIM / 2, zoo.DIM)
    measures.train(model, optimizer, 2)
    measures.assert_close(measures.deviations(model, optimizer, measures.alone(variant)))


@CASES.on(4)
def refuses_what_other_ranks_left_behind() -> str:
    """The state as it lies on four ranks, for an optimizer of two of them."""
    model, optimizer = measures.make("zero1")
    measures.train(model, optimizer, last=1)
    saved = optimizer.state_dict()
    halves = init_device_mesh("cpu", (2, 2), mesh_dim_names=("other", "dp"))
    fewer, _ = zoo.build("single")
    optimizer = Muon(zoo.param_groups(fewer), process_group=halves["dp"].get_group(), zero=1)
    with pytest.raises(ValueError, match="saved by 4 ranks as it lay on them is loaded by 2") as e:
        optimizer.load_state_dict(saved)
    return str(e.value)


@CASES.on(2, layout=["zero1", "fsdp2"])
def gathers_a_full_state_dict_and_spreads_it(layout: str) -> None:
    """Rank 0 has all of it; the others have nothing, and get their parts from it."""
    model, optimizer = measures.make(layout, variant="normuon")
    measures.train(model, optimizer, last=2)
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    # On a CPU what is not sharded would be the run's own tensors.
    full = copy.deepcopy(tuple(get_state_dict(model, optimizer, options=options)))
    if dist.get_rank():
        assert full == ({}, {})
    else:
        assert not any(isinstance(tensor, DTensor) for tensor in full[0].values())
    resumed, its_optimizer = measures.make(layout, seed=1, lr=0.7, variant="normuon")
    # Not by set_state_dict: with an empty model_state_dict it takes the model for left out, on the
    # ranks that have nothing, and rank 0 waits for them.
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(resumed, full[0], options=options)
    set_optimizer_state_dict(resumed, its_optimizer, full[1], options=options)
    measures.train(resumed, its_optimizer, 2)
    measures.train(model, optimizer, 2)
    _assert_same(_bits(resumed, its_optimizer), _bits(model, optimizer))


# --- by one rank for all --------------------------------------------------------------------------


@CASES.on(2)
def forgets_the_whole_state_where_a_group_is_added() -> None:
    """It has nothing for the new parameters."""
    optimizer = Muon([torch.nn.Parameter(torch.ones(4, 6))], process_group=dist.group.WORLD, zero=1)
    optimizer.consolidate_state_dict()
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(6, 6))]})
    assert sorted(optimizer.state_dict()["state"]) == [0, 1]


@CASES.on(2, layout=["zero1", "fsdp2"])
@CASES.on(4, layout=["hsdp", "fsdp2_tp", "dp_tp_zero1", "ep_fsdp2_of_experts"])
def gathers_the_whole_state_on_one_rank(layout: str) -> None:
    """It is plain, and loaded by one process, or by the same layout, the run goes on."""
    to = 0 if dist.get_world_size() == 2 else 3
    model, optimizer = measures.make(layout, variant="normuon")
    measures.train(model, optimizer, last=2)
    before, parameters = _bits(model, optimizer), zoo.assemble_parameters(model)
    parts = copy.deepcopy(model.state_dict())
    optimizer.consolidate_state_dict(to)
    _assert_same(_bits(model, optimizer), before)
    saved = optimizer.state_dict()
    assert _has_parts(saved) == (dist.get_rank() != to)
    with shared_folder() as folder:
        if dist.get_rank() == to:
            torch.save(saved, folder / "state.pt")
        dist.barrier()
        saved = torch.load(folder / "state.pt", weights_only=True)

    resumed, its_optimizer = measures.make(layout, seed=1, lr=0.7, variant="normuon")
    resumed.load_state_dict(parts)
    its_optimizer.load_state_dict(copy.deepcopy(saved))
    measures.check_state(resumed, its_optimizer)
    _assert_same(_bits(resumed, its_optimizer), before)
    for some in ((model, optimizer), (resumed, its_optimizer)):
        measures.train(*some, 2)
    _assert_same(_bits(resumed, its_optimizer), _bits(model, optimizer))
    assert _has_parts(optimizer.state_dict())  # what was gathered is of another step

    alone, of_one = measures.make("single", seed=1, variant="normuon")
    alone.load_state_dict(parameters, strict=False)  # the tied head is named once
    of_one.load_state_dict(saved)
    measures.train(alone, of_one, 2)
    measures.assert_close(measures.deviations(alone, of_one, measures.alone("normuon")))


@CASES.on(4, rows=[5, 6, 8])
def gathers_what_lies_along_axes_that_were_flattened(rows: int) -> None:
    """torch 2.13's `full_tensor` takes the flat mesh, and is wrong where rows do not divide."""
    both = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    both["dp", "tp"]._flatten("loss")
    values = torch.arange(1.0, rows + 1)[:, None] * torch.tensor([[1.0, -2.0, 3.0]])
    optimizers = []
    for _ in range(2):
        # Replicated over "tp", and by ZeRO-1's word over "dp": the state is cut along both.
        p = torch.nn.Parameter(distribute_tensor(values.clone(), both["tp"], [Replicate()]))
        optimizers.append(Muon([p], momentum=0.0, process_group=both["dp"], zero=1))
    p.grad = p.detach().clone()
    one, other = optimizers[1], optimizers[0]
    one.step()
    one.consolidate_state_dict()
    found = [one.state_dict()]
    dist.broadcast_object_list(found)
    assert torch.equal(found[0]["state"][0]["momentum_buffer"], values)
    other.load_state_dict(found[0])
    for mine, its in zip(one.state.values(), other.state.values(), strict=True):
        assert torch.equal(mine["momentum_buffer"].to_local(), its["momentum_buffer"].to_local())


def _has_parts(state_dict: dict[str, Any]) -> bool:
    return any(
        isinstance(value, DTensor)
        for entry in state_dict["state"].values()
        for value in entry.values()
    )


@CASES.on(2, layout=["zero1", "fsdp2"], way=["state_dict", "get_optimizer_state_dict"])
def refuses_another_ranks_part(layout: str, way: str) -> str:
    """Pitfall 35: a framework saves rank 0's state dict, and every rank loads it."""
    model, optimizer = measures.make(layout, variant="normuon")
    measures.train(model, optimizer, last=2)
    options = StateDictOptions(cpu_offload=True)
    saved = (
        optimizer.state_dict()
        if way == "state_dict"
        else get_state_dict(model, optimizer, options=options)[1]
    )
    with shared_folder() as folder:
        if dist.get_rank() == 0:
            torch.save(saved, folder / "state.pt")
        dist.barrier()
        saved = torch.load(folder / "state.pt", weights_only=True)
    measures.train(model, optimizer, 2, 3)
    before = _bits(model, optimizer)
    if dist.get_rank() == 0:
        optimizer.load_state_dict(saved)
        return "torch.distributed.checkpoint"
    load = (
        functools.partial(optimizer.load_state_dict, saved)
        if way == "state_dict"
        else functools.partial(set_optimizer_state_dict, model, optimizer, saved)
    )
    with pytest.raises(ValueError, match=r"the part of rank 0, and this is rank 1\.") as e:
        load()
    assert "optimizer.consolidate_state_dict()" in str(e.value)
    _assert_same(_bits(model, optimizer), before)
    return str(e.value)


@CASES.on(2)
def refuses_to_gather_on_two_ranks() -> str:
    model, optimizer = measures.make("zero1")
    measures.train(model, optimizer, last=1)
    with pytest.raises(RuntimeError, match=r"the whole state: 0 on rank 0, but .* 1 on"):
        optimizer.consolidate_state_dict(to=dist.get_rank())
    with pytest.raises(ValueError, match="there are ranks 0 to 1"):
        optimizer.consolidate_state_dict(to=2)
    return "torch.distributed.checkpoint"


@CASES.on(2, variant=["plain", "normuon"])
def goes_to_another_number_of_pipeline_stages(variant: str) -> None:
    """Flattened, as torchtitan saves: two stages, and one on each of two ranks, both ways."""
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    own = ("ab", "cd")[dist.get_rank()]
    for saved, loaded in ((own, "abcd"), ("abcd", own)):
        with shared_folder() as folder:
            state = get_optimizer_state_dict(
                *stages.trained(saved, range(2), variant=variant), options=options
            )
            dcp.save(state, checkpoint_id=folder)
            model, optimizer = stages.trained(loaded, range(3), variant=variant)
            expected = stages.trained(loaded, range(2), variant=variant)
            model.load_state_dict(expected[0].state_dict())
            state = get_optimizer_state_dict(model, optimizer, options=options)
            dcp.load(state, checkpoint_id=folder)
            set_optimizer_state_dict(model, optimizer, state, options=options)
            _assert_same(_bits(model, optimizer), _bits(*expected))
            for some in ((model, optimizer), expected):
                stages.train_by_name(*some, [2])
            _assert_same(_bits(model, optimizer), _bits(*expected))


def _saves_a_part(path: Path) -> None:
    model, optimizer = measures.make("zero1")
    measures.train(model, optimizer, last=1)
    if dist.get_rank() == 0:
        torch.save(optimizer.state_dict(), path)


def _refuses_it_alone(path: Path) -> None:
    _, optimizer = measures.make("single")
    for weights_only in (True, False):
        saved = torch.load(path, weights_only=weights_only)
        with pytest.raises(ValueError, match="lies on 2 ranks: it is the part of rank 0, and this"):
            optimizer.load_state_dict(saved)


def test_a_part_is_refused_by_a_process_without_ranks(tmp_path: Path) -> None:
    path = tmp_path / "state.pt"
    run(2, {"saves": functools.partial(_saves_a_part, path)})["saves"].check()
    alone = {"loads": functools.partial(_refuses_it_alone, path)}
    run(1, alone, init=False)["loads"].check()


@pytest.mark.parametrize(("world_size", "case"), CASES.ids())
def test_a_checkpoint(world_size: int, case: str, ranks: Ranks) -> None:
    values = ranks.outcome(world_size, case).check()
    if case.startswith("refuses"):
        assert "torch.distributed.checkpoint" in values[0]
    else:
        assert values == (None,) * world_size
