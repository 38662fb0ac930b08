"""pretrain, fit-head and finetune, then query, score and report on what they made; and what they refuse."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nlpinf import Query, Scores, Stage
from nlpinf import parameters as P
from nlpinf.adapters import elmo
from nlpinf.adapters.huggingface import chain_from_runs
from nlpinf.adapters.openers import build_task
from tests.cli.common import files, labelled, nlpinf, refused, sentences, write_data

h5py = pytest.importorskip("h5py")

SIZES = {"character_dim": 3, "filters": [[1, 4], [2, 6]], "highways": 1, "lstm_dim": 8, "projection_dim": 5}
CONFIG = elmo.ElmoConfig(**SIZES)  # type: ignore[arg-type]
TRAINING = ("--epochs", 2, "--batch-size", 16, "--learning-rate", 0.01, "--weight-decay", 0.001)
BERT = {
    "model_type": "bert",
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 8,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "bilm": SIZES,
    "masked_lm": {**BERT, "vocab_size": 30522, "pad_token_id": 0},  # the words of a config.json are not ours
    "causal_lm": {"model_type": "gpt2", "n_embd": 8, "n_layer": 1, "n_head": 2},
}


@cache
def _made(task: str, root: Path) -> Path:
    data = write_data(root / "data")
    config = root / "config.json"
    config.write_text(json.dumps(CONFIGS[task]), encoding="utf-8")
    ended = nlpinf(
        "pretrain", "--task", task, "--config", config, "--corpus", data / "corpus.txt", "--out", root / "pretrain",
        "--vocabulary-size", 300 if task == "causal_lm" else 64, "--seed", 3, *TRAINING, "--json",
    )  # fmt: skip
    assert ended.status == 0, ended
    (root / "pretrain.json").write_text(ended.out, encoding="utf-8")
    return root


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A folder with data/ and a pretraining of each task, made once; tests only read it."""
    roots: dict[str, Path] = {}
    return lambda task: _made(task, roots.setdefault(task, tmp_path_factory.mktemp(task)))


CASES = {
    ("bilm", "frozen"): ("--frozen", "--pooling", "max"),
    ("bilm", "proximity"): ("--proximity", 0.1, "--head", "bilstm", "--units", 2, "--layers", "mix"),
    ("masked_lm", "frozen"): ("--frozen",),
    ("causal_lm", "proximity"): ("--proximity", 0.1, "--head", "mlp", "--units", 3, "--pooling", "attention"),
}


@pytest.mark.parametrize("task, transfer", CASES)
def test_from_the_corpus_to_the_report(task: str, transfer: str, made: Callable[[str], Path], tmp_path: Path) -> None:
    root = made(task)
    rows, finetuned = root / "data/rows.jsonl", tmp_path / "finetune"
    ended = nlpinf(
        "finetune", "--pretrain", root / "pretrain", "--data", rows, "--test", rows, "--out", finetuned, *TRAINING,
        *CASES[task, transfer], "--json",
    )  # fmt: skip
    assert ended.status == 0, ended
    told = ended.json
    assert told["loss"] == pytest.approx(told["test"]["loss"]) and 0 <= told["test"]["accuracy"] <= 1
    chain = chain_from_runs([root / "pretrain", finetuned])
    assert chain.stages[1].objective() >= told["loss"]
    link = chain.links[1]
    if transfer == "frozen":
        assert not link.moved and told["optimum"]["gradient"] <= 1e-8
        assert P.norm(chain.stages[1].gradient()) < 1e-5
    else:
        assert link.alpha == 0.1 and link.moved and told["optimum"] is None

    query, scores, page = tmp_path / "query", tmp_path / "scores", tmp_path / "report.html"
    ended = nlpinf(
        "query", "--pretrain", root / "pretrain", "--finetune", finetuned, "--test", rows, "--out", query,
        "--damping", 0.1, "--tolerance", 1e-2,
    )  # fmt: skip
    assert ended.status == 0, ended
    assert nlpinf("score", "--query", query, "--out", scores).status == 0
    assert nlpinf("report", scores, "--query", query, "--out", page).status == 0
    opened = Scores.open(scores)
    assert len(opened) == 60 and opened.column().any()
    text = page.read_text(encoding="utf-8")
    shades = text.count("<mark") + text.count('class="t')
    assert shades > 20, "sentences are shaded by token"
    assert "without its pretraining head" not in text


