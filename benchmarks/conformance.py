"""Hold every public Muon to the laws of `muonkit.testing`, and write docs/conformance.md.

    python benchmarks/conformance.py                    # all that are installed, and the page
    python benchmarks/conformance.py --only torch_muon keller
    python benchmarks/conformance.py --page             # the page alone, from its files

Each implementation (conformance_subjects.py) is tried as users try theirs, in a process of its own:
pytest --pyargs muonkit.testing --optimizer conformance_subjects.py:NAME. What is not installed
(requirements-peers.txt) keeps the file that it has.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from conformance_subjects import ENTRIES, NOT_JUDGED
from machine import facts
from parts import Record, replace_block, table

from muonkit.testing import LAWS

HERE = Path(__file__).parent
DOCS = HERE.parent / "docs"
FILES, PAGE = DOCS / "conformance", DOCS / "conformance.md"
# What each is called in the table.
SHORT = {
    "muon": "muonkit Muon",
    "muonw": "muonkit MuonW",
    "torch_muon": "torch",
    "torch_plain_momentum": "torch, no Nesterov",
    "pytorch_optimizer": "pytorch_optimizer",
    "optimuon": "optimuon",
    "muonium": "muonium",
    "dtensor_muon": "dtensor-muon",
    "gram_newton_schulz": "gram-newton-schulz",
    "heavyball": "heavyball",
    "emerging": "emerging-optimizers",
    "keller": "Keller Jordan's",
    "omnimuon": "omnimuon",
}


def version(name: str) -> str | None:
    """Of the package that has it, where it is installed."""
    package = ENTRIES[name].package
    if package is None:
        package = "muonkit" if name in ("muon", "muonw") else "torch"
    try:
        return f"{package} {importlib.metadata.version(package)}"
    except importlib.metadata.PackageNotFoundError:
        return "this checkout" if package == "muonkit" else None


def try_one(name: str, timeout: float) -> Record:
    """What became of the laws, by the command that users have.

    Raises:
        RuntimeError: the run did not come to its end; the message ends with what it said.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "found.json"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
        command += ["-p", "muonkit.testing.plugin", "--pyargs", "muonkit.testing"]
        command += ["--optimizer", f"{HERE / 'conformance_subjects.py'}:{name}"]
        done = subprocess.run(
            [*command, "--conformance-json", str(file)],
            cwd=folder,  # no conftest of ours
            # Some compile for every shape; what is compiled is not what the laws are about.
            env={**os.environ, "TORCHDYNAMO_DISABLE": "1", "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        if not file.exists():
            raise RuntimeError(f"{name} came to no end: {(done.stdout + done.stderr)[-800:]}")
        found: Record = json.loads(file.read_text(encoding="utf-8"))
    entry, machine = ENTRIES[name], facts()
    kept = {key: machine[key] for key in ("cpu", "capability", "date", "python", "torch")}
    return {
        "kind": "conformance",
        "optimizer": name,
        "version": version(name),
        "adapted": entry.adapted,
        "machine": kept,
        "laws": found["laws"],
    }


# --- the page -----------------------------------------------------------------------------------

MARKS = {"pass": "✓", "fail": "**✗**", "does not claim": "–"}


def _mark(row: Record | None) -> str:
    if row is None:
        return "–"
    return "(✗)" if row.get("deliberate") else MARKS[row["verdict"]]


def _rows(record: Record) -> dict[str, Record]:
    return {row["law"]: row for row in record["laws"]}


def _counts(record: Record) -> tuple[int, int, int]:
    rows = record["laws"]
    verdicts = [row["verdict"] for row in rows]
    return tuple(verdicts.count(verdict) for verdict in MARKS)  # type: ignore[return-value]


def summary(records: list[Record]) -> str:
    rows = [
        [SHORT[record["optimizer"]], record["version"], *_counts(record), record["adapted"] or "–"]
        for record in records
    ]
    head = ["implementation", "version", "keeps", "breaks", "does not claim", "adapted"]
    return table(head, rows, left=2)


def laws_table(records: list[Record]) -> str:
    found = [_rows(record) for record in records]
    head = ["law", *(SHORT[record["optimizer"]] for record in records)]
    rows = [[_spoken(law), *(_mark(rows.get(law)) for rows in found)] for law in LAWS]
    return table(head, rows)


def _spoken(law: str) -> str:
    return law.replace("_", " ").replace("-on-", ", ").replace("-ranks", " ranks")


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ").replace("<", "&lt;")


def failures(records: list[Record]) -> str:
    """One list for each implementation; laws on ranks that fail alike are told once."""
    parts = []
    for record in records:
        broken = [row for row in record["laws"] if row["verdict"] == "fail"]
        entry = ENTRIES[record["optimizer"]]
        if not broken:
            continue
        lines = [f"**{SHORT[record['optimizer']]}** ({record['version']})", ""]
        for row in broken:
            where = f" {_cell(row['input'])}:" if row.get("input") else ""
            told = f"- *{_spoken(row['law'])}*:{where} {_cell(row['message'])}"
            law = row["law"].partition("-")[0]
            more = [
                f"On purpose: {row['deliberate']}." if row.get("deliberate") else "",
                entry.notes.get(law, ""),
                f"Known: <{entry.known[law]}>." if law in entry.known else "",
            ]
            lines.append(" ".join([told.rstrip(".") + ".", *filter(None, more)]))
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def stated() -> str:
    rows = []
    for law in LAWS.values():
        if law.world_size == 4 and law.name.replace("-4-", "-2-") in LAWS:
            continue
        name = _spoken(law.name.partition("-")[0])
        ranks = " Ranks." if law.world_size else ""
        claims = ", ".join(claim for claim in law.claims if claim != "matrices")
        rows.append([name, law.states + ranks, claims or "–", law.elsewhere])
    return table(["law", "what it states", "for those who claim", "elsewhere"], rows, left=4)


def not_judged() -> str:
    return "\n".join(f"- {what}: {why}." for what, why in NOT_JUDGED.items())


def read() -> list[Record]:
    """What was found, in the order of the table."""
    files = {name: FILES / f"{name}.json" for name in SHORT}
    there = [path for path in files.values() if path.exists()]
    return [json.loads(path.read_text(encoding="utf-8")) for path in there]


def numbers(records: list[Record]) -> str:
    others = [r for r in records if r["optimizer"] not in ("muon", "muonw")]
    broken = [row for r in others for row in r["laws"] if row["verdict"] == "fail"]
    chosen = sum(bool(row.get("deliberate")) for row in broken)
    ours = sum(_counts(r)[1] for r in records if r["optimizer"] in ("muon", "muonw"))
    dates = [record["machine"]["date"] for record in records]
    ends = sorted({min(dates), max(dates)})
    where = {f"torch {m['torch']}, {m['cpu']}" for m in (r["machine"] for r in records)}
    return (
        f"{len(LAWS)} laws, {len(records)} implementations; {len(broken)} failures found in "
        f"others, {chosen} of them on purpose; ours has {ours or 'none'}. {' to '.join(ends)}; "
        f"{' and '.join(sorted(where))}."
    )


def renewed(page: str, records: list[Record]) -> str:
    """The page as the files make it."""
    blocks = {
        "numbers": numbers(records),
        "summary": summary(records),
        "laws": laws_table(records),
        "failures": failures(records),
        "not judged": not_judged(),
        "stated": stated(),
    }
    for name, content in blocks.items():
        page = replace_block(page, name, content)
    return page


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=list(ENTRIES), metavar="NAME")
    parser.add_argument("--page", action="store_true", help="write the page alone, from the files")
    parser.add_argument("--timeout", type=float, default=900.0, help="seconds for one of them")
    options = parser.parse_args()
    for name in [] if options.page else options.only or SHORT:
        if version(name) is None:
            print(f"{name}: not installed, its file stays as it is")
            continue
        record = try_one(name, options.timeout)
        FILES.mkdir(exist_ok=True)
        written = json.dumps(record, indent=1, ensure_ascii=False) + "\n"
        (FILES / f"{name}.json").write_text(written, encoding="utf-8")
        kept, broken, unclaimed = _counts(record)
        print(f"{name}: keeps {kept}, breaks {broken}, does not claim {unclaimed}")
    PAGE.write_text(renewed(PAGE.read_text(encoding="utf-8"), read()), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
