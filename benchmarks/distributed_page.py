"""The generated blocks of docs/distributed.md: `pages.py` writes them.

Each function gets the records of one kind, as the scripts write them with --json.
"""

from __future__ import annotations

from typing import Any

from parts import Record, machine_lines, spread, table

OURS = "muonkit"
# A column of the losses: its title, and the runs of example_losses.py that print the same ones.
RUNS = {
    "one process": ("1 process",),
    "apart": ("1 process, projections apart",),
    "DDP ZeRO-1, FSDP2 (2 ranks)": ("DDP ZeRO-1, 2", "DDP ZeRO-1, reduce-scatter, 2", "FSDP2, 2"),
    "FSDP2 × TP, DP × TP ZeRO-1 (4)": ("FSDP2 x TP, 4", "DP x TP ZeRO-1, 4"),
}
SHOWN = (1, 20, 60, 100, 140, 200)  # steps


def losses_block(records: list[Record]) -> str:
    (record,) = records
    columns = []
    for names in RUNS.values():
        first, *others = (record["runs"][name]["losses"] for name in names)
        if any(each != first for each in others):
            raise ValueError(f"expected equal losses of {', '.join(names)}: show them apart")
        columns.append(first)
    rows = [[step, *(f"{losses[step - 1]:.6f}" for losses in columns)] for step in SHOWN]
    largest = [record["largest_deviation"].get(names[0]) for names in RUNS.values()]
    steps = len(columns[0])
    last = [f"largest deviation of {steps} steps"]
    last += ["" if value is None else f"{value:.0e}".replace("e-0", "e-") for value in largest]
    return machine_lines(records) + "\n\n" + table(["step", *RUNS], [*rows, last])


def cases(records: list[Record]) -> dict[tuple[str, int], dict[str, Record]]:
    """(set, ranks) -> layout -> case, in the order in which they were measured."""
    found: dict[tuple[str, int], dict[str, Record]] = {}
    for record in records:
        for case in record["cases"]:
            found.setdefault((case["set"], case["ranks"]), {})[case["layout"]] = case
    return dict(sorted(found.items()))


def float32_rows(case: Record) -> dict[str, Record]:
    return {row["name"]: row for row in case["rows"] if row["wire"] in ("float32", None)}


def step_block(records: list[Record]) -> str:
    """Ours in milliseconds, the others as multiples of it, float32 on the way."""
    columns = cases(records)
    rows: list[list[Any]] = []
    for layout in ("fsdp2", "ddp"):
        by_column = [float32_rows(layouts[layout]) for layouts in columns.values()]
        for name in by_column[0]:
            own = [column[name] for column in by_column]
            cells = [f"{row['ms']:.0f} ms" if name == OURS else spread(row["times_muonkit"])
                     for row in own]  # fmt: skip
            rows.append([layout, name, *cells])
    head = ["layout", "who", *(f"{name}, {ranks} ranks" for name, ranks in columns)]
    rounds = sorted({c["rounds"] for layouts in columns.values() for c in layouts.values()})
    said = f"{rounds[0]} to {rounds[-1]} rounds." if len(rounds) > 1 else f"{rounds[0]} rounds."
    return "\n\n".join([machine_lines(records) + f" {said}", table(head, rows, left=2)])


def bytes_block(records: list[Record]) -> str:
    """Bytes that a rank sends, over the bytes of all matrices: the same for every set."""
    sent: dict[tuple[str, str], dict[int, set[str]]] = {}
    for (_, ranks), layouts in cases(records).items():
        for layout, case in layouts.items():
            for name, row in float32_rows(case).items():
                by_ranks = sent.setdefault((layout, name.removesuffix(", muonkit's products")), {})
                by_ranks.setdefault(ranks, set()).add(f"{row['sent_of_all']:.3f}")
    counts = sorted({ranks for by_ranks in sent.values() for ranks in by_ranks})
    rows = [
        [layout, name, *(" to ".join(sorted(by_ranks[ranks])) for ranks in counts)]
        for layout in ("fsdp2", "ddp")
        for (of, name), by_ranks in sent.items()
        if of == layout
    ]
    return table(["layout", "who", *(f"{ranks} ranks" for ranks in counts)], rows, left=2)


def kill_block(records: list[Record]) -> str:
    (record,) = records
    runs, equal = record["runs"], "parameters\nequal, bit for bit, to those of a run"
    slowest = max(run["seconds_to_end"] for run in runs)
    said = (
        f"A rank was killed at a random moment in {len(runs)} trainings with checkpoints. All "
        f"other ranks\nended with an error within {slowest:.1f} s, and every resumed run ended "
        f"with {equal} that was never interrupted."
    )
    return f"{machine_lines(records)}\n\n{said}"


def period_block(records: list[Record]) -> str:
    """A step with a period of five beside one without, and their bytes."""
    (record,) = records
    period, rows = record["period"], []
    for case in record["cases"]:
        every, periodic = (
            sum(case["bytes"][f"period={p}"]) / period / case["ranks"] for p in (1, period)
        )
        whole, blocks = case["flops"]
        times = [
            spread(case[kind][what])
            for what in ("step_of_blocks", "mean_of_period")
            for kind in ("cpu", "clock")
        ]
        sent = f"{every / 2**20:.2f}", f"{periodic / 2**20:.2f}"
        place = case["layout"], case["set"], case["ranks"]
        ms = f"{case['cpu']['ms']:.0f}, {case['clock']['ms']:.0f}"
        rows.append([*place, *sent, f"{blocks / whole:.2f}", ms, *times])
    head = ["layout", "matrices", "ranks", "MiB sent", f"with period={period}"]
    head += ["FLOPs of a step of blocks", "ms of the CPU, clock"]
    head += [f"{what}, {kind}" for what in ("step of blocks", f"mean of {period}")
             for kind in ("CPU", "clock")]  # fmt: skip
    rounds = sorted({case["rounds"] for case in record["cases"]})
    said = f" {rounds[0]} to {rounds[-1]} rounds."
    return "\n\n".join([machine_lines(records) + said, table(head, rows, left=2)])


def period_losses_block(records: list[Record]) -> str:
    """Validation losses of whole trainings, by run."""
    (record,) = records
    found: dict[str, list[float]] = {}
    for run in record["runs"]:
        found.setdefault(run["run"], []).append(run["validation"])
    first = next(iter(found.values()))
    rows = []
    for name, losses in found.items():
        differences = [a - b for a, b in zip(losses, first, strict=True)]
        mean = sum(differences) / len(differences)
        rows.append([name, *(f"{loss:.3f}" for loss in losses), f"{mean:+.3f}"])
    seeds = [f"seed {number}" for number in range(len(first))]
    head = ["run", *seeds, "mean difference"]
    return "\n\n".join([machine_lines(records), table(head, rows)])


BLOCKS = {
    "ranks-losses": ("losses", losses_block),
    "ranks-step": ("distributed", step_block),
    "ranks-bytes": ("distributed", bytes_block),
    "ranks-kill": ("kill", kill_block),
    "ranks-period": ("period-step", period_block),
    "ranks-period-losses": ("period-train", period_losses_block),
}
