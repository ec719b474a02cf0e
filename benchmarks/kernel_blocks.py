"""Time the Triton kernel with other block sizes than its table has, on a GPU.

    python benchmarks/kernel_blocks.py --json kernel_blocks.json

For every size of matrix: the time of every candidate over that of the fastest, and of torch's
general product (bmm). `muonkit.newton_schulz.triton.blocks` holds what was chosen from it. All
candidates are compiled first, by several processes into Triton's cache; what does not compile for
want of shared memory or registers is left out. Every candidate's result is compared with float64.
Times are of replayed CUDA graphs: without the launches.
"""

from __future__ import annotations

import collections
import hashlib
import itertools
import multiprocessing
import statistics
import sys
from typing import Any

import harness
import torch
from gpu import Device, missing_gpu
from machine import facts
from torch import Tensor

from muonkit.newton_schulz.symmetric import symmetric_product
from muonkit.newton_schulz.triton.blocks import Blocks, choose, kind_of, tile_count

# (matrices, m, k): as many as a step takes together, and single ones, as a rank may own.
SHAPES = [
    (512, 64, 64), (512, 64, 256), (256, 128, 128), (256, 128, 512), (128, 256, 256),
    (128, 256, 1024), (64, 512, 512), (64, 512, 2048), (48, 768, 768), (36, 768, 3072),
    (4, 768, 3072), (32, 1024, 1024), (16, 1024, 4096), (1, 1024, 4096), (8, 2048, 2048),
    (1, 2048, 2048), (4, 2048, 8192), (1, 4096, 4096), (1, 4096, 16384), (1, 8192, 8192),
]  # fmt: skip

CANDIDATES = {
    2: [
        Blocks(tile, depth, warps, stages)
        for tile, depth, warps, stages in [
            (32, 64, 4, 3), (32, 64, 4, 4), (32, 128, 4, 3),
            *itertools.product((64,), (64, 128), (4,), (3, 4)),
            *itertools.product((128,), (64,), (4, 8), (2, 3, 4)),
            (128, 32, 4, 4), (128, 128, 8, 2), (128, 128, 8, 3),
        ]
    ],
    4: [
        Blocks(tile, depth, warps, stages)
        for tile, depth, warps, stages in [
            (32, 32, 4, 3), *itertools.product((64,), (32,), (4, 8), (2, 3)), (64, 64, 4, 3),
            (128, 16, 8, 2), (128, 32, 8, 3), (128, 32, 4, 3),
        ]
    ],
}  # fmt: skip
NAMES = {"bf16": torch.bfloat16, "fp32": torch.float32, "tf32": torch.float32}


def product(X: Tensor, D: Tensor | None, blocks: Blocks, group: int) -> Tensor:
    """X X^T, or with D: 2 X X^T - 4.8 D + 3.4 I; X (B, m, k), dense or the transposed of it."""
    from muonkit.newton_schulz.triton import precision
    from muonkit.newton_schulz.triton.symmetric_kernel import kernel

    batch, m, k = X.shape
    C = torch.empty((batch, m, m), dtype=X.dtype, device=X.device)
    strides = [*X.stride(), *X.stride(), *((0, 0, 0) if D is None else D.stride())]
    scalars = (1.0, 0.0, 0.0) if D is None else (2.0, -4.8, 3.4)
    kernel[(batch * tile_count(m, blocks.tile),)](
        X, X, D, C, m, k, *strides, *scalars,
        TILE=blocks.tile, DEPTH=blocks.depth, GROUP=group, VECTOR=16 // X.element_size(),
        TALL=X.stride(2) != 1,
        WHOLE=k % blocks.depth == 0, PRECISION=precision(X.dtype),
        num_warps=blocks.warps, num_stages=blocks.stages,
    )  # fmt: skip
    return C


Job = tuple[str, Blocks, int]


