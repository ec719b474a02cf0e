"""MuonBP over ranks: a float64 reference that cuts as the ranks do, and bytes that were planned."""

from __future__ import annotations

import itertools
import os
from collections import Counter
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import set_state_dict
from torch.distributed.tensor import Shard

from muonkit import Monitor, Muon
from muonkit.period import PERIOD_STEP
from muonkit.scale import SCALES
from muonkit.stages import AFTER, BEFORE, CONSTRAINTS
from muonkit.views import blocks_of
from tests.helpers import internals, measures, zoo
from tests.helpers.ranks import Cases, Ranks, shared_folder

CASES = Cases()
WHOLE = os.environ.get("MUONKIT_TEST_ALL") == "1"

PERIOD, FACTOR, STEPS = 3, 0.5, 5  # whole, two of blocks, whole, one of blocks
LR, DECAY, MOMENTUM = 0.1, 0.1, 0.9
# Of one tensor's largest magnitude, in float64. Measured: 1.2e-15; with adamuon, which divides by
# small entries, 5.4e-11.
EXACT, DIVIDED = 1e-13, 1e-9

CUT = ["fsdp2", "hsdp", "tp", "tp_any_dim", "tp_packed", "fsdp2_tp", "ep_fsdp2_of_experts"]
UNCUT = ["ddp", "zero1"]
LAYOUTS = [*CUT, *UNCUT, "dp_tp_zero1", "dp_tp_zero1_one_mesh", "ep_ddp"]
ON_TWO = [each for each in LAYOUTS if each not in ("hsdp", "dp_tp_zero1_one_mesh")]


def made(layout: str, dtype: torch.dtype = torch.float64, **options: Any) -> tuple[Any, Muon]:
    model = zoo.Zoo(options.pop("seed", 0)).to(dtype)
    told = zoo.LAYOUTS[layout].apply(model)
    given = {"lr": LR, "weight_decay": DECAY, "momentum": MOMENTUM, "period": PERIOD}
    given |= {"block_lr_factor": FACTOR, "adjust_lr_fn": "match_rms_adamw"}
    return model, Muon(zoo.param_groups(model), **{**given, **told, **options})


# --- the reference --------------------------------------------------------------------------------


def stored_parts(model: nn.Module) -> dict[str, list[Tensor]]:
    """For each parameter, which of its entries each rank stores, without any of muonkit's code."""
    mine = {}
    for name, p in model.named_parameters():
        has = torch.zeros(p.numel(), dtype=torch.bool)
        has[zoo.local_part(torch.arange(p.numel()).view(p.shape), p).reshape(-1)] = True
        mine[name] = has.view(p.shape)
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    return {name: [has[name] for has in everyone] for name in mine}


def runs(mask: Tensor) -> list[tuple[int, int]]:
    """The intervals of a dim in which a mask is set."""
    edges = torch.diff(mask.int(), prepend=torch.zeros(1), append=torch.zeros(1)).nonzero()
    return [(int(a), int(b)) for a, b in edges.view(-1, 2)]


def blocks_in(box: tuple[slice, ...], parts: list[Tensor]) -> set[tuple[slice, ...]]:
    """The rectangles of a box that the ranks store each."""
    found = set()
    for has in parts:
        here = has[box]
        if not here.any():
            continue
        along = [
            runs(here.transpose(0, dim).flatten(1).any(1) if here.ndim > 1 else here)
            for dim in range(here.ndim)
        ]
        for intervals in itertools.product(*along):
            found.add(
                tuple(
                    (cut.start + a, cut.start + b)
                    for cut, (a, b) in zip(box, intervals, strict=True)
                )
            )
    return found


def as_matrix(tensor: Tensor) -> Tensor:
    """A view of a matrix of the zoo: one of a stack, or a convolution."""
    return tensor[0] if tensor.ndim == 3 else tensor.flatten(1)


def newton_schulz(U: Tensor) -> Tensor:
    X = U / U.norm() if U.any() else U
    X = X.mT if len(X) > X.shape[1] else X
    for _ in range(5):
        A = X @ X.mT
        X = 3.4445 * X + (-4.7750 * A + 2.0315 * A @ A) @ X
    return X.mT if len(U) > U.shape[1] else X


