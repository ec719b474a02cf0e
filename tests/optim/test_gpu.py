"""The step on a GPU: equal to the CPU's, without waiting for it, compiled, captured, over ranks.

Skipped where there is no GPU. The kernel alone is checked by `benchmarks/gpu.py`, on hardware, and
by newton_schulz/test_kernels.py without.
"""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from muonkit import Monitor, Muon, MuonW
from muonkit.newton_schulz import triton as kernels
from muonkit.newton_schulz.coefficients import SCHEDULES
from muonkit.newton_schulz.forms import FORMS
from muonkit.newton_schulz.orthogonalizer import orthogonalize
from muonkit.newton_schulz.symmetric import symmetric_product
from muonkit.scale import SCALES
from tests.helpers.optim import VIEWED, mlp
from tests.helpers.stages import NAMES, stage_options

DEVICE = torch.device("cuda", 0)

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU here")

# float32 products in another order, in five iterations that multiply what they round by up to 3.4
# each: benchmarks/errors.py measures at most 5e-4 of an entry of one between two forms; between two
# orders of the same sums a tenth of it. Parameters are about 1, updates lr = 0.02 times that.
CLOSE = 2e-5
# bfloat16 products: an orthogonalized matrix within a few per cent of its RMS.
COARSE = 5e-2

SHAPES = [(1, 1), (7, 5), (64, 64), (129, 257), (768, 768), (768, 3072), (3072, 768), (2304, 96)]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@contextlib.contextmanager
def nothing_waits() -> Iterator[None]:
    """An error where the CPU waits for the GPU."""
    torch.cuda.synchronize()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the mode calls itself a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def set_gradients(models: list[nn.Module], seed: int) -> None:
    """The same gradients for all of them."""
    for named in zip(*(model.named_parameters() for model in models), strict=True):
        gradient = draw(*named[0][1].shape, seed=1000 * seed + len(named[0][0]))
        for _, p in named:
            p.grad = gradient.to(p.device, p.dtype)


def apart(one: nn.Module, other: nn.Module) -> float:
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return max(float((p.detach().cpu() - q.detach().cpu()).abs().max()) for p, q in pairs)


# ---- one matrix


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("dtype", "bound"), [("float32", 1e-3), ("bfloat16", COARSE), ("float16", COARSE)]
)
def test_orthogonalized_as_in_float64(
    shape: tuple[int, int], form: str, dtype: str, bound: float
) -> None:
    G = draw(3, *shape)
    exact = orthogonalize(G.double(), ns_form="standard")
    found = orthogonalize(G.to(DEVICE), ns_form=form, ns_dtype=dtype).cpu().double()
    error = (found - exact).flatten(1).norm(dim=1) / exact.flatten(1).norm(dim=1)
    assert float(error.max()) <= bound


@pytest.mark.parametrize("schedule", [*SCHEDULES, "svd"])
def test_every_schedule(schedule: str) -> None:
    G = draw(2, 96, 160)
    exact = orthogonalize(G.double(), ns_coefficients=schedule)
    for form in FORMS:
        found = orthogonalize(
            G.to(DEVICE), ns_coefficients=schedule, ns_form=form, ns_dtype="float32"
        )
        assert float((found.cpu() - exact).abs().max()) <= 1e-3


@pytest.mark.parametrize("magnitude", [0.0, 1e-40, 1e-30, 1.0, 1e30, 3e38])
def test_any_magnitude(magnitude: float) -> None:
    G = draw(40, 64)
    G = (G / G.abs().max() * magnitude).to(DEVICE)
    found = orthogonalize(G)
    assert bool(found.isfinite().all())
    if magnitude >= 1e-30:
        same = orthogonalize(draw(40, 64).to(DEVICE))
        assert float((found - same).norm() / same.norm()) <= COARSE


