"""What a comparison keeps on disk, so that it can stop anywhere and go on.

::

    OUT/config.json            what was asked for; the folder belongs to this configuration alone
    OUT/runs/KEY/measurements.jsonl   one line per step and per validation, appended while it runs
    OUT/runs/KEY/checkpoint.pt        the run in progress, replaced from time to time
    OUT/runs/KEY/result.json          the run's figures; its presence means the run is finished
    OUT/measurements.jsonl, summary.json, pictures, report.html        written at the end

The measurements are only appended to; the checkpoint holds their length, and what lies behind it is
cut off. Every file that is read back is held to a SHA-256: ``config.json`` and ``result.json`` have
one of themselves in them, ``checkpoint.pt`` at its end, and the measurements' (and the
recording's) stands in the checkpoint, and in the result. It shows damage, not malice: who makes a
folder can make its sums, so types and sizes are checked as well.
"""

import errno
import hashlib
import json
import math
import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from muonkit._text import shortened
from muonkit.lab import files
from muonkit.lab.errors import LabError, RunError
from muonkit.lab.files import UnfitError
from muonkit.lab.files import write_atomically as write_atomically

try:
    import fcntl
except ImportError:  # Windows: two processes in one folder are not noticed there
    fcntl = None  # type: ignore[assignment]

Record = dict[str, Any]

CONFIG = "config.json"
#: What a stored configuration has that is not asked for: the fingerprint of the data, and of a task
#: of the user's own the digests of its source, the first one and those that --same-task let pass.
DATA = "data"
SOURCES = "sources"
_LOCK = ".lock"
_SUM = "sha256"
#: More than any configuration or result has, in bytes.
_MOST = 1 << 20


# --- JSON ------------------------------------------------------------------------------------


def parse(content: bytes) -> Any:
    """The JSON value in ``content``.

    Raises:
        ValueError: there is none, or it has what we never write: NaN, infinities, numbers that no
            float64 holds, or brackets in brackets in brackets until Python gives up.
    """
    try:
        return json.loads(content, parse_constant=_no, parse_float=_float, parse_int=_int)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def _no(name: str) -> float:
    raise ValueError(f"{name} is no number")


def _float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{shortened(text, 20)} is too large")
    return value


def _int(text: str) -> int:
    if len(text) > 19:  # what int64 has; Python's own are as long as one likes
        raise ValueError(f"{shortened(text, 20)} is too large")
    return int(text)


