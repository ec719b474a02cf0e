"""Stages: the published equations, in every dtype and layout, and nothing non-finite."""

from __future__ import annotations

import math
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from muonkit import Muon, MuonW, orthogonalize
from muonkit.scale import SCALES
from muonkit.stages import (
    AFTER,
    BEFORE,
    CONSTRAINTS,
    STAGES,
    Constraint,
    Stage,
    check_stages,
    stages_of,
)
from muonkit.views import blocks_of, row_blocks, row_shape
from tests.helpers.stages import NAMES, stage_options

ALL = {**BEFORE, **AFTER}
STATEFUL = [name for name, stage in ALL.items() if stage.state != "none"]
SHAPES = [(5, 8), (8, 5), (1, 6), (6, 1), (4, 4), (1, 1)]
# A rounding of O's dtype, and for the wide ones those of a sum of squares besides.
TOLERANCE = {
    torch.float64: 1e-12,
    torch.float32: 2e-6,
    torch.bfloat16: 2**-8,
    torch.float16: 2**-11,
}


def orthogonal(count: int, rows: int, cols: int, seed: int = 0) -> Tensor:
    """Stacks as the orthogonalizer returns them, in float64."""
    generator = torch.Generator().manual_seed(seed)
    G = torch.randn(count, rows, cols, generator=generator, dtype=torch.float64)
    return orthogonalize(G, ns_dtype="float64")


def state_of(name: str, O: Tensor, dtype: torch.dtype = torch.float32) -> Tensor | None:
    count, rows, cols = O.shape
    state = ALL[name].state
    if state == "none":
        return None
    shape = (count, rows, 1) if state == "rows" else (count, rows, cols)
    return torch.zeros(shape, dtype=dtype)


def transcription(
    name: str, O: list[list[float]], v: list[list[float]], beta2: float, t: int
) -> list[list[float]]:
    """The equations for one matrix, number by number; rewrites v (rows x columns)."""
    m, n = len(O), len(O[0])
    entries = list(product(range(m), range(n)))
    norm = math.sqrt(sum(O[i][j] ** 2 for i, j in entries))
    for i, j in entries:
        seen = sum(x**2 for x in O[i]) / n if name == "normuon" else O[i][j] ** 2
        v[i][j] = beta2 * v[i][j] + (1 - beta2) * seen
    eps, bias, target = 1e-10, 1.0, norm
    if name == "adamuon":
        eps, bias, target = 1e-8, 1 - beta2**t, math.sqrt(min(m, n))
    hat = [[O[i][j] / (math.sqrt(v[i][j] / bias) + eps) for j in range(n)] for i in range(m)]
    norm_hat = math.sqrt(sum(hat[i][j] ** 2 for i, j in entries))
    return [[hat[i][j] * target / norm_hat for j in range(n)] for i in range(m)]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("rows", "cols"), SHAPES)
@pytest.mark.parametrize("name", STATEFUL)
def test_five_steps_are_the_published_equations(
    name: str, rows: int, cols: int, dtype: torch.dtype
) -> None:
    stage, beta2 = ALL[name], ALL[name].beta2
    assert beta2 is not None
    v, expected_v = None, [[[0.0] * cols for _ in range(rows)] for _ in range(3)]
    for t in range(1, 6):
        # Steps of different size, or a wrong weight of the past would cancel in the norms.
        O = (orthogonal(3, rows, cols, seed=t) * (0.5 + t / 5)).to(dtype)
        if v is None:
            v = state_of(name, O, torch.promote_types(dtype, torch.float32))
        assert v is not None
        expected = [
            transcription(name, matrix.tolist(), past, beta2, t)
            for matrix, past in zip(O.double(), expected_v, strict=True)
        ]
        stage.apply_(O, v, beta2, t)
        rtol = TOLERANCE[dtype]
        torch.testing.assert_close(
            O.double(), torch.tensor(expected, dtype=torch.float64), rtol=rtol, atol=rtol * 1e-3
        )
        wide = torch.tensor(expected_v, dtype=v.dtype)
        torch.testing.assert_close(v.expand_as(wide), wide, rtol=2e-6, atol=1e-12)


