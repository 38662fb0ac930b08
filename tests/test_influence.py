"""Query vectors and scores against dense float64 oracles, over the whole table of cases."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from nlpinf.curvature import Matrix
from nlpinf.influence import ImplicitSolve, query_vectors
from nlpinf.queries import Query
from nlpinf.solvers import CG, Preconditioner
from nlpinf.stages import Stage
from tests import oracle
from tests.cases import NAMES, case, scores_of


def inverse(family: str, path: str, k: int, kind: str, damping: float, stage: Stage) -> Preconditioner:
    """Return the dense inverse as a preconditioner: the solve still ends on the operator's own residual, only sooner."""
    dense = oracle.matrix(family, path, k, kind)
    inverse = torch.linalg.inv(dense + damping * torch.eye(len(dense), dtype=torch.float64))
    return Matrix(stage.theta, inverse.to(stage.dtype)).product


def compare(family: str, path: str, kinds: list[str], dtype: torch.dtype, tolerance: float) -> None:
    """Compare v and scores with the oracle's; text models beyond the frozen path solve with a preconditioner, for speed."""
    c = case(family, path, dtype)
    stages = c.chain.stages
    kinds = kinds if len(kinds) == len(stages) else kinds * len(stages)
    alone = path == "frozen" or family.startswith(("mlp", "lstm"))
    share = 0.4 if alone and not family.startswith("mlp") else 0.02
    dampings = [oracle.safe_damping(family, path, k, kind, share) for k, kind in enumerate(kinds)]
    asked = list(c.asked)
    queries = [Query.mean_loss(asked), Query.loss(asked[-1])][: 2 if family in ("mlp", "lstm tagger") else 1]
    solver = CG(tolerance=1e-10 if dtype == torch.float64 else 3e-6)
    if alone:
        made = query_vectors(c.chain, queries, curvature=kinds, damping=dampings, solver=solver)
    else:
        steps = [
            ImplicitSolve(kind, damping, replace(solver, preconditioner=inverse(family, path, k, kind, damping, stage)))
            for k, (kind, damping, stage) in enumerate(zip(kinds, dampings, stages))
        ]
        made = query_vectors(c.chain, queries, steps=steps)
    assert made.converged
    scores = scores_of(stages[0], list(made.vectors))
    first = oracle.dense(family, path, 0)
    trained = first.where(list(stages[0].trained))
    for i, which in enumerate([slice(None), slice(-1, None)][: len(queries)]):
        q = oracle.query_gradient(family, path, asked, which)
        expected = oracle.vector(family, path, q, kinds, dampings)
        v = torch.cat([made.vectors[i][n].double().flatten() for n in stages[0].trained])
        assert torch.linalg.norm(v - expected) <= tolerance * torch.linalg.norm(expected)
        right = first.gradients[:, trained] @ expected
        assert (scores[:, i] - right).abs().max() <= tolerance * right.abs().max()


@pytest.mark.parametrize("kind", ["hessian", "ggn"])
@pytest.mark.parametrize(("family", "path"), NAMES)
def test_vectors_and_scores_equal_the_dense_formulas(family: str, path: str, kind: str) -> None:
    compare(family, path, [kind], torch.float64, 1e-8)


@pytest.mark.parametrize(("family", "path"), [n for n in NAMES if n[1] == "three stages"])
def test_vectors_and_scores_in_single_precision(family: str, path: str) -> None:
    compare(family, path, ["ggn", "hessian", "ggn"], torch.float32, 1e-4)


@pytest.mark.parametrize(
    ("family", "path"), [("mlp", "proximity"), ("bert sdpa", "frozen"), ("lstm tagger", "proximity")]
)
def test_vectors_and_scores_with_the_fisher(family: str, path: str) -> None:
    compare(family, path, ["fisher"], torch.float64, 1e-8)
