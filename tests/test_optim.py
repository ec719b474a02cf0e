"""The optimizer's laws (DESIGN section 6) and the bugs of others (PITFALLS), on one device."""

from __future__ import annotations

import copy
import io
import pickle
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from muonkit import Muon, MuonW, View, orthogonalize
from muonkit.scale import SCALES, scale_factor

VIEWED = [
    ("matrix", (6, 10)),
    ("matrix", (10, 6)),
    ("flatten", (6, 3, 2, 2)),
    ("experts", (3, 6, 4)),
    ("split(rows=3)", (12, 5)),
    ("split(rows=6+2+2)", (10, 5)),
    ("split(cols=2)", (5, 12)),
    ("transpose > split(rows=3)", (5, 12)),
    ("experts > split(rows=2)", (2, 8, 5)),
]


def parameter(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    generator = torch.Generator().manual_seed(seed)
    return nn.Parameter(torch.randn(shape, generator=generator).to(dtype))


def set_gradients(params: list[nn.Parameter], seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(1000 + seed)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)


def mlp(width: int = 12, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(width, 2 * width),
        nn.ReLU(),
        nn.Linear(2 * width, width),
        nn.LayerNorm(width),
        nn.Linear(width, 3),
    )


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, seed: int = 0) -> None:
    for t in range(steps):
        set_gradients(list(model.parameters()), seed + t)
        optimizer.step()


def momentum_of(optimizer: Muon, p: torch.Tensor) -> torch.Tensor:
    return optimizer.state[p]["momentum_buffer"]


# --- the step is the algorithm ----------------------------------------------------------------


@pytest.mark.parametrize("adjust_lr_fn", [None, *SCALES])
@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize(("view", "shape"), VIEWED)
def test_each_matrix_of_the_view_gets_the_written_step(
    view: str, shape: tuple[int, ...], nesterov: bool, adjust_lr_fn: str | None
) -> None:
    """A plain float64 transcription, one matrix at a time (PITFALLS 9, 11, 12: the scale too)."""
    lr, decay, mu = 0.1, 0.3, 0.9
    p = parameter(*shape, dtype=torch.float64)
    optimizer = Muon(
        [{"params": [p], "view": view}], lr, decay, mu, nesterov, adjust_lr_fn=adjust_lr_fn
    )
    W, M = p.detach().clone(), torch.zeros(shape, dtype=torch.float64)
    for t in range(3):
        set_gradients([p], t)
        optimizer.step()
        assert p.grad is not None
        M = mu * M + (1 - mu) * p.grad
        U = (1 - mu) * p.grad + mu * M if nesterov else M
        W = W - lr * decay * W
        for block in View.parse(view).blocks(shape):
            matrices = block.to_matrices(block.region(U))
            O = torch.stack([orthogonalize(matrix) for matrix in matrices])
            step = lr * scale_factor(adjust_lr_fn, block.rows, block.cols) * O
            block.region(W).sub_(block.to_region(step))
    torch.testing.assert_close(p.detach(), W, rtol=1e-9, atol=1e-9)


def test_pitfall_9_a_convolution_is_scaled_by_its_matrix() -> None:
    conv = parameter(64, 16, 3, 3)
    optimizer = Muon([{"params": [conv], "view": "flatten"}], adjust_lr_fn="spectral")
    assert optimizer.describe()[0]["scale"] == pytest.approx((64 / (16 * 9)) ** 0.5)


