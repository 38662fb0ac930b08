"""Filtering: the rows that a sort names, the texts that a loop keeps, in every format, by any query, with replacements."""

from __future__ import annotations

import gzip
import json
import os
import resource
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from nlpinf.data.corpus import Corpus
from nlpinf.data.sources import find
from nlpinf.errors import BadInput
from nlpinf.scoring.feed import deduped, feed_of
from nlpinf.scoring.filter import filter_corpus
from nlpinf.scoring.select import Amount, Rule, select
from nlpinf.scoring.store import Scores
from tests.scoring.made import made

TEXTS = [f"text {i}" for i in range(40)]
ROWS = [3 * i + 1 for i in range(40)]
VALUES = np.random.default_rng(0).integers(-4, 5, (40, 3)).astype(np.float32)  # with ties


@pytest.fixture(scope="module")
def scores(tmp_path_factory: pytest.TempPathFactory) -> Scores:
    return made(tmp_path_factory.mktemp("made") / "s", Corpus(TEXTS, ROWS), VALUES)


def first(values: np.ndarray, count: int, harmful: bool) -> set[int]:
    """The places of the `count` first of a sort by score and row."""
    order = sorted(range(len(values)), key=lambda i: (-values[i] if harmful else values[i], i))
    return set(order[:count])


@pytest.mark.parametrize("side", ["harmful", "helpful"])
@pytest.mark.parametrize(("amount", "count"), [("5%", 2), ("1", 1), ("17", 17), ("50%", 20), ("100%", 40), ("1%", 0)])
def test_amounts_are_those_of_a_sort(scores: Scores, side: str, amount: str, count: int) -> None:
    found = select(scores, Rule(side, Amount.parse(amount)), [1])  # type: ignore[arg-type]
    expected = first(VALUES[:, 1], count, side == "harmful")
    assert set(np.flatnonzero(found.chosen)) == expected
    if count:
        edge = [VALUES[i, 1] for i in expected]
        assert found.edges == {"query 1": min(edge) if side == "harmful" else max(edge)}


def test_thresholds_several_queries_and_chance(scores: Scores) -> None:
    above = select(scores, Rule("harmful", threshold=1.0), [0, 2], "all").chosen
    np.testing.assert_array_equal(above, (VALUES[:, [0, 2]] > 1).all(1))
    below = select(scores, Rule("helpful", threshold=1.0), [0, "query 2"], "any").chosen
    np.testing.assert_array_equal(below, (VALUES[:, [0, 2]] < 1).any(1))
    mean = select(scores, Rule("harmful", Amount.parse("9")), [0, 1, 2], "mean").chosen
    assert set(np.flatnonzero(mean)) == first(VALUES.mean(1).astype(np.float32), 9, True)
    both = select(scores, Rule("harmful", Amount.parse("30%")), [0, 1]).chosen
    assert set(np.flatnonzero(both)) == first(VALUES[:, 0], 12, True) & first(VALUES[:, 1], 12, True)
    draws = [select(scores, Rule("random", Amount.parse("25%"), seed=s)).chosen for s in (0, 0, 1)]
    assert all(draw.sum() == 10 for draw in draws)
    assert (draws[0] == draws[1]).all() and (draws[0] != draws[2]).any()


@pytest.mark.parametrize("text", ["0", "-3", "5.5", "x", "0%", "101%", "%", "nan%"])
def test_amounts_that_are_none(text: str) -> None:
    with pytest.raises(BadInput, match="amount"):
        Amount.parse(text)


def written(path: Path) -> list[str]:
    if path.suffix == ".parquet":
        return pq.read_table(path)["text"].to_pylist()
    if path.name.endswith(".jsonl.gz"):
        return [json.loads(line)["text"] for line in gzip.open(path, "rt", encoding="utf-8")]
    return list(Corpus.read(path))


