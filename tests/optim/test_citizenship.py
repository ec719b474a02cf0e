"""Living with the rest of PyTorch: closures, schedulers, scalers, checkpoints, compilation."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from muonkit import Muon, MuonW
from tests.helpers import internals
from tests.helpers.optim import mlp, momentum_of, parameter, set_gradients, train

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
    torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=1e-2, total_steps=10, max_momentum=0.75, base_momentum=0.5
    )
    train(model, optimizer, 1)
    assert optimizer.param_groups[0]["momentum"] == 0.75
    weight = model[0].weight
    assert weight.grad is not None
    torch.testing.assert_close(momentum_of(optimizer, weight), weight.grad * 0.25)


def test_a_tensor_lr_is_not_shared_between_groups() -> None:
    """Schedulers fill it group by group: a shared one would be halved once for each."""
    lr = torch.tensor(1.0)
    optimizer = MuonW(mlp(), lr=lr)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0)
    scheduler.step(1.0)
    scheduler.step(2.0)
    assert [float(group["lr"]) for group in optimizer.param_groups] == [0.5] * 3
    optimizer.add_param_group({"params": [("more", parameter(3, 3))], "algorithm": "muon"})
    assert len({id(group["lr"]) for group in optimizer.param_groups}) == 4
    # One group keeps the caller's own tensor, as torch's does.
    assert Muon([parameter(3, 3)], lr=lr).param_groups[0]["lr"] is lr


def test_a_one_element_lr_of_any_shape() -> None:
    one, two = parameter(4, 4), parameter(4, 4)
    set_gradients([one])
    two.grad = one.grad
    Muon([one], lr=torch.tensor([[0.1]])).step()
    Muon([two], lr=0.1).step()
    torch.testing.assert_close(one, two)


def test_an_lr_on_the_device_is_never_read_back() -> None:
    """A meta tensor cannot be read: the step has to do without."""
    p = nn.Parameter(torch.empty(4, 4, device="meta"))
    p.grad = torch.empty(4, 4, device="meta")
    optimizer = Muon([p], lr=0.1, ns_dtype="float32")
    for cautious in (False, True):
        group = optimizer.param_groups[0]
        group["lr"], group["cautious"] = torch.empty((), device="meta"), cautious
        optimizer.step()


@pytest.mark.parametrize("algorithm", ["muon", "adamw"])
@pytest.mark.parametrize("cautious", [False, True])
def test_decay_of_16_bit_weights_is_not_rounded_to_16_bits(algorithm: str, cautious: bool) -> None:
    """1 - lr * decay = 0.998 is 0.996 in bf16: twice the decay, were it rounded."""
    for lr in (0.02, torch.tensor(0.02)):
        p = nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16) * 1.3)
        group = {"params": [p], "algorithm": algorithm, "lr": lr}
        optimizer = Muon([group], weight_decay=0.1, cautious=cautious, ns_dtype="float32")
        for _ in range(40):
            p.grad = torch.zeros_like(p)
            optimizer.step()
        # Each step's 0.0026 is less than half the spacing of bf16 at 1.3: it rounds away, in
        # torch's Muon and AdamW too. Rounded factors would have taken 15% of the weight.
        assert p.min() == p.max() == torch.tensor(1.3).bfloat16()


# --- AdamW in every layout ----------------------------------------------------------------------


def _layouts() -> dict[str, tuple[nn.Parameter, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(8, 6, generator=generator)
    conv = torch.randn(4, 3, 3, 3, generator=generator)
    last = conv.to(memory_format=torch.channels_last)
    return {
        "slice": (nn.Parameter(base.clone()[:, :3]), torch.randn(8, 3, generator=generator)),
        "transposed": (nn.Parameter(base.clone().T), torch.randn(6, 8, generator=generator)),
        "expanded gradient": (nn.Parameter(base.clone()), torch.ones(1, 1).expand(8, 6)),
        "channels_last": (nn.Parameter(last), torch.randn(conv.shape, generator=generator)),
        "both channels_last": (nn.Parameter(last), torch.randn_like(last)),
    }


@pytest.mark.parametrize("kind", _layouts())
def test_adamw_equals_torchs_in_every_layout(kind: str) -> None:
    """torch's fused kernel walks raw pointers: with other strides it writes out of bounds."""
    ours, gradient = _layouts()[kind]
    theirs = nn.Parameter(ours.detach().clone(memory_format=torch.contiguous_format))
    group = {"params": [ours], "algorithm": "adamw", "lr": 0.01, "betas": (0.9, 0.999)}
    optimizer = Muon([group], weight_decay=0.01)
    reference = torch.optim.AdamW([theirs], lr=0.01, foreach=False)
    whole = torch.as_strided(ours.detach(), (8, 6), (6, 1), 0) if kind == "slice" else None
    outside = None if whole is None else whole[:, 3:].clone()
    for scale in (1.0, -0.5, 2.0):
        ours.grad = gradient if kind == "expanded gradient" else gradient * scale
        theirs.grad = ours.grad.contiguous()
        optimizer.step()
        reference.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)
    if whole is not None:
        assert torch.equal(whole[:, 3:], outside)


