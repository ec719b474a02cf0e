"""The lab's data: batches depend on (seed, step) alone; damaged or absent files are one line."""

from __future__ import annotations

import gzip
import hashlib
import os
import shutil
import struct
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

from muonkit.lab import data, download
from muonkit.lab.errors import DataError, LabError
from tests.helpers.lab import write_cifar
from tests.helpers.paths import SHARED

DATA = SHARED / "data"


# --- batches ---


@pytest.fixture(scope="module")
def digits() -> data.ImageData:
    return data.digits()


def test_batches_depend_on_seed_and_step_alone(digits: data.ImageData) -> None:
    first = digits.batch(seed=0, step=30, size=64)
    digits.batch(seed=1, step=0, size=64)
    torch.manual_seed(123)
    again = digits.batch(seed=0, step=30, size=64)
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    other = digits.batch(seed=1, step=30, size=64)
    assert not torch.equal(first[0], other[0])


def test_an_epoch_shows_every_example_once(digits: data.ImageData) -> None:
    size = 719  # 1,438 training images = 2 batches of 719
    steps = digits.steps_per_epoch(size)
    assert steps == 2
    for epoch in range(2):
        seen = torch.cat([digits.batch(0, epoch * steps + i, size)[0] for i in range(steps)])
        inputs = digits._inputs(digits.train_x)
        assert torch.equal(seen.flatten(1).sum(1).sort()[0], inputs.flatten(1).sum(1).sort()[0])


def test_a_batch_larger_than_the_data_is_refused(digits: data.ImageData) -> None:
    with pytest.raises(LabError, match="batch size 5000 exceeds the 1438"):
        digits.steps_per_epoch(5000)


def test_flip_and_crop_moves_whole_images() -> None:
    images = torch.arange(4 * 3 * 8 * 8, dtype=torch.uint8).view(4, 3, 8, 8)
    many = images.repeat(32, 1, 1, 1)
    moved = data.flip_and_crop(many, data.generator("test"), pad=2)
    assert moved.shape == many.shape
    assert moved.dtype == torch.uint8
    padded = torch.nn.functional.pad(many.float(), (2,) * 4, mode="reflect").to(torch.uint8)
    kinds = set()
    for i in range(len(many)):
        windows = {
            (top, left, mirrored): (window.flip(-1) if mirrored else window)
            for top in range(5)
            for left in range(5)
            for mirrored in (False, True)
            for window in [padded[i, :, top : top + 8, left : left + 8]]
        }
        matching = [kind for kind, window in windows.items() if torch.equal(window, moved[i])]
        assert matching, f"image {i} is no shifted or mirrored copy"
        kinds.add(matching[0])
    assert len(kinds) > 10


def _library(root: Path, files: int) -> Path:
    for i in range(files):
        path = root / f"package{i % 3}" / f"module{i}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"# {i}\n" * 1000)
    (root / "test").mkdir()
    (root / "test" / "never.py").write_text("never = 1\n" * 10_000)
    (root / "latin.py").write_bytes(b"# caf\xe9\n" * 1000)
    return root


def test_text_splits_by_file_and_skips_tests(tmp_path: Path) -> None:
    text = data.stdlib_text(16, root=_library(tmp_path, 60))
    for side in (text.train, text.val):
        content = bytes(side.tolist())
        assert b"never" not in content
        assert b"caf" not in content
    assert 0 < len(text.val) < len(text.train) / 2
    x, y = text.batch(0, 0, 4)
    assert x.shape == y.shape == (4, 16)
    assert torch.equal(x[:, 1:], y[:, :-1])
    # A file stays on its side when others are added after it.
    capped = data.stdlib_text(16, cap=130_000, root=tmp_path)
    assert bytes(text.train.tolist()).startswith(bytes(capped.train.tolist()))


def test_a_python_without_sources_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="found 0 bytes of Python source"):
        data.stdlib_text(16, root=tmp_path)


# --- IDX ---


