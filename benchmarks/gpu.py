"""Check and time the Triton kernel and the step on a GPU, in one command.

    python benchmarks/gpu.py --json gpu.json

docs/performance.md has what it found on an H100. `--device cpu` tries it to its end without a GPU:
tiny sizes, no events and graphs, the kernel replaced by plain products; those figures mean nothing.

1. The kernel against float64, over sizes, layouts and dtypes; and whole orthogonalizations against
   the same polynomial in float64.
2. Its time against torch's general product (mm for one matrix, bmm for a batch) of the same
   operands. "Effective" TFLOP/s count a general product's FLOPs over the time taken. The limit is
   the longer of the FLOPs that a symmetric product needs over the best rate of torch's products
   measured here, and the bytes it must move over the rate of a copy measured here.
3. A step of `muonkit.Muon` over GPT-2 small's 48 hidden matrices and those of 4 layers of Llama 3.2
   1B, against fused AdamW and torch.optim.Muon, as called and replayed from a CUDA graph. The limit
   is the FLOPs of the cheapest form over the rate of products. Then how much memory a step takes
   beyond weights, gradients and state.
4. A whole training step of GPT-2 small, 16 x 1024 tokens under bfloat16 autocast, with MuonW and
   with fused AdamW.
5. The step captured in a CUDA graph and replayed: the same weights as steps taken one by one. The
   step compiled by torch.compile, with several options: the same movement in float32 but for
   rounding.
6. What a step of ours takes with other options; and against those other packages (peers.py) that
   can be imported, in 16 bits like them, with how far their first step is from ours.

Each part is written when it is done.

The block table of the kernel has a search of its own: kernel_blocks.py.

Times are medians of paired rounds (harness.py), with quartiles. Exits with 0 if all checks
pass, 1 if one fails, 2 where there is no GPU that the kernel runs on: then it says so, in one line.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import itertools
import math
import statistics
import sys
from collections.abc import Callable, Iterator
from typing import Any

import harness
import peers
import torch
import torch._inductor.config
from harness import Spread, column, quartiles
from machine import facts
from peers import PEERS, Implementation, Peer
from sets import SETS, TINY, Entry, cheapest_flops
from torch import Tensor, nn

from muonkit import Muon, MuonW, orthogonalize
from muonkit.lab.models import GPT
from muonkit.newton_schulz import triton as kernels

Task = Callable[[], object]

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# (matrices, m, k): square and wide single ones, and batches as a model's layers make them.
PRODUCTS = [(1, m, k) for m in (256, 512, 1024, 2048, 4096, 8192) for k in (m, 4 * m)] + [
    (48, 256, 1024), (12, 768, 768), (12, 768, 3072), (64, 128, 128), (512, 64, 64),
]  # fmt: skip
DRY_PRODUCTS = [(1, 64, 64), (1, 48, 96), (3, 33, 40)]
CHECKED = [
    (1, 1, 1), (2, 17, 5), (3, 64, 64), (2, 100, 300), (1, 129, 1000), (5, 512, 512), (1, 1031, 77),
    (2, 768, 3072), (1, 2304, 768), (1, 4096, 4096),
]  # fmt: skip
DRY_CHECKED = [(1, 1, 1), (2, 17, 5), (3, 64, 64)]


class Device:
    """Where it runs: a GPU, or the CPU for a dry run, where plain products stand for the kernel."""

    def __init__(self, name: str, rounds: int) -> None:
        self.torch, self.dry, self.rounds = torch.device(name), name == "cpu", rounds

    def product(
        self, L: Tensor, R: Tensor, D: Tensor | None, alpha: float, beta: float, gamma: float
    ) -> Tensor:
        if not self.dry:
            return kernels.symmetric_product(L, R, D, alpha, beta, gamma)
        C = alpha * (L.float() @ R.float().mT)
        C = C if D is None else C + beta * D.float()
        C.diagonal(dim1=-2, dim2=-1).add_(gamma)
        return (C.tril() + C.tril(-1).mT).to(L.dtype)

    def randn(self, *shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
        generator = torch.Generator(self.torch).manual_seed(seed)
        return torch.randn(shape, generator=generator, device=self.torch).to(dtype)

    def wait(self) -> None:
        if not self.dry:
            torch.cuda.synchronize(self.torch)

    def seconds(self, task: Task, times: int) -> float:
        """Of one call, the mean of `times` in a row, by the device's own clock."""
        if self.dry:
            return harness.timed(task, times)
        start_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start_event.record()
        for _ in range(times):
            task()
        end_event.record()
        end_event.synchronize()
        return start_event.elapsed_time(end_event) / 1e3 / times

    def compare(self, tasks: dict[str, Task], graphs: bool = False) -> dict[str, list[float]]:
        """Seconds of every task in every round.

        Args:
            graphs: replay each from a CUDA graph, so that the launches do not count.
        """
        timings: dict[str, Callable[[], float]] = {}
        graphs = graphs and not self.dry
        for name, task in tasks.items():
            for _ in range(2):
                task()  # compiles, allocates, tunes
            self.wait()
            # Long enough that the events' own time does not count: 2 ms.
            times = max(1, min(200, round(2e-3 / max(self.seconds(task, 1), 1e-7))))
            if graphs:
                replay = repeated(task, times)  # one replay makes all the calls
                timings[name] = lambda replay=replay, n=times: self.seconds(replay, 1) / n
            else:
                timings[name] = functools.partial(self.seconds, task, times)
        results = harness.paired(timings, self.rounds)
        return {name: column(results, name) for name in tasks}