def test_what_a_pretraining_measures(made: Callable[[str], Path]) -> None:
    for task in CONFIGS:
        root = made(task)
        told = json.loads((root / "pretrain.json").read_text(encoding="utf-8"))
        stage = Stage.from_run(root / "pretrain")
        assert told["rows"] == stage.size == 60 and told["parameters"] == P.size(stage.parameters)
        assert not told["head_fitted"] and "head" not in stage.record
        mean = Stage(stage.model, stage.task, stage.data, reduction="token").objective()
        assert told["perplexity"] == pytest.approx(math.exp(mean), rel=1e-5)
        words = stage.model.get_output_embeddings().weight.shape[0]  # type: ignore[operator, union-attr]
        assert told["perplexity"] < 0.9 * words, "it learnt something"
        assert set(stage.decay.values()) == {0.001} and stage.record["seed"] == 3


def test_a_pretraining_is_a_function_of_its_seed(made: Callable[[str], Path], tmp_path: Path) -> None:
    root = made("bilm")
    arguments = ("pretrain", "--task", "bilm", "--config", root / "config.json", "--corpus", root / "data/corpus.txt",
                 "--vocabulary-size", 64, *TRAINING)  # fmt: skip
    assert nlpinf(*arguments, "--seed", 3, "--out", tmp_path / "same").status == 0
    assert nlpinf(*arguments, "--seed", 4, "--out", tmp_path / "other").status == 0
    weights = [
        (f / "model.safetensors").read_bytes() for f in (root / "pretrain", tmp_path / "same", tmp_path / "other")
    ]
    assert weights[0] == weights[1] != weights[2]


def elmo_files(folder: Path, softmax: bool = False) -> elmo.ElmoLM:
    """Write options.json and weights.hdf5, with `softmax` also softmax.hdf5 and vocabulary.txt."""
    torch.manual_seed(1)
    vocabulary = elmo.Vocabulary.build([s.split() for s in sentences()])
    model = elmo.ElmoLM(CONFIG, len(vocabulary))
    elmo.write_encoder(model.encoder, folder)
    if softmax:
        elmo.write_softmax(model.head, folder / "softmax.hdf5")
        vocabulary.write(folder / "vocabulary.txt")
    return model