def reference(model: nn.Module, steps: int, **stages: str) -> dict[str, Tensor]:
    """MuonBP in one process, on the whole parameters of Muon; every block is looped over."""
    parts, before, after, constraint = stored_parts(model), None, None, None
    before = BEFORE[stages["before"]] if "before" in stages else None
    after = AFTER[stages["after"]] if "after" in stages else None
    constraint = CONSTRAINTS[stages["constraint"]] if "constraint" in stages else None
    values = zoo.Zoo(0).double()
    found = {}
    for name, p in values.named_parameters():
        view = next((v for end, v in zoo.VIEWS.items() if name.endswith(end)), None)
        if view is None:
            continue
        W, M, v = p.detach().clone(), torch.zeros_like(p), torch.zeros_like(p)
        for step in range(steps):
            G = zoo.full_random(f"gradient of {name}", p.shape, step).double()
            M.lerp_(G, 1 - MOMENTUM)
            U = G.lerp(M, MOMENTUM)
            old = W.clone()
            for matrix in [box for block in blocks_of(view, p.shape) for box in block.boxes()]:
                whole = tuple(slice(a, b) for a, b in matrix)
                boxes = [whole] if step % PERIOD == 0 else blocks_in(whole, parts[name])
                for box in [
                    tuple(slice(*pair) if isinstance(pair, tuple) else pair for pair in b)
                    for b in boxes
                ]:
                    u = as_matrix(U[box]).clone()
                    if before is not None:
                        before.apply_(u[None], None, 0.0, 0)
                    o = newton_schulz(u)
                    if after is not None:
                        kept = as_matrix(v[box])[None].clone()
                        kept = kept[..., :1] if after.state == "rows" else kept
                        after.apply_(o[None], kept, after.beta2, step + 1)
                        as_matrix(v[box]).copy_(kept[0].expand_as(o))
                    w, before_w = as_matrix(W[box]), as_matrix(old[box])
                    scale = SCALES["match_rms_adamw"](*o.shape)
                    decay = DECAY
                    if constraint is not None and constraint.update is not None:
                        o = o * constraint.update(before_w.norm()[None]) / o.norm()
                        scale = 1.0
                    if constraint is not None and not constraint.decays:
                        decay = 0.0
                    factor = FACTOR if box != whole else 1.0
                    w.mul_(1 - LR * decay).add_(o, alpha=-LR * factor * scale)
                    if constraint is not None and constraint.target is not None:
                        wanted = constraint.target(before_w.norm()[None], w.norm()[None])
                        w.mul_(wanted / w.norm())
        found[name] = W
    return found


def deviation(model: nn.Module, expected: dict[str, Tensor]) -> float:
    ours = {name: p.detach() for name, p in model.named_parameters() if name in expected}
    full = zoo.assemble(ours)
    return max(zoo.deviation(full[name], W) for name, W in expected.items())


@CASES.on(2, layout=ON_TWO if WHOLE else ON_TWO[:2])
@CASES.on(4, layout=LAYOUTS)
def equals_the_reference(layout: str) -> float:
    model, optimizer = made(layout)
    measures.check_state(model, optimizer)
    measures.train(model, optimizer, last=STEPS)
    assert {g[PERIOD_STEP] for g in optimizer.param_groups if g["algorithm"] == "muon"} == {STEPS}
    return deviation(model, reference(model, STEPS))


STAGES = {
    "muoneq": {"before": "muoneq"},
    "normuon": {"after": "normuon"},
    "adamuon": {"after": "adamuon"},
    "muon_plus": {"after": "muon_plus"},
    "hyperball": {"constraint": "hyperball"},
    "relative_update": {"constraint": "relative_update"},
    "radial_brake": {"constraint": "radial_brake"},
}


