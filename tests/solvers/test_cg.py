"""The contract of a solve: the vector, the true residuals, and how it ended."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from nlpinf import parameters as P
from nlpinf.curvature import Matrix, Operator, Shifted
from nlpinf.errors import BadInput, NotConverged
from nlpinf.solvers import CG

TEMPLATE = {"w": torch.zeros(4, 3, dtype=torch.float64), "b": torch.zeros(8, dtype=torch.float64)}
SIZE = 20


class Lambda(Operator):
    """An operator that is any function of the flat vector and the number of the product."""

    def __init__(self, function: Callable[[Tensor, int], Tensor]) -> None:
        super().__init__(TEMPLATE)
        self.function = function

    def product(self, vector: P.Parameters) -> P.Parameters:
        return tree(self.function(flat(vector), self.products))


def flat(vector: P.Parameters) -> Tensor:
    return torch.cat([t.flatten() for t in vector.values()])


def tree(vector: Tensor) -> P.Parameters:
    return {"w": vector[:12].view(4, 3), "b": vector[12:]}


def definite(condition: float = 100.0, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    q, _ = torch.linalg.qr(torch.randn(SIZE, SIZE, generator=generator, dtype=torch.float64))
    return q @ torch.diag(torch.logspace(0, torch.tensor(condition).log10().item(), SIZE, dtype=torch.float64)) @ q.T


RIGHT = P.random_like(TEMPLATE, 5)


def true_residual(matrix: Tensor, x: P.Parameters, right: P.Parameters = RIGHT) -> float:
    return float(torch.linalg.norm(flat(right) - matrix @ flat(x)) / torch.linalg.norm(flat(right)))


@pytest.mark.parametrize("tolerance", [1e-2, 1e-5, 1e-12])
def test_solves_to_the_tolerance_and_not_much_further(tolerance: float) -> None:
    matrix = definite()
    operator = Matrix(TEMPLATE, matrix)
    solution = CG(tolerance=tolerance)(operator, RIGHT)
    assert solution.verdict == "converged"
    assert solution.residual == pytest.approx(true_residual(matrix, solution.vector), rel=1e-6, abs=1e-15)
    assert solution.residual <= tolerance
    assert solution.history[-1] <= tolerance < solution.history[-2]  # stopped at the first iterate that has it
    assert solution.products == operator.products
    assert solution.tolerance == tolerance
    exact = torch.linalg.solve(matrix, flat(RIGHT))
    assert torch.linalg.norm(flat(solution.vector) - exact) <= 100 * tolerance * torch.linalg.norm(exact)


def test_more_tolerance_takes_fewer_products() -> None:
    spent = [CG(tolerance=t)(Matrix(TEMPLATE, definite()), RIGHT).products for t in (1e-1, 1e-3, 1e-6)]
    assert spent[0] < spent[1] < spent[2]


def test_the_residual_is_the_true_one() -> None:
    """Products that lose digits let the recursive residual run far below the true one; only the true one counts."""
    matrix = definite(1e4)

    def rough(v: Tensor, k: int) -> Tensor:
        noise = torch.randn(SIZE, generator=torch.Generator().manual_seed(k), dtype=torch.float64)
        product = matrix @ v
        return product + 1e-5 * torch.linalg.norm(product) * noise / SIZE**0.5

    solution = CG(tolerance=1e-9, max_iterations=200)(Lambda(rough), RIGHT)
    true = true_residual(matrix, solution.vector)
    assert min(solution.history) <= 1e-9 < true  # the recursion believed that it was there
    assert solution.verdict == "not converged"
    assert solution.residual > 1e-9
    assert solution.residual == pytest.approx(true, rel=0.5)


def test_a_drifted_recursion_starts_again() -> None:
    """One wrong product leaves the recursion with an offset; replacing the residual by the true one repairs it."""
    matrix = definite()

    def once_wrong(v: Tensor, k: int) -> Tensor:
        return matrix @ v * (1.001 if k == 3 else 1.0)

    solution = CG(tolerance=1e-10)(Lambda(once_wrong), RIGHT)
    assert solution.verdict == "converged"
    assert true_residual(matrix, solution.vector) <= 1e-10
    first = next(i for i, size in enumerate(solution.history) if size <= 1e-10)
    assert len(solution.history) > first + 1  # it went on after the recursion had ended


def test_the_second_sample_is_measured_on_its_own_operator() -> None:
    matrix, other = definite(), definite(seed=1)
    second = Matrix(TEMPLATE, other)
    solution = CG(tolerance=1e-8)(Matrix(TEMPLATE, matrix), RIGHT, second)
    assert solution.verdict == "converged"
    assert solution.second_residual == pytest.approx(true_residual(other, solution.vector), rel=1e-9)
    assert solution.second_residual > 0.1
    assert second.products == 1
    assert CG()(Matrix(TEMPLATE, matrix), RIGHT).second_residual is None


def test_negative_curvature_ends_the_solve() -> None:
    values = torch.ones(SIZE, dtype=torch.float64)
    values[3] = -0.5
    solution = CG(tolerance=1e-8)(Matrix(TEMPLATE, torch.diag(values)), RIGHT)
    assert solution.verdict == "negative curvature"
    assert not solution.converged
    assert P.finite(solution.vector)
    assert solution.residual == pytest.approx(true_residual(torch.diag(values), solution.vector), rel=1e-9)
    enough = Shifted(Matrix(TEMPLATE, torch.diag(values)), damping=0.6)
    assert CG(tolerance=1e-8)(enough, RIGHT).verdict == "converged"
    assert CG(tolerance=1e-8)(Matrix(TEMPLATE, torch.zeros(SIZE, SIZE, dtype=torch.float64)), RIGHT).verdict == (
        "negative curvature"
    )


def test_a_short_budget_is_not_converged() -> None:
    operator = Matrix(TEMPLATE, definite(1e4))
    solution = CG(tolerance=1e-10, max_iterations=5)(operator, RIGHT)
    assert solution.verdict == "not converged"
    assert len(solution.history) == 5
    assert operator.products == solution.products <= 7  # those that check are few
    assert solution.residual > 1e-10


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_what_is_not_finite_is_said(wrong: float) -> None:
    matrix = definite()

    def breaks(v: Tensor, k: int) -> Tensor:
        return matrix @ v * (wrong if k == 4 else 1.0)

    assert CG(tolerance=1e-10)(Lambda(breaks), RIGHT).verdict == "not finite"
    bad = {**RIGHT, "b": RIGHT["b"].clone()}
    bad["b"][2] = wrong
    solution = CG()(Matrix(TEMPLATE, matrix), bad)
    assert solution.verdict == "not finite"
    assert solution.summary()["residual"] is None


def test_divergence_is_said() -> None:
    """An operator that is no symmetric matrix makes the residual grow without bound."""
    skew = torch.triu(torch.full((SIZE, SIZE), 30.0, dtype=torch.float64), 1)
    operator = Lambda(lambda v, k: v + (skew - skew.T) @ v)
    solution = CG(tolerance=1e-10, divergence=1e3)(operator, RIGHT)
    assert solution.verdict == "diverged"
    assert solution.residual > 1e3
    assert max(solution.history[:-1]) <= 1e3  # it stopped at once


def test_a_zero_right_hand_side_is_solved_by_zero() -> None:
    operator, second = Matrix(TEMPLATE, definite()), Matrix(TEMPLATE, definite(seed=1))
    solution = CG()(operator, P.zeros_like(RIGHT), second)
    assert solution.verdict == "converged"
    assert (solution.residual, solution.second_residual) == (0.0, 0.0)
    assert P.norm(solution.vector) == 0
    assert solution.products == operator.products + second.products


def test_the_preconditioner_is_used() -> None:
    """With the exact inverse one product solves; with the diagonal a badly scaled system takes fewer than without."""
    matrix = definite(1e4)
    exact = Matrix(TEMPLATE, torch.linalg.inv(matrix))
    assert len(CG(tolerance=1e-8, preconditioner=exact.product)(Matrix(TEMPLATE, matrix), RIGHT).history) == 1
    scale = torch.logspace(0, 3, SIZE, dtype=torch.float64)
    scaled = scale[:, None] * definite(3.0) * scale
    diagonal = Matrix(TEMPLATE, torch.diag(1 / scaled.diagonal())).product
    plain = CG(tolerance=1e-8)(Matrix(TEMPLATE, scaled), RIGHT)
    helped = CG(tolerance=1e-8, preconditioner=diagonal)(Matrix(TEMPLATE, scaled), RIGHT)
    assert helped.converged
    assert helped.products < plain.products / 2
    assert true_residual(scaled, helped.vector) <= 1e-8
    assert CG(preconditioner=diagonal).settings()["preconditioned"] is True


def test_the_solve_changes_neither_the_right_hand_side_nor_the_operator() -> None:
    matrix, right = definite(), {n: t.clone() for n, t in RIGHT.items()}
    base = Matrix(TEMPLATE, matrix.clone())
    operator = Shifted(base, {"w": 0.1}, 0.5)
    runs = [CG(tolerance=1e-8)(operator, right) for _ in range(3)]
    assert all(torch.equal(flat(run.vector), flat(runs[0].vector)) for run in runs)
    assert torch.equal(base.matrix, matrix)
    assert torch.equal(flat(right), flat(RIGHT))
    assert {run.damping for run in runs} == {0.5}
    assert {run.products for run in runs} == {runs[0].products}


def test_progress_is_told_each_residual() -> None:
    seen: list[tuple[int, float]] = []
    solution = CG()(Matrix(TEMPLATE, definite()), RIGHT, progress=lambda k, residual: seen.append((k, residual)))
    assert [k for k, _ in seen] == list(range(1, len(solution.history) + 1))
    assert [size for _, size in seen] == solution.history


def test_required_raises_with_what_to_do() -> None:
    operator = Matrix(TEMPLATE, definite(1e4))
    solution = CG(tolerance=1e-10, max_iterations=3)(operator, RIGHT)
    with pytest.raises(
        NotConverged, match=r"stage 'x': not converged: residual .* after \d+ products .*more iterations"
    ) as e:
        solution.required("stage 'x'")
    assert e.value.solution is solution
    assert "\n" not in str(e.value)
    good = CG()(operator, RIGHT)
    assert good.required("x") is good
    assert "vector" not in good.summary()


def test_a_solution_prints_in_a_line() -> None:
    """Its numbers, and none of the vector's: verdicts are printed by the dictionary, whose entries show their repr."""
    solution = CG()(Matrix(TEMPLATE, definite()), RIGHT, Matrix(TEMPLATE, definite(seed=1)))
    shown = str(({"pretrain": solution},))
    assert shown == f"({{'pretrain': Solution({solution})}},)"
    assert f"converged: residual {solution.residual:.2e}, second sample {solution.second_residual:.2e} after" in shown
    assert "tensor" not in shown and "\n" not in shown and len(shown) < 160


@pytest.mark.parametrize(
    "settings", [{"tolerance": 0.0}, {"tolerance": 1.0}, {"tolerance": -1e-3}, {"max_iterations": 0}]
)
def test_bad_settings_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(BadInput):
        CG(**settings)
