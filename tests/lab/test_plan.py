"""`muonkit plan`: the simulated step is the optimizer's, the bytes are the formulas', every figure
follows from the assumptions, and what cannot be done is said.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from muonkit import Muon, Rule
from muonkit.distributed.layout import dtensor_placements
from muonkit.distributed.owners import make_plan
from muonkit.distributed.placement import replicated
from muonkit.distributed.planner import GroupToPlan, ParamToPlan, plan_step
from muonkit.distributed.transfers import Matrix, PlannedTensor, alike
from muonkit.lab.cli import main
from muonkit.lab.errors import LabError
from muonkit.lab.plan import assumptions, balance, forecast, peak, summary, verdict
from muonkit.lab.plan_costs import Simulation, elements, flops_of, of_stage
from muonkit.lab.plan_layouts import LAYOUTS, choose_layout, parse_mesh, place
from muonkit.lab.plan_models import find_model, parse_roles, shape_of
from muonkit.lab.plan_schemes import lower_bound, schemes, seconds
from muonkit.lab.shapes import MODELS, ModelShape, ParameterShape, PublishedModel, published

DENSE = published(
    "dense",
    "llama",
    {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
    },
    "made up: every dim divides by 16, so that no shard is padded",
)
SPARSE = published(
    "sparse",
    "qwen3_moe",
    {
        "vocab_size": 64,
        "hidden_size": 16,
        "moe_intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "num_experts": 8,
        "num_experts_per_tok": 2,
    },
    "made up",
)


def changed(model: PublishedModel, **config: int) -> PublishedModel:
    return published(model.name, model.architecture, {**model.config, **config}, model.source)


# All ranks on one node, as the optimizer assumes where torchrun does not say otherwise.
ASSUME = assumptions("cpu", node=sys.maxsize)


def simulate(model: ModelShape, mesh: str, layout: str | None = None, **options: Any) -> Simulation:
    name, axes = choose_layout(layout, parse_mesh(mesh), model)
    laid = [(n, p, place(p, name, axes)) for n, p in of_stage(model, 0, 1)]
    return Simulation(axes, replace(ASSUME, **options), laid)


# -- formulas -------------------------------------------------------------------------------------

FORMULAS = {
    # layout, mesh -> what of S elements goes in and out, mean over the N ranks.
    ("ddp", "dp=4"): (Fraction(0), Fraction(3, 4)),
    ("zero1", "dp=4"): (Fraction(3, 16), Fraction(3, 4)),
    ("zero1", "dp=16"): (Fraction(15, 256), Fraction(15, 16)),
    ("fsdp", "fsdp=4"): (Fraction(3, 16), Fraction(3, 16)),
    ("fsdp", "fsdp=16"): (Fraction(15, 256), Fraction(15, 256)),
    ("tp", "tp=4"): (Fraction(3, 16), Fraction(3, 16)),
    # One exchange over the flattened mesh.
    ("fsdp_tp", "fsdp=4,tp=2"): (Fraction(7, 64), Fraction(7, 64)),
    # Each of 4 x 2 ranks has 1/8 of the momentum, and 1/2 of the parameters: all but the owner's.
    ("dp_tp_zero1", "dp=4,tp=2"): (Fraction(7, 64), Fraction(7, 16)),
}


@pytest.mark.parametrize(("layout", "mesh"), FORMULAS)
@pytest.mark.parametrize("comm_itemsize", [4, 2])
def test_bytes_are_the_formulas(layout: str, mesh: str, comm_itemsize: int) -> None:
    step = simulate(DENSE, mesh, layout, comm_itemsize=comm_itemsize)
    muon_plans = [plan for plan in step.plan.plans if plan.inward]
    size = DENSE.elements("muon")
    bytes_in, bytes_out = (share * size * comm_itemsize for share in FORMULAS[layout, mesh])
    ranks = step.mesh.ranks
    for sent, received, expected in (
        ("sent_in", "received_in", bytes_in),
        ("sent_out", "received_out", bytes_out),
    ):
        for way in (sent, received):
            total = sum(sum(getattr(plan.traffic(), way)) for plan in muon_plans)
            assert total == expected * ranks, way


def test_copies_are_sent_to_only_where_they_are_not_computed_again() -> None:
    """HSDP over 2 copies of 4 shards: within each copy as FSDP2 on 4, or divided over 8."""
    size, b = DENSE.elements("muon"), 4
    again = simulate(DENSE, "dp=2,fsdp=4", replicas="recompute").traffic()
    assert again["sent_in"].sum() == again["sent_out"].sum() == 8 * Fraction(3, 16) * size * b
    once = simulate(DENSE, "dp=2,fsdp=4", replicas="split").traffic()
    # In: of each piece one copy, but for the owner's. Out: two copies of each, but for the owner's.
    assert once["sent_in"].sum() == Fraction(3, 4) * size * b
    assert once["sent_out"].sum() == (2 - Fraction(1, 4)) * size * b
    assert again["flops"].sum() == 2 * once["flops"].sum()


def test_experts_that_are_whole_on_a_rank_send_nothing() -> None:
    step = simulate(SPARSE, "fsdp=1,ep=4")
    stacks = [plan for plan in step.plan.plans if len(plan.tensors[0].shape) == 3]
    assert len(stacks) == 2
    for plan in stacks:
        traffic = plan.traffic()
        assert sum(traffic.sent_in) == sum(traffic.sent_out) == 0
        assert len(set(traffic.flops)) == 1


def test_balanced_ranks_each_send_the_formula() -> None:
    """Four equal matrices a rank of four: every rank's bytes, worked out by hand."""
    step = simulate(changed(DENSE, intermediate_size=32), "dp=4")
    traffic = step.traffic()
    size = 4 * 7 * 32 * 32  # 4 layers, q, k, v, o, gate, up, down
    assert set(traffic["matrices"]) == {7}
    assert set(traffic["sent_in"]) == set(traffic["received_in"]) == {3 * size // 16 * 4}
    # Embedding, head: 64 x 32 each; norms: 2 in each layer and a last one of 32. 3/4 is received.
    adamw = 2 * 64 * 32 + 9 * 32
    assert set(traffic["received_out"]) == {3 * (size + adamw) // 4 * 4}


# -- the real optimizer ---------------------------------------------------------------------------


@pytest.fixture
def many_ranks(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Makes this process rank 0 of many that are not there: enough to plan, not to exchange."""
    dist = pytest.importorskip("torch.distributed")
    fake = pytest.importorskip("torch.testing._internal.distributed.fake_pg")
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)

    def start(ranks: int) -> None:
        dist.init_process_group("fake", rank=0, world_size=ranks, store=fake.FakeStore())

    yield start
    dist.destroy_process_group()


def real_traffic(
    model: ModelShape, mesh: str, layout: str | None, after: str, blocks: bool = False
) -> dict[str, list[int]]:
    """What the optimizer itself plans for this model: parameters distributed as the simulation
    says, in torch's own words.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import zeros

    name, axes = choose_layout(layout, parse_mesh(mesh), model)
    whole = init_device_mesh("cpu", tuple(size for _, size in axes.axes), mesh_dim_names=axes.names)
    params = []
    for label, p in of_stage(model, 0, 1):
        lay = place(p, name, axes)
        if (
            all(axis.dim is None for axis in lay.param_placement.axes)
            and len(lay.param_placement.mesh) == 1
        ):
            params.append((label, p, nn.Parameter(torch.zeros(p.shape))))
            continue
        placements = dtensor_placements(lay.param_placement.axes)
        on = [i for i in range(len(lay.param_placement.mesh)) if i not in lay.implied]
        if len(on) < len(lay.param_placement.mesh):
            placements = [placements[i] for i in on]
            sub = whole[tuple(axes.names[i] for i in on)]
        else:
            sub = whole
        params.append(
            (label, p, nn.Parameter(zeros(p.shape, device_mesh=sub, placements=placements)))
        )
    views = list(dict.fromkeys(p.view for _, p, _ in params))
    groups: list[dict[str, Any]] = []
    for view in sorted(views, key=lambda view: view is None):
        members = [(label, tensor) for label, p, tensor in params if p.view == view]
        kind = {"algorithm": "adamw", "lr": 1e-3} if view is None else {"view": view}
        groups.append({"params": members, **kind})
    kind = LAYOUTS[name]
    group = whole["dp"].get_group() if kind.given else None
    # The simulation's CPU multiplies in float32.
    optimizer = Muon(
        groups,
        after=() if after == "none" else after,
        process_group=group,
        zero=int(kind.zero),
        ns_dtype="float32",
        period=1 + blocks,
    )
    return optimizer.plan(blocks).traffic()._asdict()


PLACES = [
    (DENSE, "dp=4", "ddp"),
    (DENSE, "dp=3", "zero1"),
    (SPARSE, "dp=16", "zero1"),
    (DENSE, "fsdp=7", None),
    (SPARSE, "fsdp=3", None),
    (SPARSE, "fsdp=12", None),
    (DENSE, "dp=2,fsdp=4", None),
    (DENSE, "tp=4", None),
    (DENSE, "fsdp=4,tp=2", None),
    (SPARSE, "fsdp=2,tp=4", None),
    (DENSE, "dp=2,tp=2", None),
    (SPARSE, "dp=3,tp=2", None),
]


@pytest.mark.parametrize("after", ["none", "normuon", "adamuon"])
@pytest.mark.parametrize(
    ("model", "mesh", "layout"), PLACES, ids=lambda value: getattr(value, "name", value)
)
def test_the_simulated_step_is_what_the_optimizer_plans(
    many_ranks: Any, model: ModelShape, mesh: str, layout: str | None, after: str
) -> None:
    step = simulate(model, mesh, layout, after=after)
    many_ranks(step.mesh.ranks)
    expected = real_traffic(model, mesh, layout, after)
    for name, figures in step.traffic().items():
        assert figures.tolist() == expected[name], name


@pytest.mark.parametrize(
    ("model", "mesh", "layout"), PLACES, ids=lambda value: getattr(value, "name", value)
)
def test_the_simulated_step_of_blocks_is_what_the_optimizer_plans(
    many_ranks: Any, model: ModelShape, mesh: str, layout: str | None
) -> None:
    name, axes = choose_layout(layout, parse_mesh(mesh), model)
    laid = [(n, p, place(p, name, axes)) for n, p in of_stage(model, 0, 1)]
    step = Simulation(axes, ASSUME, laid, in_blocks=True)
    many_ranks(step.mesh.ranks)
    expected = real_traffic(model, mesh, layout, "none", blocks=True)
    for each, figures in step.traffic().items():
        assert figures.tolist() == expected[each], each
    if name in ("fsdp", "hsdp", "tp", "fsdp_tp"):
        assert not any(expected["sent_in"]) and not any(expected["sent_out"])  # noqa: PT018


def test_a_period_has_a_scheme_of_its_own_and_divides_the_bytes() -> None:
    whole, blocks, *_ = schemes(DENSE, "fsdp", parse_mesh("fsdp=4"), replace(ASSUME, period=5))
    assert (whole.name, blocks.name) == ("muonkit, fsdp", "muonkit, fsdp, blocks")
    assert whole.costs.sent_in.sum() > 0 == blocks.costs.sent_in.sum()
    assert (blocks.costs.flops < whole.costs.flops).all()
    said = verdict(forecast(find_model("llama-8b"), "fsdp=64", None, assumptions(period=5)))
    assert "sends at most 891 MB" in said
    assert "sends nothing: 178 MB a step in the mean" in said
    with pytest.raises(LabError, match="is cut between columns"):
        forecast(find_model("llama-8b"), "tp=2", None, assumptions(after="normuon", period=2))


# -- parameters, memory, time ---------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(MODELS))
@pytest.mark.parametrize("stages", [1, 3, 8])
def test_stages_have_every_parameter_once(name: str, stages: int) -> None:
    model = MODELS[name]
    names = [label for s in range(stages) for label, _ in of_stage(model, s, stages)]
    assert len(names) == len(set(names)) == sum(p.count for p in model.parameters)
    assert set(names) == {label for p in model.parameters for label in p.names}


def test_memory_by_hand() -> None:
    """gpt2-124m on four ranks with ZeRO-1: parameters whole, a quarter of the state."""
    found = forecast(find_model("gpt2-124m"), "dp=4", None, ASSUME)
    ours, *_, adamw = found.schemes
    muon, rest = 84_934_656, 39_505_152
    assert set(ours.costs.parameters) == {4 * (muon + rest)}
    # Of 50,257 rows three ranks have 12,565 and the last 12,562; all else divides.
    least, most = ours.costs.state.min(), ours.costs.state.max()
    assert most - least == 2 * 4 * 3 * 768
    assert ours.costs.state.sum() == 4 * (muon + 2 * rest)
    assert adamw.costs.state.sum() == 4 * 2 * (muon + rest)
    held = peak(ours)
    assert (held >= 2 * ours.costs.parameters + ours.costs.state).all()
    # Transient: at least one bucket's matrices, at most what the caps of three buckets allow.
    assert (ours.costs.transient > 4 * 2304 * 768).all()


def test_a_prediction_is_figures_over_rates() -> None:
    assume = assumptions("cuda", node=4, flops=1e12, intra=1e9, inter=1e8, memory=1e10)
    for scheme in schemes(DENSE, "zero1", parse_mesh("dp=8"), assume):
        costs, took = scheme.costs, seconds(scheme, assume)
        assert took.products == costs.flops.max() / 1e12
        assert took.elementwise == costs.touched.max() / 1e10
        assert took.exchange == pytest.approx((costs.between / 1e8 + costs.within / 1e9).max())
        assert took.overlapped == took.elementwise + max(took.products, took.exchange)
        assert took.serial == took.elementwise + took.chain + took.exchange
        assert took.chain >= took.products


def test_ranks_wait_for_a_matrix_that_fills_a_bucket_alone() -> None:
    """llama-70b: an MLP matrix has 0.94 GB and the cap is 0.27: each has a bucket, and an owner, of
    its own, so that one after the other takes far longer than the busiest rank.
    """
    assume = assumptions()
    large = schemes(find_model("llama-70b"), "fsdp", parse_mesh("fsdp=512"), assume)[0]
    assert large.buckets >= 3 * 80
    mlp = flops_of(28672, 8192, "cuda")
    assert large.chain is not None
    assert large.chain >= 240 * mlp > 100 * large.costs.flops.max()
    took = seconds(large, assume)
    assert took.serial > took.chain > 100 * took.products
    small = schemes(find_model("gpt2-124m"), "fsdp", parse_mesh("fsdp=8"), assume)[0]
    # Two buckets: what the second one's ranks wait for is less than one more matrix.
    assert 0 <= small.chain - small.costs.flops.max() < flops_of(3072, 768, "cuda")


def test_what_stays_in_a_node_crosses_no_slow_link() -> None:
    tp = schemes(DENSE, "tp", parse_mesh("tp=8"), assumptions("cuda", node=8))
    assert not tp[0].costs.between.any()
    assert tp[0].costs.within.any()
    apart = schemes(DENSE, "tp", parse_mesh("tp=8"), assumptions("cuda", node=1))
    assert not apart[0].costs.within.any()
    assert (apart[0].costs.between == tp[0].costs.within).all()
    # Two nodes: what the traffic between them is, by its own count.
    step = simulate(DENSE, "fsdp=8")
    far, all_of_it = step.traffic(4), step.traffic()
    assert 0 < far["sent_in"].sum() < all_of_it["sent_in"].sum()
    assert far["sent_in"].sum() == far["received_in"].sum()


def test_the_schemes_differ_as_they_should() -> None:
    found = schemes(DENSE, "fsdp", parse_mesh("fsdp=8"), assumptions())
    ours, gathered, in_turn, adamw, zero1 = found
    assert [s.name.partition(",")[0] for s in found] == [
        "muonkit", "all-gather", "round robin", "AdamW", "AdamW",
    ]  # fmt: skip
    total = ours.costs.flops.sum()
    assert set(gathered.costs.flops) == {total}, "every rank computes everything"
    assert in_turn.costs.flops.sum() == total
    assert not adamw.costs.received_out.any(), "FSDP's AdamW exchanges nothing in the step"
    assert not adamw.costs.flops.any()
    size = DENSE.elements("muon") * 4
    assert gathered.costs.received_in.mean() == size * 7 / 8
    assert in_turn.costs.received_out.mean() == size * 7 / 8
    assert zero1.costs.received_out.mean() == DENSE.elements() * 4 * 7 / 8
    assert in_turn.costs.state.sum() == size + 8 * 2 * 4 * DENSE.elements("adamw")


def test_pipeline_stages_are_apart() -> None:
    """Each stage is the step of its own layers; the ranks are one stage after the other."""
    assume = assumptions()
    whole = schemes(DENSE, "fsdp", parse_mesh("pp=2,fsdp=4"), assume)[0]
    assert whole.costs.flops.shape == (8,)
    assert whole.costs.flops[:4].sum() == whole.costs.flops[4:].sum()
    half = changed(DENSE, num_hidden_layers=2)
    alone = schemes(half, "fsdp", parse_mesh("fsdp=4"), assume)[0]
    assert (whole.costs.flops[:4] == alone.costs.flops).all()


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_flops_are_the_same_for_a_matrix_and_its_transpose(device: str) -> None:
    assert flops_of(256, 1024, device) == flops_of(1024, 256, device)
    # In the standard form: 30 m^3 in general products, 20 m^3 where symmetric ones cost half.
    assert 20 * 256**3 <= flops_of(256, 256, device) <= 30 * 256**3


def test_what_tensor_parallelism_leaves_out_is_trained_in_every_place() -> None:
    """A router under DP x TP with ZeRO-1: its state is sharded over DP, and copied along TP."""
    (router,) = [p for p in SPARSE.parameters if p.name.endswith("mlp.gate.weight")]
    layout, axes = choose_layout(None, parse_mesh("dp=2,tp=4"), SPARSE)
    lay = place(router, layout, axes)
    assert lay.implied == lay.state_placement.copies() == (1,)
    assert set(elements(lay.state_placement, router.shape)) == {prod(router.shape) / 2}
    step = simulate(SPARSE, "dp=2,tp=4")
    routers = [t for plan in step.plan.plans for t in plan.tensors if t.shape == router.shape]
    assert {t.repeat for t in routers if t.name.endswith("mlp.gate.weight")} == {(1,)}


# -- balance --------------------------------------------------------------------------------------


def plan_of(costs: list[int], ranks: int) -> Any:
    at = replicated(ranks)
    tensors = [PlannedTensor(str(i), (1, 1), at, at) for i in range(len(costs))]
    matrices = [Matrix(i, ((0, 1), (0, 1)), cost) for i, cost in enumerate(costs)]
    return make_plan(ranks, tensors, matrices, 4, 1 << 20)


@pytest.mark.parametrize(
    ("costs", "ranks", "bound", "why"),
    [
        ([6, 6, 6, 6], 4, 1.0, "the mean"),
        ([9, 1, 1, 1], 4, 3.0, "the largest matrix"),
        ([6, 6, 6, 6, 6], 4, 12 / 7.5, "5 matrices on 4 ranks"),
        ([7, 6, 5], 2, 11 / 9, "3 matrices on 2 ranks"),
    ],
)
def test_the_lower_bound_by_hand(costs: list[int], ranks: int, bound: float, why: str) -> None:
    plan = plan_of(costs, ranks)
    got, reason = lower_bound([plan], ranks)
    assert got == pytest.approx(bound)
    assert reason.startswith(why)
    assert plan.traffic().balance >= got - 1e-12


@pytest.mark.parametrize("name", ["gpt2-124m", "llama-8b", "qwen3-30b-a3b"])
@pytest.mark.parametrize("mesh", ["dp=8", "fsdp=64", "dp=512"])
def test_no_plan_is_below_its_bound(name: str, mesh: str) -> None:
    model = find_model(name)
    layout, axes = choose_layout(None, parse_mesh(mesh), model)
    step = simulate(model, mesh)
    bound, _ = lower_bound([plan for plan in step.plan.plans], axes.ranks)
    got = balance(step.traffic()["flops"])
    assert 1 <= bound <= got + 1e-9
    if layout == "zero1" and name != "qwen3-30b-a3b":
        # Every rank may own everything: then no worse than mean + the largest matrix.
        largest = max(matrix.flops for plan in step.plan.plans for matrix in plan.matrices)
        assert got <= 1 + largest / step.traffic()["flops"].mean()


def test_the_bound_counts_matrices_only() -> None:
    """Parts of AdamW's parameters, which ZeRO-1 shares out as well, are no matrices."""
    ours = schemes(find_model("llama-8b"), "zero1", parse_mesh("dp=64"), assumptions())[0]
    assert ours.bound_by == "224 matrices on 64 ranks"
    assert ours.costs.matrices.sum() == 224


# -- a trillion parameters ------------------------------------------------------------------------


def test_a_trillion_parameters_are_few_kinds() -> None:
    """What makes 70,000 matrices on 4,096 ranks quick: they are counted by kind."""
    step = simulate(find_model("kimi-k2"), "fsdp=64,ep=8,tp=8")
    assert sum(len(plan.matrices) for plan in step.plan.plans if plan.inward) == 69_729
    kinds = sum(len(set(alike(plan.tensors, plan.matrices))) for plan in step.plan.plans)
    assert kinds < 100
    traffic = step.traffic()
    assert traffic["matrices"].sum() >= 69_729
    assert traffic["sent_in"].sum() == traffic["received_in"].sum() > 0
    assert traffic["sent_out"].sum() == traffic["received_out"].sum() > 0


@pytest.mark.parametrize(
    ("name", "mesh"),
    [
        (name, mesh)
        for name, model in sorted(MODELS.items())
        for mesh in ("dp=8,tp=8", "fsdp=64,tp=8", "dp=4,fsdp=16", "fsdp=8,ep=4,tp=2")
        if "ep" not in mesh or any(p.ep_dim is not None for p in model.parameters)
    ],
)
def test_every_parameter_is_somewhere_exactly_as_often_as_it_is_copied(
    name: str, mesh: str
) -> None:
    model = find_model(name)
    layout, axes = choose_layout(None, parse_mesh(mesh), model)
    for p in model.parameters:
        lay = place(p, layout, axes)
        for placement in (lay.param_placement, lay.state_placement):
            copies = prod(placement.mesh[axis] for axis in placement.copies())
            assert elements(placement, p.shape).sum() == copies * prod(p.shape), p.name


# -- what is typed --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mesh", "layout"),
    [
        ("dp=8", "zero1"),
        ("fsdp=8", "fsdp"),
        ("shard=8", "fsdp"),
        ("dp=2,fsdp=4", "hsdp"),
        ("tp=8", "tp"),
        ("fsdp=2,tp=4", "fsdp_tp"),
        ("dp=2,fsdp=2,tp=2", "fsdp_tp"),
        ("dp=2,tp=4", "dp_tp_zero1"),
        ("ep=8", "ep"),
        ("dp=2,fsdp=4,ep=8,tp=2", "ep"),
        ("pp=2,fsdp=4", "fsdp"),
    ],
)
def test_the_axes_say_the_layout(mesh: str, layout: str) -> None:
    assert choose_layout(None, parse_mesh(mesh), find_model("kimi-k2"))[0] == layout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--mesh dp=8", "Missing option '--model'"),
        ("--model gpt2-124m", "Missing option '--mesh'"),
        ("--model gpt2-124 --mesh dp=8", "unknown model 'gpt2-124': did you mean 'gpt2-124m'?"),
        ("--model kimi-k2 --mesh dp=8 --tp x=colwise", "leave --tp and --rule out"),
        ("--model t:t --mesh dp=8", "no module 't'"),
        ("--model gpt2-124m --mesh dq=8", "unknown mesh axis 'dq': did you mean 'dp'?"),
        (
            "--model gpt2-124m --mesh dp",
            "'dp' is no axis and its number of ranks, 1 or more; write",
        ),
        ("--model gpt2-124m --mesh dp=0", "'dp=0' is no axis and its number of ranks"),
        ("--model gpt2-124m --mesh dp=-8", "'dp=-8' is no axis and its number of ranks"),
        ("--model gpt2-124m --mesh dp=2,dp=4", "dp is there twice"),
        ("--model gpt2-124m --mesh fsdp=2,shard=4", "fsdp is there twice"),
        ("--model gpt2-124m --mesh dp=2,pp=4", "write --mesh pp=8,fsdp=64"),
        ("--model gpt2-124m --mesh pp=24", "gpt2-124m has 12 layers, expected at least one"),
        ("--model gpt2-124m --mesh dp=99999", "99,999 ranks, expected at most 65,536"),
        ("--model gpt2-124m --mesh ep=8", "has no experts for the axis ep"),
        ("--model kimi-k2 --mesh fsdp=2,tp=2,ep=2", "write them side by side"),
        ("--model gpt2-124m --mesh dp=8 --layout zero2", "did you mean 'zero1'?"),
        ("--model gpt2-124m --mesh dp=8 --layout tp", "lacks tp: write --mesh tp=8 or --layout"),
        ("--model gpt2-124m --mesh dp=8,tp=2 --layout ddp", "has tp besides: write --mesh dp=8"),
        ("--model gpt2-124m --mesh fsdp=8,tp=2", "50257 x 768 on the mesh fsdp=8,tp=2 would lie"),
        ("--model gpt2-124m --mesh dp=8 --device tpu", "unknown device 'tpu': did you mean 'cpu'?"),
        ("--model gpt2-124m --mesh dp=8 --dtype int8", "unknown dtype 'int8'; it is one of"),
        ("--model gpt2-124m --mesh dp=8 --after soap", "unknown after 'soap'"),
        ("--model gpt2-124m --mesh dp=8 --replicas 2", "unknown choice of replicas '2'"),
        ("--model gpt2-124m --mesh dp=8 --inter 0", "Invalid value for '--inter'"),
        ("--model gpt2-124m --mesh dp=2 --plot x.mp3", "unknown kind of picture 'mp3'"),
        (
            "--model gpt2-124m --mesh dp=2 --json no/x.json",
            "--json no/x.json: there is no folder no; make it, or name another file with --json",
        ),
        ("--model gpt2-124m --mesh dp=2 --plot no/x.png", "or name another file with --plot"),
    ],
)
def test_an_error_is_one_line_with_its_remedy(
    words: str,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["plan", *words.split()]) in (1, 2)
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_table_picture_and_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture, figures = tmp_path / "plan.png", tmp_path / "plan.json"
    words = ["--model", "gpt2-124m", "--mesh", "fsdp=8", "--exchange-dtype", "bfloat16"]
    assert main(["plan", *words, "--plot", str(picture), "--json", str(figures)]) == 0
    shown = capsys.readouterr().out
    assert "Predictions, nothing is measured" in shown
    for scheme in ("muonkit", "all-gather", "round robin", "AdamW"):
        assert scheme in shown
    assert picture.read_bytes().startswith(b"\x89PNG")
    found = json.loads(figures.read_text())
    assume = assumptions(exchange_dtype="bfloat16")
    assert found == json.loads(
        json.dumps(summary(forecast(find_model("gpt2-124m"), "fsdp=8", None, assume)))
    )
    ours = found["schemes"][0]
    assert ours["bytes"]["sent_in"]["mean"] == 84_934_656 * 2 * 7 / 64
    assert ours["flops"]["max_over_mean"] == pytest.approx(
        ours["flops"]["max"] / ours["flops"]["mean"]
    )


