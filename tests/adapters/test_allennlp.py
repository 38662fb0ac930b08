"""AllenNLP's archives, read without AllenNLP: those in `archives/` were made, and their logits computed, by AllenNLP 2.10.1.

`tests/interop` makes them anew and compares with the library itself.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import nlpinf
from nlpinf.adapters import allennlp
from nlpinf.adapters.huggingface import save_run
from nlpinf.curvature.products import hessian_product
from nlpinf.errors import BadInput
from nlpinf.stages import Stage, evaluation

ARCHIVES = Path(__file__).parent / "archives"
OPTIONS = ARCHIVES / "options.json"
EXPECTED = json.loads((ARCHIVES / "logits.json").read_text(encoding="utf-8"))
NAMES = sorted(EXPECTED["models"])
ROWS = [{"text": text, "label": k % 3} for k, text in enumerate(EXPECTED["texts"])]


def logits_of(stage: Stage) -> torch.Tensor:
    result = torch.empty(stage.size, 3, dtype=stage.dtype)
    with evaluation(stage.model), torch.no_grad():
        for batch in stage.batches():
            result[batch.rows] = stage.outputs(batch)
    return result


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("batch_size", [1, 4])
def test_logits_are_allennlps(name: str, batch_size: int) -> None:
    """Also one text at a time, where no text is padded, and behind each other, where AllenNLP would carry states."""
    expected = EXPECTED["models"][name]
    archive = allennlp.read_archive(ARCHIVES / f"{name}.tar.gz", OPTIONS)
    assert list(archive.labels) == expected["labels"]
    got = logits_of(archive.stage(ROWS, batch_size=batch_size))
    torch.testing.assert_close(got, torch.tensor(expected["logits"]), rtol=0, atol=2e-6)
    assert float((got - got[0]).abs().amax(1)[1:].min()) > 1e-2  # or nothing would have been compared


@pytest.mark.parametrize("name", NAMES)
def test_derivatives(name: str) -> None:
    """First by forward mode and second derivatives against differences, in double precision."""
    archive = allennlp.read_archive(ARCHIVES / f"{name}.tar.gz", OPTIONS)
    archive.model.double()
    stage = archive.stage(ROWS, trained=[n for n, _ in archive.model.named_parameters()])
    (batch,) = stage.batches()
    torch.manual_seed(0)
    v = {n: torch.randn_like(t) for n, t in stage.theta.items()}

    def losses(step: float) -> torch.Tensor:
        with torch.no_grad():
            return stage.example_losses(batch, {n: t + step * v[n] for n, t in stage.theta.items()})

    def gradient(step: float) -> list[torch.Tensor]:
        theta = {n: (t + step * v[n]).requires_grad_() for n, t in stage.theta.items()}
        return list(torch.autograd.grad(stage.example_losses(batch, theta).sum(), list(theta.values())))

    h = 1e-5
    with evaluation(stage.model):
        first = nlpinf.scoring.forward_scores(stage, [v], batch).scores[:, 0]
        torch.testing.assert_close(first, (losses(h) - losses(-h)) / (2 * h), rtol=1e-6, atol=1e-7)
        second = hessian_product(stage, batch, v, list(v))
        expected = [(a - b) / (2 * h) for a, b in zip(gradient(h), gradient(-h))]
    scale = max(float(e.abs().max()) for e in expected)
    for a, b in zip(second, expected):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6 * scale)


def test_what_was_trained() -> None:
    """Without requires_grad the encoder was fixed; given scalar_mix_parameters were fixed too."""
    trained = {n: set(allennlp.read_archive(ARCHIVES / f"{n}.tar.gz", OPTIONS).trained or ()) for n in ("mean", "sum")}
    assert trained["mean"] == {"head.mix", "head.scale", "head.classifier.weight", "head.classifier.bias"}
    assert "encoder.characters.embedding.weight" in trained["sum"] and "head.mix" not in trained["sum"]


def test_labels_by_name_and_a_run_folder(tmp_path: Path) -> None:
    archive = allennlp.read_archive(ARCHIVES / "cnn.tar.gz", OPTIONS)
    named = [{"text": row["text"], "label": archive.labels[row["label"]]} for row in ROWS]
    stage = archive.stage(named)
    assert [row["label"] for row in stage.data] == [row["label"] for row in ROWS]
    save_run(stage, tmp_path / "run", transfer="frozen")
    again = Stage.from_run(tmp_path / "run", data=ROWS)
    assert torch.equal(logits_of(again), logits_of(stage)) and again.trained == stage.trained
    with pytest.raises(BadInput, match="row 1: the label 'neutral' is not one of"):
        archive.stage([named[0], {"text": "so so", "label": "neutral"}])


def changed(
    folder: Path,
    config: Callable[[dict[str, Any]], Any] | bytes = b"",
    weights: Callable[[dict[str, torch.Tensor]], Any] | bytes = b"",
    leave_out: str = "",
) -> Path:
    """A copy of an archive, its configuration or weights edited by a function or replaced by bytes."""
    path = folder / "model.tar.gz"
    with tarfile.open(ARCHIVES / "cnn.tar.gz") as old, tarfile.open(path, "w:gz") as new:
        for member in old:
            if not member.isfile() or member.name == leave_out:
                continue
            content = old.extractfile(member).read()  # type: ignore[union-attr]
            if member.name == "config.json" and callable(config):
                settings = json.loads(content)
                config(settings["model"])
                content = json.dumps(settings).encode()
            elif member.name == "weights.th" and callable(weights):
                tensors = torch.load(io.BytesIO(content), weights_only=True)
                weights(tensors)
                content = pickled(tensors)
            elif member.name in ("config.json", "weights.th"):
                given = config if member.name == "config.json" else weights
                content = given or content  # type: ignore[assignment]
            member.size = len(content)
            new.addfile(member, io.BytesIO(content))
    return path


def pickled(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def embedder(model: dict[str, Any]) -> dict[str, Any]:
    return model["text_field_embedder"]["token_embedders"]["elmo"]


WEIGHT = "_classification_layer.weight"


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"config": lambda m: m.update(type="bcn")}, "model type 'bcn' is not supported; supported is basic_classifier"),
        ({"config": lambda m: m["seq2vec_encoder"].update(type="gru")}, "seq2vec_encoder 'gru' .* supported are bag_of"),
        ({"config": lambda m: m["seq2seq_encoder"].update(type="x")}, "supported are pass_through, lstm"),
        ({"config": lambda m: m["feedforward"].update(activations="prelu")}, "'prelu' is not supported; .*relu, tanh"),
        ({"config": lambda m: embedder(m).update(type="embedding")}, "token embedders are embedding; supported is one"),
        ({"config": lambda m: m.update(regularizer={"regexes": []})}, "the regularizer is part of what this model minimised"),
        ({"config": lambda m: m.update(seq2vec_encoder="cnn")}, "seq2vec_encoder is 'cnn'; expected an object"),
        ({"config": lambda m: embedder(m).update(do_layer_norm=True)}, "do_layer_norm normalises over the whole batch"),
        ({"config": lambda m: m["seq2vec_encoder"].pop("num_filters")}, "field 'num_filters' is missing"),
        ({"config": lambda m: m.update(num_labels=2)}, "has 3 labels, the model 2"),
        ({"weights": lambda s: s.update({WEIGHT: torch.zeros(3, 9)})}, r"classifier.weight has shape \(3, 9\), expected"),
        ({"weights": lambda s: s.pop(WEIGHT)}, "classifier.weight has shape None, expected"),
        ({"weights": lambda s: s.update({"odd.weight": torch.zeros(1)})}, "odd.weight has shape .* expected None"),
        ({"weights": lambda s: s[WEIGHT].fill_(float("nan"))}, "classifier.weight has NaN"),
        ({"weights": pickled(nn.Linear(1, 1))}, "weights.th holds no plain tensors or is damaged"),
        ({"leave_out": "weights.th"}, "has no weights.th"),
        ({"leave_out": "config.json"}, "has no config.json"),
        ({"config": b"{"}, "config.json is not a JSON object"),
    ],
)  # fmt: skip
def test_archives_that_cannot_be_used(how: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=message) as error:
        allennlp.read_archive(changed(tmp_path, **how), OPTIONS)
    assert "\n" not in str(error.value) and "model.tar.gz" in str(error.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    whole = (ARCHIVES / "mean.tar.gz").read_bytes()
    (tmp_path / "half.tar.gz").write_bytes(whole[: len(whole) // 2])
    for path, message in {
        tmp_path / "half.tar.gz": "truncated or no tar archive",
        tmp_path / "absent.tar.gz": "no such file",
        OPTIONS: "truncated or no tar archive",
        tmp_path: "has no config.json",
    }.items():
        with pytest.raises(BadInput, match=message):
            allennlp.read_archive(path, OPTIONS)
    with pytest.raises(BadInput, match=r"options file work/elmo/options.json is not at hand; give the options.json"):
        allennlp.read_archive(ARCHIVES / "mean.tar.gz")
    with pytest.raises(BadInput, match="Linear is not supported; supported are AllenNLP's Elmo"):
        allennlp.encoder_of(nn.Linear(1, 1))


def test_a_folder_that_training_left(tmp_path: Path) -> None:
    with tarfile.open(ARCHIVES / "lstm.tar.gz") as tar:
        tar.extractall(tmp_path, filter="data")
    (tmp_path / "weights.th").rename(tmp_path / "best.th")
    got = logits_of(allennlp.stage_of_archive(tmp_path, ROWS, options=OPTIONS))
    torch.testing.assert_close(got, torch.tensor(EXPECTED["models"]["lstm"]["logits"]), rtol=0, atol=2e-6)
