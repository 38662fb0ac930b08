"""nlpinf predict: sets and single rows, its table and JSON, what the report then shows, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nlpinf.scoring import Scores
from tests.cli.common import copied, nlpinf, refused


def predicted(root: Path, *more: Any) -> list[Any]:
    return ["predict", "--query", root / "run/query", "--scores", root / "run/scores", *more]


def test_predictions_of_sets_and_rows(root: Path, tmp_path: Path) -> None:
    """First order is −Σ score/m of the scores folder; a set in a file is that set; rows by themselves add up to first order."""
    scores = Scores.open(root / "run/scores")
    worst = [row.row for row in scores.top(3)]
    (tmp_path / "rows.txt").write_text("\n".join(map(str, worst)) + "\n")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"row": r, "text": "…"}) + "\n" for r in worst))
    pq.write_table(pa.table({"row": worst}), tmp_path / "rows.parquet")
    drops = [x for name in ("5%", "3", *sorted(tmp_path.glob("rows.*"))) for x in ("--drop", name)]
    ended = nlpinf(*predicted(root, *drops, "--json"))
    assert ended.status == 0, ended
    share, *same = ended.json["sets"]
    assert len(share["rows"]) == int(0.05 * ended.json["m"]) and len(same) == 4
    for made in same:
        assert made["rows"] == sorted(worst)
        assert made["queries"] == same[0]["queries"]
        assert made["solve"]["verdict"] == "converged" and "of the rows that stay" in made["solve"]["note"]
    for number, query in enumerate(same[0]["queries"]):
        column = dict(zip(scores.rows.tolist(), scores.column(number).tolist()))
        assert query["first_order"] == pytest.approx(-sum(column[r] for r in worst) / scores.m, rel=1e-4)
        assert 0 < abs(query["newton"] - query["first_order"]) < 2 * abs(query["first_order"])
    shown = nlpinf(*predicted(root, "--drop", 3))
    assert shown.status == 0 and "converged" in shown.out and f"{same[0]['queries'][0]['newton']:+.3e}" in shown.out


def test_the_report_shows_what_was_kept(root: Path, tmp_path: Path) -> None:
    query = copied(root / "run/query", tmp_path / "query")
    arguments = [
        "predict",
        "--query",
        query,
        "--scores",
        root / "run/scores",
        "--pretrain",
        root / "run/pretrain",
        "--each",
        "--keep",
    ]
    first = nlpinf(*arguments, "--drop", 2, "--json")
    assert first.status == 0, first
    assert nlpinf(*arguments, "--drop", 1, "--helpful").status == 0
    kept = json.loads((query / "removals.json").read_text())["rows"]
    assert len(kept) == 3
    for made in first.json["sets"]:
        assert kept[str(made["rows"][0])] == [q["newton"] for q in made["queries"]]
    page = tmp_path / "r.html"
    ended = nlpinf("report", root / "run/scores", "--query", query, "--pretrain", root / "run/pretrain", "--out", page)
    assert ended.status == 0, ended
    assert page.read_text().count("by a Newton step") == 2 * len(
        first.json["sets"][0]["queries"]
    )  # harmful and helpful
    assert nlpinf("report", root / "run/scores", "--out", page).status == 0
    assert "by a Newton step" not in page.read_text()


def test_refusals(root: Path, tmp_path: Path) -> None:
    def drop(text: str) -> Path:
        (tmp_path / "drop.txt").write_text(text)
        return tmp_path / "drop.txt"

    for text, *named in [
        ("", "names no row"), ("3\nsix\n", "line 2 holds 'six'"), ("3\n4\n3\n", "row 3 twice"), ("1000\n", "no row 1000"),
        ("-1\n", "line 1 holds '-1'"), ("\n".join(map(str, range(60))), "all 60 rows"),
    ]:  # fmt: skip
        refused(nlpinf("predict", "--query", root / "run/query", "--drop", drop(text)), "drop.txt", *named)
    for more, named in [
        (["--drop", "5%"], "--scores"),
        (["--drop", tmp_path / "none.txt"], "none.txt: there is no such file"),
        (["--drop", "1", "--keep"], "--each"),
        (["--drop", drop("1"), "--damping", "-1"], "--damping"),
    ]:
        assert named in refused(nlpinf("predict", "--query", root / "run/query", *more))
    short = nlpinf(
        "predict", "--query", root / "run/query", "--drop", drop("1"), "--tolerance", 1e-6, "--max-iterations", 1
    )
    assert (short.status, short.out) == (2, "") and "not converged" in short.err.splitlines()[-1]
    refused(nlpinf(*predicted(root, "--drop", "1%")), "1%", "no row")
    (tmp_path / "corpus.txt").write_text("other words\n" * 60)
    refused(
        nlpinf(*predicted(root, "--drop", "3", "--corpus", tmp_path / "corpus.txt")),
        "corpus.txt",
        "not those of the run",
    )
    other = copied(root / "run/scores", tmp_path / "scores")
    manifest = json.loads((other / "manifest.json").read_text())
    for key, named in (("queries", "another query"), ("corpus_sha256", "another corpus")):
        changed = {**manifest, "identity": {**manifest["identity"], key: ["0"] if key == "queries" else "0"}}
        (other / "manifest.json").write_text(json.dumps(changed))
        refused(nlpinf("predict", "--query", root / "run/query", "--scores", other, "--drop", "3"), named)