def spread(one: list[float], other: list[float]) -> Spread:
    """Quartiles of the ratios within a round."""
    return quartiles([a / b for a, b in zip(one, other, strict=True)])


def repeated(task: Task, times: int) -> Task:
    """A function that replays so many calls of the task from one CUDA graph."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(times):
            task()
    return graph.replay


# ---- 1. the kernel against float64


def layouts(X: Tensor) -> Iterator[tuple[str, Tensor]]:
    yield "dense", X
    yield "transposed", X.mT.contiguous().mT
    wide = torch.full((X.shape[0], X.shape[1], X.shape[2] + 3), torch.nan, device=X.device)
    wide = wide.to(X.dtype)
    wide[..., 1:-2] = X
    yield "sliced", wide[..., 1:-2]
    yield "expanded", X[:1].expand_as(X)


def check(device: Device) -> dict[str, object]:
    """The largest error of each dtype, over the magnitudes added, and the bound it must keep."""
    torch.backends.cuda.matmul.allow_tf32 = False
    worst: dict[str, object] = {}
    for name, dtype in DTYPES.items():
        shares = [
            found
            for batch, m, k in (DRY_CHECKED if device.dry else CHECKED)
            for layout, X in layouts(device.randn(batch, m, k, dtype=dtype))
            for found in errors(device, X, layout)
        ]
        share, error, where = max(shares)
        worst[name] = {"error": error, "of_bound": share, "where": where, "good": share <= 1}
        print(f"  {name}: {error:.1e} of the magnitudes, {share:.2f} of the bound, at {where}")
    return worst


def errors(device: Device, X: Tensor, layout: str) -> Iterator[tuple[float, float, str]]:
    """(error over bound, error, what) of the Gram matrix, and of a product with D and I added."""
    batch, m, k = X.shape
    other = device.randn(batch, m, k, dtype=X.dtype, seed=1)
    D = device.randn(batch, m, m, dtype=X.dtype, seed=2)
    own = torch.finfo(X.dtype).eps / 2 if X.dtype.itemsize == 2 else 0.0
    bound = (k + 5) * 2.0**-24 + own
    for R, add, beta, gamma in ((X, None, 0.0, 0.0), (other, D, -4.775, 3.4445)):
        C = device.product(X, R, add, 1.25, beta, gamma)
        exact = 1.25 * (X.double() @ R.double().mT)
        size = 1.25 * (X.double().abs() @ R.double().abs().mT)
        if add is not None:
            exact, size = exact + beta * add.double(), size + abs(beta) * add.double().abs()
        exact.diagonal(dim1=-2, dim2=-1).add_(gamma)
        size.diagonal(dim1=-2, dim2=-1).add_(gamma)
        exact, size = (E.tril() + E.tril(-1).mT for E in (exact, size))
        # float16 below 2^-14 rounds to multiples of 2^-24.
        rest = ((C.double() - exact).abs() - 2.0**-25 * (X.dtype == torch.float16)) / size
        error = float(rest.max())
        same = torch.equal(C, C.mT) and torch.equal(C, device.product(X, R, add, 1.25, beta, gamma))
        what = f"{batch}x{m}x{k} {layout}{'' if add is None else ' + D'}"
        yield (error / bound if same and error == error else float("inf")), error, what


# ---- 2. the kernel's time


def rates(device: Device) -> dict[str, float]:
    """FLOP/s of torch's best general product in each dtype, and bytes/s of a copy."""
    best: dict[str, float] = {}
    for name, dtype in DTYPES.items():
        for n in (64,) if device.dry else (4096, 8192):
            X = device.randn(n, n, dtype=dtype)
            taken = device.compare({"mm": lambda X=X: X @ X})["mm"]
            best[name] = max(best.get(name, 0.0), 2 * n**3 / min(taken))
    source = torch.zeros(2**12 if device.dry else 2**30, dtype=torch.uint8, device=device.torch)
    into = torch.empty_like(source)
    taken = device.compare({"copy": lambda: into.copy_(source)})["copy"]
    return best | {"copy": 2 * source.numel() / min(taken)}


