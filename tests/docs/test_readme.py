"""The README's Python blocks and commands are run as they are printed.

Each section's Python blocks are one program, in a process and an empty folder of its own, and print
what the section's text blocks show; commands run in order, block by block. A block that cannot be
run, or not at its full length, says so in the line above it (the directions are in
`readme_blocks.read_blocks`).
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from tests.helpers.pages import (
    Block,
    ReadmeError,
    commands,
    environment,
    is_run,
    python_sections,
    read_blocks,
    run_program,
)
from tests.helpers.paths import ROOT

README = ROOT / "README.md"
BLOCKS = read_blocks(README.read_text(encoding="utf-8")) if README.is_file() else []
PROGRAMS = python_sections(BLOCKS)
SHELL_BLOCKS = [block for block in BLOCKS if block.language in ("bash", "console")]


def run_command(command: str, folder: Path) -> None:
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command],
        cwd=folder, env=environment(), capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, f"README.md, {command}:\n{done.stdout}{done.stderr}"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Looks like the root of a checkout, but what a command writes is written elsewhere."""
    for name in ("benchmarks", "examples", "docs"):
        if (ROOT / name).is_dir():
            (tmp_path / name).symlink_to(ROOT / name)
    return tmp_path


def test_the_readme_has_python_and_commands() -> None:
    assert PROGRAMS, "README.md has no Python block that is run"
    unskipped = [block for block in SHELL_BLOCKS if not block.skipped]
    assert any(is_run(command) for block in unskipped for command in commands(block))


@pytest.mark.parametrize("section", PROGRAMS, ids=lambda title: re.sub(r"\W+", "-", title))
def test_python(section: str, folder: Path) -> None:
    printed = run_program(PROGRAMS[section], folder)
    for block in BLOCKS:
        if block.section == section and block.language == "text":
            assert block.text in printed, f"line {block.line}: this is what it prints:\n{printed}"


# A block of commands that train or plan takes a minute: it runs in `make test-all`.
LONG = "muonkit compare"


@pytest.mark.parametrize(
    "block",
    [
        pytest.param(block, marks=[pytest.mark.whole] if LONG in block.text else [])
        for block in SHELL_BLOCKS
    ],
    ids=lambda block: f"line-{block.line}",
)
def test_commands(block: Block, folder: Path) -> None:
    asked = commands(block)
    assert asked, f"line {block.line}: a {block.language} block without a command"
    if block.skipped:
        pytest.skip("the README says why, above this block")
    for command in asked:
        if is_run(command):
            run_command(command, folder)


SAMPLE = """\
# Title
```python
x = 1
```
```python
y = x + 1
```
## Other
<!-- test: substitute 1000 -> 3 -->
```python
steps = 1000
```
<!-- test: skip because it needs a cluster -->
```bash
torchrun train.py
```
1. In a list:
   ```console
   $ muonkit compare digits \\
       --steps 3
   final loss 0.1
   ```
"""


def test_blocks_are_read_with_their_directions() -> None:
    blocks = read_blocks(SAMPLE)
    assert [block.language for block in blocks] == ["python", "python", "python", "bash", "console"]
    assert python_sections(blocks) == {
        "Title": "\n\nx = 1\n\n\ny = x + 1\n",
        "Other": "\n" * 10 + "steps = 3\n",
    }
    assert [block.skipped for block in blocks] == [False, False, False, True, False]
    assert commands(blocks[-1]) == ["muonkit compare digits --steps 3"]
    wanting = "<!-- test: needs {} -->\n```python\n```\n"
    here, elsewhere = read_blocks(wanting.format("torch") + wanting.format("no_such_package"))
    assert (here.needs, here.skipped) == ("torch", False)
    assert (elsewhere.needs, elsewhere.skipped) == ("no_such_package", True)


@pytest.mark.parametrize(
    ("readme", "complaint"),
    [
        ("```python\nx = 1\n", "never closed"),
        ("<!-- test: skip because -->\n```bash\nls\n```\n", "unknown direction"),
        ("<!-- test: ignore -->\n```bash\nls\n```\n", "unknown direction"),
        ("<!-- test: substitute 300 -> 3 -->\n```bash\nls\n```\n", "not in the block"),
        ("<!-- test: skip because slow -->\n\n```bash\nls\n```\n", "right below"),
    ],
)
def test_a_direction_that_says_nothing_is_refused(readme: str, complaint: str) -> None:
    with pytest.raises(ReadmeError, match=complaint):
        read_blocks(readme)


@pytest.mark.parametrize(
    ("command", "runs"),
    [
        ("muonkit compare digits --steps 3", True),
        ("MUONKIT_DATA=/data muonkit compare mnist | head", True),
        ("muonkit route gpt2 --rule '*.mlp|head=adamw; x'", True),
        ("python benchmarks/import_time.py", True),
        ("make test", False),
        ("git clone https://example.org/muonkit && cd muonkit && make demo test JOBS=4", False),
        ("pip install muonkit", False),
        ("pip install 'muonkit[lab]'  # the command line too", False),
        ("python -m pip install -e '.[dev]'", False),
        ("python3 -m venv .venv", False),
    ],
)
def test_commands_are_told_apart(command: str, runs: bool) -> None:
    assert is_run(command) is runs


@pytest.mark.parametrize(
    ("command", "complaint"),
    [
        ("make dmeo", "no target 'dmeo'"),
        ("cd muonkit && make dmeo", "no target 'dmeo'"),
        ("pip install 'muonkit[labs]'", "the extras are"),
        ("pip install -e '.[labs]'", "the extras are"),
        ("pip install muon-kit-torch", "does not install muonkit"),
        ("python examples/absent.py", "there is no examples/absent.py"),
        ("rm -rf /", "cannot check"),
        ("make test; rm -rf /", "cannot check"),
    ],
)
def test_a_command_that_would_not_work_is_refused(command: str, complaint: str) -> None:
    with pytest.raises(ReadmeError, match=re.escape(complaint)):
        is_run(command)


def test_a_failure_is_reported_at_its_line(tmp_path: Path) -> None:
    broken = "# T\n\n```python\nx = 1\nx.absent\n```\n"
    with pytest.raises(AssertionError, match=r'"README\.md", line 5'):
        run_program(python_sections(read_blocks(broken))["T"], tmp_path)
    with pytest.raises(AssertionError, match="not written by hand"):
        run_command("echo not written by hand && false", tmp_path)
