"""The generated blocks of docs/performance.md and docs/choosing.md: `pages.py` writes them.

Each function gets the records of one kind, as the scripts write them with --json.
"""

from __future__ import annotations

import statistics

from harness import quartiles
from kernels import HEAD
from parts import Record, machine_line, machine_lines, mib, spread, table
from train_overhead import what_and_how_much

from muonkit.lab.results import p_value


def merged_sets(records: list[Record]) -> dict[str, Record]:
    """The sets of several step files; the last one measured counts."""
    return {name: result for record in records for name, result in record["sets"].items()}


def by_cpu(records: list[Record]) -> dict[str, list[Record]]:
    """The records by what the CPU can do, "AVX2" first: most of the page speaks of it."""
    found: dict[str, list[Record]] = {}
    for record in sorted(records, key=lambda record: record["machine"]["capability"] != "AVX2"):
        found.setdefault(record["machine"]["capability"], []).append(record)
    return found


def sets_of_all(records: list[Record]) -> dict[str, Record]:
    """The sets of every kind of CPU, by both names."""
    return {
        f"{name}, {cpu}": s
        for cpu, some in by_cpu(records).items()
        for name, s in merged_sets(some).items()
    }


def step_summary(sets: dict[str, Record]) -> str:
    rows = []
    for name, s in sets.items():
        ours, best = s["rows"]["muonkit"], s["best_peer"]
        fp32 = s["rows"].get("torch fp32")
        against = "" if best is None else spread([1 / q for q in _reversed(s["rows"][best])])
        rows.append(
            [
                name,
                s["matrices"],
                f"{s['gflop']:.1f}" if s["gflop"] >= 10 else f"{s['gflop']:.3f}",
                f"{ours['ms']:.2f}",
                f"{ours['effective_gflops']:.0f}",
                f"{s['product_gflops']:.0f} ({s['sustained_gflops']:.0f})",
                f"{ours['share_of_limit']:.0%}",
                ours["operations"],
                best or "none installed",
                against,
                "" if fp32 is None else spread([1 / q for q in _reversed(fp32)]),
            ]
        )
    head = ["set", "matrices", "GFLOP", "ms", "GFLOP/s", "best product (median)", "of the limit"]
    head += ["operations", "best peer", "of its time", "of torch fp32's time"]
    return table(head, rows)


def _reversed(row: Record) -> list[float]:
    return list(reversed(row["times_muonkit"]))


def step_details(name: str, s: Record, cpu: str) -> str:
    rows = []
    for peer, r in sorted(s["rows"].items(), key=lambda item: item[1]["ms"]):
        rows.append(
            [
                peer,
                r["products"],
                f"{r['ms']:.2f}",
                spread(r["times_muonkit"]),
                f"{r['share_of_limit']:.0%}",
                "" if r["operations"] is None else r["operations"],
                "" if r["calls"] is None else r["calls"],
                f"{r['first_ms'] / 1e3:.1f}",
                f"{r['distance_of_first_step']:.0e}",
                r["rounds"],
            ]
        )
    head = ["implementation", "products", "ms", "× muonkit", "of the limit", "operations", "calls"]
    head += ["first step, s", "distance", "rounds"]
    return f"#### {name}, {cpu}\n\n" + table(head, rows)


def step_notes(sets: dict[str, Record]) -> str:
    """Versions, what differs, and who did not run and why; each said once."""
    notes: dict[str, list[str]] = {}
    reasons: dict[tuple[str, str], list[str]] = {}
    for set_name, s in sets.items():
        for peer, r in s["rows"].items():
            said = [f"version {r['version']}"] if r["version"] else []
            said += [r["differs"]] if r["differs"] else []
            said += ["writes into the gradients"] if r["writes_gradients"] else []
            views = r["given_as_matrices"]
            said += [f"given {' and '.join(views)} as separate 2-D matrices"] if views else []
            for note in said:
                if note not in notes.setdefault(peer, []):
                    notes[peer].append(note)
        for peer, reason in s["absent"].items():
            reasons.setdefault((peer, reason), []).append(set_name)
    for (peer, reason), where in reasons.items():
        where_said = f"{', '.join(where)}: " if len(where) < len(sets) else ""
        notes.setdefault(peer, []).append(where_said + reason)
    return "\n".join(f"- **{peer}**: {'; '.join(said)}" for peer, said in notes.items() if said)


