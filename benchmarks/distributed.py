"""Time, bytes and memory of one step on several ranks, against the usual ways to distribute Muon.

    python benchmarks/distributed.py                        # two sets, 2 and 4 ranks, 4 minutes
    python benchmarks/distributed.py --quick
    python benchmarks/distributed.py --set gpt2-small-4 --seconds 900 --json distributed.json

The ranks are processes of this machine, of one thread each, which speak gloo. Where there are more
of them than cores, the times of a step tell how much all ranks compute together, not how long a
rank of its own would take; the tables say so. The backend's own threads compete for the same cores,
and what it sends is copied from memory to memory: bytes cost less here than in a network.

Two layouts, on the same matrices:

- fsdp2: every parameter is a DTensor with `[Shard(0)]`, and so are its gradient and its momentum;
- ddp: parameters and (averaged) gradients are whole on every rank. What DDP itself sends to average
  them is not part of the step, and not counted.

Against muonkit:

- torch, each rank alone: `torch.optim.Muon` itself; every rank computes everything, and sends
  nothing.
- torch, all-gather: the same on full tensors: every rank gathers every matrix, computes it, and
  keeps its rows.
- round robin: in the order of their shapes the i-th matrix is computed by rank i mod N, and the
  results of N matrices at a time are all-gathered, in parts as large as the largest, as in Keller
  Jordan's Muon and modded-nanogpt. For fsdp2 each is gathered to its rank before; "scatter" then
  sends back to every rank its rows only, as muon_fsdp_2 and its descendants do.

All of these compute with torch.optim.Muon's own function, its cast to bfloat16 changed to float32
(a CPU without units for bfloat16 takes 100 times as long), and overlap what they send with what
they compute. "muonkit's products" is a round robin with muonkit's orthogonalize instead: what is
left of the difference then is owners, bytes and packing. "muonkit, each rank alone" shares nothing.

Paired (harness.py). A step begins after a barrier and takes as long as on the rank that is slowest.
Quoted are medians, and ratios to muonkit with the same dtype on the way, within a round, with their
quartiles.

Bytes are counted in one step, from every collective that reaches the dispatcher: what a rank sends
to others at least. All-to-all: what is for others; all-gather: its own part to all others, which a
ring does, (N-1)/N of the output; gather: every part but the root's; scatter: the parts of all but
the root; all-reduce: 2 (N-1)/N. Muonkit's have to be equal to what its plan says, or the script
fails. "of all": over the bytes of all matrices together. Peak: the most that a step holds beyond
what it found, by torch's allocator, on the rank where it is most.
"""

from __future__ import annotations

import functools
import math
import os
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

# torch reads these once: its profiler, which tells the bytes of a step, announces itself otherwise.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

import harness
import machine
import torch
import torch.distributed as dist
from distributed_peers import CONTENDERS, OURS, Contender, Other, Parameters, local_part
from gloo_ranks import run_on_ranks
from parts import mib, spread, table
from peers import Implementation
from sets import SETS, Entry, gpt
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.utils._python_dispatch import TorchDispatchMode

import muonkit
from muonkit.newton_schulz import scratch

WIRES = ("float32", "bfloat16")
# Four layers: a multiple of 2 and of 4 ranks, as GPT-2's twelve are, so that a round robin is as
# balanced, and as free of padding, as on the whole model.
CHOICES: dict[str, list[Entry]] = {
    "gpt-12x128": SETS["gpt-12x128"],
    "gpt-4x384": gpt(4, 384),
    "gpt2-small-4": gpt(4, 768),  # a third of GPT-2 small: minutes for every round
    "tiny": [*gpt(2, 16), Entry((18, 10))],  # for the tests; 18 rows do not divide by 4
}
USUAL = ("gpt-12x128", "gpt-4x384")
FEWEST = 3  # rounds, however long they take


