"""Preconditioned conjugate gradient (Hestenes and Stiefel, 1952) with a verdict."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from nlpinf import parameters as P
from nlpinf.curvature.operators import Operator
from nlpinf.parameters import Parameters
from nlpinf.solvers.base import (
    Checkpoint,
    Iterative,
    Progress,
    Solution,
    State,
    begun,
    finished,
    in_part,
    iterated,
)
from nlpinf.solvers.block import block_cg

_BLOCK_ENTRIES = 1 << 27  # half a gigabyte in single precision, for each of the dozen sets of columns of block CG


@dataclass(kw_only=True)
class _State(State):
    """`rz` ⟨r, M⁻¹r⟩; `began` the residual where the recursion began, `reached` the true one of the last check; p None to begin."""

    x: Parameters
    r: Parameters
    p: Parameters | None = None
    rz: float = 0.0
    began: float = 1.0
    reached: float = 1.0


@dataclass(frozen=True)
class CG(Iterative):
    """Conjugate gradient for a symmetric positive definite operator.

    `tolerance`       relative residual ‖b − C x‖/‖b‖ to reach, checked with a true residual, not the recursive one
    `max_iterations`  curvature products at most, but for those that check
    `preconditioner`  v ↦ M⁻¹ v with M symmetric positive definite

    Ends with "negative curvature" at a direction p with ⟨p, C p⟩ ≤ 0 (the iterate before it is returned), "diverged" when the
    recursive residual grows by `divergence`, "not finite" at the first NaN or infinity. Where the recursive residual
    has drifted from the true one the iteration starts again from the current iterate (residual replacement).
    Several right-hand sides share their directions (`block.py`), `block` of them at a time, fewer for a large model: block CG
    holds about ten numbers a parameter and column.

    A preconditioner that has `learn` is handed the last `memory` directions and their products after each solve; with one
    several right-hand sides are solved for one after the other.
    """

    divergence: float = 1e6
    block: int = 16
    name: ClassVar[str] = "cg"

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
        learn = getattr(self.preconditioner, "learn", None)
        pairs: deque[tuple[Parameters, Parameters]] = deque(maxlen=getattr(self.preconditioner, "memory", 0))

        def begin() -> _State:
            x, r = begun(operator, right, start)
            reached = P.norm(r) / scale
            return _State(x=x, r=r, reached=reached, verdict="converged" if reached <= self.tolerance else None)

        def learned() -> None:
            if learn is not None and pairs:
                learn(pairs)
                pairs.clear()

        def advance(s: _State) -> None:
            known = len(s.history)
            self._step(operator, s, scale, pairs)
            if progress is not None and len(s.history) > known:
                progress(len(s.history), s.history[-1])
            if s.verdict == "converged":
                learned()
                s.r = P.axpy(-1.0, operator @ s.x, right)
                true = P.norm(s.r) / scale
                if self.tolerance < true <= 0.5 * s.reached:  # else it is there, or rounding allows no better
                    s.p, s.reached, s.verdict = None, true, None

        kept = checkpoint if learn is None else None  # what a preconditioner has learned is in no state
        s, before = iterated(_State, begin, advance, self.max_iterations, operator, kept)
        learned()
        verdict = s.verdict or "not converged"
        return finished(self.name, operator, second, right, s.x, verdict, self.tolerance, s.history, before)

    def many(
        self,
        operator: Operator,
        rights: Sequence[Parameters],
        second: Operator | None = None,
        progress: Progress | None = None,
        starts: Sequence[Parameters] | None = None,
        checkpoint: Checkpoint | None = None,
    ) -> list[Solution]:
        """Return the solution for every right-hand side, by block CG where there are several."""
        block = min(self.block, _BLOCK_ENTRIES // max(1, P.size(rights[0]))) if rights else 0
        learns = hasattr(self.preconditioner, "learn")  # from one solve for the next
        if len(rights) < 2 or block < 2 or learns or P.in_pieces(rights[0]):
            return super().many(operator, rights, second, progress, starts, checkpoint)
        limits = (self.preconditioner, self.tolerance, self.max_iterations)

        def together(chosen: slice) -> Callable[[Checkpoint | None], list[Solution]]:
            begin = None if starts is None else starts[chosen]
            return lambda part: block_cg(operator, rights[chosen], second, *limits, progress, begin, part)

        firsts = range(0, len(rights), block)
        return [s for i in firsts for s in in_part(checkpoint, f"block-{i}", together(slice(i, i + block)))]

    def _step(self, operator: Operator, s: _State, scale: float, pairs: deque[tuple[Parameters, Parameters]]) -> None:
        precondition = self.preconditioner or (lambda v: v)
        if s.p is None:
            s.p = precondition(s.r)
            s.rz, s.began = P.dot(s.r, s.p), P.norm(s.r) / scale
        s.iterations += 1
        p, cp = s.p, operator @ s.p
        curvature = P.dot(p, cp)
        if not math.isfinite(curvature):
            s.verdict = "not finite"
            return
        if curvature <= 0.0 or s.rz <= 0.0:
            s.verdict = "negative curvature"
            return
        pairs.append((p, cp))
        step = s.rz / curvature
        s.x, s.r = P.axpy(step, p, s.x), P.axpy(-step, cp, s.r)
        size = P.norm(s.r) / scale
        s.history.append(size)
        if not math.isfinite(size):
            s.verdict = "not finite"
        elif size > self.divergence * s.began:
            s.verdict = "diverged"
        elif size <= self.tolerance:
            s.verdict = "converged"
        else:
            z = precondition(s.r)
            s.rz, old = P.dot(s.r, z), s.rz
            s.p = P.axpy(s.rz / old, p, z)
