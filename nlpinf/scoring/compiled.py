"""Reverse mode as one compiled graph: what the layers' rules need, without the cost of a network run operation by operation.

Every layer that a rule covers is followed by the identity, whose backward pass hands the layer's input a and its output's
gradient δ to the rule (`layers.py`) and adds the result to the gradient of a zero tensor s (B, Q): after one forward and one
backward pass that gradient is the scores' part of all layers inside. `torch.compile` fuses what lies between the layers, for
batches of every shape at once; attention takes its fused kernels, which only forward mode and second derivatives forbid. The
output layer and the loss are done in chunks, as ever (`head.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any, ClassVar

import torch
import torch._inductor.config
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from transformers.pytorch_utils import Conv1D

from nlpinf import products
from nlpinf.evaluation import replaced
from nlpinf.scoring.forward import BatchScores
from nlpinf.scoring.layers import Groups, Rule, Vectors, embedding, linear, normalisation, rule_of
from nlpinf.scoring.reverse import ReverseScorer, lowered, through_head
from nlpinf.tasks import Batch
from nlpinf.tasks.base import logits_of

FUSED = 1  # queries up to which the rules are part of the graph
_TRACED = (linear, embedding, normalisation)
# Places of a row: at 27 and 49 attention unfused takes three quarters and five sixths of the fused kernel's time, at 250 as long.
_UNFUSED_UP_TO = 128
# Largest disagreement with the same scores uncompiled, relative to their layers' shares.
_TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-3}


class CannotCompile(Exception):
    """The stage's scores cannot be compiled; the message says why."""


class _Pass:
    """What the rules need in the backward pass that runs now, by the layers' numbers."""

    layers: ClassVar[list[tuple[nn.Module, Rule, Vectors]]] = []
    groups: ClassVar[Groups]


@torch.library.custom_op("nlpinf::share", mutates_args=())
def _share(a: Tensor, delta: Tensor, queries: int, layer: int) -> Tensor:
    module, rule, vectors = _Pass.layers[layer]
    found = rule(module, (a,), delta, vectors, _Pass.groups)
    return torch.stack([share.double() for share in found.values()]).sum(0)


@_share.register_fake
def _(a: Tensor, delta: Tensor, queries: int, layer: int) -> Tensor:
    return delta.new_empty((delta.shape[0], queries), dtype=torch.float64)


class _Alone(Groups):
    """Every group an example of its own."""

    def __init__(self, examples: int) -> None:
        self.examples, self.longest, self.regular = examples, 1, True