def test_the_kernel_is_used_and_repeats_its_bits() -> None:
    assert kernels.available(DEVICE)
    X = draw(4, 264, 328).to(DEVICE).bfloat16()
    first = symmetric_product(X, X)
    assert torch.equal(first, symmetric_product(X, X))
    # A batch is rounded as its matrices are.
    one = X[2:3]
    assert torch.equal(first[2], symmetric_product(one, one)[0])


def test_gradients_flow_through_it() -> None:
    G = draw(24, 40)
    answers = []
    for device in ("cpu", DEVICE):
        X = G.clone().to(device).requires_grad_()
        orthogonalize(X, ns_dtype="float32").square().mul(
            torch.arange(40.0, device=device)
        ).sum().backward()
        assert X.grad is not None
        answers.append(X.grad.cpu())
    assert torch.allclose(*answers, rtol=1e-3, atol=1e-3)


# ---- a step


def pair(**options: Any) -> tuple[list[nn.Module], list[MuonW]]:
    """The same model on the CPU and on the GPU, with an optimizer each."""
    models = [mlp(48), mlp(48).to(DEVICE)]
    options = {"lr": 0.02, "adamw_lr": 1e-3, "ns_dtype": "float32", **options}
    return models, [MuonW(model, **options) for model in models]


def steps(models: list[nn.Module], optimizers: list[MuonW], count: int, first: int = 0) -> None:
    for t in range(first, first + count):
        set_gradients(models, t)
        for optimizer in optimizers:
            optimizer.step()


@pytest.mark.parametrize("stage", NAMES)
@pytest.mark.parametrize(
    "options",
    [
        {},
        *({"adjust_lr_fn": scale} for scale in SCALES),
        {"nesterov": False, "maximize": True},
        {"cautious": True, "weight_decay": 0.1},
        {"momentum_dtype": "bfloat16"},
        {"bytes_in_flight": 1},
        {"nonfinite": "skip"},
        {"nonfinite": "raise"},
        {"ns_form": "gram"},
        {"ns_coefficients": "svd"},
        {"lr": torch.tensor(0.02)},
        {"momentum": torch.tensor(0.9)},
    ],
    ids=lambda options: "-".join(map(str, options)) or "default",
)
def test_a_step_is_the_cpus(stage: str, options: dict[str, Any]) -> None:
    # cautious: an entry near zero may change its sign.
    loose = "cautious" in options or "ns_coefficients" in options
    models, optimizers = pair(adamw_lr=1e-3, **stage_options(stage), **options)
    steps(models, optimizers, 4)
    assert apart(*models) <= (1e-3 if loose else CLOSE)


LESS = [
    {"momentum_dtype": "int8"},
    {"fraction": 0.25},
    {"fraction": 0.25, "after": "normuon"},
    {"period": 2},
]


@pytest.mark.parametrize("options", LESS, ids=lambda options: "-".join(map(str, options)))
def test_a_step_with_less_memory_or_work_is_the_cpus(options: dict[str, Any]) -> None:
    models, optimizers = pair(**options)
    steps(models, optimizers, 4)
    # int8: what lies half way between two whole numbers may be rounded to either, which moves an
    # entry by a 127th of the largest in its block.
    assert apart(*models) <= (1e-3 if "momentum_dtype" in options else CLOSE)


