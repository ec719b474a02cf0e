"""The tutorial's notebooks: executed once, kept with their outputs, and shown as pages.

They are written as text (tutorial/NN_name.py). `make tutorial` runs this file: what changed in its
code is executed, in full, and tutorial/NN_name.ipynb is what came out: a real notebook, which
Jupyter, GitHub and Colab open. These are in the repository, so that a build of the site executes
nothing and shows the same figures everywhere.

`mkdocs.yml` names this file under `hooks`: it makes a page of each notebook, with the outputs, and
ends the build where an .ipynb is not what its text says (`stale`). Cells with the tag "hide-input"
are folded; what the cell with the tag "result" shows is repeated at the top of the page. Equations
become MathML, which browsers draw without a script, and every picture gets a dark form.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import html
import itertools
import json
import os
import platform
import re
import sys
import time
import tomllib
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

import jupytext
import nbformat
from jupytext.combine import combine_inputs_with_outputs

import muonkit
from muonkit.lab.pictures import dark

ROOT = Path(__file__).resolve().parents[1]
TUTORIAL = ROOT / "docs" / "tutorial"
NOTEBOOK = re.compile(r"tutorial/(\d\d_\w+)\.py")
#: What a notebook's cells import from beside it.
BESIDE = {"06_many_ranks": ("ranks.py",)}
#: The line of every first cell that says where muonkit can be had.
ADDRESS = re.compile(r'^REPOSITORY = ""(  #.*)?$', re.MULTILINE)

# --- what is kept ----------------------------------------------------------------------------


def repository() -> str | None:
    """The repository's address: `Repository` under `[project.urls]` in pyproject.toml, if any.

    It is the one place for it; the install cells and the links to Colab are made from it.
    """
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    address = project.get("urls", {}).get("Repository")
    return address.removesuffix("/") if address else None


def sources() -> list[Path]:
    return sorted(TUTORIAL.glob("[0-9][0-9]_*.py"))


def kept(source: Path) -> Path:
    return source.with_suffix(".ipynb")


def key(source: Path) -> str:
    """What outputs depend on: the cells' code, the files beside it, and the version of muonkit.

    Not its source, which changes with every commit: what the cells assert is held by the tests.
    """
    cells = [cell.source for cell in jupytext.read(source).cells if cell.cell_type == "code"]
    files = [(TUTORIAL / name).read_text("utf-8") for name in BESIDE.get(source.stem, ())]
    text = json.dumps([cells, files, muonkit.__version__])
    return hashlib.sha256(text.encode()).hexdigest()


def written(source: Path) -> Any:
    """The notebook that the text stands for, without outputs."""
    notebook = jupytext.read(source)
    notebook.metadata.pop("jupytext", None)
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number}"
        if "hide-input" in cell.metadata.get("tags", ()):
            cell.metadata["jupyter"] = {"source_hidden": True}
            cell.metadata["cellView"] = "form"  # Colab's word for it
        if cell.cell_type == "code":
            cell.source = ADDRESS.sub(f'REPOSITORY = "{repository() or ""}"', cell.source)
    return notebook


def stale(source: Path) -> str | None:
    """Why the kept notebook is not what the text says; None if it is."""
    if not kept(source).exists():
        return "it was never executed"
    notebook = nbformat.read(kept(source), as_version=4)
    if notebook.metadata.get("muonkit", {}).get("key") != key(source):
        return "its outputs are of other code"
    new = written(source)
    same = [(c.cell_type, c.source, c.metadata) for c in new.cells] == [
        (c.cell_type, c.source, c.metadata) for c in notebook.cells
    ]
    return None if same else "its text is another"


def renew(source: Path, again: bool = False) -> str:
    """Bring the kept notebook up to date, executing it only if its code changed; what was done."""
    notebook, path, now = written(source), kept(source), key(source)
    old = nbformat.read(path, as_version=4) if path.exists() else None
    facts = old.metadata.get("muonkit", {}) if old is not None else {}
    if old is not None and facts.get("key") == now and not again:
        notebook = combine_inputs_with_outputs(notebook, old)
        notebook.metadata["muonkit"] = facts
        done = "text renewed" if stale(source) else "up to date"
    else:
        start = time.perf_counter()
        execute(notebook, cwd=source.parent)
        took = time.perf_counter() - start
        notebook.metadata["muonkit"] = {"key": now, **machine()}
        done = f"executed in {took:.0f} s"
    nbformat.write(notebook, path)
    return done


def machine() -> dict[str, str]:
    """Where the outputs are from."""
    import torch

    from muonkit.lab.report import environment

    return {
        "processor": f"{environment()['processor']}, one thread",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": date.today().isoformat(),
    }


def execute(notebook: Any, cwd: Path) -> None:
    """Run all cells in full, pictures as SVG.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell raised.
    """
    from jupyter_client.manager import KernelManager
    from nbclient import NotebookClient

    # One thread: sums are taken in the same order wherever it runs.
    environment = {**os.environ, "MUONKIT_TUTORIAL": "full", "OMP_NUM_THREADS": "1"}
    environment.pop("MPLBACKEND", None)
    manager = KernelManager(kernel_name="python3")
    manager.start_kernel(
        env=environment, cwd=str(cwd), extra_arguments=["--InlineBackend.figure_formats={'svg'}"]
    )
    try:
        NotebookClient(notebook, km=manager, timeout=3600).execute()
    finally:
        manager.shutdown_kernel(now=True)
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # when each cell began: another at each execution
        if cell.cell_type == "code":
            cell.execution_count = None
            cell.outputs = list(_merged(cell.outputs))


def _merged(outputs: list[Any]) -> Iterator[Any]:
    """The outputs with what is printed in a row as one, and pictures without their date."""
    last = None
    for output in outputs:
        if "execution_count" in output:
            output.execution_count = None
        svg = output.get("data", {}).get("image/svg+xml")
        if svg:
            lines = re.sub(r"<dc:date>.*?</dc:date>", "", svg).splitlines()
            output.data["image/svg+xml"] = "\n".join(line.rstrip() for line in lines)
        if last is not None and output.get("name") == last.get("name") is not None:
            last.text += output.text
            continue
        if last is not None:
            yield last
        last = output
    if last is not None:
        yield last


# --- pages -----------------------------------------------------------------------------------


def on_config(config: Any) -> None:
    """End the build where a page would show what its code does not print."""
    from mkdocs.exceptions import PluginError

    found = {source.name: why for source in sources() if (why := stale(source))}
    if found:
        said = "; ".join(f"{name}: {why}" for name, why in found.items())
        raise PluginError(f"stale notebooks ({said}): run `make tutorial` and commit what it wrote")


def on_files(files: Any, config: Any) -> Any:
    from mkdocs.structure.files import File

    for file in list(files):
        found = NOTEBOOK.fullmatch(file.src_uri)
        if found:
            text, pictures = page(nbformat.read(TUTORIAL / f"{found[1]}.ipynb", 4), found[1])
            files.append(File.generated(config, f"tutorial/{found[1]}.md", content=text))
            for name, picture in pictures.items():
                files.append(File.generated(config, f"tutorial/{name}", content=picture))
            files.remove(file)
        elif file.src_uri.endswith(".svg"):
            form = dark(Path(file.abs_src_path).read_text("utf-8"))
            files.append(File.generated(config, _dark_name(file.src_uri), content=form))
    return files


#: What search shows first and last, of pages that have the same words: answers before history.
BOOST = {"learning-rate.md": 4.0, "decisions.md": 0.3, "pitfalls.md": 0.5, "routing-survey.md": 0.3}


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links between the notebooks lead from page to page; a picture has two forms."""
    if page.file.src_uri in BOOST:
        page.meta["search"] = {"boost": BOOST[page.file.src_uri]}
    if page.file.src_uri.startswith("tutorial/"):
        markdown = re.sub(r"\((\d\d_\w+)\.py\)", r"(\1.md)", markdown)
    return re.sub(r"!\[([^\]]*)\]\(([^)#]+\.svg)\)", _two_forms, markdown)


