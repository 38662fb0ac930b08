"""Tasks: how a batch becomes outputs and losses."""

from nlpinf.tasks.base import Batch, Task
from nlpinf.tasks.bilm import BidirectionalLM, WordClassification
from nlpinf.tasks.language import CausalLM, MaskedLM, SequenceClassification
from nlpinf.tasks.losses import CrossEntropy, OutputLoss, SquaredError
from nlpinf.tasks.tensors import Classification, Regression

__all__ = [
    "Batch",
    "BidirectionalLM",
    "CausalLM",
    "Classification",
    "CrossEntropy",
    "MaskedLM",
    "OutputLoss",
    "Regression",
    "SequenceClassification",
    "SquaredError",
    "Task",
    "WordClassification",
]
