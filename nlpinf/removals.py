"""Predicted changes of single rows by a Newton step, kept in their query folder beside its vectors, for reports."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nlpinf.adapters.folders import read_json, write_json
from nlpinf.errors import BadInput
from nlpinf.influence import QueryVectors
from nlpinf.newton import Removed
from nlpinf.stages import fingerprint

REMOVALS = "removals.json"
FORMAT = 1


def keep(folder: str | Path, vectors: QueryVectors, found: Sequence[Removed], settings: Mapping[str, Any]) -> Path:
    """Write the Newton figures of single rows, by row number; those already there stay if `settings` are theirs too."""
    path, digests = Path(folder) / REMOVALS, [fingerprint(vector) for vector in vectors.vectors]
    content: dict[str, Any] = {
        "kind": "removals",
        "format": FORMAT,
        "queries": digests,
        "settings": dict(settings),
        "rows": {},
    }
    if path.exists() and (old := _read(path))["queries"] == digests and old["settings"] == content["settings"]:
        content["rows"] = old["rows"]
    for removed in found:
        (position,) = removed.rows
        content["rows"][str(int(vectors.stage.rows[position]))] = list(removed.newton)
    write_json(path, content)
    return path


def kept(folder: str | Path, digests: Sequence[str]) -> dict[int, list[float]]:
    """Return what `keep` left, by row one figure a query; nothing where there is nothing for query vectors of these digests."""
    path = Path(folder) / REMOVALS
    if not path.exists() or (content := _read(path))["queries"] != list(digests):
        return {}
    return {int(row): figures for row, figures in content["rows"].items()}


def _read(path: Path) -> dict[str, Any]:
    content = read_json(path, "predictions of removals")
    if not isinstance(content, dict) or content.get("kind") != "removals" or content.get("format") != FORMAT:
        raise BadInput(f"{path}: is no file of predicted removals of format {FORMAT}; delete it and predict again")
    return content
