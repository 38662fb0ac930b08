"""The commands of a large corpus: shards, status, merge, filter, equal texts."""

from __future__ import annotations

import json
import statistics
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


def test_texts_with_brackets_are_shown_as_they_are(root: Path, tmp_path: Path) -> None:
    texts = ["the plot was [/x] wrong", "we have \\[a^2+b^2] here", "so :smile: and [bold]loud[/bold]"]
    (tmp_path / "c.txt").write_text("\n".join(texts) + "\n")
    assert nlpinf(*score(root, tmp_path / "s", "--corpus", tmp_path / "c.txt")).status == 0
    ended = nlpinf("top", tmp_path / "s")
    assert ended.status == 0 and all(text in ended.out for text in texts), ended


def test_a_corpus_of_another_column_is_filtered_and_replaced(root: Path, tmp_path: Path) -> None:
    texts = sentences()[:8]
    rows = [{"body": text, "text": "another text", "null": None} for text in texts]
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    column = ("--text-column", "body")
    assert nlpinf(*score(root, tmp_path / "s", "--corpus", tmp_path / "c.jsonl", *column, "--no-text")).status == 0
    out = ("--drop-harmful", 3, "--out")
    assert nlpinf("filter", tmp_path / "s", *out, tmp_path / "o.txt").status == 0
    kept = (tmp_path / "o.txt").read_text().splitlines()
    assert len(kept) == 5 and set(kept) < set(texts)
    more = (
        "--corpus",
        tmp_path / "c.jsonl",
        *column,
        "--replace-with",
        tmp_path / "c.jsonl",
        "--replace-column",
        "body",
    )
    assert nlpinf("filter", tmp_path / "s", *out, tmp_path / "p.txt", *more).status == 0
    fresh = iter(texts)
    expected = [text if text in kept else next(fresh) for text in texts]
    assert (tmp_path / "p.txt").read_text().splitlines() == expected
    refused(nlpinf("filter", tmp_path / "s", *out, tmp_path / "q.txt", *column), "--text-column", "--corpus")
    nothing = nlpinf("filter", tmp_path / "s", "--drop-harmful", "1%", "--out", tmp_path / "r.txt", "--json")
    assert nothing.json["edges"] == {} and nothing.json["dropped"] == 0


def test_a_run_of_equal_texts_names_the_option(root: Path, tmp_path: Path) -> None:
    (tmp_path / "c.txt").write_text("the cat\nthe cat\na dog\n")
    assert nlpinf(*score(root, tmp_path / "s", "--corpus", tmp_path / "c.txt")).status == 0
    refused(nlpinf(*score(root, tmp_path / "s", "--corpus", tmp_path / "c.txt", "--dedupe")), "another --dedupe")


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


