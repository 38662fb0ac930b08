"""Queries: values, signs, and gradients against finite differences."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nlpinf import parameters as P
from nlpinf.errors import BadInput
from nlpinf.influence import query_vectors
from nlpinf.queries import Query
from nlpinf.solvers import CG
from nlpinf.stages import Stage
from nlpinf.tasks import Classification, MaskedLM
from tests import oracle
from tests.cases import FAMILIES, TEXTS, Case, case, tokenizer


def queries(c: Case) -> list[Query]:
    asked = list(c.asked)
    made = [Query.loss(asked[0]), Query.mean_loss(asked), Query.of(lambda o, batch: o[:, 0].square().sum(), asked)]
    return made if "tagger" in c.name else [*made, Query.margin(asked[0])]


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_equal_finite_differences(family: str) -> None:
    """⟨∇q, u⟩ for random directions u over all parameters, trained or not; central differences of fourth order."""
    c = case(family, "frozen")
    stage = c.chain.stages[1]
    for query in queries(c):
        gradient = query.gradient(stage)
        assert list(gradient) == list(stage.parameters)
        for seed in (1, 2):
            u = P.random_like(stage.parameters, seed)
            h = 2e-3 / P.norm(u)
            q = {k: query.value(stage, P.axpy(k * h, u, stage.parameters)) for k in (-2, -1, 1, 2)}
            slope = (8 * (q[1] - q[-1]) - (q[2] - q[-2])) / (12 * h)
            assert P.dot(gradient, u) == pytest.approx(slope, rel=1e-7, abs=1e-8)


@pytest.mark.parametrize("family", FAMILIES)
def test_values_are_mean_losses(family: str) -> None:
    """Each example's loss is the mean of its counted losses, and a set's the mean over examples, in any batches."""
    c = case(family, "frozen")
    stage, d = c.chain.stages[1], oracle.dense(family, "frozen", 1)
    asked = Stage(stage.model, stage.task, list(c.asked), trained=stage.trained)
    each = [float(oracle.item_losses(*c.asked_outputs(asked, d.tree(d.theta), i)).mean()) for i in range(len(c.asked))]
    assert [Query.loss(x).value(stage) for x in c.asked] == pytest.approx(each, rel=1e-12)
    for size in (1, 64):
        batched = Stage(stage.model, stage.task, stage.data, trained=stage.trained, batch_size=size)
        assert Query.mean_loss(list(c.asked)).value(batched) == pytest.approx(sum(each) / len(each), rel=1e-12)


def test_a_margin_is_negative_where_the_label_wins() -> None:
    model = torch.nn.Linear(2, 3, bias=False, dtype=torch.float64)
    model.weight.data = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, -1.0]], dtype=torch.float64)
    stage = Stage(model, Classification(), [(torch.zeros(2), 0)])
    x = torch.tensor([2.0, 0.5])  # outputs 2, 0.5, −2.5
    assert Query.margin((x, 0)).value(stage) == 0.5 - 2.0
    assert Query.margin((x, 1)).value(stage) == 2.0 - 0.5
    assert Query.margin((x, 2)).value(stage) == 2.0 + 2.5
    gradient = Query.margin((x, 1)).gradient(stage)["weight"]
    assert gradient.tolist() == [[2.0, 0.5], [-2.0, -0.5], [0.0, 0.0]]


def test_a_function_sees_all_examples_in_their_order() -> None:
    c = case("mlp", "frozen")
    stage = Stage(c.chain.stages[1].model, Classification(), c.chain.stages[1].data, batch_size=1)
    asked = list(c.asked)
    seen: list[tuple] = []

    def function(outputs: torch.Tensor, batch) -> torch.Tensor:  # type: ignore[no-untyped-def]
        seen.append((outputs.detach(), batch.targets.tolist()))
        return outputs.sum()

    query = Query.of(function, asked)
    query.value(stage)
    ((outputs, targets),) = seen
    assert targets == [int(y) for _, y in asked]
    for i, (x, _) in enumerate(asked):
        assert torch.allclose(outputs[i], stage.model(x[None])[0].detach(), rtol=1e-12)
    assert query.name == "function"


def test_a_masked_query_has_masks_of_its_own() -> None:
    """Rows of queries start behind the corpus's, so that a query is not asked with a pretraining sentence's masks."""
    stage = case("bert eager", "frozen").chain.stages[0]
    task = MaskedLM(tokenizer(), 9, probability=0.3, seed=3)
    own = Stage(stage.model, task, TEXTS)
    batches = Query.mean_loss(TEXTS)._batches(own)
    expected = task.collate(task.encode(TEXTS), range(len(TEXTS), 2 * len(TEXTS)))
    assert torch.equal(batches[0].inputs["input_ids"], expected.inputs["input_ids"])


def test_texts_that_are_cut_are_counted() -> None:
    """A text longer than the finetuned model's rows has the loss of its beginning, and that is said."""
    c = case("bert eager", "frozen")
    last = c.chain.stages[1]
    short, long = c.asked[0], {**c.asked[0], "text": " ".join([c.asked[0]["text"]] * 9)}
    longer = {**long, "text": long["text"] + " again"}
    assert Query.loss(long).value(last) == pytest.approx(Query.loss(longer).value(last), rel=1e-12)
    queries = [Query.mean_loss([short, long, longer]), Query.loss(short)]
    rough: dict[str, Any] = {"solver": CG(max_iterations=1), "allow_unconverged": True}
    assert query_vectors(c.chain, queries, **rough).settings["truncated"] == [2, 0]
    assert "truncated" not in query_vectors(c.chain, queries[1:], **rough).settings


def test_bad_queries_are_refused() -> None:
    c = case("lstm tagger", "frozen")
    with pytest.raises(BadInput, match="at least one example"):
        Query.mean_loss([])
    with pytest.raises(BadInput, match="one label an example"):
        Query.margin(c.asked[0]).value(c.chain.stages[1])
    infinite = Query.of(lambda o, b: (o.sum() * 0).sqrt(), list(c.asked), "root")
    with pytest.raises(BadInput, match="gradient of query 'root' is not finite"):
        infinite.gradient(c.chain.stages[1])


def test_names_are_short() -> None:
    assert Query.loss({"text": "a good film", "label": 1}).name == "loss of 'a good film'"
    assert len(Query.loss("x" * 500).name) < 80
    assert Query.mean_loss([1, 2, 3]).name == "mean loss of 3 examples"
    assert Query.loss("a", name="mine").name == "mine"
