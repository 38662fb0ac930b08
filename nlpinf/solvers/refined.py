"""Iterative refinement: products in low precision, residuals in the model's own (Wilkinson, 1963; Carson and Higham, 2018)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from nlpinf import parameters as P
from nlpinf import sharded
from nlpinf.curvature.operators import Operator, Shifted
from nlpinf.curvature.products import Curvature, noise_floor
from nlpinf.errors import BadInput
from nlpinf.parameters import Parameters
from nlpinf.solvers.base import (
    Checkpoint,
    Preconditioner,
    Progress,
    Solution,
    Verdict,
    all_finished,
    begun,
    in_part,
)
from nlpinf.solvers.cg import CG
from nlpinf.stages import Precision

_DEEPEST = 1e-2  # an inner solve below this spends products on what the next residual measures anew
_ROUNDS = 30


@dataclass(frozen=True)
class Refined:
    """Solves C x = b with the products of C̃, the same operator in low precision:

        r = b − C x (the model's precision),   C̃ d ≈ r (to a tolerance above C̃'s noise),   x += d

    until ‖r‖ ≤ tolerance · ‖b‖, so that it ends at the residual that the solver would have reached without C̃.

    `solver`     the inner solver, and with its `tolerance` the one to reach
    `preconditioner`  for the inner solver
    `precision`  "bfloat16" or "float16" (forward and backward pass under autocast; losses, sums and vectors as before)

    The noise of C̃ on the first b, ‖C̃b − Cb‖/‖Cb‖, and that of C itself against float64, are measured first. Where C̃'s is above ¼
    a refinement step gains little, and the solver runs on C; a tolerance below C's own raises `BadInput` with the number.
    A step takes half of the products that are left at most. One that uses them up or does not halve the residual, as where
    eigenvalues lie far below ‖C̃ − C‖, is the last in low precision: the solver goes on with C from the better iterate.
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
        starts = None if start is None else [start]
        return self.many(operator, [right], second, progress, starts, checkpoint)[0]

    def many(
        self,
        operator: Operator,
        rights: Sequence[Parameters],
        second: Operator | None = None,
        progress: Progress | None = None,
        starts: Sequence[Parameters] | None = None,
        checkpoint: Checkpoint | None = None,
    ) -> list[Solution]:
        """Return the solution for every right-hand side; the inner solves are of all that are not done, so block CG's directions serve all."""
        if not (isinstance(operator, Shifted) and isinstance(operator.base, Curvature)):
            raise BadInput("low precision is for the curvature of a stage; use the solver itself for other operators")
        stage = operator.base.stage
        sharded.refused(stage.model, stage.name, "copy in another precision", "leave the precision out")
        plain = self._inner()
        probe = next((b for b in rights if 0.0 < P.norm(b) < math.inf), None)
        if probe is None:
            return plain.many(operator, rights, second, progress, starts, checkpoint)
        own = noise_floor(operator, probe)
        if self.tolerance < own:
            raise BadInput(
                f"the tolerance is {self.tolerance:.1e}, but products in {_name(operator)} have noise of {own:.1e}: "
                "give a larger tolerance, or a model of a larger dtype"
            )
        low = operator.at(self.precision)
        exact = operator @ probe
        size = P.norm(exact)
        floor = P.norm(P.axpy(-1.0, low @ probe, exact)) / size if size else math.inf
        if not floor < 0.25:
            note = f"{self.precision} has noise of {floor:.1e}: not used"
            solutions = plain.many(operator, rights, second, progress, starts, checkpoint)
            return [replace(s, note="; ".join(filter(None, (s.note, note)))) for s in solutions]
        begins: Sequence[Parameters | None] = [None] * len(rights) if starts is None else starts
        columns = [_Column(operator, b, start) for b, start in zip(rights, begins)]
        probed = next(column for column in columns if column.right is probe)
        probed.low, probed.exact = probed.low + 1, probed.exact + 1
        most = self.solver.max_iterations
        for number in range(_ROUNDS):
            left = [c for c in columns if not c.stuck and c.open(self.tolerance, most)]
            if not left:
                break
            wanted = self.tolerance / max(c.reached for c in left)  # less what the noise adds to the true residual
            aim = min(0.5, max(wanted - 2 * floor, wanted / 2, 2 * floor, _DEEPEST))
            limit = max(1, _unspent(left, most) // 2)
            inner = self._inner(tolerance=aim, max_iterations=limit)
            parts = in_part(checkpoint, f"round-{number}", _round(inner, low, [c.r for c in left], progress))
            moved = [column for column, part in zip(left, parts) if column.moved_by(part, limit)]
            for column, product in zip(moved, operator.many([column.tried for column in moved])):
                column.measure(product)
        left = [c for c in columns if c.open(self.tolerance, most)]
        if left:
            rest = self._inner(max_iterations=_unspent(left, most))
            so_far = [c.x for c in left] if any(c.reached < 1.0 for c in left) else None
            parts = in_part(checkpoint, "rest", _round(rest, operator, [c.right for c in left], progress, so_far))
            for column, part in zip(left, parts):
                column.end_by(part)
        name = f"refined {self.solver.settings()['name']}"
        xs, verdicts, histories = ([getattr(c, what) for c in columns] for what in ("x", "verdict", "history"))
        spent, known = [c.exact for c in columns], [c.residual for c in columns]
        ends = all_finished(
            name, operator, second, rights, xs, verdicts, self.tolerance, histories, spent, residuals=known
        )
        note = f"products in {self.precision} (noise {floor:.1e})"
        return [
            replace(end, products=end.products + c.low, note=f"{c.low} {note}, {c.exact} in {_name(operator)}")
            for c, end in zip(columns, ends)
        ]


class _Column:
    """One right-hand side's answer so far: x, r = b − C x and ‖r‖/‖b‖, with the products spent in both precisions."""

    def __init__(self, operator: Operator, right: Parameters, start: Parameters | None) -> None:
        self.right, self.scale = right, P.norm(right)
        before = operator.products
        self.verdict: Verdict = "not converged"
        self.history: list[float] = []
        self.low, self.reached = 0, 1.0
        self.stuck = False
        self.done = not 0.0 < self.scale < math.inf
        if self.done:
            self.x, self.verdict = P.zeros_like(right), "converged" if self.scale == 0.0 else "not finite"
        else:
            self.x, self.r = begun(operator, right, start)
            self.reached = P.norm(self.r) / self.scale
        self.exact = operator.products - before

    @property
    def residual(self) -> float:
        """‖b − C x‖/‖b‖ as it was measured last, which is of x as it stands."""
        return self.reached if 0.0 < self.scale < math.inf else 0.0 if self.scale == 0.0 else math.nan

    def open(self, tolerance: float, most: int) -> bool:
        """Whether there is something left to do and products to do it with."""
        return not self.done and self.reached > tolerance and len(self.history) < most

    def moved_by(self, part: Solution, limit: int) -> bool:
        """Try the answer to C̃ d ≈ r, if it is one; stuck where it is none or took `limit` products."""
        self.low += part.products
        self.history += [self.reached * h for h in part.history]
        answered = part.verdict in ("converged", "not converged")
        self.stuck = not answered or len(part.history) >= limit
        if answered:
            self.tried = P.axpy(1.0, part.vector, self.x)
        return answered

    def measure(self, product: Parameters) -> None:
        """Take C x of the x that is tried, and keep it where the residual falls; stuck where that does not halve."""
        self.exact += 1
        r = P.axpy(-1.0, product, self.right)
        size = P.norm(r) / self.scale
        self.stuck = self.stuck or not size < 0.5 * self.reached
        if size < self.reached:
            self.x, self.r, self.reached = self.tried, r, size

    def end_by(self, part: Solution) -> None:
        """Take the answer that the solver found with C."""
        self.exact += part.products
        self.history += part.history
        self.x, self.reached, self.verdict, self.done = part.vector, part.residual, part.verdict, True


def _unspent(columns: list[_Column], most: int) -> int:
    return most - max(len(column.history) for column in columns)


def _round(
    solver: Any,
    operator: Operator,
    rights: list[Parameters],
    progress: Progress | None,
    starts: list[Parameters] | None = None,
) -> Callable[[Checkpoint | None], list[Solution]]:
    return lambda part: solver.many(operator, rights, None, progress, starts, part)


def _name(operator: Operator) -> str:
    dtype: torch.dtype = next(iter(operator.template.values())).dtype
    return str(dtype).removeprefix("torch.")
