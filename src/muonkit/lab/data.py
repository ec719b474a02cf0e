"""Data sets as batches that depend on nothing but (seed, step).

Every batch, its order and its augmentation, is a pure function of the run's seed and the step
number. So every optimizer sees the same batches, and a resumed run needs no generator's state.
"""

import gzip
import hashlib
import sysconfig
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from muonkit._install import install_line
from muonkit.lab.download import RemoteFile, fetch, local_copy
from muonkit.lab.errors import DataError, LabError
from muonkit.lab.randomness import generator

Batch = tuple[Tensor, Tensor]


class Data(Protocol):
    """What a task trains and validates on."""

    @property
    def description(self) -> str:
        """One line for the report."""

    @property
    def fingerprint(self) -> str:
        """Changes when the data change; a resumed comparison must find the same."""

    def steps_per_epoch(self, batch_size: int) -> int:
        """Whole batches in one pass; LabError when there is not a single one."""

    def batch(self, seed: int, step: int, size: int) -> Any:
        """What the loss takes at one step (counted from 0): (inputs, targets), if it is ours."""

    def go_to(self, seed: int, step: int) -> None:
        """Be ready for this step: what takes time only where a run is taken up, which its measured
        seconds are not to have.
        """

    def validation(self) -> Iterator[Any]:
        """The fixed validation set, in batches."""


def _fingerprint(*tensors: Tensor) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def _whole_batches(examples: int, batch_size: int) -> int:
    if batch_size > examples:
        raise LabError(f"batch size {batch_size} exceeds the {examples} training examples")
    return examples // batch_size


@lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, examples: int) -> Tensor:
    return torch.randperm(examples, generator=generator("order", seed, epoch))


@dataclass(frozen=True, eq=False)
class ImageData:
    """Images and labels in memory: ``x`` uint8 (N, C, H, W), ``y`` int64 (N,)."""

    description: str
    train_x: Tensor
    train_y: Tensor
    val_x: Tensor
    val_y: Tensor
    mean: tuple[float, ...]
    std: tuple[float, ...]
    augment: bool = False
    channels_last: bool = False
    fingerprint: str = field(init=False)

    def __post_init__(self) -> None:
        tensors = (self.train_x, self.train_y, self.val_x, self.val_y)
        object.__setattr__(self, "fingerprint", _fingerprint(*tensors))

    def steps_per_epoch(self, batch_size: int) -> int:
        return _whole_batches(len(self.train_x), batch_size)

    def go_to(self, seed: int, step: int) -> None:
        """Every step is at hand."""

    def batch(self, seed: int, step: int, size: int) -> Batch:
        epoch, position = divmod(step, self.steps_per_epoch(size))
        order = _permutation(seed, epoch, len(self.train_x))
        chosen = order[position * size : (position + 1) * size]
        images = self.train_x[chosen]
        if self.augment:
            images = flip_and_crop(images, generator("augment", seed, step))
        return self._inputs(images), self.train_y[chosen]

    def validation(self) -> Iterator[Batch]:
        for x, y in zip(torch.split(self.val_x, 1000), torch.split(self.val_y, 1000), strict=True):
            yield self._inputs(x), y

    def _inputs(self, images: Tensor) -> Tensor:
        shape = (1, -1, 1, 1)
        mean, std = torch.tensor(self.mean).view(shape), torch.tensor(self.std).view(shape)
        inputs = (images.float().div_(255) - mean) / std
        if self.channels_last:
            return inputs.contiguous(memory_format=torch.channels_last)
        return inputs


def flip_and_crop(images: Tensor, rng: torch.Generator, pad: int = 2) -> Tensor:
    """Mirror half of the (N, C, H, W) images and shift each by up to ``pad`` pixels each way."""
    count, channels, height, width = images.shape
    padded = F.pad(images.float(), (pad,) * 4, mode="reflect").to(images.dtype)
    top, left = torch.randint(2 * pad + 1, (2, count, 1), generator=rng)
    mirrored = torch.rand(count, 1, generator=rng) < 0.5
    rows = top + torch.arange(height)
    columns = torch.arange(width).expand(count, width)
    columns = left + torch.where(mirrored, columns.flip(1), columns)
    which = torch.arange(count).view(-1, 1, 1, 1)
    plane = torch.arange(channels).view(1, -1, 1, 1)
    return padded[which, plane, rows.view(count, 1, -1, 1), columns.view(count, 1, 1, -1)]


