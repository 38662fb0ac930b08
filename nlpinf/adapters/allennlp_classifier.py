"""The network of AllenNLP's `basic_classifier` on an ELMo embedder, in operations that have all derivatives needed here.

    words → ELMo's layers → scalar mix → projection? → LSTM over words? → one vector a text → feedforward? → logits

Built from the `model` section of an archive's config.json, so that any archive of these parts can be opened, trained
on, saved and scored without AllenNLP.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from nlpinf.adapters.elmo.config import ElmoConfig
from nlpinf.adapters.elmo.network import ElmoEncoder
from nlpinf.errors import BadInput
from nlpinf.files import save_tensors

RECIPE = "nlpinf_allennlp.json"
_WEIGHTS = "model.safetensors"

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "linear": lambda x: x,
    "relu": torch.relu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "gelu": F.gelu,
    "elu": F.elu,
    "selu": F.selu,
    "leaky_relu": F.leaky_relu,
    "softplus": F.softplus,
    "swish": F.silu,
    "mish": F.mish,
}
SEQ2SEQ = ("pass_through", "lstm")
SEQ2VEC = ("bag_of_embeddings", "boe", "cls_pooler", "cnn", "lstm")


class Recurrent(nn.Module):
    """`torch.nn.LSTM`, its parameters' names and gate order, over texts at the left of their rows; padding never counts."""

    def __init__(self, inputs: int, hidden: int, layers: int, bidirectional: bool, bias: bool) -> None:
        super().__init__()
        self.ways = [(k, end) for k in range(layers) for end in (("", "_reverse") if bidirectional else ("",))]
        self.width = hidden * (2 if bidirectional else 1)
        self.hidden, self.bias = hidden, bias
        for k, end in self.ways:
            shapes: dict[str, tuple[int, ...]] = {
                "weight_ih": (4 * hidden, self.width if k else inputs),
                "weight_hh": (4 * hidden, hidden),
            }
            shapes |= {"bias_ih": (4 * hidden,), "bias_hh": (4 * hidden,)} if bias else {}
            for name, shape in shapes.items():
                self.register_parameter(f"{name}_l{k}{end}", nn.Parameter(torch.zeros(shape)))

    def forward(self, x: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """(B, T, inputs) to the top layer's outputs (B, T, width), zero past the end, and its last states (B, width)."""
        place = torch.arange(x.shape[1], device=x.device)
        turned = torch.where(place < lengths[:, None], lengths[:, None] - 1 - place, place)
        outputs: dict[int, list[Tensor]] = {}
        last: list[Tensor] = []
        for k, end in self.ways:
            source = torch.cat(outputs[k - 1], -1) if k else x
            reverse = bool(end)
            out = self._run(_taken(source, turned) if reverse else source, f"_l{k}{end}")
            state = _taken(out, lengths[:, None] - 1)[:, 0]
            last = [*last, state] if reverse else [state]
            outputs.setdefault(k, []).append(_taken(out, turned) if reverse else out)
        top = torch.cat(outputs[self.ways[-1][0]], -1)
        return torch.where((place < lengths[:, None])[..., None], top, top.new_zeros(())), torch.cat(last, -1)

    def _run(self, x: Tensor, end: str) -> Tensor:
        names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")[: 4 if self.bias else 2]
        weight, recurrent, *biases = (getattr(self, name + end) for name in names)
        gates = F.linear(x, weight, biases[0] + biases[1] if self.bias else None)
        h = c = x.new_zeros(x.shape[0], self.hidden)
        outputs = []
        for step in gates.unbind(1):
            i, f, g, o = (step + h @ recurrent.T).chunk(4, -1)
            c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
            h = torch.sigmoid(o) * torch.tanh(c)
            outputs.append(h)
        return torch.stack(outputs, 1)


class Convolution(nn.Module):
    """AllenNLP's `cnn` encoder: the maximum over a text's n-grams of each filter, after its activation; 0 without any."""

    def __init__(
        self, inputs: int, filters: int, sizes: Sequence[int], activation: str, output_dim: int | None
    ) -> None:
        super().__init__()
        self.sizes, self.activation = list(sizes), ACTIVATIONS[activation]
        for k, size in enumerate(self.sizes):
            self.add_module(f"conv_layer_{k}", nn.Conv1d(inputs, filters, size))
        self.width = output_dim or filters * len(self.sizes)
        self.projection_layer = nn.Linear(filters * len(self.sizes), output_dim) if output_dim else None

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        """(B, T, inputs) to (B, width)."""
        x = F.pad(x.transpose(1, 2), (0, max(self.sizes) - 1))
        found = []
        for k, size in enumerate(self.sizes):
            values = self.activation(self.get_submodule(f"conv_layer_{k}")(x))
            beyond = torch.arange(values.shape[2], device=x.device) > (lengths - size)[:, None]
            best = values.masked_fill(beyond[:, None], float("-inf")).amax(-1)
            found.append(best.masked_fill((lengths < size)[:, None], 0.0))
        out = torch.cat(found, 1)
        return out if self.projection_layer is None else self.projection_layer(out)


class ArchiveHead(nn.Module):
    """What stands on ELMo's layers; `recipe` is the `model` section of the archive's config.json."""

    def __init__(self, recipe: dict[str, Any], layers: int, width: int, labels: int, source: str) -> None:
        super().__init__()
        self.mix, self.scale = nn.Parameter(torch.zeros(layers)), nn.Parameter(torch.ones(()))
        embedder = embedder_of(recipe, source)
        projection = embedder.get("projection_dim")
        self.projection = nn.Linear(width, int(projection)) if projection else None
        width = int(projection or width)
        over, into = recipe.get("seq2seq_encoder") or {}, recipe["seq2vec_encoder"]
        self.over = _recurrent(over, width) if over.get("type") == "lstm" else None
        width = width if self.over is None else self.over.width
        self.kind, self.averaged = into["type"], bool(into.get("averaged", False))
        self.into: nn.Module | None = None
        if self.kind == "lstm":
            recurrent = _recurrent(into, width)
            self.into, width = recurrent, recurrent.width
        elif self.kind == "cnn":
            sizes = into.get("ngram_filter_sizes", (2, 3, 4, 5))
            activation = into.get("conv_layer_activation", "relu")
            convolution = Convolution(width, int(into["num_filters"]), sizes, activation, into.get("output_dim"))
            self.into, width = convolution, convolution.width
        self.activations: list[str] = []
        self.feedforward = nn.ModuleList()
        if forward := recipe.get("feedforward"):
            count = int(forward["num_layers"])
            hidden, names = forward["hidden_dims"], forward["activations"]
            for size in [hidden] * count if isinstance(hidden, int) else hidden:
                self.feedforward.append(nn.Linear(width, int(size)))
                width = int(size)
            self.activations = [names] * count if isinstance(names, str) else list(names)
        self.classifier = nn.Linear(width, labels)

    def forward(self, layers: Sequence[Tensor], mask: Tensor) -> Tensor:
        """Layers (B, T, width), zero past the end, and the mask (B, T) to logits (B, labels)."""
        lengths = mask.sum(1)
        x = self.scale * torch.einsum("k,kbtd->btd", self.mix.softmax(0), torch.stack(tuple(layers)))
        x = x if self.projection is None else self.projection(x)
        x = x if self.over is None else self.over(x, lengths)[0]
        x = torch.where(mask[..., None].bool(), x, x.new_zeros(()))
        if isinstance(self.into, Recurrent):
            x = self.into(x, lengths)[1]
        elif self.into is not None:
            x = self.into(x, lengths)
        elif self.kind == "cls_pooler":
            x = x[:, 0]
        else:
            x = x.sum(1) / lengths[:, None] if self.averaged else x.sum(1)
        for linear, name in zip(self.feedforward, self.activations):
            x = ACTIVATIONS[name](linear(x))
        return self.classifier(x)


class ArchiveClassifier(nn.Module):
    """An ELMo encoder, its parameters named as in `ElmoLM`, and the head that the archive's config describes."""

    prefix = "encoder"

    def __init__(
        self, config: ElmoConfig, recipe: dict[str, Any], labels: Sequence[str], source: str = "config.json"
    ) -> None:
        super().__init__()
        check_recipe(recipe, source)
        self.config, self.recipe, self.labels = config, recipe, list(labels)
        self.encoder = ElmoEncoder(config)
        self.head = ArchiveHead(recipe, config.layers + 1, config.hidden_size, len(self.labels), source)

    def forward(self, distinct: Tensor, index: Tensor, lengths: Tensor) -> Tensor:
        """Logits (B, labels) of a batch of words; see `ElmoEncoder`."""
        return self.head(*self.encoder.states(distinct, index, lengths))

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json, the archive's model section and labels, and model.safetensors."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.config.save_pretrained(folder)
        content = {"model": self.recipe, "labels": self.labels}
        (folder / RECIPE).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        tensors = {name: p.detach().contiguous() for name, p in self.named_parameters()}
        save_tensors(tensors, folder / _WEIGHTS, metadata={"format": "pt"})

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> ArchiveClassifier:
        """Open what `save_pretrained` wrote."""
        folder = Path(folder)
        try:
            content = json.loads((folder / RECIPE).read_text(encoding="utf-8"))
            recipe, labels = content["model"], content["labels"]
        except (ValueError, KeyError, TypeError) as error:
            raise BadInput(f"{folder / RECIPE}: cannot be read ({error}); convert the archive again") from None
        model = cls(ElmoConfig.from_pretrained(folder)[0], recipe, labels, str(folder / RECIPE))
        load_tensors(model, load_file(folder / _WEIGHTS), str(folder / _WEIGHTS))
        return model.eval()


def load_tensors(module: nn.Module, tensors: dict[str, Tensor], source: str) -> None:
    """Copy tensors into a module's parameters; `BadInput` for a missing, superfluous, misshapen or non-finite one."""
    wanted = {name: tuple(p.shape) for name, p in module.named_parameters()}
    for name in sorted({*wanted, *tensors}):
        found = tuple(tensors[name].shape) if name in tensors else None
        if found != wanted.get(name):
            raise BadInput(
                f"{source}: {name} has shape {found}, expected {wanted.get(name)} by its config; use the files of one model"
            )
        if not bool(torch.isfinite(tensors[name]).all()):
            raise BadInput(f"{source}: {name} has NaN or infinite entries; use a checkpoint from before")
    module.to(next(iter(tensors.values())).dtype)
    module.load_state_dict(tensors, strict=False)


def embedder_of(recipe: dict[str, Any], source: str) -> dict[str, Any]:
    """Return the settings of the model's one token embedder, ELMo's; `empty` ones, which give nothing, may stand beside it."""
    field = recipe.get("text_field_embedder") or {}
    known = field.get("token_embedders") or {k: v for k, v in field.items() if isinstance(v, dict)}
    giving = [value for value in known.values() if value.get("type") != "empty"]
    kinds = [str(value.get("type")) for value in giving]
    if kinds != ["elmo_token_embedder"]:
        raise BadInput(
            f"{source}: the token embedders are {', '.join(kinds) or 'none'}; supported is one elmo_token_embedder, "
            "beside which others may be empty"
        )
    return giving[0]


def check_recipe(recipe: Any, source: str) -> None:
    """Raise `BadInput`, naming what is supported, for a model that `ArchiveHead` cannot be."""
    if not isinstance(recipe, dict) or recipe.get("type") != "basic_classifier":
        kind = recipe.get("type") if isinstance(recipe, dict) else None
        raise BadInput(
            f"{source}: the model type {kind!r} is not supported; supported is basic_classifier with an "
            f"elmo_token_embedder, a seq2vec_encoder of {', '.join(SEQ2VEC)} and a seq2seq_encoder of none, {', '.join(SEQ2SEQ)}"
        )
    for name in ("text_field_embedder", "seq2seq_encoder", "seq2vec_encoder", "feedforward"):
        if not isinstance(recipe.get(name) or {}, dict):
            raise BadInput(f"{source}: {name} is {recipe[name]!r}; expected an object with its settings")
    if recipe.get("regularizer"):
        raise BadInput(
            f"{source}: the regularizer is part of what this model minimised, and is not supported; train without it, with "
            "the optimizer's weight_decay if need be"
        )
    embedder = embedder_of(recipe, source)
    if embedder.get("do_layer_norm"):
        raise BadInput(
            f"{source}: do_layer_norm normalises over the whole batch, so that a text has no loss of its own; "
            "train without it"
        )
    for name, known in (("seq2seq_encoder", (None, *SEQ2SEQ)), ("seq2vec_encoder", SEQ2VEC)):
        kind = (recipe.get(name) or {}).get("type")
        if kind not in known:
            told = ", ".join(str(k) for k in known if k is not None)
            raise BadInput(f"{source}: the {name} {kind!r} is not supported; supported are {told}")
    last = recipe["seq2vec_encoder"]
    if last.get("cls_is_last_token"):
        raise BadInput(f"{source}: cls_is_last_token is not supported; supported is a cls_pooler of the first token")
    forward = recipe.get("feedforward") or {}
    names = forward.get("activations", [])
    for name in [*([names] if isinstance(names, str) else names), last.get("conv_layer_activation", "relu")]:
        if (name if isinstance(name, str) else None) not in ACTIVATIONS:
            raise BadInput(
                f"{source}: the activation {name!r} is not supported; supported are {', '.join(ACTIVATIONS)}"
            )


def _recurrent(settings: dict[str, Any], width: int) -> Recurrent:
    layers, both = int(settings.get("num_layers", 1)), bool(settings.get("bidirectional", False))
    return Recurrent(width, int(settings["hidden_size"]), layers, both, bool(settings.get("bias", True)))


def _taken(x: Tensor, place: Tensor) -> Tensor:
    """Return x[b, place[b, t]] for x (B, T, width) and place (B, n): (B, n, width)."""
    return torch.gather(x, 1, place[..., None].expand(-1, -1, x.shape[2]))
