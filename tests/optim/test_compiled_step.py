"""A compiled step equals an eager one, by values, for every option and every value of it."""

from __future__ import annotations

import copy
import inspect
import itertools
import warnings
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from muonkit import Muon, MuonW
from muonkit.newton_schulz.coefficients import KELLER, SCHEDULES
from muonkit.newton_schulz.forms import FORMS
from muonkit.newton_schulz.orthogonalizer import NS_DTYPES
from muonkit.options import CHOICES, OPTION_KEYS
from muonkit.scale import SCALES
from muonkit.stages import AFTER, BEFORE, CONSTRAINTS
from tests.helpers.optim import parameter

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

# float32: the graph's operations round elsewhere (a fused product, a bias correction in float32).
# Parameters are about 1 and updates at most 0.1 a step.
CLOSE = 2e-6
# An update that is rounded to 16 bits, times the learning rate of 0.05, in three steps.
COARSE = 3 * 0.05 * 2**-7

DTYPES = ("auto", *NS_DTYPES)
MUON: dict[str, Sequence[Any]] = {
    "algorithm": ["muon"],
    "view": ["matrix", "transpose", "flatten", "split(rows=2)", "split(cols=4+2)"],
    "lr": [0.05, 1, torch.tensor(0.05), torch.tensor([0.05])],
    "weight_decay": [0, 0.0, 0.1, torch.tensor(0.1)],
    "eps": [1e-7],
    "momentum": [0.0, 0.5, 0.95, torch.tensor(0.9)],
    "nesterov": [True, False],
    "ns_coefficients": [
        *SCHEDULES,
        "svd",
        KELLER,
        (KELLER, (3.0, -3.0, 1.0), KELLER, KELLER, KELLER),
    ],
    "ns_steps": [1, 2, 5],
    "adjust_lr_fn": [None, *SCALES],
    "ns_form": ["auto", *FORMS],
    "ns_dtype": DTYPES,
    "momentum_dtype": (*DTYPES, "int8"),
    "bytes_in_flight": [None, 1, 2**20],
    "before": [(), *BEFORE],
    "after": [(), *AFTER, ["normuon", "muon_plus"]],
    "constraint": [(), *CONSTRAINTS, ["relative_update", "radial_brake"]],
    "stage_beta2": [None, 0.0, 0.9],
    "fraction": [1.0, 0.5, 1.0, 0.25, 0.4],  # 1 beside "adamuon", the third of `after`
    "selection": CHOICES["selection"],
    "exchange_dtype": CHOICES["exchange_dtype"],
    "replicas": CHOICES["replicas"],
    "period": [1, 5],
    "block_lr_factor": [1.0, 0.5],
    "maximize": [False, True],
    "cautious": [False, True],
    "nonfinite": CHOICES["nonfinite"],
}
ADAMW: dict[str, Sequence[Any]] = {
    "algorithm": ["adamw"],
    "lr": [0.05, torch.tensor(0.05)],
    "weight_decay": [0, 0.1],
    "betas": [(0.9, 0.95), (0.0, 0.9), (0.9, 0.999)],
    "eps": [1e-8, 0.0, 1e-3],
    "maximize": [False, True],
    "nonfinite": CHOICES["nonfinite"],
}
# What the constructor has and no group: defaults of AdamW's groups, and ranks. Of ranks only these
# values make a graph; a step over ranks is no part of one (tests of several ranks).
CONSTRUCTOR: dict[str, Sequence[Any]] = {
    "adamw_lr": [0.02, torch.tensor(0.02)],
    "adamw_betas": [(0.8, 0.9)],
    "adamw_eps": [1e-6],
    "adamw_wd": [0.2],
    "process_group": [None],
    "zero": [0],
    "variant": ["plain", "normuon"],
}


def test_every_option_has_its_row() -> None:
    """An option that is new is compared too."""
    constructor = set(inspect.signature(Muon.__init__).parameters) - {"self", "params"}
    assert constructor | set(OPTION_KEYS) == {*MUON, *ADAMW, *CONSTRUCTOR}


def group_of(
    algorithm: str, options: dict[str, Any], dtype: torch.dtype, seed: int
) -> dict[str, Any]:
    shapes = [(6, 6), (10, 6)] if algorithm == "muon" else [(7,)]
    params = [parameter(*shape, seed=seed + i, dtype=dtype) for i, shape in enumerate(shapes)]
    base: dict[str, Any] = {"lr": 0.05, "weight_decay": 0.1, "algorithm": algorithm}
    if algorithm == "muon":
        base |= {"ns_dtype": "float32", "momentum": 0.9}
        if "stage_beta2" in options:
            base["after"] = "normuon"
    return {"params": params, **base, **options}


