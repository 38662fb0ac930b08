"""Iterative refinement: products in low precision, residuals in the model's own (Wilkinson, 1963; Carson and Higham, 2018)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from nlpinf import parameters as P
from nlpinf.curvature.operators import Operator, Shifted
from nlpinf.curvature.products import Curvature, noise_floor
from nlpinf.errors import BadInput
from nlpinf.parameters import Parameters
from nlpinf.solvers.base import (
    Checkpoint,
    EachAlone,
    Preconditioner,
    Progress,
    Solution,
    Verdict,
    begun,
    finished,
    in_part,
)
from nlpinf.solvers.cg import CG
from nlpinf.stages import Precision

_DEEPEST = 1e-2  # an inner solve below this spends products on what the next residual measures anew
_ROUNDS = 30


@dataclass(frozen=True)
class Refined(EachAlone):
    """Solves C x = b with the products of C̃, the same operator in low precision:

        r = b − C x (the model's precision),   C̃ d ≈ r (to a tolerance above C̃'s noise),   x += d

    until ‖r‖ ≤ tolerance · ‖b‖, so that it ends at the residual that the solver would have reached without C̃.

    `solver`     the inner solver, and with its `tolerance` the one to reach
    `preconditioner`  for the inner solver
    `precision`  "bfloat16" or "float16" (forward and backward pass under autocast; losses, sums and vectors as before)

    The noise of C̃ on b, ‖C̃b − Cb‖/‖Cb‖, and that of C itself against float64, are measured first. Where C̃'s is above ½
    a refinement step gains nothing, and the solver runs on C; a tolerance below C's own raises `BadInput` with the number.
    """

    solver: Any = field(default_factory=CG)
    precision: Precision = "bfloat16"
    preconditioner: Preconditioner | None = None

    @property
    def tolerance(self) -> float:
        """The relative residual to reach."""
        return float(self.solver.tolerance)

    def settings(self) -> dict[str, Any]:
        return {**self._inner().settings(), "precision": self.precision}

    def _inner(self, **limits: Any) -> Any:
        own = {} if self.preconditioner is None else {"preconditioner": self.preconditioner}
        return replace(self.solver, **own, **limits)

    def __call__(
        self,
        operator: Operator,
        right: Parameters,
        second: Operator | None = None,
        progress: Progress | None = None,
        start: Parameters | None = None,
        checkpoint: Checkpoint | None = None,
    ) -> Solution:
        scale = P.norm(right)
        if not (isinstance(operator, Shifted) and isinstance(operator.base, Curvature)):
            raise BadInput("low precision is for the curvature of a stage; use the solver itself for other operators")
        if not math.isfinite(scale) or scale == 0.0:
            return self._inner()(operator, right, second, progress, start, checkpoint)
        own = noise_floor(operator, right)
        if self.tolerance < own:
            raise BadInput(
                f"the tolerance is {self.tolerance:.1e}, but products in {_name(operator)} have noise of {own:.1e}: "
                "give a larger tolerance, or a model of a larger dtype"
            )
        low, before = operator.at(self.precision), operator.products
        exact = operator @ right
        floor = P.norm(P.axpy(-1.0, low @ right, exact)) / P.norm(exact)
        if not floor < 0.5:
            solution = self._inner()(operator, right, second, progress, start, checkpoint)
            note = f"{self.precision} has noise of {floor:.1e}: not used"
            return replace(solution, note="; ".join(filter(None, (solution.note, note))))

        x, r = begun(operator, right, start)
        reached, history, spent = P.norm(r) / scale, list[float](), low.products
        verdict: Verdict = "not converged"
        for number in range(_ROUNDS):
            if reached <= self.tolerance:
                break
            aim = min(0.5, max(self.tolerance / reached * 0.5, 2 * floor, _DEEPEST))
            left = max(1, self.solver.max_iterations - len(history))
            inner = self._inner(tolerance=aim, max_iterations=left)
            (part,) = in_part(checkpoint, f"round-{number}", _round(inner, low, r, progress))
            spent += part.products
            history += [reached * h for h in part.history]
            if part.verdict not in ("converged", "not converged"):
                verdict = part.verdict
                break
            x = P.axpy(1.0, part.vector, x)
            r = P.axpy(-1.0, operator @ x, right)
            size = P.norm(r) / scale
            if not size < 0.9 * reached or size <= self.tolerance or len(history) >= self.solver.max_iterations:
                break
            reached = size
        note = f"{spent} products in {self.precision} (noise {floor:.1e}), {operator.products - before} in {_name(operator)}"
        name = f"refined {self.solver.settings()['name']}"
        solution = finished(name, operator, second, right, x, verdict, self.tolerance, history, before, note)
        return replace(solution, products=solution.products + spent)


def _round(
    inner: Any, low: Operator, r: Parameters, progress: Progress | None
) -> Callable[[Checkpoint | None], list[Solution]]:
    return lambda part: [inner(low, r, None, progress, None, part)]


def _name(operator: Operator) -> str:
    dtype: torch.dtype = next(iter(operator.template.values())).dtype
    return str(dtype).removeprefix("torch.")
