"""Screening: exact where it says so, resumed to the same bytes, its stated recall true of the recall that scoring all shows."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from nlpinf import report
from nlpinf.data.corpus import Corpus
from nlpinf.errors import BadInput
from nlpinf.scoring import Scores, score
from nlpinf.scoring.screen import recall, screen
from tests.cases import WORDS
from tests.scoring.common import pretrain_stage, query_vectors

ROWS, PART = 2400, 500


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> tuple:
    draw = np.random.default_rng(0)
    texts = [" ".join(draw.choice(WORDS, n)) for n in draw.integers(2, 8, ROWS)]
    stage = replace(
        pretrain_stage("gpt2 sdpa"), data=Corpus(texts, range(7, ROWS + 7)), batch_size=256, batch_tokens=4096
    )
    vectors = query_vectors(stage, 2)
    out = tmp_path_factory.mktemp("screened") / "s"
    scores = screen(vectors, None, out, exact=0.5, top=0.05, part_rows=PART)
    return vectors, scores, out, score(vectors)


def test_exact_rows_are_exact_and_others_are_marked(found: tuple) -> None:
    _, scores, out, whole = found
    table = pq.read_table(sorted(out.glob("part-*.parquet")))
    assert table["row"].to_pylist() == whole.rows.tolist()
    exact = table["exact"].to_numpy()
    assert 0.5 <= exact.mean() < 0.85  # the candidates, and of the sample those that are none
    scale = max(abs(whole.column(q)).max() for q in (0, 1))
    for query in (0, 1):
        difference = np.abs(scores.column(query) - whole.column(query)) / scale
        assert difference[exact].max() < 1e-6 and difference[~exact].max() > 1e-4
    np.testing.assert_allclose(scores.losses[exact], whole.losses[exact], rtol=1e-5)
    assert table["loss"].null_count == table["tokens"].null_count == (~exact).sum()
    assert all(row.row in set(whole.rows[exact]) for row in scores.top(40, helpful=True))
    assert Scores.open(out).manifest["corpus"]["exact"] == exact.sum()


def test_the_report_shows_exact_rows_and_says_how_many_were_screened(found: tuple, tmp_path: Path) -> None:
    _, scores, _, _ = found
    report.write(scores, tmp_path / "page.html", examples=200)
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    exact = {r for t in scores.tables(["row", "exact"]) for r, e in zip(*t.to_pydict().values()) if e}
    told = f"{ROWS - len(exact):,}".replace(",", "\u2009")
    assert f"{told} sentences were screened only" in page and ">nan<" not in page.lower()
    shown = [row for q in (0, 1) for h in (False, True) for row in scores.top(200, q, h)]
    assert {row.row for row in shown} <= exact and all(row.loss is not None for row in shown)


def test_the_stated_recall_holds(found: tuple) -> None:
    _, scores, out, whole = found
    stated = recall(out)
    assert stated is not None and [(r.query, r.end) for r in stated] == [
        (f"query {q}", end) for q in (0, 1) for end in ("harmful", "helpful")
    ]
    drawn = set(Scores.open(out / "screening/sample").rows)
    other = np.array([row not in drawn for row in whole.rows])
    exact = np.concatenate([t["exact"].to_numpy() for t in scores.tables(["exact"])])
    for entry in stated:
        column = whole.column(entry.query) * (-1 if entry.end == "harmful" else 1)
        best = np.argsort(np.where(other, column, np.inf), kind="stable")[: int(0.05 * other.sum())]
        true = exact[best].mean()
        assert entry.seen == 25 and entry.recall == entry.found / 25 and entry.low <= entry.recall <= entry.high
        assert entry.low <= true <= entry.high
        assert true > 0.6  # half of the rows, a quarter at random for each query and end


def test_resumed_to_the_same_bytes(found: tuple, tmp_path: Path) -> None:
    vectors, _, out, _ = found
    before = {path.relative_to(out): path.read_bytes() for path in out.rglob("*") if path.is_file()}
    copy = tmp_path / "s"
    shutil.copytree(out, copy)
    for name in ("part-00002.parquet", "screening/recall.json", "screening/candidates/part-00001.parquet"):
        (copy / name).unlink()
    screen(vectors, None, copy, exact=0.5, top=0.05, part_rows=PART)
    assert {path.relative_to(copy): path.read_bytes() for path in copy.rglob("*") if path.is_file()} == before
    with pytest.raises(BadInput, match="another setting 'screen'"):
        screen(vectors, None, copy, exact=0.6, top=0.05, part_rows=PART)
    with pytest.raises(BadInput, match="too few to screen"):
        screen(vectors, None, tmp_path / "t", exact=0.1)
    assert recall(tmp_path) is None
