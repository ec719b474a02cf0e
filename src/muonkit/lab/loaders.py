"""The batches of a task of one's own: a loader, a list or a function as a function of (seed, step).

Before each batch is drawn the global random numbers are seeded by the run's seed and the step, and
a loader's own generator is at the beginning of each pass. So a shuffling ``DataLoader`` gives every
optimizer the same batches, and a run that is taken up goes through those of the pass so far.
"""

import hashlib
import inspect
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from muonkit.lab.errors import TaskError
from muonkit.lab.objective import Batch, by_name
from muonkit.lab.randomness import number_of, seed_all
from muonkit.lab.user import failed, users

#: A validation set that has no length and more batches than this is taken for endless.
ENDLESS = 10_000
#: Training batches that the fingerprint has.
FIRST = 2
_END = object()


class Source:
    """One side of the data, which can be gone through as often as one likes.

    Args:
        given: what the task returned: a loader, any iterable, or a function that makes one.
        name: how errors call it.

    Raises:
        TaskError: it is none of these, or can be gone through once only.
    """

    def __init__(self, given: Any, name: str) -> None:
        self.given, self.name = given, name
        is_examples = isinstance(given, Dataset) and not isinstance(given, IterableDataset)
        if is_examples or isinstance(given, Tensor | str | bytes | Mapping):
            raise TaskError(
                f"{name} is of type {type(given).__name__}, expected batches: write "
                "DataLoader(dataset, batch_size=32), or give a list of batches, or a function that "
                "makes an iterable of them"
            )
        if not isinstance(given, Iterable) and not callable(given):
            raise TaskError(
                f"{name} is of type {type(given).__name__}, expected a DataLoader, an iterable of "
                "batches, or a function that makes one"
            )
        if isinstance(given, Iterator):
            raise TaskError(
                f"{name} is a {type(given).__name__}, which can be gone through only once: return "
                "the function that makes it (without calling it), a list or a DataLoader"
            )
        self.length = self._length()
        if self.length == 0:
            raise self.empty()

    def _length(self) -> int | None:
        """Batches in a pass; None where nobody knows."""
        if not hasattr(self.given, "__len__"):
            return None
        try:
            return len(self.given)
        except TypeError:  # a DataLoader of an IterableDataset without a length
            return None
        except Exception as error:
            raise failed(f"len() of {self.name}", error) from error

    def empty(self) -> TaskError:
        hint = ", and drop_last=True leaves out the only one" if _drops(self.given) else ""
        return TaskError(
            f"{self.name} has no batches{hint}: give it more examples, or smaller batches of them"
        )

    def begin(self, *key: object) -> Iterator[Batch]:
        """A pass, whose order depends on the key and on the global random numbers alone."""
        for each in _generators(self.given):
            each.manual_seed(number_of("order", *key))
        given = self.given
        with users(self.name):
            if not isinstance(given, Iterable):
                given = given(number_of("order", *key) % (1 << 32)) if _wants(given) else given()
                if not isinstance(given, Iterable):
                    raise TaskError(
                        f"{self.name}() returned {type(given).__name__}, expected an iterable of "
                        "batches"
                    )
            return iter(given)

    def next(self, batches: Iterator[Batch]) -> Batch:
        """The next batch.

        Raises:
            StopIteration: there is none.
            TaskError: it has no tensor or no example, or the user's code failed.
        """
        with users(self.name):
            batch = next(batches, _END)
        if batch is _END:
            raise StopIteration
        if next(tensors(batch), None) is None:
            raise TaskError(
                f"{self.name} gave a batch of type {type(batch).__name__} without a tensor: make "
                "tensors of it, in the loader's collate_fn for example"
            )
        if not examples(batch):
            raise TaskError(
                f"{self.name} gave a batch of 0 examples, whose mean is no number: leave it out "
                "(examples are counted by the first dimension of the batch's first tensor)"
            )
        return batch


def _drops(given: Any) -> bool:
    return bool(getattr(given, "drop_last", False))


def _generators(given: Any) -> list[torch.Generator]:
    """Those that a loader and its samplers have of their own."""
    sampler = getattr(given, "sampler", None)
    batched = getattr(given, "batch_sampler", None)
    holders = (given, sampler, batched, getattr(batched, "sampler", None))
    found = (getattr(holder, "generator", None) for holder in holders)
    return [each for each in found if isinstance(each, torch.Generator)]


