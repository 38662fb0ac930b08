"""Query vectors and scores against dense float64 oracles, over the whole table of cases."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch

from nlpinf.curvature import Matrix, curvature_samples
from nlpinf.damping import Relative
from nlpinf.errors import BadInput, NotConverged
from nlpinf.influence import ImplicitSolve, query_vectors
from nlpinf.queries import Query
from nlpinf.solvers import CG, Preconditioner
from nlpinf.stages import Chain, Stage
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


def test_one_stage_is_the_classic_influence_function() -> None:
    """Without a second stage v = −(G'' + λI)⁻¹ q'."""
    c, d = case("mlp", "frozen"), oracle.dense("mlp", "frozen", 0)
    stage = c.chain.stages[0]
    query = Query.mean_loss(stage.data[:3])
    made = query_vectors(Chain([stage]), [query], curvature="hessian", damping=3.0, solver=CG(1e-12))
    matrix = oracle.matrix("mlp", "frozen", 0, "hessian") + 3.0 * torch.eye(len(d.theta), dtype=torch.float64)
    expected = -torch.linalg.solve(matrix, d.gradients[:3].mean(0))
    assert torch.linalg.norm(d.flat(made.vectors[0]) - expected) <= 1e-10 * torch.linalg.norm(expected)
    assert made.values[0] == pytest.approx(float(sum(d.loss(d.theta, i) for i in range(3)) / 3), rel=1e-12)


def test_the_curvature_sample_is_what_the_solve_averages_over() -> None:
    """Two rows of the corpus carry the curvature; the second residual is that of two others."""
    c, d = case("mlp", "frozen"), oracle.dense("mlp", "frozen", 0)
    stage = c.chain.stages[0]
    made = query_vectors(Chain([stage]), [Query.loss(stage.data[0])], damping=0.1, solver=CG(1e-12), sample=2, seed=3)
    first, second = curvature_samples(stage.size, 2, 3)
    weights = torch.zeros(2, stage.size, dtype=torch.float64)
    weights[0, first] = weights[1, second] = 0.5
    eye = torch.eye(len(d.theta), dtype=torch.float64)
    shift = torch.diag(d.shift(c.chain.links[0])) + 0.1 * eye
    matrices = [shift.clone(), shift.clone()]
    for i, jacobian in enumerate(d.jacobians):
        p = torch.softmax(d.outputs(d.theta, i)[0][0], 0)
        block = jacobian[0].T @ (torch.diag(p) - torch.outer(p, p)) @ jacobian[0]
        for which in (0, 1):
            matrices[which] += weights[which, i] * block
    q = d.gradients[0]
    v = d.flat(made.vectors[0])
    expected = -torch.linalg.solve(matrices[0], q)
    assert torch.linalg.norm(v - expected) <= 1e-9 * torch.linalg.norm(expected)
    (solution,) = made.verdicts[0].values()
    residual = float(torch.linalg.norm(q + matrices[1] @ v) / torch.linalg.norm(q))
    assert solution.second_residual == pytest.approx(residual, rel=1e-8)
    assert residual > 0.01


def test_verdicts_and_settings_tell_how_it_was_made() -> None:
    c = case("mlp", "three stages")
    made = query_vectors(
        c.chain, [Query.loss(c.asked[0]), Query.loss(c.asked[1])], curvature=["fisher", "ggn", "ggn"],
        damping=[Relative(0.1), 0.2, 0.3], sample=4, seed=5,
    )  # fmt: skip
    assert len(made) == 2 and made.stage is c.chain.stages[0]
    assert [list(v) for v in made.verdicts] == [[s.name for s in reversed(c.chain.stages)]] * 2
    assert [s.damping for s in made.verdicts[0].values()][:2] == [0.3, 0.2]
    assert made.settings["transfer"] == [{"proximity": 0.2}, {"proximity": pytest.approx(0.3)}]
    assert [s["curvature"] for s in made.settings["steps"]] == ["fisher", "ggn", "ggn"]
    assert [s["damping"] for s in made.settings["steps"]] == [{"relative": 0.1}, 0.2, 0.3]
    assert made.settings["sign"] == "positive = harmful"
    json.dumps(made.settings)
    assert made.converged


def test_what_did_not_converge_raises_unless_allowed() -> None:
    c = case("lstm tagger", "frozen")
    queries, short = [Query.mean_loss(list(c.asked))], CG(tolerance=1e-12, max_iterations=2)
    with pytest.raises(NotConverged, match="stage 'last frozen 0': not converged"):
        query_vectors(c.chain, queries, damping=1e-3, solver=short)
    made = query_vectors(c.chain, queries, damping=1e-3, solver=short, allow_unconverged=True)
    assert not made.converged
    assert all(step["allow_unconverged"] for step in made.settings["steps"])
    with pytest.raises(NotConverged, match="negative curvature"):
        query_vectors(
            case("mlp", "frozen").chain, [Query.loss(case("mlp", "frozen").asked[0])], curvature="hessian", damping=0.0
        )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"damping": -0.1}, "damping is -0.1; it must not be negative"),
        ({"sample": 99}, "99 rows, but the corpus has 7"),
        ({"sample": 0}, "0 rows"),
        ({"curvature": "kfac"}, "'kfac'"),
        ({"curvature": ["ggn"]}, "1 settings for 2 stages"),
        ({"queries": []}, "no query"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    c = case("mlp", "frozen")
    with pytest.raises(BadInput, match=message) as e:
        query_vectors(c.chain, settings.pop("queries", [Query.loss(c.asked[0])]), **settings)
    assert "\n" not in str(e.value)
    with pytest.raises(BadInput, match="relative damping is -1"):
        Relative(-1.0)
