"""What a task is: how examples become a batch, a batch outputs, and outputs losses."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nlpinf.data.hashing import uniform
from nlpinf.tasks.losses import OutputLoss


@dataclass(frozen=True)
class Batch:
    """Examples as tensors. B examples, S sequences that the model sees (B, or K·B for K masks), I counted items.

    `inputs`    keyword arguments of the model, each (S, ...)
    `rows`      (B,) int64, the examples' numbers in their corpus
    `targets`   (I,) classes or (I, values) numbers
    `example`   (I,) int64, the item's example: an index into `rows`
    `position`  (I,) int64, the item's place in the flattened (S · length) outputs, None if the outputs are the items
    `sequence`  (S,) int64, the sequence's example
    `shown`     (I,) int64, the word that each item predicts, where `targets` are other numbers
    """

    inputs: dict[str, Tensor]
    rows: Tensor
    targets: Tensor
    example: Tensor
    sequence: Tensor
    position: Tensor | None = None
    shown: Tensor | None = None

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def counts(self) -> Tensor:
        """Return the number of counted items of each example, (B,) int64."""
        return torch.bincount(self.example, minlength=len(self.rows))

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """Return the batch on `device`."""

        def moved(value: Any) -> Any:
            if isinstance(value, Tensor):
                return value.to(device, non_blocking=non_blocking)
            if isinstance(value, dict):
                return {key: moved(item) for key, item in value.items()}
            return value

        return replace(self, **{f.name: moved(getattr(self, f.name)) for f in fields(self)})

    def cast(self, dtype: torch.dtype) -> Batch:
        """Return the batch with floating point inputs and targets in the model's `dtype`."""
        inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in self.inputs.items()}
        targets = self.targets.to(dtype) if self.targets.is_floating_point() else self.targets
        return replace(self, inputs=inputs, targets=targets)

    def sum_by_example(self, items: Tensor) -> Tensor:
        """Return the sums of (I, ...) `items` over each example's items, (B, ...) in float64."""
        total = items.new_zeros((len(self.rows), *items.shape[1:]), dtype=torch.float64)
        return total.index_add_(0, self.example, items.double())

    def uniform(self, seed: int, width: int = 1) -> Tensor:
        """Return (I, width) numbers in [0, 1), a function of (seed, row, the item's number within its example)."""
        first = torch.cumsum(self.counts, 0) - self.counts
        order = torch.argsort(self.example, stable=True)
        number = torch.empty_like(self.example)
        number[order] = torch.arange(len(order), device=order.device) - first[self.example[order]]
        keys = (self.rows[self.example][:, None].cpu(), number[:, None].cpu(), torch.arange(width)[None])
        return uniform(seed, *keys).to(self.example.device)


class Task(ABC):
    """Splits the network at its outputs, so that curvature, token scores, sentence scores and memory have one seam."""

    name: str
    loss: OutputLoss
    ahead: int = 0  # from the place whose output predicts an item to the item's own place in the example

    @abstractmethod
    def encode(self, examples: Sequence[Any]) -> list[Any]:
        """Turn raw examples (texts, mappings, tensors) into what `collate` takes: the slow step, done once."""

    @abstractmethod
    def collate(self, encoded: Sequence[Any], rows: Sequence[int]) -> Batch:
        """Build the batch of encoded examples with these row numbers."""

    def encode_marked(self, examples: Sequence[Any]) -> tuple[list[Any], np.ndarray | None]:
        """Return `encode(examples)`, and which of them were cut to a greatest length, (n,) bool, None if that is not told."""
        return self.encode(examples), None

    def training_batch(self, encoded: Sequence[Any], rows: Sequence[int], turn: int, step: int) -> Batch:
        """Build the batch that training sees in an optimizer step; what is drawn is a function of `turn` and `step`.

        `turn` counts the passes over the data, modulo the number of masks an example has.
        """
        return self.collate(encoded, rows)

    @abstractmethod
    def outputs(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the network's outputs at the counted positions only, (I, classes)."""

    def losses(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Return the loss of every item, (I,)."""
        return self.loss.losses(outputs, batch.targets)

    def length(self, encoded: Any) -> int:
        """Return the padded-to length that the example asks for: batches are sorted by it."""
        return 1

    def counted(self, encoded: Sequence[Any]) -> int:
        """Return the number of counted items of these examples."""
        return len(self.collate(encoded, range(len(encoded))).example)

    def spans(self, example: Any) -> tuple[list[tuple[int, int]], list[str]] | None:
        """Return (start, end) in the text and the name of every place of the sequence that `Batch.position` counts.

        None where the task's tokenizer tells that, or nothing does; (0, 0) for a place that is not in the text.
        """
        return None

    def item_module(self, model: nn.Module) -> nn.Module | None:
        """Return the module whose inputs are already the counted items, None if all modules see whole sequences."""
        return None

    def settings(self) -> dict[str, Any]:
        """Return what a run or manifest records of the task, JSON values only."""
        return {"name": self.name}


def logits_of(result: Any) -> Tensor:
    """Return the outputs tensor of whatever a model's forward returned."""
    if isinstance(result, Tensor):
        return result
    if isinstance(result, Mapping):
        return result["logits"]
    if hasattr(result, "logits"):
        return result.logits
    return result[0]
