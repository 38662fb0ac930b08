"""Conjugate gradient for many right-hand sides at once: all directions serve all of them (O'Leary, 1980).

With R, P the residuals and directions as columns, and D = Pᵀ C P:

    X += P D⁺ Pᵀ R,   R −= C P D⁺ Pᵀ R,   P ← M⁻¹ R − P D⁺ (C P)ᵀ M⁻¹ R, then made orthonormal

A direction that depends on the others, or belongs to a column that is done, is dropped, so that the block narrows and
never breaks down. Columns are scaled to ‖b‖ = 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from nlpinf import parameters as P
from nlpinf.curvature.operators import Operator
from nlpinf.parameters import Parameters
from nlpinf.solvers.base import (
    Checkpoint,
    Preconditioner,
    Progress,
    Solution,
    State,
    Verdict,
    all_finished,
    begun,
    iterated,
)

_PART = 1 << 20  # entries of a column that are widened to float64 at a time
_DEPENDENT = 1e-10  # share of the largest eigenvalue of a Gram matrix below which a direction is dropped


class Columns:
    """k vectors as one tensor a parameter, each (k, ...)."""

    def __init__(self, tensors: Parameters) -> None:
        self.tensors = tensors

    @classmethod
    def of(cls, vectors: Sequence[Parameters]) -> Columns:
        return cls({name: torch.stack([v[name] for v in vectors]) for name in vectors[0]})

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))

    def __getitem__(self, i: int) -> Parameters:
        return {name: tensor[i] for name, tensor in self.tensors.items()}

    def chosen(self, which: Tensor) -> Columns:
        """Return the columns at `which`."""
        return Columns({name: tensor[which] for name, tensor in self.tensors.items()})

    def gram(self, other: Columns) -> Tensor:
        """Return the inner products (k, l) with the other's columns, in float64."""
        total = torch.zeros(len(self), len(other), dtype=torch.float64)
        for name, tensor in self.tensors.items():
            mine, theirs = tensor.flatten(1), other.tensors[name].flatten(1)
            for a, b in zip(mine.split(_PART, 1), theirs.split(_PART, 1)):
                total += (a.double() @ b.double().T).cpu()
        return total

    def combined(self, weights: Tensor, onto: Columns | None = None) -> Columns:
        """Return the columns Σ_i self_i weights_ij, added to `onto`."""
        made = {}
        for name, tensor in self.tensors.items():
            w = weights.T.to(tensor)
            part = (w @ tensor.flatten(1)).view(len(w), *tensor.shape[1:])
            made[name] = part if onto is None else onto.tensors[name] + part
        return Columns(made)

    def through(self, operator: Operator) -> Columns:
        """Return the columns C self_i."""
        return Columns.of(operator.many([self[i] for i in range(len(self))]))

    def mapped(self, function: Callable[[Parameters], Parameters]) -> Columns:
        """Return the columns function(self_i)."""
        return Columns.of([function(self[i]) for i in range(len(self))])

    def orthonormal(self) -> Columns:
        """Return an orthonormal basis of the columns' span, without the directions that depend on others."""
        norms = self.gram_diagonal().sqrt()
        kept = (norms > 0).nonzero()[:, 0]
        if not len(kept):
            return self.chosen(kept)
        scaled = self.chosen(kept).combined(torch.diag(1 / norms[kept]))
        values, vectors = torch.linalg.eigh(scaled.gram(scaled))
        large = values > _DEPENDENT * values[-1]
        return scaled.combined(vectors[:, large] / values[large].sqrt())

    def gram_diagonal(self) -> Tensor:
        """Return ‖self_i‖², (k,) in float64."""
        return torch.tensor([P.dot(self[i], self[i]) for i in range(len(self))], dtype=torch.float64)


@dataclass(kw_only=True)
class _State(State):
    """Columns x, r and p as trees of (k, ...); `reached` the largest true residual of the last check; p None to begin."""

    x: Parameters
    r: Parameters
    p: Parameters | None = None
    reached: float = 1.0
    histories: list[list[float]] = field(default_factory=list)


