"""The table of docs/api/options.md: `python -m tests.helpers.option_table` renews it."""

from __future__ import annotations

from muonkit.options import OPTIONS
from tests.helpers.paths import DOCS

PAGE = DOCS / "api" / "options.md"

HEAD = """# All options

Every argument of `Muon` beside the parameters; `MuonW` has them too, and its own defaults where it
routes. [Choosing options](../choosing.md) says what to change when. This page is written from
`muonkit/options.py`.

| option | default | key in groups of | what it is | choices |
| --- | --- | --- | --- | --- |
"""


def page() -> str:
    rows = []
    for row in OPTIONS:
        owners = ", ".join(row.owners) or (f"adamw, as `{row.fills}`" if row.fills else "none")
        choices = ", ".join([*(f'`"{name}"`' for name in row.choices), *filter(None, [row.also])])
        rows.append(f"| `{row.name}` | `{row.default!r}` | {owners} | {row.text} | {choices} |")
    return HEAD + "\n".join(rows) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