class _Tap(torch.autograd.Function):
    """The identity of y; its backward pass adds the layer's share to the gradient of s."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, a: Tensor, s: Tensor, layer: int) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(a)
        ctx.layer, ctx.queries = layer, s.shape[1]
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, delta: Tensor) -> Any:  # type: ignore[override]
        (a,) = ctx.saved_tensors
        module, rule, vectors = _Pass.layers[ctx.layer]
        if ctx.queries > FUSED or rule not in _TRACED:
            return delta, None, _share(a, delta, ctx.queries, ctx.layer), None
        found = rule(module, (a,), delta, vectors, _Alone(len(delta)))
        return delta, None, sum(share.double() for share in found.values()), None


class CompiledScorer:
    """Scores batches as `ReverseScorer` does, compiled by a backend of `torch.compile`; with the weights that there are now.

    Raises `CannotCompile` where that is not possible.
    """

    def __init__(self, reverse: ReverseScorer, backend: str = "inductor") -> None:
        self.reverse, self.stage = reverse, reverse.stage
        if reverse.head is None or reverse.uncovered:
            lacking = f"no rule for {reverse.uncovered[0]}" if reverse.uncovered else "no plain output layer"
            raise CannotCompile(lacking)
        self.head = reverse.head
        inside = {module: names for module, names in reverse.calls.items() if module is not reverse.head.module}
        self._layers: list[tuple[nn.Module, Rule, Vectors]] = []
        self._forwards: list[tuple[nn.Module, Callable[..., Tensor]]] = []
        s = [torch.zeros(2, len(reverse.vectors), dtype=torch.float64, requires_grad=True)]
        dtype = self.stage.dtype
        for module, names in inside.items():
            vectors = {local: reverse.stacked[name] for local, name in names.items() if name in reverse.stacked}
            rule = rule_of(module)
            if rule is linear and names.get("weight") in reverse.low:
                vectors["weight"] = reverse.low[names["weight"]]
            if vectors and rule is not None:
                self._forwards.append((module, _tapped(module, len(self._layers), s)))
                self._layers.append((module, rule, vectors))

        # Products round their matrices to low precision; those of linear maps alone are rounded here, not for every batch.
        elsewhere = {
            name for module, names in inside.items() if rule_of(module) is not linear for name in names.values()
        }
        matrices = {names["weight"] for m, names in inside.items() if rule_of(m) is linear and "weight" in names}
        self._parameters = {
            name: lowered(self.stage, tensor.detach()) if name in matrices - elsewhere else tensor.detach()
            for name, tensor in self.stage.parameters.items()
        }

        def hidden(parameters: dict[str, Tensor], inputs: dict[str, Tensor], zero: Tensor) -> Tensor:
            s[0] = zero
            with precision():
                return logits_of(functional_call(self.stage.model, parameters, (), inputs)).to(dtype)

        def precision() -> Any:
            if self.stage.precision is None:
                return nullcontext()
            return torch.autocast(self.stage.device.type, getattr(torch, self.stage.precision), cache_enabled=False)

        self._hidden = torch.compile(hidden, dynamic=True, fullgraph=True, backend=backend)
        for batch in reverse.probes:
            self._try(batch)

    def _try(self, batch: Batch) -> None:
        """Raise `CannotCompile` if compiling fails, in whatever way, or gives other scores."""
        try:
            found = self._scores(batch)
        except Exception as error:
            raise CannotCompile(f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}") from error
        losses, shares = self.reverse.shares(batch, self.reverse.stacked)
        scale = torch.stack(list(shares.values())).norm()
        tolerance = _TOLERANCE.get(self.stage.dtype, 0.1) if self.stage.precision is None else 0.1
        for mine, theirs, size in ((found.scores, sum(shares.values()), scale), (found.losses, losses, losses.norm())):
            if not bool((mine - theirs).norm() <= tolerance * size):
                raise CannotCompile(f"its scores differ from the others by {float((mine - theirs).norm() / size):.1e}")

    def __call__(self, batch: Batch) -> BatchScores:
        # A dimension of 1 would be compiled on its own; such batches are few and small.
        if any(size == 1 for value in batch.inputs.values() for size in value.shape[:2]):
            return self.reverse(batch)
        try:
            return self._scores(batch)
        except torch._dynamo.exc.TorchDynamoException:  # this shape is one of too many kinds
            return self.reverse(batch)

    def _scores(self, batch: Batch) -> BatchScores:
        stage, head = self.stage, self.head
        if batch.position is None:
            raise CannotCompile("its items are not places of a sequence")
        weights = stage.item_weights(batch)
        zero = torch.zeros(len(batch.sequence), len(self.reverse.vectors), dtype=torch.float64, device=weights.device)
        with self._installed(batch), torch.enable_grad():
            # The limit is shared by all scorers of a process; the patterns would put fused attention back.
            with torch._dynamo.config.patch(recompile_limit=64), torch._inductor.config.patch(pattern_matcher=False):
                end = self._hidden(self._parameters, batch.inputs, zero.requires_grad_(True)).flatten(0, 1)
            with torch.no_grad():
                x = end.detach()[batch.position]
                losses, cotangent, shares = through_head(
                    head, stage, x, weights, batch, self.reverse.stacked, self.reverse.low
                )
                whole = torch.zeros_like(end).index_copy_(0, batch.position, cotangent)
            (inside,) = torch.autograd.grad(end, zero, whole)
        scores = torch.zeros(len(batch), len(self.reverse.vectors), dtype=torch.float64, device=weights.device)
        scores.index_add_(0, batch.sequence, inside)
        return BatchScores(batch.sum_by_example(losses.double() * weights), sum(shares.values(), scores), None)

    @contextmanager
    def _installed(self, batch: Batch) -> Iterator[None]:
        model, head = self.stage.model, self.head
        modes = [(module, module.training) for module in model.modules()]
        with ExitStack() as stack:
            for module, forward in [*self._forwards, (head.module, _identity)]:
                stack.enter_context(replaced(module, forward))
            if self.stage.device.type == "cpu":
                stack.enter_context(_attention())
            stack.enter_context(products.fast())
            model.eval()
            _Pass.layers, _Pass.groups = self._layers, Groups(torch.arange(len(batch.sequence)), len(batch.sequence))
            try:
                yield
            finally:
                _Pass.layers = []
                for module, training in modes:
                    module.training = training


@contextmanager
def _attention() -> Iterator[None]:
    """Run attention in float32 at least within, where its backward pass takes a fifth of the time, and unfused on short rows.

    The fused kernel's many small products take longer than those of whole batches, which a short row has memory for.
    """
    fused = F.scaled_dot_product_attention

    def attention(
        query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *args: Any, **kwargs: Any
    ) -> Tensor:
        dtype = torch.promote_types(query.dtype, torch.float32)
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            attn_mask = torch.zeros((), dtype=dtype).masked_fill(~attn_mask, -torch.inf)
        elif attn_mask is not None:
            attn_mask = attn_mask.to(dtype)
        with torch.autocast(query.device.type, enabled=False):
            given = query.to(dtype), key.to(dtype), value.to(dtype), attn_mask
            if key.shape[-2] <= _UNFUSED_UP_TO:
                return torch.ops.aten._scaled_dot_product_attention_math(*given, *args, **kwargs)[0]
            return fused(*given, *args, **kwargs)

    F.scaled_dot_product_attention = attention
    try:
        yield
    finally:
        F.scaled_dot_product_attention = fused


def _identity(x: Tensor) -> Tensor:
    return x


def _unfused(module: nn.Module, x: Tensor) -> Tensor:
    """A linear map whose bias is added to what the product gave, with the operations that follow, not copied before it."""
    weight, bias = module.weight, module.bias
    y = x @ weight if isinstance(module, Conv1D) else F.linear(x, weight)  # type: ignore[arg-type, operator]
    return y if bias is None else y + bias.to(y.dtype)  # type: ignore[union-attr, operator]


def _tapped(module: nn.Module, number: int, s: list[Tensor]) -> Callable[..., Tensor]:
    plain = _unfused if rule_of(module) is linear else type(module).forward

    def forward(x: Tensor) -> Tensor:
        y = plain(module, x)
        if type(module) is nn.Embedding and y.shape[0] == 1:
            y = y.expand(s[0].shape[0], *y.shape[1:])
        a = x.detach()
        return _Tap.apply(y, a.to(y.dtype) if a.is_floating_point() else a, s[0], number)

    return forward
