"""bilm-tf's files: what they hold, what its network computes from them, round trips, and files that are wrong."""

from __future__ import annotations

import json
import math
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from nlpinf.adapters import elmo
from nlpinf.adapters.elmo import files
from nlpinf.errors import NlpinfError

h5py = pytest.importorskip("h5py")


def shared_data() -> Path:
    """The folder of test data, or a skip that says where it was looked for."""
    root = Path(os.environ.get("NLPINF_DATA", Path(__file__).resolve().parents[2].parent / "shared" / "data"))
    if not (root / "elmo").is_dir():
        pytest.skip(f"no test data: {root / 'elmo'} is absent (set NLPINF_DATA)")
    return root


def fixture(name: str) -> tuple[Path, elmo.ElmoEncoder]:
    folder = shared_data() / "elmo" / name
    return folder, elmo.read_encoder(folder / "options.json", folder / "lm_weights.hdf5")


SETS = ["allennlp", "bilm_tf"]


@pytest.mark.parametrize("name", SETS)
def test_top_layers_with_carried_states(name: str) -> None:
    folder, encoder = fixture(name)
    lists = json.loads(next(folder.glob("*sentences.json")).read_text())
    expected = [h5py.File(folder / f"lm_embeddings_{k}.hdf5") for k in range(3)]
    states, worst = None, 0.0
    with torch.no_grad():
        for i in range(10):
            batch = elmo.character_batch([words[i].split() for words in lists])
            layers, states = encoder(batch.distinct, batch.index, batch.lengths, states=states, carry=True)
            for k in range(3):
                want = torch.from_numpy(expected[k][str(i)][...])
                got = layers[-1][k, : want.shape[1]]
                worst = max(worst, (got - torch.cat([want[0], want[1]], -1)).abs().max().item())
                assert not layers[-1][k, want.shape[1] :].any()
    print(f"{name}: top layers differ by at most {worst:.2g}")
    assert worst < 1e-5


@pytest.mark.parametrize("name", SETS)
def test_first_sentences_without_states(name: str) -> None:
    """Sentence 0 of each list starts from zero states, so the stateless default must agree there."""
    folder, encoder = fixture(name)
    lists = json.loads(next(folder.glob("*sentences.json")).read_text())
    batch = elmo.character_batch([words[0].split() for words in lists])
    with torch.no_grad():
        layers = encoder(batch.distinct, batch.index, batch.lengths)
    assert len(layers) == 3
    for k in range(3):
        want = torch.from_numpy(h5py.File(folder / f"lm_embeddings_{k}.hdf5")["0"][...])
        torch.testing.assert_close(layers[-1][k, : want.shape[1]], torch.cat([want[0], want[1]], -1), rtol=0, atol=1e-5)