def _wants(function: Callable[..., Any]) -> bool:
    """Whether it takes a seed: whether it has a positional argument without a default."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return False
    return any(
        p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
        for p in parameters
    )


def tensors(batch: Batch) -> Iterator[Tensor]:
    """Every tensor in a batch."""
    if isinstance(batch, Tensor):
        yield batch
    elif (named := by_name(batch)) is not None:
        for value in named.values():
            yield from tensors(value)
    elif isinstance(batch, list | tuple):
        for value in batch:
            yield from tensors(value)


def examples(batch: Batch) -> int:
    """How many examples a batch has: the first dimension of its first tensor."""
    first = next(tensors(batch))
    return first.size(0) if first.ndim else 1  # a nested one may have no shape


def add_to(digest: Any, value: Any) -> None:
    """Make a digest depend on a batch: on tensors and numbers to the last bit, and on the rest as
    it prints.
    """
    if isinstance(value, Tensor) and value.is_nested:
        add_to(digest, value.detach().unbind())
    elif isinstance(value, Tensor) and value.layout is not torch.strided:
        sparse = value.detach().cpu().to_sparse_coo().coalesce()  # type: ignore[no-untyped-call]
        digest.update(f"{tuple(value.shape)}".encode())
        add_to(digest, [sparse.indices(), sparse.values()])
    elif isinstance(value, Tensor):
        bits = value.detach().cpu().contiguous().flatten().view(torch.uint8)
        digest.update(f"{value.dtype} {tuple(value.shape)}".encode())
        digest.update(bits.numpy())
    elif isinstance(value, np.ndarray) and value.dtype != object:
        digest.update(f"{value.dtype} {value.shape}".encode())
        digest.update(np.ascontiguousarray(value).tobytes())
    elif isinstance(value, float):
        digest.update(struct.pack("<d", value))
    elif (named := by_name(value)) is not None:
        for name in named:
            digest.update(f"{name}:".encode())
            add_to(digest, named[name])
    elif isinstance(value, list | tuple):
        digest.update(f"[{len(value)}".encode())
        for each in value:
            add_to(digest, each)
    elif isinstance(value, str | int | bool | bytes | None):
        digest.update(repr(value).encode())
    else:  # an address in its repr would be another one tomorrow
        digest.update(type(value).__name__.encode())


def digest_of(value: Any) -> str:
    """A digest of a batch."""
    digest = hashlib.sha256()
    add_to(digest, value)
    return digest.hexdigest()


class OwnData:
    """The batches of a task of one's own, by seed and step.

    Attributes:
        description: a line for the report.
        fingerprint: of the first batches of seed 0 and of all that validate.
        examples: in the first batch.

    Raises:
        TaskError: a side has no batches, the training batches differ between two passes of the
            same seed, or those that validate do not end.
    """

    def __init__(self, train: Any, validation: Any, name: str) -> None:
        self._train = Source(train, f"the training data of {name}")
        self._validation = Source(validation, f"the validation data of {name}")
        # Where the training stands: the next step of this seed, the pass that it is in.
        self._seed, self._step, self._epoch = 0, -1, 0
        self._batches: Iterator[Batch] = iter(())
        self._begun = first = self._first()
        if first != self._first():
            remedy = (
                "leave out persistent_workers=True, with which the random numbers of the workers "
                "go on from pass to pass"
                if getattr(train, "persistent_workers", False)
                else "draw random numbers from torch's, numpy's or Python's global generator, or "
                "return a function that takes a seed and makes the iterable"
            )
            raise TaskError(
                f"{self._train.name} are other batches each time, at the same seed: {remedy}"
            )
        self._known: str | None = None
        self._opening: str | None = None  # likewise, of its first batch
        # The first pass, which makes the digest that all later ones are held to.
        sizes = [examples(batch) for batch in self.validation()]
        batches, held_out = len(sizes), sum(sizes)
        self.examples = examples(self.batch(0, 0, 0))
        self.fingerprint = hashlib.sha256(f"{first} {self._known}".encode()).hexdigest()[:16]
        length = self._train.length
        count = "batches" if length is None else f"{length:,} batch{'es' if length != 1 else ''}"
        self.description = (
            f"{count} of {self.examples} to train on, {held_out:,} examples in {batches:,} "
            f"batch{'es' if batches != 1 else ''} to validate"
        )

    def _first(self, seed: int = 0) -> str:
        """A digest of the first training batches of a seed."""
        digest = hashlib.sha256()
        self._step = -1  # begin again
        for step in range(min(FIRST, self._train.length or FIRST)):
            add_to(digest, self.batch(seed, step, 0))
        return digest.hexdigest()

    def is_same_for_all_seeds(self) -> bool:
        """Whether the training batches of seed 1 begin as those of seed 0 do; draws some."""
        return self._first(1) == self._begun

    def see_untouched(self) -> None:
        """See that a loss, which has changed a batch that it was given, has not changed what will
        come again: of a list it has, of a loader's batches it has not.

        Raises:
            TaskError: it has.
        """
        for source, is_same in (
            (self._train, self._first() == self._begun),
            (self._validation, self._opened() == self._opening),
        ):
            if not is_same:
                raise TaskError(
                    f"{source.name} changed while the loss was computed, so that other batches "
                    "would come the next time: let loss and model write into copies, as after "
                    "x = x.clone() or batch = dict(batch)"
                )

    def _opened(self) -> str:
        """A digest of the first batch that validates, as it is now."""
        seed_all("validation")
        batches = self._validation.begin("validation")
        seed_all("validation", 0)
        return digest_of(self._validation.next(batches))

    def steps_per_epoch(self, batch_size: int) -> int:
        if self._train.length is None:
            raise TaskError(
                f"{self._train.name} have no length, so that nobody knows what an epoch is: give "
                "--steps instead of --epochs"
            )
        return self._train.length

    # --- training ---

    def batch(self, seed: int, step: int, size: int) -> Batch:
        self.go_to(seed, step)
        batch = self._next(step)
        self._step = step + 1
        return batch

    def go_to(self, seed: int, step: int) -> None:
        """Begin the pass that has this step, and go through what lies before it."""
        if (seed, step) == (self._seed, self._step):
            return
        length = self._train.length
        self._step = -1  # nowhere, until this is done
        self._seed, epoch = seed, step // length if length else 0
        begun = epoch * length if length else 0
        self._begin(epoch, begun)
        for earlier in range(begun, step):
            self._next(earlier)
        self._step = step

    def _begin(self, epoch: int, step: int) -> None:
        self._epoch, self._batches = epoch, iter(())
        seed_all("batch", self._seed, step)
        self._batches = self._train.begin(self._seed, epoch)

    def _next(self, step: int) -> Batch:
        length = self._train.length
        if length and step // length > self._epoch:
            self._begin(self._epoch + 1, step)
        try:
            return self._drawn(step)
        except StopIteration:
            if length:
                raise TaskError(
                    f"{self._train.name} have a length of {length} and ended after "
                    f"{step - self._epoch * length} batches: give them the length they have, or "
                    "none"
                ) from None
        self._begin(self._epoch + 1, step)
        try:
            return self._drawn(step)
        except StopIteration:
            raise self._train.empty() from None

    def _drawn(self, step: int) -> Batch:
        # Again, whatever beginning a pass has drawn: a run that is taken up begins at another step.
        seed_all("batch", self._seed, step)
        return self._train.next(self._batches)

    # --- validation ---

    def validation(self) -> Iterator[Batch]:
        """The validation set.

        Raises:
            TaskError: it is not what it was at first, it is empty, or it does not end.
        """
        source, digest, count = self._validation, hashlib.sha256(), 0
        seed_all("validation")
        batches = source.begin("validation")
        while True:
            # Whatever the model drew meanwhile, the loader draws what it drew before.
            seed_all("validation", count)
            try:
                batch = source.next(batches)
            except StopIteration:
                break
            count += 1
            most = max(source.length or 0, ENDLESS)  # a DataLoader's length may be an estimate
            if count > most:
                raise TaskError(
                    f"{source.name} did not end after {most:,} batches: give them an end, as "
                    "itertools.islice does, or the length that they have"
                )
            add_to(digest, batch)
            if count == 1:
                self._opening = self._opening or digest.hexdigest()
                if digest.hexdigest() != self._opening:
                    raise self._changed()
            yield batch
        if not count:
            raise source.empty()
        self._known = self._known or digest.hexdigest()
        if digest.hexdigest() != self._known:
            raise self._changed()

    def _changed(self) -> TaskError:
        return TaskError(
            f"{self._validation.name} changed between two validations, so that their losses do not "
            "compare: return the same batches each time, a list of them for example"
        )
