"""A curvature sample that grows until a larger one no longer changes the order of the scores."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr

from nlpinf import parameters as P
from nlpinf import processes
from nlpinf.curvature.products import output_tangents
from nlpinf.errors import BadInput
from nlpinf.parameters import Parameters
from nlpinf.solvers import Solution
from nlpinf.stages import Stage, evaluation


@dataclass(frozen=True)
class Growing:
    """Sizes `start`, `start`·`factor`, ... of the curvature sample, up to `limit` rows (None: the whole corpus).

    It ends when the scores of `probe` rows of the corpus, drawn by the solves' seed, have a Spearman correlation of at
    least `spearman` with those of the size before, for every query. Each sample holds the one before.
    """

    start: int = 1024
    factor: int = 2
    limit: int | None = None
    spearman: float = 0.98
    probe: int = 2000

    def __post_init__(self) -> None:
        if self.start < 1 or self.factor < 2 or self.probe < 3:
            raise BadInput(
                f"a sample that grows from {self.start} rows by factor {self.factor} with a probe of {self.probe} rows was "
                "asked for; they must be at least 1, 2 and 3"
            )
        if not -1 < self.spearman < 1:
            raise BadInput(f"the rank correlation to reach is {self.spearman}; it must lie between -1 and 1")
        if self.limit is not None and self.limit < self.start:
            raise BadInput(f"the sample grows to {self.limit} rows, fewer than the {self.start} it starts with")


@dataclass(frozen=True)
class Size:
    """What one size of the sample gave; of several queries the worst.

    `products`         curvature products of all solves; each reads `rows` rows of the corpus, or all of a smaller one
    `second_residual`  of the pretraining's solve on as many other rows
    `spearman`, `cosine`  of the probe's scores and of the query vector with those of the size before
    """

    rows: int
    products: int
    verdict: str
    second_residual: float | None
    spearman: float | None
    cosine: float | None


Pulled = tuple[list[Parameters], list[dict[str, Solution]]]


def grow(
    growing: Growing, stage: Stage, seed: int, pull: Callable[[int, list[dict[str, Solution]] | None], Pulled]
) -> tuple[Pulled, dict[str, Any]]:
    """Return the query vectors of the last size, and the curve for a manifest.

    `pull(rows, before)` gives the vectors of a size and how their solves ended, `before` being the solves of the size
    before. `ended` in the curve is "stable", "whole corpus" (nothing is left to draw: the sample plays no part any more) or
    "limit reached", of which no more is known than the curve shows.
    """
    if P.in_pieces(stage.theta):
        raise BadInput(
            f"stage {stage.name!r}: its model is sharded among processes, whose sample cannot grow; give a number of rows"
        )
    cap = min(growing.limit or stage.size, stage.size)
    draw = torch.randperm(stage.size, generator=torch.Generator().manual_seed(seed + 1))
    probe = sorted(draw[: growing.probe].tolist())
    rows, sizes, ended = min(growing.start, cap), list[Size](), ""
    found: Pulled | None = None
    scores = np.zeros(0)
    while not ended:
        before, known = found, scores
        found = pull(rows, None if before is None else before[1])
        scores = probe_scores(stage, found[0], probe)
        ranks, cosine = None, None
        if before is not None:
            ranks = min(_correlation(known[:, q], scores[:, q]) for q in range(len(found[0])))
            cosine = min(_cosine(a, b) for a, b in zip(before[0], found[0]))
        sizes.append(_size(rows, found[1], ranks, cosine))
        if rows == stage.size:
            ended = "whole corpus"
        elif ranks is not None and ranks >= growing.spearman:
            ended = "stable"
        elif rows == cap:
            ended = "limit reached"
        rows = min(rows * growing.factor, cap)
    assert found is not None
    curve = {**asdict(growing), "probe": len(probe), "ended": ended, "sizes": [asdict(size) for size in sizes]}
    return found, curve


def _size(rows: int, verdicts: Sequence[dict[str, Solution]], ranks: float | None, cosine: float | None) -> Size:
    ends = [solution for verdict in verdicts for solution in verdict.values()]
    open_ = [s.verdict for s in ends if not s.converged]
    seconds = [list(verdict.values())[-1].second_residual for verdict in verdicts]
    second = max((s for s in seconds if s is not None), default=None)
    return Size(rows, sum(s.products for s in ends), open_[0] if open_ else "converged", second, ranks, cosine)


def probe_scores(stage: Stage, vectors: Sequence[Parameters], rows: Sequence[int]) -> np.ndarray:
    """Return ⟨v, g'(z)⟩ of the examples at `rows` for every v: (rows, vectors), the longest first; a forward-mode pass for each v."""
    found = torch.zeros(len(rows), len(vectors), dtype=torch.float64)
    at = 0
    with evaluation(stage.model):
        for number, batch in enumerate(stage.batches(rows)):
            mine = number % processes.count() == processes.rank()
            for q, vector in enumerate(vectors if mine else []):
                outputs, moved = output_tangents(stage, batch, vector)
                items = (stage.task.loss.gradient(outputs, batch.targets) * moved).sum(-1) * stage.item_weights(batch)
                scores = items.new_zeros(len(batch)).index_add(0, batch.example, items)
                found[at : at + len(batch), q] = scores.double().cpu()
            at += len(batch)
    return processes.total({"scores": found})["scores"].numpy()


def _correlation(one: np.ndarray, other: np.ndarray) -> float:
    """Spearman's; 1 where both are constant, as for a query that nothing reaches, and 0 where one is."""
    constant = [np.ptp(one) == 0, np.ptp(other) == 0]
    return float(all(constant)) if any(constant) else float(spearmanr(one, other).statistic)


def _cosine(one: Parameters, other: Parameters) -> float:
    sizes = P.norm(one) * P.norm(other)
    return P.dot(one, other) / sizes if sizes else 1.0