@pytest.mark.parametrize(("view", "shape"), VIEWED)
def test_every_view(view: str, shape: tuple[int, ...]) -> None:
    params = [nn.Parameter(draw(*shape).to(device)) for device in ("cpu", DEVICE)]
    for p in params:
        optimizer = Muon([{"params": [p], "view": view}], lr=0.02, ns_dtype="float32")
        for t in range(3):
            p.grad = draw(*shape, seed=t).to(p.device)
            optimizer.step()
    assert float((params[0].detach() - params[1].detach().cpu()).abs().max()) <= CLOSE


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_parameters_of_16_bits(dtype: torch.dtype) -> None:
    models = [mlp(48).to(dtype), mlp(48).to(DEVICE, dtype)]
    optimizers = [MuonW(model, lr=0.02, ns_dtype="float32") for model in models]
    steps(models, optimizers, 3)
    assert apart(*models) <= 4 * torch.finfo(dtype).eps  # parameters are below 1


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"after": "normuon"},
        {"after": "adamuon"},
        {"constraint": "hyperball", "adamw_lr": 1e-3},
        {"momentum_dtype": "bfloat16"},
        {"lr": torch.tensor(0.02), "weight_decay": 0.1},
        {"momentum": torch.tensor(0.9)},
        {"nonfinite": "propagate"},
        *LESS,
    ],
    ids=lambda options: "-".join(map(str, options.values())) or "default",
)
def test_a_step_waits_for_nothing(options: dict[str, Any]) -> None:
    model = mlp(48).to(DEVICE)
    optimizer = MuonW(model, **{"lr": 0.02, **options})
    for t in range(4):
        set_gradients([model], t)
        if t < 2:
            optimizer.step()
        else:
            with nothing_waits():
                optimizer.step()


def test_a_monitor_sees_the_gpus_step() -> None:
    model = mlp(48).to(DEVICE)
    optimizer = MuonW(model, lr=0.02)
    with Monitor(optimizer, every=1) as monitor:
        steps([model], [optimizer], 2)
    assert monitor.latest is not None


def test_checkpoints_cross_devices() -> None:
    models, optimizers = pair(after="normuon")
    steps(models, optimizers, 2)
    moved = [copy.deepcopy(models[0]).to(DEVICE), copy.deepcopy(models[1]).cpu()]
    others = [MuonW(model, lr=0.02, ns_dtype="float32", after="normuon") for model in moved]
    for other, optimizer in zip(others, optimizers, strict=True):
        other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for model, other in zip(moved, others, strict=True):
        assert all(
            value.device == p.device
            for p in model.parameters()
            for name, value in other.state[p].items()
            if isinstance(value, Tensor) and name != "step"
        )
    steps([*models, *moved], [*optimizers, *others], 2, first=2)
    assert max(apart(models[0], model) for model in moved) <= CLOSE


def test_a_model_moved_after_construction() -> None:
    models = [mlp(48), mlp(48)]
    optimizers = [MuonW(model, lr=0.02, ns_dtype="float32") for model in models]
    models[1].to(DEVICE)
    steps(models, optimizers, 2)
    assert apart(*models) <= CLOSE


@pytest.mark.parametrize("overflow", [False, True])
def test_a_grad_scaler(overflow: bool) -> None:
    model = mlp(48).to(DEVICE)
    optimizer = MuonW(model, lr=0.02, ns_dtype="float32")
    twin = copy.deepcopy(model)
    reference = MuonW(twin, lr=0.02, ns_dtype="float32")
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**10)
    scaler.scale(torch.zeros((), device=DEVICE))
    set_gradients([model, twin], 0)
    with torch.no_grad():
        for p in model.parameters():
            assert p.grad is not None
            p.grad.mul_(torch.inf if overflow else 2.0**10)
    before = copy.deepcopy(model)
    scaler.step(optimizer)
    scaler.update()
    reference.step()
    assert apart(model, before if overflow else twin) <= (0.0 if overflow else CLOSE)
    assert scaler.get_scale() == (2.0**9 if overflow else 2.0**10)


