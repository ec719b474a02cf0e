"""Living with the rest of PyTorch: closures, schedulers, scalers, checkpoints, compilation."""

from __future__ import annotations

import copy
import io
import pickle
import warnings

import pytest
import torch
from torch import nn

from muonkit import Muon, MuonW, orthogonalize
from optim_helpers import mlp, momentum_of, parameter, set_gradients, train

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
