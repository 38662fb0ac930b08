"""The preconditioner's own answer, x = M⁻¹ b, with the residual that it has."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from nlpinf import parameters as P
from nlpinf.curvature.operators import Operator
from nlpinf.errors import BadInput
from nlpinf.parameters import Parameters
from nlpinf.solvers.base import Checkpoint, EachAlone, Preconditioner, Progress, Solution, checked, finished


@dataclass(frozen=True)
class Direct(EachAlone):
    """No iteration: with EK-FAC as M the usual approximation of large models, at the price of the products that check it.

    `tolerance` is what the residual is held to; EK-FAC seldom reaches 0.1, so that most uses allow unconverged solves.
    """

    tolerance: float = 1e-3
    preconditioner: Preconditioner | None = None

    def __post_init__(self) -> None:
        checked(self.tolerance, 1)

    def settings(self) -> dict[str, Any]:
        return {"name": "direct", "tolerance": self.tolerance, "preconditioned": self.preconditioner is not None}

    def __call__(
        self,
        operator: Operator,
        right: Parameters,
        second: Operator | None = None,
        progress: Progress | None = None,
        start: Parameters | None = None,
        checkpoint: Checkpoint | None = None,
    ) -> Solution:
        if self.preconditioner is None:
            raise BadInput("the direct solver is the preconditioner's inverse; give it one, such as 'ekfac'")
        x = self.preconditioner(right) if P.finite(right) else P.zeros_like(right)
        verdict = "not converged" if P.finite(right) else "not finite"
        return finished("direct", operator, second, right, x, verdict, self.tolerance, [], operator.products)  # type: ignore[arg-type]