def many(folder: Path, rows: int) -> Path:
    """Write a corpus of so many sentences, some of them odd."""
    texts = (sentences(200) * (rows // 200 + 1))[:rows]
    texts[5] += " \ufffd"
    texts[6] = " ".join(texts[:6])
    path = folder / "many.txt"
    path.write_text("\n".join(texts) + "\n", encoding="utf-8")
    return path


def test_screening_marks_what_it_guessed(root: Path, tmp_path: Path) -> None:
    corpus = many(tmp_path, 2500)
    job = ("score", "--query", root / "run/query", "--corpus", corpus, "--part-rows", 1000)
    ended = nlpinf(*job, "--out", tmp_path / "s", "--screen", "45%")
    assert ended.status == 0 and "most harmful rows" in ended.out and "held-out rows" in ended.out, ended
    again = nlpinf(*job, "--out", tmp_path / "s", "--screen", "45%", "--json").json
    assert again["corpus"]["exact"] < 2500 and again["corpus"]["odd"] == {"U+FFFD": 2}
    assert {(end["end"], end["seen"]) for end in again["recall"]} == {("harmful", 5), ("helpful", 5)}
    exact = nlpinf(*job, "--out", tmp_path / "e", "--json")
    assert exact.status == 0, exact
    tops = [nlpinf("top", tmp_path / name, "-n", 5, "--json").json["rows"] for name in ("s", "e")]
    by_row = {row["row"]: row["score"] for row in nlpinf("top", tmp_path / "e", "-n", 2500, "--json").json["rows"]}
    assert all(abs(row["score"] - by_row[row["row"]]) < 1e-5 * abs(tops[1][0]["score"]) for row in tops[0])
    page = nlpinf("report", tmp_path / "s", "--out", tmp_path / "page.html")
    assert page.status == 0 and "were screened only" in (tmp_path / "page.html").read_text(encoding="utf-8"), page
    cut = exact.json["corpus"]["truncated"]  # the joined one, and what the model's 16 tokens are too few for
    assert 1 <= cut < 2500 and f"{cut} truncated, 2 with U+FFFD" in nlpinf("status", tmp_path / "e").out
    for options in (("--screen", "5"), ("--screen", "45%", "--compress", 0.1), ("--screen", "45%", "--shard", "0/2")):
        refused(nlpinf(*job, "--out", tmp_path / "x", *options), "--screen takes a share", "--shard", "--compress")
    refused(nlpinf(*job, "--out", tmp_path / "x", "--screen", "lots"), "lots")
    refused(nlpinf(*job, "--out", tmp_path / "x", "--screen", "10%"), "too few to screen")


def test_compressed_scores_say_what_they_err_by(root: Path, tmp_path: Path) -> None:
    corpus = many(tmp_path, 300)
    job = ("score", "--query", root / "run/query", "--corpus", corpus)
    exact = nlpinf(*job, "--out", tmp_path / "e", "--json")
    found = nlpinf(*job, "--out", tmp_path / "c", "--compress", 0.2, "--json")
    assert exact.status == found.status == 0, (exact, found)
    told = found.json["scoring"]["compression"]
    assert told["error"] == 0.2 and 0 < told["measured"]["rms"] <= 0.2 and told["measured"]["spearman"] >= 0.99
    a, b = (
        {row["row"]: row["score"] for row in nlpinf("top", tmp_path / name, "-n", 300, "--json").json["rows"]}
        for name in "ec"
    )
    spread = statistics.pstdev(a.values())
    assert (sum((a[row] - b[row]) ** 2 for row in a) / len(a)) ** 0.5 < 0.3 * spread
    assert "of their spread" in nlpinf(*job, "--out", tmp_path / "c", "--compress", 0.2).out
    refused(nlpinf(*job, "--out", tmp_path / "c", "--compress", 0.1), "'compress': 0.2 there, 0.1 now")
    refused(nlpinf(*job, "--out", tmp_path / "x", "--compress", 2), "between 0 and 1")


def test_a_plan_is_printed_and_nothing_is_written(root: Path, tmp_path: Path) -> None:
    corpus = many(tmp_path, 400)
    job = ("plan", "--query", root / "run/query", "--corpus", corpus, "--part-rows", 100, "--rows", 50)
    ended = nlpinf(*job, "--price", 2, "--processes", 6, cwd=tmp_path)
    assert ended.status == 0 and "400 rows in 4 parts" in ended.out and "cost" in ended.out, ended
    assert [p.name for p in tmp_path.iterdir()] == ["many.txt"]
    plan = nlpinf(*job, "--json", "--processes", 6).json
    assert plan["rows"] == 400 and plan["parts"] == 4 and 50 <= plan["measured"] <= 400 and plan["disk_bytes"] > 0
    assert [option["processes"] for option in plan["options"]] == [1, 2, 4, 6]
    assert all(option["cost"] is None for option in plan["options"])
    hours = [option["hours"] for option in plan["options"]]
    assert hours == sorted(hours, reverse=True) and hours[2] == hours[3]  # four parts, a process each
    refused(nlpinf(*job, "--mode", "sideways"), "sideways", "'auto', 'forward', 'reverse'")
    refused(nlpinf(*job, "--precision", "float16"), "float16", "bfloat16")
    refused(nlpinf(*job, "--precision", "bfloat16", "--compress", 0.2), "compressed", "leave out one")
    refused(nlpinf(*job[:-4], "--corpus", tmp_path / "none.txt"), "none.txt", "no such file")
