"""How a solve ends: the `Solution` contract, shared by every solver."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from nlpinf import parameters as P
from nlpinf.curvature.operators import Operator
from nlpinf.errors import BadInput, NotConverged
from nlpinf.parameters import Parameters

Verdict = Literal["converged", "not converged", "negative curvature", "diverged", "not finite"]
Preconditioner = Callable[[Parameters], Parameters]


@dataclass(frozen=True)
class Solution:
    """What a solve of C x = b returns.

    `residual`         ‖b − C x‖ / ‖b‖, recomputed at the end with a product of its own on the curvature sample
    `second_residual`  the same on the second sample: how far the sample, not the solver, determines x; None without one
    `products`         curvature products spent, those that check included
    `history`          the solver's own relative residual after each product
    `note`             what else the reader should know: which curvature was chosen and why, a step that was shortened
    """

    vector: Parameters
    verdict: Verdict
    residual: float
    second_residual: float | None
    products: int
    tolerance: float
    damping: float
    solver: str
    history: list[float] = field(default_factory=list)
    note: str = ""

    @property
    def converged(self) -> bool:
        """Whether the residual reached the tolerance."""
        return self.verdict == "converged"

    def summary(self) -> dict[str, Any]:
        """Return everything but the vector, for manifests and reports; numbers that are not finite become None."""
        values = {key: value for key, value in asdict_without_vector(self).items()}
        for key, value in values.items():
            if isinstance(value, float) and not math.isfinite(value):
                values[key] = None
        values["history"] = [h for h in self.history if math.isfinite(h)]
        return values

    def __str__(self) -> str:
        second = "" if self.second_residual is None else f", second sample {self.second_residual:.2e}"
        note = f"; {self.note}" if self.note else ""
        return f"{self.verdict}: residual {self.residual:.2e}{second} after {self.products} products (damping {self.damping:.3g}){note}"

    def __repr__(self) -> str:
        return f"Solution({self})"  # a vector of a million numbers tells a reader nothing

    def required(self, what: str) -> Solution:
        """Return self if converged; raise `NotConverged` with what to do otherwise."""
        if self.converged:
            return self
        advice = {
            "not converged": "allow more iterations, a larger damping or a larger tolerance",
            "negative curvature": "use curvature 'ggn', or a damping larger than the most negative eigenvalue",
            "diverged": "use a larger damping",
            "not finite": "run `nlpinf check` on the model and use a larger damping",
        }[self.verdict]
        raise NotConverged(f"{what}: {self}; {advice}, or allow unconverged solves", self)


def asdict_without_vector(solution: Solution) -> dict[str, Any]:
    """Return the fields of a solution but its vector."""
    return {k: v for k, v in vars(solution).items() if k != "vector"}


class Solver(Protocol):
    """Solves `operator @ x = right`; measures the end on `operator` and on `second` if there is one."""

    def __call__(
        self,
        operator: Operator,
        right: Parameters,
        second: Operator | None = None,
        progress: Callable[[int, float], None] | None = None,
    ) -> Solution:
        """Return the solution with its verdict; never raises for numerical reasons."""
        ...

    def many(
        self,
        operator: Operator,
        rights: Sequence[Parameters],
        second: Operator | None = None,
        progress: Callable[[int, float], None] | None = None,
    ) -> list[Solution]:
        """Return the solution for every right-hand side."""
        ...

    def settings(self) -> dict[str, Any]:
        """Return the settings for a manifest."""
        ...


class EachAlone:
    """Solves for many right-hand sides one after the other."""

    def many(
        self,
        operator: Operator,
        rights: Sequence[Parameters],
        second: Operator | None = None,
        progress: Callable[[int, float], None] | None = None,
    ) -> list[Solution]:
        """Return the solution for every right-hand side."""
        return [self(operator, right, second, progress) for right in rights]  # type: ignore[operator]


def checked(tolerance: float, max_iterations: int) -> None:
    """Raise `BadInput` for settings that no solver can use."""
    if not 0 < tolerance < 1:
        raise BadInput(f"the tolerance is {tolerance}; it must lie between 0 and 1")
    if max_iterations < 1:
        raise BadInput(f"max_iterations is {max_iterations}; at least one is needed")


def finished(
    solver: str,
    operator: Operator,
    second: Operator | None,
    right: Parameters,
    vector: Parameters,
    verdict: Verdict,
    tolerance: float,
    history: list[float],
    products_before: int,
    note: str = "",
) -> Solution:
    """Measure the true residuals of `vector` and close the solve; only they decide between converged and not."""
    scale = P.norm(right)
    second_before = second.products if second is not None else 0

    def relative(of: Operator) -> float:
        return P.norm(P.axpy(-1.0, of @ vector, right)) / scale if scale else 0.0

    residual = relative(operator)
    other = relative(second) if second is not None else None
    if not math.isfinite(residual) or not P.finite(vector):
        verdict = "not finite"
    elif verdict in ("converged", "not converged"):
        verdict = "converged" if residual <= tolerance else "not converged"
    spent = operator.products - products_before + (second.products - second_before if second is not None else 0)
    return Solution(vector, verdict, residual, other, spent, tolerance, operator.damping, solver, history, note)
