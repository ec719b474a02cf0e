"""The monitor on several ranks: in every layout one process's numbers, and nothing is changed."""

from __future__ import annotations

import contextlib
import functools
import json
import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from muonkit import Monitor, Muon
from muonkit.monitor.sample import KINDS
from tests.helpers import measures, zoo
from tests.helpers.ranks import Cases, Ranks, shared_folder
from tests.helpers.stages import stage_options

CASES = Cases()

# Parameters deviate by up to 3e-7 of their magnitude after five steps (docs/distributed.md), and a
# singular value by no more than the matrix does (Weyl); O by more. Measured: below 5e-6 with AVX2,
# 6.1e-6 with AVX-512.
EXACT = measures.STEEPEST

MANY = [name for name in zoo.LAYOUTS if name not in ("single", "hsdp_tp")]
STEPS = 3


@functools.cache
def alone(variant: str) -> dict[str, Any]:
    model, optimizer = measures.make("single", **stage_options(variant))
    with Monitor(optimizer, every=STEPS, spectra=KINDS) as monitor:
        measures.train(model, optimizer, last=STEPS)
    assert monitor.latest is not None
    return monitor.latest


def distance(got: Any, expected: Any, where: str = "") -> tuple[float, str]:
    """The largest deviation of all numbers, over their size; of a spectrum over its largest value.

    Raises:
        AssertionError: other keys, other lists, or other texts.
    """
    if isinstance(expected, dict):
        assert got.keys() == expected.keys(), where
        scale = expected.get("max")
        parts = []
        for key in expected.keys() - {"owners", "ranks"}:
            far, place = distance(got[key], expected[key], f"{where} {key}")
            if scale and key == "min":
                far, place = abs(got[key] - expected[key]) / scale, f"{where} min"
            if scale and key == "quantiles":
                pairs = zip(got[key], expected[key], strict=True)
                far, place = max(abs(a - b) for a, b in pairs) / scale, f"{where} quantiles"
            parts.append((far, place))
        return max(parts, default=(0.0, where))
    if isinstance(expected, list):
        assert len(got) == len(expected), where
        pairs = zip(got, expected, strict=True)
        return max(
            (distance(a, b, f"{where} {i}") for i, (a, b) in enumerate(pairs)), default=(0.0, where)
        )
    if isinstance(expected, float):
        return abs(got - expected) / (abs(expected) or 1.0), where
    assert got == expected, where
    return 0.0, where


@CASES.on(2, 4, layout=MANY, variant=["plain", "normuon"])
@CASES.on(4, layout=["fsdp2_tp", "zero1", "tp_any_dim"], variant=["dion2", "nordion2"])
def equals_one_process(layout: str, variant: str) -> tuple[float, str]:
    plain, unwatched = measures.make(layout, **stage_options(variant))
    measures.train(plain, unwatched, last=STEPS)
    model, optimizer = measures.make(layout, **stage_options(variant))
    seen = torch.get_rng_state()
    with Monitor(optimizer, every=STEPS, spectra=KINDS) as monitor:
        measures.train(model, optimizer, last=STEPS - 1)
        assert monitor.latest is not None
        assert monitor.latest["step"] == 1
        measures.train(model, optimizer, STEPS - 1, STEPS)
        sample = monitor.latest
    assert torch.equal(seen, torch.get_rng_state())
    for (name, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(zoo.part_of(p), zoo.part_of(q)), name
        full = zoo.full_random(f"gradient of {name}", p.shape, STEPS - 1)
        assert torch.equal(zoo.part_of(p.grad), zoo.local_part(full, p)), name
        for key, value in optimizer.state[p].items():
            assert torch.equal(zoo.part_of(value), zoo.part_of(unwatched.state[q][key])), key
    check_same_everywhere(sample)
    check_plan(optimizer, sample)
    return distance(sample, alone(variant))


def check_same_everywhere(sample: dict[str, Any]) -> None:
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, sample)
    assert all(other == sample for other in everyone)


def check_plan(optimizer: Muon, sample: dict[str, Any]) -> None:
    """Bytes and owners are the plan's."""
    plan = optimizer.plan()
    traffic = plan.traffic()
    got = {
        key: [record[key] for record in sample["ranks"]]
        for key in ("bytes_to_owners", "bytes_to_parameters", "matrices")
    }
    assert got["bytes_to_owners"] == traffic.sent_in
    assert got["bytes_to_parameters"] == traffic.sent_out
    assert got["matrices"] == traffic.matrices
    computed = [0] * len(traffic.matrices)
    for record in sample["matrices"]:
        for rank in record["owners"]:
            computed[rank] += 1
    assert computed == traffic.matrices


