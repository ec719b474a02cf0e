"""What each option of Muon costs: time of a step, state and peak memory, beside the defaults.

    python benchmarks/options.py                      # the 2-layer, d = 384 GPT
    python benchmarks/options.py --set gpt2-small --rounds 3
    python benchmarks/options.py --only fraction      # of the options those of this name

Paired (harness.py): all options are in one process, on the same weights and gradients. Quoted are
the median of the ratios to the defaults' step in the same round, and its quartiles. The
table is that of docs/choosing.md; pages.py puts it there from docs/choosing/*.json.
"""

from __future__ import annotations

import functools
import os
import statistics
from typing import Any

# torch reads these once: its profiler, which tells the bytes of a step, announces itself otherwise.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

import harness
import machine
import torch
from performance_page import options_block
from sets import SETS, TINY, Entry, Workload
from step import state_bytes

import muonkit.newton_schulz.scratch
from muonkit import Muon

MIB = 2**20
OPTIONS: dict[str, dict[str, Any]] = {
    "the defaults": {},
    'ns_coefficients="you"': {"ns_coefficients": "you"},
    'ns_coefficients="polar_express_1.02"': {"ns_coefficients": "polar_express_1.02"},
    'ns_coefficients="aol4"': {"ns_coefficients": "aol4"},
    'ns_coefficients="cubic5"': {"ns_coefficients": "cubic5"},
    'ns_coefficients="deepseek_v4"': {"ns_coefficients": "deepseek_v4"},
    'ns_coefficients="svd"': {"ns_coefficients": "svd"},
    'ns_form="standard"': {"ns_form": "standard"},
    'ns_form="gram"': {"ns_form": "gram"},
    'momentum_dtype="bfloat16"': {"momentum_dtype": "bfloat16"},
    'after="normuon"': {"after": "normuon"},
    'after="adamuon"': {"after": "adamuon"},
    'before="muoneq"': {"before": "muoneq"},
    'after="muon_plus"': {"after": "muon_plus"},
    'constraint="hyperball"': {"constraint": "hyperball"},
    'constraint="relative_update"': {"constraint": "relative_update"},
    'constraint="radial_brake"': {"constraint": "radial_brake"},
    "fraction=0.5": {"fraction": 0.5},
    "fraction=0.25": {"fraction": 0.25},
    'fraction=0.25, after="normuon"': {"fraction": 0.25, "after": "normuon"},
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


def measure(entries: list[Entry], rounds: int, only: str = "") -> dict[str, dict[str, Any]]:
    """Option -> ratios to the defaults' time, one for each round, and bytes."""
    workload = Workload(entries)
    made = {
        name: build(workload, options)
        for name, options in OPTIONS.items()
        if only in name or not options
    }
    for optimizer in made.values():
        optimizer.step()
    tasks = {name: functools.partial(harness.timed, each.step) for name, each in made.items()}
    results = harness.paired(tasks, rounds)
    return {
        name: {
            "ms": harness.ms(statistics.median(harness.column(results, name))),
            "ratio": harness.quartiles(harness.ratios(results, name, "the defaults")),
            "state": state_bytes(optimizer.state_dict()["state"]),
            "peak": peak(optimizer),
        }
        for name, optimizer in made.items()
    }


def main() -> int:
    parser = harness.parser(__doc__, rounds=15)
    every = {**SETS, **TINY}
    parser.add_argument("--set", choices=list(every), default="gpt-2x384")
    parser.add_argument("--only", default="", help="options that have this in their name")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = measure(every[options.set], options.rounds, options.only)
    record = {"kind": "options", "machine": machine.facts(), "set": options.set, "rows": rows}
    print(options_block([record]))
    harness.write(options.json, harness.rounded(record))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
