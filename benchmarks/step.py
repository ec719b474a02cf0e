"""Time one optimizer step on fixed sets of hidden matrices, against every peer installed.

    python benchmarks/step.py                                   # the 2-layer, d = 384 GPT
    python benchmarks/step.py --set all --json step.json --plot step.svg
    python benchmarks/step.py --set vit-tiny --only "torch fp32,heavyball fp32"

Paired (harness.py): all implementations live in one process, on the same weights and gradients.
Quoted are medians, and ratios to ours within a round with their quartiles.

The limit is the time that the FLOPs of the cheapest exact form take (for each matrix the least of
the standard form and the gram form with one restart, symmetric products at half cost,
momentum and the rest at nothing) at the best rate of a float32 product measured before, between and
after the rounds. Effective GFLOP/s are those same FLOPs over the time of a step, whatever the
implementation really computed.

A peer whose step takes longer than --budget seconds runs in one round, or in two; one that would
take longer than --longest, judged by one small product in its dtype, does not run at all (that is
torch.optim.Muon as shipped on a CPU without bf16 units: look at one-layer-768).
"""

from __future__ import annotations

import importlib.metadata
import math
import os
import statistics
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# torch reads these once: its profiler, which tells the bytes of a step, announces itself otherwise.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

import harness
import machine
import torch
from peers import PEERS, Implementation, Peer, distance
from sets import SETS, TINY, Workload, cheapest_flops, matrices, standard_flops
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from muonkit import Muon
from muonkit.newton_schulz import scratch

OURS = "muonkit"
SHORTEST = 0.02  # seconds; a shorter step is repeated until one measurement takes this long


