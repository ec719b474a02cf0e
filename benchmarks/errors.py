"""How far every form is from the exact polynomial: dtypes, spectra, schedules, shapes.

    python benchmarks/errors.py                     # all of it, about a minute on two cores
    python benchmarks/errors.py --schedules keller --json errors.json

The judge is the polynomial evaluated in float64 on the singular values of the same float32 matrix,
U p(S) V^T. Printed are the relative distance to it (Frobenius) and the largest singular value, for
each dtype, spectrum and form: with Keller's coefficients, and the worst over schedules (each over
shapes; --all prints every case). Schedules without a safety factor are refused in 16 bits and left
out. On deficient ranks a schedule of many or steep steps lifts rounding into the null space, in any
form: there the distance says little, the largest singular value and the ratio to `standard` do.

Exit code 1 if a singular value exceeds 1.5, if anything is not finite, or if a form in a 16-bit
dtype is over twice as far away as `standard` on the same matrix.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable
from typing import Any

import harness
import machine
import torch
from torch import Tensor

from muonkit import orthogonalize
from muonkit.newton_schulz.coefficients import SCHEDULES, resolve
from muonkit.newton_schulz.forms import FORMS

LARGEST = 1.5  # no singular value may be above
TIMES_STANDARD = 2.0  # in 16 bits, no form may be further away than this many times `standard`

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Small in 16 bits: a CPU without units for them multiplies about a hundred times slower.
SHAPES = {
    "float32": ((256, 1024), (384, 384)),
    "bfloat16": ((64, 256), (96, 96)),
    "float16": ((64, 256), (96, 96)),
}
QUICK_SHAPES = ((24, 96), (32, 32))


def spectra(m: int, n: int) -> dict[str, Tensor]:
    """One m x n matrix (m <= n) in float32 of each kind."""
    generator = torch.Generator().manual_seed(0)
    G = torch.randn(m, n, generator=generator, dtype=torch.float64)
    U, _, Vh = torch.linalg.svd(G, full_matrices=False)
    k = torch.arange(1, m + 1, dtype=torch.float64)
    zero_rows = G.clone()
    zero_rows[::2] = 0
    return {
        "full rank": G.float(),
        "power law": ((U / k) @ Vh).float(),
        "rank m/2": ((U * (k <= m // 2)) @ Vh).float(),
        "rank 1": (G[:, :1] @ G[:1]).float(),
        "zero rows": zero_rows.float(),
    }


def exact(G: Tensor, schedule: str) -> Tensor:
    """U p(S) V^T in float64."""
    iterations = resolve(schedule)
    X = G.double() / (G.double().norm() * iterations.margin)
    if iterations.balanced:
        X = X / (X @ X.mT).abs().sum(1, keepdim=True).sqrt().clamp_min(1e-300)
    U, s, Vh = torch.linalg.svd(X, full_matrices=False)
    for a, b, c in iterations.triples:
        s = a * s + b * s**3 + c * s**5
    return (U * s) @ Vh


def case(G: Tensor, expected: Tensor, schedule: str, form: str, dtype: str) -> tuple[float, float]:
    """Relative distance to `expected` and the largest singular value; inf if not finite."""
    O = orthogonalize(G, ns_coefficients=schedule, ns_form=form, ns_dtype=dtype).double()
    if not O.isfinite().all():
        return math.inf, math.inf
    error = (O - expected).norm() / expected.norm()
    return error.item(), torch.linalg.matrix_norm(O, 2).item()


def measure(schedules: Iterable[str], dtypes: Iterable[str], quick: bool) -> list[dict[str, Any]]:
    """Every case; a form's `times_standard` compares it with `standard` on the same matrix."""
    forms = ["standard", *(form for form in FORMS if form != "standard")]
    cases = []
    for dtype in dtypes:
        for m, n in QUICK_SHAPES if quick else SHAPES[dtype]:
            for spectrum, G in spectra(m, n).items():
                for schedule in schedules:
                    expected = exact(G, schedule)
                    standard = math.nan
                    for form in forms:
                        error, sigma = case(G, expected, schedule, form, dtype)
                        standard = error if form == "standard" else standard
                        ratio = error / standard if math.isfinite(error) else math.inf
                        cases.append(
                            {
                                "dtype": dtype,
                                "spectrum": spectrum,
                                "form": form,
                                "schedule": schedule,
                                "shape": [m, n],
                                "error": error,
                                "sigma": sigma,
                                "times_standard": ratio,
                            }
                        )
    return cases


def worst(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Over schedules and shapes, for each dtype, spectrum and form; in order of appearance."""
    rows: dict[tuple[str, str, str], dict[str, Any]] = {}
    for c in cases:
        key = (c["dtype"], c["spectrum"], c["form"])
        row = rows.setdefault(key, dict(zip(("dtype", "spectrum", "form"), key, strict=True)))
        if c["schedule"] == "keller":
            row["keller"] = max(row.get("keller", 0.0), c["error"])
        if c["error"] > row.get("error", 0.0):
            row["worst_schedule"] = c["schedule"]
        for figure in ("error", "sigma", "times_standard"):
            row[figure] = max(row.get(figure, 0.0), c[figure])
    return list(rows.values())


def failures(cases: list[dict[str, Any]]) -> list[str]:
    """What breaks a bound, one line each."""
    found = []
    for c in cases:
        where = f"{c['form']}, {c['dtype']}, {c['spectrum']}, {c['schedule']}, {c['shape']}"
        if not c["sigma"] <= LARGEST:
            found.append(f"{where}: largest singular value {c['sigma']:.3g}, allowed {LARGEST}")
        if c["dtype"] != "float32" and not c["times_standard"] <= TIMES_STANDARD:
            found.append(
                f"{where}: error {c['error']:.2g} is {c['times_standard']:.2f} times standard's, "
                f"allowed {TIMES_STANDARD}"
            )
    return found


def show(rows: list[dict[str, Any]], every: bool) -> None:
    last = "schedule, shape" if every else "with the schedule"
    print(
        f"{'dtype':10}{'spectrum':11}{'form':12}{'keller':>9}{'error':>9}{'x standard':>12}"
        f"{'largest σ':>11}  {last}"
    )
    for r in rows:
        keller = f"{r['keller']:.1e}" if "keller" in r else ""
        last = f"{r['schedule']}, {r['shape']}" if every else r["worst_schedule"]
        print(
            f"{r['dtype']:10}{r['spectrum']:11}{r['form']:12}{keller:>9}{r['error']:9.1e}"
            f"{r['times_standard']:12.2f}{r['sigma']:11.3f}  {last}"
        )


def main() -> int:
    parser = harness.parser(__doc__)
    safe = [name for name in SCHEDULES if not resolve(name).strict]
    parser.add_argument("--schedules", nargs="+", choices=safe, default=safe)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--quick", action="store_true", help="matrices of at most 32 rows")
    parser.add_argument("--all", action="store_true", help="print every case")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    cases = measure(options.schedules, options.dtypes, options.quick)
    rows = worst(cases)
    show(cases if options.all else rows, options.all)
    found = failures(cases)
    for line in found:
        print(f"FAILED: {line}")
    if options.json:
        record = {
            "kind": "errors",
            "machine": machine.facts(),
            "schedules": options.schedules,
            "shapes": {d: QUICK_SHAPES if options.quick else SHAPES[d] for d in options.dtypes},
            "allowed": {"sigma": LARGEST, "times_standard": TIMES_STANDARD},
            "rows": rows,
            "cases": cases,
            "failures": found,
        }
        harness.write(options.json, record)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
