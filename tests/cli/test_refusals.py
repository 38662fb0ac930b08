"""Bad input through the command line: exit status 2, one line that names what is wrong, nothing half-written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.cli.common import copied, files, labelled, nlpinf, recipe, refused, sentences, write_data, write_recipe

LABELLED = "".join(json.dumps(row) + "\n" for row in labelled())


def query_of(runs: Path, out: Path, *options: Any, test: Path | None = None) -> list[Any]:
    """The arguments of a query on `runs`/pretrain and `runs`/finetune."""
    asked = test or runs / "data" / "test.jsonl"
    return [
        "query", "--pretrain", runs / "pretrain", "--finetune", runs / "finetune", "--test", asked, "--out", out,
        "--sample", 20, *options,
    ]  # fmt: skip


def edited(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change a JSON file."""
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    path.write_text(json.dumps(content), encoding="utf-8")


def damaged(run: Path, change: Callable[[dict[str, torch.Tensor]], Any], *, recorded: bool = False) -> None:
    """Change a run's weights, and unless `recorded` let its record know nothing of their sha256."""
    weights = load_file(run / "model.safetensors")
    change(weights)
    save_file(weights, run / "model.safetensors", metadata={"format": "pt"})
    if not recorded:
        edited(run / "nlpinf_stage.json", lambda r: r.update(weights={}))


# --- texts, through `run`, `query` and `score` ---

CORPORA = {
    "missing": (None, ["corpus.txt", "no such file"]),
    "empty": (b"", ["corpus.txt", "empty"]),
    "only line ends": (b"\n\n", ["corpus.txt", "line 1"]),
    "with an empty line": (b"the cat sat\na dog ran\n\na plot\n", ["corpus.txt", "line 3 is empty", "skip"]),
    "not UTF-8": ("the cat\nun café\n".encode("latin-1"), ["corpus.txt", "line 2", "UTF-8"]),
}


@pytest.mark.parametrize("case", CORPORA)
def test_a_corpus_is_refused_before_anything_is_made(case: str, root: Path, tmp_path: Path) -> None:
    content, named = CORPORA[case]
    data = write_data(tmp_path / "data")
    (data / "corpus.txt").unlink()
    if content is not None:
        (data / "corpus.txt").write_bytes(content)
    before = files(tmp_path)
    refused(
        nlpinf("score", "--query", root / "run/query", "--corpus", data / "corpus.txt", "--out", tmp_path / "s"), *named
    )
    assert files(tmp_path) == before and not (tmp_path / "s").exists()
    path = write_recipe(tmp_path / "recipe.yaml", recipe(data))
    refused(nlpinf("run", path, "--out", tmp_path / "run"), *named)
    assert not (tmp_path / "run").exists()


ROWS = {
    "missing": (None, ["rows.jsonl", "no such file"]),
    "empty": ("", ["rows.jsonl", "no example"]),
    "label out of range": (LABELLED + '{"text": "a plot", "label": 2}\n', ["rows.jsonl", "line 25", "label 2", "0 to 1"]),
    "negative label": ('{"text": "a plot", "label": -1}\n' + LABELLED, ["rows.jsonl", "line 1", "label -1"]),
    "label a word": ('{"text": "a plot", "label": "good"}\n' + LABELLED, ["rows.jsonl", "line 1", "'good'", "integer"]),
    "no label": ('{"text": "a plot"}\n' + LABELLED, ["rows.jsonl", "line 1", "`label`"]),
    "empty text": ('{"text": " ", "label": 1}\n' + LABELLED, ["rows.jsonl", "line 1", "empty"]),
    "no JSON": (LABELLED + "a plot\t1\n", ["rows.jsonl", "line 25", "JSON"]),
}  # fmt: skip


@pytest.mark.parametrize("case", ROWS)
def test_labelled_rows_are_refused_before_anything_is_made(case: str, root: Path, tmp_path: Path) -> None:
    content, named = ROWS[case]
    data = write_data(tmp_path / "data")
    (data / "rows.jsonl").unlink()
    if content is not None:
        (data / "rows.jsonl").write_text(content, encoding="utf-8")
    refused(nlpinf(*query_of(root / "run", tmp_path / "query", test=data / "rows.jsonl")), *named)
    assert not (tmp_path / "query").exists()
    path = write_recipe(tmp_path / "recipe.yaml", recipe(data))
    refused(nlpinf("run", path, "--out", tmp_path / "run"), *named)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("alone", ["in the file", "after the test rows are held out"])