def time_products(device: Device, rate: dict[str, float]) -> list[dict[str, object]]:
    rows = []
    for name, dtype in DTYPES.items():
        for batch, m, k in DRY_PRODUCTS if device.dry else PRODUCTS:
            if dtype == torch.float32 and m * k > 4096 * 4096:
                continue  # seconds a product, without tensor cores
            X = device.randn(batch, m, k, dtype=dtype)
            rows.append(time_product(device, rate, name, "gram", X))
            if m == k:
                rows.append(time_product(device, rate, name, "P = aI + bA + cA^2", X))
    return rows


def time_product(
    device: Device, rate: dict[str, float], name: str, kind: str, X: Tensor
) -> dict[str, object]:
    batch, m, k = X.shape
    operands = batch * m * k + (batch * m * m if kind != "gram" else 0)
    if kind == "gram":
        one = X[0]
        general: Task = (lambda: one @ one.mT) if batch == 1 else (lambda: torch.bmm(X, X.mT))
        tasks = {"muonkit": lambda: device.product(X, X, None, 1.0, 0.0, 0.0), "torch": general}
    else:
        X = X + X.mT
        operands = batch * m * m  # A is L, R and D: read once
        tasks = {
            "muonkit": lambda: device.product(X, X, X, 2.0315, -4.775, 3.4445),
            "torch": lambda: torch.baddbmm(X, X, X.mT, beta=-4.775, alpha=2.0315),
        }
    seconds = device.compare(tasks)
    needed = batch * m * (m + 1) * k  # FLOPs on and below the diagonal
    by_bytes = (operands + batch * m * m) * X.element_size() / rate["copy"]
    limit = max(needed / rate[name], by_bytes)
    low, middle, high = spread(seconds["torch"], seconds["muonkit"])
    own = statistics.median(seconds["muonkit"])
    effective = 2 * batch * m * m * k / own / 1e12
    print(
        f"  {name} {kind:18} {batch:4} x {m:5} x {k:5}: {own * 1e6:9.1f} us, {effective:7.1f} "
        f"TFLOP/s effective, x{middle:.2f} [{low:.2f}, {high:.2f}] of torch, {limit / own:4.0%} of "
        f"the limit ({'bytes' if by_bytes == limit else 'products'})"
    )
    return {
        "dtype": name, "kind": kind, "shape": [batch, m, k], "seconds": seconds,
        "effective_tflops": effective, "times_torch": [low, middle, high], "limit": limit,
    }  # fmt: skip


