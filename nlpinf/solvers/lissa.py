"""LiSSA: the Neumann series of the inverse, a batch of the curvature sample at a time (Agarwal et al., 2017).

    x ← x + η M⁻¹ (b − C_k x),   C_k the curvature of one batch, M the preconditioner

With EK-FAC as M this is the stochastic solve of Wang et al. (ASTRA, 2025). The step is η = 1 / (2 λ), λ the largest
eigenvalue of M⁻¹ C by power iteration; the batches of a pass come in a seeded random order; what is returned is the mean
of the iterates since the last check, or the last iterate, whichever has the smaller true residual.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from nlpinf import parameters as P
from nlpinf.curvature.operators import Operator
from nlpinf.parameters import Parameters
from nlpinf.solvers.base import EachAlone, Preconditioner, Solution, Verdict, checked, finished


def largest_eigenvalue(
    operator: Operator, precondition: Preconditioner | None = None, iterations: int = 8, seed: int = 0
) -> float:
    """Return the largest eigenvalue of M⁻¹ C in size, from below, by power iteration: `iterations` products."""
    v, found = P.random_like(operator.template, seed), 0.0
    for _ in range(iterations):
        size = P.norm(v)
        if not size > 0 or not math.isfinite(size):
            break
        v = operator @ P.scaled(1 / size, v)
        v = v if precondition is None else precondition(v)
        found = P.norm(v)
    return found


_FAILURES = 12  # checks in a row without progress


@dataclass(frozen=True)
class LiSSA(EachAlone):
    """Stochastic Neumann iteration: useful progress in the first few passes over the curvature sample, slow beyond.

    `max_iterations`  passes over the sample at most, checks and power iteration included
    `check`           passes between two true residuals
    `seed`            of the order of the batches

    Where a residual has doubled, or is not finite, the step is halved and the iteration goes back to the best iterate;
    the solution's note says how often. The note also gives the noise of the answer: half the distance of the means of the two
    halves of the last passes, relative to the answer. It ends after twelve checks without progress; with no progress at all
    the verdict is "diverged".
    """

    tolerance: float = 1e-3
    max_iterations: int = 1000
    preconditioner: Preconditioner | None = None
    check: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        checked(self.tolerance, self.max_iterations)

    def settings(self) -> dict[str, Any]:
        return {
            "name": "lissa",
            "tolerance": self.tolerance,
            "max_iterations": self.max_iterations,
            "preconditioned": self.preconditioner is not None,
            "seed": self.seed,
        }

    def __call__(
        self,
        operator: Operator,
        right: Parameters,
        second: Operator | None = None,
        progress: Callable[[int, float], None] | None = None,
    ) -> Solution:
        before, scale = operator.products, P.norm(right)
        best, noise = P.zeros_like(right), 0.0
        history: list[float] = []
        if not math.isfinite(scale) or scale == 0:
            end: Verdict = "converged" if scale == 0 else "not finite"
            return finished("lissa", operator, second, right, best, end, self.tolerance, history, before)
        top = largest_eigenvalue(operator, self.preconditioner, seed=self.seed)
        step = 0.5 / top if top > 0 and math.isfinite(top) else 1.0
        parts, generator = operator.parts(), torch.Generator().manual_seed(self.seed)
        x, reached, halved, failed = best, 1.0, 0, 0
        verdict: Verdict = "not converged"
        while operator.products - before < self.max_iterations and verdict == "not converged":
            passes = max(1, min(self.check, self.max_iterations - (operator.products - before) - 1))
            x, means = self._passes(parts, x, right, step, passes, generator)
            operator.products += passes if len(parts) > 1 else 0
            mean = P.scaled(0.5, P.axpy(1.0, *means))
            candidates = []
            for candidate in (x, mean) if len(parts) > 1 else (x,):
                candidates.append((P.norm(P.axpy(-1.0, operator @ candidate, right)) / scale, candidate))
            size, candidate = min(candidates, key=lambda c: c[0] if math.isfinite(c[0]) else math.inf)
            history.append(size)
            if progress is not None:
                progress(operator.products - before, size)
            if size < reached:
                best, reached, failed = candidate, size, 0
                noise = 0.5 * P.norm(P.axpy(-1.0, *means)) / (P.norm(mean) or 1.0)
            else:  # divergence, or noise, of which smaller steps average more out
                failed += 1
                far = not size <= 2 * reached
                step, halved, x = (0.5 * step, halved + 1, best) if far else (0.7 * step, halved, candidate)
            if reached <= self.tolerance:
                verdict = "converged"
            elif failed == _FAILURES:
                break
        if verdict == "not converged" and reached == 1.0 and failed:
            verdict = "diverged"
        note = f"noise {noise:.1e}" + (f", step halved {halved} times" if halved else "")
        return finished("lissa", operator, second, right, best, verdict, self.tolerance, history, before, note)

    def _passes(
        self,
        parts: list[Operator],
        x: Parameters,
        right: Parameters,
        step: float,
        passes: int,
        generator: torch.Generator,
    ) -> tuple[Parameters, list[Parameters]]:
        """Return the last iterate, and the means over the first and the second half of the steps."""
        order = [k for _ in range(passes) for k in torch.randperm(len(parts), generator=generator).tolist()]
        sums, counts = [P.zeros_like(x), P.zeros_like(x)], [0, 0]
        for i, k in enumerate(order):
            residual = P.axpy(-1.0, parts[k] @ x, right)
            x = P.axpy(step, residual if self.preconditioner is None else self.preconditioner(residual), x)
            half = int(2 * i >= len(order) - 1)
            sums[half], counts[half] = P.axpy(1.0, x, sums[half]), counts[half] + 1
        return x, [P.scaled(1 / max(1, n), s) for s, n in zip(sums, counts)]
