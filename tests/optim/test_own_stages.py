"""Stages, scales, schedules and views that a user gives as objects: everywhere where a name may
stand, with the same result in every layout, compiled and saved.
"""

from __future__ import annotations

import copy
import inspect
import io
import json
import math
import os
import pickle
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from muonkit import Monitor, Muon, MuonW, Rule, Stage, View, orthogonalize, route
from muonkit.convert import from_muonkit
from muonkit.newton_schulz.coefficients import SCHEDULES, Schedule, resolve
from muonkit.scale import SCALES
from muonkit.stages import AFTER
from tests.helpers import measures, zoo
from tests.helpers.paths import ROOT
from tests.helpers.ranks import Cases, Ranks, shared_folder

sys.path.insert(0, str(ROOT / "examples"))
from clip_rows import CLIP_ROWS, MOST, clip_rows_


def settle_rows_(O: Tensor, v: Tensor | None, beta2: float, step: float | Tensor) -> None:
    """No row longer than the average of its own norms so far, the bias corrected."""
    assert v is not None
    norm = torch.linalg.vector_norm(O, dim=-1, keepdim=True, dtype=v.dtype)
    v.lerp_(norm, 1 - beta2)
    O.mul_((v / (1 - beta2**step) / norm.clamp_min(1e-15)).clamp_max(1))


def smooth_(O: Tensor, v: Tensor | None, beta2: float, step: float | Tensor) -> None:
    """The average of the orthogonalized matrices in their place."""
    assert v is not None
    O.copy_(v.lerp_(O.to(v.dtype), 1 - beta2))


OWN = {
    each.name: each
    for each in (
        CLIP_ROWS,
        Stage("settle_rows", settle_rows_, "rows", 0.5),
        Stage("smooth", smooth_, "entries", 0.5),
    )
}


def width(rows: int, cols: int) -> float:
    return 0.1 * math.sqrt(rows + cols)


SCHEDULE = Schedule(((1.5, -0.5, 0.0),) * 2, (1.875, -1.25, 0.375), 2, margin=1.1)


def trained(steps: int = 3, compiled: bool = False, **options: Any) -> Muon:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 9), nn.ReLU(), nn.Linear(9, 2))
    optimizer = MuonW(model, lr=0.05, adamw_lr=1e-3, **{"ns_dtype": "float32", **options})
    train(optimizer, steps, compiled)
    return optimizer


def train(optimizer: Muon, steps: int, compiled: bool = False) -> None:
    step = torch.compile(optimizer.step, backend="eager") if compiled else optimizer.step
    for t in range(steps):
        generator = torch.Generator().manual_seed(t)
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad = torch.randn(p.shape, generator=generator)
        step()


def parameters(optimizer: Muon) -> list[Tensor]:
    return [p.detach().clone() for group in optimizer.param_groups for p in group["params"]]


def saved(optimizer: Muon) -> dict[str, Any]:
    """The state dict, by way of a file that runs no code when it is loaded."""
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    loaded: dict[str, Any] = torch.load(file, weights_only=True)
    return loaded


# --- every layout -------------------------------------------------------------------------------

CASES = Cases()
MANY = [name for name in zoo.LAYOUTS if name not in ("single", "hsdp_tp")]


# What keeps no state in every layout; what does travels as NorMuon's and AdaMuon's state, which
# tests/distributed/test_parity.py has in all of them. MUONKIT_TEST_ALL=1 has the whole product.
WHOLE = os.environ.get("MUONKIT_TEST_ALL") == "1"
SOME = MANY if WHOLE else ["zero1", "fsdp2_tp"]


@CASES.on(*((2, 4) if WHOLE else (4,)), layout=MANY, name=["clip_rows"])
@CASES.on(*((2, 4) if WHOLE else (4,)), layout=SOME, name=["settle_rows", "smooth"])
def equals_one_process(layout: str, name: str) -> measures.Parity:
    plain, ours = (measures.alone(v)["parameters"] for v in ("plain", OWN[name]))
    assert max(zoo.deviation(ours[p], plain[p]) for p in plain) > 1e-2, "it was not applied"
    return measures.parity(layout, OWN[name])


@CASES.on(4, layout=SOME)
def equals_one_process_with_a_scale_and_a_schedule(layout: str) -> None:
    options = {"after": CLIP_ROWS, "adjust_lr_fn": width, "ns_coefficients": SCHEDULE}
    model, optimizer = measures.make(layout, **options)
    measures.train(model, optimizer)
    alone, its = measures.make("single", **options)
    measures.train(alone, its)
    expected = measures.tensors_of(alone, its)
    measures.assert_close(measures.deviations(model, optimizer, expected))