class CountOperations(TorchDispatchMode):
    """Counts what reaches the dispatcher: on a GPU, about the kernels launched."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class Limits:
    """How much is measured.

    Attributes:
        rounds: in each, every implementation takes one step (a short one several).
        budget: seconds of a step beyond which a peer runs in one or two rounds only.
        longest: seconds of a step beyond which a peer does not run.
        probes: products of each size that are timed for the limit, before and after the rounds.
    """

    rounds: int = 15
    budget: float = 20.0
    longest: float = 60.0
    probes: int = 8


@dataclass
class Runner:
    """One implementation in the race."""

    peer: Peer
    made: Implementation
    workload: Workload
    first_seconds: float
    movement: list[Tensor]  # of the weights, by the first step; kept of ours only
    writes_gradients: bool
    distance: float = 0.0  # of that movement from ours
    estimate: float = 0.0  # seconds of a step

    def ready(self) -> None:
        """The same gradients for everyone; outside of what is timed."""
        if self.writes_gradients:
            self.workload.restore_gradients()
        self.made.give_gradients()

    def time(self) -> float:
        self.ready()
        return harness.timed(self.made.step, max(1, math.ceil(SHORTEST / self.estimate)))


def absence(error: BaseException, peer: Peer) -> str:
    """Why a peer is not in the table, in one line."""
    message = str(error)
    if "from user code:" in message:  # torch.compile's: the line it stopped at, then advice
        message = message.partition("from user code:")[2].partition("\n\n")[0]
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    said = ": ".join([type(error).__name__, *lines[-1:]])
    if isinstance(error, ImportError):
        try:
            importlib.metadata.version(peer.package or "torch")
        except importlib.metadata.PackageNotFoundError:
            return "not installed (benchmarks/requirements-peers.txt)"
    return f"does not run here: {said}"


def enter(
    peer: Peer, workload: Workload, limits: Limits, reference: list[Tensor] | None
) -> Runner | str:
    """Make a peer, take its first step and warm it up; the reason where it cannot.

    Args:
        reference: how the first step of ours moved the weights; None for ours itself.
    """
    dtype = getattr(torch, peer.products)
    expected = machine.product_seconds(dtype, standard_flops(workload.entries))
    if expected > limits.longest and peer.name != OURS:
        return f"not run: a step would take about {expected:.0f} s in {peer.products}"
    before = [w.clone() for w in workload.weights]
    workload.restore_gradients()
    try:
        made = Implementation(peer, workload.parameters(peer.views))
        first = harness.timed(made.step)
        movement = list(torch._foreach_sub(workload.weights, before))
        runner = Runner(peer, made, workload, first, movement, workload.gradients_changed())
        if reference is not None:
            runner.distance, runner.movement = distance(movement, reference), []
        runner.estimate = first
        if peer.compiled or first < limits.budget:  # else the first step has said enough
            runner.ready()
            runner.estimate = max(1e-6, harness.timed(made.step))
    except Exception as error:  # another package's: whatever it is, the others can still run
        return absence(error, peer)
    finally:
        torch._foreach_copy_(workload.weights, before)
    return runner


def race(
    runners: dict[str, Runner], limits: Limits, rate: machine.ProductRate
) -> list[dict[str, float]]:
    """Seconds of each in each round, and the product rate before, between and after."""
    rounds, budget = limits.rounds, limits.budget
    allowed = {}
    for name, runner in runners.items():
        slow = name != OURS and runner.estimate > budget
        allowed[name] = rounds if not slow else 1 if runner.estimate > 2 * budget else 2

    def between(number: int) -> None:
        if number % max(1, rounds // 4) == 0:
            rate.probe(1)

    rate.probe(limits.probes)
    tasks = {name: runner.time for name, runner in runners.items()}
    results = harness.paired(tasks, rounds, allowed=allowed, after=between)
    rate.probe(limits.probes)
    return results


def operations(runner: Runner) -> int | None:
    """Dispatched operations of one step; None for a compiled one, which would not stay compiled."""
    if runner.peer.compiled:
        return None
    runner.ready()
    with CountOperations() as counter:
        runner.made.step()
    return counter.count


def profile(runner: Runner) -> tuple[int, int]:
    """Of one step: the calls of torch's own operations, and the most bytes held at a time.

    Calls inside another package's operation (torch.library) are counted, which `operations` takes
    for a single one; calls inside torch's own are not. The bytes are those beyond what the step
    found, by torch's allocator; what a BLAS library allocates for itself is not among them.
    """
    runner.ready()
    activities = [torch.profiler.ProfilerActivity.CPU]
    kept, scratch.KEPT_BYTES = scratch.KEPT_BYTES, 0  # it would hide from the count
    try:
        with torch.profiler.profile(activities=activities, profile_memory=True) as profiler:
            runner.made.step()
    finally:
        scratch.KEPT_BYTES = kept
    calls = [e for e in profiler.events() if e.name.startswith("aten::")]
    return sum(not _inside_torch(e) for e in calls), machine.peak_bytes(profiler)


def _inside_torch(event: Any) -> bool:
    outer = event.cpu_parent
    while outer is not None and not outer.name.startswith("aten::"):
        outer = outer.cpu_parent
    return outer is not None


def state_bytes(state: Any) -> int:
    """Bytes of all tensors in an optimizer's state, however it is nested."""
    if isinstance(state, Tensor):
        return state.numel() * state.element_size()
    values = state.values() if hasattr(state, "values") else state
    return sum(state_bytes(v) for v in values) if isinstance(state, dict | list | tuple) else 0


def _products(runner: Runner) -> str:
    """The dtypes of its matrix products: of ours as the optimizer says, which "auto" is by size."""
    optimizer = runner.made.optimizer
    if not isinstance(optimizer, Muon):
        return runner.peer.products
    found = {str(each["ns_dtype"]).removeprefix("torch.") for each in optimizer.describe()}
    return " and ".join(sorted(found))


def row(
    name: str, runner: Runner, results: list[dict[str, float]], budget: float
) -> dict[str, Any]:
    """What is written of one implementation."""
    slow = runner.estimate > budget
    calls, peak = (None, None) if slow else profile(runner)
    peer = runner.peer
    seconds = harness.column(results, name)
    needs = {e.view for e in runner.workload.entries} - peer.views
    return {
        "ms": harness.ms(statistics.median(seconds)),
        "quartiles_ms": harness.ms(harness.quartiles(seconds)),
        "times_muonkit": harness.quartiles(harness.ratios(results, name, OURS)),
        "rounds": len(seconds),
        "first_ms": runner.first_seconds * 1e3,
        "products": _products(runner),
        "distance_of_first_step": runner.distance,
        "writes_gradients": runner.writes_gradients,
        "given_as_matrices": sorted(needs),
        "operations": None if slow else operations(runner),
        "calls": None if peer.compiled else calls,  # its own kernels would not be among them
        "state_bytes": state_bytes(dict(runner.made.optimizer.state)),
        "peak_bytes": peak,
        "version": importlib.metadata.version(peer.package) if peer.package else None,
        "differs": peer.differs,
        "seconds": seconds,
    }