def _idx(shape: tuple[int, ...], magic: int | None = None, cut: int = 0, fill: int = 3) -> bytes:
    count = 1
    for size in shape:
        count *= size
    header = struct.pack(f">{1 + len(shape)}I", magic or 0x0800 + len(shape), *shape)
    content = header + bytes([fill]) * count
    return content[: len(content) - cut]


@pytest.mark.parametrize("packed", [True, False])
def test_idx_is_read_packed_or_not(tmp_path: Path, packed: bool) -> None:
    path = tmp_path / ("images.gz" if packed else "images")
    content = _idx((5, 4, 3), fill=7)
    path.write_bytes(gzip.compress(content) if packed else content)
    images = data.read_idx(path, (5, 4, 3))
    assert images.shape == (5, 4, 3)
    assert (images == 7).all()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (gzip.compress(_idx((5, 4, 3)))[:-12], "is truncated or no gzip file"),
        (_idx((5, 4, 3)), "is truncated or no gzip file"),
        (gzip.compress(_idx((5, 4, 3), magic=0x0801)), "begins with 0x00000801, expected 0x00"),
        (gzip.compress(_idx((5, 4, 2))), r"declares shape \(5, 4, 2\), expected \(5, 4, 3\)"),
        (gzip.compress(_idx((5, 4, 3), cut=1)), "unpacks to 75 bytes, expected 76"),
        (gzip.compress(b"\x00\x00\x08"), "holds 3 bytes, an IDX header has 16"),
    ],
    ids=["truncated gzip", "no gzip", "magic", "shape", "truncated idx", "no header"],
)
def test_damaged_idx_names_file_found_and_expected(
    tmp_path: Path, content: bytes, message: str
) -> None:
    path = tmp_path / "images.gz"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        data.read_idx(path, (5, 4, 3))
    assert str(path) in str(caught.value)
    assert "replace the file" in str(caught.value)


def test_mnist_labels_are_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "mnist"
    folder.mkdir()
    monkeypatch.setenv("MUONKIT_DATA", str(tmp_path))
    for side, count in (("train", 60_000), ("t10k", 10_000)):
        (folder / f"{side}-images-idx3-ubyte").write_bytes(_idx((count, 28, 28)))
        (folder / f"{side}-labels-idx1-ubyte").write_bytes(_idx((count,)))
    assert data.mnist().steps_per_epoch(100) == 600
    (folder / "train-labels-idx1-ubyte").write_bytes(_idx((60_000,), fill=10))
    with pytest.raises(DataError, match="has label 10, expected 0 to 9"):
        data.mnist()


def test_a_missing_local_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MUONKIT_DATA", str(tmp_path))
    with pytest.raises(DataError, match=r"no train-images-idx3-ubyte.gz or .* unset MUONKIT_DATA"):
        data.mnist()


# --- CIFAR-10 ---


def test_cifar_is_read_from_a_tar_file(tmp_path: Path) -> None:
    sides = data.read_cifar(write_cifar(tmp_path / "c.tar.gz"))
    assert sides["train"][0].shape == (50_000, 3, 32, 32)
    assert sides["test"][1].tolist() == [9] * 10_000


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ({"cut": "data_batch_3.bin"}, "data_batch_3.bin .*30729995 bytes, expected 30730000"),
        ({"drop": "test_batch.bin"}, "has no cifar-10-batches-bin/test_batch.bin"),
        ({"label": 10}, "has label 10, expected 0 to 9"),
    ],
    ids=["size", "missing", "label"],
)
def test_damaged_cifar_is_named(tmp_path: Path, damage: dict[str, str], message: str) -> None:
    path = write_cifar(tmp_path / "c.tar.gz", **damage)  # type: ignore[arg-type]
    with pytest.raises(DataError, match=message):
        data.read_cifar(path)


def test_a_truncated_tar_file_is_named(tmp_path: Path) -> None:
    path = write_cifar(tmp_path / "c.tar.gz")
    path.write_bytes(path.read_bytes()[:-40_000])
    with pytest.raises(DataError, match=r"is truncated or no tar.gz"):
        data.read_cifar(path)


