"""Norms and singular values of stacks of matrices, in float64 (on the CPU, if the device has none).

For a matrix A of m x n with m <= n, singular values σ_1 <= ... <= σ_m and p_i = σ_i / Σσ:

- norm: ||A||_F;
- entropy: H / log m, where H = -Σ p_i log p_i (1 for m = 1): 1 if all σ are equal, towards 0 if one
  is larger than all others;
- effective rank: exp(H), between 1 and m (Roy & Vetterli, EUSIPCO 2007, whose entropy this is);
- stable rank: ||A||_F^2 / ||A||_2^2, between 1 and m (Rudelson & Vershynin, J. ACM 54, 2007);
- quantiles: σ at `LEVELS` equal steps from the smallest to the largest, linearly interpolated;
- orthogonality error: ||AA^T - I||_F / √m = √(mean of (σ_i^2 - 1)^2), of the short side.

The σ are the square roots of the eigenvalues of AA^T. In float64 those below 1e-8 of the largest
are rounding, which is less than float32 entries themselves leave of them. Apple's GPUs (mps) have
neither float64 nor eigenvalues, and some of Intel's (xpu) no float64: their matrices are measured
on the CPU.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from muonkit._torch import measurable

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

__all__ = ["LEVELS", "SPECTRUM", "norms", "orthogonality_error", "spectra"]

# Quantiles of the singular values: the smallest, every sixteenth of them, the largest.
LEVELS = 17

# The measures that `spectra` returns for each matrix, in this order; LEVELS quantiles follow.
SPECTRUM = ("min", "max", "entropy", "stable_rank", "effective_rank")

# Bytes of the matrices that are taken together, in float64.
CHUNK_BYTES = 2**26


def norms(A: Tensor) -> tuple[Tensor, Tensor]:
    """The Frobenius norms of a stack `(N, m, n)`, and how many entries of each matrix are not
    finite: both `(N,)`. A norm is NaN where there is such an entry.
    """
    found, counts = [], []
    for chunk in _chunks(A):
        broken = (~chunk.isfinite()).sum((-2, -1))
        X, largest = _scaled(chunk, broken > 0)
        norm = torch.linalg.vector_norm(X, dim=(-2, -1)) * largest
        found.append(norm.masked_fill(broken > 0, math.nan))
        counts.append(broken)
    return torch.cat(found), torch.cat(counts)


def spectra(A: Tensor) -> Tensor:
    """The spectra of a stack `(N, m, n)`, as `(N, len(SPECTRUM) + LEVELS)`: NaN where a matrix is
    zero or not finite.
    """
    return torch.cat([_spectra(chunk) for chunk in _chunks(A)])


def orthogonality_error(A: Tensor) -> Tensor:
    """The errors of a stack `(N, m, n)`, as `(N,)`: NaN where a matrix is not finite."""
    errors = []
    for chunk in _chunks(A):
        gram = _gram(chunk.double())
        gram.diagonal(dim1=-2, dim2=-1).sub_(1)
        error = torch.linalg.vector_norm(gram, dim=(-2, -1)) / gram.shape[-1] ** 0.5
        errors.append(error.masked_fill(~error.isfinite(), math.nan))
    return torch.cat(errors)


def _spectra(A: Tensor) -> Tensor:
    broken = ~A.isfinite().all(-1).all(-1)
    X, largest = _scaled(A, broken)
    gram = _gram(X)
    try:
        eigenvalues = torch.linalg.eigvalsh(gram)  # ascending
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]  # does not converge: no reason to end a training
        eigenvalues = gram.new_full(gram.shape[:-1], math.nan)
    sigma = eigenvalues.clamp_min(0).sqrt() * largest[:, None]
    sigma = sigma.masked_fill((broken | (largest == 0))[:, None], math.nan)
    p = sigma / sigma.sum(-1, keepdim=True)
    entropy = -torch.special.xlogy(p, p).sum(-1)
    m = sigma.shape[-1]
    top = sigma[:, -1]
    stable = (sigma / top[:, None]).square().sum(-1)
    normalized = entropy / math.log(m) if m > 1 else torch.where(entropy.isnan(), entropy, 1.0)
    measures = [sigma[:, 0], top, normalized, stable, entropy.exp()]
    return torch.cat([torch.stack(measures, -1), _quantiles(sigma)], -1)


def _quantiles(sigma: Tensor) -> Tensor:
    """`(N, m)`, ascending -> `(N, LEVELS)`."""
    # On the CPU whatever the default device is: indices are needed as they are computed there.
    places = torch.linspace(0, sigma.shape[-1] - 1, LEVELS, dtype=sigma.dtype, device="cpu")
    low = places.floor().long().clamp_max(sigma.shape[-1] - 1)
    high = places.ceil().long().clamp_max(sigma.shape[-1] - 1)
    weight = (places - low).to(sigma.device)
    return torch.lerp(sigma[:, low.to(sigma.device)], sigma[:, high.to(sigma.device)], weight)


def _scaled(A: Tensor, broken: Tensor) -> tuple[Tensor, Tensor]:
    """Every matrix over its largest magnitude, which squares would overflow on, and that; zeros
    where it is broken.
    """
    X = A.double().masked_fill(broken[:, None, None], 0.0)
    largest = X.abs().amax((-2, -1))
    return X / torch.where(largest > 0, largest, 1.0)[:, None, None], largest


def _gram(X: Tensor) -> Tensor:
    """The Gram matrix of the shorter side."""
    return X @ X.mT if X.shape[-2] <= X.shape[-1] else X.mT @ X


def _chunks(A: Tensor) -> Iterator[Tensor]:
    """Parts of a stack, each no larger than CHUNK_BYTES unless it is one matrix."""
    size = max(1, CHUNK_BYTES // max(1, A.shape[-2] * A.shape[-1] * 8))
    return (measurable(part) for part in torch.split(A, size))
