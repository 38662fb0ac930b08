"""LiSSA: the Neumann series of the inverse, a batch of the curvature sample at a time (Agarwal et al., 2017).

    x ← x + η M⁻¹ (b − C_k x),   C_k the curvature of one batch, M the preconditioner

With EK-FAC as M this is the stochastic solve of Wang et al. (ASTRA, 2025). The step is η = 1 / (2 λ), λ the largest
eigenvalue of M⁻¹ C by power iteration; the batches of a pass come in a seeded random order; what is returned is the mean
of the iterates since the last check, or the last iterate, whichever has the smaller true residual.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from nlpinf import parameters as P
from nlpinf.curvature.operators import Operator
from nlpinf.parameters import Parameters
from nlpinf.solvers.base import (
    Checkpoint,
    Iterative,
    Preconditioner,
    Progress,
    Solution,
    State,
    Verdict,
    begun,
    finished,
    iterated,
)


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


@dataclass(kw_only=True)
class _State(State):
    """`x` goes on, `best` has the residual `reached`; `failed` counts checks without progress since then."""

    x: Parameters
    best: Parameters
    step: float
    reached: float
    noise: float = 0.0
    halved: int = 0
    failed: int = 0


@dataclass(frozen=True)
class LiSSA(Iterative):
    """Stochastic Neumann iteration: useful progress in the first few passes over the curvature sample, slow beyond.

    `max_iterations`  passes over the sample at most, checks and power iteration included
    `check`           passes between two true residuals
    `seed`            of the order of the batches

    Where a residual has doubled, or is not finite, the step is halved and the iteration goes back to the best iterate;
    the solution's note says how often. The note also gives the noise of the answer: half the distance of the means of the two
    halves of the last passes, relative to the answer. It ends after twelve checks without progress; with no progress at all
    the verdict is "diverged".
    """

    check: int = 4
    seed: int = 0
    name: ClassVar[str] = "lissa"

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "seed": self.seed}

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
        parts, products = operator.parts(), operator.products

        def begin() -> _State:
            x, r = begun(operator, right, start)
            reached = P.norm(r) / scale
            verdict: Verdict | None = "converged" if reached <= self.tolerance else None
            top = largest_eigenvalue(operator, self.preconditioner, seed=self.seed)
            step = 0.5 / top if top > 0 and math.isfinite(top) else 1.0
            spent = operator.products - products
            return _State(x=x, best=x, step=step, reached=reached, iterations=spent, verdict=verdict)

        def advance(s: _State) -> None:
            spent = operator.products - s.iterations
            self._round(operator, parts, right, scale, s)
            s.iterations = operator.products - spent
            if progress is not None:
                progress(s.iterations, s.history[-1])

        s, before = iterated(_State, begin, advance, self.max_iterations, operator, checkpoint)
        verdict = s.verdict or "not converged"
        if verdict == "not converged" and len(s.history) == s.failed and s.failed:
            verdict = "diverged"
        note = f"noise {s.noise:.1e}" + (f", step halved {s.halved} times" if s.halved else "")
        return finished(self.name, operator, second, right, s.best, verdict, self.tolerance, s.history, before, note)

    def _round(self, operator: Operator, parts: list[Operator], right: Parameters, scale: float, s: _State) -> None:
        passes = max(1, min(self.check, self.max_iterations - s.iterations - 1))
        # The order of each round is a function of its number, so that no generator's state must be kept.
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + len(s.history))
        s.x, means = self._passes(parts, s.x, right, s.step, passes, generator)
        operator.products += passes if len(parts) > 1 else 0
        mean = P.scaled(0.5, P.axpy(1.0, *means))
        candidates = []
        for candidate in (s.x, mean) if len(parts) > 1 else (s.x,):
            candidates.append((P.norm(P.axpy(-1.0, operator @ candidate, right)) / scale, candidate))
        size, candidate = min(candidates, key=lambda c: c[0] if math.isfinite(c[0]) else math.inf)
        s.history.append(size)
        if size < s.reached:
            s.best, s.reached, s.failed = candidate, size, 0
            if passes * len(parts) > 1:  # else there are no two halves
                s.noise = 0.5 * P.norm(P.axpy(-1.0, *means)) / (P.norm(mean) or 1.0)
        else:  # divergence, or noise, of which smaller steps average more out
            s.failed += 1
            far = not size <= 2 * s.reached
            s.step, s.x = (0.5 * s.step, s.best) if far else (0.7 * s.step, candidate)
            s.halved += far
        if s.reached <= self.tolerance:
            s.verdict = "converged"
        elif s.failed == _FAILURES:
            s.verdict = "not converged"

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
        return x, [P.scaled(1 / n, s) if n else x for s, n in zip(sums, counts)]
