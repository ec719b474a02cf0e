"""The kernel's cases, in Triton's interpreter and as compiled code, each in a process of its own.

The interpreter has to be chosen before Triton is imported, so `python -m tests.helpers.kernels
interpreted` (or `compiled`) prints what it found as JSON; `interpreted()` and `compiled()` run it.
"""

from __future__ import annotations

import functools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from muonkit.newton_schulz import triton as kernels
from tests.helpers.paths import BENCHMARKS, ROOT

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


# ---- the cases: operands by name, so that both processes know them


class Scalars(NamedTuple):
    alpha: float = 1.0
    beta: float = 0.0
    gamma: float = 0.0


PLAIN = Scalars()
ALL = Scalars(1.25, -4.775, 3.4445)


@dataclass(frozen=True)
class Case:
    """L, R (and D, where `added`) of this layout; R is L where `gram`."""

    dtype: str
    batch: int
    m: int
    k: int
    layout: str = "contiguous"
    gram: bool = True
    added: bool = False
    scalars: Scalars = PLAIN
    tile: int = 0  # 0: the table's blocks; else tiles of this size, 16 columns at a time

    @property
    def name(self) -> str:
        product = ("gram" if self.gram else "product") + ("+D" if self.added else "")
        tile = f"-tile{self.tile}" if self.tile else ""
        shape = f"{self.batch}x{self.m}x{self.k}"
        return f"{self.dtype}-{shape}-{self.layout}-{product}{tile}"


def cases() -> Iterator[Case]:
    for dtype in DTYPES:
        for m, k in ((1, 1), (1, 40), (40, 1), (7, 5), (33, 70), (65, 64), (96, 80), (64, 128)):
            yield Case(dtype, 1, m, k)
        for layout in LAYOUTS:
            yield Case(dtype, 2, 72, 48, layout)
            yield Case(dtype, 2, 72, 48, layout, gram=False, added=True, scalars=ALL)
        yield Case(dtype, 3, 50, 50, gram=False, added=True, scalars=ALL)
        yield Case(dtype, 3, 64, 64, gram=False, added=True, scalars=ALL)
        yield Case(dtype, 2, 48, 48, gram=False, added=True, scalars=Scalars(-2.0, 0.5, 0.0))
        yield Case(dtype, 2, 48, 48, gram=False, scalars=Scalars(0.5, 0.0, 2.0))
    # Thirteen and ten rows of tiles: two bands of GROUP = 8, the second not whole.
    yield Case("fp32", 1, 200, 32, tile=16)
    yield Case("bf16", 1, 149, 19, gram=False, added=True, scalars=ALL, tile=16)
    # The largest tiles of the table, with a rest.
    yield Case("fp16", 1, 600, 192, gram=False, added=True, scalars=ALL)
    yield Case("bf16", 1, 520, 72)
    # Dense columns: whole slices of k and not, tiles that end beyond m.
    for dtype in DTYPES:
        yield Case(dtype, 2, 40, 128, "transposed")
        yield Case(dtype, 1, 264, 70, "transposed", scalars=ALL)
        yield Case(dtype, 2, 72, 66, "transposed", added=True, scalars=ALL)
    yield Case("bf16", 1, 144, 48, "transposed", tile=16)


def contiguous(tensor: Tensor) -> Tensor:
    return tensor


def transposed(tensor: Tensor) -> Tensor:
    return tensor.mT.contiguous().mT


def sliced(tensor: Tensor) -> Tensor:
    """A block out of a larger matrix: addresses and strides that are no multiple of 16 bytes."""
    batch, rows, cols = tensor.shape
    base = torch.full((batch, rows + 3, cols + 5), torch.nan, dtype=tensor.dtype)
    base[:, 1 : rows + 1, 3 : cols + 3] = tensor
    return base[:, 1 : rows + 1, 3 : cols + 3]


def columns(tensor: Tensor) -> Tensor:
    """Dense rows at multiples of 16 bytes in a wider matrix: the aligned variant, but strided."""
    base = torch.full((*tensor.shape[:2], tensor.shape[2] + 24), torch.nan, dtype=tensor.dtype)
    base[..., 8 : 8 + tensor.shape[2]] = tensor
    return base[..., 8 : 8 + tensor.shape[2]]


def interleaved(tensor: Tensor) -> Tensor:
    """As the weights of a convolution in channels_last: no dimension is dense."""
    base = torch.full((*tensor.shape, 3), torch.nan, dtype=tensor.dtype)
    base[..., 1] = tensor
    return base[..., 1]


