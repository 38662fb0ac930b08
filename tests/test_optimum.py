"""The optimum of a linear head: against scikit-learn, the stage's own gradient, and where there is none."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from nlpinf import parameters as P
from nlpinf.adapters.elmo import ElmoLM
from nlpinf.adapters.heads import HeadSettings, TextClassifier
from nlpinf.errors import BadInput
from nlpinf.optimum import Optimum, features, fit_linear_head, is_linear
from nlpinf.stages import Stage
from nlpinf.tasks import WordClassification
from tests.cases import ELMO, VOCABULARY, randomised

TEXTS = ["the cat sat on", "a dog", "film", "bad film", "a cat", "the dog sat", "on the film", "sat", "bad dog bad cat"]


def stage_of(
    labels: int,
    decay: float | dict[str, float],
    dtype: torch.dtype = torch.float64,
    pooling: str = "mean",
    hidden: int = 0,
) -> Stage:
    settings = HeadSettings(pooling, hidden, labels)  # type: ignore[arg-type]
    model = TextClassifier.on(randomised(ElmoLM(ELMO, len(VOCABULARY)).to(dtype), 1), settings)
    rows = [{"text": t, "label": (3 * i + i // 2) % labels} for i, t in enumerate(TEXTS)]
    heads = [n for n, _ in model.named_parameters() if n.startswith("head.")]
    return Stage(
        model, WordClassification(9, labels=labels, max_characters=8), rows, decay, trained=heads, batch_size=4
    )


@pytest.mark.parametrize("pooling", ["mean", "max", "first"])
@pytest.mark.parametrize("labels", [2, 4])
def test_the_gradient_of_the_stage_vanishes(labels: int, pooling: str) -> None:
    stage = stage_of(labels, {"head.classifier.weight": 1e-2, "head.classifier.bias": 3e-3}, pooling=pooling)
    before = {n: t.clone() for n, t in stage.parameters.items()}
    optimum = fit_linear_head(stage)
    assert optimum.gradient <= 1e-8 and 0 < optimum.steps < 30
    assert P.norm(stage.gradient()) <= 1e-8
    moved = {n for n, t in stage.parameters.items() if not torch.equal(t, before[n])}
    assert moved == {"head.classifier.weight", "head.classifier.bias"}


@pytest.mark.parametrize("labels", [2, 3])
def test_it_is_the_optimum_of_scikit_learn(labels: int) -> None:
    stage = stage_of(labels, {"head.classifier.weight": 2e-2})
    fit_linear_head(stage)
    x, y = (t.numpy() for t in features(stage, list(range(stage.size))))
    reference = LogisticRegression(C=1 / (2e-2 * stage.size), tol=1e-12, max_iter=10_000, solver="newton-cg")
    if labels == 2:  # one weight vector there, two here: w and −w halve the penalty of 2w
        reference.set_params(C=2 / (2e-2 * stage.size))
    expected = reference.fit(x, y).predict_proba(x)
    theta = stage.parameters
    logits = x @ theta["head.classifier.weight"].numpy().T + theta["head.classifier.bias"].numpy()
    got = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    np.testing.assert_allclose(got, expected, atol=1e-6)


def test_rows_left_out_are_out_of_the_sum_and_m_stays() -> None:
    stage = stage_of(2, 1e-2)
    fit_linear_head(stage, exclude=[1, 5])
    kept = [i for i in range(stage.size) if i not in (1, 5)]
    share = len(kept) / stage.size
    data = P.scaled(share, stage.gradient(indices=kept, decay=False))
    decay = {n: 1e-2 * stage.parameters[n] for n in data}
    assert P.norm(P.axpy(1.0, data, decay)) <= 1e-8


def test_in_single_precision_it_is_rounded_and_no_worse() -> None:
    stage, exact = stage_of(2, 1e-2, torch.float32), stage_of(2, 1e-2)
    assert fit_linear_head(stage).gradient <= 1e-8  # found in float64, on features in float32
    fit_linear_head(exact)
    assert P.norm(stage.gradient()) < 1e-6
    for name, tensor in stage.theta.items():
        torch.testing.assert_close(tensor.double(), exact.parameters[name], rtol=0, atol=1e-4)


def test_where_there_is_no_optimum() -> None:
    stage = stage_of(2, 0.0)
    rows = [{"text": t, "label": int(i > 0)} for i, t in enumerate(TEXTS[:2])]
    with pytest.raises(BadInput, match=r"separates its rows.*give a weight decay"):
        fit_linear_head(Stage(stage.model, stage.task, rows, trained=stage.trained))
    with pytest.raises(BadInput, match="every example is left out"):
        fit_linear_head(stage, exclude=range(stage.size))


def test_what_is_linear() -> None:
    stage = stage_of(2, 0.0)
    assert is_linear(stage) and isinstance(fit_linear_head(stage_of(2, 1e-1)), Optimum)
    whole = Stage(stage.model, stage.task, stage.data)
    for other in (whole, stage_of(2, 0.0, hidden=2), stage_of(2, 0.0, pooling="attention")):
        assert not is_linear(other)
        with pytest.raises(BadInput, match="more than a linear head"):
            fit_linear_head(other)
