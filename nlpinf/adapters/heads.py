"""Classification heads on any encoder, a transformer's or ELMo's: layers, a BiLSTM, pooling, then linear or one hidden layer.

Source of the scalar mix: Peters et al., NAACL 2018, equation 1.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel

from nlpinf.adapters.elmo.config import MODEL_TYPE, ElmoConfig
from nlpinf.adapters.elmo.network import ElmoEncoder, Packing, ProjectedLSTM, greatest
from nlpinf.errors import BadInput
from nlpinf.files import save_tensors
from nlpinf.stages import evaluation

Layers = Literal["last", "mix"]
Pooling = Literal["mean", "max", "attention", "first"]
HEAD = "nlpinf_head.json"
_WEIGHTS = "model.safetensors"


ENCODERS: dict[str, Callable[[Path], nn.Module]] = {
    MODEL_TYPE: lambda folder: ElmoEncoder(ElmoConfig.from_pretrained(folder)[0])
}
"""Encoders that are not transformers', by the `model_type` of their config.json: made, without weights, from a folder.

Each has a `config` with `hidden_size`, `num_hidden_layers` and `save_pretrained`, and `states(**inputs)`, which returns
the layers (B, T, width), the lowest first, and the (B, T) mask.
"""


@dataclass(frozen=True)
class HeadSettings:
    """What stands on an encoder, from below.

    `layers`   "last", or "mix": γ Σ_k softmax(s)_k h_k of all layers, the embeddings' among them, γ and s being trained
    `lstm`     units in each direction of a bidirectional LSTM over the tokens, 0 for none
    `pooling`  over the tokens: "mean", "max", "attention" (a trained softmax over tokens) or "first"
    `hidden`   units of one tanh layer, 0 for a linear head
    """

    pooling: Pooling = "mean"
    hidden: int = 0
    labels: int = 2
    layers: Layers = "last"
    lstm: int = 0

    def __post_init__(self) -> None:
        if self.pooling not in ("mean", "max", "attention", "first"):
            raise BadInput(f"pooling {self.pooling!r} is none of mean, max, attention, first")
        if self.layers not in ("last", "mix"):
            raise BadInput(f"layers {self.layers!r} is neither last nor mix")
        if self.hidden < 0 or self.lstm < 0 or self.labels < 2:
            raise BadInput(
                f"a head of {self.hidden} hidden units, {self.lstm} LSTM units and {self.labels} labels is not possible"
            )

    @property
    def linear(self) -> bool:
        """Whether the logits are linear in the head's parameters, so that its loss is convex."""
        return not self.hidden and not self.lstm and self.layers == "last" and self.pooling != "attention"


class Head(nn.Module):
    """Layers of hidden states, each (B, T, width), and a (B, T) mask to (B, labels) logits. Padding never counts."""

    def __init__(self, width: int, settings: HeadSettings, layers: int = 1) -> None:
        super().__init__()
        self.settings = settings
        if settings.layers == "mix":
            self.mix, self.scale = nn.Parameter(torch.zeros(layers)), nn.Parameter(torch.ones(()))
        if settings.lstm:
            self.lstm = ProjectedLSTM(width, settings.lstm, settings.lstm, None, None)
            width = 2 * settings.lstm
        if settings.pooling == "attention":
            self.attention = nn.Linear(width, 1)
        if settings.hidden:
            self.hidden = nn.Linear(width, settings.hidden)
        self.classifier = nn.Linear(settings.hidden or width, settings.labels)

    def forward(self, layers: Sequence[Tensor], mask: Tensor) -> Tensor:
        states = layers[-1]
        if self.settings.layers == "mix":
            states = self.scale * torch.einsum("k,kbtd->btd", self.mix.softmax(0), torch.stack(tuple(layers)))
        if self.settings.lstm:
            states = self._recurrent(states, mask.sum(1))
        pooled = self._pooled(states, mask.bool())
        if self.settings.hidden:
            pooled = torch.tanh(self.hidden(pooled))
        return self.classifier(pooled)

    def _recurrent(self, states: Tensor, lengths: Tensor) -> Tensor:
        """(B, T, width) to (B, T, 2 lstm), zeros past the end; texts stand at the left of their rows."""
        batch, width, _ = states.shape
        packing = Packing.of(lengths, width, last=True)
        x = F.embedding(packing.tokens, states.flatten(0, 1))
        out, _ = self.lstm(self.lstm.gates(x), packing.sizes, None, False)
        # The slot that read each token; tokens past the end read one zero row behind all slots.
        count = packing.tokens.shape[1]
        where = packing.tokens.new_full((2, batch * width), count)
        where.scatter_(1, packing.tokens, torch.arange(count, device=where.device).expand(2, count))
        out = torch.cat([out, out.new_zeros(2, 1, out.shape[2])], 1)
        return torch.cat([F.embedding(i, o) for i, o in zip(where, out)], -1).view(batch, width, -1)

    def _pooled(self, states: Tensor, mask: Tensor) -> Tensor:
        if self.settings.pooling == "first":
            return states[:, 0]
        if self.settings.pooling == "max":
            return greatest(states.masked_fill(~mask[..., None], float("-inf")), 1)
        if self.settings.pooling == "attention":
            weights = self.attention(states)[..., 0].masked_fill(~mask, float("-inf")).softmax(1)
        else:
            weights = mask.to(states.dtype) / mask.sum(1, keepdim=True)
        return (weights[..., None] * states).sum(1)


