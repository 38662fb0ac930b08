"""bilm-tf's files: options.json, weights .hdf5 and softmax .hdf5, read and written, names and layout unchanged.

In the file every matrix is (inputs, outputs) and an LSTM kernel is one array of input rows above state rows, its
columns i, j, f, o; a filter is (1, width, character_dim, count).  Here a matrix is (outputs, inputs), as torch has it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nlpinf.adapters.elmo.config import ElmoConfig
from nlpinf.adapters.elmo.language_model import ElmoLM
from nlpinf.adapters.elmo.network import ElmoEncoder
from nlpinf.data.characters import ALPHABET
from nlpinf.data.vocabulary import Vocabulary
from nlpinf.errors import BadInput

SOFTMAX_WEIGHT, SOFTMAX_BIAS = "softmax/W", "softmax/b"


def read_options(path: str | Path) -> ElmoConfig:
    """The configuration in an options.json."""
    try:
        options = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BadInput(f"{path}: no such file; give the options.json that came with the weights") from None
    except OSError as error:
        raise BadInput(f"{path}: cannot be read ({error.strerror}); check the file") from None
    except ValueError as error:
        raise BadInput(f"{path}: not JSON ({error}); use the options.json that came with the weights") from None
    return ElmoConfig.from_options(options, str(path))


def read_encoder(options: str | Path, weights: str | Path) -> ElmoEncoder:
    """An encoder in evaluation mode from bilm-tf's two files, float32."""
    config = read_options(options)
    with torch.device("meta"):
        encoder = ElmoEncoder(config)
    encoder.to_empty(device="cpu")
    load_arrays(encoder, read_arrays(weights), str(weights), str(options))
    return encoder.eval()


def read_language_model(
    options: str | Path, weights: str | Path, softmax: str | Path, vocabulary: Vocabulary | None = None
) -> ElmoLM:
    """Encoder and head from bilm-tf's files; the vocabulary, where given, must have a word for each softmax row."""
    config = read_options(options)
    weight, bias = read_softmax(softmax, config.projection_dim)
    if vocabulary is not None:
        vocabulary.check_size(len(bias), str(softmax))
    with torch.device("meta"):
        model = ElmoLM(config, len(bias))
    model.encoder = read_encoder(options, weights)
    model.head.weight, model.head.bias = nn.Parameter(weight), nn.Parameter(bias)
    return model.eval()


def read_softmax(path: str | Path, projection_dim: int | None = None) -> tuple[Tensor, Tensor]:
    """(weight (V, projection), bias (V,)) of a softmax file, float32."""
    arrays = read_arrays(path)
    for name in (SOFTMAX_WEIGHT, SOFTMAX_BIAS):
        if name not in arrays:
            raise BadInput(f"{path}: no array {name}; expected a softmax file with {SOFTMAX_WEIGHT} and {SOFTMAX_BIAS}")
    weight, bias = arrays[SOFTMAX_WEIGHT], arrays[SOFTMAX_BIAS]
    if weight.ndim != 2 or bias.shape != weight.shape[:1]:
        raise BadInput(
            f"{path}: {SOFTMAX_WEIGHT} is {weight.shape} and {SOFTMAX_BIAS} {bias.shape}; expected (V, P) and (V,)"
        )
    if projection_dim is not None and weight.shape[1] != projection_dim:
        raise BadInput(
            f"{path}: {SOFTMAX_WEIGHT} has {weight.shape[1]} columns, expected {projection_dim} (lstm.projection_dim); "
            "use the softmax of the same model"
        )
    if not len(bias):
        raise BadInput(f"{path}: {SOFTMAX_WEIGHT} has no row; expected one for each word")
    for name, array in ((SOFTMAX_WEIGHT, weight), (SOFTMAX_BIAS, bias)):
        if not np.isfinite(array).all():
            raise BadInput(f"{path}: {name} holds NaN or infinity; copy or train the softmax again")
    return torch.from_numpy(weight.astype(np.float32)), torch.from_numpy(bias.astype(np.float32))


def write_encoder(encoder: ElmoEncoder, folder: str | Path) -> tuple[Path, Path]:
    """Write `options.json` and `weights.hdf5` as bilm-tf and AllenNLP read them; returns the two paths."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    options, weights = folder / "options.json", folder / "weights.hdf5"
    _write_arrays(weights, {name: _to_file(kind, *tensors) for name, kind, tensors in _layout(encoder)})
    part = folder / "options.json.part"
    part.write_text(json.dumps(encoder.config.to_options(), indent=2) + "\n", encoding="utf-8")
    part.replace(options)
    return options, weights


def write_softmax(head: nn.Linear, path: str | Path) -> None:
    """Write a head as a softmax file: softmax/W (V, projection) and softmax/b (V,)."""
    _write_arrays(
        Path(path), {SOFTMAX_WEIGHT: _to_file("plain", head.weight), SOFTMAX_BIAS: _to_file("plain", head.bias)}
    )


def load_arrays(encoder: ElmoEncoder, arrays: dict[str, np.ndarray], source: str, options: str = "options") -> None:
    """Copy arrays in bilm-tf's names and layout into an encoder; `source` and `options` are named in errors."""
    embedding = arrays.get("char_embed")
    if embedding is not None and embedding.ndim == 2 and len(embedding) == ALPHABET + 1 and not embedding[0].any():
        # A file written from a network that already holds the padding row: it is a zero vector and no parameter.
        arrays = {**arrays, "char_embed": embedding[1:]}
    layout = list(_layout(encoder))
    missing = [name for name, _, _ in layout if name not in arrays]
    if missing:
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        raise BadInput(
            f"{source}: no array {', '.join(missing[:5])}{more}, which {options} calls for; "
            "use the options and weights of one model"
        )
    extra = sorted(set(arrays) - {name for name, _, _ in layout})
    if extra:
        raise BadInput(
            f"{source}: the array {extra[0]} has no place in {options}; use the options and weights of one model"
        )
    with torch.no_grad():
        for name, kind, tensors in layout:
            expected = _file_shape(kind, *tensors)
            if arrays[name].shape != expected:
                raise BadInput(
                    f"{source}: {name} has shape {arrays[name].shape}, expected {expected} by {options}; "
                    "use the options and weights of one model"
                )
            if not np.isfinite(arrays[name]).all():
                raise BadInput(f"{source}: {name} holds NaN or infinity; copy or train the weights again")
            array = torch.from_numpy(arrays[name])
            rows = torch.split(array, [tensor.shape[1] for tensor in tensors]) if kind == "matrix" else [array]
            for tensor, part in zip(tensors, rows):
                tensor.copy_(_turned(kind, part))


