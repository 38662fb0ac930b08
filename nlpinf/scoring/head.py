"""A language model's output layer, applied to the hidden states of counted items in chunks.

(items × vocabulary) is the largest tensor of a language model by far, so it never exists whole: with x the hidden
states, o = W x + b the outputs and ℓ the items' losses, each chunk goes from x to what is asked and is forgotten.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nlpinf.evaluation import evaluation, replaced
from nlpinf.parameters import Parameters
from nlpinf.pieces import Room, entries
from nlpinf.stages import Stage
from nlpinf.tasks import Batch, CrossEntropy, OutputLoss, Task

CHUNK = 1 << 22  # outputs that exist at a time: 16 MiB in float32; less loses to more calls, more to memory traffic
_ROOM = Room()


@dataclass(frozen=True)
class Head:
    """The linear output layer `module` of a stage; `weight` and `bias` are its parameters' names in the model."""

    module: nn.Linear
    weight: str
    bias: str | None

    def hidden(self, run: Callable[[], Any]) -> Tensor:
        """Return what `run` hands to the layer, (I, d), without applying the layer."""
        seen: list[Tensor] = []

        def instead(x: Tensor) -> Tensor:
            seen.append(x)
            return x[..., :1]

        with replaced(self.module, instead):
            run()
        (x,) = seen
        return x.to(self.module.weight.dtype)  # of a network in low precision; the output layer and the loss are not

    def tangents(
        self,
        loss: OutputLoss,
        parameters: Parameters,
        vector: Parameters,
        targets: Tensor,
        x: Tensor,
        moved: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Return ℓ and dℓ/dt of every item, (I,) each, for x moving by `moved` and the layer by `vector`."""
        weight, bias = parameters[self.weight], None if self.bias is None else parameters[self.bias]
        step, shift = vector.get(self.weight), None if self.bias is None else vector.get(self.bias)
        losses, tangents = x.new_empty(len(x)), x.new_zeros(len(x))
        parts = list(self.parts(x, entries(CHUNK, x)))
        longest = max((part.stop - part.start for part in parts), default=0)
        room = _ROOM.like(x, 2, longest, len(weight))  # the same memory for all chunks
        for part in parts:
            outputs, change = room[:, : part.stop - part.start]
            _affine(outputs, x[part], weight, bias)
            change.zero_() if shift is None else change.copy_(shift.expand_as(change))
            if moved is not None:
                change.addmm_(moved[part], weight.T)
            if step is not None:
                change.addmm_(x[part], step.T)
            losses[part], tangents[part] = _loss_and_tangent(loss, outputs, targets[part], change)
        return losses, tangents

    def parts(self, x: Tensor, chunk: int) -> Iterator[slice]:
        """Yield slices of the items with at most `chunk` outputs each."""
        size = max(1, chunk // len(self.module.weight))
        yield from (slice(start, min(start + size, len(x))) for start in range(0, len(x), size))

    def cotangents(
        self, stage: Stage, targets: Tensor, scale: Tensor, x: Tensor, part: slice, low: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return ℓ (n,), δ = scale · ∂ℓ/∂o (n, classes) and Wᵀ δ (n, d) of the items in `part`.

        δ and Wᵀ δ are of the dtype of `low`, the weight in the stage's precision. The next call overwrites δ.
        """
        weight, bias = stage.parameters[self.weight], None if self.bias is None else stage.parameters[self.bias]
        with _low_products(stage):
            outputs = _affine(_ROOM.like(x, part.stop - part.start, len(weight)), x[part], weight, bias)
        losses = _loss_to_cotangent(stage.task.loss, outputs, targets[part], scale[part])
        delta = outputs.to(low.dtype)
        return losses, delta, delta @ low


def linear_head(stage: Stage, batch: Batch) -> Head | None:
    """Return the stage's output layer if it is plainly linear and its outputs are the model's as they stand, else None.

    Settled by running `batch` once: a model that caps or scales its logits hands on another tensor than the layer's.
    """
    module = stage.task.item_module(stage.model)
    if type(module) is not nn.Linear or type(stage.task).losses is not Task.losses:
        return None
    first = {id(parameter): name for name, parameter in stage.model.named_parameters()}
    if id(module.weight) not in first or (module.bias is not None and id(module.bias) not in first):
        return None
    seen: list[tuple[Any, Any]] = []
    handle = module.register_forward_hook(lambda _, args, out: seen.append((args[0], out)))
    try:
        with evaluation(stage.model), torch.no_grad():
            outputs = stage.at(None).outputs(batch)
    finally:
        handle.remove()
    if len(seen) != 1 or outputs is not seen[0][1] or seen[0][0].shape[:-1] != batch.example.shape:
        return None
    return Head(module, first[id(module.weight)], None if module.bias is None else first[id(module.bias)])


@contextmanager
def _low_products(stage: Stage) -> Iterator[None]:
    """Let float32 matrix products of a stage in bfloat16 round their factors to it; sums and results stay float32."""
    settings = getattr(torch.backends.mkldnn, "matmul", None)  # from PyTorch 2.9 on
    if stage.precision != "bfloat16" or settings is None:
        yield
        return
    before, settings.fp32_precision = settings.fp32_precision, "bf16"
    try:
        yield
    finally:
        settings.fp32_precision = before


def _affine(out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.mm(x, weight.T, out=out) if bias is None else torch.addmm(bias, x, weight.T, out=out)


def _loss_and_tangent(loss: OutputLoss, outputs: Tensor, targets: Tensor, change: Tensor) -> tuple[Tensor, Tensor]:
    if not isinstance(loss, CrossEntropy):
        return loss.losses(outputs, targets), loss.tangents(outputs, targets, change)
    # ℓ = m + log Σ exp(o − m) − o_t and dℓ/dt = Σ p u − u_t from one exponential, in place.
    own, own_change = (t.gather(-1, targets[:, None])[:, 0] for t in (outputs, change))
    largest = outputs.amax(-1)
    total = outputs.sub_(largest[:, None]).exp_().sum(-1)
    return largest + total.log() - own, torch.linalg.vecdot(outputs, change) / total - own_change


def _loss_to_cotangent(loss: OutputLoss, outputs: Tensor, targets: Tensor, scale: Tensor) -> Tensor:
    """Return ℓ and leave scale · ∂ℓ/∂o in `outputs`."""
    if not isinstance(loss, CrossEntropy):
        losses = loss.losses(outputs, targets)
        outputs.copy_(loss.gradient(outputs, targets)).mul_(scale[:, None])
        return losses
    # ℓ = m + log Σ exp(o − m) − o_t and ∂ℓ/∂o = p − e_t from one exponential, in place.
    own = outputs.gather(-1, targets[:, None])[:, 0]
    largest = outputs.amax(-1)
    total = outputs.sub_(largest[:, None]).exp_().sum(-1)
    outputs.mul_((scale / total)[:, None])
    outputs[torch.arange(len(targets), device=targets.device), targets] -= scale
    return largest + total.log() - own
