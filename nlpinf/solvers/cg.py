"""Preconditioned conjugate gradient (Hestenes and Stiefel, 1952) with a verdict."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from nlpinf import parameters as P
from nlpinf.curvature.operators import Operator
from nlpinf.parameters import Parameters
from nlpinf.solvers.base import Preconditioner, Solution, Verdict, checked, finished
from nlpinf.solvers.block import block_cg

_BLOCK_ENTRIES = 1 << 27  # half a gigabyte in single precision, for each of the dozen sets of columns of block CG


@dataclass(frozen=True)
class CG:
    """Conjugate gradient for a symmetric positive definite operator.

    `tolerance`       relative residual ‖b − C x‖/‖b‖ to reach, checked with a true residual, not the recursive one
    `max_iterations`  curvature products at most, but for those that check
    `preconditioner`  v ↦ M⁻¹ v with M symmetric positive definite

    Ends with "negative curvature" at a direction p with ⟨p, C p⟩ ≤ 0 (the iterate before it is returned), "diverged" when the
    recursive residual grows by `divergence`, "not finite" at the first NaN or infinity. Where the recursive residual
    has drifted from the true one the iteration starts again from the current iterate (residual replacement).
    Several right-hand sides share their directions (`block.py`), `block` of them at a time, fewer for a large model: block CG
    holds about ten numbers a parameter and column.

    A preconditioner that has `learn` is handed the last `memory` directions and their products after each solve.
    """

    tolerance: float = 1e-3
    max_iterations: int = 1000
    preconditioner: Preconditioner | None = None
    divergence: float = 1e6
    block: int = 16

    def __post_init__(self) -> None:
        checked(self.tolerance, self.max_iterations)

    def settings(self) -> dict[str, Any]:
        return {
            "name": "cg",
            "tolerance": self.tolerance,
            "max_iterations": self.max_iterations,
            "preconditioned": self.preconditioner is not None,
        }

    def __call__(
        self,
        operator: Operator,
        right: Parameters,
        second: Operator | None = None,
        progress: Callable[[int, float], None] | None = None,
    ) -> Solution:
        before, scale = operator.products, P.norm(right)
        x = P.zeros_like(right)
        history: list[float] = []
        verdict: Verdict = "not converged"

        def ended(verdict: Verdict) -> Solution:
            return finished("cg", operator, second, right, x, verdict, self.tolerance, history, before)

        if not math.isfinite(scale):
            return ended("not finite")
        if scale == 0.0:
            return ended("converged")

        r, iterations, reached = right, 0, 1.0
        while iterations < self.max_iterations:
            x, verdict, spent = self._run(operator, x, r, scale, self.max_iterations - iterations, history, progress)
            iterations += spent
            if verdict != "converged":
                break
            r = P.axpy(-1.0, operator @ x, right)
            true = P.norm(r) / scale
            if true <= self.tolerance or true > 0.5 * reached:  # there, or rounding allows no better
                break
            reached = true
        return ended(verdict)

    def many(
        self,
        operator: Operator,
        rights: Sequence[Parameters],
        second: Operator | None = None,
        progress: Callable[[int, float], None] | None = None,
    ) -> list[Solution]:
        """Return the solution for every right-hand side, by block CG where there are several."""
        block = min(self.block, _BLOCK_ENTRIES // max(1, P.size(rights[0]))) if rights else 0
        if len(rights) < 2 or block < 2:
            return [self(operator, right, second, progress) for right in rights]
        limits = (self.preconditioner, self.tolerance, self.max_iterations)
        parts = [rights[i : i + block] for i in range(0, len(rights), block)]
        return [s for part in parts for s in block_cg(operator, part, second, *limits, progress)]

    def _run(
        self,
        operator: Operator,
        x: Parameters,
        r: Parameters,
        scale: float,
        budget: int,
        history: list[float],
        progress: Callable[[int, float], None] | None,
    ) -> tuple[Parameters, Verdict, int]:
        precondition = self.preconditioner or (lambda v: v)
        learn = getattr(self.preconditioner, "learn", None)
        pairs: deque[tuple[Parameters, Parameters]] = deque(maxlen=getattr(self.preconditioner, "memory", 0))
        x, verdict, spent = self._steps(operator, x, r, scale, budget, history, progress, precondition, pairs)
        if learn is not None:
            learn(pairs)
        return x, verdict, spent

    def _steps(
        self,
        operator: Operator,
        x: Parameters,
        r: Parameters,
        scale: float,
        budget: int,
        history: list[float],
        progress: Callable[[int, float], None] | None,
        precondition: Preconditioner,
        pairs: deque[tuple[Parameters, Parameters]],
    ) -> tuple[Parameters, Verdict, int]:
        z = precondition(r)
        p, rz, start = z, P.dot(r, z), P.norm(r) / scale
        for k in range(budget):
            cp = operator @ p
            curvature = P.dot(p, cp)
            if not math.isfinite(curvature):
                return x, "not finite", k + 1
            if curvature <= 0.0 or rz <= 0.0:
                return x, "negative curvature", k + 1
            pairs.append((p, cp))
            step = rz / curvature
            x, r = P.axpy(step, p, x), P.axpy(-step, cp, r)
            size = P.norm(r) / scale
            history.append(size)
            if progress is not None:
                progress(len(history), size)
            if not math.isfinite(size):
                return x, "not finite", k + 1
            if size > self.divergence * start:
                return x, "diverged", k + 1
            if size <= self.tolerance:
                return x, "converged", k + 1
            z = precondition(r)
            rz, old = P.dot(r, z), rz
            p = P.axpy(rz / old, p, z)
        return x, "not converged", budget
