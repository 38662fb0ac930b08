"""Scores of a batch by one forward-mode pass: ⟨v, g'(z)⟩ = d/dt g(z; θ + t v) at t = 0, for every z of the batch at once."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nlpinf.curvature.products import output_tangents
from nlpinf.parameters import Parameters
from nlpinf.stages import Stage, evaluation
from nlpinf.tasks import Batch


@dataclass(frozen=True)
class BatchScores:
    """`losses` g(z) (B,), `scores` (B, queries), `item_scores` (I, queries): the scores' parts, adding up to them; float64."""

    losses: Tensor
    scores: Tensor
    item_scores: Tensor | None


class ForwardScorer:
    """Scores batches with one forward-mode pass a query; no backward pass. Exact for every module and parameter."""

    def __init__(self, stage: Stage, vectors: list[Parameters]) -> None:
        self.stage, self.vectors = stage, vectors

    def __call__(self, batch: Batch) -> BatchScores:
        return forward_scores(self.stage, self.vectors, batch)


def forward_scores(stage: Stage, vectors: list[Parameters], batch: Batch) -> BatchScores:
    """Return the scores of `batch` for each query vector, one forward-mode pass a query; no backward pass."""
    weights = stage.item_weights(batch).double()
    items = []
    with evaluation(stage.model), torch.no_grad():
        for vector in vectors:
            outputs, moved = output_tangents(stage, batch, vector)
            items.append(stage.task.loss.tangents(outputs, batch.targets, moved).double() * weights)
        losses = batch.sum_by_example(stage.task.losses(outputs, batch).double() * weights)
    item_scores = torch.stack(items, 1)
    return BatchScores(losses, batch.sum_by_example(item_scores), item_scores)
