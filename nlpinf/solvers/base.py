"""How a solve runs and ends: the `Solution` contract, starts and interruptions, shared by every solver."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol, TypeVar

from nlpinf import parameters as P
from nlpinf.curvature.operators import Operator
from nlpinf.errors import BadInput, NotConverged
from nlpinf.parameters import Parameters

Verdict = Literal["converged", "not converged", "negative curvature", "diverged", "not finite"]
Preconditioner = Callable[[Parameters], Parameters]
Progress = Callable[[int, float], None]


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


class Checkpoint(Protocol):
    """Where a solve keeps its state, so that one that was killed goes on from there to the same answer."""

    def restored(self) -> dict[str, Any] | None:
        """Return the fields of the state that was kept last; None if there is none."""
        ...

    def keep(self, state: dict[str, Any]) -> None:
        """Take the fields of a state: trees of tensors, and what JSON holds. It is written now and then."""
        ...

    def solved(self, name: str, solve: Callable[[Checkpoint], list[Solution]]) -> list[Solution]:
        """Return the solutions of the part `name` of this solve, if it is done, or else what `solve` returns for it."""
        ...


class Solver(Protocol):
    """Solves `operator @ x = right`; measures the end on `operator` and on `second` if there is one.

    `start` is a first guess of x, from which the solve starts if it is nearer than zero.
    """

    def __call__(
        self,
        operator: Operator,
        right: Parameters,
        second: Operator | None = None,
        progress: Progress | None = None,
        start: Parameters | None = None,
        checkpoint: Checkpoint | None = None,
    ) -> Solution:
        """Return the solution with its verdict; never raises for numerical reasons."""
        ...

    def many(
        self,
        operator: Operator,
        rights: Sequence[Parameters],
        second: Operator | None = None,
        progress: Progress | None = None,
        starts: Sequence[Parameters] | None = None,
        checkpoint: Checkpoint | None = None,
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
        progress: Progress | None = None,
        starts: Sequence[Parameters] | None = None,
        checkpoint: Checkpoint | None = None,
    ) -> list[Solution]:
        """Return the solution for every right-hand side."""
        alone: Any = self

        def one(i: int) -> Callable[[Checkpoint | None], list[Solution]]:
            start = None if starts is None else starts[i]
            return lambda part: [alone(operator, rights[i], second, progress, start, part)]

        return [in_part(checkpoint, f"right-{i}", one(i))[0] for i in range(len(rights))]


def in_part(
    checkpoint: Checkpoint | None, name: str, solve: Callable[[Checkpoint | None], list[Solution]]
) -> list[Solution]:
    """Return what `solve` gives, from the checkpoint if it has been done before."""
    return solve(None) if checkpoint is None else checkpoint.solved(name, solve)


@dataclass(kw_only=True)
class State:
    """What an iteration knows. Fields are trees of tensors or what JSON holds, and all that the next step depends on.

    `verdict` is set when the iteration ends of itself; the budget, which a later run may raise, ends it without one.
    """

    iterations: int = 0
    history: list[float] = field(default_factory=list)
    verdict: Verdict | None = None


S = TypeVar("S", bound=State)


def iterated(
    kind: type[S],
    begin: Callable[[], S],
    advance: Callable[[S], None],
    budget: int,
    operator: Operator,
    checkpoint: Checkpoint | None,
) -> tuple[S, int]:
    """Advance a state to its end, and return it with the operator's count of products before the solve.

    A state that was kept is taken up; the products spent on it count as if they had been made now.
    """
    before = operator.products
    kept = None if checkpoint is None else checkpoint.restored()
    if kept is None:
        state = begin()
    else:
        operator.products += kept.pop("products")
        state = kind(**kept)
    while state.verdict is None and state.iterations < budget:
        advance(state)
        if checkpoint is not None:
            checkpoint.keep({**vars(state), "products": operator.products - before})
    return state, before


def begun(operator: Operator, right: Parameters, start: Parameters | None) -> tuple[Parameters, Parameters]:
    """Return x and b − C x at the start: the guess, or zero if that is nearer."""
    if start is not None:
        residual = P.axpy(-1.0, operator @ start, right)
        if P.norm(residual) < P.norm(right):
            return start, residual
    return P.zeros_like(right), right


@dataclass(frozen=True)
class Iterative(EachAlone, ABC):
    """A solver that improves an iterate until a residual or a number of products is reached.

    `tolerance`       relative residual ‖b − C x‖/‖b‖ to reach, checked with a true residual
    `max_iterations`  curvature products at most, but for those that check
    `preconditioner`  v ↦ M⁻¹ v with M symmetric positive definite
    """

    tolerance: float = 1e-3
    max_iterations: int = 1000
    preconditioner: Preconditioner | None = None
    name: ClassVar[str]

    def __post_init__(self) -> None:
        checked(self.tolerance, self.max_iterations)

    def settings(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "tolerance": self.tolerance,
            "max_iterations": self.max_iterations,
            "preconditioned": self.preconditioner is not None,
        }

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
        if not math.isfinite(scale) or scale == 0:
            end: Verdict = "converged" if scale == 0 else "not finite"
            zeros = P.zeros_like(right)
            return finished(self.name, operator, second, right, zeros, end, self.tolerance, [], operator.products)
        return self.solve(operator, right, scale, second, progress, start, checkpoint)

    @abstractmethod
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
        """Solve for a right-hand side of norm `scale`, finite and not zero."""


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
    spent = operator.products - products_before
    return all_finished(solver, operator, second, [right], [vector], [verdict], tolerance, [history], [spent], note)[0]


def all_finished(
    solver: str,
    operator: Operator,
    second: Operator | None,
    rights: Sequence[Parameters],
    vectors: Sequence[Parameters],
    verdicts: Sequence[Verdict],
    tolerance: float,
    histories: Sequence[list[float]],
    spent: Sequence[int],
    note: str = "",
    residuals: Sequence[float] | None = None,
) -> list[Solution]:
    """Close several solves as `finished` does one; `spent` products went to each before this check.

    `residuals` are the true ones of the vectors, where they have been measured already.
    """
    scales = [P.norm(right) for right in rights]

    def relative(of: Operator) -> list[float]:
        errors = [P.axpy(-1.0, product, right) for product, right in zip(of.many(vectors), rights)]
        return [P.norm(error) / scale if scale else 0.0 for error, scale in zip(errors, scales)]

    checks = (residuals is None) + (second is not None)
    residuals = relative(operator) if residuals is None else residuals
    others: list[Any] = [None] * len(rights) if second is None else relative(second)
    solutions = []
    for i, (vector, verdict, residual) in enumerate(zip(vectors, verdicts, residuals)):
        if not math.isfinite(residual) or not P.finite(vector):
            verdict = "not finite"
        elif verdict in ("converged", "not converged"):
            verdict = "converged" if residual <= tolerance else "not converged"
        products = spent[i] + checks
        solutions.append(
            Solution(
                vector, verdict, residual, others[i], products, tolerance, operator.damping, solver, histories[i], note
            )
        )
    return solutions