def test_the_result_comes_first(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--model", "gpt2-124m", "--mesh", "fsdp=8"]) == 0
    first, second, *_ = capsys.readouterr().out.splitlines()
    found = forecast(find_model("gpt2-124m"), "fsdp=8", None, assumptions())
    ours, costs = found.schemes[0], found.schemes[0].costs
    took = seconds(ours, found.assume)
    sent = (costs.sent_in + costs.sent_out).max()
    assert first == (
        f"A step takes {took.overlapped * 1e6:.0f} us to {took.serial * 1e3:.2f} ms at the assumed "
        f"rates, AdamW's {took.elementwise * 1e6:.0f} us. The slowest rank's part of it: products "
        f"{took.products * 1e6:.0f} us, exchange {took.exchange * 1e6:.0f} us, elementwise "
        f"{took.elementwise * 1e6:.0f} us. A rank sends at most {sent / 1e6:.1f} MB; its memory "
        f"peaks at {peak(ours).max() / 1e6:.0f} MB, without activations."
    )
    assert second.startswith("gpt2-124m: 124,439,808 parameters")


def test_short_times_have_digits(capsys: pytest.CaptureFixture[str]) -> None:
    tiny = ModelShape("tiny", (ParameterShape("weight", (16, 16), "matrix", "replicated"),))
    shown = verdict(forecast(tiny, "dp=2", None, ASSUME))
    assert " 0 us" not in shown
    assert "Latencies, which are left out, will be more than that." in shown
    alone = verdict(forecast(tiny, "dp=1", None, ASSUME))
    assert "exchange 0, " in alone
    assert "A rank sends nothing;" in alone


def test_a_mesh_that_does_not_fit_is_a_lab_error() -> None:
    for layout, kind in LAYOUTS.items():
        wrong = parse_mesh("tp=2" if "tp" not in kind.needs else "fsdp=2")
        with pytest.raises(LabError, match="layout"):
            choose_layout(layout, wrong, find_model("kimi-k2"))
    assert np.isfinite(
        forecast(find_model("gpt2-124m"), "dp=1", None, ASSUME).schemes[0].costs.transient
    ).all()


# -- the user's own model -------------------------------------------------------------------------

OWN_MODEL = """
from torch import nn

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3)
        self.blocks = nn.ModuleList(Block() for _ in range(4))
        self.conv = nn.Conv2d(32, 32, 3)
        self.head = nn.Linear(32, 10)

    def forward(self, x):
        return x
"""


@pytest.fixture
def own_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    (tmp_path / "own_net.py").write_text(OWN_MODEL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield "own_net:Net"
    sys.modules.pop("own_net", None)


def test_a_model_of_ones_own_is_planned(own_model: str, tmp_path: Path) -> None:
    """Bytes by the formula: FSDP2 on four ranks sends (N - 1) / N^2 of Muon's elements, twice."""
    words = ["--model", own_model, "--mesh", "fsdp=4", "--json", "found.json"]
    assert main(["plan", *words]) == 0
    found = json.loads((tmp_path / "found.json").read_text())
    muon = 4 * 2 * 32 * 64 + 32 * 32 * 9
    assert found["model"] == own_model
    assert found["muon_elements"] == muon
    for direction in ("sent_in", "sent_out"):
        assert found["schemes"][0]["bytes"][direction]["mean"] == 4 * muon * 3 / 16


def test_what_a_module_keeps_for_all_its_models_is_not_on_the_meta_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "with_constants.py").write_text(
        "import torch\nfrom torch import nn\nFREQS = torch.arange(8)\n"
        "def build():\n"
        "    wide = nn.Linear(len(FREQS.tolist()), 16)\n"
        "    return nn.Sequential(wide, nn.ReLU(), nn.Linear(16, 4))\n"
    )
    assert main(["plan", "--model", "with_constants:build", "--mesh", "fsdp=2"]) == 0
    assert "with_constants:build: 212 parameters" in capsys.readouterr().out


def test_a_model_of_ones_own_is_cut_as_it_is_told(own_model: str) -> None:
    roles = parse_roles(["*.up.*=colwise", "*.down.*=rowwise", "conv.weight=rowwise"])
    model = find_model(own_model, roles)
    dims = {p.name: p.tp_dim for p in model.parameters}
    assert dims["blocks.2.up.weight"] == dims["blocks.2.up.bias"] == 0
    assert dims["blocks.2.down.weight"] == 1
    assert dims["blocks.2.down.bias"] is dims["head.weight"] is None
    assert dims["conv.weight"] == 1, "the inputs of a convolution"
    assert model.layers == 4
    stage = [name for name, _ in of_stage(model, 1, 2)]
    assert stage[0].startswith("blocks.2.")
    assert stage[-1] == "head.bias"
    assert forecast(model, "tp=2", None, ASSUME).schemes[0].costs.flops.all()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--mesh tp=2", "own_net:Net has no tensor parallel plan: leave tp out, or say"),
        ("--mesh tp=2 --tp q=colwise", "no parameter of own_net:Net is called 'q'"),
        ("--mesh tp=2 --tp colwise", "--tp 'colwise': write PATTERN=ROLE"),
        ("--mesh tp=2 --tp *=rows", "unknown role 'rows': did you mean 'rowwise'?"),
        ("--mesh ep=2", "own_net:Net has no experts for the axis ep"),
        ("--mesh pp=8", "own_net:Net has 4 layers"),
        ("--mesh dp=2 --rule x=muon", "x"),
    ],
)
def test_what_does_not_fit_ones_own_model_is_said(
    words: str, message: str, own_model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", "--model", own_model, *words.split()]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_model_without_layers_or_without_matrices_has_a_plan() -> None:
    one = shape_of("one", nn.Linear(8, 8))
    assert forecast(one, "dp=2", None, ASSUME).schemes[0].costs.parameters.all()
    with pytest.raises(LabError, match="frozen"):
        shape_of("none", nn.Linear(8, 8).requires_grad_(False))
    with pytest.raises(LabError, match="nothing to optimize"):
        shape_of("none", nn.Linear(8, 8), rules=[Rule("*", algorithm="ignore")])


def test_gathers_that_are_merged_cost_what_each_alone_does() -> None:
    """What makes AdamW's parameters on 4,096 ranks quick changes no figure."""
    laid = [(n, p, place(p, "zero1", parse_mesh("dp=8"))) for n, p in of_stage(SPARSE, 0, 1)]
    params = {
        i: ParamToPlan(name, p.shape, layout)
        for i, (name, p, layout) in enumerate(laid)
        if p.view is None
    }
    group = GroupToPlan(params, None, lambda *_: 0, 1 << 10)
    merged, each = (plan_step([group], ASSUME.rates, 8, merge) for merge in (True, False))
    assert merged[0].traffic() == each[0].traffic()
    assert len(merged[0].plans) < len(params)
    assert each[1][0].shared
