"""Per-example inner products of a layer's gradient with many vectors, from its input a and its output's gradient δ.

For one call of a layer on G groups (sequences, or single counted items) of T places each, group g belonging to example
`owner[g]`, every function returns ⟨V_q, ∂/∂(parameter) of example b's loss⟩ for all b and q, (B, Q):

    linear map       Σ_t δ_tᵀ V_q a_t
    bias             Σ_t ⟨δ_t, V_q⟩
    embedding        Σ_t ⟨δ_t, V_q[id_t]⟩
    normalisation    Σ_t ⟨δ_t ∘ x̂_t, V_q⟩,  x̂ the normalised input
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, vjp, vmap
from transformers.pytorch_utils import Conv1D

from nlpinf.pieces import Room, entries

_BLOCK = 1 << 22  # entries of the per-example gradients that are held at a time: 16 MiB in float32
_SMALL = 1 << 16  # entries of a module's parameters up to which per-example gradients are formed whole
_ROOM = Room()


class Groups:
    """To which of `examples` examples each group belongs: `owner` (G,) int64, in any order."""

    def __init__(self, owner: Tensor, examples: int) -> None:
        self.owner, self.examples = owner, examples
        self.counts = torch.bincount(owner, minlength=examples)
        self.longest = int(self.counts.max()) if len(owner) else 0
        even = 0 < self.longest * examples == len(owner)
        self.regular = even and bool(
            (owner.view(examples, -1) == torch.arange(examples, device=owner.device)[:, None]).all()
        )

    def summed(self, values: Tensor) -> Tensor:
        """Return the sums over each example's groups of (G, Q) values, (B, Q)."""
        if self.regular and self.longest == 1:
            return values
        return values.new_zeros(self.examples, *values.shape[1:]).index_add_(0, self.owner, values)

    def gathered(self, values: Tensor) -> Tensor:
        """Return (G, T, d) values as (B, longest · T, d): an example's groups one after the other, zeros behind."""
        _, places, width = values.shape
        if self.regular:
            return values.reshape(self.examples, self.longest * places, width)
        order = torch.argsort(self.owner, stable=True)
        first = torch.cumsum(self.counts, 0) - self.counts
        owner = self.owner[order]
        padded = values.new_zeros(self.examples, self.longest, places, width)
        padded[owner, torch.arange(len(order), device=values.device) - first[owner]] = values[order]
        return padded.view(self.examples, self.longest * places, width)


class Matrices(ABC):
    """Q matrices V_q of one parameter (r, c) that are not held entry by entry."""

    @abstractmethod
    def __len__(self) -> int:
        """The number of matrices."""

    @abstractmethod
    def bilinear(self, left: Tensor, right: Tensor, groups: Groups) -> Tensor:
        """Return Σ_t left_tᵀ V_q right_t by example (B, Q); left (G, T, r), right (G, T, c)."""

    @abstractmethod
    def chosen(self, ids: Tensor, right: Tensor, groups: Groups) -> Tensor:
        """Return Σ_t V_q[id_t] · right_t by example (B, Q); ids (G, T), right (G, T, c)."""


def side_by_side(tensors: Sequence[Tensor] | Tensor) -> Tensor:
    """Return Q tensors as one, (Q, ...), in whose memory the Q values of an entry are neighbours.

    So `bilinear` and `embedding` read them in the order in which they lie, in which products are up to five times as fast.
    """
    return torch.stack(list(tensors), -1).movedim(-1, 0)


