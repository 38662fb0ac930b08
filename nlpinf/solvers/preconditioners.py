"""How preconditioners are made from an operator C + diag(shift) + λI: by EK-FAC, its diagonal, Nyström, or past solves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from nlpinf import parameters as P
from nlpinf.curvature.ekfac import EKFAC, planned_bytes
from nlpinf.curvature.operators import Shifted
from nlpinf.curvature.products import Curvature
from nlpinf.errors import BadInput
from nlpinf.parameters import Parameters
from nlpinf.solvers.base import Preconditioner
from nlpinf.solvers.block import Columns
from nlpinf.stages import Stage


class Preconditioning(Protocol):
    """Makes a preconditioner v ↦ M⁻¹ v, M symmetric positive definite, for one operator."""

    def fit(self, operator: Shifted) -> Preconditioner:
        """Return it."""
        ...

    def settings(self) -> dict[str, Any]:
        """Return the settings for a manifest."""
        ...


@dataclass(frozen=True)
class EKFACPreconditioning:
    """EK-FAC of the operator's stage, from at most `rows` rows of its curvature sample; always of the Gauss-Newton matrix.

    `largest`  as in `EKFAC.fit`; 0 makes it the diagonal
    """

    rows: int = 512
    largest: int = 2048
    name: str = "ekfac"

    def settings(self) -> dict[str, Any]:
        return {"name": self.name, "rows": self.rows, "largest": self.largest}

    def fit(self, operator: Shifted) -> Preconditioner:
        return self.factors(operator).inverse(operator.damping, operator.shift)

    def planned(self, stage: Stage) -> str:
        """Say in a line what memory the factors of a stage take."""
        found = planned_bytes(stage, self.largest)
        mib = 1 << 20
        return f"EK-FAC takes {found.factors / mib:,.1f} MiB, {found.peak / mib:,.1f} MiB at most while it is made, beside the model and a batch"

    def factors(self, operator: Shifted) -> EKFAC:
        """Return the factors of the operator's curvature."""
        base = operator.base
        if not isinstance(base, Curvature):
            raise BadInput(f"the {self.name} preconditioner needs a stage's curvature, not {type(base).__name__}")
        step = max(1, len(base.indices) // self.rows)
        return EKFAC.fit(base.stage, base.indices[::step], base.seed, self.largest)


@dataclass(frozen=True)
class Nystrom:
    """A = D^−½ C D^−½ ≈ U Λ Uᵀ from `rank` products with random vectors (Frangella, Tropp and Udell, 2023).

    Without a start D = I, C is the operator without its damping λ, and ℓ the last of Λ. With one D is its EK-FAC, C the whole
    operator, λ = 0 and ℓ = 1: what EK-FAC leaves of the largest eigenvalues is taken out.

        M⁻¹ = D^−½ [ U (Λ + λ)⁻¹ Uᵀ + (ℓ + λ)⁻¹ (I − U Uᵀ) ] D^−½

    It costs `rank` products and holds `rank` vectors, once for all queries.
    """

    rank: int = 32
    start: EKFACPreconditioning | None = None
    seed: int = 0

    def settings(self) -> dict[str, Any]:
        start = self.start and self.start.settings()
        return {"name": "nystrom", "rank": self.rank, "start": start, "seed": self.seed}

    def planned(self, stage: Stage) -> str:
        """Say in a line what memory its vectors take, and the factors that it starts from."""
        size = sum(t.numel() * t.element_size() for t in stage.theta.values())
        told = f"Nyström takes {2 * self.rank} vectors, {2 * self.rank * size / (1 << 20):,.1f} MiB"
        return told if self.start is None else f"{self.start.planned(stage)}; {told}"

    def fit(self, operator: Shifted) -> Preconditioner:
        if P.in_pieces(operator.template):
            raise BadInput(
                "the model is sharded among processes, for which there is no Nyström preconditioner; take the preconditioner 'none'"
            )
        damping, root = operator.damping, None
        if self.start is not None:
            factors, damping = self.start.factors(operator), 0.0
            root = factors.inverse(operator.damping, operator.shift, 0.5)

        def halved(v: Parameters) -> Parameters:
            return v if root is None else root(v)

        rank = min(self.rank, operator.shape[0])
        draws = Columns.of([P.random_like(operator.template, self.seed * 104729 + i) for i in range(rank)])
        draws = draws.orthonormal()
        made = draws.mapped(halved).through(operator).mapped(halved)
        made = draws.combined(-damping * torch.eye(len(draws), dtype=torch.float64), made)
        inner = draws.gram(made)
        if not bool(torch.isfinite(inner).all()):
            raise BadInput("a curvature product is not finite; run `nlpinf check` on the model")
        values, vectors = torch.linalg.eigh((inner + inner.T) / 2)
        large = values > 1e-7 * values[-1].clamp(min=0)
        if not bool(large.any()):
            return lambda v: halved(halved(v))
        half = made.combined(vectors[:, large] / values[large].sqrt())  # half halfᵀ = Y (Ωᵀ Y)⁻¹ Yᵀ
        eigenvalues, rotation = torch.linalg.eigh(half.gram(half))
        kept = eigenvalues > 1e-7 * eigenvalues[-1]
        eigenvalues, basis = eigenvalues[kept], half.combined(rotation[:, kept] / eigenvalues[kept].sqrt())
        rest = 1.0 if root is not None else float(eigenvalues[0]) + damping
        weights = 1 / (eigenvalues + damping) - 1 / rest

        def solve(v: Parameters) -> Parameters:
            column = Columns.of([halved(v)])
            return halved(P.axpy(1 / rest, column[0], basis.combined(weights[:, None] * basis.gram(column))[0]))

        return solve


@dataclass
class LimitedMemory:
    """The inverse as the directions of past solves know it (L-BFGS; Morales and Nocedal, 2000): serves query after query.

    `memory`  directions that are kept, two vectors each
    `start`   the preconditioner that it improves, None for the identity
    """

    memory: int = 24
    start: Preconditioning | None = None

    def settings(self) -> dict[str, Any]:
        return {"name": "spectral", "memory": self.memory, "start": self.start and self.start.settings()}

    def fit(self, operator: Shifted) -> Preconditioner:
        return _Recycled(self.memory, None if self.start is None else self.start.fit(operator))


@dataclass
class _Recycled:
    memory: int
    start: Preconditioner | None
    pairs: list[tuple[Parameters, Parameters, float]] = field(default_factory=list)

    def learn(self, pairs: Sequence[tuple[Parameters, Parameters]]) -> None:
        self.pairs = [*self.pairs, *((s, y, P.dot(s, y)) for s, y in pairs)][-self.memory :]

    def __call__(self, v: Parameters) -> Parameters:
        weights = []
        for s, y, sy in reversed(self.pairs):
            weights.append(P.dot(s, v) / sy)
            v = P.axpy(-weights[-1], y, v)
        if self.start is not None:
            v = self.start(v)
        elif self.pairs:
            _, y, sy = self.pairs[-1]
            v = P.scaled(sy / P.dot(y, y), v)
        for (s, y, sy), weight in zip(self.pairs, reversed(weights)):
            v = P.axpy(weight - P.dot(y, v) / sy, s, v)
        return v


KINDS: dict[str, Callable[[], Preconditioning | None]] = {
    "none": lambda: None,
    "diagonal": lambda: EKFACPreconditioning(largest=0, name="diagonal"),
    "ekfac": EKFACPreconditioning,
    "nystrom": Nystrom,
    "ekfac+nystrom": lambda: Nystrom(start=EKFACPreconditioning()),
    "spectral": LimitedMemory,
}


def preconditioning(kind: str | Preconditioning | None) -> Preconditioning | None:
    """Return what a name stands for; anything else as it is."""
    if not isinstance(kind, str):
        return kind
    if kind not in KINDS:
        raise BadInput(f"preconditioner {kind!r} is none of {', '.join(map(repr, KINDS))}")
    return KINDS[kind]()


__all__ = ["KINDS", "EKFACPreconditioning", "LimitedMemory", "Nystrom", "Preconditioning", "preconditioning"]
