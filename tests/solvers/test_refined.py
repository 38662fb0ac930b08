"""Refinement reaches with low precision what the model's own precision reaches, and says what noise it met."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from nlpinf import CG, Query, query_vectors
from nlpinf import parameters as P
from nlpinf.curvature import Curvature, Shifted
from nlpinf.curvature.operators import Matrix, Operator
from nlpinf.curvature.products import noise_floor
from nlpinf.errors import BadInput
from nlpinf.solvers import Refined
from nlpinf.solvers.preconditioners import EKFACPreconditioning
from nlpinf.stages import Stage
from nlpinf.tasks import Classification
from tests.cases import case

FAMILIES = ["bert sdpa", "gpt2 eager", "lstm tagger", "elmo"]


def system(family: str, kind: Any = "ggn", dtype: torch.dtype = torch.float32) -> tuple[Shifted, P.Parameters]:
    """Return a damped operator and a right-hand side."""
    stage = case(family, "proximity", dtype).chain.stages[0]
    return Shifted(Curvature(stage, kind), stage.decay, 0.05), P.random_like(stage.theta, 1)


class Broken(Operator):
    """Another operator's products, which are not finite any more after some of them."""

    def __init__(self, other: Operator, good: int) -> None:
        super().__init__(other.template)
        self.other, self.good = other, good

    def product(self, vector: P.Parameters) -> P.Parameters:
        return P.scaled(1.0 if self.products <= self.good else math.nan, self.other @ vector)


def relative(a: P.Parameters, b: P.Parameters) -> float:
    """Return ‖a − b‖ / ‖b‖ in float64."""
    a, b = ({n: t.double() for n, t in tree.items()} for tree in (a, b))
    return P.norm(P.axpy(-1.0, b, a)) / P.norm(b)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_the_residual_is_that_of_full_precision(family: str, precision: Any) -> None:
    operator, right = system(family)
    solution = Refined(CG(1e-5), precision)(operator, right)
    assert solution.converged and precision in solution.note
    exact, same = system(family, dtype=torch.float64)
    residual = relative(exact @ {n: t.double() for n, t in solution.vector.items()}, same)
    assert residual <= 1.5e-5  # in float64, of a solution in float32
    assert residual == pytest.approx(solution.residual, rel=0.2, abs=2e-6)


@pytest.mark.parametrize("kind", ["ggn", "hessian"])  # the Fisher matrix's labels are drawn anew where outputs move
@pytest.mark.parametrize("family", FAMILIES)
def test_low_precision_is_low_and_noise_is_told(family: str, kind: Any) -> None:
    operator, right = system(family, kind)
    exact, same = system(family, kind, torch.float64)
    true = exact @ same
    low = operator.at("bfloat16") @ right
    assert 1e-5 < relative(low, true) < 0.1
    assert {t.dtype for t in low.values()} == {torch.float32}
    assert noise_floor(operator, right, rows=10**6) == pytest.approx(relative(operator @ right, true), rel=0.5)


def test_a_tolerance_below_the_noise_is_refused_with_the_number() -> None:
    operator, right = system("bert sdpa")
    floor = noise_floor(operator, right)
    with pytest.raises(BadInput, match=f"noise of {floor:.1e}"):
        Refined(CG(floor / 10))(operator, right)


def test_where_low_precision_is_all_noise_it_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    operator, right = system("bert sdpa")
    size = operator.shape[0]
    noise = Matrix(operator.template, torch.randn(size, size, generator=torch.Generator().manual_seed(0)))
    monkeypatch.setattr(Shifted, "at", lambda self, precision: noise)
    solution = Refined(CG(1e-4))(operator, right)
    assert solution.converged and "not used" in solution.note
    assert relative(solution.vector, CG(1e-4)(operator, right).vector) == 0.0


