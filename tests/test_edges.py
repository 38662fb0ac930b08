"""Where a stage is odd: rows without a counted item, a layer that nothing reaches, flat and negative directions, one row."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor, nn

import nlpinf
from nlpinf import parameters as P
from nlpinf.curvature import Curvature, Shifted
from nlpinf.errors import NotConverged
from nlpinf.queries import Query
from nlpinf.solvers import CG, MINRES, LiSSA
from nlpinf.stages import Chain, Stage
from nlpinf.tasks import Classification
from tests.cases import Tagger, case, randomised

BLANK = 3  # the place of the row that counts nothing


class Spare(Tagger):
    """A tagger with a layer that its outputs do not reach."""

    def __init__(self) -> None:
        super().__init__(3)
        self.spare = nn.Linear(2, 2)


def rows(blank: bool) -> list[tuple[Tensor, Tensor]]:
    made = list(case("lstm tagger", "frozen").chain.stages[0].data)
    if blank:
        made.insert(BLANK, (torch.tensor([1, 2, 3]), torch.full((3,), -100)))
    return made


def stage(reduction: Any, blank: bool = True, decay: float = 0.01) -> Stage:
    model = randomised(Spare().double(), 5)
    return Stage(model, Classification(), rows(blank), decay, reduction, name="odd", batch_size=2)


@pytest.mark.parametrize("reduction", ["example", "token"])
def test_rows_without_an_item_and_a_layer_without_a_gradient(reduction: Any, tmp_path: Path) -> None:
    """The row counts in m alone; the layer's part of v is zero; a query without a gradient has v = 0; no NaN in the file."""
    odd, plain = stage(reduction), stage(reduction, blank=False)
    share = plain.size / odd.size if reduction == "example" else 1.0
    direction = P.random_like(odd.theta, 1)
    for kind in ("ggn", "hessian", "fisher"):
        if kind == "fisher" and reduction == "example":  # labels are drawn by row number, which the blank row shifts
            continue
        some, all_ = (Curvature(s, kind, [0, 1, 2, *range(len(s.data) - 3, len(s.data))]) for s in (plain, odd))  # type: ignore[arg-type]
        assert P.finite(some @ direction) and P.finite(all_ @ direction)
    ggn, less = Curvature(odd, "ggn") @ direction, Curvature(plain, "ggn") @ direction
    assert P.norm(P.axpy(-share, less, ggn)) <= 1e-12 * P.norm(ggn)
    (alone,) = [Curvature(odd, "ggn", [BLANK]) @ direction]
    assert P.norm(alone) == 0.0

    queries = [Query.mean_loss(rows(False)[:2]), Query.of(lambda outputs, _: 0.0 * outputs.sum(), rows(False)[:1])]
    vectors = nlpinf.query_vectors(Chain([odd]), queries, damping=0.05, solver=CG(1e-10))
    assert vectors.converged
    v, nothing = vectors.vectors
    assert P.norm(nothing) == 0.0 and P.norm(v) > 0
    assert all(float(v[n].abs().max()) == 0.0 for n in ("spare.weight", "spare.bias"))
    system = Shifted(Curvature(plain, "ggn"), {}, 0.0)
    found = P.axpy(share, system @ v, P.scaled(0.06, v))  # with decay 0.01 and damping 0.05
    gradient = P.select(queries[0].gradient(odd), odd.theta)
    assert P.norm(P.axpy(1.0, found, gradient)) <= 1e-9 * P.norm(gradient)

    nlpinf.score(vectors, out=tmp_path / "scores")
    table = pq.read_table(tmp_path / "scores/part-00000.parquet").to_pydict()
    assert (table["score"][BLANK], table["loss"][BLANK], table["tokens"][BLANK]) == ([0.0, 0.0], 0.0, 0)
    assert np.isfinite(table["score"]).all() and np.isfinite(table["loss"]).all()
    assert all(one != 0.0 and zero == 0.0 for i, (one, zero) in enumerate(table["score"]) if i != BLANK)


@pytest.mark.parametrize("solver", [CG(1e-8, 300), MINRES(1e-8, 300), LiSSA(1e-8, 300)], ids=["cg", "minres", "lissa"])
def test_a_rank_deficient_curvature_of_one_row(solver: Any) -> None:
    """Without decay and damping: what lies in its range is solved, what does not is not said to be."""
    operator = Shifted(Curvature(stage("example", decay=0.0), "ggn", [0]))
    inside = operator @ P.random_like(operator.template, 2)
    solution = solver(operator, inside)
    assert P.finite(solution.vector)
    residual = P.norm(P.axpy(-1.0, operator @ solution.vector, inside)) / P.norm(inside)
    assert solution.residual == pytest.approx(residual, rel=1e-6, abs=1e-12)
    assert solution.converged == (residual <= 1e-8)
    assert solution.converged or isinstance(solver, LiSSA)  # which the smallest of its eigenvalues slows down
    outside = solver(operator, P.random_like(operator.template, 3))
    assert not outside.converged and P.finite(outside.vector) and outside.residual > 0.1


def test_an_indefinite_hessian_is_told_everywhere(tmp_path: Path) -> None:
    """A refusal that says so; where it is allowed, a verdict in the file and no NaN; `auto` takes the Gauss-Newton matrix."""
    chain, query = Chain([stage("example")]), Query.mean_loss(rows(False)[:2])
    with pytest.raises(NotConverged, match="negative curvature"):
        nlpinf.query_vectors(chain, [query], curvature="hessian", damping=0.0)
    kept = nlpinf.query_vectors(chain, [query], curvature="hessian", damping=0.0, allow_unconverged=True)
    assert not kept.converged and P.finite(kept.vectors[0])
    scores = nlpinf.score(kept, out=tmp_path / "scores")
    assert scores.manifest["queries"][0]["converged"] is False
    assert np.isfinite(scores.column(0)).all()
    chosen = nlpinf.query_vectors(chain, [query], curvature="auto", damping=1e-3)
    assert chosen.converged and "Gauss-Newton matrix" in chosen.verdicts[0]["odd"].note
