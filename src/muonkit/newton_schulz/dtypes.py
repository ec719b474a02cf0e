"""The dtype of the matrix products: what `ns_dtype` stands for on a device, and why.

"auto" is the dtype that is measured to be fastest on a kind of hardware, not the one that a flag of
it promises:

- x86 with AVX-512's bf16 instructions and no AMX: float32. Measured on such a Xeon, one thread,
  768 x 768 matrices: 146 GFLOP/s in float32, 83 in bfloat16; a whole step took 1.7 to 2.4 times as
  long in bfloat16.
- x86 with neither: float32. Measured with AVX2: bfloat16 takes about 100 times as long.
- x86 with AMX: bfloat16, but float32 for matrices of fewer than 96 rows or columns, of which a
  single one takes up to 4 times as long in bfloat16. Measured on a Xeon, one thread: 1,016 GFLOP/s
  in bfloat16 at 768 x 768, 162 in float32; at 64 x 64 19 and 82. docs/performance.md has whole
  orthogonalizations by size.
- Arm with BFMMLA and a torch with the Arm Compute Library (its Linux wheels): bfloat16. Not
  measured by us; published for Graviton 3 (pytorch/pytorch#91763): BERT is 1.9 times as fast with
  products in bfloat16. A torch without that library (macOS) does not use BFMMLA: float32.
- CUDA from Ampere (8.0) on, ROCm and XPU: bfloat16, by matrix units that float32 has not got.
  Before Ampere it is emulated: float32.
"""

from __future__ import annotations

import contextlib
import functools
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from muonkit._compile import constant_result
from muonkit._text import unknown
from muonkit._torch import cpu_capabilities, onednn_is_on

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from muonkit.newton_schulz.coefficients import Iterations

__all__ = [
    "AUTO_IN_WORDS",
    "NS_DTYPES",
    "Fastest",
    "auto_in_words",
    "dtype_reason",
    "fastest_dtype",
    "is_small",
    "products_dtype",
    "resolve_dtype",
    "size_decides",
    "without_autocast",
]

NS_DTYPES: dict[str, torch.dtype] = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


_FEWEST_ROWS_ON_AMX = 96


def is_small(rows: int, cols: int) -> bool:
    """Whether matrices of this shape are too small for AMX to pay."""
    # A branch, so that a graph for shapes of any size gets a bool.
    return True if rows < _FEWEST_ROWS_ON_AMX or cols < _FEWEST_ROWS_ON_AMX else False  # noqa: SIM210


def size_decides(ns_dtype: str | torch.dtype, device_type: str) -> bool:
    """Whether small matrices (`is_small`) are computed in another dtype than others."""
    return str(ns_dtype) == "auto" and device_type == "cpu" and _size_decides()


@constant_result
def _size_decides() -> bool:
    return fastest_dtype("cpu", None, True).dtype != fastest_dtype("cpu", None, False).dtype


_FOR_SMALL = "bfloat16 (float32 for small matrices)"
#: All that `auto_in_words` may say.
AUTO_IN_WORDS = ("bfloat16", "float32", _FOR_SMALL)


def auto_in_words(device: torch.device) -> str:
    """What "auto" is on a device. Ranks that differ in it differ in some matrices, if not in the
    same ones.
    """
    large, small = (fastest_dtype(device.type, device.index, s).dtype for s in (False, True))
    return str(large).removeprefix("torch.") if large == small else _FOR_SMALL


def products_dtype(
    ns_dtype: str | torch.dtype,
    input_dtype: torch.dtype,
    device: torch.device,
    iterations: Iterations,
    small: bool,
) -> torch.dtype:
    """The dtype that these iterations are computed in.

    The exact factor has no products to choose a dtype for: it is decomposed in at least float32.

    Args:
        small: `is_small` of the matrices.

    Raises:
        ValueError: as `resolve_dtype`.
    """
    dtype = resolve_dtype(ns_dtype, input_dtype, device, small, iterations.strict)
    if iterations.exact:
        return torch.promote_types(torch.promote_types(input_dtype, torch.float32), dtype)
    return dtype


