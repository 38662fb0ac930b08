"""Tasks on text: masked and causal language models, sequence classification, for any Hugging Face model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from nlpinf.data.hashing import uniform
from nlpinf.errors import BadInput
from nlpinf.tasks.base import Batch, Task, logits_of
from nlpinf.tasks.cutting import token_ids
from nlpinf.tasks.losses import CrossEntropy, OutputLoss


class _TextTask(Task):
    """Tokenizes texts, or takes lists of token ids as they are; pads on the right."""

    loss: OutputLoss = CrossEntropy()

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int = 128) -> None:
        if tokenizer.pad_token_id is None:
            raise BadInput(
                f"the tokenizer {type(tokenizer).__name__} has no pad token; set tokenizer.pad_token, for example to "
                "tokenizer.eos_token (padding is masked out, so any token will do)"
            )
        if max_length < 2:
            raise BadInput(f"max_length is {max_length}; it must be at least 2 tokens")
        self.tokenizer = tokenizer
        self.max_length = max_length
        self._specials = sorted(set(tokenizer.all_special_ids))

    def encode(self, examples: Sequence[Any]) -> list[Any]:
        return self.encode_marked(examples)[0]

    def _ids(self, texts: Sequence[Any]) -> tuple[list[list[int]], np.ndarray]:
        if not texts:
            return [], np.zeros(0, bool)
        if not isinstance(texts[0], str):
            cut = np.array([len(ids) > self.max_length for ids in texts], bool)
            return [[int(i) for i in ids][: self.max_length] for ids in texts], cut
        return token_ids(self.tokenizer, texts, self.max_length)

    def _padded(self, sequences: Sequence[list[int]]) -> tuple[Tensor, Tensor]:
        width = max(1, max(len(ids) for ids in sequences))
        ids = torch.full((len(sequences), width), self.tokenizer.pad_token_id)
        mask = torch.zeros((len(sequences), width), dtype=torch.int64)
        for i, sequence in enumerate(sequences):
            ids[i, : len(sequence)] = torch.tensor(sequence, dtype=torch.int64)
            mask[i, : len(sequence)] = 1
        return ids, mask

    def settings(self) -> dict[str, Any]:
        return {"name": self.name, "max_length": self.max_length}


class _LanguageModel(_TextTask):
    """Outputs are the vocabulary logits at the counted positions: the output layer is applied to these alone."""

    def encode_marked(self, examples: Sequence[Any]) -> tuple[list[list[int]], np.ndarray]:
        return self._ids([e["text"] if isinstance(e, dict) else e for e in examples])

    def length(self, encoded: Any) -> int:
        return len(encoded)

    def item_module(self, model: nn.Module) -> nn.Module | None:
        find = getattr(model, "get_output_embeddings", None)
        return find() if find is not None else None

    def outputs(self, model: nn.Module, batch: Batch) -> Tensor:
        head = self.item_module(model)
        assert batch.position is not None
        if head is None:
            return logits_of(model(**batch.inputs)).flatten(0, 1)[batch.position]

        # The hidden states of the counted positions replace all others on their way into the output layer.
        def keep_counted(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return (args[0].flatten(0, -2)[batch.position], *args[1:])

        handle = head.register_forward_pre_hook(keep_counted)
        try:
            return logits_of(model(**batch.inputs))
        finally:
            handle.remove()


class MaskedLM(_LanguageModel):
    """Masked language modelling with masks that are a function of (seed, row, mask number).

    Of n maskable tokens of a sentence, max(1, round(probability · n)) are counted; 80 % of them become the mask token,
    10 % a random word, 10 % stay (Devlin et al., 2019). With `masks` = K > 1, g(z) averages over K masks; training then
    shows them in turn, one an epoch.
    """

    name = "masked_lm"

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int = 128,
        *,
        probability: float = 0.15,
        masks: int = 1,
        seed: int = 0,
    ) -> None:
        super().__init__(tokenizer, max_length)
        if tokenizer.mask_token_id is None:
            raise BadInput("the tokenizer has no mask token; a masked LM needs one (set tokenizer.mask_token)")
        if not 0 < probability < 1:
            raise BadInput(f"the masking probability is {probability}; it must lie between 0 and 1")
        if masks < 1:
            raise BadInput(f"masks is {masks}; at least one mask a sentence is needed")
        self.probability, self.masks, self.seed = probability, masks, seed
        special = torch.zeros(len(tokenizer), dtype=torch.bool)
        special[[i for i in self._specials if i < len(tokenizer)]] = True
        unknown = tokenizer.unk_token_id
        if unknown is not None:  # an unknown word is a word: it is masked and predicted like any other
            special[unknown] = False
        self._maskable = ~special
        self._words = self._maskable.nonzero()[:, 0]

    def collate(self, encoded: Sequence[list[int]], rows: Sequence[int], masks: Sequence[int] | None = None) -> Batch:
        """Build the batch under the mask numbers `masks` (default: all K of them)."""
        masks = range(self.masks) if masks is None else masks
        ids, attention = self._padded(encoded)
        rows_tensor = torch.as_tensor(rows, dtype=torch.int64)
        sequence = torch.arange(len(encoded)).repeat_interleave(len(masks))
        number = torch.as_tensor(masks, dtype=torch.int64).repeat(len(encoded))
        ids, attention = ids[sequence], attention[sequence]
        counted = self._chosen(ids, attention, rows_tensor[sequence], number)
        flat = counted.flatten().nonzero()[:, 0]
        inputs = {
            "input_ids": self._corrupted(ids, counted, rows_tensor[sequence], number),
            "attention_mask": attention,
        }
        example = sequence[flat // ids.shape[1]]
        return Batch(inputs, rows_tensor, ids.flatten()[flat], example, sequence, flat)

    def training_batch(self, encoded: Sequence[list[int]], rows: Sequence[int], turn: int, step: int) -> Batch:
        return self.collate(encoded, rows, masks=[turn])

    def _keys(self, ids: Tensor, rows: Tensor, number: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return rows[:, None], number[:, None], torch.arange(ids.shape[1])[None]

    def _chosen(self, ids: Tensor, attention: Tensor, rows: Tensor, number: Tensor) -> Tensor:
        maskable = self._maskable[ids] & attention.bool()
        draw = uniform(self.seed, *self._keys(ids, rows, number)).masked_fill(~maskable, 2.0)
        # In float64, so that it rounds as `counted` does: half of a token falls to the even number in both.
        wanted = (self.probability * maskable.sum(1).double()).round().clamp(min=1)
        rank = draw.argsort(dim=1, stable=True).argsort(dim=1)
        return (rank < wanted[:, None]) & maskable

    def _corrupted(self, ids: Tensor, counted: Tensor, rows: Tensor, number: Tensor) -> Tensor:
        keys = self._keys(ids, rows, number)
        kind, word = uniform(self.seed + 1, *keys), uniform(self.seed + 2, *keys)
        random_word = self._words[(word * len(self._words)).long()]
        ids = torch.where(counted & (kind < 0.8), self.tokenizer.mask_token_id, ids)
        return torch.where(counted & (kind >= 0.9), random_word, ids)

    def counted(self, encoded: Sequence[list[int]]) -> int:
        total = 0
        for ids in encoded:
            words = int(self._maskable[torch.tensor(ids, dtype=torch.int64)].sum())
            total += self.masks * min(words, max(1, round(self.probability * words)))
        return total

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "probability": self.probability, "masks": self.masks, "seed": self.seed}


class CausalLM(_LanguageModel):
    """Next-word prediction: every token but the first of a sentence is counted.

    `boundaries` adds the tokenizer's begin and end tokens to every sentence, so that the first word counts as well.
    `uncounted` are ids that are never predicted: a collator that takes every pad token for padding leaves out the ends of
    sentences too, where pad and end are one token.
    """

    name = "causal_lm"

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int = 128,
        *,
        boundaries: bool = False,
        uncounted: Sequence[int] = (),
    ) -> None:
        super().__init__(tokenizer, max_length)
        if boundaries and (tokenizer.bos_token_id is None or tokenizer.eos_token_id is None):
            raise BadInput("boundaries need a tokenizer with bos_token and eos_token; set both or leave boundaries off")
        self.boundaries, self.uncounted = boundaries, tuple(int(i) for i in uncounted)
        self.ahead = 0 if boundaries else 1  # a begin token in front moves the others by one

    def encode_marked(self, examples: Sequence[Any]) -> tuple[list[list[int]], np.ndarray]:
        encoded, cut = super().encode_marked(examples)
        if self.boundaries:
            cut = cut | np.array([len(ids) + 2 > self.max_length for ids in encoded], bool)
            bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
            encoded = [([bos, *ids, eos])[: self.max_length] for ids in encoded]
        return encoded, cut

    def collate(self, encoded: Sequence[list[int]], rows: Sequence[int]) -> Batch:
        ids, attention = self._padded(encoded)
        indices = torch.arange(len(encoded))
        counted = torch.zeros_like(attention, dtype=torch.bool)
        counted[:, :-1] = attention[:, 1:].bool() & ~torch.isin(
            ids[:, 1:], torch.tensor(self.uncounted, dtype=ids.dtype)
        )
        flat = counted.flatten().nonzero()[:, 0]
        targets = ids.flatten()[flat + 1]
        inputs = {"input_ids": ids, "attention_mask": attention}
        rows_tensor = torch.as_tensor(rows, dtype=torch.int64)
        return Batch(inputs, rows_tensor, targets, flat // ids.shape[1], indices, flat)

    def counted(self, encoded: Sequence[list[int]]) -> int:
        return sum(sum(i not in self.uncounted for i in ids[1:]) for ids in encoded)

    def settings(self) -> dict[str, Any]:
        uncounted = {"uncounted": list(self.uncounted)} if self.uncounted else {}
        return {**super().settings(), "boundaries": self.boundaries, **uncounted}


@dataclass(frozen=True)
class _Labelled:
    ids: list[int]
    label: int


class SequenceClassification(_TextTask):
    """Cross-entropy of a label for every text; examples are mappings with `text` and `label`."""

    name = "sequence_classification"

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int = 128, *, labels: int = 2) -> None:
        super().__init__(tokenizer, max_length)
        if labels < 2:
            raise BadInput(f"labels is {labels}; a classifier needs at least 2 classes")
        self.labels = labels

    def encode_marked(self, examples: Sequence[Any]) -> tuple[list[_Labelled], np.ndarray]:
        for example in examples:
            if not isinstance(example, Mapping) or "label" not in example or "text" not in example:
                raise BadInput(
                    f"an example of this task is a mapping with `text` and `label`, not {str(example)[:60]!r}"
                )
            label = example["label"]
            if not isinstance(label, int) or not 0 <= label < self.labels:
                raise BadInput(f"label {label!r} is outside the range 0 to {self.labels - 1} of this task")
        ids, cut = self._ids([example["text"] for example in examples])
        return [_Labelled(i, example["label"]) for i, example in zip(ids, examples)], cut

    def length(self, encoded: _Labelled) -> int:
        return len(encoded.ids)

    def collate(self, encoded: Sequence[_Labelled], rows: Sequence[int]) -> Batch:
        ids, attention = self._padded([e.ids for e in encoded])
        indices = torch.arange(len(encoded))
        targets = torch.tensor([e.label for e in encoded])
        inputs = {"input_ids": ids, "attention_mask": attention}
        return Batch(inputs, torch.as_tensor(rows, dtype=torch.int64), targets, indices, indices)

    def outputs(self, model: nn.Module, batch: Batch) -> Tensor:
        return logits_of(model(**batch.inputs))

    def counted(self, encoded: Sequence[_Labelled]) -> int:
        return len(encoded)

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "labels": self.labels}
