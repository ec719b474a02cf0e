"""What a step costs, counted: dispatched operations, host synchronisation, memory, compilations."""

from __future__ import annotations

import functools
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from muonkit import Muon, orthogonalize
from muonkit.newton_schulz.coefficients import KELLER
from muonkit.newton_schulz.orthogonalizer import choose
from tests.helpers import internals
from tests.helpers.optim import momentum_of, parameter, set_gradients
from tests.helpers.paths import BENCHMARKS

GPT2_SMALL = [(2304, 768), (768, 768), (3072, 768), (768, 3072)] * 12
# Bookkeeping: no memory is touched, nothing is launched.
BOOKKEEPING = {"as_strided", "diagonal", "empty", "promote_types", "slice", "transpose", "unbind"}
BOOKKEEPING |= {"view", "_record_function_enter_new", "_record_function_exit"}


class Counting(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.operations: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.operations[func._overloadpacket._qualified_op_name.partition("::")[2]] += 1
        return func(*args, **(kwargs or {}))


def on_meta(shapes: list[tuple[int, ...]], make: Callable[..., Any], **options: Any) -> Any:
    """An optimizer after its first step, over parameters without memory: reading any value of
    theirs back to the host raises.
    """
    params = [nn.Parameter(torch.empty(shape, device="meta")) for shape in shapes]
    for p in params:
        p.grad = torch.empty_like(p)
    optimizer = make(params, **options)
    optimizer.step()
    return optimizer


def dispatched(step: Callable[[], object]) -> Counter[str]:
    with Counting() as counting:
        step()
    return counting.operations


@pytest.mark.parametrize("cap", [None, 64 * 2**20])  # that of other devices, of the CPU
def test_a_step_over_gpt2_small_dispatches_fewer_than_150_operations(cap: int | None) -> None:
    ours = dispatched(on_meta(GPT2_SMALL, Muon, bytes_in_flight=cap).step)
    assert ours.total() < 150, ours
    # torch's takes every matrix alone.
    torchs = dispatched(on_meta(GPT2_SMALL, torch.optim.Muon).step)
    assert torchs.total() > 1300
    assert ours["newton_schulz_"] == (4 if cap is None else 7)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_launches_of_a_step_over_gpt2_small(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU has to start, where every symmetric product is one kernel: also inside of our own
    operation, which the dispatcher takes for one.
    """
    internals.smallest_block(monkeypatch, "meta", 10**9)
    operations = dispatched(on_meta(GPT2_SMALL, Muon).step)
    del operations["newton_schulz_"]
    for shape in set(GPT2_SMALL):
        G = torch.empty(12, *shape, device="meta")
        choice = choose(KELLER, 5, "auto", dtype, G.dtype, G.device, *shape)
        flat = [number for triple in choice.triples for number in triple]
        arguments = G, flat, "auto", choice.margin, choice.dtype
        operations += dispatched(lambda a=arguments: internals.newton_schulz_(*a))
    launches = {name: n for name, n in operations.items() if name not in BOOKKEEPING}
    assert sum(launches.values()) < 150, launches


def test_no_host_synchronisation() -> None:
    """On meta tensors a value read back raises; so does a CUDA graph's capture."""
    for nesterov in (True, False):
        options = {"nesterov": nesterov, "cautious": True, "maximize": True}
        optimizer = on_meta([(8, 12), (8, 12), (30, 8)], Muon, **options)
        optimizer.param_groups[0]["lr"] = torch.empty((), device="meta")
        optimizer.param_groups[0]["weight_decay"] = torch.empty((), device="meta")
        optimizer.step()
    with pytest.raises(RuntimeError, match="meta"):
        torch.empty((), device="meta").item()


# --- small models -------------------------------------------------------------------------------

RESNET_8 = [
    (16, 3, 3, 3),
    (16, 16, 3, 3),
    (16, 16, 3, 3),
    (32, 16, 3, 3),
    (32, 32, 3, 3),
    (32, 16, 1, 1),
]


def test_padding_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Matrices of several shapes in one call, also tall ones, against each shape on its own."""
    shapes = [*RESNET_8, (5, 40, 1, 1), (40, 5, 1, 1)]

    def trained() -> tuple[list[nn.Parameter], set[tuple[int, int]]]:
        params = [parameter(*shape, seed=i) for i, shape in enumerate(shapes)]
        optimizer = Muon([{"params": params, "view": "flatten"}], lr=0.1, ns_dtype="float32")
        for t in range(3):
            set_gradients(params, t)
            optimizer.step()
        return params, {row["computed_as"] for row in optimizer.describe()}

    padded, together = trained()
    with internals.free_launches(monkeypatch):
        alone, apart = trained()
    assert len(together) < len(apart) == len(set(shapes))
    for p, q in zip(padded, alone, strict=True):
        # Sums of more terms, zeros, in another order, and another form where its FLOPs are fewer.
        torch.testing.assert_close(p, q, rtol=0, atol=2e-4 * 0.1 * 3)


# --- memory -------------------------------------------------------------------------------------


def peak_of(step: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> int:
    """The most that a step holds at a time beyond what it found, as benchmarks/step.py reads it."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    from machine import peak_bytes

    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profiler:
        step()
    return peak_bytes(profiler)


@pytest.mark.parametrize(
    "options",
    [{}, {"momentum_dtype": "bfloat16"}, {"momentum_dtype": "int8"}, {"nesterov": False}],
)
@pytest.mark.parametrize("form", ["standard", "gram"])
@pytest.mark.parametrize(("rows", "cols"), [(32, 128), (64, 64)])
def test_the_transient_peak_is_bounded_by_the_cap(
    rows: int, cols: int, form: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    internals.keep_no_scratch(monkeypatch)
    internals.smallest_block(monkeypatch, "cpu", 16)  # blocks have temporaries too
    params = [parameter(rows, cols, seed=i) for i in range(64)]
    size = rows * cols * 4
    peaks = []
    for cap in (4 * size, 16 * size):
        optimizer = Muon(params, ns_form=form, ns_dtype="float32", bytes_in_flight=cap, **options)
        set_gradients(params)
        optimizer.step()
        peaks.append(peak_of(optimizer.step, monkeypatch))
        # The batch, the normalized matrices, and what a segment makes of them while the next one
        # does; six (m, m). The momentum in another dtype comes and goes before.
        assert peaks[-1] <= (1 + 3 + 6 * rows / cols) * cap + 2**16
    assert peaks[1] > 2 * peaks[0]


def test_the_state_is_one_buffer_per_matrix() -> None:
    for dtype, itemsize in (("auto", 4), ("bfloat16", 2), ("float64", 8)):
        params = [parameter(8, 12), parameter(6, 5)]
        optimizer = Muon(params, momentum_dtype=dtype)
        set_gradients(params)
        optimizer.step()
        for p in params:
            assert list(optimizer.state[p]) == ["momentum_buffer"]
            assert momentum_of(optimizer, p).nbytes == p.numel() * itemsize
            assert momentum_of(optimizer, p).shape == p.shape


@pytest.mark.parametrize("nesterov", [True, False])
def test_bf16_momentum_stays_within_its_bound_over_200_steps(nesterov: bool) -> None:
    """|M16 - M32| <= 2^-8 / (1 - mu) * max |M32|: each step rounds by at most 2^-8 |M| (bf16 keeps
    eight bits), and the next one keeps mu of that.
    """
    params, twins = [[parameter(12, 20), parameter(10, 10, seed=1)] for _ in range(2)]
    common: dict[str, Any] = {"lr": 0.01, "nesterov": nesterov, "ns_dtype": "float32"}
    coarse = Muon(params, momentum_dtype=torch.bfloat16, **common)
    fine = Muon(twins, **common)
    largest = [torch.zeros(p.shape) for p in params]
    starts = [p.detach().clone() for p in params]
    worst = 0.0
    for t in range(200):
        set_gradients(params, t)
        for p, q in zip(params, twins, strict=True):
            assert p.grad is not None
            p.grad += 0.3 * p.detach()  # with a part that stays, as real gradients have
            q.grad = p.grad.clone()
        coarse.step()
        fine.step()
        for i, (p, q) in enumerate(zip(params, twins, strict=True)):
            M = momentum_of(fine, q)
            largest[i] = torch.maximum(largest[i], M.abs())
            bound = 2**-8 / 0.05 * largest[i]
            error = (momentum_of(coarse, p).float() - M).abs()
            assert (error <= bound + 1e-3).all()  # + what differing weights do to the gradients
            worst = max(worst, (error.norm() / M.norm()).item())
            if t == 2:  # the same direction, with the same look ahead
                moved = [w.detach() - start for w, start in ((p, starts[i]), (q, starts[i]))]
                assert (moved[0] - moved[1]).norm() < 0.05 * moved[1].norm()
    assert 1e-3 < worst < 0.03  # it is rounded, and by far less than the bound
    for p, q in zip(params, twins, strict=True):
        assert (p - q).norm() / q.norm() < 0.05


def test_momentum_dtype_survives_a_checkpoint() -> None:
    for param_dtype, kept in ((torch.bfloat16, "float32"), (torch.float32, "bfloat16")):
        p = parameter(8, 12, dtype=param_dtype)
        optimizer = Muon([p], momentum_dtype=kept)
        for t in range(3):
            set_gradients([p], t)
            optimizer.step()
        q = parameter(8, 12, dtype=param_dtype)
        other = Muon([q], momentum_dtype=kept)
        other.load_state_dict(optimizer.state_dict())
        assert momentum_of(other, q).dtype == getattr(torch, kept)
        assert torch.equal(momentum_of(other, q), momentum_of(optimizer, p))
        assert momentum_of(other, q).data_ptr() != momentum_of(optimizer, p).data_ptr()


def test_misuse_is_refused() -> None:
    p = parameter(4, 4)
    with pytest.raises(ValueError, match=r"momentum_dtype 'int4'.*'float32'"):
        Muon([p], momentum_dtype="int4")
    with pytest.raises(ValueError, match="bytes_in_flight should be at least 1 but is: 0"):
        Muon([p], bytes_in_flight=0)
    with pytest.raises(TypeError, match=r"whole number of bytes or None, got 1\.5"):
        Muon([p], bytes_in_flight=1.5)  # type: ignore[arg-type]


def test_scratch_outlives_inference_mode() -> None:
    internals.forget_scratch()
    G = torch.randn(2, 300, 300)
    other = nn.Parameter(torch.randn(600, 300))
    other.grad = torch.randn(600, 300)
    with torch.inference_mode():
        orthogonalize(G)
        Muon([other]).step()
    p = nn.Parameter(torch.randn(600, 300))  # the same shape: the same views are given out
    p.grad = torch.randn(600, 300)
    Muon([p]).step()
    assert p.isfinite().all()


def test_results_do_not_depend_on_what_ran_before() -> None:
    """Scratch is shared by everything in a thread."""
    G, H = torch.randn(3, 400, 420), torch.randn(2, 500, 400)
    one = orthogonalize(G)
    other = orthogonalize(H)
    kept = one.clone(), other.clone()
    assert torch.equal(orthogonalize(G), one)
    assert torch.equal(one, kept[0])
    assert torch.equal(other, kept[1])


# --- torch.compile ------------------------------------------------------------------------------


def test_one_compilation_and_one_more_for_every_set_of_gradients() -> None:
    """None when lr or decay changes. A parameter that loses its gradient is another graph, since
    it is left alone then; it is compiled once, and both are kept.
    """
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    params = [parameter(8, 12, seed=1), parameter(8, 12, seed=2), parameter(6, 6, seed=3)]
    twins = [nn.Parameter(p.detach().clone()) for p in params]
    group = {"lr": torch.tensor(1e-2), "weight_decay": torch.tensor(0.1)}
    optimizer = Muon(params, **{k: v.clone() for k, v in group.items()})
    reference = Muon(twins, **{k: v.clone() for k, v in group.items()})
    counter = CompileCounter()
    counts = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # dynamo's own remarks on the profiler
        step = torch.compile(optimizer.step, backend=counter, fullgraph=True)
        for t in range(8):
            for chosen, one in ((optimizer, params), (reference, twins)):
                set_gradients(one, t)
                chosen.param_groups[0]["lr"].mul_(0.9)
                chosen.param_groups[0]["weight_decay"].mul_(0.9)
                if t % 2 and t > 2:
                    one[1].grad = None
            if t == 0:
                reference.step()
                optimizer.step()  # makes the state
                continue
            step()
            reference.step()
            counts.append(counter.frame_count)
    assert counts == [1, 1, 2, 2, 2, 2, 2]
    for p, q in zip(params, twins, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("form", ["standard", "gram"])
def test_orthogonalize_compiles_to_one_operation(form: str) -> None:
    torch._dynamo.reset()
    G = torch.randn(2, 6, 10)
    compiled = torch.compile(
        lambda X: orthogonalize(X, ns_form=form), backend="aot_eager", fullgraph=True
    )
    torch.testing.assert_close(compiled(G), orthogonalize(G, ns_form=form))


def test_the_operation_is_a_good_citizen_of_torch() -> None:
    G = torch.randn(3, 8, 12)
    flat = [number for _ in range(5) for number in KELLER]
    arguments: tuple[Tensor, list[float], str, float, torch.dtype]
    arguments = G, flat, "gram", 1.0, torch.float32
    for balanced in (False, True):
        torch.library.opcheck(torch.ops.muonkit.newton_schulz_.default, (*arguments, balanced))


def test_orthogonalize_compiles_for_changing_shapes() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(lambda X: orthogonalize(X), backend="eager", fullgraph=True)
    for shape in ((6, 10), (7, 12), (12, 7), (3, 7, 12)):
        G = torch.randn(shape)
        torch.testing.assert_close(compiled(G), orthogonalize(G))


# --- transforms ---------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # torch's own, in jvp
@pytest.mark.parametrize("shape", [(6, 9), (9, 6), (7, 7)])
def test_transforms_of_torch_func(shape: tuple[int, int]) -> None:
    G, V = torch.randn(2, *shape, dtype=torch.float64)
    step = 1e-6
    slope = (orthogonalize(G + step * V) - orthogonalize(G - step * V)) / (2 * step)
    torch.testing.assert_close(
        torch.func.jvp(orthogonalize, (G,), (V,))[1], slope, rtol=1e-4, atol=1e-6
    )
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(G, V)
        tangent = torch.autograd.forward_ad.unpack_dual(orthogonalize(dual)).tangent
    torch.testing.assert_close(tangent, slope, rtol=1e-4, atol=1e-6)
    batch = torch.randn(4, *shape)
    # Products in bfloat16 round apart where they are taken in another order.
    exactly = functools.partial(orthogonalize, ns_dtype="float32")
    each = torch.stack([exactly(M) for M in batch])
    torch.testing.assert_close(torch.func.vmap(exactly)(batch), each)
    forward, reverse = torch.func.jacfwd(orthogonalize)(G), torch.func.jacrev(orthogonalize)(G)
    torch.testing.assert_close(forward, reverse, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("shape", [(20, 30), (30, 20), (400, 500)])
def test_autocast_does_not_lower_what_was_asked_for(shape: tuple[int, int]) -> None:
    G = torch.randn(shape)
    expected = orthogonalize(G, ns_dtype="float32")
    p, q = [nn.Parameter(torch.ones(shape)) for _ in range(2)]
    p.grad, q.grad = G.clone(), G.clone()
    Muon([q], ns_dtype="float32").step()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        Muon([p], ns_dtype="float32").step()
        assert torch.equal(orthogonalize(G, ns_dtype="float32"), expected)
        differentiable = orthogonalize(G.requires_grad_(), ns_dtype="float32")
    assert torch.equal(p, q)
    torch.testing.assert_close(differentiable, expected, rtol=0, atol=1e-4)


def test_a_wider_momentum_does_not_widen_the_products() -> None:
    p, q = parameter(6, 9), parameter(6, 9)
    p.grad, q.grad = torch.randn(2, 6, 9).unbind()
    q.grad = p.grad.clone()
    wide, plain = Muon([p], momentum_dtype="float64"), Muon([q])
    for optimizer in (wide, plain):
        optimizer.step()
    dtypes = [row["ns_dtype"] for optimizer in (wide, plain) for row in optimizer.describe()]
    assert dtypes in (["torch.float32"] * 2, ["torch.bfloat16"] * 2)
    # The updates, of 1e-3, differ by the rounding of the momentum: the parameters by their own. In
    # bfloat16 that may turn the rounding of an entry, by 2^-8, and five iterations amplify it.
    atol = 1e-7 if dtypes[0] == "torch.float32" else 1e-3 * 2**-4
    torch.testing.assert_close(p, q, rtol=2**-23, atol=atol)


def test_hooks_on_loading_have_the_last_word() -> None:
    p = parameter(6, 9)
    set_gradients([p])
    optimizer = Muon([p], momentum_dtype="bfloat16")
    optimizer.step()
    saved = optimizer.state_dict()
    optimizer.register_load_state_dict_post_hook(lambda o: o.state[p]["momentum_buffer"].zero_())
    optimizer.load_state_dict(saved)
    assert not momentum_of(optimizer, p).any()
    optimizer.step()
    assert momentum_of(optimizer, p).dtype == torch.bfloat16


def test_an_optimizer_pickled_before_an_option_existed_steps() -> None:
    p = parameter(6, 9)
    optimizer = Muon([p])
    state = optimizer.__getstate__()
    for key in ("momentum_dtype", "bytes_in_flight"):
        del state["param_groups"][0][key]
    other = Muon.__new__(Muon)
    other.__setstate__(state)
    set_gradients([p])
    other.step()
