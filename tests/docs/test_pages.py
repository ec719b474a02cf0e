"""The documentation site builds strictly and fetches nothing; the Python on its pages runs.

The Python blocks of a page are one program, from top to bottom; `readme_blocks.read_blocks` has the
directions that may stand above a block.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import muonkit
from tests.helpers.pages import python_sections, read_blocks, run_program
from tests.helpers.paths import ROOT, TESTS


def program_of(page: Path) -> str:
    """All Python blocks of a page as one program, each line where it stands on the page."""
    blocks = read_blocks(page.read_text(encoding="utf-8"))
    return python_sections([replace(block, section="") for block in blocks]).get("", "")


PROGRAMS = {page.name: program_of(page) for page in sorted((ROOT / "docs").glob("*.md"))}
PAGES = [name for name, program in PROGRAMS.items() if program]


def test_the_site_builds_strictly_and_fetches_nothing(tmp_path: Path) -> None:
    """A link or an anchor that leads nowhere, a page outside of the navigation, and a name that
    the reference documents and nobody has, are warnings of mkdocs, and strict ends on these.
    """
    for name in ("mkdocs", "material", "mkdocstrings_handlers.python"):
        pytest.importorskip(name, reason="the site is built by mkdocs-material, mkdocstrings")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path],
        cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    pages = {str(p.relative_to(tmp_path)): p.read_text("utf-8") for p in tmp_path.rglob("*.html")}
    # Every public name is documented.
    reference = "".join(text for name, text in pages.items() if name.startswith("api/"))
    for name in set(muonkit.__all__) - {"__version__"}:
        assert f'id="muonkit.{name}"' in reference, name
    # What a browser loads by itself; links that a reader may follow are none of it.
    loads = re.compile(r"<(?:script|img|link)\b[^>]*?\b(?:src|href)=[\"']?(?:https?:)?//[^>]*>")
    assert {name: loads.findall(text) for name, text in pages.items() if loads.search(text)} == {}
    # Of pages with the words, search shows first the one that answers.
    index = json.loads((tmp_path / "search" / "search_index.json").read_text("utf-8"))["docs"]
    boosts = {entry["location"]: entry.get("boost", 1) for entry in index}
    assert boosts["learning-rate/"] == max(boosts.values()) > boosts["decisions/"]
    assert "learning rate" in next(e for e in index if e["location"] == "learning-rate/")["title"]
    # A picture has a form for each scheme; a wide table's cells know their heading.
    for name in (
        "index.html",
        "performance/index.html",
        "tutorial/02_orthogonalization/index.html",
    ):
        shown = re.findall(r'<img [^>]*src="([^"]*\.svg)(#only-\w+)"', pages[name])
        assert {theme for _, theme in shown} == {"#only-light", "#only-dark"}, name
        assert all(((tmp_path / name).parent / file).resolve().is_file() for file, _ in shown), name
    assert '<td data-label="ratio"' in pages["performance/index.html"]
    # The tutorial's notebooks are pages, their equations drawn, and lead from one to the next.
    notebooks = sorted(name for name in pages if re.match(r"tutorial/\d", name))
    sources = sorted((ROOT / "docs/tutorial").glob("[0-9]*.py"))
    assert [Path(name).parent.name for name in notebooks] == [path.stem for path in sources]
    assert all("$$" not in pages[name] for name in notebooks)
    assert "<math" in pages["tutorial/02_orthogonalization/index.html"]
    assert 'href="01_the_problem/"' in pages["tutorial/index.html"]


@pytest.mark.parametrize("page", PAGES)
def test_python(page: str, tmp_path: Path) -> None:
    run_program(PROGRAMS[page], tmp_path, page)


def needed() -> set[tuple[str, str]]:
    """Page and package, for every block that wants one."""
    texts = {page.name: page.read_text("utf-8") for page in (ROOT / "docs").glob("*.md")}
    return {(n, b.needs) for n, text in texts.items() for b in read_blocks(text) if b.needs}


@pytest.mark.parametrize(("page", "package"), sorted(needed()))
def test_the_blocks_that_need_a_package_were_run(page: str, package: str) -> None:
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed: its blocks on {page} were not run")


def test_the_pitfalls_name_tests_that_there_are() -> None:
    page = (ROOT / "docs" / "pitfalls.md").read_text(encoding="utf-8")
    numbers = [int(number) for number in re.findall(r"^(\d+)\. ", page, flags=re.MULTILINE)]
    assert numbers == list(range(1, len(numbers) + 1))
    named = re.findall(r"`(\w+/test_\w+\.py)::(\w+)`", page)
    assert len(named) > len(numbers)
    for file, name in named:
        source = (TESTS / file).read_text(encoding="utf-8")
        assert f"\ndef {name}(" in source, f"docs/pitfalls.md: {file} has no {name}"
    for file in TESTS.glob("*/test_*.py"):
        for name in re.findall(r"^def (test_pitfalls?_\w+)", file.read_text("utf-8"), re.MULTILINE):
            own = {int(number) for number in re.findall(r"(?<=_)\d+(?=_)", name)}
            assert own <= set(numbers), f"{file.name}: {name} is not in docs/pitfalls.md"
