"""Orthogonalization: (nearly) the closest semi-orthogonal matrix, by matrix products alone.

With G = U S V^T, the result is U p(S) V^T, where p is the composed polynomial of the schedule and
takes the singular values of the normalized matrix near one. Nothing here knows of optimizers,
parameters or ranks.
"""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from muonkit._compile import constant_result
from muonkit._torch import is_watched_by_func
from muonkit.newton_schulz.coefficients import DEFAULT_STEPS, KELLER, Triple, resolve
from muonkit.newton_schulz.dtypes import (
    NS_DTYPES,
    dtype_reason,
    is_small,
    products_dtype,
    resolve_dtype,
    without_autocast,
)
from muonkit.newton_schulz.forms import check_form, choose_form, product_flops, segments
from muonkit.newton_schulz.scratch import is_kept, scratch
from muonkit.newton_schulz.symmetric import block_count, general_product, method, symmetric_product

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from muonkit.newton_schulz.coefficients import Coefficients

__all__ = [
    "NS_DTYPES",
    "Choice",
    "check_choice",
    "choose",
    "orthogonalize",
    "orthogonalize_",
    "products_dtype",
    "resolve_dtype",
]


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
        ns_steps: number of iterations (see `muonkit.newton_schulz.coefficients.resolve`).
        ns_form: how the polynomial is evaluated; "auto" chooses.
        ns_dtype: the dtype of the matrix products; "auto" is the one that the hardware multiplies
            fastest, of bfloat16 and float32: bfloat16 on GPUs (of NVIDIA's from Ampere on), on
            CPUs with AMX for matrices of at least 96 rows and columns, and on Arm CPUs with BFMMLA
            where torch has the Arm Compute Library; float32 elsewhere (on CPUs with AVX-512's bf16
            instructions alone too, where bfloat16 products take 1.8 times as long). float64 input
            stays float64, and the schedules without a safety factor, which diverge in 16 bits, get
            float32.

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
    rows, cols = G.shape[-2:]
    options = ns_coefficients, ns_steps, ns_form, ns_dtype
    if not _is_transformed(G):
        return orthogonalize_(G.clone(memory_format=torch.contiguous_format), *options)
    exact, triples, margin, dtype, balanced = _constants(
        *options, G.dtype, G.device, is_small(rows, cols)
    )
    if G.numel() == 0:
        return G.clone()
    with without_autocast(G.device):
        X = _normalize(G.reshape(-1, rows, cols), margin, dtype, differentiable=True)
        if exact:
            O = _exact(X)
        else:
            if torch.compiler.is_compiling() and ns_form == "auto":
                ns_form = "standard"  # the compiler may know the shape as symbols only
            O = _evaluate(X, triples, ns_form, balanced, differentiable=True)
        return O.to(G.dtype).reshape(G.shape)


def _is_transformed(G: Tensor) -> bool:
    """Whether something watches what is computed of G: autograd, in either mode, or torch.func."""
    if torch.is_grad_enabled() and G.requires_grad:
        return True
    if torch.compiler.is_compiling():
        return False
    dual = torch.autograd.forward_ad.unpack_dual(G)  # type: ignore[no-untyped-call]
    return is_watched_by_func(G) or dual.tangent is not None


def orthogonalize_(
    X: Tensor,
    ns_coefficients: Coefficients,
    ns_steps: int,
    ns_form: str,
    ns_dtype: str | torch.dtype,
) -> Tensor:
    """`orthogonalize` in place, not differentiable: nothing of X's size is allocated.

    Returns:
        X, contiguous or `(B, m, n)`.
    """
    rows, cols = X.shape[-2:]
    exact, triples, margin, dtype, balanced = _constants(
        ns_coefficients, ns_steps, ns_form, ns_dtype, X.dtype, X.device, is_small(rows, cols)
    )
    if X.numel():
        batch = X if X.ndim == 3 else X.view(-1, rows, cols)
        if exact:
            with without_autocast(X.device):
                batch.copy_(_exact(_normalize(batch, margin, dtype)))
        else:
            flat = [number for triple in triples for number in triple]
            torch.ops.muonkit.newton_schulz_.default(batch, flat, ns_form, margin, dtype, balanced)
    return X


class Choice(NamedTuple):
    """What is computed for one shape, every "auto" replaced.

    Attributes:
        exact: singular value decomposition; what follows is then empty.
        triples: (a, b, c) of every iteration.
        restarts: see `muonkit.newton_schulz.forms.Evaluation`.
        margin: the input is divided by margin times its norm.
        dtype: of the matrix products.
        dtype_reason: why it is this one, in a few words.
        form: a key of `muonkit.newton_schulz.forms.FORMS`, or "svd".
        blocks: in how many blocks of rows a symmetric product is computed.
        flops: of the matrix products for one matrix.
    """

    exact: bool
    triples: tuple[Triple, ...]
    restarts: tuple[int, ...]
    margin: float
    dtype: torch.dtype
    dtype_reason: str
    form: str
    blocks: int
    flops: int


def choose(
    ns_coefficients: Coefficients,
    ns_steps: int,
    ns_form: str,
    ns_dtype: str | torch.dtype,
    input_dtype: torch.dtype,
    device: torch.device,
    rows: int,
    cols: int,
) -> Choice:
    """What `orthogonalize` does with matrices of this shape and dtype on this device.

    Raises:
        ValueError, TypeError: as `orthogonalize`.
    """
    small = is_small(rows, cols)
    exact, triples, margin, dtype, _ = _constants(
        ns_coefficients, ns_steps, ns_form, ns_dtype, input_dtype, device, small
    )
    reason = dtype_reason(ns_dtype, input_dtype, device, resolve(ns_coefficients, ns_steps), small)
    if exact:
        return Choice(True, (), (), 1.0, dtype, reason, "svd", 1, 0)
    m, n = sorted((rows, cols))
    blocks = block_count(m, dtype, device)
    form, restarts = choose_form(ns_form, m, n, triples, dtype.itemsize, blocks)
    flops = product_flops(m, n, triples, restarts, blocks)
    return Choice(False, triples, restarts, margin, dtype, reason, form, blocks, flops)


def check_choice(
    ns_coefficients: Coefficients, ns_steps: int, ns_form: str, ns_dtype: str | torch.dtype
) -> None:
    """Compare the arguments with what they may be; a graph may do so before each step.

    Raises:
        ValueError, TypeError: as `orthogonalize`.
    """
    cpu = torch.device("cpu")
    _constants(ns_coefficients, ns_steps, ns_form, ns_dtype, torch.float32, cpu, False)


@constant_result
def _constants(
    ns_coefficients: Coefficients,
    ns_steps: int,
    ns_form: str,
    ns_dtype: str | torch.dtype,
    input_dtype: torch.dtype,
    device: torch.device,
    small: bool,
) -> tuple[bool, tuple[Triple, ...], float, torch.dtype, bool]:
    """Of `Choice` exact, triples, margin and dtype, which depend on a shape only by its being
    small, and whether rows are balanced first.

    They are a plain tuple, which torch.compile takes for a constant.
    """
    iterations = resolve(ns_coefficients, ns_steps)
    dtype = products_dtype(ns_dtype, input_dtype, device, iterations, small)
    check_form(ns_form)
    margin = iterations.margin
    if iterations.strict:
        # Rounding can push the largest singular value above 1.
        margin *= 1 + 4 * torch.finfo(dtype).eps
    return iterations.exact, iterations.triples, margin, dtype, iterations.balanced


def _normalize(
    X: Tensor,
    margin: float,
    dtype: torch.dtype,
    differentiable: bool = False,
    looks: bool = False,
) -> Tensor:
    """Every matrix divided by `margin` times its norm, in at least float32; then in `dtype`.

    Args:
        looks: values may be read on the way, to spare those passes that few matrices need: not
            where something waits for them, or traces.
    """
    X = X.to(torch.promote_types(X.dtype, torch.float32))
    out = None if differentiable else scratch("normalized", tuple(X.shape), X.dtype, X.device)
    norm = _norm(X) if looks else None
    magnitude = _magnitude(X, norm)
    if magnitude is not None:
        X = X / magnitude if out is None else torch.div(X, magnitude, out=out)
        again = _norm(X).clamp_min(torch.finfo(X.dtype).tiny)
        # What was divided by 1 keeps the norm that it has without the others, to the bit.
        norm = again if norm is None else torch.where(magnitude == 1, norm, again)
    assert norm is not None
    if margin != 1:
        norm = norm * margin
    if out is None:
        normalized: Tensor = X / norm
        return normalized.to(dtype)
    if X.device.type == "cuda" and X.dtype != dtype:  # rounded as it is written: two passes less
        out = X.new_empty(X.shape, dtype=dtype)
    return torch.div(X, norm, out=out).to(dtype)


def _magnitude(X: Tensor, norm: Tensor | None) -> Tensor | None:
    """What every matrix is divided by before its norm is taken, since the squares of huge and of
    tiny numbers are none; None where `norm`, taken without that, is right for all of them.
    """
    within = None
    if norm is not None:
        least = _least_norm(X.dtype)
        lowest, highest = norm.aminmax()
        if least < lowest.item() and highest.item() < math.inf:  # NaN is neither
            return None
        within = (least < norm) & (norm < math.inf)
    largest = _largest(X).clamp_min(torch.finfo(X.dtype).tiny)  # a zero matrix stays one
    return largest if within is None else largest.masked_fill_(within, 1)


def _norm(X: Tensor) -> Tensor:
    """The norm of every matrix, `(B, 1, 1)`."""
    if X.device.type == "cpu":
        # Along memory first: torch adds up all squares of a matrix in one long sum, and at 4096 x
        # 4096 is off by 6e-4, or 5e-3 where rows lie apart. A large one takes half the time too.
        along = -1 if X.stride(-1) <= X.stride(-2) else -2
        X = torch.linalg.vector_norm(X, dim=along, keepdim=True)
    norm: Tensor = torch.linalg.vector_norm(X, dim=(-2, -1), keepdim=True)
    return norm


@functools.cache
def _least_norm(dtype: torch.dtype) -> float:
    """Above this the squares that vanish, of up to 2^40 entries, are less than a rounding error of
    their sum. (A sum of squares that overflows is infinite, and so is the norm.)
    """
    info = torch.finfo(dtype)
    return float((info.tiny * 2.0**40 / info.eps) ** 0.5)


def _largest(X: Tensor) -> Tensor:
    """The largest magnitude of every matrix, `(B, 1, 1)`; NaN where there is one."""
    if X.device.type == "cuda":
        largest: Tensor = torch.linalg.vector_norm(X, torch.inf, dim=(-2, -1), keepdim=True)
        return largest
    # On a CPU these two passes take less time.
    return torch.maximum(X.amax(dim=(-2, -1), keepdim=True), -X.amin(dim=(-2, -1), keepdim=True))


# Names of scratch memory, and none: what is small, or differentiated, is allocated.
_NAMES: dict[str, str | None] = {name: name for name in ("A", "P0", "P1", "PA", "Q0", "Q1")}
_NO_NAMES: dict[str, str | None] = dict.fromkeys(_NAMES)


def _evaluate(
    X: Tensor,
    triples: tuple[Triple, ...],
    ns_form: str,
    balanced: bool = False,
    out: Tensor | None = None,
    differentiable: bool = False,
) -> Tensor:
    """The polynomial on normalized matrices, `(B, m, n)` or `(B, n, m)`; see
    `muonkit.newton_schulz.forms`.

    Args:
        balanced: divide the rows of the shorter side first: `coefficients.Schedule`. It takes
            no product of its own.
        out: where the result goes, not the memory of X.
        differentiable: by operations that torch can transform; no scratch.
    """
    m, n = sorted(X.shape[-2:])
    tall = X.shape[-2] > X.shape[-1]
    blocks = block_count(m, X.dtype, X.device)
    form, restarts = choose_form(ns_form, m, n, triples, X.dtype.itemsize, blocks)
    how = 1 if differentiable else method(X.mT if tall else X)
    product: Callable[..., Tensor] = general_product
    if how != 1:
        product = functools.partial(symmetric_product, blocks=how)
    small = not is_kept(X.shape[0] * m * m * X.dtype.itemsize, X.device)
    plain = how == 1 and form == "standard" and not balanced and not differentiable
    if plain and small and X.dtype.itemsize > 2:
        return _by_iteration(X, triples, tall, out)
    names = _NO_NAMES if how == 1 and (small or differentiable) else _NAMES
    # 16 bits would round a on P's diagonal: P is without aI, and the products add a times their
    # other factor. In float32 one P, rounded once for all three products, is nearer to exact.
    split = how == 1 and X.dtype.itemsize == 2 and not differentiable
    runs = segments(triples, restarts)
    for run, segment in enumerate(runs, start=1):
        rows = X.mT if tall else X
        target = out
        if run < len(runs):  # not X's own memory
            name = f"X{run % 2}"
            target = None if differentiable else scratch(name, tuple(X.shape), X.dtype, X.device)
        A = product(rows, rows, name=names["A"])
        if balanced and run == 1:
            X, A = _balanced(X, A, tall, differentiable)
        if len(segment) == 1 and X.dtype.itemsize == 2:
            # a is the last product's beta: see above.
            ((a, b, c),) = segment
            P = _polynomial(product, A, 0.0, b, c, names["P0"])
            X = _apply(torch.baddbmm, (X,), P, X, tall, target, beta=a)
            continue
        Q = None
        for number, (a, b, c) in enumerate(segment, start=1):
            apart = a if split else 0.0
            # Q and P in turn take the memory of the Q and P before the last.
            P = _polynomial(product, A, a - apart, b, c, names[f"P{number % 2}"])
            if Q is not None:
                Q = product(P, Q, Q, beta=apart, name=names[f"Q{number % 2}"])
            if number < len(segment):
                PA = product(P, A, A, beta=apart, name=names["PA"])
                A = product(PA, P, PA, beta=apart, name=names["A"])
            if Q is None:
                Q = _add_identity_(P, apart)
        assert Q is not None
        X = _apply(torch.bmm, (), Q, X, tall, target)
    return X


def _by_iteration(X: Tensor, triples: tuple[Triple, ...], tall: bool, out: Tensor | None) -> Tensor:
    """What `_evaluate` does in the standard form, to the bit, in as few calls as there are: of
    small matrices these take longer than what they compute.
    """
    m = min(X.shape[-2:])
    P = X.new_empty(X.shape[0], m, m)
    diagonal = P.diagonal(dim1=-2, dim2=-1)
    for number, (a, b, c) in enumerate(triples, start=1):
        rows = X.mT if tall else X
        A = torch.bmm(rows, rows.mT)
        if c:
            torch.baddbmm(A, A, A.mT, beta=b, alpha=c, out=P)
        else:
            torch.mul(A, b, out=P)
        diagonal.add_(a)
        target = out if number == len(triples) else None
        factors = (X, P) if tall else (P, X)
        X = torch.bmm(*factors) if target is None else torch.bmm(*factors, out=target)
    return X


def _balanced(X: Tensor, A: Tensor, tall: bool, differentiable: bool) -> tuple[Tensor, Tensor]:
    """X and A = XX^T, once row i of X (of the shorter side) is divided by √(Σ_j |A_ij|).

    The spectral norm is then at most 1 (AOL; Turbo-Muon, arXiv 2512.04632). A zero row stays zero.
    """
    wide = torch.promote_types(A.dtype, torch.float32)
    sums = A.abs().sum(dim=-1, keepdim=True, dtype=wide)
    least = torch.finfo(wide).tiny
    s = torch.where(sums > least, sums.clamp_min(least).rsqrt(), 0.0).to(A.dtype)
    across = s.mT if tall else s
    if differentiable:
        return X * across, A * s * s.mT
    return X.mul_(across), A.mul_(s).mul_(s.mT)


def _apply(
    function: Callable[..., Tensor],
    first: tuple[Tensor, ...],
    Q: Tensor,
    X: Tensor,
    tall: bool,
    out: Tensor | None,
    **options: float,
) -> Tensor:
    """The product of Q and X on X's short side; without `out` where torch.func could not follow."""
    factors = (X, Q) if tall else (Q, X)
    if out is None:
        return function(*first, *factors, **options)
    return function(*first, *factors, out=out, **options)


def _polynomial(
    product: Callable[..., Tensor], A: Tensor, a: float, b: float, c: float, name: str | None
) -> Tensor:
    """aI + bA + cA^2."""
    if c:
        return product(A, A, A, alpha=c, beta=b, gamma=a, name=name)
    return _add_identity_(b * A, a)


def _add_identity_(P: Tensor, a: float) -> Tensor:
    if a:
        P.diagonal(dim1=-2, dim2=-1).add_(a)
    return P


def _exact(X: Tensor) -> Tensor:
    """U V^T over the singular values that are not rounding; X in at least float32.

    A matrix with a non-finite entry gives NaN, as the polynomial does (LAPACK would raise).
    """
    finite = X.isfinite().all(-1).all(-1)[:, None, None]
    U, S, Vh = torch.linalg.svd(torch.where(finite, X, 0.0), full_matrices=False)
    floor = max(X.shape[-2:]) * torch.finfo(X.dtype).eps * S[..., :1]
    kept = (S > floor).to(X.dtype)
    return torch.where(finite, (U * kept[..., None, :]) @ Vh, torch.nan)


def _newton_schulz_(
    G: Tensor,
    coefficients: Sequence[float],
    ns_form: str,
    margin: float,
    dtype: torch.dtype,
    balanced: bool = False,
) -> None:
    """Normalize and evaluate in place, as one operation of torch: one node in a compiled graph.

    On a CPU a few matrices at a time, so that what is written is still in the cache when it is
    read, and temporaries stay small enough for malloc to keep them (fresh pages cost more than the
    arithmetic on them); elsewhere the whole batch at once.
    """
    triples = tuple(zip(coefficients[::3], coefficients[1::3], coefficients[2::3], strict=True))
    count, rows, cols = G.shape
    looks = G.device.type == "cpu"
    together = _together(count, rows, cols, dtype) if looks else count
    with without_autocast(G.device):
        for some in (G,) if together >= count else torch.split(G, together):
            out = some if dtype == G.dtype and some.is_contiguous() else None
            X = _normalize(some, margin, dtype, looks=looks)
            O = _evaluate(X, triples, ns_form, balanced, out)
            if out is None:
                some.copy_(O)


def _together(count: int, rows: int, cols: int, dtype: torch.dtype) -> int:
    """How many matrices a CPU takes at a time: as many for every thread, and about as many each
    time.
    """
    threads = torch.get_num_threads()
    most = max(1, _CPU_BYTES_TOGETHER // (rows * cols * dtype.itemsize * threads)) * threads
    times = -(-count // most)
    return -(-count // (times * threads)) * threads


_CPU_BYTES_TOGETHER = 4 * 2**20

# Not torch.library.custom_op, whose wrapper costs as much as several small products.
torch.library.define(
    "muonkit::newton_schulz_",
    "(Tensor(a!) G, float[] coefficients, str ns_form, float margin, ScalarType dtype, "
    "bool balanced=False) -> ()",
)
torch.library.impl("muonkit::newton_schulz_", "CompositeExplicitAutograd", _newton_schulz_)
torch.library.register_fake("muonkit::newton_schulz_", lambda *_: None)
