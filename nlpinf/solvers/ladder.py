"""Solutions for a ladder of dampings from one Krylov space: multi-shift conjugate gradient (Jegerlehner, 1996).

C + λ_k I have the same Krylov space for all λ_k, and residuals that are multiples of one another, ζ_k r. So the products of
the smallest damping give all solutions, at two vectors a damping.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from nlpinf import parameters as P
from nlpinf.curvature.operators import Operator, Shifted
from nlpinf.errors import BadInput
from nlpinf.parameters import Parameters
from nlpinf.solvers.base import Solution, Verdict, checked, finished


def solve_ladder(
    operator: Operator,
    right: Parameters,
    dampings: Sequence[float],
    second: Operator | None = None,
    tolerance: float = 1e-3,
    max_iterations: int = 1000,
    progress: Callable[[int, float], None] | None = None,
) -> list[Solution]:
    """Return the solutions of (C + λI) x = b for every λ of `dampings`, in their order, with true residuals.

    `operator` is C, without damping. A damping whose residual has reached the tolerance is left as it is; `products` of each is
    what it would have needed alone, its check included.
    """
    checked(tolerance, max_iterations)
    if not dampings or not all(d >= 0 and math.isfinite(d) for d in dampings):
        raise BadInput(f"the dampings are {list(dampings)}; give numbers of at least 0")
    least, scale = min(dampings), P.norm(right)
    shifts = [d - least for d in dampings]
    count = len(shifts)
    xs = [P.zeros_like(right) for _ in shifts]
    histories: list[list[float]] = [[] for _ in shifts]
    spent = [0] * count
    verdicts: list[Verdict] = ["not converged" if scale else "converged"] * count
    running = [k for k in range(count) if 0 < scale < math.inf]
    if not math.isfinite(scale):
        verdicts = ["not finite"] * count
    r, p, ps = right, right, [right for _ in shifts]
    rr = P.dot(r, r) if running else 0.0
    zeta_old, zeta = [1.0] * count, [1.0] * count
    alpha_old, beta_old = 1.0, 0.0
    for done in range(1, max_iterations + 1):
        if not running:
            break
        cp = P.axpy(least, p, operator @ p)
        curvature = P.dot(p, cp)
        if not curvature > 0:
            for k in running:
                verdicts[k] = "negative curvature" if math.isfinite(curvature) else "not finite"
            break
        alpha = rr / curvature
        r = P.axpy(-alpha, cp, r)
        rr, before = P.dot(r, r), rr
        beta = rr / before
        for k in list(running):
            z_old, z, s = zeta_old[k], zeta[k], shifts[k]
            z_new = z * z_old * alpha_old / (alpha * beta_old * (z_old - z) + z_old * alpha_old * (1 + s * alpha))
            ratio = z_new / z
            xs[k] = P.axpy(alpha * ratio, ps[k], xs[k])
            ps[k] = P.axpy(beta * ratio * ratio, ps[k], P.scaled(z_new, r))
            zeta_old[k], zeta[k] = z, z_new
            size = abs(z_new) * math.sqrt(rr) / scale
            histories[k].append(size)
            spent[k] = done
            if not math.isfinite(size):
                verdicts[k] = "not finite"
                running.remove(k)
            elif size <= tolerance:
                verdicts[k] = "converged"
                running.remove(k)
        if progress is not None:
            progress(done, max((histories[k][-1] for k in running), default=tolerance))
        p = P.axpy(beta, p, r)
        alpha_old, beta_old = alpha, beta
    solutions = []
    for k, damping in enumerate(dampings):
        damped = Shifted(operator, damping=damping)
        other = None if second is None else Shifted(second, damping=damping)
        x = xs[k] if P.finite(xs[k]) else P.zeros_like(right)
        solutions.append(
            finished(
                "ladder", damped, other, right, x, verdicts[k], tolerance, histories[k], damped.products - spent[k]
            )
        )
    return solutions