def bilinear(left: Tensor, right: Tensor, vectors: Tensor | Matrices, groups: Groups) -> Tensor:
    """Return Σ_t left_tᵀ V_q right_t by example; left (G, T, r), right (G, T, c), V (Q, r, c).

    Either V_q times `right` for each query, Q·G·T·r·c multiplications, or the examples' gradients Σ_t left_t right_tᵀ
    once and their inner products with all V_q, B·(T' + Q)·r·c with T' the most places of an example: the fewer.
    """
    if isinstance(vectors, Matrices):
        return vectors.bilinear(left, right, groups)
    places = groups.examples * groups.longest * left.shape[1]
    if len(vectors) * left.shape[0] * left.shape[1] <= places + groups.examples * len(vectors):
        # The smaller of V right and Vᵀ left is made: of an output layer by the width, not by the vocabulary.
        narrow = left.shape[2] > right.shape[2]
        columns = [_dots(left @ v, right) if narrow else _dots(left, right @ v.T) for v in vectors]
        return groups.summed(torch.stack(columns, 1))
    left, right = groups.gathered(left).transpose(1, 2), groups.gathered(right)
    total = left.new_zeros(groups.examples, len(vectors), dtype=torch.promote_types(left.dtype, torch.float32))
    # Blocks over examples and rows of V: the gradients of a vocabulary-sized layer for a batch would not fit in memory.
    block = entries(_BLOCK, left)
    count = max(1, min(groups.examples, block // (16 * right.shape[2])))
    step = min(left.shape[1], max(1, block // (count * right.shape[2])))
    room = _ROOM.like(left, count * step * right.shape[2])  # the same memory for all blocks
    for r in range(0, left.shape[1], step):
        rows = vectors[:, r : r + step].flatten(1).T
        for b in range(0, groups.examples, count):
            one, other = left[b : b + count, r : r + step], right[b : b + count]
            gradient = room[: len(one) * len(rows)].view(len(one), one.shape[1], other.shape[2])
            torch.bmm(one, other, out=gradient)
            total[b : b + count] += gradient.flatten(1) @ rows
    return total


def chosen(ids: Tensor, right: Tensor, vectors: Tensor | Matrices, groups: Groups) -> Tensor:
    """Return Σ_t V_q[id_t] · right_t by example; ids (G, T), right (G, T, c), V (Q, r, c)."""
    if isinstance(vectors, Matrices):
        return vectors.chosen(ids, right, groups)
    if len(vectors) == 1:
        return groups.summed(torch.linalg.vecdot(right, F.embedding(ids, vectors[0])).sum(1)[:, None])
    rows = vectors.movedim(0, -1).flatten(1)  # (r, c · Q), as they lie
    step = max(1, entries(_BLOCK, right) // max(1, rows.shape[1] * ids.shape[1]))
    found = right.new_empty(len(ids), len(vectors))
    for g in range(0, len(ids), step):
        some = rows[ids[g : g + step]].view(-1, right[0].numel(), len(vectors))
        found[g : g + step] = torch.bmm(right[g : g + step].reshape(len(some), 1, -1), some)[:, 0]
    return groups.summed(found)


def _dots(left: Tensor, right: Tensor) -> Tensor:
    """Return Σ_t ⟨left_t, right_t⟩, (G,), summed in float32 at least."""
    if left.dtype in (torch.float32, torch.float64):
        return torch.linalg.vecdot(left, right).sum(1)
    return (left * right).sum((1, 2), dtype=torch.float32)


Vectors = dict[str, Any]  # by local name: (Q, ...) tensors, or `Matrices` where the rule takes them
Rule = Callable[[Any, tuple[Tensor, ...], Tensor, Vectors, Groups], dict[str, Tensor]]


def _three(values: Tensor, trailing: int = 1) -> Tensor:
    """Return (G, ..., d) as (G, T, d), the last `trailing` dimensions being d."""
    return values.reshape(values.shape[0], -1, values.shape[-trailing:].numel())


def _bias(delta: Tensor, vectors: Tensor, groups: Groups) -> Tensor:
    return groups.summed(delta.sum(1, dtype=vectors.dtype) @ vectors.flatten(1).T)


def linear(
    module: Any, inputs: tuple[Tensor, ...], delta: Tensor, vectors: Vectors, groups: Groups
) -> dict[str, Tensor]:
    """Rule of `nn.Linear`, weight (out, in), and of transformers' `Conv1D`, weight (in, out)."""
    a, delta = _three(inputs[0]).to(delta.dtype), _three(delta)
    found = {}
    if "weight" in vectors:
        left, right = (a, delta) if isinstance(module, Conv1D) else (delta, a)
        weight = vectors["weight"]
        weight = weight if isinstance(weight, Matrices) else weight.to(delta.dtype)
        found["weight"] = bilinear(left, right, weight, groups)
    if "bias" in vectors:
        found["bias"] = _bias(delta, vectors["bias"], groups)
    return found


def embedding(
    module: Any, inputs: tuple[Tensor, ...], delta: Tensor, vectors: Vectors, groups: Groups
) -> dict[str, Tensor]:
    """Rule of `nn.Embedding`."""
    delta = _three(delta)
    ids = inputs[0].expand(delta.shape[0], *inputs[0].shape[1:]).reshape(delta.shape[0], -1)
    if module.padding_idx is not None:  # whose vector gets no gradient, wherever it stands
        delta = delta * (ids != module.padding_idx)[..., None]
    return {"weight": chosen(ids, delta, vectors["weight"], groups)}


def normalisation(
    module: Any, inputs: tuple[Tensor, ...], delta: Tensor, vectors: Vectors, groups: Groups
) -> dict[str, Tensor]:
    """Rule of `nn.LayerNorm` and `nn.RMSNorm`."""
    shape = module.normalized_shape
    found = {}
    if "weight" in vectors:
        bare = (
            F.layer_norm(inputs[0], shape, eps=module.eps)
            if isinstance(module, nn.LayerNorm)
            else F.rms_norm(inputs[0], shape, eps=module.eps)
        )
        found["weight"] = _bias(_three(delta * bare, len(shape)), vectors["weight"], groups)
    if "bias" in vectors:
        found["bias"] = _bias(_three(delta, len(shape)), vectors["bias"], groups)
    return found


def small(
    module: Any, inputs: tuple[Tensor, ...], delta: Tensor, vectors: Vectors, groups: Groups
) -> dict[str, Tensor]:
    """Rule of any module with few parameters that works on each group alone: its vector-Jacobian product by group."""
    values = {n: p.detach() for n, p in module.named_parameters(recurse=False)}
    fixed = {n: p for n, p in values.items() if n not in vectors}

    def gradient(a: Tensor, d: Tensor) -> dict[str, Tensor]:
        moved = {n: values[n] for n in vectors}
        _, pull = vjp(lambda p: functional_call(module, {**fixed, **p}, (a[None],))[0], moved)  # type: ignore[misc]
        return pull(d)[0]

    by_group = vmap(gradient)(inputs[0], delta)
    return {n: groups.summed(g.flatten(1) @ vectors[n].flatten(1).T) for n, g in by_group.items()}


def takes_matrices(module: nn.Module, local: str) -> bool:
    """Say whether the module's rule takes `Matrices` for its parameter of this name."""
    return local == "weight" and rule_of(module) in (linear, embedding)


def rule_of(module: nn.Module) -> Rule | None:
    """Return the rule of a module that holds parameters of its own, None if it has none.

    By exact type: a subclass may compute something else.
    """
    kind = type(module)
    if kind in (nn.Linear, Conv1D):
        return linear
    if kind is nn.Embedding:
        return None if module.max_norm is not None or module.scale_grad_by_freq or module.sparse else embedding
    if kind in (nn.LayerNorm, nn.RMSNorm):
        return normalisation
    own = list(module.parameters(recurse=False))
    leaf = next(module.children(), None) is None
    return small if leaf and own and sum(p.numel() for p in own) <= _SMALL else None
