"""The query folder: query vectors as safetensors with a manifest of what they were made from and how the solves ended."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from nlpinf.adapters.folders import file_sha256, one_line, read_json, versions, write_json
from nlpinf.adapters.plain import Told
from nlpinf.adapters.runs import stage_from_run, told_record
from nlpinf.data.corpus import examples_sha256
from nlpinf.errors import BadInput
from nlpinf.files import save_tensors
from nlpinf.influence import QueryVectors
from nlpinf.parameters import Parameters
from nlpinf.queries import Query
from nlpinf.solvers import Solution
from nlpinf.stages import Chain, Stage

MANIFEST = "manifest.json"
FORMAT = 1
SOLVES = "solves"
_VECTORS = ("vectors-", "errors-")


def claim(folder: str | Path) -> Path:
    """Say whether a query may be saved in `folder`: one that is new, empty, or left by a query that was interrupted.

    Raises `BadInput` if it holds a query or other files. Makes nothing, so it can be asked before the long work.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise BadInput(f"{folder}: is a file; give a new folder for the query")
    names = {p.name for p in folder.iterdir()} if folder.exists() else set()
    if MANIFEST in names:
        raise BadInput(f"{folder}: holds a query already; give a new folder, or delete this one")
    if strange := [name for name in names if name != SOLVES and not name.startswith((*_VECTORS, MANIFEST))]:
        raise BadInput(f"{folder}: holds other files ({min(strange)}); give a new folder for the query")
    return folder


def solves(folder: str | Path) -> Path:
    """Return where the solves of a query that is to be saved in `folder` keep their checkpoints; `save` removes them."""
    return Path(folder) / SOLVES


