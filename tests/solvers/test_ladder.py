"""Many dampings from one Krylov space, and what Lanczos tells of a spectrum, against dense matrices."""

from __future__ import annotations

import pytest
import torch

from nlpinf import parameters as P
from nlpinf.curvature import Matrix
from nlpinf.curvature.spectrum import lanczos, sketch, smallest_ritz_value
from nlpinf.errors import BadInput
from nlpinf.solvers.ladder import solve_ladder
from tests.solvers.test_cg import RIGHT, SIZE, TEMPLATE, definite, flat, true_residual

DAMPINGS = [10.0, 1e-1, 1e-3]


def test_every_rung_is_its_own_solution() -> None:
    matrix, other = definite(1e3), definite(1e3, seed=1)
    operator = Matrix(TEMPLATE, matrix)
    rungs = solve_ladder(operator, RIGHT, DAMPINGS, Matrix(TEMPLATE, other), tolerance=1e-8)
    for damping, rung in zip(DAMPINGS, rungs):
        shifted = matrix + damping * torch.eye(SIZE).double()
        expected = torch.linalg.solve(shifted, flat(RIGHT))
        assert rung.converged and rung.damping == damping
        assert torch.linalg.norm(flat(rung.vector) - expected) <= 1e-5 * torch.linalg.norm(expected)
        assert rung.residual == pytest.approx(true_residual(shifted, rung.vector), rel=1e-6, abs=1e-15)
        assert rung.history[-1] <= 1e-8
    assert [r.products for r in rungs] == sorted(r.products for r in rungs)
    # One space for all: the products of the smallest damping, and a check for each.
    assert operator.products == max(len(r.history) for r in rungs) + len(DAMPINGS)


def test_rungs_that_do_not_end_well() -> None:
    few = solve_ladder(Matrix(TEMPLATE, definite(1e6)), RIGHT, DAMPINGS, tolerance=1e-10, max_iterations=3)
    assert few[-1].verdict == "not converged"
    ends = solve_ladder(Matrix(TEMPLATE, -definite()), RIGHT, DAMPINGS)
    assert {e.verdict for e in ends} == {"negative curvature"} and all(P.finite(e.vector) for e in ends)
    zero = solve_ladder(Matrix(TEMPLATE, definite()), P.zeros_like(RIGHT), DAMPINGS)
    assert {(e.verdict, e.residual) for e in zero} == {("converged", 0.0)}
    nan = solve_ladder(Matrix(TEMPLATE, definite() * float("nan")), RIGHT, DAMPINGS)
    assert {e.verdict for e in nan} == {"not finite"} and all(P.finite(e.vector) for e in nan)
    with pytest.raises(BadInput, match="at least 0"):
        solve_ladder(Matrix(TEMPLATE, definite()), RIGHT, [-1.0])


def test_lanczos_finds_the_extreme_eigenvalues() -> None:
    matrix = definite(50.0) - 5 * torch.eye(SIZE).double()
    found = torch.linalg.eigvalsh(lanczos(Matrix(TEMPLATE, matrix), RIGHT, 2 * SIZE))
    true = torch.linalg.eigvalsh(matrix)
    assert found[[0, -1]].tolist() == pytest.approx(true[[0, -1]].tolist(), abs=1e-11)
    assert smallest_ritz_value(Matrix(TEMPLATE, matrix), 2 * SIZE) == pytest.approx(float(true[0]), abs=1e-11)
    # A start within an invariant space ends when that is exhausted.
    values, vectors = torch.linalg.eigh(matrix)
    start = vectors[:, :2].sum(1)
    t = lanczos(Matrix(TEMPLATE, matrix), {"w": start[:12].view(4, 3), "b": start[12:]}, SIZE)
    assert t.shape == (2, 2) and torch.allclose(torch.linalg.eigvalsh(t), values[:2], atol=1e-8)


def test_the_sketch_is_the_spectrum() -> None:
    """With many starts the weighted Ritz values give tr f(C)/P: here the mean, the effective dimension, a count."""
    matrix = definite(100.0)
    values = torch.linalg.eigvalsh(matrix)
    operator = Matrix(TEMPLATE, matrix)
    spectrum = sketch(operator, probes=400, steps=SIZE)
    assert float(spectrum.weights.sum()) == pytest.approx(1.0)
    assert spectrum.mean == pytest.approx(float(values.mean()), rel=0.05)
    assert (spectrum.smallest, spectrum.largest) == pytest.approx((1.0, 100.0), rel=1e-6)
    assert spectrum.effective_dimension(3.0) == pytest.approx(float((values / (values + 3.0)).sum()), rel=0.05)
    assert spectrum.above(10.0) == pytest.approx(float((values > 10.0).sum()), rel=0.1)
    assert spectrum.products == operator.products
