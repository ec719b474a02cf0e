"""PyTorch's own generic optimizer tests, on `Muon` and `MuonW`.

torch describes each of its optimizers by an `OptimizerInfo` (installed with it, as
torch.testing._internal.common_optimizers) and drives the tests of its test/test_optim.py by it:
what an optimizer is made with, which inputs it has to refuse and in which words, what it supports.
Here `Muon` and `MuonW` are described so, by torch's own row for its Muon and by options of ours.

What torch asks of the flags foreach, fused, differentiable and capturable does not apply: Muon has
none of them, here as in torch. What stands for "foreach equals the loop" is that a step on many
matrices equals their steps one by one. Compiled parity is test_compiled_step.py's.
"""

from __future__ import annotations

import copy
import functools
import inspect
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.testing import assert_close

from muonkit import Muon, MuonW, route

# torch does not require it, and its test helpers do not import without it.
pytest.importorskip("expecttest", reason="torch.testing._internal needs expecttest")

from torch.testing._internal.common_optimizers import (
    OptimizerErrorEnum,
    OptimizerInfo,
    OptimizerInput,
    optim_db,
)

# Its helpers forbid the whole process to set flags such as torch.backends.cudnn.benchmark, which
# other tests of this process do.
torch.backends.flags_frozen.__globals__["__allow_nonbracketed_mutation_flag"] = True
assert not torch.backends.flags_frozen()

GLOBAL_FLAGS = ("foreach", "fused", "differentiable", "capturable")
TORCHS = next(info for info in optim_db if info.optim_cls is torch.optim.Muon)
SGDS = next(info for info in optim_db if info.optim_cls is torch.optim.SGD)  # the most schedulers


def inputs(device: str, dtype: torch.dtype | None = None) -> list[OptimizerInput]:
    """torch's own for its Muon, and those options of ours that change what a step computes."""
    ours: list[dict[str, Any]] = [
        {"maximize": True},
        {"nesterov": False, "weight_decay": 0.0},
        {"cautious": True, "adjust_lr_fn": "match_rms_adamw"},
        {"after": "normuon"},
        {"ns_coefficients": "svd", "momentum_dtype": "bfloat16"},
        {"fraction": 0.5},
    ]
    return [
        *TORCHS.optim_inputs_func(device=device, dtype=dtype),
        *(OptimizerInput(None, kwargs, " ".join(map(str, kwargs))) for kwargs in ours),
    ]


INFOS = {
    optimizer: OptimizerInfo(
        optimizer,
        optim_inputs_func=inputs,
        optim_error_inputs_func=TORCHS.optim_error_inputs_func,
        scheduler_inputs=SGDS.scheduler_inputs,
        supported_impls=(),
        not_og_supported_flags=("maximize",),
        supports_complex=False,
    )
    for optimizer in (Muon, MuonW)
}

every_optimizer = pytest.mark.parametrize("info", INFOS.values(), ids=lambda info: info.name)


def every_input(function: Callable[..., None]) -> Callable[..., None]:
    cases = [
        pytest.param(info, given, id=f"{info.name}-{given.desc}")
        for info in INFOS.values()
        for given in info.optim_inputs_func(device="cpu")
    ]
    return pytest.mark.parametrize(("info", "given"), cases)(function)


def kwargs_of(given: OptimizerInput) -> dict[str, Any]:
    """A copy: one tensor lr is not to be shared by two optimizers."""
    return copy.deepcopy(given.kwargs)


