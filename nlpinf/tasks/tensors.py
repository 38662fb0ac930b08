"""Tasks on plain tensors for any `torch.nn.Module`: classification (of whole examples or of their steps) and regression."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nlpinf.errors import BadInput
from nlpinf.tasks.base import Batch, Task, logits_of
from nlpinf.tasks.losses import CrossEntropy, OutputLoss, SquaredError

NOT_COUNTED = -100  # the label that PyTorch and Hugging Face give to positions without a loss


class _TensorTask(Task):
    """Examples are pairs (input, target); inputs of unequal length are padded with zeros on the right."""

    def __init__(self, argument: str | None = None) -> None:
        self.argument = argument

    def encode(self, examples: Sequence[Any]) -> list[tuple[Tensor, Tensor]]:
        return [(torch.as_tensor(x), torch.as_tensor(y)) for x, y in examples]

    def length(self, encoded: Any) -> int:
        return int(encoded[0].shape[0]) if encoded[0].dim() and not encoded[0].is_floating_point() else 1

    def collate(self, encoded: Sequence[tuple[Tensor, Tensor]], rows: Sequence[int]) -> Batch:
        inputs = _stacked([x for x, _ in encoded], 0)
        targets = self._targets([y for _, y in encoded])
        indices = torch.arange(len(encoded))
        if targets.dim() > 1 and not targets.is_floating_point():  # one label a step
            counted = (targets != NOT_COUNTED).nonzero()
            example, position = counted[:, 0], counted[:, 0] * targets.shape[1] + counted[:, 1]
            targets = targets.reshape(-1)[position]
        else:
            example, position = indices, None
        return Batch({self.argument or "input": inputs}, torch.as_tensor(rows), targets, example, indices, position)

    def outputs(self, model: nn.Module, batch: Batch) -> Tensor:
        values = batch.inputs[self.argument or "input"]
        result = logits_of(model(values) if self.argument is None else model(**{self.argument: values}))
        return result if batch.position is None else result.flatten(0, -2)[batch.position]

    def _targets(self, targets: list[Tensor]) -> Tensor:
        return _stacked(targets, NOT_COUNTED)


class Classification(_TensorTask):
    """Cross-entropy of `model(x)`: logits (B, classes) with labels (), or (B, steps, classes) with labels (steps,).

    A label of −100 is not counted. `argument` names the model's keyword for x; without it x is passed first.
    """

    name = "classification"
    loss: OutputLoss = CrossEntropy()


class Regression(_TensorTask):
    """½ ‖model(x) − y‖², summed over all values of an example: y (values,), or (steps, values) and so on."""

    name = "regression"
    loss: OutputLoss = SquaredError()

    def outputs(self, model: nn.Module, batch: Batch) -> Tensor:
        values = super().outputs(model, batch)
        return values[:, None] if values.dim() == 1 else values.flatten(1)

    def _targets(self, targets: list[Tensor]) -> Tensor:
        stacked = torch.stack(targets)
        stacked = stacked if stacked.is_floating_point() else stacked.to(torch.get_default_dtype())
        return stacked[:, None] if stacked.dim() == 1 else stacked.flatten(1)


def _stacked(tensors: list[Tensor], fill: int) -> Tensor:
    if len({tensor.shape for tensor in tensors}) == 1:
        return torch.stack(tensors)
    if any(tensor.dim() != 1 for tensor in tensors):
        raise BadInput("examples have inputs of different shapes; only 1-d inputs are padded, so make the others equal")
    return nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=fill)
