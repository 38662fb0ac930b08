"""Scores on disk and in memory: a folder of Parquet parts with a manifest, written part by part, read in a stream.

Layout and columns: docs/reference/files.md. A part holds a fixed range of the corpus's positions; it is written under
another name, synced and renamed, so that a file named `part-NNNNN.parquet` is whole whenever the process may have died.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from nlpinf.errors import BadInput
from nlpinf.scoring.files import PARTIAL, disk, first_name, publish, write_table

FORMAT = 1
MANIFEST = "manifest.json"
REPEATS = "duplicates.parquet"
COMPRESSED = "compressed.safetensors"
CLAIM = ".claim"


@dataclass(frozen=True)
class ScoredRow:
    """One row of the result for one query.

    `score`             dq/dε for upweighting the example; positive = harmful
    `standard_error`    of the score, where the query has error bars
    `predicted_change`  −score/m: by about so much removing it changes the query's value, in the query's own unit
    `count`             how many rows of the corpus have this text, where equal texts were scored once
    `loss`              g(z); `tokens` the number of its counted items
    `token_scores`      the parts that add up to `score`, if they were kept, each with its `token_ids` (the class that
                        was predicted) and `token_positions` (the place in the sequence that predicted it)
    """

    row: int
    score: float
    predicted_change: float
    loss: float
    tokens: int
    text: str | None = None
    token_scores: list[float] | None = None
    token_ids: list[int] | None = None
    token_positions: list[int] | None = None
    count: int | None = None
    standard_error: float | None = None


class Store:
    """A scores folder while it is written: `Store.start` makes or resumes it, `missing` says what is left to do.

    Any number of processes may write parts of one folder; a part that two of them do comes out the same twice.
    """

    def __init__(self, folder: Path, manifest: dict[str, Any]) -> None:
        self.folder, self.manifest = folder, manifest

    @classmethod
    def start(cls, folder: str | Path, manifest: dict[str, Any]) -> Store:
        """Make the folder, or resume one whose manifest has the same `identity`; else `BadInput` names what differs."""
        folder = Path(folder)
        path = folder / MANIFEST
        with disk(folder):
            folder.mkdir(parents=True, exist_ok=True)
        cls.check(folder, manifest["identity"])
        if not path.exists():
            publish(path, lambda temporary: temporary.write_bytes(_content(manifest)), first_name)
            cls.check(folder, manifest["identity"])  # another process may have been the first
        return cls(folder, read_manifest(folder))

    @staticmethod
    def check(folder: str | Path, identity: dict[str, Any]) -> None:
        """Raise `BadInput` if the folder holds a run of another identity, which it names, or is no scores folder."""
        folder = Path(folder)
        if not folder.exists():
            return
        if not (folder / MANIFEST).exists():
            with disk(folder):
                strange = [p.name for p in folder.iterdir() if not p.name.endswith(PARTIAL) and p.name != COMPRESSED]
            if not (folder / MANIFEST).exists():  # else another process made it at this moment
                if strange:
                    raise BadInput(
                        f"{folder}: is no scores folder and has files in it ({min(strange)}); give a new folder"
                    )
                return
        if difference := identity_difference(read_manifest(folder).get("identity"), identity):
            raise BadInput(f"{folder}: {difference}; give another folder, or the arguments that it was started with")

    @property
    def part_rows(self) -> int:
        """Rows in a part; the last one has what is left."""
        return self.manifest["identity"]["part_rows"]

    @property
    def rows(self) -> int:
        """Rows in all parts."""
        return self.manifest["identity"]["rows"]

    def has(self, part: int) -> bool:
        """Say whether a part is there."""
        return part_path(self.folder, part).exists()

    def done(self) -> int:
        """Return the number of rows in the parts that are there."""
        return rows_done(self.manifest, self.missing())

    def missing(self) -> list[int]:
        """Return the numbers of the parts that are not there yet."""
        return missing_parts(self.folder, self.manifest)

    def write(self, part: int, table: pa.Table) -> None:
        """Write a part: all of it, or nothing; one that is there stays. Equal tables give equal bytes."""
        publish(part_path(self.folder, part), lambda temporary: write_table(table, temporary), first_name)

    def finish(self) -> None:
        """Once no part is missing, write into the manifest how many rows were truncated, and how many scored exactly.

        Any process may, any number of times.
        """
        counted = Scores.open(self.folder, partial=True)
        if counted.missing:
            return
        found = {name: counted.count_of(name) for name in ("truncated", "exact")}
        found = {name: count for name, count in found.items() if count is not None}
        if found.items() <= self.manifest["corpus"].items():
            return
        self.manifest["corpus"].update(found)
        publish(self.folder / MANIFEST, lambda temporary: temporary.write_bytes(_content(self.manifest)))

    def tidy(self) -> None:
        """Remove what killed processes left, once no part is missing."""
        if not self.missing():
            for ending in (PARTIAL, CLAIM):
                for stale in self.folder.glob(f".*{ending}"):
                    stale.unlink(missing_ok=True)


class Scores:
    """The scores of a corpus, in a folder or in memory; read part by part, so memory does not grow with the corpus.

    `manifest` tells the queries (names, values, verdicts), the corpus, `m`, the reduction and the versions; `missing` the
    parts that are not there, of a shard or a run that goes on.
    """

    def __init__(
        self,
        manifest: dict[str, Any],
        parts: Sequence[Callable[[list[str] | None], pa.Table]],
        folder: Path | None = None,
        missing: Sequence[int] = (),
    ) -> None:
        self.manifest, self.folder, self.missing = manifest, folder, tuple(missing)
        self._parts = parts

    @classmethod
    def open(cls, folder: str | Path, *, partial: bool = False) -> Scores:
        """Open a finished scores folder; with `partial` also one that lacks parts.

        Raises `BadInput` if it is none, or if its run was interrupted.
        """
        folder = Path(folder)
        manifest = read_manifest(folder)
        missing = missing_parts(folder, manifest)
        if missing and not partial:
            shown = ", ".join(map(str, missing[:5])) + (", ..." if len(missing) > 5 else "")
            raise BadInput(
                f"{folder}: the run that makes it was interrupted: {len(missing)} of "
                f"{manifest['identity']['parts']} parts are missing (part {shown}); run `nlpinf score` again with the "
                f"same arguments to finish it"
            )

        def reader(path: Path) -> Callable[[list[str] | None], pa.Table]:
            return lambda columns: _read(path, columns)

        lacking = set(missing)
        there = [i for i in range(manifest["identity"]["parts"]) if i not in lacking]
        return cls(manifest, [reader(part_path(folder, i)) for i in there], folder, missing)

    @property
    def queries(self) -> list[str]:
        """The queries' names."""
        return [query["name"] for query in self.manifest["queries"]]

    @property
    def m(self) -> int:
        """m of −score/m: the number of examples that the pretraining stage was trained on."""
        return self.manifest["m"]

    def __len__(self) -> int:
        return rows_done(self.manifest, self.missing)

    def tables(self, columns: list[str] | None = None) -> Iterator[pa.Table]:
        """Yield the parts in order as Arrow tables (default: all columns)."""
        for part in self._parts:
            yield part(columns)

    def part(self, number: int, columns: list[str] | None = None) -> pa.Table:
        """Return the part at place `number` of those that are there."""
        return self._parts[number](columns)

    @cached_property
    def columns(self) -> list[str]:
        """The names of the stored columns."""
        return self._parts[0](None).column_names if self._parts else []

    @cached_property
    def rows(self) -> np.ndarray:
        """The row numbers in the corpus's order, (N,) int64."""
        return np.concatenate([table["row"].to_numpy() for table in self.tables(["row"])])

    def count_of(self, flag: str) -> int | None:
        """Return how many rows have a flag, "truncated" or "exact"; None if there is no such column."""
        if flag not in self.columns:
            return None
        return sum(pc.sum(table[flag]).as_py() or 0 for table in self.tables([flag]))

    @cached_property
    def losses(self) -> np.ndarray:
        """g(z) of every row, (N,) float32."""
        return np.concatenate([table["loss"].to_numpy() for table in self.tables(["loss"])])

    def column(self, query: int | str = 0) -> np.ndarray:
        """Return the scores of a query, by number or name, in the order of `rows`: (N,) float32."""
        index = self.index_of(query)
        return np.concatenate([self.scores_of(table, index) for table in self.tables(["score"])])

    def standard_errors(self, query: int | str = 0) -> np.ndarray | None:
        """Return the standard errors of a query's scores in the order of `rows`, (N,) float32; None without error bars."""
        name, index = "standard_error", self.index_of(query)
        if name not in self.columns:
            return None
        return np.concatenate([self.scores_of(table, index, name) for table in self.tables([name])])

    def top(self, k: int = 20, query: int | str = 0, helpful: bool = False) -> list[ScoredRow]:
        """Return the `k` rows with the largest scores (most harmful first), or with the smallest (most helpful first).

        Rows of equal score come in the order of their numbers. Rows that screening only guessed are left out. One pass;
        holds one part and k rows.
        """
        if k < 1:
            raise BadInput(f"top {k} rows were asked for; give a number of at least 1")
        index, sign = self.index_of(query), (1 if helpful else -1)
        best = np.empty((0, 4))  # key, row, part, position: float64 holds integers to 2^53
        screened = "exact" in self.columns
        for number, table in enumerate(self.tables(["row", "score", *(["exact"] if screened else [])])):
            if screened:
                kept = np.flatnonzero(table["exact"].to_numpy())
                table = table.take(pa.array(kept))
            else:
                kept = np.arange(len(table))
            key = sign * self.scores_of(table, index).astype(np.float64)
            near = np.flatnonzero(key <= np.partition(key, k - 1)[k - 1]) if len(key) > k else np.arange(len(key))
            found = np.stack([key[near], table["row"].to_numpy()[near], np.full(len(near), number), kept[near]], 1)
            best = np.concatenate([best, found])
            best = best[np.lexsort((best[:, 1], best[:, 0]))[:k]]
        result: dict[tuple[int, int], ScoredRow] = {}
        for number in np.unique(best[:, 2]).astype(int):
            positions = best[best[:, 2] == number, 3].astype(int)
            table = self._parts[number](None).take(pa.array(positions))
            for position, values in zip(positions.tolist(), table.to_pylist()):
                result[int(number), position] = self._scored(values, index)
        return [result[int(number), int(position)] for number, position in best[:, 2:]]

    def _scored(self, values: dict[str, Any], index: int) -> ScoredRow:
        one = len(self.queries) == 1
        score = values["score"] if one else values["score"][index]
        error = values.get("standard_error")
        parts = values.get("token_scores")
        if parts is not None and not one:
            parts = [part[index] for part in parts]
        return ScoredRow(
            values["row"],
            score,
            -score / self.m,
            values["loss"],
            values["tokens"],
            values.get("text"),
            parts,
            values.get("token_ids"),
            values.get("token_positions"),
            values.get("count"),
            error if one or error is None else error[index],
        )

    def scores_of(self, table: pa.Table, index: int, name: str = "score") -> np.ndarray:
        """Return the scores of query number `index` of a table that has the column `name`, (n,) float32."""
        column = table[name].combine_chunks()
        if isinstance(column, pa.ChunkedArray):
            column = pa.concat_arrays(column.chunks)
        if len(self.queries) == 1:
            return column.to_numpy()
        return column.flatten().to_numpy().reshape(len(table), len(self.queries))[:, index]

    def index_of(self, query: int | str) -> int:
        """Return the number of a query that is told by number or name; raise `BadInput` if there is none."""
        if isinstance(query, str):
            if query not in self.queries:
                raise BadInput(
                    f"there is no query {query!r} in these scores; there are {', '.join(map(repr, self.queries))}"
                )
            return self.queries.index(query)
        if not 0 <= query < len(self.queries):
            raise BadInput(f"there is no query {query}; these scores have {len(self.queries)}, numbered from 0")
        return query


