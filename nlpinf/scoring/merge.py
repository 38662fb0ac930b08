"""One scores folder from those of several machines, once it is clear that they belong together."""

from __future__ import annotations

import filecmp
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from nlpinf.errors import BadInput
from nlpinf.scoring.documents import write_documents
from nlpinf.scoring.files import first_name, publish
from nlpinf.scoring.screen import FOLDER as SCREENING
from nlpinf.scoring.screen import REPORT as RECALL
from nlpinf.scoring.store import (
    COMPRESSED,
    REPEATS,
    Scores,
    Store,
    identity_difference,
    missing_parts,
    part_path,
    read_manifest,
)


@dataclass(frozen=True)
class Merged:
    """The folder, how many parts it has of how many, which are missing, and what differed without being an obstacle."""

    folder: Path
    parts: int
    missing: list[int]
    differences: list[str]


def merge(folders: Sequence[str | Path], out: str | Path) -> Merged:
    """Bring the parts of `folders` into `out`, a new folder, or one of the same job. Links files where it can.

    Raises `BadInput`, before anything is made, if the folders are not of one job (query, weights, corpus, settings),
    and if two of them have a part in common whose bytes differ.
    """
    if not folders:
        raise BadInput("there is no scores folder to merge; give at least one")
    sources = [Path(folder) for folder in folders]
    manifests = [read_manifest(folder) for folder in sources]
    for folder, manifest in zip(sources[1:], manifests[1:]):
        if difference := identity_difference(manifests[0]["identity"], manifest["identity"]):
            raise BadInput(f"{folder}: {difference}, unlike {sources[0]}; merge folders of one job only")
    where: dict[int, Path] = {}
    for folder, manifest in zip(sources, manifests):
        lacking = set(missing_parts(folder, manifest))
        for part in range(manifest["identity"]["parts"]):
            if part in lacking:
                continue
            path = part_path(folder, part)
            if part in where and not filecmp.cmp(where[part], path, shallow=False):
                raise BadInput(
                    f"{path}: differs from {where[part]}, the same part; delete the one that you trust less "
                    "(other versions, threads or processors round differently)"
                )
            where.setdefault(part, path)
    for part, path in where.items():
        _check_part(path, part, manifests[0]["identity"])
    store = Store.start(out, manifests[0])
    repeats = next((folder / REPEATS for folder in sources if (folder / REPEATS).exists()), None)
    if repeats is not None and not (store.folder / REPEATS).exists():
        _bring(repeats, store.folder / REPEATS)
    for part, path in where.items():
        target = part_path(store.folder, part)
        if not target.exists():
            _bring(path, target)
        elif not filecmp.cmp(path, target, shallow=False):
            raise BadInput(f"{target}: is there already and differs from {path}, the same part; delete one of them")
    for kept in (COMPRESSED, f"{SCREENING}/{RECALL}"):
        source = next((folder / kept for folder in sources if (folder / kept).exists()), None)
        if source is not None:
            (store.folder / kept).parent.mkdir(exist_ok=True)
            _bring(source, store.folder / kept)
    store.tidy()
    store.finish()
    write_documents(Scores.open(store.folder, partial=True))
    return Merged(store.folder, len(where), store.missing(), _differences(sources, manifests))


def _check_part(path: Path, part: int, identity: dict[str, Any]) -> None:
    """Raise `BadInput` for a part that cannot be read or does not hold the rows that it should."""
    wanted = min(identity["part_rows"], identity["rows"] - part * identity["part_rows"])
    try:
        rows = pq.read_metadata(path).num_rows
    except (pa.ArrowException, OSError) as error:
        told = str(error).splitlines()[0]
        raise BadInput(f"{path}: cannot be read ({told}); delete this part and score it again") from None
    if rows != wanted:
        raise BadInput(f"{path}: has {rows:,} rows instead of {wanted:,}; delete this part and score it again")


def _bring(source: Path, target: Path) -> None:
    def copy(temporary: Path) -> None:
        try:
            os.link(source, temporary)
        except OSError:  # another file system
            shutil.copyfile(source, temporary)

    publish(target, copy, first_name)


def _differences(sources: Sequence[Path], manifests: Sequence[dict[str, Any]]) -> list[str]:
    """Say what differs between the folders that may round scores differently."""
    told = []
    for key in ("versions", "scoring"):
        for folder, manifest in zip(sources[1:], manifests[1:]):
            old, new = manifests[0].get(key) or {}, manifest.get(key) or {}
            told += [
                f"{folder}: {key} {name}: {old.get(name)} in {sources[0]}, {new.get(name)} here"
                for name in {**old, **new}
                if old.get(name) != new.get(name) and name != "compression"
            ]
    made = [(manifest.get("scoring") or {}).get("compression") for manifest in manifests]
    told += [
        f"{folder}: made its own compressed vectors" for folder, one in zip(sources[1:], made[1:]) if one != made[0]
    ]
    return told
