"""α for a finetuning run that had no proximity term: the one that makes where it stopped most nearly stationary.

    α̂ = − ⟨∇_W F(W**, Θ*), Δ⟩ / (2 ‖Δ‖²),     Δ = W** − W*

is the least-squares solution of ∇_W F + 2αΔ = 0, the stationarity condition of case 2 in W (docs/concepts.md).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from nlpinf import parameters as P
from nlpinf.errors import BadInput
from nlpinf.stages import Proximity, Stage


@dataclass(frozen=True)
class FittedProximity:
    """`alpha` is α̂; `residual` ‖∇_W F + 2α̂Δ‖ / ‖∇_W F‖, from 0 (stationary) to 1 (α̂ explains nothing); `distance` ‖Δ‖."""

    alpha: float
    residual: float
    distance: float

    def required(self) -> Proximity:
        """Return `Proximity(α̂)`; raise `BadInput` where α̂ ≤ 0, since then no α describes the run."""
        if self.alpha > 0:
            return Proximity(self.alpha)
        raise BadInput(
            f"the fitted proximity α̂ is {self.alpha:.3g} ≤ 0: the run moved uphill or past its minimum, so no α describes "
            "it; give one yourself (--alpha, or Proximity(α)), or finetune with a proximity term"
        )

    def __str__(self) -> str:
        return f"α̂ = {self.alpha:.3g}, relative residual {self.residual:.2f} (‖W** − W*‖ = {self.distance:.3g})"


def fit_proximity(
    parent: Stage,
    stage: Stage,
    shared: Mapping[str, str] | None = None,
    indices: Sequence[int] | None = None,
) -> FittedProximity:
    """Fit α̂ to a stage that went on from `parent` without a proximity term.

    `shared` maps the stage's names to the parent's where they differ; `indices` are the positions of the finetuning rows
    that the gradient averages over (default: all). F includes the stage's weight decay.
    """
    names = dict(shared) if shared is not None else {n: n for n in stage.parameters if n in parent.parameters}
    moved = [n for n in names if n in stage.decay]
    if not moved:
        raise BadInput(
            f"stage {stage.name!r} trained nothing that it received from {parent.name!r}; its encoder was frozen"
        )
    start = {n: parent.parameters[names[n]] for n in moved}
    delta = P.axpy(-1.0, start, P.select(stage.parameters, moved))
    distance = P.norm(delta)
    if distance == 0.0:
        raise BadInput(f"stage {stage.name!r} has the encoder of {parent.name!r} unchanged; use transfer='frozen'")
    gradient = stage.gradient(moved, indices)
    alpha = -P.dot(gradient, delta) / (2 * distance**2)
    size = P.norm(gradient)
    residual = P.norm(P.axpy(2 * alpha, delta, gradient)) / size if size else 0.0
    return FittedProximity(alpha, residual, distance)