def model_for(info: OptimizerInfo, seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Two hidden layers; MuonW's has what AdamW trains too: biases and a head."""
    torch.manual_seed(seed)
    others = info.optim_cls is MuonW
    layers = [nn.Linear(6, 8, bias=others), nn.Tanh(), nn.Linear(8, 8, bias=others)]
    return nn.Sequential(*layers, *([nn.Linear(8, 3)] if others else [])).to(dtype)


def make(info: OptimizerInfo, model: nn.Module, named: bool = False, **kwargs: Any) -> Optimizer:
    if info.optim_cls is MuonW:
        return MuonW(model, **kwargs)  # named by its nature
    params = model.named_parameters() if named else model.parameters()
    return info.optim_cls(params, **kwargs)


def loss_of(model: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    dtype = next(model.parameters()).dtype
    x = torch.randn(16, 6, generator=generator).to(dtype)
    return (model(x) - 1).square().mean()


def closure_for(model: nn.Module, optimizer: Optimizer) -> Callable[[], Tensor]:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        return loss

    return closure


def train(model: nn.Module, optimizer: Optimizer, steps: int = 3) -> None:
    for _ in range(steps):
        optimizer.step(closure_for(model, optimizer))


def trained(info: OptimizerInfo, steps: int = 3, **kwargs: Any) -> tuple[nn.Module, Optimizer]:
    model = model_for(info)
    optimizer = make(info, model, **kwargs)
    train(model, optimizer, steps)
    return model, optimizer


def assert_same(one: nn.Module, two: nn.Module) -> None:
    """The same operations on the same numbers: bit for bit."""
    assert_close(dict(one.state_dict()), dict(two.state_dict()), rtol=0, atol=0)


def assert_same_state_dict(one: dict[str, Any], two: dict[str, Any]) -> None:
    assert one["param_groups"] == two["param_groups"]
    assert_close(one["state"], two["state"], rtol=0, atol=0)


# --- construction -------------------------------------------------------------------------------


@every_optimizer
def test_no_input_names_a_flag_that_torch_tests_for_all(info: OptimizerInfo) -> None:
    for given in info.optim_inputs_func(device="cpu"):
        assert not set(GLOBAL_FLAGS) & set(given.kwargs)
    assert not set(GLOBAL_FLAGS) & set(inspect.signature(info.optim_cls).parameters)
    assert info.supported_impls == TORCHS.supported_impls


def _error_cases() -> list[Any]:
    return [
        pytest.param(info, case, id=f"{info.name}-{case.optimizer_error_input.desc}")
        for info in INFOS.values()
        for case in info.optim_error_inputs_func(device="cpu", dtype=torch.float32)
        # Where the split is given by hand, one tensor stands for a list of one.
        if info.optim_cls is Muon or case.optimizer_error_input.desc != "invalid param type"
    ]


@pytest.mark.parametrize(("info", "case"), _error_cases())
def test_errors_are_of_torchs_type_and_in_its_words(info: OptimizerInfo, case: Any) -> None:
    given = case.optimizer_error_input
    params = [nn.Parameter(torch.ones(2, 3))] if given.params is None else given.params
    make_it: Any = info.optim_cls
    if info.optim_cls is MuonW:  # without a model: the split by hand
        rest = {"adamw_params": [nn.Parameter(torch.ones(3))], "adamw_lr": 3e-4}
        make_it = functools.partial(MuonW, **rest)
        given = OptimizerInput(given.params, {"lr": 0.02, **given.kwargs})
    words = case.error_regex.split(". ")[0]  # a second sentence is a remedy, and ours says more
    if case.error_type is UserWarning:
        with pytest.warns(UserWarning, match=words):
            make_it(params, **given.kwargs)
        return

    def made_and_stepped() -> None:
        optimizer = make_it(params, **given.kwargs)
        assert case.error_on is OptimizerErrorEnum.STEP_ERROR
        optimizer.step()

    # torch refuses complex parameters in the first step; here nothing is made of them.
    with pytest.raises(case.error_type, match=words):
        made_and_stepped()


def test_complex_is_refused_with_the_remedy() -> None:
    with pytest.raises(RuntimeError, match=r"does not support complex parameters.*AdamW"):
        Muon([nn.Parameter(torch.ones(2, 3, dtype=torch.complex64))])


@every_input
def test_every_group_holds_every_default(info: OptimizerInfo, given: OptimizerInput) -> None:
    optimizer = make(info, model_for(info), **kwargs_of(given))
    for group in optimizer.param_groups:
        if group["algorithm"] == "muon":
            assert given.kwargs.keys() <= group.keys()
            assert {"lr", "momentum", "weight_decay", "ns_steps"} <= group.keys()
        else:
            assert {"lr", "betas", "eps", "weight_decay"} <= group.keys()
    assert given.kwargs.keys() <= optimizer.defaults.keys()


@every_input
def test_it_can_be_printed(info: OptimizerInfo, given: OptimizerInput) -> None:
    assert info.name in repr(make(info, model_for(info), **kwargs_of(given)))


# --- the step -----------------------------------------------------------------------------------


@every_input
@pytest.mark.parametrize("contiguous", [True, False])
def test_it_goes_in_the_right_direction(
    info: OptimizerInfo, given: OptimizerInput, contiguous: bool
) -> None:
    model = model_for(info)
    if not contiguous:
        for p in model.parameters():
            p.data = torch.stack([p.data, p.data], dim=-1)[..., 0]
            assert not p.is_contiguous() or p.numel() == 1
    optimizer = make(info, model, **kwargs_of(given))
    first = loss_of(model).item()
    train(model, optimizer, 10)
    last = loss_of(model).item()
    assert last > first if given.kwargs.get("maximize") else last < first


@every_optimizer
@pytest.mark.parametrize("number", range(len(SGDS.scheduler_inputs)))
def test_schedulers_go_along(info: OptimizerInfo, number: int) -> None:
    model = model_for(info)
    optimizer = make(info, model, lr=0.01)
    schedulers = [make_one(optimizer) for make_one in info.scheduler_inputs[number]]
    first = loss_of(model).item()
    for _ in range(12):
        optimizer.step(closure_for(model, optimizer))
        for scheduler in schedulers:
            told = (loss_of(model).item(),) if isinstance(scheduler, ReduceLROnPlateau) else ()
            scheduler.step(*told)
    assert loss_of(model).item() < first


@every_optimizer
@pytest.mark.parametrize("number", range(len(SGDS.scheduler_inputs)))
def test_schedulers_go_along_with_groups(info: OptimizerInfo, number: int) -> None:
    model = model_for(info)
    groups = (
        route(model).param_groups()
        if info.optim_cls is MuonW
        else [{"params": [p], "name": name} for name, p in model.named_parameters()]
    )
    groups[0]["lr"] = 0.01
    optimizer = Muon(groups, lr=0.003, adamw_lr=0.003)
    schedulers = [make_one(optimizer) for make_one in info.scheduler_inputs[number]]
    first, before = loss_of(model).item(), [group["lr"] for group in optimizer.param_groups]
    for _ in range(12):
        optimizer.step(closure_for(model, optimizer))
        for scheduler in schedulers:
            told = (loss_of(model).item(),) if isinstance(scheduler, ReduceLROnPlateau) else ()
            scheduler.step(*told)
    assert loss_of(model).item() < first
    after = [group["lr"] for group in optimizer.param_groups]
    ratios = {round(float(b) / float(a), 5) for a, b in zip(before, after, strict=True)}
    assert len(ratios) == 1  # a scheduler treats all groups alike


@every_input
@pytest.mark.parametrize("dims", [0, 2])
def test_a_tensor_lr_equals_a_number(info: OptimizerInfo, given: OptimizerInput, dims: int) -> None:
    kwargs = kwargs_of(given)
    lr = float(kwargs.pop("lr", 1e-2))
    one, two = model_for(info), model_for(info)
    tensor = torch.full((1,) * dims, lr)
    train(one, make(info, one, lr=tensor, **kwargs))
    train(two, make(info, two, lr=lr, **kwargs))
    assert tensor.item() == pytest.approx(lr)
    # float32 knows lr to 2^-24; what that changes in the weights, the next gradients' smallest
    # singular values show some times larger.
    assert_close(dict(one.state_dict()), dict(two.state_dict()), rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:no parameter of the optimizer has a gradient")
@every_input
def test_many_matrices_equal_one_by_one(info: OptimizerInfo, given: OptimizerInput) -> None:
    """What torch asks of foreach: mixed shapes and dtypes, some without a gradient."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(4, 6), (6, 4), (4, 6), (5, 5), (4, 6), (1, 3)]
    dtypes = [torch.float32, torch.float32, torch.float64, torch.float32, torch.float32]
    together = [
        nn.Parameter(torch.randn(shape, generator=generator, dtype=dtype))
        for shape, dtype in zip(shapes, [*dtypes, torch.bfloat16], strict=True)
    ]
    alone = copy.deepcopy(together)
    all_of_them = Muon(together, ns_dtype="float32", **kwargs_of(given))
    one_by_one = [Muon([p], ns_dtype="float32", **kwargs_of(given)) for p in alone]
    for step in range(3):
        for i, (p, q) in enumerate(zip(together, alone, strict=True)):
            p.grad = torch.randn(p.shape, generator=generator).to(p.dtype) if i != step else None
            q.grad = None if p.grad is None else p.grad.clone()
        for optimizer in (all_of_them, *one_by_one):
            optimizer.step()
    for p, q in zip(together, alone, strict=True):
        # Batched products are rounded in another order: a few float32 roundings; bfloat16 shows
        # one of them as one unit in its last place.
        rounding = 2**-7 if p.dtype is torch.bfloat16 else 1e-5
        assert_close(p, q, rtol=rounding, atol=rounding)


@every_optimizer
@pytest.mark.parametrize("option", [("weight_decay", 0.5, 0.0), ("lr", 0.1, 0.01)])
def test_groups_have_their_own(info: OptimizerInfo, option: tuple[str, float, float]) -> None:
    name, first, second = option
    models = [model_for(info) for _ in range(3)]
    each = [list(model.parameters()) for model in models]
    options = [{"algorithm": "muon" if p.ndim == 2 else "adamw"} for p in each[0]]

    def groups(params: list[nn.Parameter], values: list[float]) -> list[dict[str, Any]]:
        rows = zip(params, options, values, strict=True)
        return [{"params": [p], **how, name: value} for p, how, value in rows]

    mixed = [first, *[second] * (len(options) - 1)]
    values = (mixed, [first] * len(options), [second] * len(options))
    for model, params, chosen in zip(models, each, values, strict=True):
        optimizer = Muon(groups(params, chosen), adamw_lr=0.01)
        loss_of(model).backward()
        optimizer.step()
    for i, (got, one, two) in enumerate(zip(*each, strict=True)):
        assert_close(got, two if i else one, rtol=0, atol=0)
    assert not torch.equal(each[0][0], each[2][0])


@every_input
def test_without_gradients_nothing_moves(info: OptimizerInfo, given: OptimizerInput) -> None:
    model = model_for(info)
    before = copy.deepcopy(model)
    optimizer = make(info, model, **kwargs_of(given))
    optimizer.zero_grad(set_to_none=True)
    with pytest.warns(UserWarning, match="nothing is trained"):
        optimizer.step()
    assert_same(model, before)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    for group in optimizer.param_groups:
        group["weight_decay"] = 0.0
    optimizer.step()
    assert_same(model, before)


@every_optimizer
def test_empty_parameters_and_groups(info: OptimizerInfo) -> None:
    empty = nn.Parameter(torch.empty(0, 4))
    empty.grad = torch.empty(0, 4)
    Muon([empty]).step()
    model = model_for(info)
    train(model, make(info, model), 1)


@every_optimizer
def test_a_closure_has_gradients_and_its_loss_is_returned(info: OptimizerInfo) -> None:
    model = model_for(info)
    optimizer = make(info, model)
    seen: list[bool] = []

    def closure() -> Tensor:
        seen.append(torch.is_grad_enabled())
        return closure_for(model, optimizer)()

    expected = loss_of(model).item()
    with torch.no_grad():
        assert optimizer.step(closure).item() == expected  # type: ignore[call-overload]
        assert not torch.is_grad_enabled()
    assert seen == [True]
    assert optimizer.step() is None


@every_input
def test_it_steps_where_float64_is_the_default(info: OptimizerInfo, given: OptimizerInput) -> None:
    torch.set_default_dtype(torch.float64)
    try:
        model = model_for(info, dtype=torch.float64)
        optimizer = make(info, model, **kwargs_of(given))
        train(model, optimizer)
        assert all(p.dtype is torch.float64 for p in model.parameters())
    finally:
        torch.set_default_dtype(torch.float32)


@every_optimizer
def test_groups_are_added_later(info: OptimizerInfo) -> None:
    model, later = model_for(info), nn.Parameter(torch.ones(3, 4))
    optimizer = make(info, model, named=True)
    train(model, optimizer, 1)
    group = {"params": [("later", later)], "algorithm": "muon"}
    optimizer.add_param_group({**group, "lr": 0.5})
    later.grad = torch.randn(3, 4)
    optimizer.step()
    assert not torch.equal(later, torch.ones(3, 4))
    assert optimizer.param_groups[-1]["lr"] == 0.5
    with pytest.raises(ValueError, match="more than one parameter group"):
        optimizer.add_param_group(group)
    with pytest.raises(TypeError):
        optimizer.add_param_group({"params": [("more", "no tensor")], "algorithm": "muon"})


# --- hooks --------------------------------------------------------------------------------------


@every_optimizer
def test_step_hooks_run_in_torchs_order(info: OptimizerInfo) -> None:
    model = model_for(info)
    optimizer = make(info, model)
    calls: list[str] = []

    def note(word: str) -> Callable[..., None]:
        return lambda *_: calls.append(word)

    handles = [
        register_optimizer_step_pre_hook(note("global pre")),
        register_optimizer_step_post_hook(note("global post")),
        optimizer.register_step_pre_hook(note("pre")),
        optimizer.register_step_post_hook(note("post")),
    ]
    try:
        train(model, optimizer, 1)
        assert calls == ["global pre", "pre", "post", "global post"]
    finally:
        for handle in handles:
            handle.remove()
    train(model, optimizer, 1)
    assert len(calls) == 4


@every_optimizer
def test_state_dict_hooks_run_and_may_replace(info: OptimizerInfo) -> None:
    _, optimizer = trained(info, 1)
    calls: list[str] = []
    optimizer.register_state_dict_pre_hook(lambda _: calls.append("pre"))
    optimizer.register_state_dict_post_hook(lambda _, saved: {**saved, "mark": 1})
    optimizer.register_state_dict_post_hook(lambda *_: calls.append("first"), prepend=True)
    saved = optimizer.state_dict()
    assert calls == ["pre", "first"]
    assert saved["mark"] == 1

    def halved(_: Optimizer, saved: dict[str, Any]) -> dict[str, Any]:
        for group in saved["param_groups"]:
            group["lr"] = group["lr"] / 2
        return saved

    other = make(info, model_for(info))
    other.register_load_state_dict_pre_hook(halved)
    other.register_load_state_dict_pre_hook(lambda *_: calls.append("load pre"), prepend=True)
    other.register_load_state_dict_post_hook(lambda *_: calls.append("load post"))
    lr = [group["lr"] for group in optimizer.param_groups]
    other.load_state_dict(copy.deepcopy(saved))
    assert [group["lr"] for group in other.param_groups] == [value / 2 for value in lr]
    assert calls[2:] == ["load pre", "load post"]


# --- state dicts and copies ---------------------------------------------------------------------


@every_input
@pytest.mark.parametrize("named", [False, True])
def test_a_state_dict_goes_on_as_the_optimizer_would(
    info: OptimizerInfo, given: OptimizerInput, named: bool
) -> None:
    one, two = model_for(info), model_for(info)
    first = make(info, one, named, **kwargs_of(given))
    train(one, first)
    two.load_state_dict(one.state_dict())
    saved = copy.deepcopy(first.state_dict())
    second = make(info, two, named, **kwargs_of(given))
    given_to_load = copy.deepcopy(saved)
    second.load_state_dict(given_to_load)
    assert_same_state_dict(given_to_load, saved)
    for _ in range(3):
        train(one, first, 1)
        train(two, second, 1)
        assert_same(one, two)
    assert_same_state_dict(first.state_dict(), second.state_dict())


@every_optimizer
def test_names_in_one_of_both_are_no_trouble(info: OptimizerInfo) -> None:
    for named_first in (True, False):
        one, two = model_for(info), model_for(info)
        first = make(info, one, named_first)
        train(one, first)
        two.load_state_dict(one.state_dict())
        second = make(info, two, not named_first)
        second.load_state_dict(copy.deepcopy(first.state_dict()))
        train(one, first)
        train(two, second)
        assert_same(one, two)


@every_input
def test_weights_only_loads_what_was_saved(info: OptimizerInfo, given: OptimizerInput) -> None:
    _, optimizer = trained(info, **kwargs_of(given))
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    assert_same_state_dict(loaded, optimizer.state_dict())
    make(info, model_for(info), **kwargs_of(given)).load_state_dict(loaded)


@every_input
def test_older_state_dicts_load(info: OptimizerInfo, given: OptimizerInput) -> None:
    """One that was saved before a flag was there: those of today's optimizer hold."""
    model, optimizer = trained(info, **kwargs_of(given))
    saved = copy.deepcopy(optimizer.state_dict())
    for group in saved["param_groups"]:
        for flag in info.not_og_supported_flags:
            group.pop(flag, None)
    optimizer.load_state_dict(saved)
    train(model, optimizer)


def test_a_step_count_that_is_no_tensor_loads() -> None:
    info = INFOS[MuonW]
    model, optimizer = trained(info)
    saved = copy.deepcopy(optimizer.state_dict())
    counted = [state for state in saved["state"].values() if "step" in state]
    assert counted
    for state in counted:
        state["step"] = float(state["step"])
    optimizer.load_state_dict(saved)
    train(model, optimizer)


@every_input
def test_state_takes_the_parameters_dtype(info: OptimizerInfo, given: OptimizerInput) -> None:
    _, first = trained(info, **kwargs_of(given))
    two = model_for(info, dtype=torch.bfloat16)
    second = make(info, two, **kwargs_of(given))
    kept = {p: {key: v.dtype for key, v in second.state[p].items()} for p in two.parameters()}
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for p in two.parameters():
        for key, value in second.state[p].items():
            if key in kept[p] and isinstance(value, Tensor):
                assert value.dtype is kept[p][key]
    train(two, second)


@every_input
def test_state_is_not_empty(info: OptimizerInfo, given: OptimizerInput) -> None:
    model, optimizer = trained(info, 1, **kwargs_of(given))
    for p in model.parameters():
        moments = [v for v in optimizer.state[p].values() if isinstance(v, Tensor) and v.any()]
        assert moments


@every_input
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda it: pickle.loads(pickle.dumps(it))])
def test_copies_have_every_public_attribute(
    info: OptimizerInfo, given: OptimizerInput, copied: Callable[[Any], Any]
) -> None:
    model, optimizer = trained(info, 1, **kwargs_of(given))

    def public(one: Optimizer) -> set[str]:
        return {name for name in vars(one) if not name.startswith("_")}

    assert public(copied(optimizer)) == public(optimizer)
    model_of_copy, copy_of_it = copied((model, optimizer))
    train(model, optimizer)
    train(model_of_copy, copy_of_it)
    assert_same(model, model_of_copy)
