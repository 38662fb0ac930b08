"""Corpora: texts with permanent row numbers, and labelled sets, read from files that are checked line by line.

A row's number is its line number in the file, from 0, and stays with it when other rows are skipped or left out:
scores, masks and reports are keyed by it. Lines end at "\\n" alone ("\\r\\n" counts as one end); U+2028, U+0085 and a
bare "\\r" are characters like any other. A byte order mark at the start of a file is dropped.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import zlib
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from nlpinf.data.shipped import resolve
from nlpinf.errors import BadInput

EmptyPolicy = Literal["error", "skip"]
_BLOCK = 1 << 24


class Corpus(Sequence[str]):
    """An immutable sequence of texts; `rows[i]` is the permanent number of text i.

    `texts`    non-empty strings, or a pyarrow string array, which is kept as it is
    `rows`     their numbers, distinct; default 0, 1, 2, ...
    `path`     where they come from, for manifests
    `skipped`  how many rows of the source were left out, by reason
    """

    def __init__(
        self,
        texts: Iterable[str] | pa.Array,
        rows: Sequence[int] | Tensor | None = None,
        *,
        path: str | None = None,
        skipped: dict[str, int] | None = None,
    ) -> None:
        self._texts = _column(texts)
        self.rows = torch.arange(len(self._texts)) if rows is None else torch.as_tensor(rows, dtype=torch.int64)
        self.path = path
        self.skipped = dict(skipped or {})
        where = path or "corpus"
        if not len(self._texts):
            raise BadInput(f"{where}: there is no text in it; give at least one sentence")
        if self.rows.shape != (len(self._texts),):
            raise BadInput(f"{where}: {len(self._texts)} texts with {self.rows.numel()} row numbers; give one for each")
        if rows is not None and len(torch.unique(self.rows)) != len(self.rows):
            raise BadInput(f"{where}: a row number occurs twice; row numbers must be distinct")
        empty = _empty(self._texts)
        if empty.any():
            first = int(self.rows[int(empty.argmax())])
            raise BadInput(f"{where}: row {first} is empty; leave empty texts out (`--empty skip` for a file)")

    @classmethod
    def read(cls, path: str | Path, *, empty: EmptyPolicy = "error") -> Corpus:
        """Read a .txt file (one text a line) or a .jsonl file (objects with `text`), plain or .gz, .zst or .bz2.

        `path` may be `shipped:NAME`. A line of white space alone is empty: an error, or left out with `empty="skip"`
        and counted in `skipped`, the other rows keeping their numbers. Raises `BadInput` with the file and line.
        """
        if empty not in ("error", "skip"):
            raise BadInput(f"empty={empty!r} is neither 'error' nor 'skip'")
        parts = [pa.array([], pa.large_string())]
        if _is_json(path):
            parts += (pa.array(texts, pa.large_string()) for texts in _json_texts(path))
        else:
            parts += (_lines(block) for block, _ in _blocks(path))
        texts = pa.chunked_array(parts).combine_chunks()
        if isinstance(texts, pa.ChunkedArray):
            texts = texts.chunk(0)
        blank = _empty(texts)
        if not blank.any():
            return cls(texts, path=str(path)) if len(texts) else cls._nothing(path)
        if empty == "error":
            raise BadInput(
                f"{path}: line {int(blank.argmax()) + 1} is empty; remove it, or skip empty lines with `--empty skip`"
            )
        kept = np.flatnonzero(~blank)
        if not len(kept):
            return cls._nothing(path)
        return cls(
            texts.take(pa.array(kept)), torch.from_numpy(kept), path=str(path), skipped={"empty": int(blank.sum())}
        )

    @classmethod
    def _nothing(cls, path: str | Path) -> Corpus:
        raise BadInput(f"{path}: the corpus is empty; give a file with one sentence a line")

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
        """The sha256 of the texts in order, UTF-8, each followed by "\\n": that of the plain file, if none is empty."""
        digest = hashlib.sha256()
        for start in range(0, len(self), 1 << 16):
            digest.update("\n".join([*self[start : start + (1 << 16)], ""]).encode())
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
        return Corpus(self._texts.take(pa.array(kept.numpy())), self.rows[kept], path=self.path, skipped=skipped)


def read_labelled(path: str | Path, labels: int | None = None, *, training: bool = False) -> list[dict[str, Any]]:
    """Read a .jsonl file (plain or compressed) of objects with `text`, not empty, and `label`, 0 to `labels` − 1.

    Other keys are ignored. `training` asks for at least two classes. Raises `BadInput` with the file and line.
    """
    examples = []
    for number, value in _objects(path):
        text, label = _text_of(value, path, number), value.get("label")
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


def _empty(texts: pa.Array) -> np.ndarray:
    lengths = pc.binary_length(pc.utf8_ltrim_whitespace(texts))
    return lengths.to_numpy(zero_copy_only=False) == 0


def _suffixes(path: str | Path) -> tuple[str, str]:
    """Return (format suffix, compression suffix) of a name."""
    parts = [s.lower() for s in resolve(path).suffixes]
    packed = parts.pop() if parts and parts[-1] in (".gz", ".zst", ".bz2") else ""
    return (parts[-1] if parts else ""), packed


def _is_json(path: str | Path) -> bool:
    return _suffixes(path)[0] in (".jsonl", ".json", ".ndjson")


def _blocks(path: str | Path) -> Iterator[tuple[bytes, int]]:
    """Yield blocks of whole lines, valid UTF-8, every line with its "\\n", and the number of each one's first line."""
    number, rest, first = 1, b"", True
    for data in _stream(path):
        rest += data.removeprefix(b"\xef\xbb\xbf") if first else data
        first = False
        end = rest.rfind(b"\n") + 1
        if end:
            block, rest = rest[:end], rest[end:]
            yield _checked(block, path, number).replace(b"\r\n", b"\n"), number
            number += block.count(b"\n")
    if rest:
        yield _checked(rest, path, number) + b"\n", number


