"""Hessian, generalized Gauss-Newton and Fisher products of a stage's mean loss, over a fixed sample of rows.

With outputs o = o(θ), their Jacobian J, the item weights w of the stage's reduction and n rows in the sample:

    hessian   1/n Σ w [ Jᵀ (∂²ℓ/∂o²) J v + (∂_v J)ᵀ ∂ℓ/∂o ]     (Pearlmutter, 1994)
    ggn       1/n Σ w   Jᵀ (∂²ℓ/∂o²) J v                         (Schraudolph, 2002; Martens, 2020)
    fisher    1/n Σ w   Jᵀ ĝ ĝᵀ J v,  ĝ = ∂ℓ/∂o at a target drawn from the model, fixed by (seed, row)

J v is a forward-mode pass, Jᵀ u a reverse-mode pass, and what lies between them is closed form at the outputs, so that
the peak is the model, two copies of the parameters and one batch of activations and outputs. In a group of processes
each takes its share of the batches, then one all-reduce. The Hessian product of a
network whose backward pass has no forward mode (SiLU's, so Llama's and Mixtral's) is reverse mode over reverse mode.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any, Literal
from weakref import WeakSet

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn
from torch.func import jvp, vjp, vmap

from nlpinf import memory, processes, sharded
from nlpinf import parameters as P
from nlpinf.curvature.constant import KEEP, Constants
from nlpinf.curvature.operators import Operator, Shifted
from nlpinf.errors import BadInput
from nlpinf.parameters import Parameters
from nlpinf.pieces import pieces
from nlpinf.stages import Stage, evaluation
from nlpinf.tasks import Batch

CurvatureKind = Literal["hessian", "ggn", "fisher"]

_TOGETHER = 1 << 29  # bytes that the outputs' tangents of one batch may take where several products are made at once

_reverse_only: WeakSet[nn.Module] = WeakSet()  # models whose backward pass turned out to have no forward mode
_one_by_one: WeakSet[nn.Module] = WeakSet()  # models of which `vmap` turned out to make no several products


def _dual_outputs(stage: Stage, batch: Batch, theta: Parameters, tangent: Parameters) -> Tensor:
    dual = {n: forward_ad.make_dual(t, tangent[n]) if n in tangent else t for n, t in theta.items()}
    return stage.outputs(batch, dual)


def output_tangents(stage: Stage, batch: Batch, tangent: Parameters) -> tuple[Tensor, Tensor]:
    """Return the outputs o and J v, each (I, classes), by one forward-mode pass; zeros where v does not reach them."""
    if sharded.is_sharded(stage.model):
        with torch.no_grad(), forward_ad.dual_level(), sharded.moving(stage.model, tangent):
            outputs, moved = forward_ad.unpack_dual(stage.outputs(batch))
        return outputs, torch.zeros_like(outputs) if moved is None else moved
    theta = P.select(stage.parameters, tangent)
    with torch.no_grad(), forward_ad.dual_level():
        outputs, moved = forward_ad.unpack_dual(_dual_outputs(stage, batch, theta, tangent))
    return outputs, torch.zeros_like(outputs) if moved is None else moved


def hessian_product(stage: Stage, batch: Batch, tangent: Parameters, names: Sequence[str]) -> list[Tensor]:
    """Return Σ over the batch of ∂_v ∇_names g(z), exact.

    Forward mode over reverse mode; from the first `NotImplementedError` on, reverse over reverse for that model.
    """
    if sharded.is_sharded(stage.model):
        raise BadInput(
            f"stage {stage.name!r}: its model is sharded among processes, and FSDP has no second derivatives; take the "
            "curvature 'ggn' or 'fisher', and a transfer by proximity"
        )
    if stage.model not in _reverse_only:
        try:
            return _forward_over_reverse(stage, batch, tangent, names)
        except NotImplementedError:
            _reverse_only.add(stage.model)
    return _reverse_over_reverse(stage, batch, tangent, names)


def _forward_over_reverse(stage: Stage, batch: Batch, tangent: Parameters, names: Sequence[str]) -> list[Tensor]:
    theta = {n: stage.parameters[n].clone().requires_grad_(True) for n in {**dict.fromkeys(names), **tangent}}
    weights, loss = stage.item_weights(batch)[:, None], stage.task.loss
    with forward_ad.dual_level():
        dual = _dual_outputs(stage, batch, theta, tangent)
        outputs, moved = forward_ad.unpack_dual(dual)
        outputs = outputs.detach()
        moved = torch.zeros_like(outputs) if moved is None else moved.detach()
        cotangent = forward_ad.make_dual(
            weights * loss.gradient(outputs, batch.targets),
            weights * loss.hessian_product(outputs, batch.targets, moved),
        )
        gradients = torch.autograd.grad(dual, [theta[n] for n in names], cotangent, allow_unused=True)
        tangents = [None if g is None else forward_ad.unpack_dual(g).tangent for g in gradients]
    return [torch.zeros_like(theta[n]) if t is None else t.detach() for n, t in zip(names, tangents)]


def _reverse_over_reverse(stage: Stage, batch: Batch, tangent: Parameters, names: Sequence[str]) -> list[Tensor]:
    """Return the same as `_forward_over_reverse`, by S(θ, u) = uᵀ J v: ∂S/∂u = J v and ∂S/∂θ = (∂_v J)ᵀ u at u = ∂ℓ/∂o."""
    theta = {n: stage.parameters[n].clone().requires_grad_(True) for n in {**dict.fromkeys(names), **tangent}}
    weights, loss = stage.item_weights(batch)[:, None], stage.task.loss
    with torch.enable_grad():
        outputs = stage.outputs(batch, theta)
        values = outputs.detach()
        u = (weights * loss.gradient(values, batch.targets)).requires_grad_(True)
        pulled = torch.autograd.grad(outputs, [theta[n] for n in tangent], u, create_graph=True, allow_unused=True)
        terms = [(g * v).sum() for g, v in zip(pulled, tangent.values()) if g is not None]
        if not terms:  # v does not reach the outputs
            return [torch.zeros_like(theta[n]) for n in names]
        along = torch.stack(terms).sum()
        (moved,) = torch.autograd.grad(along, u, retain_graph=True)
        straight = weights * loss.hessian_product(values, batch.targets, moved)
        gradients = torch.autograd.grad(
            [along, outputs], [theta[n] for n in names], [torch.ones_like(along), straight], allow_unused=True
        )
    return [torch.zeros_like(theta[n]) if g is None else g for n, g in zip(names, gradients)]


def gauss_newton_product(
    stage: Stage, batch: Batch, tangent: Parameters, names: Sequence[str], sampled: int | None, weight: float = 1.0
) -> list[Tensor]:
    """Return Σ over the batch of w Jᵀ B J v with B = ∂²ℓ/∂o², or ĝ ĝᵀ with targets drawn by the seed `sampled`.

    Of a sharded model the sum is over the processes' batches, each times its `weight`.
    """
    if sharded.is_sharded(stage.model):  # two passes, so that no gathered part of v lives on in a graph
        outputs, moved = output_tangents(stage, batch, tangent)
        inner = _inner(stage, batch, outputs, moved, sampled) * weight
        return sharded.pulled_back(stage.model, names, lambda: (stage.outputs(batch), inner))
    theta = {n: stage.parameters[n].clone().requires_grad_(True) for n in {**dict.fromkeys(names), **tangent}}
    with forward_ad.dual_level():  # one pass gives o with its graph and J v beside it
        outputs, moved = forward_ad.unpack_dual(_dual_outputs(stage, batch, theta, tangent))
        moved = torch.zeros_like(outputs) if moved is None else moved.detach()
    inner = _inner(stage, batch, outputs.detach(), moved, sampled)
    gradients = torch.autograd.grad(outputs, [theta[n] for n in names], inner, allow_unused=True)
    return [torch.zeros_like(theta[n]) if g is None else g for n, g in zip(names, gradients)]


@torch.no_grad()
def _inner(stage: Stage, batch: Batch, outputs: Tensor, moved: Tensor, sampled: int | None) -> Tensor:
    """Return w B J v of every item, (I, classes)."""
    loss, targets, weights = stage.task.loss, batch.targets, stage.item_weights(batch)[:, None]
    uniform = None
    if sampled is not None:
        uniform = batch.uniform(sampled, outputs.shape[-1] if targets.is_floating_point() else 1)
    found = torch.empty_like(outputs)
    for part in pieces(outputs):
        if uniform is None:
            inner = loss.hessian_product(outputs[part], targets[part], moved[part])
        else:
            drawn = loss.sampled_gradient(outputs[part], uniform[part])
            inner = drawn * (drawn * moved[part]).sum(-1, keepdim=True)
        torch.mul(inner, weights[part], out=found[part])
    return found


def products_at_once(
    stage: Stage, batch: Batch, kind: CurvatureKind, vectors: Sequence[Parameters], seed: int
) -> Iterator[Parameters]:
    """Yield the product's sum over the batch for every v in `vectors`, all of the same names; `kind` as in `Curvature`.

    What does not depend on v (the forward pass, and for the Hessian the backward pass beside it) is run once, or where the
    outputs' tangents are large once for as many v as `_TOGETHER` allows.
    """
    theta, loss = P.select(stage.parameters, vectors[0]), stage.task.loss
    weights = stage.item_weights(batch)[:, None]

    def outputs(parameters: Parameters) -> Tensor:
        return stage.outputs(batch, parameters)

    def gradient(parameters: Parameters) -> Parameters:
        values, pull = vjp(outputs, parameters)[:2]
        return pull(weights * loss.gradient(values, batch.targets))[0]

    def along(function: Callable[[Parameters], Any], stacked: Parameters) -> Any:
        return vmap(lambda v: jvp(function, (theta,), (v,))[1])(stacked)

    with torch.no_grad() if kind == "hessian" else nullcontext():
        values, pull = vjp(outputs, theta)[:2]
    width = max(1, _TOGETHER // max(1, values.nbytes))
    for start in range(0, len(vectors), width):
        chosen = vectors[start : start + width]
        stacked = {name: torch.stack([v[name] for v in chosen]) for name in theta}
        if kind == "hessian":
            found = along(gradient, stacked)
        else:
            moved = along(outputs, stacked)
            for i in range(len(chosen)):
                moved[i] = _inner(stage, batch, values.detach(), moved[i], seed if kind == "fisher" else None)
            (found,) = vmap(pull)(moved)
        yield from ({name: found[name][i].detach() for name in theta} for i in range(len(chosen)))


class Curvature(Operator):
    """The curvature of a stage's mean loss over fixed rows, without weight decay or damping (`Shifted` adds them).

    `indices`  positions of the rows in the stage's data (the curvature sample); batches are made once and kept
    `kind`     "hessian", "ggn" or "fisher"; the module's docstring gives the formulas
    `keep`     bytes of what no trained parameter reaches (a frozen encoder's outputs) that are kept from product to product
    """

    def __init__(
        self, stage: Stage, kind: CurvatureKind, indices: Sequence[int] | None = None, seed: int = 0, keep: int = KEEP
    ) -> None:
        super().__init__(stage.theta)
        if kind not in ("hessian", "ggn", "fisher"):
            raise BadInput(f"curvature {kind!r} is none of 'hessian', 'ggn', 'fisher'")
        self.stage, self.kind, self.seed = stage, kind, seed
        self.indices = list(range(stage.size) if indices is None else indices)
        self.rows: float = len(self.indices)
        batches = list(stage.batches(self.indices))
        # Of a sharded model every process makes each turn, without a batch of its own with another's, which counts nothing.
        self.batches = list(processes.turns(batches, sharded.is_sharded(stage.model)))
        self._turns = -(-len(batches) // processes.count())
        self._constants = Constants(stage, keep)

    def parts(self) -> list[Operator]:
        """Return an operator for every batch (of each process, in a group) that there was at first; their mean is this one."""
        parts: list[Operator] = []
        for turn in range(self._turns):
            part = copy.copy(self)
            part.batches, part.products, part.rows = self.batches[turn :: self._turns], 0, self.rows / self._turns
            parts.append(part)
        return parts

    def at(self, precision: str | None) -> Curvature:
        other = copy.copy(self)
        other.stage, other.products = self.stage.at(precision), 0  # type: ignore[arg-type]
        other._constants = Constants(other.stage, self._constants.limit)
        return other

    def product(self, vector: Parameters) -> Parameters:
        return self.block([vector])[0]

    def block(self, vectors: Sequence[Parameters]) -> list[Parameters]:
        while True:
            try:
                totals = self._totals(vectors)
                break
            except memory.OutOfMemory:
                if sharded.is_sharded(self.stage.model):  # whose processes make their turns together
                    raise
            self._recut(memory.halved(self.stage))
        return [P.mean_like(processes.total(total), self.rows, self.template) for total in totals]

    def _recut(self, stage: Stage) -> None:
        """Cut this process's rows into the batches of `stage` from now on."""
        place = {int(stage.rows[i]): i for i in self.indices}
        own = [place[row] for batch, _ in self.batches for row in batch.rows.tolist()]
        self.stage, self._constants = stage, Constants(stage, self._constants.limit)
        self.batches = [(batch, True) for batch in stage.batches(own)]

    def _totals(self, vectors: Sequence[Parameters]) -> list[Parameters]:
        """Return this process's sums over its batches."""
        totals = [P.sums_like(self.template) for _ in vectors]
        with evaluation(self.stage.model):
            for batch, own in self.batches:
                with self._constants.of(batch):
                    for total, parts in zip(totals, self._parts(batch, vectors, float(own))):
                        for name, part in parts.items():
                            total[name] += part
        return totals

    def _parts(self, batch: Batch, vectors: Sequence[Parameters], weight: float) -> Iterable[Parameters]:
        model = self.stage.model
        if len(vectors) > 1 and not sharded.is_sharded(model) and model not in _one_by_one:
            try:
                return list(products_at_once(self.stage, batch, self.kind, vectors, self.seed))
            except memory.OutOfMemory:
                raise
            except (RuntimeError, ValueError):  # an operation without a rule for many at once
                _one_by_one.add(model)
        return (self._part(batch, vector, weight) for vector in vectors)

    def _part(self, batch: Batch, vector: Parameters, weight: float) -> Parameters:
        names = list(self.template)
        if self.kind == "hessian":
            parts = hessian_product(self.stage, batch, vector, names)
        else:
            sampled = self.seed if self.kind == "fisher" else None
            parts = gauss_newton_product(self.stage, batch, vector, names, sampled, weight)
        return dict(zip(names, parts))


def noise_floor(operator: Operator, vector: Parameters, rows: int = 4) -> float:
    """Return the rounding noise of an operator's products, ‖C v − C₆₄ v‖ / ‖C₆₄ v‖ over a few rows, C₆₄ being in float64; 0 where C v is."""
    shifted = operator if isinstance(operator, Shifted) else Shifted(operator)
    base = shifted.base
    assert isinstance(base, Curvature)
    stage, chosen = base.stage, base.indices[:rows]
    double = dataclasses.replace(stage, model=copy.deepcopy(stage.model).double(), precision=None)
    products = [
        Shifted(Curvature(s, base.kind, chosen, base.seed), shifted.shift, shifted.damping)
        @ {n: t.to(s.dtype) for n, t in vector.items()}
        for s in (stage, double)
    ]
    difference = {n: t.double() - products[1][n] for n, t in products[0].items()}
    size = P.norm(products[1])
    return P.norm(difference) / size if size else 0.0


def cross_product(stage: Stage, vector: Parameters, names: Iterable[str], indices: Sequence[int]) -> Parameters:
    """Return F_WΘ y: the rows `names` (W) of the full Hessian of the mean loss applied to (0, y), y = `vector`.

    Always the exact second derivative, also where the solves use the GGN.
    """
    names = list(names)
    template = P.select(stage.parameters, names)

    def summed(stage: Stage) -> Parameters:
        total = P.sums_like(template)
        with evaluation(stage.model):
            for batch in processes.share(stage.batches(indices)):
                for name, part in zip(names, hessian_product(stage, batch, vector, names)):
                    total[name] += part
        return total

    total = memory.within(stage, summed)
    return P.mean_like(processes.total(total), len(indices), template)


def curvature_samples(size: int, sample: int | None, seed: int, draw: int = 0) -> tuple[list[int], list[int]]:
    """Return two disjoint lists of positions: the curvature sample and a second one of at most the same length.

    `sample` None takes every row, and leaves none for the second. Samples of the same seed and length with numbers `draw`
    0, 1, ... are disjoint; the second is the next one, of the last one that fits the first. One of a larger `sample` and
    draw 0 holds the smaller one. The draw is a function of (size, seed).
    """
    if sample is None or sample == size:
        return list(range(size)), []
    if not 0 < sample <= size:
        raise BadInput(
            f"the curvature sample is {sample} rows, but the corpus has {size}; give a number from 1 to {size}"
        )
    if (draw + 1) * sample > size:
        raise BadInput(
            f"{draw + 1} disjoint curvature samples of {sample} rows were asked for, but the corpus has {size}; "
            f"give at most {size // (draw + 1)}"
        )
    order = torch.randperm(size, generator=torch.Generator().manual_seed(seed)).tolist()
    begin, end = draw * sample, (draw + 1) * sample
    return sorted(order[begin:end]), sorted((order[end:] + order[:begin])[:sample])
