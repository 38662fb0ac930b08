"""Start from somebody's Hugging Face model: an encoder, or a whole language model, with what it lacks of a head made anew."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, PreTrainedTokenizerBase

from nlpinf.adapters.huggingface import one_line
from nlpinf.adapters.openers import AUTO_MODELS, quiet_loading
from nlpinf.adapters.supported import check_supported
from nlpinf.adapters.tokenizers import tokenizer_in
from nlpinf.errors import BadInput


def open_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Open the tokenizer of a model folder."""
    _there(folder)
    try:
        with quiet_loading():
            return tokenizer_in(folder)
    except BadInput:
        raise
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadInput(f"{folder}: has no tokenizer that can be opened: {one_line(error)}") from error


def open_pretrained(task: str, folder: Path, seed: int) -> nn.Module:
    """Open the weights in `folder` as a model for `task` ("masked_lm", "causal_lm").

    The encoder must be whole; parameters of the head that the folder lacks are initialised by the seed. Dropout is off,
    so that the loss is a function of the example.
    """
    _there(folder)
    torch.manual_seed(seed)
    try:
        with quiet_loading():
            config = AutoConfig.from_pretrained(folder)
            check_supported(config, folder, task)
            for name in config.to_dict():
                if name.endswith(("dropout", "dropout_prob", "pdrop")) and name != "classifier_dropout":
                    setattr(config, name, 0.0)
            model, loading = AUTO_MODELS[task].from_pretrained(folder, config=config, output_loading_info=True)
    except BadInput:
        raise
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise BadInput(f"{folder}: cannot be opened as a {task} model: {one_line(error)}") from error
    head, missing = set(head_names(model)), set(loading["missing_keys"])
    for name, _ in model.named_parameters():  # older versions of transformers leave the prefix out
        if name not in head and missing & {name, name.removeprefix(f"{model.base_model_prefix}.")}:
            raise BadInput(f"{folder}: its weights have no {name!r}, which the encoder has; give a whole model")
    return model.float()


def head_names(model: Any) -> list[str]:
    """Return the names of the parameters outside the encoder; tied weights are the encoder's."""
    prefix = getattr(model, "base_model_prefix", "")
    if not prefix or not hasattr(model, prefix):
        raise BadInput(f"{type(model).__name__} has no base model, so what its head is cannot be told")
    return [name for name, _ in model.named_parameters() if not name.startswith(prefix + ".")]


def _there(folder: Path) -> None:
    if not (folder / "config.json").is_file():
        raise BadInput(f"{folder}: is no model folder (it has no config.json); give what `save_pretrained` leaves")
