"""Every solver and preconditioner against dense answers, and the ends that each has to tell."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from nlpinf import parameters as P
from nlpinf.curvature import Curvature, Matrix, Operator, Shifted
from nlpinf.curvature.ekfac import EKFAC
from nlpinf.errors import BadInput
from nlpinf.solvers import CG, MINRES, Direct, LimitedMemory, LiSSA, Nystrom, preconditioning
from nlpinf.solvers.lissa import largest_eigenvalue
from tests import oracle
from tests.cases import case
from tests.solvers.test_cg import RIGHT, SIZE, TEMPLATE, definite, flat, tree, true_residual


class Mean(Operator):
    """The mean of matrices, handed to stochastic solvers one by one."""

    def __init__(self, matrices: list[Tensor]) -> None:
        super().__init__(TEMPLATE)
        self.matrices = matrices

    def parts(self) -> list[Operator]:
        return [Matrix(TEMPLATE, m) for m in self.matrices]

    def product(self, vector: P.Parameters) -> P.Parameters:
        return tree(torch.stack(self.matrices).mean(0) @ flat(vector))


ITERATIVE: list[Any] = [CG(1e-8), MINRES(1e-8), LiSSA(1e-8, 4000)]
NAMES = [s.settings()["name"] for s in ITERATIVE]


@pytest.mark.parametrize("solver", ITERATIVE, ids=NAMES)
def test_every_solver_reaches_the_dense_answer(solver: Any) -> None:
    matrix = definite(30.0)
    second = Matrix(TEMPLATE, definite(30.0, seed=1))
    solution = solver(Matrix(TEMPLATE, matrix), RIGHT, second)
    assert solution.converged, solution
    assert solution.residual == pytest.approx(true_residual(matrix, solution.vector), rel=1e-6, abs=1e-15)
    assert solution.second_residual == pytest.approx(true_residual(second.matrix, solution.vector), rel=1e-6)
    expected = torch.linalg.solve(matrix, flat(RIGHT))
    assert torch.linalg.norm(flat(solution.vector) - expected) <= 1e-6 * torch.linalg.norm(expected)


@pytest.mark.parametrize("solver", [*ITERATIVE, Direct(preconditioner=lambda v: v)], ids=[*NAMES, "direct"])
def test_ends_that_are_no_answers(solver: Any) -> None:
    """A zero right-hand side, one that is not finite, an operator that gives NaN: a verdict, and no NaN in the vector."""
    operator = Matrix(TEMPLATE, definite())
    zero = solver(operator, P.zeros_like(RIGHT))
    assert (zero.verdict, zero.residual, P.norm(zero.vector)) == ("converged", 0.0, 0.0)
    bad = solver(operator, {**RIGHT, "b": RIGHT["b"] * float("nan")})
    assert bad.verdict == "not finite" and P.finite(bad.vector)
    broken = solver(Matrix(TEMPLATE, definite() * float("nan")), RIGHT)
    assert broken.verdict in ("not finite", "diverged")
    assert P.finite(broken.vector)


def test_minres_solves_what_is_indefinite_and_what_is_singular() -> None:
    values = torch.cat([-torch.logspace(-1, 1, 7), torch.logspace(-1, 1, SIZE - 7)]).double()
    basis = torch.linalg.eigh(definite())[1]
    matrix = basis @ torch.diag(values) @ basis.T
    assert CG(1e-8)(Matrix(TEMPLATE, matrix), RIGHT).verdict == "negative curvature"
    solution = MINRES(1e-8)(Matrix(TEMPLATE, matrix), RIGHT)
    assert solution.converged and true_residual(matrix, solution.vector) <= 1e-8
    weights = torch.logspace(0, 2, SIZE).double()
    helped = MINRES(1e-8, preconditioner=Matrix(TEMPLATE, torch.diag(1 / weights)).product)(
        Matrix(TEMPLATE, matrix), RIGHT
    )
    assert helped.converged and true_residual(matrix, helped.vector) <= 1e-8
    singular = basis[:, :12] @ torch.diag(values[:12]) @ basis[:, :12].T
    within = tree(singular @ flat(RIGHT))
    assert MINRES(1e-8)(Matrix(TEMPLATE, singular), within).converged
    outside = MINRES(1e-8)(Matrix(TEMPLATE, singular), RIGHT)
    assert outside.verdict == "not converged" and P.finite(outside.vector)


def test_the_recurrence_of_minres_is_its_residual() -> None:
    seen: list[float] = []
    matrix = definite(50.0)
    for budget in (3, 6, 9):
        end = MINRES(1e-13, max_iterations=budget, preconditioner=lambda v: {n: 0.5 * t for n, t in v.items()})(
            Matrix(TEMPLATE, matrix), RIGHT
        )
        seen.append(end.history[-1] / end.residual)
    assert seen == pytest.approx([1.0] * 3, rel=1e-8)


def test_lissa_on_parts_is_stochastic_and_tells_its_noise() -> None:
    matrices = [definite(20.0) + 3 * torch.diag(torch.rand(SIZE, generator=torch.Generator().manual_seed(k)).double()) for k in range(6)]  # fmt: skip
    mean = torch.stack(matrices).mean(0)
    operator = Mean(matrices)
    solution = LiSSA(2e-2, 400)(operator, RIGHT)
    assert solution.converged and true_residual(mean, solution.vector) <= 2e-2
    assert solution.note.startswith("noise ")
    assert solution.products == operator.products
    inverse = Matrix(TEMPLATE, torch.linalg.inv(mean)).product
    assert LiSSA(2e-2, 400, preconditioner=inverse)(operator, RIGHT).products < solution.products
    again = LiSSA(2e-2, 400)(Mean(matrices), RIGHT)
    assert torch.equal(flat(again.vector), flat(solution.vector))


@pytest.mark.parametrize("budget", range(40, 46))
def test_the_noise_of_lissa_is_of_two_halves(budget: int) -> None:
    """Whatever is left for the last round: on one part iterates near the end hardly differ, so their noise is small."""
    solution = LiSSA(1e-9, budget)(Matrix(TEMPLATE, definite(3.0)), RIGHT)
    noise = float(solution.note.removeprefix("noise ").split(",")[0])
    assert 0 < noise < 1e-2, solution


def test_lissa_halves_a_step_that_diverges_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nlpinf.solvers.lissa.largest_eigenvalue", lambda *_, **__: 20.0)  # five times too small
    solution = LiSSA(1e-3, 4000)(Matrix(TEMPLATE, definite(100.0)), RIGHT)
    assert solution.converged
    assert "step halved" in solution.note and solution.note in str(solution)
    indefinite = LiSSA(1e-3, 4000)(Matrix(TEMPLATE, -definite(100.0)), RIGHT)
    assert indefinite.verdict == "diverged" and P.finite(indefinite.vector)


def test_power_iteration_finds_the_largest_eigenvalue() -> None:
    assert largest_eigenvalue(Matrix(TEMPLATE, definite(100.0)), iterations=60) == pytest.approx(100.0, rel=1e-3)


@pytest.mark.parametrize("preconditioner", [None, "exact"])
def test_a_block_gives_each_its_answer_in_fewer_products(preconditioner: str | None) -> None:
    matrix = definite(1e3)
    inverse = torch.linalg.inv(matrix + 0.3 * torch.eye(SIZE).double())
    solver = CG(1e-9, preconditioner=preconditioner and Matrix(TEMPLATE, inverse).product)
    rights = [P.scaled(10.0**k, P.random_like(TEMPLATE, k)) for k in range(4)]
    # Equal, dependent and zero columns take directions away, and must not break it down.
    rights += [rights[0], P.axpy(1e-3, rights[0], rights[1]), P.zeros_like(rights[0])]
    operator = Matrix(TEMPLATE, matrix)
    solutions = solver.many(operator, rights, Matrix(TEMPLATE, matrix))
    for solution, right in zip(solutions, rights):
        assert solution.converged, solution
        expected = torch.linalg.solve(matrix, flat(right))
        assert torch.linalg.norm(flat(solution.vector) - expected) <= 1e-7 * torch.linalg.norm(expected)
    alone = sum(solver(operator, right).products for right in rights)
    assert sum(s.products for s in solutions) < (0.8 if preconditioner else 0.6) * alone
    (single,) = solver.many(operator, rights[:1])
    assert single.solver == "cg"
    narrow = CG(1e-9, block=1).many(operator, rights[:2])
    assert [s.solver for s in narrow] == ["cg", "cg"]


def test_a_block_tells_of_each_column_how_it_ended() -> None:
    operator = Matrix(TEMPLATE, definite(1e6))
    bad = {**RIGHT, "b": RIGHT["b"] * float("inf")}
    top = tree(torch.linalg.eigh(definite(1e6))[1][:, -1])
    ends = CG(1e-6, max_iterations=3).many(operator, [RIGHT, top, bad])
    assert [e.verdict for e in ends] == ["not converged", "converged", "not finite"]
    assert all(P.finite(e.vector) for e in ends)
    assert {e.verdict for e in CG().many(Matrix(TEMPLATE, -definite()), [RIGHT, top])} == {"negative curvature"}


def test_nystrom_takes_the_large_eigenvalues_out() -> None:
    values = torch.cat([torch.logspace(1, 4, 12), torch.linspace(0.1, 0.2, SIZE - 12)]).double()
    basis = torch.linalg.eigh(definite())[1]
    base = Matrix(TEMPLATE, basis @ torch.diag(values) @ basis.T)
    operator = Shifted(base, damping=0.5)
    plain = CG(1e-8)(operator, RIGHT)
    helped = CG(1e-8, preconditioner=Nystrom(14).fit(operator))(operator, RIGHT)
    assert helped.converged and helped.products <= 0.6 * plain.products
    full = Nystrom(SIZE).fit(operator)(RIGHT)
    assert true_residual(base.matrix + 0.5 * torch.eye(SIZE).double(), full) <= 1e-8


def test_past_solves_help_the_next() -> None:
    operator = Shifted(Matrix(TEMPLATE, definite(1e4)), damping=0.1)
    recycled = LimitedMemory(memory=SIZE).fit(operator)
    first = CG(1e-6, preconditioner=recycled)(operator, RIGHT)
    again = CG(1e-6, preconditioner=recycled)(operator, P.axpy(0.1, P.random_like(TEMPLATE, 9), RIGHT))
    assert first.converged and again.converged
    assert again.products < 0.6 * first.products


def test_past_solves_help_the_other_queries_of_a_call() -> None:
    operator = Shifted(Matrix(TEMPLATE, definite(1e4)), damping=0.1)
    rights = [P.axpy(0.1, P.random_like(TEMPLATE, k), RIGHT) for k in range(3)]
    solutions = CG(1e-6, preconditioner=LimitedMemory(memory=SIZE).fit(operator)).many(operator, rights)
    assert all(s.converged for s in solutions)
    assert max(s.products for s in solutions[1:]) < 0.6 * solutions[0].products


def test_ekfac_alone_says_what_it_is_worth() -> None:
    stage = case("mlp", "frozen").chain.stages[0]
    operator = Shifted(Curvature(stage, "ggn"), {n: 0.01 for n in stage.theta}, 1e-3)
    right = P.random_like(stage.theta, 3)
    inverse = preconditioning("ekfac").fit(operator)  # type: ignore[union-attr]
    direct = Direct(0.9, inverse)(operator, right)
    expected = EKFAC.fit(stage).inverse(1e-3, {n: 0.01 for n in stage.theta})(right)
    assert P.norm(P.axpy(-1.0, direct.vector, expected)) <= 1e-10 * P.norm(expected)
    dense = oracle.matrix("mlp", "frozen", 0, "ggn")
    d = oracle.dense("mlp", "frozen", 0)
    shift = torch.diag(0.011 - d.shift(case("mlp", "frozen").chain.links[0]))
    x, b = d.flat(direct.vector), d.flat(right)
    assert direct.residual == pytest.approx(float((b - (dense + shift) @ x).norm() / b.norm()), rel=1e-8)
    with pytest.raises(BadInput, match="a stage's curvature"):
        preconditioning("ekfac").fit(Shifted(Matrix(TEMPLATE, definite())))  # type: ignore[union-attr]
    with pytest.raises(BadInput, match="give it one"):
        Direct()(operator, right)
    with pytest.raises(BadInput, match="none of 'none', 'diagonal'"):
        preconditioning("best")
