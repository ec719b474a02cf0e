"""What `make release-check` is made of, without building anything; the wheel has test_wheel.py."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

import muonkit

ROOT = Path(__file__).parents[2]


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"release_{name}", ROOT / f"release/{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


check = load("check")


Outside = Callable[[str, str | None, str], str]


@pytest.fixture
def outside() -> Outside:
    pytest.importorskip("hatchling")
    made: Outside = load("description").outside
    return made


README = """\
![Two curves](docs/a.png) [Page](docs/a.md#b), [`M`](docs/c.md), [site](https://x.org), [up](#up)
`model[0](x)`
```python
heads[0](x)
```
"""


def test_links_of_the_description_lead_into_the_tag(outside: Outside) -> None:
    assert outside(README, "https://forge.org/us/muonkit/", "0.1.0") == README.replace(
        "(docs/a.png)", "(https://forge.org/us/muonkit/raw/v0.1.0/docs/a.png)"
    ).replace("(docs/", "(https://forge.org/us/muonkit/blob/v0.1.0/docs/")


def test_without_an_address_links_are_their_text(outside: Outside) -> None:
    first, *rest = outside(README, None, "0.1.0").splitlines()
    assert first == "*(Two curves)* Page, `M`, [site](https://x.org), [up](#up)"
    assert rest == README.splitlines()[1:]


def test_the_pages_beside_docs_link_to_what_there_is() -> None:
    assert [line for page in check.PAGES for line in check.dead_links(page)] == []


def test_dead_links_are_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(check, "ROOT", tmp_path)
    (tmp_path / "b.md").write_text("## On a GPU, `tf32`\n")
    (tmp_path / "a.md").write_text("[1](b.md#on-a-gpu-tf32) [2](b.md#on) [3](c.md) [4](http://x)\n")
    assert list(check.dead_links("a.md")) == [
        "a.md: b.md has no heading #on",
        "a.md: there is no c.md",
    ]


def test_the_changelog_names_this_version() -> None:
    check.check_version(None)
    assert check.version() == muonkit.__version__


@pytest.mark.parametrize(
    ("heading", "tag", "complaint"),
    [
        ("[0.0.9] - 2026-01-02", None, "newest heading of CHANGELOG.md is 0.0.9"),
        ("[{}] - soon", None, "'soon' where its date belongs"),
        ("[{}] - unreleased", "v{}", "'unreleased' where its date belongs"),
        ("[{}] - 2026-01-02", "{}", "the tag of version"),
        ("{}", None, "expected '[X.Y.Z]"),
    ],
)
def test_version_changelog_and_tag_have_to_agree(
    heading: str, tag: str | None, complaint: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "src/muonkit").mkdir(parents=True)
    (tmp_path / "src/muonkit/__init__.py").write_text(f'__version__ = "{muonkit.__version__}"\n')
    heading = heading.format(muonkit.__version__)
    (tmp_path / "CHANGELOG.md").write_text(f"## [Unreleased]\n\n## {heading}\n")
    monkeypatch.setattr(check, "ROOT", tmp_path)
    with pytest.raises(check.Problem, match=re.escape(complaint)):
        check.check_version(tag and tag.format(muonkit.__version__))


def test_torch_is_lent_with_what_it_requires() -> None:
    assert {"torch", "sympy", "typing_extensions"} <= {
        name.replace("-", "_") for name in check.closure("torch")
    }
    assert "numpy" not in check.closure("torch")