@dataclass(frozen=True, eq=False)
class TextData:
    """Bytes, one long row each for training and validation: uint8 (N,)."""

    description: str
    train: Tensor
    val: Tensor
    context: int
    val_windows: int = 128
    fingerprint: str = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "fingerprint", _fingerprint(self.train, self.val))

    def steps_per_epoch(self, batch_size: int) -> int:
        return _whole_batches(len(self.train) // self.context, batch_size)

    def go_to(self, seed: int, step: int) -> None:
        """Every step is at hand."""

    def batch(self, seed: int, step: int, size: int) -> Batch:
        last = len(self.train) - self.context - 1
        starts = torch.randint(last + 1, (size,), generator=generator("window", seed, step))
        return self._windows(self.train, starts)

    def validation(self) -> Iterator[Batch]:
        last = len(self.val) - self.context - 1
        starts = torch.linspace(0, last, self.val_windows).long()
        for some in torch.split(starts, 32):
            yield self._windows(self.val, some)

    def _windows(self, text: Tensor, starts: Tensor) -> Batch:
        index = starts.unsqueeze(1) + torch.arange(self.context + 1)
        windows = text[index].long()
        return windows[:, :-1], windows[:, 1:]


# --- Python's own standard library -----------------------------------------------------------

#: Folders of the standard library that are not library source, or not there on every machine.
_SKIPPED = {"test", "tests", "idlelib", "turtledemo", "site-packages", "dist-packages"}


def _source_files(root: Path) -> Iterator[tuple[str, bytes]]:
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if _SKIPPED.isdisjoint(name.parts):
            try:
                source = path.read_bytes()
                source.decode("utf-8")
            except (OSError, UnicodeDecodeError):
                continue
            yield name.as_posix(), source


def stdlib_text(context: int, cap: int = 8_000_000, root: Path | None = None) -> TextData:
    """The source of Python's standard library as bytes; about one file in ten validates.

    Files come in sorted order until ``cap`` bytes are full. The hash of a file's name decides
    its side, so a file stays on it whatever else is installed.

    Raises:
        DataError: less than 100 kB of source was found.
    """
    root = root or Path(sysconfig.get_path("stdlib"))
    sides: dict[bool, list[bytes]] = {False: [], True: []}
    total = 0
    for name, source in _source_files(root):
        if total + len(source) > cap:
            break
        total += len(source)
        validates = hashlib.sha256(name.encode()).digest()[0] < 26
        sides[validates].append(source)
    train, val = b"\n".join(sides[False]), b"\n".join(sides[True])
    if total < 100_000 or len(val) <= context + 1:
        raise DataError(
            f"found {total} bytes of Python source in {root}, need 100000: run with a Python "
            "that has its standard library as .py files"
        )
    files = sum(map(len, sides.values()))
    return TextData(
        f"source of Python's standard library: {files} files, {len(train):,} bytes to train on, "
        f"{len(val):,} to validate",
        torch.frombuffer(bytearray(train), dtype=torch.uint8),
        torch.frombuffer(bytearray(val), dtype=torch.uint8),
        context,
    )


# --- scikit-learn's digits -------------------------------------------------------------------


def digits() -> ImageData:
    """1,797 8 × 8 digits that come with scikit-learn; every fifth validates."""
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        raise DataError(f"the task digits needs scikit-learn: {install_line('lab')}") from error
    bunch = load_digits()
    # 0…16 in the file; the pipeline's range is 0…255.
    images = torch.from_numpy(bunch.images * 255 / 16).round().to(torch.uint8).unsqueeze(1)
    labels = torch.from_numpy(bunch.target).long()
    held_out = torch.arange(len(labels)) % 5 == 4
    return ImageData(
        f"scikit-learn's 8 x 8 digits: {int((~held_out).sum())} to train on, "
        f"{int(held_out.sum())} to validate",
        images[~held_out],
        labels[~held_out],
        images[held_out],
        labels[held_out],
        mean=(0.3053,),
        std=(0.3760,),
    )


# --- MNIST -----------------------------------------------------------------------------------

_MNIST_MIRRORS = (
    "https://ossci-datasets.s3.amazonaws.com/mnist/",
    "https://storage.googleapis.com/cvdf-datasets/mnist/",
)
_MNIST_FILES = {
    name: RemoteFile(name, sha256, [mirror + name for mirror in _MNIST_MIRRORS])
    for name, sha256 in (
        (
            "train-images-idx3-ubyte.gz",
            "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
        ),
        (
            "train-labels-idx1-ubyte.gz",
            "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
        ),
        (
            "t10k-images-idx3-ubyte.gz",
            "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
        ),
        (
            "t10k-labels-idx1-ubyte.gz",
            "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
        ),
    )
}
_REPLACE = "replace the file, or unset MUONKIT_DATA to download it"


def read_idx(path: Path, shape: tuple[int, ...]) -> Tensor:
    """An IDX file of unsigned bytes (gzipped when it ends in .gz) as a uint8 tensor.

    Args:
        path: the file.
        shape: the shape it must declare and hold.

    Raises:
        DataError: wrong magic number, wrong shape, truncated, or unreadable.
    """
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path} is truncated or no gzip file ({error}): {_REPLACE}") from error
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}; {_REPLACE}") from error
    header = 4 + 4 * len(shape)
    magic = (0x08 << 8) + len(shape)
    if len(raw) < header:
        raise DataError(f"{path} holds {len(raw)} bytes, an IDX header has {header}: {_REPLACE}")
    words = np.frombuffer(raw, dtype=">u4", count=1 + len(shape))
    if words[0] != magic:
        raise DataError(f"{path} begins with {words[0]:#010x}, expected {magic:#010x}: {_REPLACE}")
    found = tuple(int(word) for word in words[1:])
    if found != shape:
        raise DataError(f"{path} declares shape {found}, expected {shape}: {_REPLACE}")
    expected = header + int(np.prod(shape))
    if len(raw) != expected:
        raise DataError(f"{path} unpacks to {len(raw)} bytes, expected {expected}: {_REPLACE}")
    return torch.frombuffer(bytearray(raw[header:]), dtype=torch.uint8).view(shape)