@pytest.mark.skipif(not DATA.exists(), reason="no local copy of MNIST and CIFAR-10")
def test_the_real_files_load(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MUONKIT_DATA", str(DATA))
    digits, pictures = data.mnist(), data.cifar10()
    assert digits.train_y.bincount().tolist()[0] == 5923  # the published count of zeros
    assert pictures.train_y.bincount().tolist() == [5000] * 10
    for real in (digits, pictures):
        x, y = real.batch(0, 0, 32)
        assert abs(x.mean().item()) < 0.3
        assert 0.7 < x.std().item() < 1.3
        assert y.shape == (32,)
    assert x.is_contiguous(memory_format=torch.channels_last)


# --- downloads ---

CONTENT = os.urandom(200_000)


class _Quiet(SimpleHTTPRequestHandler):
    requests: list[str]

    def log_message(self, format: str, *args: object) -> None:
        self.requests.append(self.path)


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, list[str]]]:
    """The address of a server that has ``file.bin``, and the requests it logs."""
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv("MUONKIT_DATA", raising=False)
    monkeypatch.setenv("MUONKIT_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "served"
    folder.mkdir()
    (folder / "file.bin").write_bytes(CONTENT)
    requests: list[str] = []
    handler = type("Handler", (_Quiet,), {"requests": requests})
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=folder)) as http:
        thread = threading.Thread(target=http.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{http.server_port}", requests
        finally:
            http.shutdown()
            thread.join()


def _remote(*urls: str, content: bytes = CONTENT) -> download.RemoteFile:
    return download.RemoteFile("file.bin", hashlib.sha256(content).hexdigest(), urls)


def test_a_download_is_checked_and_cached(server: tuple[str, list[str]]) -> None:
    address, requests = server
    file = _remote(f"{address}/file.bin")
    path = download.fetch(file, "set")
    assert path.read_bytes() == CONTENT
    assert download.fetch(file, "set") == path
    assert len(requests) == 1
    path.write_bytes(CONTENT[:1000])  # a damaged cache is mended
    assert download.fetch(file, "set").read_bytes() == CONTENT


def test_the_next_mirror_is_tried(server: tuple[str, list[str]]) -> None:
    address, _ = server
    file = _remote(f"{address}/gone.bin", f"{address}/file.bin")
    assert download.fetch(file, "set").read_bytes() == CONTENT


def test_a_wrong_checksum_leaves_nothing_behind(
    server: tuple[str, list[str]], tmp_path: Path
) -> None:
    address, _ = server
    with pytest.raises(DataError, match="its SHA-256 is not the official one") as caught:
        download.fetch(_remote(f"{address}/file.bin", content=b"other"), "set")
    assert "MUONKIT_DATA" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert list((tmp_path / "cache" / "set").iterdir()) == []


def test_no_network_is_one_line(server: tuple[str, list[str]], tmp_path: Path) -> None:
    address, _ = server
    with pytest.raises(DataError, match=r"status 404.*no connection.*connect to the") as caught:
        download.fetch(_remote(f"{address}/gone.bin", "http://127.0.0.1:9/file.bin"), "set")
    assert "\n" not in str(caught.value)


def test_a_cache_that_cannot_be_written_is_named(
    server: tuple[str, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "plain").write_text("a file, where a folder is needed")
    monkeypatch.setenv("MUONKIT_CACHE", str(tmp_path / "plain"))
    with pytest.raises(DataError, match=r"cannot write .*set MUONKIT_CACHE"):
        download.fetch(_remote(f"{server[0]}/file.bin"), "set")


def test_the_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MUONKIT_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", os.path.join(os.sep, "x"))
    assert download.cache_folder() == Path(os.sep, "x", "muonkit")
    monkeypatch.setenv("MUONKIT_CACHE", os.path.join(os.sep, "y"))
    assert download.cache_folder() == Path(os.sep, "y")


@pytest.fixture(autouse=True)
def _no_rests(tmp_path: Path) -> Iterator[None]:
    """The CIFAR archives unpack to 180 MB each; do not keep what pytest would keep."""
    yield
    shutil.rmtree(tmp_path, ignore_errors=True)
