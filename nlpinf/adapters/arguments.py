"""The settings of training_args.bin, a pickle, read without running any of it.

The Trainer saves its arguments by pickling them, and to load a pickle is to run what it says. Here nothing is imported and
nothing is called: every class that the pickle names becomes an empty stand-in, and only plain values are kept.
"""

from __future__ import annotations

import io
import pickle
import zipfile
from pathlib import Path
from typing import Any

from nlpinf.errors import BadInput

ARGUMENTS_FILE = "training_args.bin"


class _StandIn:
    """Takes the place of any object: remembers what it was made from and given as state."""

    made_from: tuple[Any, ...] = ()

    def __new__(cls, *args: Any) -> Any:
        made = object.__new__(cls)
        made.made_from = args
        return made

    def __init__(self, *args: Any) -> None:
        """Made by `__new__`, which a pickle may call alone."""

    def __call__(self, *args: Any) -> Any:
        return _StandIn(*args)

    def __setstate__(self, state: Any) -> None:
        self.__dict__.update(state if isinstance(state, dict) else {})

    def __setitem__(self, key: Any, value: Any) -> None:
        """Entries of dictionaries' subclasses are not kept."""

    def append(self, value: Any) -> None:
        """Items of lists' subclasses are not kept."""

    extend = append


class _Inert(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        return type(name, (_StandIn,), {})

    def persistent_load(self, pid: Any) -> Any:
        return _StandIn()


def read_arguments(folder: Path) -> dict[str, Any]:
    """Return the numbers, strings and choices of a run's training_args.bin by name; raise `BadInput` if it is none."""
    path = folder / ARGUMENTS_FILE
    try:
        with zipfile.ZipFile(path) as archive:
            name = next(n for n in archive.namelist() if n.endswith("data.pkl"))
            arguments = _Inert(io.BytesIO(archive.read(name))).load()
    except FileNotFoundError:
        raise BadInput(f"{path}: no such file; leave --read-training-args out and give the settings yourself") from None
    except Exception as error:  # whatever bytes make an unpickler do
        raise BadInput(
            f"{path}: is not what the Trainer saves ({type(error).__name__}); give the settings yourself"
        ) from None
    return {n: v for n, value in vars(arguments).items() if (v := _value(value)) is not None}


def _value(value: Any) -> Any:
    if isinstance(value, _StandIn) and len(value.made_from) == 1:
        value = value.made_from[0]  # an enumeration's member
    return value if isinstance(value, bool | int | float | str) else None