def batch_inside(tensor: Tensor) -> Tensor:
    return tensor.permute(1, 2, 0).contiguous().permute(2, 0, 1)


def expanded(tensor: Tensor) -> Tensor:
    return tensor[:1].expand_as(tensor)


def reversed_rows(tensor: Tensor) -> Tensor:
    """Rows that overlap in memory, each one element further than the last."""
    batch, rows, cols = tensor.shape
    line = tensor.reshape(-1)[: rows + cols - 1].contiguous()
    return line.as_strided((batch, rows, cols), (0, 1, 1))


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": contiguous,
    "transposed": transposed,
    "sliced": sliced,
    "columns": columns,
    "interleaved": interleaved,
    "batch_inside": batch_inside,
    "expanded": expanded,
    "overlapping": reversed_rows,
}


def operands(case: Case) -> tuple[Tensor, Tensor, Tensor | None]:
    generator = torch.Generator().manual_seed(case.m * 1000 + case.k)

    def draw(cols: int) -> Tensor:
        drawn = torch.randn(case.batch, case.m, cols, generator=generator).to(DTYPES[case.dtype])
        return LAYOUTS[case.layout](drawn)

    L = draw(case.k)
    return L, L if case.gram else draw(case.k), draw(case.m) if case.added else None


def judged(case: Case) -> tuple[Tensor, Tensor]:
    """In float64: the lower half of the result, mirrored, and the magnitudes that were added."""
    L, R, D = operands(case)
    alpha, beta, gamma = case.scalars
    exact = alpha * (L.double() @ R.double().mT)
    size = abs(alpha) * (L.double().abs() @ R.double().abs().mT)
    if D is not None:
        exact, size = exact + beta * D.double(), size + abs(beta) * D.double().abs()
    identity = torch.eye(case.m, dtype=torch.float64)
    exact, size = exact + gamma * identity, size + abs(gamma) * identity
    return exact.tril() + exact.tril(-1).mT, size.tril() + size.tril(-1).mT


def allowed(case: Case) -> float:
    """The bound on |error| / magnitudes for sums of k products in float32, in any order.

    One rounding of 2^-24 for each of k additions and products, four for the scalars (rounded to
    float32 themselves), D and I; then the result's own rounding, half of its eps.
    """
    own = torch.finfo(DTYPES[case.dtype]).eps / 2 if case.dtype != "fp32" else 0.0
    return (case.k + 5) * 2.0**-24 + own


# ---- in the interpreter's process


def patch_interpreter() -> None:
    """Teach Triton's interpreter bfloat16, which it stores as bits and multiplies as integers.

    Conversions to it also truncate, where the hardware rounds to the nearest.
    """
    import numpy as np
    import triton.language as language
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    handle, own_dot, own_cast = interpreter.TensorHandle, builder.create_dot, builder.cast_impl

    def widened(tensor: Any) -> Any:
        if tensor.dtype.scalar != language.bfloat16:
            return tensor
        bits = tensor.data.astype(np.uint32) << np.uint32(16)
        return handle(bits.view(np.float32), language.float32)

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return own_dot(self, widened(a), widened(b), *rest)

    def cast_impl(self: Any, source: Any, to: Any) -> Any:
        if source.dtype.scalar == language.float32 and to.scalar == language.bfloat16:
            rounded = torch.from_numpy(np.ascontiguousarray(source.data)).bfloat16()
            return handle(rounded.view(torch.int16).numpy().view(np.uint16), language.bfloat16)
        return own_cast(self, source, to)

    builder.create_dot, builder.cast_impl = create_dot, cast_impl
    # Bound at the class's creation, each to the function above's predecessor.
    builder.create_fp_trunc = cast_impl


def compute(case: Case) -> Tensor:
    from muonkit.newton_schulz.triton import symmetric_kernel
    from muonkit.newton_schulz.triton.blocks import Blocks

    own = symmetric_kernel.choose
    if case.tile:
        symmetric_kernel.choose = lambda *asked: Blocks(case.tile, 16, 4, 3)
    try:
        return kernels.symmetric_product(*operands(case), *case.scalars)
    finally:
        symmetric_kernel.choose = own


def measure(case: Case) -> dict[str, object]:
    C = compute(case)
    exact, size = judged(case)
    error = (C.double() - exact).abs()
    return {
        # Where no product is large, float16 rounds to multiples of 2^-24: allow half of that.
        "error": float(((error - 2.0**-25 * (case.dtype == "fp16")) / size).max()),
        "symmetric": torch.equal(C, C.mT),
        "kind": [list(C.shape), str(C.dtype), C.is_contiguous()],
    }


