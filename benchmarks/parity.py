"""Print how far muonkit is from the references: the figures that docs/migrate.md quotes.

    python benchmarks/parity.py

Needs the reference trajectories that tests/optim/test_golden.py reads; without them it says so and
prints the rest.
"""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # the tests are a package of the checkout

from muonkit import Muon
from tests.optim import test_golden, test_torch_parity


def golden() -> None:
    print("largest deviation from the reference trajectories, six steps")
    if not test_golden.GOLDEN.is_dir():
        print(f"  not here: {test_golden.GOLDEN}")
        return
    for file, build, _ in test_golden.FILES:
        for reference, dtype in (("fp32", "float32"), ("bf16", "bfloat16")):
            worst = [w for _, w in test_golden.deviations(file, build, reference, dtype)]
            hidden, rest = worst[: test_golden.HIDDEN], worst[test_golden.HIDDEN :]
            print(f"  {file:32} {reference}  hidden {max(hidden):.1e}  AdamW {max(rest):.1e}")


def parity() -> None:
    print("distance to torch.optim.Muon after four steps, relative to the distance travelled")
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        for ns_dtype in ("bfloat16", "float32"):
            a, b = test_torch_parity.twins(dtype)
            start = [p.detach().clone() for p in a]
            theirs, ours = torch.optim.Muon(a, lr=0.02), Muon(b, lr=0.02, ns_dtype=ns_dtype)
            test_torch_parity.run(theirs, ours, a, b)
            worst = max(
                float(((p - q).norm() / (p - p0).norm()).detach())
                for p, q, p0 in zip(a, b, start, strict=True)
            )
            print(f"  weights {dtype!s:15} products {ns_dtype:9} {worst:.1e}")


def exactness() -> None:
    print("distance to the same four steps in float64, relative to the distance travelled")
    for ns_dtype in ("float32", "bfloat16"):
        a, b = test_torch_parity.twins(torch.float32)
        a = [torch.nn.Parameter(p.detach().double()) for p in a]
        start = copy.deepcopy(a)
        exact, ours = Muon(a, lr=0.02, ns_dtype="float64"), Muon(b, lr=0.02, ns_dtype=ns_dtype)
        generator = torch.Generator().manual_seed(1)
        for _ in range(4):
            for p, q in zip(a, b, strict=True):
                q.grad = torch.randn(p.shape, generator=generator)
                p.grad = q.grad.double()
            exact.step()
            ours.step()
        worst = max(
            float(((p - q).norm() / (p - p0).norm()).detach())
            for p, q, p0 in zip(a, b, start, strict=True)
        )
        print(f"  products {ns_dtype:9} {worst:.1e}")


if __name__ == "__main__":
    golden()
    parity()
    exactness()
