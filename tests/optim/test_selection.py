"""Selection (`fraction` below 1): the published equations, its laws, and what is refused."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from muonkit import Monitor, Muon, MuonW, orthogonalize
from muonkit.scale import SCALES
from muonkit.selection import count_of, largest, line_norms, put, take
from muonkit.stages import AFTER, BEFORE, CONSTRAINTS
from muonkit.views import blocks_of, row_blocks, row_shape
from tests.helpers.optim import parameter

OPTIONS: dict[str, Any] = {"lr": 0.1, "weight_decay": 0.3, "momentum": 0.9, "ns_dtype": "float64"}
VIEWS = [
    ("matrix", (5, 8)),
    ("matrix", (9, 4)),
    ("matrix", (6, 6)),
    ("transpose", (8, 5)),
    ("flatten", (6, 3, 2, 2)),
    ("flatten", (16, 2, 2, 1)),
    ("experts", (3, 6, 4)),
    ("experts > transpose", (3, 6, 4)),
    ("split(rows=3)", (12, 6)),
    ("split(rows=6+4+2)", (12, 6)),
    ("split(cols=2)", (6, 8)),
    ("transpose > split(rows=2)", (6, 16)),
    ("experts > split(cols=2)", (3, 4, 12)),
    ("experts > split(rows=4+2)", (3, 6, 12)),
]
SOME = [name for name in (*BEFORE, *AFTER, *CONSTRAINTS) if name != "adamuon"]


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def published(
    W: Tensor, M: Tensor, G: Tensor, v: Tensor | None, fraction: float, scale: float
) -> None:
    """One step on one matrix in place: arXiv 2512.16928, and its authors' nordion2.py where v is
    one number per row.
    """
    mu, lr, decay = OPTIONS["momentum"], OPTIONS["lr"], OPTIONS["weight_decay"]
    rows = W.shape[0] <= W.shape[1] or v is not None
    if not rows:
        W, M, G = W.mT, M.mT, G.mT
    M += G
    k = math.ceil(fraction * len(M))
    S = sorted(range(len(M)), key=lambda i: -float(M[i].abs().sum()))[:k]
    U = M[S].clone()
    M[S] *= mu
    O = orthogonalize(U, ns_dtype="float64")
    if v is not None:
        v[S] = 0.95 * v[S] + 0.05 * O.square().mean(1, keepdim=True)
        normed = O / (v[S].sqrt() + 1e-10)
        O = normed * O.norm() / normed.norm()
    W *= 1 - lr * decay
    W[S] -= lr * scale * O


@pytest.mark.parametrize("fraction", [0.25, 0.5, 2 / 3])
@pytest.mark.parametrize("after", [(), "normuon"])
@pytest.mark.parametrize(("view", "shape"), VIEWS)
def test_a_step_is_the_published_one(
    view: str, shape: tuple[int, ...], after: Any, fraction: float
) -> None:
    p = nn.Parameter(noise(*shape))
    given = {"fraction": fraction, "after": after, "adjust_lr_fn": "spectral", **OPTIONS}
    optimizer = Muon([{"params": [p], "view": view}], **given)
    W, M = p.detach().clone(), torch.zeros(shape, dtype=torch.float64)
    V = torch.zeros(row_shape(view, shape), dtype=torch.float64)
    for t in range(6):
        p.grad = noise(*shape, seed=t + 1)
        for block, row_block in zip(blocks_of(view, shape), row_blocks(view, shape), strict=True):
            scale = SCALES["spectral"](block.rows, block.cols)
            regions = [block.region(each) for each in (W, M, p.grad)]
            matrices = [block.to_matrices(each[None]).clone() for each in regions]
            v = row_block.to_matrices(row_block.region(V)[None]).clone()
            for i in range(len(v)):
                published(*(each[i] for each in matrices), v[i] if after else None, fraction, scale)
            for region, some in zip(regions, matrices, strict=True):
                region.copy_(block.to_regions(some)[0])
            row_block.region(V).copy_(row_block.to_regions(v)[0])
        # (The gradient's regions were written to by themselves.)
        optimizer.step()
    state = optimizer.state[p]
    torch.testing.assert_close(p.detach(), W, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(state["momentum_buffer"], M, rtol=1e-11, atol=1e-11)
    if after:
        torch.testing.assert_close(state["second_momentum_buffer"], V, rtol=1e-11, atol=1e-11)


def test_a_fraction_of_one_is_todays_step() -> None:
    ours = [parameter(6, 9), parameter(9, 4, seed=1)]
    plain = [nn.Parameter(p.detach().clone()) for p in ours]
    optimizers = Muon(ours, fraction=1, selection="local"), Muon(plain)
    for t in range(3):
        for optimizer, params in zip(optimizers, (ours, plain), strict=True):
            for i, p in enumerate(params):
                p.grad = noise(*p.shape, seed=10 * t + i, dtype=torch.float32)
            optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(ours, plain, strict=True))


# --- laws ----------------------------------------------------------------------------------------

LAYOUTS = {
    "row-major": lambda m: m.contiguous(),
    "transposed": lambda m: m.mT.contiguous().mT,
    "strided": lambda m: torch.stack([m, m], -1)[..., 0],
}
CELLS = [[(0, 7, 3)], [(0, 4, 2), (4, 7, 1)], [(0, 7, 7)]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("rows", [True, False])
@pytest.mark.parametrize("strides", LAYOUTS)
@pytest.mark.parametrize("cells", CELLS, ids=str)
def test_lines_are_taken_and_put_back(
    cells: list[tuple[int, int, int]], strides: str, rows: bool, dtype: torch.dtype
) -> None:
    matrices = noise(3, *((7, 5) if rows else (5, 7)), dtype=dtype)
    given = LAYOUTS[strides](matrices)
    before = given.clone()
    norms = line_norms(given, rows)
    assert norms.dtype == torch.promote_types(dtype, torch.float32)
    lines = largest(norms, cells)
    taken = take(given, lines, rows)
    whole = put(taken, lines, rows, 7)
    assert torch.equal(given, before)
    taken.zero_()
    assert torch.equal(given, before)  # in memory of its own
    assert whole.dtype == dtype
    for i in range(3):  # a batch is its matrices, one by one
        sums = matrices[i].double().abs().sum(1 if rows else 0)
        expected = [
            j
            for start, stop, k in cells
            for j in sorted(sorted(range(start, stop), key=lambda j: -float(sums[j]))[:k])
        ]
        assert lines[i].tolist() == expected
        for j in range(7):
            line = (whole[i, j], given[i, j]) if rows else (whole[i, :, j], given[i, :, j])
            assert torch.equal(line[0], line[1] if j in expected else torch.zeros_like(line[1]))


def test_of_equal_lines_the_first_are_taken() -> None:
    norms = torch.tensor([[1.0, 2, 2, 1, 2, 2], [0, 0, 0, 0, 0, 0]])
    assert largest(norms, [(0, 6, 3)]).tolist() == [[1, 2, 4], [0, 1, 2]]
    many = torch.ones(1, 5000)  # topk takes others here
    assert largest(many, [(0, 5000, 8)]).tolist() == [list(range(8))]


def test_a_nan_is_taken() -> None:
    assert 2 in largest(torch.tensor([[1.0, 9.0, math.nan, 3.0]]), [(0, 4, 1)])


@pytest.mark.parametrize(
    ("fraction", "lines", "count"),
    [
        (0.25, 8, 2),
        (0.25, 9, 3),
        (0.07, 100, 7),
        (0.1, 30, 3),
        (1e-9, 10, 1),
        (1, 5, 5),
        (0.3, 1, 1),
    ],
)
def test_as_many_lines_as_the_fraction_says(fraction: float, lines: int, count: int) -> None:
    assert count_of(fraction, lines) == count


@pytest.mark.parametrize("stage", ["plain", *SOME])
def test_a_step_does_not_depend_on_the_gradients_scale(stage: str) -> None:
    found = []
    for scale in (1e-18, 1.0, 1e12):
        p = parameter(6, 9)
        optimizer = Muon([p], lr=0.1, ns_dtype="float32", fraction=0.5, **stage_option(stage))
        for t in range(4):
            p.grad = noise(6, 9, seed=t + 1, dtype=torch.float32) * scale
            optimizer.step()
        found.append(p.detach())
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-5, atol=1e-6)


def stage_option(stage: str) -> dict[str, Any]:
    tables = {"before": BEFORE, "after": AFTER, "constraint": CONSTRAINTS}
    return {option: stage for option, table in tables.items() if stage in table}


@pytest.mark.parametrize("stage", ["plain", *SOME])
@pytest.mark.parametrize("fraction", [0.25, 0.5])
def test_a_zero_gradient_leaves_all_but_decay(stage: str, fraction: float) -> None:
    p, q = parameter(6, 9), parameter(9, 4)
    before = [p.detach().clone(), q.detach().clone()]
    optimizer = Muon([p, q], lr=0.1, weight_decay=0.0, fraction=fraction, **stage_option(stage))
    for _ in range(3):
        p.grad, q.grad = torch.zeros_like(p), torch.zeros_like(q)
        optimizer.step()
    for each, was in zip((p, q), before, strict=True):
        torch.testing.assert_close(each.detach(), was, rtol=1e-6, atol=0)


@pytest.mark.parametrize("after", [(), "normuon", "muon_plus"])
def test_matrices_do_not_depend_on_their_companions(after: Any) -> None:
    """In a batch, padded or not, as alone; stacked experts as matrices."""
    shapes = [(6, 9), (6, 9), (9, 4), (16, 4), (5, 5)]

    def trained(apart: bool) -> list[Tensor]:
        params = [parameter(*shape, seed=i) for i, shape in enumerate(shapes)]
        sets = [[p] for p in params] if apart else [params]
        options = {**OPTIONS, "ns_dtype": "float32", "fraction": 0.5, "after": after}
        optimizers = [Muon(some, **options) for some in sets]
        for t in range(3):
            for i, p in enumerate(params):
                p.grad = noise(*p.shape, seed=10 * t + i, dtype=torch.float32)
            for optimizer in optimizers:
                optimizer.step()
        return [p.detach() for p in params]

    for one, other in zip(trained(True), trained(False), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("momentum_dtype", ["bfloat16", "float16", "float64"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_momentum_of_another_dtype_follows(dtype: torch.dtype, momentum_dtype: str) -> None:
    ours, exact = (nn.Parameter(noise(8, 12, dtype=dtype)) for _ in range(2))
    kept = Muon([ours], fraction=0.25, momentum_dtype=momentum_dtype, ns_dtype="float32")
    plain = Muon([exact], fraction=0.25, momentum_dtype="float32", ns_dtype="float32")
    for t in range(4):
        for optimizer, p in ((kept, ours), (plain, exact)):
            p.grad = noise(8, 12, seed=t, dtype=dtype)
            optimizer.step()
    M = [each.state[p]["momentum_buffer"].float() for each, p in ((kept, ours), (plain, exact))]
    assert (M[0] - M[1]).abs().max() <= 4 * 2**-8 * M[1].abs().max()


def test_what_is_not_selected_waits() -> None:
    """Every row is applied sooner or later: its momentum grows until it is the largest."""
    p = nn.Parameter(torch.zeros(8, 12))
    optimizer = Muon([p], lr=0.1, weight_decay=0.0, fraction=0.25)
    grad = noise(8, 12, dtype=torch.float32) * torch.logspace(0, -0.3, 8)[:, None]
    moved = torch.zeros(8, dtype=torch.bool)
    for _ in range(200):
        before = p.detach().clone()
        p.grad = grad.clone()
        optimizer.step()
        now = (p.detach() != before).any(1)
        assert int(now.sum()) == 2
        moved |= now
        assert torch.equal(p.grad, grad)
    assert moved.all()


def test_maximize_is_the_other_direction() -> None:
    up, down = parameter(6, 9), parameter(6, 9)
    ascending = Muon([up], fraction=0.5, maximize=True)
    descending = Muon([down], fraction=0.5)
    for t in range(3):
        up.grad = noise(6, 9, seed=t, dtype=torch.float32)
        down.grad = -up.grad
        ascending.step()
        descending.step()
    assert torch.equal(up, down)


# --- what it costs, and what tells of it ----------------------------------------------------------


def test_flops_and_shapes_are_those_of_the_selected_lines() -> None:
    params = [parameter(64, 96), parameter(96, 64), parameter(32, 32)]
    whole, some = Muon(params), Muon(params, fraction=0.25)
    shapes = {(64, 96): (16, 96), (96, 64): (96, 16), (32, 32): (8, 32)}
    flops = 0
    for row in some.describe():
        assert row["selected"] == shapes[row["rows"], row["cols"]]
        (expected,) = Muon([parameter(*row["selected"])]).plan().traffic().flops
        flops += expected
    assert some.plan().traffic().flops == [flops]
    assert flops < 0.1 * whole.plan().traffic().flops[0]
    rows = Muon([params[1]], fraction=0.25, after="normuon").describe()
    assert [row["selected"] for row in rows] == [(24, 64)]


def test_a_monitor_sees_the_whole_update() -> None:
    model = nn.Sequential(nn.Linear(8, 12), nn.Linear(12, 8), nn.Linear(8, 2))
    optimizer = MuonW(model, lr=0.1, fraction=0.5)
    monitor = Monitor(optimizer, every=1)
    for t in range(2):
        for i, p in enumerate(model.parameters()):
            p.grad = noise(*p.shape, seed=10 * t + i, dtype=torch.float32)
        optimizer.step()
    monitor.close()


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize("fraction", [0, -0.5, 1.5, math.nan, math.inf])
def test_a_fraction_out_of_range_is_refused(fraction: float) -> None:
    with pytest.raises(ValueError, match=r"fraction should be in \(0, 1\] but is"):
        Muon([parameter(4, 6)], fraction=fraction)


@pytest.mark.parametrize("fraction", ["0.5", None, True, torch.tensor(0.5)])
def test_a_fraction_that_is_no_number_is_refused(fraction: Any) -> None:
    with pytest.raises(TypeError, match=r"fraction is a number in \(0, 1\]"):
        Muon([parameter(4, 6)], fraction=fraction)


def test_what_does_not_go_together_is_refused() -> None:
    with pytest.raises(ValueError, match=r"unknown selection 'globl': did you mean 'global'\?"):
        Muon([parameter(4, 6)], selection="globl")
    with pytest.raises(ValueError, match=r"adamuon averages every entry.*take after='normuon'"):
        Muon([parameter(4, 6)], fraction=0.5, after="adamuon")
    Muon([parameter(4, 6)], fraction=1, after="adamuon")


def test_a_group_is_edited() -> None:
    p = parameter(8, 8)
    optimizer = Muon([p])
    for fraction in (1.0, 0.5, 0.25, 1.0):
        optimizer.param_groups[0]["fraction"] = fraction
        p.grad = noise(8, 8, dtype=torch.float32)
        before = p.detach().clone()
        optimizer.param_groups[0]["weight_decay"] = 0.0
        optimizer.step()
        assert int((p.detach() != before).any(1).sum()) == 8 * fraction
    optimizer.param_groups[0]["fraction"] = 2.0
    before = p.detach().clone()
    with pytest.raises(ValueError, match=r"muon: fraction should be in .*nothing was changed"):
        optimizer.step()
    assert torch.equal(p, before)


def test_a_state_dict_has_the_options_and_no_other_state() -> None:
    p = parameter(8, 8)
    optimizer = Muon([p], fraction=0.25)
    p.grad = noise(8, 8, dtype=torch.float32)
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    assert saved["state"][0].keys() == {"momentum_buffer"}
    q = nn.Parameter(p.detach().clone())
    other = Muon([q])
    other.load_state_dict(saved)
    assert other.param_groups[0]["fraction"] == 0.25
    for each, its in ((optimizer, p), (other, q)):
        its.grad = noise(8, 8, seed=1, dtype=torch.float32)
        each.step()
    assert torch.equal(p, q)
    # What was saved before there was the option goes on with the optimizer's.
    del saved["param_groups"][0]["fraction"], saved["param_groups"][0]["selection"]
    other.load_state_dict(saved)
    assert other.param_groups[0]["fraction"] == 0.25
