"""Complex parameters (spectral filters of Fourier neural operators): AdamW trains them as torch's
does, in every way that an optimizer is used."""

from __future__ import annotations

import io

import pytest
import torch
from torch import Tensor, nn

from muonkit import Monitor, Muon, MuonW, Rule, route
from tests.helpers.routing import Body, D, Holder, by_name


def model(dtype: torch.dtype = torch.complex64) -> nn.Module:
    torch.manual_seed(0)
    filters = nn.Parameter(torch.randn(6, 5, 4, dtype=dtype))
    return Body(fc=nn.Linear(D, D), spectral=Holder(weights1=filters))


def give_gradients(net: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in net.parameters():
        p.grad = torch.randn(p.shape, dtype=p.dtype, generator=generator)


def filters_of(net: nn.Module) -> Tensor:
    return net.get_parameter("spectral.weights1")


def test_a_complex_filter_needs_no_rule() -> None:
    found = by_name(model())["spectral.weights1"]
    assert (found.algorithm, found.view, found.decay) == ("adamw", None, True)
    frozen = model()
    filters_of(frozen).requires_grad_(False)
    waiting = by_name(frozen)["spectral.weights1"].unfrozen
    assert waiting is not None
    assert waiting.algorithm == "adamw"


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_its_steps_are_those_of_torchs_adamw(dtype: torch.dtype) -> None:
    ours, theirs = model(dtype), model(dtype)
    optimizer = MuonW(ours, lr=0.02, weight_decay=0.1)
    reference = torch.optim.AdamW(
        [filters_of(theirs)], lr=0.02, betas=(0.9, 0.95), weight_decay=0.1
    )
    for step in range(5):
        give_gradients(ours, step)
        give_gradients(theirs, step)
        optimizer.step()
        reference.step()
        # The same operations in another kernel: a few roundings of an entry of order 1 a step.
        torch.testing.assert_close(filters_of(ours), filters_of(theirs), rtol=1e-5, atol=1e-6)
    assert optimizer.state[filters_of(ours)]["exp_avg"].dtype == dtype


def test_it_is_clipped_skipped_measured_saved_and_resumed() -> None:
    net, other = model(), model()
    optimizer = MuonW(net, lr=0.02, nonfinite="skip")
    monitor = Monitor(optimizer, every=1)
    give_gradients(net, 0)
    norm = torch.nn.utils.get_total_norm([p.grad for p in net.parameters() if p.grad is not None])
    assert optimizer.clip_grad_norm_(0.5).item() == pytest.approx(norm.item())
    optimizer.step()
    assert monitor.latest is not None
    file = io.BytesIO()
    torch.save({"model": net.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed = MuonW(other, lr=0.02, nonfinite="skip")
    other.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    for net_, optimizer_ in ((net, optimizer), (other, resumed)):
        give_gradients(net_, 1)
        optimizer_.step()
    assert torch.equal(filters_of(net), filters_of(other))
    give_gradients(net, 2)
    filters_of(net).grad[0, 0, 0] = complex(0.0, float("nan"))  # type: ignore[index]
    optimizer.step()
    assert optimizer.skipped_steps == 1
    assert torch.equal(filters_of(net), filters_of(other))


def test_a_conjugated_gradient_is_its_values() -> None:
    one, two = model(), model()
    optimizers = [MuonW(net, lr=0.02) for net in (one, two)]
    give_gradients(one, 0)
    give_gradients(two, 0)
    grad = filters_of(two).grad
    assert grad is not None
    filters_of(two).grad = grad.conj().resolve_conj().conj()
    for optimizer in optimizers:
        optimizer.step()
    assert torch.equal(filters_of(one), filters_of(two))


def test_a_parameter_that_turned_complex_is_refused_before_anything_is_written() -> None:
    net = Body(table=nn.Embedding(5, D))
    optimizer = MuonW(net, lr=0.1, rules=[Rule("last.weight", view="matrix")])
    give_gradients(net, 0)
    optimizer.step()
    p = net.get_parameter("table.weight")
    p.grad = None
    p.data = p.data.to(torch.complex64)
    p.grad = torch.ones_like(p)
    before = p.detach().clone()
    with pytest.raises(ValueError, match=r"complex64, its exp_avg .*float32: .*reset_state"):
        optimizer.step()
    assert torch.equal(p, before)


def test_muon_offers_adamw_and_leaving_out_and_both_work() -> None:
    net = model()
    filters = filters_of(net)
    with pytest.raises(RuntimeError, match=r"complex64; AdamW trains it .*algorithm='ignore'"):
        Muon([filters])
    Muon([{"params": [filters], "algorithm": "adamw", "lr": 0.1}])
    with pytest.raises(RuntimeError, match="does not support complex"):
        MuonW(net, rules=[Rule("*weights1", view="experts")])
    left = route(net, [Rule("*weights1", algorithm="ignore")])
    assert {r.name: r.algorithm for r in left}["spectral.weights1"] == "ignore"
