"""Scores of a batch for many queries by one reverse pass to the activations and a few products a layer.

A forward and a backward pass give every layer's input a and its output's gradient δ; a parameter's share of
⟨v, g'(z)⟩ is the inner product of v with the layer's gradient, summed over the layer's calls (`layers.py`), so that
tied weights count once a use. No gradient of the batch with respect to a parameter is formed.

Which parameters may be done so is settled before and watched in every batch; the others go through forward mode, one
pass a query, so that the sum is exact for every network:

- before: on two batches of different shape each parameter's share is compared with `torch.autograd`, example by
  example;
- in every batch: inputs and outputs of a layer's calls must have one group for each sequence (or counted item), and
  no use of the parameter outside its layer may reach the outputs. The latter is seen by autograd: outside its layer's
  calls the parameter is a leaf that asks for a gradient.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from nlpinf import parameters as P
from nlpinf.memory import OutOfMemory
from nlpinf.parameters import Parameters
from nlpinf.pieces import entries
from nlpinf.scoring.forward import BatchScores, forward_scores
from nlpinf.scoring.head import CHUNK, Head, linear_head
from nlpinf.scoring.layers import Groups, Matrices, Rule, Vectors, linear, rule_of, side_by_side, takes_matrices
from nlpinf.stages import Stage, evaluation
from nlpinf.tasks import Batch

# Largest disagreement with autograd on a probe, relative to the norm of the parameter's gradient.
_TOLERANCE = {torch.float64: 1e-8, torch.float32: 2e-3}


class _Uncovered(Exception):
    """Parameters turned out to be used in a way that the layers' rules do not cover."""

    def __init__(self, names: set[str]) -> None:
        super().__init__(*sorted(names))
        self.names = names


class ReverseScorer:
    """Scores batches for all queries at once; exact. `covered` are the parameters that need no pass a query."""

    def __init__(self, stage: Stage, vectors: list[Parameters]) -> None:
        self.stage, self.vectors = stage, vectors
        self.stacked: Vectors = {name: side_by_side([v[name] for v in vectors]) for name in vectors[0]}
        self.calls = {module: names for module, names in _owned(stage.model).items() if rule_of(module) is not None}
        known = {name for names in self.calls.values() for name in names.values()}
        self.covered = [name for name in self.stacked if name in known]
        maps = {names.get("weight") for module, names in self.calls.items() if rule_of(module) is linear}
        # What linear maps meet in the precision of their products, rounded once and not for every batch.
        self.low: Vectors = {n: lowered(stage, v) for n, v in self.stacked.items() if n in maps and stage.precision}
        self.probes = list(_probes(stage))
        self.head = linear_head(stage, self.probes[0])
        self._met: set[str] | None = None  # parameters of the layers that a probe called, once all are through
        met: set[str] = set()
        for batch in self.probes:
            met |= self._probe(batch)
        self._met = met

    @property
    def uncovered(self) -> list[str]:
        """The parameters that go through forward mode."""
        return [name for name in self.stacked if name not in self.covered]

    @property
    def matrices(self) -> dict[str, tuple[int, int]]:
        """The covered parameters that are matrices in every use, for which `Matrices` may stand, and their shapes."""
        shapes = {name: tuple(self.stacked[name].shape[1:]) for name in self.covered}
        plain = {
            name
            for module, names in self.calls.items()
            for local, name in names.items()
            if not takes_matrices(module, local)
        }
        return {name: (s[0], s[1]) for name, s in shapes.items() if len(s) == 2 and name not in plain}

    def replaced(self, matrices: Mapping[str, Matrices]) -> ReverseScorer:
        """Return a scorer in which these stand for the query vectors' parts of the same names."""
        other = copy.copy(self)
        changed = {name: matrices[name] for name in self.matrices if name in matrices}
        other.stacked = {**self.stacked, **changed}
        other.low = {name: vector for name, vector in self.low.items() if name not in changed}
        return other

    def __call__(self, batch: Batch) -> BatchScores:
        losses, shares = self.shares(batch, self.stacked)
        scores = sum(
            shares.values(), torch.zeros(len(batch), len(self.vectors), dtype=torch.float64, device=losses.device)
        )
        if self.uncovered:
            scores = (
                scores + forward_scores(self.stage, [P.select(v, self.uncovered) for v in self.vectors], batch).scores
            )
        return BatchScores(losses, scores, None)

    def shares(self, batch: Batch, vectors: Vectors, stage: Stage | None = None) -> tuple[Tensor, Parameters]:
        """Return g(z) (B,) and the share of the scores of every covered parameter in `vectors`, (B, Q) by name, in float64."""
        while True:
            try:
                chosen = {n: vectors[n] for n in self.covered if n in vectors}
                low = self.low if vectors is self.stacked else {}
                losses, found = reverse_pass(stage or self.stage, self.calls, chosen, batch, self.head, low)
                if self._met is not None and (new := found.keys() - self._met):
                    raise _Uncovered(set(new))  # a layer for rare tokens: nothing has been compared
                return losses, found
            except _Uncovered as reason:
                self.covered = [n for n in self.covered if n not in reason.names]

    def _probe(self, batch: Batch) -> set[str]:
        """Take out of `covered` what disagrees with autograd on `batch`; return the parameters whose layers were called."""
        stage = self.stage.at(None)  # coverage does not hang on the precision, and low precision would blur it
        truth, sizes, directions = _by_autograd(stage, list(self.stacked), batch)
        _, shares = self.shares(batch, directions, stage)
        tolerance = _TOLERANCE.get(stage.dtype, 5e-2)
        largest = max(float(size.max()) for size in sizes.values())
        agreed = []
        for name in self.covered:
            share = shares.get(name, torch.zeros_like(truth[name])[:, None])[:, 0]
            # A gradient that is zero up to rounding (a key's bias) is held to the rounding of the others.
            if bool(((share - truth[name]).abs() <= tolerance * (sizes[name] + 1e-3 * largest)).all()):
                agreed.append(name)
        self.covered = agreed
        return set(shares)