def compiles(job: Job) -> tuple[Job, float | None, str]:
    """The job, the largest error over the largest magnitude (None where it does not compile), and a
    digest of the result's bits.
    """
    name, blocks, group = job
    device = Device("cuda", 1)
    torch.backends.cuda.matmul.allow_tf32 = name == "tf32"
    X = device.randn(2, 256, 256, dtype=NAMES[name])
    try:
        found = [product(X, D, blocks, group) for D in (None, X @ X.mT)]
        product(X[:, :, : 256 - 16 // X.element_size()].contiguous(), None, blocks, group)
        found.append(product(X.mT.contiguous().mT, None, blocks, group))
        torch.cuda.synchronize()
    except Exception:
        return job, None, ""
    exact = X.double() @ X.double().mT
    polynomial = 2 * exact - 4.8 * (X @ X.mT).double() + 3.4 * torch.eye(256, device=X.device)
    pairs = zip(found, (exact, polynomial, exact), strict=True)
    error = max(float((C.double() - E).abs().max() / E.abs().max()) for C, E in pairs)
    bits = b"".join(C.cpu().view(torch.uint8).numpy().tobytes() for C in found)
    return job, error, hashlib.sha256(bits).hexdigest()[:8]


def main() -> int:
    parser = harness.parser(__doc__, rounds=5, threads=False)
    parser.add_argument("--workers", type=int, default=12)
    parser.add_argument("--dtypes", nargs="+", choices=NAMES, default=list(NAMES))
    parser.add_argument("--groups", type=int, nargs="+", default=[8])
    options = parser.parse_args()
    if why := missing_gpu():
        print(why)
        return 2
    jobs = [
        (name, blocks, group)
        for name in options.dtypes
        for blocks in CANDIDATES[NAMES[name].itemsize]
        for group in options.groups
    ]
    with multiprocessing.get_context("spawn").Pool(options.workers) as pool:
        answers = list(pool.imap_unordered(compiles, jobs))
    found = {job: error for job, error, _ in answers}
    bits: dict[str, list[int]] = {}
    for name in options.dtypes:
        digests = collections.Counter(own for job, _, own in answers if job[0] == name and own)
        bits[name] = sorted(digests.values(), reverse=True)
        print(f"{name}: candidates with equal bits: {bits[name]}")
    wrong = [job for job, error in found.items() if error is not None and not error < 1e-2]
    usable = [job for job in jobs if found[job] is not None and job not in wrong]
    print(f"{len(usable)} of {len(jobs)} candidates compiled and are right; wrong: {wrong}")
    device = Device("cuda", options.rounds)
    rows: list[dict[str, Any]] = []
    for name, (batch, m, k), tall in itertools.product(options.dtypes, SHAPES, (False, True)):
        if (tall and m == k) or (name == "fp32" and (tall or m > 2048)):
            continue
        torch.backends.cuda.matmul.allow_tf32 = name == "tf32"
        X = device.randn(batch, m, k, dtype=NAMES[name]).mul_(k**-0.5)
        D = X @ X.mT if m == k else None
        if tall:
            X = X.mT.contiguous().mT
        tasks: dict[str, Any] = {
            str((*blocks, group)): lambda X=X, D=D, b=blocks, g=group: product(X, D, b, g)
            for job_name, blocks, group in usable
            if job_name == name
            and blocks.tile < 4 * m
            and (16 * blocks.tile >= m or blocks.tile > 64)
        }
        if D is None:
            tasks["torch"] = lambda X=X: torch.bmm(X, X.mT)
        else:
            tasks["torch"] = lambda X=X, D=D: torch.baddbmm(D, X, X.mT, beta=-4.8, alpha=2.0)
        if name == "fp32" and D is not None:
            for blocks in (2, 4, 8):
                if m >= 128 * blocks:
                    tasks[f"torch, {blocks} blocks of rows"] = lambda X=X, D=D, b=blocks: (
                        symmetric_product(X, X, D, alpha=2.0, beta=-4.8, gamma=3.4, blocks=b)
                    )
        seconds = {t: statistics.median(s) for t, s in device.compare(tasks, True).items()}
        ranked = sorted(seconds, key=seconds.__getitem__)
        rate = 2 * batch * m * m * k / 1e12
        kind = kind_of(NAMES[name], "tf32" if name == "tf32" else "ieee")
        table = str((*choose(batch, m, k, kind), 8))
        print(
            f"{name} {batch:4} x {m:5} x {k:5}{' tall' if tall else '     '}: effective TFLOP/s: "
            f"torch {rate / seconds['torch']:6.1f}; "
            f"table {table} {rate / seconds.get(table, float('inf')):6.1f}; "
            + "; ".join(f"{t} {rate / seconds[t]:.1f}" for t in ranked[:5])
        )
        rows.append(
            {
                "dtype": name,
                "shape": [batch, m, k],
                "tall": tall,
                "table": table,
                "seconds": seconds,
            }
        )
    record = {
        "kind": "kernel_blocks", "machine": facts() | {"device": torch.cuda.get_device_name()},
        "rows": rows, "bits": bits,
    }  # fmt: skip
    harness.write(options.json, harness.rounded(record), indent=None)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
