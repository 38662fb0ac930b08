"""Classification heads on any Hugging Face encoder: pooled hidden states, then a linear layer or one hidden layer."""

from __future__ import annotations

import copy
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel

from nlpinf.errors import BadInput

Pooling = Literal["mean", "max", "attention", "first"]
HEAD = "nlpinf_head.json"
_WEIGHTS = "model.safetensors"


@dataclass(frozen=True)
class HeadSettings:
    """`pooling` over the tokens of the last layer; `hidden` units of one tanh layer, 0 for a linear head."""

    pooling: Pooling = "mean"
    hidden: int = 0
    labels: int = 2

    def __post_init__(self) -> None:
        if self.pooling not in ("mean", "max", "attention", "first"):
            raise BadInput(f"pooling {self.pooling!r} is none of mean, max, attention, first")
        if self.hidden < 0 or self.labels < 2:
            raise BadInput(f"a head of {self.hidden} hidden units and {self.labels} labels is not possible")


class Head(nn.Module):
    """(B, T, width) hidden states and a (B, T) mask to (B, labels) logits. Padding never counts."""

    def __init__(self, width: int, settings: HeadSettings) -> None:
        super().__init__()
        self.settings = settings
        if settings.pooling == "attention":
            self.attention = nn.Linear(width, 1)
        if settings.hidden:
            self.hidden = nn.Linear(width, settings.hidden)
        self.classifier = nn.Linear(settings.hidden or width, settings.labels)

    def forward(self, states: Tensor, mask: Tensor) -> Tensor:
        pooled = self._pooled(states, mask.bool())
        if self.settings.hidden:
            pooled = torch.tanh(self.hidden(pooled))
        return self.classifier(pooled)

    def _pooled(self, states: Tensor, mask: Tensor) -> Tensor:
        if self.settings.pooling == "first":
            return states[:, 0]
        if self.settings.pooling == "max":
            return states.masked_fill(~mask[..., None], float("-inf")).amax(1)
        if self.settings.pooling == "attention":
            weights = self.attention(states)[..., 0].masked_fill(~mask, float("-inf")).softmax(1)
        else:
            weights = mask.to(states.dtype) / mask.sum(1, keepdim=True)
        return (weights[..., None] * states).sum(1)


class TextClassifier(nn.Module):
    """An encoder under the name that it has in its pretraining model (`bert`, `transformer`, `model`), and a `Head`.

    So that parameters keep their names from stage to stage. `forward` takes `input_ids` and `attention_mask`.
    """

    def __init__(self, encoder: nn.Module, prefix: str, settings: HeadSettings) -> None:
        super().__init__()
        config: Any = encoder.config
        self.config = config
        self.prefix = prefix
        self.add_module(prefix, encoder)
        self.head = Head(int(config.hidden_size), settings)

    @classmethod
    def on(cls, model: nn.Module, settings: HeadSettings, seed: int = 0) -> TextClassifier:
        """Return a classifier on a copy of the encoder of a pretraining model; the head is initialised by the seed."""
        prefix = getattr(model, "base_model_prefix", "")
        if not prefix or not hasattr(model, prefix):
            raise BadInput(f"{type(model).__name__} has no base model; give a Hugging Face pretraining model")
        encoder = copy.deepcopy(getattr(model, prefix))
        torch.manual_seed(seed)
        return cls(encoder, prefix, settings)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        encoder = getattr(self, self.prefix)
        states = encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return self.head(states, attention_mask)

    def get_input_embeddings(self) -> nn.Module:
        """Return the word embeddings, as Hugging Face models do."""
        return getattr(self, self.prefix).get_input_embeddings()

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json, the head's settings and model.safetensors."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.config.save_pretrained(folder)
        settings = {"prefix": self.prefix, **asdict(self.head.settings)}
        (folder / HEAD).write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
        tensors = {name: p.detach().contiguous() for name, p in self.named_parameters()}
        save_file(tensors, folder / _WEIGHTS, metadata={"format": "pt"})

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> TextClassifier:
        """Open what `save_pretrained` wrote."""
        folder = Path(folder)
        settings = json.loads((folder / HEAD).read_text(encoding="utf-8"))
        prefix = settings.pop("prefix")
        config = AutoConfig.from_pretrained(folder)
        try:
            encoder = AutoModel.from_config(config, add_pooling_layer=False)
        except TypeError:  # architectures without a pooler do not know the argument
            encoder = AutoModel.from_config(config)
        model = cls(encoder, prefix, HeadSettings(**settings))
        tensors = load_file(folder / _WEIGHTS)
        expected = {name for name, _ in model.named_parameters()}
        if odd := sorted(expected ^ tensors.keys()):
            raise BadInput(f"{folder / _WEIGHTS}: parameter {odd[0]!r} is missing or not of this model")
        model.load_state_dict(tensors, strict=False)
        return model
