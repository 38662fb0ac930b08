"""Conjugate gradient for many right-hand sides at once: all directions serve all of them (O'Leary, 1980).

With R, P the residuals and directions as columns, and D = Pᵀ C P:

    X += P D⁺ Pᵀ R,   R −= C P D⁺ Pᵀ R,   P ← M⁻¹ R − P D⁺ (C P)ᵀ M⁻¹ R, then made orthonormal

A direction that depends on the others, or belongs to a column that is done, is dropped, so that the block narrows and
never breaks down. Columns are scaled to ‖b‖ = 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from nlpinf import parameters as P
from nlpinf.curvature.operators import Operator
from nlpinf.parameters import Parameters
from nlpinf.solvers.base import Preconditioner, Solution, Verdict, finished

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


def block_cg(
    operator: Operator,
    rights: Sequence[Parameters],
    second: Operator | None,
    precondition: Preconditioner | None,
    tolerance: float,
    max_iterations: int,
    progress: Callable[[int, float], None] | None = None,
) -> list[Solution]:
    """Return the solution of C x = b for every b in `rights`; `max_iterations` counts a block of products as one."""
    scales = [P.norm(b) for b in rights]
    live = [i for i, s in enumerate(scales) if math.isfinite(s) and s > 0]
    ends: dict[int, Verdict] = {
        i: "converged" if s == 0 else "not finite" for i, s in enumerate(scales) if i not in live
    }
    vectors = {i: P.zeros_like(rights[i]) for i in ends}
    histories: dict[int, list[float]] = {i: [] for i in range(len(rights))}
    spent = {i: 0.0 for i in range(len(rights))}
    if live:
        b = Columns.of([P.scaled(1 / scales[i], rights[i]) for i in live])
        before = operator.products
        x, verdicts, histories_live = _run(operator, b, precondition, tolerance, max_iterations, progress)
        share = (operator.products - before) / len(live)
        for column, i in enumerate(live):
            vectors[i], ends[i] = P.scaled(scales[i], x[column]), verdicts[column]
            histories[i], spent[i] = histories_live[column], share
    solutions = []
    for i, right in enumerate(rights):
        before = operator.products - math.ceil(spent[i])
        solutions.append(
            finished("block cg", operator, second, right, vectors[i], ends[i], tolerance, histories[i], before)
        )
    return solutions


def _run(
    operator: Operator,
    b: Columns,
    precondition: Preconditioner | None,
    tolerance: float,
    budget: int,
    progress: Callable[[int, float], None] | None,
) -> tuple[Columns, list[Verdict], list[list[float]]]:
    x = Columns({name: torch.zeros_like(tensor) for name, tensor in b.tensors.items()})
    r, sizes, reached, done = b, torch.ones(len(b), dtype=torch.float64), 1.0, 0
    histories: list[list[float]] = [[] for _ in range(len(b))]
    while True:
        x, r, verdict, done = _iterate(operator, x, r, precondition, tolerance, budget, done, histories, progress)
        if verdict != "converged":
            break
        r = x.mapped(lambda v: operator @ v).combined(-torch.eye(len(b), dtype=torch.float64), b)
        sizes = r.gram_diagonal().sqrt()
        worst = float(sizes.max())
        if worst <= tolerance or worst > 0.5 * reached or done >= budget:  # there, or rounding allows no better
            break
        reached = worst
    ended: list[Verdict] = ["converged" if float(s) <= tolerance else verdict for s in r.gram_diagonal().sqrt()]
    return x, ended, histories


def _iterate(
    operator: Operator,
    x: Columns,
    r: Columns,
    precondition: Preconditioner | None,
    tolerance: float,
    budget: int,
    done: int,
    histories: list[list[float]],
    progress: Callable[[int, float], None] | None,
) -> tuple[Columns, Columns, Verdict, int]:
    def needed(r: Columns) -> Columns:
        open_ = (r.gram_diagonal().sqrt() > tolerance).nonzero()[:, 0]
        rest = r.chosen(open_)
        return rest if precondition is None or not len(rest) else rest.mapped(precondition)

    p = needed(r).orthonormal()
    while len(p) and done < budget:
        done += 1
        cp = p.mapped(lambda v: operator @ v)
        d = p.gram(cp)
        if not bool(torch.isfinite(d).all()):
            return x, r, "not finite", done
        values, vectors = torch.linalg.eigh((d + d.T) / 2)
        if float(values[0]) <= 0:
            return x, r, "negative curvature", done
        inverse = vectors / values @ vectors.T
        step = inverse @ p.gram(r)
        x, r = p.combined(step, x), cp.combined(-step, r)
        sizes = r.gram_diagonal().sqrt()
        for history, size in zip(histories, sizes.tolist()):
            history.append(size)
        worst = float(sizes.max())
        if progress is not None:
            progress(done, worst)
        if not math.isfinite(worst):
            return x, r, "not finite", done
        z = needed(r)
        if not len(z):
            return x, r, "converged", done
        p = p.combined(-(inverse @ cp.gram(z)), z).orthonormal()
    return x, r, "converged" if not len(p) else "not converged", done