def test_adamuon_corrects_the_bias_inside_eps_too() -> None:
    # Entries of 1e-8 are where eps shows; without the correction it would be 30 times too large.
    O = torch.tensor([[[3e-8, 1.0], [1.0, 2e-8]]], dtype=torch.float64)
    v = torch.zeros_like(O)
    expected = transcription("adamuon", O[0].tolist(), [[0.0, 0.0], [0.0, 0.0]], 0.999, 1)
    ALL["adamuon"].apply_(O, v, 0.999, 1)
    torch.testing.assert_close(O[0], torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=0)


@pytest.mark.parametrize("shape", [(), (1,), (3, 1, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.int64])
def test_the_step_may_be_a_tensor_and_differ_between_matrices(
    shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    ages = [1, 4, 900] if len(shape) == 3 else [7, 7, 7]
    # Small enough for eps, and with it the step, to matter.
    O, past = orthogonal(3, 4, 6) * 1e-8, 1e-18 * torch.rand(3, 4, 6, dtype=torch.float64)
    alone = O.clone()
    for i, t in enumerate(ages):
        ALL["adamuon"].apply_(alone[i : i + 1], past[i : i + 1].clone(), 0.999, t)
    step = torch.tensor(ages, dtype=dtype)[: math.prod(shape)].reshape(shape)
    ALL["adamuon"].apply_(O, past.clone(), 0.999, step)
    # The correction is in the step's precision: 1 - 0.999 in float32.
    torch.testing.assert_close(O, alone, rtol=1e-4, atol=1e-12)


@pytest.mark.parametrize("name", ALL)
def test_a_stack_is_its_matrices_one_by_one(name: str) -> None:
    stage, beta2 = ALL[name], ALL[name].beta2 or 0.0
    O = orthogonal(4, 6, 9).float() * torch.tensor([1.0, 1e-3, 1.2, 0.0]).reshape(4, 1, 1)
    v = state_of(name, O)
    loop = [o.clone()[None] for o in O]
    loop_v = [state_of(name, o) for o in loop]
    for t in (1, 2):
        stage.apply_(O, v, beta2, t)
        for o, past in zip(loop, loop_v, strict=True):
            stage.apply_(o, past, beta2, t)
    torch.testing.assert_close(O, torch.cat(loop), rtol=1e-6, atol=1e-9)
    if v is not None:
        assert loop_v[0] is not None
        torch.testing.assert_close(v[:1], loop_v[0], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ALL)
def test_strided_memory_is_rewritten_in_place(name: str, dtype: torch.dtype) -> None:
    stage, beta2 = ALL[name], ALL[name].beta2 or 0.0
    # The matrices of a padded batch, stored transposed: what the step takes a stack from.
    whole = torch.full((3, 12, 7), 7.0, dtype=dtype)
    O = whole[:, :9, :5].mT
    O.copy_(orthogonal(3, 5, 9))
    twin = O.contiguous()
    v, twin_v = state_of(name, O), state_of(name, O)
    if v is not None:
        v = v.mT.contiguous().mT
    stage.apply_(O, v, beta2, 1)
    stage.apply_(twin, twin_v, beta2, 1)
    # Sums of squares in another order may end on the other side of a rounding.
    rtol = max(2e-6, torch.finfo(dtype).eps)
    torch.testing.assert_close(O, twin, rtol=rtol, atol=0)
    assert (whole[:, 9:] == 7).all()
    assert (whole[:, :, 5:] == 7).all()


@pytest.mark.parametrize(("rows", "cols"), SHAPES)
def test_the_norm_of_the_result(rows: int, cols: int) -> None:
    before = orthogonal(3, rows, cols).float() * 1.3
    full = torch.full((3,), math.sqrt(min(rows, cols)))
    expected = {
        "muoneq": torch.full((3,), math.sqrt(rows)),
        "normuon": before.norm(dim=(1, 2)),
        "adamuon": full,
        "muon_plus": full,
    }
    for name, stage in ALL.items():
        O, v = before.clone(), state_of(name, before)
        for t in (1, 2):
            O.copy_(before)
            stage.apply_(O, v, stage.beta2 or 0.0, t)
        torch.testing.assert_close(O.norm(dim=(1, 2)), expected[name], rtol=2e-6, atol=0)


HARD = {
    "zero": torch.zeros(1, 4, 6),
    "zero rows": torch.eye(4, 6)[None] * torch.tensor([1.0, 0, 0, 1]).reshape(1, 4, 1),
    "zero columns": torch.eye(6, 4)[None],
    "noise beside a row": torch.cat([torch.ones(1, 1, 6) / 6**0.5, 1e-12 * torch.ones(1, 3, 6)], 1),
    "below eps": torch.full((1, 4, 6), 1e-11),
    "squares underflow": torch.full((1, 4, 6), 1e-30),
    "denormal": torch.full((1, 4, 6), 1e-42),
    "large": torch.full((1, 4, 6), 1e4),
}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("matrix", HARD)
@pytest.mark.parametrize("name", ALL)
def test_pitfall_4_nothing_non_finite_comes_out(name: str, matrix: str, dtype: torch.dtype) -> None:
    stage, beta2 = ALL[name], ALL[name].beta2 or 0.0
    usual = orthogonal(1, *HARD[matrix].shape[1:]).to(dtype)
    v = state_of(name, usual)
    # At first, then after usual matrices, and a usual one after it.
    for t, given in enumerate([HARD[matrix], usual, HARD[matrix], HARD[matrix], usual], start=1):
        O = given.to(dtype, copy=True)
        before = O.double().norm().item()
        stage.apply_(O, v, beta2, t)
        assert O.isfinite().all()
        assert v is None or v.isfinite().all()
        keeps = name == "normuon"
        most = before if keeps else math.sqrt(O.shape[1] if name in BEFORE else min(O.shape[1:]))
        rounding = 2 * max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)  # of O and of v
        assert O.double().norm().item() <= most * (1 + rounding) + 1e-30
        assert (O[given.to(dtype) == 0] == 0).all()
    # The last usual matrix is not lost in what came before.
    assert O.double().norm().item() >= 0.5


def test_a_nan_stays_in_its_matrix() -> None:
    for name in STATEFUL:
        O = orthogonal(3, 4, 6).float()
        O[1, 2, 3] = math.nan
        ALL[name].apply_(O, state_of(name, O), 0.9, 1)
        assert O[1].isnan().any()
        assert O[[0, 2]].isfinite().all()


def test_normuon_keeps_one_number_per_output() -> None:
    """Of a parameter stored in x out the outputs are columns; its view says so."""
    w = orthogonal(1, 6, 4)[0].float() * torch.arange(1.0, 5.0)
    (block,), (row,) = blocks_of("transpose", (6, 4)), row_blocks("transpose", (6, 4))
    kept = torch.zeros(row_shape("transpose", (6, 4)))
    O, v = block.to_matrices(w.clone()), row.to_matrices(kept)
    ALL["normuon"].apply_(O, v, 0.95, 1)
    torch.testing.assert_close(kept, 0.05 * w.square().mean(0, keepdim=True))
    norms = block.to_regions(O)[0].norm(dim=0)
    # After the first step every output's weights have one norm.
    torch.testing.assert_close(norms, norms[:1].expand(4), rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", ALL)
def test_nothing_is_read_back_to_the_host(name: str) -> None:
    O = torch.empty(3, 4, 6, dtype=torch.bfloat16, device="meta")
    v = state_of(name, O)
    step = torch.empty(3, 1, 1, device="meta")
    # A meta tensor has no values: whoever asks for one is refused.
    ALL[name].apply_(O, None if v is None else v.to("meta"), 0.9, step)


@pytest.mark.parametrize("name", ALL)
def test_one_graph_when_compiled(name: str) -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    stage, beta2 = ALL[name], ALL[name].beta2 or 0.0
    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(backend=counter, fullgraph=True)
    def apply_(O: Tensor, v: Tensor | None, step: Tensor) -> None:
        stage.apply_(O, v, beta2, step)

    O = orthogonal(3, 9, 5).to(torch.bfloat16).mT
    v, twin_v = state_of(name, O), state_of(name, O)
    for t in (1, 2, 3):
        O.copy_(orthogonal(3, 5, 9, seed=t))
        twin = O.clone()
        apply_(O, v, torch.tensor(float(t)))
        stage.apply_(twin, twin_v, beta2, t)
        torch.testing.assert_close(O, twin)
    assert counter.frame_count == 1


def options(**given: Any) -> dict[str, Any]:
    return {"before": (), "after": (), "constraint": (), **given}


def test_an_unknown_stage_lists_the_options() -> None:
    for option, table in STAGES.items():
        for name, stage in table.items():
            for spelling in (name, [name], (stage,)):
                group = options(**{option: spelling})
                check_stages(group)
                assert getattr(stages_of(group), option) == (stage,)
        names = ", ".join(map(repr, table))
        for wrong in ("NorMuon", "", 3, ["nor"]):
            with pytest.raises(ValueError, match=f"unknown {option} .*one of {names}"):
                check_stages(options(**{option: wrong}))


def test_two_stages_that_keep_a_state_are_refused() -> None:
    with pytest.raises(ValueError, match="normuon and adamuon keep a state each"):
        check_stages(options(after=["normuon", "adamuon"]))
    with pytest.raises(ValueError, match="a name twice"):
        check_stages(options(after=["muon_plus", "muon_plus"]))
    with pytest.raises(ValueError, match="muonkit's own"):
        check_stages(options(after=Stage("muon_plus", lambda O, v, beta2, step: None)))
    with pytest.raises(ValueError, match="muonkit's own"):
        check_stages(options(constraint=Constraint("hyperball", lambda w: w)))


@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1.0, 1e12])
def test_muoneq_gives_every_row_one_norm_whatever_its_scale(scale: float) -> None:
    U = torch.randn(3, 6, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    U *= torch.logspace(-3, 3, 6, dtype=torch.float64)[:, None]
    U[1, 2] = 0
    # arXiv 2603.28254, transcribed; a common factor of a matrix makes no difference.
    row = U.norm(dim=-1, keepdim=True)
    mean = U.norm(dim=(-2, -1), keepdim=True) / 6**0.5
    expected = torch.where(row > 0, U * mean / row.clamp_min(1e-300), 0.0)
    given = (U * scale).float()
    BEFORE["muoneq"].apply_(given, None, 0.0, 0)
    torch.testing.assert_close(given.double(), expected / mean, rtol=1e-6, atol=1e-7)


def test_muon_plus_is_the_published_equation() -> None:
    O = orthogonal(3, 5, 8) * 0.7
    expected = O * math.sqrt(5) / O.norm(dim=(1, 2), keepdim=True)
    AFTER["muon_plus"].apply_(O, None, 0.0, 0)
    torch.testing.assert_close(O, expected, rtol=1e-14, atol=0)


VIEWED = [("matrix", (5, 8)), ("experts > transpose", (3, 6, 4))]

# --- constraints ----------------------------------------------------------------------------------


def published(name: str, W: Tensor, O: Tensor, lr: float, decay: float, scale: float) -> Tensor:
    """One step of a constraint on one matrix, in float64."""
    before = W.norm()
    if name == "hyperball":
        moved = W - lr * before * O / O.norm()
        return moved * before / moved.norm()
    if name == "relative_update":
        return W - lr * decay * W - lr * O * before / O.norm()
    moved = W - lr * decay * W - lr * scale * O
    grown = moved.norm() - before
    return moved * (before + grown * (0.5 if grown > 0 else 1.0)) / moved.norm()


@pytest.mark.parametrize("outward", [False, True])
@pytest.mark.parametrize(("view", "shape"), VIEWED)
@pytest.mark.parametrize("name", CONSTRAINTS)
def test_a_step_is_the_published_constraint(
    name: str, view: str, shape: tuple[int, ...], outward: bool
) -> None:
    generator = torch.Generator().manual_seed(0)
    p = torch.nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64))
    options: dict[str, Any] = {"lr": 0.1, "weight_decay": 0.3, "adjust_lr_fn": "spectral"}
    kwargs: dict[str, Any] = {"momentum": 0.0, "nesterov": False, "ns_dtype": "float64"}
    optimizer = Muon([{"params": [p], "view": view}], constraint=name, **options, **kwargs)
    (block,) = blocks_of(view, shape)
    scale = SCALES["spectral"](block.rows, block.cols)
    for _ in range(4):
        # Along the weight it shrinks or grows; across it the norm changes by rounding alone.
        p.grad = torch.randn(shape, generator=generator, dtype=torch.float64)
        p.grad -= p.detach() if outward else -p.detach()
        W = block.to_matrices(p.detach()[None].clone())
        O = orthogonalize(block.to_matrices(p.grad[None]), ns_dtype="float64")
        expected = [published(name, w, o, 0.1, 0.3, scale) for w, o in zip(W, O, strict=True)]
        optimizer.step()
        now = block.to_matrices(p.detach()[None])
        torch.testing.assert_close(now, torch.stack(expected), rtol=1e-12, atol=1e-12)


