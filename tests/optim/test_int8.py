"""A momentum in int8: the laws of its blocks, of a step with it, and of what is loaded and changed.

Layouts of several ranks have theirs in tests/distributed/test_int8.py.
"""

from __future__ import annotations

import copy
import itertools
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from muonkit import Monitor, Muon, convert
from muonkit.int8 import (
    LARGEST,
    LEAST,
    MomentumScale,
    Scales,
    block_extents,
    dequantized,
    is_scaled,
    quantize_,
    scale_region,
    scale_shape,
)
from muonkit.state import as_numbers
from muonkit.views import blocks_of
from tests.helpers.optim import momentum_of, parameter, set_gradients

# View, shape of the parameter, extents of its blocks, each for a reason.
BLOCKS = [
    ("matrix", (48, 4096), (1, 128)),  # as long as can be where 16 ranks share them evenly
    ("matrix", (8, 768), (1, 96)),  # 8 blocks rather than 6
    ("matrix", (8, 1024), (1, 64)),  # 16 rather than 8
    ("matrix", (8, 11008), (1, 86)),
    ("matrix", (6, 10), (1, 10)),  # a short row is one
    ("matrix", (10, 131), (1, 66)),  # a prime: the last one is shorter
    ("transpose > split(rows=3)", (8, 2304), (1, 96)),  # GPT-2's c_attn: 768 is cut in eight
    ("split(cols=12)", (8, 768), (1, 64)),  # heads of 64 columns
    ("split(cols=8)", (8, 256), (1, 32)),  # heads of 32, which are shorter than LEAST
    ("split(cols=96+32)", (8, 128), (1, 32)),
    ("flatten", (16, 32, 3, 3), (1, 8, 3, 3)),  # 72 elements
    ("flatten", (16, 3, 16, 16), (1, 1, 4, 16)),
    ("flatten", (16, 64, 1, 1), (1, 64, 1, 1)),
    ("flatten", (16, 3, 3, 3), (1, 3, 3, 3)),
    ("experts", (2, 12, 512), (1, 1, 64)),
    ("experts", (2, 256, 8), (1, 16, 8)),  # short rows of one expert share one
    ("experts > split(rows=2)", (2, 16, 12), (1, 8, 12)),  # but not over the view's cut
]
IDS = [f"{view}-{shape}" for view, shape, _ in BLOCKS]


def numbers_of(optimizer: Muon, p: Tensor) -> Tensor:
    return as_numbers(optimizer.state[p])


def rounding_of(p: Tensor, scale: Tensor) -> Tensor:
    """For every element half of its block's scale."""
    extents = block_extents(p.shape, scale.shape)
    for dim, extent in enumerate(extents):
        scale = scale.repeat_interleave(extent, dim).narrow(dim, 0, p.shape[dim])
    return scale / 2


def rounded(M: Tensor, view: str) -> tuple[Tensor, Tensor]:
    """A momentum in int8, and its scales."""
    kept = torch.zeros(M.shape, dtype=torch.int8)
    scale = torch.zeros(scale_shape(view, M.shape), dtype=torch.float32)
    quantize_([kept], Scales.of([scale], block_extents(M.shape, scale.shape)), torch.stack([M]))
    return kept, scale


