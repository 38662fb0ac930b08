"""The commands of a large corpus: shards, status, merge, filter, equal texts."""

from __future__ import annotations

import json
from pathlib import Path

from tests.cli.common import nlpinf, refused, scored, sentences


def score(root: Path, out: Path, *options: object) -> tuple[object, ...]:
    return ("score", "--query", root / "run/query", "--out", out, "--part-rows", 20, *options)


def test_shards_are_merged_to_the_same_bytes(root: Path, tmp_path: Path) -> None:
    assert nlpinf(*score(root, tmp_path / "whole")).status == 0
    for index in (0, 1):
        ended = nlpinf(*score(root, tmp_path / f"m{index}", "--shard", f"{index}/2"))
        assert ended.status == 0 and "parts are missing still" in ended.out, ended
    assert sorted(scored(tmp_path / "m1")) == ["part-00001.parquet"]
    status = nlpinf("status", tmp_path / "m0", "--json").json
    assert status["parts_done"] == 2 and status["rows_done"] == 40 and status["missing"] == [1]
    assert "2 of 3 parts, 40 of 60 rows (66.7%)" in nlpinf("status", tmp_path / "m0").out
    merged = nlpinf("merge", tmp_path / "m0", tmp_path / "m1", "--out", tmp_path / "merged", "--json").json
    assert merged["parts"] == 3 and merged["missing"] == [] and merged["differences"] == []
    assert scored(tmp_path / "merged") == scored(tmp_path / "whole")
    refused(nlpinf(*score(root, tmp_path / "m0", "--shard", "2/2")), "2/2", "0/2 to 1/2")
    refused(nlpinf(*score(root, tmp_path / "m0", "--shard", "x")), "'x'", "3/64")


def test_filter_writes_what_top_does_not_show(root: Path, tmp_path: Path) -> None:
    scores = root / "run/scores"
    worst = nlpinf("top", scores, "--count", 6, "--json").json["rows"]
    ended = nlpinf("filter", scores, "--drop-harmful", "10%", "--out", tmp_path / "clean.txt.zst", "--json")
    assert ended.status == 0, ended
    assert ended.json["written"] == 54 and ended.json["dropped"] == 6
    change = sum(row["predicted_change"] for row in worst)
    first = next(iter(ended.json["predicted_change"].values()))
    assert abs(first - change) < 1e-5 * abs(change)
    again = nlpinf("filter", scores, "--keep-helpful", 54, "--out", tmp_path / "same.txt")
    assert again.status == 0 and "54 rows; 6 of 60 dropped" in again.out, again
    kept = (tmp_path / "same.txt").read_text().splitlines()
    assert set(sentences()) - set(kept) == {row["text"] for row in worst}
    refused(nlpinf("filter", scores, "--out", tmp_path / "x.txt"), "0 rules", "--drop-harmful")
    refused(nlpinf("filter", scores, "--out", tmp_path / "x.txt", "--drop-harmful", "5%", "--drop-above", 1), "2 rules")
    refused(nlpinf("filter", scores, "--out", tmp_path / "x.txt", "--drop-harmful", "lots"), "lots")


def test_equal_texts_are_scored_once_and_shown_with_their_number(root: Path, tmp_path: Path) -> None:
    texts = sentences()[:6]
    lines = [texts[i] for i in (0, 1, 0, 2, 3, 0, 4, 1, 5)]
    (tmp_path / "twice.txt").write_bytes(("\r\n".join(lines) + "\r\n\r\n").encode())
    options = ("--corpus", tmp_path / "twice.txt", "--empty", "skip", "--json")
    once = nlpinf(*score(root, tmp_path / "once", "--dedupe", *options))
    every = nlpinf(*score(root, tmp_path / "every", *options))
    assert once.status == every.status == 0, (once, every)
    assert once.json["corpus"]["skipped"] == {"empty": 1, "repeated": 3}
    counts, plain = (
        {row["row"]: row for row in nlpinf("top", tmp_path / name, "--json").json["rows"]} for name in ("once", "every")
    )
    assert {row: found["count"] for row, found in counts.items()} == {0: 3, 1: 2, 3: 1, 4: 1, 6: 1, 8: 1}
    for row, found in counts.items():  # the first row's own score, masks and all
        assert abs(found["score"] - plain[row]["score"]) < 1e-5 * abs(plain[row]["score"])
    refused(nlpinf(*score(root, tmp_path / "every", "--dedupe", *options)), "every", "other")
    done = nlpinf("filter", tmp_path / "once", "--drop-above", -1e9, "--out", tmp_path / "none.jsonl")
    refused(done, "every row would be dropped")
    best = min(counts.values(), key=lambda found: found["score"])
    limit = (best["score"] + sorted(found["score"] for found in counts.values())[1]) / 2
    assert nlpinf("filter", tmp_path / "once", "--drop-above", limit, "--out", tmp_path / "best.jsonl").status == 0
    rows = [json.loads(line) for line in (tmp_path / "best.jsonl").read_text().splitlines()]
    assert [row["text"] for row in rows] == [best["text"]] * best["count"]