def test_a_missing_softmax_is_fitted_and_every_report_says_so(tmp_path: Path) -> None:
    given, data = elmo_files(tmp_path / "elmo"), write_data(tmp_path / "data")
    ended = nlpinf("fit-head", "--encoder", tmp_path / "elmo", "--corpus", data / "corpus.txt", "--out", tmp_path / "p",
                   "--vocabulary-size", 64, "--epochs", 150, "--batch-size", 30, "--learning-rate", 0.2)  # fmt: skip
    assert ended.status == 0 and "was fitted" in ended.out, ended
    stage = Stage.from_run(tmp_path / "p")
    assert stage.record["head"] == {"fitted": True, "rows": 60, "corpus": str(data / "corpus.txt")}
    theirs = given.encoder.state_dict()
    assert all(torch.equal(t, theirs[n]) for n, t in stage.model.encoder.state_dict().items())  # type: ignore[union-attr]
    assert set(stage.trained or ()) == set(stage.parameters)  # scores are of all parameters all the same
    # The softmax stands where the encoder, fixed, lets it: a convex problem, whose optimum L-BFGS finds as well.
    head = ["head.weight", "head.bias"]
    theta = {n: stage.parameters[n].clone().requires_grad_() for n in head}
    optimizer = torch.optim.LBFGS(list(theta.values()), max_iter=300, line_search_fn="strong_wolfe")
    batches = list(stage.batches())

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = sum(stage.example_losses(b, theta).sum() for b in batches) / stage.size
        loss = loss + 0.5e-6 * sum(t.square().sum() for t in theta.values())
        loss.backward()
        return loss

    start = float(optimizer.step(closure).detach())
    best = float(closure().detach())
    assert start == pytest.approx(stage.objective(), abs=1e-3) and best <= start < best + 0.1, (start, best)

    rows = data / "rows.jsonl"
    ended = nlpinf("finetune", "--pretrain", tmp_path / "elmo", "--data", rows, "--out", tmp_path / "f", "--frozen")
    assert ended.status == 0, ended  # on the files themselves; their run came later
    query = ("query", "--pretrain", tmp_path / "p", "--finetune", tmp_path / "f", "--test", rows, "--damping", 0.1)
    assert nlpinf(*query, "--out", tmp_path / "q").status == 0
    assert nlpinf("score", "--query", tmp_path / "q", "--out", tmp_path / "s").status == 0
    assert nlpinf("report", tmp_path / "s", "--out", tmp_path / "r.html").status == 0
    text = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert "came without its pretraining head" in text and "60 texts" in text


def test_files_with_their_softmax_become_a_run_as_they_are(tmp_path: Path) -> None:
    given, data = elmo_files(tmp_path / "elmo", softmax=True), write_data(tmp_path / "data")
    ended = nlpinf("fit-head", "--encoder", tmp_path / "elmo", "--corpus", data / "corpus.txt", "--out", tmp_path / "p",
                   "--json")  # fmt: skip
    assert ended.status == 0, ended
    assert not ended.json["head_fitted"] and ended.json["loss"] is None
    stage = Stage.from_run(tmp_path / "p")
    assert all(torch.equal(t, given.state_dict()[n]) for n, t in stage.model.state_dict().items())
    assert "head" not in stage.record and stage.task.vocabulary.words[:3] == ["<S>", "</S>", "<UNK>"]  # type: ignore[attr-defined]


def test_a_head_that_was_fitted_stays_one_in_the_runs_that_come_of_it(tmp_path: Path) -> None:
    elmo_files(tmp_path / "elmo")
    data = write_data(tmp_path / "data")
    common = ("--corpus", data / "corpus.txt", "--epochs", 1)
    assert nlpinf("fit-head", "--encoder", tmp_path / "elmo", *common, "--out", tmp_path / "p").status == 0
    assert nlpinf("fit-head", "--encoder", tmp_path / "p", *common, "--out", tmp_path / "again").status == 0
    first, again = (Stage.from_run(tmp_path / name).record for name in ("p", "again"))
    assert first["head"]["fitted"] and again["head"] == first["head"] and again["notes"] == first["notes"]


def test_bilm_files_in_a_run_of_their_own_leave_it_a_run(tmp_path: Path) -> None:
    elmo_files(tmp_path / "elmo", softmax=True)
    data, run = write_data(tmp_path / "data"), tmp_path / "p"
    assert nlpinf("fit-head", "--encoder", tmp_path / "elmo", "--corpus", data / "corpus.txt", "--out", run).status == 0
    model: Any = Stage.from_run(run).model
    elmo.write_encoder(model.encoder, run)
    elmo.write_softmax(model.head, run / "softmax.hdf5")
    rows = data / "rows.jsonl"
    assert nlpinf("finetune", "--pretrain", run, "--data", rows, "--out", tmp_path / "f", "--frozen").status == 0
    query = ("query", "--pretrain", run, "--finetune", tmp_path / "f", "--test", rows, "--damping", 0.1)
    assert nlpinf(*query, "--out", tmp_path / "q").status == 0


