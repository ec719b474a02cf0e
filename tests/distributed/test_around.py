"""Around the step, on several ranks: clipping, scalers, what is not finite or not there, and models
as FSDP2, DDP and tensor parallelism train them.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

from muonkit import Muon, ddp_reduce_scatter_hook
from muonkit.distributed import ddp_hook
from tests.helpers import internals, measures, zoo
from tests.helpers.measures import (
    EXACT,
    assert_equals_one_process,
    assert_unchanged,
    bits,
    unchanged,
)
from tests.helpers.ranks import Cases, Ranks, counted_collectives

CASES = Cases()

# What activation checkpointing puts into names.
WRAPPED = "_checkpoint_wrapped_module."

# One of each kind: what is whole, what is sharded by ZeRO-1, shards, shards on two axes, experts.
KINDS = ["ddp", "zero1", "fsdp2", "fsdp2_tp", "dp_tp_zero1", "ep_fsdp2"]


# --- clipping -------------------------------------------------------------------------------------


def _full_gradients(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: zoo.full_random(f"gradient of {name}", p.shape, 0)
        for name, p in model.named_parameters()
    }


@CASES.on(2)
def sends_adamws_parameters_under_muons_cap() -> None:
    """Each rank updates half of 64 x 8 numbers, 1,024 bytes, and sends them to the other."""
    for cap, buckets in ((None, 1), (256, 4)):
        adamw = {"params": [nn.Parameter(torch.ones(64, 8))], "algorithm": "adamw", "lr": 0.1}
        optimizer = Muon(
            [{"params": [nn.Parameter(torch.ones(4, 6))]}, adamw],
            bytes_in_flight=cap,
            process_group=dist.group.WORLD,
            zero=1,
        )
        (gather,) = (plan for plan in optimizer.plan().plans if not plan.inward)
        assert len(gather.buckets) == buckets


@CASES.on(4, layout=[name for name in zoo.LAYOUTS if name not in ("single", "hsdp_tp")])
def clips_to_the_norm_over_all_ranks(layout: str) -> None:
    model, optimizer = measures.make(layout)
    zoo.set_gradients(model, 0)
    full = _full_gradients(model)
    norm = float(torch.stack([g.double().square().sum() for g in full.values()]).sum().sqrt())
    assert float(optimizer.clip_grad_norm_(2 * norm)) == pytest.approx(norm, rel=EXACT)
    gradients = zoo.assemble({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in gradients.items():
        assert torch.equal(gradient, full[name]), name
    assert float(optimizer.clip_grad_norm_(norm / 4)) == pytest.approx(norm, rel=EXACT)
    gradients = zoo.assemble({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, full[name] / 4, rtol=EXACT, atol=0)


@CASES.on(2, layout=["zero1", "fsdp2"])
def clips_nothing_by_a_norm_that_is_not_finite(layout: str) -> None:
    model, optimizer = measures.make(layout)
    zoo.set_gradients(model, 0)
    if dist.get_rank() == 1:
        zoo.part_of(model.blocks[0].up.weight.grad)[0, 0] = float("nan")
    before = [zoo.part_of(p.grad).clone() for p in model.parameters()]
    with pytest.raises(RuntimeError, match="norm is nan; nothing was clipped"):
        optimizer.clip_grad_norm_(1.0, error_if_nonfinite=True)
    for p, gradient in zip(model.parameters(), before, strict=True):
        assert torch.equal(zoo.part_of(p.grad).nan_to_num(), gradient.nan_to_num())


# --- not finite -----------------------------------------------------------------------------------


def _break_one_rank(model: nn.Module) -> None:
    """An infinity in one entry of a matrix, or of what one rank has of it."""
    if dist.get_rank() == dist.get_world_size() - 1:
        zoo.part_of(model.blocks[0].up.weight.grad).view(-1)[-1] = float("inf")


@CASES.on(4, layout=KINDS)
def skips_on_all_ranks_what_is_not_finite_on_one(layout: str) -> None:
    model, optimizer = measures.make(layout, variant="normuon", nonfinite="skip")
    measures.train(model, optimizer, last=2)
    zoo.set_gradients(model, 77)
    _break_one_rank(model)
    with unchanged(model, optimizer):
        optimizer.step()
    assert optimizer.skipped_steps == 1
    measures.train(model, optimizer, 2)
    assert optimizer.skipped_steps == 1
    assert_equals_one_process(model, optimizer, "normuon")


@CASES.on(4, layout=KINDS)
def raises_on_all_ranks_what_is_not_finite_on_one(layout: str) -> str:
    model, optimizer = measures.make(layout, nonfinite="raise")
    measures.train(model, optimizer, last=2)
    zoo.set_gradients(model, 77)
    _break_one_rank(model)
    with unchanged(model, optimizer), pytest.raises(FloatingPointError) as error:
        optimizer.step()
    measures.train(model, optimizer, 2)
    assert_equals_one_process(model, optimizer)
    return str(error.value)


@CASES.on(2)
def takes_the_strictest_rank_by_the_options_of_all() -> None:
    """One group skips, another raises; each is broken on a rank of its own."""
    first, second = (nn.Parameter(torch.ones(4, 4)) for _ in range(2))
    optimizer = Muon(
        [{"params": [first], "nonfinite": "skip"}, {"params": [second], "nonfinite": "raise"}],
        process_group=dist.group.WORLD,
    )
    for p, rank in ((first, 0), (second, 1)):
        p.grad = torch.full((4, 4), float("nan") if rank == dist.get_rank() else 1.0)
    with pytest.raises(FloatingPointError):
        optimizer.step()
    assert torch.equal(first, torch.ones(4, 4))


# --- GradScaler -----------------------------------------------------------------------------------


def _scaled(model: nn.Module, scaler: Any) -> None:
    """Backward of a scaled loss, on other tokens on every rank of data parallelism."""
    model.zero_grad()
    scaler.scale(model(zoo.tokens())).backward()


@CASES.on(2, 4, layout=["zero1", "fsdp2", "fsdp2_tp"])
def a_scaler_changes_nothing_but_the_scale(layout: str) -> None:
    """By a power of two, gradients are scaled and unscaled exactly."""
    found = []
    for scale in (1.0, 8.0):
        model, optimizer = measures.make(layout)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        for _ in range(2):
            _scaled(model, scaler)
            scaler.step(optimizer)
            scaler.update()
        found.append(bits(model, optimizer))
    for name, tensor in found[0].items():
        assert torch.equal(tensor, found[1][name]), name


@CASES.on(2)
def unscales_gradients_of_partial_sums() -> None:
    """As norms under sequence parallelism have them: redistributed, they are copies."""
    mesh = init_device_mesh("cpu", (2,))
    kept = []
    for scale in (1.0, 1024.0):
        matrix, bias = (
            nn.Parameter(distribute_tensor(t, mesh, [Replicate()]))
            for t in (torch.ones(4, 4) + torch.eye(4), torch.ones(4))
        )
        optimizer = Muon(
            [{"params": [matrix]}, {"params": [bias], "algorithm": "adamw", "lr": 0.1}], lr=0.02
        )
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        scaler.scale(torch.ones(()))  # makes its scale
        for p in (matrix, bias):
            half = torch.eye(4) / 2 if p.ndim == 2 else torch.ones(4) / 2
            p.grad = DTensor.from_local(scale * half, mesh, [Partial()])
        scaler.step(optimizer)
        states = optimizer.state[matrix], optimizer.state[bias]
        kept.append((states[0]["momentum_buffer"].to_local(), states[1]["exp_avg"].to_local()))
    torch.testing.assert_close(kept[1], kept[0], rtol=EXACT, atol=0)


@CASES.on(4, constraint=["hyperball", "relative_update", "radial_brake"])
def a_constraint_goes_by_each_copy_that_is_trained_by_itself(constraint: str) -> None:
    grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("apart", "shards"))
    copy = grid.get_local_rank("apart")
    drawn = torch.Generator().manual_seed(copy)
    weight = (1 + 9 * copy) * torch.randn(8, 8, generator=drawn, dtype=torch.float64)
    alone = nn.Parameter(weight.clone())
    lies = {"device_mesh": grid["shards"], "placements": [Shard(0)], "src_data_rank": None}
    one = nn.Parameter(distribute_tensor(weight, **lies))
    other = torch.eye(8, dtype=torch.float64)
    shared = nn.Parameter(distribute_tensor(other, grid, [Replicate(), Shard(0)]))
    options: dict[str, Any] = {"lr": 0.1, "constraint": constraint, "ns_dtype": "float64"}
    optimizer, reference = Muon([one, shared], **options), Muon([alone], **options)
    for _ in range(3):
        alone.grad = torch.randn(8, 8, generator=drawn, dtype=torch.float64)
        one.grad = distribute_tensor(alone.grad.clone(), **lies)
        shared.grad = distribute_tensor(other.clone(), grid, [Replicate(), Shard(0)])
        optimizer.step()
        reference.step()
    torch.testing.assert_close(one.detach().full_tensor(), alone.detach(), rtol=1e-12, atol=0)


@CASES.on(2)
def clips_alike_or_not_at_all() -> None:
    rank = dist.get_rank()
    mesh = init_device_mesh("cpu", (2,))
    p = nn.Parameter(distribute_tensor(torch.ones(4, 4), mesh, [Replicate()]))
    optimizer = Muon([p])
    p.grad = distribute_tensor(torch.ones(4, 4), mesh, [Replicate()])
    with pytest.raises(RuntimeError, match=r"max_norm: 1\.0 on rank 0, but max_norm: 2\.0"):
        optimizer.clip_grad_norm_(1.0 + rank)
    if rank:
        p.grad = DTensor.from_local(torch.ones(4, 4) / 2, mesh, [Partial()])
    with pytest.raises(RuntimeError, match=r"the gradient of parameter 0"):
        optimizer.clip_grad_norm_(1.0)


@CASES.on(2, layout=["zero1", "fsdp2"], unscaled_before=[False, True])
def unscales_once(layout: str, unscaled_before: bool) -> None:
    model, optimizer = measures.make(layout)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    _scaled(model, scaler)
    gradient = zoo.part_of(model.blocks[0].proj.weight.grad).clone()
    if unscaled_before:
        scaler.unscale_(optimizer)
    scaler.step(optimizer)
    momentum = zoo.part_of(optimizer.state[model.blocks[0].proj.weight]["momentum_buffer"])
    mine = gradient[: len(momentum)] if dist.get_rank() == 0 else gradient[-len(momentum) :]
    torch.testing.assert_close(momentum, 0.1 * mine / 4, rtol=EXACT, atol=0)


@CASES.on(4, layout=["zero1", "fsdp2", "fsdp2_tp"])
def a_scaler_skips_on_all_ranks_or_on_none(layout: str) -> tuple[float, bool]:
    """The scale of this rank after it, and whether the ranks' scales differed."""
    model, optimizer = measures.make(layout)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    measures.train(model, optimizer, last=2)
    _scaled(model, scaler)
    _break_one_rank(model)
    with unchanged(model, optimizer):
        scaler.step(optimizer)
    assert optimizer.skipped_steps == 1
    scaler.update()
    scales: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(scales, scaler.get_scale())
    differ = len(set(scales)) > 1
    _scaled(model, scaler)
    if differ:
        with (
            unchanged(model, optimizer),
            pytest.raises(
                RuntimeError, match=r"the gradients' scale: 8\.0 on rank.* 4\.0"
            ) as error,
        ):
            scaler.step(optimizer)
        assert "take the smallest" in str(error.value)
        # What the error says.
        scale = torch.tensor(scaler.get_scale())
        dist.all_reduce(scale, dist.ReduceOp.MIN)
        scaler.update(scale.item())
        _scaled(model, scaler)
    before = bits(model, optimizer)
    scaler.step(optimizer)
    assert not torch.equal(bits(model, optimizer)["blocks.0.up.bias"], before["blocks.0.up.bias"])
    return scaler.get_scale(), differ


