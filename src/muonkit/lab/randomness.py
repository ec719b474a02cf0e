"""Random numbers as functions of a key: the seed of a run, the number of a step.

What draws from a global generator (torch's on any device, Python's, numpy's) draws the same numbers
at the same step in every run of a seed, whatever was drawn before. So every optimizer sees the same
batches, dropout and augmentation, and a run that is taken up needs no generator's state.
"""

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def number_of(*key: object) -> int:
    """A number of 63 bits from the whole of ``key``, so that nearby seeds are unrelated."""
    digest = hashlib.sha256("/".join(map(str, key)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def generator(*key: object) -> torch.Generator:
    """A CPU generator seeded from ``key``."""
    return torch.Generator().manual_seed(number_of(*key))


def seed_all(*key: object) -> None:
    """Seed every global generator from ``key``."""
    number = number_of(*key)
    # torch.manual_seed looks for every kind of device, and takes 0.2 ms.
    torch.default_generator.manual_seed(number)
    if _has_cuda():
        torch.cuda.manual_seed_all(number)
    random.seed(number)
    np.random.seed(number % (1 << 32))


def _has_cuda() -> bool:
    """Whether this process uses a GPU by now."""
    return bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]


@contextmanager
def seeded(*key: object) -> Iterator[None]:
    """Global generators seeded from ``key`` in this block; afterwards they are as they were."""
    cuda = [torch.cuda.current_device()] if _has_cuda() else []
    of_python, of_numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(cuda):
        seed_all(*key)
        try:
            yield
        finally:
            random.setstate(of_python)
            np.random.set_state(of_numpy)
