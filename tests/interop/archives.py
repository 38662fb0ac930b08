"""Archives made by the real AllenNLP: `python -m tests.interop.archives FOLDER` writes those of tests/adapters/archives.

Each is of a tiny ELMo and one composition of a `basic_classifier`, its parameters random; `logits.json` has what
AllenNLP's model gives for `TEXTS` right after opening.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from nlpinf.adapters import elmo

CONFIG = elmo.ElmoConfig(
    character_dim=3, filters=((1, 3), (2, 4), (3, 3)), highways=2, lstm_dim=7, projection_dim=4, cell_clip=0.5,
    projection_clip=0.3,
)  # fmt: skip
TEXTS = [
    "a bad film",
    "good",
    "the film was not a bad film , but an extraordinarily-uninteresting one",
    "naïve … it was",
]
LABELS = ["positive", "negative", "positive", "mixed"]
WIDTH = 8

LSTM = {"type": "lstm", "input_size": WIDTH, "hidden_size": 3}
MODELS: dict[str, dict[str, Any]] = {
    "mean": {"seq2vec_encoder": {"type": "bag_of_embeddings", "embedding_dim": WIDTH, "averaged": True}},
    "sum": {
        "embedder": {"requires_grad": True, "scalar_mix_parameters": [0.3, -0.2, 0.9]},
        "seq2vec_encoder": {"type": "boe", "embedding_dim": WIDTH},
        "dropout": 0.2,
    },
    "cnn": {
        "embedder": {"projection_dim": 5},
        "seq2seq_encoder": {**LSTM, "input_size": 5, "bidirectional": True},
        "seq2vec_encoder": {"type": "cnn", "embedding_dim": 6, "num_filters": 8, "ngram_filter_sizes": [1, 3], "output_dim": 4},
        "feedforward": {"input_dim": 4, "num_layers": 2, "hidden_dims": [5, 3], "activations": ["tanh", "tanh"], "dropout": 0.1},
    },
    "lstm": {"seq2vec_encoder": {**LSTM, "num_layers": 2, "bidirectional": True}},
    "first": {
        "seq2seq_encoder": LSTM,
        "seq2vec_encoder": {"type": "cls_pooler", "embedding_dim": 3},
        "feedforward": {"input_dim": 3, "num_layers": 1, "hidden_dims": 4, "activations": "gelu"},
    },
}  # fmt: skip


def make(name: str, folder: Path, archive: Path) -> None:
    """Build a model with AllenNLP from its configuration and archive it, as training would leave it."""
    from allennlp.common import Params
    from allennlp.data import Vocabulary
    from allennlp.data.dataset_readers import DatasetReader
    from allennlp.models import Model
    from allennlp.models.archival import archive_model

    torch.manual_seed(len(name))
    encoder = elmo.ElmoEncoder(CONFIG)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.copy_(2 * parameter + 0.1 * torch.randn_like(parameter))
    folder.mkdir(parents=True)
    options, weights = elmo.write_encoder(encoder, folder / "elmo")
    recipe = dict(MODELS[name])
    embedder = {
        "type": "elmo_token_embedder", "options_file": str(options), "weight_file": str(weights), **recipe.pop("embedder", {})
    }  # fmt: skip
    config = {
        "dataset_reader": {
            "type": "text_classification_json",
            "tokenizer": {"type": "whitespace"},
            "token_indexers": {"elmo": {"type": "elmo_characters"}, "tokens": {"type": "single_id"}},
        },
        "model": {
            "type": "basic_classifier",
            # AllenNLP's classifier does not run without word ids, though nothing is made of them.
            "text_field_embedder": {"token_embedders": {"elmo": embedder, "tokens": {"type": "empty"}}},
            **recipe,
        },
        "trainer": {"optimizer": "adam"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    params = Params.from_file(str(folder / "config.json"))
    reader = DatasetReader.from_params(params["dataset_reader"])
    vocabulary = Vocabulary.from_instances(_instances(reader, LABELS))
    model = Model.from_params(vocab=vocabulary, params=params["model"])
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "_elmo_lstm" not in key:
                parameter.add_(0.5 * torch.randn_like(parameter))
    vocabulary.save_to_files(str(folder / "vocabulary"))
    torch.save(model.state_dict(), folder / "best.th")
    archive_model(str(folder), weights="best.th", archive_path=str(archive))


def logits(archive: Path) -> tuple[list[list[float]], list[str]]:
    """What AllenNLP's model gives for `TEXTS`, in one batch, right after opening; and its labels in order."""
    from allennlp.data import Batch
    from allennlp.models.archival import load_archive

    loaded = load_archive(str(archive))
    model, reader = loaded.model, loaded.dataset_reader
    batch = Batch(_instances(reader, [None] * len(TEXTS)))
    batch.index_instances(model.vocab)
    with torch.no_grad():
        found = model.eval()(**batch.as_tensor_dict())["logits"].tolist()
    names = model.vocab.get_index_to_token_vocabulary("labels")
    return found, [names[k] for k in sorted(names)]


def _instances(reader: Any, labels: Sequence[str | None]) -> list[Any]:
    instances = [reader.text_to_instance(text, label) for text, label in zip(TEXTS, labels)]
    for instance in instances:
        reader.apply_token_indexers(instance)
    return instances


def main(target: Path) -> None:
    """Write every archive, the options of its ELMo, and the logits."""
    target.mkdir(parents=True, exist_ok=True)
    expected = {}
    for name in MODELS:
        folder = target / "work"
        make(name, folder, target / f"{name}.tar.gz")
        found, labels = logits(target / f"{name}.tar.gz")
        expected[name] = {"logits": found, "labels": labels}
        shutil.copy(folder / "elmo" / "options.json", target / "options.json")
        shutil.rmtree(folder)
    (target / "logits.json").write_text(
        json.dumps({"texts": TEXTS, "models": expected}, indent=1, ensure_ascii=False) + "\n"
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
