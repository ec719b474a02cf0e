"""Where samples go: JSON lines in a file, or any callable."""

from __future__ import annotations

import errno
import gc
import json
import math
import os
import warnings
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

try:
    import fcntl
except ImportError:  # Windows: two processes that write to one file are not noticed there
    fcntl = None  # type: ignore[assignment]

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import BinaryIO

__all__ = ["JsonLines", "Sink", "deliver", "shut", "sinks_of"]

Sink: TypeAlias = "str | os.PathLike[str] | Callable[[dict[str, Any]], Any]"

# Significant digits in a file: what float32 has.
_DIGITS = 7


class JsonLines:
    """One JSON object a line; not finite is null. What is in the file stays.

    A run that goes on appends, and writes its header only where it differs from the last one
    there. A last line that was not written to its end is cut off.

    Raises:
        ValueError: another name than *.jsonl, or a file that another monitor has open, of this
            process or another.
        FileNotFoundError: no such folder.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        if self.path.suffix != ".jsonl":
            raise ValueError(
                f"to={str(path)!r} is no sink: a path ends in .jsonl; for another format pass a "
                "callable, as those of muonkit.integrations"
            )
        if not self.path.parent.is_dir():
            raise FileNotFoundError(
                f"to={str(path)!r} is in a folder that is not there: make it first, "
                f"os.makedirs({str(self.path.parent)!r})"
            )
        self._key = self.path.resolve()
        if self._key in _OPEN:
            gc.collect()  # it may be of a monitor that nobody has: a cycle with its optimizer
        if self._key in _OPEN:
            raise ValueError(
                f"another monitor writes to {str(path)!r}: close it, or give each its own file"
            )
        self._file = self.path.open("a+b")
        try:
            _lock(self._file, path)
            self._header = _mend(self._file)
        except Exception:
            self._file.close()
            raise
        self._close = weakref.finalize(self, self._file.close)  # also where nobody calls `close`
        _OPEN[self._key] = self

    def __call__(self, record: dict[str, Any]) -> None:
        _lock(self._file, self.path)  # again: this process may have read the file meanwhile
        line = json.dumps(_plain(record), allow_nan=False)
        if record["kind"] == "header":
            if line == self._header:
                return
            self._header = line
        self._file.write(f"{line}\n".encode())
        self._file.flush()

    def close(self) -> None:
        try:
            self._close()  # writes what is left, for which there may be no room
        finally:
            if _OPEN.get(self._key) is self:
                del _OPEN[self._key]


# The files that monitors of this process write to.
_OPEN: weakref.WeakValueDictionary[Path, JsonLines] = weakref.WeakValueDictionary()


def _lock(file: BinaryIO, path: str | os.PathLike[str]) -> None:
    """Hold the file for this process; the system lets go even if it is killed.

    A lock of the process, not of the open file: a child that is forked, as a DataLoader's, does not
    keep it. But the process loses it where it closes any other handle of the file, a reader's too,
    so it is taken again before each line.
    """
    if fcntl is None:
        return
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):  # else: a file system without locks
            raise ValueError(
                f"a monitor of another process writes to {str(path)!r}: give each its own file, or "
                "writes=False to all but one"
            ) from error


def _mend(file: BinaryIO) -> str | None:
    """Cut off a line without an end; returns the last header that is there."""
    header, end = None, 0
    file.seek(0)
    for line in file:
        if not line.endswith(b"\n"):
            break
        end += len(line)
        if line.startswith(b'{"kind": "header"'):
            header = line.decode().rstrip("\n")
    file.truncate(end)
    return header


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.{_DIGITS}g}") if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    return value


def sinks_of(to: Sink | Sequence[Sink] | None, writes: bool) -> list[Callable[..., Any]]:
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
                sinks.append(sink if callable(sink) else JsonLines(sink))
    except Exception:
        for sink in sinks:
            if isinstance(sink, JsonLines):
                sink.close()
        raise
    return sinks


def deliver(sinks: list[Callable[..., Any]], record: dict[str, Any]) -> None:
    """Give every sink the record. One that raises gets no more: a full disk is no reason to end a
    training.
    """
    for sink in list(sinks):
        try:
            sink(record)
        except Exception as error:
            sinks.remove(sink)
            warnings.warn(
                f"the monitor's sink {sink!r:.80} raised {type(error).__name__}: {error}; it gets "
                "no more samples, the training goes on",
                UserWarning,
                stacklevel=2,
            )


def shut(sinks: Sequence[Any]) -> None:
    """Close every sink that can be closed, whatever the others raise."""
    for sink in sinks:
        close: Callable[[], Any] | None = getattr(sink, "close", None)
        try:
            if close is not None:
                close()
        except Exception as error:
            warnings.warn(
                f"the monitor's sink {sink!r:.80} could not be closed, {type(error).__name__}: "
                f"{error}; its last samples may be missing",
                UserWarning,
                stacklevel=3,
            )