# --- no gradient ----------------------------------------------------------------------------------

SOME = ("blocks.0.up.weight", "blocks.0.norm1.weight", "blocks.0.experts.down")


@CASES.on(4, layout=KINDS)
def leaves_alone_what_has_no_gradient_anywhere(layout: str) -> None:
    """In the second of three steps only: one plan more, and the momentum goes on after it."""
    found = []
    for which in (layout, "single"):
        model, optimizer = measures.make(which)
        for step, skip in enumerate([(), SOME, ()]):
            zoo.set_gradients(model, step, skip)
            before = bits(model, optimizer)
            optimizer.step()
            after = bits(model, optimizer)
            for name, tensor in after.items():
                if any(name.endswith(some) for some in skip):
                    assert torch.equal(tensor, before[name]), name
        found.append((model, optimizer))
    (model, optimizer), alone = found
    measures.assert_close(measures.deviations(model, optimizer, measures.tensors_of(*alone)))


@CASES.on(
    4,
    layout=["ddp", "zero1", "fsdp2", "fsdp2_tp", "dp_tp_zero1"],
    name=["blocks.0.up.weight", "blocks.0.norm1.weight", "score.weight"],
)
def refuses_a_gradient_on_some_ranks_only(layout: str, name: str) -> str:
    model, optimizer = measures.make(layout)
    measures.train(model, optimizer, last=2)
    zoo.set_gradients(model, 77, skip=(name,) if dist.get_rank() == 1 else ())
    with unchanged(model, optimizer), pytest.raises(RuntimeError, match="disagree") as error:
        optimizer.step()
    measures.train(model, optimizer, 2)
    assert_equals_one_process(model, optimizer)
    return str(error.value)


