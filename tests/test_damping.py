"""The damping that is chosen, against the same rule by dense solves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from nlpinf import damping as dampings
from nlpinf.curvature import Matrix, Shifted, curvature_samples
from nlpinf.damping import DETERMINED, FACTORS, Auto, Relative
from nlpinf.errors import BadInput
from nlpinf.growing import Growing
from nlpinf.influence import ImplicitSolve, QueryVectors, query_vectors
from nlpinf.newton import predict
from nlpinf.queries import Query
from nlpinf.solvers import CG
from nlpinf.stages import Chain, Link, Proximity, Stage
from nlpinf.tasks import Regression
from tests.cases import case
from tests.test_sampling import DECAY, ridge

ROWS, COLUMNS = 400, 40


def asked(chain: Chain, **settings: Any) -> QueryVectors:
    stage = chain.stages[0]
    return query_vectors(chain, [Query.loss(stage.data[0])], **{"solver": CG(1e-9), **settings})


def matrices(chain: Chain, sample: int | None) -> list[torch.Tensor]:
    """Return XᵀX/n + decay of the sample and of the second one, if there is one."""
    stage = chain.stages[0]
    rows = [r for r in curvature_samples(stage.size, sample, 0) if r]
    x = [torch.stack([stage.data[i][0] for i in r]) for r in rows]
    return [m.T @ m / len(m) + DECAY * torch.eye(COLUMNS).double() for m in x]


def chosen(made: QueryVectors) -> tuple[float, str]:
    (end,) = made.verdicts[0].values()
    return end.damping, end.note


@pytest.mark.parametrize(("sample", "factor"), [(None, 0.01), (190, 1.0), (15, 10.0), (4, 100.0)], ids=str)
def test_the_smallest_damping_that_the_sample_determines_is_taken(sample: int | None, factor: float) -> None:
    """By exact solves: all larger factors are determined, and the next smaller is not."""
    chain, _, gradients = ridge(5, ROWS, COLUMNS)
    made = asked(chain, sample=sample)
    damping, note = chosen(made)
    first, *second = matrices(chain, sample)
    mean = float(first.trace()) / COLUMNS
    assert damping / factor == pytest.approx(mean, rel=0.5)  # eight random probes
    assert f"damping {factor:g} × the mean eigenvalue" in note
    residuals = {}
    for f in FACTORS if second else ():
        shift = damping / factor * f * torch.eye(COLUMNS).double()
        x = torch.linalg.solve(first + shift, gradients[0])
        residuals[f] = float((gradients[0] - (second[0] + shift) @ x).norm() / gradients[0].norm())
    for f, residual in residuals.items():
        assert f < factor or residual < DETERMINED - 0.05
    if residuals and factor > FACTORS[-1]:
        assert residuals[factor / 10] > DETERMINED + 0.05 and f"at {factor / 10:g} × a second sample disagrees" in note
    expected = torch.linalg.solve(first + damping * torch.eye(COLUMNS).double(), -gradients[0])
    torch.testing.assert_close(made.vectors[0]["weight"][0], expected, rtol=1e-7, atol=1e-9)


def test_a_sample_that_no_damping_makes_up_for_gets_the_largest_and_says_so() -> None:
    """Of two rows in one direction the second sample's is a hundred times as long."""
    (i,), (j,) = curvature_samples(2, 1, 0)
    x = torch.eye(3).double()[:1]
    data = {i: (x[0], torch.ones(1).double()), j: (100 * x[0], torch.ones(1).double())}
    stage = Stage(nn.Linear(3, 1, bias=False).double(), Regression(), [data[0], data[1]], name="train")
    solution = ImplicitSolve(sample=1)(Link(stage, {}, None), [{"weight": x}])[0].solution
    assert solution.converged and solution.damping == pytest.approx(100 / 3)
    assert "the most that is tried: at 100 × a second sample disagrees" in solution.note


def test_every_sample_of_a_query_has_the_same_damping() -> None:
    """Of one that grows that of the first size, of error bars that of the first draw."""
    chain, *_ = ridge(5, ROWS, COLUMNS)
    alone = chosen(asked(chain, sample=30))[0]
    bars = asked(chain, sample=30, error_bars=3)
    assert {end.damping for end in bars.verdicts[0].values()} == {alone}
    grown = asked(chain, sample=Growing(start=30, limit=120, spearman=0.99999))
    assert grown.settings["growth"]["sizes"][-1]["rows"] == 120 and chosen(grown)[0] == alone
    assert chosen(asked(chain, sample=120))[0] < alone


def test_a_query_without_a_gradient_does_not_choose_for_the_others() -> None:
    chain, _, gradients = ridge(5, ROWS, COLUMNS)
    right = {"weight": gradients[0][None]}
    alone, both = (
        [p.solution for p in ImplicitSolve(sample=15, solver=CG(1e-9))(chain.links[0], rights)]
        for rights in ([right], [{"weight": torch.zeros_like(right["weight"])}, right])
    )
    assert {s.damping for s in both} == {alone[0].damping} and both[0].residual == 0.0


def test_an_indefinite_matrix_is_told_from_too_many_products() -> None:
    operator = Shifted(Matrix({"x": torch.zeros(3).double()}, torch.diag(torch.tensor([1.0, 1.0, -1e6]).double())))
    choice = Auto().choose(0, operator, None, lambda: 1.0, {"x": torch.ones(3).double()})
    assert choice.damping == 100.0 and "negative curvature" in choice.reason and "products" not in choice.reason


def test_each_stage_and_curvature_has_its_own() -> None:
    """The manifest says what was asked for and what was chosen, and a removal is predicted with that."""
    c = case("mlp", "proximity")
    queries = [Query.loss(row) for row in c.asked[:2]]
    made = query_vectors(Chain(c.chain.stages, Proximity(0.2)), queries, curvature=["ggn", "auto"], solver=CG(1e-10))
    assert made.converged
    (first, second), names = made.settings["steps"], list(made.verdicts[0])
    assert first["damping"] == second["damping"] == "auto"
    for step, name in zip((second, first), names):
        end = made.verdicts[0][name]
        (told,) = step["chosen"].values()
        assert "× the mean eigenvalue" in told and told in end.note
        assert end.damping == made.verdicts[1][name].damping > 0  # of the first query
    assert "exact Hessian" in second["chosen"][names[0]] or "Gauss-Newton" in second["chosen"][names[0]]
    numbers = [made.verdicts[0][name].damping for name in reversed(names)]
    same = query_vectors(
        Chain(c.chain.stages, Proximity(0.2)), queries, curvature=["ggn", "auto"], damping=numbers, solver=CG(1e-10)
    )
    for vector, other in zip(made.vectors, same.vectors):
        for name in vector:
            torch.testing.assert_close(vector[name], other[name], rtol=1e-6, atol=1e-9)
    gone = {"one": [0]}
    here, there = (predict(v, gone, curvature="ggn", solver=CG(1e-10))[0] for v in (made, same))
    assert here.newton == pytest.approx(there.newton, rel=1e-6)


def test_what_is_no_damping_is_refused() -> None:
    with pytest.raises(BadInput, match="'little'; give a number"):
        asked(ridge(0, 20)[0], damping="little")  # type: ignore[arg-type]
    with pytest.raises(BadInput, match="relative damping is -1"):
        Relative(-1.0)
    assert dampings.described(Relative(0.5)) == {"relative": 0.5}