def poisoned(value: float) -> dict[str, bool]:
    """Three matrices, one entry of the second replaced."""
    clean = torch.randn(3, 80, 40, generator=torch.Generator().manual_seed(0))
    dirty = clean.clone()
    dirty[1, 37, 3] = value
    before, after = (kernels.symmetric_product(X, X, None, 1.0, 0.0, 0.0) for X in (clean, dirty))
    outside = torch.ones(80, 80, dtype=torch.bool)
    outside[37] = outside[:, 37] = False
    return {
        "others_untouched": torch.equal(before[[0, 2]], after[[0, 2]]),
        "rest_untouched": torch.equal(before[1][outside], after[1][outside]),
        "reached": not bool(after[1][~outside].isfinite().any()),
    }


def far() -> bool:
    """Two matrices more than 2^31 elements apart, with rows 2^25 apart; a few pages are real."""
    m, k, row, batch = 70, 8, 2**25, 2**31 + 2**20
    assert (m - 1) * row > 2**31
    base = torch.empty(batch + m * row, dtype=torch.float16)
    X = base.as_strided((2, m, k), (batch, row, 1))
    X.copy_(torch.randn(2, m, k, generator=torch.Generator().manual_seed(0)))
    near = X.contiguous()
    D = base[1:].as_strided((2, m, m), (batch, row, 1))  # over what X leaves free: odd addresses
    D.fill_(0.0)
    D.copy_(torch.eye(m).expand(2, m, m))
    X.copy_(near)
    found = kernels.symmetric_product(X, X, D, 1.0, 0.5, 0.0)
    return torch.equal(found, kernels.symmetric_product(near, near, D.contiguous(), 1.0, 0.5, 0.0))


