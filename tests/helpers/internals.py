"""What tests reach of the package that has no public name: each name once, so that a rename changes
one line (the lab's are in `helpers.lab`). A law is tested through the public names; here is what
makes its case small enough to be seen, or counts what it costs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from muonkit import Muon, batching, step, validate
from muonkit.distributed import meshes, plan_batches, rank_dtypes
from muonkit.monitor.sample import _not_finite as not_finite
from muonkit.monitor.sample import _square as square
from muonkit.monitor.sinks import JsonLines
from muonkit.newton_schulz import dtypes, scratch, symmetric, triton
from muonkit.newton_schulz.orthogonalizer import _evaluate as evaluate
from muonkit.newton_schulz.orthogonalizer import _newton_schulz_ as newton_schulz_
from muonkit.newton_schulz.orthogonalizer import _normalize

__all__ = [
    "all_in_scratch",
    "counted_orthogonalizations",
    "cpu_has",
    "evaluate",
    "file_of",
    "forget_gpus",
    "forget_nodes",
    "forget_scratch",
    "free_launches",
    "keep_no_scratch",
    "newton_schulz_",
    "normalize",
    "not_finite",
    "observer_of",
    "requests_counted",
    "size_of",
    "smallest_block",
    "spy_on_validation",
    "square",
    "step_hooks",
]

# --- newton_schulz --------------------------------------------------------------------------------


def smallest_block(patch: pytest.MonkeyPatch, device: str, size: int) -> None:
    """Symmetric products are cut into blocks down to this size."""
    patch.setitem(symmetric._SMALLEST_BLOCK, device, size)


def all_in_scratch(patch: pytest.MonkeyPatch) -> None:
    """The smallest temporary has its memory kept, too."""
    patch.setattr(scratch, "_WORTH_KEEPING", 0)


def keep_no_scratch(patch: pytest.MonkeyPatch) -> None:
    """Memory that is kept from step to step would not be seen in a step's peak."""
    patch.setattr(scratch, "KEPT_BYTES", 0)


def forget_scratch() -> None:
    scratch._kept.views.clear()
    scratch._kept.buffers.clear()


def normalize(X: Tensor, looks: bool) -> Tensor:
    """Every matrix divided by its norm, in at least float32."""
    return _normalize(X, 1.0, torch.promote_types(X.dtype, torch.float32), looks=looks)


def cpu_has(patch: pytest.MonkeyPatch, features: dict[str, bool]) -> None:
    """What this CPU multiplies fast, as the choice of dtypes asks."""
    patch.setattr(dtypes, "cpu_capabilities", lambda: features)


def forget_hardware() -> None:
    """What a CPU or a GPU multiplies fast is asked anew."""
    dtypes._fastest_dtype.cache_clear()


def spy_on_validation(patch: pytest.MonkeyPatch, looked_at: list[str]) -> None:
    """Note the name of every parameter that is held against its group's options."""
    original = validate._validate_parameter

    def noting(name: str, p: Tensor, group: dict[str, Any]) -> None:
        looked_at.append(name)
        original(name, p, group)

    patch.setattr(validate, "_validate_parameter", noting)


def forget_gpus() -> None:
    triton._gpu_available.cache_clear()
    triton._can_launch.cache_clear()


# --- the optimizer --------------------------------------------------------------------------------


@contextlib.contextmanager
def free_launches(patch: pytest.MonkeyPatch) -> Iterator[None]:
    """A launch costs nothing: no matrix is padded to be computed with others."""
    patch.setitem(plan_batches._FLOPS_OF_A_LAUNCH, "cpu", 0)
    _forget_batches()
    yield
    _forget_batches()


def _forget_batches() -> None:
    plan_batches._cached.cache_clear()
    batching._kept_plan.cache_clear()


@contextlib.contextmanager
def counted_orthogonalizations() -> Iterator[list[int]]:
    """How many matrices each call of the orthogonalizer has."""
    calls: list[int] = []
    original = step.orthogonalize_

    def counting(matrices: Tensor, *options: Any) -> Tensor:
        calls.append(len(matrices))
        return original(matrices, *options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step, "orthogonalize_", counting)
        yield calls


def observer_of(optimizer: Muon) -> Any:
    """Who is told of the matrices of a step, if anyone is."""
    return optimizer._observer


def step_hooks(optimizer: torch.optim.Optimizer) -> list[Any]:
    """What torch calls before and after a step."""
    return [*optimizer._optimizer_step_pre_hooks, *optimizer._optimizer_step_post_hooks]


# --- several ranks --------------------------------------------------------------------------------


@contextlib.contextmanager
def requests_counted() -> Iterator[list[Any]]:
    """Each request to the store by which ranks tell their dtypes."""
    requests: list[Any] = []
    through = rank_dtypes._try

    def counting(ask: Any, *arguments: Any) -> Any:
        requests.append(ask)
        return through(ask, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rank_dtypes, "_try", counting)
        yield requests


def forget_nodes() -> None:
    """Ask anew how many ranks a node has."""
    meshes._nodes.clear()


# --- the monitor ----------------------------------------------------------------------------------


def file_of(sink: JsonLines) -> Any:
    """The file that a sink writes to."""
    return sink._file


def size_of(sink: JsonLines) -> int:
    """The bytes that a sink takes its file to have."""
    return sink._size
