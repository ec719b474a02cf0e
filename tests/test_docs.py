"""The documentation site builds strictly and fetches nothing; the Python on its pages runs.

As in README.md, the blocks of a section are one program (see `readme_blocks.read_blocks` for the
directions that may stand above a block).
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from readme_blocks import ROOT, python_sections, read_blocks, run_program

PROGRAMS = {
    (page.name, section): program
    for page in sorted((ROOT / "docs").glob("*.md"))
    for section, program in python_sections(read_blocks(page.read_text(encoding="utf-8"))).items()
}


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
    assert 'id="muonkit.Muon.step"' in pages["api/optimizers/index.html"]
    # What a browser loads by itself; links that a reader may follow are none of it.
    loads = re.compile(r"<(?:script|img|link)\b[^>]*?\b(?:src|href)=[\"']?(?:https?:)?//[^>]*>")
    assert {name: loads.findall(text) for name, text in pages.items() if loads.search(text)} == {}


@pytest.mark.parametrize(
    ("page", "section"), PROGRAMS, ids=lambda text: re.sub(r"\W+", "-", text).strip("-")
)
def test_python(page: str, section: str, tmp_path: Path) -> None:
    run_program(PROGRAMS[page, section], tmp_path, page)
