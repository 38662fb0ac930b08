"""A folder of bilm-tf's files: options.json and weights, and beside them perhaps the softmax and its vocabulary."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from nlpinf.adapters.elmo.files import SOFTMAX_WEIGHT, array_names, read_encoder, read_softmax
from nlpinf.adapters.elmo.language_model import ElmoLM
from nlpinf.adapters.elmo.network import ElmoEncoder
from nlpinf.adapters.folders import RECORD
from nlpinf.data.characters import BEGIN, END
from nlpinf.data.vocabulary import UNKNOWN, Vocabulary
from nlpinf.errors import BadInput

OPTIONS = "options.json"


class Headless(nn.Module):
    """An encoder under the name that it has in an `ElmoLM`, without a softmax: enough to put a classifier on."""

    base_model_prefix = "encoder"

    def __init__(self, encoder: ElmoEncoder) -> None:
        super().__init__()
        self.config, self.encoder = encoder.config, encoder


@dataclass(frozen=True)
class ElmoFiles:
    """What lies in the folder: `options` (*.json), `weights` and `softmax` (*.hdf5, told apart by their arrays), `vocabulary` (*.txt)."""

    folder: Path
    options: Path
    weights: Path
    softmax: Path | None
    vocabulary: Path | None

    @classmethod
    def there(cls, folder: str | Path) -> bool:
        """Say whether a folder holds such files, and is no run of its own into which they were written."""
        folder = Path(folder)
        return folder.is_dir() and not (folder / RECORD).exists() and _options(folder) is not None

    @classmethod
    def find(cls, folder: str | Path) -> ElmoFiles:
        """Find the files of a folder; `BadInput` where one is missing or there are two of a kind."""
        folder = Path(folder)
        options = _options(folder)
        if options is None:
            raise BadInput(f"{folder}: has no {OPTIONS}; give a folder with ELMo's options and weights")
        arrays = {path: array_names(path) for path in sorted(folder.glob("*.hdf5"))}
        softmaxes = [path for path, names in arrays.items() if SOFTMAX_WEIGHT in names]
        weights = [path for path, names in arrays.items() if "char_embed" in names]
        if not weights:
            raise BadInput(
                f"{folder}: no .hdf5 file in it has the array char_embed; give the weights of the encoder too"
            )
        texts = sorted(path for path in folder.glob("*.txt") if _is_vocabulary(path))
        for kind, found in (("weights", weights), ("softmax", softmaxes), ("vocabulary", texts)):
            if len(found) > 1:
                names = " and ".join(path.name for path in found[:2])
                raise BadInput(f"{folder}: {names} are both a {kind}; leave one of them in the folder")
        return cls(folder, options, weights[0], *(found[0] if found else None for found in (softmaxes, texts)))

    def headless(self) -> Headless:
        """Read the encoder alone."""
        return Headless(read_encoder(self.options, self.weights))

    def language_model(self, vocabulary: Vocabulary, seed: int) -> ElmoLM:
        """Return the model with the softmax of the folder, or where there is none with one initialised by the seed."""
        encoder = read_encoder(self.options, self.weights)
        torch.manual_seed(seed)
        model = ElmoLM(encoder.config, len(vocabulary), encoder=encoder)
        if self.softmax is None:
            return model.eval()
        weight, bias = read_softmax(self.softmax, encoder.config.projection_dim)
        vocabulary.check_size(len(bias), str(self.softmax))
        model.head.weight, model.head.bias = nn.Parameter(weight), nn.Parameter(bias)
        return model.eval()

    def sha256(self) -> dict[str, str]:
        """Return the sha256 of the weights file by its name, as a run records its own."""
        with open(self.weights, "rb") as file:
            digest = hashlib.sha256()
            while chunk := file.read(1 << 20):
                digest.update(chunk)
        return {self.weights.name: digest.hexdigest()}


def _options(folder: Path) -> Path | None:
    if (folder / OPTIONS).is_file():
        return folder / OPTIONS
    named = sorted(folder.glob("*options*.json"))  # the released files carry the model's name in front
    if len(named) > 1:
        raise BadInput(
            f"{folder}: {named[0].name} and {named[1].name} are both options; leave one of them in the folder"
        )
    return named[0] if named else None


def _is_vocabulary(path: Path) -> bool:
    """Say whether a text file has one of a vocabulary's marks on a line, as a README beside it has not."""
    with path.open(encoding="utf-8", errors="replace") as file:
        return any(line.strip() in (BEGIN, END, UNKNOWN) for line in file)
