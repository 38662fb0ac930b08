"""MINRES (Paige and Saunders, 1975): the smallest residual over the Krylov space, for operators that may be indefinite."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from nlpinf import parameters as P
from nlpinf.curvature.operators import Operator
from nlpinf.parameters import Parameters
from nlpinf.solvers.base import Checkpoint, Iterative, Progress, Solution, State, begun, finished, iterated


@dataclass(kw_only=True)
class _State(State):
    """`r` the recurrence's residual, `reached` the true one of the last check; the rest as in Paige and Saunders; v None to begin."""

    x: Parameters
    r: Parameters
    reached: float
    v: Parameters | None = None
    v_old: Parameters | None = None
    z: Parameters | None = None
    w: Parameters | None = None
    w_old: Parameters | None = None
    beta: float = 0.0
    beta_old: float = 1.0
    eta: float = 0.0
    began: float = 0.0
    c: float = 1.0
    c_old: float = 1.0
    s: float = 0.0
    s_old: float = 0.0


@dataclass(frozen=True)
class MINRES(Iterative):
    """For the Hessian without damping, where CG may end with "negative curvature"; a singular system is solved in the range.

    `preconditioner` must be positive definite also where the operator is not. What is minimised is ‖b − C x‖ in the norm
    of M⁻¹; the verdict goes by the plain norm.
    """

    name: ClassVar[str] = "minres"

    def solve(
        self,
        operator: Operator,
        right: Parameters,
        scale: float,
        second: Operator | None,
        progress: Progress | None,
        start: Parameters | None,
        checkpoint: Checkpoint | None,
    ) -> Solution:
        def begin() -> _State:
            x, r = begun(operator, right, start)
            reached = P.norm(r) / scale
            return _State(x=x, r=r, reached=reached, verdict="converged" if reached <= self.tolerance else None)

        def advance(s: _State) -> None:
            known = len(s.history)
            goes_on = self._step(operator, s, scale)
            if progress is not None and len(s.history) > known:
                progress(len(s.history), s.history[-1])
            if goes_on:
                return
            # The recurrence's residual is in another norm and drifts: start again from the true one while that helps.
            s.v, s.r = None, P.axpy(-1.0, operator @ s.x, right)
            true = P.norm(s.r) / scale
            if not true <= 0.5 * s.reached or true <= self.tolerance:
                s.verdict = "converged" if true <= self.tolerance else "not converged"
            s.reached = true

        s, before = iterated(_State, begin, advance, self.max_iterations, operator, checkpoint)
        verdict = s.verdict or "not converged"
        return finished(self.name, operator, second, right, s.x, verdict, self.tolerance, s.history, before)

    def _step(self, operator: Operator, s: _State, scale: float) -> bool:
        """Take one step, and say whether another may follow."""
        precondition = self.preconditioner or (lambda v: v)
        if s.v is None:
            s.v, s.z, s.v_old = s.r, precondition(s.r), None
            s.w = s.w_old = P.zeros_like(s.r)
            s.beta, s.beta_old = math.sqrt(max(P.dot(s.v, s.z), 0.0)), 1.0
            s.eta = s.began = s.beta
            s.c, s.c_old, s.s, s.s_old = 1.0, 1.0, 0.0, 0.0
        assert s.z is not None and s.w is not None and s.w_old is not None
        if not s.beta > 0 or not math.isfinite(s.beta):
            return False
        s.iterations += 1
        beta, c_old, c, s_old, sine = s.beta, s.c_old, s.c, s.s_old, s.s
        cz = operator @ P.scaled(1 / beta, s.z)
        alpha = P.dot(s.z, cz) / beta
        new = P.axpy(-alpha / beta, s.v, cz)
        if s.v_old is not None:
            new = P.axpy(-beta / s.beta_old, s.v_old, new)
        z_new = precondition(new)
        beta_new = math.sqrt(max(P.dot(new, z_new), 0.0))
        delta = c * alpha - c_old * sine * beta
        rho1 = math.hypot(delta, beta_new)
        rho2, rho3 = sine * alpha + c_old * c * beta, s_old * beta
        if not rho1 > 1e-14 * abs(alpha) or not math.isfinite(rho1):
            return False
        s.c_old, s.c, s.s_old, s.s = c, delta / rho1, sine, beta_new / rho1
        reduced = P.axpy(-rho2, s.w, P.axpy(-rho3, s.w_old, P.scaled(1 / beta, s.z)))
        s.w_old, s.w = s.w, P.scaled(1 / rho1, reduced)
        s.x = P.axpy(s.c * s.eta, s.w, s.x)
        # r_k = s² r_{k-1} − c η_k v_{k+1}/β_{k+1}: the plain residual without a product.
        eta = -s.s * s.eta
        s.r = P.axpy(s.c * eta / beta_new, new, P.scaled(s.s * s.s, s.r)) if beta_new > 0 else P.scaled(0.0, s.r)
        s.eta = eta
        size = P.norm(s.r) / scale
        s.history.append(size)
        if not math.isfinite(size) or size <= self.tolerance or abs(eta) <= 1e-15 * s.began:
            return False
        s.v_old, s.v, s.z, s.beta_old, s.beta = s.v, new, z_new, beta, beta_new
        return True
