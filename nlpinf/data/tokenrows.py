"""Training rows as the token ids that the model saw, in a Parquet file beside the checkpoint.

For runs whose examples are no texts any more: tokenized elsewhere, or packed, many documents to a row. Columns: `row` int64,
`input_ids` list of int32, `fingerprint` string (the first 16 hexadecimal digits of the sha256 of the ids, little-endian
int32, and of the label, int64), `label` int64 for labelled rows, `text` string where the run had it, and for packed rows
`documents` and `starts`: the numbers of the documents that the row has tokens of, and the place of each one's first token.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from torch import Tensor

from nlpinf.errors import BadInput

ROWS_FILE = "nlpinf_rows.parquet"
_GROUP = 1 << 14
_EXTRA = {"text": pa.large_string(), "documents": pa.list_(pa.int64()), "starts": pa.list_(pa.int32())}


class TokenRows(Sequence[Any]):
    """An immutable sequence of rows: lists of token ids, or {"text": ids, "label": label} where there are labels.

    `rows[i]` is the permanent number of row i; `decode` turns ids into the text that reports show.
    """

    def __init__(
        self, table: pa.Table, path: str | None = None, decode: Callable[[list[int]], str] | None = None
    ) -> None:
        self._table = table.combine_chunks()
        self.rows: Tensor = torch.from_numpy(table["row"].to_numpy().astype(np.int64))
        self.path, self._decode = path, decode
        self.labelled = "label" in table.column_names
        self.skipped: dict[str, int] = {}

    @classmethod
    def read(cls, path: Path, decode: Callable[[list[int]], str] | None = None) -> TokenRows:
        """Read a file that `write_rows` wrote; raise `BadInput` if it is another, damaged or without token ids."""
        try:
            table = pq.read_table(path, memory_map=True)
        except FileNotFoundError:
            raise BadInput(f"{path}: no such file; it holds the rows of the run, restore it") from None
        except (pa.ArrowInvalid, OSError) as error:
            raise BadInput(
                f"{path}: not a Parquet file or truncated ({' '.join(str(error).split())}); restore it"
            ) from None
        for name in ("row", "input_ids"):
            if name not in table.column_names:
                raise BadInput(f"{path}: has no column {name!r}; give the run's corpus instead (--corpus, or data=...)")
        if not table.num_rows:
            raise BadInput(f"{path}: has no rows; record the run again")
        return cls(table, str(path), decode)

    def __len__(self) -> int:
        return self._table.num_rows

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        i = int(index) % len(self)
        ids = self._table["input_ids"][i].as_py()
        return {"text": ids, "label": self._table["label"][i].as_py()} if self.labelled else ids

    def __repr__(self) -> str:
        return f"TokenRows({len(self)} rows{f' of {self.path}' if self.path else ''})"

    @property
    def longest(self) -> int:
        """The number of tokens of the longest row."""
        lengths = pc.list_value_length(self._table["input_ids"])
        return int(pc.max(lengths).as_py())

    @property
    def fingerprints(self) -> list[str]:
        """The rows' fingerprints, in their order."""
        return self._table["fingerprint"].to_pylist()

    @property
    def packed(self) -> bool:
        """Whether rows hold pieces of several documents, and which."""
        return "documents" in self._table.column_names

    def documents(self, index: int) -> list[tuple[int, int]]:
        """Return (document, place of its first token in the row) for packed row `index`, in the row's order."""
        return list(zip(self._table["documents"][index].as_py(), self._table["starts"][index].as_py()))

    def documents_of(self, rows: np.ndarray, places: np.ndarray) -> np.ndarray:
        """Return the document of the token at place `places[k]` of packed row `rows[k]` (a position here), (I,) int64."""
        keys, documents, width = self._pieces
        return documents[np.searchsorted(keys, rows * width + places, side="right") - 1]

    @cached_property
    def _pieces(self) -> tuple[np.ndarray, np.ndarray, int]:
        """The places of all documents' first tokens, rows laid end to end at one width; the documents; the width."""
        starts, width = self._table["starts"], self.longest + 1
        flat = pc.list_flatten(starts).to_numpy().astype(np.int64)
        owner = np.repeat(np.arange(len(self)), pc.list_value_length(starts).to_numpy())
        return owner * width + flat, pc.list_flatten(self._table["documents"]).to_numpy(), width

    def texts(self, start: int, stop: int) -> pa.Array | None:
        """Return the texts of the rows from `start` to `stop`, as recorded or as the tokenizer spells the ids."""
        if "text" in self._table.column_names:
            return self._table["text"].slice(start, stop - start).combine_chunks().cast(pa.large_string())
        if self._decode is None:
            return None
        ids = self._table["input_ids"].slice(start, stop - start).to_pylist()
        return pa.array([self._decode(i) for i in ids], pa.large_string())


def row_fingerprint(ids: Sequence[int] | np.ndarray, label: int | None = None) -> str:
    """Return the first 16 hexadecimal digits of the sha256 of a row's ids and label."""
    digest = hashlib.sha256(np.asarray(ids, "<i4").tobytes())
    if label is not None:
        digest.update(np.asarray(label, "<i8").tobytes())
    return digest.hexdigest()[:16]


def write_rows(
    path: Path, rows: Iterable[dict[str, Any]], *, ids: bool = True, count: Iterable[int] = ()
) -> dict[str, Any]:
    """Write rows (mappings with `input_ids` and maybe `row`, `label`, `text`, `documents` and `starts`).

    Returns their number, the sha256 of all fingerprints, the length of the longest row, the number of tokens, and how many
    times each id of `count` occurs (`ids`). Without `ids` only numbers, fingerprints and labels are kept. The file appears
    whole or not at all.
    """
    part, digest, longest, done = path.with_name(path.name + ".part"), hashlib.sha256(), 0, 0
    tokens, times = 0, dict.fromkeys(count, 0)
    writer = None
    try:
        for group in _groups(rows):
            sequences = [np.asarray(row["input_ids"], np.int32) for row in group]
            labels = [row.get("label") for row in group]
            prints = [row_fingerprint(s, label) for s, label in zip(sequences, labels)]
            digest.update("".join(prints).encode())
            tokens += sum(map(len, sequences))
            for i in times:
                times[i] += sum(int((s == i).sum()) for s in sequences)
            longest = max(longest, *(len(s) for s in sequences))
            columns: dict[str, pa.Array] = {
                "row": pa.array([row.get("row", done + i) for i, row in enumerate(group)], pa.int64()),
                "fingerprint": pa.array(prints),
            }
            if ids:
                columns["input_ids"] = pa.array(sequences, pa.list_(pa.int32()))
            if labels[0] is not None:
                columns["label"] = pa.array(labels, pa.int64())
            for name, kind in _EXTRA.items() if ids else ():
                if name in group[0]:
                    columns[name] = pa.array([row[name] for row in group], kind)
            table = pa.table(columns)
            writer = writer or pq.ParquetWriter(part, table.schema, compression="zstd")
            writer.write_table(table)
            done += len(group)
    finally:
        if writer is not None:
            writer.close()
    if writer is None:
        raise BadInput(f"{path}: there are no rows to record; the training set is empty")
    part.replace(path)
    return {"rows": done, "sha256": digest.hexdigest(), "longest": longest, "tokens": tokens, "ids": times}


def _groups(rows: Iterable[dict[str, Any]]) -> Iterable[list[dict[str, Any]]]:
    group: list[dict[str, Any]] = []
    for row in rows:
        group.append(row)
        if len(group) == _GROUP:
            yield group
            group = []
    if group:
        yield group
