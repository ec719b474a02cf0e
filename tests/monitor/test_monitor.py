"""The monitor: its numbers against a plain transcription, and nothing changed by it."""

from __future__ import annotations

import gc
import io
import json
import math
import multiprocessing
import os
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from muonkit import Monitor, Muon, MuonW, orthogonalize
from muonkit.monitor.sample import KINDS
from muonkit.monitor.sinks import JsonLines
from muonkit.monitor.spectra import LEVELS, orthogonality_error, spectra
from tests.helpers import internals
from tests.helpers.optim import VIEWED, mlp, momentum_of, parameter, set_gradients, train
from tests.helpers.pages import python_sections, read_blocks
from tests.helpers.paths import ROOT

# Sums of float32 entries, taken in float64 on both sides; O is orthogonalized in other batches.
TOLERANCE = 1e-5
OPTIONS: dict[str, Any] = {"lr": 0.05, "weight_decay": 0.2, "momentum": 0.9, "ns_dtype": "float32"}


# --- the transcription --------------------------------------------------------------------------

# What each view of `VIEWED` means, written without views: the logical matrices of a parameter.
MEANING: dict[str, Callable[[torch.Tensor], list[torch.Tensor]]] = {
    "matrix": lambda p: [p],
    "flatten": lambda p: [p.flatten(1)],
    "experts": lambda p: list(p),
    "split(rows=3)": lambda p: list(p.chunk(3)),
    "split(rows=6+2+2)": lambda p: list(p.split([6, 2, 2])),
    "split(cols=2)": lambda p: list(p.chunk(2, 1)),
    "split(rows=2) > split(rows=3+2)": lambda p: [p[:3], p[5:8], p[3:5], p[8:]],
    "transpose > split(rows=3)": lambda p: list(p.mT.chunk(3)),
    "experts > split(rows=2)": lambda p: [half for expert in p for half in expert.chunk(2)],
}


def spectrum(A: torch.Tensor) -> dict[str, Any]:
    """By numpy's SVD, as the formulas are printed."""
    sigma = np.linalg.svd(A.double().numpy(), compute_uv=False)[::-1]
    p = sigma / sigma.sum()
    entropy = -sum(x * math.log(x) for x in p if x > 0)
    return {
        "min": sigma[0],
        "max": sigma[-1],
        "entropy": entropy / math.log(len(sigma)),
        "stable_rank": np.linalg.norm(A.double().numpy()) ** 2 / sigma[-1] ** 2,
        "effective_rank": math.exp(entropy),
        "quantiles": list(np.quantile(sigma, np.linspace(0, 1, LEVELS))),
    }


def transcribed(W: torch.Tensor, G: torch.Tensor, M: torch.Tensor, scale: float) -> dict[str, Any]:
    """One matrix's record, from the weight before the step and the momentum after it."""
    U = 0.9 * M + 0.1 * G
    O = orthogonalize(U, ns_dtype="float32").double()
    W, G, M = W.double(), G.double(), M.double()
    lr, m = OPTIONS["lr"] * scale, min(W.shape)
    update, decay = lr * O, OPTIONS["lr"] * OPTIONS["weight_decay"] * W
    gram = O @ O.mT if O.shape[0] <= O.shape[1] else O.mT @ O
    return {
        "lr": lr,
        "gradient_norm": G.norm().item(),
        "momentum_norm": M.norm().item(),
        "update_norm": update.norm().item(),
        "weight_norm": W.norm().item(),
        "update_rms": update.square().mean().sqrt().item(),
        "update_to_weight": (update.norm() / W.norm()).item(),
        "decay_norm": decay.norm().item(),
        "decay_share": (decay.norm() / (decay.norm() + update.norm())).item(),
        "orthogonality_error": ((gram - torch.eye(m).double()).norm() / m**0.5).item(),
        "nonfinite": dict.fromkeys(KINDS, 0),
        "spectra": {
            "gradient": spectrum(G),
            "momentum": spectrum(M),
            "update": spectrum(O),
            "weight": spectrum(W),
        },
    }


def assert_close(got: Any, expected: Any, where: str = "") -> None:
    if isinstance(expected, dict):
        assert got.keys() >= expected.keys(), where
        scale = expected.get("max", 0.0)
        for key, value in expected.items():
            if scale and key in ("min", "quantiles"):  # the smallest to a fraction of the largest
                assert got[key] == pytest.approx(value, abs=TOLERANCE * scale), f"{where} {key}"
            else:
                assert_close(got[key], value, f"{where} {key}")
    else:
        assert got == pytest.approx(expected, rel=TOLERANCE), where


@pytest.mark.parametrize(("view", "shape"), VIEWED)
def test_a_matrix_is_measured_as_the_formulas_say(view: str, shape: tuple[int, ...]) -> None:
    p = parameter(*shape)
    optimizer = Muon(
        [{"params": [("w", p)], "view": view}], adjust_lr_fn="match_rms_adamw", **OPTIONS
    )
    with Monitor(optimizer, every=3, spectra=KINDS) as monitor:
        for t in range(3):
            before = p.detach().clone()
            set_gradients([p], t)
            optimizer.step()
    sample = monitor.latest
    assert sample is not None
    assert sample["step"] == 3
    assert p.grad is not None
    parts = [MEANING[view](t) for t in (before, p.grad, momentum_of(optimizer, p))]
    assert len(sample["matrices"]) == len(parts[0]) == len(monitor.header["matrices"])
    for k, (record, W, G, M) in enumerate(zip(sample["matrices"], *parts, strict=True)):
        assert (record["name"], record["index"], record["owners"]) == ("w", k, [0])
        assert monitor.header["matrices"][k]["shape"] == list(W.shape)
        assert_close(record, transcribed(W, G, M, 0.2 * max(W.shape) ** 0.5), f"{k}")


def test_the_applied_update_is_what_the_parameter_changed_by() -> None:
    """By the change itself, with a variant and cautious decay."""
    p = parameter(12, 8)
    optimizer = Muon([p], variant="adamuon", cautious=True, **OPTIONS)
    with Monitor(optimizer, every=1) as monitor:
        for t in range(4):
            before = p.detach().clone()
            set_gradients([p], t)
            optimizer.step()
    assert monitor.latest is not None
    (record,) = monitor.latest["matrices"]
    change = p.detach() - before
    # change = -lr λ mask W - η O, and the mask is where O W > 0, which is where both shrink W.
    decay = torch.zeros_like(before)
    assert record["decay_norm"] > 0
    for _ in range(3):  # where the update without the decay has the sign that shrinks
        mask = (-(change + decay)) * before > 0
        decay = OPTIONS["lr"] * OPTIONS["weight_decay"] * before * mask
    assert record["decay_norm"] == pytest.approx(decay.norm().item(), rel=1e-4)
    assert record["update_norm"] == pytest.approx((change + decay).norm().item(), rel=1e-4)


