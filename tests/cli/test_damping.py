"""nlpinf damping: its table, its JSON, and what it refuses."""

from __future__ import annotations

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