ORTHOGONALIZED = [(1, 768, 768), (4, 768, 3072), (2, 2304, 768), (3, 1031, 77), (64, 128, 512)]
DRY_ORTHOGONALIZED = [(1, 16, 16), (2, 24, 16), (3, 5, 33)]
# Of the Frobenius norm, over these matrices of normal numbers and these two schedules:
# docs/performance.md has worse ones, of other spectra and schedules.
ALLOWED = {"bf16": 0.06, "fp16": 0.02, "fp32": 1e-4}


def check_orthogonalizer(device: Device) -> dict[str, object]:
    """The worst distance to float64 over sizes, and the largest singular value, by dtype and
    schedule.
    """
    found: dict[str, object] = {}
    for dtype, schedule in itertools.product(ALLOWED, ("keller", "polar_express_1.05")):
        worst, sigma = 0.0, 0.0
        for number, shape in enumerate(DRY_ORTHOGONALIZED if device.dry else ORTHOGONALIZED):
            G = device.randn(*shape, seed=number)
            O = orthogonalize(G, ns_coefficients=schedule, ns_dtype=DTYPES[dtype]).double()
            exact = orthogonalize(G.double(), ns_coefficients=schedule, ns_dtype="float64")
            worst = max(worst, float((O - exact).norm() / exact.norm()))
            sigma = max(sigma, float(torch.linalg.matrix_norm(O, 2).max()))
        good = worst <= ALLOWED[dtype] and sigma <= 1.5
        found[f"{dtype} {schedule}"] = {"error": worst, "sigma": sigma, "good": good}
        print(f"  orthogonalizer {dtype} {schedule}: {worst:.1e}, largest σ {sigma:.3f}"
              f"{'' if good else ': TOO FAR'}")  # fmt: skip
    return found


# ---- 3. a whole step


def parameters(device: Device, entries: list[Entry]) -> list[nn.Parameter]:
    made = []
    for seed, entry in enumerate(entries):
        parameter = nn.Parameter(0.02 * device.randn(*entry.shape, seed=seed))
        parameter.grad = device.randn(*entry.shape, seed=1000 + seed)
        made.append(parameter)
    return made


STEPPED = ("gpt2-small", "llama-1b")


def time_steps(device: Device, rate: dict[str, float], name: str) -> dict[str, object]:
    """Steps as they are called, and replayed from a CUDA graph: what the GPU alone takes."""
    entries = TINY["tiny"][:4] if device.dry else SETS[name]
    ours = Muon(parameters(device, entries), lr=1e-3, ns_dtype="bfloat16")
    theirs = torch.optim.Muon(parameters(device, entries), lr=1e-3)
    adamw = torch.optim.AdamW(parameters(device, entries), lr=1e-3, fused=True)
    for group in adamw.param_groups:
        group["capturable"] = not device.dry
    optimizers = {"muonkit.Muon": ours, "torch.optim.Muon": theirs, "AdamW (fused)": adamw}
    limit = cheapest_flops(entries) / rate["bf16"]
    matrices = sum(math.prod(entry.shape) for entry in entries)
    record: dict[str, object] = {"matrices": len(entries), "parameters": matrices, "limit": limit}
    print(f"  {name}: {len(entries)} matrices, {matrices / 1e6:.0f} M; products alone "
          f"{limit * 1e3:.3f} ms")  # fmt: skip
    for how, graphs in (("called", False), ("replayed", True)):
        seconds = device.compare({n: each.step for n, each in optimizers.items()}, graphs)
        rows = {}
        for each, taken in seconds.items():
            low, middle, high = spread(taken, seconds["muonkit.Muon"])
            median = statistics.median(taken)
            rows[each] = {"seconds": taken, "times_muonkit": [low, middle, high]}
            share = "" if "AdamW" in each else f", {limit / median:.0%} of the limit"
            print(f"    {how:8} {each:17} {median * 1e3:8.3f} ms, x{middle:.2f} "
                  f"[{low:.2f}, {high:.2f}]{share}")  # fmt: skip
        record[how] = rows
    return record