@CASES.on(4, layout=["fsdp2", "hsdp"] if WHOLE else ["hsdp"], stage=list(STAGES))
@CASES.on(
    4, layout=["fsdp2_tp", "tp_any_dim", "dp_tp_zero1"], stage=[s for s in STAGES if s != "normuon"]
)
def equals_the_reference_with_a_stage(layout: str, stage: str) -> float:
    adamw = {"adamw_lr": 0.01} if "constraint" in STAGES[stage] else {}
    model, optimizer = made(layout, **STAGES[stage], **adamw)
    measures.train(model, optimizer, last=STEPS)
    return deviation(model, reference(model, STEPS, **STAGES[stage]))


# --- what a step sends ----------------------------------------------------------------------------

# Nothing that is cut is sent in a step of blocks; of zoo's "tp" the rest is replicated, and divided
# by cost as ever.
SILENT = ["fsdp2", "hsdp", "tp_any_dim", "fsdp2_tp", "ep_fsdp2", "ep_fsdp2_of_experts"]


@CASES.on(2, 4, layout=SILENT[:1] + SILENT[2:])
@CASES.on(4, layout=["hsdp", "tp", "ddp", "zero1", "dp_tp_zero1"])
def sends_what_is_planned(layout: str) -> tuple[int, int]:
    """Bytes of two periods, and how many steps of them sent nothing."""
    model, optimizer = made(layout, torch.float32, exchange_dtype="bfloat16")
    me, total, silent = dist.get_rank(), 0, 0
    plans = [optimizer.plan(), optimizer.plan(blocks=True)]
    for step in range(2 * PERIOD):
        plan = plans[step % PERIOD != 0]
        planned: Counter[int] = Counter()
        for way in plan.messages(me).values():
            planned.update(way)
        zoo.set_gradients(model, step)
        with (
            internals.counted_orthogonalizations() as counted,
            measures.sent_bytes() as sent,
            mock.patch.object(dist, "all_to_all_single", wraps=dist.all_to_all_single) as calls,
        ):
            optimizer.step()
        assert dict(sent) == dict(planned), step
        assert sum(counted) == plan.traffic().matrices[me]
        total += sum(sent.values())
        silent += not calls.called
    traffic = [plan.traffic() for plan in plans]
    whole, block = (each.sent_in[me] + each.sent_out[me] for each in traffic)
    assert total == 2 * (whole + (PERIOD - 1) * block)
    return total, silent