@CASES.on(4, layout=["zero1", "fsdp2_tp"])
def sends_nothing_between_samples(layout: str) -> None:
    model, optimizer = measures.make(layout)
    with Monitor(optimizer, every=10):
        measures.train(model, optimizer, last=1)
        with measures.sent_bytes() as sent:  # refuses whatever is no part of a step
            measures.train(model, optimizer, 1, 2)
    traffic, me = optimizer.plan().traffic(), dist.get_rank()
    assert sum(sent.values()) == traffic.sent_in[me] + traffic.sent_out[me]


@CASES.on(4)
def ranks_without_matrices_take_part() -> dict[str, Any]:
    model = nn.Module()
    model.register_parameter("w", nn.Parameter(zoo.full_random("w", torch.Size((6, 4)), 0)))
    optimizer = Muon([("w", model.w)], process_group=dist.group.WORLD, zero=1)
    with shared_folder() as folder:
        with Monitor(optimizer, every=1, to=folder / "run.jsonl") as monitor:
            measures.train(model, optimizer, last=2)
        dist.barrier()
        lines = (folder / "run.jsonl").read_text().splitlines()
    kinds = [json.loads(line)["kind"] for line in lines]
    assert kinds == ["header", "sample", "sample"]  # one rank wrote
    assert monitor.latest is not None
    check_same_everywhere(monitor.latest)
    assert len(monitor.latest["matrices"]) == 1
    assert [len(r["owners"]) for r in monitor.latest["matrices"]] == [1]
    assert sorted(r["matrices"] for r in monitor.latest["ranks"]) == [0, 0, 0, 1]
    return monitor.latest


@CASES.on(2, layout=["zero1", "fsdp2"], policy=["propagate", "skip", "raise"])
def a_gradient_that_is_not_finite(layout: str, policy: str) -> None:
    model, optimizer = measures.make(layout, nonfinite=policy)
    name = "blocks.0.proj.weight"
    with Monitor(optimizer, every=2) as monitor:
        measures.train(model, optimizer, last=1)
        zoo.set_gradients(model, 1)
        broken = zoo.part_of(dict(model.named_parameters())[name].grad)
        if dist.get_rank() == 0:
            broken[0, 0] = math.nan
        # Under ZeRO-1 every rank has the whole gradient: as DDP would have made it.
        if layout == "zero1":
            broken[0, 0] = math.nan
        with pytest.raises(FloatingPointError) if policy == "raise" else contextlib.nullcontext():
            optimizer.step()
        sample = monitor.latest
        assert sample is not None
        check_same_everywhere(sample)
        if policy == "propagate":
            (record,) = (r for r in sample["matrices"] if r["name"] == name)
            assert record["nonfinite"] == {"gradient": 1, "momentum": 1, "update": 144, "weight": 0}
            assert record["gradient_norm"] is None
            assert record["spectra"]["momentum"] is None
            assert record["spectra"]["weight"] is not None
            others = [r for r in sample["matrices"] if r["name"] != name]
            assert all(r["spectra"]["update"] for r in others)
            return
        assert sample["step"] == (2 if policy == "skip" else 1)
        assert sample["skipped"] == (policy == "skip")
        measures.train(model, optimizer, 2, 3)  # and it goes on
        assert monitor.latest["step"] == (2 if policy == "skip" else 3)
        measures.train(model, optimizer, 3, 4)
        assert monitor.latest["step"] == 4
        assert not monitor.latest["skipped"]


@CASES.on(2)
def without_a_gradient_there_is_no_record() -> None:
    model, optimizer = measures.make("fsdp2")
    skip = ("blocks.0.qkv.weight", "blocks.0.experts.down", "blocks.0.norm1.weight")
    with Monitor(optimizer, every=1) as monitor:
        zoo.set_gradients(model, 0, skip)
        optimizer.step()
    sample = monitor.latest
    assert sample is not None
    check_same_everywhere(sample)
    known = {r["name"] for r in (*monitor.header["matrices"], *monitor.header["parameters"])}
    named = {r["name"] for r in (*sample["matrices"], *sample["parameters"])}
    assert known - named == set(skip)
    assert len(sample["matrices"]) == len(monitor.header["matrices"]) - 3 - zoo.EXPERTS


@pytest.mark.sampled
@pytest.mark.parametrize(("world_size", "case"), CASES.ids())
def test_the_monitor_on_ranks(world_size: int, case: str, ranks: Ranks) -> None:
    values = ranks.outcome(world_size, case).check()
    if case.startswith("equals_one_process"):
        for far, where in values:
            assert far <= EXACT, where