# Other packages, in 16 bits as they are shipped, and ours likewise.
OURS = Peer("muonkit", functools.partial(peers.muonkit, dtype="bfloat16"), views=peers.ALL_VIEWS)
CARRIED = ("pytorch_optimizer", "gram-newton-schulz", "heavyball", "optimuon", "muonium")
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "normuon": {"after": "normuon"},
    "int8": {"momentum_dtype": "int8"},
    "fraction=0.25": {"fraction": 0.25},
    "hyperball": {"constraint": "hyperball"},
    "compiled": {},
}


def time_carried(device: Device, name: str) -> dict[str, object]:
    """Steps as they are called, of ours and of the packages that are here, and how far their first
    step is from ours: one that moves nothing is in no race.
    """
    entries = TINY["tiny"][:4] if device.dry else SETS[name]
    tasks: dict[str, Task] = {}
    absent: dict[str, str] = {}
    distances: dict[str, float] = {}
    reference: list[Tensor] = []
    for peer in (OURS, *(PEERS[each] for each in CARRIED)):
        weights = parameters(device, entries)
        before = [p.detach().clone() for p in weights]
        try:
            made = Implementation(peer, [(p, "matrix") for p in weights])
            made.step()
            movement = list(torch._foreach_sub([p.detach() for p in weights], before))
            reference = reference or movement
            if not any(float(moved.abs().max()) > 0 for moved in movement):
                raise RuntimeError("its step moves nothing")
            distances[peer.name] = peers.distance(movement, reference)
        except Exception as error:  # another package's, of whatever kind
            absent[peer.name] = f"{type(error).__name__}: {error}".splitlines()[0][:120]
        else:
            tasks[peer.name] = functools.partial(_step_anew, made)
    seconds = race(device, name, tasks, OURS.name)
    for each, far in distances.items():
        print(f"    {each}: its first step is {far:.1e} from ours")
    for each, why in absent.items():
        print(f"    {each} did not run: {why}")
    return {"seconds": seconds, "absent": absent, "distance_of_first_step": distances}


def _step_anew(made: Implementation) -> None:
    made.give_gradients()  # some drop them in a step
    made.step()


def time_options(device: Device, name: str) -> dict[str, list[float]]:
    """Steps of ours with other options, as they are called."""
    entries = TINY["tiny"][:4] if device.dry else SETS[name]
    tasks: dict[str, Task] = {}
    for each, told in OPTIONS.items():
        step = Muon(parameters(device, entries), lr=1e-3, **told).step
        tasks[each] = compiled(device, step) if each == "compiled" else step
    return race(device, name, tasks, "plain")


def race(device: Device, name: str, tasks: dict[str, Task], base: str) -> dict[str, list[float]]:
    """The seconds of each task, which are printed as times those of one of them too."""
    seconds = device.compare(tasks)
    for each, taken in seconds.items():
        low, middle, high = spread(taken, seconds[base])
        print(f"    {name}, {each}: {statistics.median(taken) * 1e3:.3f} ms, "
              f"x{middle:.2f} [{low:.2f}, {high:.2f}]")  # fmt: skip
    return seconds


def compiled(device: Device, step: Task) -> Task:
    """In a dry run torch's compiler traces, and generates no code."""
    made: Task = torch.compile(step, backend="eager" if device.dry else "inductor")
    return made


def peak_bytes(device: Device, name: str) -> dict[str, int | None]:
    """The most that the third step holds beyond what was held before it."""
    entries = TINY["tiny"][:4] if device.dry else SETS[name]
    kinds: dict[str, Callable[..., torch.optim.Optimizer]] = {
        "muonkit.Muon": Muon, "torch.optim.Muon": torch.optim.Muon, "AdamW (fused)": _adamw
    }  # fmt: skip
    found: dict[str, int | None] = {}
    for each, kind in kinds.items():
        optimizer = kind(parameters(device, entries), lr=1e-3)
        for _ in range(2):
            optimizer.step()
        device.wait()
        if device.dry:
            optimizer.step()
            found[each] = None
            continue
        held = torch.cuda.memory_allocated(device.torch)
        torch.cuda.reset_peak_memory_stats(device.torch)
        optimizer.step()
        device.wait()
        found[each] = torch.cuda.max_memory_allocated(device.torch) - held
    print(f"    {name}, peak bytes of a step: {found}")
    return found


