"""The damping advisor against dense solves."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from nlpinf.advice import advise
from nlpinf.errors import BadInput
from nlpinf.queries import Query
from tests import oracle
from tests.cases import case

FACTORS = (1e-2, 1e-1, 1.0)


def test_rungs_and_ranks_are_those_of_dense_solves() -> None:
    c = case("mlp", "frozen")
    found = advise(c.chain, Query.mean_loss(list(c.asked)), factors=FACTORS, probe=99, tolerance=1e-9)
    assert [a.stage for a in found] == ["last frozen 0", "pretrain"]
    d = oracle.dense("mlp", "frozen", 1)
    trained = d.where(list(d.stage.trained))
    matrix = oracle.matrix("mlp", "frozen", 1, "ggn")
    q = oracle.query_gradient("mlp", "frozen", list(c.asked), slice(None))[trained]
    mean = float(matrix.trace()) / len(matrix)
    assert found[0].spectrum["mean"] == pytest.approx(mean, rel=0.5)  # four random starts
    ys = [torch.linalg.solve(matrix + r.damping * torch.eye(len(matrix)).double(), q) for r in found[0].rungs]
    scores = [(d.gradients[:, trained] @ y).numpy() for y in ys]
    for k, rung in enumerate(found[0].rungs[:-1]):
        assert rung.verdict == "converged"
        cosine = float(ys[k] @ ys[k + 1] / ys[k].norm() / ys[k + 1].norm())
        assert rung.cosine == pytest.approx(cosine, abs=1e-6)
        assert rung.spearman == pytest.approx(spearmanr(scores[k], scores[k + 1]).statistic)
    assert found[0].rungs[-1].cosine is None
    for advice in found:
        assert advice.recommended in [r.damping for r in advice.rungs] and advice.reason
        assert np.isfinite(list(advice.content()["spectrum"].values())).all()


def test_a_ladder_that_does_not_converge_recommends_nothing() -> None:
    c = case("mlp", "frozen")
    (only,) = advise(c.chain, Query.mean_loss(list(c.asked)), factors=[1e-6], tolerance=1e-9, max_iterations=1)
    assert only.recommended is None and "no solve converged" in only.reason
    with pytest.raises(BadInput, match="each above 0"):
        advise(c.chain, Query.mean_loss(list(c.asked)), factors=[0.0])