def test_constraints_in_a_list_hold_together() -> None:
    p = torch.nn.Parameter(torch.eye(4, 6))
    optimizer = Muon([p], lr=0.5, weight_decay=0.0, constraint=["relative_update", "radial_brake"])
    p.grad = -p.detach().clone()
    optimizer.step()
    # The update has half the weight's norm and points outward: a half of that is left.
    assert float(p.detach().norm()) == pytest.approx(2 * 1.25, rel=1e-6)


def test_hyperball_keeps_the_norm() -> None:
    p = torch.nn.Parameter(torch.randn(24, 40, generator=torch.Generator().manual_seed(0)))
    before = float(p.detach().double().norm())
    optimizer = Muon([p], lr=0.05, constraint="hyperball", ns_dtype="float32")
    for t in range(200):
        p.grad = torch.randn(24, 40, generator=torch.Generator().manual_seed(t))
        optimizer.step()
    assert abs(float(p.detach().double().norm()) / before - 1) <= 1e-5
    narrow = torch.nn.Parameter(p.detach().bfloat16())
    for name in ("hyperball", "radial_brake"):
        with pytest.raises(ValueError, match=f"bfloat16, which constraint='{name}' cannot hold"):
            Muon([narrow], constraint=name)
    Muon([narrow], constraint="relative_update")