def test_pitfall_10_equal_shapes_are_not_mixed() -> None:
    """Several same-shaped parameters in one group equal each alone."""
    together = [parameter(8, 3, 2, 2, seed=i) for i in range(3)]
    alone = [nn.Parameter(p.detach().clone()) for p in together]
    optimizer = Muon([{"params": together, "view": "flatten"}], lr=0.1)
    singles = [Muon([{"params": [p], "view": "flatten"}], lr=0.1) for p in alone]
    for t in range(2):
        set_gradients(together, t)
        for p, q in zip(together, alone, strict=True):
            assert p.grad is not None
            q.grad = p.grad.clone()
        optimizer.step()
        for single in singles:
            single.step()
    for p, q in zip(together, alone, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("view", ["split(rows=12)", "split(rows=3) > split(rows=4)"])
def test_pitfall_11_one_head_does_not_move_the_others(view: str) -> None:
    qkv = parameter(48, 16)
    louder = nn.Parameter(qkv.detach().clone())
    set_gradients([qkv])
    assert qkv.grad is not None
    louder.grad = qkv.grad.clone()
    louder.grad[4:8] *= 100
    for p in (qkv, louder):
        Muon([{"params": [p], "view": view}], lr=0.1).step()
    torch.testing.assert_close(louder, qkv, rtol=1e-5, atol=1e-6)


def test_pitfall_12_experts_are_separate_matrices() -> None:
    stack = parameter(4, 6, 10)
    singles = [nn.Parameter(matrix.clone()) for matrix in stack.detach()]
    set_gradients([stack])
    assert stack.grad is not None
    for single, g in zip(singles, stack.grad, strict=True):
        single.grad = g.clone()
    Muon([{"params": [stack], "view": "experts"}], lr=0.1).step()
    Muon(singles, lr=0.1).step()
    torch.testing.assert_close(stack.detach(), torch.stack([s.detach() for s in singles]))


def test_pitfall_13_channels_last() -> None:
    torch.manual_seed(0)
    plain = nn.Conv2d(3, 8, 3)
    last = copy.deepcopy(plain).to(memory_format=torch.channels_last)
    images = torch.randn(2, 3, 9, 9)
    for conv, x in ((plain, images), (last, images.to(memory_format=torch.channels_last))):
        optimizer = Muon([{"params": [conv.weight], "view": "flatten"}], lr=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            conv(x).square().mean().backward()
            optimizer.step()
    assert last.weight.stride() != plain.weight.stride()
    torch.testing.assert_close(last.weight, plain.weight, rtol=1e-4, atol=1e-5)


def test_pitfall_14_the_scale_is_applied_once() -> None:
    p = parameter(64, 16)
    before = p.detach().clone()
    set_gradients([p])
    Muon([p], lr=1.0, weight_decay=0.0, ns_coefficients="svd", adjust_lr_fn="original").step()
    values = torch.linalg.svdvals(before - p.detach())
    torch.testing.assert_close(values, torch.full((16,), 2.0), rtol=1e-4, atol=0)


@given(
    rows=st.integers(1, 7),
    cols=st.integers(1, 7),
    exponent=st.integers(-30, 30),
    transposed=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_any_magnitude_and_stride_steps_alike(
    rows: int, cols: int, exponent: int, transposed: bool, seed: int
) -> None:
    """PITFALLS 2 and 24: the update depends on neither the gradient's scale nor the strides."""
    p = parameter(rows, cols, seed=seed)
    q = nn.Parameter(p.detach().T.contiguous().T) if transposed else copy.deepcopy(p)
    set_gradients([p], seed)
    assert p.grad is not None
    q.grad = p.grad * 10.0**exponent
    for x in (p, q):
        optimizer = Muon([x], lr=0.1)
        optimizer.step()
        assert momentum_of(optimizer, x).is_contiguous()
    # The worst of these draws are nearly singular, where fp32 rounding moves O by up to 1e-3.
    torch.testing.assert_close(p, q, rtol=0, atol=2e-3)


# --- what the step leaves alone ---------------------------------------------------------------


@pytest.mark.parametrize("maximize", [True, False])
@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pitfalls_1_and_3_gradient_and_momentum_are_not_aliased(
    dtype: torch.dtype, nesterov: bool, maximize: bool
) -> None:
    for view, shape in VIEWED:
        p = parameter(*shape, dtype=dtype)
        options = {"lr": 0.1, "nesterov": nesterov, "maximize": maximize}
        optimizer = Muon([{"params": [p], "view": view}], ns_dtype=dtype, **options)
        set_gradients([p])
        assert p.grad is not None
        before = p.grad.clone()
        optimizer.step()
        assert torch.equal(p.grad, before)
        expected = torch.zeros_like(before).lerp_(-before if maximize else before, 1 - 0.95)
        assert torch.equal(momentum_of(optimizer, p), expected)


def test_pitfall_1_is_real_in_torch() -> None:
    """Why ours differs from torch.optim.Muon there: delete this when torch mends it."""
    p = parameter(6, 6, dtype=torch.bfloat16)
    theirs = torch.optim.Muon([p], nesterov=False)
    set_gradients([p])
    assert p.grad is not None
    theirs.step()
    expected = torch.zeros_like(p.grad).lerp_(p.grad, 1 - 0.95)
    assert not torch.equal(theirs.state[p]["momentum_buffer"], expected)


def test_pitfall_19_no_gradient_no_step() -> None:
    model = mlp()
    optimizer = MuonW(model, lr=0.1, weight_decay=0.5)
    idle = [model[2].weight, model[4].weight, model[0].bias]
    before = [p.detach().clone() for p in idle]
    set_gradients([p for p in model.parameters() if not any(p is q for q in idle)])
    moved = model[0].weight.detach().clone()
    optimizer.step()
    assert all(torch.equal(p, b) for p, b in zip(idle, before, strict=True))
    assert all(p not in optimizer.state for p in idle)
    assert not torch.equal(model[0].weight, moved)


def test_pitfall_4_a_zero_gradient_moves_nothing() -> None:
    for view, shape in VIEWED:
        p = parameter(*shape)
        before = p.detach().clone()
        p.grad = torch.zeros_like(p)
        Muon([{"params": [p], "view": view}], weight_decay=0.0).step()
        assert torch.equal(p, before)


def test_cautious_decay_only_where_the_update_shrinks() -> None:
    p = parameter(8, 8)
    before = p.detach().clone()
    set_gradients([p])
    plain, cautious = copy.deepcopy(p), copy.deepcopy(p)
    plain.grad, cautious.grad = p.grad, p.grad
    Muon([plain], lr=0.1, weight_decay=0.0).step()
    Muon([cautious], lr=0.1, weight_decay=0.5, cautious=True).step()
    shrinks = (before - plain.detach()) * before > 0
    assert shrinks.any()
    assert not shrinks.all()
    expected = plain.detach() - 0.1 * 0.5 * before * shrinks
    torch.testing.assert_close(cautious.detach(), expected)


def test_maximize_is_the_negative_gradient() -> None:
    for algorithm in ("muon", "adamw"):
        p = parameter(6, 6)
        q = copy.deepcopy(p)
        set_gradients([p])
        assert p.grad is not None
        q.grad = -p.grad
        Muon([{"params": [p], "algorithm": algorithm, "lr": 0.1}], maximize=True).step()
        Muon([{"params": [q], "algorithm": algorithm, "lr": 0.1}]).step()
        torch.testing.assert_close(p, q)


# --- living with the rest of PyTorch ----------------------------------------------------------


def test_closure_runs_with_gradients_and_its_loss_is_returned() -> None:
    model = mlp()
    optimizer = MuonW(model)
    x = torch.randn(4, 12)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        return loss

    first = optimizer.step(closure)
    for _ in range(20):
        last = optimizer.step(closure)
    assert last < first


def test_adamw_groups_are_torchs_adamw() -> None:
    model = mlp()
    twin = copy.deepcopy(model)
    options = {"lr": 0.01, "betas": (0.8, 0.9), "eps": 1e-6, "weight_decay": 0.1}
    ours = Muon([{"params": list(model.parameters()), "algorithm": "adamw", **options}])
    theirs = torch.optim.AdamW(twin.parameters(), **options)
    for t in range(5):
        train(model, ours, 1, t)
        train(twin, theirs, 1, t)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)
        assert set(ours.state[p]) == set(theirs.state[q])


def test_zero_grad_reaches_everything() -> None:
    model = mlp()
    optimizer = MuonW(model)
    set_gradients(list(model.parameters()))
    optimizer.zero_grad()
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("tensor_lr", [False, True])
def test_pitfall_22_a_scheduler_reaches_every_group_and_keeps_their_ratio(tensor_lr: bool) -> None:
    model = mlp()
    lr = torch.tensor(1e-2) if tensor_lr else 1e-2
    optimizer = MuonW(model, lr=lr, adamw_lr=3e-3)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1 / (1 + t))
    for t in range(3):
        train(model, optimizer, 1, t)
        scheduler.step()
    for group in optimizer.param_groups:
        base = 1e-2 if group["algorithm"] == "muon" else 3e-3
        assert float(group["lr"]) == pytest.approx(base / 4)


def test_momentum_schedulers_reach_muon() -> None:
    model = mlp()
    optimizer = MuonW(model)
    torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=10)
    assert all(g["momentum"] == 0.95 for g in optimizer.param_groups)