def deviation(
    groups: Sequence[dict[str, Any]],
    backend: str = "eager",
    steps: int = 3,
    before: Callable[[Muon, int], None] = lambda optimizer, t: None,
    fullgraph: bool = False,
    **options: Any,
) -> tuple[list[float], int]:
    """For each group the largest difference of parameters and state between compiled and eager
    steps, and how many graphs there were.
    """
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    eager, compiled = (Muon(copy.deepcopy(list(groups)), **options) for _ in range(2))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # dynamo's own remarks
        step = torch.compile(compiled.step, backend=counter, fullgraph=fullgraph)
        for t in range(steps):
            for optimizer, take in ((eager, eager.step), (compiled, step)):
                generator = torch.Generator().manual_seed(t)
                for group in optimizer.param_groups:
                    for p in group["params"]:
                        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
                before(optimizer, t)
                take()
    assert eager.skipped_steps == compiled.skipped_steps
    return [
        max(differences(eager, one, compiled, other))
        for one, other in zip(eager.param_groups, compiled.param_groups, strict=True)
    ], counter.frame_count


def differences(
    eager: Muon, one: dict[str, Any], compiled: Muon, other: dict[str, Any]
) -> Iterator[float]:
    for p, q in zip(one["params"], other["params"], strict=True):
        pairs = [(p, q)]
        kept, twin = eager.state[p], compiled.state[q]
        assert kept.keys() == twin.keys()
        pairs += [(kept[key], twin[key]) for key in kept]
        for a, b in pairs:
            assert a.dtype == b.dtype
            assert (a.isfinite() == b.isfinite()).all()
            yield (a - b).double().abs().max().item()


def cases() -> list[tuple[str, dict[str, Any]]]:
    """(algorithm, options): together they have every value of every option. One group each, all in
    one optimizer: to compile for every value apart would take minutes.
    """
    # Schedules without a safety factor refuse 16 bits, most of them another number of steps; a
    # fraction refuses int8 and a period.
    apart = ("dtype", "_steps", "period")
    dtypes = {key: values for key, values in MUON.items() if key.endswith(apart)}
    others = {key: values for key, values in MUON.items() if key not in dtypes}
    return [
        (algorithm, {key: values[i % len(values)] for key, values in table.items()})
        for algorithm, table in (("muon", dtypes), ("muon", others), ("adamw", ADAMW))
        for i in range(max(map(len, table.values())))
    ]


def test_compiled_equals_eager() -> None:
    table = cases()
    groups = [
        group_of(algorithm, options, torch.float32, seed=10 * i)
        for i, (algorithm, options) in enumerate(table)
    ]
    found, graphs = deviation(groups)
    assert graphs == 1
    for (algorithm, options), difference in zip(table, found, strict=True):
        coarse = {"bfloat16", "float16"} & {str(value) for value in options.values()}
        assert difference <= (COARSE if coarse else CLOSE), (algorithm, options)


@pytest.mark.parametrize("after", [pytest.param((), marks=pytest.mark.whole), "normuon"])
def test_a_fraction_is_compiled_once_for_every_dtype_of_momentum(after: Any) -> None:
    def schedule(optimizer: Muon, t: int) -> None:
        for group in optimizer.param_groups:
            group["momentum"].fill_(0.9 + 0.01 * t)

    groups = [
        {
            "params": [parameter(6, 4, seed=i), parameter(6, 9, seed=i + 10)],
            "momentum_dtype": dtype,
            "momentum": torch.tensor(0.9),
            "ns_dtype": "float32",
        }
        for i, dtype in enumerate(("float32", "float64", "bfloat16", "float16"))
    ]
    found, graphs = deviation(
        groups, backend="aot_eager", before=schedule, fullgraph=True, fraction=0.5, after=after
    )
    assert graphs == 1
    assert max(found[:2]) <= CLOSE
    assert max(found[2:]) <= COARSE


def test_adamws_arguments_of_the_constructor() -> None:
    groups = [{"params": [parameter(5)], "algorithm": "adamw"}, {"params": [parameter(4, 3)]}]
    for values in itertools.zip_longest(*CONSTRUCTOR.values()):
        options = {
            key: value for key, value in zip(CONSTRUCTOR, values, strict=True) if value is not None
        }
        found, graphs = deviation(groups, fullgraph=True, steps=2, **options)
        assert graphs == 1
        assert max(found) <= CLOSE


@pytest.mark.parametrize("policy", CHOICES["nonfinite"])
def test_a_broken_gradient(policy: str) -> None:
    """The host reads whether gradients are finite: around the graph, of which there is one."""

    def break_one(optimizer: Muon, t: int) -> None:
        if t == 1:
            optimizer.param_groups[0]["params"][1].grad[0, 0] = float("nan")

    groups = [{"params": [parameter(6, 4, seed=i) for i in range(3)]}]
    if policy == "raise":
        with pytest.raises(FloatingPointError, match="parameter 1 is not finite"):
            deviation(groups, before=break_one, nonfinite=policy)
        return
    found, graphs = deviation(groups, steps=4, before=break_one, nonfinite=policy)
    assert graphs == 1
    assert max(x for x in found if x == x) <= CLOSE


