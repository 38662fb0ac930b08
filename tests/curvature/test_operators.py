"""The mean eigenvalue and the explicit matrix operator."""

from __future__ import annotations

import pytest
import torch

from nlpinf import parameters as P
from nlpinf.curvature import Curvature, Matrix, Shifted
from nlpinf.damping import Relative
from nlpinf.influence import ImplicitSolve
from tests import oracle
from tests.cases import case


def test_the_mean_eigenvalue_of_a_diagonal_matrix_is_exact() -> None:
    """zᵀ D z = tr D for entries ±1, whatever the draw."""
    template = {"a": torch.zeros(2, 3, dtype=torch.float64), "b": torch.zeros(4, dtype=torch.float64)}
    diagonal = torch.arange(10, dtype=torch.float64)
    operator = Matrix(template, torch.diag(diagonal))
    assert operator.mean_eigenvalue(1) == pytest.approx(4.5, rel=1e-14)
    assert Shifted(operator, {"b": 5.0}, 2.0).mean_eigenvalue(2) == pytest.approx(4.5 + 2.0 + 2.0, rel=1e-14)


@pytest.mark.parametrize("kind", ["hessian", "ggn"])
def test_the_mean_eigenvalue_tends_to_the_trace(kind: str) -> None:
    """100 probes land within 4 of the estimator's standard errors, √(2 Σ_{i≠j} C_ij²)/(P √probes), of the dense trace."""
    stage, d = case("mlp", "frozen").chain.stages[0], oracle.dense("mlp", "frozen", 0)
    matrix = d.curvature(kind)
    estimate = Curvature(stage, kind).mean_eigenvalue(100, seed=1)  # type: ignore[arg-type]
    off_diagonal = matrix - torch.diag(matrix.diagonal())
    error = 2**0.5 * float(torch.linalg.norm(off_diagonal)) / (len(matrix) * 100**0.5)
    assert abs(estimate - float(matrix.trace()) / len(matrix)) <= 4 * error


def test_relative_damping_is_its_share_of_the_mean_eigenvalue() -> None:
    """Weight decay and proximity are part of the mean; the estimate comes from the ±1 draws that the seed fixes."""
    c = case("lstm tagger", "proximity")
    step = ImplicitSolve("ggn", Relative(0.3, probes=4), seed=2)
    system = step.system(c.chain.links[1])
    operator, second = system.operator, system.second
    matrix = oracle.matrix("lstm tagger", "proximity", 1, "ggn")
    draws = [P.random_like(c.chain.stages[1].theta, 2 * 7919 + i, P.rademacher) for i in range(4)]
    z = torch.stack([torch.cat([t.flatten() for t in draw.values()]) for draw in draws])
    assert set(z.unique().tolist()) == {-1.0, 1.0}
    mean = float(torch.einsum("ip,pq,iq->i", z, matrix, z).mean()) / len(matrix)
    assert operator.damping == pytest.approx(0.3 * mean, rel=1e-10)
    assert second is None
    assert step.system(c.chain.links[1]) is system
    assert operator.damping == pytest.approx(0.3 * mean, rel=1e-10)


def test_a_matrix_multiplies_the_flattened_tree() -> None:
    template = {"a": torch.zeros(2, 2), "b": torch.zeros(1)}
    matrix = torch.arange(25.0).view(5, 5)
    product = Matrix(template, matrix) @ {"a": torch.tensor([[1.0, 0.0], [0.0, 2.0]]), "b": torch.tensor([3.0])}
    expected = matrix[:, 0] + 2 * matrix[:, 3] + 3 * matrix[:, 4]
    assert torch.equal(product["a"], expected[:4].view(2, 2))
    assert torch.equal(product["b"], expected[4:])
