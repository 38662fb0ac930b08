"""What cannot be attributed, and why: told by a model's config, before its weights are read."""

from __future__ import annotations

from typing import Any

from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

from nlpinf.errors import BadInput


def _check_causal(config: Any, where: Any) -> None:
    """Raise `BadInput` for an encoder as a causal language model, in which every place would see the word that it predicts."""
    both = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.keys() & MODEL_FOR_MASKED_LM_MAPPING_NAMES.keys()
    causal = getattr(config, "is_decoder", False) or getattr(config, "causal", False)  # XLM's
    if config.model_type in both and not causal:
        raise BadInput(
            f"{where}: a {config.model_type} model sees the words that a causal language model is to predict, unless its config "
            "has is_decoder=true; take the task masked_lm, or a decoder such as GPT-2"
        )


def check_supported(config: Any, where: Any, task: str) -> None:
    """Raise `BadInput` for encoder-decoder models, quantised weights and encoders as causal language models; `where` is named."""
    if getattr(config, "is_encoder_decoder", False):
        raise BadInput(
            f"{where}: {config.model_type} is an encoder-decoder model, and no task here has two sequences; give an encoder or a "
            "decoder, such as BERT or GPT-2"
        )
    if (quantised := getattr(config, "quantization_config", None)) is not None:
        method = (
            quantised.get("quant_method") if isinstance(quantised, dict) else getattr(quantised, "quant_method", None)
        )
        raise BadInput(
            f"{where}: its weights are quantised ({getattr(method, 'value', method) or 'unknown method'}), which have no "
            "derivatives; give the weights that they were made from, in float32 or bfloat16"
        )
    if task == "causal_lm":
        _check_causal(config, where)
