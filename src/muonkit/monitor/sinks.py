"""Where samples go: JSON lines in a file, or any callable."""

from __future__ import annotations

import errno
import gc
import json
import math
import os
import stat
import warnings
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from muonkit._text import shortened, shown

try:
    import fcntl
except ImportError:  # Windows: two processes that write to one file are not noticed there
    fcntl = None  # type: ignore[assignment]

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from io import FileIO

__all__ = [
    "FORMAT",
    "JsonLines",
    "OpenSinks",
    "Sink",
    "copied",
    "deliver",
    "is_torn",
    "sinks_of",
]

Sink: TypeAlias = "str | os.PathLike[str] | Callable[[dict[str, Any]], Any]"

# The format of the records; a reader refuses any other.
FORMAT = 1

# How every line of ours begins, and the first line of a file.
_RECORD, _HEADER = b'{"kind": "', b'{"kind": "header", "format": '

# Significant digits in a file: what float32 has.
_DIGITS = 7

# The file ends with a line that says so; a sample leaves room for it.
_END_BYTES = 80


class JsonLines:
    """Writes one JSON object a line, with null for what is not finite, behind what the file has.

    A run that goes on appends, and writes its header only where it differs from the last one
    there. A last line of ours that was not written to its end is cut off.

    Args:
        max_bytes: what the file may grow to. The sample that does not fit any more is not written;
            in its place is ``{"kind": "end", "step": its step, "max_bytes": max_bytes}``.

    Raises:
        ValueError: another name than *.jsonl; no regular file; one that is no recording (nothing
            of it was changed); one that another monitor has open, of this process or another.
        FileNotFoundError: no such folder.
    """

    def __init__(self, path: str | os.PathLike[str], max_bytes: int | None = None) -> None:
        self.path, self._most = Path(path), max_bytes
        _check_place(self.path)
        self._key = self.path.resolve()
        if self._key in _OPEN:
            gc.collect()  # it may be of a monitor that nobody has: a cycle with its optimizer
        if self._key in _OPEN:
            raise ValueError(
                f"another monitor writes to {str(path)!r}: close it, or give each its own file"
            )
        # Unbuffered: a child that is forked closes its copy, and has nothing to write twice.
        self._file: FileIO = self.path.open("a+b", buffering=0)
        try:
            _lock(self._file, path)
            self._header, self._size, self._ended = _take_up(self._file, path)
        except Exception:
            self._file.close()
            raise
        self._pid = os.getpid()
        self._close = weakref.finalize(self, self._file.close)  # also where nobody calls `close`
        _OPEN[self._key] = self

    def __repr__(self) -> str:
        return f"JsonLines({str(self.path)!r})"

    def __call__(self, record: dict[str, Any]) -> None:
        if os.getpid() != self._pid:
            raise ValueError(
                "its file belongs to the process that this one was forked from: make a monitor "
                "here, with a file of its own"
            )
        line = _line(record)
        if record["kind"] == "header" and line == self._header:
            return
        if self._most is not None and self._size + len(line) + _END_BYTES > self._most:
            self._end(record)
        self._write(line)
        self._ended = False
        if record["kind"] == "header":
            self._header = line

    def _end(self, record: dict[str, Any]) -> None:
        """Close the recording with a line that says so, once, and raise `_FullError`."""
        step = record.get("step")
        line = _line({"kind": "end", "step": step, "max_bytes": self._most})
        if self._size and not self._ended and self._size + len(line) <= (self._most or 0):
            self._write(line)
            self._ended = True
        what = f"the {record['kind']}{'' if step is None else f' of step {step}'}"
        raise _FullError(
            f"{str(self.path)!r} has {self._size} bytes, and max_bytes={self._most} leaves no room "
            f"for {what}: nothing more is recorded there, the training goes on. Choose fewer "
            "fields= or a larger every, or a larger max_bytes"
        )

    def _write(self, line: bytes) -> None:
        rest = memoryview(line)
        while rest:  # a disk that fills up may take a part
            rest = rest[self._file.write(rest) :]
        self._size += len(line)

    def close(self) -> None:
        try:
            self._close()
        finally:
            if _OPEN.get(self._key) is self:
                del _OPEN[self._key]


