"""Reads a README or a page: its fenced blocks, the directions above them, what a command line asks
for; and runs its programs.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from packaging.requirements import InvalidRequirement, Requirement

from tests.helpers import warm
from tests.helpers.paths import ROOT

# Names the file, so that a traceback's line is the page's.
_RUN_PROGRAM = (
    "import sys; exec(compile(sys.stdin.read(), sys.argv[1], 'exec'), {'__name__': '__main__'})"
)

_FENCE = re.compile(r"^(?P<fence>`{3,}|~{3,})\s*(?P<language>[\w+-]*)")
_HEADING = re.compile(r"^#{1,2} (?P<title>.+)")
_DIRECTION = re.compile(r"^<!-- test: (?P<text>.*?) -->$")
_SKIP = re.compile(r"^skip because \S.*$")
_NEEDS = re.compile(r"^needs (?P<package>\w+)$")
_SUBSTITUTE = re.compile(r"^substitute (?P<old>.+?) -> (?P<new>.*)$")

# What `git`, `cd` and an environment do is not this project's to test.
_SETTING_UP = frozenset({"cd", "git", "source", "."})


class ReadmeError(ValueError):
    """The README holds something that would not work as printed, or cannot be checked."""


@dataclass(frozen=True)
class Block:
    """One fenced block: `line` is that of its first line of text, counted from 1."""

    section: str
    language: str
    line: int
    text: str
    skipped: bool = False
    needs: str | None = None


def read_blocks(readme: str) -> list[Block]:
    """Every fenced block, substitutions done.

    A direction stands on the line above the block, or above another direction:
    `<!-- test: skip because REASON -->`, `<!-- test: needs PACKAGE -->` (else it is skipped) or
    `<!-- test: substitute OLD -> NEW -->`.

    Raises:
        ReadmeError: an unknown direction, one without a block below it, one whose OLD does not
            occur, or a block that never ends.
    """
    blocks: list[Block] = []
    section, directions = "start", list[str]()
    lines = iter(enumerate(readme.splitlines(), start=1))
    for number, line in lines:
        if fence := _FENCE.match(line.strip()):
            indent = len(line) - len(line.lstrip())
            text = "".join(_until(fence["fence"], lines, number, indent))
            block = Block(section, fence["language"], number + 1, text)
            blocks.append(_follow(directions, block))
            directions = []
        elif direction := _DIRECTION.match(line.strip()):
            directions.append(direction["text"])
        elif directions:
            raise ReadmeError(f"line {number}: a block has to stand right below its test direction")
        elif heading := _HEADING.match(line):
            section = heading["title"].strip()
    return blocks


def _until(fence: str, lines: Iterator[tuple[int, str]], start: int, indent: int) -> Iterator[str]:
    for _, line in lines:
        if line.strip() == fence:
            return
        yield (line[indent:] if not line[:indent].strip() else line) + "\n"
    raise ReadmeError(f"line {start}: this block is never closed")


def _follow(directions: list[str], block: Block) -> Block:
    for text in directions:
        if _SKIP.match(text):
            block = replace(block, skipped=True)
        elif needed := _NEEDS.match(text):
            there = importlib.util.find_spec(needed["package"]) is not None
            block = replace(block, needs=needed["package"], skipped=not there)
        elif change := _SUBSTITUTE.match(text):
            if change["old"] not in block.text:
                raise ReadmeError(f"line {block.line}: {change['old']!r} is not in the block below")
            block = replace(block, text=block.text.replace(change["old"], change["new"]))
        else:
            raise ReadmeError(
                f"line {block.line}: unknown direction {text!r}; there are"
                " 'skip because REASON', 'needs PACKAGE' and 'substitute OLD -> NEW'"
            )
    return block


def python_sections(blocks: list[Block]) -> dict[str, str]:
    """Section -> its Python blocks as one program, each line where it stands in the README."""
    programs: dict[str, str] = {}
    for block in blocks:
        if block.language == "python" and not block.skipped:
            before = programs.get(block.section, "")
            padding = "\n" * (block.line - 1 - before.count("\n"))
            programs[block.section] = before + padding + block.text
    return programs


def environment() -> dict[str, str]:
    """This one, with the `muonkit` beside this Python first on the path, and one thread."""
    scripts = str(Path(sys.executable).parent)
    path = os.pathsep.join([scripts, os.environ.get("PATH", "")])
    return {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1"}


def run_program(program: str, folder: Path, page: str = "README.md") -> str:
    """Run a section of `page` in a process of its own, in `folder`.

    Returns:
        what it printed.

    Raises:
        AssertionError: it failed; with its output.
    """
    done = warm.run(["-c", _RUN_PROGRAM, page], input=program, cwd=folder, env=environment())
    assert done.returncode == 0, f"{page}, python:\n{done.stdout}{done.stderr}"
    return done.stdout


def commands(block: Block) -> list[str]:
    """The commands of a `bash` or `console` block: joined over `\\`, prompts and output removed."""
    joined = re.sub(r"\\\n\s*", "", block.text)
    lines = [line.strip() for line in joined.splitlines()]
    if block.language == "console":
        return [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
    return [line.removeprefix("$ ") for line in lines if line and not line.startswith("#")]


def is_run(command: str) -> bool:
    """Whether the command is to be run; one that sets things up is checked here instead.

    Raises:
        ReadmeError: a make target, an extra or a script that does not exist, or a program that
            this test knows nothing about.
    """
    return any([_judge(command, words) for words in _simple_commands(command)])


def _simple_commands(command: str) -> Iterator[list[str]]:
    """The words of each command of a list; behind a pipe stands only what filters the output."""
    lexer = shlex.shlex(command, posix=True, punctuation_chars=";&|")
    lexer.whitespace_split = True
    words, behind_pipe = list[str](), False
    for token in [*lexer, ";"]:
        if token not in ("&&", "||", ";", "|", "&"):
            words.append(token)
            continue
        while words and re.match(r"^[A-Z_][A-Z0-9_]*=", words[0]):
            words = words[1:]
        if words and not behind_pipe:
            yield words
        words, behind_pipe = [], token == "|"


def _judge(command: str, words: list[str]) -> bool:
    match words:
        case ["muonkit", *_]:
            return True
        case ["make", *arguments]:
            _check_targets(arguments)
        case ["pip", "install", *arguments] | [_, "-m", "pip", "install", *arguments]:
            _check_requirements(arguments)
        case ["python" | "python3" | "torchrun", *arguments] if arguments[:2] != ["-m", "venv"]:
            _check_script(command, arguments)
            return True
        case [first, *_] if first in (*_SETTING_UP, "python", "python3"):
            pass
        case _:
            raise ReadmeError(f"cannot check {command!r}: put a direction above its block")
    return False


def _check_targets(arguments: list[str]) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z][\w-]*):", makefile, flags=re.MULTILINE))
    for target in arguments:
        if "=" not in target and not target.startswith("-") and target not in targets:
            raise ReadmeError(f"make has no target {target!r}; it has {sorted(targets)}")


def _check_requirements(arguments: list[str]) -> None:
    with (ROOT / "pyproject.toml").open("rb") as file:
        project = tomllib.load(file)["project"]
    extras = set(project["optional-dependencies"])
    name: str = project["name"]
    named = []
    for argument in arguments:
        if argument.startswith("-"):
            continue
        # `.[lab]` is this checkout; `[lab]` alone is no requirement that could be parsed.
        text = name + argument[1:] if argument.startswith(".") else argument
        try:
            requirement = Requirement(text)
        except InvalidRequirement as error:
            raise ReadmeError(f"pip would not understand {argument!r}: {error}") from error
        named.append(requirement.name)
        if requirement.name == name and requirement.extras - extras:
            raise ReadmeError(f"{argument!r}: the extras are {sorted(extras)}")
    if name not in named:
        raise ReadmeError(f"pip install {' '.join(arguments)} does not install {name}")


def _check_script(command: str, arguments: list[str]) -> None:
    for argument in arguments:
        if argument.endswith(".py") and not (ROOT / argument).is_file():
            raise ReadmeError(f"{command!r}: there is no {argument}")
