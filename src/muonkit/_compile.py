"""What torch.compile has to be told."""

from __future__ import annotations

from collections.abc import Callable
from typing import ParamSpec, TypeVar

from muonkit._torch import CONSTANT_MARK

__all__ = ["constant_result"]

P = ParamSpec("P")
R = TypeVar("R")


def constant_result(function: Callable[P, R]) -> Callable[P, R]:
    """`torch.compiler.assume_constant_result`: called while tracing, with constant arguments.

    The compiler guards on the arguments as constants. torch's own decorator does just this, but
    imports all of torch._dynamo for it: two seconds on `import muonkit`. A test holds that the mark
    still works (one graph, no break).
    """
    function.__dict__[CONSTANT_MARK] = True
    return function
