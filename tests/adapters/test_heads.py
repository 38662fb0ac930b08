"""Heads on transformers and ELMo against their formulas written out, one text at a time, and as run folders."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertForMaskedLM, GPT2LMHeadModel

from nlpinf.adapters.elmo import ElmoLM
from nlpinf.adapters.heads import HeadSettings, TextClassifier
from nlpinf.curvature.products import hessian_product
from nlpinf.errors import NlpinfError
from nlpinf.stages import Stage, evaluation
from nlpinf.tasks import SequenceClassification, WordClassification
from tests.cases import (
    ASKED,
    ELMO,
    LABELLED,
    VOCABULARY,
    _elmo_layers,
    _head_outputs,
    bert_config,
    gpt2_config,
    randomised,
    tokenizer,
)

ROWS = [*LABELLED, *ASKED]
ENCODERS = {
    "elmo": lambda: ElmoLM(ELMO, len(VOCABULARY)),
    # The attention that from_pretrained chooses, as a folder does not hold which one a model had.
    "bert": lambda: BertForMaskedLM._from_config(bert_config(), attn_implementation="sdpa"),
    "gpt2": lambda: GPT2LMHeadModel._from_config(gpt2_config(), attn_implementation="sdpa"),
}
SETTINGS = [
    HeadSettings(pooling, hidden, 3, layers, lstm)  # type: ignore[arg-type]
    for pooling, hidden, layers, lstm in product(("mean", "max", "attention", "first"), (0, 2), ("last", "mix"), (0, 2))
]


def stage_of(encoder: str, settings: HeadSettings, dtype: torch.dtype = torch.float64) -> Stage:
    model = TextClassifier.on(randomised(ENCODERS[encoder]().to(dtype), 1), settings)
    assert all(p.dtype == dtype for p in model.parameters())
    task: Any = (
        WordClassification(9, labels=3, max_characters=8)
        if encoder == "elmo"
        else SequenceClassification(tokenizer(), 9, labels=3)
    )
    return Stage(randomised(model, 2), task, ROWS, batch_size=8)


def logits_of(stage: Stage) -> torch.Tensor:
    result = torch.empty(len(ROWS), 3, dtype=stage.dtype)
    with evaluation(stage.model), torch.no_grad():
        for batch in stage.batches():
            result[batch.rows] = stage.outputs(batch)
    return result


@pytest.mark.parametrize("encoder", ENCODERS)
def test_every_head_is_its_formula(encoder: str) -> None:
    for settings in SETTINGS:
        stage = stage_of(encoder, settings)
        got = logits_of(stage)
        theta = stage.parameters
        for i, row in enumerate(ROWS):
            if encoder == "elmo":
                halves = _elmo_layers(theta, row["text"].split())
                layers = [torch.stack([torch.cat([f, b]) for f, b in zip(*layer)][1:-1]) for layer in halves]
            else:
                ids = torch.tensor([tokenizer()(row["text"])["input_ids"]])
                with evaluation(stage.model), torch.no_grad():
                    body = getattr(stage.model, stage.model.prefix)  # type: ignore[arg-type]
                    out = body(input_ids=ids, attention_mask=torch.ones_like(ids), output_hidden_states=True)
                layers = [layer[0] for layer in out.hidden_states]
            torch.testing.assert_close(got[i], _head_outputs(settings, theta, layers)[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("encoder", ENCODERS)
def test_padding_and_order_change_nothing(encoder: str) -> None:
    """In single precision, batches of one against one batch of all."""
    for settings in (HeadSettings("max", 2, 3, "mix", 2), HeadSettings("attention", 0, 3)):
        stage = stage_of(encoder, settings, torch.float32)
        alone = Stage(stage.model, stage.task, ROWS, batch_size=1)
        torch.testing.assert_close(logits_of(stage), logits_of(alone), rtol=0, atol=1e-6)


def test_second_derivatives_of_the_recurrent_head() -> None:
    stage = stage_of("bert", HeadSettings("attention", 2, 3, "mix", 2))
    (batch,) = stage.batches()
    v = {n: torch.randn_like(t) for n, t in stage.theta.items()}
    with evaluation(stage.model):
        got = hessian_product(stage, batch, v, list(v))

        def gradient(step: float) -> list[torch.Tensor]:
            theta = {n: (t + step * v[n]).requires_grad_() for n, t in stage.theta.items()}
            return list(torch.autograd.grad(stage.example_losses(batch, theta).sum(), list(theta.values())))

        h = 1e-5
        expected = [(a - b) / (2 * h) for a, b in zip(gradient(h), gradient(-h))]
    scale = max(float(e.abs().max()) for e in expected)
    for a, b in zip(got, expected):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-7 * scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("encoder", ENCODERS)
def test_saved_and_opened_again(encoder: str, dtype: torch.dtype, tmp_path: Path) -> None:
    stage = stage_of(encoder, HeadSettings("attention", 2, 3, "mix", 2), dtype)
    stage.model.save_pretrained(tmp_path)  # type: ignore[operator]
    again = Stage(TextClassifier.from_pretrained(tmp_path), stage.task, ROWS, batch_size=8)
    assert stage.parameters.keys() == again.parameters.keys()
    assert all(torch.equal(tensor, again.parameters[name]) for name, tensor in stage.parameters.items())
    # A transformer may be opened with another implementation of attention, which rounds otherwise.
    rounding = 0.0 if encoder == "elmo" else 8 * torch.finfo(dtype).eps
    torch.testing.assert_close(logits_of(stage), logits_of(again), rtol=rounding, atol=rounding)


def test_encoders_keep_the_names_of_their_pretraining_model() -> None:
    for encoder, make in ENCODERS.items():
        parent = make()
        child = TextClassifier.on(parent, HeadSettings("mean"))
        theirs = dict(parent.named_parameters())
        new = {n for n, p in child.named_parameters() if n not in theirs or theirs[n].shape != p.shape}
        if encoder == "elmo":
            assert new == {"head.classifier.weight", "head.classifier.bias"}
        for name, parameter in child.named_parameters():
            if name not in new:
                assert torch.equal(parameter, theirs[name]) and parameter is not theirs[name]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layers": "first"}, "neither last nor mix"),
        ({"pooling": "sum"}, "none of mean, max, attention, first"),
        ({"lstm": -1}, "-1 LSTM units"),
        ({"labels": 1}, "1 labels"),
    ],
)
def test_heads_that_cannot_be(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(NlpinfError, match=message):
        HeadSettings(**settings)
    with pytest.raises(NlpinfError, match="has no base model"):
        TextClassifier.on(torch.nn.Linear(2, 2), HeadSettings())
