"""Samples that grow, and error bars from disjoint ones, against the full curvature of models that have a closed form."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from nlpinf import parameters as P
from nlpinf.curvature import curvature_samples
from nlpinf.errors import BadInput
from nlpinf.growing import Growing, probe_scores
from nlpinf.influence import QueryVectors, query_vectors
from nlpinf.queries import Query
from nlpinf.scoring import score
from nlpinf.solvers import CG
from nlpinf.spread import mean_and_errors
from nlpinf.stages import Chain, Proximity, Stage
from nlpinf.tasks import Classification, Regression
from tests.cases import case, scores_of
from tests.solvers.test_cg import TEMPLATE

DECAY = 0.05


def ridge(seed: int, rows: int, columns: int = 3) -> tuple[Chain, torch.Tensor, torch.Tensor]:
    """Return a linear model of one output at random weights as a chain, and the scores of all rows and their gradients.

    The query is the loss of row 0, the curvature that of the whole corpus, XᵀX/m + decay.
    """
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    x *= torch.exp(0.3 * torch.randn(rows, 1, generator=generator, dtype=torch.float64))  # rows of unlike weight
    y = torch.randn(rows, 1, generator=generator, dtype=torch.float64)
    model = nn.Linear(columns, 1, bias=False, dtype=torch.float64)
    weight = torch.randn(1, columns, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        model.weight.copy_(weight)
    stage = Stage(model, Regression(), list(zip(x, y)), DECAY, name="train", batch_size=rows, batch_tokens=10**9)
    gradients = (x @ weight.T - y) * x
    vector = -torch.linalg.solve(x.T @ x / rows + DECAY * torch.eye(columns, dtype=torch.float64), gradients[0])
    return Chain([stage]), gradients @ vector, gradients


def asked(chain: Chain, **settings: Any) -> QueryVectors:
    stage = chain.stages[0]
    return query_vectors(chain, [Query.loss(stage.data[0])], **{"damping": 0.0, "solver": CG(1e-9), **settings})


def test_error_vectors_give_the_spread_of_the_draws() -> None:
    draws = [P.random_like(TEMPLATE, seed) for seed in range(5)]
    direction = P.random_like(TEMPLATE, 9)
    mean, errors = mean_and_errors(draws, 0.75)
    values = np.array([P.dot(v, direction) for v in draws])
    assert P.dot(mean, direction) == pytest.approx(values.mean(), rel=1e-12)
    found = sum(P.dot(e, direction) ** 2 for e in errors)
    assert found == pytest.approx(0.75 * values.var(ddof=1) / 5, rel=1e-10)
    assert len(errors) == 4
    assert all(P.norm(e) == 0 for e in mean_and_errors(draws, 0.0)[1])


@pytest.mark.parametrize(("draws", "share"), [(2, 0.2), (4, 0.2), (4, 0.8)])
def test_error_bars_cover_the_score_of_the_whole_corpus_at_their_rate(draws: int, share: float) -> None:
    """Over many corpora: as often within t·se as Student's distribution says, also where most of the corpus was drawn."""
    trials, rows, levels = 80, 1500, (0.5, 0.9)
    sample = int(share * rows / draws)
    inside = np.zeros(len(levels), int)
    for seed in range(trials):
        chain, truth, gradients = ridge(seed, rows)
        vectors = asked(chain, sample=sample, error_bars=draws, seed=seed)
        scores = [float((t["weight"][0] * gradients[1]).sum()) for t in (vectors.vectors[0], *vectors.errors[0])]
        distance = abs(scores[0] - float(truth[1])) / math.hypot(*scores[1:])
        inside += [distance <= stats.t.ppf(0.5 + level / 2, draws - 1) for level in levels]
    for level, count in zip(levels, inside):
        allowed = stats.binom.interval(0.999, trials, level)
        assert allowed[0] <= count <= allowed[1], (level, count, allowed)


def test_error_bars_come_with_the_scores() -> None:
    """Of a chain and several queries, a number a row and query: the spread of the scores of the draws, each asked for alone."""
    c = case("mlp", "proximity")
    first, last = c.chain.stages
    big = Stage(first.model, first.task, list(first.data) * 3, first.weight_decay, first.reduction, name="pretrain")
    chain = Chain([big, last], Proximity(0.2))
    queries = [Query.loss(c.asked[0]), Query.loss(c.asked[1])]
    settings: dict[str, Any] = {"damping": 0.3, "solver": CG(1e-11)}
    made = query_vectors(chain, queries, sample=4, error_bars=4, seed=2, **settings)
    assert made.settings["error_bars"] == {"samples": 4, "rows": {"pretrain": 4}, "unseen": pytest.approx(1 - 16 / 21)}
    names = [f"{stage}, sample {k}" for k in range(1, 5) for stage in (last.name, "pretrain")]
    assert list(made.verdicts[0]) == names and made.converged
    order = torch.randperm(21, generator=torch.Generator().manual_seed(2)).tolist()
    alone = []
    for k in range(4):
        rows = sorted(order[4 * k : 4 * k + 4])
        assert curvature_samples(21, 4, 2, k)[0] == rows
        # The same corpus in another order, of which the first rows are the sample, has that sample's curvature.
        few = Stage(first.model, first.task, [big.data[i] for i in rows], first.weight_decay, name="pretrain")
        solved = query_vectors(Chain([few, last], Proximity(0.2)), queries, **settings)
        alone.append(scores_of(big, list(solved.vectors)).numpy())
    expected = np.stack(alone)
    for mode in ("forward", "reverse"):
        found = score(made, mode=mode)  # type: ignore[arg-type]
        for q in range(2):
            np.testing.assert_allclose(found.column(q), expected[:, :, q].mean(0), rtol=1e-5, atol=1e-6)
            errors = found.standard_errors(q)
            assert errors is not None
            spread = np.sqrt((1 - 16 / 21) * expected[:, :, q].var(0, ddof=1) / 4)
            np.testing.assert_allclose(errors, spread, rtol=1e-5, atol=1e-7)
            for row in found.top(3, q):
                assert row.standard_error == errors[row.row]
    plain = score(query_vectors(chain, queries, **settings))
    assert plain.standard_errors() is None and plain.top(1)[0].standard_error is None
    (single,) = score(query_vectors(chain, queries[:1], sample=4, error_bars=2, **settings)).top(1)
    assert single.standard_error is not None and single.standard_error > 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sample": 30, "error_bars": 4}, "4 disjoint samples of 30 rows .* has 100; give a sample of at most 25"),
        ({"sample": 30, "error_bars": 1}, "from 1 samples .* at least 2"),
        ({"error_bars": 2}, "need a sample"),
        ({"sample": Growing(), "error_bars": 2}, "let it grow first"),
    ],
)
def test_error_bars_that_cannot_be_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        asked(ridge(0, 100)[0], **settings)


