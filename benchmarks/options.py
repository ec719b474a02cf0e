"""What each option of Muon costs: time of a step, state and peak memory, beside the defaults.

    python benchmarks/options.py                      # the 2-layer, d = 384 GPT
    python benchmarks/options.py --set gpt2-small --rounds 3

Paired: all options are in one process on the same weights and gradients; every round takes a step
with each, in an order that rotates. Quoted are the median of the ratios to the defaults' step in
the same round, and its quartiles. The table is that of docs/choosing.md.
"""

from __future__ import annotations

import argparse
import os
import statistics
from typing import Any

# torch reads these once: its profiler, which tells the bytes of a step, announces itself otherwise.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

import machine
import torch
from sets import SETS, TINY, Entry, Workload
from step import state_bytes

import muonkit.newton_schulz.scratch
from muonkit import Muon

MIB = 2**20
OPTIONS: dict[str, dict[str, Any]] = {
    "the defaults": {},
    'ns_coefficients="you"': {"ns_coefficients": "you"},
    'ns_coefficients="polar_express_1.02"': {"ns_coefficients": "polar_express_1.02"},
    'ns_coefficients="cubic5"': {"ns_coefficients": "cubic5"},
    'ns_coefficients="deepseek_v4"': {"ns_coefficients": "deepseek_v4"},
    'ns_coefficients="svd"': {"ns_coefficients": "svd"},
    'ns_form="standard"': {"ns_form": "standard"},
    'ns_form="gram"': {"ns_form": "gram"},
    'momentum_dtype="bfloat16"': {"momentum_dtype": "bfloat16"},
    'variant="normuon"': {"variant": "normuon"},
    'variant="adamuon"': {"variant": "adamuon"},
    'nonfinite="skip"': {"nonfinite": "skip"},
    "cautious=True": {"cautious": True},
    "bytes_in_flight=2**20": {"bytes_in_flight": MIB},
}


def peak(optimizer: Muon) -> int:
    """The most bytes that a step holds at a time beyond what it found; nothing is kept for it."""
    kept, muonkit.newton_schulz.scratch.KEPT_BYTES = muonkit.newton_schulz.scratch.KEPT_BYTES, 0
    activities = [torch.profiler.ProfilerActivity.CPU]
    try:
        with torch.profiler.profile(activities=activities, profile_memory=True) as profiler:
            optimizer.step()
    finally:
        muonkit.newton_schulz.scratch.KEPT_BYTES = kept
    return machine.peak_bytes(profiler)


def build(workload: Workload, options: dict[str, Any]) -> Muon:
    groups: dict[str, list[Any]] = {}
    for p, view in workload.parameters({"matrix", "flatten", "experts"}):
        groups.setdefault(view, []).append(p)
    return Muon([{"params": ps, "view": view} for view, ps in groups.items()], lr=1e-4, **options)


def measure(entries: list[Entry], rounds: int) -> dict[str, dict[str, Any]]:
    """Option -> ratios to the defaults' time, one for each round, and bytes."""
    workload = Workload(entries)
    made = {name: build(workload, options) for name, options in OPTIONS.items()}
    for optimizer in made.values():
        optimizer.step()
    names = list(made)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            seconds[name].append(machine.timed(made[name].step))
    base = seconds["the defaults"]
    return {
        name: {
            "ms": 1e3 * statistics.median(seconds[name]),
            "ratio": machine.quartiles([s / b for s, b in zip(seconds[name], base, strict=True)]),
            "state": state_bytes(optimizer.state_dict()["state"]),
            "peak": peak(optimizer),
        }
        for name, optimizer in made.items()
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    every = {**SETS, **TINY}
    parser.add_argument("--set", choices=list(every), default="gpt-2x384")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = measure(every[options.set], options.rounds)
    facts = machine.facts()
    print(
        f"`{facts['command']}` on {facts['cpu']}, {facts['threads']} threads, "
        f"{facts['capability']}; torch {facts['torch']}; {facts['date']}.\n"
    )
    print("| option | ms | × the defaults | state, MiB | peak, MiB |\n|---|--:|--:|--:|--:|")
    for name, row in rows.items():
        low, middle, high = row["ratio"]
        print(
            f"| `{name}` | {row['ms']:.1f} | {middle:.2f} [{low:.2f}, {high:.2f}] "
            f"| {row['state'] / MIB:.1f} | {row['peak'] / MIB:.1f} |"
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
