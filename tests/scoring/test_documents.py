"""Document scores of packed rows: against a gradient a token, tokens told apart by the text, and against the rows' own sums."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from nlpinf.data.packing import packed_rows
from nlpinf.data.tokenrows import TokenRows, write_rows
from nlpinf.errors import BadInput
from nlpinf.influence import QueryVectors
from nlpinf.scoring import Documents, Shard, score
from nlpinf.scoring.merge import merge
from nlpinf.stages import Stage, evaluation
from nlpinf.tasks import MaskedLM
from tests.cases import tokenizer
from tests.cli.common import nlpinf, refused
from tests.scoring.common import apart, pretrain_stage, query_vectors, sentences

SIZE = 5
NUMBERS = [3 * i + 7 for i in range(12)]  # documents have numbers of their own, not their places


def texts() -> list[str]:
    return [*sentences(11, seed=3), " ".join(sentences(6, seed=4))]  # the last one lies in several rows


def packed(folder: Path) -> TokenRows:
    encoded = [tokenizer()(text)["input_ids"] for text in texts()]
    path = folder / "rows.parquet"
    write_rows(path, packed_rows(encoded, NUMBERS, SIZE))
    return TokenRows.read(path, tokenizer().decode)


def owners() -> list[int]:
    """The document of every token of the joined text, one after another."""
    return [number for number, text in zip(NUMBERS, texts()) for _ in tokenizer()(text)["input_ids"]]


def vectors(family: str, folder: Path, count: int, reduction: str = "token") -> QueryVectors:
    stage = pretrain_stage(family)
    return query_vectors(replace(stage, data=packed(folder), reduction=reduction), count)


def by_hand(stage: Stage, trees: Any) -> dict[int, np.ndarray]:
    """Σ over a document's counted tokens of w ⟨v, ∇ℓ⟩: one backward pass a token, no part of the scoring code."""
    whose = owners()
    total: dict[int, np.ndarray] = defaultdict(lambda: np.zeros(len(trees)))
    items = sum(len(b.example) for b in stage.batches())
    with evaluation(stage.model):
        for i in range(stage.size):
            batch = stage.on_device(stage.task.collate(stage.task.encode([stage.data[i]]), [int(stage.rows[i])]))
            theta = {n: t.clone().requires_grad_(True) for n, t in stage.parameters.items()}
            losses = stage.task.losses(stage.outputs(batch, theta), batch)
            assert batch.position is not None
            for k, place in enumerate(batch.position.tolist()):
                gradients = torch.autograd.grad(losses[k], list(theta.values()), retain_graph=True, allow_unused=True)
                of = {n: g for n, g in zip(theta, gradients) if g is not None}
                weight = stage.size / items if stage.reduction == "token" else 1 / len(losses)
                predicted = place % SIZE + (0 if isinstance(stage.task, MaskedLM) else 1)
                if not isinstance(stage.task, MaskedLM):  # the target is the token at that place
                    assert int(batch.targets[k]) == stage.data[i][predicted]
                total[whose[i * SIZE + predicted]] += [
                    weight * sum(float((of[n] * v[n]).sum()) for n in v if n in of) for v in trees
                ]
    return total


