"""Texts inside the package, named `shipped:NAME` wherever a file may be named."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from nlpinf.errors import BadInput

PREFIX = "shipped:"
_FILES = {"wikitext2": "wikitext2.txt.gz", "cr": "cr.jsonl.gz", "mr": "mr.jsonl.gz"}


def resolve(name: str | Path) -> Path:
    """Return the path of a file, or of the shipped text `shipped:wikitext2`, `shipped:cr` or `shipped:mr`."""
    text = str(name)
    if not text.startswith(PREFIX):
        return Path(text)
    key = text[len(PREFIX) :]
    if key not in _FILES:
        raise BadInput(f"{text}: no such shipped text; there are {', '.join(PREFIX + k for k in _FILES)}")
    return Path(str(files("nlpinf") / "data" / "texts" / _FILES[key]))
