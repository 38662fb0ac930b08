"""AllenNLP's ELMo, as a live module or a model archive, becomes a stage. AllenNLP itself is needed only for the former.

A live `Elmo` or `_ElmoBiLm` is translated into `ElmoEncoder` and both are run on the same words. An archive
(`model.tar.gz`: config.json, weights.th, vocabulary/) of a `basic_classifier` with an ELMo embedder is read as it is,
its weights with `weights_only=True`, and built anew.

AllenNLP carries the LSTM's states from batch to batch, here every text starts from zero states, so that its loss is a
function of the text: its logits are those of AllenNLP's model on the first batch after opening, or after `reset_states()`.
"""

from __future__ import annotations

import io
import json
import pickle
import re
import tarfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nlpinf.adapters.allennlp_classifier import ArchiveClassifier, check_recipe, embedder_of, load_tensors
from nlpinf.adapters.elmo.config import ElmoConfig
from nlpinf.adapters.elmo.files import load_arrays, read_options, read_softmax
from nlpinf.adapters.elmo.language_model import ElmoLM
from nlpinf.adapters.elmo.network import ElmoEncoder
from nlpinf.data.characters import character_batch
from nlpinf.data.vocabulary import Vocabulary
from nlpinf.errors import BadInput
from nlpinf.stages import Stage
from nlpinf.tasks import BidirectionalLM, WordClassification

AGREEMENT = 1e-5
"""How far the outputs of a live module and of its translation may differ, relative to the largest output."""
_PROBE = [["a", "fine", "film", "!"], ["naïve"], ["an", "extraordinarily-uninteresting-one", "…"]]


def encoder_of(module: nn.Module) -> ElmoEncoder:
    """Return a live `Elmo`, `_ElmoBiLm` or `ElmoTokenEmbedder` as an `ElmoEncoder` with the same outputs.

    Raises `BadInput` if the module is none of these, or if the two differ on probe words.
    """
    bilm = _bilm(module)
    config = ElmoConfig.from_options(bilm._token_embedder._options, f"the options of {type(module).__name__}")
    # Words that the module computed ahead (`vocab_to_cache`) are no parameters.
    state = {n: t.detach().cpu() for n, t in bilm.state_dict().items() if not n.startswith("_word_embedding.")}
    encoder = _encoder(config, state, f"the state of {type(module).__name__}")
    _compare(bilm, encoder)
    return encoder


def language_model_of(
    module: nn.Module, softmax: str | Path | nn.Linear | None, vocabulary: Vocabulary, seed: int = 0
) -> ElmoLM:
    """Return a live module with its softmax as a language model.

    `softmax`  bilm-tf's softmax .hdf5, a linear layer (projection → words), or None: a new one, drawn by the seed, which
               has to be fitted before its scores mean anything
    """
    encoder = encoder_of(module)
    torch.manual_seed(seed)
    model = ElmoLM(encoder.config, len(vocabulary))
    model.encoder = encoder
    if softmax is not None:
        linear = isinstance(softmax, nn.Linear)
        source = "the softmax" if linear else str(softmax)
        weight, bias = (
            _of_linear(softmax)  # type: ignore[arg-type]
            if linear
            else read_softmax(softmax, encoder.config.projection_dim)  # type: ignore[arg-type]
        )
        vocabulary.check_size(len(bias), source)
        if weight.shape[1] != encoder.config.projection_dim:
            raise BadInput(
                f"{source}: takes {weight.shape[1]} numbers, the encoder gives {encoder.config.projection_dim} a direction"
            )
        model.head.weight, model.head.bias = nn.Parameter(weight), nn.Parameter(bias)
    return model.eval()


def stage_of(
    module: nn.Module,
    data: Sequence[Any],
    vocabulary: Vocabulary,
    softmax: str | Path | nn.Linear | None = None,
    *,
    task: dict[str, Any] | None = None,
    **settings: Any,
) -> Stage:
    """Return the pretraining stage of a live module: `data` are texts, `task` settings of `BidirectionalLM`, the others `Stage`'s."""
    model = language_model_of(module, softmax, vocabulary)
    settings = {"name": "pretrain", **settings}
    return Stage(model, BidirectionalLM(vocabulary, **(task or {})), data, **settings)