def save(vectors: QueryVectors, folder: str | Path, chain: Chain, found: Mapping[str, Any] | None = None) -> Path:
    """Write a query folder; every stage of `chain` must have been opened from a run folder. Returns its path.

    The manifest is written last, so that a folder without one is a run that was interrupted. It names the runs by their
    place relative to the folder, so that both may be moved together; of runs that have no record of their own it holds
    what was told and assumed. `found` is what opening the chain found out.
    """
    folder = claim(folder)
    runs = []
    for stage in chain.stages:
        if "run" not in stage.record:
            raise BadInput(
                f"stage {stage.name!r} is in memory only; save it with save_run and open it with Stage.from_run first"
            )
        runs.append(
            {
                "name": stage.name,
                "run": Path(os.path.relpath(stage.record["run"], folder)).as_posix(),
                "weights": stage.record["weights"],
                "data": stage.record["data"],
                **({} if (told := told_record(stage)) is None else {"record": told}),
                **({"told": dict(stage.record["told"])} if "told" in stage.record else {}),
            }
        )
    folder.mkdir(parents=True, exist_ok=True)
    for stale in folder.iterdir():
        if stale.name != SOLVES:
            stale.unlink()
    queries = []
    for i, (query, vector, verdicts, value) in enumerate(
        zip(vectors.queries, vectors.vectors, vectors.verdicts, vectors.values)
    ):
        path = folder / f"vectors-{i:05d}.safetensors"
        save_tensors({name: tensor.contiguous() for name, tensor in vector.items()}, path)
        errors = vectors.errors[i] if vectors.errors else ()
        where = folder / f"errors-{i:05d}.safetensors"
        if errors:
            tensors = {f"{j}/{name}": t.contiguous() for j, error in enumerate(errors) for name, t in error.items()}
            save_tensors(tensors, where)
        queries.append(
            {
                "id": i,
                "name": query.name,
                "kind": query.kind,
                "examples": [e for e in query.examples if isinstance(e, str | dict)],
                "value": value,
                "file": path.name,
                "sha256": file_sha256(path),
                **({"errors": {"file": where.name, "sha256": file_sha256(where)}} if errors else {}),
                "verdicts": {name: solution.summary() for name, solution in verdicts.items()},
            }
        )
    content = {
        "kind": "query",
        "format": FORMAT,
        "queries": queries,
        "chain": runs,
        "settings": vectors.settings,
        **({"found": dict(found)} if found else {}),
        "versions": versions(),
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    write_json(folder / MANIFEST, content)
    shutil.rmtree(solves(folder), ignore_errors=True)
    return folder


def manifest(folder: str | Path) -> dict[str, Any]:
    """Read and check a query folder's manifest."""
    folder = Path(folder)
    if not folder.is_dir():
        raise BadInput(f"{folder}: no such query folder; `nlpinf query` makes one")
    content = read_json(folder / MANIFEST, "a finished query folder")
    if content.get("kind") != "query" or content.get("format") != FORMAT:
        raise BadInput(f"{folder / MANIFEST}: is no query manifest of format {FORMAT}; make the query again")
    return content


def load(
    folder: str | Path, *, run: str | Path | None = None, data: Any = None, trust_remote_code: bool = False
) -> QueryVectors:
    """Open a query folder and the pretraining run that it belongs to (`run` and its corpus `data`, where these were moved).

    Raises `BadInput` if a vector file, the run's weights or the texts of `data` are not those that the manifest names.
    """
    folder = Path(folder)
    content = manifest(folder)
    first = content["chain"][0]
    where = Path(run) if run is not None else Path(os.path.normpath(folder / first["run"]))
    if not where.is_dir():
        raise BadInput(f"{where}: the pretraining run of {folder} is not there; say where it is (--pretrain)")
    stage = stage_from_run(
        where,
        data=data,
        told=Told(**first["told"]) if "told" in first else None,
        record=first.get("record"),
        trust_remote_code=trust_remote_code,
    )
    there, then = stage.record["weights"], first["weights"]
    if changed := sorted(n for n in {**there, **then} if there.get(n) != then.get(n)):
        raise BadInput(
            f"{where}: its weights are not those that {folder} was made with (sha256 of {changed[0]} differs); make the query again"
        )
    if data is not None and (expected := first["data"].get("sha256")) not in (None, examples_sha256(stage.data)):
        raise BadInput(f"{data}: the texts are not those of the run (sha256 differs from {expected[:12]}…)")
    vectors, verdicts, queries, errors = [], [], [], []
    for entry in content["queries"]:
        vectors.append(_tensors(folder, entry, stage))
        if "errors" in entry:
            errors.append(_numbered(_tensors(folder, entry["errors"], stage)))
        queries.append(Query(entry["kind"], tuple(entry["examples"]), entry["name"]))
        verdicts.append({name: _solution(summary) for name, summary in entry["verdicts"].items()})
    values = tuple(entry["value"] for entry in content["queries"])
    settings = {**content["settings"], "query_folder": folder.name}
    return QueryVectors(stage, tuple(queries), tuple(vectors), tuple(verdicts), values, settings, tuple(errors))


def _tensors(folder: Path, entry: Mapping[str, Any], stage: Stage) -> Parameters:
    path = folder / entry["file"]
    if not path.is_file() or file_sha256(path) != entry["sha256"]:
        raise BadInput(f"{path}: is missing or changed since the query was made; make the query again")
    try:
        return {n: t.to(stage.device) for n, t in load_file(path).items()}
    except Exception as error:
        raise BadInput(f"{path}: cannot be read ({one_line(error)}); make the query again") from error


def _numbered(tensors: Parameters) -> tuple[Parameters, ...]:
    """Return the trees of a file whose names are NUMBER/NAME."""
    trees: dict[int, Parameters] = {}
    for key, tensor in tensors.items():
        number, name = key.split("/", 1)
        trees.setdefault(int(number), {})[name] = tensor
    return tuple(trees[j] for j in sorted(trees))


def _solution(summary: Mapping[str, Any]) -> Solution:
    values: dict[str, Any] = {
        k: (float("nan") if v is None and k != "second_residual" else v) for k, v in summary.items()
    }
    return Solution(vector={}, **values)