def block_cg(
    operator: Operator,
    rights: Sequence[Parameters],
    second: Operator | None,
    precondition: Preconditioner | None,
    tolerance: float,
    max_iterations: int,
    progress: Progress | None = None,
    starts: Sequence[Parameters] | None = None,
    checkpoint: Checkpoint | None = None,
) -> list[Solution]:
    """Return the solution of C x = b for every b in `rights`; `max_iterations` counts a block of products as one."""
    scales = [P.norm(b) for b in rights]
    live = [i for i, s in enumerate(scales) if math.isfinite(s) and s > 0]
    vectors = [P.zeros_like(b) for b in rights]
    ends: list[Verdict] = ["converged" if s == 0 else "not finite" for s in scales]
    histories: list[list[float]] = [[] for _ in rights]
    spent = [0] * len(rights)
    if live:
        b = Columns.of([P.scaled(1 / scales[i], rights[i]) for i in live])
        guesses = [None if starts is None else P.scaled(1 / scales[i], starts[i]) for i in live]
        run = _Run(operator, b, precondition, tolerance, progress)
        s, before = iterated(_State, lambda: run.begin(guesses), run.advance, max_iterations, operator, checkpoint)
        share = math.ceil((operator.products - before) / len(live))
        x, verdict = Columns(s.x), s.verdict or "not converged"
        sizes = Columns(s.r).gram_diagonal().sqrt()
        for column, i in enumerate(live):
            vectors[i] = P.scaled(scales[i], x[column])
            ends[i] = "converged" if float(sizes[column]) <= tolerance else verdict
            histories[i], spent[i] = s.histories[column], share
    return all_finished("block cg", operator, second, rights, vectors, ends, tolerance, histories, spent)


@dataclass(frozen=True)
class _Run:
    operator: Operator
    b: Columns
    precondition: Preconditioner | None
    tolerance: float
    progress: Progress | None

    def begin(self, guesses: Sequence[Parameters | None]) -> _State:
        pairs = [begun(self.operator, self.b[i], guess) for i, guess in enumerate(guesses)]
        x, r = (Columns.of(column) for column in zip(*pairs))
        reached = float(r.gram_diagonal().sqrt().max())
        histories: list[list[float]] = [[] for _ in guesses]
        verdict: Verdict | None = "converged" if reached <= self.tolerance else None
        return _State(x=x.tensors, r=r.tensors, reached=reached, histories=histories, verdict=verdict)

    def advance(self, s: _State) -> None:
        """Take one step; where all columns seem done, compare with the true residuals, and go on from them if that helps."""
        if s.p is None:
            s.p = self._needed(Columns(s.r)).orthonormal().tensors
        if len(Columns(s.p)):
            self._step(s)
        else:
            s.verdict = "converged"
        if s.verdict != "converged":
            return
        x = Columns(s.x)
        r = x.through(self.operator).combined(-torch.eye(len(x), dtype=torch.float64), self.b)
        s.r, worst = r.tensors, float(r.gram_diagonal().sqrt().max())
        if self.tolerance < worst <= 0.5 * s.reached:  # else they are there, or rounding allows no better
            s.p, s.reached, s.verdict = None, worst, None

    def _step(self, s: _State) -> None:
        assert s.p is not None
        x, r, p = Columns(s.x), Columns(s.r), Columns(s.p)
        s.iterations += 1
        cp = p.through(self.operator)
        d = p.gram(cp)
        if not bool(torch.isfinite(d).all()):
            s.verdict = "not finite"
            return
        values, vectors = torch.linalg.eigh((d + d.T) / 2)
        if float(values[0]) <= 0:
            s.verdict = "negative curvature"
            return
        inverse = vectors / values @ vectors.T
        step = inverse @ p.gram(r)
        x, r = p.combined(step, x), cp.combined(-step, r)
        s.x, s.r = x.tensors, r.tensors
        sizes = r.gram_diagonal().sqrt()
        for history, size in zip(s.histories, sizes.tolist()):
            history.append(size)
        worst = float(sizes.max())
        if self.progress is not None:
            self.progress(s.iterations, worst)
        if not math.isfinite(worst):
            s.verdict = "not finite"
            return
        z = self._needed(r)
        p = p.combined(-(inverse @ cp.gram(z)), z).orthonormal() if len(z) else z
        s.p = p.tensors
        if not len(p):
            s.verdict = "converged"

    def _needed(self, r: Columns) -> Columns:
        open_ = (r.gram_diagonal().sqrt() > self.tolerance).nonzero()[:, 0]
        rest = r.chosen(open_)
        return rest if self.precondition is None or not len(rest) else rest.mapped(self.precondition)