@pytest.mark.parametrize("family", ["bert sdpa", "gpt2 eager"])
def test_where_low_precision_gets_no_further_full_precision_goes_on(family: str) -> None:
    """Small eigenvalues drown in bfloat16's noise: half of the products bring nothing, the other half what CG alone brings."""
    operator, right = system(family)
    operator = Shifted(operator.base, operator.shift, 1e-4)
    plain = CG(1e-2)(operator, right)
    assert plain.converged and plain.products > 100
    most = 2 * plain.products + 10
    solution = Refined(CG(1e-2, most))(operator, right)
    assert solution.converged and solution.residual <= 1e-2
    low, full = (int(part.split()[0]) for part in solution.note.replace("; ", ", ").split(", "))
    assert low <= most // 2 + 3 and full <= plain.products + 5
    assert solution.products == low + full


def test_a_low_precision_that_breaks_down_leaves_the_solve_to_full_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    operator, right = system("bert sdpa")
    exact = CG(1e-4)(operator, right)
    spoiled = Broken(operator, 5)
    monkeypatch.setattr(Shifted, "at", lambda self, precision: spoiled)
    solution = Refined(CG(1e-4))(operator, right)
    assert spoiled.products > spoiled.good
    assert solution.converged and relative(solution.vector, exact.vector) < 1e-3


def test_where_the_first_rows_count_nothing_there_is_an_answer() -> None:
    """The noise is measured on the first rows of the sample: of rows without an item, undamped, products are zero."""
    generator = torch.Generator().manual_seed(0)
    rows = [tuple(torch.randint(0, 9, (2, 5), generator=generator)) for _ in range(20)]
    rows[:4] = [(x, torch.full_like(y, -100)) for x, y in rows[:4]]
    torch.manual_seed(3)
    model = torch.nn.Sequential(torch.nn.Embedding(9, 4), torch.nn.Tanh(), torch.nn.Linear(4, 9))
    stage = Stage(model, Classification(), rows)
    operator = Shifted(Curvature(stage, "ggn"))
    right = operator @ P.random_like(stage.theta, 1)
    assert noise_floor(operator, right) == 0.0
    solution = Refined(CG(1e-2))(operator, right)
    assert solution.converged and solution.residual <= 1e-2
    empty = Shifted(Curvature(stage, "ggn", [0, 1]))
    ended = Refined(CG(1e-2))(empty, right)
    assert not ended.converged and P.finite(ended.vector)


def test_a_preconditioner_serves_the_inner_solves_and_settings_tell_all() -> None:
    chain = case("bert sdpa", "proximity", torch.float32).chain
    queries = [Query.loss(chain.stages[-1].data[0])]
    found = query_vectors(chain, queries, damping=0.05, solver=Refined(CG(1e-4)), preconditioner=EKFACPreconditioning())
    plain = query_vectors(chain, queries, damping=0.05, solver=CG(1e-5))
    assert found.converged and relative(found.vectors[0], plain.vectors[0]) < 1e-2
    solver = found.settings["steps"][0]["solver"]
    assert solver["precision"] == "bfloat16" and solver["name"] == "cg"


def test_operators_without_a_network_are_refused() -> None:
    right = {"x": torch.ones(2)}
    with pytest.raises(BadInput, match="the curvature of a stage"):
        Refined(CG())(Matrix(right, torch.eye(2)), right)


def test_many_right_hand_sides_share_their_low_products() -> None:
    """Each residual, in float64, is as small as asked; zero stays zero; together they need fewer products than alone."""
    operator, _ = system("gpt2 eager")
    rights = [P.random_like(operator.template, seed) for seed in range(4)]
    rights.insert(3, P.zeros_like(rights[0]))
    solver = Refined(CG(1e-4))
    together = solver.many(operator, rights)
    exact, _ = system("gpt2 eager", dtype=torch.float64)
    for right, solution in zip(rights, together):
        assert solution.converged and P.finite(solution.vector)
        if P.norm(right):
            wide = {n: t.double() for n, t in right.items()}
            assert relative(exact @ {n: t.double() for n, t in solution.vector.items()}, wide) <= 1.2e-4
    assert not any(t.any() for t in together[3].vector.values())
    alone = [solver(operator, right) for right in rights if P.norm(right)]
    assert sum(s.products for s in together) < 0.8 * sum(s.products for s in alone)
