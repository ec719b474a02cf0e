"""What is measured of the optimizer in a layout, on the ranks: for the tests and for the tables.

Every function here is called by all ranks of the world, with the same arguments.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from muonkit import Muon
from muonkit.distributed import exchange
from muonkit.distributed.step_plan import present_gradients
from muonkit.selection import selects
from muonkit.stages import stages_of
from muonkit.state import as_numbers
from muonkit.views import blocks_of
from tests.helpers import internals, sampling, zoo
from tests.helpers.ranks import counted_collectives
from tests.helpers.stages import AnyStage, stage_options

# Large steps: whatever goes wrong is to be seen in the parameters. Products in float32 on every
# machine, so that a deviation is not the rounding of bf16 products.
OPTIONS: dict[str, Any] = {
    "lr": 0.1,
    "weight_decay": 0.1,
    "momentum": 0.9,
    "ns_dtype": "float32",
}
# A fault in what a step keeps shows in the one after it, and one of resuming in the last of three.
STEPS = 5 if sampling.is_whole() else 3
# Of one tensor's largest magnitude, after at most five steps: a few roundings of float32.
EXACT = 1e-6
# Where products are taken in another order: O has the momentum's rounding, 6e-8, times the slope of
# the polynomial at its smallest singular values, at most 3.4445^5 = 485: 2.9e-5.
STEEPEST = 3e-5


def limit(kind: str) -> float:
    """The largest deviation of one kind of tensor. A variance is a mean of squares, which have
    twice the relative rounding.
    """
    return 2 * EXACT if kind == "variance" else EXACT


def assert_close(apart: Mapping[str, float | tuple[float, str]]) -> None:
    """Every kind of tensor is within its own limit.

    Args:
        apart: by kind the largest deviation, and whose it is where that is known.
    """
    for kind, found in apart.items():
        far = found[0] if isinstance(found, tuple) else found
        assert far <= limit(kind), (kind, found)


@dataclass(frozen=True)
class Parity:
    """One layout against one process, as one rank sees it.

    Attributes:
        parameters, momentum, variance: largest deviation over largest magnitude of each tensor;
            momentum and variance are AdamW's moments too, variance is 0 where there is none.
        worst: the parameter that deviates most.
        sent, planned: bytes that this rank sent in one step, to each other rank.
        orthogonalized, planned_matrices: by this rank in one step.
        matrices: of the whole model.
        held: elements of Muon's momentum on this rank, over those of all its parameters.
    """

    parameters: float
    momentum: float
    variance: float
    worst: str
    sent: dict[int, int]
    planned: dict[int, int]
    orthogonalized: int
    planned_matrices: int
    matrices: int
    held: float

    @property
    def apart(self) -> dict[str, float]:
        """The deviations, by kind."""
        return {kind: getattr(self, kind) for kind in ("parameters", "momentum", "variance")}


def make(layout: str, blocks: int = 1, seed: int = 0, **options: Any) -> tuple[nn.Module, Muon]:
    """The zoo in a layout and its optimizer."""
    model, told = zoo.build(layout, seed, blocks)
    return model, Muon(zoo.param_groups(model), **{**OPTIONS, **options, **told})


def train(model: nn.Module, optimizer: Muon, first: int = 0, last: int = STEPS) -> None:
    for step in range(first, last):
        zoo.set_gradients(model, step)
        optimizer.step()


def tensors_of(model: nn.Module, optimizer: Muon) -> dict[str, dict[str, Tensor]]:
    """Parameters, momenta and variances (AdamW's moments among them), by name."""
    found: dict[str, dict[str, Tensor]] = {"parameters": {}, "momentum": {}, "variance": {}}
    kinds = {
        "momentum_buffer": "momentum",
        "exp_avg": "momentum",
        "second_momentum_buffer": "variance",
        "exp_avg_sq": "variance",
    }
    for name, p in model.named_parameters():
        found["parameters"][name] = p.detach()
        state = optimizer.state[p]
        for key, value in state.items():
            if key in kinds:
                found[kinds[key]][name] = as_numbers(state) if value.dtype == torch.int8 else value
    return found


@functools.cache
def alone(stage: AnyStage, steps: int = STEPS, blocks: int = 1) -> dict[str, dict[str, Tensor]]:
    """What `tensors_of` one process is after these steps."""
    model, optimizer = make("single", blocks, **stage_options(stage))
    train(model, optimizer, last=steps)
    return tensors_of(model, optimizer)


def deviations(
    model: nn.Module, optimizer: Muon, expected: dict[str, dict[str, Tensor]]
) -> dict[str, tuple[float, str]]:
    """For each kind of tensor the largest deviation, and whose it is.

    Raises:
        AssertionError: copies on several ranks differ in a bit.
    """
    mine = tensors_of(model, optimizer)
    assert {kind: set(some) for kind, some in mine.items()} == {
        kind: set(some) for kind, some in expected.items()
    }
    full = zoo.assemble(
        {f"{kind} {name}": t for kind, some in mine.items() for name, t in some.items()}
    )
    return {
        kind: max(
            ((zoo.deviation(full[f"{kind} {name}"], t), name) for name, t in some.items()),
            default=(0.0, ""),
        )
        for kind, some in expected.items()
    }


def parity(layout: str, stage: AnyStage = "plain", blocks: int = 1, **options: Any) -> Parity:
    """Train `STEPS` steps and compare; the last one is counted."""
    model, optimizer = make(layout, blocks, **stage_options(stage), **options)
    check_state(model, optimizer)
    train(model, optimizer, last=STEPS - 1)
    sums = sums_of(optimizer)
    with internals.counted_orthogonalizations() as counted, sent_bytes(sums) as sent:
        train(model, optimizer, STEPS - 1)
    check_state(model, optimizer)
    plan, me = optimizer.plan(), dist.get_rank()
    planned: Counter[int] = Counter()
    for way in plan.messages(me).values():
        planned.update(way)
    traffic = plan.traffic()
    # Two accounts of one plan.
    assert sum(planned.values()) == traffic.sent_in[me] + traffic.sent_out[me]
    apart = deviations(model, optimizer, alone(stage, blocks=blocks))
    matrices, held = _size(optimizer)
    return Parity(
        **{kind: far for kind, (far, _) in apart.items()},
        worst=apart["parameters"][1],
        sent=dict(sent),
        planned=dict(planned),
        orthogonalized=sum(counted),
        planned_matrices=traffic.matrices[me],
        matrices=matrices,
        held=held,
    )


def sums_of(optimizer: Muon) -> int:
    """How often a step adds up norms over the ranks, of weights and of lines: for each bucket."""
    times = 0
    group = next(each for each in optimizer.param_groups if each["algorithm"] == "muon")
    for each in stages_of(group).constraint:
        times = max(times, 1 if each.target is None else 2)
    times += selects(group)
    if not times:
        return 0
    planned = optimizer._planned_step(present_gradients(optimizer.param_groups))
    return times * sum(len(s.buckets) for group in planned.sharded_groups for s in group)


# --- against one process, and against before ------------------------------------------------------


def bits(model: nn.Module, optimizer: Muon) -> dict[str, Tensor]:
    """A copy of all that this rank has: parameters and state, the number of steps included."""
    found = {name: p.detach() for name, p in model.named_parameters()}
    for name, p in model.named_parameters():
        found |= {f"{key} of {name}": value for key, value in optimizer.state[p].items()}
    return {name: zoo.part_of(tensor).clone() for name, tensor in found.items()}


def assert_unchanged(model: nn.Module, optimizer: Muon, before: dict[str, Tensor]) -> None:
    for name, tensor in bits(model, optimizer).items():
        assert torch.equal(tensor, before[name]), name


@contextlib.contextmanager
def unchanged(model: nn.Module, optimizer: Muon) -> Iterator[None]:
    before = bits(model, optimizer)
    yield
    assert_unchanged(model, optimizer, before)


def assert_equals_one_process(model: nn.Module, optimizer: Muon, stage: AnyStage = "plain") -> None:
    assert_close(deviations(model, optimizer, alone(stage)))


# --- checkpoints --------------------------------------------------------------------------------

SAVED_AFTER = 2 if sampling.is_whole() else 1


def checkpoint(model: nn.Module, optimizer: Muon) -> dict[str, Any]:
    """All of both, as torch.distributed.checkpoint wants it."""
    parameters, state = get_state_dict(model, optimizer)
    return {"model": parameters, "optimizer": state}


@contextlib.contextmanager
def _alone_or_not() -> Iterator[dict[str, Any]]:
    """What torch.distributed.checkpoint is told; it warns of one process even then."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        yield {"no_dist": not dist.is_initialized()}


def write(model: nn.Module, optimizer: Muon, folder: Path) -> None:
    with _alone_or_not() as options:
        dcp.save(checkpoint(model, optimizer), checkpoint_id=folder, **options)


def save(folder: Path, layout: str, stage: AnyStage = "plain") -> None:
    """The first steps in this layout, and a checkpoint."""
    model, optimizer = make(layout, **stage_options(stage))
    train(model, optimizer, last=SAVED_AFTER)
    write(model, optimizer, folder)


def load(folder: Path, layout: str, stage: AnyStage = "plain") -> tuple[nn.Module, Muon]:
    """What is in a checkpoint, in this layout: of a run that was made with other numbers."""
    model, optimizer = make(layout, seed=1, lr=0.7, **stage_options(stage))
    train(model, optimizer, last=1)  # state of its own, all of which has to go
    state = checkpoint(model, optimizer)
    with _alone_or_not() as options:
        dcp.load(state, checkpoint_id=folder, **options)
    set_state_dict(
        model,
        optimizer,
        model_state_dict=state["model"],
        optim_state_dict=state["optimizer"],
    )
    return model, optimizer


def stop_over(folder: Path, to: Path, layout: str, stage: AnyStage = "plain") -> None:
    """Load, take one step, and save."""
    model, optimizer = load(folder, layout, stage)
    train(model, optimizer, SAVED_AFTER, SAVED_AFTER + 1)
    write(model, optimizer, to)


def resumed(
    folder: Path, layout: str, stage: AnyStage = "plain", done: int = SAVED_AFTER
) -> dict[str, float]:
    """Load, take the steps that are left, and compare with one process that never stopped."""
    model, optimizer = load(folder, layout, stage)
    check_state(model, optimizer)
    train(model, optimizer, done)
    apart = deviations(model, optimizer, alone(stage))
    return {kind: far for kind, (far, _) in apart.items()}


def _size(optimizer: Muon) -> tuple[int, float]:
    """How many matrices Muon has, and which part of its momentum is here."""
    matrices = whole = here = 0
    for group in optimizer.param_groups:
        for p in group["params"] if group["algorithm"] == "muon" else []:
            matrices += sum(block.batch for block in blocks_of(group["view"], tuple(p.shape)))
            whole += p.numel()
            here += zoo.part_of(optimizer.state[p]["momentum_buffer"]).numel()
    return matrices, here / whole


def check_identity(model: nn.Module, optimizer: Muon, blocks: bool = False) -> None:
    """`to_params` of `to_owners` is the identity, bit by bit: of the parameters themselves.

    Args:
        blocks: in a step of blocks (`period`).

    Raises:
        AssertionError: it is not.
    """
    for p in model.parameters():
        p.grad = p.detach().clone()
    work = [(group, group["params"]) for group in optimizer.param_groups]
    present = present_gradients(optimizer.param_groups)
    planned = optimizer._planned_step(present, [blocks] * len(work))
    own, shared = optimizer._batches(work, planned)
    for _, batch in [*shared, *own]:
        stacks = [torch.stack(shards.grads) for shards in batch.momentum_shards]
        owned = batch.to_owners(stacks).wait()
        back = batch.to_params(owned).wait()
        for shards, pieces in zip(batch.param_shards, back, strict=True):
            for p, piece in zip(shards.params, pieces, strict=True):
                assert torch.equal(p, piece), shards[1:]


class _Collectives(TorchDispatchMode):
    """Counts every collective by its operation, also those that a DTensor calls by itself.

    (As torch's `CommDebugMode`, which takes as long as the step that it watches.)
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if DTensor in types:
            return NotImplemented  # what it is made of comes here afterwards
        if "c10d" in func.namespace:
            self.counts[str(func.overloadpacket)] += 1
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def sent_bytes(sums: int = 0) -> Iterator[Counter[int]]:
    """Bytes to each other rank in one step inside, of ranks that are the whole world.

    Args:
        sums: how often norms are added up over the ranks.

    Raises:
        AssertionError: padding of a message, or any communication that is neither an exchange, nor
            one of these sums, nor the one of three numbers by which ranks compare their plans.
    """
    sent: Counter[int] = Counter()
    calls = gathers = 0
    original, gather = dist.all_to_all_single, exchange.all_gather

    def gathering(output: Tensor, input: Tensor, group: dist.ProcessGroup) -> Any:
        nonlocal gathers
        gathers += 1
        for rank in range(dist.get_world_size()):
            if rank != dist.get_rank():
                sent[rank] += input.numel() * input.element_size()
        return gather(output, input, group)

    def counting(
        output: Tensor, input: Tensor, into: list[int], out_of: list[int], **options: Any
    ) -> Any:
        nonlocal calls
        calls += 1
        assert (len(output), len(input)) == (sum(into), sum(out_of)), "padding"
        for rank, elements in enumerate(out_of):
            if elements and rank != dist.get_rank():
                sent[rank] += elements * input.element_size()
        return original(output, input, into, out_of, **options)

    with (
        counted_collectives() as named,
        mock.patch.object(dist, "all_to_all_single", counting),
        mock.patch.object(exchange, "all_gather", gathering),
        _Collectives() as every,
    ):
        yield sent
    assert len(named) == gathers, named
    assert {name for name, _ in named} <= {"all_gather_single", "all_gather_into_tensor"}, named
    expected = {"c10d.alltoall_base_": calls, "c10d.allreduce_": 1 + sums}
    expected["c10d._allgather_base_"] = gathers
    assert every.counts == +Counter(expected), every.counts


def check_state(model: nn.Module, optimizer: Muon) -> None:
    """State is there, in logical shapes; a DTensor's is one on the same ranks.

    Raises:
        AssertionError: it is not.
    """
    for name, p in model.named_parameters():
        state = optimizer.state[p]
        assert state, name
        for key, value in state.items():
            if key == "step":
                continue
            assert value.ndim == p.ndim, (name, key)
            if key not in ("second_momentum_buffer", "momentum_scale"):
                assert value.shape == p.shape, (name, key)
            if isinstance(p, DTensor):
                assert isinstance(value, DTensor), (name, key)