def by_hand(M: Tensor, extents: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """The equations of the module's docstring, block by block."""
    kept = torch.zeros(M.shape, dtype=torch.int8)
    counts = [-(-n // k) for n, k in zip(M.shape, extents, strict=True)]
    scale = torch.zeros(counts)
    for place in itertools.product(*map(range, counts)):
        cut = tuple(slice(i * k, (i + 1) * k) for i, k in zip(place, extents, strict=True))
        s = M[cut].abs().max() / LARGEST
        scale[place] = s
        kept[cut] = 0 if s == 0 else (M[cut] / s).round().to(torch.int8)
    return kept, scale


# --- blocks ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("view", "shape", "extents"), BLOCKS, ids=IDS)
def test_a_block_is_what_is_said(view: str, shape: Any, extents: tuple[int, ...]) -> None:
    scales = scale_shape(view, shape)
    assert block_extents(shape, scales) == extents
    assert is_scaled(shape, scales)
    M = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    kept, scale = rounded(M, view)
    expected, its_scale = by_hand(M, extents)
    assert torch.equal(kept, expected)
    assert torch.equal(scale, its_scale)
    # What the view cuts out has whole blocks: it is read alone as it is read in the whole.
    whole = as_numbers({"momentum_buffer": kept, "momentum_scale": scale})
    for block in blocks_of(view, shape):
        piece = scale_region(block, MomentumScale(scale, extents))
        scales_of_it = Scales.of([piece.tensor], piece.block)
        alone = dequantized([block.region(kept)], scales_of_it, torch.float32)[0]
        assert torch.equal(alone, block.region(whole))


def test_a_parameter_without_entries_has_blocks_too() -> None:
    p = nn.Parameter(torch.zeros(0, 8))
    optimizer = Muon([p], momentum_dtype="int8")
    p.grad = torch.zeros(0, 8)
    optimizer.step()
    assert numbers_of(optimizer, p).shape == (0, 8)


def test_shapes_that_are_no_scales() -> None:
    for shape, scales in [((4, 8), (4,)), ((4, 8), (2, 1)), ((4, 8), (4, 9)), ((4, 8), (4, 0))]:
        assert not is_scaled(shape, scales) or shape[0] // scales[0] > 1
    assert not is_scaled((4, 8, 6), (4, 2, 3))
    assert not is_scaled((4, 100), (4, 99))


def test_the_state_is_at_most_27_hundredths_of_float32() -> None:
    """GPT-2 small's hidden matrices, Llama 7B's of a layer, and a convnet's but for its stem."""
    shapes = [(2304, 768), (768, 768), (3072, 768), (768, 3072)]
    shapes += [(4096, 4096), (11008, 4096), (4096, 11008)]
    matrices = [nn.Parameter(torch.empty(shape, device="meta")) for shape in shapes]
    convs = [nn.Parameter(torch.empty(64, n, 3, 3, device="meta")) for n in (16, 32, 64)]
    optimizer = Muon(
        [{"params": matrices}, {"params": convs, "view": "flatten"}], momentum_dtype="int8"
    )
    for p in (*matrices, *convs):
        kept = sum(t.nbytes for t in optimizer.state[p].values())
        assert kept <= 0.27 * 4 * p.numel(), tuple(p.shape)
    assert (1 + 4 / LEAST) / 4 <= 0.27
    total = sum(t.nbytes for state in optimizer.state.values() for t in state.values())
    elements = sum(p.numel() for p in (*matrices, *convs))
    assert 0.25 < total / (4 * elements) < 0.264


# --- rounding -------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [1e-30, 1e-18, 1e-6, 1.0, 1e12, 1e30, 2.0**60])
def test_the_scale_of_a_momentum_does_not_matter(alpha: float) -> None:
    M = parameter(32, 256).detach()
    kept, scale = rounded(M, "matrix")
    other, its_scale = rounded(M * alpha, "matrix")
    assert (kept.int() - other.int()).abs().max() <= (0 if alpha == 2.0**60 else 1)
    torch.testing.assert_close(its_scale, scale * alpha, rtol=1e-6, atol=0)


def test_rounding_is_to_nearest_and_the_largest_is_exact() -> None:
    M = parameter(32, 256).detach()
    kept, scale = rounded(M, "matrix")
    read = as_numbers({"momentum_buffer": kept, "momentum_scale": scale})
    assert ((read - M).abs() <= rounding_of(M, scale) * (1 + 1e-5)).all()
    assert kept.abs().max() == LARGEST
    assert (kept.view(32, -1, 64).abs().amax(-1) == LARGEST).all()


@pytest.mark.parametrize("tiny", [0.0, 1e-44, 2.5e-43, 1e-40, 1.2e-38])
def test_zeros_and_less_than_normal_numbers(tiny: float) -> None:
    M = torch.full((3, 256), tiny)
    M[1] = 1.0
    kept, scale = rounded(M, "matrix")
    read = as_numbers({"momentum_buffer": kept, "momentum_scale": scale})
    assert read.isfinite().all()
    assert (read[1] == 1).all()
    assert (read[0] - tiny).abs().max() <= max(tiny, 1e-43)


@pytest.mark.parametrize("broken", [float("nan"), float("inf"), -float("inf")])
def test_a_gradient_that_is_not_finite_stays_visible(broken: float) -> None:
    p = parameter(4, 256)
    optimizer = Muon([p], momentum_dtype="int8", lr=0.01)
    set_gradients([p])
    assert p.grad is not None
    p.grad[1, 3] = broken
    optimizer.step()
    set_gradients([p])
    optimizer.step()
    read = numbers_of(optimizer, p)
    assert read[1, :64].isnan().all()
    assert read[0].isfinite().all()  # rows and blocks without it
    assert p.isnan().all()


# --- steps ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize(("view", "shape", "extents"), BLOCKS, ids=IDS)
def test_a_step_is_that_of_the_equations(
    view: str, shape: Any, extents: tuple[int, ...], nesterov: bool
) -> None:
    """The momentum that a step uses is the one before it is rounded."""
    p = parameter(*shape)
    q = nn.Parameter(p.detach().clone())
    common: dict[str, Any] = {"ns_dtype": "float32", "nesterov": nesterov, "momentum": 0.9}
    optimizer = Muon([{"params": [p], "view": view}], momentum_dtype="int8", **common)
    other = Muon([{"params": [q], "view": view}], **common)
    M = torch.zeros(shape)
    for t in range(3):
        set_gradients([p], t)
        assert p.grad is not None
        q.grad = p.grad.clone()
        momentum_of(other, q).copy_(M)
        optimizer.step()
        other.step()
        assert torch.equal(p, q)
        kept, scale = by_hand(M.lerp(p.grad, 1 - 0.9), extents)
        # An edge between two numbers may be met by the last bit of a division.
        assert (momentum_of(optimizer, p).int() - kept.int()).abs().max() <= 1
        M = numbers_of(optimizer, p)
        torch.testing.assert_close(optimizer.state[p]["momentum_scale"], scale, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str
)
def test_every_dtype_of_weights(dtype: torch.dtype) -> None:
    """Scales are float32 at least, and so is what is computed: the error is that of int8 alone."""
    p = parameter(16, 256, dtype=dtype)
    optimizer = Muon([p], momentum_dtype=torch.int8, ns_dtype="float32")
    M = torch.zeros(16, 256, dtype=torch.float64)
    for t in range(20):
        set_gradients([p], t)
        assert p.grad is not None
        M.lerp_(p.grad.double(), 0.05)
        optimizer.step()
    state = optimizer.state[p]
    assert state["momentum_buffer"].dtype == torch.int8
    assert state["momentum_scale"].dtype == torch.promote_types(dtype, torch.float32)
    assert (numbers_of(optimizer, p) - M).norm() < 0.02 * M.norm()
    assert p.isfinite().all()


def test_strides_do_not_matter() -> None:
    conv = parameter(16, 32, 3, 3)
    last = nn.Parameter(conv.detach().to(memory_format=torch.channels_last))
    flat = parameter(24, 256)
    turned = nn.Parameter(flat.detach().t().contiguous().t())
    assert turned.stride() != flat.stride()
    for p, q, view in ((conv, last, "flatten"), (flat, turned, "matrix")):
        states = []
        for each in (p, q):
            optimizer = Muon([{"params": [each], "view": view}], momentum_dtype="int8")
            for t in range(3):
                set_gradients([each], t)
                assert each.grad is not None
                each.grad = torch.empty_like(each).copy_(each.grad)
                optimizer.step()
            states.append(optimizer.state[each])
        for key, value in states[0].items():
            assert torch.equal(value, states[1][key]), key


def test_many_at_once_are_what_each_is_alone() -> None:
    shapes = [(16, 128), (16, 128), (128, 16), (10, 131), (16, 256)]
    params = [parameter(*shape, seed=i) for i, shape in enumerate(shapes)]
    twins = [nn.Parameter(p.detach().clone()) for p in params]
    together = Muon(params, momentum_dtype="int8")
    apart = [Muon([q], momentum_dtype="int8") for q in twins]
    for t in range(4):
        set_gradients(params, t)
        for p, q, optimizer in zip(params, twins, apart, strict=True):
            q.grad = copy.deepcopy(p.grad)
            optimizer.step()
        together.step()
    for p, q, optimizer in zip(params, twins, apart, strict=True):
        for key, value in together.state[p].items():
            assert torch.equal(value, optimizer.state[q][key])


def test_errors_stay_within_their_bound_over_500_steps() -> None:
    """|M8 - M| <= s / 2 / (1 - mu), for the largest scale s of the block so far: each step rounds
    by at most s / 2, and the next one keeps mu of that. What is typical is far less.
    """
    p, q = parameter(24, 256), parameter(24, 256)
    coarse = Muon([p], momentum_dtype="int8", lr=0.0)
    fine = Muon([q], lr=0.0)
    mean = parameter(24, 256, seed=1).detach()
    bound = torch.zeros(p.shape)
    for t in range(500):
        for each in (p, q):
            set_gradients([each], t)
            assert each.grad is not None
            each.grad += 0.3 * mean
        coarse.step()
        fine.step()
        half = rounding_of(p, coarse.state[p]["momentum_scale"])
        bound = torch.maximum(bound, half / (1 - 0.95))
        error = (numbers_of(coarse, p) - momentum_of(fine, q)).abs()
        assert (error <= bound * (1 + 1e-4)).all()
    typical = error.norm() / momentum_of(fine, q).norm()
    assert 0.003 < typical < 0.03


@pytest.mark.parametrize(
    "backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.whole)]
)
def test_compiled_is_eager(backend: str) -> None:
    """Through inductor's own kernels too: a division may round an edge to the other side."""
    pairs = []
    for _ in range(2):
        params = [parameter(8, 96), parameter(12, 131, seed=1), parameter(8, 4, 3, 3, seed=2)]
        groups = [{"params": params[:2]}, {"params": params[2:], "view": "flatten"}]
        pairs.append((params, Muon(groups, momentum_dtype="int8", ns_dtype="float32")))
    torch._dynamo.reset()
    step = torch.compile(pairs[1][1].step, fullgraph=True, backend=backend)
    for t in range(3):
        for params, _ in pairs:
            set_gradients(params, t)
        pairs[0][1].step()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the compiler's own remarks
            step()
    (params, eager), (twins, compiled) = pairs
    for p, q in zip(params, twins, strict=True):
        apart = (momentum_of(eager, p).int() - momentum_of(compiled, q).int()).abs()
        assert apart.max() <= 1
        assert apart.sum() <= 0.001 * p.numel()
        torch.testing.assert_close(
            eager.state[p]["momentum_scale"], compiled.state[q]["momentum_scale"]
        )
        torch.testing.assert_close(p, q, rtol=0, atol=1e-4)


# --- what is loaded, changed, refused -------------------------------------------------------------


def made(kept: str, view: str = "matrix", seed: int = 0, **options: Any) -> tuple[list[Any], Muon]:
    params = [parameter(16, 128, seed=seed), parameter(12, 200, seed=seed + 1)]
    return params, Muon([{"params": params, "view": view}], momentum_dtype=kept, **options)


def stepped(params: list[Any], optimizer: Muon, first: int, last: int) -> None:
    for t in range(first, last):
        set_gradients(params, t)
        optimizer.step()


@pytest.mark.parametrize("options", [{}, {"after": "normuon"}])
def test_a_run_goes_on_from_a_checkpoint(options: dict[str, Any]) -> None:
    params, optimizer = made("int8", **options)
    stepped(params, optimizer, 0, 3)
    saved = copy.deepcopy(optimizer.state_dict())
    twins, other = made("int8", seed=7, **options)
    stepped(twins, other, 5, 6)
    other.load_state_dict(saved)
    for p, q in zip(params, twins, strict=True):
        q.data.copy_(p)
    stepped(params, optimizer, 3, 5)
    stepped(twins, other, 3, 5)
    for p, q in zip(params, twins, strict=True):
        assert torch.equal(p, q)
        assert optimizer.state[p].keys() == other.state[q].keys()
    clone = copy.deepcopy(optimizer)
    assert clone.state_dict()["state"][0]["momentum_buffer"].dtype == torch.int8


def test_numbers_are_loaded_into_int8_and_int8_as_numbers() -> None:
    params, optimizer = made("float32")
    stepped(params, optimizer, 0, 3)
    saved = copy.deepcopy(optimizer.state_dict())
    del saved["param_groups"][0]["momentum_dtype"]  # torch.optim.Muon has none
    twins, coarse = made("int8")
    coarse.load_state_dict(saved)
    for p, q in zip(params, twins, strict=True):
        expected, scale = rounded(momentum_of(optimizer, p), "matrix")
        assert torch.equal(momentum_of(coarse, q), expected)
        assert torch.equal(coarse.state[q]["momentum_scale"], scale)
    saved = copy.deepcopy(coarse.state_dict())
    for kept in ("float32", "bfloat16", "auto"):
        saved["param_groups"][0]["momentum_dtype"] = kept
        others, fine = made("int8")
        fine.load_state_dict(copy.deepcopy(saved))
        for q, r in zip(twins, others, strict=True):
            assert list(fine.state[r]) == ["momentum_buffer"]
            dtype = torch.bfloat16 if kept == "bfloat16" else torch.float32
            assert torch.equal(momentum_of(fine, r), numbers_of(coarse, q).to(dtype))


def test_blocks_of_another_view_are_made_anew() -> None:
    params, optimizer = made("int8")
    stepped(params, optimizer, 0, 3)
    others, cut = made("int8", view="split(cols=4)")
    cut.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    states = [optimizer.state[params[0]], cut.state[others[0]]]
    assert [tuple(state["momentum_scale"].shape) for state in states] == [(16, 2), (16, 4)]
    for p, q in zip(params, others, strict=True):
        error = (numbers_of(cut, q) - numbers_of(optimizer, p)).abs()
        assert (error <= rounding_of(q, cut.state[q]["momentum_scale"]) * (1 + 1e-5)).all()


def test_the_option_may_change_in_a_group() -> None:
    params, optimizer = made("float32")
    stepped(params, optimizer, 0, 2)
    fine = [momentum_of(optimizer, p).clone() for p in params]
    group = optimizer.param_groups[0]
    group["momentum_dtype"] = "int8"
    saved = optimizer.state_dict()  # before any step with it
    for i, (p, M) in enumerate(zip(params, fine, strict=True)):
        assert saved["state"][i]["momentum_buffer"].dtype == torch.int8
        assert (numbers_of(optimizer, p) - M).norm() < 0.01 * M.norm()
    made("float32")[1].load_state_dict(saved)
    stepped(params, optimizer, 2, 3)
    coarse = [numbers_of(optimizer, p) for p in params]
    group["momentum_dtype"] = "bfloat16"
    group["momentum"] = 1 - 2**-20  # the next gradient leaves it nearly as it is
    stepped(params, optimizer, 3, 4)
    for p, M in zip(params, coarse, strict=True):
        assert list(optimizer.state[p]) == ["momentum_buffer"]
        assert momentum_of(optimizer, p).dtype == torch.bfloat16
        torch.testing.assert_close(momentum_of(optimizer, p).float(), M, rtol=2**-8, atol=1e-5)


def test_a_hook_on_loading_has_the_last_word() -> None:
    params, optimizer = made("int8")
    stepped(params, optimizer, 0, 1)
    saved = copy.deepcopy(optimizer.state_dict())
    optimizer.register_load_state_dict_post_hook(
        lambda o: [o.state[p]["momentum_buffer"].fill_(0.5) for p in params] and None
    )
    optimizer.load_state_dict(saved)
    for p in params:
        assert momentum_of(optimizer, p).dtype == torch.int8
        assert torch.equal(numbers_of(optimizer, p), torch.full(p.shape, 0.5))


def test_what_says_nothing_is_refused() -> None:
    params, optimizer = made("int8")
    stepped(params, optimizer, 0, 1)
    saved = optimizer.state_dict()
    for scale in (None, torch.ones(16, 129), torch.ones(16)):
        broken = copy.deepcopy(saved)
        broken["state"][0]["momentum_scale"] = scale
        if scale is None:
            del broken["state"][0]["momentum_scale"]
        with pytest.raises(ValueError, match="without the scales of its blocks it says nothing"):
            made("int8")[1].load_state_dict(broken)
    broken = copy.deepcopy(saved)
    del broken["state"][0]["momentum_scale"]
    broken["state"][0]["momentum_buffer"] = broken["state"][0]["momentum_buffer"].float()
    with pytest.raises(ValueError, match=r"make the optimizer with momentum_dtype='int8', load"):
        made("float32")[1].load_state_dict(broken)


def test_a_view_that_cuts_blocks_is_refused_at_once() -> None:
    p = parameter(8, 28)
    group = {"params": [p], "view": "split(cols=7)"}
    with pytest.raises(ValueError, match="share no block of at least 8 elements") as error:
        Muon([group], momentum_dtype="int8")
    assert "bfloat16" in str(error.value)
    optimizer = Muon([group], momentum_dtype="bfloat16")
    optimizer.param_groups[0]["momentum_dtype"] = "int8"
    before = p.detach().clone()
    set_gradients([p])
    with pytest.raises(ValueError, match="share no block"):
        optimizer.step()
    assert torch.equal(p, before)


def test_a_fraction_of_the_lines_is_refused() -> None:
    """Error feedback multiplies the lines that were taken, which may be columns of many blocks."""
    with pytest.raises(ValueError, match="takes lines out of the momentum") as error:
        Muon([parameter(16, 128)], momentum_dtype="int8", fraction=0.25)
    assert "bfloat16" in str(error.value)
    Muon([parameter(16, 128)], momentum_dtype="bfloat16", fraction=0.25)


def test_a_resized_scale_is_refused_before_anything_is_written() -> None:
    params, optimizer = made("int8")
    stepped(params, optimizer, 0, 1)
    optimizer.state[params[0]]["momentum_scale"] = torch.zeros(16, 3)
    before = [p.detach().clone() for p in params]
    with pytest.raises(ValueError, match="wants a momentum_scale of shape"):
        stepped(params, optimizer, 1, 2)
    assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True))
    optimizer.reset_state(params)
    stepped(params, optimizer, 1, 2)


@pytest.mark.parametrize("kept", ["int8", "float32"])
@pytest.mark.parametrize("put_in", [False, True])
def test_scales_go_with_a_momentum_that_was_taken_out(kept: str, put_in: bool) -> None:
    """Its scales are of nothing, and not finite where it was not."""
    params, optimizer = made("int8")
    set_gradients(params)
    for p in params:
        p.grad.fill_(torch.nan)
    optimizer.step()
    others, fresh = made(kept)
    optimizer.param_groups[0]["momentum_dtype"] = kept
    for p, q in zip(params, others, strict=True):
        p.data.copy_(q)
        del optimizer.state[p]["momentum_buffer"]
        if put_in:
            optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
    stepped(params, optimizer, 1, 3)
    stepped(others, fresh, 1, 3)
    for p, q in zip(params, others, strict=True):
        assert torch.equal(p, q)
        assert set(optimizer.state[p]) == set(fresh.state[q])


# --- who reads it ---------------------------------------------------------------------------------


def test_a_monitor_sees_numbers() -> None:
    norms = []
    for kept in ("float32", "int8"):
        p = parameter(16, 128)
        optimizer = Muon([("w", p)], momentum_dtype=kept)
        with Monitor(optimizer, every=1) as monitor:
            set_gradients([p])
            optimizer.step()
            assert monitor.latest is not None
            (matrix,) = monitor.latest["matrices"]
            norms.append(matrix["momentum_norm"])
    assert norms[0] == pytest.approx(norms[1], rel=0.01)
    assert optimizer.describe()[0]["momentum_dtype"] == "torch.int8"


@pytest.mark.parametrize("target", ["torch", "keller", "moonlight", "dion"])
def test_others_get_numbers(target: str) -> None:
    """Theirs is an average of gradients, or their sum: 1 / (1 - momentum) times ours."""
    model = nn.Sequential(nn.Linear(96, 96, bias=False), nn.Linear(96, 96, bias=False))
    optimizer = Muon(list(model.named_parameters()), lr=0.01, momentum_dtype="int8")
    stepped(list(model.parameters()), optimizer, 0, 2)
    exported = convert.from_muonkit(target, optimizer)
    state = exported.state_dicts[0]["state"]
    for i, p in enumerate(model.parameters()):
        name = "momentum" if target == "dion" else "momentum_buffer"
        factor = 20 if target in ("moonlight", "dion") else 1
        torch.testing.assert_close(state[i][name], factor * numbers_of(optimizer, p))