def _stream(path: str | Path) -> Iterator[bytes]:
    packed = _suffixes(path)[1]
    try:
        if packed == ".gz":
            file: Any = gzip.open(resolve(path))
        elif packed:
            file = pa.input_stream(str(resolve(path)), compression={".zst": "zstd", ".bz2": "bz2"}[packed])
        else:
            file = resolve(path).open("rb")
        with file:
            while data := file.read(_BLOCK):
                yield data
    except FileNotFoundError:
        raise BadInput(f"{path}: there is no such file; check the path") from None
    except IsADirectoryError:
        raise BadInput(f"{path}: is a folder; give a file") from None
    except (EOFError, zlib.error):
        raise BadInput(f"{path}: the compressed file is truncated or damaged; fetch it again") from None
    except gzip.BadGzipFile:
        raise BadInput(f"{path}: is not a gzip file, or is damaged; rename or fetch it again") from None
    except OSError as error:
        raise BadInput(f"{path}: cannot be read ({error.strerror or error}); check the file") from None


def _checked(block: bytes, path: str | Path, number: int) -> bytes:
    try:
        block.decode("utf-8")
    except UnicodeDecodeError as error:
        line = number + block.count(b"\n", 0, error.start)
        raise BadInput(
            f"{path}: line {line} is not UTF-8 (byte {block[error.start]:#04x}); convert the file, e.g. with iconv"
        ) from None
    return block


def _lines(block: bytes) -> pa.Array:
    """Return the lines of a block that ends in "\\n", without Python objects."""
    ends = np.flatnonzero(np.frombuffer(block, np.uint8) == 10)
    offsets = np.concatenate([[0], ends - np.arange(len(ends))]).astype(np.int64)
    text = block.replace(b"\n", b"")
    return pa.Array.from_buffers(pa.large_string(), len(ends), [None, pa.py_buffer(offsets), pa.py_buffer(text)])


def _objects(path: str | Path, blank: dict[str, Any] | None = None) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number, object) of a JSON lines file; `blank` stands for empty lines, else they are an error."""
    for block, first in _blocks(path):
        for number, line in enumerate(block[:-1].split(b"\n"), first):
            if blank is not None and not line.strip():
                yield number, blank
                continue
            try:
                value = json.loads(line)
            except ValueError:
                hint = "is empty; remove it" if not line.strip() else "is not valid JSON; each line is one object"
                raise BadInput(f"{path}: line {number} {hint}") from None
            if not isinstance(value, dict):
                raise BadInput(
                    f"{path}: line {number} is a JSON {type(value).__name__}; each line is one object with `text`"
                )
            yield number, value


def _text_of(value: dict[str, Any], path: str | Path, number: int) -> str:
    if "text" not in value:
        raise BadInput(f"{path}: line {number} has no `text`; each line is an object with `text`")
    text = value["text"]
    if not isinstance(text, str):
        raise BadInput(f"{path}: line {number}: `text` is of type {type(text).__name__}; it must be a string")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise BadInput(
            f"{path}: line {number}: the text has half of a surrogate pair, which is no character; repair it"
        ) from None
    return text


def _json_texts(path: str | Path) -> Iterator[list[str]]:
    texts: list[str] = []
    for number, value in _objects(path, blank={"text": ""}):
        texts.append(_text_of(value, path, number))
        if len(texts) == 1 << 16:
            yield texts
            texts = []
    yield texts