def _adamw(params: list[nn.Parameter], lr: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr, fused=True)


# ---- 4. a training step


def time_training(device: Device) -> dict[str, object]:
    """Forward, backward and step, as they are called."""
    torch.manual_seed(0)
    batch, context, sizes = (16, 1024, (50304, 1024, 768, 12, 12))
    if device.dry:
        batch, context, sizes = 2, 8, (64, 8, 16, 1, 2)
    model = GPT(*sizes).to(device.torch)
    trained = {"MuonW": model, "AdamW (fused)": copy.deepcopy(model)}
    optimizers = {
        "MuonW": MuonW(trained["MuonW"]),
        "AdamW (fused)": torch.optim.AdamW(trained["AdamW (fused)"].parameters(), fused=True),
    }
    ids = torch.randint(sizes[0], (batch, context + 1), device=device.torch)

    def step(name: str) -> None:
        with torch.autocast(device.torch.type, torch.bfloat16):
            scores = trained[name](ids[:, :-1]).flatten(0, 1)
            loss = nn.functional.cross_entropy(scores, ids[:, 1:].flatten())
        loss.backward()
        optimizers[name].step()
        optimizers[name].zero_grad()

    seconds = device.compare({name: functools.partial(step, name) for name in trained})
    found = {name: statistics.median(taken) * 1e3 for name, taken in seconds.items()}
    low, middle, high = spread(seconds["MuonW"], seconds["AdamW (fused)"])
    print("  " + ", ".join(f"{name} {ms:.1f} ms" for name, ms in found.items())
          + f": x{middle:.3f} [{low:.3f}, {high:.3f}]")  # fmt: skip
    return {
        "tokens": batch * context, "parameters": sum(p.numel() for p in model.parameters()),
        "seconds": seconds, "times_adamw": [low, middle, high],
    }  # fmt: skip


# ---- 5. a CUDA graph


def graph(device: Device) -> dict[str, object]:
    """Five steps one by one, and the same five of which the last two are replays of a graph."""
    entries = TINY["tiny"][:4] if device.dry else SETS["gpt2-small"][:8]
    eager, captured = parameters(device, entries), parameters(device, entries)
    # lr as a tensor: a float would be part of the graph.
    one, other = (Muon(p, lr=torch.tensor(0.02, device=device.torch)) for p in (eager, captured))
    for _ in range(5):
        one.step()
    replay = other.step if device.dry else capture(other)
    for _ in range(2):
        replay()
    device.wait()
    if device.dry:
        for _ in range(3):
            other.step()
    equal = all(torch.equal(p, q) for p, q in zip(eager, captured, strict=True))
    print(f"  captured, replayed: {'the same weights' if equal else 'DIFFERENT WEIGHTS'}")
    return {"equal": equal}


