"""bilm-tf's checkpoint to .hdf5 files, on a checkpoint with its variables' names (`make test-tensorflow` has TensorFlow)."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_scripts import convert_bilm_checkpoint as script
from nlpinf.adapters import elmo

pytest.importorskip("h5py")

CONFIG = elmo.ElmoConfig(character_dim=3, filters=((1, 2), (2, 5)), highways=2, lstm_dim=6, projection_dim=4)
WORDS = ["<S>", "</S>", "<UNK>", "a", "b", "c", "d"]


def variables(model: elmo.ElmoLM) -> dict[str, np.ndarray]:
    """The variables of a model in TensorFlow's names and layout, as bilm-tf's training saves them."""
    words, lm = model.encoder.characters, {}
    lm["char_embed"] = words.embedding.weight
    for k, conv in enumerate(words.convolutions):
        lm[f"CNN/W_cnn_{k}"], lm[f"CNN/b_cnn_{k}"] = conv.weight.permute(2, 1, 0)[None], conv.bias
    for k, (carry, transform) in enumerate(zip(words.carry, words.transform)):
        lm[f"CNN_high_{k}/W_carry"], lm[f"CNN_high_{k}/b_carry"] = carry.weight.T, carry.bias
        lm[f"CNN_high_{k}/W_transform"], lm[f"CNN_high_{k}/b_transform"] = transform.weight.T, transform.bias
    lm["CNN_proj/W_proj"], lm["CNN_proj/b_proj"] = words.projection.weight.T, words.projection.bias
    for way in range(2):
        for k, layer in enumerate(model.encoder.layers):
            cell = f"RNN_{way}/rnn/multi_rnn_cell/cell_{k}/lstm_cell"
            lm[f"{cell}/kernel"] = torch.cat([layer.weight_ih[way], layer.weight_hh[way]], 1).T
            lm[f"{cell}/bias"], lm[f"{cell}/projection/kernel"] = layer.bias[way], layer.weight_hr[way].T
    lm["softmax/W"], lm["softmax/b"] = model.head.weight, model.head.bias
    found = {f"lm/{name}": tensor.detach().numpy().copy() for name, tensor in lm.items()}
    slots = {f"{name}/Adagrad": np.full_like(value, 0.1) for name, value in found.items()}
    return {**found, **slots, "global_step": np.int64(7), "train_perplexity": np.float32(40.0)}


def model_of(seed: int = 0) -> elmo.ElmoLM:
    torch.manual_seed(seed)
    model = elmo.ElmoLM(CONFIG, len(WORDS))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter))
    return model


def save(folder: Path, values: dict[str, np.ndarray]) -> Path:
    """A checkpoint under plain names, as `tf.compat.v1.train.Saver` writes it."""
    tf = pytest.importorskip("tensorflow", reason="TensorFlow is not installed; `make test-tensorflow` has it")
    folder.mkdir(exist_ok=True)
    prefix = folder / "model.ckpt-7"
    names = list(values)
    tensors = [tf.constant(values[name]) for name in names]
    tf.raw_ops.SaveV2(prefix=f"{prefix}.part", tensor_names=names, shape_and_slices=[""] * len(names), tensors=tensors)
    tf.raw_ops.MergeV2Checkpoints(checkpoint_prefixes=[f"{prefix}.part"], destination_prefix=str(prefix))
    (folder / "checkpoint").write_text('model_checkpoint_path: "model.ckpt-7"\n')
    elmo.write_encoder(elmo.ElmoEncoder(CONFIG), folder / "other")
    (folder / "other" / "options.json").rename(folder / "options.json")
    return prefix


@pytest.mark.parametrize("by_prefix", [False, True])
def test_the_whole_model(by_prefix: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = model_of()
    prefix = save(tmp_path / "trained", variables(model))
    vocabulary = elmo.Vocabulary(WORDS)
    vocabulary.write(tmp_path / "vocab.txt")
    given = prefix if by_prefix else prefix.parent
    out = tmp_path / "out"
    assert script.main([str(given), "--out", str(out), "--encoder", "--vocabulary", str(tmp_path / "vocab.txt")]) == 0
    assert capsys.readouterr().out.split() == [str(out / n) for n in ("options.json", "weights.hdf5", "softmax.hdf5")]
    again = elmo.read_language_model(out / "options.json", out / "weights.hdf5", out / "softmax.hdf5", vocabulary)
    expected = model.state_dict()
    assert again.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in again.state_dict().items())


def test_the_softmax_alone(tmp_path: Path) -> None:
    """Without options and with no use for the encoder's variables."""
    model = model_of(1)
    prefix = save(tmp_path / "trained", variables(model))
    (tmp_path / "trained" / "options.json").unlink()
    assert script.main([str(prefix), "--out", str(tmp_path / "out")]) == 0
    weight, bias = elmo.read_softmax(tmp_path / "out" / "softmax.hdf5", 4)
    assert torch.equal(weight, model.head.weight) and torch.equal(bias, model.head.bias)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["softmax.hdf5"]


def test_checkpoints_that_cannot_be_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = variables(model_of())

    def refused(message: str, *more: str) -> None:
        assert script.main([str(tmp_path / "trained"), "--out", str(tmp_path / "out"), *more]) == 2
        told = capsys.readouterr().err.strip().splitlines()
        assert len(told) == 1 and message in told[0], told
        assert not (tmp_path / "out").exists()

    save(tmp_path / "trained", values)
    elmo.Vocabulary(WORDS[:-1]).write(tmp_path / "vocab.txt")
    refused("6 words, but the softmax of", "--vocabulary", str(tmp_path / "vocab.txt"))
    refused("no such file", "--encoder", "--options", str(tmp_path / "absent.json"))
    save(tmp_path / "trained", {n: v for n, v in values.items() if not n.startswith("lm/CNN_high_1/W_carry")})
    refused("no array CNN_high_1/W_carry", "--encoder")
    save(tmp_path / "trained", {n: v for n, v in values.items() if n != "lm/softmax/b"})
    refused("no variable lm/softmax/b")
    save(tmp_path / "trained", {**values, "lm/softmax/W": np.full((7, 4), np.nan, np.float32)})
    refused("holds NaN")
    save(tmp_path / "trained", {**values, "lm/softmax/W": np.zeros((7, 5), np.float32)})
    refused("projection_dim 4")
    save(tmp_path / "trained", {"other/W": np.zeros(2, np.float32)})
    refused("is named lm/...")
    for path in (tmp_path / "trained").glob("model.ckpt*"):
        path.unlink()
    refused("no checkpoint of TensorFlow")


def test_without_tensorflow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    assert script.main([str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert "pip install 'nlpinf[tensorflow]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("variable", "name"),
    [
        ("lm/RNN_0/rnn/multi_rnn_cell/cell_1/lstm_cell/kernel", "RNN_0/RNN/MultiRNNCell/Cell1/LSTMCell/W_0"),
        ("lm/RNN_1/rnn/multi_rnn_cell/cell_0/lstm_cell/bias", "RNN_1/RNN/MultiRNNCell/Cell0/LSTMCell/B"),
        ("lm/RNN_1/rnn/multi_rnn_cell/cell_0/lstm_cell/projection/kernel", "RNN_1/RNN/MultiRNNCell/Cell0/LSTMCell/W_P_0"),
        ("lm/char_embed", "char_embed"),
    ],
)  # fmt: skip
def test_names(variable: str, name: Any) -> None:
    assert script.file_name(variable) == name