def step_block(records: list[Record]) -> str:
    parts = []
    for cpu, some in by_cpu(records).items():
        sets = merged_sets(some)
        parts += [f"### {cpu}", machine_lines(some), step_summary(sets)]
        parts += [step_details(name, s, cpu) for name, s in sets.items()]
    notes = step_notes(sets_of_all(records))
    return "\n\n".join([*parts, "### Notes\n\n" + notes] if notes else parts)


def memory_block(records: list[Record]) -> str:
    rows = []
    for name, s in sets_of_all(records).items():
        ours = s["rows"]["muonkit"]
        cells = [name, mib(ours["state_bytes"]), mib(ours["peak_bytes"])]
        for peer in ("torch fp32", s["best_peer"]):
            cells.append(mib(s["rows"].get(peer, {}).get("peak_bytes")))
        rows.append([*cells, s["best_peer"] or ""])
    head = ["set", "state, MiB", "peak, MiB", "torch fp32: peak", "best peer: peak", "best peer"]
    return table(head, rows)


def moved_block(records: list[Record]) -> str:
    (record,) = records
    rows = []
    for name, found in record["sets"].items():
        for who, each in found["moved"].items():
            others = each["all"] - each["products"]
            cells = [name, who, mib(each["all"]), f"{each['all'] / found['fewest']:.2f}"]
            rows.append([*cells, mib(each["products"]), mib(others)])
    head = ["set", "implementation", "moved, MiB", "of the fewest", "by products", "by all else"]
    return table(head, rows, left=2)


def errors_block(records: list[Record]) -> str:
    rows = [
        [
            r["dtype"],
            r["spectrum"],
            r["form"],
            f"{r['keller']:.1e}" if "keller" in r else "",
            f"{r['error']:.1e}",
            r["worst_schedule"],
            f"{r['times_standard']:.2f}",
            f"{r['sigma']:.3f}",
        ]
        for record in records
        for r in record["rows"]
    ]
    head = ["dtype", "spectrum", "form", "keller", "worst schedule", "which", "× standard"]
    found = [f"- {line}" for record in records for line in record["failures"]]
    parts = [machine_lines(records), table([*head, "largest σ"], rows)]
    return "\n\n".join([*parts, "Out of bounds:\n\n" + "\n".join(found)] if found else parts)


def overhead_block(records: list[Record]) -> str:
    rows = []
    for r in records:
        rows.append(
            [
                what_and_how_much(r)[0],
                r["machine"]["capability"],
                f"{r['parameters'] / 1e6:.2f} M",
                what_and_how_much(r)[1],
                f"{r['muonw']['step_ms']:.1f}",
                f"{r['adamw']['step_ms']:.1f}",
                spread(r["ratio"], 3),
                f"{r['muonw']['share']:.1%}",
                f"{r['adamw']['share']:.1%}",
            ]
        )
    head = ["model", "CPU", "parameters", "a step", "MuonW, ms", "AdamW, ms", "ratio"]
    head += ["MuonW's share", "AdamW's share"]
    return machine_lines(records) + "\n\n" + table(head, rows)


def whole_steps(records: list[Record]) -> list[tuple[str, str, str, str]]:
    """Size, step with MuonW, with AdamW, and their ratio, as the README quotes them: on a GPU and
    on a CPU with AVX2.
    """
    found = []
    for r in records:
        if r["kind"] == "gpu":
            ms = [1e3 * statistics.median(s) for s in r["training"]["seconds"].values()]
            size = f"{r['training']['tokens']:,} tokens"
            found.append((size, *ms, r["training"]["times_adamw"][1]))
        elif r["kind"] == "overhead" and r["machine"]["capability"] == "AVX2":
            ms = [r[name]["step_ms"] for name in ("muonw", "adamw")]
            found.append((what_and_how_much(r)[1], *ms, r["ratio"][1]))
    return [
        (size, *(f"{ms:.{1 if ms < 100 else 0}f} ms" for ms in two), f"{ratio:.2f}")
        for size, *two, ratio in found
    ]