def test_token_embeddings() -> None:
    folder, encoder = fixture("allennlp")
    words = (folder / "vocab_test.txt").read_text(encoding="utf-8").split("\n")[:458]
    want = torch.from_numpy(h5py.File(folder / "elmo_token_embeddings.hdf5")["embedding"][...])
    ids = torch.tensor([elmo.word_characters(word)[0] for word in words])
    with torch.no_grad():
        got = encoder.characters(ids)
    print(f"token embeddings differ by at most {(got - want).abs().max():.2g}")
    torch.testing.assert_close(got, want, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", SETS)
def test_round_trip(name: str, tmp_path: Path) -> None:
    folder, encoder = fixture(name)
    options, weights = elmo.write_encoder(encoder, tmp_path)
    before, after = files.read_arrays(folder / "lm_weights.hdf5"), files.read_arrays(weights)
    assert before.keys() == after.keys() and len(before) == 33
    for key in before:
        assert before[key].dtype == after[key].dtype == np.float32
        assert np.array_equal(before[key], after[key]), key
    assert json.loads(options.read_text()) == json.loads((folder / "options.json").read_text())
    again = elmo.read_encoder(options, weights)
    assert all(torch.equal(a, b) for a, b in zip(encoder.state_dict().values(), again.state_dict().values()))
    assert not list(tmp_path.glob("*.part"))


CONFIG = elmo.ElmoConfig(character_dim=3, filters=((1, 2), (2, 5)), highways=1, lstm_dim=6, projection_dim=4)


def written(folder: Path) -> tuple[Path, Path, Path]:
    torch.manual_seed(0)
    model = elmo.ElmoLM(CONFIG, 7)
    options, weights = elmo.write_encoder(model.encoder, folder)
    elmo.write_softmax(model.head, folder / "softmax.hdf5")
    return options, weights, folder / "softmax.hdf5"


def change(path: Path, name: str, value: np.ndarray | None) -> None:
    with h5py.File(path, "a") as file:
        del file[name]
        if value is not None:
            file[name] = value


def test_language_model_round_trip(tmp_path: Path) -> None:
    options, weights, softmax = written(tmp_path)
    vocabulary = elmo.Vocabulary(["<S>", "</S>", "<UNK>", "a", "b", "c", "d"])
    model = elmo.read_language_model(options, weights, softmax, vocabulary)
    torch.manual_seed(0)
    want = elmo.ElmoLM(CONFIG, 7).state_dict()
    assert want.keys() == model.state_dict().keys()
    assert all(torch.equal(want[key], value) for key, value in model.state_dict().items())
    model.save_pretrained(tmp_path / "run")
    again = elmo.ElmoLM.from_pretrained(tmp_path / "run")
    assert again.config == CONFIG and all(torch.equal(want[key], value) for key, value in again.state_dict().items())
    assert not again.training and all(p.requires_grad for p in again.parameters())


@pytest.mark.parametrize("characters", [261, 262])
def test_both_counts_of_characters(characters: int, tmp_path: Path) -> None:
    options, weights, _ = written(tmp_path)
    content = json.loads(options.read_text())
    content["char_cnn"]["n_characters"] = characters
    options.write_text(json.dumps(content))
    embedding = files.read_arrays(weights)["char_embed"]
    assert embedding.shape == (261, 3)
    one = elmo.read_encoder(options, weights)
    change(weights, "char_embed", np.concatenate([np.zeros((1, 3), np.float32), embedding]))
    two = elmo.read_encoder(options, weights)
    assert torch.equal(one.characters.embedding.weight, two.characters.embedding.weight)


def test_no_projections(tmp_path: Path) -> None:
    """Without W_proj (as many filters as the LSTM's inputs) and without W_P (LSTM as wide as its output)."""
    config = elmo.ElmoConfig(character_dim=3, filters=((1, 2), (2, 2)), highways=0, lstm_dim=4, projection_dim=4)
    encoder = elmo.ElmoEncoder(config)
    options, weights = elmo.write_encoder(encoder, tmp_path)
    assert not any("proj" in name or "W_P" in name for name in files.read_arrays(weights))
    again = elmo.read_encoder(options, weights)
    assert all(torch.equal(a, b) for a, b in zip(encoder.state_dict().values(), again.state_dict().values()))


def test_missing_arrays_are_named(tmp_path: Path) -> None:
    options, weights, softmax = written(tmp_path)
    change(weights, "CNN_high_0/W_carry", None)
    with pytest.raises(NlpinfError, match=r"weights.hdf5: no array CNN_high_0/W_carry, which .*options.json calls for"):
        elmo.read_encoder(options, weights)
    change(softmax, "softmax/b", None)
    with pytest.raises(NlpinfError, match=r"softmax.hdf5: no array softmax/b"):
        elmo.read_softmax(softmax)


def test_options_that_do_not_fit(tmp_path: Path) -> None:
    options, weights, softmax = written(tmp_path)
    content = json.loads(options.read_text())

    def read(section: str, field: str, value: object) -> None:
        changed = json.loads(json.dumps(content))
        changed[section][field] = value
        options.write_text(json.dumps(changed))
        elmo.read_encoder(options, weights)

    with pytest.raises(NlpinfError, match=r"W_0 has shape \(8, 24\), expected \(8, 32\)"):
        read("lstm", "dim", 8)
    with pytest.raises(NlpinfError, match="Cell1/LSTMCell/B has no place"):
        read("lstm", "n_layers", 1)
    with pytest.raises(NlpinfError, match="no array CNN_high_1/W_carry"):
        read("char_cnn", "n_highway", 2)
    with pytest.raises(NlpinfError, match="n_characters is 60, expected 261 or 262"):
        read("char_cnn", "n_characters", 60)
    with pytest.raises(NlpinfError, match=r"options.json: .*activation is 'gelu'"):
        read("char_cnn", "activation", "gelu")
    for section, field, value, told in (
        ("lstm", "dim", "many", "lstm_dim is 'many'"),
        ("lstm", "dim", math.inf, "lstm_dim is inf"),
        ("lstm", "dim", 8.5, "lstm_dim is 8.5"),
        ("lstm", "n_layers", True, "layers is True"),
        ("lstm", "cell_clip", -3, "cell_clip is -3.0, expected a number above 0"),
        ("lstm", "proj_clip", math.nan, "projection_clip is nan"),
        ("char_cnn", "n_highway", -1, "highways is -1"),
        ("char_cnn", "max_characters_per_token", 2, "max_characters is 2, expected a whole number of at least 3"),
    ):
        with pytest.raises(NlpinfError, match=re.escape(told)) as error:
            read(section, field, value)
        assert str(error.value).startswith(str(options))
    with pytest.raises(NlpinfError, match=r"options.json: a field has the wrong type"):
        read("char_cnn", "filters", 3)
    with pytest.raises(NlpinfError, match=r"columns, expected 5"):
        elmo.read_softmax(softmax, 5)
    options.write_text(json.dumps({"lstm": content["lstm"]}))
    with pytest.raises(NlpinfError, match="no section 'char_cnn'"):
        elmo.read_encoder(options, weights)
    del content["lstm"]["projection_dim"]
    options.write_text(json.dumps(content))
    with pytest.raises(NlpinfError, match="the field 'projection_dim' is missing"):
        elmo.read_encoder(options, weights)
    options.write_text("{")
    with pytest.raises(NlpinfError, match="not JSON"):
        elmo.read_encoder(options, weights)


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_a_softmax_of_another_dtype_is_read_as_float32(tmp_path: Path, dtype: type) -> None:
    options, weights, softmax = written(tmp_path)
    expected = elmo.read_language_model(options, weights, softmax).head.weight
    with h5py.File(softmax) as file:
        arrays = {name: file[name][...].astype(dtype) for name in ("softmax/W", "softmax/b")}
    for name, array in arrays.items():
        change(softmax, name, array)
    model = elmo.read_language_model(options, weights, softmax)
    assert model.head.weight.dtype == torch.float32 == model.head.bias.dtype
    torch.testing.assert_close(model.head.weight, expected, rtol=1e-3, atol=1e-4)


def test_a_softmax_that_cannot_be(tmp_path: Path) -> None:
    _, _, softmax = written(tmp_path)
    change(softmax, "softmax/b", np.full(7, np.nan, np.float32))
    with pytest.raises(NlpinfError, match=r"softmax.hdf5: softmax/b holds NaN"):
        elmo.read_softmax(softmax)
    change(softmax, "softmax/b", np.zeros(0, np.float32))
    change(softmax, "softmax/W", np.zeros((0, 4), np.float32))
    with pytest.raises(NlpinfError, match=r"softmax.hdf5: softmax/W has no row"):
        elmo.read_softmax(softmax)


def test_damaged_files(tmp_path: Path) -> None:
    options, weights, _ = written(tmp_path)
    whole = weights.read_bytes()
    for length in (0, 100, len(whole) // 2, len(whole) - 8):
        weights.write_bytes(whole[:length])
        with pytest.raises(NlpinfError, match=r"weights.hdf5: truncated or no HDF5 file") as error:
            elmo.read_encoder(options, weights)
        assert "\n" not in str(error.value)
    weights.write_bytes(whole)
    change(weights, "char_embed", np.full((261, 3), np.nan, np.float32))
    with pytest.raises(NlpinfError, match="char_embed holds NaN"):
        elmo.read_encoder(options, weights)
    with pytest.raises(NlpinfError, match="no such file"):
        elmo.read_encoder(options, tmp_path / "absent.hdf5")
    model = elmo.ElmoLM(CONFIG, 7)
    model.save_pretrained(tmp_path / "run")
    file = tmp_path / "run" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(NlpinfError, match="damaged or truncated"):
        elmo.ElmoLM.from_pretrained(tmp_path / "run")
    elmo.ElmoLM(CONFIG, 8).save_pretrained(tmp_path / "other")
    file.write_bytes((tmp_path / "other" / "model.safetensors").read_bytes())
    with pytest.raises(NlpinfError, match=r"head.bias has shape \(8,\), expected \(7,\)"):
        elmo.ElmoLM.from_pretrained(tmp_path / "run")


def test_vocabularies(tmp_path: Path) -> None:
    options, weights, softmax = written(tmp_path)
    path = tmp_path / "vocabulary.txt"
    for missing in ("<S>", "</S>", "<UNK>"):
        path.write_text("\n".join(w for w in ("<S>", "</S>", "<UNK>", "the") if w != missing) + "\n")
        with pytest.raises(NlpinfError, match=f"vocabulary.txt: no line {missing}"):
            elmo.Vocabulary.read(path)
    path.write_text("</S>\n<S>\n<UNK>\nthe\n!!!MAXTERMID\n")
    vocabulary = elmo.Vocabulary.read(path, size=4)
    assert vocabulary.encode(["the", "cat"]) == [1, 3, 2, 0]
    with pytest.raises(NlpinfError, match=r"vocabulary.txt: 4 words, but .*softmax.hdf5 has 7 rows"):
        elmo.read_language_model(options, weights, softmax, vocabulary)
    path.write_bytes(b"<S>\n\xff\n")
    with pytest.raises(NlpinfError, match="not UTF-8 at byte 4"):
        elmo.Vocabulary.read(path)
    built = elmo.Vocabulary.build([["b", "a", "b"], ["c", "a", "b"]], size=5)
    assert built.words == ["<S>", "</S>", "<UNK>", "b", "a"]
    built.write(path)
    assert elmo.Vocabulary.read(path).words == built.words
    assert built.batch([["a"], ["b", "x"]]).tolist() == [[0, 4, 1, 0], [0, 3, 2, 1]]