@CASES.on(2, layout=["ep_ddp", "ep_fsdp2"])
def takes_experts_without_a_gradient_on_some_ranks(layout: str) -> None:
    """Nobody was routed to this rank's: they stay, and the others' are trained."""
    model, optimizer = measures.make(layout)
    zoo.set_gradients(model, 0, skip=SOME[2:] if dist.get_rank() == 1 else ())
    before = bits(model, optimizer)
    optimizer.step()
    after = bits(model, optimizer)
    stayed = torch.equal(after[SOME[2]], before[SOME[2]])
    assert stayed == (dist.get_rank() == 1)
    assert not torch.equal(after["blocks.0.experts.gate_up"], before["blocks.0.experts.gate_up"])


@CASES.on(2)
def freezes_experts_that_had_a_gradient_on_some_ranks() -> None:
    """Then no rank has a gradient for them, as in the step before only some had none."""
    model = nn.ParameterDict()
    for name, shape in {"experts": (3, 16, 16), "up": (16, 16), "down": (16, 16)}.items():
        model[name] = nn.Parameter(zoo.full_random(name, torch.Size(shape), 0))
    zoo.distribute(model, zoo.mesh((2,), ("ep",)), lambda *_: [Shard(0)])
    experts, *others = model.values()
    optimizer = Muon([{"params": [experts], "view": "experts"}, {"params": others}])
    for p in others if dist.get_rank() == 0 else model.values():
        p.grad = torch.ones_like(p)
    optimizer.step()
    experts.requires_grad_(False).grad = None
    before = bits(model, optimizer)
    optimizer.step()
    after = bits(model, optimizer)
    changed = {name for name in model if not torch.equal(after[name], before[name])}
    assert changed == {"up", "down"}


