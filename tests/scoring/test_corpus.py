"""The pass over a corpus: the same scores whatever the batches, in the corpus's order, and what it refuses."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch

import nlpinf.scoring.rows as pass_over
from nlpinf.data.corpus import Corpus
from nlpinf.errors import BadInput
from nlpinf.influence import QueryVectors
from nlpinf.scoring import Scorer, score, shards
from nlpinf.scoring.rows import RowScorer
from nlpinf.stages import Stage
from tests.scoring.common import apart, by_loop, pretrain_stage, query_vectors, sentences

TEXT_FAMILIES = ["bert sdpa", "gpt2 sdpa"]


def on_corpus(family: str, count: int, **changes: Any) -> Stage:
    """Return the single-precision pretraining stage of a family on a corpus of its own."""
    stage = pretrain_stage(family, torch.float32)
    return replace(stage, data=Corpus(sentences(count), rows=range(5, 5 + count)), **changes)


@pytest.mark.parametrize("mode", ["forward", "reverse"])
@pytest.mark.parametrize("family", ["mlp", "bert sdpa", "gpt2 sdpa", "lstm tagger"])
def test_pass_equals_the_loop(family: str, mode: Any) -> None:
    stage = pretrain_stage(family)
    vectors = query_vectors(stage, 2)
    truth, losses = by_loop(stage, vectors.vectors)
    scores = score(vectors, mode=mode, part_rows=3)
    for q in (0, 1):
        assert apart(scores.column(q), truth[:, q]) < 1e-6  # stored in float32
    assert apart(scores.losses, losses) < 1e-6 and scores.rows.tolist() == list(range(stage.size))


@pytest.mark.parametrize("mode", ["forward", "reverse"])
@pytest.mark.parametrize("family", TEXT_FAMILIES)
def test_batches_do_not_change_scores(family: str, mode: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = on_corpus(family, 24)
    vectors = query_vectors(stage, 2)

    def columns(**settings: Any) -> np.ndarray:
        scores = score(vectors, mode=mode, **settings)
        return np.stack([scores.column(q) for q in (0, 1)])

    expected = columns(batch_size=64, batch_tokens=10**6)
    for settings in ({"batch_size": 1}, {"batch_size": 7}, {"batch_tokens": 30}, {"part_rows": 7}, {}):
        assert apart(columns(**settings), expected) < 1e-5

    def unsorted(lengths: list[int], size: int, tokens: int) -> Any:
        order = torch.randperm(len(lengths), generator=torch.Generator().manual_seed(3)).tolist()
        yield from (order[i : i + 7] for i in range(0, len(order), 7))

    monkeypatch.setattr(pass_over, "length_batches", unsorted)
    assert apart(columns(), expected) < 1e-5


@pytest.mark.parametrize("family", TEXT_FAMILIES)
def test_padding_does_not_change_scores(family: str) -> None:
    stage = on_corpus(family, 12, batch_size=64, batch_tokens=10**6)
    vectors = query_vectors(stage, 2)
    for mode in ("forward", "reverse"):
        scorer = RowScorer(vectors, mode)  # type: ignore[arg-type]
        alone = scorer(["a cat", "dog sat"], [3, 4])
        beside = scorer(["a cat", "dog sat", "the cat sat on the mat ran"], [3, 4, 9])
        assert apart(beside.scores[:2], alone.scores) < 1e-5 and apart(beside.losses[:2], alone.losses) < 1e-5


def test_attention_kernels_give_the_same_scores() -> None:
    eager, sdpa = on_corpus("gpt2 eager", 20, reduction="example"), on_corpus("gpt2 sdpa", 20)
    for one, other in zip(eager.parameters.values(), sdpa.parameters.values()):
        assert torch.equal(one, other)
    for mode in ("forward", "reverse"):
        a, b = (score(query_vectors(s, 2), mode=mode) for s in (eager, sdpa))  # type: ignore[arg-type]
        assert apart(a.column(1), b.column(1)) < 1e-5


@pytest.mark.parametrize("family", ["bert sdpa", "gpt2 sdpa", "lstm tagger", "mlp"])
def test_token_scores_add_up(family: str) -> None:
    stage = pretrain_stage(family)
    vectors = query_vectors(stage, 2)
    plain, detailed = score(vectors, mode="forward"), score(vectors, token_scores=True, part_rows=2)
    assert detailed.manifest["scoring"]["mode"] == "forward"
    np.testing.assert_array_equal(plain.column(1), detailed.column(1))
    for row in detailed.top(100, query=1):
        assert row.token_scores is not None and row.token_ids is not None
        assert len(row.token_scores) == row.tokens == len(row.token_ids)
        assert abs(sum(row.token_scores) - row.score) < 1e-5 * max(1.0, *map(abs, row.token_scores))


def test_token_ids_are_the_sentence_in_order() -> None:
    stage = on_corpus("gpt2 sdpa", 20)
    task = stage.task
    for row in score(query_vectors(stage), token_scores=True, part_rows=6).top(20):
        ids = task.encode([row.text])[0]
        assert row.token_ids == ids[1:] and row.token_positions == list(range(len(ids) - 1))


def test_a_corpus_file_scores_like_the_texts_in_memory(tmp_path: Path) -> None:
    texts = sentences(15)
    file = tmp_path / "corpus.txt"
    file.write_text("\n".join(texts[:7]) + "\n\n" + "\n".join(texts[7:]) + "\n")
    stage = on_corpus("bert sdpa", 15)
    vectors = query_vectors(stage)
    read = Corpus.read(file, empty="skip")
    scores = score(vectors, read)
    same = score(vectors, Corpus(texts, rows=[*range(7), *range(8, 16)]))
    np.testing.assert_array_equal(scores.column(), same.column())
    assert scores.rows.tolist() == [*range(7), *range(8, 16)]
    # Masks are drawn by row number, so renumbered sentences have other losses.
    assert apart(score(vectors, texts).losses, scores.losses) > 1e-3
    assert scores.manifest["corpus"] == {
        "path": str(file), "reading": {}, "rows": 15, "skipped": {"empty": 1}, "odd": {}, "truncated": 0,
    }  # fmt: skip
    file.write_text("\n".join(texts))
    np.testing.assert_array_equal(score(vectors, file).column(), score(vectors, texts).column())


@pytest.mark.parametrize("queries", [1, 3])
def test_scorer_maps_data_sets(queries: int) -> None:
    stage = on_corpus("bert sdpa", 20)
    vectors = query_vectors(stage, queries)
    data = datasets.Dataset.from_dict({"text": list(stage.data), "row": stage.rows.tolist()})
    found = np.array(data.map(Scorer(vectors), batched=True, batch_size=6)["score"]).reshape(20, queries)
    expected = score(vectors)
    for q in range(queries):
        assert apart(found[:, q], expected.column(q)) < 1e-5
    by_index = data.remove_columns("row").map(Scorer(vectors), batched=True, with_indices=True)["score"]
    other = score(vectors, list(stage.data))
    assert apart(np.array(by_index).reshape(20, queries)[:, 0], other.column()) < 1e-5
    scorer = Scorer(vectors)
    with pytest.raises(BadInput, match="with_indices"):
        scorer({"text": ["a cat"]})
    with pytest.raises(BadInput, match="no 'text'"):
        scorer({"sentence": ["a cat"]})
    assert scorer({"text": []}, []) == {"score": []}


def test_memory_does_not_hold_results_of_parts_that_are_on_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import gc

    import pyarrow as pa

    monkeypatch.setattr(shards, "_PACE", 1e9)  # no report within a part
    stage = on_corpus("gpt2 sdpa", 60)
    held: list[int] = []

    def progress(done: int, rows: int) -> None:
        gc.collect()
        held.append(pa.total_allocated_bytes())

    before = pa.total_allocated_bytes()
    score(query_vectors(stage), out=tmp_path / "s", part_rows=6, progress=progress)
    assert len(held) == 10 and max(held[1:]) - before < 20_000


def test_progress_counts_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "_PACE", 1e9)
    stage = on_corpus("gpt2 sdpa", 20)
    seen: list[tuple[int, int]] = []
    score(query_vectors(stage), out=tmp_path / "s", part_rows=8, progress=lambda *a: seen.append(a))
    assert seen == [(8, 20), (16, 20), (20, 20)]
    (tmp_path / "s" / "part-00002.parquet").unlink()
    seen.clear()
    score(query_vectors(stage), out=tmp_path / "s", part_rows=8, progress=lambda *a: seen.append(a))
    assert seen == [(20, 20)]


def test_bad_settings() -> None:
    stage = on_corpus("gpt2 sdpa", 3)
    vectors = query_vectors(stage)
    for arguments, message in [
        ({"mode": "both"}, "none of"), ({"mode": "reverse", "token_scores": True}, "forward mode"),
        ({"part_rows": 0}, "at least 1"), ({"batch_size": 0}, "at least 1"), ({"corpus": []}, "corpus is empty"),
        ({"corpus": "no/such/file.txt"}, "no such file"),
    ]:  # fmt: skip
        with pytest.raises(BadInput, match=message):
            score(vectors, **arguments)  # type: ignore[arg-type]
    with pytest.raises(BadInput, match="no query vector"):
        score(QueryVectors(stage, (), (), (), (), {}))


def test_auto_takes_reverse_mode_for_many_queries_where_every_layer_has_a_rule() -> None:
    for family, queries, mode in [
        ("gpt2 sdpa", 1, "forward"),
        ("gpt2 sdpa", 32, "reverse"),
        ("lstm tagger", 32, "forward"),
    ]:
        assert RowScorer(query_vectors(pretrain_stage(family), queries)).mode == mode