@CASES.on(4, name=list(OWN))
def goes_on_from_a_checkpoint_of_another_layout(name: str) -> None:
    with shared_folder() as folder:
        measures.save(folder, "zero1", OWN[name])
        apart = measures.resumed(folder, "fsdp2_tp", OWN[name])
    measures.assert_close(apart)


@CASES.on(4)
def ranks_with_other_stages_do_not_step() -> None:
    stage = OWN["clip_rows"] if dist.get_rank() == 0 else OWN["smooth"]
    model, optimizer = measures.make("ddp", after=stage)
    zoo.set_gradients(model, 0)
    with pytest.raises(RuntimeError, match=r"after.*clip_rows.*on rank 0.*smooth"):
        optimizer.step()


@pytest.mark.parametrize(("world_size", "case"), CASES.ids())
def test_on_ranks(world_size: int, case: str, ranks: Ranks) -> None:
    for value in ranks.outcome(world_size, case).check():
        if value is not None:
            measures.assert_close(value.apart)
            assert value.sent == value.planned


# --- on one device ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OWN)
def test_a_stack_is_its_matrices_one_by_one_and_stays_finite(name: str) -> None:
    stage = OWN[name]
    O = orthogonalize(torch.randn(4, 6, 9, generator=torch.Generator().manual_seed(0)))
    O[3] = 0
    size = {"none": None, "rows": (4, 6, 1), "entries": (4, 6, 9)}[stage.state]
    v = None if size is None else torch.zeros(size)
    loop, past = O.clone(), None if v is None else v.clone()
    for t in (1, 2):
        stage.apply_(O, v, stage.beta2 or 0.0, t)
        for i in range(4):
            own = None if past is None else past[i : i + 1]
            stage.apply_(loop[i : i + 1], own, stage.beta2 or 0.0, t)
    torch.testing.assert_close(O, loop)
    assert O.isfinite().all()
    assert not O[3].any()


def test_the_clip_clips() -> None:
    O = orthogonalize(torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0)))
    before = O.norm(dim=-1)
    limit = MOST * before.mean(dim=-1, keepdim=True)
    assert (before > limit).any()
    clip_rows_(O, None, 0.0, 0)
    torch.testing.assert_close(O.norm(dim=-1), before.minimum(limit))


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("state", ["none", "rows", "entries"])
def test_a_step_applies_a_stage_whatever_it_keeps(state: Any, compiled: bool) -> None:
    stop = Stage("stop", lambda O, v, beta2, step: O.zero_(), state)
    p = nn.Parameter(torch.randn(4, 6, generator=torch.Generator().manual_seed(0)))
    before = p.detach().clone()
    train(Muon([p], lr=0.1, weight_decay=0.0, after=stop), 2, compiled)
    assert torch.equal(p, before)


def test_a_function_that_fails_in_another_dtype_is_refused_when_it_is_made() -> None:
    def narrow_(O: Tensor, v: Tensor | None, beta2: float, step: float | Tensor) -> None:
        O.mul_(torch.linalg.vector_norm(O, dim=-1, keepdim=True, dtype=torch.float32))

    with pytest.raises(TypeError, match=r"on matrices in torch\.float64 it failed"):
        Stage("narrow", narrow_)


def test_a_stage_without_state_is_given_its_own_beta2() -> None:
    given = []
    stage = Stage("tell", lambda O, v, beta2, step: given.append((beta2, step)), beta2=0.9)
    for after, stage_beta2 in ((stage, None), ([stage, "normuon"], None), (stage, 0.5)):
        p = nn.Parameter(torch.eye(4, 6))
        optimizer = Muon([p], after=after, stage_beta2=stage_beta2)
        given.clear()
        p.grad = torch.eye(4, 6)
        optimizer.step()
        assert given == [(0.9 if stage_beta2 is None else 0.5, 0)]


def test_a_list_of_stages_is_looked_at_again_where_somebody_adds_to_it() -> None:
    p = nn.Parameter(torch.eye(4, 6))
    optimizer = Muon([p])
    p.grad = torch.ones(4, 6)
    (group,) = optimizer.param_groups
    group["after"] = ["normuon"]
    optimizer.step()
    before = p.detach().clone()
    for name, told in (("adamuon", "normuon and adamuon keep a state each"), ("no", "unknown")):
        group["after"].append(name)
        with pytest.raises(ValueError, match=f"{told}.*nothing was changed"):
            optimizer.step()
        group["after"].pop()
    assert torch.equal(p, before)
    group["after"].append("muon_plus")
    optimizer.step()
    assert not torch.equal(p, before)


