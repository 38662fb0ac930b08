"""How much damping a stage's solve gets: a number, a multiple of the mean eigenvalue, or as little as its sample can bear.

With λ below the eigenvalues that a sample of n rows determines, (C + λI)⁻¹ b is an answer about those n rows: put into the
system of n other rows its residual ‖b − (C₂ + λI) x‖/‖b‖ is large, often above 1, where x = 0 has 1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from nlpinf.curvature import Shifted
from nlpinf.errors import BadInput
from nlpinf.parameters import Parameters
from nlpinf.solvers.cg import CG

FACTORS = (100.0, 10.0, 1.0, 0.1, 0.01)  # multiples of the mean eigenvalue that are tried, the largest first
DETERMINED = 0.5  # residual on a second sample up to which the sample counts as large enough
_ROUGH = CG(tolerance=0.1, max_iterations=100)


@dataclass(frozen=True)
class Relative:
    """A damping of `factor` times the mean eigenvalue of the undamped curvature on its sample.

    The mean eigenvalue is tr(C)/P by Hutchinson's estimator with `probes` seeded ±1 vectors; weight decay and proximity
    are part of C.
    """

    factor: float
    probes: int = 8

    def __post_init__(self) -> None:
        if not self.factor >= 0:
            raise BadInput(f"the relative damping is {self.factor}; it must not be negative")


@dataclass(frozen=True)
class Choice:
    """A damping λ that was chosen, and why in a line."""

    damping: float
    reason: str


@dataclass
class Auto:
    """The smallest of 100, 10, 1, 0.1 and 0.01 times the mean eigenvalue that the sample determines and CG can solve.

    For the first right-hand side b that is not zero and from the largest on, each is solved to a residual of 0.1. The last one with which a
    second sample agrees (a residual of at most 0.5) within 100 products is taken; where even 100 times is not such, that.
    A stage of which all rows carry the curvature has no second sample, so products alone decide. `found` keeps what was
    chosen for a stage, so that all samples of a query, growing or repeated, have the same damping.
    """

    found: dict[int, Choice] = field(default_factory=dict, repr=False)

    def choose(
        self,
        key: int,
        operator: Shifted,
        second: Shifted | None,
        mean: Callable[[], float],
        right: Parameters,
        progress: Callable[[int, float], None] | None = None,
    ) -> Choice:
        """Return the choice for the stage `key`, made when it is first asked for.

        `operator` and `second` are undamped; `mean` gives the mean eigenvalue, in as many products as it has probes.
        """
        if key not in self.found:
            self.found[key] = _choice(operator, second, mean(), right, progress)
        return self.found[key]


Damping = float | Relative | Auto | Literal["auto"]


def described(damping: Damping) -> Any:
    """Return a damping for a manifest."""
    if isinstance(damping, Relative):
        return {"relative": damping.factor}
    return "auto" if isinstance(damping, Auto) else damping


def resolved(damping: Damping | None) -> float | Relative | Auto:
    """Return a damping with "auto", and None, as an `Auto`; `BadInput` for any other word."""
    if damping is None or damping == "auto":
        return Auto()
    if isinstance(damping, str):
        raise BadInput(f"the damping is {damping!r}; give a number, Relative(factor) or 'auto'")
    return damping


def _choice(
    operator: Shifted,
    second: Shifted | None,
    mean: float,
    right: Parameters,
    progress: Callable[[int, float], None] | None,
) -> Choice:
    taken, start, ended = None, None, ""
    for factor in FACTORS:
        damped, other = (None if o is None else Shifted(o.base, o.shift, factor * mean) for o in (operator, second))
        assert damped is not None
        solution = _ROUGH(damped, right, other, progress, start)
        beside = solution.second_residual
        if not solution.converged:
            many = f"{factor:g} × takes more than {_ROUGH.max_iterations} products"
            ended = (
                many if solution.verdict == "not converged" else f"at {factor:g} × a solve ends with {solution.verdict}"
            )
            break
        if beside is not None and beside > DETERMINED:
            ended = f"at {factor:g} × a second sample disagrees, residual {beside:.2g}"
            break
        taken, start, ended = factor, solution.vector, "the smallest that is tried"
    if taken is None:
        return Choice(
            FACTORS[0] * mean, f"damping {FACTORS[0]:g} × the mean eigenvalue, the most that is tried: {ended}"
        )
    return Choice(taken * mean, f"damping {taken:g} × the mean eigenvalue: {ended}")
