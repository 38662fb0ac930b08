"""Preconditioned conjugate gradient (Hestenes and Stiefel, 1952) with a verdict."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from nlpinf import parameters as P
from nlpinf.curvature.operators import Operator
from nlpinf.errors import BadInput
from nlpinf.parameters import Parameters
from nlpinf.solvers.base import Preconditioner, Solution, Verdict, finished


@dataclass(frozen=True)
class CG:
    """Conjugate gradient for a symmetric positive definite operator.

    `tolerance`       relative residual ‖b − C x‖/‖b‖ to reach, checked with a true residual, not the recursive one
    `max_iterations`  curvature products at most, but for those that check
    `preconditioner`  v ↦ M⁻¹ v with M symmetric positive definite

    Ends with "negative curvature" at a direction p with ⟨p, C p⟩ ≤ 0 (the iterate before it is returned), "diverged" when the
    recursive residual grows by `divergence`, "not finite" at the first NaN or infinity. Where the recursive residual
    has drifted from the true one the iteration starts again from the current iterate (residual replacement).
    """

    tolerance: float = 1e-3
    max_iterations: int = 1000
    preconditioner: Preconditioner | None = None
    divergence: float = 1e6

    def __post_init__(self) -> None:
        if not 0 < self.tolerance < 1:
            raise BadInput(f"the tolerance is {self.tolerance}; it must lie between 0 and 1")
        if self.max_iterations < 1:
            raise BadInput(f"max_iterations is {self.max_iterations}; at least one is needed")

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
        z = precondition(r)
        p, rz, start = z, P.dot(r, z), P.norm(r) / scale
        for k in range(budget):
            cp = operator @ p
            curvature = P.dot(p, cp)
            if not math.isfinite(curvature):
                return x, "not finite", k + 1
            if curvature <= 0.0 or rz <= 0.0:
                return x, "negative curvature", k + 1
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
