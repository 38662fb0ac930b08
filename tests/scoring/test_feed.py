"""Feeds: the parts are slices of the corpus, whatever was chosen of it, and awkward text is what the policy says."""

from __future__ import annotations

import gzip
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from nlpinf.data.corpus import Corpus
from nlpinf.data.sources import find
from nlpinf.errors import BadInput
from nlpinf.scoring import Scores, score
from nlpinf.scoring.feed import StreamFeed, deduped, feed_of
from tests.scoring.common import pretrain_stage, query_vectors

TEXTS = [f"text {i} {'y' * (i % 5)}" for i in range(101)]


@pytest.mark.parametrize("size", [1, 7, 50, 101, 500])
@pytest.mark.parametrize("block", [1, 13, 1000])
def test_parts_are_slices(size: int, block: int) -> None:
    rows = np.arange(101) * 3 + 5
    corpus = Corpus(TEXTS, rows.tolist())

    def blocks():  # type: ignore[no-untyped-def]
        for start in range(0, 101, block):
            yield rows[start : start + block], corpus.texts(start, min(start + block, 101)), 0

    feed = StreamFeed(blocks)
    feed._scan()
    assert feed.sha256 == corpus.sha256 == feed_of(corpus).sha256 and feed.total == feed.size == 101
    chosen = np.random.default_rng(0).random(101) < 0.4
    for some, places in ((feed, np.arange(101)), (feed.choose(chosen), np.flatnonzero(chosen))):
        count = -(-len(places) // size)
        for wanted in (range(count), range(0, count, 3), [count - 1]):
            parts = list(some.parts(wanted, size))
            assert [part.number for part in parts] == list(wanted)
            for part in parts:
                here = places[part.number * size : (part.number + 1) * size]
                assert list(part.examples) == [TEXTS[i] for i in here] and part.rows.tolist() == rows[here].tolist()
        assert some.rows.tolist() == rows[places].tolist()


def test_a_corpus_that_shrinks_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "c.txt"
    path.write_text("\n".join(TEXTS))
    feed = feed_of(path)
    path.write_text("\n".join(TEXTS[:50]))
    with pytest.raises(BadInput, match="fewer rows than a moment ago"):
        list(feed.parts(range(11), 10))


def test_examples_that_are_no_texts(tmp_path: Path) -> None:
    ids = [[1, 2, 3], [4, 5]]
    feed = feed_of(ids)
    assert not feed.has_texts and [list(part.examples) for part in feed.parts([0, 1], 1)] == [[[1, 2, 3]], [[4, 5]]]
    with pytest.raises(BadInput, match="only texts"):
        deduped(feed)


def test_awkward_text_is_scored_as_the_policy_says(tmp_path: Path) -> None:
    lines = [
        "the cat",
        "the\u2028dog",
        "a \ufffd cat",
        "a\0dog",
        "the\rcat",
        "\ufeffa cat",
        "x" * 10 * 2**20,
        "the end",
    ]
    content = ("\r\n".join(lines[:4]) + "\r\n" + "\n" * 50_000 + " \n" * 50_000 + "\n".join(lines[4:]) + "\n").encode()
    path = tmp_path / "c.txt.gz"
    path.write_bytes(gzip.compress(content, 1))
    with pytest.raises(BadInput, match=r"line 5 is empty.*--empty skip"):
        feed_of(find(path))
    stage = replace(pretrain_stage("gpt2 sdpa"), data=Corpus(["the cat"]))
    scores = score(query_vectors(stage), path, tmp_path / "s", empty="skip", part_rows=3)
    odd = {"U+FFFD": 1, "NUL": 1, "U+2028": 1, "CR": 1}
    counted = {"skipped": {"empty": 100_000}, "odd": odd, "truncated": 0}
    assert scores.manifest["corpus"] == {"path": str(path), "reading": {}, "rows": 8, **counted}
    assert scores.rows.tolist() == [0, 1, 2, 3, *range(100_004, 100_008)]
    table = [text for part in Scores.open(tmp_path / "s").tables(["text"]) for text in part["text"].to_pylist()]
    assert table == lines
    same = score(query_vectors(stage), Corpus(lines, scores.rows.tolist()))
    np.testing.assert_allclose(scores.column(), same.column(), rtol=1e-5)
