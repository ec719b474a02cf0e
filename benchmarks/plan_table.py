"""Load balance of six models on 8 to 4,096 ranks, as planned: `python benchmarks/plan_table.py`.

Largest over mean of the ranks' FLOPs, and the least that any choice of owners could have. Nothing
is measured or run: the optimizer's planner makes the plan from shapes. About a minute.
"""

from __future__ import annotations

import argparse
from typing import NamedTuple

from muonkit.lab.plan import assumptions, balance
from muonkit.lab.plan_costs import Simulation, of_stage
from muonkit.lab.plan_layouts import choose_layout, parse_mesh, place
from muonkit.lab.plan_schemes import lower_bound
from muonkit.lab.shapes import MODELS

RANKS = (8, 64, 512, 4096)
# By how a mesh of N ranks is made: all data parallel, or tensor parallel within a node of 8; with
# experts, as many of these ranks expert parallel as leave whole experts on each.
MESHES = {
    "fsdp": "fsdp={n}",
    "zero1": "dp={n}",
    "fsdp_tp": "fsdp={n8},tp=8",
    "ep": "fsdp={n8},ep=8",
}


class Cell(NamedTuple):
    """Largest over mean, its lower bound and what sets it, matrices, largest number on a rank."""

    balance: float
    bound: float
    why: str
    matrices: int
    most: int


def plan(name: str, mesh: str) -> Cell:
    """The plan of a model on a mesh."""
    model = MODELS[name]
    layout, axes = choose_layout(None, parse_mesh(mesh), model)
    laid = [(label, p, place(p, layout, axes)) for label, p in of_stage(model, 0, 1)]
    step = Simulation(axes, assumptions(), laid)
    plans = [each for each in step.plan.plans if each.inward]
    traffic = step.traffic()
    bound, why = lower_bound(plans, axes.ranks)
    matrices = sum(len(each.matrices) for each in plans)
    return Cell(balance(traffic["flops"]), bound, why, matrices, int(traffic["matrices"].max()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layouts", default=",".join(MESHES), metavar="A,B,...")
    options = parser.parse_args()
    for layout in options.layouts.split(","):
        print(f"\n{layout}: max over mean of FLOPs (lower bound)\n")
        print("| model | matrices | " + " | ".join(f"{n:,} ranks" for n in RANKS) + " |")
        print("|---|---:|" + "---:|" * len(RANKS))
        for name, model in MODELS.items():
            if layout == "ep" and all(p.ep_dim is None for p in model.parameters):
                continue
            cells = [plan(name, MESHES[layout].format(n=n, n8=n // 8)) for n in RANKS]
            shown = " | ".join(f"{c.balance:.3f} ({c.bound:.3f})" for c in cells)
            print(f"| {name} | {cells[0].matrices:,} | {shown} |", flush=True)


if __name__ == "__main__":
    main()