def test_tensor_lr_equals_float_lr() -> None:
    one, two = mlp(), mlp()
    a, b = MuonW(one, lr=0.01), MuonW(two, lr=torch.tensor(0.01))
    for t in range(3):
        train(one, a, 1, t)
        train(two, b, 1, t)
    for p, q in zip(one.parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_each_group_has_its_own_hyperparameters() -> None:
    fast, slow = parameter(6, 6), parameter(6, 6)
    optimizer = Muon([{"params": [fast], "lr": 0.2}, {"params": [slow]}], lr=0.1, weight_decay=0.0)
    before = fast.detach().clone()
    set_gradients([fast])
    slow.grad = fast.grad
    optimizer.step()
    torch.testing.assert_close(before - fast.detach(), 2 * (before - slow.detach()))


def test_add_param_group_and_unfreezing() -> None:
    model = mlp()
    model[2].requires_grad_(False)
    optimizer = MuonW(model)
    claimed = {id(p) for g in optimizer.param_groups for p in g["params"]}
    assert id(model[2].weight) not in claimed
    model[2].requires_grad_(True)
    optimizer.add_param_group({"params": [model[2].weight]})
    optimizer.add_param_group({"params": [model[2].bias], "algorithm": "adamw"})
    before = model[2].weight.detach().clone()
    train(model, optimizer, 1)
    assert not torch.equal(model[2].weight, before)
    assert optimizer.param_groups[-1]["lr"] == optimizer.param_groups[0]["lr"]


def test_a_refused_group_is_not_added() -> None:
    optimizer = Muon([parameter(4, 4)])
    for group in (
        {"params": [parameter(4)]},
        {"params": [parameter(4, 4)], "lr": -1.0},
        {"params": [parameter(4, 4)], "ns_coefficients": "nope"},
        {"params": [parameter(4, 4)], "view": "split(rows=3)"},
    ):
        with pytest.raises(ValueError):
            optimizer.add_param_group(group)
        assert len(optimizer.param_groups) == 1


def test_step_hooks_run() -> None:
    model = mlp()
    optimizer = MuonW(model)
    seen: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    train(model, optimizer, 1)
    assert seen == ["before", "after"]


# --- state -------------------------------------------------------------------------------------


def reload_weights_only(state: dict) -> dict:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@pytest.mark.parametrize(
    "options", [{}, {"ns_coefficients": "polar_express_1.05", "lr": torch.tensor(0.02)}]
)
def test_a_resumed_run_equals_the_uninterrupted_one(options: dict) -> None:
    options = {"lr": 0.02, **options}
    straight = mlp()
    optimizer = MuonW(straight, **copy.deepcopy(options))
    train(straight, optimizer, 3, seed=0)
    resumed = mlp(seed=5)
    resumed.load_state_dict(straight.state_dict())
    again = MuonW(resumed, **copy.deepcopy(options))
    again.load_state_dict(reload_weights_only(optimizer.state_dict()))
    train(straight, optimizer, 2, seed=10)
    train(resumed, again, 2, seed=10)
    for p, q in zip(straight.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(p, q)


def test_pitfall_23_state_loads_into_another_dtype() -> None:
    model = mlp()
    optimizer = MuonW(model)
    train(model, optimizer, 1)
    half = mlp().to(torch.bfloat16)
    other = MuonW(half, ns_dtype="float32")
    other.load_state_dict(optimizer.state_dict())
    train(half, other, 1)
    assert momentum_of(other, half[0].weight).dtype == torch.bfloat16
    # ... and a model that is cast after its first step goes on as well.
    model.double()
    train(model, optimizer, 1)
    assert momentum_of(optimizer, model[0].weight).dtype == torch.float64


def test_load_refuses_another_model_and_loads_nothing() -> None:
    model = mlp()
    optimizer = MuonW(model)
    train(model, optimizer, 1)
    kept = momentum_of(optimizer, model[0].weight).clone()
    wider = MuonW(big := mlp(16))
    train(big, wider, 1)
    with pytest.raises(
        ValueError, match=r"0\.weight has shape \(32, 16\), the parameter \(24, 12\)"
    ):
        optimizer.load_state_dict(wider.state_dict())
    swapped = optimizer.state_dict()
    swapped = {**swapped, "param_groups": swapped["param_groups"][::-1]}
    with pytest.raises(ValueError, match="trained by adamw, here by muon"):
        optimizer.load_state_dict(swapped)
    with pytest.raises(ValueError, match="number of parameter groups"):
        optimizer.load_state_dict(Muon([parameter(2, 2)]).state_dict())
    assert torch.equal(momentum_of(optimizer, model[0].weight), kept)


def test_deepcopy_and_pickle() -> None:
    model = mlp()
    optimizer = MuonW(model)
    train(model, optimizer, 1)
    for copied_model, copied in (
        copy.deepcopy((model, optimizer)),
        pickle.loads(pickle.dumps((model, optimizer))),
    ):
        train(copied_model, copied, 1, seed=7)
        reference = copy.deepcopy((model, optimizer))
        train(*reference, 1, seed=7)
        for p, q in zip(copied_model.parameters(), reference[0].parameters(), strict=True):
            assert torch.equal(p, q)
        copied.add_param_group({"params": [parameter(3)], "algorithm": "adamw"})
        assert copied.skipped_steps == 0
        assert "Parameter Group" in repr(copied)


# --- gradients that are late, scaled, broken ---------------------------------------------------


def test_pitfall_26_accumulation_orthogonalizes_once_a_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import muonkit.optim as module

    calls: list[int] = []

    def counted(u: torch.Tensor, **options: object) -> torch.Tensor:
        calls.append(u.shape[0])
        return orthogonalize(u, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "orthogonalize", counted)
    model = mlp()
    whole = copy.deepcopy(model)
    optimizer = MuonW(model, lr=0.01)
    x = torch.randn(8, 12)
    for part in x.split(2):
        (model(part).square().mean() / 4).backward()
    assert calls == []
    optimizer.step()
    assert sum(calls) == 2  # two hidden matrices, each once
    MuonW(whole, lr=0.01).zero_grad()
    whole(x).square().mean().backward()
    MuonW(whole, lr=0.01).step()
    for p, q in zip(model.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-4)


def test_pitfall_20_clipping_acts_on_gradients_not_on_updates() -> None:
    one, two = mlp(), mlp()
    for model, norm in ((one, 1e9), (two, 1e-3)):
        set_gradients(list(model.parameters()))
        nn.utils.clip_grad_norm_(model.parameters(), norm)
        MuonW(model, lr=0.1).step()
    torch.testing.assert_close(one[0].weight, two[0].weight, rtol=1e-3, atol=1e-4)


def test_pitfall_21_grad_scaler_leaves_no_trace_of_an_overflow() -> None:
    model = mlp()
    optimizer = MuonW(model)
    train(model, optimizer, 1)
    before = copy.deepcopy(model.state_dict())
    state = copy.deepcopy(optimizer.state_dict()["state"])
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(model(torch.randn(2, 12)).sum())
    set_gradients(list(model.parameters()), 3)
    assert model[0].weight.grad is not None
    model[0].weight.grad[0, 0] = float("inf")
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 4.0
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])
    for key, entry in optimizer.state_dict()["state"].items():
        for name, value in entry.items():
            assert torch.equal(value, state[key][name])
    optimizer.zero_grad()
    scaler.scale(model(torch.randn(2, 12)).square().sum()).backward()
    scaler.step(optimizer)
    assert not torch.equal(model[0].weight, before["0.weight"])


