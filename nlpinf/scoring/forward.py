"""Scores of a batch by one forward-mode pass a query: ⟨v, g'(z)⟩ = d/dt g(z; θ + t v) at t = 0, for all z at once."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from nlpinf import parameters as P
from nlpinf import sharded
from nlpinf.curvature.products import output_tangents
from nlpinf.parameters import Parameters
from nlpinf.scoring.head import Head, linear_head
from nlpinf.stages import Stage, evaluation
from nlpinf.tasks import Batch


@dataclass(frozen=True)
class BatchScores:
    """Float64: `losses` g(z) (B,), `scores` (B, queries), and the scores' parts `item_scores` (I, queries)."""

    losses: Tensor
    scores: Tensor
    item_scores: Tensor | None


class ForwardScorer:
    """Scores batches with one forward-mode pass a query; no backward pass. Exact for every module and parameter.

    Of a language model with a linear output layer, the layer and the loss are done in chunks over items (`head.py`).
    """

    def __init__(self, stage: Stage, vectors: list[Parameters]) -> None:
        self.stage, self.vectors = stage, vectors
        self._head: Head | None = None
        self._looked = False

    def __call__(self, batch: Batch) -> BatchScores:
        if not self._looked:
            whole = not sharded.is_sharded(self.stage.model)
            self._head, self._looked = linear_head(self.stage, batch) if whole else None, True
        weights = self.stage.item_weights(batch).double()
        items = []
        with evaluation(self.stage.model), torch.no_grad():
            for vector in self.vectors:
                losses, tangents = self._items(batch, vector)
                items.append(tangents.double() * weights)
            total = batch.sum_by_example(losses.double() * weights)
        item_scores = torch.stack(items, 1)
        return BatchScores(total, batch.sum_by_example(item_scores), item_scores)

    def _items(self, batch: Batch, vector: Parameters) -> tuple[Tensor, Tensor]:
        """Return ℓ and dℓ/dt of every item, (I,) each."""
        stage, loss = self.stage, self.stage.task.loss
        if self._head is None:
            outputs, moved = output_tangents(stage, batch, vector)
            return stage.task.losses(outputs, batch), loss.tangents(outputs, batch.targets, moved)
        with forward_ad.dual_level():
            theta = P.select(stage.parameters, vector)
            dual = {name: forward_ad.make_dual(tensor, vector[name]) for name, tensor in theta.items()}
            x, change = forward_ad.unpack_dual(self._head.hidden(lambda: stage.outputs(batch, dual)))
        return self._head.tangents(loss, stage.parameters, vector, batch.targets, x, change)


def forward_scores(stage: Stage, vectors: list[Parameters], batch: Batch) -> BatchScores:
    """Return the scores of one batch for each query vector; `ForwardScorer` does many batches."""
    return ForwardScorer(stage, vectors)(batch)
