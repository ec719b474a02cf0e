"""Write the tables of the pages under docs/ from measurements.

    python benchmarks/pages.py                                       # every page, from docs/
    python benchmarks/pages.py docs/performance/step.json --page docs/performance.md --plot step.svg

The files are what the scripts write with --json. Between `<!-- begin: NAME -->` and
`<!-- end: NAME -->` everything is replaced; the text around it is written by hand. Several files of
a kind go into one table; a block whose kind is not among the files stays as it is.

docs/evidence.md, docs/learning-rate.md, docs/mup.md, docs/finetuning.md, docs/qk-clip.md,
docs/conformance.md, docs/distributed/layouts.md and the stages of docs/choosing.md are written by
the scripts that make their figures.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import distributed_page
import performance_page
from parts import Record, replace_block

DOCS = Path(__file__).parents[1] / "docs"

# Block of a page -> the kind of file that it is made from, and how.
Blocks = dict[str, tuple[str, Callable[[list[Record]], str]]]


class Page(NamedTuple):
    files: str  # below docs/
    blocks: Blocks


PAGES = {
    "performance.md": Page("performance/*.json", performance_page.BLOCKS),
    "choosing.md": Page("choosing/*.json", performance_page.CHOOSING),
    "monitor.md": Page("monitor/*.json", performance_page.MONITOR),
    "kernels.md": Page("kernels/*.json", performance_page.KERNELS),
    "distributed.md": Page("distributed/*.json", distributed_page.BLOCKS),
}


def rewrite(page: str, blocks: Blocks, records: list[Record]) -> str:
    """The page with every block renewed whose kind is among the records.

    Raises:
        ValueError: a file of an unknown kind, or a page without the markers of a block.
    """
    kinds = {kind for kind, _ in blocks.values()}
    for record in records:
        if record.get("kind") not in kinds:
            raise ValueError(
                f"got a file of kind {record.get('kind')!r}, expected one of {sorted(kinds)}: "
                "give what the benchmarks write with --json"
            )
    for name, (kind, make) in blocks.items():
        chosen = [record for record in records if record["kind"] == kind]
        if chosen:
            page = replace_block(page, name, make(chosen))
    return page


def read(files: list[Path]) -> list[Record]:
    return [json.loads(file.read_text(encoding="utf-8")) for file in files]


def renewed() -> dict[Path, str]:
    """Every page as the files in docs/ make it."""
    return {
        DOCS / name: rewrite(
            (DOCS / name).read_text(encoding="utf-8"),
            page.blocks,
            read(sorted(DOCS.glob(page.files))),
        )
        for name, page in PAGES.items()
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", type=Path, nargs="*")
    parser.add_argument("--page", type=Path, help=f"one of {', '.join(PAGES)}, from these files")
    parser.add_argument("--plot", type=Path, help="also draw what step.py measured")
    options = parser.parse_args()
    if bool(options.files) != bool(options.page):
        parser.error("files and --page are given together")
    if options.page and options.page.name not in PAGES:
        parser.error(f"--page {options.page}: expected one of {', '.join(PAGES)}")
    try:
        if options.page:
            records = read(options.files)
            text = options.page.read_text(encoding="utf-8")
            pages = {options.page: rewrite(text, PAGES[options.page.name].blocks, records)}
        else:
            records, pages = read(sorted(DOCS.glob("performance/*.json"))), renewed()
    except (OSError, ValueError) as error:  # JSONDecodeError is a ValueError
        print(f"pages.py: {error}", file=sys.stderr)
        return 2
    for path, text in pages.items():
        path.write_text(text, encoding="utf-8")
    steps = [record for record in records if record["kind"] == "step"]
    if options.plot and steps:
        from step import plot

        steps = next(iter(performance_page.by_cpu(steps).values()))  # a plot is of one kind
        dates = {record["machine"]["date"] for record in steps}
        span = {"date": " to ".join(sorted({min(dates), max(dates)}))}
        plot(performance_page.merged_sets(steps), steps[-1]["machine"] | span, options.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