def on_page_content(content: str, **_: Any) -> str:
    """Each cell of a wide table knows its heading: on a telephone extra.css makes a list of it."""
    return re.sub(r"<table>.*?</table>", _labelled, content, flags=re.DOTALL)


#: Columns that 390 pixels have room for.
NARROW = 3


def _labelled(found: re.Match[str]) -> str:
    table = found[0]
    headings = [re.sub("<[^>]+>", "", h) for h in re.findall(r"<th\b[^>]*>(.*?)</th>", table)]
    if len(headings) <= NARROW:
        return table
    head, body, end = table.partition("<tbody>")
    places = itertools.count()

    def label(cell: re.Match[str]) -> str:
        heading = html.escape(html.unescape(headings[next(places) % len(headings)]))
        return f'<td data-label="{heading}"{cell[1]}>'

    return (
        head.replace("<table>", "<table data-list>") + body + re.sub(r"<td\b([^>]*)>", label, end)
    )


def _dark_name(name: str) -> str:
    return name.removesuffix(".svg") + "-dark.svg"


def _two_forms(found: re.Match[str]) -> str:
    alt, name = found.groups()
    return f"![{alt}]({name}#only-light)![{alt}]({_dark_name(name)}#only-dark)"


def page(notebook: Any, name: str) -> tuple[str, dict[str, str | bytes]]:
    """A notebook's page and its pictures by name."""
    pictures: dict[str, str | bytes] = {}
    parts, result, heading = [], "", ""
    for cell in notebook.cells:
        tags = cell.metadata.get("tags", ())
        if cell.cell_type == "markdown":
            heading = (re.findall(r"^#+ (.+)$", cell.source, re.MULTILINE) or [heading])[-1]
            parts.append(prose(cell.source))
            continue
        code = f"```python\n{cell.source}\n```"
        if "hide-input" in tags:
            code = folded("Code" if len(parts) > 1 else "Code: imports", code)
        shown = outputs(cell.outputs, name, heading, pictures)
        parts.append("\n\n".join(filter(None, [code, shown])))
        if "result" in tags:
            result = shown
    # The title, the result in words, and what shows it; then where that is from, and the rest.
    title, words, *rest = parts[0].split("\n\n")
    parts[0:1] = [title, words, result, source_note(notebook, name), *rest]
    return "\n\n".join(parts) + "\n", pictures


