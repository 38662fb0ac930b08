"""MINRES (Paige and Saunders, 1975): the smallest residual over the Krylov space, for operators that may be indefinite."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from nlpinf import parameters as P
from nlpinf.curvature.operators import Operator
from nlpinf.parameters import Parameters
from nlpinf.solvers.base import EachAlone, Preconditioner, Solution, Verdict, checked, finished


@dataclass(frozen=True)
class MINRES(EachAlone):
    """For the Hessian without damping, where CG may end with "negative curvature"; a singular system is solved in the range.

    `preconditioner` must be positive definite also where the operator is not. What is minimised is ‖b − C x‖ in the norm
    of M⁻¹; the verdict goes by the plain norm.
    """

    tolerance: float = 1e-3
    max_iterations: int = 1000
    preconditioner: Preconditioner | None = None

    def __post_init__(self) -> None:
        checked(self.tolerance, self.max_iterations)

    def settings(self) -> dict[str, Any]:
        return {
            "name": "minres",
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
        verdict: Verdict = "converged" if scale == 0 else "not converged" if math.isfinite(scale) else "not finite"
        reached, r, used = 1.0, right, 0
        while verdict == "not converged" and used < self.max_iterations:
            # The recurrence's residual is in another norm and drifts: start again from the true one while that helps.
            step, spent = self._run(operator, r, scale, self.max_iterations - used, history, progress)
            used += spent
            x = P.axpy(1.0, step, x)
            r = P.axpy(-1.0, operator @ x, right)
            true = P.norm(r) / scale
            if not true <= 0.5 * reached:
                break
            if true <= self.tolerance:
                verdict = "converged"
            reached = true
        return finished("minres", operator, second, right, x, verdict, self.tolerance, history, before)

    def _run(
        self,
        operator: Operator,
        b: Parameters,
        scale: float,
        budget: int,
        history: list[float],
        progress: Callable[[int, float], None] | None,
    ) -> tuple[Parameters, int]:
        precondition = self.preconditioner or (lambda v: v)
        x, w_old, w = (P.zeros_like(b) for _ in range(3))
        v_old, v = P.zeros_like(b), b
        z = precondition(v)
        beta, beta_old = math.sqrt(max(P.dot(v, z), 0.0)), 1.0
        eta, start, r = beta, beta, b
        c_old, c, s_old, s = 1.0, 1.0, 0.0, 0.0
        for k in range(budget):
            if not beta > 0 or not math.isfinite(beta):
                return x, k
            cz = operator @ P.scaled(1 / beta, z)
            alpha = P.dot(z, cz) / beta
            new = P.axpy(-alpha / beta, v, cz)
            if k:
                new = P.axpy(-beta / beta_old, v_old, new)
            z_new = precondition(new)
            beta_new = math.sqrt(max(P.dot(new, z_new), 0.0))
            delta = c * alpha - c_old * s * beta
            rho1 = math.hypot(delta, beta_new)
            rho2, rho3 = s * alpha + c_old * c * beta, s_old * beta
            if not rho1 > 1e-14 * abs(alpha) or not math.isfinite(rho1):
                return x, k + 1
            c_old, c, s_old, s = c, delta / rho1, s, beta_new / rho1
            w_old, w = (
                w,
                P.scaled(1 / rho1, P.axpy(-rho2, w, P.axpy(-rho3, w_old, P.scaled(1 / beta, z)))),
            )
            x = P.axpy(c * eta, w, x)
            # r_k = s² r_{k-1} − c η_k v_{k+1}/β_{k+1}: the plain residual without a product.
            eta_new = -s * eta
            r = P.axpy(c * eta_new / beta_new, new, P.scaled(s * s, r)) if beta_new > 0 else P.scaled(0.0, r)
            eta = eta_new
            size = P.norm(r) / scale
            history.append(size)
            if progress is not None:
                progress(len(history), size)
            if not math.isfinite(size) or size <= self.tolerance or abs(eta) <= 1e-15 * start:
                return x, k + 1
            v_old, v, z, beta_old, beta = v, new, z_new, beta, beta_new
        return x, budget
