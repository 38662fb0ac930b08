"""How the runs of each task are written and opened: the model, and what turns its texts into numbers.

`OPENERS` has one entry a task, by the name that the run's record holds; an entry of one's own makes `save_run` and
`Stage.from_run` know another kind of run.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from nlpinf.adapters.allennlp_classifier import RECIPE, ArchiveClassifier
from nlpinf.adapters.elmo.language_model import ElmoLM
from nlpinf.adapters.heads import HEAD, TextClassifier
from nlpinf.adapters.supported import check_supported
from nlpinf.adapters.tokenizers import tokenizer_in
from nlpinf.data.vocabulary import Vocabulary
from nlpinf.errors import BadInput
from nlpinf.tasks import BidirectionalLM, CausalLM, MaskedLM, SequenceClassification, Task, WordClassification

AUTO_MODELS = {
    "masked_lm": AutoModelForMaskedLM,
    "causal_lm": AutoModelForCausalLM,
    "sequence_classification": AutoModelForSequenceClassification,
}
VOCABULARY = "vocabulary.txt"


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Keep transformers' loading bars and notices off the terminal; errors still show."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


class Opener(ABC):
    """One kind of run. `words` is whatever the task needs beside its settings: a tokenizer, a vocabulary, nothing."""

    @abstractmethod
    def task(self, settings: dict[str, Any], words: Any) -> Task:
        """Return the task of these settings, its name left out."""

    @abstractmethod
    def open(self, folder: Path, trust_remote_code: bool = False) -> tuple[nn.Module, Any]:
        """Return the model and the words of a run folder; raise `BadInput` if they do not fit each other.

        `trust_remote_code` lets transformers run code that lies in the folder.
        """

    @abstractmethod
    def save_words(self, task: Any, folder: Path) -> None:
        """Write what `open` reads beside the model's own files."""


class HuggingFace(Opener):
    """A model and a tokenizer as `save_pretrained` leaves them; with the file of a head, a `TextClassifier`."""

    def __init__(self, name: str, make: Callable[..., Task]) -> None:
        self.name, self.make = name, make

    def task(self, settings: dict[str, Any], words: Any) -> Task:
        return self.make(words, **settings)

    def save_words(self, task: Any, folder: Path) -> None:
        with quiet_loading():
            task.tokenizer.save_pretrained(folder)

    def open(self, folder: Path, trust_remote_code: bool = False) -> tuple[nn.Module, PreTrainedTokenizerBase]:
        with quiet_loading():
            tokenizer = tokenizer_in(folder, trust_remote_code=trust_remote_code)
            model = self._model(folder, trust_remote_code)
        embeddings = model.get_input_embeddings()
        if len(tokenizer) > embeddings.weight.shape[0]:
            raise BadInput(
                f"{folder}: the tokenizer has {len(tokenizer)} words, the embedding {embeddings.weight.shape[0]}; they are of different runs"
            )
        return model, tokenizer

    def _model(self, folder: Path, trust_remote_code: bool) -> Any:
        if (folder / HEAD).exists():
            return TextClassifier.from_pretrained(folder)
        check_supported(AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code), folder, self.name)
        model, loading = AUTO_MODELS[self.name].from_pretrained(
            folder, output_loading_info=True, trust_remote_code=trust_remote_code
        )
        if absent := sorted(loading["missing_keys"]):  # transformers would go on with random numbers in their place
            raise BadInput(
                f"{folder}: its weights have no {absent[0]!r}, which a {self.name} model has; save the whole model"
            )
        return model


class Elmo(Opener):
    """An `ElmoLM` and the vocabulary of its softmax, vocabulary.txt."""

    def task(self, settings: dict[str, Any], words: Any) -> Task:
        return BidirectionalLM(words, **settings)

    def save_words(self, task: Any, folder: Path) -> None:
        task.vocabulary.write(folder / VOCABULARY)

    def open(self, folder: Path, trust_remote_code: bool = False) -> tuple[nn.Module, Vocabulary]:
        model = ElmoLM.from_pretrained(folder)
        vocabulary = Vocabulary.read(folder / VOCABULARY)
        vocabulary.check_size(model.vocabulary_size, f"the softmax of {folder}")
        return model, vocabulary


class ElmoClassifier(Opener):
    """A `TextClassifier` on an ELMo encoder, or one from AllenNLP: both read characters and so need no words."""

    def task(self, settings: dict[str, Any], words: Any) -> Task:
        return WordClassification(**settings)

    def save_words(self, task: Any, folder: Path) -> None:
        return None

    def open(self, folder: Path, trust_remote_code: bool = False) -> tuple[nn.Module, None]:
        kind = ArchiveClassifier if (folder / RECIPE).exists() else TextClassifier
        return kind.from_pretrained(folder), None


OPENERS: dict[str, Opener] = {
    "masked_lm": HuggingFace("masked_lm", MaskedLM),
    "causal_lm": HuggingFace("causal_lm", CausalLM),
    "sequence_classification": HuggingFace("sequence_classification", SequenceClassification),
    "bilm": Elmo(),
    "word_classification": ElmoClassifier(),
}


def opener_of(name: Any) -> Opener:
    """Return the opener of a task by its name."""
    if name not in OPENERS:
        raise BadInput(f"task {name!r} is unknown; there are {', '.join(OPENERS)}")
    return OPENERS[name]


def build_task(settings: dict[str, Any], words: Any) -> Task:
    """Return the task that `Task.settings()` described; `words` is its tokenizer or vocabulary."""
    options = dict(settings)
    return opener_of(options.pop("name", None)).task(options, words)
