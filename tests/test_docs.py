"""The documentation site builds strictly and fetches nothing; the Python on its pages runs.

The Python blocks of a page are one program, from top to bottom; `readme_blocks.read_blocks` has the
directions that may stand above a block.
"""

from __future__ import annotations

import copy
import importlib.util
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import muonkit
from muonkit import MuonW, orthogonalize
from readme_blocks import ROOT, python_sections, read_blocks, run_program


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
    # Every public name is documented; where a module has the same name, by its home.
    reference = "".join(text for name, text in pages.items() if name.startswith("api/"))
    for name in set(muonkit.__all__) - {"__version__"}:
        ids = (f'id="muonkit.{name}"', f'id="muonkit.{name}.{name}"')
        assert any(anchor in reference for anchor in ids), name
    # What a browser loads by itself; links that a reader may follow are none of it.
    loads = re.compile(r"<(?:script|img|link)\b[^>]*?\b(?:src|href)=[\"']?(?:https?:)?//[^>]*>")
    assert {name: loads.findall(text) for name, text in pages.items() if loads.search(text)} == {}
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


def moonlights_step(
    params: list[Tensor], state: dict[int, dict[str, Any]], grads: list[Tensor], hidden: int
) -> None:
    """Moonlight's update, transcribed, with our products: lr 1e-3, decay 0.1, betas (0.9, 0.95)."""
    for i, (p, g) in enumerate(zip(params, grads, strict=True)):
        kept = state.setdefault(i, {"use_muon": i < hidden})
        p.mul_(1 - 1e-3 * 0.1)
        if i < hidden:
            total = kept.setdefault("momentum_buffer", torch.zeros_like(p))
            total.mul_(0.95).add_(g)
            O = orthogonalize(g + 0.95 * total, ns_dtype="float32")
            p.add_(O, alpha=-1e-3 * 0.2 * max(p.shape) ** 0.5)
            continue
        t = kept["step"] = kept.get("step", 0) + 1
        mean = kept.setdefault("moment1", torch.zeros_like(p)).lerp_(g, 0.1)
        square = kept.setdefault("moment2", torch.zeros_like(p)).lerp_(g * g, 0.05)
        correction = (1 - 0.95**t) ** 0.5 / (1 - 0.9**t)
        p.add_(mean / (1e-8 + square.sqrt()), alpha=-1e-3 * correction)


def test_a_state_of_moonlight_goes_on_as_it_would_have() -> None:
    page = (ROOT / "docs" / "migrate.md").read_text(encoding="utf-8")
    (text,) = re.findall(r"^def from_moonlight.*?^    return .*?$", page, re.MULTILINE | re.DOTALL)
    names: dict[str, Any] = {"torch": torch}
    exec(text, names)
    torch.manual_seed(0)
    theirs = [torch.randn(shape) for shape in ((24, 16), (16, 32), (16,), (40, 16))]
    grads = [[torch.randn_like(p) for p in theirs] for _ in range(8)]
    state: dict[int, dict[str, Any]] = {}
    for given in grads[:4]:
        moonlights_step(theirs, state, given, hidden=2)
    ours = [nn.Parameter(p.clone()) for p in theirs]
    options = {"adjust_lr_fn": "match_rms_adamw", "ns_dtype": "float32"}
    optimizer = MuonW(ours[:2], 1e-3, 0.1, adamw_params=ours[2:], **options)
    optimizer.load_state_dict(names["from_moonlight"](copy.deepcopy({"state": state}), optimizer))
    for given in grads[4:]:
        moonlights_step(theirs, state, given, hidden=2)
        for p, g in zip(ours, given, strict=True):
            p.grad = g.clone()
        optimizer.step()
    # Weights are up to 4, so rounding is 2e-7 in each of four steps of 4e-3: a momentum that was
    # off by its factor of 20 is off by 1e-3.
    for p, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p.detach(), expected, rtol=0, atol=4e-6)


def test_the_pitfalls_name_tests_that_there_are() -> None:
    page = (ROOT / "docs" / "pitfalls.md").read_text(encoding="utf-8")
    numbers = [int(number) for number in re.findall(r"^(\d+)\. ", page, flags=re.MULTILINE)]
    assert numbers == list(range(1, len(numbers) + 1))
    named = re.findall(r"`(test_\w+\.py)::(\w+)`", page)
    assert len(named) > len(numbers)
    for file, name in named:
        source = (ROOT / "tests" / file).read_text(encoding="utf-8")
        assert f"\ndef {name}(" in source, f"docs/pitfalls.md: {file} has no {name}"
    for file in (ROOT / "tests").glob("test_*.py"):
        for name in re.findall(r"^def (test_pitfalls?_\w+)", file.read_text("utf-8"), re.MULTILINE):
            own = {int(number) for number in re.findall(r"(?<=_)\d+(?=_)", name)}
            assert own <= set(numbers), f"{file.name}: {name} is not in docs/pitfalls.md"