# --- models as they are trained -------------------------------------------------------------------


def _follow(
    model: nn.Module,
    optimizer: Muon,
    losses: Callable[[int], Tensor],
    twin: nn.Module | None = None,
    steps: int = 2,
) -> None:
    """Train, and compare with one process that is given the same gradients."""
    twin = zoo.Zoo() if twin is None else twin
    its_optimizer = Muon(zoo.param_groups(twin), **measures.OPTIONS)
    untrained = {name: p.detach().clone() for name, p in twin.named_parameters()}
    mine = {name.replace(WRAPPED, ""): p for name, p in model.named_parameters()}
    for step in range(steps):
        model.zero_grad()
        losses(step).backward()
        gradients = {}
        for name, p in mine.items():
            gradient = p.grad
            assert gradient is not None, name
            if isinstance(p, DTensor):
                gradient = gradient.redistribute(placements=p.placements)
            gradients[name] = gradient
        gradients = zoo.assemble(gradients)
        for name, p in twin.named_parameters():
            p.grad = gradients[name].to(p.dtype)
        optimizer.step()
        its_optimizer.step()
    parameters = zoo.assemble({name: p.detach() for name, p in mine.items()})
    for name, p in twin.named_parameters():
        assert zoo.deviation(parameters[name], p.detach()) <= EXACT, name
        assert not torch.equal(p, untrained[name]), name