@CASES.on(2, 4, layout=["fsdp2", "tp", "fsdp2_tp", "ddp"])
def sends_a_period_th(layout: str) -> float:
    """Bytes of a period of five, over those of five steps without one."""
    size = dist.get_world_size()
    axes, placements = (size,), [Shard(int(layout == "tp"))]
    told: dict[str, Any] = {}
    if layout == "fsdp2_tp":
        axes, placements = (size // 2, 2), [Shard(0), Shard(1)]
    sent = []
    for period in (5, 1):
        model = nn.Module()
        for i in range(8):
            model.register_parameter(f"w{i}", nn.Parameter(zoo.full_random(f"w{i}", (16, 16), 0)))
        if layout == "ddp":
            told = {"process_group": dist.group.WORLD}
        else:
            zoo.distribute(model, zoo.mesh(axes, ("a", "b")[: len(axes)]), lambda *_: placements)
        optimizer = Muon(list(model.parameters()), period=period, **told)
        total = 0
        for step in range(5):
            zoo.set_gradients(model, step)
            with measures.sent_bytes() as counted:
                optimizer.step()
            total += sum(counted.values())
        sent.append(total)
    return sent[0] / sent[1]


# --- when it changes nothing ----------------------------------------------------------------------


@CASES.on(2, layout=UNCUT, exchange_dtype=["float32", "bfloat16"])
@CASES.on(1, layout=["single"] if WHOLE else [], exchange_dtype=["float32"])
def changes_nothing_where_nothing_is_cut(layout: str, exchange_dtype: str) -> None:
    """To the bit, with any period."""
    kind = {"exchange_dtype": exchange_dtype}
    model, optimizer = made(layout, torch.float32, **kind)
    other, plain = made(layout, torch.float32, period=1, block_lr_factor=1.0, **kind)
    measures.train(model, optimizer)
    measures.train(other, plain)
    state = measures.bits(other, plain)
    measures.assert_unchanged(model, optimizer, state)


@CASES.on(4, layout=LAYOUTS)
def there_and_back_is_the_identity(layout: str) -> None:
    measures.check_identity(*made(layout, torch.float32), blocks=True)


@CASES.on(2, layout=["fsdp2", "tp"])
def begins_with_whole_matrices(layout: str) -> None:
    model, optimizer = made(layout, torch.float32)
    other, plain = made(layout, torch.float32, period=1)
    for each, its in ((model, optimizer), (other, plain)):
        measures.train(each, its, last=1)
    measures.assert_unchanged(model, optimizer, measures.bits(other, plain))
    for each, its in ((model, optimizer), (other, plain)):
        measures.train(each, its, 1, 2)
    apart = [
        zoo.deviation(zoo.part_of(p.detach()), zoo.part_of(q.detach()))
        for p, q in zip(model.parameters(), other.parameters(), strict=True)
        if p.ndim == 2 and zoo.part_of(p).numel()
    ]
    assert max(apart) > 1e-2
    assert len(apart) > 5


# --- which step it is -----------------------------------------------------------------------------


@CASES.on(4, layout=["fsdp2", "fsdp2_tp"])
def goes_on_from_a_checkpoint(layout: str) -> float:
    """In the same layout as if it had not stopped, to the bit; in another at the same step."""
    model, optimizer = made(layout, torch.float32)
    measures.train(model, optimizer, last=2)
    with shared_folder() as folder:
        measures.write(model, optimizer, folder / "0")
        measures.train(model, optimizer, 2, STEPS)
        for name in (layout, "tp_any_dim"):
            again, other = made(name, torch.float32, seed=1, lr=0.7, period=7)
            measures.train(again, other, last=1)
            state = measures.checkpoint(again, other)
            dcp.load(state, checkpoint_id=folder / "0")
            set_state_dict(
                again,
                other,
                model_state_dict=state["model"],
                optim_state_dict=state["optimizer"],
            )
            groups = [g for g in other.param_groups if g["algorithm"] == "muon"]
            assert {(g["period"], g[PERIOD_STEP]) for g in groups} == {(PERIOD, 2)}
            measures.train(again, other, 2, STEPS)
            if name == layout:
                measures.assert_unchanged(again, other, measures.bits(model, optimizer))
            assert {g[PERIOD_STEP] for g in groups} == {STEPS}


@CASES.on(2)
def counts_only_steps_that_are_taken() -> None:
    model, optimizer = made("fsdp2", torch.float32, nonfinite="skip")
    group = next(g for g in optimizer.param_groups if g["algorithm"] == "muon")
    measures.train(model, optimizer, last=1)
    zoo.set_gradients(model, 1)
    next(model.parameters()).grad.mul_(float("nan"))
    with measures.unchanged(model, optimizer):
        optimizer.step()
    assert (optimizer.skipped_steps, group[PERIOD_STEP]) == (1, 1)
    # A parameter without a gradient is left alone, and its group's step counts.
    zoo.set_gradients(model, 1, skip=tuple(n for n, _ in model.named_parameters() if "up" in n))
    optimizer.step()
    assert {g.get(PERIOD_STEP) for g in optimizer.param_groups if g["algorithm"] == "muon"} == {2}
    # A group that comes later is in step with the others.
    late = nn.Parameter(zoo.laid_out(torch.ones(18, 12), model.blocks[0].up.weight))
    optimizer.add_param_group({"params": [("late", late)]})
    assert optimizer.param_groups[-1][PERIOD_STEP] == 2


@CASES.on(2)
def ranks_in_other_steps_are_told() -> None:
    model, optimizer = made("fsdp2", torch.float32)
    measures.train(model, optimizer, last=1)
    for group in optimizer.param_groups:
        if group["algorithm"] == "muon" and dist.get_rank() == 1:
            group[PERIOD_STEP] = 0
    zoo.set_gradients(model, 1)
    with (
        measures.unchanged(model, optimizer),
        pytest.raises(RuntimeError, match=r"period_step: 1 on rank 0, but .* 0 on rank 1"),
    ):
        optimizer.step()


# --- what is refused ------------------------------------------------------------------------------

CUT_ROWS = r"blocks.0.proj.weight \(12, 12\) is cut between columns.*period=1.*normuon.*adamuon"


@CASES.on(2, 4, stage=["normuon"])
def a_number_per_row_needs_whole_rows(stage: str) -> None:
    with pytest.raises(ValueError, match=CUT_ROWS):
        made("tp", after=stage)
    # Set later, it is refused by the step that would need it.
    model, optimizer = made("tp", torch.float32, after=stage, period=1)
    measures.train(model, optimizer, last=1)
    for group in optimizer.param_groups:
        if group["algorithm"] == "muon":
            group["period"], group[PERIOD_STEP] = 3, 1
    zoo.set_gradients(model, 1)
    with measures.unchanged(model, optimizer), pytest.raises(ValueError, match=CUT_ROWS):
        optimizer.step()
    # So is a state dict that says it.
    saved = optimizer.state_dict()
    for group in optimizer.param_groups:
        if group["algorithm"] == "muon":
            group["period"] = 1
    with measures.unchanged(model, optimizer), pytest.raises(ValueError, match=CUT_ROWS):
        optimizer.load_state_dict(saved)
    assert all(group.get("period", 1) == 1 for group in optimizer.param_groups)
    # A group of rows that are whole is not.
    optimizer = Muon([model.blocks[0].up.weight], after=stage, period=3)
    with pytest.raises(ValueError, match="is cut between columns"):
        optimizer.add_param_group({"params": [model.blocks[0].proj.weight]})
    assert len(optimizer.param_groups) == 1


# --- beside it ------------------------------------------------------------------------------------


@CASES.on(2)
def a_monitor_waits_for_whole_matrices() -> list[int]:
    model, optimizer = made("fsdp2", torch.float32)
    samples: list[Any] = []
    with Monitor(optimizer, every=2, to=samples.append, spectra=(), writes=True) as monitor:
        measures.train(model, optimizer, last=7)
        assert monitor.latest is not None
        assert len(monitor.latest["matrices"]) == len(monitor.header["matrices"]) > 10
    return [sample["step"] for sample in samples]


@CASES.on(2)
def a_compiled_step_is_traced_no_more_often() -> int:
    from torch._dynamo.testing import CompileCounter

    counter = CompileCounter()
    model, optimizer = made("fsdp2", torch.float32)
    other, eager = made("fsdp2", torch.float32)
    step = torch.compile(optimizer.step, backend=counter)
    for number in range(2 * PERIOD):
        zoo.set_gradients(model, number)
        step()
    measures.train(other, eager, last=2 * PERIOD)
    measures.assert_unchanged(model, optimizer, measures.bits(other, eager))
    return counter.frame_count


@pytest.mark.sampled
@pytest.mark.parametrize(("world_size", "case"), CASES.ids())
def test_blocks_on_ranks(world_size: int, case: str, ranks: Ranks) -> None:
    values = ranks.outcome(world_size, case).check()
    if case.startswith("equals_the_reference"):
        print(case, max(values))
        assert max(values) <= (DIVIDED if case.endswith("adamuon") else EXACT)
    if case.startswith("sends_what_is_planned"):
        layout = case.split("-")[1]
        sent = [total for total, _ in values]
        assert sum(sent) > 0
        for _, silent in values:
            assert silent == (2 * (PERIOD - 1) if layout in SILENT else 0)
    if case.startswith("sends_a_period_th"):
        expected = 1.0 if case.endswith("ddp") else 1 / 5
        assert values == (expected,) * world_size
    if case == "a_monitor_waits_for_whole_matrices":
        assert values == ([1, 4, 7],) * world_size
    if case == "a_compiled_step_is_traced_no_more_often":
        assert set(values) == {0}, values