def test_a_sample_grows_until_the_order_of_the_scores_is_settled() -> None:
    chain, scores, _ = ridge(3, 3000, columns=12)
    stage, truth = chain.stages[0], scores.numpy()
    made = asked(chain, sample=Growing(start=15, probe=500))
    curve = made.settings["growth"]
    sizes = curve["sizes"]
    assert curve["ended"] == "stable" and curve["probe"] == 500
    assert [s["rows"] for s in sizes] == [15 * 2**k for k in range(len(sizes))] and sizes[-1]["rows"] < 3000
    assert all(s["spearman"] < 0.98 for s in sizes[1:-1]) and sizes[-1]["spearman"] >= 0.98
    assert sizes[0]["spearman"] is None and sizes[0]["cosine"] is None
    errors = []
    for size in sizes:
        alone = asked(chain, sample=size["rows"])
        errors.append(1 - stats.spearmanr(scores_of(stage, list(alone.vectors))[:, 0].numpy(), truth).statistic)
        second = alone.verdicts[0]["train"].second_residual
        assert size["second_residual"] == pytest.approx(second, rel=1e-4)
    assert errors[-1] < 0.02 < errors[0]
    assert P.norm(P.axpy(-1.0, alone.vectors[0], made.vectors[0])) <= 1e-7 * P.norm(alone.vectors[0])


def test_growth_that_finds_no_end_says_so() -> None:
    chain, *_ = ridge(3, 60, columns=12)
    ends = {
        limit: asked(chain, sample=Growing(start=10, limit=limit, spearman=0.9999)).settings["growth"]
        for limit in (None, 25, 60, 10)
    }
    assert [end["ended"] for end in ends.values()] == ["whole corpus", "limit reached", "whole corpus", "limit reached"]
    assert [s["rows"] for s in ends[None]["sizes"]] == [10, 20, 40, 60]
    assert [s["rows"] for s in ends[25]["sizes"]] == [10, 20, 25]
    assert ends[None]["sizes"][-1]["second_residual"] is None
    for bad in ({"start": 0}, {"factor": 1}, {"limit": 5}, {"spearman": 1.0}):
        with pytest.raises(BadInput):
            Growing(**bad)  # type: ignore[arg-type]


def test_a_stage_whose_sample_does_not_grow_is_not_solved_again() -> None:
    """The finetuning has fewer rows than the sample: from the second size on its answer is where the solve starts."""
    generator = torch.Generator().manual_seed(0)

    def classifier(seed: int, rows: int) -> Stage:
        torch.manual_seed(seed)
        x = torch.randn(rows, 4, generator=generator, dtype=torch.float64)
        y = torch.randint(0, 3, (rows,), generator=generator)
        return Stage(
            nn.Linear(4, 3, dtype=torch.float64), Classification(), list(zip(x, y)), DECAY, name=f"stage {seed}"
        )

    first, last = classifier(1, 200), classifier(2, 10)
    chain = Chain([first, last], Proximity(0.1))
    told: dict[str, list[int]] = {"stage 1": [], "stage 2": []}
    made = query_vectors(
        chain, [Query.loss(last.data[0])], damping=0.01, solver=CG(1e-6), sample=Growing(start=20, probe=50),
        progress=lambda stage, k, _: told[stage].append(k),
    )  # fmt: skip
    assert len(made.settings["growth"]["sizes"]) > 1
    assert told["stage 2"].count(1) == 1 < told["stage 1"].count(1)


@pytest.mark.parametrize("family", ["mlp", "bert sdpa", "lstm tagger"])
def test_probe_scores_are_the_scores(family: str) -> None:
    stage = case(family, "frozen").chain.stages[0]
    vectors = [P.random_like(stage.theta, seed) for seed in (1, 2)]
    rows = list(range(stage.size))
    expected = scores_of(stage, vectors).numpy()
    found = probe_scores(stage, vectors, rows)
    np.testing.assert_allclose(np.sort(found, 0), np.sort(expected, 0), rtol=1e-9, atol=1e-12)