@dataclass(frozen=True)
class Archive:
    """A classifier read from an archive, the names of its classes, and the parameters that its training moved."""

    model: ArchiveClassifier
    labels: tuple[str, ...]
    trained: tuple[str, ...] | None
    source: str

    def stage(self, data: Sequence[Any], *, task: dict[str, Any] | None = None, **settings: Any) -> Stage:
        """Return the finetuning stage: `data` are mappings with `text` (words between spaces) and `label`, a name or number.

        `task` are settings of `WordClassification`, the others `Stage`'s.
        """
        if "trained" not in settings:
            if self.trained is None:
                raise BadInput(
                    f"{self.source}: trainer.no_grad kept some parameters fixed; name those that were trained (trained=[...])"
                )
            settings["trained"] = self.trained
        words = {"labels": len(self.labels), "max_characters": self.model.config.max_characters, **(task or {})}
        rows = [self._row(number, row) for number, row in enumerate(data)]
        return Stage(self.model, WordClassification(**words), rows, **{"name": "finetune", **settings})

    def _row(self, number: int, row: Any) -> Any:
        label = row.get("label") if isinstance(row, dict) else None
        if not isinstance(label, str):
            return row
        if label not in self.labels:
            raise BadInput(
                f"row {number}: the label {label!r} is not one of {self.source}: {', '.join(map(repr, self.labels))}"
            )
        return {**row, "label": self.labels.index(label)}


def read_archive(path: str | Path, options: str | Path | None = None) -> Archive:
    """Read a model archive, or the folder that AllenNLP trained into.

    `options`  ELMo's options.json, where the path in the archive's config does not lead to it (it is often a web address)
    """
    files = _files(Path(path))
    config = _json(path, files["config.json"])
    recipe = config.get("model")
    source = f"{path}: config.json"
    check_recipe(recipe, source)
    assert isinstance(recipe, dict)
    embedder = embedder_of(recipe, source)
    elmo = _options(Path(path), embedder, options)
    namespace = recipe.get("label_namespace", "labels")
    names = files.get(f"vocabulary/{namespace}.txt", b"").decode("utf-8").splitlines()
    count = int(recipe.get("num_labels") or len(names))
    if count < 2 or (names and len(names) > count):
        raise BadInput(
            f"{path}: vocabulary/{namespace}.txt has {len(names)} labels, the model {count}; expected the same, 2 or more"
        )
    names += [str(k) for k in range(len(names), count)]
    with torch.device("meta"):
        model = _built(elmo, recipe, names, source)
    state = _weights(path, files["weights.th"])
    root = _embedder_root(state, f"{path}: weights.th")
    model.encoder = _encoder(elmo, _under(state, f"{root}_elmo._elmo_lstm."), f"{path}: weights.th")
    model.head.to_empty(device="cpu")
    load_tensors(model.head, _head(state, root), f"{path}: weights.th")
    fixed = [] if embedder.get("scalar_mix_parameters") is None else ["head.mix", "head.scale"]
    tuned = bool(embedder.get("requires_grad", False))
    names_of = [n for n, _ in model.named_parameters() if n not in fixed and (tuned or not n.startswith("encoder."))]
    chosen = bool((config.get("trainer") or {}).get("no_grad"))
    return Archive(model.eval(), tuple(names), None if chosen else tuple(names_of), str(path))


def stage_of_archive(
    path: str | Path, data: Sequence[Any], *, options: str | Path | None = None, **settings: Any
) -> Stage:
    """Return the finetuning stage of a model archive; see `read_archive` and `Archive.stage`."""
    return read_archive(path, options).stage(data, **settings)


def _built(elmo: ElmoConfig, recipe: dict[str, Any], names: list[str], source: str) -> ArchiveClassifier:
    try:
        return ArchiveClassifier(elmo, recipe, names, source)
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, BadInput):
            raise
        raise BadInput(
            f"{source}: the model's field {error} is missing or of another type; use the archive's own"
        ) from None


def _bilm(module: Any) -> Any:
    for name in ("_elmo", "_elmo_lstm"):
        if not hasattr(module, "_token_embedder") and hasattr(module, name):
            module = getattr(module, name)
    if not hasattr(module, "_token_embedder") or not hasattr(module, "_elmo_lstm"):
        raise BadInput(
            f"{type(module).__name__} is not supported; supported are AllenNLP's Elmo, _ElmoBiLm and ElmoTokenEmbedder"
        )
    return module


