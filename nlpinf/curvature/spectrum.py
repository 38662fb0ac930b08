"""What products alone tell of an operator's eigenvalues: Lanczos from random vectors (Golub and Meurant; Ubaru et al., 2017).

A start z of ±1 entries and k products give a tridiagonal T with eigenvalues θ_i (Ritz values) and weights τ_i² (the first entries
of its eigenvectors, squared), such that zᵀ f(C) z / P ≈ Σ τ_i² f(θ_i). The extreme θ approach the extreme eigenvalues from
inside, so a negative θ proves a negative eigenvalue.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from nlpinf import parameters as P
from nlpinf.curvature.operators import Operator
from nlpinf.errors import BadInput
from nlpinf.parameters import Parameters


def lanczos(operator: Operator, start: Parameters, steps: int) -> Tensor:
    """Return T (k, k) in float64 after at most `steps` products; fewer where the Krylov space is exhausted.

    More steps than there are parameters can pay: rounding repeats Ritz values, and the extreme ones go on converging.
    """
    size = P.norm(start)
    if not size > 0:
        raise BadInput("Lanczos needs a start that is not zero")
    q_old, q, beta = P.zeros_like(start), P.scaled(1 / size, start), 0.0
    diagonal: list[float] = []
    off: list[float] = []
    for _ in range(steps):
        v = P.axpy(-beta, q_old, operator @ q)
        alpha = P.dot(q, v)
        v = P.axpy(-alpha, q, v)
        # One more pass keeps neighbours orthogonal to rounding; distant ones only repeat Ritz values, which is harmless.
        v = P.axpy(-P.dot(q, v), q, v)
        beta = P.norm(v)
        diagonal.append(alpha)
        if not math.isfinite(alpha + beta) or beta <= 1e-10 * max(map(abs, diagonal)):
            break
        off.append(beta)
        q_old, q = q, P.scaled(1 / beta, v)
    off = off[: len(diagonal) - 1]
    d, o = torch.tensor(diagonal, dtype=torch.float64), torch.tensor(off, dtype=torch.float64)
    return torch.diag(d) + torch.diag(o, 1) + torch.diag(o, -1)


def smallest_ritz_value(operator: Operator, steps: int = 24, seed: int = 0) -> float:
    """Return an upper bound of the smallest eigenvalue, near it after enough steps."""
    t = lanczos(operator, P.random_like(operator.template, seed), steps)
    return float(torch.linalg.eigvalsh(t)[0]) if bool(torch.isfinite(t).all()) else math.nan


@dataclass(frozen=True)
class Spectrum:
    """Eigenvalues `values` (n,) with `weights` (n,) that sum to 1: shares of the P eigenvalues near each."""

    values: Tensor
    weights: Tensor
    size: int
    products: int

    @property
    def mean(self) -> float:
        """tr(C)/P."""
        return float(self.values @ self.weights)

    @property
    def smallest(self) -> float:
        """The smallest Ritz value, an upper bound of the smallest eigenvalue."""
        return float(self.values.min())

    @property
    def largest(self) -> float:
        """The largest Ritz value, a lower bound of the largest eigenvalue."""
        return float(self.values.max())

    def above(self, threshold: float) -> float:
        """Return how many of the P eigenvalues are above the threshold."""
        return float(self.weights[self.values > threshold].sum()) * self.size

    def effective_dimension(self, damping: float) -> float:
        """Return tr(C (C + λI)⁻¹) over the positive eigenvalues: how many directions the data determine at that damping."""
        values = self.values.clamp(min=0)
        return float((self.weights * values / (values + damping)).nan_to_num(0.0).sum()) * self.size


def sketch(operator: Operator, probes: int = 4, steps: int = 24, seed: int = 0) -> Spectrum:
    """Return the spectrum as `probes` random starts see it, `steps` products each."""
    before = operator.products
    values, weights = [], []
    for i in range(probes):
        t = lanczos(operator, P.random_like(operator.template, seed * 7919 + i, P.rademacher), steps)
        if not bool(torch.isfinite(t).all()):
            raise BadInput("a curvature product is not finite; run `nlpinf check` on the model")
        found, vectors = torch.linalg.eigh(t)
        values.append(found)
        weights.append(vectors[0].square() / probes)
    return Spectrum(torch.cat(values), torch.cat(weights), operator.shape[0], operator.products - before)
