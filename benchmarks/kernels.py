"""Compile every variant of the Triton kernel, without a GPU, and show what came out.

    python benchmarks/kernels.py                                  # all: minutes, at first
    python benchmarks/kernels.py --target sm_90 --dtype bf16 --tile 128 --every
    python benchmarks/kernels.py --errors                         # in Triton's interpreter

Registers and spills are read from the machine code (`cuobjdump`, which Triton brings, for NVIDIA;
the assembly's own notes for AMD), instructions are counted in the PTX or the assembly. A row is the
worst of the variants that share its blocks: with and without D, and (where aligned) with and
without masks in the loop. Exits with 1 if anything spills to memory, or if a variant that should
use tensor cores does not. Compiled code is kept in Triton's own cache.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import harness
import machine
import torch
from parts import table

from muonkit.newton_schulz.triton.blocks import BLOCKS, SMALLEST, UNALIGNED, Blocks

# Triton's names: backend, architecture, threads in a warp.
TARGETS: dict[str, tuple[str, int | str, int]] = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "gfx942": ("hip", "gfx942", 64),
}
# Bytes of shared memory that a program may have.
SHARED = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "gfx942": 64 * 1024}
# dtype and how it is multiplied. float32 in full precision has tensor cores on AMD only.
PRODUCTS = {
    "bf16": ("bf16", "ieee"),
    "fp16": ("fp16", "ieee"),
    "fp32": ("fp32", "ieee"),
    "tf32": ("fp32", "tf32"),
}
KINDS = {"bf16": "16 bits", "fp16": "16 bits", "fp32": "float32", "tf32": "tf32"}
SIZES = {"bf16": 2, "fp16": 2, "fp32": 4}
TENSOR_CORES = {"mma.sync": r"\bmma\.sync", "wgmma": r"\bwgmma\.mma_async", "v_mfma": r"\bv_mfma"}
HEAD = ["target", "product", "layout", "tile × depth", "warps", "registers", "shared KiB"]
HEAD += ["spills", "tensor-core instructions"]


@dataclass(frozen=True)
class Variant:
    """One compiled kernel, as `muonkit.newton_schulz.triton.symmetric_kernel.launch` would ask for
    it.
    """

    product: str
    blocks: Blocks
    layout: str  # what is dense: "rows", "columns" (of a Gram matrix's L), or "any", nothing
    whole: bool
    with_D: bool


@dataclass(frozen=True)
class Compiled:
    target: str
    variant: Variant
    registers: int
    shared_bytes: int
    spilled_bytes: int
    instructions: dict[str, int]

    @property
    def fault(self) -> str | None:
        """What must not be, in words."""
        where = f"{self.target} {self.variant}"
        if self.spilled_bytes:
            return f"{where} spills {self.spilled_bytes} bytes a thread: choose smaller blocks"
        expected = self.variant.product != "fp32" or self.target.startswith("gfx")
        if expected and not any(self.instructions.values()):
            return f"{where} has no tensor-core instruction"
        return None


def variants() -> Iterator[Variant]:
    """All that can be compiled: what the table says, for each layout, with and without D."""
    for product, kind in KINDS.items():
        for blocks in sorted({SMALLEST[kind], *BLOCKS[kind]}):
            for layout, whole, with_D in itertools.product(
                ("rows", "columns"), (True, False), (False, True)
            ):
                yield Variant(product, blocks, layout, whole, with_D)
        for blocks in sorted(set(UNALIGNED[kind])):
            for with_D in (False, True):
                yield Variant(product, blocks, "any", False, with_D)


def is_used(target: str, variant: Variant) -> bool:
    """float32 is multiplied in full precision on ROCm, whatever torch allows; on NVIDIA torch's own
    products are faster there, and only calls from outside come, which are with dense rows.
    """
    if TARGETS[target][0] == "hip":
        return variant.product != "tf32"
    return variant.product != "fp32" or variant.layout != "columns"


def compiled_code(target: str, variant: Variant) -> Any:
    """Triton's compiled kernel. Needs no driver."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from muonkit.newton_schulz.triton.symmetric_kernel import GROUP, kernel

    dtype, precision = PRODUCTS[variant.product]
    blocks = variant.blocks
    fit = SHARED[target] // (2 * blocks.tile * blocks.depth * SIZES[dtype])
    stages = max(1, min(blocks.stages, fit))  # as `_blocks.choose` does
    constants = {
        "TILE": variant.blocks.tile,
        "DEPTH": variant.blocks.depth,
        "GROUP": GROUP,
        "VECTOR": 1 if variant.layout == "any" else 16 // SIZES[dtype],
        "TALL": variant.layout == "columns",
        "WHOLE": variant.whole,
        "PRECISION": precision,
    }
    if not variant.with_D:
        constants["D"] = None
    types = {name: f"*{dtype}" for name in "LRDC"} | dict.fromkeys(
        ("alpha", "beta", "gamma"), "fp32"
    )
    signature = {
        name: "constexpr" if name in constants else types.get(name, "i64")
        for name in kernel.arg_names
    }
    return triton.compile(
        ASTSource(kernel, signature, constants),
        target=GPUTarget(*TARGETS[target]),
        options={"num_warps": variant.blocks.warps, "num_stages": stages},
    )


