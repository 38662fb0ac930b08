"""nlpinf: which sentences of a pretraining corpus help or harm a finetuned model."""

from typing import Any

from nlpinf.damping import Relative
from nlpinf.data.corpus import Corpus, read_labelled
from nlpinf.influence import ImplicitSolve, QueryVectors, query_vectors
from nlpinf.queries import Query
from nlpinf.scoring import Scorer, Scores, score
from nlpinf.solvers import CG
from nlpinf.stages import Chain, Proximity, Stage
from nlpinf.tasks import CausalLM, Classification, MaskedLM, Regression, SequenceClassification

__version__ = "0.1.0"
__all__ = [
    "CG",
    "CausalLM",
    "Chain",
    "Classification",
    "Corpus",
    "ImplicitSolve",
    "MaskedLM",
    "Proximity",
    "Query",
    "QueryVectors",
    "Regression",
    "Relative",
    "Scorer",
    "Scores",
    "SequenceClassification",
    "Stage",
    "StageRecorder",
    "query_vectors",
    "read_labelled",
    "score",
]


def __getattr__(name: str) -> Any:
    if name != "StageRecorder":
        raise AttributeError(f"module 'nlpinf' has no attribute {name!r}")
    from nlpinf.integrations.trainer import StageRecorder  # the Trainer's modules take a second to import

    return StageRecorder
