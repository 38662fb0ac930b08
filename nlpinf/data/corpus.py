"""Corpora: texts with permanent row numbers, and labelled sets, read from files that are checked row by row.

A row's number is its place in its source, from 0 (`nlpinf.data.sources`), and stays with it when other rows are skipped
or left out: scores, masks and reports are keyed by it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from nlpinf.data.files import objects, text_of
from nlpinf.data.sources import EmptyPolicy, find, is_empty, kept
from nlpinf.errors import BadInput


class Corpus(Sequence[str]):
    """An immutable sequence of texts; `rows[i]` is the permanent number of text i.

    `texts`    non-empty strings, or a pyarrow string array, which is kept as it is
    `rows`     their numbers, distinct; default 0, 1, 2, ...
    `path`     where they come from, for manifests
    `skipped`  how many rows of the source were left out, by reason
    `reading`  what else it takes to read them from `path` again: arguments of `nlpinf.data.sources.find`
    """

    def __init__(
        self,
        texts: Iterable[str] | pa.Array,
        rows: Sequence[int] | Tensor | None = None,
        *,
        path: str | None = None,
        skipped: dict[str, int] | None = None,
        reading: dict[str, Any] | None = None,
    ) -> None:
        self._texts = _column(texts)
        self.rows = torch.arange(len(self._texts)) if rows is None else torch.as_tensor(rows, dtype=torch.int64)
        self.path = path
        self.skipped = dict(skipped or {})
        self.reading = dict(reading or {})
        where = path or "corpus"
        if not len(self._texts):
            raise BadInput(f"{where}: there is no text in it; give at least one sentence")
        if self.rows.shape != (len(self._texts),):
            raise BadInput(f"{where}: {len(self._texts)} texts with {self.rows.numel()} row numbers; give one for each")
        if rows is not None and len(torch.unique(self.rows)) != len(self.rows):
            raise BadInput(f"{where}: a row number occurs twice; row numbers must be distinct")
        empty = is_empty(self._texts)
        if empty.any():
            first = int(self.rows[int(empty.argmax())])
            raise BadInput(f"{where}: row {first} is empty; leave empty texts out (`--empty skip` for a file)")

    @classmethod
    def read(
        cls, where: Any, *, empty: EmptyPolicy = "error", text_column: str = "text", split: str | None = None
    ) -> Corpus:
        """Read a corpus into memory: a file, a folder or pattern of files, a `datasets` object, folder or hub name.

        `nlpinf.data.sources` tells the formats and what a row's number is. A text of white space alone is empty: an
        error, or left out with `empty="skip"` and counted in `skipped`, the other rows keeping their numbers. Raises
        `BadInput` with the file and line or row. `nlpinf.score` reads a path in a stream, without holding the texts.
        """
        source = find(where, text_column, split)
        rows, parts, skipped = [], [pa.array([], pa.large_string())], 0
        for numbers, texts, blank in kept(source, empty):
            rows.append(numbers)
            parts.append(texts)
            skipped += blank
        texts = pa.chunked_array(parts).combine_chunks()
        if isinstance(texts, pa.ChunkedArray):
            texts = texts.chunk(0)
        if not len(texts):
            raise BadInput(f"{source.name}: the corpus is empty; give one with at least one sentence")
        if not skipped:
            return cls(texts, path=source.name, reading=source.reading)
        there = torch.from_numpy(np.concatenate(rows))
        return cls(texts, there, path=source.name, skipped={"empty": skipped}, reading=source.reading)

    def __len__(self) -> int:
        return len(self._texts)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            start, stop, step = index.indices(len(self))
            if step == 1:
                return self._texts.slice(start, max(0, stop - start)).to_pylist()
            return [self[i] for i in range(start, stop, step)]
        if not -len(self) <= index < len(self):
            raise IndexError(f"text {index} of a corpus of {len(self)}")
        return self._texts[int(index) % len(self)].as_py()

    def __repr__(self) -> str:
        return f"Corpus({len(self)} texts{f' of {self.path}' if self.path else ''})"

    @cached_property
    def sha256(self) -> str:
        """The sha256 of the texts in order: `TextsDigest`."""
        digest = TextsDigest()
        for start in range(0, len(self), 1 << 16):
            digest.update(self._texts.slice(start, 1 << 16))
        return digest.hexdigest()

    def texts(self, start: int, stop: int) -> pa.Array:
        """Return the texts at positions `start` to `stop` as an Arrow array, without copying."""
        return self._texts.slice(start, stop - start)

    def without(self, rows: Iterable[int]) -> Corpus:
        """Return the corpus without the texts of these row numbers; the others keep theirs."""
        left_out = torch.as_tensor(sorted(set(rows)), dtype=torch.int64)
        if unknown := left_out[~torch.isin(left_out, self.rows)].tolist():
            raise BadInput(f"{self.path or 'corpus'}: there is no row {unknown[0]} to leave out")
        kept = (~torch.isin(self.rows, left_out)).nonzero()[:, 0]
        if not len(kept):
            raise BadInput(f"{self.path or 'corpus'}: every row is left out; keep at least one")
        skipped = {**self.skipped, "left out": self.skipped.get("left out", 0) + len(left_out)}
        texts = self._texts.take(pa.array(kept.numpy()))
        return Corpus(texts, self.rows[kept], path=self.path, skipped=skipped, reading=self.reading)


def read_labelled(path: str | Path, labels: int | None = None, *, training: bool = False) -> list[dict[str, Any]]:
    """Read a .jsonl file (plain or compressed) of objects with `text`, not empty, and `label`, 0 to `labels` − 1.

    Other keys are ignored. `training` asks for at least two classes. Raises `BadInput` with the file and line.
    """
    examples = []
    for number, value in objects(path):
        text, label = text_of(value, path, number), value.get("label")
        if "label" not in value:
            raise BadInput(f"{path}: line {number} has no `label`; each line is an object with `text` and `label`")
        if not isinstance(label, int) or isinstance(label, bool):
            raise BadInput(f"{path}: line {number}: the label {label!r} is not an integer")
        if label < 0 or (labels is not None and label >= labels):
            expected = "not negative" if labels is None else f"from 0 to {labels - 1}"
            raise BadInput(f"{path}: line {number}: the label {label} is out of range; it must be {expected}")
        if not text.strip():
            raise BadInput(f"{path}: line {number}: the text is empty; remove the line")
        examples.append({"text": text, "label": label})
    if not examples:
        raise BadInput(f"{path}: the file has no example; give at least one object with `text` and `label`")
    if training and len({e["label"] for e in examples}) == 1:
        raise BadInput(
            f"{path}: all {len(examples)} examples have the label {examples[0]['label']}; training needs two classes"
        )
    return examples


class TextsDigest:
    """The sha256 of texts in order, UTF-8, each followed by "\\n": that of the plain file, if none is empty.

    Where a text has a "\\n" in it, that of their lengths in bytes follows, so that the same lines cut into other texts differ.
    """

    def __init__(self) -> None:
        self._texts, self._lengths, self._broken = hashlib.sha256(), hashlib.sha256(), False

    def update(self, texts: pa.Array) -> None:
        """Go on with these texts, large strings without nulls."""
        lengths = pc.binary_length(texts).to_numpy(zero_copy_only=False)
        self._lengths.update(np.ascontiguousarray(lengths, "<i8").tobytes())
        self._broken = self._broken or bool(pc.any(pc.match_substring(texts, "\n")).as_py())
        self._texts.update("\n".join([*texts.to_pylist(), ""]).encode())

    def hexdigest(self) -> str:
        """Return the sha256 of the texts so far."""
        whole = self._texts.copy()
        if self._broken:
            whole.update(self._lengths.digest())
        return whole.hexdigest()


def examples_sha256(examples: Sequence[Any]) -> str:
    """Return the sha256 of any sequence of examples: a corpus's own, else one of their values, types and order."""
    if isinstance(examples, Corpus):
        return examples.sha256
    digest = hashlib.sha256()
    if len(examples) and all(isinstance(examples[i], str) for i in range(len(examples))):
        return Corpus(examples).sha256
    for i in range(len(examples)):
        _digest(digest, examples[i])
    return digest.hexdigest()


