"""Which damping: the spectrum of each stage's curvature, and how query vector and ranking move along a ladder of dampings.

A damping that is too small makes the answer one of the curvature sample; one that is too large turns it into a dot product of
gradients. Between the two, ranks change little from one rung to the next: the advice is the smallest such damping, and where ranks never
settle the smallest with which a second sample agrees, which is what "auto" takes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr

from nlpinf import parameters as P
from nlpinf.curvature import CurvatureKind
from nlpinf.curvature.spectrum import Spectrum, sketch
from nlpinf.damping import DETERMINED
from nlpinf.errors import BadInput
from nlpinf.influence import Progress, passed_back
from nlpinf.parameters import Parameters
from nlpinf.queries import Query
from nlpinf.scoring.reverse import ReverseScorer
from nlpinf.solvers import Solution
from nlpinf.solvers.ladder import solve_ladder
from nlpinf.stages import Chain, Stage
from nlpinf.systems import System

FACTORS = (1e-2, 1e-1, 1.0, 10.0, 100.0)
STEADY = 0.95  # rank correlation with the next larger damping from which ranks count as kept


@dataclass(frozen=True)
class Rung:
    """One damping. `cosine` and `spearman` compare query vector and ranking with the next larger damping's."""

    factor: float
    damping: float
    verdict: str
    residual: float
    second_residual: float | None
    products: int
    cosine: float | None
    spearman: float | None


@dataclass(frozen=True)
class Advice:
    """What was found for one stage; `recommended` is an absolute damping, None where no solve converged."""

    stage: str
    curvature: str
    rows: int
    spectrum: dict[str, float]
    rungs: list[Rung]
    recommended: float | None
    reason: str

    def content(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        return {**vars(self), "rungs": [vars(rung) for rung in self.rungs]}


def advise(
    chain: Chain,
    query: Query,
    *,
    curvature: CurvatureKind = "ggn",
    factors: Sequence[float] = FACTORS,
    sample: int | None = None,
    probe: int = 256,
    seed: int = 0,
    tolerance: float = 1e-2,
    max_iterations: int = 500,
    progress: Progress | None = None,
) -> list[Advice]:
    """Return the advice for every stage, the last first; each passes the query on with what was recommended for it.

    `factors` are multiples of the mean eigenvalue. Ranks are those of `probe` rows of the stage's own data. One Krylov space
    gives all dampings of a stage.
    """
    if not factors or not all(f > 0 for f in factors):
        raise BadInput(f"the factors are {list(factors)}; give multiples of the mean eigenvalue, each above 0")
    factors = sorted(factors)
    cotangent = query.gradient(chain.stages[-1])
    found = []
    for link in reversed(chain.links):
        stage = link.stage
        cotangent = P.embedded(cotangent, stage.parameters)
        rows = None if sample is None else min(sample, stage.size)
        system = System(link, curvature, 0.0, rows, seed)
        spectrum = sketch(system.operator, seed=seed)
        if not spectrum.mean > 0:
            raise BadInput(
                f"stage {stage.name!r}: the mean eigenvalue of its {curvature} is {spectrum.mean:.3g}; use curvature 'ggn'"
            )
        report = None if progress is None else (lambda k, r, name=stage.name: progress(name, k, r))
        right = P.select(cotangent, system.operator.template)
        ladder = solve_ladder(
            system.operator, right, [f * spectrum.mean for f in factors], system.second, tolerance, max_iterations, report
        )  # fmt: skip
        rungs = _rungs(stage, factors, ladder, probe, seed)
        best, reason = _recommended(rungs)
        found.append(
            Advice(
                stage.name, curvature, len(system.first), _told(spectrum), rungs,
                None if best is None else rungs[best].damping, reason,
            )
        )  # fmt: skip
        if best is None:
            break
        cotangent = passed_back(link, cotangent, ladder[best].vector, system.first)
    return found


def ranks_of(stage: Stage, vectors: Sequence[Parameters], probe: int, seed: int) -> np.ndarray:
    """Return the scores (rows, vectors) of `probe` seeded rows of the stage's data."""
    order = torch.randperm(stage.size, generator=torch.Generator().manual_seed(seed + 1)).tolist()
    scorer = ReverseScorer(stage, list(vectors))
    return torch.cat([scorer(batch).scores.cpu() for batch in stage.batches(sorted(order[:probe]))]).numpy()


def agreement(scores: np.ndarray, other: np.ndarray) -> float:
    """Return the Spearman correlation of two columns of scores, 1 where both are constant."""
    if np.ptp(scores) == 0 or np.ptp(other) == 0:
        return float(np.ptp(scores) == np.ptp(other))
    return float(spearmanr(scores, other).statistic)


def _rungs(stage: Stage, factors: Sequence[float], ladder: list[Solution], probe: int, seed: int) -> list[Rung]:
    vectors = [s.vector for s in ladder]
    scores = ranks_of(stage, vectors, probe, seed)
    rungs = []
    for k, (factor, s) in enumerate(zip(factors, ladder)):
        last = k + 1 == len(ladder)
        size = 0.0 if last else P.norm(vectors[k]) * P.norm(vectors[k + 1])
        cosine = None if last else P.dot(vectors[k], vectors[k + 1]) / size if size else 1.0
        spearman = None if last else agreement(scores[:, k], scores[:, k + 1])
        rungs.append(
            Rung(factor, s.damping, s.verdict, s.residual, s.second_residual, s.products, cosine, spearman)
        )  # fmt: skip
    return rungs


def _recommended(rungs: list[Rung]) -> tuple[int | None, str]:
    solved = [k for k, r in enumerate(rungs) if r.verdict == "converged"]
    if not solved:
        return None, "no solve converged: allow more iterations or larger dampings"
    for k in solved:
        r = rungs[k]
        steady = r.spearman is not None and r.spearman >= STEADY
        if steady and (r.second_residual is None or r.second_residual <= DETERMINED):
            second = (
                "" if r.second_residual is None else f" and a second sample agrees (residual {r.second_residual:.2f})"
            )
            return k, f"the smallest whose ranks are kept by the next larger one (correlation {r.spearman:.3f}){second}"
    determined = [k for k in solved if (rungs[k].second_residual or 0.0) <= DETERMINED]
    if determined:
        k = determined[0]
        return k, (
            "the smallest with which a second sample agrees; ranks change from rung to rung: compare a few removals with retraining"
        )
    k = min(solved, key=lambda k: (rungs[k].second_residual or 0.0, rungs[k].damping))
    return k, (
        f"even here the sample determines the answer (residual {rungs[k].second_residual:.2f} on a second one): take more rows"
    )


def _told(spectrum: Spectrum) -> dict[str, float]:
    return {
        "parameters": spectrum.size,
        "mean": spectrum.mean,
        "smallest": spectrum.smallest,
        "largest": spectrum.largest,
        "above_mean": round(spectrum.above(spectrum.mean)),
        "products": spectrum.products,
    }