def _fsdp2(**options: Any) -> tuple[nn.Module, Muon]:
    model = zoo.Zoo()
    zoo.fsdp(model, zoo.mesh((dist.get_world_size(),), ("dp",)), **options)
    return model, Muon(zoo.param_groups(model), **measures.OPTIONS)


def _own_tokens(step: int) -> Tensor:
    return zoo.tokens(seed=100 * step + dist.get_rank())


@CASES.on(2, reshard=[True, False])
def trains_with_reshard_after_forward(reshard: bool) -> None:
    model, optimizer = _fsdp2(reshard_after_forward=reshard)
    _follow(model, optimizer, lambda step: model(_own_tokens(step)))


@CASES.on(2)
def trains_in_mixed_precision() -> None:
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model, optimizer = _fsdp2(mp_policy=policy)
    _follow(model, optimizer, lambda step: model(_own_tokens(step)))
    assert all(p.dtype == torch.float32 for p in model.parameters())


@CASES.on(2)
def trains_offloaded_to_the_cpu() -> None:
    model, optimizer = _fsdp2(offload_policy=CPUOffloadPolicy(pin_memory=False))
    _follow(model, optimizer, lambda step: model(_own_tokens(step)))


@CASES.on(2)
def trains_with_activation_checkpointing() -> None:
    model = zoo.Zoo()
    model.blocks[0] = checkpoint_wrapper(model.blocks[0])
    zoo.fsdp(model, zoo.mesh((2,), ("dp",)))
    optimizer = Muon(zoo.param_groups(model), **measures.OPTIONS)
    _follow(model, optimizer, lambda step: model(_own_tokens(step)))


@CASES.on(2, layout=["fsdp2", "zero1"])
def trains_a_compiled_model(layout: str) -> None:
    model, optimizer = measures.make(layout)
    # The tracing is torch.compile's; to have code made for it would take too long.
    model.blocks[0].compile(backend="eager")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the tracer reads .grad of what is no leaf
        _follow(model, optimizer, lambda step: model(zoo.tokens(seed=step)))


@CASES.on(2)
def trains_from_the_meta_device() -> None:
    with torch.device("meta"):
        model = zoo.Zoo()
    zoo.fsdp(model, zoo.mesh((2,), ("dp",)))
    model.to_empty(device="cpu")
    model.fill()
    model.head.weight = model.embed.weight
    optimizer = Muon(zoo.param_groups(model), **measures.OPTIONS)
    _follow(model, optimizer, lambda step: model(_own_tokens(step)))


