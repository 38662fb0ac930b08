"""Gradients of single examples, kept as the products of the two sides that they are made of, for every kind of layer.

What is differentiated is a square root of the Gauss-Newton matrix at the outputs, so that second moments of these
gradients are curvature: with B = ∂²ℓ/∂o² = S Sᵀ of an item and w its weight in g(z), the cotangents are u = √w S ε with
random signs ε, so that E u uᵀ = w B, and G_b, the gradient of example b, has E Σ_b vec(G_b) vec(G_b)ᵀ = Σ w Jᵀ B J. Unlike
a drawn target this gives every class its share, rare words too: u_c² is near w B_cc in every draw. Up to `EXACT` outputs the
columns of S are taken one after the other, with one sign an item: exact for examples of one item.

A linear map's gradient is Σ_t δ_t a_tᵀ, with a_t what enters and δ_t the gradient at what leaves in place t; calls of the
same layer, and uses of a tied weight, only add places. A place that does not count has δ = 0. So neither padding nor the
size of the batch plays a part. A layer whose places cannot be told apart by example is done one example at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.func import functional_call, vjp, vmap
from transformers.pytorch_utils import Conv1D

from nlpinf import processes
from nlpinf.parameters import Parameters
from nlpinf.pieces import pieces
from nlpinf.stages import Stage, evaluation
from nlpinf.tasks import Batch

EXACT = 8  # outputs up to which B^½ is taken column by column
_SMALL = 1 << 16  # entries of a module's parameters up to which its gradients are formed group by group


@dataclass(frozen=True)
class Outer:
    """G_b = Σ_t left_t right_tᵀ; left (B, T, r), right (B, T, c)."""

    left: Tensor
    right: Tensor


@dataclass(frozen=True)
class Rows:
    """G_b = Σ_t e(id_t) right_tᵀ, of an embedding; ids (B, T), right (B, T, c)."""

    ids: Tensor
    right: Tensor


@dataclass(frozen=True)
class Whole:
    """G_b itself; values (B, *shape of the parameter)."""

    values: Tensor


Use = Outer | Rows | Whole
Uses = dict[str, list[Use]]


def square_roots(stage: Stage, batch: Batch, outputs: Tensor, seed: int) -> Iterator[Tensor]:
    """Yield the cotangents u (I, classes) of the module's docstring; their signs are a function of (seed, row, item)."""
    weights, loss, targets = stage.item_weights(batch).sqrt()[:, None], stage.task.loss, batch.targets
    drawn = _drawn(batch, seed, outputs.shape[1] if outputs.shape[1] > EXACT else 1)
    bits = torch.arange(256, device=drawn.device)[:, None] >> torch.arange(8, device=drawn.device) & 1
    table = (1 - 2 * bits).to(outputs)  # of every byte, a sign for each of its bits
    if outputs.shape[1] > EXACT:
        found = torch.empty_like(outputs)
        for part in pieces(outputs):
            product = loss.root_product(outputs[part], targets[part], _signs(drawn[part], table, outputs.shape[1]))
            torch.mul(product, weights[part], out=found[part])
        yield found
        return
    signs = _signs(drawn, table, 1)
    for unit in torch.eye(outputs.shape[1], dtype=outputs.dtype, device=outputs.device):
        yield weights * signs * loss.root_product(outputs, targets, unit.expand_as(outputs))