def _encoder(config: ElmoConfig, state: dict[str, Tensor], source: str) -> ElmoEncoder:
    with torch.device("meta"):
        encoder = ElmoEncoder(config)
    encoder.to_empty(device="cpu")
    load_arrays(encoder, _arrays(state), source, "the model's options")
    return encoder.eval()


def _arrays(state: dict[str, Tensor]) -> dict[str, np.ndarray]:
    """An `_ElmoBiLm`'s state in the names and layout of bilm-tf's weights file."""
    arrays: dict[str, Tensor] = {}
    for name, tensor in state.items():
        part, _, rest = name.partition(".")
        words = rest.split(".")
        if part == "_token_embedder":
            if rest == "_char_embedding_weights":
                arrays["char_embed"] = tensor
            elif words[0].startswith("char_conv_"):
                k = words[0].removeprefix("char_conv_")
                filters = words[1] == "weight"
                arrays[f"CNN/{'W' if filters else 'b'}_cnn_{k}"] = tensor.permute(2, 1, 0)[None] if filters else tensor
            elif words[0] == "_highways":
                # AllenNLP's gate is 1 − bilm-tf's carry gate: the signs turn.
                transform, carry = tensor.chunk(2)
                letter, k = ("W", words[2]) if words[3] == "weight" else ("b", words[2])
                arrays[f"CNN_high_{k}/{letter}_transform"] = transform.T if letter == "W" else transform
                arrays[f"CNN_high_{k}/{letter}_carry"] = -(carry.T if letter == "W" else carry)
            elif words[0] == "_projection":
                kind = words[1] == "weight"
                arrays[f"CNN_proj/{'W' if kind else 'b'}_proj"] = tensor.T if kind else tensor
            else:
                arrays[name] = tensor
        elif part == "_elmo_lstm" and words[0].partition("_layer_")[0] in ("forward", "backward"):
            way, _, k = words[0].partition("_layer_")
            root = f"RNN_{int(way == 'backward')}/RNN/MultiRNNCell/Cell{k}/LSTMCell"
            if words[1] == "state_projection":
                arrays[f"{root}/W_P_0"] = tensor.T
            elif words[1:] == ["state_linearity", "bias"]:
                bias = _reordered(tensor).clone()
                bias.view(4, -1)[2] -= 1.0  # bilm-tf adds 1 to the forget gate as it runs
                arrays[f"{root}/B"] = bias
            elif words[1] == "input_linearity":
                state_part = state.get(f"_elmo_lstm.{words[0]}.state_linearity.weight")
                if state_part is None:
                    continue  # the array is missing then, which is told by its name
                arrays[f"{root}/W_0"] = torch.cat([_reordered(tensor), _reordered(state_part)], 1).T
        else:
            arrays[name] = tensor
    return {name: tensor.contiguous().numpy() for name, tensor in arrays.items()}


def _of_linear(layer: nn.Linear) -> tuple[Tensor, Tensor]:
    """Return a layer's weight and bias, zeros where it has none."""
    weight = layer.weight.detach().clone()
    return weight, weight.new_zeros(len(weight)) if layer.bias is None else layer.bias.detach().clone()


def _reordered(gates: Tensor) -> Tensor:
    i, f, j, o = gates.chunk(4)
    return torch.cat([i, j, f, o])


def _compare(bilm: Any, encoder: ElmoEncoder) -> None:
    """Run both on probe words; the module's mode and states are left as they were."""
    batch = character_batch(_PROBE, encoder.config.max_characters)
    ids = batch.distinct[batch.index[:, 1:-1]]
    inside = torch.arange(ids.shape[1]) < (batch.lengths - 2)[:, None]
    ids = torch.where(inside[..., None], ids, ids.new_zeros(()))
    lstm, training = bilm._elmo_lstm, bilm.training
    parameter = next(bilm.parameters())
    kept, lstm._states = lstm._states, None
    try:
        with torch.no_grad():
            theirs = bilm.eval()(ids.to(parameter.device))["activations"]
            ours = encoder(batch.distinct, batch.index, batch.lengths)
    finally:
        lstm._states = kept
        bilm.train(training)
    where = inside.nonzero(as_tuple=True)
    for k, (a, b) in enumerate(zip(theirs, ours)):
        a, b = a.cpu()[where[0], where[1] + 1].to(b.dtype), b[where]
        gap = float((a - b).abs().max() / a.abs().max().clamp(min=1.0))
        if not gap <= AGREEMENT:
            raise BadInput(
                f"the module's layer {k} differs by {gap:.2g} from the network of its options; supported is an unchanged _ElmoBiLm"
            )