class Sequence(nn.Module):
    """A norm over a sequence that the ranks share, and two products."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(zoo.DIM)
        self.up, self.down = nn.Linear(zoo.DIM, zoo.HIDDEN), nn.Linear(zoo.HIDDEN, zoo.DIM)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(nn.functional.gelu(self.up(self.norm(x))))


def _sequence_parallel() -> tuple[nn.Module, nn.Module, Muon]:
    torch.manual_seed(5)
    model, twin = Sequence(), Sequence()
    twin.load_state_dict(model.state_dict())
    plan = {
        "norm": SequenceParallel(),
        "up": ColwiseParallel(input_layouts=Shard(1)),
        "down": RowwiseParallel(output_layouts=Shard(1)),
    }
    parallelize_module(model, zoo.mesh((dist.get_world_size(),), ("tp",)), plan)
    return model, twin, Muon(zoo.param_groups(model), **measures.OPTIONS)


def _part_of_the_sequence(model: nn.Module, step: int) -> Tensor:
    x = zoo.full_random("x", torch.Size((2, 8, zoo.DIM)), step)
    return model(x.chunk(dist.get_world_size(), 1)[dist.get_rank()]).square().sum()


@CASES.on(2)
def trains_norms_of_a_shared_sequence() -> str:
    """Their gradients are sums of what the ranks have."""
    model, twin, optimizer = _sequence_parallel()
    _follow(model, optimizer, lambda step: _part_of_the_sequence(model, step), twin)
    return str(model.norm.weight.grad.placements)


@CASES.on(2)
def clips_the_norm_of_sums() -> None:
    model, twin, optimizer = _sequence_parallel()
    _part_of_the_sequence(model, 0).backward()
    x = zoo.full_random("x", torch.Size((2, 8, zoo.DIM)), 0)
    twin(x).square().sum().backward()
    expected = float(nn.utils.clip_grad_norm_(twin.parameters(), 1.0))
    # Sums over the sequence in another order.
    assert float(optimizer.clip_grad_norm_(1.0)) == pytest.approx(expected, rel=1e-5)
    gradients = zoo.assemble({name: p.grad for name, p in model.named_parameters()})
    for name, p in twin.named_parameters():
        assert zoo.deviation(gradients[name], p.grad) <= 1e-5, name


@CASES.on(2)
def refuses_a_sum_that_some_ranks_lack() -> str:
    model, _, optimizer = _sequence_parallel()
    _part_of_the_sequence(model, 0).backward()
    if dist.get_rank() == 1:
        model.norm.weight.grad = None
    with unchanged(model, optimizer), pytest.raises(RuntimeError, match="disagree") as error:
        optimizer.step()
    return str(error.value)


# --- accumulation, and DDP's hook -----------------------------------------------------------------


def _wrapped(zero: int, hook: bool) -> tuple[nn.Module, Muon, nn.Module]:
    model = zoo.Zoo()
    optimizer = Muon(
        zoo.param_groups(model), **measures.OPTIONS, process_group=dist.group.WORLD, zero=zero
    )
    wrapped = DistributedDataParallel(model)
    if hook:
        wrapped.register_comm_hook(optimizer, ddp_reduce_scatter_hook)
    return model, optimizer, wrapped


def _accumulate(model: nn.Module, unsynced: Callable[[], Any], micro: int) -> None:
    """Two batches of this rank's own; the first is not sent to anybody."""
    with unsynced():
        (model(_own_tokens(micro)) / 2).backward()
    (model(_own_tokens(micro + 1)) / 2).backward()


def _mean_gradients(steps: int) -> list[dict[str, Tensor]]:
    """What one process has of the same batches, by step."""
    found = []
    for step in range(steps):
        twin, size = zoo.Zoo(), dist.get_world_size()
        for micro in (2 * step, 2 * step + 1):
            for rank in range(size):
                (twin(zoo.tokens(seed=100 * micro + rank)) / (2 * size)).backward()
        found.append({name: p.grad for name, p in twin.named_parameters()})
    return found


@CASES.on(2, how=["ddp", "zero1", "hook", "fsdp2"])
def orthogonalizes_once_for_all_micro_batches(how: str) -> None:
    if how == "fsdp2":
        wrapped, optimizer = _fsdp2()
        model = wrapped

        @contextlib.contextmanager
        def unsynced() -> Iterator[None]:
            model.set_requires_gradient_sync(False)
            yield
            model.set_requires_gradient_sync(True)
    else:
        model, optimizer, wrapped = _wrapped(int(how != "ddp"), how == "hook")
        unsynced = wrapped.no_sync
    (expected,) = _mean_gradients(1)
    with internals.counted_orthogonalizations() as counted:
        _accumulate(wrapped, unsynced, 0)
        assert not counted
        optimizer.step()
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, sum(counted))
    assert sum(everyone) == sum(optimizer.plan().traffic().matrices) == 21
    for name, p in model.named_parameters():
        momentum = optimizer.state[p].get("momentum_buffer")
        if momentum is None:
            continue
        whole = expected[name] * (1 - measures.OPTIONS["momentum"])
        got = zoo.assemble({name: momentum})[name]
        assert zoo.deviation(got, whole) <= 1e-5, name  # sums over tokens in another order


