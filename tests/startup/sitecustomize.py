"""Answers for the suite, in every process of it, what this CPU multiplies fastest.

`MUONKIT_TEST_CPU=bfloat16 make unit` runs all tests as on a CPU with units for bfloat16,
`MUONKIT_TEST_CPU=float32` as on one without. Python imports this file when it starts, in each
process that inherits `PYTHONPATH` from `tests/conftest.py`: the ranks, examples and commands that
the tests start. So the package itself knows of no variable of the tests'.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import os
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

VARIABLE = "MUONKIT_TEST_CPU"
_MODULE = "muonkit.newton_schulz.dtypes"


def answer(module: Any, dtype: str) -> None:
    """Make `muonkit.newton_schulz.dtypes` find AMX, or no units for bfloat16 at all."""
    names = ("amx_bf16", "amx_held_back", "avx512_bf16", "arm_bf16", "onednn_acl")
    found = {name: name == "amx_bf16" and dtype == "bfloat16" for name in names}
    module.cpu_capabilities = lambda: found


class _Finder(importlib.abc.MetaPathFinder):
    """Answers as soon as the module is imported."""

    def __init__(self, dtype: str) -> None:
        self.dtype = dtype

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != _MODULE:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        assert spec is not None
        assert spec.loader is not None
        run = spec.loader.exec_module

        def run_and_answer(module: ModuleType) -> None:
            run(module)
            answer(module, self.dtype)

        spec.loader.exec_module = run_and_answer  # type: ignore[method-assign]
        return spec


def install() -> None:
    """Do so in this process, where the variable is set."""
    dtype = os.environ.get(VARIABLE)
    if dtype is None or any(isinstance(finder, _Finder) for finder in sys.meta_path):
        return
    if dtype not in ("bfloat16", "float32"):
        raise ValueError(f"{VARIABLE} is 'bfloat16' or 'float32', got {dtype!r}")
    sys.meta_path.insert(0, _Finder(dtype))


install()
