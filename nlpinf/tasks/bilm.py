"""Tasks on texts as words spelt in characters, for ELMo: the bidirectional language model, and classification.

A text's words are what white space divides; a list of words is taken as it is. `<S>` and `</S>` are put around them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from nlpinf.data.characters import BEGIN, END, MAX_CHARACTERS, character_batch, word_bytes
from nlpinf.data.vocabulary import Vocabulary
from nlpinf.errors import BadInput
from nlpinf.tasks.base import Batch, Task, logits_of
from nlpinf.tasks.language import SequenceClassification
from nlpinf.tasks.losses import CrossEntropy, OutputLoss
from nlpinf.tasks.softmax import DEFAULT_NEGATIVES, Negatives, draw_negatives

LongPolicy = Literal["truncate", "error"]
FULL_SOFTMAX = 50_000
"""Words up to which the full softmax is the default: its outputs then cost less than a batch's states at `original`."""


@dataclass(frozen=True)
class Spelling:
    """How texts become words and characters.

    `max_length`      words of a text at most; with `long` "truncate" the first ones are kept, with "error" it is refused
    `max_characters`  character ids a word, its marks included; a word of more bytes keeps its first ones, as in bilm-tf
    """

    max_length: int = 128
    long: LongPolicy = "truncate"
    max_characters: int = MAX_CHARACTERS

    def __post_init__(self) -> None:
        if self.max_length < 1:
            raise BadInput(f"max_length is {self.max_length}; it must be at least 1 word")
        if self.long not in ("truncate", "error"):
            raise BadInput(f"long is {self.long!r}; it is 'truncate' or 'error'")

    def words(self, example: Any) -> list[str]:
        """Return the words of a text, of a mapping with `text`, or of a list of words."""
        text = example["text"] if isinstance(example, dict) else example
        words = _words(text)
        if not words:
            raise BadInput(f"the text {_shown(text)} has no word; leave it out")
        if len(words) > self.max_length and self.long == "error":
            raise BadInput(
                f"the text {_shown(text)} has {len(words)} words, more than {self.max_length}; leave it out, raise "
                "max_length, or use long='truncate'"
            )
        kept = words[: self.max_length]
        try:
            for word in kept:
                spelt = word_bytes(word)  # what cannot be spelt is refused with its text, before anything is trained
                if self.long == "error" and len(spelt) > self.max_characters - 2:
                    raise BadInput(
                        f"a word has {len(spelt)} bytes, more than {self.max_characters - 2}; leave it out, or use long='truncate'"
                    )
        except BadInput as error:
            raise BadInput(f"the text {_shown(text)}: {error}") from None
        return kept

    def marked(self, examples: Sequence[Any]) -> tuple[list[list[str]], np.ndarray]:
        """Return the words of every example, and which examples lost words or the ends of words, (n,) bool."""
        texts = [example["text"] if isinstance(example, dict) else example for example in examples]
        kept = [self.words(text) for text in texts]
        cut = [len(_words(text)) > self.max_length or self._cuts(words) for text, words in zip(texts, kept)]
        return kept, np.array(cut, bool)

    def _cuts(self, words: Sequence[str]) -> bool:
        """Say whether a word has more bytes than there are places for."""
        return any(4 * len(w) > self.max_characters - 2 < len(w.encode()) for w in words)

    def inputs(self, sentences: Sequence[Sequence[str]]) -> dict[str, Tensor]:
        """Return what the encoder takes: `index` and `lengths` by sentence, and the `distinct` words of all of them."""
        batch = character_batch(sentences, self.max_characters)
        # The leading axis says that the distinct words belong to the batch and not to its sentences.
        return {"index": batch.index, "distinct": batch.distinct[None], "lengths": batch.lengths}

    def spans(self, example: Any) -> tuple[list[tuple[int, int]], list[str]]:
        """Return where each word stands in its text, and the words; the boundaries, at (0, 0), are counted."""
        words = self.words(example)
        found = [m.span() for m in re.finditer(r"\S+", example)] if isinstance(example, str) else [(0, 0)] * len(words)
        return [(0, 0), *found[: len(words)], (0, 0)], [BEGIN, *words, END]

    def settings(self) -> dict[str, Any]:
        """Return the settings for a run's record."""
        return {"max_length": self.max_length, "long": self.long, "max_characters": self.max_characters}


