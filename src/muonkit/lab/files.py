"""The one place where the lab opens files: a folder may have come from elsewhere.

A file is written as a whole or not at all: it is made anew (``O_EXCL``) in the same folder, under
a name that nobody can have guessed, and renamed when it is on the disk. No link is followed to a
file that is written, locked or read back, and only plain files of a plausible size are read. So a
crafted folder can neither have other files overwritten nor make a command wait for ever. A path
that the user names, ``--out`` or a recording, may be a link: it is the user's own.
"""

import hashlib
import os
import re
import secrets
import stat
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from muonkit.lab.errors import LabError, RunError

#: Windows has neither links that anybody may make nor pipes in folders, nor these flags. Not
#: to block matters for pipes, whose opening would wait for the other end.
_CAREFUL = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
_PLAIN = getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
_KINDS = {
    stat.S_IFLNK: "a link",
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}
_REST = re.compile(r"\..+\.[0-9a-f]{16}\.tmp", re.DOTALL)


class UnfitError(LabError):
    """A file that is not what it should be; the message names it and has no remedy yet."""


def _kind(path: Path) -> str | None:
    """What stands at ``path`` if that is no plain file; None for one, or where nothing is."""
    try:
        mode = os.lstat(path).st_mode
    except OSError:  # opening it will say why
        return None
    return None if stat.S_ISREG(mode) else _KINDS.get(stat.S_IFMT(mode), "no file")


def _open(path: Path, flags: int) -> int:
    """A descriptor of the plain file at ``path``.

    Raises:
        UnfitError: something else is there.
        OSError: it cannot be opened.
    """
    if kind := _kind(path):  # before it is opened: opening a device can do things
        raise UnfitError(f"{path} is {kind}, expected a plain file")
    descriptor = os.open(path, flags | _CAREFUL | _PLAIN, 0o666)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise UnfitError(f"{path} is no plain file")
    return descriptor


def is_there(path: Path) -> bool:
    """Whether there is anything at all of that name, a link to nowhere included."""
    return os.path.lexists(path)


# --- reading ---------------------------------------------------------------------------------


def read(path: Path, most: int, length: int | None = None) -> bytes:
    """The content of a plain file.

    Args:
        path: the file.
        most: bytes that it can have; a larger one is not read.
        length: read these first bytes only; what is behind them may be of any size.

    Raises:
        UnfitError: no plain file, larger than that, or shorter than ``length``.
        OSError: it is not there, or cannot be read.
    """
    with os.fdopen(_open(path, os.O_RDONLY), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        wanted = size if length is None else length
        _check_size(path, wanted, most)
        content = file.read(wanted)
    if len(content) < wanted:
        raise UnfitError(f"{path} has {len(content):,} bytes, expected {wanted:,}")
    return content


def _check_size(path: Path, size: int, most: int) -> None:
    if size > most:
        raise UnfitError(f"{path} has {size:,} bytes, expected {most:,} at most")


def digest(path: Path, most: int) -> tuple[int, str]:
    """Bytes and SHA-256 of a plain file of ``most`` bytes at most, which is on the disk afterwards.

    Raises:
        UnfitError, OSError: as :func:`read`.
    """
    with os.fdopen(_open(path, os.O_RDONLY), "rb") as file:
        _check_size(path, os.fstat(file.fileno()).st_size, most)
        with suppress(OSError):  # Windows wants a file that is open for writing
            os.fsync(file.fileno())
        found = hashlib.sha256()
        while block := file.read(1 << 20):
            found.update(block)
        return file.tell(), found.hexdigest()


# --- writing ---------------------------------------------------------------------------------


def write_atomically(
    path: Path, content: bytes, remedy: str = "choose another folder with --out"
) -> None:
    """Write ``content`` to ``path``: the whole of it, or nothing.

    A link of that name is replaced, and what it leads to stays as it is.

    Args:
        remedy: what the user can do, other than make room.

    Raises:
        RunError: there is no room, or no right to write; nothing is left behind.
    """
    beside = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    made = False
    try:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | _CAREFUL | _PLAIN
        # Not tempfile: its files are for their owner alone, whatever the umask says.
        with os.fdopen(os.open(beside, flags, 0o666), "wb") as file:
            made = True
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except OSError as error:
        if made:
            with suppress(OSError):
                beside.unlink(missing_ok=True)
        raise RunError(
            f"cannot write {path}: {error.strerror or error}; make room there, or {remedy}, and "
            "give the command again"
        ) from error
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """Put the renaming on the disk too; where the system cannot, it does so when it likes."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY | _PLAIN)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def begin(path: Path, content: bytes) -> BinaryIO:
    """A new file in the place of whatever is at ``path``, to append to; ``content`` is in it."""
    write_atomically(path, content)
    return os.fdopen(_open(path, os.O_WRONLY | os.O_APPEND), "ab")


def open_lock(path: Path) -> BinaryIO:
    """The file to lock, made when it is missing; what is in it stays.

    Raises:
        UnfitError: something else is there.
        OSError: it cannot be opened.
    """
    return os.fdopen(_open(path, os.O_RDWR | os.O_CREAT), "r+b")


def remove(path: Path) -> None:
    """Take the name away, if it is there; of a link, the link."""
    path.unlink(missing_ok=True)


# --- folders ---------------------------------------------------------------------------------


def make_folder(path: Path, *, own: bool = True) -> None:
    """Make the folder if it is missing.

    Args:
        path: the folder.
        own: it is one of ours, below what the user named: no link then.

    Raises:
        LabError: a link or a file is in its place, or it cannot be made.
    """
    if own:
        check_folder(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LabError(
            f"cannot write to {path}: {error.strerror or error}; choose another folder with --out"
        ) from error


def check_folder(path: Path) -> None:
    """Refuse a link, or anything else, in the place of a folder of ours.

    Raises:
        LabError: that is so.
    """
    kind = _kind(path)
    if kind not in (None, "a folder") or (kind is None and is_there(path)):
        raise LabError(
            f"{path} is {kind or 'a file'}, expected a folder of its own: nothing is written "
            "there; delete it, or choose another folder with --out"
        )


def remove_rests(folder: Path) -> None:
    """Delete what a kill left of files that were being written. Only who holds the lock may."""
    for path in _entries(folder):
        if _REST.fullmatch(path.name) and _kind(path) is None:
            with suppress(OSError):
                remove(path)


def _entries(folder: Path) -> Iterator[Path]:
    with suppress(OSError):
        yield from list(folder.iterdir())