def _content(manifest: dict[str, Any]) -> bytes:
    return json.dumps(manifest, indent=1, ensure_ascii=False, allow_nan=False, default=str).encode() + b"\n"


def write_repeats(folder: Path, rows: np.ndarray, first: np.ndarray) -> None:
    """Write which rows have the text of an earlier one, unless that is written already."""
    path = folder / REPEATS
    if not path.exists():
        table = pa.table({"row": rows, "first": first})
        publish(path, lambda temporary: write_table(table, temporary), first_name)


def part_path(folder: Path, part: int) -> Path:
    """Return the path of a part."""
    return folder / f"part-{part:05d}.parquet"


def missing_parts(folder: Path, manifest: dict[str, Any]) -> list[int]:
    """Return the numbers of the parts that the manifest promises and the folder lacks; one listing of the folder."""
    there = {entry.name for entry in os.scandir(folder)}
    return [i for i in range(manifest["identity"]["parts"]) if part_path(folder, i).name not in there]


def rows_done(manifest: dict[str, Any], missing: Sequence[int]) -> int:
    """Return the number of rows in all parts but the missing ones."""
    identity = manifest["identity"]
    size, rows = identity["part_rows"], identity["rows"]
    return rows - sum(min(size, rows - part * size) for part in missing)


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """Read and check a scores folder's manifest."""
    path = Path(folder) / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise BadInput(
            f"{folder}: is no scores folder (there is no {MANIFEST}); give one that `nlpinf score` made"
        ) from None
    except ValueError:
        raise BadInput(f"{path}: is not valid JSON; score the corpus again into a new folder") from None
    if not isinstance(manifest, dict) or manifest.get("kind") != "scores":
        raise BadInput(f"{path}: is no manifest of scores; give a folder that `nlpinf score` made")
    if manifest.get("format") != FORMAT:
        raise BadInput(
            f"{path}: has format {manifest.get('format')}, this version reads {FORMAT}; use the version that wrote it"
        )
    return manifest


def _read(path: Path, columns: list[str] | None) -> pa.Table:
    try:
        return pq.ParquetFile(path).read(columns=columns)
    except (pa.ArrowInvalid, OSError) as error:
        reason = str(error).splitlines()[0]
        raise BadInput(f"{path}: cannot be read ({reason}); delete this part and run `nlpinf score` again") from None


def identity_difference(old: Any, new: dict[str, Any]) -> str | None:
    """Say in one line what the folder was started with that is not so now, the most telling first."""
    if not isinstance(old, dict):
        return "its manifest does not say what was scored"
    names = {
        "queries": "holds scores of another query (another query vector)",
        "weights_sha256": "was made with other weights of the pretrained model",
        "corpus_sha256": "was made from another corpus (the texts differ)",
        "dedupe": "was made with another --dedupe",
        "rows": "was made from another corpus",
        "rows_sha256": "was made from a corpus with other row numbers",
    }
    for key in [*names, *(k for k in {**old, **new} if k not in names)]:
        if old.get(key) != new.get(key):
            told = names.get(key, f"was made with another setting {key!r}")
            if isinstance(new.get(key), int | float | str | None) and not key.endswith("sha256"):
                told += f": {old.get(key)!r} there, {new.get(key)!r} now"
            return told
    return None