def test_a_weight_of_zeros_is_refused_where_it_would_stay_zero() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Linear(6, 6), torch.nn.Linear(6, 2))
    torch.nn.init.zeros_(model[1].weight)
    for name in ("hyperball", "relative_update"):
        with pytest.raises(ValueError, match=rf"1\.weight \(6, 6\) is zero, and .*{name}"):
            MuonW(model, constraint=name, adamw_lr=1e-3)
    MuonW(model, constraint="radial_brake")
    # A frozen one may be zero, until it is trained; one on the meta device, until it has memory.
    model[1].weight.requires_grad_(False)
    optimizer = MuonW(model, constraint="hyperball", adamw_lr=1e-3)
    model[1].weight.requires_grad_(True)
    with pytest.raises(ValueError, match=r"1\.weight \(6, 6\) is zero"):
        optimizer.step()
    with torch.device("meta"):
        layer = torch.nn.Linear(4, 6, bias=False)
    optimizer = Muon(layer.parameters(), constraint="hyperball")
    layer.to_empty(device="cpu")
    torch.nn.init.zeros_(layer.weight)
    optimizer.param_groups[0]["params"] = [layer.weight]
    layer.weight.grad = torch.ones(6, 4)
    with pytest.raises(ValueError, match=r"\(6, 4\) is zero"):
        optimizer.step()
    torch.nn.init.ones_(layer.weight)
    optimizer.step()