class CountSent(TorchDispatchMode):
    """Counts the bytes that this rank sends to others, by collective; integers are "control".

    Raises:
        KeyError: on a collective that it does not know, so that none goes uncounted.
    """

    def __init__(self) -> None:
        super().__init__()
        self.sent: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional", "c10d_functional"):
            name = func._schema.name
            tensor, elements = _SENT[name](args)
            kind = name.partition("::")[2].strip("_") if tensor.is_floating_point() else "control"
            self.sent[kind] += elements * tensor.element_size()
        return func(*args, **(kwargs or {}))


def _all_to_all(args: Any) -> tuple[Tensor, int]:
    sizes = args[4] or [len(args[1]) // dist.get_world_size()] * dist.get_world_size()
    others = sum(sizes) - sizes[dist.get_rank()]
    return args[1], others * (args[1].numel() // max(1, len(args[1])))


def _reduced(args: Any) -> tuple[Tensor, int]:
    (tensor,) = args[0]
    n = dist.get_world_size()
    return tensor, math.ceil(2 * (n - 1) * tensor.numel() / n)


def _to_root(args: Any) -> tuple[Tensor, int]:
    (part,) = args[1]
    return part, 0 if args[3] == dist.get_rank() else part.numel()


def _from_root(args: Any) -> tuple[Tensor, int]:
    (part,) = args[0]
    others = dist.get_world_size() - 1
    return part, others * part.numel() if args[3] == dist.get_rank() else 0


# From the arguments of the operation: a tensor that is sent, and how many elements go to others.
_SENT: dict[str, Callable[[Any], tuple[Tensor, int]]] = {
    "c10d::alltoall_base_": _all_to_all,
    "c10d::_allgather_base_": lambda args: (
        args[1],
        (dist.get_world_size() - 1) * args[1].numel(),
    ),
    "c10d::allreduce_": _reduced,
    "c10d::gather_": _to_root,
    "c10d::scatter_": _from_root,
}


@dataclass
class Runner:
    """One contender with one dtype on the way, on this rank."""

    made: Any
    wire: str
    first_seconds: float = 0.0
    distance: float = 0.0  # of its first step from the reference's
    sent: Counter[str] = field(default_factory=Counter)
    planned: list[int] | None = None  # bytes by rank; of muonkit only
    peak: int = 0
    seconds: list[float] = field(default_factory=list)

    def state_bytes(self) -> int:
        """Of the momentum and all else that this rank keeps from step to step."""
        made = self.made
        if isinstance(made, Other):
            tensors = list(made.momenta.values())
        else:
            optimizer = made.optimizer if isinstance(made, Implementation) else made
            states = optimizer.state.values()
            tensors = [local_part(t) for s in states for t in s.values() if isinstance(t, Tensor)]
        return sum(t.numel() * t.element_size() for t in tensors)


def enter(contender: Contender, wire: str, parameters: Parameters) -> tuple[Runner, list[Tensor]]:
    """Make it and take its first step; and how that moved this rank's weights."""
    runner = Runner(contender.make(parameters, getattr(torch, wire)), wire)
    parameters.restore()
    before = [w.clone() for w in parameters.weights]
    dist.barrier()
    runner.first_seconds = harness.timed(runner.made.step)
    return runner, list(torch._foreach_sub(parameters.weights, before))


def distance(movement: list[Tensor], reference: list[Tensor]) -> float:
    """Of two movements of all weights on all ranks, relative to the second (Frobenius)."""
    squares = torch.zeros(2, dtype=torch.float64)
    for one, other in zip(movement, reference, strict=True):
        squares += torch.stack(
            [(one - other).double().square().sum(), other.double().square().sum()]
        )
    dist.all_reduce(squares)
    return math.sqrt(squares[0] / squares[1])


def count(runner: Runner) -> None:
    """What one step sends, and the most that it holds.

    Raises:
        RuntimeError: muonkit sends something else than its plan says.
    """
    kept, scratch.KEPT_BYTES = scratch.KEPT_BYTES, 0  # it would hide from the count
    activities = [torch.profiler.ProfilerActivity.CPU]
    dist.barrier()
    try:
        with (
            torch.profiler.profile(activities=activities, profile_memory=True) as profiler,
            CountSent() as counter,
        ):
            runner.made.step()
    finally:
        scratch.KEPT_BYTES = kept
    runner.sent, runner.peak = counter.sent, machine.peak_bytes(profiler)
    if isinstance(runner.made, muonkit.Muon):
        plan = runner.made.plan()
        traffic = plan.traffic() if plan.ranks > 1 else None
        both = zip(traffic.sent_in, traffic.sent_out, strict=True) if traffic else ()
        runner.planned = [a + b for a, b in both] or [0] * dist.get_world_size()
        counted, planned = data_bytes(runner.sent), runner.planned[dist.get_rank()]
        if counted != planned:
            raise RuntimeError(
                f"rank {dist.get_rank()} was to send {planned} bytes by muonkit's plan, but sent "
                f"{counted}: {dict(runner.sent)}"
            )


def data_bytes(sent: Counter[str]) -> int:
    return sum(sent.values()) - sent["control"]


def race(runners: Mapping[Any, Runner], rounds: int) -> None:
    """Paired rounds; every runner keeps the seconds of its steps."""

    def step(runner: Runner) -> None:
        dist.barrier()
        runner.seconds.append(harness.timed(runner.made.step))

    tasks = {key: functools.partial(step, runner) for key, runner in runners.items()}
    harness.paired(tasks, rounds)


@dataclass(frozen=True)
class Case:
    """What is measured on one number of ranks: a set in a layout, in at most so many rounds."""

    set: str
    layout: str
    rounds: int


def measure(case: Case, deadline: float, mesh: DeviceMesh) -> dict[str, Any]:
    """One case, until about `deadline` (of `time.monotonic`), with `FEWEST` rounds at least."""
    parameters = Parameters(CHOICES[case.set], mesh if case.layout == "fsdp2" else None)
    runners: dict[tuple[str, str], Runner] = {}
    reference: list[Tensor] = []
    for contender in CONTENDERS[case.layout]:
        for wire in WIRES if contender.sends else WIRES[:1]:
            runner, movement = enter(contender, wire, parameters)
            reference = reference or movement
            runner.distance = distance(movement, reference)
            count(runner)
            runners[contender.name, wire] = runner
    fitting = (deadline - time.monotonic()) / sum(r.first_seconds for r in runners.values())
    rounds = [min(case.rounds, max(FEWEST, int(fitting)))]
    dist.broadcast_object_list(rounds)  # all ranks take as many
    race(runners, rounds[0])
    elements = sum(shape.numel() for shape in parameters.shapes)
    return {
        **asdict(case),
        "rounds": rounds[0],
        "ranks": dist.get_world_size(),
        "matrices": len(parameters.shapes),
        "elements": elements,
        "rows": rows(runners, elements),
    }


def rows(runners: dict[tuple[str, str], Runner], elements: int) -> list[dict[str, Any]]:
    """What is written of each contender, from all ranks."""
    mine = {
        key: (r.seconds, dict(r.sent), r.peak, r.state_bytes(), r.first_seconds)
        for key, r in runners.items()
    }
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    slowest = {
        key: [max(some) for some in zip(*(other[key][0] for other in everyone), strict=True)]
        for key in runners
    }
    written = []
    for (name, wire), runner in runners.items():
        _, sent, peaks, states, firsts = zip(
            *(other[name, wire] for other in everyone), strict=True
        )
        seconds = slowest[name, wire]
        data = [data_bytes(Counter(some)) for some in sent]
        ratios = [a / b for a, b in zip(seconds, slowest[OURS, wire], strict=True)]
        written.append(
            {
                "name": name,
                "wire": wire if any(data) else None,
                "ms": harness.ms(statistics.median(seconds)),
                "quartiles_ms": harness.ms(harness.quartiles(seconds)),
                "times_muonkit": harness.quartiles(ratios),
                "first_ms": harness.ms(max(firsts)),
                "sent_bytes": data,
                "sent_of_all": sum(data) / len(data) / (elements * getattr(torch, wire).itemsize),
                "sent_by_collective": sent,
                "planned_bytes": runner.planned,
                "peak_bytes": max(peaks),
                "state_bytes": max(states),
                "distance_of_first_step": runner.distance,
                "seconds": seconds,
            }
        )
    return written


def measure_all(cases: list[Case], seconds: float) -> list[dict[str, Any]]:
    """On each rank: what is measured of these cases, in so many seconds together."""
    end = time.monotonic() + seconds
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    results = []
    for number, case in enumerate(cases):
        now = time.monotonic()
        results.append(measure(case, now + (end - now) / (len(cases) - number), mesh))
    return results


def markdown(result: dict[str, Any], cores: int) -> str:
    """A heading, what has to be known beside the figures, and the table."""
    ranks = result["ranks"]
    crowd = ""
    if ranks > cores:
        crowd = f"; {ranks} ranks on {cores} {'cores' if cores > 1 else 'core'}: oversubscribed"
    head = ["", "on the way", "ms", "× muonkit", "MiB sent by a rank (most)", "of all"]
    head += ["peak MiB", "state MiB", "distance"]
    lines = [
        [
            row["name"],
            row["wire"] or "",
            f"{row['ms']:.1f}",
            spread(row["times_muonkit"]),
            f"{mib2(statistics.mean(row['sent_bytes']))} ({mib2(max(row['sent_bytes']))})",
            f"{row['sent_of_all']:.3f}",
            mib(row["peak_bytes"]),
            mib(row["state_bytes"]),
            f"{row['distance_of_first_step']:.0e}",
        ]
        for row in result["rows"]
    ]
    return (
        f"\n### {result['set']}, {result['layout']}, {ranks} ranks\n\n"
        f"{result['matrices']} matrices, {result['elements'] * 4 / 2**20:.1f} MiB in float32; "
        f"{result['rounds']} rounds{crowd}.\n\n{table(head, lines)}"
    )


def mib2(value: float) -> str:
    return f"{value / 2**20:.2f}"


def main() -> int:
    parser = harness.parser(__doc__, rounds=15, threads=False)
    parser.add_argument("--set", nargs="+", choices=list(CHOICES), default=list(USUAL))
    parser.add_argument("--layout", nargs="+", choices=list(CONTENDERS), default=list(CONTENDERS))
    parser.add_argument("--ranks", nargs="+", type=int, default=[2, 4])
    parser.add_argument(
        "--seconds", type=float, default=200.0, help="for all; fewer rounds than --rounds fit it"
    )
    parser.add_argument("--quick", action="store_true", help="the smallest set in a few rounds")
    options = parser.parse_args()
    if options.quick:
        options.set, options.rounds = list(USUAL[:1]), FEWEST
    if min(options.ranks) < 2:
        parser.error(f"expected --ranks of at least 2, got {options.ranks}")
    torch.set_num_threads(1)
    facts = machine.facts()
    print(
        f"{facts['cpu']}, {facts['cores']} cores, one thread a rank, {facts['capability']}, gloo, "
        f"torch {facts['torch']}, {facts['date']}"
    )
    cases = [
        Case(name, layout, options.rounds) for name in options.set for layout in options.layout
    ]
    end = time.monotonic() + options.seconds
    results: list[dict[str, Any]] = []
    for number, ranks in enumerate(options.ranks):
        share = ranks / sum(options.ranks[number:])
        new = run_on_ranks(ranks, measure_all, cases, share * (end - time.monotonic()))
        results += new
        print("\n".join(markdown(result, facts["cores"]) for result in new), flush=True)
        # After every number of ranks: a run that is stopped keeps what it has.
        harness.write(options.json, {"kind": "distributed", "machine": facts, "cases": results})
    return 0


if __name__ == "__main__":
    sys.exit(main())