def resolve_dtype(
    ns_dtype: str | torch.dtype,
    input_dtype: torch.dtype,
    device: torch.device,
    small: bool,
    strict: bool = False,
) -> torch.dtype:
    """The dtype of the matrix products that `ns_dtype` stands for on this device.

    Args:
        small: `is_small` of the matrices.
        strict: the schedule diverges in 16 bits (`Schedule.strict`).

    Raises:
        ValueError: not a dtype of `NS_DTYPES` nor "auto", or one too coarse for the schedule.
    """
    name = str(ns_dtype).removeprefix("torch.")
    if name in NS_DTYPES:
        dtype = NS_DTYPES[name]
        if strict and dtype.itemsize == 2:
            # Measured: singular values of 1,000 and more from a random matrix in bf16.
            raise ValueError(
                f"this schedule has no safety factor and diverges in {name}: use "
                "'polar_express_1.01', 'polar_express_1.02' or 'polar_express_1.05', "
                "or ns_dtype='float32'"
            )
        return dtype
    if name != "auto":
        raise ValueError(unknown("ns_dtype", ns_dtype, ["auto", *NS_DTYPES]))
    if input_dtype == torch.float64:
        return torch.float64  # whoever keeps float64 weights asked for its precision
    if strict:
        return torch.float32
    return fastest_dtype(device.type, device.index, small).dtype


def dtype_reason(
    ns_dtype: str | torch.dtype,
    input_dtype: torch.dtype,
    device: torch.device,
    iterations: Iterations,
    small: bool,
) -> str:
    """Why `products_dtype` is what it is."""
    if iterations.exact:
        return "svd: the input's dtype, float32 at least"
    if str(ns_dtype) != "auto":
        return "given"
    if input_dtype == torch.float64:
        return "auto: the input's"
    if iterations.strict:
        return "auto: the schedule has no safety factor and diverges in 16 bits"
    return f"auto: {fastest_dtype(device.type, device.index, small).reason}"


class Fastest(NamedTuple):
    """The dtype that a device multiplies matrices fastest in, of bfloat16 and float32, and why."""

    dtype: torch.dtype
    reason: str


def fastest_dtype(device_type: str, index: int | None, small: bool = False) -> Fastest:
    """The dtype that "auto" stands for on this device; the module's docstring has the rule.

    Args:
        small: for matrices that are (`is_small`).
    """
    return _fastest_dtype(device_type, index, small, device_type == "cpu" and onednn_is_on())


@functools.lru_cache(maxsize=64)
def _fastest_dtype(device_type: str, index: int | None, small: bool, onednn: bool) -> Fastest:
    """`fastest_dtype`, once for each state of what can be switched."""
    if device_type == "cpu":
        return _fastest_on_cpu(small)
    if device_type == "cuda":
        major, minor = torch.cuda.get_device_capability(index)
        if major >= 8 and not _is_old_amd(index):
            return Fastest(torch.bfloat16, "this GPU multiplies bfloat16 natively")
        return Fastest(torch.float32, f"this GPU ({major}.{minor}) emulates bfloat16")
    if device_type == "xpu":
        return Fastest(torch.bfloat16, "this GPU multiplies bfloat16 natively")
    return Fastest(torch.float32, f"nothing is known of bfloat16 products on {device_type!r}")


def _is_old_amd(index: int | None) -> bool:
    """Whether this is a GPU of AMD's without matrix units for bf16: older than CDNA and RDNA 3."""
    if torch.version.hip is None:
        return False
    name = str(torch.cuda.get_device_properties(index).gcnArchName).split(":")[0]
    return name in ("gfx900", "gfx906") or name.startswith("gfx10")


def _fastest_on_cpu(small: bool) -> Fastest:
    have = cpu_capabilities()
    if have["amx_bf16"]:
        if small:
            reason = f"this CPU has AMX, but these matrices have fewer than {_FEWEST_ROWS_ON_AMX} "
            reason += "rows or columns"
            return Fastest(torch.float32, reason)
        return Fastest(torch.bfloat16, "this CPU has AMX")
    if have["arm_bf16"]:
        if have["onednn_acl"]:
            return Fastest(torch.bfloat16, "this CPU has BFMMLA")
        return Fastest(
            torch.float32, "this CPU has BFMMLA, but this torch no Arm Compute Library to use it"
        )
    if have["amx_held_back"]:
        return Fastest(
            torch.float32,
            "this CPU has AMX, but oneDNN may not use it (torch.backends.mkldnn.enabled, "
            "ONEDNN_MAX_CPU_ISA)",
        )
    if have["avx512_bf16"]:
        return Fastest(torch.float32, "this CPU has avx512_bf16 but no AMX: bfloat16 is slower")
    return Fastest(torch.float32, "this CPU has no units for bfloat16")


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Products are in the dtype that was asked for, also where autocast would lower it."""
    kind = device.type
    amp: Any = torch.amp  # untyped in torch 2.9
    if torch.compiler.is_compiling() or not amp.is_autocast_available(kind):
        return contextlib.nullcontext()
    if not torch.is_autocast_enabled(kind):
        return contextlib.nullcontext()
    return torch.autocast(kind, enabled=False)