def monitor_block(records: list[Record]) -> str:
    parts = []
    for r in records:
        sample, other = (r[key] for key in ("sample_ms", "other_ms"))
        rows = [
            ["a step", f"{r['step_ms']:.0f} ms"],
            ["a sampled step takes longer by", f"{spread(sample, 0)} ms"],
            ["any other by", f"{spread(other, 0)} ms; its hooks take {r['hooks_us']:.1f} µs"],
            *([f"overhead at `every={n}`", f"{x:.2%}"] for n, x in r["overhead"].items()),
        ]
        size = f"{r['matrices']} matrices, {r['tokens']:,} tokens a step"
        parts += [machine_line(r), table([size, "median [quartiles]"], rows)]
    return "\n\n".join(parts)


def kernels_block(records: list[Record]) -> str:
    """float16 is left out: it is as bfloat16, with a few registers less."""
    (record,) = records
    rows = [row for row in record["rows"] if row[1] != "fp16"]
    made = f"`{record['command']}`: Triton {record['triton']}, torch {record['torch']}; "
    return f"{made}{record['date']}.\n\n{table(HEAD, rows, left=4)}"


def gpu_line(record: Record) -> str:
    m = record["machine"]
    return f"`{m['command']}` on {m['device']}; torch {m['torch']}; {m['date']}."


def gpu_step_block(records: list[Record]) -> str:
    parts = []
    for record in records:
        rows = []
        for name, found in record["steps"].items():
            for optimizer in found["called"]:
                row: list[object] = [f"{name}, {found['parameters'] / 1e6:.0f} M", optimizer]
                for how in ("called", "replayed"):
                    own = found[how][optimizer]
                    middle = statistics.median(own["seconds"])
                    row += [f"{middle * 1e3:.2f}", spread(own["times_muonkit"])]
                share = found["limit"] / middle
                rows.append([*row, "" if "AdamW" in optimizer else f"{share:.0%}"])
        head = ["hidden matrices", "optimizer", "called, ms", "× ours"]
        head += ["replayed, ms", "× ours", "of the limit"]
        whole = record["training"]
        ms = {n: statistics.median(taken) * 1e3 for n, taken in whole["seconds"].items()}
        said = (
            f"A whole training step of GPT-2 small ({whole['parameters'] / 1e6:.0f} M parameters, "
            f"{whole['tokens']:,} tokens, bfloat16 autocast, not compiled): "
            + ", ".join(f"{n} {taken:.1f} ms" for n, taken in ms.items())
            + f"; ratio {spread(whole['times_adamw'], 3)}."
        )
        parts += [gpu_line(record), table(head, rows), said, *gpu_further(record)]
    return "\n\n".join(parts)


def gpu_further(record: Record) -> list[str]:
    """What a newer file has beside steps and training, one sentence each."""

    def times(seconds: dict[str, list[float]], base: str) -> str:
        found = []
        for name, taken in seconds.items():
            if name != base:
                ratios = [a / b for a, b in zip(taken, seconds[base], strict=True)]
                found.append(f"{name} {spread(quartiles(ratios))}")
        return ", ".join(found)

    parts = []
    for name, found in record.get("carried", {}).items():
        if len(found["seconds"]) > 1:
            others = times(found["seconds"], "muonkit")
            parts.append(f"A step over {name}'s matrices, times ours: {others}.")
    for name, seconds in record.get("options", {}).items():
        parts.append(f"With options over {name}'s, times plain: {times(seconds, 'plain')}.")
    for name, peak in record.get("peak", {}).items():
        each = ", ".join(f"{who} {mib(count)} MiB" for who, count in peak.items())
        parts.append(f"The most memory that a step over {name}'s holds beyond its state: {each}.")
    return parts