def test_texts_beside_the_files_are_no_vocabulary(tmp_path: Path) -> None:
    elmo_files(tmp_path / "elmo", softmax=True)
    (tmp_path / "elmo" / "requirements.txt").write_text("allennlp\n")
    data = write_data(tmp_path / "data")
    arguments = ("--encoder", tmp_path / "elmo", "--corpus", data / "corpus.txt", "--out", tmp_path / "p")
    assert nlpinf("fit-head", *arguments).status == 0


# --- what is refused ---


def test_files_without_a_run_are_told_how_to_become_one(tmp_path: Path) -> None:
    elmo_files(tmp_path / "elmo")
    rows = write_data(tmp_path / "data") / "rows.jsonl"
    done = nlpinf("finetune", "--pretrain", tmp_path / "elmo", "--data", rows, "--out", tmp_path / "f", "--frozen")
    assert done.status == 0, done
    query = ("query", "--pretrain", tmp_path / "elmo", "--finetune", tmp_path / "f", "--test", rows)
    refused(nlpinf(*query, "--out", tmp_path / "q"), "nlpinf fit-head --encoder", "elmo")


def test_what_cannot_be_made_leaves_nothing(tmp_path: Path) -> None:
    """A training that diverges, words that cannot be spelt where nothing is trained, a folder that is not there."""
    elmo_files(tmp_path / "elmo", softmax=True)
    data = write_data(tmp_path / "data")
    (tmp_path / "bell.txt").write_text("a plot\nb \x07 c\n")
    (tmp_path / "config.json").write_text(json.dumps(SIZES))
    before = files(tmp_path)
    out = ("--out", tmp_path / "p")
    wild = ("--epochs", 2, "--learning-rate", 1000, "--batch-size", 4, "--config", tmp_path / "config.json")
    diverged = nlpinf("pretrain", "--task", "bilm", *wild, "--corpus", data / "corpus.txt", *out)
    assert diverged.status == 2 and "lower the learning rate" in diverged.err.splitlines()[-1], diverged
    refused(nlpinf("fit-head", "--encoder", tmp_path / "elmo", "--corpus", tmp_path / "bell.txt", *out), "U+0007")
    refused(nlpinf("fit-head", "--encoder", tmp_path / "no", "--corpus", data / "corpus.txt", *out), "is no folder")
    assert files(tmp_path) == before and not (tmp_path / "p").exists()


def no_softmax_words(folder: Path) -> list[str]:
    (folder / "vocabulary.txt").unlink()
    return ["elmo", "softmax.hdf5", "no vocabulary"]


def other_size(folder: Path) -> list[str]:
    with open(folder / "vocabulary.txt", "a", encoding="utf-8") as file:
        file.write("more\n")
    return ["vocabulary.txt", "softmax.hdf5", "rows"]


def no_unknown(folder: Path) -> list[str]:
    words = (folder / "vocabulary.txt").read_text(encoding="utf-8").replace("<UNK>\n", "unknown\n")
    (folder / "vocabulary.txt").write_text(words, encoding="utf-8")
    return ["vocabulary.txt", "no line <UNK>"]


def other_options(folder: Path) -> list[str]:
    content = json.loads((folder / "options.json").read_text())
    content["lstm"]["dim"] = 9
    (folder / "options.json").write_text(json.dumps(content))
    return ["weights.hdf5", "(10, 32)", "(10, 36)", "options.json"]


def missing_array(folder: Path) -> list[str]:
    with h5py.File(folder / "weights.hdf5", "a") as file:
        del file["CNN_high_0/W_carry"]
    return ["weights.hdf5", "no array CNN_high_0/W_carry"]


