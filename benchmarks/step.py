"""Time one optimizer step against torch.optim.Muon, paired in one process.

    python benchmarks/step.py                      # the 2-layer, d = 384 GPT
    python benchmarks/step.py --set gpt2-small --rounds 10 --json step.json

Every round runs each implementation once, in an order that rotates, so that a change of the
machine's speed meets all of them; quoted are medians, and the ratios are medians over rounds with
their quartiles. The limit is the time that the counted FLOPs of the standard form (general
products) take at the best product rate measured in the same run.

torch.optim.Muon as shipped computes in bf16 whatever the hardware; on a CPU without bf16 units a
step of it takes minutes, so it runs only `--shipped-rounds` times.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from torch.optim import _muon as torch_muon

from muonkit import Muon

Shape = tuple[int, int]


def gpt_shapes(layers: int, d: int) -> list[Shape]:
    """Hidden matrices of a GPT: fused QKV, attention output, MLP up and down."""
    return [(3 * d, d), (d, d), (4 * d, d), (d, 4 * d)] * layers


SETS: dict[str, list[Shape]] = {
    "gpt-2x384": gpt_shapes(2, 384),
    "gpt2-small": gpt_shapes(12, 768),
    "one-layer-768": gpt_shapes(1, 768),
}


def newton_schulz_fp32(
    grad: torch.Tensor, ns_coefficients: tuple[float, float, float], ns_steps: int, eps: float
) -> torch.Tensor:
    """torch.optim.Muon's own loop with its cast changed to float32 and nothing else."""
    a, b, c = ns_coefficients
    X = grad.float().clone()
    if grad.size(0) > grad.size(1):
        X = X.T
    X.div_(X.norm().clamp(min=eps))
    for _ in range(ns_steps):
        A = X @ X.T
        B = torch.addmm(A, A, A, beta=b, alpha=c)
        X = torch.addmm(X, B, X, beta=a)
    return X.T if grad.size(0) > grad.size(1) else X


def standard_flops(shapes: list[Shape], steps: int = 5) -> int:
    """FLOPs of the matrix products, standard form, general products: 4m^2n + 2m^3 an iteration."""
    return sum(steps * (4 * min(s) ** 2 * max(s) + 2 * min(s) ** 3) for s in shapes)


def product_rate() -> float:
    """The best FLOP/s of a float32 product of this machine, over a few sizes."""
    best = 0.0
    for n in (512, 1024, 2048):
        a, b = torch.randn(n, n), torch.randn(n, n)
        for _ in range(8):
            start = time.perf_counter()
            a @ b
            best = max(best, 2 * n**3 / (time.perf_counter() - start))
    return best


def parameters(shapes: list[Shape]) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(s, generator=generator) * 0.02) for s in shapes]
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator)
    return params


def implementations(shapes: list[Shape]) -> dict[str, Callable[[], object]]:
    ours = Muon(parameters(shapes), ns_dtype="float32")
    theirs = torch.optim.Muon(parameters(shapes))
    shipped = torch_muon._zeropower_via_newtonschulz

    def with_orthogonalization(function: Callable[..., torch.Tensor]) -> Callable[[], object]:
        def step() -> None:
            torch_muon._zeropower_via_newtonschulz = function
            try:
                theirs.step()
            finally:
                torch_muon._zeropower_via_newtonschulz = shipped

        return step

    return {
        "muonkit": ours.step,
        "torch fp32 loop": with_orthogonalization(newton_schulz_fp32),
        "torch as shipped": with_orthogonalization(shipped),
    }


def timed(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def measure(shapes: list[Shape], rounds: int, shipped_rounds: int) -> dict[str, list[float]]:
    """Seconds of every step; the lists of one round belong together."""
    every = implementations(shapes)
    usual = [name for name in every if name != "torch as shipped"]
    for name in usual:
        every[name]()
        every[name]()
    seconds: dict[str, list[float]] = {name: [] for name in every}
    for number in range(rounds):
        order = usual if number % 2 == 0 else usual[::-1]
        if number < shipped_rounds:
            order = [*order, "torch as shipped"]
        for name in order:
            seconds[name].append(timed(every[name]))
    return seconds


def quartiles(values: list[float]) -> tuple[float, float, float]:
    if len(values) < 2:
        return (values[0],) * 3
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--set", choices=SETS, default="gpt-2x384")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--shipped-rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    shapes = SETS[options.set]
    rate = product_rate()
    seconds = measure(shapes, options.rounds, options.shipped_rounds)
    rate = max(rate, product_rate())
    flops = standard_flops(shapes)
    limit = flops / rate
    print(
        f"{options.set}: {len(shapes)} matrices, {flops / 1e9:.1f} GFLOP a step (standard form), "
        f"best product {rate / 1e9:.0f} GFLOP/s, limit {limit * 1e3:.1f} ms; "
        f"torch {torch.__version__}, {options.threads} threads, "
        f"{torch.backends.cpu.get_cpu_capability()}"
    )
    rows = {}
    for name, values in seconds.items():
        if not values:
            continue
        ratios = [v / o for v, o in zip(values, seconds["muonkit"], strict=False)]
        low, middle, high = quartiles(ratios)
        median = statistics.median(values)
        rows[name] = {
            "ms": median * 1e3,
            "times_muonkit": [low, middle, high],
            "share_of_limit": limit / median,
            "rounds": len(values),
        }
        print(
            f"  {name:18} {median * 1e3:10.1f} ms   x{middle:.2f} of muonkit's "
            f"[{low:.2f}, {high:.2f}]   {limit / median:5.0%} of the limit   "
            f"({len(values)} rounds)"
        )
    if options.json:
        record = {
            "set": options.set,
            "gflop": flops / 1e9,
            "gflops": rate / 1e9,
            "threads": options.threads,
            "torch": torch.__version__,
            "machine": platform.processor() or platform.machine(),
            "capability": torch.backends.cpu.get_cpu_capability(),
            "seconds": seconds,
            "rows": rows,
        }
        options.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
