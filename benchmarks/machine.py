"""What a measurement is judged by: the machine it ran on, and the speed of its matrix products.

Shared by the benchmarks; nothing here knows of optimizers.
"""

from __future__ import annotations

import datetime
import os
import platform
import shlex
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from harness import timed

from muonkit._torch import cpu_capabilities

# (rows, inner, cols) of the products whose best rate is the machine's: square ones, and the wide
# and the deep ones that a 3072 x 768 matrix is made of.
PRODUCTS = ((1024, 1024, 1024), (2048, 2048, 2048), (768, 3072, 768), (768, 768, 3072))


def facts() -> dict[str, Any]:
    """CPU, cores, threads, versions, date and the command line, for the JSON and the page."""
    return {
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "capability": _capability(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "command": shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
    }


def _capability() -> str:
    """The vector instructions that torch uses, as "AVX2", and whether it has AMX beside them."""
    kind = torch.backends.cpu.get_cpu_capability()
    return f"{kind} with AMX" if cpu_capabilities()["amx_bf16"] else kind


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def peak_bytes(profiler: torch.profiler.profile) -> int:
    """The most bytes held at a time, beyond what was held before, by torch's allocator.

    Args:
        profiler: has run, with profile_memory=True.
    """
    recorded = profiler.profiler
    assert recorded is not None
    events = [e for e in recorded.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


class ProductRate:
    """The best rate of a float32 product seen so far, over sizes and calls; FLOP/s."""

    def __init__(self) -> None:
        self.best: dict[str, float] = {}
        self._all: dict[str, list[float]] = {}
        generator = torch.Generator().manual_seed(0)
        self._operands = {
            (m, k, n): (
                torch.randn(m, k, generator=generator),
                torch.randn(k, n, generator=generator),
                torch.empty(m, n),
            )
            for m, k, n in PRODUCTS
        }

    def probe(self, times: int) -> None:
        """Run every size `times` times."""
        for (m, k, n), (a, b, out) in self._operands.items():
            for _ in range(times):
                seconds = timed(lambda a=a, b=b, out=out: torch.mm(a, b, out=out))
                size = f"{m}x{k}x{n}"
                self.best[size] = max(self.best.get(size, 0.0), 2 * m * k * n / seconds)
                self._all.setdefault(size, []).append(2 * m * k * n / seconds)

    @property
    def value(self) -> float:
        return max(self.best.values())

    @property
    def sustained(self) -> float:
        """The best size's median over all calls: what the machine holds beside its neighbours."""
        return max(statistics.median(rates) for rates in self._all.values())


def product_seconds(dtype: torch.dtype, flops: float) -> float:
    """What `flops` of products in this dtype would take, judged by one product of 256 x 256.

    A CPU without units for a 16-bit dtype is a hundred times slower in it; this tells before a step
    is begun that takes minutes.
    """
    a = torch.randn(256, 256).to(dtype)
    a @ a
    return min(timed(lambda: a @ a) for _ in range(3)) / (2 * 256**3) * flops