def test_the_guide_has_the_example() -> None:
    guide = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert inspect.getsource(clip_rows_) in guide


@pytest.mark.parametrize("name", OWN)
def test_compiled_is_eager_with_objects(name: str) -> None:
    options = {"after": OWN[name], "adjust_lr_fn": width, "ns_coefficients": SCHEDULE}
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # dynamo's own remarks
        compiled = trained(compiled=True, **options)
    for p, q in zip(parameters(trained(**options)), parameters(compiled), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


def test_objects_do_what_their_names_do() -> None:
    names = {"after": "normuon", "adjust_lr_fn": "spectral", "ns_coefficients": "cans"}
    objects = {
        "after": AFTER["normuon"],
        "adjust_lr_fn": lambda rows, cols: SCALES["spectral"](rows, cols),
        "ns_coefficients": SCHEDULES["cans"],
    }
    expected = parameters(trained(**names))
    for p, q in zip(expected, parameters(trained(**objects)), strict=True):
        assert torch.equal(p, q)
    for steps in (2, 3, 7):
        assert resolve(SCHEDULE, steps).margin == 1.1
        assert resolve(SCHEDULE, steps).triples[2:] == ((1.875, -1.25, 0.375),) * (steps - 2)


def test_views_are_objects_too() -> None:
    p = nn.Parameter(torch.zeros(6, 4))
    view = View.parse("split(rows=3)")
    (group,) = Muon([{"params": [p], "view": view}]).param_groups
    assert group["view"] == str(view)
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 6))
    routes = route(model, [Rule("0.weight", view=view)], scale=width)
    assert routes[0].view == str(view)
    assert routes[0].scale == width(2, 4)
    assert MuonW(routes, lr=0.1, adamw_lr=0.1).describe()[0]["scale"] == width(2, 4)
    with pytest.raises(ValueError, match="unknown view 'cube'"):
        Muon([{"params": [p], "view": View(("cube",))}])


def test_rules_take_objects() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 2))
    own = {"after": CLIP_ROWS, "adjust_lr_fn": width}
    routes = route(model, [Rule("1.weight", options=own)])
    told = {row["name"]: row["options"] for row in json.loads(routes.to_json())["routes"]}
    assert told["1.weight"] == {"after": "clip_rows", "adjust_lr_fn": "width"}
    groups = MuonW(routes, lr=0.1).param_groups
    assert [g["after"] for g in groups if g["algorithm"] == "muon"] == [(), (CLIP_ROWS,)]


# --- saved and told -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OWN)
def test_a_state_dict_has_names_and_a_run_goes_on_from_it(name: str) -> None:
    options = {"after": OWN[name], "adjust_lr_fn": width, "ns_coefficients": SCHEDULE}
    first, whole = trained(2, **options), trained(4, **options)
    state = saved(first)
    group = state["param_groups"][0]
    assert (group["after"], group["adjust_lr_fn"]) == ((name,), "width")
    json.dumps({**group, "params": []})
    second = trained(0, **{**options, "ns_coefficients": "cans"})
    with torch.no_grad():
        for p, q in zip(second.param_groups, first.param_groups, strict=True):
            for mine, theirs in zip(p["params"], q["params"], strict=True):
                mine.copy_(theirs)
    second.load_state_dict(state)
    assert second.param_groups[0]["after"] == (OWN[name],)
    assert second.param_groups[0]["adjust_lr_fn"] is width
    for t in (2, 3):
        generator = torch.Generator().manual_seed(t)
        for p in (p for group in second.param_groups for p in group["params"]):
            p.grad = torch.randn(p.shape, generator=generator)
        second.step()
    for p, q in zip(parameters(whole), parameters(second), strict=True):
        assert torch.equal(p, q)


