"""On the site the tutorial's notebooks are pages: `mkdocs.yml` names this file under `hooks`.

They are kept as text that Jupyter opens; here jupytext writes them as Markdown, and their equations
become MathML, which browsers draw without a script. Outputs are not there: nothing is executed.
"""

from __future__ import annotations

import re
from typing import Any

import jupytext
from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files

NOTEBOOK = re.compile(r"tutorial/\d\d_\w+\.py")
DISPLAYED = re.compile(r"\$\$(.+?)\$\$", re.DOTALL)
INLINE = re.compile(r"\$([^$\n]+(?:\n[^$\n]+)?)\$")
NOTE = (
    "*This is a notebook: open it and run it ([how](index.md#open-one)). Here are its text and "
    "code, without what the cells print and draw.*"
)


def on_files(files: Files, config: Any) -> Files:
    for file in list(files):
        if NOTEBOOK.fullmatch(file.src_uri):
            page = file.src_uri.removesuffix(".py") + ".md"
            files.append(File.generated(config, page, content=as_markdown(file.abs_src_path)))
            files.remove(file)
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links between the notebooks lead from page to page."""
    if page.file.src_uri.startswith("tutorial/"):
        return re.sub(r"\((\d\d_\w+)\.py\)", r"(\1.md)", markdown)
    return markdown


def as_markdown(path: str | None) -> str:
    parts = []
    for cell in jupytext.read(path).cells:
        if cell.cell_type == "markdown":
            parts.append(INLINE.sub(_inline, DISPLAYED.sub(_displayed, cell.source)))
        elif cell.source:
            parts.append(f"```python\n{cell.source}\n```")
    return "\n\n".join([parts[0], NOTE, *parts[1:]]) + "\n"


def _inline(found: re.Match[str]) -> str:
    # Markdown takes a <math> that begins a line for a block.
    return f"<span>{convert(found[1])}</span>"


def _displayed(found: re.Match[str]) -> str:
    return "\n\n" + convert(found[1], display="block") + "\n\n"
