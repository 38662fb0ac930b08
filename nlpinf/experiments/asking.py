"""Ask as query settings say, those of a recipe and those of the command line alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from nlpinf.checkpoints import Checkpoints
from nlpinf.damping import Relative
from nlpinf.experiments.recipe import QuerySettings, RelativeDamping
from nlpinf.growing import Growing
from nlpinf.influence import Progress, QueryVectors, query_vectors
from nlpinf.queries import Query
from nlpinf.solvers import CG, MINRES, Direct, LiSSA, Refined, Solver
from nlpinf.stages import Chain

AUTO_ROWS = 1024  # of the sample "auto", at most

_ITERATIVE: dict[str, Any] = {"cg": CG, "minres": MINRES, "lissa": LiSSA}


def ask(
    chain: Chain,
    queries: Sequence[Query],
    settings: QuerySettings,
    seed: int,
    checkpoint: Checkpoints,
    progress: Progress | None = None,
) -> QueryVectors:
    """Return the query vectors of `queries` through `chain`; the arguments are those of `nlpinf.query_vectors`."""
    given = settings.damping if isinstance(settings.damping, list) else [settings.damping] * len(chain.links)
    preconditioner = settings.preconditioner
    if settings.solver == "direct" and preconditioner == "none":
        preconditioner = "ekfac"
    return query_vectors(
        chain,
        queries,
        curvature=settings.curvature,
        damping=[Relative(d.relative) if isinstance(d, RelativeDamping) else d for d in given],
        solver=solver_of(settings),
        preconditioner=None if preconditioner == "none" else preconditioner,
        sample=sample_of(settings, chain.stages[0].size),
        error_bars=settings.error_bars,
        seed=seed,
        allow_unconverged=settings.allow_unconverged,
        checkpoint=checkpoint,
        progress=progress,
    )


def solver_of(settings: QuerySettings) -> Solver:
    """Return the solver that the settings name, with their tolerance, limit and precision."""
    if settings.solver == "direct":
        return Direct(settings.tolerance)
    solver: Solver = _ITERATIVE[settings.solver](settings.tolerance, settings.max_iterations)
    return solver if settings.precision is None else Refined(solver, settings.precision)


def sample_of(settings: QuerySettings, size: int) -> int | Growing | list[int | None] | None:
    """Return the curvature sample for a pretraining corpus of `size` rows.

    "auto" is at most 1,024 rows, half of the corpus, and with error bars of K samples a K-th of it.
    """
    if settings.sample == "grow":
        start, limit = Growing().start, settings.sample_limit
        return Growing(start=min(start, limit or start), limit=limit)
    if settings.sample == "auto":
        return min(AUTO_ROWS, max(1, size // max(2, settings.error_bars or 2)))
    return settings.sample