def test_what_a_state_dict_names_is_given_to_the_optimizer_that_loads_it() -> None:
    clipped, scaled = saved(trained(after=CLIP_ROWS)), saved(trained(adjust_lr_fn=width))
    optimizer = trained()
    before = parameters(optimizer)
    with pytest.raises(ValueError, match=r"unknown after 'clip_rows'.* that loads it, as after="):
        optimizer.load_state_dict(clipped)
    with pytest.raises(ValueError, match=r"unknown adjust_lr_fn 'width'.* loads it, as adjust"):
        optimizer.load_state_dict(scaled)
    assert all(map(torch.equal, before, parameters(optimizer)))
    # A name of muonkit's own is found, whatever this optimizer was made with.
    mine = trained(after=CLIP_ROWS, adjust_lr_fn=width)
    mine.load_state_dict(saved(optimizer))
    assert mine.param_groups[0]["after"] == ()
    assert mine.param_groups[0]["adjust_lr_fn"] == "unit_rms"


def test_an_optimizer_with_objects_is_copied_and_pickled() -> None:
    optimizer = trained(after=CLIP_ROWS, adjust_lr_fn=width)
    for twin in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert twin.param_groups[0]["after"] == (CLIP_ROWS,)
        train(twin, 1)
    assert copy.deepcopy(optimizer).param_groups[0]["after"][0] is CLIP_ROWS


def test_other_libraries_get_what_they_can_have_of_it() -> None:
    optimizer = trained(after=CLIP_ROWS, adjust_lr_fn=width, ns_coefficients=SCHEDULE)
    exported = from_muonkit("keller", optimizer)
    notes = str(exported)
    assert "after=(Stage('clip_rows'" in notes
    assert "ns_coefficients" in notes


def test_whoever_tells_of_a_stage_tells_its_name(tmp_path: Path) -> None:
    optimizer = trained(0, after=CLIP_ROWS)
    assert optimizer.describe()[0]["after"] == "clip_rows"
    with Monitor(optimizer, every=1, to=tmp_path / "run.jsonl"):
        train(optimizer, 1)
    header = json.loads((tmp_path / "run.jsonl").read_text(encoding="utf-8").splitlines()[0])
    assert {matrix["after"] for matrix in header["matrices"]} == {"clip_rows"}
    assert "0x" not in repr(CLIP_ROWS)


def test_a_plan_counts_the_state_of_a_stage() -> None:
    """Each matrix's box of what its stage keeps."""
    for name, columns in (("clip_rows", None), ("settle_rows", 1), ("smooth", 6)):
        (plan,) = trained(0, after=OWN[name]).plan().plans
        box = plan.matrices[0].stage_box
        assert (box if box is None else box[1][1]) == columns


# --- mistakes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "error", "told"),
    [
        (lambda: Stage("clip rows", clip_rows_), ValueError, "an identifier, got 'clip rows'"),
        (lambda: Stage("x", clip_rows_, "row"), ValueError, "did you mean 'rows'"),
        (lambda: Stage("x", clip_rows_, beta2=1.0), ValueError, r"in \[0, 1\), got 1.0"),
        (lambda: Stage("x", clip_rows_, beta2="a"), ValueError, r"in \[0, 1\), got 'a'"),  # type: ignore[arg-type]
        (lambda: Stage("x", lambda O: O), TypeError, r"apply_\(O, v, beta2, step\)"),
        (lambda: Stage("x", lambda O, v, b, s: O * 2), TypeError, r"write O.copy_"),
        (lambda: Stage("x", lambda O, v, b, s: O.div_(O.norm())), ValueError, "clamp_min"),
        (lambda: trained(after=clip_rows_), ValueError, r"muonkit.Stage\(name, function\)"),
        (lambda: trained(after=Stage("normuon", smooth_, "entries")), ValueError, "another name"),
        (lambda: trained(adjust_lr_fn=lambda n: 1.0), TypeError, r"\(rows, cols\) -> float"),
        (lambda: trained(adjust_lr_fn=lambda m, n: "1"), TypeError, "returned '1'"),
        (lambda: trained(adjust_lr_fn=lambda m, n: 8.0 - m), ValueError, "not negative"),
        (lambda: trained(ns_coefficients=Schedule(())), ValueError, "at least one triple"),
        (lambda: trained(ns_coefficients=SCHEDULE, ns_steps=1), ValueError, "cut the schedule"),
    ],
)
def test_another_form_is_refused_when_it_is_given(
    make: Any, error: type[Exception], told: str
) -> None:
    with pytest.raises(error, match=told):
        make()


def test_a_name_of_muonkits_own_scale_is_taken() -> None:
    def spectral(rows: int, cols: int) -> float:
        return 1.0

    with pytest.raises(ValueError, match="spectral has the name of one of muonkit's own"):
        trained(adjust_lr_fn=spectral)
