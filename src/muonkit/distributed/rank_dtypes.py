"""Whether "auto" is the same dtype on every rank, where the ranks' optimizers exchange nothing.

Under plain DDP every rank steps by itself, and copies stay equal because all ranks compute the
same. On nodes of different kinds "auto" may be bfloat16 on one and float32 on another (unless all
matrices are small): the copies would drift apart without a word. A collective could hang (an
optimizer may be made on one rank only), so each rank writes what "auto" is to it into the store at
which the ranks met, and looks once, at its first step and without waiting, at what the others have
written by then.

The ranks that are compared are those whose optimizers train parameters of the same names and
shapes on the same kind of device: stages of a pipeline differ in these, and need not agree. Costs:
two requests to the store at construction and three at the first step; later none. Where ranks share
parameters, `muonkit.distributed.exchange.check_ranks_agree` compares instead.
"""

from __future__ import annotations

import hashlib
import weakref
from typing import TYPE_CHECKING, Any

import torch

from muonkit._compile import constant_result
from muonkit._torch import default_store
from muonkit.distributed.meshes import listed
from muonkit.groups import parameter_names
from muonkit.newton_schulz.coefficients import resolve
from muonkit.newton_schulz.dtypes import fastest_dtype, is_small
from muonkit.selection import selected_shape
from muonkit.views import blocks_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from torch.optim import Optimizer

__all__ = ["look_at_others", "post"]

# The answers that there are: `muonkit.newton_schulz.dtypes.fastest_dtype`.
_ANSWERS = ("bfloat16", "float32")

# Optimizers that have not looked yet, by what they are called in a compiled step: a string, which
# the compiler takes for a constant.
_waiting: weakref.WeakValueDictionary[str, Optimizer] = weakref.WeakValueDictionary()


def post(optimizer: Optimizer) -> str:
    """Tell the other ranks what "auto" is on this one, if there are any and it matters.

    Returns:
        What `look_at_others` is to be called with at the first step.
    """
    token = hex(id(optimizer))
    _waiting[token] = optimizer
    _post(_answers(optimizer.param_groups))
    return token


@constant_result
def look_at_others(token: str) -> None:
    """Compare with what other ranks have told; once, later calls do nothing. In a compiled step it
    is called as the step is traced, and is no part of the graph.

    Raises:
        RuntimeError: "auto" is another dtype on another rank.
    """
    optimizer = _waiting.get(token)
    if optimizer is None:
        return
    answers = _answers(optimizer.param_groups)
    _post(answers)  # the process group, or parameters, may have come after the optimizer
    for (device, digest), mine in answers.items():
        for other, ranks in _differing(device, digest, mine).items():
            raise RuntimeError(
                f'ns_dtype="auto" is {mine} on rank {torch.distributed.get_rank()} and {other} on '
                f"rank {listed(ranks)}: their {device} devices multiply matrices fastest in "
                "different dtypes (ns_dtype_reason in optimizer.describe() says why), and copies "
                "of one model that are trained in different dtypes drift apart. Give all ranks "
                'the same, as ns_dtype="float32"; this step has changed nothing'
            )
    del _waiting[token]


def _answers(groups: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str], str]:
    """(device, digest of the parameters) -> dtype, for those whose dtype the hardware decides."""
    found: dict[str, list[Any]] = {}
    devices: dict[str, torch.device] = {}
    large: set[str] = set()  # kinds of devices with matrices that are not small
    for group in groups:
        if group["algorithm"] != "muon" or group["ns_dtype"] != "auto":
            continue
        iterations = resolve(group["ns_coefficients"], group["ns_steps"])
        if iterations.strict or iterations.exact:
            continue
        for name, p in zip(parameter_names(group), group["params"], strict=True):
            if p.dtype != torch.float64:
                devices[p.device.type] = p.device
                found.setdefault(p.device.type, []).append((name, *p.shape))
                blocks = blocks_of(group["view"], p.shape)
                if not all(is_small(*selected_shape(group, b.rows, b.cols)) for b in blocks):
                    large.add(p.device.type)
    # Only where "auto" depends on the size are small matrices in another dtype than the others;
    # then they are in float32 on every rank, and the others tell.
    return {
        (kind, _digest(shapes)): _fastest(devices[kind], small=kind not in large)
        for kind, shapes in found.items()
    }


def _fastest(device: torch.device, small: bool) -> str:
    return str(fastest_dtype(device.type, device.index, small).dtype).removeprefix("torch.")


def _digest(shapes: Iterable[Any]) -> str:
    return hashlib.sha256(repr(sorted(shapes)).encode()).hexdigest()[:16]


def _store() -> Any:
    """Where ranks can leave word for one another; None where there are none, or nowhere."""
    dist = torch.distributed
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return None
    if dist.get_backend() == "fake":  # one process that plays a rank; its store keeps nothing
        return None
    return default_store()


def _key(device: str, digest: str, of: object) -> str:
    return f"muonkit/auto/{device}/{digest}/{of}"


def _post(answers: Mapping[tuple[str, str], str]) -> None:
    store = _store()
    if store is None:
        return
    for (device, digest), dtype in answers.items():
        # The count spares the others to ask for each rank: 4,096 ranks would ask 16 million times.
        # It may be too high (a rank that tells twice, ranks of an earlier life): it is a hint.
        _try(store.set, _key(device, digest, torch.distributed.get_rank()), dtype)
        _try(store.add, _key(device, digest, dtype), 1)


def _differing(device: str, digest: str, mine: str) -> dict[str, list[int]]:
    """The ranks that have told another dtype, by that."""
    store = _store()
    if store is None:
        return {}
    hints = [_try(store.add, _key(device, digest, d), 0) for d in _ANSWERS if d != mine]
    if not any(hints):
        return {}
    found: dict[str, list[int]] = {}
    for rank in range(torch.distributed.get_world_size()):
        key = _key(device, digest, rank)
        if _try(store.check, [key]):
            value = _try(store.get, key)
            told = mine if value is None else value.decode()
            if told != mine:
                found.setdefault(told, []).append(rank)
    return found


def _try(ask: Any, *arguments: Any) -> Any:
    """The store's answer; None where this kind of store has none, or it is gone with its rank."""
    try:
        return ask(*arguments)
    except (RuntimeError, NotImplementedError, ValueError):
        return None
