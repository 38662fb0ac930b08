"""The optimum of a linear head on a frozen encoder, by Newton's method in float64, so that F_ΘΘ is a Hessian at a minimum.

With x_j the pooled features, extended by a 1, and the rows of Θ the classes, F is convex in Θ:

    F(Θ) = 1/m Σ_j [log Σ_c exp(Θ_c x_j) − Θ_{y_j} x_j] + ½ Σ decay ⊙ Θ²
    ∇F   = 1/m Σ_j (p_j − e_{y_j}) x_jᵀ + decay ⊙ Θ
    F''V = 1/m Σ_j [(diag(p_j) − p_j p_jᵀ) V x_j] x_jᵀ + decay ⊙ V
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nlpinf.errors import BadInput, NotConverged
from nlpinf.stages import Stage, evaluation

NewtonProgress = Callable[[int, float], None]
STEPS = 100


@dataclass(frozen=True)
class Optimum:
    """How Newton's method ended: ‖∇F‖ over the head in float64, and its steps."""

    gradient: float
    steps: int


def is_linear(stage: Stage) -> bool:
    """Say whether what the stage trains is a linear head and nothing else."""
    head = getattr(stage.model, "head", None)
    linear = getattr(getattr(head, "settings", None), "linear", False)
    return bool(linear) and set(stage.trained or ()) == {"head.classifier.weight", "head.classifier.bias"}


def fit_linear_head(
    stage: Stage, *, exclude: Collection[int] = (), tolerance: float = 1e-8, progress: NewtonProgress | None = None
) -> Optimum:
    """Set the stage's linear head to the minimum of F, found in float64 to ‖∇F‖ ≤ `tolerance`, rounded to its dtype.

    `exclude` are positions in the stage's data to do without; what is minimised then is F − 1/m Σ_excluded f. Raises
    `BadInput` where there is no minimum: without weight decay, on rows that a linear head separates.
    """
    if not is_linear(stage):
        raise BadInput(
            f"stage {stage.name!r} trains more than a linear head; its optimum is not found by Newton's method"
        )
    kept = [i for i in range(stage.size) if i not in frozenset(exclude)]
    if not kept:
        raise BadInput(f"stage {stage.name!r}: every example is left out; keep at least one")
    x, y = features(stage, kept)
    x = torch.cat([x, x.new_ones(len(x), 1)], 1)
    classifier: Any = stage.model.head.classifier  # type: ignore[union-attr]
    decay = x.new_full((classifier.out_features, x.shape[1]), stage.decay["head.classifier.weight"])
    decay[:, -1] = stage.decay["head.classifier.bias"]
    theta, optimum = _newton(_Logistic(x, y, decay, stage.size), tolerance, stage.name, progress)
    with torch.no_grad():
        classifier.weight.copy_(theta[:, :-1])
        classifier.bias.copy_(theta[:, -1])
    return optimum


def features(stage: Stage, indices: list[int]) -> tuple[Tensor, Tensor]:
    """Return what enters the classifier, (n, width) float64, and the labels (n,), in the order of `indices`."""
    place = {int(stage.rows[i]): k for k, i in enumerate(indices)}
    seen: list[Tensor] = []
    classifier: Any = stage.model.head.classifier  # type: ignore[union-attr]
    hook = classifier.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach().double()))
    order, labels = [], []
    try:
        with evaluation(stage.model), torch.no_grad():
            for batch in stage.batches(indices):
                stage.outputs(batch)
                order += [place[row] for row in batch.rows.tolist()]
                labels.append(batch.targets)
    finally:
        hook.remove()
    back = torch.argsort(torch.tensor(order)).to(stage.device)
    return torch.cat(seen)[back], torch.cat(labels)[back]


@dataclass(frozen=True)
class _Logistic:
    """F of the module's docstring; Θ is (classes, width + 1)."""

    x: Tensor
    y: Tensor
    decay: Tensor
    m: int

    def value(self, theta: Tensor) -> float:
        return float(F.cross_entropy(self.x @ theta.T, self.y, reduction="sum") / self.m) + 0.5 * float(
            (self.decay * theta.square()).sum()
        )

    def gradient(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        p = (self.x @ theta.T).softmax(1)
        residual = p - F.one_hot(self.y, p.shape[1])
        return residual.T @ self.x / self.m + self.decay * theta, p

    def product(self, v: Tensor, p: Tensor) -> Tensor:
        u = p * (self.x @ v.T)
        return (u - p * u.sum(1, keepdim=True)).T @ self.x / self.m + self.decay * v

    def separated(self, theta: Tensor) -> bool:
        logits = self.x @ theta.T
        own = logits.gather(1, self.y[:, None])
        others = logits.scatter(1, self.y[:, None], float("-inf"))
        return not bool(self.decay.any()) and bool((own[:, 0] > others.amax(1)).all())


def _newton(problem: _Logistic, tolerance: float, name: str, progress: NewtonProgress | None) -> tuple[Tensor, Optimum]:
    theta = torch.zeros_like(problem.decay)
    gradient, p = problem.gradient(theta)
    for step in range(STEPS + 1):
        size = float(gradient.norm())
        if progress is not None:
            progress(step, size)
        if problem.separated(theta):
            raise BadInput(
                f"stage {name!r}: a linear head separates its rows, so that without weight decay it has no optimum; "
                "give a weight decay"
            )
        if size <= tolerance:
            return theta, Optimum(size, step)
        direction = _solve(problem, gradient, p, min(0.1, size))
        value, slope, length = problem.value(theta), -float((gradient * direction).sum()), 1.0
        while True:
            there = theta - length * direction
            new, p_new = problem.gradient(there)
            # Close to the minimum F no longer tells two points apart, while its gradient still does.
            if problem.value(there) <= value + 1e-4 * length * slope or float(new.norm()) < 0.5 * size:
                break
            length /= 2
            if length < 1e-10:
                raise NotConverged(
                    f"stage {name!r}: Newton's method stopped at a gradient of {size:.1e}", Optimum(size, step)
                )
        theta, gradient, p = there, new, p_new
    raise NotConverged(f"stage {name!r}: {STEPS} Newton steps left a gradient of {size:.1e}", Optimum(size, STEPS))


def _solve(problem: _Logistic, b: Tensor, p: Tensor, forcing: float) -> Tensor:
    """Solve F'' v = b by conjugate gradients, preconditioned by the diagonal, to a relative residual of `forcing`."""
    curvature = (p * (1 - p)).T @ problem.x.square() / problem.m + problem.decay
    inverse = 1.0 / curvature.clamp(min=1e-12 * float(curvature.max()))
    v, r = torch.zeros_like(b), b.clone()
    z = inverse * r
    d, rz, goal = z.clone(), float((r * z).sum()), forcing * float(b.norm())
    for _ in range(10 * b.numel()):
        if float(r.norm()) <= goal:
            break
        product = problem.product(d, p)
        along = float((d * product).sum())
        if along <= 0:  # a direction in which F is flat
            break
        v, r = v + (rz / along) * d, r - (rz / along) * product
        z = inverse * r
        before, rz = rz, float((r * z).sum())
        d = z + (rz / before) * d
    return v if bool(v.any()) else b
