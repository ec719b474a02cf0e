"""Orthogonalization: (nearly) the closest semi-orthogonal matrix, by matrix products alone.

With G = U S V^T, the result is U p(S) V^T, where p is the composed polynomial of the schedule and
takes the singular values of the normalized matrix near one. Nothing here knows of optimizers,
parameters or ranks.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from muonkit._compile import constant_result
from muonkit.coefficients import DEFAULT_STEPS, KELLER, Iterations, resolve

if TYPE_CHECKING:
    from collections.abc import Callable

    from muonkit.coefficients import Coefficients

__all__ = [
    "FORMS",
    "NS_DTYPES",
    "orthogonalize",
    "products_dtype",
    "resolve_dtype",
    "resolve_form",
]

NS_DTYPES: dict[str, torch.dtype] = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def orthogonalize(
    G: Tensor,
    *,
    ns_coefficients: Coefficients = KELLER,
    ns_steps: int = DEFAULT_STEPS,
    ns_form: str = "auto",
    ns_dtype: str | torch.dtype = "auto",
) -> Tensor:
    """Replace every matrix by (nearly) its closest semi-orthogonal matrix.

    Newton-Schulz: X <- aX + (bA + cA^2)X with A = XX^T (Keller Jordan 2024), on the matrix divided
    by its largest magnitude and then by its Frobenius norm, so that any finite scale gives the
    same result. Zero gives zero. The input is never written to; the result is differentiable.

    Args:
        G: `(..., m, n)`, floating point; the leading dimensions are a batch of matrices.
        ns_coefficients: a schedule's name, "svd" for the exact factor, one triple (a, b, c), or one
            triple per step.
        ns_steps: number of iterations (see `muonkit.coefficients.resolve`).
        ns_form: how the polynomial is evaluated; "auto" chooses.
        ns_dtype: the dtype of the matrix products; "auto" is what the hardware multiplies natively:
            bfloat16 on GPUs and CPUs with bf16 units, else float32. float64 input stays float64,
            and the schedules without a safety factor, which diverge in 16 bits, get float32.

    Returns:
        A tensor of G's shape and dtype.

    Raises:
        ValueError: fewer than two dimensions, an unknown option, or a schedule without a safety
            factor in a 16-bit dtype.
        TypeError: G is not a real floating-point tensor of at least 16 bits.
    """
    if not isinstance(G, Tensor) or not G.dtype.is_floating_point or G.dtype.itemsize < 2:
        got = G.dtype if isinstance(G, Tensor) else type(G).__name__
        raise TypeError(
            f"orthogonalize expects a real floating-point tensor of at least 16 bits, got {got}"
        )
    if G.ndim < 2:
        raise ValueError(
            f"orthogonalize expects matrices (..., m, n), got shape {tuple(G.shape)}; "
            "a vector has no orthogonal factor: train it with AdamW"
        )
    iterations = resolve(ns_coefficients, ns_steps)
    form = resolve_form(ns_form)
    dtype = products_dtype(ns_dtype, G.dtype, G.device, iterations)
    if G.numel() == 0:
        return G.clone()
    X = G.reshape(-1, *G.shape[-2:])
    tall = X.shape[-2] > X.shape[-1]
    # Row-major, or the products of the first iteration run at two thirds of their rate.
    X = _normalize(X.mT.contiguous() if tall else X, iterations, dtype)
    X = _exact(X) if iterations.exact else FORMS[form](X, iterations)
    return (X.mT if tall else X).reshape(G.shape).to(G.dtype)


def products_dtype(
    ns_dtype: str | torch.dtype,
    input_dtype: torch.dtype,
    device: torch.device,
    iterations: Iterations,
) -> torch.dtype:
    """The dtype that these iterations are computed in.

    The exact factor has no products to choose a dtype for: it is decomposed in at least float32.

    Raises:
        ValueError: as `resolve_dtype`.
    """
    dtype = resolve_dtype(ns_dtype, input_dtype, device, iterations.strict)
    if iterations.exact:
        return torch.promote_types(torch.promote_types(input_dtype, torch.float32), dtype)
    return dtype


@constant_result
def resolve_dtype(
    ns_dtype: str | torch.dtype,
    input_dtype: torch.dtype,
    device: torch.device,
    strict: bool = False,
) -> torch.dtype:
    """The dtype of the matrix products that `ns_dtype` stands for on this device.

    Args:
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
        options = ", ".join(map(repr, ["auto", *NS_DTYPES]))
        raise ValueError(f"unknown ns_dtype {ns_dtype!r}; it is one of {options}")
    if input_dtype == torch.float64:
        return torch.float64  # whoever keeps float64 weights asked for its precision
    if strict:
        return torch.float32
    return torch.bfloat16 if _multiplies_bf16(device.type, device.index) else torch.float32


