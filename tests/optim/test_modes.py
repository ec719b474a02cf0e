"""Modes of torch in which an optimizer may be made or stepped: inference mode, the meta device, a
default device, and devices without float64. As torch's AdamW, or an error that names the remedy.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_map

from muonkit import Monitor, Muon, MuonW
from muonkit.monitor import spectra as measured
from muonkit.mup import coordinates
from muonkit.newton_schulz.scratch import scratch
from muonkit.newton_schulz.symmetric import symmetric_product
from tests.helpers import internals
from tests.helpers.optim import mlp, parameter, set_gradients, train

VARIANTS = ("plain", "normuon", "adamuon")


def values(model: nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def after_three_steps(variant: str, under: tuple[str, ...] = (), **options: Any) -> nn.Module:
    """A model after three steps; what `under` names (make, first step, load) is done in inference
    mode.
    """
    model = mlp()
    with torch.inference_mode("make" in under):
        optimizer = MuonW(model, lr=0.01, variant=variant, **options)
    with torch.inference_mode("step" in under):
        train(model, optimizer, 1)
    if "load" in under:
        with torch.inference_mode():
            optimizer.load_state_dict(optimizer.state_dict())
    train(model, optimizer, 2, seed=1)
    assert not any(
        isinstance(value, torch.Tensor) and value.is_inference()
        for state in optimizer.state.values()
        for value in state.values()
    )
    return model


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("under", [("make",), ("step",), ("make", "step"), ("load",)])
def test_state_made_under_inference_mode_is_written_to_outside(
    variant: str, under: tuple[str, ...]
) -> None:
    """torch's AdamW ends in an error of autograd's there. The same numbers, bit for bit."""
    plain, odd = after_three_steps(variant), after_three_steps(variant, under)
    for p, q in zip(values(plain), values(odd), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("which", [0, -1])
def test_a_parameter_made_under_inference_mode_is_refused_before_anything_is_written(
    which: int,
) -> None:
    """Whether Muon trains it or AdamW; the others are as they were."""
    model = mlp()
    optimizer = MuonW(model, lr=0.01)
    train(model, optimizer, 1)
    groups = [g for g in optimizer.param_groups if g["params"]]
    group = groups[which]
    with torch.inference_mode():
        group["params"][0] = nn.Parameter(group["params"][0].clone())
    params = [p for g in groups for p in g["params"]]
    optimizer.state_dict()  # settles it: with the state of the one it stands for
    set_gradients(params, 1)
    before = [p.clone() for p in params], [t.clone() for t in tensors_of(optimizer)]
    with pytest.raises(RuntimeError, match=r"made under torch.inference_mode.*nothing was changed"):
        optimizer.step()
    after = params, tensors_of(optimizer)
    for olds, news in zip(before, after, strict=True):
        assert all(torch.equal(old, new) for old, new in zip(olds, news, strict=True))
    with torch.inference_mode():
        optimizer.step()  # as torch's AdamW


def tensors_of(optimizer: Muon) -> list[torch.Tensor]:
    return [value for state in optimizer.state.values() for value in state.values()]


# --- meta ---------------------------------------------------------------------------------------


def on_meta(**options: Any) -> tuple[nn.Module, MuonW]:
    model = mlp().to("meta")
    optimizer = MuonW(model, lr=0.01, **options)
    for p in model.parameters():
        p.grad = torch.empty_like(p)
    return model, optimizer


@pytest.mark.parametrize(
    "options",
    [
        *({"variant": variant} for variant in VARIANTS),
        {"nonfinite": "skip"},
        {"nonfinite": "raise"},
        {"ns_coefficients": "svd"},
        {"cautious": True, "momentum_dtype": "bfloat16"},
        {"momentum_dtype": "int8"},
    ],
)
def test_a_step_of_meta_parameters_is_a_dry_run(options: dict[str, Any]) -> None:
    """As torch's AdamW and Muon: nothing is computed, and nothing raises."""
    model, optimizer = on_meta(**options)
    for _ in range(2):
        optimizer.step()
    assert optimizer.skipped_steps == 0
    assert optimizer.describe()
    assert all(t.is_meta for t in tensors_of(optimizer) if t.ndim)
    # Given memory, it trains as one that never had a dry run.
    fresh = mlp()
    model.to_empty(device="cpu")
    model.load_state_dict(fresh.state_dict())
    named = dict(model.named_parameters())
    for group in optimizer.param_groups:
        group["params"] = [named[name] for name in group["param_names"]]
    other = MuonW(fresh, lr=0.01, **options)
    for each, own in ((model, optimizer), (fresh, other)):
        train(each, own, 2)
    for p, q in zip(values(model), values(fresh), strict=True):
        assert torch.equal(p, q)


def test_a_monitor_refuses_to_measure_meta_parameters() -> None:
    _, optimizer = on_meta()
    with Monitor(optimizer, every=2), pytest.raises(RuntimeError, match=r"close\(\) the monitor"):
        optimizer.step()
    optimizer.step()