@pytest.mark.filterwarnings("ignore")  # of torch's compiler, about torch
@pytest.mark.parametrize(
    "options",
    [
        *map(stage_options, NAMES),
        {"momentum_dtype": "bfloat16"},
        {"momentum_dtype": "bfloat16", "nesterov": False},
        {"cautious": True, "lr": torch.tensor(0.02)},
        {"nonfinite": "skip", "after": "normuon"},
        *LESS,
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_compiled(options: dict[str, Any]) -> None:
    """One matrix of each shape, and several: the compiler's graphs differ."""
    models = [nn.Sequential(mlp(48), mlp(48), mlp(32)).to(DEVICE) for _ in range(2)]
    eager, compiled = (
        MuonW(model, **{"lr": 0.02, "adamw_lr": 1e-3, "ns_dtype": "float32", **options})
        for model in models
    )
    step: Callable[[], object] = torch.compile(compiled.step)
    # See "Compiling the step" in docs/choosing.md: a fault of torch 2.11's compiler.
    ordering = torch._inductor.config.patch(loop_ordering_after_fusion=False)
    with ordering if options.get("after") == "normuon" else contextlib.nullcontext():
        for t in range(3):
            set_gradients(models, t)
            eager.step()
            step()
    # AdaMuon divides entries near zero by themselves; bfloat16 rounds the momentum.
    exact = options.get("after") != "adamuon" and "momentum_dtype" not in options
    assert apart(*models) <= (CLOSE if exact else 1e-3)


@pytest.mark.parametrize("stage", NAMES)
def test_captured_in_a_graph(stage: str) -> None:
    models = [mlp(48).to(DEVICE), mlp(48).to(DEVICE)]
    eager, captured = (
        MuonW(model, lr=torch.tensor(0.02, device=DEVICE), **stage_options(stage), adamw_lr=1e-3)
        for model in models
    )
    set_gradients(models, 0)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            captured.step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured.step()
    for _ in range(3):
        graph.replay()
    for _ in range(6):
        eager.step()
    torch.cuda.synchronize()
    assert apart(*models) == 0.0


def test_what_a_step_holds_stays_below_the_bound() -> None:
    """The docstring's bound of `bytes_in_flight`: 3 + 6 m / n times the batch's bytes."""
    sides, count, cap = 512, 16, 4 * 512 * 512 * 4
    params = [nn.Parameter(draw(sides, sides, seed=i).to(DEVICE)) for i in range(count)]
    optimizer = Muon(params, lr=0.02, ns_dtype="float32", bytes_in_flight=cap)
    for p in params:
        p.grad = torch.randn_like(p)
    optimizer.step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    optimizer.step()
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - before <= (1 + 3 + 6) * cap


# ---- over ranks: one, which is what one GPU allows


@pytest.fixture(scope="module")
def group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    path: Path = tmp_path_factory.mktemp("group") / "store"
    torch.cuda.set_device(DEVICE)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl", init_method=f"file://{path}", rank=0, world_size=1
    )
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("zero", [0, 1])
def test_ddp(group: None, zero: int) -> None:
    models = [mlp(48), mlp(48).to(DEVICE)]
    wrapped = DistributedDataParallel(models[1], device_ids=[0])
    optimizers = [
        MuonW(models[0], lr=0.02, ns_dtype="float32"),
        MuonW(wrapped, lr=0.02, ns_dtype="float32", zero=zero),
    ]
    steps(models, optimizers, 3)
    assert apart(*models) <= CLOSE


@pytest.mark.parametrize("stage", NAMES)
def test_fsdp2(group: None, stage: str) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor, distribute_tensor

    models = [mlp(48), mlp(48).to(DEVICE)]
    fully_shard(models[1], mesh=init_device_mesh("cuda", (1,)))
    optimizers = [
        MuonW(model, lr=0.02, ns_dtype="float32", adamw_lr=1e-3, **stage_options(stage))
        for model in models
    ]
    for t in range(3):
        for (name, p), (_, q) in zip(
            models[0].named_parameters(), models[1].named_parameters(), strict=True
        ):
            p.grad = draw(*p.shape, seed=1000 * t + len(name))
            assert isinstance(q, DTensor)
            q.grad = distribute_tensor(p.grad.to(DEVICE), q.device_mesh, q.placements)
        for optimizer in optimizers:
            optimizer.step()
    for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert isinstance(q, DTensor)
        assert float((p - q.full_tensor().cpu()).detach().abs().max()) <= CLOSE
