"""The user's own source: a file or a module, read as it is now and run as a module."""

import ast
import importlib
import importlib.util
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import ModuleType

from muonkit._text import meant
from muonkit.lab.errors import LabError, TaskError
from muonkit.lab.files import UnfitError, read
from muonkit.lab.user import users

#: More than any source file has, in bytes.
_MOST = 1 << 24


def factories(file: Path) -> list[str]:
    """Functions and models that a module defines, as far as its text shows: it is not run."""
    with suppress(OSError, ValueError, SyntaxError, UnfitError):
        body = ast.parse(read(file, _MOST)).body
        named = [s.name for s in body if isinstance(s, ast.FunctionDef | ast.ClassDef)]
        return [name for name in named if not name.startswith("_")]
    return []


def suggested(spec: str, usual: str) -> str:
    """``FILE:FUNCTION`` where FUNCTION is missing: the usual name, or what the file has."""
    where = spec.rstrip(":")
    file = Path(where) if where.endswith(".py") else Path(f"{where}.py")
    names = factories(file)
    name = usual if usual in names or not names else names[0]
    return f"{where}:{name}"


def absent(where: str, name: str, offered: Sequence[str]) -> LabError:
    """The error where a file or module has no such name."""
    hint = f"{meant(name, offered)} " if meant(name, offered) else ""
    return LabError(
        f"{where} has no {name!r}: {hint}it has {', '.join(offered[:12]) or 'no function'}"
    )


def is_file(where: str) -> bool:
    """Whether it is the path of a file, and no module's name."""
    return where.endswith(".py") or "/" in where or "\\" in where


def path_of(where: str) -> Path:
    """The source of a file, or of a module, which is not imported for that.

    Raises:
        LabError: there is none.
    """
    if is_file(where):
        path = Path(where).resolve()
        if not path.is_file():
            near = [str(each) for each in Path(where).parent.glob("*.py")]
            hint = f"{meant(where, near)} " if meant(where, near) else ""
            raise LabError(
                f"there is no file {where}: {hint}`muonkit new-task {Path(where).stem or 'mytask'}`"
                " writes one to begin with"
            )
        return path
    search_here()
    importlib.invalidate_caches()
    try:
        with users(f"importing {where}"):
            found = importlib.util.find_spec(where)
    except TaskError as error:
        if not isinstance(error.__cause__, ModuleNotFoundError):
            raise
        found = None
    if found is None or not found.origin or not Path(found.origin).is_file():
        raise LabError(
            f"there is no module {where!r}: run from the folder that has it, install it, or name "
            "the file, as mytask.py:task"
        )
    return Path(found.origin)


def content_of(path: Path) -> bytes:
    """What the file has.

    Raises:
        LabError: it cannot be read.
    """
    try:
        return read(path.resolve(), _MOST)
    except (OSError, UnfitError) as error:
        raise LabError(f"cannot read {path} ({error})") from error


def search_here(folder: str | None = None) -> None:
    """Have modules imported from this folder too [default: the current one]."""
    folder = folder or os.getcwd()
    if folder not in sys.path:
        sys.path.insert(0, folder)


def module_of(where: str, path: Path, content: bytes) -> ModuleType:
    """The module, made of this content: neither of an older import nor of an older .pyc.

    Raises:
        TaskError: its code failed.
    """
    name = where
    if is_file(where):
        name = path.stem
        search_here(str(path.parent))
        before = sys.modules.get(name)
        if before is not None and getattr(before, "__file__", None) != str(path):
            name = f"muonkit_task_{path.stem}"  # another module has its name already
    found = importlib.util.spec_from_file_location(name, path)
    assert found is not None
    module = importlib.util.module_from_spec(found)
    # Before it is run: classes of it are found by their module's name, as pickle does.
    sys.modules[name] = module
    try:
        with users(f"importing {where}"):
            exec(compile(content, path, "exec"), module.__dict__)
    except TaskError as error:
        sys.modules.pop(name, None)
        if isinstance(error.__cause__, ImportError) and "relative import" in str(error.__cause__):
            raise LabError(
                f"{where} imports from its package, which a file alone has not: name the module, "
                f"from the folder above the package: package.{path.stem} in place of {where}"
            ) from error
        raise
    except BaseException:
        sys.modules.pop(name, None)
        raise
    return module
