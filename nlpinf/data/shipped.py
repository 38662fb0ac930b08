"""Names of files and folders: plain paths, `$VARIABLE/...`, `shipped:NAME` and `package:PACKAGE/PATH`, wherever a file may be named."""

from __future__ import annotations

import importlib.util
import os
import re
from importlib.resources import files
from pathlib import Path

from nlpinf.errors import BadInput

PREFIX = "shipped:"
PACKAGE = "package:"
_FILES = {"wikitext2": "wikitext2.txt.gz", "cr": "cr.jsonl.gz", "mr": "mr.jsonl.gz"}


def resolve(name: str | Path) -> Path:
    """Return the path of a file or folder.

    `shipped:wikitext2`, `shipped:cr` and `shipped:mr` are texts of this package, `package:PACKAGE/PATH` a file of an
    installed Python package, which is not imported; `$NAME` stands for an environment variable.
    """
    text = expand(name)
    if text.startswith(PREFIX):
        key = text[len(PREFIX) :]
        if key not in _FILES:
            raise BadInput(f"{text}: no such shipped text; there are {', '.join(PREFIX + k for k in _FILES)}")
        return Path(str(files("nlpinf") / "data" / "texts" / _FILES[key]))
    return _in_package(text) if text.startswith(PACKAGE) else Path(text)


def expand(name: str | Path) -> str:
    """Return the name with its environment variables put in."""
    text = os.path.expandvars(name)
    if missing := re.search(r"\$(\w+|\{\w+\})", text):
        variable = missing[1].strip("{}")
        if variable not in os.environ:
            raise BadInput(f"{name}: the environment variable {variable} is not set; set it, or give the whole path")
    return text


def absolute(name: str | Path) -> str:
    """Return the name so that it is found from any folder; what is no file here stays as it is."""
    text = expand(name)
    if text.startswith((PREFIX, PACKAGE)):
        return text
    return str(Path(text).resolve()) if Path(text).exists() or is_pattern(text) else text


def is_pattern(name: str | Path) -> bool:
    """Return whether the name is no file but a pattern of files' names (`*`, `?`, `[...]`)."""
    return bool(re.search(r"[*?[]", str(name))) and not Path(name).exists()


def _in_package(text: str) -> Path:
    package, _, inner = text[len(PACKAGE) :].partition("/")
    try:
        found = importlib.util.find_spec(package) if package else None
    except (ImportError, ValueError):
        found = None
    if found is None or not found.submodule_search_locations:
        raise BadInput(f"{text}: the Python package {package!r} is not installed; install it with pip")
    return Path(next(iter(found.submodule_search_locations))) / inner