@CASES.on(2, 4)
def the_hook_leaves_gradients_where_the_state_lives() -> None:
    (without, _, _), (model, optimizer, _) = runs = [_wrapped(1, hook) for hook in (False, True)]
    for _, _, wrapped in runs:
        _accumulate(wrapped, wrapped.no_sync, 0)
    for (name, p), q in zip(model.named_parameters(), without.parameters(), strict=True):
        state = optimizer.state[p]
        here = torch.zeros_like(p, dtype=torch.bool)
        zoo.local_part(here, state.get("momentum_buffer", state.get("exp_avg"))).fill_(True)
        assert not p.grad[~here].any(), name
        # Sums over the ranks in another order.
        torch.testing.assert_close(p.grad[here], q.grad[here], rtol=1e-5, atol=1e-7)
    norms = [float(optimizer.clip_grad_norm_(1.0)) for _, optimizer, _ in runs]
    assert norms[1] == pytest.approx(norms[0], rel=1e-5)
    assert float(optimizer.clip_grad_norm_(1.0)) == pytest.approx(1.0, rel=1e-5)
    watching = [len(p._backward_hooks) for p in model.parameters()]
    for _ in range(2):
        optimizer.reset_state()
        model.zero_grad()
        _accumulate(runs[1][2], runs[1][2].no_sync, 0)
    assert [len(p._backward_hooks) for p in model.parameters()] == watching


@CASES.on(2)
def the_hook_changes_nothing() -> None:
    """Bit for bit: on two ranks the sum is a + b either way."""
    runs = [_wrapped(1, hook) for hook in (False, True)]
    for step in range(2):
        for _, optimizer, wrapped in runs:
            optimizer.zero_grad()
            _accumulate(wrapped, wrapped.no_sync, 2 * step)
            optimizer.step()
    (without, its_optimizer, _), (model, optimizer, _) = runs
    assert_unchanged(model, optimizer, bits(without, its_optimizer))


class _Queued:
    """Work as NCCL has it: its future is complete at once, its result is there after a wait."""

    def __init__(self, out: Tensor, result: Tensor) -> None:
        self.out, self.result = out, result

    def get_future(self) -> _Queued:
        return self

    def wait(self) -> None:
        self.out.copy_(self.result)

    def then(self, callback: Callable[[Any], Tensor]) -> torch.futures.Future[Tensor]:
        future: torch.futures.Future[Tensor] = torch.futures.Future()
        future.set_result(callback(self))
        return future


@CASES.on(2)
def the_hook_reads_no_result_that_is_only_queued() -> None:
    """Its callback waits for both of its collectives; gloo's would have been there anyway."""
    reduce_scatter, all_reduce = ddp_hook.reduce_scatter, dist.all_reduce

    def scattered(out: Tensor, source: Tensor, group: Any) -> _Queued:
        result = torch.empty_like(out)
        reduce_scatter(result, source, group).wait()
        return _Queued(out, result)

    def reduced(tensor: Tensor, *rest: Any, async_op: bool = False, **named: Any) -> Any:
        if not async_op:
            return all_reduce(tensor, *rest, **named)
        group = named["group"]
        result = tensor.clone()
        all_reduce(result, group=group)
        return _Queued(tensor, result)

    def gradients() -> list[Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
        # What no optimizer has is summed whole.
        optimizer = Muon([model[0].weight], process_group=dist.group.WORLD, zero=1)
        wrapped = DistributedDataParallel(model)
        wrapped.register_comm_hook(optimizer, ddp_reduce_scatter_hook)
        wrapped(torch.full((2, 8), 1.0 + dist.get_rank())).sum().backward()
        return [p.grad for p in model.parameters()]

    expected = gradients()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ddp_hook, "reduce_scatter", scattered)
        patch.setattr(dist, "all_reduce", reduced)
        got = gradients()
    assert all(map(torch.equal, expected, got))


