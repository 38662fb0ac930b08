"""What cannot be attributed, and why: told by a model's config, before its weights are read."""

from __future__ import annotations

from typing import Any

from nlpinf.errors import BadInput


def check_supported(config: Any, where: Any) -> None:
    """Raise `BadInput` for encoder-decoder models and for quantised weights; `where` is named."""
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