@pytest.mark.parametrize(
    ("view", "shape", "index"),
    [
        ("split(rows=2)", (8, 4), (slice(4, 8),)),
        ("split(cols=2)", (4, 8), (slice(None), slice(4, 8))),
        ("experts", (3, 4, 5), (1,)),
        ("experts > split(rows=2)", (2, 4, 3), (0, slice(2, 4))),
    ],
)
def test_a_matrix_of_zeros_in_a_weight_is_refused(
    view: str, shape: tuple[int, ...], index: Any
) -> None:
    weight = torch.ones(shape)
    weight[index] = 0
    given = [{"params": [torch.nn.Parameter(weight)], "view": view}]
    with pytest.raises(ValueError, match=r"matrix \d of .* is zero, and constraint='hyperball'"):
        Muon(given, constraint="hyperball")
    weight[index][..., -1] = float("nan")
    Muon(given, constraint="hyperball")


def test_weights_are_not_looked_through_where_another_option_changes() -> None:
    """A schedule changes lr in every step, and a GPU would be waited for."""
    p = torch.nn.Parameter(torch.ones(4, 4))
    p.grad = torch.eye(4)
    optimizer = Muon([p])
    (group,) = optimizer.param_groups
    optimizer.step()
    group["constraint"] = ["hyperball"]
    optimizer.step()
    p.data.zero_()
    group["lr"] = 0.5
    optimizer.step()