@pytest.mark.parametrize("where", [0, 2, 3, 4])
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_nonfinite_gradients(where: int, value: float) -> None:
    def broken(policy: str) -> tuple[nn.Sequential, MuonW, list[torch.Tensor]]:
        model = mlp()
        optimizer = MuonW(model, lr=0.1, nonfinite=policy)
        train(model, optimizer, 1)
        set_gradients(list(model.parameters()), 1)
        model[where].weight.grad.view(-1)[1] = value
        state = optimizer.state_dict()["state"]
        tensors = [*model.parameters(), *(v for entry in state.values() for v in entry.values())]
        return model, optimizer, [t.detach().clone() for t in tensors]

    for policy in ("skip", "raise"):
        model, optimizer, before = broken(policy)
        if policy == "skip":
            optimizer.step()
            assert optimizer.skipped_steps == 1
        else:
            with pytest.raises(FloatingPointError, match=rf"gradient of {where}\.weight is not"):
                optimizer.step()
        state = optimizer.state_dict()["state"]
        after = [*model.parameters(), *(v for entry in state.values() for v in entry.values())]
        assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
        train(model, optimizer, 1, seed=2)
        assert all(p.isfinite().all() for p in model.parameters())
    model, optimizer, _ = broken("propagate")
    optimizer.step()
    assert model[where].weight.isnan().any()


