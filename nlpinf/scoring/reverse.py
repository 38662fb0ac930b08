"""placeholder"""
from __future__ import annotations
from nlpinf.parameters import Parameters
from nlpinf.scoring.forward import BatchScores, forward_scores
from nlpinf.stages import Stage
from nlpinf.tasks import Batch


class ReverseScorer:
    def __init__(self, stage: Stage, vectors: list[Parameters]) -> None:
        self.stage, self.vectors = stage, vectors

    def __call__(self, batch: Batch) -> BatchScores:
        return forward_scores(self.stage, self.vectors, batch)