@pytest.mark.parametrize("how", ["edited", "loaded"])
def test_a_weight_of_zeros_is_refused_under_a_constraint_that_comes_later(how: str) -> None:
    p, other = (torch.nn.Parameter(torch.full((4, 4), fill)) for fill in (0.0, 1.0))
    optimizer, saved = Muon([p]), Muon([other], constraint="hyperball")
    for q in (p, other):
        q.grad = torch.ones(4, 4)
    optimizer.step()
    p.data.zero_()
    if how == "edited":
        optimizer.param_groups[0]["constraint"] = "hyperball"
    else:
        saved.step()
        optimizer.load_state_dict(saved.state_dict())
    with pytest.raises(ValueError, match=r"is zero, and constraint='hyperball'.*nothing was chang"):
        optimizer.step()
    assert not p.count_nonzero()


def test_adamw_needs_a_rate_of_its_own_where_muons_is_relative() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Linear(6, 6), torch.nn.Linear(6, 2))
    for name in ("hyperball", "relative_update"):
        with pytest.raises(ValueError, match=rf"no lr of its own.*constraint=\('{name}',\)"):
            MuonW(model, lr=0.01, constraint=name)
        rates = {g["lr"] for g in MuonW(model, constraint=name, adamw_lr=0.5).param_groups}
        assert 0.5 in rates


@pytest.mark.parametrize(
    ("make", "error", "told"),
    [
        (lambda: Constraint("a b", lambda w: w), ValueError, "an identifier"),
        (lambda: Constraint("x"), ValueError, "constrains nothing"),
        (lambda: Constraint("x", lambda: 1), TypeError, r"takes norms \(N,\)"),
        (lambda: Constraint("x", lambda w: 1.0), TypeError, "gave float"),
        (lambda: Constraint("x", lambda w: w.sum()), TypeError, r"gave torch.Size\(\[\]\)"),
        (lambda: Constraint("x", None, lambda old, new: old / new), ValueError, "finite"),
        (lambda: Constraint("x", lambda w: -w), ValueError, "none below 0"),
        (lambda: Constraint("x", lambda w: w.mul_(2)), ValueError, "wrote to its arguments"),
    ],
)
def test_another_form_of_constraint_is_refused(
    make: Any, error: type[Exception], told: str
) -> None:
    with pytest.raises(error, match=told):
        make()


@pytest.mark.parametrize("name", NAMES)
def test_a_step_does_not_depend_on_the_gradients_scale(name: str) -> None:
    found = []
    for scale in (1e-18, 1.0, 1e12):
        p = torch.nn.Parameter(torch.randn(6, 9, generator=torch.Generator().manual_seed(0)))
        optimizer = Muon([p], lr=0.1, ns_dtype="float32", **stage_options(name))
        for t in range(3):
            p.grad = torch.randn(6, 9, generator=torch.Generator().manual_seed(t + 1)) * scale
            optimizer.step()
        found.append(p.detach())
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-5, atol=1e-6)


def test_variant_is_another_name_of_after() -> None:
    p = torch.nn.Parameter(torch.ones(3, 4))
    assert Muon([p], variant="normuon").param_groups[0]["after"] == ("normuon",)
    assert Muon([p], variant="plain").param_groups[0]["after"] == ()
    assert Muon([{"params": [p], "variant": "adamuon"}]).param_groups[0]["after"] == ("adamuon",)
    with pytest.raises(ValueError, match="variant='adamuon' is another name of after"):
        Muon([p], variant="adamuon", after="normuon")
    optimizer = Muon([p])
    optimizer.param_groups[0]["variant"] = "normuon"  # as an older script sets it
    p.grad = torch.randn(3, 4)
    optimizer.step()
    assert optimizer.param_groups[0]["after"] == ("normuon",)
    assert "variant" not in optimizer.param_groups[0]
    state = optimizer.state_dict()
    group = state["param_groups"][0]
    group["variant"], group["variant_beta2"] = group.pop("after")[0], group.pop("stage_beta2")
    other = Muon([torch.nn.Parameter(torch.ones(3, 4))])
    other.load_state_dict(state)
    assert other.param_groups[0]["after"] == ("normuon",)
