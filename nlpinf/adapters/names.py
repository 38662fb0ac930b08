"""What a Hugging Face class does, by its name, and which models cannot become a stage, with the reason."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn
from transformers.models.auto import modeling_auto

from nlpinf.adapters.folders import read_json
from nlpinf.adapters.heads import ENCODERS
from nlpinf.errors import BadInput

_MAPPINGS = {
    "masked_lm": "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "causal_lm": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "sequence_classification": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
}
CONFIG = "config.json"


def task_of_class(name: str) -> str | None:
    """Return the task of a transformers model class, such as `BertForMaskedLM`; None if it is none of ours."""
    found = [task for task, table in _MAPPINGS.items() if name in getattr(modeling_auto, table).values()]
    if len(found) > 1:  # a class that serves for two goes by its own name
        found = [task for task in found if task.replace("_", "") in name.lower().replace("lmhead", "causallm")] or found
    return found[0] if found else None


def check_config(folder: Path, trust_remote_code: bool = False) -> dict[str, Any]:
    """Return config.json of a run folder; raise `BadInput` for a model that cannot become a stage, with the reason."""
    path = folder / CONFIG
    config = read_json(path, "a Hugging Face model")
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise BadInput(f"{path}: has no `model_type`; it is not the config of a Hugging Face model")
    if config.get("is_encoder_decoder"):
        raise BadInput(
            f"{path}: a {config['model_type']} model is an encoder-decoder, whose two sequences no task here has; give an encoder or a decoder"
        )
    if config.get("quantization_config"):
        raise BadInput(
            f"{path}: the weights are quantised, and a loss has no derivative in rounded numbers; give the model before quantisation"
        )
    if config.get("auto_map") and config["model_type"] not in ENCODERS and not trust_remote_code:
        raise BadInput(
            f"{path}: the model needs code of its own ({next(iter(config['auto_map'].values()))}), which would be run; allow it with --trust-remote-code"
        )
    return config


def decayed(model: nn.Module) -> list[str]:
    """Return the parameters that the Trainer decays by default: all but biases and those of normalisation layers."""
    names = []
    norms = {prefix for prefix, module in model.named_modules() if "norm" in type(module).__name__.lower()}
    for name, _ in model.named_parameters():
        owner, _, last = name.rpartition(".")
        if last != "bias" and owner not in norms:
            names.append(name)
    return names
