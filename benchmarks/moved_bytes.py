"""Count the bytes that one optimizer step reads and writes, against the fewest possible.

    python benchmarks/moved_bytes.py --json docs/performance/moved.json

Counted are the operands and results of every operation that torch runs, inside the orthogonalizer
too: each operand read once and each result written once, views and empty memory not at all. What
stays in a cache between two operations is counted like the rest. It is the same on every machine,
but for the number of threads, which is two here.

The fewest are those of the algorithm where nothing but its matrix products is an operation of its
own: the momentum reads G and M and writes M and U; the products of the cheapest form read their
operands and write their results, each once; the last pass reads O and W and writes W. The norm is
then found while U is written, and divides nothing, and what only adds to a product costs nothing.
"""

from __future__ import annotations

import sys
from collections import Counter
from typing import Any

import harness
import machine
import torch
from peers import PEERS, Implementation
from sets import KELLER_STEPS, SETS, TINY, Entry, Workload, matrices
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from muonkit.newton_schulz import orthogonalizer
from muonkit.newton_schulz.forms import choose_form, segments
from muonkit.newton_schulz.symmetric import block_count

NAMES = ("muonkit fp32", "torch fp32", "pytorch_optimizer gram fp32")
DEFAULT = ("gpt-12x128", "gpt-2x384", "one-layer-768", "resnet-20", "vit-tiny")
PRODUCTS = ("mm", "bmm", "addmm", "baddbmm")
ITEMSIZE = 4


class CountMoved(TorchDispatchMode):
    """Bytes that operations read and write, by the name of the operation."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "muonkit":
            with self:
                return orthogonalizer._newton_schulz_(*args, **kwargs)
        result = func(*args, **kwargs)
        name = func._schema.name.partition("::")[2]
        self.bytes[name.strip("_")] += _moved(func, name, args, kwargs, result)
        return result


def _moved(func: Any, name: str, args: Any, kwargs: Any, result: Any) -> int:
    if func.is_view or name.startswith(("empty", "new_empty", "detach", "_unsafe_view")):
        return 0
    read: dict[tuple[Any, ...], int] = {}
    written: dict[tuple[Any, ...], int] = {}
    schema = func._schema.arguments
    given = [
        *zip(schema, args, strict=False),
        *((a, kwargs[a.name]) for a in schema if a.name in kwargs),
    ]
    for argument, value in given:
        changed = argument.alias_info is not None and argument.alias_info.is_write
        unread = changed and (argument.is_out or "copy" in name or name in ("fill_", "zero_"))
        # beta = 0: what is added is not looked at.
        unread |= name == "baddbmm" and argument.name == "self" and kwargs.get("beta") == 0
        for tensor in _tensors(value):
            if changed:
                written[_place(tensor)] = _size(tensor)
            if not unread:
                read[_place(tensor)] = _size(tensor)
    if not written:
        written = {_place(tensor): _size(tensor) for tensor in _tensors(result)}
    return sum(read.values()) + sum(written.values())


def _tensors(value: Any) -> list[Tensor]:
    return [each for each in tree_flatten(value)[0] if isinstance(each, Tensor)]


def _place(tensor: Tensor) -> tuple[Any, ...]:
    """What a tensor and its transpose have in common."""
    return tensor.data_ptr(), tensor.numel(), tuple(sorted(tensor.stride()))


def _size(tensor: Tensor) -> int:
    """Bytes of the memory that it shows, once where it repeats."""
    count = 1
    for length, stride in zip(tensor.shape, tensor.stride(), strict=True):
        count *= length if stride else 1
    return count * tensor.element_size()


def fewest(rows: int, cols: int) -> int:
    """Bytes for one matrix, in float32: see above."""
    m, n = sorted((rows, cols))
    blocks = block_count(m, torch.float32, torch.device("cpu"))
    _, restarts = choose_form("auto", m, n, KELLER_STEPS, ITEMSIZE, blocks)
    whole, gram = m * n, m * m
    elements = 4 * whole + 3 * whole
    for segment in segments(KELLER_STEPS, restarts):
        elements += whole + gram  # A <- X X^T
        for number in range(len(segment)):
            elements += 2 * gram  # P <- aI + bA + cA^2
            elements += 3 * gram * (number > 0)  # Q <- P Q
            elements += 6 * gram * (number < len(segment) - 1)  # A <- (P A) P
        elements += gram + 2 * whole  # X <- Q X
    return elements * ITEMSIZE


def count(entries: list[Entry], name: str) -> Counter[str]:
    """Of the second step, by operation."""
    peer = PEERS[name]
    runner = Implementation(peer, Workload(entries).parameters(peer.views))
    runner.step()
    runner.give_gradients()
    with CountMoved() as counted:
        runner.step()
    return counted.bytes


def row(entries: list[Entry]) -> dict[str, Any]:
    least = sum(fewest(rows, cols) for rows, cols in matrices(entries))
    found: dict[str, Any] = {"fewest": least, "moved": {}}
    for name in NAMES:
        try:
            counted = count(entries, name)
        except ImportError:
            continue
        found["moved"][name] = {
            "all": counted.total(),
            "products": sum(counted[each] for each in PRODUCTS),
            "most": counted.most_common(6),
        }
    return found


def main() -> int:
    parser = harness.parser(__doc__, rounds=None, threads=False)
    parser.add_argument("--set", nargs="+", choices=[*SETS, *TINY], default=list(DEFAULT))
    options = parser.parse_args()
    torch.set_num_threads(2)
    sets = {}
    for name in options.set:
        found = sets[name] = row({**SETS, **TINY}[name])
        for who, each in found["moved"].items():
            ratio = each["all"] / found["fewest"]
            print(f"{name}, {who}: {each['all'] / 2**20:.1f} MiB, {ratio:.2f} of the fewest")
            print("   ", ", ".join(f"{op} {n / 2**20:.1f}" for op, n in each["most"]))
    harness.write(options.json, {"kind": "moved", "machine": machine.facts(), "sets": sets})
    return 0


if __name__ == "__main__":
    sys.exit(main())
