"""Files from the network, checked and cached, or from a folder the user names.

A download goes to a temporary file, is compared with its SHA-256 and only then renamed into the
cache, so the cache never holds half a file (``pooch`` does this).
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pooch  # type: ignore[import-untyped]
import requests
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from muonkit.lab.errors import DataError
from muonkit.lab.output import Console

#: Seconds without a byte after which a mirror is given up.
TIMEOUT = 30.0


@dataclass(frozen=True)
class RemoteFile:
    """One file of a data set: its name, its SHA-256, and the addresses that serve it."""

    name: str
    sha256: str
    urls: Sequence[str]


def cache_folder() -> Path:
    """``MUONKIT_CACHE``, or muonkit's folder in ``XDG_CACHE_HOME`` (default ``~/.cache``)."""
    if own := os.environ.get("MUONKIT_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "muonkit"


def local_copy(dataset: str, *names: str) -> Path | None:
    """The first of ``names`` below ``$MUONKIT_DATA/dataset``; None when the variable is not set.

    Raises:
        DataError: the variable is set and none of the names is there.
    """
    root = os.environ.get("MUONKIT_DATA")
    if not root:
        return None
    folder = Path(root).expanduser() / dataset
    for name in names:
        if (folder / name).exists():
            return folder / name
    raise DataError(
        f"no {' or '.join(names)} in {folder}: put it there, or unset MUONKIT_DATA to download it"
    )


class _RichBar:
    """The three methods pooch asks of a progress bar, on a rich one (silent off a terminal)."""

    def __init__(self, name: str) -> None:
        columns = (TextColumn(name), BarColumn(), DownloadColumn(), TransferSpeedColumn())
        console = Console(stderr=True)
        self._progress = Progress(*columns, console=console, disable=not console.is_terminal)
        self._task = self._progress.add_task(name, total=None)
        self._total = 0

    @property
    def total(self) -> int:
        return self._total

    @total.setter
    def total(self, value: int) -> None:
        self._total = value
        self._progress.update(self._task, total=value or None)
        self._progress.start()

    def update(self, size: int) -> None:
        self._progress.advance(self._task, size)

    def reset(self) -> None:
        # pooch resets the bar after the last byte and then adds the total once more.
        self._progress.reset(self._task)

    def close(self) -> None:
        self._progress.stop()


def _why(error: Exception) -> str:
    """One short clause for a failed download; requests' own messages run over several lines."""
    if isinstance(error, requests.HTTPError) and error.response is not None:
        return f"HTTP status {error.response.status_code}"
    if isinstance(error, requests.Timeout):
        return f"no answer in {TIMEOUT:g} s"
    if isinstance(error, requests.ConnectionError):
        return "no connection"
    if isinstance(error, ValueError):  # pooch's hash mismatch
        return "its SHA-256 is not the official one"
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def fetch(file: RemoteFile, dataset: str) -> Path:
    """The path of ``file`` in the cache, downloaded first when it is absent or damaged.

    Args:
        file: what to fetch; its addresses are tried in order.
        dataset: the folder of the cache it belongs to.

    Raises:
        DataError: no address gave the file with its checksum, or the cache cannot be written.
    """
    folder = cache_folder() / dataset
    pooch.get_logger().setLevel("ERROR")
    failures = []
    for url in file.urls:
        bar = _RichBar(file.name)
        try:
            found = pooch.retrieve(
                url,
                known_hash=f"sha256:{file.sha256}",
                fname=file.name,
                path=folder,
                downloader=pooch.HTTPDownloader(progressbar=bar, timeout=TIMEOUT),
            )
            return Path(found)
        except (requests.RequestException, ValueError) as error:
            failures.append(f"{url}: {_why(error)}")
        except OSError as error:
            raise DataError(
                f"cannot write {folder}: {error.strerror or error}; "
                "set MUONKIT_CACHE to a folder you may write to"
            ) from error
        finally:
            bar.close()
    raise DataError(
        f"cannot download {file.name} ({'; '.join(failures)}): connect to the network, "
        f"or set MUONKIT_DATA to a folder that has {dataset}/{file.name}"
    )
