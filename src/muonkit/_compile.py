"""Marks for torch.compile: which results are constants, and where a graph may break.

torch's own decorators import all of torch._dynamo, two seconds on `import muonkit`; these set the
marks that they set. Tests hold that the marks still work.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

from muonkit._torch import CONSTANT_MARK, OUTSIDE_MARKS, never_begin_a_graph

__all__ = ["constant_result", "copy_each_", "graph_or_eager", "outside_graphs", "scheduled"]

P = ParamSpec("P")
R = TypeVar("R")


def constant_result(function: Callable[P, R]) -> Callable[P, R]:
    """`torch.compiler.assume_constant_result`: called while tracing, with constant arguments.

    The compiler guards on the arguments as constants.
    """
    function.__dict__[CONSTANT_MARK] = True
    return function


def graph_or_eager(function: Callable[P, R]) -> Callable[P, R]:
    """A function that is part of its caller's graph as a whole, or runs as it is with all that it
    calls: never in parts.

    Where a graph breaks, torch.compile calls the function that it was tracing, and traces that
    function, and the functions that it calls, separately. Parts of some code (generators, loops,
    comprehensions) then run twice or not at all.
    """
    never_begin_a_graph(function)
    return function


def outside_graphs(function: Callable[P, R]) -> Callable[P, R]:
    """`torch.compiler.disable`: a graph breaks where this is called, and it runs as it is."""
    function.__dict__.update(OUTSIDE_MARKS)
    never_begin_a_graph(function)
    return function


def copy_each_(targets: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """`torch._foreach_copy_`, right in a graph too where the values were computed of the targets.

    What such values are used for afterwards, torch 2.11's compiler computes once more on a GPU,
    then of the targets' new contents: NorMuon's variance was averaged twice.
    """
    if torch.compiler.is_compiling():
        for target, value in zip(targets, values, strict=True):
            target.copy_(value)
    else:
        torch._foreach_copy_(list(targets), list(values))


def scheduled(value: float | Tensor, like: Tensor) -> float | Tensor:
    """A number that a schedule may change, as torch.compile can follow it: in a graph a tensor
    without dims, in full precision, on the device of another; elsewhere the number itself. A tensor
    of one element loses its dims.

    A graph has a float that no tensor was made of, such as foreach's alpha, as a constant, and is
    compiled anew for each value of it.
    """
    if isinstance(value, Tensor):
        return value.reshape(()) if value.ndim else value
    if not torch.compiler.is_compiling():
        return value
    dtype = torch.promote_types(like.dtype, torch.float32)
    return torch.ones((), dtype=dtype, device=like.device) * value