def compile_variant(target: str, variant: Variant) -> Compiled:
    code = compiled_code(target, variant)
    nvidia = TARGETS[target][0] == "cuda"
    text = code.asm["ptx" if nvidia else "amdgcn"]
    registers, spilled = nvidia_usage(code.asm["cubin"]) if nvidia else amd_usage(text)
    counts = {name: len(re.findall(pattern, text)) for name, pattern in TENSOR_CORES.items()}
    found = {name: count for name, count in counts.items() if count}
    return Compiled(target, variant, registers, code.metadata.shared, spilled, found)


def nvidia_usage(cubin: bytes) -> tuple[int, int]:
    """Registers of a thread, and bytes of its stack: this kernel has nothing else to keep there."""
    import triton

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        shown = subprocess.run(
            [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name],
            check=True,
            capture_output=True,
            text=True,
        ).stdout
    usage = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", shown)}
    return usage["REG"], usage["STACK"] + usage["LOCAL"]


def amd_usage(assembly: str) -> tuple[int, int]:
    """Vector registers of a thread, accumulators included, and its bytes of scratch memory.

    Scalar registers that overflow go to vector registers, which is not a spill to memory.
    """

    def note(key: str) -> int:
        return int(re.findall(rf"\.{key}:\s*(\d+)", assembly)[-1])

    return note("vgpr_count"), note("private_segment_fixed_size") + 4 * note("vgpr_spill_count")


def worst(group: list[Compiled]) -> list[str]:
    """A row of the table: the most registers, memory and spills, the fewest instructions."""
    names = sorted({name for each in group for name in each.instructions})
    least = {name: min(each.instructions.get(name, 0) for each in group) for name in names}
    variant = group[0].variant
    return [
        group[0].target,
        variant.product,
        variant.layout,
        f"{variant.blocks.tile} × {variant.blocks.depth}",
        str(variant.blocks.warps),
        str(max(each.registers for each in group)),
        f"{max(each.shared_bytes for each in group) / 1024:.0f}",
        str(max(each.spilled_bytes for each in group)),
        ", ".join(f"{count} {name}" for name, count in least.items()) or "none",
    ]


def rows_of(results: list[Compiled], every: bool) -> list[list[str]]:
    """The table: a row for those that share their blocks, or for every variant."""

    def key(each: Compiled) -> tuple[object, ...]:
        own = each.variant
        return (each.target, own.product, own.layout, own.blocks, *((own,) if every else ()))

    groups: dict[tuple[object, ...], list[Compiled]] = {}
    for each in results:
        groups.setdefault(key(each), []).append(each)
    return [worst(group) for group in groups.values()]


def show_errors() -> None:
    """The largest error of each dtype, against float64, over the cases that the tests have."""
    sys.path.insert(0, str(Path(__file__).parents[1]))  # the tests are a package of the checkout
    from tests.helpers import kernels as kernel_helpers

    found = kernel_helpers.interpreted()
    print("| dtype | cases | largest error | of its bound |")
    print("|---|---|---|---|")
    for dtype in kernel_helpers.DTYPES:
        cases = [case for case in kernel_helpers.cases() if case.dtype == dtype]
        errors = [float(found[case.name]["error"]) for case in cases]
        pairs = zip(errors, cases, strict=True)
        share = max(error / kernel_helpers.allowed(case) for error, case in pairs)
        print(f"| {dtype} | {len(cases)} | {max(errors):.1e} | {share:.2f} |")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--target", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--dtype", nargs="+", choices=PRODUCTS, default=list(PRODUCTS))
    parser.add_argument("--tile", nargs="+", type=int, help="only these tiles")
    parser.add_argument("--every", action="store_true", help="a row for each variant")
    parser.add_argument("--errors", action="store_true", help="run the interpreter instead")
    parser.add_argument("--json", type=Path, help="write table and variants to this file")
    options = parser.parse_args()
    if importlib.util.find_spec("triton") is None:
        print("Triton is not installed, and compiles these kernels: pip install triton (Linux)")
        return 1
    if options.errors:
        show_errors()
        return 0
    import triton

    wanted = [
        variant
        for variant in variants()
        if variant.product in options.dtype
        and (options.tile is None or variant.blocks.tile in options.tile)
    ]
    results = [
        compile_variant(target, each)
        for target in options.target
        for each in wanted
        if is_used(target, each)
    ]
    print(f"Triton {triton.__version__}, torch {torch.__version__}: {len(wanted)} variants of the "
          f"kernel, for {', '.join(options.target)}\n")  # fmt: skip
    rows = rows_of(results, options.every)
    print(table(HEAD, rows, left=4))
    if options.json:
        facts = machine.facts()
        record = {
            "kind": "kernels",
            **{name: facts[name] for name in ("command", "torch", "date")},
            "triton": triton.__version__,
            "rows": rows,
            "variants": [asdict(each) | {"fault": each.fault} for each in results],
        }
        harness.write(options.json, record)
    faults = [each.fault for each in results if each.fault]
    print("\n".join(["", *faults]) if faults else "\nnothing spills, no tensor core is missed")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