def capture(optimizer: torch.optim.Optimizer) -> Task:
    """A graph of one step, after the three on a stream of its own that PyTorch asks for."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            optimizer.step()
    torch.cuda.current_stream().wait_stream(stream)
    recorded = torch.cuda.CUDAGraph()
    with torch.cuda.graph(recorded):
        optimizer.step()  # recorded, not run
    return recorded.replay


def compare_compiled(device: Device) -> dict[str, object]:
    """How far five compiled steps are from five eager ones, of what these moved."""
    entries = TINY["tiny"][:4] if device.dry else SETS["gpt2-small"][:4]
    found: dict[str, object] = {}
    for name, told in OPTIONS.items():
        if name == "compiled":
            continue
        try:
            apart = _compiled_from_eager(device, entries, told)
        except Exception as error:  # torch's compiler's, of whatever kind
            found[name] = {"error": f"{type(error).__name__}: {error}"[:500], "good": False}
            print(f"  compiled, {name}: FAILED, {type(error).__name__}")
            continue
        found[name] = {"apart": apart, "good": apart <= ROUNDED}
        print(f"  compiled, {name}: {apart:.1e} apart{'' if apart <= ROUNDED else ': TOO FAR'}")
    return found


def _compiled_from_eager(device: Device, entries: list[Entry], told: dict[str, Any]) -> float:
    start = [p.detach().clone() for p in parameters(device, entries)]
    one, other = parameters(device, entries), parameters(device, entries)
    eager = Muon(one, lr=0.02, ns_dtype="float32", **told)
    traced = Muon(other, lr=0.02, ns_dtype="float32", **told)
    step = compiled(device, traced.step)
    # See "Compiling the step" in docs/choosing.md: a fault of torch 2.11's compiler.
    ordering = torch._inductor.config.patch(loop_ordering_after_fusion=False)
    with ordering if told.get("after") == "normuon" else contextlib.nullcontext():
        for _ in range(5):
            eager.step()
            step()
    return max(
        float((p.detach() - q.detach()).norm() / (p.detach() - s).norm())
        for p, q, s in zip(one, other, start, strict=True)
    )


# In float32. int8 may round an entry the other way; five steps on the same gradient hide it.
ROUNDED = 1e-3


def missing_gpu() -> str | None:
    """Why this cannot run here, or None."""
    need = "it needs an NVIDIA GPU of compute capability 8.0 or ROCm, and Triton"
    if not torch.cuda.is_available():
        return f"no GPU: torch {torch.__version__} sees none; {need}. Nothing was checked or timed."
    if not kernels.available(torch.device("cuda", torch.cuda.current_device())):
        got = f"{torch.cuda.get_device_name()}, {torch.cuda.get_device_capability()}"
        return f"no kernel for {got}; {need}. Nothing was checked or timed."
    return None


def main() -> int:
    parser = harness.parser(__doc__, rounds=15, threads=False)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help=argparse.SUPPRESS)
    options = parser.parse_args()
    why = missing_gpu() if options.device == "cuda" else None
    if why:
        print(why)
        return 2
    device = Device(options.device, options.rounds)
    name = "dry run on the CPU" if device.dry else torch.cuda.get_device_name()
    print(f"{name}, torch {torch.__version__}\n1. the kernel against float64")
    record: dict[str, object] = {
        "kind": "gpu", "machine": facts() | {"device": name}, "dry": device.dry,
    }  # fmt: skip

    def keep(**found: object) -> None:
        """What is there when this is killed, or a kernel takes the GPU's context with it."""
        record.update(found)
        harness.write(options.json, harness.rounded(record))

    keep(errors=(worst := check(device)))
    keep(orthogonalizer=(exact := check_orthogonalizer(device)))
    keep(rates=(rate := rates(device)))
    shown = ", ".join(f"{key} {value / 1e12:.1f}" for key, value in rate.items() if key != "copy")
    print(
        f"2. symmetric products; torch's best: {shown} TFLOP/s; copy {rate['copy'] / 1e9:.0f} GB/s"
    )
    keep(products=time_products(device, rate))
    print("3. one step over hidden matrices, as it is called and replayed from a CUDA graph")
    keep(steps={name: time_steps(device, rate, name) for name in STEPPED})
    keep(peak={name: peak_bytes(device, name) for name in STEPPED})
    print("4. a training step of GPT-2 small, 16 x 1024 tokens, bfloat16 autocast")
    keep(training=time_training(device))
    print("5. the step in a CUDA graph, and compiled")
    keep(graph=(captured := graph(device)))
    keep(compiled=(traced := compare_compiled(device)))
    checks = [*worst.values(), *exact.values(), *traced.values()]
    good = bool(captured["equal"]) and all(row["good"] for row in checks)
    keep(good=good)
    print("6. with other options; and other packages, last, since their kernels may fail")
    keep(options={name: time_options(device, name) for name in STEPPED[:1]})
    carried: dict[str, object] = {}
    for each in STEPPED:
        carried[each] = time_carried(device, each)
        keep(carried=carried)
    print("all checks passed" if good else "A CHECK FAILED: see above")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
