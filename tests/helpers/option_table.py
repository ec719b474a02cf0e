"""The tables of docs/api/options.md: `python -m tests.helpers.option_table` renews them."""

from __future__ import annotations

import re

from muonkit.options import OPTIONS, Option
from tests.helpers.paths import DOCS

PAGE = DOCS / "api" / "options.md"

HEAD = """| option | default | key in groups of | what it is | choices |
| --- | --- | --- | --- | --- |
"""


def page() -> str:
    """The page with its tables as they should be; the text around them stays."""
    tables = {
        "all but the ranks'": [row for row in OPTIONS if not row.ranks],
        "the ranks'": [row for row in OPTIONS if row.ranks],
    }
    text = PAGE.read_text(encoding="utf-8")
    for name, rows in tables.items():
        begin, end = f"<!-- options: {name} -->\n\n", "\n<!-- end of options -->\n"
        found = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
        (old,) = found.findall(text)
        text = text.replace(old, begin + table(rows) + end)
    return text


def table(options: list[Option]) -> str:
    rows = []
    for row in options:
        owners = ", ".join(row.owners) or (f"adamw, as `{row.fills}`" if row.fills else "none")
        choices = ", ".join([*(f'`"{name}"`' for name in row.choices), *filter(None, [row.also])])
        rows.append(f"| `{row.name}` | `{row.default!r}` | {owners} | {row.text} | {choices} |")
    return HEAD + "\n".join(rows) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