@pytest.fixture
def _meta_by_default() -> Iterator[None]:
    torch.set_default_device("meta")
    yield
    torch.set_default_device(None)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_default_device_is_none_of_ours(variant: str) -> None:
    """Whatever is made inside of a step lies where the parameters do."""
    found = []
    for device in (None, "meta"):
        model = mlp()
        params = list(model.parameters())
        torch.set_default_device(device)
        try:
            optimizer = MuonW(model, lr=0.01, variant=variant, nonfinite="skip")
            with Monitor(optimizer, every=1) as monitor:
                torch.set_default_device(None)
                set_gradients(params)
                torch.set_default_device(device)
                optimizer.step()
            optimizer.load_state_dict(optimizer.state_dict())
            optimizer.clip_grad_norm_(1.0)
        finally:
            torch.set_default_device(None)
        found.append((monitor.latest, values(model)))
    assert found[0][0] == found[1][0]
    assert found[0][0]["matrices"][0]["spectra"]["momentum"] is not None
    assert all(torch.equal(p, q) for p, q in zip(found[0][1], found[1][1], strict=True))


@pytest.mark.usefixtures("_meta_by_default")
def test_scratch_lies_where_it_was_asked_for() -> None:
    large = scratch("test_modes", (2**20,), torch.float32, torch.device("cpu"))
    assert large.device.type == "cpu"


# --- devices without float64 --------------------------------------------------------------------


class OnMps(torch.Tensor):
    """A tensor that says it is on an Apple GPU, and refuses what those refuse: float64, and
    eigenvalues. It stands for hardware that this project was never run on.
    """

    inside: torch.Tensor

    @staticmethod
    def __new__(cls, inside: torch.Tensor) -> OnMps:
        made = torch.Tensor._make_wrapper_subclass(
            cls, inside.shape, strides=inside.stride(), dtype=inside.dtype, device="mps"
        )
        made.inside = inside
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        assert "eig" not in str(func), "aten::_linalg_eigh is not implemented for mps"
        if "baddbmm" in str(
            func
        ):  # up to torch 2.13 it adds 0 x what is there, and that may be NaN
            assert kwargs.get("beta") != 0, "mps reads what beta=0 multiplies"
        leaves = kwargs.pop("device", None)
        if leaves is not None and torch.device(leaves).type == "mps":
            leaves = None
        args, kwargs = tree_map(lambda t: t.inside if isinstance(t, OnMps) else t, (args, kwargs))
        result = func(*args, **kwargs)
        if leaves is not None:
            kept = {t.dtype for t in args if isinstance(t, torch.Tensor)}
            assert kept == {result.dtype} or result.dtype != torch.float64, "mps refuses this copy"
            return result

        def wrapped(t: Any) -> Any:
            assert getattr(t, "dtype", None) != torch.float64, "mps has no float64"
            return OnMps(t) if isinstance(t, torch.Tensor) else t

        return tree_map(wrapped, result)


def test_the_stand_in_refuses_what_apples_gpus_refuse() -> None:
    A = OnMps(torch.ones(3, 3))
    assert A.device.type == "mps"
    with pytest.raises(AssertionError, match="no float64"):
        A.double()
    with pytest.raises(AssertionError, match="_linalg_eigh"):
        torch.linalg.eigvalsh(A)


def test_what_apples_gpus_lack_is_measured_on_the_cpu() -> None:
    A = parameter(3, 5, 8).detach()
    odd = OnMps(A)
    assert torch.equal(measured.spectra(odd), measured.spectra(A))
    assert torch.equal(measured.orthogonality_error(odd), measured.orthogonality_error(A))
    for got, expected in zip(measured.norms(odd), measured.norms(A), strict=True):
        assert torch.equal(got, expected)
    assert torch.equal(internals.square(odd), internals.square(A))
    assert internals.not_finite(odd).to(internals.square(odd)) == 0  # they are stacked

    class Layer(nn.Module):
        def forward(self) -> torch.Tensor:
            return odd

    assert coordinates(Layer()) == {"": pytest.approx(float(A.square().mean().sqrt()))}


@pytest.mark.parametrize("blocks", [1, 4])
def test_apples_gpus_multiply_into_memory_that_holds_anything(
    monkeypatch: pytest.MonkeyPatch, blocks: int
) -> None:
    def unwritten(_: str, shape: Any, dtype: torch.dtype, device: torch.device) -> OnMps:
        assert device.type == "mps"
        return OnMps(torch.full(shape, torch.nan, dtype=dtype))

    def copy_(self: OnMps, source: OnMps) -> OnMps:  # torch's asks for a build with mps
        self.inside.copy_(source.inside)
        return self

    monkeypatch.setattr("muonkit.newton_schulz.symmetric.scratch", unwritten)
    monkeypatch.setattr(OnMps, "copy_", copy_)
    A = parameter(1, 16, 8).detach()
    odd = OnMps(A)
    found = symmetric_product(odd, odd, alpha=2.0, blocks=blocks, name="A")
    assert isinstance(found, OnMps)
    torch.testing.assert_close(found.inside, 2 * A @ A.mT)