def agrees(stage: Stage) -> bool:
    """Say whether forward mode finds what autograd finds for an example of a stage, to a share of the gradients' size.

    The share is generous: it tells apart a model of which a part has one derivative and not the other, not rounding.
    """
    stage = stage.at(None)
    batch = next(iter(_probes(stage)))
    names = list(stage.theta)
    truth, sizes, directions = _by_autograd(stage, names, batch)
    found = forward_scores(stage, [{n: r[0] for n, r in directions.items()}], batch).scores[:, 0]
    gap = (found - sum(truth.values())).abs()
    size = torch.stack(list(sizes.values())).square().sum(0).sqrt()
    small = gap <= (0.3 if stage.dtype.itemsize < 4 else 0.02) * size
    return bool((small | ~gap.isfinite()).all())  # what is not finite is told with its row


def reverse_scores(stage: Stage, vectors: list[Parameters], batch: Batch) -> BatchScores:
    """Return the scores of one batch for each query vector; `ReverseScorer` does many batches with one probing."""
    return ReverseScorer(stage, vectors)(batch)


def reverse_pass(
    stage: Stage,
    calls: dict[nn.Module, dict[str, str]],
    vectors: Vectors,
    batch: Batch,
    head: Head | None = None,
    low: Vectors | None = None,
) -> tuple[Tensor, Parameters]:
    """Return g(z) (B,) and the shares of the parameters in `vectors`, each (Q, ...), by name: (B, Q) in float64.

    `low` has those of linear maps in the stage's precision, where they were rounded before.
    """
    inside = {module: names for module, names in calls.items() if head is None or module is not head.module}
    watch = _Watch(stage, inside, vectors, low or {}, batch)
    weights = stage.item_weights(batch)
    with evaluation(stage.model), torch.enable_grad():
        with watch.installed():
            run = partial(stage.outputs, batch, watch.leaves)
            end = run() if head is None else head.hidden(run)
        with torch.no_grad():
            if head is None:
                losses = stage.task.losses(end.detach(), batch)
                cotangent = weights[:, None] * stage.task.loss.gradient(end.detach(), batch.targets)
            else:
                losses, cotangent, shares = through_head(head, stage, end.detach(), weights, batch, vectors, low)
                for name, share in shares.items():
                    watch.count(name, share)
        if end.requires_grad:
            torch.autograd.backward(end, cotangent)
    outside = {name for name, leaf in watch.leaves.items() if leaf.grad is not None}
    if outside | watch.odd:
        raise _Uncovered(outside | watch.odd)
    return batch.sum_by_example(losses.double() * weights), watch.shares