def _files(path: Path) -> dict[str, bytes]:
    """Return an archive's (or folder's) config.json, weights.th and vocabulary/*.txt, whole, in one pass."""

    def wanted(name: str) -> bool:
        return (
            name in ("config.json", "weights.th", "best.th") or re.fullmatch(r"vocabulary/[^/]+\.txt", name) is not None
        )

    files: dict[str, bytes] = {}
    try:
        if path.is_dir():
            found = [file for file in path.rglob("*") if file.is_file()]
            files = {n: file.read_bytes() for file in found if wanted(n := file.relative_to(path).as_posix())}
        else:
            with tarfile.open(path, "r:*") as tar:
                for member in tar:
                    file = tar.extractfile(member) if wanted(member.name.removeprefix("./")) else None
                    if file is not None:
                        files[member.name.removeprefix("./")] = file.read()
    except FileNotFoundError:
        raise BadInput(f"{path}: no such file; expected a model archive (model.tar.gz)") from None
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        detail = " ".join(str(error).split())
        raise BadInput(f"{path}: truncated or no tar archive ({detail}); copy or make it again") from None
    files.setdefault("weights.th", files.pop("best.th", b""))  # what training leaves before it is archived
    for name in ("config.json", "weights.th"):
        if not files.get(name):
            raise BadInput(
                f"{path}: has no {name}; expected a model archive with config.json, weights.th and vocabulary/"
            )
    return files


def _json(path: Any, content: bytes) -> dict[str, Any]:
    try:
        found = json.loads(content)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise BadInput(f"{path}: config.json is not a JSON object; make the archive again")
    return found


def _weights(path: Any, content: bytes) -> dict[str, Tensor]:
    try:
        state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, ValueError) as error:
        detail = " ".join(str(error).split())[:160]
        raise BadInput(
            f"{path}: weights.th holds no plain tensors or is damaged ({detail}); save the weights again"
        ) from None
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise BadInput(f"{path}: weights.th is not a model's state; expected tensors by name")
    return state


def _options(path: Path, embedder: dict[str, Any], given: str | Path | None) -> ElmoConfig:
    if given is not None:
        return read_options(given)
    named = embedder.get("options_file")
    for file in () if named is None else (Path(named), path.parent / named):
        if file.is_file():
            return read_options(file)
    raise BadInput(
        f"{path}: ELMo's options file {named} is not at hand; give the options.json of its weights (options=...)"
    )


def _embedder_root(state: dict[str, Tensor], source: str) -> str:
    mark = "_elmo._elmo_lstm._token_embedder."
    roots = {name.partition(mark)[0] for name in state if mark in name}
    if len(roots) != 1:
        raise BadInput(f"{source}: holds {len(roots)} ELMo encoders, expected one")
    return roots.pop()


def _under(state: dict[str, Tensor], root: str) -> dict[str, Tensor]:
    return {name.removeprefix(root): tensor for name, tensor in state.items() if name.startswith(root)}


def _head(state: dict[str, Tensor], root: str) -> dict[str, Tensor]:
    """The state outside ELMo's encoder in the names of `ArchiveHead`; what it has no name for keeps its own."""
    places = {
        f"{root}_projection.": "projection.",
        "_seq2seq_encoder._module.": "over.",
        "_seq2vec_encoder._module.": "into.",
        "_seq2vec_encoder.": "into.",
        "_feedforward._linear_layers.": "feedforward.",
        "_classification_layer.": "classifier.",
    }
    mix = f"{root}_elmo.scalar_mix_0."
    found: dict[str, Tensor] = {}
    weights: dict[int, Tensor] = {}
    for name, tensor in state.items():
        if name.startswith(f"{root}_elmo._elmo_lstm."):
            continue
        if name == f"{mix}gamma":
            found["scale"] = tensor.reshape(())
        elif name.startswith(f"{mix}scalar_parameters."):
            weights[int(name.rpartition(".")[2])] = tensor.reshape(())
        else:
            start = next((s for s in places if name.startswith(s)), "")
            found[places.get(start, "") + name.removeprefix(start)] = tensor
    if weights:
        found["mix"] = torch.stack([weights[k] for k in sorted(weights)])
    return found
