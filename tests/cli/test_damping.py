"""nlpinf damping: its table, its JSON, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

from tests.cli.common import nlpinf


def test_damping_recommends_for_each_stage(root: Path) -> None:
    arguments = (
        "damping", "--pretrain", root / "run/pretrain", "--finetune", root / "run/finetune", "--test",
        root / "run/data/test.jsonl", "--sample", 20, "--probe", 20, "--factor", 0.1, "--factor", 1,
    )  # fmt: skip
    ended = nlpinf(*arguments, "--json")
    assert ended.status == 0
    assert [advice["stage"] for advice in ended.json] == ["finetune", "pretrain"]
    for advice in ended.json:
        assert [rung["factor"] for rung in advice["rungs"]] == [0.1, 1.0]
        assert advice["recommended"] in [rung["damping"] for rung in advice["rungs"]]
        assert advice["spectrum"]["largest"] >= advice["spectrum"]["mean"] > 0
    shown = nlpinf(*arguments)
    assert shown.status == 0 and shown.out.count("recommended: ") == 2
    bad = nlpinf(*arguments, "--factor", 0)
    assert bad.status == 2 and "each above 0" in bad.err


def test_a_query_without_a_damping_says_which_it_chose(root: Path, tmp_path: Path) -> None:
    arguments = (
        "query", "--pretrain", root / "run/pretrain", "--finetune", root / "run/finetune", "--test",
        root / "run/data/test.jsonl", "--sample", 20, "--tolerance", 0.05, "--out", tmp_path / "query",
    )  # fmt: skip
    ended = nlpinf(*arguments)
    assert ended.status == 0, ended.err
    for stage in ("finetune", "pretrain"):
        assert f"{stage}: damping " in ended.out and "× the mean eigenvalue" in ended.out
    manifest = json.loads((tmp_path / "query/manifest.json").read_text())
    assert [step["damping"] for step in manifest["settings"]["steps"]] == ["auto", "auto"]
    scored = nlpinf("score", "--query", tmp_path / "query", "--out", tmp_path / "scores")
    assert scored.status == 0
    assert nlpinf("report", tmp_path / "scores", "--query", tmp_path / "query").status == 0
    page = next(tmp_path.rglob("*.html")).read_text(encoding="utf-8")
    assert "by a second sample" in page and "× the mean eigenvalue" in page