def through_head(
    head: Head, stage: Stage, x: Tensor, weights: Tensor, batch: Batch, vectors: Vectors, low: Vectors | None = None
) -> tuple[Tensor, Tensor, Parameters]:
    """Return ℓ (I,), the cotangent of the hidden states x (I, d), and the output layer's shares, (B, Q) by name, in chunks."""
    losses, cotangent = x.new_empty(len(x)), torch.empty_like(x)
    names = {"weight": head.weight} | ({} if head.bias is None else {"bias": head.bias})
    mine = {local: vectors[name] for local, name in names.items() if name in vectors}
    queries = len(next(iter(vectors.values()), x[:0]))
    shares = {names[local]: x.new_zeros(len(batch), queries, dtype=torch.float64) for local in (mine if len(x) else ())}
    weight = lowered(stage, stage.parameters[head.weight])  # once, not for every chunk
    if "weight" in mine:
        mine["weight"] = low[head.weight] if low and head.weight in low else lowered(stage, mine["weight"])
    # Many queries read their vectors once a chunk, so their chunks are larger.
    for part in head.parts(x, entries(4 * CHUNK if queries > 1 else CHUNK, x)):
        losses[part], delta, cotangent[part] = head.cotangents(stage, batch.targets, weights, x, part, weight)
        examples, owner = torch.unique(batch.example[part], return_inverse=True)
        for local, share in linear(head.module, (x[part],), delta, mine, Groups(owner, len(examples))).items():
            shares[names[local]].index_add_(0, examples, share.double())
    return losses, cotangent, shares


def lowered(stage: Stage, matrix: Any) -> Any:
    """Return a matrix, or matrices (queries, ...), in the precision of the stage's products; compressed ones as they are."""
    return (
        matrix
        if stage.precision is None or not isinstance(matrix, Tensor)
        else matrix.to(getattr(torch, stage.precision))
    )