def test_adamws_parameters_are_measured() -> None:
    model = mlp()
    optimizer = MuonW(model, lr=0.01, weight_decay=0.1, decay_1d=True)
    with Monitor(optimizer, every=2) as monitor:
        for t in range(2):
            before = {name: p.detach().clone() for name, p in model.named_parameters()}
            set_gradients(list(model.parameters()), t)
            optimizer.step()
    sample = monitor.latest
    assert sample is not None
    assert {r["name"] for r in sample["parameters"]} == {
        r["name"] for r in monitor.header["parameters"]
    }
    params = dict(model.named_parameters())
    for record in sample["parameters"]:
        p, W = params[record["name"]], before[record["name"]]
        decay = 0.01 * 0.1 * W
        update = p.detach() - W + decay
        assert record["lr"] == 0.01
        assert p.grad is not None
        # The difference of two float32 tensors is off by their rounding, a thousandth of so small
        # a change.
        assert record["update_norm"] == pytest.approx(update.norm().item(), rel=1e-3)
        assert record["update_rms"] == pytest.approx(update.square().mean().sqrt().item(), rel=1e-3)
        assert record["gradient_norm"] == pytest.approx(p.grad.norm().item(), rel=TOLERANCE)
        moment = optimizer.state[p]["exp_avg"].norm().item()
        assert record["momentum_norm"] == pytest.approx(moment, rel=TOLERANCE)
        assert record["weight_norm"] == pytest.approx(W.norm().item(), rel=TOLERANCE)
        assert record["decay_norm"] == pytest.approx(decay.norm().item(), rel=TOLERANCE)


def test_the_error_is_the_orthogonalizations_and_the_update_is_the_variants() -> None:
    found = {}
    for variant in ("plain", "normuon"):
        p = parameter(6, 10)
        optimizer = Muon([p], variant=variant, **OPTIONS)
        with Monitor(optimizer) as monitor:
            set_gradients([p])
            optimizer.step()
        assert monitor.latest is not None
        (found[variant],) = monitor.latest["matrices"]
    plain, normuon = found["plain"], found["normuon"]
    assert normuon["orthogonality_error"] == plain["orthogonality_error"]
    # The same norm (NorMuon keeps it), other singular values.
    assert normuon["update_norm"] == pytest.approx(plain["update_norm"], rel=TOLERANCE)
    assert normuon["spectra"]["update"]["max"] != pytest.approx(
        plain["spectra"]["update"]["max"], rel=1e-3
    )


@pytest.mark.parametrize("constraint", ["hyperball", "relative_update", "radial_brake"])
def test_a_constraint_decides_what_is_added_and_what_decays(constraint: str) -> None:
    p = parameter(6, 10)
    W = p.detach().clone()
    optimizer = Muon([p], constraint=constraint, **OPTIONS)
    with Monitor(optimizer) as monitor:
        set_gradients([p])
        optimizer.step()
    assert monitor.latest is not None
    (record,) = monitor.latest["matrices"]
    decay = 0.05 * 0.2 * W.norm().item() if constraint != "hyperball" else 0
    assert record["decay_norm"] == pytest.approx(decay, rel=TOLERANCE)
    if constraint != "radial_brake":  # lr is the update's relative size
        assert record["update_to_weight"] == pytest.approx(0.05, rel=TOLERANCE)
    if constraint == "relative_update":
        added = p.detach() - W + 0.05 * 0.2 * W
        assert record["update_norm"] == pytest.approx(added.norm().item(), rel=TOLERANCE)


def test_empty_parameters_are_no_trouble() -> None:
    p, empty, nothing = parameter(4, 3), parameter(0, 3), parameter(0)
    adamw = {"params": [nothing], "algorithm": "adamw", "lr": 0.1}
    optimizer = Muon([{"params": [p, empty]}, adamw])
    with Monitor(optimizer) as monitor:
        set_gradients([p, empty, nothing])
        optimizer.step()
    assert monitor.latest is not None
    assert len(monitor.latest["matrices"]) == 1
    (record,) = monitor.latest["parameters"]
    assert (record["update_norm"], record["update_rms"]) == (0, None)


def test_a_group_is_its_members_as_one_vector() -> None:
    model = mlp()
    optimizer = MuonW(model, lr=0.01)
    with Monitor(optimizer) as monitor:
        train(model, optimizer, 1)
    sample = monitor.latest
    assert sample is not None
    names = {r["name"]: r["group"] for r in (*sample["matrices"], *sample["parameters"])}
    for record in sample["groups"]:
        mine = [p for name, p in model.named_parameters() if names[name] == record["group"]]
        grads = torch.cat([p.grad.flatten() for p in mine if p.grad is not None])
        assert record["gradient_norm"] == pytest.approx(grads.norm().item(), rel=TOLERANCE)
        rms = record["update_norm"] / sum(p.numel() for p in mine) ** 0.5
        assert record["update_rms"] == pytest.approx(rms)
        assert record["members"] == len(mine)


# --- laws of the spectra ------------------------------------------------------------------------


def measures(A: torch.Tensor) -> torch.Tensor:
    return spectra(A[None])[0]


