"""With the real AllenNLP (`make test-allennlp`): the same numbers from its modules and ours, both ways."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nlpinf.adapters import allennlp, elmo
from nlpinf.errors import BadInput
from nlpinf.stages import Stage, evaluation
from tests.interop import archives
from tests.shared import shared_data

pytest.importorskip("allennlp", reason="AllenNLP is not installed; `make test-allennlp` has an environment with it")

from allennlp.common.checks import ConfigurationError
from allennlp.modules.elmo import Elmo, _ElmoBiLm, batch_to_ids
from allennlp.modules.token_embedders import ElmoTokenEmbedder

SENTENCES = [text.split() for text in archives.TEXTS]


def fixture(name: str) -> tuple[Path, Path]:
    folder = shared_data("elmo", name)
    return folder / "options.json", folder / "lm_weights.hdf5"


def theirs(module: Any, sentences: list[list[str]]) -> list[Tensor]:
    """The layers of a `_ElmoBiLm` from zero states, the boundaries left out and zero past the end."""
    module._elmo_lstm.reset_states()
    with torch.no_grad():
        found = module.eval()(batch_to_ids(sentences))["activations"]
    inside = torch.arange(found[0].shape[1] - 2) < torch.tensor([len(words) for words in sentences])[:, None]
    return [layer[:, 1:-1] * inside[..., None] for layer in found]


def ours(encoder: elmo.ElmoEncoder, sentences: list[list[str]]) -> list[Tensor]:
    batch = elmo.character_batch(sentences)
    with torch.no_grad():
        return encoder(batch.distinct, batch.index, batch.lengths)  # type: ignore[return-value]


def close(a: list[Tensor], b: list[Tensor], tolerance: float) -> None:
    assert len(a) == len(b) == 3
    for one, two in zip(a, b):
        torch.testing.assert_close(one, two, rtol=0, atol=tolerance)


@pytest.fixture(scope="module")
def sentences() -> list[list[str]]:
    lists = json.loads((shared_data("elmo", "allennlp") / "sentences.json").read_text())
    return [sentence.split() for words in lists for sentence in words]


def test_words_that_a_module_computed_ahead_change_nothing() -> None:
    options, weights = fixture("allennlp")
    plain, ahead = (
        Elmo(options, weights, 1, dropout=0.0, **more) for more in ({}, {"vocab_to_cache": ["a", "film", "<S>"]})
    )
    one, other = (allennlp.encoder_of(module).state_dict() for module in (plain, ahead))
    assert all(torch.equal(t, other[n]) for n, t in one.items())


def test_every_layer_of_the_fixture(sentences: list[list[str]]) -> None:
    options, weights = fixture("allennlp")
    close(theirs(_ElmoBiLm(str(options), str(weights)), sentences), ours(elmo.read_encoder(options, weights), sentences), 1e-5)  # fmt: skip


def test_weights_of_bilm_tf_with_skip_connections(sentences: list[list[str]], tmp_path: Path) -> None:
    """AllenNLP refuses a model without skip connections; with them switched on it reads the same weights as we do."""
    options, weights = fixture("bilm_tf")
    with pytest.raises(ConfigurationError, match="residual connections"):
        _ElmoBiLm(str(options), str(weights))
    content = json.loads(options.read_text())
    content["lstm"]["use_skip_connections"] = True
    switched = tmp_path / "options.json"
    switched.write_text(json.dumps(content))
    close(theirs(_ElmoBiLm(str(switched), str(weights)), sentences), ours(elmo.read_encoder(switched, weights), sentences), 1e-5)  # fmt: skip


def test_carried_states(sentences: list[list[str]]) -> None:
    options, weights = fixture("allennlp")
    module, encoder = _ElmoBiLm(str(options), str(weights)).eval(), elmo.read_encoder(options, weights)
    states = None
    with torch.no_grad():
        for start in range(3):
            words = [sentences[start], sentences[start + 10], sentences[start + 20]]
            found = module(batch_to_ids(words))["activations"][-1]
            batch = elmo.character_batch(words)
            layers, states = encoder(batch.distinct, batch.index, batch.lengths, states=states, carry=True)
            for k, sentence in enumerate(words):
                n = len(sentence)
                torch.testing.assert_close(layers[-1][k, :n], found[k, 1 : n + 1], rtol=0, atol=1e-5)


def test_our_files_in_allennlp(tmp_path: Path) -> None:
    """What we train and write is read by AllenNLP with the same numbers."""
    torch.manual_seed(0)
    encoder = elmo.ElmoEncoder(elmo.ElmoConfig.preset("small")).eval()
    options, weights = elmo.write_encoder(encoder, tmp_path)
    close(theirs(_ElmoBiLm(str(options), str(weights)), SENTENCES), ours(encoder, SENTENCES), 1e-5)


@pytest.mark.parametrize("kind", ["bilm", "elmo", "embedder"])
def test_a_live_module(kind: str) -> None:
    """Its parameters differ from the files it was made of: those of the module count. It is left as it was."""
    options, weights = (str(path) for path in fixture("allennlp"))
    whole = {
        "bilm": lambda: _ElmoBiLm(options, weights),
        "elmo": lambda: Elmo(options, weights, 1),
        "embedder": lambda: ElmoTokenEmbedder(options, weights),
    }[kind]()
    bilm = next(module for module in whole.modules() if isinstance(module, _ElmoBiLm))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in bilm.named_parameters():
            if "char_embedding" not in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
        bilm(batch_to_ids(SENTENCES))
    before = [state.clone() for state in bilm._elmo_lstm._states]
    whole.train()
    encoder = allennlp.encoder_of(whole)
    assert whole.training and bilm.training
    assert all(torch.equal(a, b) for a, b in zip(before, bilm._elmo_lstm._states))
    close(theirs(bilm, SENTENCES), ours(encoder, SENTENCES), 1e-5)


def test_a_live_module_as_a_stage(tmp_path: Path) -> None:
    """Losses of the stage are cross-entropies of AllenNLP's top layer under the softmax."""
    options, weights = (str(path) for path in fixture("allennlp"))
    module = _ElmoBiLm(options, weights)
    vocabulary = elmo.Vocabulary.build(SENTENCES)
    torch.manual_seed(2)
    softmax = torch.nn.Linear(16, len(vocabulary))
    elmo.write_softmax(softmax, tmp_path / "softmax.hdf5")
    module._elmo_lstm.reset_states()
    with torch.no_grad():
        found = module.eval()(batch_to_ids(SENTENCES))["activations"][-1]
        expected = []
        for k, words in enumerate(SENTENCES):
            ids = torch.tensor(vocabulary.encode(words))
            ahead, back = found[k, : len(ids)].split(16, -1)
            log = torch.stack([softmax(ahead[:-1]), softmax(back[1:])]).log_softmax(-1)
            expected.append(-log.gather(-1, torch.stack([ids[1:], ids[:-1]])[..., None]).mean())
    for given in (softmax, tmp_path / "softmax.hdf5"):
        stage = allennlp.stage_of(module, archives.TEXTS, vocabulary, given)
        losses = torch.empty(len(SENTENCES))
        with evaluation(stage.model), torch.no_grad():
            for batch in stage.batches():
                losses[batch.rows] = stage.example_losses(batch)
        torch.testing.assert_close(losses, torch.stack(expected), rtol=0, atol=1e-5)
    with pytest.raises(BadInput, match="words, but"):
        allennlp.stage_of(module, archives.TEXTS, elmo.Vocabulary.build(SENTENCES[:1]), softmax)