@CASES.on(2, 4)
def the_hook_sends_what_an_optimal_reduce_scatter_sends() -> None:
    size = dist.get_world_size()
    model = nn.Sequential(*(nn.Linear(16, 16, bias=False) for _ in range(3)))
    optimizer = Muon(model.parameters(), process_group=dist.group.WORLD, zero=1)
    wrapped = DistributedDataParallel(model)
    wrapped.register_comm_hook(optimizer, ddp_reduce_scatter_hook)
    with counted_collectives() as calls:
        wrapped(torch.ones(2, 16)).sum().backward()
    assert {name for name, _ in calls} <= {"reduce_scatter_single", "reduce_scatter_tensor"}
    assert sum(sent for _, sent in calls) == 3 * 16 * 16 * 4 * (size - 1) // size


def _zero_model(model: nn.Module) -> None:
    for p in model.parameters():
        p.grad = None


ZEROED: dict[str, Callable[[nn.Module, Muon], None] | None] = {
    "none": lambda model, optimizer: optimizer.zero_grad(),
    "zeros": lambda model, optimizer: optimizer.zero_grad(set_to_none=False),
    "model": lambda model, optimizer: _zero_model(model),
    "not": None,
}


@CASES.on(2, zeroed=list(ZEROED), steps=[True, False])
def the_hook_refuses_to_add_to_what_it_has_averaged(zeroed: str, steps: bool) -> None:
    """Two backward passes without no_sync, with a step between them or without."""
    model, optimizer, wrapped = _wrapped(1, hook=True)
    wrapped(_own_tokens(0)).backward()
    if steps:
        optimizer.step()
    zero = ZEROED[zeroed]
    if zero is None:
        with pytest.raises(RuntimeError, match=r"has averaged.*no_sync"):
            wrapped(_own_tokens(1)).backward()
        return
    zero(model, optimizer)
    _accumulate(wrapped, wrapped.no_sync, 1)
    optimizer.step()


@CASES.on(2)
def the_hook_divides_before_it_sums() -> None:
    """As DDP does it: the mean of two float16 gradients of 40,000, whose sum is infinite."""
    model = nn.Linear(8, 8).half()
    p, b = model.weight, model.bias
    groups = [{"params": [p]}, {"params": [b], "algorithm": "adamw", "lr": 0.1}]
    optimizer = Muon(groups, process_group=dist.group.WORLD, zero=1)
    wrapped = DistributedDataParallel(model)
    wrapped.register_comm_hook(optimizer, ddp_reduce_scatter_hook)
    wrapped(torch.full((1, 8), 40000.0, dtype=torch.float16)).backward(
        torch.full((1, 8), 1.0, dtype=torch.float16)
    )
    assert set(b.grad.unique().tolist()) <= {0.0, 1.0}
    assert set(p.grad.unique().tolist()) == {0.0, 40000.0}


@CASES.on(2)
def the_hook_refuses_an_optimizer_that_needs_whole_gradients() -> str:
    _, _, wrapped = _wrapped(0, hook=True)
    with pytest.raises(Exception, match="zero=1") as error:
        wrapped(zoo.tokens()).backward()
    return str(error.value)


# --- the tests ------------------------------------------------------------------------------------


@pytest.mark.sampled
@pytest.mark.parametrize(("world_size", "case"), CASES.ids())
def test_around_the_step(world_size: int, case: str, ranks: Ranks) -> None:
    values = ranks.outcome(world_size, case).check()
    if case.startswith("refuses_a_gradient"):
        name = case.rsplit("-", 1)[1]
        for message in values:
            assert message == values[0]
            assert f"{name}: " in message
            assert "no gradient" in message
            assert "zero times its output" in message
    elif case.startswith("refuses_a_sum"):
        for message in values:
            assert "norm.weight: " in message
            assert "no gradient" in message
    elif case.startswith("raises"):
        assert "a parameter on another rank" in values[0]
        assert "blocks.0.up.weight" in values[-1]
    elif case.startswith("a_scaler_skips"):
        assert {scale for scale, _ in values} == {4.0}
        if "zero1" in case:
            assert all(differed for _, differed in values)
    elif case == "trains_norms_of_a_shared_sequence":
        assert "Partial" in values[0]
    elif "refuses" not in case:
        assert values == (None,) * world_size