def measure(entries: list[Any], names: list[str], limits: Limits) -> dict[str, Any]:
    """Everything about one set."""
    workload = Workload(entries)
    runners: dict[str, Runner] = {}
    absent: dict[str, str] = {}
    reference: list[Tensor] | None = None
    for name in names:  # ours is the first
        entered = enter(PEERS[name], workload, limits, reference)
        if isinstance(entered, Runner):
            runners[name] = entered
            reference = reference or entered.movement
        else:
            absent[name] = entered
            if name == OURS:
                raise SystemExit(f"muonkit itself: {entered}")
    rate = machine.ProductRate()
    results = race(runners, limits, rate)
    rows = {name: row(name, runner, results, limits.budget) for name, runner in runners.items()}
    flops = cheapest_flops(entries)
    limit = flops / rate.value
    for record in rows.values():
        record["effective_gflops"] = flops / record["ms"] / 1e6
        record["share_of_limit"] = limit * 1e3 / record["ms"]
    others = [name for name in rows if not name.startswith(OURS)]
    return {
        "matrices": len(matrices(entries)),
        "parameters": len(entries),
        "gflop": flops / 1e9,
        "gflop_standard": standard_flops(entries) / 1e9,
        "product_gflops": rate.value / 1e9,
        "sustained_gflops": rate.sustained / 1e9,
        "product_gflops_by_size": {size: r / 1e9 for size, r in rate.best.items()},
        "limit_ms": limit * 1e3,
        "best_peer": min(others, key=lambda name: rows[name]["times_muonkit"][1], default=None),
        "rows": rows,
        "absent": absent,
    }


def show(name: str, result: dict[str, Any]) -> None:
    print(
        f"\n{name}: {result['matrices']} matrices; cheapest form {result['gflop']:.2f} GFLOP "
        f"(standard, general products: {result['gflop_standard']:.2f}); best product "
        f"{result['product_gflops']:.0f} GFLOP/s (median {result['sustained_gflops']:.0f}); limit "
        f"{result['limit_ms']:.2f} ms"
    )
    print(
        f"  {'':28}{'ms':>10}{'x muonkit':>11}{'quartiles':>16}{'GFLOP/s':>9}{'limit':>7}"
        f"{'ops':>6}{'calls':>6}{'peak MiB':>9}{'distance':>10}{'rounds':>7}"
    )
    for peer, r in sorted(result["rows"].items(), key=lambda item: item[1]["ms"]):
        low, middle, high = r["times_muonkit"]
        ops, calls = ("" if r[key] is None else r[key] for key in ("operations", "calls"))
        peak = "" if r["peak_bytes"] is None else f"{r['peak_bytes'] / 2**20:.1f}"
        print(
            f"  {peer:28}{r['ms']:10.2f}{middle:11.2f}{f'[{low:.2f}, {high:.2f}]':>16}"
            f"{r['effective_gflops']:9.1f}{r['share_of_limit']:7.0%}{ops:>6}{calls:>6}{peak:>9}"
            f"{r['distance_of_first_step']:10.1e}{r['rounds']:7}"
        )
    for peer, reason in result["absent"].items():
        print(f"  {peer:28}{reason}")
    for peer, r in result["rows"].items():
        if r["given_as_matrices"]:
            views = ", ".join(r["given_as_matrices"])
            print(f"  ({peer}: no {views} parameters; given the same matrices one by one)")
    best = result["best_peer"]
    if best:
        low, middle, high = (1 / q for q in reversed(result["rows"][best]["times_muonkit"]))
        print(f"  muonkit takes {middle:.2f} [{low:.2f}, {high:.2f}] of the best peer's ({best})")