def _digest(digest: Any, value: Any) -> None:
    if isinstance(value, Tensor | np.ndarray):
        array = value.detach().cpu() if isinstance(value, Tensor) else torch.from_numpy(np.ascontiguousarray(value))
        digest.update(f"{array.dtype}{tuple(array.shape)}".encode())
        digest.update(array.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    elif isinstance(value, dict):
        digest.update(f"dict{len(value)}".encode())
        for key in value:
            _digest(digest, key)
            _digest(digest, value[key])
    elif isinstance(value, list | tuple) and not all(isinstance(v, int) for v in value):
        digest.update(f"list{len(value)}".encode())
        for item in value:
            _digest(digest, item)
    else:
        digest.update(f"{type(value).__name__}{value!r}\n".encode())


def _column(texts: Iterable[str] | pa.Array) -> pa.Array:
    if isinstance(texts, pa.ChunkedArray):
        texts = texts.combine_chunks()
    if isinstance(texts, pa.Array):
        return texts.cast(pa.large_string())
    values = list(texts)
    for i, value in enumerate(values):
        if not isinstance(value, str):
            raise BadInput(f"text {i} of the corpus is of type {type(value).__name__}; each must be a string")
    try:
        return pa.array(values, pa.large_string())
    except UnicodeEncodeError as error:
        raise BadInput(f"a text of the corpus is not valid Unicode ({error.reason}); repair or remove it") from None