def test_a_closure_is_called_as_it_is() -> None:
    torch._dynamo.reset()
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 2))
    twin = copy.deepcopy(model)
    optimizers = [MuonW(m, lr=0.02) for m in (model, twin)]
    x = torch.randn(8, 4)
    steps = [torch.compile(optimizers[0].step, backend="eager"), optimizers[1].step]
    for _ in range(3):
        losses = []
        for m, optimizer, step in zip((model, twin), optimizers, steps, strict=True):

            def closure(m: nn.Module = m, optimizer: Muon = optimizer) -> torch.Tensor:
                optimizer.zero_grad()
                loss = m(x).square().mean()
                loss.backward()
                return loss

            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # dynamo's own, on the loss that comes back
                losses.append(step(closure))
        torch.testing.assert_close(*losses)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=CLOSE)


WHERE = [
    ("muonkit.step", "orthogonalize_"),
    ("muonkit.optim", "ensure_state"),
    ("muonkit.optim", "adamw_step_"),
]


@pytest.mark.parametrize(("module", "name"), WHERE)
def test_a_graph_that_breaks_inside_the_step_trains_all(
    module: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The step is one graph or none: torch.compile would run parts of it twice or not at all."""
    found = __import__(module, fromlist=["_"])
    function = getattr(found, name)

    def breaking(*args: Any) -> Any:
        torch._dynamo.graph_break()
        return function(*args)

    monkeypatch.setattr(found, name, breaking)
    groups = [
        {"params": [parameter(6, 4), parameter(5, 7), parameter(4, 4)]},
        {"params": [parameter(8)], "algorithm": "adamw"},
    ]
    differences_, graphs = deviation(groups, steps=2, adamw_lr=0.1)
    assert max(differences_) <= CLOSE
    assert graphs == 0


def test_pitfall_25_a_scheduled_tensor_is_compiled_once() -> None:
    """lr, weight_decay and momentum as tensors, filled in place, as a schedule does it."""

    def schedule(optimizer: Muon, t: int) -> None:
        for group in optimizer.param_groups:
            group["lr"].fill_(0.05 / (t + 1))
            if group["algorithm"] == "muon":
                group["weight_decay"].fill_(0.1 / (t + 1))
                group["momentum"].fill_(0.9 + 0.01 * t)

    options = {"weight_decay": torch.tensor(0.1), "momentum": torch.tensor(0.9)}
    groups = [
        group_of("muon", {"lr": torch.tensor(0.05), **options}, torch.float32, seed=0),
        group_of("adamw", {"lr": torch.tensor(0.05)}, torch.float32, seed=5),
    ]
    found, graphs = deviation(groups, steps=10, before=schedule)
    assert graphs == 1
    assert max(found) <= CLOSE


def test_scheduled_numbers_are_compiled_twice() -> None:
    """lr, weight_decay, momentum and betas as numbers: once as they are, and once for all others.

    Not only traced once: it is the passes behind it that make constants of numbers.
    """

    def schedule(optimizer: Muon, t: int) -> None:
        for group in optimizer.param_groups:
            group["lr"], group["weight_decay"] = 0.05 / (t + 1), 0.1 / (t + 1)
            if group["algorithm"] == "muon":
                group["momentum"] = 0.9 + 0.01 * t
            else:
                group["betas"] = (0.8 + 0.01 * t, 0.9 + 0.01 * t)

    groups = [
        {"params": [parameter(6, 4)], "ns_dtype": "float32"},
        {"params": [parameter(6, 4)], "momentum_dtype": "float64", "ns_dtype": "float32"},
        {"params": [parameter(5)], "algorithm": "adamw"},
    ]
    found, graphs = deviation(
        groups, backend="aot_eager", steps=5, before=schedule, adamw_lr=0.1, ns_steps=1
    )
    assert graphs == 2
    assert max(found) <= CLOSE


def test_options_that_were_edited_are_refused() -> None:
    """As in an eager step, also those that no tensor is computed with."""
    groups = [{"params": [parameter(4, 3)]}, {"params": [parameter(5)], "algorithm": "adamw"}]
    optimizer = Muon(groups, adamw_lr=0.1)
    torch._dynamo.reset()
    step = torch.compile(optimizer.step, backend="eager")
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for p in params:
        p.grad = torch.ones_like(p)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        step()
        before = [p.detach().clone() for p in params]
        for number, key, value in (
            (0, "momentum", 1.5),
            (0, "exchange_dtype", "int8"),
            (1, "eps", -1.0),
            (1, "lr", torch.ones(2)),
        ):
            kept = optimizer.param_groups[number][key]
            optimizer.param_groups[number][key] = value
            with pytest.raises(ValueError, match="nothing was changed"):
                step()
            optimizer.param_groups[number][key] = kept
    assert all(map(torch.equal, params, before))