def test_adamw_is_fused_where_it_can_be(monkeypatch: pytest.MonkeyPatch) -> None:
    import muonkit.adamw as module

    asked: list[object] = []
    original = module.adamw

    def counted(*args: object, **options: object) -> None:
        asked.append(options["fused"])
        original(*args, **options)

    monkeypatch.setattr(module, "adamw", counted)
    train(model := mlp(), MuonW(model), 1)
    assert asked == [True, True]


@pytest.mark.skipif(
    not hasattr(torch.Tensor, "grad_dtype"), reason="torch 2.9 has no such gradients"
)
def test_a_gradient_of_another_dtype_is_converted() -> None:
    for algorithm in ("muon", "adamw"):
        p = parameter(4, 4, dtype=torch.bfloat16)
        p.grad_dtype = torch.float32
        p.grad = torch.randn(4, 4)
        before = p.detach().clone()
        Muon([{"params": [p], "algorithm": algorithm, "lr": 0.1}], ns_dtype="float32").step()
        assert not torch.equal(p, before)


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


def test_add_param_group() -> None:
    model, more = mlp(), mlp(seed=1)
    optimizer = MuonW(model)
    optimizer.add_param_group({"params": [("more.weight", more[2].weight)], "algorithm": "muon"})
    optimizer.add_param_group({"params": [("more.bias", more[2].bias)], "algorithm": "adamw"})
    before = more[2].weight.detach().clone()
    set_gradients(list(model.parameters()))
    train(more, optimizer, 1)
    assert not torch.equal(more[2].weight, before)
    assert optimizer.param_groups[-1]["lr"] == optimizer.param_groups[0]["lr"]
    # Names in all groups or in none, as torch's optimizers have it.
    with pytest.raises(ValueError, match="with/without names"):
        optimizer.add_param_group({"params": [parameter(2, 2)], "algorithm": "muon"})
    assert len(optimizer.param_groups) == 5


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
        ValueError, match=r"0\.weight has shape \(32, 16\), the parameter \(24, 12\) wants"
    ):
        optimizer.load_state_dict(wider.state_dict())
    swapped = optimizer.state_dict()
    swapped = {**swapped, "param_groups": swapped["param_groups"][::-1]}
    for group in swapped["param_groups"]:
        del group["param_names"]  # by which groups would be found in any order
    with pytest.raises(ValueError, match="trained by adamw, here by muon"):
        optimizer.load_state_dict(swapped)
    with pytest.raises(ValueError, match="number of parameter groups"):
        optimizer.load_state_dict(Muon([parameter(2, 2)]).state_dict())
    assert torch.equal(momentum_of(optimizer, model[0].weight), kept)


def test_load_refuses_another_optimizers_state_and_options() -> None:
    model = mlp()
    optimizer = MuonW(model)
    train(model, optimizer, 1)
    kept = momentum_of(optimizer, model[0].weight).clone()
    good = optimizer.state_dict()
    adamw = copy.deepcopy(good)
    moments = {"step": torch.tensor(1.0), "exp_avg": kept, "exp_avg_sq": kept}
    adamw["state"][adamw["param_groups"][0]["params"][0]] = moments
    wrong_option = copy.deepcopy(good)
    wrong_option["param_groups"][0]["ns_coefficients"] = "zzz"
    for state, words in (
        (adamw, "no momentum_buffer: it was saved by another optimizer than muon"),
        (wrong_option, "unknown ns_coefficients 'zzz'"),
        ({"param_groups": good["param_groups"]}, r"lacks \['state'\]"),
    ):
        with pytest.raises(ValueError, match=words):
            optimizer.load_state_dict(state)
    assert torch.equal(momentum_of(optimizer, model[0].weight), kept)


