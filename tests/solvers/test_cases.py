"""Every solver and preconditioner on the table of cases, against the dense systems of its stages."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch

from nlpinf import parameters as P
from nlpinf.curvature import Matrix
from nlpinf.curvature.ekfac import EKFAC
from nlpinf.influence import ImplicitSolve
from nlpinf.solvers import CG, MINRES, LiSSA
from nlpinf.systems import System
from tests import oracle
from tests.cases import FAMILIES, case

# On the products of the network itself, which tests/curvature holds against the dense matrices.
SOLVERS: list[tuple[Any, str]] = [
    (CG(1e-9), "ekfac"),
    (CG(1e-9), "diagonal"),
    (CG(1e-9), "nystrom"),
    (CG(1e-9), "ekfac+nystrom"),
    (CG(1e-9), "spectral"),
    (MINRES(1e-9), "ekfac"),
    (MINRES(1e-9), "none"),
    (LiSSA(1e-2, 300), "ekfac"),
]
# One solve for every architecture, all solvers for three, and LiSSA, slow by nature, on the smallest alone.
THREE = ("mlp", "bert sdpa", "lstm tagger")
ALL = [(f, k) for f in FAMILIES for k in range(len(SOLVERS)) if k == 0 or (f in THREE and (k < 7 or f == "mlp"))]
# On the dense matrix, where a product costs nothing.
ITERATIVE: list[Any] = [CG(1e-9), CG(1e-9, block=1), MINRES(1e-9), LiSSA(1e-9, 4000)]
NAMES = ["block cg", "cg", "minres", "lissa"]


@cache
def factors(family: str) -> EKFAC:
    return EKFAC.fit(case(family, "frozen").chain.links[0].stage)


@pytest.mark.parametrize(("family", "which"), ALL)
def test_solvers_equal_the_dense_solution(family: str, which: int) -> None:
    """Two right-hand sides, one damping for all: the answer is the dense one to the residual that was asked for."""
    solver, preconditioner = SOLVERS[which]
    link, d = case(family, "frozen").chain.links[0], oracle.dense(family, "frozen", 0)
    matrix = oracle.matrix(family, "frozen", 0, "ggn")
    damping = 0.1 * float(torch.linalg.eigvalsh(matrix)[-1])
    system = System(link, "ggn", damping, None, 0, preconditioner)
    rights = [P.random_like(link.stage.theta, seed) for seed in (1, 2)]
    for right, solution in zip(rights, system.solve(solver, rights)):
        assert solution.converged, solution
        trained = d.where(list(link.stage.trained))
        expected = torch.linalg.solve(matrix + damping * torch.eye(len(matrix)).double(), d.flat(right)[trained])
        # An answer with residual r is off by at most r times the condition number, here at most 11: the solver's stated error.
        allowed = 1e-6 if solver.tolerance < 1e-6 else 11 * solution.residual
        assert torch.linalg.norm(d.flat(solution.vector)[trained] - expected) <= allowed * torch.linalg.norm(expected)


@pytest.mark.parametrize("preconditioner", ["none", "ekfac"])
@pytest.mark.parametrize("solver", ITERATIVE, ids=NAMES)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_solver_on_every_dense_case(family: str, solver: Any, preconditioner: str) -> None:
    """The pretraining stage's Gauss-Newton matrix of every architecture, with and without EK-FAC of the network: 1e-6."""
    link, d = case(family, "frozen").chain.links[0], oracle.dense(family, "frozen", 0)
    dense = oracle.matrix(family, "frozen", 0, "ggn")
    damping = 0.1 * float(torch.linalg.eigvalsh(dense)[-1])
    dense = dense + damping * torch.eye(len(dense)).double()
    trained = d.where(list(link.stage.trained))
    if preconditioner == "ekfac":
        solver = replace(solver, preconditioner=factors(family).inverse(damping, link.shift))
    rights = [P.random_like(link.stage.theta, seed) for seed in (1, 2)]
    for right, solution in zip(rights, solver.many(Matrix(link.stage.theta, dense), rights)):
        assert solution.converged, solution
        expected = torch.linalg.solve(dense, d.flat(right)[trained])
        assert torch.linalg.norm(d.flat(solution.vector)[trained] - expected) <= 1e-6 * torch.linalg.norm(expected)


def test_auto_takes_the_hessian_where_it_is_definite_and_says_why() -> None:
    family, link = "mlp", case("mlp", "frozen").chain.links[0]
    matrix = oracle.matrix(family, "frozen", 0, "hessian")
    least = float(torch.linalg.eigvalsh(matrix)[0])
    assert least < 0  # random weights: not at a minimum
    enough = System(link, "auto", -2 * least, None, 0)
    assert enough.kind == "hessian" and "positive definite" in enough.reason
    (solution,) = enough.solve(CG(1e-9), [P.random_like(link.stage.theta, 1)])
    assert solution.converged and "exact Hessian" in solution.note
    little = System(link, "auto", -0.5 * least, None, 0)
    assert little.kind == "ggn" and "Gauss-Newton matrix: the damped Hessian has an eigenvalue" in little.reason
    step = ImplicitSolve("auto", -0.5 * least, CG(1e-9))
    (pulled,) = step(link, [P.random_like(link.stage.theta, 1)])
    assert "Gauss-Newton" in pulled.solution.note
    assert step.settings()["chosen"] == {link.stage.name: little.reason}


def test_auto_falls_back_when_a_solve_meets_negative_curvature(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nlpinf.systems.smallest_ritz_value", lambda *_, **__: 1.0)
    link = case("mlp", "frozen").chain.links[0]
    system = System(link, "auto", 1e-3, None, 0, "ekfac")
    rights = [P.random_like(link.stage.theta, 1)]
    (solution,) = system.solve(CG(1e-6), rights)
    assert solution.converged and "met negative curvature" in solution.note
    (plain,) = System(link, "ggn", 1e-3, None, 0).solve(CG(1e-6), rights)
    assert P.norm(P.axpy(-1.0, plain.vector, solution.vector)) <= 1e-3 * P.norm(plain.vector)


def test_one_row_and_a_query_without_a_gradient() -> None:
    """A sample of one row, and a right-hand side of zeros beside another, for each preconditioner."""
    link = case("bert sdpa", "frozen").chain.links[0]
    right = P.random_like(link.stage.theta, 1)
    for preconditioner in ("none", "ekfac"):
        system = System(link, "ggn", 0.1, 1, 0, preconditioner)
        first, zero = system.solve(replace(CG(1e-6), max_iterations=500), [right, P.zeros_like(right)])
        assert first.converged and first.second_residual is not None
        assert zero.converged and P.norm(zero.vector) == 0.0