class _FullError(Exception):
    """A file has what it may have."""


# The files that monitors of this process write to.
_OPEN: weakref.WeakValueDictionary[Path, JsonLines] = weakref.WeakValueDictionary()


def _line(record: dict[str, Any]) -> bytes:
    return f"{json.dumps(_plain(record), allow_nan=False)}\n".encode()


def _check_place(path: Path) -> None:
    """Refuse what no recording can be written to, before it is opened: a pipe would wait there.

    Raises:
        ValueError, FileNotFoundError: as `JsonLines`.
    """
    try:
        mode = path.stat().st_mode
    except OSError:  # nothing is there yet, or opening it will say why
        mode = stat.S_IFREG
    if not stat.S_ISREG(mode):
        kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
        raise ValueError(
            f"to={str(path)!r} is {kinds.get(stat.S_IFMT(mode), 'a device')}, expected a file: "
            "name a .jsonl file, pass a callable, or to=None to write nothing"
        )
    if path.suffix != ".jsonl":
        raise ValueError(
            f"to={str(path)!r} is no sink: a path ends in .jsonl; for another format pass a "
            "callable, as those of muonkit.integrations"
        )
    if not path.parent.is_dir():
        raise FileNotFoundError(
            f"to={str(path)!r} is in a folder that is not there: make it first, "
            f"os.makedirs({str(path.parent)!r})"
        )


def _lock(file: FileIO, path: str | os.PathLike[str]) -> None:
    """Hold the open file; the system lets go when it is closed, also by a kill.

    A lock of the open file, not of the process: that one is lost where the process closes any other
    handle of the file, a reader's too. A child that is forked, as a DataLoader's, would keep this
    one: so it closes its copy (`_let_go`).
    """
    if fcntl is None:
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):  # else: a file system without locks
            raise ValueError(
                f"a monitor of another process writes to {str(path)!r}: give each its own file, or "
                "writes=False to all but one"
            ) from error


def _let_go() -> None:
    """In a child that was just forked: the files are its parent's."""
    for sink in list(_OPEN.values()):
        sink._file.close()
    _OPEN.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)


class _There(NamedTuple):
    """A file that exists: its last header, its size, and whether `max_bytes` ended it."""

    header: bytes | None
    size: int
    ended: bool


def _take_up(file: FileIO, path: str | os.PathLike[str]) -> _There:
    """Read what is there, and mend its end: a line of ours that was not finished is cut off.

    Raises:
        ValueError: it is no recording, or of another format; nothing was changed.
    """
    header, line, number, end = None, b"", 0, 0
    is_cut = ended = False
    with open(os.dup(file.fileno()), "rb") as reader:
        reader.seek(0)
        begun = reader.read(len(_HEADER))
        if begun and (len(begun) < len(_RECORD) or not is_torn(begun, _HEADER)):
            raise _foreign(path, 1, f"begins with {begun!r}", "the header of a recording")
        reader.seek(0)
        for line in reader:
            number += 1
            is_cut = not line.endswith(b"\n") and not _is_whole(line)
            if is_cut:
                break
            if line.startswith(_HEADER):
                header = _checked(path, number, line)
            ended = line.startswith(b'{"kind": "end"')
            end += len(line)
    if not line.endswith(b"\n") and not is_torn(line):
        raise _foreign(path, number, f"begins with {line[:16]!r}", "a record")
    if is_cut:
        file.truncate(end)
    elif line and not line.endswith(b"\n"):  # an editor took the line's end away
        end += file.write(b"\n")
    return _There(header, end, ended)


def is_torn(line: bytes, begin: bytes = _RECORD) -> bool:
    """Whether this may be a record of ours, or the beginning of one."""
    return line.startswith(begin) or begin.startswith(line)


