"""Tiny causal models with gated layers, by the names of their families: SiLU and GELU gates, mixtures of experts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call
from transformers import (
    GemmaConfig,
    GemmaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from nlpinf.stages import Stage
from nlpinf.tasks import CausalLM
from tests.cases import TEXTS, randomised, tokenizer

SIZES: dict[str, Any] = {
    "hidden_size": 4, "intermediate_size": 5, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 2, "max_position_embeddings": 16, "pad_token_id": 0, "bos_token_id": 2,
    "eos_token_id": 3,
}  # fmt: skip

GATED: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer()), **SIZES)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(vocab_size=len(tokenizer()), **SIZES)),
    "gemma": lambda: GemmaForCausalLM(GemmaConfig(vocab_size=len(tokenizer()), **SIZES)),
    "mixtral": lambda: MixtralForCausalLM(
        MixtralConfig(vocab_size=len(tokenizer()), num_local_experts=3, num_experts_per_tok=2, **SIZES)
    ),
}


def gated_stage(name: str, texts: Sequence[str] = TEXTS) -> Stage:
    """Return a stage in float64 with random weights, in batches of sentences of unequal length."""
    return Stage(randomised(GATED[name]().double(), 2), CausalLM(tokenizer(), 9), list(texts), batch_size=3)


def loss_alone(stage: Stage, i: int, theta: dict[str, Tensor]) -> Tensor:
    """Return the mean loss of example i's tokens: the sentence alone, unpadded, all logits, PyTorch's own loss."""
    ids = torch.tensor([tokenizer()(stage.data[i])["input_ids"]])
    logits = functional_call(stage.model, theta, (ids,), {"use_cache": False}, tie_weights=True).logits
    return F.cross_entropy(logits[0, :-1], ids[0, 1:])