@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (7, 7), (1, 6), (300, 20)])
def test_spectra_do_not_see_transposition_rotation_or_scale(shape: tuple[int, int]) -> None:
    A = parameter(*shape, seed=1).detach().double()
    Q = torch.linalg.qr(parameter(shape[0], shape[0], seed=2).detach().double())[0]
    expected = measures(A)
    torch.testing.assert_close(measures(A.mT), expected)
    torch.testing.assert_close(measures(Q @ A), expected)
    for scale in (1e-30, 1e30):  # squares would leave float32, and not float64
        scaled = measures((A * scale).float())
        torch.testing.assert_close(scaled[:2] / scale, expected[:2], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(scaled[2:5], expected[2:5], rtol=1e-5, atol=1e-5)


def test_spectra_of_known_matrices() -> None:
    """Flat: all ranks are full. Rank one: all are 1. (1 + 1e-7 for what squares lose.)"""
    low, high, entropy, stable, effective = measures(3 * torch.eye(8, 20))[:5].tolist()
    assert (low, high, entropy, stable, effective) == pytest.approx((3, 3, 1, 8, 8))
    one = torch.outer(torch.arange(1.0, 9.0), torch.ones(20))
    low, high, entropy, stable, effective = measures(one)[:5].tolist()
    assert low == pytest.approx(0, abs=1e-6 * high)
    assert (stable, effective) == pytest.approx((1, 1), abs=1e-4)
    assert entropy == pytest.approx(0, abs=1e-4)


def test_spectra_of_a_stack_are_those_of_its_matrices(monkeypatch: pytest.MonkeyPatch) -> None:
    A = parameter(5, 6, 9).detach()
    expected = torch.stack([measures(a) for a in A])
    torch.testing.assert_close(spectra(A), expected)
    monkeypatch.setattr("muonkit.monitor.spectra.CHUNK_BYTES", 6 * 9 * 8 * 2)
    torch.testing.assert_close(spectra(A), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_orthogonality_error_is_zero_for_orthonormal_rows(dtype: torch.dtype) -> None:
    Q = torch.linalg.qr(parameter(20, 6).detach().double())[0]
    for A in (Q, Q.mT):
        # Each entry is rounded to eps / 2; 20 of them are summed.
        error = orthogonality_error(A.to(dtype)[None]).item()
        assert error <= 20 * torch.finfo(dtype).eps
    assert orthogonality_error(torch.zeros(1, 3, 5)).item() == pytest.approx(1)
    assert orthogonality_error(2 * Q[None]).item() == pytest.approx(3)


def test_norms_whose_squares_are_infinite_do_not_raise() -> None:
    p = parameter(4, 3, dtype=torch.float64)
    optimizer = Muon([p], lr=0.1)
    p.grad = torch.full_like(p, 1e200)
    with Monitor(optimizer, every=1) as monitor:
        optimizer.step()
    assert monitor.latest is not None
    (record,) = monitor.latest["matrices"]
    assert record["gradient_norm"] is None
    assert record["update_norm"] is not None
    assert record["nonfinite"]["gradient"] == 0


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_counted_and_never_raises(value: float) -> None:
    good, bad, zero = parameter(6, 4), parameter(6, 4, seed=1), parameter(5, 3, seed=2)
    optimizer = Muon([("good", good), ("bad", bad), ("zero", zero)], **OPTIONS)
    stream = io.StringIO()
    sink: Callable[[Any], Any] = lambda s: stream.write(json.dumps(s, allow_nan=False))  # noqa: E731
    with Monitor(optimizer, to=sink) as monitor:
        set_gradients([good, bad, zero])
        assert bad.grad is not None
        assert zero.grad is not None
        bad.grad[0, :2] = value
        zero.grad.zero_()
        optimizer.step()
    assert monitor.latest is not None
    ok, broken, empty = monitor.latest["matrices"]
    assert ok["spectra"]["momentum"] is not None
    assert broken["nonfinite"] == {"gradient": 2, "momentum": 2, "update": 24, "weight": 0}
    assert broken["spectra"]["momentum"] is broken["spectra"]["update"] is None
    assert broken["gradient_norm"] is broken["update_rms"] is broken["decay_share"] is None
    assert broken["spectra"]["weight"] is not None
    assert empty["spectra"]["momentum"] is None
    assert (empty["gradient_norm"], empty["update_norm"]) == (0, 0)
    assert empty["decay_share"] == 1
    (group,) = monitor.latest["groups"]
    assert group["nonfinite"]["gradient"] == 2
    assert group["update_norm"] is None
    assert "momentum_norm" in stream.getvalue()


# --- nothing is changed -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [{}, {"variant": "normuon"}, {"momentum_dtype": "bfloat16"}, {"momentum_dtype": "int8"}],
)
def test_parameters_and_state_are_those_without_it(options: dict[str, Any]) -> None:
    plain, watched = mlp(), mlp()
    optimizers = [MuonW(model, lr=0.01, **options) for model in (plain, watched)]
    seen = torch.get_rng_state()
    with Monitor(optimizers[1], every=2, spectra=KINDS) as monitor:
        for model, optimizer in zip((plain, watched), optimizers, strict=True):
            train(model, optimizer, 5)
        assert monitor.latest is not None
        assert monitor.latest["step"] == 4
        ours, theirs = (optimizer.state_dict() for optimizer in optimizers)
    assert torch.equal(seen, torch.get_rng_state())
    for p, q in zip(plain.parameters(), watched.parameters(), strict=True):
        assert torch.equal(p, q)
        assert p.grad is not None
        assert q.grad is not None
        assert torch.equal(p.grad, q.grad)
    assert ours["param_groups"] == theirs["param_groups"]
    assert ours["state"].keys() == theirs["state"].keys()
    for key, state in ours["state"].items():
        for name, value in state.items():
            assert torch.equal(value, theirs["state"][key][name])


def test_it_samples_the_first_step_and_multiples() -> None:
    p = parameter(4, 3)
    optimizer = Muon([p])
    seen: list[int] = []
    with Monitor(optimizer, every=3, to=lambda sample: seen.append(sample["step"])) as monitor:
        for t in range(7):
            set_gradients([p], t)
            optimizer.step()
    assert seen == [1, 3, 6]
    assert monitor.step == 7
    with Monitor(optimizer, every=5, to=lambda s: seen.append(s["step"]), start=7) as monitor:
        for t in range(4):
            set_gradients([p], t)
            optimizer.step()
    assert seen == [1, 3, 6, 10]


def test_nobody_listens_between_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cause of its cost: between samples the step is told of no observer, nothing is made."""
    p = parameter(4, 3)
    optimizer = Muon([p])
    made: list[Any] = []
    from muonkit.monitor import monitor as diagnostics

    class Counted(diagnostics.Sampler):
        def __init__(self, *args: Any) -> None:
            made.append(args)
            super().__init__(*args)

    monkeypatch.setattr(diagnostics, "Sampler", Counted)
    with Monitor(optimizer, every=10):
        for t in range(12):
            set_gradients([p], t)
            optimizer.step()
            assert internals.observer_of(optimizer) is None
    assert len(made) == 2


def test_closing_it_leaves_no_trace() -> None:
    p = parameter(4, 3)
    optimizer = Muon([p])
    monitor = Monitor(optimizer, every=1)
    set_gradients([p])
    optimizer.step()
    monitor.close()
    monitor.close()
    assert not internals.step_hooks(optimizer)
    assert internals.observer_of(optimizer) is None
    latest = monitor.latest
    optimizer.step()
    assert monitor.latest is latest
    alive = weakref.ref(monitor)
    del monitor
    gc.collect()
    assert alive() is None
    Monitor(optimizer).close()  # another may follow


def test_closing_a_monitor_again_leaves_the_next_one_alone() -> None:
    optimizer = Muon([parameter(4, 3)])
    first = Monitor(optimizer)
    first.close()
    with Monitor(optimizer):
        first.close()
        with pytest.raises(ValueError, match="has a monitor already"):
            Monitor(optimizer)


def test_without_a_gradient_there_is_no_record() -> None:
    p, q = parameter(4, 3), parameter(5, 2)
    optimizer = Muon([("p", p), ("q", q)])
    with Monitor(optimizer, every=1) as monitor:
        set_gradients([p])
        optimizer.step()
        assert [r["name"] for r in monitor.latest["matrices"]] == ["p"]
        p.grad = None
        with pytest.warns(UserWarning, match="nothing is trained"):
            optimizer.step()
    assert monitor.latest["matrices"] == monitor.latest["groups"] == []


def test_skipped_and_refused_steps() -> None:
    p = parameter(4, 3)
    for policy in ("skip", "raise"):
        optimizer = Muon([p], nonfinite=policy)
        with Monitor(optimizer, every=1) as monitor:
            set_gradients([p])
            p.grad[0, 0] = math.nan
            if policy == "raise":
                with pytest.raises(FloatingPointError):
                    optimizer.step()
                assert monitor.latest is None
            else:
                optimizer.step()
                assert monitor.latest["skipped"]
                assert monitor.latest["matrices"] == []
            set_gradients([p])
            optimizer.step()
            assert monitor.latest["step"] == 2
            assert not monitor.latest["skipped"]
            assert len(monitor.latest["matrices"]) == 1


def test_the_sample_of_a_step_that_raised_is_taken_in_the_next() -> None:
    p = parameter(4, 3)
    optimizer = Muon([p], nonfinite="raise")
    with Monitor(optimizer, every=5) as monitor:
        set_gradients([p])
        assert p.grad is not None
        p.grad[0, 0] = math.nan
        for _ in range(2):
            with pytest.raises(FloatingPointError):
                optimizer.step()
        assert monitor.latest is None
        set_gradients([p])
        optimizer.step()
        assert monitor.latest is not None
        assert monitor.latest["step"] == 3
        optimizer.step()
        assert monitor.latest["step"] == 3  # the fourth is not sampled
        assert internals.observer_of(optimizer) is None


def test_a_closure_is_seen() -> None:
    p = parameter(4, 3)
    optimizer = Muon([p])

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss

    with Monitor(optimizer) as monitor:
        assert optimizer.step(closure) > 0
    assert p.grad is not None
    assert monitor.latest["matrices"][0]["gradient_norm"] == pytest.approx(p.grad.norm().item())


def test_without_spectra_the_rest_is_there() -> None:
    p = parameter(4, 3)
    optimizer = Muon([p])
    with Monitor(optimizer, spectra=()) as monitor:
        set_gradients([p])
        optimizer.step()
    (record,) = monitor.latest["matrices"]
    assert record["spectra"] == {}
    assert record["orthogonality_error"] > 0


def test_groups_that_are_added_are_known() -> None:
    p, q = parameter(4, 3), parameter(6, 5, seed=1)
    optimizer = Muon([p])
    with Monitor(optimizer, every=1) as monitor:
        set_gradients([p])
        optimizer.step()
        optimizer.add_param_group({"params": [q]})
        set_gradients([p, q])
        optimizer.step()
    assert len(monitor.header["matrices"]) == len(monitor.latest["matrices"]) == 2
    names = [record["name"] for record in monitor.latest["matrices"]]
    assert len(set(names)) == 2  # nobody named them


def test_a_tensor_lr_and_schedulers_are_read_as_they_are() -> None:
    p = parameter(8, 2)
    optimizer = Muon([p], lr=torch.tensor(0.1))
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    rates = []
    with Monitor(optimizer, every=1, to=lambda sample: rates.append(sample["matrices"][0]["lr"])):
        for t in range(3):
            set_gradients([p], t)
            optimizer.step()
            scheduler.step()
    assert rates == pytest.approx([0.2, 0.1, 0.05])  # "original": times √(8 / 2)


def test_a_compiled_step_is_compiled_once_more_and_never_again() -> None:
    """Its sampled steps run as they are, so they differ by rounding; the others are the same."""
    import torch._dynamo

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    params = [parameter(6, 4) for _ in range(2)]
    optimizers = [Muon([p], lr=torch.tensor(0.01)) for p in params]
    steps = [torch.compile(optimizer.step, backend="eager") for optimizer in optimizers]
    graphs = []
    with Monitor(optimizers[1], every=4) as monitor:
        for t in range(10):
            for p, step in zip(params, steps, strict=True):
                set_gradients([p], t)
                step()
            graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert monitor.latest["step"] == 8
    assert len(set(graphs[2:])) == 1
    torch.testing.assert_close(params[0], params[1], rtol=1e-6, atol=1e-6)


def test_the_pages_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = ROOT / "docs" / "monitor.md"
    (program,) = python_sections(read_blocks(page.read_text(encoding="utf-8"))).values()
    monkeypatch.chdir(tmp_path)
    exec(compile(program, "monitor.md", "exec"), {"__name__": "__main__"})
    assert [record.get("step") for record in lines(Path("run.jsonl"))] == [None, 1, 100, 200]


# --- sinks --------------------------------------------------------------------------------------


def run(path: Path, steps: int, **options: Any) -> None:
    p = parameter(4, 3)
    optimizer = Muon([("w", p)])
    with Monitor(optimizer, **{"every": 2, "to": path, **options}):
        for t in range(steps):
            set_gradients([p], t)
            optimizer.step()


def lines(path: Path) -> list[dict[str, Any]]:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def test_json_lines_are_appended_to(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    run(path, 4)
    assert [(r["kind"], r.get("step")) for r in lines(path)] == [
        ("header", None),
        ("sample", 1),
        ("sample", 2),
        ("sample", 4),
    ]
    header = lines(path)[0]
    assert (header["format"], header["every"]) == (1, 2)
    assert header["torch"] == torch.__version__
    assert header["matrices"][0]["name"] == "w"
    with path.open("a") as file:
        file.write('{"kind": "sample", "st')  # the run was killed here
    run(path, 2, start=4)
    kinds = [(r["kind"], r.get("step")) for r in lines(path)]
    assert kinds[3:] == [("sample", 4), ("sample", 6)]
    run(path, 1, spectra=())
    assert [r["kind"] for r in lines(path)].count("header") == 1


def test_another_models_header_is_written_again(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    run(path, 1)
    p = parameter(5, 3)
    optimizer = Muon([("other", p)])
    with Monitor(optimizer, to=path):
        set_gradients([p])
        optimizer.step()
    assert [r["kind"] for r in lines(path)] == ["header", "sample", "header", "sample"]


def test_a_sample_is_in_the_file_at_once(tmp_path: Path) -> None:
    p = parameter(4, 3)
    optimizer = Muon([p])
    with Monitor(optimizer, to=tmp_path / "run.jsonl"):
        set_gradients([p])
        optimizer.step()
        assert len(lines(tmp_path / "run.jsonl")) == 2


def test_a_sink_that_raises_ends_no_training() -> None:
    p = parameter(4, 3)
    optimizer = Muon([p])
    seen: list[Any] = []

    def broken(sample: dict[str, Any]) -> None:
        raise OSError("no space left on device")

    with Monitor(optimizer, every=1, to=[broken, seen.append]):
        set_gradients([p])
        with pytest.warns(UserWarning, match="no space left on device; it gets no more samples"):
            optimizer.step()
        optimizer.step()
    assert [sample["step"] for sample in seen] == [1, 2]


def test_a_sink_of_two_monitors_is_closed_by_the_last() -> None:
    """As of a generator's and a discriminator's optimizer, which one tracker follows."""

    class Sink:
        def __init__(self) -> None:
            self.samples, self.closed = 0, 0

        def __call__(self, sample: dict[str, Any]) -> None:
            assert not self.closed
            self.samples += 1

        def close(self) -> None:
            self.closed += 1

    sink = Sink()
    params = [parameter(4, 3), parameter(3, 5)]
    optimizers = [Muon([p]) for p in params]
    first, second = (Monitor(optimizer, every=1, to=sink) for optimizer in optimizers)
    set_gradients(params)
    first.close()
    first.close()
    assert not sink.closed
    optimizers[1].step()
    assert sink.samples == 1
    second.close()
    assert sink.closed == 1
    with Monitor(optimizers[0], to=[sink, sink]):  # as often as it is given, and once each time
        pass
    assert sink.closed == 2
    # A monitor that nobody has any more, and that nobody closed, has no sinks.
    lost = Muon([parameter(4, 3)])
    Monitor(lost, to=sink)
    del lost
    gc.collect()
    with Monitor(optimizers[0], to=sink):
        pass
    assert sink.closed == 3


def test_a_sink_that_cannot_be_closed_holds_nothing_up(tmp_path: Path) -> None:
    p = parameter(4, 3)

    class Sink:
        closed = False

        def __call__(self, sample: dict[str, Any]) -> None: ...

        def close(self) -> None:
            self.closed = True

    class Full(Sink):
        def close(self) -> None:
            raise OSError("no space left on device")

    last = Sink()
    path = tmp_path / "run.jsonl"
    monitor = Monitor(Muon([p]), to=[Full(), path, last])
    with pytest.warns(UserWarning, match="could not be closed, OSError: no space left on device"):
        monitor.close()
    assert last.closed
    Monitor(Muon([p]), to=path).close()


def test_a_file_that_could_not_be_written_may_be_opened_again(tmp_path: Path) -> None:
    sink = JsonLines(tmp_path / "run.jsonl")
    os.close(internals.file_of(sink).fileno())  # as on a full disk, writing and closing raise
    with pytest.raises(OSError, match="Bad file descriptor"):
        sink({"kind": "sample"})
    with pytest.raises(OSError, match="Bad file descriptor"):
        sink.close()
    JsonLines(tmp_path / "run.jsonl").close()


def test_a_monitor_that_nobody_has_any_more_lets_its_file_go(tmp_path: Path) -> None:
    def run() -> None:
        p = parameter(4, 3)
        optimizer = Muon([p])
        Monitor(optimizer, to=tmp_path / "run.jsonl")  # as in a function that raises
        set_gradients([p])
        optimizer.step()

    run()
    run()
    assert len(lines(tmp_path / "run.jsonl")) == 3


# --- mistakes -----------------------------------------------------------------------------------


def test_a_trainers_wrapper_is_taken_off() -> None:
    """Fabric and Lightning make a class that extends the optimizer's, and step the one inside."""
    model = mlp()
    inner = MuonW(model, lr=0.01)
    wrapper: Any = type("FabricMuonW", (MuonW,), {"__init__": lambda self: None})()
    wrapper.__dict__.update(inner.__dict__)
    wrapper.optimizer = inner
    monitor = Monitor(wrapper, every=1)
    train(model, inner, 1)
    assert monitor.latest is not None
    assert len(monitor.latest["matrices"]) == len(monitor.header["matrices"]) > 0
    monitor.close()


def test_a_monitor_that_was_refused_leaves_its_file_to_the_next(tmp_path: Path) -> None:
    optimizer = MuonW(mlp(), lr=0.01)
    group = optimizer.param_groups[0]
    names, path = list(group["param_names"]), tmp_path / "run.jsonl"
    group["param_names"] = names[1:]
    with pytest.raises(ValueError, match="names") as raised:
        Monitor(optimizer, to=path)
    group["param_names"] = names
    Monitor(optimizer, to=path).close()
    assert raised.traceback  # a notebook too holds the error, and what that refers to


def test_names_may_come_from_an_iterator() -> None:
    model = mlp()
    optimizer = MuonW(model, lr=0.01)
    monitor = Monitor(optimizer, every=1, spectra=iter(["update"]), fields=iter(["update_norm"]))  # type: ignore[arg-type]
    train(model, optimizer, 1)
    assert monitor.latest is not None
    assert all("update_norm" in each for each in monitor.latest["matrices"])
    monitor.close()


@pytest.mark.parametrize(
    ("arguments", "error", "remedy"),
    [
        ({"every": 0}, ValueError, "at least 1, got 0"),
        ({"every": 2.5}, ValueError, "whole number of steps"),
        ({"start": -1}, ValueError, "at least 0, got -1"),
        ({"spectra": ["sigma"]}, ValueError, "'gradient', 'momentum', 'update', 'weight'"),
        ({"spectra": "weight"}, ValueError, "is a list of"),
        ({"fields": "lr"}, ValueError, "'spectra.stable_rank', "),
        ({"fields": ["lr", "norm"]}, ValueError, "unknown name in fields 'norm': did you mean"),
        ({"max_bytes": 0}, ValueError, "a whole number of bytes, or None, at least 1, got 0"),
        ({"max_bytes": 1e6}, ValueError, "got 1000000.0"),
        ({"to": "run.csv"}, ValueError, "ends in .jsonl"),
        ({"to": "no/such/folder/run.jsonl"}, FileNotFoundError, "os.makedirs('no/such/folder')"),
        ({"to": 3}, TypeError, "a callable that takes the sample"),
    ],
)
def test_mistakes_are_refused_in_one_line(
    arguments: dict[str, Any], error: type[Exception], remedy: str
) -> None:
    optimizer = Muon([parameter(4, 3)])
    with pytest.raises(error) as caught:
        Monitor(optimizer, **arguments)
    assert remedy in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not internals.step_hooks(optimizer)  # nothing half done
    Monitor(optimizer).close()


def test_other_optimizers_are_refused() -> None:
    p = parameter(4, 3)
    with pytest.raises(TypeError, match="got SGD; of a wrapper give the optimizer inside"):
        Monitor(torch.optim.SGD([p], lr=0.1))  # type: ignore[arg-type]
    adamw = Muon([{"params": [p], "algorithm": "adamw", "lr": 0.1}])
    with pytest.raises(ValueError, match=r"nothing to monitor: print\(muonkit.route\(model\)\)"):
        Monitor(adamw)


def test_two_monitors_do_not_meet(tmp_path: Path) -> None:
    one, other = (Muon([nn.Parameter(torch.ones(3, 2))]) for _ in range(2))
    with Monitor(one, to=tmp_path / "run.jsonl"):
        with pytest.raises(ValueError, match="another monitor writes to"):
            Monitor(other, to=tmp_path / ".." / tmp_path.name / "run.jsonl")
        with pytest.raises(ValueError, match="has a monitor already"):
            Monitor(one)
    Monitor(other, to=tmp_path / "run.jsonl").close()


@pytest.mark.skipif(sys.platform == "win32", reason="files are not locked there")
@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
def test_monitors_of_two_processes_do_not_meet_and_a_forked_child_holds_nothing(
    tmp_path: Path,
) -> None:
    path = tmp_path / "run.jsonl"
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()

    def open_too() -> None:
        try:
            JsonLines(path)
        except ValueError as error:
            theirs.send(str(error))
        theirs.recv()  # as a worker of a DataLoader, which outlives the monitor

    sink = JsonLines(path)
    internals.file_of(sink).write(HEADER[:-9])
    child = context.Process(target=open_too)
    child.start()
    assert ours.poll(60)
    assert "a monitor of another process writes to" in ours.recv()
    assert path.read_bytes() == HEADER[:-9]  # not cut off as a line without an end
    sink.close()
    JsonLines(path).close()
    ours.send("end")
    child.join(60)
    assert child.exitcode == 0


@pytest.mark.skipif(sys.platform == "win32", reason="files are not locked there")
def test_a_reader_in_the_same_process_does_not_cost_the_lock(tmp_path: Path) -> None:
    """Not for a moment, and before any line is written."""
    sink = JsonLines(tmp_path / "run.jsonl")
    sink.path.read_bytes()  # closing any handle of the file drops a lock of the process
    code = f"from muonkit.monitor.sinks import JsonLines; JsonLines({str(sink.path)!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "a monitor of another process writes to" in done.stderr
    sink.close()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="nothing is forked there")
