"""What a comparison keeps on disk, so that it can stop anywhere and go on.

::

    OUT/config.json            what was asked for; the folder belongs to this configuration alone
    OUT/runs/KEY/measurements.jsonl   one line per step and per validation, appended while it runs
    OUT/runs/KEY/checkpoint.pt        the run in progress, replaced from time to time
    OUT/runs/KEY/result.json          the run's figures; its presence means the run is finished
    OUT/measurements.jsonl, summary.json, *.png, report.html          written at the end

Every file but a run's own measurements is written beside its place and renamed. The measurements
are only appended to; the checkpoint holds their length, and what lies behind it is cut off.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from muonkit.lab.errors import LabError, RunError

try:
    import fcntl
except ImportError:  # Windows: two processes in one folder are not noticed there
    fcntl = None  # type: ignore[assignment]

Record = dict[str, Any]

CONFIG = "config.json"
#: The one entry of a stored configuration that is not asked for: the fingerprint of the data.
DATA = "data"
_LOCK = ".lock"


def write_atomically(path: Path, content: bytes) -> None:
    """Write ``content`` to ``path``: the whole of it, or nothing.

    Raises:
        RunError: there is no room, or no right to write; nothing is left behind.
    """
    beside = path.with_name(f".{path.name}.tmp")
    try:
        with beside.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except OSError as error:
        with suppress(OSError):
            beside.unlink(missing_ok=True)
        raise RunError(
            f"cannot write {path}: {error.strerror or error}; make room there, or choose another "
            "folder with --out, and give the command again"
        ) from error


def write_json(path: Path, value: object) -> None:
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    write_atomically(path, text.encode())


def read_json(path: Path) -> Any:
    """The value in ``path``; LabError when it is no JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise LabError(f"cannot read {path} ({error}): choose another folder with --out") from error


class MeasurementFile:
    """An append-only JSONL file that can be cut back to a length it once had."""

    def __init__(self, path: Path, length: int = 0) -> None:
        self.path = path
        self._file: BinaryIO = path.open("ab")
        self._file.truncate(length)
        self._file.seek(0, os.SEEK_END)

    def append(self, record: Record) -> None:
        self._file.write(json.dumps(record, allow_nan=False).encode() + b"\n")

    def sync(self) -> int:
        """Put everything on disk; the file's length in bytes."""
        self._file.flush()
        os.fsync(self._file.fileno())
        return self._file.tell()

    def close(self) -> None:
        self._file.close()


def read_records(path: Path, length: int | None = None) -> list[Record]:
    """The records in the first ``length`` bytes (all of them when None).

    Raises:
        ValueError: the file is shorter than that, or a line is no JSON.
    """
    with path.open("rb") as file:
        content = file.read() if length is None else file.read(length)
    if length is not None and len(content) != length:
        raise ValueError(f"{path} has {len(content)} bytes, expected {length} or more")
    return [json.loads(line) for line in content.splitlines()]


class Folder:
    """The output folder of one comparison."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def run(self, key: str) -> Path:
        return self.path / "runs" / key

    def check(self, config: Record) -> bool:
        """Whether the folder holds a comparison of ``config`` to go on with. Changes nothing.

        Raises:
            LabError: another configuration, files that are not ours, or no folder at all.
        """
        if not self.path.exists():
            return False
        if not self.path.is_dir():
            raise LabError(f"{self.path} is a file: choose another folder with --out")
        stored = self.path / CONFIG
        if not stored.exists():
            foreign = [p.name for p in self.path.iterdir() if not p.name.startswith(".")]
            if foreign:
                raise LabError(
                    f"{self.path} holds other files ({', '.join(sorted(foreign)[:3])}): "
                    "choose an empty or new folder with --out"
                )
            return False
        found = read_json(stored)
        for name in dict.fromkeys([*config, *found]):
            if name != DATA and found.get(name) != config.get(name):
                raise LabError(
                    f"{self.path} holds a comparison with {name} = {json.dumps(found.get(name))}, "
                    f"not {json.dumps(config.get(name))}: choose another folder with --out, or "
                    "delete it"
                )
        return True

    def create(self, config: Record) -> None:
        """Make the folder and its config; LabError when that is not allowed."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            if not (self.path / CONFIG).exists():
                write_json(self.path / CONFIG, config)
        except OSError as error:
            raise LabError(
                f"cannot write to {self.path}: {error.strerror}; choose another folder with --out"
            ) from error

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder for this process; the system lets go even if it is killed."""
        if fcntl is None:
            yield
            return
        with (self.path / _LOCK).open("wb") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise LabError(
                    f"another muonkit is running in {self.path}: wait for it, or choose another "
                    "folder with --out"
                ) from error
            yield
