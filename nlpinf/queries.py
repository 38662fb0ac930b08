"""Query: a scalar q of the last stage's model, lower being better, and its gradient."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from nlpinf import parameters as P
from nlpinf import processes, sharded
from nlpinf.errors import BadInput
from nlpinf.parameters import Parameters
from nlpinf.stages import Stage, evaluation
from nlpinf.tasks import Batch, CrossEntropy

OutputsToScalar = Callable[[Tensor, Batch], Tensor]


@dataclass(frozen=True)
class Query:
    """q(W, Θ) over `examples` of the last stage's task.

    A score's sign follows q: positive = the pretraining example raises q. So that positive means harmful for every
    query, each kind is one of which less is better: a loss, or a margin with the other sign.
    """

    kind: Literal["loss", "mean_loss", "margin", "function"]
    examples: tuple[Any, ...]
    name: str = ""
    function: OutputsToScalar | None = None

    @classmethod
    def loss(cls, example: Any, name: str = "") -> Query:
        """Return q = the loss of one example (the mean of its counted losses)."""
        return cls("loss", (example,), name or f"loss of {_shown(example)}")

    @classmethod
    def mean_loss(cls, examples: Sequence[Any], name: str = "") -> Query:
        """Return q = the mean over `examples` of each one's loss."""
        if not len(examples):
            raise BadInput("a mean loss needs at least one example")
        return cls("mean_loss", tuple(examples), name or f"mean loss of {len(examples)} examples")

    @classmethod
    def margin(cls, example: Any, name: str = "") -> Query:
        """Return q = max_{c ≠ y} o_c − o_y, the logit margin by which a wrong class leads: negative where y wins."""
        return cls("margin", (example,), name or f"margin of {_shown(example)}")

    @classmethod
    def of(cls, function: OutputsToScalar, examples: Sequence[Any], name: str = "") -> Query:
        """Return q = function(outputs, batch), outputs (items, classes) of all `examples` in one batch, in their order."""
        return cls("function", tuple(examples), name or getattr(function, "__name__", "function"), function)

    def value(self, stage: Stage, changed: Parameters | None = None) -> float:
        """Return q at the stage's parameters, with those in `changed` in their place."""
        with evaluation(stage.model), torch.no_grad():
            turns = processes.turns(self._batches(stage), sharded.is_sharded(stage.model))
            return processes.total_of(sum(float(self._part(stage, batch, changed, own)) for batch, own in turns))

    def gradient(self, stage: Stage) -> Parameters:
        """Return (q_W, q_Θ): ∇q by name for every parameter of the stage's model, trained or not."""
        sums = P.sums_like(stage.parameters)
        with evaluation(stage.model):
            for batch, own in processes.turns(self._batches(stage), sharded.is_sharded(stage.model)):
                gradients = sharded.gradients(
                    stage.model, stage.parameters, partial(self._part, stage, batch, weight=own)
                )
                for total, gradient in zip(sums.values(), gradients):
                    total += gradient
        result = P.mean_like(processes.total(sums), 1, stage.parameters)
        if not P.finite(result):
            raise BadInput(
                f"the gradient of query {self.name!r} is not finite; check the example and the model's weights"
            )
        return result

    def truncated(self, stage: Stage) -> int:
        """Return how many examples are longer than the task takes, so that q is of their beginnings; 0 if it does not tell."""
        _, cut = stage.task.encode_marked(list(self.examples))
        return 0 if cut is None else int(cut.sum())

    def _batches(self, stage: Stage) -> list[Batch]:
        task = stage.task
        encoded = task.encode(list(self.examples))
        size = len(encoded) if self.kind == "function" else stage.batch_size
        # Row numbers of queries start where the corpus ends, so that their masks are their own.
        return [
            stage.on_device(
                task.collate(encoded[i : i + size], [stage.size + j for j in range(i, min(i + size, len(encoded)))])
            )
            for i in range(0, len(encoded), size)
        ]

    def _part(self, stage: Stage, batch: Batch, changed: Parameters | None = None, weight: float = 1.0) -> Tensor:
        """Return `weight` times the batch's part of q."""
        outputs = stage.outputs(batch, changed)
        if self.kind == "function":
            assert self.function is not None
            return self.function(outputs, batch) * weight
        if self.kind == "margin":
            if not isinstance(stage.task.loss, CrossEntropy) or len(outputs) != 1:
                raise BadInput(f"a margin needs a classifier with one label an example; {stage.task.name} is none")
            own = outputs.gather(-1, batch.targets[:, None])
            others = outputs.scatter(-1, batch.targets[:, None], float("-inf"))
            return (others.amax(-1) - own[:, 0]).sum() * weight
        weights = batch.counts.clamp(min=1).to(outputs.dtype).reciprocal()[batch.example]
        return (stage.task.losses(outputs, batch) * weights).sum() * weight / len(self.examples)


def _shown(example: Any) -> str:
    text = example.get("text") if isinstance(example, dict) else example
    if not isinstance(text, str):
        return "an example"
    return repr(text if len(text) <= 60 else text[:57] + "...")