class _Watch:
    """Hooks on the layers for one forward and backward pass."""

    def __init__(
        self, stage: Stage, calls: dict[nn.Module, dict[str, str]], vectors: Vectors, low: Vectors, batch: Batch
    ) -> None:
        self.calls = {
            module: {local: name for local, name in names.items() if name in vectors} for module, names in calls.items()
        }
        self.vectors, self.low = vectors, low
        self.inside = {name: stage.parameters[name] for name in vectors}
        self.leaves = {name: tensor.detach().requires_grad_(True) for name, tensor in self.inside.items()}
        self.sequences = Groups(batch.sequence, len(batch))
        self.items = Groups(batch.example, len(batch))
        head = stage.task.item_module(stage.model)
        self.item_modules = set() if head is None else set(head.modules())
        self.shares: Parameters = {}
        self.odd: set[str] = set()

    @contextmanager
    def installed(self) -> Iterator[None]:
        handles = []
        for module, names in self.calls.items():
            if names:
                handles.append(module.register_forward_pre_hook(self.enter))
                handles.append(module.register_forward_hook(self.leave, with_kwargs=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def enter(self, module: nn.Module, args: Any) -> None:
        for local, name in self.calls[module].items():
            module._parameters[local] = self.inside[name]  # type: ignore[assignment]

    def leave(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
        names = self.calls[module]
        for local, name in names.items():
            module._parameters[local] = self.leaves[name]  # type: ignore[assignment]
        groups = self.items if module in self.item_modules else self.sequences
        count = len(groups.owner)
        rule = rule_of(module)
        if kwargs or len(args) != 1 or not isinstance(args[0], Tensor) or not isinstance(out, Tensor) or not out.dim():
            self.odd.update(names.values())
            return None
        if type(module) is nn.Embedding and out.shape[0] == 1 < count:
            out = out.expand(count, *out.shape[1:])  # positions that all sequences share: each gets its own gradient
        elif args[0].shape[:1] != (count,) or out.shape[0] != count:
            self.odd.update(names.values())
            return None
        a = args[0].detach()
        assert rule is not None

        def arrived(delta: Tensor) -> None:
            self.add(module, rule, names, a, delta, groups)

        if out.requires_grad:
            out.register_hook(arrived)
            return None
        leaf = out.detach().requires_grad_(True)
        leaf.register_hook(arrived)
        return leaf.clone()  # the network may change its own tensor in place, but not a leaf

    def add(
        self,
        module: nn.Module,
        rule: Rule,
        names: dict[str, str],
        a: Tensor,
        delta: Tensor,
        groups: Groups,
    ) -> None:
        with torch.no_grad():
            try:
                met = {**self.vectors, **self.low} if rule is linear else self.vectors
                found = rule(module, (a,), delta, {local: met[name] for local, name in names.items()}, groups)
            except OutOfMemory:
                raise
            except (RuntimeError, NotImplementedError):
                self.odd.update(names.values())
                return
        for local, share in found.items():
            self.count(names[local], share.double())

    def count(self, name: str, share: Tensor) -> None:
        """Add a use of a parameter to its share."""
        self.shares[name] = self.shares[name] + share if name in self.shares else share


def _owned(model: nn.Module) -> dict[nn.Module, dict[str, str]]:
    """Return for every module its own parameters' local names and the names that the model's tree has for them."""
    first = {id(parameter): name for name, parameter in model.named_parameters()}
    owned = {
        module: {local: first[id(p)] for local, p in module._parameters.items() if p is not None}
        for module in model.modules()
    }
    return {module: names for module, names in owned.items() if names}


def _probes(stage: Stage) -> Iterator[Batch]:
    """Yield a batch of the two shortest and one of the three longest of the first examples."""
    encoded = stage.task.encode([stage.data[i] for i in range(min(32, stage.size))])
    order = sorted(range(len(encoded)), key=lambda i: stage.task.length(encoded[i]))
    for chosen in ((order * 2)[:2], (order[::-1] * 3)[:3]):
        rows = [int(stage.rows[i]) for i in chosen]
        yield stage.on_device(stage.task.collate([encoded[i] for i in chosen], rows))


def _by_autograd(stage: Stage, names: list[str], batch: Batch) -> tuple[Parameters, Parameters, Parameters]:
    """Return ⟨r, g'(z)⟩ and ‖g'(z)‖ by parameter, each (B,) in float64, and the random directions r, each (1, ...)."""
    directions = P.random_like(P.select(stage.parameters, names), seed=0)
    theta = {n: stage.parameters[n].clone().requires_grad_(True) for n in names}
    truth: dict[str, list[Tensor]] = {n: [] for n in names}
    sizes: dict[str, list[Tensor]] = {n: [] for n in names}
    with evaluation(stage.model), torch.enable_grad():
        losses = stage.example_losses(batch, theta)
        for loss in losses:
            gradients = torch.autograd.grad(loss, list(theta.values()), retain_graph=True, materialize_grads=True)
            for name, gradient in zip(names, gradients):
                truth[name].append((gradient.double() * directions[name].double()).sum())
                sizes[name].append(gradient.double().norm())
    return (
        {n: torch.stack(values) for n, values in truth.items()},
        {n: torch.stack(values) for n, values in sizes.items()},
        {n: r[None] for n, r in directions.items()},
    )