def source_note(notebook: Any, name: str) -> str:
    """Where the page is from, and how a reader runs it."""
    address, facts = repository(), notebook.metadata["muonkit"]
    links = [f"[the notebook]({name}.ipynb)", "[how to run it](index.md#open-one)"]
    if address:
        inside = f"{address.removeprefix('https://github.com/')}/blob/main/docs/tutorial/{name}"
        colab = f"https://colab.research.google.com/github/{inside}.ipynb"
        links.insert(0, f"[Open in Colab]({colab}){{ .md-button }}")
    return (
        " · ".join(links) + f"\n\n*What the cells print and draw is from one run: "
        f"{facts['processor']}, torch {facts['torch']}, Python {facts['python']}, "
        f"{facts['date']}.*\n{{ .source }}"
    )


def folded(summary: str, text: str) -> str:
    return (
        f'<details class="code" markdown="1"><summary>{summary}</summary>\n\n{text}\n\n</details>'
    )


def outputs(found: list[Any], name: str, heading: str, pictures: dict[str, str | bytes]) -> str:
    """What a cell printed and drew, as Markdown; its pictures are added to the others."""
    parts = []
    for output in found:
        data = output.get("data", {})
        if output.output_type == "stream":
            parts.append("```{ .text .output }\n" + output.text.rstrip() + "\n```")
        elif "image/svg+xml" in data:
            file = f"{name}-{len(pictures) // 2 + 1}.svg"
            pictures[file] = data["image/svg+xml"]
            pictures[_dark_name(file)] = dark(data["image/svg+xml"])
            parts.append(f"![{re.sub('[$*`]', '', heading)}]({file})")
        elif "image/png" in data:
            file = f"{name}-{len(pictures) // 2 + 1}.png"
            pictures[file] = base64.b64decode(data["image/png"])
            parts.append(f"![{heading}]({file})")
        elif "text/plain" in data:
            text = COLOURS.sub("", data["text/plain"])
            parts.append("```{ .text .output }\n" + text.rstrip() + "\n```")
    return "\n\n".join(parts)


#: What a terminal takes for colours and bold letters.
COLOURS = re.compile(r"\x1b\[[0-9;]*m")
DISPLAYED = re.compile(r"\$\$(.+?)\$\$", re.DOTALL)
INLINE = re.compile(r"\$([^$\n]+(?:\n[^$\n]+)?)\$")


def prose(text: str) -> str:
    """Markdown with its equations drawn, and folded answers read as Markdown."""
    text = INLINE.sub(_inline, DISPLAYED.sub(_displayed, text))
    return text.replace("<details>", '<details markdown="1">')


def _inline(found: re.Match[str]) -> str:
    from latex2mathml.converter import convert

    # Markdown takes a <math> that begins a line for a block.
    return f"<span>{convert(found[1])}</span>"


def _displayed(found: re.Match[str]) -> str:
    from latex2mathml.converter import convert

    return "\n\n" + convert(found[1], display="block") + "\n\n"


# --- the command -----------------------------------------------------------------------------


def main() -> int:
    parser = argparse.ArgumentParser(description="Bring the tutorial's .ipynb files up to date.")
    parser.add_argument("names", nargs="*", help="parts of their names [default: all]")
    parser.add_argument("--again", action="store_true", help="execute what is up to date, too")
    parser.add_argument("--check", action="store_true", help="only say which are not; status 1")
    options = parser.parse_args()
    chosen = [s for s in sources() if not options.names or any(n in s.stem for n in options.names)]
    if options.check:
        found = {source.name: why for source in chosen if (why := stale(source))}
        for name, why in found.items():
            print(f"{name}: {why}")
        return 1 if found else 0
    for source in chosen:
        print(f"{kept(source).name}: {renew(source, options.again)}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