COLOURS = {"ours": "#0072B2", "float32": "#8C6BB1", "16 bits": "#999999"}
# Bars end here, that one which is a hundred times ours does not press the others flat.
CUT = 2.5


def plot(sets: dict[str, Any], facts: dict[str, Any], path: Path) -> None:
    """Horizontal bars from zero, one panel a set: time relative to ours, and the limit."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from muonkit.lab.pictures import human, rendered

    heights = [len(result["rows"]) + 1.6 for result in sets.values()]
    figure = Figure(figsize=(8, 0.3 * sum(heights) + 1), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(sets), 1, squeeze=False, height_ratios=heights, sharex=True)
    for axis, (name, result) in zip(axes[:, 0], sets.items(), strict=True):
        rows = sorted(result["rows"].items(), key=lambda item: -item[1]["times_muonkit"][1])
        for position, (peer, r) in enumerate(rows):
            low, middle, high = r["times_muonkit"]
            kind = "ours" if peer.startswith(OURS) else r["products"]
            shown = min(middle, CUT)
            spread = None if middle > CUT else [[middle - low], [min(high, CUT) - middle]]
            colour = COLOURS.get(kind, COLOURS["16 bits"])
            axis.barh(position, shown, color=colour, xerr=spread, ecolor="black", height=0.7)
            said = f"{middle:.2f}" if middle <= CUT else f"… {human(middle)}, the bar is cut"
            axis.text(min(high, CUT) + 0.03, position, said, va="center", fontsize=9)
        limit = result["rows"][OURS]["share_of_limit"]
        axis.axvline(limit, color="black", ls="--", lw=1, ymax=0.97)
        axis.set_yticks(range(len(rows)), [peer for peer, _ in rows], fontsize=9)
        axis.set_xlim(0, CUT + 0.75)
        title = f"{name}: muonkit {human(result['rows'][OURS]['ms'])} ms, limit {limit:.2f} of it"
        axis.set_title(title, fontsize=10, loc="left")
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="x", alpha=0.3)
        axis.set_axisbelow(True)
    axes[-1, 0].set_xlabel("time of a step, muonkit = 1; dashed: the limit; grey: 16-bit products")
    figure.suptitle(
        f"{facts['cpu']}, {facts['threads']} threads, {facts['capability']}, "
        f"torch {facts['torch']}, {facts['date']}",
        fontsize=9,
    )
    path.write_bytes(rendered(figure, path.suffix.removeprefix(".")))


def main() -> int:
    usual = Limits()
    parser = harness.parser(__doc__, rounds=usual.rounds)
    every = {**SETS, **TINY}
    parser.add_argument("--set", choices=["all", *every], default="gpt-2x384")
    parser.add_argument("--only", help="names of implementations, with commas; muonkit always runs")
    parser.add_argument("--budget", type=float, default=usual.budget, help="seconds; see above")
    parser.add_argument("--longest", type=float, default=usual.longest, help="seconds; see above")
    parser.add_argument(
        "--probes", type=harness.at_least_one, default=usual.probes, help="products timed per size"
    )
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    names = list(PEERS)
    if options.only:
        chosen = [name.strip() for name in options.only.split(",")]
        unknown = [name for name in chosen if name not in PEERS]
        if unknown:
            parser.error(f"--only: unknown {unknown}; known are {', '.join(PEERS)}")
        names = list(dict.fromkeys([OURS, *chosen]))
    limits = Limits(options.rounds, options.budget, options.longest, options.probes)
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore", module="torch._inductor")
    facts = machine.facts()
    print(
        f"{facts['cpu']}, {facts['threads']} threads, {facts['capability']}, "
        f"torch {facts['torch']}, {facts['date']}"
    )
    sets = {}
    for name in SETS if options.set == "all" else [options.set]:
        sets[name] = measure(every[name], names, limits)
        show(name, sets[name])
        # After every set: a long run that is stopped keeps what it has.
        harness.write(options.json, {"kind": "step", "machine": facts, "sets": sets})
    if options.plot:
        plot(sets, facts, options.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