@pytest.mark.parametrize("name", ["c.txt", "c.txt.gz", "c.txt.zst", "c.txt.bz2", "c.jsonl", "c.jsonl.gz", "c.parquet"])
def test_formats(scores: Scores, tmp_path: Path, name: str) -> None:
    chosen = select(scores, Rule("harmful", Amount.parse("25%")), [1])
    done = filter_corpus(scores, chosen, tmp_path / name)
    gone = first(VALUES[:, 1], 10, True)
    assert written(tmp_path / name) == [TEXTS[i] for i in range(40) if i not in gone]
    assert (done.rows, done.dropped, done.replaced, done.written) == (40, 10, 0, 30)
    expected = -VALUES[sorted(gone)].astype(np.float64).sum(0) / 50
    np.testing.assert_allclose(list(done.predicted_change.values()), expected, rtol=1e-12)
    kept = filter_corpus(scores, chosen, tmp_path / f"kept-{name}", keep=True)
    assert written(kept.out) == [TEXTS[i] for i in sorted(gone)] and kept.dropped == 30
    again = filter_corpus(scores, chosen, tmp_path / f"again-{name}")
    assert again.out.read_bytes() == done.out.read_bytes()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_replacements_take_the_places_of_the_dropped(scores: Scores, tmp_path: Path) -> None:
    chosen = select(scores, Rule("harmful", Amount.parse("10")))
    gone, fresh = first(VALUES[:, 0], 10, True), iter(f"fresh {i}" for i in range(10))
    (tmp_path / "fresh.txt").write_text("".join(f"fresh {i}\n\n" for i in range(12)))
    done = filter_corpus(scores, chosen, tmp_path / "o.jsonl", replacement=tmp_path / "fresh.txt")
    lines = [json.loads(line) for line in done.out.read_text().splitlines()]
    assert [line["text"] for line in lines] == [next(fresh) if i in gone else TEXTS[i] for i in range(40)]
    assert [line["row"] for line in lines] == [None if i in gone else ROWS[i] for i in range(40)]
    assert (done.written, done.replaced) == (40, 10)
    with pytest.raises(BadInput, match="12 rows to replace 13"):
        filter_corpus(
            scores,
            select(scores, Rule("harmful", Amount.parse("13"))),
            tmp_path / "p.txt",
            replacement=tmp_path / "fresh.txt",
        )


def test_texts_from_the_corpus(tmp_path: Path) -> None:
    (tmp_path / "corpus.txt").write_text("\n".join(TEXTS[:9]) + "\n \n" + "\n".join(TEXTS[9:]) + "\n")
    feed = feed_of(tmp_path / "corpus.txt", "skip")
    scores = made(tmp_path / "s", feed, VALUES[:, 0], text=False)
    gone = first(VALUES[:, 0], 4, True)
    chosen = select(scores, Rule("harmful", Amount.parse("10%")))
    filter_corpus(scores, chosen, tmp_path / "o.txt")
    assert written(tmp_path / "o.txt") == [t for i, t in enumerate(TEXTS) if i not in gone]
    (tmp_path / "corpus.txt").write_text("\n".join(reversed(TEXTS)))
    with pytest.raises(BadInput, match="not the corpus that was scored"):
        filter_corpus(scores, chosen, tmp_path / "p.txt")
    assert not (tmp_path / "p.txt").exists()


@pytest.mark.parametrize("dedupe", [False, True])
def test_the_same_texts_at_other_row_numbers_are_another_corpus(tmp_path: Path, dedupe: bool) -> None:
    """An empty line that went: the rows that scores name are then other texts."""
    texts = ["red", "", "blue", "red", "cats"]
    (tmp_path / "a.txt").write_text("\n".join(texts) + "\n")
    (tmp_path / "b.txt").write_text("\n".join(t for t in texts if t) + "\n")
    feed = feed_of(tmp_path / "a.txt", "skip")
    feed = deduped(feed) if dedupe else feed
    scores = made(tmp_path / "s", feed, np.arange(feed.size), text=False)
    chosen = select(scores, Rule("harmful", Amount.parse("1")))
    with pytest.raises(BadInput, match="other row numbers"):
        filter_corpus(scores, chosen, tmp_path / "o.txt", corpus=tmp_path / "b.txt")
    filter_corpus(scores, chosen, tmp_path / "o.txt")
    assert written(tmp_path / "o.txt") == ["red", "blue", "red"]