def _is_whole(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _checked(path: str | os.PathLike[str], number: int, line: bytes) -> bytes:
    """The header's line, if a run of this version may go on with it."""
    try:
        form = json.loads(line)["format"]
    except (ValueError, RecursionError, KeyError, TypeError):
        raise _foreign(path, number, "is damaged", "the header of a recording") from None
    if form != FORMAT:
        raise _foreign(path, number, f"is of format {form!r:.20}", f"format {FORMAT}")
    return line.rstrip(b"\r\n") + b"\n"


def _foreign(path: str | os.PathLike[str], number: int, got: str, expected: str) -> ValueError:
    return ValueError(
        f"to={str(path)!r} cannot be gone on with: line {number} {got}, expected {expected}; "
        "nothing was changed. Give another name, or move that file away"
    )


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.{_DIGITS}g}") if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    return value


def copied(value: Any) -> Any:
    """The same dicts and lists anew: who gets them may change them."""
    if isinstance(value, dict):
        return {key: copied(part) for key, part in value.items()}
    return [copied(part) for part in value] if isinstance(value, list) else value


def sinks_of(
    to: Sink | Sequence[Sink] | None, writes: bool, max_bytes: int | None = None
) -> list[Callable[..., Any]]:
    """The callables that `to` means; files are opened by the rank that writes only.

    Raises:
        TypeError: neither a path nor callable.
        ValueError, FileNotFoundError: as `JsonLines`.
    """
    given = [] if to is None else list(to) if isinstance(to, list | tuple) else [to]
    sinks: list[Callable[..., Any]] = []
    try:
        for sink in given:
            if not callable(sink) and not isinstance(sink, str | os.PathLike):
                raise TypeError(
                    "to= is a path that ends in .jsonl, a callable that takes the sample, or a "
                    f"list of these, got {sink!r:.80}"
                )
            if writes:
                sinks.append(sink if callable(sink) else JsonLines(sink, max_bytes))
    except Exception:
        for sink in sinks:
            if isinstance(sink, JsonLines):
                sink.close()
        raise
    return sinks


def deliver(sinks: list[Callable[..., Any]], record: dict[str, Any]) -> None:
    """Give every sink the record, callables one of their own, which they may change.

    One that raises gets no more: a full disk is no reason to end a training.
    """
    for sink in list(sinks):
        try:
            sink(record if isinstance(sink, JsonLines) else copied(record))
        except _FullError as full:
            sinks.remove(sink)
            warnings.warn(str(full), UserWarning, stacklevel=2)
        except Exception as error:
            sinks.remove(sink)
            warnings.warn(
                f"the monitor's sink {_named(sink)} raised {type(error).__name__}: {shown(error)}; "
                "it gets no more samples, the training goes on",
                UserWarning,
                stacklevel=2,
            )


def _named(sink: Any) -> str:
    return shortened(repr(sink), 80)


class OpenSinks:
    """What a monitor gives samples to, until it is closed; or until nobody has it any more."""

    def __init__(self, sinks: Sequence[Any]) -> None:
        self._sinks = list(sinks)
        _open.add(self)

    def close(self) -> None:
        """Close every sink that can be closed and that no other monitor has, whatever others
        raise; once.
        """
        sinks, self._sinks = self._sinks, []
        used = {id(sink) for others in _open for sink in others._sinks}
        for sink in sinks:
            close: Callable[[], Any] | None = getattr(sink, "close", None)
            if close is None or id(sink) in used:
                continue
            used.add(id(sink))  # it may be there twice
            try:
                close()
            except Exception as error:
                warnings.warn(
                    f"the monitor's sink {_named(sink)} could not be closed, "
                    f"{type(error).__name__}: {shown(error)}; its last samples may be missing",
                    UserWarning,
                    stacklevel=3,
                )


_open: weakref.WeakSet[OpenSinks] = weakref.WeakSet()