class BidirectionalLM(Task):
    """Forward and backward language model of one softmax: each direction predicts the n words of a text and a boundary.

    g(z) = ½ (mean forward + mean backward) cross-entropy: the items are the n + 1 predictions of each direction, so it
    is their plain mean. Source: Peters et al., NAACL 2018.

    `vocabulary`  the words that are predicted; others count as `<UNK>`
    `negatives`   0: the full softmax; K: the sampled one with K log-uniform negatives and the expected-count correction
                  (the vocabulary in order of falling frequency). Default: 0 up to 50,000 words, else 8,192
    `seed`        fixes the negatives: one set for all losses, curvature and scores, another one in each training step
    """

    name = "bilm"
    loss: OutputLoss = CrossEntropy()

    def __init__(
        self,
        vocabulary: Vocabulary,
        max_length: int = 128,
        *,
        long: LongPolicy = "truncate",
        max_characters: int = MAX_CHARACTERS,
        negatives: int | None = None,
        seed: int = 0,
        vocabulary_sha256: str | None = None,
    ) -> None:
        self.vocabulary, self.seed = vocabulary, seed
        self.spelling = Spelling(max_length, long, max_characters)
        if negatives is None:
            negatives = 0 if len(vocabulary) <= FULL_SOFTMAX else DEFAULT_NEGATIVES
        if not 0 <= negatives < len(vocabulary):
            raise BadInput(
                f"negatives is {negatives}; give 0 (full softmax) or fewer than the vocabulary's {len(vocabulary)} words"
            )
        self.negatives = negatives
        if vocabulary_sha256 not in (None, vocabulary.sha256):
            raise BadInput(
                f"{vocabulary.source}: is not the vocabulary of the run (sha256 differs); restore the file, its lines "
                "are the rows of the softmax"
            )

    def encode(self, examples: Sequence[Any]) -> list[list[str]]:
        return self.encode_marked(examples)[0]

    def encode_marked(self, examples: Sequence[Any]) -> tuple[list[list[str]], np.ndarray]:
        return self.spelling.marked(examples)

    def length(self, encoded: Any) -> int:
        return len(encoded) + 2

    def counted(self, encoded: Sequence[list[str]]) -> int:
        return sum(2 * (len(words) + 1) for words in encoded)

    @cached_property
    def fixed(self) -> Negatives | None:
        """The negatives of losses, curvature and scores; None under the full softmax."""
        return draw_negatives(len(self.vocabulary), self.seed, self.negatives) if self.negatives else None

    def collate(self, encoded: Sequence[list[str]], rows: Sequence[int]) -> Batch:
        return self._collate(encoded, rows, self.fixed)

    def training_batch(self, encoded: Sequence[list[str]], rows: Sequence[int], turn: int, step: int) -> Batch:
        drawn = draw_negatives(len(self.vocabulary), (self.seed, 1 + step), self.negatives) if self.negatives else None
        return self._collate(encoded, rows, drawn)

    def _collate(self, encoded: Sequence[list[str]], rows: Sequence[int], negatives: Negatives | None) -> Batch:
        inputs = self.spelling.inputs(encoded)
        words = self.vocabulary.batch(encoded)
        steps = inputs["lengths"] - 1  # predictions of one direction
        example = torch.arange(len(encoded)).repeat_interleave(2 * steps)
        first = torch.cumsum(2 * steps, 0) - 2 * steps
        number = torch.arange(len(example)) - first[example]
        ahead = number < steps[example]
        place = torch.where(ahead, number + 1, number - steps[example])
        predicted = words[example, place]
        targets = predicted
        if negatives is not None:
            inputs |= {"words": words, "negatives": negatives.ids[None], "tries": torch.tensor([negatives.tries])}
            targets = torch.zeros_like(predicted)  # an item's own word is class 0 of the sampled softmax
        position = example * words.shape[1] + place
        rows_tensor = torch.as_tensor(rows, dtype=torch.int64)
        return Batch(inputs, rows_tensor, targets, example, torch.arange(len(encoded)), position, predicted)

    def outputs(self, model: nn.Module, batch: Batch) -> Tensor:
        return logits_of(model(**batch.inputs))

    def item_module(self, model: nn.Module) -> nn.Module | None:
        find = getattr(model, "get_output_embeddings", None)
        return find() if find is not None and not self.negatives else None

    def spans(self, example: Any) -> tuple[list[tuple[int, int]], list[str]] | None:
        return self.spelling.spans(example)

    def settings(self) -> dict[str, Any]:
        return {
            "name": self.name,
            **self.spelling.settings(),
            "negatives": self.negatives,
            "seed": self.seed,
            "vocabulary_sha256": self.vocabulary.sha256,
        }


class WordClassification(SequenceClassification):
    """Cross-entropy of a label for every text, its words spelt in characters; examples as `SequenceClassification`'s."""

    name = "word_classification"

    def __init__(
        self,
        max_length: int = 128,
        *,
        labels: int = 2,
        long: LongPolicy = "truncate",
        max_characters: int = MAX_CHARACTERS,
    ) -> None:
        if labels < 2:
            raise BadInput(f"labels is {labels}; a classifier needs at least 2 classes")
        self.labels, self.max_length = labels, max_length
        self.spelling = Spelling(max_length, long, max_characters)

    def _ids(self, texts: Sequence[Any]) -> tuple[list[Any], np.ndarray]:
        return self.spelling.marked(texts)

    def length(self, encoded: Any) -> int:
        return len(encoded.ids) + 2

    def collate(self, encoded: Sequence[Any], rows: Sequence[int]) -> Batch:
        inputs = self.spelling.inputs([e.ids for e in encoded])
        indices = torch.arange(len(encoded))
        targets = torch.tensor([e.label for e in encoded])
        return Batch(inputs, torch.as_tensor(rows, dtype=torch.int64), targets, indices, indices)

    def settings(self) -> dict[str, Any]:
        return {"name": self.name, "labels": self.labels, **self.spelling.settings()}


def _words(text: Any) -> list[str]:
    return text.split() if isinstance(text, str) else [str(word) for word in text]


def _shown(text: Any) -> str:
    told = ascii(text if isinstance(text, str) else " ".join(map(str, text[:10])))
    return told if len(told) <= 60 else told[:57] + "...'"