@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
def test_a_forked_child_writes_nothing_to_its_parents_file(tmp_path: Path) -> None:
    sink = JsonLines(tmp_path / "run.jsonl")
    ours, theirs = multiprocessing.get_context("fork").Pipe()

    def write_too() -> None:
        try:
            sink({"kind": "sample", "step": 1})
        except ValueError as error:
            theirs.send(str(error))
        sink.close()

    child = multiprocessing.get_context("fork").Process(target=write_too)
    child.start()
    assert ours.poll(60)
    assert "belongs to the process that this one was forked from" in ours.recv()
    child.join(60)
    sink({"kind": "sample", "step": 2})
    sink.close()
    assert [record["step"] for record in lines(sink.path)] == [2]


# --- files of others ----------------------------------------------------------------------------

HEADER = b'{"kind": "header", "format": 1, "every": 2, "matrices": []}\n'
SAMPLE = b'{"kind": "sample", "step": 1, "skipped": true}\n'


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"begun", "line 1 begins with b'begun', expected the header of a recording"),
        (b"{", "line 1 begins with b'{'"),
        (b'{"name": "notes"}\n{"name', "line 1 begins with"),
        (b'{"kind": "sample", "step": 1}\n', "expected the header of a recording"),
        (b"\n", "line 1 begins with"),
        (b"\xef\xbb\xbf" + HEADER, "line 1 begins with"),
        (HEADER.decode().encode("utf-16"), "line 1 begins with"),
        (bytes(40), "line 1 begins with"),
        (b'{"kind": "header", "format": 2}\n', "is of format 2, expected format 1"),
        (b'{"kind": "header", "format": oops}\n', "line 1 is damaged"),
        (b'{"kind": "header", "format": ' + b"[" * 10**5 + b"\n", "line 1 is damaged"),
        (HEADER + b"my own notes", "line 2 begins with b'my own notes', expected a record"),
        (HEADER + SAMPLE + bytes(20), "line 3 begins with"),
        (HEADER + b'{"mine": 1}', "line 2 begins with"),
    ],
)
def test_a_file_that_is_no_recording_is_refused_and_left_as_it_is(
    content: bytes, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "run.jsonl"
    path.write_bytes(content)
    optimizer = Muon([parameter(4, 3)])
    with pytest.raises(ValueError, match=r"nothing was changed\. Give another name") as caught:
        Monitor(optimizer, to=path)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert path.read_bytes() == content
    path.write_bytes(b"")
    Monitor(optimizer, to=path).close()  # nothing is held, and an empty file is as good as none


@pytest.mark.parametrize(
    ("left", "kept"),
    [
        (HEADER + SAMPLE, HEADER + SAMPLE),
        (HEADER + SAMPLE + SAMPLE[:-1], HEADER + SAMPLE + SAMPLE),  # whole but for the line's end
        (HEADER + SAMPLE + SAMPLE[:20], HEADER + SAMPLE),
        (HEADER + SAMPLE + b"{", HEADER + SAMPLE),
        (HEADER[:-9], b""),
        (HEADER[:-1], HEADER),
        (HEADER.replace(b"\n", b"\r\n"), HEADER.replace(b"\n", b"\r\n")),
    ],
)
def test_what_is_there_of_a_recording_stays_but_a_torn_line(
    left: bytes, kept: bytes, tmp_path: Path
) -> None:
    path = tmp_path / "run.jsonl"
    path.write_bytes(left)
    sink = JsonLines(path)
    assert path.read_bytes() == kept
    assert internals.size_of(sink) == len(kept)
    sink(json.loads(HEADER))
    sink.close()
    assert path.read_bytes() == (kept or HEADER)  # the same header is not written again


def test_what_is_no_file_is_named(tmp_path: Path) -> None:
    """A pipe would hold the training up until somebody reads it."""
    (tmp_path / "folder.jsonl").mkdir()
    places = {"is a folder": tmp_path / "folder.jsonl"}
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe.jsonl")
        (tmp_path / "link.jsonl").symlink_to(tmp_path / "pipe.jsonl")
        places |= {"is a pipe": tmp_path / "link.jsonl", "is a device": Path(os.devnull)}
    for message, place in places.items():
        with pytest.raises(ValueError, match=f"{message}, expected a file: name a .jsonl"):
            Monitor(Muon([parameter(4, 3)]), to=place)


# --- how large a recording grows ----------------------------------------------------------------

# Bytes of a matrix and sample at most, as docs/monitor.md says: without spectra, and for each of
# them; with a name of up to 40 characters.
BASE_BYTES, SPECTRUM_BYTES = 550, 400


def growth(tmp_path: Path, **options: Any) -> float:
    """Bytes of a line for each matrix more in it."""
    sizes = []
    for count in (3, 13):
        named = [(f"{'x' * 37}.{i:02}", parameter(9, 7, seed=i)) for i in range(count)]
        optimizer = Muon(named, lr=1.23456789e-5)
        path = tmp_path / f"{count}-{len(options.get('spectra', 'abc'))}.jsonl"
        with Monitor(optimizer, every=1, to=path, **options):
            set_gradients([p for _, p in named])
            for p in optimizer.param_groups[0]["params"]:
                p.grad.mul_(1.23456789e-12)
            optimizer.step()
        sizes.append(len(path.read_bytes().splitlines()[-1]))
    return (sizes[1] - sizes[0]) / 10


@pytest.mark.parametrize("kinds", [(), ("weight",), ("momentum", "update", "weight"), KINDS])
def test_a_recording_grows_by_what_the_page_says(kinds: tuple[str, ...], tmp_path: Path) -> None:
    grown = growth(tmp_path, spectra=kinds)
    limit = BASE_BYTES + SPECTRUM_BYTES * len(kinds)
    assert 0.75 * limit < grown <= limit  # the figure is no empty promise either
    page = (ROOT / "docs" / "monitor.md").read_text(encoding="utf-8")
    assert f"{BASE_BYTES} bytes and {SPECTRUM_BYTES} for each spectrum" in page


def test_fields_are_all_that_is_kept(tmp_path: Path) -> None:
    fields = ("update_to_weight", "spectra.stable_rank")
    p, gain = parameter(4, 3), parameter(4)
    optimizer = Muon([{"params": [p]}, {"params": [gain], "algorithm": "adamw", "lr": 0.1}])
    whole, given = [], []
    for to, options in ((whole, {}), (given, {"fields": fields})):
        with Monitor(optimizer, to=to.append, **options) as monitor:
            set_gradients([p, gain])
            optimizer.step()
        assert monitor.latest == to[0]
    for part in ("groups", "matrices", "parameters"):
        for record, full in zip(given[0][part], whole[0][part], strict=True):
            kept = set(full) - {"name", "index", "group", "algorithm", "members", "weight_decay"}
            assert kept - set(record) == kept - {"update_to_weight", "spectra"}
    (matrix,) = given[0]["matrices"]
    assert set(matrix) == {"name", "index", "group", "update_to_weight", "spectra"}
    assert set(matrix["spectra"]) == {"momentum", "update", "weight"}
    assert all(set(spectrum) == {"stable_rank"} for spectrum in matrix["spectra"].values())
    assert given[0]["ranks"] == []
    drawn = ("update_to_weight", "orthogonality_error", "spectra.stable_rank")
    assert growth(tmp_path, fields=drawn) <= 330  # as docs/monitor.md says


def test_without_a_spectrum_among_the_fields_none_is_computed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("computed")

    monkeypatch.setattr("muonkit.monitor.sample.spectra", refuse)
    p = parameter(4, 3)
    optimizer = Muon([p])
    set_gradients([p])
    with Monitor(optimizer, fields=("update_rms", "ranks")) as monitor:
        optimizer.step()
    assert set(monitor.latest["matrices"][0]) == {"name", "index", "group", "update_rms"}
    assert len(monitor.latest["ranks"]) == 1


def test_a_file_ends_where_max_bytes_says_and_the_training_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    run(path, 1)
    header, sample = path.read_bytes().splitlines(keepends=True)
    most = len(header) + 2 * len(sample) + 150
    path.unlink()
    p = parameter(4, 3)
    optimizer = Muon([("w", p)])
    seen: list[int] = []
    with Monitor(optimizer, 1, [path, lambda s: seen.append(s["step"])], max_bytes=most):
        for t in range(4):
            set_gradients([p], t)
            if t == 2:
                with pytest.warns(UserWarning, match="leaves no room for the sample of step 3"):
                    optimizer.step()
            else:
                optimizer.step()
    assert seen == [1, 2, 3, 4]
    assert path.stat().st_size <= most
    ended = path.read_bytes()
    assert lines(path)[-1] == {"kind": "end", "step": 3, "max_bytes": most}
    # Going on under the same cap says it again, and writes nothing; under a larger one it goes on.
    with pytest.warns(UserWarning, match="nothing more is recorded there, the training goes on"):
        run(path, 1, start=4, every=1, max_bytes=most)
    assert path.read_bytes() == ended
    run(path, 1, start=4, every=1, max_bytes=None)
    assert [r.get("step") for r in lines(path)][-2:] == [3, 5]


def test_a_file_without_room_for_its_header_stays_empty(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="leaves no room for the header"):
        Monitor(Muon([parameter(4, 3)]), to=tmp_path / "run.jsonl", max_bytes=100).close()
    assert (tmp_path / "run.jsonl").read_bytes() == b""


# --- what sinks do ------------------------------------------------------------------------------


def test_a_sink_that_changes_its_dict_harms_nobody(tmp_path: Path) -> None:
    def spoil(value: Any) -> None:
        parts = list(value.values()) if isinstance(value, dict) else list(value)
        for part in parts:
            if isinstance(part, dict | list):
                spoil(part)
        value.clear()

    found = {}
    for sinks in ((), (spoil,)):
        p, gain = parameter(4, 3), parameter(4)
        optimizer = Muon([{"params": [p]}, {"params": [gain], "algorithm": "adamw", "lr": 0.1}])
        path, seen = tmp_path / f"{len(sinks)}.jsonl", []
        with Monitor(optimizer, 1, [*sinks, path, seen.append, *sinks]) as monitor:
            for t in range(3):
                set_gradients([p, gain], t)
                optimizer.step()
                if sinks:
                    spoil(monitor.latest)
        found[len(sinks)] = seen, path.read_bytes()
    assert found[0] == found[1]
    assert [sample["step"] for sample in found[1][0]] == [1, 2, 3]


# --- groups that change -------------------------------------------------------------------------


def named_now(optimizer: Muon) -> list[tuple[str, tuple[int, ...]]]:
    return [
        (name, tuple(p.shape))
        for group in optimizer.param_groups
        for name, p in zip(group["param_names"], group["params"], strict=True)
    ]


@pytest.mark.parametrize("change", ["shape", "name", "swap", "remove", "regroup", "view", "add"])
def test_a_sample_speaks_of_what_is_in_the_groups_now(change: str, tmp_path: Path) -> None:
    """Whatever is replaced between two samples, header and records are the new parameters'."""
    params = [("a", parameter(6, 3)), ("b", parameter(4, 6, seed=1))]
    optimizer = Muon([{"params": params}, {"params": [("c", parameter(6, 5, seed=2))]}])
    first = optimizer.param_groups[0]

    def replace(group: dict[str, Any], at: int, new: nn.Parameter) -> None:
        group["params"][at] = new
        optimizer.reset_state([new])

    def step(seed: int) -> None:
        params = [p for group in optimizer.param_groups for p in group["params"]]
        set_gradients(params, seed)
        optimizer.step()

    path = tmp_path / "run.jsonl"
    with Monitor(optimizer, 1, path) as monitor:
        step(0)
        if change == "shape":
            replace(first, 0, parameter(8, 3, seed=3))
        elif change == "name":
            first["param_names"][1] = "renamed"
        elif change == "swap":
            first["params"].reverse()
            first["param_names"].reverse()
        elif change == "remove":
            del first["params"][0], first["param_names"][0]
        elif change == "regroup":
            del optimizer.param_groups[0]
        elif change == "view":
            first["view"] = "split(rows=2)"
        else:
            optimizer.add_param_group({"params": [("d", parameter(3, 9, seed=4))]})
        step(1)
    expected = named_now(optimizer)
    if change == "view":
        first_two = [("a", (3, 3)), ("a", (3, 3)), ("b", (2, 6)), ("b", (2, 6))]
        expected = [*first_two, *expected[2:]]
    assert [(m["name"], tuple(m["shape"])) for m in monitor.header["matrices"]] == expected
    assert [m["name"] for m in monitor.latest["matrices"]] == [name for name, _ in expected]
    kinds = [(record["kind"], record.get("step")) for record in lines(path)]
    assert kinds == [("header", None), ("sample", 1), ("header", None), ("sample", 2)]
    norms = {
        name: p.grad.norm().item()
        for group in optimizer.param_groups
        for name, p in zip(group["param_names"], group["params"], strict=True)
    }
    for name, norm in norms.items():
        parts = [m["gradient_norm"] for m in monitor.latest["matrices"] if m["name"] == name]
        assert math.hypot(*parts) == pytest.approx(norm, rel=TOLERANCE)
    assert sum(record["matrices"] for record in monitor.latest["ranks"]) == len(expected)


def test_a_sample_costs_no_more_for_a_matrix_where_there_are_many(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By count: a parameter's places are looked up as often for 4 experts as for 64."""
    from muonkit.monitor import records

    counts = []
    real = records.matrices_of
    for experts in (4, 64):
        calls = 0

        def counted(*arguments: Any) -> Any:
            nonlocal calls
            calls += 1
            return real(*arguments)

        p = parameter(experts, 4, 3)
        optimizer = Muon([{"params": [p], "view": "experts"}])
        with Monitor(optimizer, spectra=()) as monitor:
            monkeypatch.setattr(records, "matrices_of", counted)
            set_gradients([p])
            optimizer.step()
            monkeypatch.setattr(records, "matrices_of", real)
        assert len(monitor.latest["matrices"]) == experts
        counts.append(calls)
    assert counts[0] == counts[1]


def test_a_parameter_taken_out_without_its_name_is_named() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    optimizer = MuonW(model, lr=0.1)
    monitor = Monitor(optimizer, every=1)
    (group,) = [g for g in optimizer.param_groups if g["algorithm"] == "muon"]
    del group["params"][0]
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    with pytest.raises(ValueError, match=r"1 parameters and 2 names: change its 'params' and"):
        optimizer.step()
    del group["param_names"][0]
    optimizer.step()
    assert monitor.latest is not None
    assert [record["name"] for record in monitor.latest["matrices"]] == ["1.weight"]
    monitor.close()
