"""What the checks of a stage work with: a few examples on copies of the model, their losses and scores, differences.

Every check runs on copies of the model; the caller's own is never touched.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from nlpinf import parameters as P
from nlpinf.errors import BadInput
from nlpinf.parameters import Parameters
from nlpinf.scoring.forward import forward_scores
from nlpinf.stages import Stage, evaluation
from nlpinf.tasks import Batch

POOL = 256  # rows to choose the examples from, so that a short and a long one are among them
STEPS = (1e-5, 1e-4, 1e-3, 1e-2)  # of the finite differences; see `differences`

Figures = dict[str, Tensor]  # losses and scores of the examples, float64


@dataclass(frozen=True)
class Bench:
    """What the checks work on: the stage on a copy of its model and on a float64 one, and its encoded examples."""

    stage: Stage
    exact: Stage
    encoded: list[Any]
    rows: list[int]
    seed: int

    @classmethod
    def of(cls, stage: Stage, examples: int, seed: int) -> Bench:
        """Choose rows by the seed, the shortest and the longest of a pool among them; copy the model twice."""
        generator = torch.Generator().manual_seed(seed)
        draw = torch.randperm(stage.size, generator=generator) if stage.size <= POOL else None
        if draw is None:  # a corpus may be too long to be put in random order
            draw = torch.randint(stage.size, (POOL,), generator=generator)
        order = list(dict.fromkeys(draw.tolist()))
        pool = stage.task.encode([stage.data[i] for i in order])
        lengths = [stage.task.length(encoded) for encoded in pool]
        ends = [lengths.index(min(lengths)), lengths.index(max(lengths))]
        chosen = list(dict.fromkeys([*ends, *range(len(pool))]))[:examples]
        # "example" gives each example its own loss without a pass over the corpus for T; the checks are about ratios.
        own = replace(stage, model=copy.deepcopy(stage.model), reduction="example")
        exact = replace(own, model=copy.deepcopy(stage.model).double())
        return cls(own, exact, [pool[i] for i in chosen], [int(stage.rows[order[i]]) for i in chosen], seed)

    def vector(self, stage: Stage) -> Parameters:
        """A seeded random vector on the trained parameters, of length one in each: the v of all scores here."""
        draw = P.random_like(self.exact.theta, self.seed)
        return {n: (t / max(P.norm({n: t}), 1e-30)).to(stage.theta[n]) for n, t in draw.items()}

    def batch(self, stage: Stage, chosen: Sequence[int]) -> Batch:
        """The examples at `chosen` in one batch."""
        return stage.on_device(stage.task.collate([self.encoded[i] for i in chosen], [self.rows[i] for i in chosen]))

    @property
    def lengths(self) -> list[int]:
        return [self.stage.task.length(encoded) for encoded in self.encoded]

    @property
    def longest(self) -> int:
        return self.lengths.index(max(self.lengths))

    @property
    def everything(self) -> range:
        return range(len(self.encoded))

    def figures(self, stage: Stage, batch: Batch) -> Figures:
        """Return losses and scores of a batch."""
        with evaluation(stage.model), torch.no_grad():
            losses = stage.example_losses(batch).double()
        v = self.vector(stage)
        try:
            return {"losses": losses, "scores": forward_scores(stage, [v], batch).scores[:, 0]}
        except NotImplementedError:  # an operation without forward mode: the check "forward mode" tells
            return {"losses": losses, "scores": reverse_scores(stage, v, batch)}

    def alone(self, stage: Stage) -> Figures:
        """Each example in a batch of its own, without padding."""
        return joined([self.figures(stage, self.batch(stage, [i])) for i in self.everything])


def reverse_scores(stage: Stage, v: Parameters, batch: Batch) -> Tensor:
    """Return ⟨v, g'(z)⟩ of each example from its own gradient, by plain autograd."""
    with evaluation(stage.model):
        theta = {n: t.clone().requires_grad_(True) for n, t in stage.theta.items()}
        scores = []
        for loss in stage.example_losses(batch, theta):
            gradient = torch.autograd.grad(loss, list(theta.values()), retain_graph=True, materialize_grads=True)
            scores.append(P.dot(dict(zip(theta, gradient)), v))
    return torch.tensor(scores, dtype=torch.float64, device=stage.device)


def joined(parts: Sequence[Figures]) -> Figures:
    """Return the figures of several batches one after another."""
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def error_of(found: Figures, expected: Figures) -> float:
    """Return the largest |difference| relative to the largest value, of losses or scores."""
    return max(relative(found[name], expected[name]) for name in expected)


def relative(found: Tensor, expected: Tensor) -> float:
    """Return the largest |difference| relative to the largest |expected|."""
    difference = (found.double() - expected).abs().max()
    return float(difference / expected.abs().max()) if difference != 0 else 0.0


def gradients(stage: Stage, batch: Batch, at: Parameters) -> Parameters:
    """Return the gradient at θ = `at` of the mean of the batch's g(z), by plain autograd."""
    theta = {n: t.clone().requires_grad_(True) for n, t in at.items()}
    loss = stage.example_losses(batch, theta).mean()
    return dict(zip(theta, torch.autograd.grad(loss, list(theta.values()), materialize_grads=True)))


def differences(error: Callable[[Tensor], float], along: Callable[[float], Tensor]) -> float:
    """Return the least `error` of the fourth-order central difference of `along` at 0, over a few step sizes.

    No single step suits every model: kinks (ReLU) ask for a small one, parts that compute in float32 for a large one.
    A wrong derivative is as wrong at every step.
    """
    least = math.inf
    for h in STEPS:
        derivative = (8 * (along(h) - along(-h)) - (along(2 * h) - along(-2 * h))) / (12 * h)
        found = error(derivative)
        least = found if math.isnan(found) else min(least, found)
        if not least > 1e-6:
            break
    return least


def first(batch: Batch) -> Batch:
    """Return the batch's first example alone, as padded as it was: its sequences come first, so positions hold."""
    sequences, items = batch.sequence == 0, batch.example == 0
    if not bool(sequences[: int(sequences.sum())].all()):
        raise BadInput("the task does not put an example's sequences in the order of the examples")

    def cut(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: cut(part) for key, part in value.items()}
        return value[sequences] if isinstance(value, Tensor) and len(value) == len(sequences) else value

    return replace(
        batch,
        inputs=cut(batch.inputs),
        rows=batch.rows[:1],
        targets=batch.targets[items],
        example=batch.example[items],
        sequence=batch.sequence[sequences],
        position=None if batch.position is None else batch.position[items],
    )