def _labels(labels: Tensor, path: Path) -> Tensor:
    if int(labels.max()) > 9:
        raise DataError(f"{path} has label {int(labels.max())}, expected 0 to 9: {_REPLACE}")
    return labels.long()


def _mnist_path(name: str) -> Path:
    return local_copy("mnist", name, name.removesuffix(".gz")) or fetch(_MNIST_FILES[name], "mnist")


def mnist() -> ImageData:
    """MNIST from ``$MUONKIT_DATA/mnist`` or the network; its 10,000 test images validate."""
    parts: dict[str, tuple[Tensor, Tensor]] = {}
    for side, count in (("train", 60_000), ("t10k", 10_000)):
        images = _mnist_path(f"{side}-images-idx3-ubyte.gz")
        labels = _mnist_path(f"{side}-labels-idx1-ubyte.gz")
        parts[side] = (
            read_idx(images, (count, 28, 28)).unsqueeze(1),
            _labels(read_idx(labels, (count,)), labels),
        )
    return ImageData(
        "MNIST: 60,000 to train on, 10,000 to validate",
        *parts["train"],
        *parts["t10k"],
        mean=(0.1307,),
        std=(0.3081,),
    )


# --- CIFAR-10 --------------------------------------------------------------------------------

_CIFAR_NAME = "cifar-10-binary.tar.gz"
_CIFAR_FILE = RemoteFile(
    _CIFAR_NAME,
    "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
    ["https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"],
)
_CIFAR_FOLDER = "cifar-10-batches-bin"
_CIFAR_BATCHES = (*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin")
_CIFAR_RECORD = 1 + 3 * 32 * 32
_CIFAR_BYTES = 10_000 * _CIFAR_RECORD


def _cifar_members(path: Path) -> dict[str, bytes]:
    """The six batches of the tar file (or of the unpacked folder) at ``path``."""
    if path.is_dir():
        return {n: (path / n).read_bytes() for n in _CIFAR_BATCHES if (path / n).is_file()}
    found = {}
    try:
        # One pass: seeking in a gzipped tar unpacks it again from the start.
        with gzip.open(path) as unpacked:
            with tarfile.open(fileobj=unpacked, mode="r|") as tar:
                for member in tar:
                    name = member.name.rpartition("/")[2]
                    content = tar.extractfile(member) if name in _CIFAR_BATCHES else None
                    if content is not None:
                        found[name] = content.read()
            # To the very end, where gzip's checksum is: tarfile stops at the last member.
            while unpacked.read(1 << 20):
                pass
    except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path} is truncated or no tar.gz ({error}): {_REPLACE}") from error
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}; {_REPLACE}") from error
    return found


def read_cifar(path: Path) -> dict[str, Batch]:
    """``train`` and ``test`` as (uint8 (N, 3, 32, 32), int64 (N,)) from the official binary layout.

    Raises:
        DataError: a batch is missing or of the wrong size, a label is above 9, or ``path`` is
            truncated.
    """
    members = _cifar_members(path)
    parts: dict[str, list[Tensor]] = {"train": [], "test": []}
    for name in _CIFAR_BATCHES:
        if name not in members:
            raise DataError(f"{path} has no {_CIFAR_FOLDER}/{name}: {_REPLACE}")
        raw = members[name]
        if len(raw) != _CIFAR_BYTES:
            raise DataError(
                f"{name} in {path} has {len(raw)} bytes, expected {_CIFAR_BYTES}: {_REPLACE}"
            )
        records = torch.frombuffer(bytearray(raw), dtype=torch.uint8).view(-1, _CIFAR_RECORD)
        parts["test" if name.startswith("test") else "train"].append(records)
    sides = {}
    for side, tensors in parts.items():
        records = torch.cat(tensors)
        images = records[:, 1:].reshape(-1, 3, 32, 32)
        sides[side] = (images, _labels(records[:, 0], path))
    return sides


def cifar10() -> ImageData:
    """CIFAR-10 from ``$MUONKIT_DATA/cifar10`` or the network; its test images validate."""
    path = local_copy("cifar10", _CIFAR_NAME, _CIFAR_FOLDER) or fetch(_CIFAR_FILE, "cifar10")
    sides = read_cifar(path)
    return ImageData(
        "CIFAR-10: 50,000 to train on (mirrored, shifted), 10,000 to validate",
        *sides["train"],
        *sides["test"],
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.2470, 0.2435, 0.2616),
        augment=True,
        channels_last=True,
    )