@pytest.mark.parametrize(
    ("family", "reduction"), [("gpt2 sdpa", "token"), ("gpt2 sdpa", "example"), ("bert sdpa", "token")]
)
def test_documents_have_the_sums_of_their_tokens(family: str, reduction: str, tmp_path: Path) -> None:
    made = vectors(family, tmp_path, 2, reduction)
    scores = score(made, token_scores=True, part_rows=3)
    documents = Documents.of(scores)
    expected = by_hand(made.stage, made.vectors)
    assert documents.numbers.tolist() == sorted(expected)
    for query in range(2):
        assert apart(documents.column(query).copy(), [expected[d][query] for d in sorted(expected)]) < 1e-5
        both = documents.column(query).astype(float), scores.column(query).astype(float)
        assert abs(both[0].sum() - both[1].sum()) < 1e-5 * np.abs(both[1]).sum()
    assert documents.table["tokens"].to_numpy().sum() == sum(t["tokens"].to_numpy().sum() for t in scores.tables())
    rows = documents.table["rows"].to_pylist()
    if family == "gpt2 sdpa":
        used = owners()[: len(made.stage.data) * SIZE]
        cut = {d: [k // SIZE for k, o in enumerate(used) if o == d and k % SIZE] for d in set(used)}
        cut = {d: places for d, places in cut.items() if places}
        assert rows == [len(set(cut[d])) for d in sorted(cut)] and max(rows) > 2
        assert documents.table["first_row"].to_pylist() == [min(cut[d]) for d in sorted(cut)]
    best = documents.top(3, 1)
    assert [b.score for b in best] == sorted(documents.column(1).tolist(), reverse=True)[:3]
    assert best[0].predicted_change == pytest.approx(-best[0].score / made.stage.size)
    assert [b.score for b in documents.top(2, 1, helpful=True)] == sorted(documents.column(1).tolist())[:2]


def test_a_folder_has_the_documents_beside_its_parts(tmp_path: Path) -> None:
    made = vectors("gpt2 sdpa", tmp_path, 2)
    whole = score(made, out=tmp_path / "whole", token_scores=True, part_rows=3)
    table = pq.read_table(tmp_path / "whole/documents.parquet")
    assert table.equals(Documents.of(score(made, token_scores=True, part_rows=4)).table)
    assert table.column_names == ["document", "score", "tokens", "first_row", "rows"]
    assert table.schema.field("score").type == pa.list_(pa.float32(), 2)
    for k in range(2):  # of the parts of several machines, only all together make documents
        score(made, out=tmp_path / f"shard{k}", token_scores=True, part_rows=3, shard=Shard(k, 2))
        assert not (tmp_path / f"shard{k}/documents.parquet").exists()
    merge([tmp_path / "shard0"], tmp_path / "merged")
    assert not (tmp_path / "merged/documents.parquet").exists()
    merge([tmp_path / "shard1"], tmp_path / "merged")
    assert pq.read_table(tmp_path / "merged/documents.parquet").equals(table)
    (tmp_path / "whole/documents.parquet").unlink()
    assert Documents.of(whole).table.equals(table)


def test_top_ranks_documents_and_shows_their_texts(tmp_path: Path) -> None:
    made = vectors("gpt2 sdpa", tmp_path, 1)
    lines = [""] * (NUMBERS[-1] + 1)
    for number, text in zip(NUMBERS, texts()):
        lines[number] = text
    (tmp_path / "corpus.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    out = tmp_path / "scores"
    documents = Documents.of(score(made, out=out, token_scores=True))
    ended = nlpinf("top", out, "--by", "document", "-n", 4, "--corpus", tmp_path / "corpus.txt", "--json")
    assert ended.status == 0 and ended.err == ""
    assert [d["document"] for d in ended.json["documents"]] == [d.document for d in documents.top(4)]
    for told in ended.json["documents"]:
        assert told["text"] == texts()[NUMBERS.index(told["document"])]
    shown = nlpinf("top", out, "--by", "document", "--helpful", "-n", 1).out
    best = documents.top(1, helpful=True)[0]
    assert f"{best.score:+.4g}" in shown and str(best.document) in shown and "helpful" in shown
    (tmp_path / "corpus.txt").write_text("one\n", encoding="utf-8")
    refused(nlpinf("top", out, "--by", "document", "--corpus", tmp_path / "corpus.txt"), "corpus.txt", "1 rows")
    refused(nlpinf("top", out, "--corpus", tmp_path / "corpus.txt"), "--by document")


def test_scores_without_documents_are_refused(tmp_path: Path) -> None:
    made = vectors("gpt2 sdpa", tmp_path, 1)
    with pytest.raises(BadInput, match="--token-scores"):
        Documents.of(score(made))
    with pytest.raises(BadInput, match="no packed ones"):
        Documents.of(score(made, sentences(5), token_scores=True))
    part = score(made, out=tmp_path / "scores", token_scores=True, part_rows=3, shard=Shard(0, 2))
    with pytest.raises(BadInput, match="parts are missing"):
        Documents.of(part)


def test_texts_of_packed_rows_are_kept(tmp_path: Path) -> None:
    made = vectors("gpt2 sdpa", tmp_path, 1)
    rows = score(made, out=tmp_path / "scores").top(100)
    data = made.stage.data
    assert {row.row: row.text for row in rows} == {i: tokenizer().decode(data[i]) for i in range(len(data))}
