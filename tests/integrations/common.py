"""Tiny Trainer runs of seconds: a masked or causal LM, and a classifier on it, as the example scripts of transformers leave them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    DataCollatorForLanguageModeling,
    DataCollatorWithPadding,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
)

from tests.cases import tokenizer
from tests.cli.common import labelled, sentences


def bert(words: int = 0, seed: int = 0, **changes: Any) -> BertConfig:
    torch.manual_seed(seed)
    settings = {
        "vocab_size": len(tokenizer()) + words, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
        "intermediate_size": 16, "max_position_embeddings": 24, "hidden_dropout_prob": 0.1, **changes,
    }  # fmt: skip
    return BertConfig(**settings)


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 24}
    return GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer()), **sizes))


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=len(tokenizer()), max_position_embeddings=24, pad_token_id=0, **sizes)
    )


def tokens(words: PreTrainedTokenizerBase | None = None, count: int = 30) -> Dataset:
    """Tokenized sentences."""
    words = words or tokenizer()
    return Dataset.from_dict({"input_ids": [words(text)["input_ids"] for text in sentences(count)]})


def labelled_tokens(words: PreTrainedTokenizerBase | None = None) -> Dataset:
    """Tokenized labelled sentences."""
    words = words or tokenizer()
    rows = labelled()
    ids = [words(row["text"])["input_ids"] for row in rows]
    return Dataset.from_dict({"input_ids": ids, "label": [row["label"] for row in rows]})


def arguments(out: Path, **changes: Any) -> TrainingArguments:
    settings: dict[str, Any] = {
        "per_device_train_batch_size": 4, "num_train_epochs": 2, "learning_rate": 3e-3, "weight_decay": 0.02, "seed": 3,
        "save_strategy": "no", "report_to": [], "disable_tqdm": True, "use_cpu": True, "logging_strategy": "no", **changes,
    }  # fmt: skip
    return TrainingArguments(str(out), **settings)


def pretraining(out: Path, callbacks: list[Any], model: Any = None, **changes: Any) -> Trainer:
    """A masked LM's Trainer, or a causal LM's for a GPT-2."""
    model = model if model is not None else BertForMaskedLM(bert())
    masked = isinstance(model, BertForMaskedLM)
    return Trainer(
        model,
        arguments(out, **changes),
        data_collator=DataCollatorForLanguageModeling(tokenizer(), mlm=masked),
        train_dataset=tokens(),
        processing_class=tokenizer(),
        callbacks=callbacks,
    )


def finetuning(out: Path, callbacks: list[Any], model: Any, **changes: Any) -> Trainer:
    """A classifier's Trainer."""
    return Trainer(
        model,
        arguments(out, **changes),
        data_collator=DataCollatorWithPadding(tokenizer()),
        train_dataset=labelled_tokens(),
        processing_class=tokenizer(),
        callbacks=callbacks,
    )


def trained(trainer: Trainer, **resume: Any) -> Path:
    """Train, save, and return the output folder."""
    trainer.train(**resume)
    trainer.save_model()
    trainer.save_state()
    return Path(trainer.args.output_dir)


def classifier(run: Path) -> BertForSequenceClassification:
    torch.manual_seed(1)
    return BertForSequenceClassification.from_pretrained(run)
