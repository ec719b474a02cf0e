"""Write the tables of docs/performance.md from measurements.

    python benchmarks/performance_page.py docs/performance/*.json --page docs/performance.md

The files are what step.py, errors.py, train_overhead.py, gpu.py and kernel_blocks.py write with
--json; several of a kind go into one table. Between `<!-- begin: NAME -->` and `<!-- end: NAME -->`
everything is replaced; the text around it is written by hand. A block whose kind is not among the
files stays as it is.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

Record = dict[str, Any]


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table; the first column to the left, the others to the right."""
    lines = [head, ["---", *["--:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def machine_line(record: Record) -> str:
    m = record["machine"]
    cores = f"{m['cores']} core{'s' if m['cores'] != 1 else ''}"
    threads = f"{m['threads']} thread{'s' if m['threads'] != 1 else ''}"
    return (
        f"`{m['command']}` on {m['cpu']}, {cores}, {threads}, {m['capability']}, "
        f"{m['system']}; torch {m['torch']}, Python {m['python']}; {m['date']}."
    )


def machine_lines(records: Iterable[Record]) -> str:
    """A list in Markdown: one command and its machine each."""
    return "\n".join(f"- {machine_line(record)}" for record in records)


def spread(quartiles: Sequence[float], digits: int = 2) -> str:
    low, middle, high = quartiles
    return f"{middle:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def mib(value: float | None) -> str:
    return "" if value is None else f"{value / 2**20:.1f}"


def merged_sets(records: list[Record]) -> dict[str, Record]:
    """The sets of several step files; the last one measured counts."""
    return {name: result for record in records for name, result in record["sets"].items()}


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


def step_details(name: str, s: Record) -> str:
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
    return f"### {name}\n\n" + table(head, rows)


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
    sets = merged_sets(records)
    parts = [machine_lines(records), step_summary(sets)]
    parts += [step_details(name, s) for name, s in sets.items()]
    notes = step_notes(sets)
    return "\n\n".join([*parts, "### Notes\n\n" + notes] if notes else parts)


def memory_block(records: list[Record]) -> str:
    rows = []
    for name, s in merged_sets(records).items():
        ours = s["rows"]["muonkit"]
        cells = [name, mib(ours["state_bytes"]), mib(ours["peak_bytes"])]
        for peer in ("torch fp32", s["best_peer"]):
            cells.append(mib(s["rows"].get(peer, {}).get("peak_bytes")))
        rows.append([*cells, s["best_peer"] or ""])
    head = ["set", "state, MiB", "peak, MiB", "torch fp32: peak", "best peer: peak", "best peer"]
    return table(head, rows)


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
        m = r["model"]
        rows.append(
            [
                f"{m['layers']} layers, d = {m['width']}, context {m['context']}",
                f"{r['parameters'] / 1e6:.2f} M",
                r["tokens"],
                f"{r['muonw']['step_ms']:.1f}",
                f"{r['adamw']['step_ms']:.1f}",
                spread(r["ratio"], 3),
                f"{r['muonw']['share']:.1%}",
                f"{r['adamw']['share']:.1%}",
                f"{r['tokens'] / r['muonw']['step_ms'] * 1e3:.0f}",
            ]
        )
    head = ["GPT", "parameters", "tokens a step", "MuonW, ms", "AdamW, ms", "ratio"]
    head += ["MuonW's share", "AdamW's share", "tokens/s with MuonW"]
    return machine_lines(records) + "\n\n" + table(head, rows)


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
        parts += [gpu_line(record), table(head, rows), said]
    return "\n\n".join(parts)


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


# block of the page -> kind of file it is made from, and how
BLOCKS: dict[str, tuple[str, Callable[[list[Record]], str]]] = {
    "step": ("step", step_block),
    "memory": ("step", memory_block),
    "errors": ("errors", errors_block),
    "overhead": ("overhead", overhead_block),
    "gpu-step": ("gpu", gpu_step_block),
    "gpu-products": ("kernel_blocks", gpu_products_block),
}


def replace_block(page: str, name: str, content: str) -> str:
    """The page with ``content`` between the markers of the block ``name``.

    Raises:
        ValueError: the page is without the markers.
    """
    begin, end = f"<!-- begin: {name} -->", f"<!-- end: {name} -->"
    if page.count(begin) != 1 or page.count(end) != 1 or page.index(end) < page.index(begin):
        raise ValueError(
            f"the page needs {begin!r} once and {end!r} once after it: put both markers where "
            "the table belongs"
        )
    block = f"{begin}\n{content}\n{end}"
    pattern = re.escape(begin) + ".*?" + re.escape(end)
    return re.sub(pattern, lambda _: block, page, flags=re.DOTALL)


def rewrite(page: str, records: list[Record]) -> str:
    """The page with every block renewed whose kind is among the records.

    Raises:
        ValueError: a file of an unknown kind, or a page without the markers of a block.
    """
    kinds = {kind for kind, _ in BLOCKS.values()}
    for record in records:
        if record.get("kind") not in kinds:
            raise ValueError(
                f"got a file of kind {record.get('kind')!r}, expected one of {sorted(kinds)}: "
                "give what step.py, errors.py, train_overhead.py, gpu.py or kernel_blocks.py "
                "write with --json"
            )
    for name, (kind, make) in BLOCKS.items():
        chosen = [record for record in records if record["kind"] == kind]
        if chosen:
            page = replace_block(page, name, make(chosen))
    return page


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--page", type=Path, required=True)
    parser.add_argument("--plot", type=Path, help="also draw what step.py measured")
    options = parser.parse_args()
    try:
        records = [json.loads(file.read_text()) for file in options.files]
        page = rewrite(options.page.read_text(), records)
    except (OSError, ValueError) as error:  # JSONDecodeError is a ValueError
        print(f"performance_page.py: {error}", file=sys.stderr)
        return 2
    options.page.write_text(page)
    steps = [record for record in records if record["kind"] == "step"]
    if options.plot and steps:
        from step import plot

        plot(merged_sets(steps), steps[-1]["machine"], options.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