def resolve_form(ns_form: str) -> str:
    """The form that `ns_form` stands for.

    Raises:
        ValueError: not a key of `FORMS` nor "auto".
    """
    if ns_form == "auto":
        return "standard"
    if ns_form not in FORMS:
        options = ", ".join(map(repr, ["auto", *FORMS]))
        raise ValueError(f"unknown ns_form {ns_form!r}; it is one of {options}")
    return ns_form


@functools.lru_cache(maxsize=64)
def _multiplies_bf16(device_type: str, index: int | None) -> bool:
    """Whether this device multiplies bf16 matrices natively, not by emulation."""
    if device_type == "cuda":
        # Before Ampere bf16 products are emulated. Also true of every ROCm GPU with bf16 MFMA.
        return torch.cuda.get_device_capability(index)[0] >= 8
    if device_type == "cpu":
        features = torch.cpu.get_capabilities()
        return any(features.get(name) for name in ("amx_bf16", "avx512_bf16", "bf16", "sve_bf16"))
    return device_type == "xpu"


def _normalize(X: Tensor, iterations: Iterations, dtype: torch.dtype) -> Tensor:
    """Every matrix divided by its norm, in at least float32; then in the dtype of the products."""
    wide = torch.promote_types(X.dtype, torch.float32)
    margin = iterations.margin
    if iterations.strict:
        # Rounding can push the largest singular value above 1.
        margin *= 1 + 4 * torch.finfo(dtype).eps
    X = X.to(wide)
    # The square of a magnitude beyond 1e19 overflows float32, below 1e-23 it vanishes: take the
    # magnitude out first. A maximum of zero is a zero matrix, which stays one.
    largest = X.abs().amax(dim=(-2, -1), keepdim=True)
    X = X / torch.where(largest == 0, 1.0, largest)
    norm = torch.linalg.vector_norm(X, dim=(-2, -1), keepdim=True)  # 0, or at least 1
    norm = torch.where(norm == 0, 1.0, norm * margin)
    # In place where autograd does not need X as it was: one pass over memory less.
    X = X / norm if X.requires_grad else X.div_(norm)
    return X.to(dtype)


def _standard(X: Tensor, iterations: Iterations) -> Tensor:
    """The polynomial on X itself: three products an iteration; `(B, m, n)` with m <= n."""
    for a, b, c in iterations.triples:
        A = X @ X.mT
        P = torch.baddbmm(A, A, A, beta=b, alpha=c) if c else b * A
        if X.dtype.itemsize > 2:
            # a on the diagonal: (aI + bA + cA^2)X as one plain product. On a CPU, a product that
            # adds to a matrix copies that matrix first, a third more time for the largest ones.
            P.diagonal(dim1=-2, dim2=-1).add_(a)
            X = P @ X
        else:
            # 16 bits would round a; as the product's beta it stays exact.
            X = torch.baddbmm(X, P, X, beta=a)
    return X


# How a polynomial is evaluated: same mathematics, different FLOPs and rounding.
FORMS: dict[str, Callable[[Tensor, Iterations], Tensor]] = {"standard": _standard}


def _exact(X: Tensor) -> Tensor:
    """U V^T over the singular values that are not rounding; X in at least float32.

    A matrix with a non-finite entry gives NaN, as the polynomial does (LAPACK would raise).
    """
    finite = X.isfinite().all(-1).all(-1)[:, None, None]
    U, S, Vh = torch.linalg.svd(torch.where(finite, X, 0.0), full_matrices=False)
    floor = max(X.shape[-2:]) * torch.finfo(X.dtype).eps * S[..., :1]
    kept = (S > floor).to(X.dtype)
    return torch.where(finite, (U * kept[..., None, :]) @ Vh, torch.nan)