def test_rows_of_one_class_are_refused_for_training(alone: str, tmp_path: Path) -> None:
    data = write_data(tmp_path / "data")
    rows = [{"text": f"a plot {i}", "label": 0} for i in range(12)]
    changes: dict[str, Any] = {}
    if alone != "in the file":
        rows, changes = [*rows[:1], {"text": "a film", "label": 1}], {"finetune__test_share": 0.5}
    (data / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    path = write_recipe(tmp_path / "recipe.yaml", recipe(data, **changes))
    refused(nlpinf("run", path, "--out", tmp_path / "run"), "rows.jsonl", "class")
    assert not (tmp_path / "run").exists()


# --- runs that do not fit, or are damaged, through `query` ---


def other_shape(runs: Path) -> list[str]:
    def widen(weights: dict[str, torch.Tensor]) -> None:
        for name, tensor in weights.items():
            if "intermediate.dense" in name:
                weights[name] = torch.cat([tensor, tensor])
            elif name.endswith("layer.0.output.dense.weight"):
                weights[name] = torch.cat([tensor, tensor], 1)

    damaged(runs / "finetune", widen)
    edited(runs / "finetune/config.json", lambda c: c.update(intermediate_size=2 * c["intermediate_size"]))
    edited(runs / "finetune/nlpinf_stage.json", lambda r: r.pop("parent"))
    return ["finetune", "intermediate.dense.weight", "(32, 16)", "(16, 16)"]


def other_tokenizer(runs: Path) -> list[str]:
    def swap(content: dict[str, Any]) -> None:
        words = content["model"]["vocab"]
        one, two = sorted(words)[-2:]
        words[one], words[two] = words[two], words[one]

    edited(runs / "finetune/tokenizer.json", swap)
    return ["finetune", "tokenizer", "pretraining run"]


def other_weights(runs: Path) -> list[str]:
    def move(weights: dict[str, torch.Tensor]) -> None:
        weights["bert.embeddings.word_embeddings.weight"] += 0.1

    damaged(runs / "pretrain", move)
    return ["finetune", "other weights", "pretrain"]


def nan(runs: Path) -> list[str]:
    def spoil(weights: dict[str, torch.Tensor]) -> None:
        weights["bert.embeddings.LayerNorm.weight"][3] = float("nan")

    damaged(runs / "pretrain", spoil)
    return ["pretrain", "bert.embeddings.LayerNorm.weight", "NaN"]


def truncated(runs: Path) -> list[str]:
    path = runs / "pretrain/model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    return ["pretrain/model.safetensors", "truncated"]


def cut_in_the_header(runs: Path) -> list[str]:
    path = runs / "finetune/model.safetensors"
    path.write_bytes(path.read_bytes()[:40])
    return ["finetune/model.safetensors", "truncated"]


def changed_weights(runs: Path) -> list[str]:
    damaged(runs / "finetune", lambda w: w["head.classifier.bias"].add_(1), recorded=True)
    return ["finetune/model.safetensors", "changed"]


def no_weights(runs: Path) -> list[str]:
    (runs / "pretrain/model.safetensors").unlink()
    return ["pretrain", "safetensors"]


def absent_parameter(runs: Path) -> list[str]:
    damaged(runs / "pretrain", lambda w: w.pop("cls.predictions.transform.dense.weight"))
    return ["pretrain", "cls.predictions.transform.dense.weight"]


def absent_parameter_of_a_head(runs: Path) -> list[str]:
    damaged(runs / "finetune", lambda w: w.pop("head.classifier.bias"))
    return ["finetune", "head.classifier.bias"]


def shapes_of_another_config(runs: Path) -> list[str]:
    edited(runs / "pretrain/config.json", lambda c: c.update(intermediate_size=24))
    return ["pretrain", "cannot be opened"]


def more_words_than_rows(runs: Path) -> list[str]:
    def add(content: dict[str, Any]) -> None:
        content["model"]["vocab"]["unheard"] = len(content["model"]["vocab"])

    edited(runs / "pretrain/tokenizer.json", add)
    return ["pretrain", "tokenizer", "embedding"]


def no_record(runs: Path) -> list[str]:
    (runs / "pretrain/nlpinf_stage.json").unlink()
    return ["pretrain", "no data location", "--corpus"]


def broken_record(runs: Path) -> list[str]:
    path = runs / "pretrain/nlpinf_stage.json"
    path.write_text(path.read_text(encoding="utf-8")[:50], encoding="utf-8")
    return ["pretrain/nlpinf_stage.json", "JSON"]


def record_without_reduction(runs: Path) -> list[str]:
    edited(runs / "pretrain/nlpinf_stage.json", lambda r: r.pop("reduction"))
    return ["pretrain/nlpinf_stage.json", "'reduction'"]


def record_with_an_unknown_task(runs: Path) -> list[str]:
    edited(runs / "pretrain/nlpinf_stage.json", lambda r: r["task"].update(name="maskedlm"))
    return ["pretrain/nlpinf_stage.json", "'maskedlm'", "masked_lm"]


def recorded_alpha_of_zero(runs: Path) -> list[str]:
    edited(runs / "finetune/nlpinf_stage.json", lambda r: r.update(transfer={"proximity": 0}))
    return ["finetune/nlpinf_stage.json", "greater than 0"]


def no_transfer(runs: Path) -> list[str]:
    edited(runs / "finetune/nlpinf_stage.json", lambda r: r.pop("transfer"))
    return ["finetune", "fitted proximity", "--alpha"]


def changed_training_rows(runs: Path) -> list[str]:
    with (runs / "data/train.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"text": "a plot", "label": 1}\n')
    return ["train.jsonl", "not those of the run"]


@pytest.mark.parametrize(
    "damage",
    [
        other_shape, other_tokenizer, other_weights, nan, truncated, cut_in_the_header, changed_weights,
        no_weights, absent_parameter, absent_parameter_of_a_head, shapes_of_another_config, more_words_than_rows,
        no_record, broken_record, record_without_reduction, record_with_an_unknown_task, recorded_alpha_of_zero,
        no_transfer, changed_training_rows,
    ],
    ids=lambda f: f.__name__,
)  # fmt: skip
def test_runs_that_do_not_fit_are_refused(damage: Callable[[Path], list[str]], root: Path, tmp_path: Path) -> None:
    runs = copied(root / "run", tmp_path / "runs", "pretrain", "finetune", "data")
    named = damage(runs)
    before = files(tmp_path)
    refused(nlpinf(*query_of(runs, tmp_path / "query")), *named)
    assert files(tmp_path) == before and not (tmp_path / "query").exists()


def test_the_same_runs_undamaged_are_taken(root: Path, tmp_path: Path) -> None:
    runs = copied(root / "run", tmp_path / "runs", "pretrain", "finetune", "data")
    assert nlpinf(*query_of(runs, tmp_path / "query")).status == 0
    assert (tmp_path / "query/manifest.json").exists()


def test_an_encoder_under_another_prefix_is_taken(root: Path, tmp_path: Path) -> None:
    runs = copied(root / "run", tmp_path / "runs", "pretrain", "finetune", "data")
    assert nlpinf(*query_of(runs, tmp_path / "before")).status == 0

    def rename(weights: dict[str, torch.Tensor]) -> None:
        for name in [n for n in weights if n.startswith("bert.")]:
            weights["encoder." + name.removeprefix("bert.")] = weights.pop(name)

    damaged(runs / "finetune", rename)
    edited(runs / "finetune/nlpinf_head.json", lambda h: h.update(prefix="encoder"))

    def record(content: dict[str, Any]) -> None:
        content.pop("parent")
        content["trained"] = [n.replace("bert.", "encoder.") for n in content["trained"]]
        content["weight_decay"] = {n.replace("bert.", "encoder."): d for n, d in content["weight_decay"].items()}

    edited(runs / "finetune/nlpinf_stage.json", record)
    ended = nlpinf(*query_of(runs, tmp_path / "after"))
    assert ended.status == 0 and "encoder for bert" in ended.out, ended
    one, other = (load_file(tmp_path / name / "vectors-00000.safetensors") for name in ("before", "after"))
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(other[name], tensor, rtol=1e-4, atol=1e-6)


# --- settings ---

SETTINGS: dict[str, tuple[list[Any], list[str]]] = {
    "damping below 0": (["--damping", "-0.1"], ["--damping", "-0.1", "at least 0"]),
    "damping NaN": (["--damping", "nan"], ["--damping", "nan"]),
    "precision of minres": (["--precision", "bfloat16", "--solver", "minres"], ["precision", "cg", "minres"]),
    "limit of a fixed sample": (["--sample-limit", "9"], ["sample_limit", "grow"]),
    "error bars of one sample": (["--error-bars", "1"], ["error_bars", "2"]),
    "relative damping below 0": (["--relative-damping", "-1"], ["--relative-damping", "-1"]),
    "two dampings": (["--relative-damping", "1", "--damping", "0.1"], ["--relative-damping", "give one of them"]),
    "sample larger than the corpus": (["--sample", "61"], ["61", "60"]),
    "sample of no row": (["--sample", "0"], ["sample", "0"]),
    "tolerance": (["--tolerance", "0"], ["tolerance", "0"]),
    "iterations": (["--max-iterations", "0"], ["max_iterations", "0"]),
    "test row": (["--row", "6"], ["test.jsonl", "no row 6", "6"]),
    "alpha of a run that has one": (["--alpha", "0.5"], ["finetune/nlpinf_stage.json", "0.03", "0.5"]),
    "alpha 0": (["--alpha", "0"], ["α", "0.0", "greater than 0"]),
    "alpha below 0": (["--alpha", "-1"], ["α", "-1.0", "greater than 0"]),
    "alpha NaN": (["--alpha", "nan"], ["α", "nan"]),
    "curvature": (["--curvature", "gnn"], ["--curvature", "gnn", "ggn"]),
    "unknown option": (["--sampel", "5"], ["--sampel", "--sample"]),
    "a word for a number": (["--damping", "small"], ["--damping", "number"]),
}


@pytest.mark.parametrize("case", SETTINGS)
def test_settings_are_refused(case: str, root: Path, tmp_path: Path) -> None:
    options, named = SETTINGS[case]
    refused(nlpinf(*query_of(root / "run", tmp_path / "query", *options)), *named)
    assert list(tmp_path.iterdir()) == []


def test_a_solve_that_does_not_converge_is_refused_and_leaves_only_where_it_can_go_on(
    root: Path, tmp_path: Path
) -> None:
    ended = nlpinf(*query_of(root / "run", tmp_path / "query", "--max-iterations", 2, "--tolerance", "1e-6"))
    assert ended.status == 2 and ended.out == ""
    last = ended.err.splitlines()[-1]
    assert last.startswith("nlpinf: stage 'finetune': not converged") and "--allow-unconverged" in last
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.glob("*/*")] == ["query/solves"]
    ended = nlpinf(
        *query_of(
            root / "run",
            tmp_path / "query",
            "--max-iterations",
            2,
            "--tolerance",
            "1e-6",
            "--allow-unconverged",
            "--json",
        )
    )
    assert ended.status == 0
    assert ended.json["queries"][0]["verdicts"]["finetune"]["verdict"] == "not converged"


def test_alpha_is_taken_where_the_run_recorded_none(root: Path, tmp_path: Path) -> None:
    runs = copied(root / "run", tmp_path / "runs", "pretrain", "finetune", "data")
    no_transfer(runs)
    refused(nlpinf(*query_of(runs, tmp_path / "query", "--alpha", "0")), "α", "greater than 0")
    ended = nlpinf(*query_of(runs, tmp_path / "query", "--alpha", "0.25", "--json"))
    assert ended.status == 0 and ended.json["settings"]["transfer"] == [{"proximity": 0.25}]


# --- folders ---


def test_an_output_folder_with_other_files_is_refused_and_kept(root: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("keep", encoding="utf-8")
    refused(nlpinf(*query_of(root / "run", tmp_path / "mine")), "mine", "notes.txt")
    refused(nlpinf("score", "--query", root / "run/query", "--out", tmp_path / "mine"), "mine", "notes.txt")
    refused(nlpinf("run", root / "recipe.yaml", "--out", tmp_path / "mine"), "mine", "not empty", "--out")
    assert files(tmp_path) == {"mine/notes.txt": b"keep"}


def test_a_query_is_not_written_over_another(root: Path, tmp_path: Path) -> None:
    folder = copied(root / "run/query", tmp_path / "query")
    before = files(folder)
    refused(nlpinf(*query_of(root / "run", folder)), "query", "holds a query already")
    assert files(folder) == before


def test_a_scores_folder_of_another_query_is_refused_and_kept(root: Path, tmp_path: Path) -> None:
    scores = copied(root / "run/scores", tmp_path / "scores")
    before = files(scores)
    ended = nlpinf(*query_of(root / "run", tmp_path / "other", "--damping", "5"))
    assert ended.status == 0, ended
    arguments = ("--out", scores, "--part-rows", 2048)
    refused(nlpinf("score", "--query", tmp_path / "other", *arguments), "scores", "another query")
    assert files(scores) == before


@pytest.mark.parametrize("command", ["top", "report"])
def test_an_interrupted_scores_folder_is_refused(command: str, root: Path, tmp_path: Path) -> None:
    scores = tmp_path / "scores"
    arguments = ("score", "--query", root / "run/query", "--out", scores, "--part-rows", 20)
    assert nlpinf(*arguments, kill=3).status == -9  # the manifest and one part have their names
    refused(nlpinf(command, scores), "scores", "interrupted", "2 of 3", "nlpinf score")
    assert not (tmp_path / "report.html").exists()
    assert nlpinf(*arguments).status == 0
    assert nlpinf(command, scores).status == 0


@pytest.mark.parametrize("command", [["top"], ["report"], ["check"], ["score", "--out", "s", "--query"], ["run"]])
def test_what_is_not_there_is_named(command: list[str], tmp_path: Path) -> None:
    refused(nlpinf(*command, "nowhere", cwd=tmp_path), "nowhere")
    (tmp_path / "bare").mkdir()
    refused(nlpinf(*command, "bare", cwd=tmp_path), "bare")
    assert [p.name for p in tmp_path.iterdir()] == ["bare"]


def test_numbers_of_top_and_report_are_checked(root: Path, tmp_path: Path) -> None:
    refused(nlpinf("top", root / "run/scores", "--count", 0), "0", "at least 1")
    refused(nlpinf("top", root / "run/scores", "--query", 2), "no query 2", "2")
    refused(nlpinf("report", root / "run/scores", "--examples", 0, "--out", tmp_path / "r.html"), "0", "at least 1")
    refused(nlpinf("report", root / "run/scores", "--out", tmp_path / "no/r.html"), "no/r.html")
    assert list(tmp_path.iterdir()) == []


def test_choices_of_score_are_checked(root: Path, tmp_path: Path) -> None:
    for option, value in (("--mode", "fast"), ("--empty", "keep"), ("--part-rows", "0")):
        arguments = ("--query", root / "run/query", "--out", tmp_path / "s", option, value)
        refused(nlpinf("score", *arguments), value)
    assert list(tmp_path.iterdir()) == []


# --- recipes ---

KEYS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "misspelt section": ({"pretrian": {}}, ["'pretrian'", "'pretrain'"]),
    "misspelt key": ({"pretrain__training": {"learning_rat": 1}}, ["pretrain.training.learning_rat", "'learning_rate'"]),
    "misspelt key of damping": ({"query__damping": {"relativ": 0.1}}, ["query.damping"]),
    "alpha 0": ({"finetune__alpha": 0}, ["finetune.alpha", "greater than 0", "0"]),
    "damping below 0": ({"query__damping": -0.5}, ["query.damping", "0", "-0.5"]),
    "damping below 0 in a list": ({"query__damping": [0.1, -0.5]}, ["query.damping", "-0.5"]),
    "dampings of three stages": ({"query__damping": [0.1, 0.1, 0.1]}, ["query.damping", "3", "2"]),
    "sample": ({"query__sample": 61}, ["query.sample", "61", "60"]),
    "sample that grows by another name": ({"query__sample": "grows"}, ["query.sample", "'grow'", "grows"]),
    "limit of a fixed sample": ({"query__sample_limit": 50}, ["query", "sample_limit", "grow"]),
    "error bars without a sample": ({"query__sample": None, "query__error_bars": 2}, ["query", "error_bars", "auto"]),
    "error bars of too many rows": ({"query__sample": 30, "query__error_bars": 3}, ["query.sample", "3", "60", "20"]),
    "precision of lissa": ({"query__solver": "lissa", "query__precision": "bfloat16"}, ["precision", "cg", "lissa"]),
    "solver": ({"query__solver": "gc"}, ["query.solver", "'cg'"]),
    "score": ({"score": {"mode": "reverse"}}, ["score.mode"]),
    "float16 scores": ({"score": {"precision": "float16"}}, ["score.precision", "bfloat16"]),
    "compressed in low precision": ({"score": {"precision": "bfloat16", "compress": 0.1}}, ["score", "compress"]),
    "compressed with error bars": ({"score": {"compress": 0.1}, "query__error_bars": 2}, ["score.compress", "error_bars"]),
    "compression of few rows": ({"score": {"compress": 0.1}}, ["score.compress", "64", "60"]),
    "removal of rows that stand for others": ({"score": {"dedupe": True}, "remove": {}}, ["score.dedupe", "remove"]),
    "share": ({"remove": {"share": 0.001}}, ["0.001", "60"]),
    "test share": ({"finetune__test_share": 0.99}, ["rows.jsonl", "test_share"]),
    "model type": ({"pretrain__model": {"type": "birt"}}, ["birt"]),
    "model field": ({"pretrain__model": {"type": "bert", "hidden": 16}}, ["bert", "'hidden'"]),
    "model sizes": ({"pretrain__model": {"type": "bert", "hidden_size": 10, "num_attention_heads": 3}}, ["bert", "10", "3"]),
    "a word for a number": ({"seed": "three"}, ["seed", "three"]),
    "a missing key": ({"finetune": {"labels": 2}}, ["finetune.data", "missing"]),
    "shipped": ({"pretrain__corpus": "shipped:wiki"}, ["shipped:wiki", "shipped:wikitext2"]),
}  # fmt: skip


@pytest.mark.parametrize("case", KEYS)
def test_recipes_are_checked_before_anything_is_made(case: str, root: Path, tmp_path: Path) -> None:
    changes, named = KEYS[case]
    path = write_recipe(tmp_path / "r.yaml", recipe(root / "data", **changes))
    refused(nlpinf("run", path, "--out", tmp_path / "run"), *named)
    assert [p.name for p in tmp_path.iterdir()] == ["r.yaml"]


@pytest.mark.parametrize("content", ["", "- a list", "name: [unclosed", "name: \udcff"])
def test_what_is_no_recipe_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_bytes(content.encode("utf-8", "surrogateescape"))
    refused(nlpinf("run", tmp_path / "r.yaml"), "r.yaml")


def test_debug_shows_the_traceback(root: Path, tmp_path: Path) -> None:
    arguments = query_of(root / "run", tmp_path / "query", "--damping", "-1")
    assert "Traceback" not in nlpinf(*arguments).err
    ended = nlpinf("--debug", *arguments)
    assert ended.status != 0 and "Traceback" in ended.err and "BadInput" in ended.err


def test_commands_and_options_are_named_with_the_nearest() -> None:
    refused(nlpinf("qury"), "qury", "query")
    refused(nlpinf("top", "s", "--cout", "3"), "--cout", "--count")
    refused(nlpinf("query", "--out", "x"), "--pretrain", "nlpinf query --help")


def test_rows_that_are_skipped_keep_the_numbers_of_the_others(root: Path, tmp_path: Path) -> None:
    (tmp_path / "c.txt").write_text("\n".join(["the cat sat", "", *sentences()[:3]]) + "\n", encoding="utf-8")
    arguments = ("--query", root / "run/query", "--corpus", tmp_path / "c.txt", "--out", tmp_path / "s")
    ended = nlpinf("score", *arguments, "--empty", "skip", "--json")
    assert ended.status == 0 and ended.json["corpus"]["skipped"] == {"empty": 1}
    rows = nlpinf("top", tmp_path / "s", "--json").json["rows"]
    assert sorted(row["row"] for row in rows) == [0, 2, 3, 4]


IMPOSSIBLE: dict[str, tuple[dict[str, Any], list[str]]] = {
    "a seed below 0": ({"seed": -1}, ["seed", "greater than or equal to 0"]),
    "longer than the positions": ({"finetune__max_length": 500}, ["max_length is 500", "positions"]),
    "no length": ({"finetune__max_length": 0}, ["finetune.max_length"]),
    "an endless rate": ({"pretrain__training__learning_rate": float("inf")}, ["learning_rate", "finite"]),
    "a size that is none": ({"pretrain__model__hidden_size": "x"}, ["cannot be made", "hidden_size"]),
}


@pytest.mark.parametrize("case", IMPOSSIBLE)
def test_a_recipe_that_cannot_be_is_refused_before_anything_is_trained(case: str, tmp_path: Path) -> None:
    changes, named = IMPOSSIBLE[case]
    path = write_recipe(tmp_path / "r.yaml", recipe(write_data(tmp_path / "data"), **changes))
    refused(nlpinf("run", path, "--out", tmp_path / "run"), *named)
    assert not (tmp_path / "run" / "pretrain").exists()


def test_a_page_of_another_query_is_refused(root: Path, tmp_path: Path) -> None:
    assert nlpinf(*query_of(root / "run", tmp_path / "query", "--row", 0)).status == 0
    page = ("report", root / "run/scores", "--query", tmp_path / "query", "--out", tmp_path / "r.html")
    refused(nlpinf(*page), "scores of another query")
    assert not (tmp_path / "r.html").exists()