def order() -> dict[str, bool]:
    """The order of tiles: each once, and right for numbers up to the largest of a grid."""
    global tl, row_of, tile_of  # Triton looks names up among the globals
    import triton
    import triton.language as tl

    from muonkit.newton_schulz.triton.symmetric_kernel import GROUP, row_of, tile_of

    @triton.jit
    def tiles(numbers, T, i_out, j_out, GROUP: tl.constexpr, SIZE: tl.constexpr):
        at = tl.arange(0, SIZE)
        i, j = tile_of(tl.load(numbers + at), T, GROUP)
        tl.store(i_out + at, i)
        tl.store(j_out + at, j)

    @triton.jit
    def rows(numbers, out, SIZE: tl.constexpr):
        at = tl.arange(0, SIZE)
        tl.store(out + at, row_of(tl.load(numbers + at)))

    once = True
    for T in (1, 2, 7, 8, 9, 16, 29):
        count = T * (T + 1) // 2
        numbers = torch.arange(512) % count
        i, j = torch.empty_like(numbers), torch.empty_like(numbers)
        tiles[(1,)](numbers, T, i, j, GROUP, 512)
        found = set(zip(i[:count].tolist(), j[:count].tolist(), strict=True))
        once &= found == {(a, b) for a in range(T) for b in range(a + 1)}
    # Around the first number of many rows, the last row that 2^31 reaches included.
    starts = [a * (a + 1) // 2 for a in [*range(1, 600), *range(65_535, 57_000, -97)]]
    numbers = torch.tensor([2**31 - 1, *(n + d for n in starts for d in (-1, 0, 1))])
    numbers = torch.cat([numbers, numbers.new_zeros(4096 - len(numbers))])
    out = torch.empty_like(numbers)
    rows[(1,)](numbers, out, 4096)
    exact = bool(((out * (out + 1) // 2 <= numbers) & (numbers < (out + 1) * (out + 2) // 2)).all())
    return {"once": once, "exact": exact}


def empty() -> bool:
    """No matrices, no rows, and no columns: nothing to launch, or nothing to sum."""
    shapes = [(0, 4, 3), (2, 0, 3)]
    empties = [
        kernels.symmetric_product(X, X, None, 1.0, 0.0, 0.0) for X in map(torch.zeros, shapes)
    ]
    X = torch.zeros(2, 5, 0)
    C = kernels.symmetric_product(X, X, torch.ones(2, 5, 5), 1.0, 2.0, 3.0)
    right = torch.equal(C, (2.0 + 3.0 * torch.eye(5)).expand(2, 5, 5))
    return right and [tuple(C.shape) for C in empties] == [(0, 4, 4), (2, 0, 0)]


def unread() -> bool:
    """With beta = 0 what D holds does not matter, as in torch.baddbmm."""
    X, D = torch.ones(1, 4, 4), torch.full((1, 4, 4), torch.nan)
    return torch.equal(kernels.symmetric_product(X, X, D, 1.0, 0.0, 0.0), X @ X.mT)


def precisions() -> list[str]:
    """What float32 and bfloat16 are multiplied as: by default, with tf32 allowed, and refused."""
    from muonkit.newton_schulz.triton import precision

    found = [precision(torch.float32)]
    torch.backends.cuda.matmul.allow_tf32 = True
    found += [precision(torch.float32), precision(torch.bfloat16)]
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    return [*found, precision(torch.float32)]


def interpret() -> dict[str, object]:
    torch.set_num_threads(1)
    patch_interpreter()
    found: dict[str, object] = {case.name: measure(case) for case in cases()}
    found |= {"nan": poisoned(torch.nan), "inf": poisoned(torch.inf), "far": far()}
    found |= {"order": order(), "empty": empty(), "unread": unread(), "precisions": precisions()}
    return found


# ---- in the compiler's process


def compile_some() -> dict[str, object]:
    """The largest blocks of the table, as code of two architectures; and blocks that are too large.

    Without masks or with them, the loop's offsets are the same: one of both is enough.
    """
    sys.path.insert(0, str(BENCHMARKS))
    import kernels as benchmark

    from muonkit.newton_schulz.triton.blocks import choose

    large = choose(8, 4096, 4096, "16 bits")
    aligned = benchmark.Variant("bf16", large, "rows", whole=False, with_D=True)
    any_strides = benchmark.Variant("bf16", large, "any", whole=False, with_D=True)
    small = choose(8, 4096, 4096, "16 bits", aligned=False)
    wide = choose(8, 4096, 16384, "16 bits")
    wanted = {
        "sm_80": ("sm_80", aligned),
        "sm_90": ("sm_90", aligned),
        "columns": ("sm_90", benchmark.Variant("bf16", wide, "columns", False, False)),
        "any strides": ("sm_80", benchmark.Variant("bf16", small, "any", False, True)),
        "too large": ("sm_80", any_strides),
    }
    found: dict[str, object] = {}
    for name, (target, variant) in wanted.items():
        compiled = benchmark.compile_variant(target, variant)
        found[name] = {"fault": compiled.fault, "instructions": compiled.instructions}
    for name in ("sm_80", "columns", "any strides"):
        found[f"narrow offsets, {name}"] = narrow(
            benchmark.compiled_code(*wanted[name]).asm["ttir"]
        )
    return found | {"specializations": specializations()}


def narrow(ir: str) -> list[str]:
    """What is added to an address and is neither 64 bits wide nor a constant."""
    added = re.findall(r"tt\.addptr %[\w#]+, (%[\w#]+) : [^,]*(?:<[^>]*>+)?, (\S+)", ir)
    assert len(added) > 8
    return [
        f"{name}: {kind}"
        for name, kind in added
        if "i64" not in kind and not name.startswith("%cst") and not name.startswith("%c")
    ]


def specializations() -> int:
    """How many kernels Triton would compile for calls that differ in sizes, strides and scalars."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    from muonkit.newton_schulz.triton.symmetric_kernel import kernel

    backend = make_backend(GPUTarget("cuda", 80, 32))
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    keys = set()
    base = torch.zeros(64)
    for integer, scalar, offset in ((1, 1.0, 0), (16, 0.0, 0), (17, -2.5, 1), (2**40, 1e30, 3)):
        tensors = [base[offset:]] * 4
        bound = bind(*tensors, *[integer] * 11, *[scalar] * 3, 64, 32, 8, 1, False, False, "ieee")
        keys.add(str(bound[1]))
    return len(keys)


# ---- from the tests' process


def run_apart(what: str, environment: dict[str, str]) -> dict[str, Any]:
    shown = subprocess.run(
        [sys.executable, "-m", __name__, what],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert shown.returncode == 0, shown.stderr[-3000:]
    found: dict[str, Any] = json.loads(shown.stdout)
    return found


@functools.cache
def interpreted() -> dict[str, Any]:
    """What `interpret` found; one process for all tests that ask."""
    return run_apart("interpreted", {"TRITON_INTERPRET": "1"})


@functools.cache
def compiled() -> dict[str, Any]:
    """What `compile_some` found, with nothing from an earlier run."""
    with tempfile.TemporaryDirectory() as cache:
        return run_apart("compiled", {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": cache})


if __name__ == "__main__":
    print(json.dumps({"interpreted": interpret, "compiled": compile_some}[sys.argv[1]]()))