def read_arrays(path: str | Path) -> dict[str, np.ndarray]:
    """Every array of an HDF5 file by its full name, as float32 where it is stored so."""
    h5py = _h5py()
    arrays: dict[str, np.ndarray] = {}

    def visit(name: str, item: Any) -> None:
        if isinstance(item, h5py.Dataset):
            arrays[name] = np.asarray(item[...])

    with _opened(path) as file:
        file.visititems(visit)
    for name, array in arrays.items():
        if array.dtype.kind != "f":
            raise BadInput(f"{path}: {name} holds {array.dtype}, expected floating-point numbers")
    return arrays


def array_names(path: str | Path) -> set[str]:
    """The full names of the arrays of an HDF5 file."""
    names: set[str] = set()
    with _opened(path) as file:
        file.visit(names.add)
    return names


@contextmanager
def _opened(path: str | Path) -> Iterator[Any]:
    h5py = _h5py()
    if not Path(path).is_file():
        raise BadInput(f"{path}: no such file; give a weights .hdf5 file")
    try:
        with h5py.File(path, "r") as file:
            yield file
    except (OSError, RuntimeError, KeyError) as error:
        detail = " ".join(str(error).split())
        raise BadInput(f"{path}: truncated or no HDF5 file ({detail}); copy or download it again") from None


def _write_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    part = path.with_name(path.name + ".part")
    with _h5py().File(part, "w") as file:
        for name, array in arrays.items():
            file.create_dataset(name, data=array)
    with open(part, "rb") as written:
        os.fsync(written.fileno())
    part.replace(path)


def _layout(encoder: ElmoEncoder) -> Iterator[tuple[str, str, list[Tensor]]]:
    """(name in the file, kind of array, our tensors or views of them) for each array of an encoder.

    "plain" is stored as it is, "filter" as (1, width, character_dim, count), "matrix" as (inputs, outputs): with two
    tensors the rows of the second below those of the first.
    """
    words: Any = encoder.characters
    layers: Any = encoder.layers
    yield "char_embed", "plain", [words.embedding.weight]
    for k, conv in enumerate(words.convolutions):
        yield f"CNN/W_cnn_{k}", "filter", [conv.weight]
        yield f"CNN/b_cnn_{k}", "plain", [conv.bias]
    for k, (carry, transform) in enumerate(zip(words.carry, words.transform)):
        yield f"CNN_high_{k}/W_carry", "matrix", [carry.weight]
        yield f"CNN_high_{k}/b_carry", "plain", [carry.bias]
        yield f"CNN_high_{k}/W_transform", "matrix", [transform.weight]
        yield f"CNN_high_{k}/b_transform", "plain", [transform.bias]
    if words.projection is not None:
        yield "CNN_proj/W_proj", "matrix", [words.projection.weight]
        yield "CNN_proj/b_proj", "plain", [words.projection.bias]
    for direction in range(2):
        for k, layer in enumerate(layers):
            root = f"RNN_{direction}/RNN/MultiRNNCell/Cell{k}/LSTMCell"
            yield f"{root}/W_0", "matrix", [layer.weight_ih[direction], layer.weight_hh[direction]]
            yield f"{root}/B", "plain", [layer.bias[direction]]
            if layer.weight_hr is not None:
                yield f"{root}/W_P_0", "matrix", [layer.weight_hr[direction]]


def _turned(kind: str, array: Tensor) -> Tensor:
    """An array of the file in our layout, as a view."""
    if kind == "plain":
        return array
    return array[0].permute(2, 1, 0) if kind == "filter" else array.T


def _to_file(kind: str, *tensors: Tensor) -> np.ndarray:
    ours = torch.cat([tensor.detach() for tensor in tensors], 1) if kind == "matrix" else tensors[0].detach()
    if kind != "plain":
        ours = ours.permute(2, 1, 0)[None] if kind == "filter" else ours.T
    return ours.contiguous().to("cpu", torch.float32).numpy()


def _file_shape(kind: str, *tensors: Tensor) -> tuple[int, ...]:
    shape = tuple(tensors[0].shape)
    if kind == "filter":
        return (1, shape[2], shape[1], shape[0])
    return (sum(tensor.shape[1] for tensor in tensors), shape[0]) if kind == "matrix" else shape


def _h5py() -> Any:
    try:
        import h5py
    except ImportError:
        raise BadInput("reading .hdf5 files needs h5py; install it with: pip install 'nlpinf[elmo]'") from None
    return h5py
