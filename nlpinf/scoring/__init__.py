"""Scores: one inner product ⟨v, g'(z)⟩ a row and query, in one pass over a corpus, and where they are kept."""

from nlpinf.scoring.corpus import Scorer, score
from nlpinf.scoring.documents import Documents, ScoredDocument
from nlpinf.scoring.forward import BatchScores, forward_scores
from nlpinf.scoring.shards import Shard
from nlpinf.scoring.store import ScoredRow, Scores

__all__ = [
    "BatchScores",
    "Documents",
    "ScoredDocument",
    "ScoredRow",
    "Scorer",
    "Scores",
    "Shard",
    "forward_scores",
    "score",
]
