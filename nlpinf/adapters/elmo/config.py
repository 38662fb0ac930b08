"""Sizes of an ELMo encoder, from and to bilm-tf's options.json."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nlpinf.data.characters import ALPHABET
from nlpinf.errors import BadInput

MODEL_TYPE = "nlpinf-elmo"


@dataclass  # not frozen: the Hugging Face Trainer sets `use_cache` on the config of any model
class ElmoConfig:
    """Sizes of the encoder; the defaults are those of the released ELMo (93.6 million parameters).

    `filters` are (width, count) pairs.  A clip of None means that nothing is clipped.  `dropout` acts in training only.
    """

    character_dim: int = 16
    filters: tuple[tuple[int, int], ...] = ((1, 32), (2, 32), (3, 64), (4, 128), (5, 256), (6, 512), (7, 1024))
    highways: int = 2
    activation: str = "relu"
    max_characters: int = 50
    lstm_dim: int = 4096
    projection_dim: int = 512
    layers: int = 2
    skip_connections: bool = True
    cell_clip: float | None = 3.0
    projection_clip: float | None = 3.0
    dropout: float = 0.0

    def __post_init__(self) -> None:
        self.filters = tuple((_whole("a filter", width), _whole("a filter", count)) for width, count in self.filters)
        least = {
            "character_dim": 1,
            "max_characters": 3,
            "lstm_dim": 1,
            "projection_dim": 1,
            "layers": 1,
            "highways": 0,
        }
        for name, smallest in least.items():
            setattr(self, name, _whole(name, getattr(self, name), smallest))
        for name in ("cell_clip", "projection_clip"):
            clip = getattr(self, name)
            if clip is not None and not 0 < clip < math.inf:
                raise BadInput(
                    f"ELMo configuration: {name} is {clip}, expected a number above 0, or none to clip nothing"
                )
        if not self.filters or min(min(pair) for pair in self.filters) < 1:
            raise BadInput("ELMo configuration: filters must be pairs of positive integers (width, count)")
        if max(width for width, _ in self.filters) > self.max_characters:
            raise BadInput("ELMo configuration: a filter is wider than max_characters; make it narrower")
        if self.activation not in ("relu", "tanh"):
            raise BadInput(f"ELMo configuration: activation is {self.activation!r}, expected 'relu' or 'tanh'")
        if self.projection_dim > self.lstm_dim:
            raise BadInput("ELMo configuration: projection_dim is larger than lstm_dim; an LSTM can only project down")
        if not 0.0 <= self.dropout < 1.0:
            raise BadInput(f"ELMo configuration: dropout is {self.dropout}, expected a number in [0, 1)")

    @property
    def n_filters(self) -> int:
        return sum(count for _, count in self.filters)

    @property
    def hidden_size(self) -> int:
        """The width of each layer that the encoder returns, both directions together."""
        return 2 * self.projection_dim

    @property
    def num_hidden_layers(self) -> int:
        """LSTM layers; the encoder returns one more, the token layer."""
        return self.layers

    def save_pretrained(self, folder: str | Path, **more: Any) -> None:
        """Write config.json: `more`, and the sizes under "encoder"."""
        path = Path(folder) / "config.json"
        part = path.with_name(path.name + ".part")
        content = {"model_type": MODEL_TYPE, **more, "encoder": asdict(self)}
        part.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        part.replace(path)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> tuple[ElmoConfig, dict[str, Any]]:
        """Read what `save_pretrained` wrote: the sizes, and the whole content of config.json."""
        path = Path(folder) / "config.json"
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content.get("model_type") != MODEL_TYPE:
                raise BadInput(f"{path}: model_type is {content.get('model_type')!r}, expected {MODEL_TYPE!r}")
            return cls(**content["encoder"]), content
        except FileNotFoundError:
            raise BadInput(f"{path}: no such file; expected a folder written by save_pretrained") from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, BadInput):
                raise
            raise BadInput(f"{path}: not a configuration of this model ({error}); save the model again") from None

    @classmethod
    def preset(cls, name: str, **changes: Any) -> ElmoConfig:
        """`small` (trains on two cores in minutes), `medium`, or `original` (the released ELMo)."""
        if name not in PRESETS:
            raise BadInput(f"ELMo configuration: no preset {name!r}, expected one of {', '.join(PRESETS)}")
        return cls(**{**PRESETS[name], **changes})

    @classmethod
    def from_options(cls, options: dict[str, Any], source: str = "options.json") -> ElmoConfig:
        """From the dictionary in bilm-tf's options.json; `source` is named in errors.

        n_characters may be 261 (as bilm-tf trains) or 262 (as it must say to be read again, padding counted): the
        weights are the same.  max_characters_per_token and activation are needed, as they change the numbers.
        """
        if not isinstance(options, dict):
            raise BadInput(f"{source}: expected a JSON object with 'lstm' and 'char_cnn'")
        for section in ("lstm", "char_cnn"):
            if not isinstance(options.get(section), dict):
                hint = " (word-embedding inputs are not supported)" if section == "char_cnn" else ""
                raise BadInput(
                    f"{source}: no section '{section}'{hint}; use the options.json that came with the weights"
                )
        lstm, cnn = options["lstm"], options["char_cnn"]
        if cnn.get("n_characters") not in (ALPHABET, ALPHABET + 1):
            raise BadInput(f"{source}: char_cnn.n_characters is {cnn.get('n_characters')!r}, expected 261 or 262")
        try:
            return cls(
                character_dim=cnn["embedding"]["dim"],
                filters=tuple((width, count) for width, count in cnn["filters"]),
                highways=cnn.get("n_highway") or 0,
                activation=cnn["activation"],
                max_characters=cnn["max_characters_per_token"],
                lstm_dim=lstm["dim"],
                projection_dim=lstm["projection_dim"],
                layers=lstm.get("n_layers", 1),
                skip_connections=bool(lstm.get("use_skip_connections")),
                cell_clip=_number(lstm.get("cell_clip")),
                projection_clip=_number(lstm.get("proj_clip")),
                dropout=float(options.get("dropout", 0.0)),
            )
        except KeyError as error:
            raise BadInput(
                f"{source}: the field {error} is missing; use the options.json that came with the weights"
            ) from None
        except (TypeError, ValueError) as error:
            text = str(error) if isinstance(error, BadInput) else f"a field has the wrong type ({error})"
            raise BadInput(f"{source}: {text}") from None

    def to_options(self) -> dict[str, Any]:
        """The dictionary of bilm-tf's options.json, as its readers (bilm-tf, AllenNLP) want it: 262 characters."""
        options: dict[str, Any] = {
            "lstm": {
                "cell_clip": self.cell_clip,
                "use_skip_connections": self.skip_connections,
                "n_layers": self.layers,
                "proj_clip": self.projection_clip,
                "projection_dim": self.projection_dim,
                "dim": self.lstm_dim,
            },
            "char_cnn": {
                "embedding": {"dim": self.character_dim},
                "filters": [list(pair) for pair in self.filters],
                "n_highway": self.highways,
                "n_characters": ALPHABET + 1,
                "max_characters_per_token": self.max_characters,
                "activation": self.activation,
            },
        }
        if self.dropout:
            options["dropout"] = self.dropout
        return options


PRESETS: dict[str, dict[str, Any]] = {
    "small": {
        "filters": ((1, 16), (2, 16), (3, 32), (4, 64)),
        "highways": 1,
        "lstm_dim": 192,
        "projection_dim": 64,
    },
    "medium": {
        "filters": ((1, 32), (2, 32), (3, 64), (4, 128), (5, 256)),
        "highways": 1,
        "lstm_dim": 1024,
        "projection_dim": 128,
    },
    "original": {},
}


def _number(value: Any) -> float | None:
    # bilm-tf takes a clip of 0, false or null as "no clipping".
    return float(value) if value else None


def _whole(name: str, value: Any, least: int = 1) -> int:
    """Return a size as an int, from 3 or 3.0; `BadInput` for what is none."""
    number = math.nan if isinstance(value, bool) or not isinstance(value, int | float) else float(value)
    if not (math.isfinite(number) and number == int(number) and number >= least):
        raise BadInput(f"ELMo configuration: {name} is {value!r}, expected a whole number of at least {least}")
    return int(number)