def test_the_same_lines_in_other_texts_are_another_corpus(tmp_path: Path) -> None:
    for name, texts in {"a": ["a red\nfox", "b"], "b": ["a red", "fox\nb"], "c": ["a red", "fox", "b"]}.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    feeds = {name: feed_of(tmp_path / f"{name}.jsonl") for name in "abc"}
    assert len({feed.sha256 for feed in feeds.values()}) == 3
    assert all(feed.sha256 == Corpus.read(tmp_path / f"{name}.jsonl").sha256 for name, feed in feeds.items())
    scores = made(tmp_path / "s", feeds["a"], np.arange(2), text=False)
    for name in "bc":
        with pytest.raises(BadInput, match="the texts differ"):
            chosen = select(scores, Rule("harmful", Amount.parse("1")))
            filter_corpus(scores, chosen, tmp_path / "o.jsonl", corpus=tmp_path / f"{name}.jsonl")


def test_a_corpus_is_read_again_as_it_was_read(tmp_path: Path) -> None:
    rows = [{"body": text, "text": "something else"} for text in TEXTS]
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for corpus in (feed_of(find(tmp_path / "c.jsonl", "body")), Corpus.read(tmp_path / "c.jsonl", text_column="body")):
        folder = tmp_path / type(corpus).__name__
        scores = made(folder, corpus, VALUES[:, 0], text=False)
        chosen = select(scores, Rule("harmful", Amount.parse("39")))
        filler = find(tmp_path / "c.jsonl", "body")
        done = filter_corpus(scores, chosen, tmp_path / f"{folder.name}.txt", replacement=filler)
        kept = set(range(40)) - first(VALUES[:, 0], 39, True)
        fresh = iter(TEXTS)
        assert written(done.out) == [TEXTS[i] if i in kept else next(fresh) for i in range(40)]
        moved = filter_corpus(scores, chosen, tmp_path / f"{folder.name}.jsonl", corpus=str(tmp_path / "c.jsonl"))
        assert moved.written == 1


@pytest.mark.parametrize("name", ["o.txt", "o.txt.gz", "o.txt.zst", "o.txt.bz2", "o.jsonl.gz", "o.parquet"])
def test_where_the_disk_is_full_no_file_appears(scores: Scores, tmp_path: Path, name: str) -> None:
    chosen = select(scores, Rule("harmful", Amount.parse("25%")), [1])
    size = filter_corpus(scores, chosen, tmp_path / f"whole-{name}").out.stat().st_size
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size - 1, limits[1]))
        with pytest.raises(BadInput, match="free some space"):
            filter_corpus(scores, chosen, tmp_path / name)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in tmp_path.iterdir()] == [f"whole-{name}"]


def test_what_killed_writers_left_goes_and_what_others_write_stays(scores: Scores, tmp_path: Path) -> None:
    old, young, other = (tmp_path / name for name in (".o.txt.1.partial", ".o.txt.2.partial", ".p.txt.1.partial"))
    for path in (old, young, other):
        path.write_text("half")
    for path in (old, other):
        os.utime(path, (0, 0))
    filter_corpus(scores, select(scores, Rule("harmful", Amount.parse("1"))), tmp_path / "o.txt")
    assert sorted(path.name for path in tmp_path.iterdir()) == [young.name, other.name, "o.txt"]


def test_a_rule_that_means_no_row_has_no_edge(scores: Scores) -> None:
    for how in ("all", "any", "mean"):
        found = select(scores, Rule("helpful", Amount.parse("1%")), [0, 1], how)  # type: ignore[arg-type]
        assert found.edges == {} and not found.chosen.any()