def test_a_module_that_is_something_else() -> None:
    """A subclass that computes differently is noticed."""

    class Other(_ElmoBiLm):
        def forward(self, *inputs: Any) -> Any:
            found = super().forward(*inputs)
            return {**found, "activations": [1.01 * layer for layer in found["activations"]]}

    with pytest.raises(BadInput, match="layer 0 differs by"):
        allennlp.encoder_of(Other(*(str(path) for path in fixture("allennlp"))))


@pytest.mark.parametrize("name", sorted(archives.MODELS))
def test_archives(name: str, tmp_path: Path) -> None:
    """An archive made and opened by AllenNLP has the same logits here; ELMo's options are found by the config's path."""
    archives.make(name, tmp_path / "work", tmp_path / "model.tar.gz")
    expected, labels = archives.logits(tmp_path / "model.tar.gz")
    archive = allennlp.read_archive(tmp_path / "model.tar.gz")
    assert list(archive.labels) == labels
    stage: Stage = archive.stage([{"text": text, "label": 0} for text in archives.TEXTS])
    with evaluation(stage.model), torch.no_grad():
        (batch,) = stage.batches()
        got = stage.outputs(batch)[torch.argsort(batch.rows)]
    torch.testing.assert_close(got, torch.tensor(expected), rtol=0, atol=2e-6)
