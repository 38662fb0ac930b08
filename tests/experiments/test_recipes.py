"""A recipe from end to end: skipped, resumed, replayed and refused; what it leaves is what its steps say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from nlpinf import Scores, Stage
from nlpinf.errors import BadInput
from nlpinf.experiments import recipe as recipes
from nlpinf.experiments.removal import removals
from tests.cli.common import copied, files, nlpinf, recipe, refused, scored, sentences, write_data, write_recipe

CAUSAL: dict[str, Any] = {
    "pretrain__task": "causal_lm",
    "pretrain__tokenizer": {"kind": "bpe", "size": 300},
    "pretrain__model": {"type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2},
    "pretrain__max_length": 48,
    "pretrain__reduction": "token",
}


def times(folder: Path) -> dict[str, int]:
    """When each file was last written."""
    return {str(p.relative_to(folder)): p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}


def test_a_second_run_does_nothing_again(root: Path) -> None:
    before = times(root / "run")
    ended = nlpinf("run", root / "recipe.yaml", "--out", root / "run", "--json")
    assert ended.status == 0
    assert times(root / "run") == before
    assert all("done before" in line for line in ended.err.splitlines() if not line.startswith("score"))


def test_the_json_outcome_is_what_lies_in_the_folder(root: Path) -> None:
    outcome = nlpinf("run", root / "recipe.yaml", "--out", root / "run", "--json").json
    scores = Scores.open(root / "run/scores")
    assert outcome["rows"] == len(scores) == 60
    assert outcome["harmful"][0]["score"] == scores.column().max()
    assert outcome["helpful"][0]["score"] == scores.column().min()
    assert outcome["removal"] == [] and outcome["report"] == str(root / "run/report.html")
    assert "</html>" in (root / "run/report.html").read_text(encoding="utf-8")
    assert [query["name"] for query in outcome["queries"]] == scores.queries

    finetuned = Stage.from_run(root / "run/finetune")
    rows = [json.loads(line) for line in (root / "run/data/test.jsonl").read_text(encoding="utf-8").splitlines()]
    test = Stage(finetuned.model, finetuned.task, rows)
    assert outcome["test_loss"] == pytest.approx(test.objective(), rel=1e-6)
    assert outcome["queries"][0]["value"] == pytest.approx(outcome["test_loss"], rel=1e-6)
    right = sum(
        int(finetuned.model(**{k: v for k, v in batch.inputs.items()}).argmax(-1).eq(batch.targets).sum())
        for batch in test.batches()
    )
    assert outcome["accuracy"] == right / len(rows)


def test_the_resolved_recipe_replays_the_scores_to_the_byte(root: Path, tmp_path: Path) -> None:
    resolved = root / "run/recipe.yaml"
    content = yaml.safe_load(resolved.read_text(encoding="utf-8"))
    assert content["pretrain"]["probability"] == 0.15 and content["seed"] == 3  # defaults are spelt out
    assert set(content["versions"]) >= {"nlpinf", "torch", "transformers"}
    assert nlpinf("run", resolved, "--out", tmp_path / "again").status == 0
    assert scored(tmp_path / "again/scores") == scored(root / "run/scores")
    for name in ("pretrain/model.safetensors", "finetune/model.safetensors", "recipe.yaml"):
        assert (tmp_path / "again" / name).read_bytes() == (root / "run" / name).read_bytes(), name


def test_another_seed_gives_other_scores(root: Path, tmp_path: Path) -> None:
    path = write_recipe(tmp_path / "r.yaml", recipe(root / "data", seed=4))
    assert nlpinf("run", path, "--out", tmp_path / "run").status == 0
    ours, theirs = (Scores.open(folder).column() for folder in (tmp_path / "run/scores", root / "run/scores"))
    assert not np.allclose(ours, theirs)


def test_a_run_that_was_killed_goes_on_to_the_same_scores(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    seen, kills = [], 0
    for kill in (2, 3, 2, 4, 3, 6):  # the pretraining, the finetuning, the query and the scores are cut off
        ended = nlpinf("run", root / "recipe.yaml", "--out", out, kill=kill)
        if ended.status == 0:
            break
        assert ended.status == -9, ended
        kills += 1
        seen.append(sorted(p.name for p in out.iterdir()))
        assert not (out / "report.html").exists()
    assert kills >= 3 and len({tuple(names) for names in seen}) >= 2, seen
    ended = nlpinf("run", root / "recipe.yaml", "--out", out)
    assert ended.status == 0, ended
    assert scored(out / "scores") == scored(root / "run/scores")
    left = [name for name in files(out) if name.endswith((".part", ".partial"))]
    assert left == []


def test_finished_steps_are_not_trained_again_after_a_kill(root: Path, tmp_path: Path) -> None:
    out = copied(root / "run", tmp_path / "run", "pretrain", "recipe.yaml")
    before = times(out)
    ended = nlpinf("run", root / "recipe.yaml", "--out", out)
    assert ended.status == 0 and "pretrain: done before" in ended.err
    after = times(out)
    assert {name: after[name] for name in before} == before
    assert scored(out / "scores") == scored(root / "run/scores")


@pytest.mark.parametrize(
    "changes, key",
    [({"seed": 5}, "seed"), ({"finetune__alpha": 0.1}, "finetune.alpha"), ({"remove": {"share": 0.1}}, "remove")],
)
def test_another_recipe_in_the_same_folder_is_refused_naming_the_key(
    changes: dict[str, Any], key: str, root: Path, tmp_path: Path
) -> None:
    before = times(root / "run")
    path = write_recipe(tmp_path / "r.yaml", recipe(root / "data", **changes))
    refused(nlpinf("run", path, "--out", root / "run"), str(root / "run"), key, "--out")
    assert times(root / "run") == before


def test_the_difference_is_the_first_key_and_versions_are_none(root: Path) -> None:
    one = recipes.parse(recipe(root))
    assert recipes.difference(one, one.model_copy(update={"versions": {"torch": "0"}})) is None
    two = recipes.parse(recipe(root, query__damping=[0.1, 0.5], query__sample=7))
    told = recipes.difference(one, two)
    assert told is not None and told.startswith("query.damping") and "0.01" in told and "0.5" in told


@pytest.mark.parametrize("transfer", ["frozen", "proximity"])
@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_both_transfers_with_removal(transfer: str, kind: str, root: Path, tmp_path: Path) -> None:
    changes = {
        **(CAUSAL if kind == "gpt2" else {}),
        "finetune__transfer": transfer,
        "finetune__head": {"pooling": "attention", "hidden": 3},
        "remove": {"share": 0.1, "random": 1},
    }
    path = write_recipe(tmp_path / "r.yaml", recipe(root / "data", **changes))
    ended = nlpinf("run", path, "--out", tmp_path / "run", "--json")
    assert ended.status == 0, ended
    out, outcome = tmp_path / "run", ended.json
    pretrained, finetuned = Stage.from_run(out / "pretrain"), Stage.from_run(out / "finetune")
    shared = [n for n in pretrained.parameters if n in finetuned.parameters]
    assert shared and all(n.startswith(("bert.", "transformer.")) for n in shared)
    for name in shared:
        same = torch.equal(pretrained.parameters[name], finetuned.parameters[name])
        assert same if transfer == "frozen" else not same or "position" in name, name
        assert (name in finetuned.decay) == (transfer == "proximity")
    recorded = json.loads((out / "finetune/nlpinf_stage.json").read_text(encoding="utf-8"))
    assert recorded["transfer"] == ("frozen" if transfer == "frozen" else {"proximity": 0.03})

    scores = Scores.open(out / "scores")
    assert [entry["name"] for entry in outcome["removal"]] == ["most harmful", "random 1", "most helpful"]
    values = dict(zip(scores.rows.tolist(), scores.column().astype(np.float64)))
    for entry in outcome["removal"]:
        kept = json.loads((out / "removal" / f"{entry['name'].replace(' ', '-')}.json").read_text(encoding="utf-8"))
        assert entry["rows"] == len(kept["rows"]) == 6
        assert entry["predicted"] == pytest.approx(-sum(values[row] for row in kept["rows"]) / 60)
        assert entry["actual"] == pytest.approx(entry["loss"] - outcome["test_loss"])
    harmful, _, helpful = outcome["removal"]
    assert harmful["predicted"] == pytest.approx(-np.sort(scores.column().astype(np.float64))[-6:].sum() / 60)
    assert helpful["predicted"] == pytest.approx(-np.sort(scores.column().astype(np.float64))[:6].sum() / 60)
    assert "most harmful" in (out / "report.html").read_text(encoding="utf-8")
    before = times(out)
    assert nlpinf("run", path, "--out", out).status == 0 and times(out) == before


def test_removals_are_seeded_rows_of_the_corpus() -> None:
    class Some:
        m = 10
        rows = np.arange(100, 140)

        def column(self, query: int) -> np.ndarray:
            return np.linspace(-1, 2, 40, dtype=np.float32)

    sets = removals(Some(), 0.1, 2, seed=1)  # type: ignore[arg-type]
    assert [s.name for s in sets] == ["most harmful", "random 1", "random 2", "most helpful"]
    assert sets[0].rows == [136, 137, 138, 139] and sets[3].rows == [100, 101, 102, 103]
    assert sets[1].rows != sets[2].rows and len(set(sets[1].rows)) == 4
    assert sets == removals(Some(), 0.1, 2, seed=1)  # type: ignore[arg-type]
    assert sets[0].predicted < 0 < sets[3].predicted
    for share in (0.01, 0.999):
        with pytest.raises(BadInput, match="share"):
            removals(Some(), share, 1)  # type: ignore[arg-type]


def test_the_shipped_recipes_are_valid() -> None:
    package = Path(recipes.__file__).parent
    found = [*package.glob("*.yaml"), *(package.parents[1] / "recipes").glob("*.yaml")]
    assert found
    for path in found:
        recipes.load(path)


def test_query_and_score_settings_are_those_of_the_commands(root: Path, tmp_path: Path) -> None:
    """A recipe's scores are, to the byte, those of `nlpinf query` and `nlpinf score` with the same settings."""
    # Of equal texts one is scored.
    data = write_data(tmp_path / "data", [*sentences(), *sentences(6)])
    changes = {"query": {"misclassified": 0, "damping": 0.1, "sample": "auto", "error_bars": 3, "tolerance": 1e-4, "curvature": "fisher", "solver": "minres", "preconditioner": "diagonal"}}  # fmt: skip
    path = write_recipe(tmp_path / "r.yaml", recipe(data, **changes, score={"dedupe": True, "precision": "bfloat16"}))
    run = tmp_path / "run"
    ended = nlpinf("run", path, "--out", run)
    assert ended.status == 0 and "3 disjoint samples (22 of pretrain)" in ended.out, ended
    asked = nlpinf(
        "query", "--pretrain", run / "pretrain", "--finetune", run / "finetune", "--test", run / "data/test.jsonl",
        "--out", tmp_path / "query", "--damping", 0.1, "--error-bars", 3, "--tolerance", 1e-4, "--curvature", "fisher",
        "--solver", "minres", "--preconditioner", "diagonal", "--seed", 3, "--json",
    )  # fmt: skip
    assert asked.status == 0, asked
    assert json.loads((run / "query/manifest.json").read_text(encoding="utf-8"))["settings"] == asked.json["settings"]
    ended = nlpinf("score", "--query", tmp_path / "query", "--out", tmp_path / "scores", "--dedupe", "--precision", "bfloat16", "--part-rows", 2048)  # fmt: skip
    assert ended.status == 0, ended
    assert scored(tmp_path / "scores") == scored(run / "scores")
    scores = Scores.open(run / "scores")
    assert len(scores) == 60 and scores.manifest["identity"]["precision"] == "bfloat16"
    assert all(row.standard_error is not None for row in scores.top(3))


def test_a_sample_that_grows_by_recipe(root: Path, tmp_path: Path) -> None:
    changes = {
        "query__sample": "grow",
        "query__sample_limit": 50,
        "query__precision": "bfloat16",
        "query__damping": 0.1,
    }
    out = copied(root / "run", tmp_path / "run", "pretrain", "finetune", "result.json", "data")
    resolved = recipes.parse(recipe(root / "data", **changes))
    recipes.dump(resolved, out / "recipe.yaml")
    ended = nlpinf("run", write_recipe(tmp_path / "r.yaml", recipe(root / "data", **changes)), "--out", out)
    assert ended.status == 0, ended
    settings = Scores.open(out / "scores").manifest["query_vectors"]
    assert [size["rows"] for size in settings["growth"]["sizes"]] == [50] and settings["growth"]["limit"] == 50
    assert "sample of 50 rows" in ended.out and "began at its limit" in ended.out
    step = settings["steps"][0]
    assert step["solver"]["precision"] == "bfloat16" and step["sample"] == 50