def truncated(folder: Path) -> list[str]:
    whole = (folder / "weights.hdf5").read_bytes()
    (folder / "weights.hdf5").write_bytes(whole[: len(whole) // 2])
    return ["weights.hdf5", "truncated"]


def two_weights(folder: Path) -> list[str]:
    (folder / "again.hdf5").write_bytes((folder / "weights.hdf5").read_bytes())
    return ["elmo", "again.hdf5 and weights.hdf5", "both"]


def no_weights(folder: Path) -> list[str]:
    (folder / "weights.hdf5").unlink()
    return ["elmo", "char_embed"]


DAMAGES = [no_softmax_words, other_size, no_unknown, other_options, missing_array, truncated, two_weights, no_weights]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda d: d.__name__)
def test_elmo_files_that_cannot_be(damage: Callable[[Path], list[str]], tmp_path: Path) -> None:
    elmo_files(tmp_path / "elmo", softmax=True)
    named, data = damage(tmp_path / "elmo"), write_data(tmp_path / "data")
    before = files(tmp_path)
    arguments = ("--encoder", tmp_path / "elmo", "--corpus", data / "corpus.txt", "--out", tmp_path / "p")
    refused(nlpinf("fit-head", *arguments), *named)
    if damage in (other_options, missing_array, truncated, two_weights, no_weights):
        arguments = ("--pretrain", tmp_path / "elmo", "--data", data / "rows.jsonl", "--out", tmp_path / "p")
        refused(nlpinf("finetune", *arguments), *named)
    assert files(tmp_path) == before and not (tmp_path / "p").exists()


@pytest.mark.parametrize(
    "line, named",
    [("", ["line 2 is empty"]), ("a \x07 plot", ["\\x07", "U+0007", "a \\x07 plot"]), ("a pl\x7fot", ["U+007F"])],
)
def test_sentences_that_cannot_be_spelt(line: str, named: list[str], tmp_path: Path) -> None:
    corpus = tmp_path / "corpus.txt"
    corpus.write_text(f"the film was good\n{line}\na plot\n", encoding="utf-8")
    arguments = ("pretrain", "--task", "bilm", "--config", "small", "--corpus", corpus, "--out", tmp_path / "p")
    refused(nlpinf(*arguments, "--epochs", 1), *named)
    assert not (tmp_path / "p").exists()


@pytest.mark.parametrize(
    "arguments, named",
    [
        (("--task", "bilm", "--config", "huge"), ["huge", "small, medium, original"]),
        (("--task", "masked_lm", "--config", "huge"), ["huge", "small, medium, original"]),
        (("--task", "tagger", "--config", "small"), ["tagger", "bilm"]),
        (("--task", "bilm", "--config", "absent.json"), ["absent.json", "no such file"]),
        (("--task", "bilm", "--config", "small", "--learning-rate", 0), ["--learning-rate", "greater than 0"]),
        (("--task", "masked_lm", "--config", "small", "--probability", 1.5), ["--probability", "1.5"]),
        (("--task", "bilm", "--config", "small", "--negatives", 64), ["negatives", "64"]),
    ],
)
def test_settings_that_cannot_be(arguments: tuple[Any, ...], named: list[str], tmp_path: Path) -> None:
    data = write_data(tmp_path / "data")
    out = ("--corpus", data / "corpus.txt", "--out", tmp_path / "p", "--vocabulary-size", 64)
    refused(nlpinf("pretrain", *arguments, *out), *named)
    assert not (tmp_path / "p").exists()


def test_finetunings_that_cannot_be(made: Callable[[str], Path], tmp_path: Path) -> None:
    root = made("bilm")
    rows, out = root / "data/rows.jsonl", ("--out", tmp_path / "f")
    start = ("finetune", "--pretrain", root / "pretrain", "--data", rows)
    refused(nlpinf(*start, *out, "--frozen", "--proximity", 0.1), "--frozen", "--proximity")
    refused(nlpinf(*start, *out, "--proximity", 0), "α", "greater than 0")
    refused(nlpinf(*start, *out, "--head", "cnn"), "cnn", "linear")
    refused(nlpinf("finetune", "--pretrain", tmp_path / "none", "--data", rows, *out), "none", "no such run folder")
    refused(nlpinf(*start, "--out", root / "pretrain"), "pretrain", "exists already")
    other = tmp_path / "rows.jsonl"
    other.write_text("".join(json.dumps({**row, "label": 5}) + "\n" for row in labelled()), encoding="utf-8")
    refused(nlpinf("finetune", "--pretrain", root / "pretrain", "--data", other, *out), "rows.jsonl", "label 5")
    other.write_text('{"text": "a plot", "label": 0}\n{"text": "a \x0ffilm", "label": 1}\n', encoding="utf-8")
    refused(nlpinf("finetune", "--pretrain", root / "pretrain", "--data", other, *out), "rows.jsonl")
    assert not (tmp_path / "f").exists()


def test_long_sentences_and_words_change_nothing_for_their_neighbours(
    made: Callable[[str], Path], tmp_path: Path
) -> None:
    """A sentence of 2,000 words and a word of 40,000 characters are scored, cut to the run's lengths."""
    root = made("bilm")
    stage = Stage.from_run(root / "pretrain")
    texts = sentences()[:6]
    long = [*texts[:2], "film " * 2000, texts[2], "a " + "x" * 40_000 + " plot", *texts[3:]]
    v = {n: torch.randn_like(t) for n, t in stage.theta.items()}
    from nlpinf.scoring.forward import forward_scores

    def scored(rows: list[str], **changes: Any) -> torch.Tensor:
        again = Stage(stage.model, stage.task, rows, trained=stage.trained, **changes)
        result = torch.empty(len(rows), 2, dtype=torch.float64)
        for batch in again.batches():
            found = forward_scores(again, [v], batch)
            result[batch.rows] = torch.stack([found.scores[:, 0].double(), found.losses.double()], 1)
        return result

    together = scored(long)
    assert together.isfinite().all()
    kept = torch.tensor([0, 1, 3, 5, 6, 7])
    scale = together[:, 0].abs().max()
    for changes in ({"batch_size": 1}, {"batch_tokens": 40}, {}):
        alone = scored(texts, **changes)
        torch.testing.assert_close(together[kept, 1], alone[:, 1], rtol=0, atol=1e-6)
        torch.testing.assert_close(together[kept, 0], alone[:, 0], rtol=0, atol=float(1e-6 * scale.clamp(min=1)))
    back = scored(long[::-1]).flip(0)
    torch.testing.assert_close(together[:, 1], back[:, 1], rtol=0, atol=1e-6)
    refusing = build_task({**stage.task.settings(), "long": "error"}, stage.task.vocabulary)  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="2000 words, more than 64"):
        refusing.encode([long[2]])
    with pytest.raises(ValueError, match="40000 bytes, more than 48"):
        refusing.encode([long[4]])
    assert stage.task.encode_marked(long)[1].tolist() == [i in (2, 4) for i in range(8)]


def test_dropout_of_the_config_leaves_losses_alone(made: Callable[[str], Path], tmp_path: Path) -> None:
    """Dropout acts in training alone: the same weights with it in their config have the same losses and query vectors."""
    root = made("bilm")
    stage = Stage.from_run(root / "pretrain")
    losses = stage.objective()
    stage.model.config.dropout = 0.5  # type: ignore[union-attr]
    stage.model.encoder.config.dropout = 0.5  # type: ignore[union-attr]
    stage.model.train()
    assert stage.objective() == losses and stage.model.training
    gradient = Query.mean_loss(list(sentences()[:4])).gradient(stage)
    stage.model.config.dropout = stage.model.encoder.config.dropout = 0.0  # type: ignore[union-attr]
    again = Query.mean_loss(list(sentences()[:4])).gradient(stage)
    assert all(np.array_equal(gradient[n].numpy(), again[n].numpy()) for n in gradient)