@pytest.mark.parametrize("counted", [int, lambda step: step.long(), lambda step: step.double()])
def test_view_is_kept_and_any_number_of_steps_is_taken_on_load(
    counted: Callable[[torch.Tensor], Any],
) -> None:
    model = mlp()
    optimizer = MuonW(model)
    train(model, optimizer, 2)
    state = copy.deepcopy(optimizer.state_dict())
    state["param_groups"][0]["view"] = "split(rows=2)"
    for entry in state["state"].values():  # Keller Jordan's Muon counts in a number
        if "step" in entry:
            entry["step"] = counted(entry["step"])
    optimizer.load_state_dict(state)
    assert optimizer.param_groups[0]["view"] == "matrix"
    train(model, optimizer, 1)
    assert optimizer.state[model[0].bias]["step"] == 3


def test_an_optimizer_is_rebuilt_from_its_defaults() -> None:
    p = parameter(3, 3)
    optimizer = Muon([p], lr=0.3, momentum=0.5, adamw_lr=0.1)
    assert Muon([p], **optimizer.defaults).defaults == optimizer.defaults


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
        copied.add_param_group({"params": [("more", parameter(3))], "algorithm": "adamw"})
        assert copied.skipped_steps == 0
        assert "Parameter Group" in repr(copied)


# --- gradients that are late, scaled, broken ---------------------------------------------------


def test_pitfall_26_accumulation_orthogonalizes_once_a_step() -> None:
    model = mlp()
    whole = copy.deepcopy(model)
    optimizer = MuonW(model, lr=0.01)
    x = torch.randn(8, 12)
    with internals.counted_orthogonalizations() as calls:
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


def test_skip_and_raise_hold_for_the_whole_step_in_any_order() -> None:
    for policies in (("propagate", "skip"), ("skip", "propagate"), ("skip", "raise")):
        params = [parameter(3, 3), parameter(0, 3), parameter(3, 3)]
        groups = [
            {"params": params[:1], "nonfinite": policies[0]},
            {"params": params[1:], "nonfinite": policies[1]},
        ]
        optimizer = Muon(groups, lr=0.1)
        set_gradients(params)
        for p, policy in ((params[0], policies[0]), (params[2], policies[1])):
            assert p.grad is not None
            if policy != "propagate":
                p.grad[0, 0] = float("nan")
        before = [p.detach().clone() for p in params]
        if "raise" in policies:
            with pytest.raises(FloatingPointError):
                optimizer.step()
        else:
            optimizer.step()
            assert optimizer.skipped_steps == 1
            assert pickle.loads(pickle.dumps(optimizer)).skipped_steps == 1
        assert all(torch.equal(p, b) for p, b in zip(params, before, strict=True))


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


def test_a_large_float64_is_finite_in_float64() -> None:
    for policy in ("skip", "raise"):
        params = [parameter(4, 4, dtype=torch.float64), parameter(4, 4)]
        optimizer = Muon(params, nonfinite=policy)
        before = [p.detach().clone() for p in params]
        set_gradients(params)
        params[0].grad.mul_(1e50)
        optimizer.step()
        assert optimizer.skipped_steps == 0
        assert not any(torch.equal(p, b) for p, b in zip(params, before, strict=True))


def test_nan_in_a_state_does_not_change_its_dtype() -> None:
    p = parameter(4, 4, dtype=torch.bfloat16)
    optimizer = Muon([p], momentum_dtype="float32")
    momentum_of(optimizer, p)[0, 0] = float("nan")
    saved = copy.deepcopy(optimizer.state_dict())
    optimizer.load_state_dict(saved)
    assert momentum_of(optimizer, p).dtype == torch.float32
    torch.testing.assert_close(
        momentum_of(optimizer, p), saved["state"][0]["momentum_buffer"], equal_nan=True
    )


# --- several dtypes and devices in one model ----------------------------------------------------


def test_mixed_dtypes_in_one_model() -> None:
    model = mlp()
    model[2].to(torch.bfloat16)
    model[4].double()
    optimizer = MuonW(model, lr=0.01, ns_dtype="float32")
    before = [p.detach().clone() for p in model.parameters()]
    train(model, optimizer, 2)
    same_shape = [parameter(6, 6), parameter(6, 6, dtype=torch.float64)]
    train_these = Muon(same_shape, lr=0.01)
    set_gradients(same_shape)
    train_these.step()
    assert train_these.describe()[1]["ns_dtype"] == "torch.float64"
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


def test_a_float_lr_compiles_too() -> None:
    torch._dynamo.reset()
    model, twin = mlp(), mlp()
    optimizer, reference = MuonW(model, lr=0.01), MuonW(twin, lr=0.01)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # dynamo's own remarks on the profiler
        step = torch.compile(optimizer.step, backend="eager", fullgraph=True)
        for t in range(3):
            set_gradients(list(model.parameters()), t)
            step()
            train(twin, reference, 1, t)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


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