def encoded(value: object) -> bytes:
    """``value`` as JSON text."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    return text.encode("utf-8", "backslashreplace")  # of a lone surrogate: JSON's own escape


def write_json(path: Path, value: object) -> None:
    write_atomically(path, encoded(value))


def write_sealed(path: Path, value: Record) -> None:
    """Write ``value`` with the SHA-256 of all the rest as its last entry."""
    write_atomically(path, _sealed(value))


def _sealed(value: Record) -> bytes:
    return encoded({**value, _SUM: hashlib.sha256(encoded(value)).hexdigest()})


def read_sealed(path: Path) -> Record:
    """What :func:`write_sealed` wrote.

    Raises:
        UnfitError: it is not that to the last byte.
    """
    content = _content(path, _MOST)
    try:
        value = parse(content)
        if not isinstance(value, dict):
            raise ValueError("it is no object")
    except ValueError as error:
        raise UnfitError(f"{path} is damaged ({shortened(error, 80)})") from error
    if _SUM not in value:
        raise UnfitError(f"{path} is damaged, or of an earlier muonkit: it has no {_SUM}")
    del value[_SUM]
    # Written again it must be the same file: so every byte of it counts, spaces included.
    if _sealed(value) != content:
        raise UnfitError(f"{path} is damaged: its SHA-256 is not the one in it")
    return value


def _content(path: Path, most: int, length: int | None = None) -> bytes:
    """:func:`files.read`, for which a file that cannot be read is not fit either."""
    try:
        return files.read(path, most, length)
    except OSError as error:
        raise UnfitError(f"cannot read {path} ({error.strerror or error})") from error


# --- a checkpoint's bytes --------------------------------------------------------------------

_SEAL = b"\nsha256 "
_SEAL_BYTES = len(_SEAL) + 64 + 1


def write_with_sum(path: Path, content: bytes) -> None:
    """Write ``content`` and a last line with its SHA-256, which torch.load does not mind."""
    write_atomically(path, content + _SEAL + hashlib.sha256(content).hexdigest().encode() + b"\n")


def read_with_sum(path: Path, most: int) -> bytes:
    """What :func:`write_with_sum` was given.

    Raises:
        UnfitError: it is not that to the last byte, or has more than ``most``.
    """
    whole = _content(path, most)
    content, seal = whole[:-_SEAL_BYTES], whole[-_SEAL_BYTES:]
    if not seal.startswith(_SEAL):
        raise UnfitError(f"{path} is damaged, or of an earlier muonkit: it does not end in its sum")
    if seal != _SEAL + hashlib.sha256(content).hexdigest().encode() + b"\n":
        raise UnfitError(f"{path} is damaged: its SHA-256 is not the one at its end")
    return content


# --- what is appended to ---------------------------------------------------------------------


def sum_of(length: int, sha256: str) -> Record:
    """What a checkpoint or a result says of another file."""
    return {"bytes": length, _SUM: sha256}


def sum_of_file(path: Path, most: int) -> Record | None:
    """The same of a file as it is now, on the disk; None where there is none.

    Raises:
        UnfitError: it is no plain file, or larger than ``most`` bytes.
    """
    return sum_of(*files.digest(path, most)) if files.is_there(path) else None


def read_summed(path: Path, known: object, most: int) -> bytes:
    """The bytes of a file that a checkpoint or a result knows of, without what came after them.

    Args:
        path: the file.
        known: what :func:`sum_of` made.
        most: bytes that it can have.

    Raises:
        UnfitError: it is not there, or they are other ones.
    """
    if not (
        isinstance(known, dict)
        and known.keys() == {"bytes", _SUM}
        and type(known["bytes"]) is int
        and known["bytes"] >= 0
    ):
        raise UnfitError(f"{path} has no sum to be held to")
    content = _content(path, most, known["bytes"])
    if hashlib.sha256(content).hexdigest() != known[_SUM]:
        raise UnfitError(f"{path} is damaged: its SHA-256 is not the one that was kept")
    return content


class MeasurementFile:
    """An append-only JSONL file that begins with what it had, and knows its sum."""

    def __init__(self, path: Path, content: bytes = b"") -> None:
        self._path, self._file = path, files.begin(path, content)
        self._length, self._sum = len(content), hashlib.sha256(content)

    def append(self, record: Record) -> None:
        """Add a line; RunError where there is no room."""
        line = json.dumps(record, allow_nan=False).encode() + b"\n"
        with self._writing():
            self._file.write(line)
        self._length += len(line)
        self._sum.update(line)

    def sync(self) -> Record:
        """Put everything on disk; its length and SHA-256. RunError where there is no room."""
        with self._writing():
            self._file.flush()
            os.fsync(self._file.fileno())
        return sum_of(self._length, self._sum.hexdigest())

    def close(self) -> None:
        with suppress(OSError):  # of what no checkpoint speaks
            self._file.close()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise RunError(
                f"cannot write {self._path}: {error.strerror or error}; make room there, and the "
                "same command goes on from the last checkpoint"
            ) from error


def parse_lines(content: bytes) -> list[Record]:
    """The records of JSON lines.

    Raises:
        ValueError: a line is no JSON object.
    """
    records = [parse(line) for line in content.splitlines()]
    for number, record in enumerate(records, start=1):
        if not isinstance(record, dict):
            raise ValueError(f"line {number} is no object")
    return records


# --- the folder ------------------------------------------------------------------------------


class Folder:
    """The output folder of one comparison, or of one run in it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def run(self, key: str) -> Path:
        return self.path / "runs" / key

    def check(self, config: Record, loose: Collection[str] = ()) -> bool:
        """Whether the folder holds a comparison of ``config`` to go on with. Changes nothing.

        Args:
            config: what is asked for.
            loose: entries that may differ as long as no run was begun.

        Raises:
            LabError: another configuration, a damaged one, files that are not ours, or no folder
                at all.
        """
        if not self.path.exists():
            return False
        if not self.path.is_dir():
            raise LabError(f"{self.path} is a file: choose another folder with --out")
        if not files.is_there(self.path / CONFIG):
            foreign = [p.name for p in self.path.iterdir() if not p.name.startswith(".")]
            if foreign:
                raise LabError(
                    f"{self.path} holds other files ({', '.join(sorted(foreign)[:3])}): "
                    "choose an empty or new folder with --out"
                )
            return False
        found = self.config()
        free = {DATA, SOURCES, *(() if self.begun() else loose)}
        for name in dict.fromkeys([*config, *found]):
            if name not in free and found.get(name) != config.get(name):
                raise LabError(
                    f"{self.path} holds a comparison with {shortened(name, 40)} = "
                    f"{_shown(found.get(name))}, not {_shown(config.get(name))}: choose another "
                    "folder with --out, or delete it"
                )
        files.check_folder(self.path / "runs")
        return True

    def config(self) -> Record:
        """The stored configuration; LabError when it is damaged."""
        try:
            return read_sealed(self.path / CONFIG)
        except UnfitError as error:
            raise LabError(
                f"{error}: put it back from a copy, or delete the folder {self.path} with all its "
                "runs, or choose another one with --out"
            ) from error

    def create(self, config: Record) -> None:
        """Make the folder and its config; LabError when that is not allowed."""
        files.make_folder(self.path, own=False)
        if not files.is_there(self.path / CONFIG):
            self.configure(config)
        files.make_folder(self.path / "runs")

    def configure(self, config: Record) -> None:
        """Write the configuration, in the place of one that is there."""
        write_sealed(self.path / CONFIG, config)

    def begun(self) -> int:
        """How many runs are finished, or have a checkpoint to go on from."""
        runs = self.path / "runs"
        kept = ("result.json", "checkpoint.pt")
        folders = list(runs.iterdir()) if runs.is_dir() else []
        return sum(any(files.is_there(each / name) for name in kept) for each in folders)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder for this process; the system lets go even if it is killed."""
        path = self.path / _LOCK
        try:
            lock = files.open_lock(path)
        except UnfitError as error:
            raise LabError(f"{error}: delete it, and give the command again") from error
        except OSError as error:
            raise LabError(
                f"cannot open {path} ({error.strerror or error}), which tells two commands in one "
                "folder apart: see to its rights, or choose another folder with --out"
            ) from error
        with lock:
            _hold(lock.fileno(), self.path)
            files.remove_rests(self.path)
            yield


def _shown(value: object) -> str:
    return shortened(json.dumps(value), 80)


def _hold(descriptor: int, folder: Path) -> None:
    """Lock the open file without waiting.

    Raises:
        LabError: another process has it, or the file system has no locks.
    """
    if fcntl is None:
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EWOULDBLOCK):
            raise LabError(
                f"another muonkit is running in {folder}: wait for it, or choose another folder "
                "with --out"
            ) from error
        raise LabError(
            f"cannot lock {folder / _LOCK} ({error.strerror or error}), and two commands in one "
            "folder would spoil it: choose a folder with --out on a file system that has locks"
        ) from error