class TextClassifier(nn.Module):
    """An encoder under the name that it has in its pretraining model (`bert`, `transformer`, `encoder`), and a `Head`.

    So that parameters keep their names from stage to stage. `forward` takes what the encoder takes.
    """

    def __init__(self, encoder: nn.Module, prefix: str, settings: HeadSettings) -> None:
        super().__init__()
        config: Any = encoder.config
        self.config = config
        self.prefix = prefix
        self.add_module(prefix, encoder)
        self.head = Head(_width(encoder), settings, int(config.num_hidden_layers) + 1)

    @classmethod
    def on(cls, model: nn.Module, settings: HeadSettings, seed: int = 0) -> TextClassifier:
        """Return a classifier on a copy of the encoder of a pretraining model; the head is initialised by the seed."""
        prefix = getattr(model, "base_model_prefix", "")
        if not prefix or not hasattr(model, prefix):
            raise BadInput(
                f"{type(model).__name__} has no base model; give a Hugging Face pretraining model or an ElmoLM"
            )
        encoder = copy.deepcopy(getattr(model, prefix))
        torch.manual_seed(seed)
        classifier = cls(encoder, prefix, settings)
        classifier.head.to(next(encoder.parameters()))
        return classifier

    def forward(self, **inputs: Tensor) -> Tensor:
        """Logits (B, labels) of what the encoder takes: `input_ids` and `attention_mask`, say."""
        return self.head(*self.states(**inputs))

    def states(self, **inputs: Tensor) -> tuple[Sequence[Tensor], Tensor]:
        """Return the encoder's layers (B, T, width) that the head uses, and the (B, T) mask."""
        encoder = getattr(self, self.prefix)
        if hasattr(encoder, "states"):
            return encoder.states(**inputs)
        if self.head.settings.layers == "mix":
            return encoder(**inputs, output_hidden_states=True).hidden_states, inputs["attention_mask"]
        return [encoder(**inputs).last_hidden_state], inputs["attention_mask"]

    def get_input_embeddings(self) -> nn.Module | None:
        """Return the word embeddings, as Hugging Face models do; None where the encoder has none."""
        find = getattr(getattr(self, self.prefix), "get_input_embeddings", None)
        return None if find is None else find()

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json, the head's settings and model.safetensors."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.config.save_pretrained(folder)
        settings = {"prefix": self.prefix, **asdict(self.head.settings)}
        (folder / HEAD).write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
        tensors = {name: p.detach().contiguous() for name, p in self.named_parameters()}
        save_tensors(tensors, folder / _WEIGHTS, metadata={"format": "pt"})

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> TextClassifier:
        """Open what `save_pretrained` wrote."""
        folder = Path(folder)
        settings = json.loads((folder / HEAD).read_text(encoding="utf-8"))
        prefix = settings.pop("prefix")
        model = cls(_encoder(folder), prefix, HeadSettings(**settings))
        tensors = load_file(folder / _WEIGHTS)
        expected = {name for name, _ in model.named_parameters()}
        if odd := sorted(expected ^ tensors.keys()):
            raise BadInput(f"{folder / _WEIGHTS}: parameter {odd[0]!r} is missing or not of this model")
        model.to(next(iter(tensors.values())).dtype)
        model.load_state_dict(tensors, strict=False)
        return model


def _width(encoder: nn.Module) -> int:
    """Return the width of the encoder's last layer; the config does not always tell (OPT's may be projected)."""
    if hasattr(encoder, "states"):
        return int(encoder.config.hidden_size)  # type: ignore[union-attr, arg-type]
    with evaluation(encoder), torch.no_grad():
        ids = torch.zeros(1, 1, dtype=torch.int64, device=next(encoder.parameters()).device)
        return int(encoder(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state.shape[-1])


def _encoder(folder: Path) -> nn.Module:
    kind = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
    if kind in ENCODERS:
        return ENCODERS[kind](folder)
    config = AutoConfig.from_pretrained(folder)
    try:
        return AutoModel.from_config(config, add_pooling_layer=False)
    except TypeError:  # architectures without a pooler do not know the argument
        return AutoModel.from_config(config)
