"""Whether "auto" is the same dtype on every rank, where the ranks' optimizers exchange nothing.

Under plain DDP every rank steps by itself, and copies stay equal because all ranks compute the
same. On nodes of different kinds "auto" may be bfloat16 on one and float32 on another: the copies
would drift apart without a word. A collective could hang (an optimizer may be made on one rank
only), so each rank writes what "auto" is on its hardware into the store at which the ranks met, and
looks once, at its first step in which that matters and without waiting, at what the others have
written by then.

The ranks that are compared are those whose optimizers have parameters of the same names and shapes
on the same kind of device, whatever their options and whether they are frozen, which may be edited:
stages of a pipeline differ in names or shapes, and need not agree. Costs: two requests to the store
at construction and four at the first step; later none. Where ranks share parameters,
`muonkit.distributed.exchange.check_ranks_agree` compares instead.
"""

from __future__ import annotations

import hashlib
import weakref
from typing import TYPE_CHECKING, Any

import torch

from muonkit._compile import constant_result
from muonkit._torch import default_store
from muonkit.describe import hardware_decides
from muonkit.distributed.meshes import listed
from muonkit.groups import parameter_names
from muonkit.newton_schulz.dtypes import AUTO_IN_WORDS, auto_in_words

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from torch.optim import Optimizer

__all__ = ["look_at_others", "post"]

# Optimizers that have not looked yet, by what they are called in a compiled step: a string, which
# the compiler takes for a constant.
_waiting: weakref.WeakValueDictionary[str, Optimizer] = weakref.WeakValueDictionary()


def post(optimizer: Optimizer) -> str:
    """Tell the other ranks what "auto" is on this one, if there are any.

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
    groups = optimizer.param_groups
    if not any(group["algorithm"] == "muon" and hardware_decides(group) for group in groups):
        return  # until an option is edited
    answers = _answers(groups)
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
    """(device, digest of the parameters) -> what "auto" is there, in words."""
    found: dict[str, list[Any]] = {}
    devices: dict[str, torch.device] = {}
    for group in groups:
        if group["algorithm"] == "muon":
            for name, p in zip(parameter_names(group), group["params"], strict=True):
                devices[p.device.type] = p.device
                found.setdefault(p.device.type, []).append((name, *p.shape))
    return {(kind, _digest(shapes)): auto_in_words(devices[kind]) for kind, shapes in found.items()}


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
    for (device, digest), answer in answers.items():
        # The count spares the others to ask for each rank: 4,096 ranks would ask 16 million times.
        # It may be too high (a rank that tells twice, ranks of an earlier life): it is a hint.
        _try(store.set, _key(device, digest, torch.distributed.get_rank()), answer)
        _try(store.add, _key(device, digest, answer), 1)


def _differing(device: str, digest: str, mine: str) -> dict[str, list[int]]:
    """The ranks that have told something else, by that."""
    store = _store()
    if store is None:
        return {}
    hints = [_try(store.add, _key(device, digest, d), 0) for d in AUTO_IN_WORDS if d != mine]
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