def test_large_finite_gradients_are_finite() -> None:
    model = mlp()
    optimizer = MuonW(model, nonfinite="raise", adamw_lr=0.0)
    set_gradients(list(model.parameters()))
    for p in model.parameters():
        p.grad.mul_(1e25)
    optimizer.step()


# --- what is refused ---------------------------------------------------------------------------


def test_sparse_gradients_are_refused_before_anything_is_written() -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(10, 6, sparse=True), "body": nn.Linear(6, 6)})
    groups = [
        {"params": [model["body"].weight]},
        {"params": [("embed.weight", model["embed"].weight)], "algorithm": "adamw", "lr": 0.1},
    ]
    groups[0]["params"] = [("body.weight", model["body"].weight)]
    optimizer = Muon(groups)
    model["body"](model["embed"](torch.tensor([1, 2]))).sum().backward()
    before = model["body"].weight.detach().clone()
    with pytest.raises(RuntimeError, match=r"sparse gradients: embed\.weight .*sparse=False"):
        optimizer.step()
    assert torch.equal(model["body"].weight, before)
    assert not optimizer.state


@pytest.mark.parametrize("algorithm", ["muon", "adamw"])
def test_complex_and_integer_parameters_are_refused(algorithm: str) -> None:
    group = {"algorithm": algorithm, "lr": 0.1}
    with pytest.raises(RuntimeError, match="view_as_real"):
        Muon([{"params": [nn.Parameter(torch.zeros(2, 2, dtype=torch.complex64))], **group}])
    with pytest.raises(TypeError, match=r"torch.int64.*buffer"):
        Muon([{"params": [torch.zeros(2, 2, dtype=torch.int64)], **group}])
    with pytest.raises(RuntimeError, match="sparse parameters"):
        Muon([{"params": [torch.eye(2).to_sparse()], **group}])


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"lr": float("nan")}, ValueError, "Learning rate should be >= 0 but is: nan"),
        ({"momentum": 1.0}, ValueError, "momentum should be >= 0 and < 1"),
        ({"eps": -1.0}, ValueError, "eps should be"),
        ({"ns_steps": 0}, ValueError, "from 1 to 99"),
        ({"ns_coefficients": "polar"}, ValueError, "'polar_express'"),
        ({"ns_dtype": "int8"}, ValueError, "'auto', 'float64', 'float32'"),
        ({"ns_coefficients": "cans", "ns_dtype": "bfloat16"}, ValueError, "no safety factor"),
        ({"ns_form": "gram!"}, ValueError, "unknown ns_form"),
        ({"adjust_lr_fn": "muP"}, ValueError, "'original', 'match_rms_adamw', 'spectral'"),
        ({"nonfinite": "ignore"}, ValueError, "'propagate', 'skip', 'raise'"),
    ],
)
def test_wrong_options_are_refused(options: dict, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        Muon([parameter(3, 3)], **options)
    with pytest.raises(error, match=words):
        MuonW(mlp(), **options)
    with pytest.raises(error, match=words):  # in a group as well
        Muon([{"params": [parameter(3, 3)], **options}])


def test_wrong_groups_are_refused() -> None:
    p = [parameter(3, 3)]
    with pytest.raises(ValueError, match="'muon', 'adamw'"):
        Muon([{"params": p, "algorithm": "sgd"}])
    with pytest.raises(TypeError, match="not a set"):
        Muon([{"params": set(p)}])
    with pytest.raises(ValueError, match=r"use_muon=True and algorithm='adamw'"):
        Muon([{"params": p, "algorithm": "adamw", "use_muon": True}])
    with pytest.raises(ValueError, match=r"no lr of its own.*adamw_lr"):
        Muon([{"params": p, "use_muon": False}], lr=0.02)
    with pytest.raises(ValueError, match=r"betas should be two numbers in \[0, 1\)"):
        Muon([{"params": p, "use_muon": False, "lr": 0.1, "betas": (0.9, 1.0)}])
    with pytest.raises(ValueError, match=r"'flatten' .convolution., 'experts'"):
        Muon([parameter(4, 3, 2, 2)])
    with pytest.raises(ValueError, match="train it with AdamW"):
        Muon([parameter(4)])
    with pytest.raises(ValueError, match=r"my.weight: view .* cuts 3 rows in 2"):
        Muon([{"params": [("my.weight", p[0])], "view": "split(rows=2)"}])


def test_pitfall_8_svd_is_never_exchanged_for_newton_schulz() -> None:
    for shape in ((6, 6), (4, 9), (9, 4)):
        p = parameter(*shape)
        before = p.detach().clone()
        set_gradients([p])
        Muon([p], lr=1.0, weight_decay=0.0, ns_coefficients="svd").step()
        values = torch.linalg.svdvals(before - p.detach())
        torch.testing.assert_close(values / values[0], torch.ones_like(values), rtol=1e-4, atol=0)


# --- several dtypes and devices in one model ----------------------------------------------------


def test_mixed_dtypes_in_one_model() -> None:
    model = mlp()
    model[2].to(torch.bfloat16)
    model[4].double()
    optimizer = MuonW(model, lr=0.01, ns_dtype="float32")
    before = [p.detach().clone() for p in model.parameters()]
    train(model, optimizer, 2)
    for p, b in zip(model.parameters(), before, strict=True):
        assert p.dtype == b.dtype
        assert p.isfinite().all()
        assert not torch.equal(p, b)


def test_several_devices_in_one_model() -> None:
    """The meta device stands for a second one: shapes, dtypes and placement are computed there."""
    real, meta = parameter(6, 6), nn.Parameter(torch.empty(6, 6, device="meta"))
    alone = copy.deepcopy(real)
    optimizer = Muon([real, meta], lr=0.1, ns_dtype="float32")
    set_gradients([real])
    alone.grad = real.grad
    meta.grad = torch.empty(6, 6, device="meta")
    optimizer.step()
    Muon([alone], lr=0.1, ns_dtype="float32").step()
    assert torch.equal(real, alone)
    assert momentum_of(optimizer, meta).device.type == "meta"


def test_empty_matrices_are_no_trouble() -> None:
    empty, full = nn.Parameter(torch.zeros(0, 4)), parameter(4, 4)
    optimizer = Muon([empty, full])
    before = full.detach().clone()
    set_gradients([empty, full])
    optimizer.step()
    assert not torch.equal(full, before)


# --- torch.compile ------------------------------------------------------------------------------


def test_pitfall_25_one_graph_and_no_recompilation_when_lr_changes() -> None:
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    model, twin = mlp(), mlp()
    optimizer = MuonW(model, lr=torch.tensor(1e-2))
    reference = MuonW(twin, lr=torch.tensor(1e-2))
    train(model, optimizer, 1)
    train(twin, reference, 1)
    counter = CompileCounter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # dynamo's own remarks on the profiler
        step = torch.compile(optimizer.step, backend=counter, fullgraph=True)
        for t in range(4):
            for one in (optimizer, reference):
                for group in one.param_groups:
                    group["lr"].mul_(0.9)
            set_gradients(list(model.parameters()), t)
            step()
            train(twin, reference, 1, t)
    assert counter.frame_count == 1
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