def test_equal_texts_go_together(tmp_path: Path) -> None:
    draw = np.random.default_rng(1)
    texts = [f"text {i}" for i in draw.integers(0, 25, 90)]
    (tmp_path / "corpus.txt").write_text("\n".join(texts) + "\n")
    feed = deduped(feed_of(tmp_path / "corpus.txt"))
    firsts = [i for i, t in enumerate(texts) if t not in texts[:i]]
    assert feed.rows.tolist() == firsts and feed.skipped == {"repeated": 90 - len(firsts)}
    assert feed.counts is not None and feed.counts.tolist() == [texts.count(texts[i]) for i in firsts]
    assert feed.repeats is not None
    assert feed.repeats.rows.tolist() == [i for i in range(90) if i not in firsts]
    assert feed.repeats.first.tolist() == [texts.index(texts[i]) for i in range(90) if i not in firsts]
    values = draw.permutation(len(firsts)).astype(np.float32)
    scores = made(tmp_path / "s", feed, values)
    assert [row.count for row in scores.top(3)] == [texts.count(row.text) for row in scores.top(3)]
    done = filter_corpus(scores, select(scores, Rule("harmful", Amount.parse("20%"))), tmp_path / "o.txt")
    gone: list[str] = []
    for i in sorted(range(len(firsts)), key=lambda i: -values[i]):
        if sum(texts.count(t) for t in [*gone, texts[firsts[i]]]) > 18:
            break
        gone.append(texts[firsts[i]])
    assert written(tmp_path / "o.txt") == [t for t in texts if t not in gone]
    assert done.dropped == sum(map(texts.count, gone)) and done.rows == 90
    change = -sum(values[firsts.index(texts.index(t))] * texts.count(t) for t in gone) / 50
    assert done.predicted_change["query 0"] == pytest.approx(change, rel=1e-12)


def test_scores_in_memory_do_not_know_the_rows_of_equal_texts(tmp_path: Path) -> None:
    scores = made(tmp_path / "s", deduped(feed_of(["a", "b", "a"])), np.arange(2))
    held = Scores(scores.manifest, [lambda columns: next(scores.tables(columns))])
    with pytest.raises(BadInput, match="score into a folder"):
        filter_corpus(
            held, select(held, Rule("harmful", Amount.parse("1"))), tmp_path / "o.txt", corpus=["a", "b", "a"]
        )


def test_refusals(scores: Scores, tmp_path: Path) -> None:
    some = select(scores, Rule("harmful", Amount.parse("3")))
    (tmp_path / "there.txt").write_text("mine")
    for name, message in [("o.csv", "format"), ("o.parquet.gz", "format"), ("there.txt", "there already")]:
        with pytest.raises(BadInput, match=message):
            filter_corpus(scores, some, tmp_path / name)
    with pytest.raises(BadInput, match="every row would be dropped"):
        filter_corpus(scores, select(scores, Rule("harmful", Amount.parse("100%"))), tmp_path / "o.txt")
    with pytest.raises(BadInput, match="41 rows were asked for, and there are 40"):
        select(scores, Rule("harmful", Amount.parse("41")))
    broken = made(tmp_path / "s", Corpus(["a", "b\nc", "d"]), np.arange(3))
    with pytest.raises(BadInput, match="text of row 1 has a line break"):
        filter_corpus(broken, select(broken, Rule("helpful", Amount.parse("1"))), tmp_path / "o.txt")
    two = select(broken, Rule("helpful", Amount.parse("2")))
    kept = made(tmp_path / "kept", Corpus(["a", "b", "c"]), np.arange(3))
    with pytest.raises(BadInput, match="a row that takes the place of a dropped one has a line break"):
        filter_corpus(kept, two, tmp_path / "o.txt", replacement=Corpus(["d\ne", "f"]))
    marked = made(tmp_path / "marked", Corpus(["\ufeffa", "b", "c"]), np.arange(3))
    with pytest.raises(BadInput, match="begins with U\\+FEFF"):
        filter_corpus(marked, select(marked, Rule("harmful", Amount.parse("1"))), tmp_path / "o.txt")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kept", "marked", "s", "there.txt"]
    assert (tmp_path / "there.txt").read_text() == "mine"
