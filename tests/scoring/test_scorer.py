"""`Scorer` in `datasets.map`: cached, in several processes and in streams, without the corpus in its pickle."""

from __future__ import annotations

import pickle
from dataclasses import replace
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from datasets.fingerprint import Hasher

from nlpinf.data.corpus import Corpus
from nlpinf.errors import BadInput
from nlpinf.scoring import Scorer, score
from nlpinf.stages import Stage
from tests.scoring.common import apart, pretrain_stage, query_vectors, sentences


def on_corpus(family: str, count: int, **changes: Any) -> Stage:
    stage = pretrain_stage(family, torch.float32)
    return replace(stage, data=Corpus(sentences(count), rows=range(5, 5 + count)), **changes)


@pytest.mark.parametrize(("family", "queries"), [("bert sdpa", 3), ("gpt2 sdpa", 1)])
def test_it_is_known_again_after_use(family: str, queries: int) -> None:
    vectors = query_vectors(on_corpus(family, 20), queries)
    scorer = Scorer(vectors)
    before = Hasher.hash(scorer)
    scorer({"text": ["a cat sat"], "row": [3]})
    assert (
        Hasher.hash(scorer) == before == Hasher.hash(Scorer(vectors)) == Hasher.hash(pickle.loads(pickle.dumps(scorer)))
    )
    others = query_vectors(on_corpus(family, 20, weight_decay=0.0), queries + 1)
    assert Hasher.hash(Scorer(others)) != before
    assert Hasher.hash(Scorer(vectors, mode="forward" if queries > 1 else "reverse")) != before


def test_its_pickle_does_not_grow_with_the_corpus() -> None:
    small, large = (Scorer(query_vectors(on_corpus("gpt2 sdpa", count, reduction="token"))) for count in (40, 4000))
    assert abs(len(pickle.dumps(large)) - len(pickle.dumps(small))) < 2000


@pytest.mark.parametrize("reduction", ["example", "token"])
def test_processes_and_streams_give_the_scores_of_the_pass(reduction: Any) -> None:
    stage = on_corpus("gpt2 sdpa", 24, reduction=reduction)
    vectors = query_vectors(stage, 2)
    scorer = Scorer(vectors, text_column="sentence")
    data = datasets.Dataset.from_dict({"sentence": list(stage.data), "row": stage.rows.tolist()})
    expected = score(vectors)
    for found in (
        data.map(scorer, batched=True, batch_size=5, num_proc=2)["score"],
        [row["score"] for row in data.to_iterable_dataset().map(scorer, batched=True, batch_size=7)],
    ):
        for q in (0, 1):
            assert apart(np.array(found)[:, q], expected.column(q)) < 1e-5
    with pytest.raises(BadInput, match="no 'sentence'; there are text"):
        scorer({"text": ["a cat"]})