def _drawn(batch: Batch, seed: int, width: int) -> Tensor:
    """Return random bytes (I, at least width / 8) in int64, six from each number that is drawn."""
    drawn = (batch.uniform(seed, -(-width // 48)) * 2**48).long()
    return (drawn[:, :, None] >> torch.arange(0, 48, 8, device=drawn.device) & 255).flatten(1)


def _signs(drawn: Tensor, table: Tensor, width: int) -> Tensor:
    """Return −1 or 1 (I, width) for the bits of random bytes (I, bytes)."""
    return F.embedding(drawn, table).flatten(1)[:, :width]


class PerExample:
    """Takes the gradients of single examples for the parameters `names` of a stage.

    `together`  those that a batch gives at once; the others are taken from batches of one example
    """

    def __init__(self, stage: Stage, names: Sequence[str], seed: int = 0) -> None:
        self.stage, self.seed = stage, seed
        self.together = list(names)
        few = probes(stage)
        for chosen in few:
            for batch in stage.batches(chosen):
                self.together = self._agreed(self.together, batch, alone=False)
        self.apart = [n for n in names if n not in self.together]
        self._hooked = list(self.apart)  # of these, the ones that layers give where all places are of one example
        for i in {i for chosen in few for i in chosen}:
            for batch in stage.batches([i]):
                self._hooked = self._agreed(self._hooked, batch, alone=True)

    def __call__(self, indices: Sequence[int]) -> Iterator[Uses]:
        """Yield the gradients of the examples at `indices`, a parameter's uses by name, one batch and column at a time.

        In a group of processes those of this one's share of the batches.
        """
        if self.together:
            for batch in processes.share(self.stage.batches(indices)):
                yield from self._columns(batch, self.together, self.together, alone=False)
        if self.apart:
            for i in processes.share(indices):
                for batch in self.stage.batches([i]):
                    yield from self._columns(batch, self.apart, self._hooked, alone=True)

    def _columns(self, batch: Batch, names: list[str], hooked: list[str], alone: bool) -> Iterator[Uses]:
        with evaluation(self.stage.model), torch.enable_grad():
            calls, leaves, outputs = self._forward(batch, names, hooked, alone)
            if calls.odd:  # layers that take this batch otherwise than those that were looked at
                hooked = [name for name in hooked if name not in calls.odd]
                calls, leaves, outputs = self._forward(batch, names, hooked, alone)
            if not outputs.requires_grad or not len(outputs):
                return
            for u in square_roots(self.stage, batch, outputs.detach(), self.seed):
                if alone or not leaves:
                    yield calls.gradients(outputs, u, leaves)
                    continue
                yield calls.gradients(outputs, u, {})
                for b in range(len(batch)):
                    yield _by_autograd(outputs, u * (batch.example == b)[:, None], leaves)

    def _forward(
        self, batch: Batch, names: list[str], hooked: list[str], alone: bool
    ) -> tuple[_Calls, Parameters, Tensor]:
        leaves = {n: self.stage.parameters[n].clone().requires_grad_(True) for n in names if n not in hooked}
        frozen = {n: self.stage.parameters[n] for n in self.stage.parameters if n not in leaves}
        calls = _Calls(self.stage, batch, set(hooked), alone)
        with calls.watched():
            outputs = self.stage.outputs(batch, frozen | leaves)
        return calls, leaves, outputs

    def _agreed(self, names: list[str], batch: Batch, alone: bool) -> list[str]:
        """Return those of `names` whose gradients by layer are what autograd finds, example by example."""
        if not names:
            return []
        generator = torch.Generator().manual_seed(0)
        with evaluation(self.stage.model), torch.enable_grad():
            theta = {n: self.stage.parameters[n].clone().requires_grad_(True) for n in names}
            plain = self.stage.outputs(batch, theta)
            if not len(plain):
                return names
            u = torch.randn(plain.shape, generator=generator, dtype=torch.float64).to(plain)
            truth = [
                torch.autograd.grad(
                    plain, list(theta.values()), u * (batch.example == b)[:, None], retain_graph=True,
                    materialize_grads=True, allow_unused=True,
                )
                for b in range(len(batch))
            ]  # fmt: skip
            calls, _, outputs = self._forward(batch, names, names, alone)
            found = calls.gradients(outputs, u, {}) if outputs.requires_grad else {}
        tolerance = {torch.float64: 1e-8, torch.float32: 2e-3}.get(self.stage.dtype, 5e-2)
        largest = max(float(g.norm()) for grads in truth for g in grads)
        agreed = []
        for k, name in enumerate(names):
            if name in calls.odd:
                continue
            right = torch.stack([grads[k] for grads in truth])
            ours = dense(found.get(name, []), right.shape).to(right)
            # A gradient that is zero up to rounding (a key's bias) is held to the rounding of the others.
            if float((ours - right).norm()) <= tolerance * (float(right.norm()) + 1e-3 * largest):
                agreed.append(name)
        return agreed


def _by_autograd(outputs: Tensor, cotangent: Tensor, leaves: Parameters) -> Uses:
    found = torch.autograd.grad(outputs, list(leaves.values()), cotangent, retain_graph=True, allow_unused=True)
    return {name: [Whole(g[None])] for name, g in zip(leaves, found) if g is not None}


def dense(uses: Sequence[Use], shape: Sequence[int]) -> Tensor:
    """Return the gradients (B, *shape of the parameter) that the uses add up to."""
    total: Any = 0
    for use in uses:
        if isinstance(use, Whole):
            part = use.values
        elif isinstance(use, Outer):
            part = use.left.mT @ use.right
        else:
            part = use.right.new_zeros(len(use.ids), shape[1], use.right.shape[-1])
            part.scatter_add_(1, use.ids[..., None].expand_as(use.right), use.right)
        total = total + part.reshape(tuple(shape))
    return total if uses else torch.zeros(tuple(shape))


class _Calls:
    """What enters the layers in one forward pass, and where the gradients at what leaves them are to be had."""

    def __init__(self, stage: Stage, batch: Batch, names: set[str], alone: bool) -> None:
        first = {id(p): n for n, p in stage.model.named_parameters()}
        self.owned: dict[nn.Module, dict[str, str]] = {}
        for module in stage.model.modules():
            own = {k: first[id(p)] for k, p in module._parameters.items() if p is not None and first[id(p)] in names}
            if own and kind_of(module) is not None:
                self.owned[module] = own
        self.alone, self.examples = alone, len(batch)
        head = stage.task.item_module(stage.model)
        self.item_modules = set() if head is None else set(head.modules())
        self.owners = {True: batch.example, False: batch.sequence}
        self.seen: list[tuple[nn.Module, Tensor, Any, Tensor]] = []
        self.odd: set[str] = set()

    @contextmanager
    def watched(self) -> Iterator[None]:
        handles = [m.register_forward_hook(self._leave, with_kwargs=True) for m in self.owned]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _leave(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
        owner = self.owners[module in self.item_modules]
        if kwargs or len(args) != 1 or not isinstance(args[0], Tensor) or not isinstance(out, Tensor):
            return self._refuse(module)
        if self.alone:
            owner = owner.new_zeros(1)
            if kind_of(module) not in ("linear", "embedding"):
                return self._refuse(module)
        elif kind_of(module) == "embedding" and out.shape[0] == 1 < len(owner):
            out = out.expand(len(owner), *out.shape[1:])  # places that all sequences share: each its own gradient
        elif args[0].shape[:1] != owner.shape or out.shape[:1] != owner.shape:
            return self._refuse(module)
        if not out.requires_grad:
            out = out.detach().requires_grad_(True)
        self.seen.append((module, args[0].detach(), get_gradient_edge(out), owner))
        return out.clone() if out.is_leaf else out  # the network may change its own tensor in place, but not a leaf

    def _refuse(self, module: nn.Module) -> None:
        self.odd.update(self.owned[module].values())

    def gradients(self, outputs: Tensor, cotangent: Tensor, leaves: Parameters) -> Uses:
        """Return the uses of every parameter for the cotangent u of the outputs."""
        edges = [edge for _, _, edge, _ in self.seen]
        found = torch.autograd.grad(
            outputs, [*edges, *leaves.values()], cotangent, retain_graph=True, allow_unused=True
        )
        uses: Uses = {}
        with torch.no_grad():
            for (module, a, _, owner), delta in zip(self.seen, found):
                if delta is not None:
                    for local, use in self._uses(module, a, delta, owner):
                        uses.setdefault(self.owned[module][local], []).append(use)
            for name, gradient in zip(leaves, found[len(edges) :]):
                if gradient is not None:
                    uses[name] = [Whole(gradient[None])]
        return uses

    def _uses(self, module: Any, a: Tensor, delta: Tensor, owner: Tensor) -> Iterator[tuple[str, Use]]:
        local, kind = self.owned[module], kind_of(module)
        if kind == "small":
            values = _by_group(module, list(local), a, delta)
            for name, by_group in values.items():
                total = by_group.new_zeros(self.examples, *by_group.shape[1:])
                yield name, Whole(total.index_add_(0, owner, by_group))
            return
        if kind == "convolution":
            patches = F.unfold(a, module.kernel_size, module.dilation, module.padding, module.stride)
            a, delta = patches.mT, delta.flatten(2).mT
        groups = 1 if self.alone else len(owner)
        delta = self._gathered(delta.reshape(groups, -1, delta.shape[-1]), owner)
        if "bias" in local:
            yield "bias", Whole(delta.sum(1))
        if "weight" not in local:
            return
        if kind == "embedding":
            ids = (a if self.alone else a.expand(groups, *a.shape[1:])).reshape(groups, -1)
            ids = self._gathered(ids[..., None], owner)[..., 0]
            if module.padding_idx is not None:
                delta = delta * (ids != module.padding_idx)[..., None]
            yield "weight", Rows(ids, delta)
        else:
            a = self._gathered(a.reshape(groups, -1, a.shape[-1]), owner)
            yield "weight", Outer(a, delta) if isinstance(module, Conv1D) else Outer(delta, a)

    def _gathered(self, values: Tensor, owner: Tensor) -> Tensor:
        """Return (G, T, d) as (B, places, d): an example's groups one after the other, zeros behind."""
        if self.alone:
            return values.reshape(1, -1, values.shape[-1])
        counts = torch.bincount(owner, minlength=self.examples)
        if bool((owner[1:] < owner[:-1]).any()):
            order = torch.argsort(owner, stable=True)
            owner, values = owner[order], values[order]
        if len(owner) == self.examples and bool((counts == 1).all()):
            return values
        number = torch.arange(len(owner), device=owner.device) - (torch.cumsum(counts, 0) - counts)[owner]
        padded = values.new_zeros(self.examples, int(counts.max()), *values.shape[1:])
        padded[owner, number] = values
        return padded.flatten(1, 2)


def kind_of(module: nn.Module) -> str | None:
    """Return how a module's gradients are taken, None if only autograd does; by exact type, for a subclass may differ."""
    if type(module) in (nn.Linear, Conv1D):
        return "linear"
    if type(module) is nn.Embedding:
        return None if module.max_norm is not None or module.scale_grad_by_freq or module.sparse else "embedding"
    if type(module) is nn.Conv2d:
        plain = module.groups == 1 and module.padding_mode == "zeros" and not isinstance(module.padding, str)
        return "convolution" if plain else None
    size = sum(p.numel() for p in module.parameters(recurse=False))
    return "small" if next(module.children(), None) is None and 0 < size <= _SMALL else None


def _by_group(module: nn.Module, names: list[str], a: Tensor, delta: Tensor) -> Parameters:
    """Return the vector-Jacobian products (G, *shape) of a module that works on each group alone."""
    values = {n: p.detach() for n, p in module.named_parameters(recurse=False)}

    def gradient(x: Tensor, d: Tensor) -> Parameters:
        moved = {n: values[n] for n in names}
        _, pull = vjp(lambda p: functional_call(module, values | p, (x[None],))[0], moved)  # type: ignore[misc]
        return pull(d)[0]

    return vmap(gradient)(a, delta)


def probes(stage: Stage) -> list[list[int]]:
    """Return the positions of the two shortest and the three longest of the first examples."""
    count = min(32, stage.size)
    lengths = [stage.task.length(e) for e in stage.task.encode([stage.data[i] for i in range(count)])]
    order = sorted(range(count), key=lambda i: lengths[i])
    return [order[:2], order[-3:]]
