"""Where a GPU's memory does not hold a batch, smaller ones give the same results; a network that refuses plays the GPU."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

from nlpinf import parameters as P
from nlpinf.curvature import Curvature, cross_product
from nlpinf.curvature.ekfac import EKFAC
from nlpinf.data.corpus import Corpus
from nlpinf.errors import BadInput
from nlpinf.memory import OutOfMemory
from nlpinf.parameters import Parameters
from nlpinf.scoring import score
from nlpinf.scoring.feed import StreamFeed
from nlpinf.scoring.plan import plan
from nlpinf.stages import Stage
from tests.scoring.common import pretrain_stage, query_vectors, sentences

FAMILY = "gpt2 sdpa"


@contextmanager
def holding(stage: Stage, most: int) -> Iterator[list[int]]:
    """Let the network run out of memory on more than `most` sequences; yield the sizes that it was given."""
    seen: list[int] = []

    def enter(_: torch.nn.Module, args: tuple[torch.Tensor, ...], kwargs: dict[str, torch.Tensor]) -> None:
        seen.append(len(kwargs["input_ids"]))
        if seen[-1] > most:
            raise OutOfMemory("CUDA out of memory.")

    handle = stage.model.register_forward_pre_hook(enter, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()


def own_stage(dtype: torch.dtype = torch.float64) -> Stage:
    """A stage with a model of its own, and 12 rows in one batch."""
    stage = pretrain_stage(FAMILY, dtype)
    return replace(stage, model=copy.deepcopy(stage.model), data=sentences(12), batch_size=64, batch_tokens=2048)


def apart(found: Parameters, expected: Parameters) -> float:
    return P.norm(P.axpy(-1.0, found, expected)) / P.norm(expected)


@pytest.mark.parametrize("kind", ["hessian", "ggn", "fisher"])
def test_products_and_gradients_are_the_same_from_smaller_batches(kind: str) -> None:
    stage = own_stage()
    vectors = [P.random_like(stage.theta, seed) for seed in (1, 2)]
    names = list(stage.theta)[:2]
    expected = [
        *Curvature(stage, kind).many(vectors),  # type: ignore[arg-type]
        stage.gradient(),
        cross_product(stage, vectors[0], names, range(12)),
    ]
    goal = stage.objective()
    with holding(stage, 3) as seen:
        operator = Curvature(stage, kind)  # type: ignore[arg-type]
        found = [*operator.many(vectors), stage.gradient(), cross_product(stage, vectors[0], names, range(12))]
        assert stage.objective() == pytest.approx(goal, rel=1e-12)
        assert seen[0] == 12 and min(seen) <= 3
        seen.clear()
        again = operator @ vectors[0]
        assert max(seen) <= 3  # what was learnt is kept
    for one, other in zip([*found, again], [*expected, expected[0]]):
        assert apart(one, other) < 1e-12
    with holding(stage, 0), pytest.raises(BadInput, match="does not hold the work on one example"):
        operator @ vectors[0]


def test_a_part_of_an_operator_keeps_to_its_own_rows() -> None:
    stage = replace(own_stage(), batch_size=6)
    v = P.random_like(stage.theta, 1)
    expected = [part @ v for part in Curvature(stage, "ggn").parts()]
    assert len(expected) == 2
    with holding(stage, 2):
        for found, right in zip(Curvature(stage, "ggn").parts(), expected):
            assert apart(found @ v, right) < 1e-12


def test_parts_of_an_operator_that_cut_its_batches_are_all_of_it() -> None:
    stage = replace(own_stage(), batch_size=6)
    v = P.random_like(stage.theta, 1)
    whole = Curvature(stage, "ggn") @ v
    with holding(stage, 2):
        operator = Curvature(stage, "ggn")
        assert apart(operator @ v, whole) < 1e-12
        found = [part @ v for part in operator.parts()]
        assert apart(P.mean_like(P.axpy(1.0, found[0], found[1]), len(found), v), whole) < 1e-12


def test_factors_are_the_same_from_smaller_batches() -> None:
    stage = own_stage()
    v = P.random_like(stage.theta, 1)
    expected = EKFAC.fit(stage).inverse(0.1)(v)
    with holding(stage, 5):
        assert apart(EKFAC.fit(stage).inverse(0.1)(v), expected) < 1e-10


@pytest.mark.parametrize("queries", [1, 3])
def test_scores_are_the_same_from_smaller_batches(queries: int) -> None:
    stage = own_stage(torch.float32)
    vectors = query_vectors(stage, queries)
    texts = sentences(40, seed=1)
    expected = score(vectors, texts)
    with holding(stage, 5) as seen:
        found = score(vectors, texts)
        assert seen.count(40) <= 1 and max(seen[-4:]) <= 5
        for q in range(queries):
            a, b = (torch.as_tensor(s.column(q)).double() for s in (found, expected))
            assert (a - b).abs().max() <= 1e-5 * b.abs().max()
        planned = plan(vectors, StreamFeed.of_corpus(Corpus(texts)), part_rows=40, sample=10)
        assert planned.scoring["batch_size"] <= 5
    with holding(stage, 0), pytest.raises(BadInput, match="memory does not hold one row"):
        score(vectors, texts, mode="forward")