def gpu_products_block(records: list[Record]) -> str:
    parts = []
    for record in records:
        rows = []
        for row in record["rows"]:
            batch, m, k = row["shape"]
            seconds = row["seconds"]
            if row["table"] not in seconds:
                continue
            rate = 2e-12 * batch * m * m * k
            best = min((t, n) for n, t in seconds.items() if n != "torch")
            kind = "XᵀX" if row["tall"] else "XXᵀ" if m != k else "aI + bA + cA²"
            rows.append(
                [
                    f"{row['dtype']} {batch} × {m} × {k}",
                    kind,
                    f"{rate / seconds['torch']:.0f}",
                    f"{rate / seconds[row['table']]:.0f}",
                    f"{seconds['torch'] / seconds[row['table']]:.2f}",
                    f"{rate / best[0]:.0f}",
                ]
            )
        head = ["product", "of", "torch", "the kernel", "× torch", "best tried"]
        parts += [gpu_line(record), table(head, rows)]
    return "\n\n".join(parts)


def options_block(records: list[Record]) -> str:
    parts = []
    for record in records:
        rows = [
            [
                f"`{name}`",
                f"{row['ms']:.1f}",
                spread(row["ratio"]),
                mib(row["state"]),
                mib(row["peak"]),
            ]
            for name, row in record["rows"].items()
        ]
        head = ["option", "ms", "× the defaults", "state, MiB", "peak, MiB"]
        parts += [machine_line(record), table(head, rows)]
    return "\n\n".join(parts)


def _of_rows(record: Record) -> str:
    return machine_line({"runs": list(record["rows"].values())})


def int8_errors_block(records: list[Record]) -> str:
    (record,) = records
    keys = ("momentum", "momentum_worst", "update", "update_worst")
    rows = [
        [f"{task}, {found['steps']} steps", name, *(f"{row[key]:.3f}" for key in keys)]
        for task, found in record["rows"].items()
        for name, row in found["rows"].items()
    ]
    head = ["gradients of", "kept in", "momentum", "worst matrix", "update", "worst matrix"]
    return "\n\n".join([_of_rows(record), table(head, rows, left=2)])


def int8_step_block(records: list[Record]) -> str:
    (record,) = records
    rows = []
    for found in record["rows"].values():
        whole = found["rows"]["float32"]["state"]
        rows += [
            [
                f"`{name}`",
                spread(row["ratio"]),
                mib(row["state"]),
                f"{row['state'] / whole:.3f}",
            ]
            for name, row in found["rows"].items()
        ]
    head = ["momentum_dtype", "× float32's step", "state, MiB", "× float32's"]
    return "\n\n".join([_of_rows(record), table(head, rows)])


def int8_losses_block(records: list[Record]) -> str:
    (record,) = records
    rows = [
        [task, found["budget"], found["text"]["muonw"], found["text"]["int8"], p_value(found["p"])]
        for task, found in record["rows"].items()
    ]
    head = ["task", "length", "validation loss, float32", "int8", "p"]
    return "\n\n".join([_of_rows(record), table(head, rows)])


MONITOR = {"monitor": ("monitor", monitor_block)}
KERNELS = {"kernels": ("kernels", kernels_block)}
BLOCKS = {
    "step": ("step", step_block),
    "memory": ("step", memory_block),
    "moved": ("moved", moved_block),
    "errors": ("errors", errors_block),
    "overhead": ("overhead", overhead_block),
    "gpu-step": ("gpu", gpu_step_block),
    "gpu-products": ("kernel_blocks", gpu_products_block),
}
CHOOSING = {
    "options": ("options", options_block),
    "int8-errors": ("int8-errors", int8_errors_block),
    "int8-step": ("int8-step", int8_step_block),
    "int8-losses": ("int8-losses", int8_losses_block),
}
