"""What each command says and prints: help with an example, JSON, results on stdout and progress on stderr."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.main import get_command

from nlpinf import Scores, Stage, querystore
from nlpinf.cli.app import app
from nlpinf.cli.console import settings_lines
from tests.cli.common import copied, files, nlpinf, refused, scored

COMMANDS = ["demo", "run", "query", "score", "top", "report", "check"]
ALL = [command.name for command in app.registered_commands]


@pytest.mark.parametrize("command", ALL)
def test_help_has_an_example_and_tells_of_json(command: str) -> None:
    ended = nlpinf(command, "--help")
    assert ended.status == 0 and ended.err == ""
    text = " ".join(ended.out.split())
    assert f"Example: nlpinf {command} " in text
    assert "--json" in text and "traceback" not in text.lower()


def test_every_option_of_every_command_has_a_help_text() -> None:
    commands = {"nlpinf": get_command(app), **get_command(app).commands}  # type: ignore[attr-defined]
    assert set(ALL) < set(commands)
    silent = [
        f"{name} {parameter.opts[0]}"
        for name, command in commands.items()
        for parameter in command.params
        if not (getattr(parameter, "help", None) or "").strip()
    ]
    assert silent == []


def test_help_lists_every_command_with_its_first_line() -> None:
    for arguments in ([], ["--help"]):
        ended = nlpinf(*arguments)
        assert ended.status == 0 and ended.err == ""
        listed = [line.split()[0] for line in ended.out.split("Commands:")[1].splitlines() if line.startswith("  ")]
        assert [w for w in listed if w in COMMANDS] == COMMANDS


def test_python_m_runs_the_command_line_and_refuses_in_one_line(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-m", "nlpinf", "top", "nowhere"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and "nowhere" in done.stderr


def test_query_prints_its_verdicts_and_its_manifest(root: Path, tmp_path: Path) -> None:
    arguments = (
        "query", "--pretrain", root / "run/pretrain", "--finetune", root / "run/finetune", "--test",
        root / "run/data/test.jsonl", "--sample", 30, "--row", 0, "--misclassified", 1,
    )  # fmt: skip
    ended = nlpinf(*arguments, "--out", tmp_path / "query", "--json")
    assert ended.status == 0
    assert ended.err.splitlines() == ["solve finetune ...", "solve pretrain ..."]
    assert ended.json == json.loads((tmp_path / "query/manifest.json").read_text(encoding="utf-8"))
    names = [query["name"] for query in ended.json["queries"]]
    assert names[0] == "mean test loss" and "test row 0" in names[1] and len(names) == 3
    rows = [json.loads(line) for line in (root / "run/data/test.jsonl").read_text(encoding="utf-8").splitlines()]
    finetuned = Stage.from_run(root / "run/finetune")
    for query in ended.json["queries"]:
        asked = query["examples"]
        own = Stage(finetuned.model, finetuned.task, asked)
        assert query["value"] == pytest.approx(own.objective(), rel=1e-6)
    assert ended.json["queries"][0]["examples"] == rows
    ended = nlpinf(*arguments, "--out", tmp_path / "shown")
    assert ended.status == 0 and ended.out.count("converged") == 6 and "mean test loss" in ended.out


def test_texts_that_were_cut_are_told() -> None:
    assert settings_lines({"stages": []}) == []
    (line,) = settings_lines({"truncated": [1200, 0, 1]})
    assert line.startswith("1,200 of a query's texts were cut at the max_length")


def test_settings_of_a_solve_reach_it(root: Path, tmp_path: Path) -> None:
    """A tighter tolerance takes more products and ends with a smaller residual; the manifest tells what was asked."""
    runs = ("query", "--pretrain", root / "run/pretrain", "--finetune", root / "run/finetune", "--test", root / "run/data/test.jsonl")  # fmt: skip

    def ends(name: str, *options: str) -> list[dict[str, Any]]:
        ended = nlpinf(*runs, "--sample", 20, "--out", tmp_path / name, "--json", *options)
        assert ended.status == 0, ended
        return [*ended.json["queries"][0]["verdicts"].values(), *ended.json["settings"]["steps"]]

    loose, tight = ends("loose", "--tolerance", "0.3"), ends("tight", "--tolerance", "1e-5")
    for one, other in zip(loose[:2], tight[:2]):
        assert one["residual"] <= 0.3 and other["residual"] <= 1e-5 < one["residual"]
        assert one["products"] < other["products"]
        assert (one["tolerance"], other["tolerance"]) == (0.3, 1e-5)
    told = nlpinf(*runs, "--sample", 20, "--out", tmp_path / "ekfac", "--preconditioner", "ekfac").err.splitlines()
    assert [line.split(" MiB")[0].rsplit(" ", 1)[0] for line in told if "MiB" in line] == [
        "finetune: EK-FAC takes",
        "pretrain: EK-FAC takes",
    ]
    refused(nlpinf(*runs, "--sample", "1.5", "--out", tmp_path / "half"), "'1.5'", "a number of rows, auto or grow")
    other = ends("other", "--damping", "0.7", "--curvature", "fisher", "--seed", "5")
    assert [end["damping"] for end in other[:2]] == [0.7, 0.7]
    steps = [(step["curvature"], step["seed"], step["sample"]) for step in other[2:]]
    assert steps == [("fisher", 5, 20), ("fisher", 5, 18)]  # finetuning has 18 rows


def test_score_top_and_report_agree(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "scores"
    ended = nlpinf("score", "--query", root / "run/query", "--out", out, "--json", "--token-scores")
    assert ended.status == 0 and ended.err.splitlines() == ["score ..."]
    assert ended.json["m"] == 60 and ended.json["corpus"]["rows"] == 60
    values = Scores.open(out).column(1)
    top = nlpinf("top", out, "--count", 7, "--query", 1, "--json")
    assert top.status == 0 and top.err == ""
    assert [row["score"] for row in top.json["rows"]] == sorted(values.tolist(), reverse=True)[:7]
    assert top.json["query"] == ended.json["queries"][1]["name"]
    for row in top.json["rows"]:
        assert row["predicted_change"] == pytest.approx(-row["score"] / 60)
        assert sum(row["token_scores"]) == pytest.approx(row["score"], rel=1e-4, abs=1e-6)
    helpful = nlpinf("top", out, "--helpful", "-n", 3, "--query", 1, "--json").json["rows"]
    assert [row["score"] for row in helpful] == sorted(values.tolist())[:3]
    shown = nlpinf("top", out, "--count", 1).out
    best = nlpinf("top", out, "--count", 1, "--json").json["rows"][0]
    assert best["text"] in shown and f"{best['score']:+.4g}" in shown and "harmful" in shown

    report = nlpinf("report", out, "--query", root / "run/query", "--out", tmp_path / "r.html", "--json")
    assert report.status == 0 and report.json == {"report": str(tmp_path / "r.html")}
    assert best["text"] in (tmp_path / "r.html").read_text(encoding="utf-8").replace("</span>", "").replace(
        "\n", ""
    ) or (best["text"].split()[0] in (tmp_path / "r.html").read_text(encoding="utf-8"))
    assert nlpinf("report", out).out.strip() == str(tmp_path / "report.html")


def test_modes_give_the_same_scores(root: Path, tmp_path: Path) -> None:
    found = []
    for mode in ("forward", "reverse"):
        assert nlpinf("score", "--query", root / "run/query", "--out", tmp_path / mode, "--mode", mode).status == 0
        found.append(torch.from_numpy(Scores.open(tmp_path / mode).column().copy()))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


def test_check_tells_every_line(root: Path) -> None:
    ended = nlpinf("check", root / "run/pretrain", root / "run/finetune", "--json", "--examples", 4)
    assert ended.status == (0 if all(line["passed"] for run in ended.json for line in run["checks"]) else 1)
    assert [Path(run["run"]).name for run in ended.json] == ["pretrain", "finetune"]
    for run in ended.json:
        assert len(run["checks"]) >= 5 and all(line["name"] and "figure" in line for line in run["checks"])
    shown = nlpinf("check", root / "run/pretrain", "--examples", 4)
    assert shown.out.count("pass") + shown.out.count("FAIL") >= 5


def test_folders_may_be_moved_together_and_used_from_anywhere(root: Path, tmp_path: Path) -> None:
    copied(root / "run", tmp_path / "moved", "pretrain", "finetune", "query", "data")
    assert nlpinf("score", "--query", "query", "--out", "s", cwd=tmp_path / "moved").status == 0
    assert nlpinf("score", "--query", "moved/query", "--out", "t", cwd=tmp_path).status == 0
    expected = files(root / "run/scores")["part-00000.parquet"]
    assert scored(tmp_path / "t")["part-00000.parquet"] == expected
    assert scored(tmp_path / "moved/s")["part-00000.parquet"] == expected


def test_a_query_that_was_moved_alone_is_told_where_its_run_is(root: Path, tmp_path: Path) -> None:
    folder = copied(root / "run/query", tmp_path / "query")
    ended = nlpinf("score", "--query", folder, "--out", tmp_path / "s")
    assert ended.status == 2 and ended.err.count("\n") == 1 and "--pretrain" in ended.err
    assert not (tmp_path / "s").exists()
    arguments = ("--query", folder, "--out", tmp_path / "s", "--pretrain", root / "run/pretrain")
    assert nlpinf("score", *arguments).status == 0
    assert len(querystore.load(folder, run=root / "run/pretrain")) == 2


def test_demo_runs_the_recipe_in_the_package(tmp_path: Path) -> None:
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo/other.txt").write_text("x", encoding="utf-8")
    ended = nlpinf("demo", cwd=tmp_path)
    assert ended.status == 2 and ended.err.count("\n") == 1 and "demo" in ended.err
