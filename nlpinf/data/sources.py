"""Where the texts of a corpus come from: files, folders, patterns, `datasets` objects, their folders and their hub.

A source yields blocks of texts in a fixed order, as often as it is asked. **A row's number** is its place in that order,
from 0, empty rows included: the line of a text or JSON lines file, the row of a Parquet file or of a `datasets` split.
In a folder, files count on from one another in the order of their paths.
"""

from __future__ import annotations

import fnmatch
import glob
import re
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from nlpinf.data.files import PACKED, line_blocks, lines, objects, suffixes, text_of
from nlpinf.data.shipped import PACKAGE, PREFIX, expand, is_pattern, resolve
from nlpinf.errors import BadInput

EmptyPolicy = Literal["error", "skip"]
Format = Literal["text", "json", "parquet"]

FORMATS: dict[str, Format] = {
    "": "text", ".txt": "text", ".text": "text",
    ".jsonl": "json", ".json": "json", ".ndjson": "json",
    ".parquet": "parquet",
}  # fmt: skip
_KNOWN = f".txt, .jsonl (also {', '.join(PACKED)}) and .parquet"
_NO_TEXT = (".*", "_*", "*.md", "README*", "LICENSE*", "dataset_info.json", "state.json")  # beside a folder's data
_ROWS = 1 << 16


@dataclass(frozen=True)
class Block:
    """Consecutive texts, null or empty ones among them; `place(i)` tells a reader where text i is."""

    texts: pa.Array
    place: Callable[[int], str]


@dataclass(frozen=True)
class Source:
    """A name for manifests, and the blocks of the corpus; each call of `blocks` starts from the first.

    `reading` holds the arguments of `find` beside the name that are not its defaults.
    """

    name: str
    blocks: Callable[[], Iterator[Block]]
    reading: dict[str, Any] = field(default_factory=dict)


def find(where: Any, text_column: str = "text", split: str | None = None, streaming: bool = False) -> Source:
    """Return the source that `where` names.

    A file (.txt, .jsonl, each also .gz, .zst or .bz2, or .parquet), a pattern of files, a folder of files of one format,
    a folder of `datasets.save_to_disk`, the name of a data set on the Hugging Face hub (NAME or NAME:CONFIG, with
    `split`; `streaming` fetches it while it is read), or a `datasets.Dataset` or `IterableDataset`.
    """
    asked = {"text_column": text_column, "split": split, "streaming": streaming}
    usual = {"text_column": "text", "split": None, "streaming": False}
    reading = {key: value for key, value in asked.items() if value != usual[key]}
    return replace(_found(where, text_column, split, streaming), reading=reading)


def _found(where: Any, text_column: str, split: str | None, streaming: bool) -> Source:
    if not isinstance(where, str | Path):
        return _of_dataset(where, text_column)
    text = expand(where)
    if is_pattern(text):
        paths = sorted(Path(p) for p in glob.glob(text, recursive=True) if Path(p).is_file())
        if not paths:
            raise BadInput(f"{text}: no file has such a name; check the pattern")
        return _of_files(text, paths, text_column)
    path = resolve(text)
    if path.is_dir():
        if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
            return _saved(path, text_column, split)
        _no_split(text, split)
        return _of_files(text, _inside(path), text_column)
    if not path.exists() and not text.startswith((PREFIX, PACKAGE)):
        if split is not None:
            return _of_hub(text, text_column, split, streaming)
        raise BadInput(f"{text}: there is no such file; check the path (a data set of the hub also needs --split)")
    if path.exists() and not path.is_file():
        raise BadInput(f"{text}: is a pipe or a device, and a corpus is read more than once; write it to a file first")
    _no_split(text, split)
    return _of_files(text, [path], text_column)


def kept(source: Source, empty: EmptyPolicy) -> Iterator[tuple[np.ndarray, pa.Array, int]]:
    """Yield (row numbers, texts, rows left out) of each block: white space alone is an error, or left out.

    Texts are large strings without nulls; the row numbers int64.
    """
    if empty not in ("error", "skip"):
        raise BadInput(f"empty={empty!r} is neither 'error' nor 'skip'")
    first = 0
    for block in source.blocks():
        blank = is_empty(block.texts)
        if empty == "error" and blank.any():
            raise BadInput(
                f"{block.place(int(blank.argmax()))} is empty; remove it, or skip empty rows with `--empty skip`"
            )
        there = np.flatnonzero(~blank)
        texts = block.texts if len(there) == len(blank) else block.texts.take(pa.array(there))
        yield there + first, texts, int(blank.sum())
        first += len(blank)


def texts_at(source: Source, rows: Collection[int]) -> dict[int, str]:
    """Return the texts of the rows of these numbers; one pass, as far as the last of them. `BadInput` if one is not there."""
    wanted, first = np.unique(np.asarray(list(rows), np.int64)), 0
    found: dict[int, str] = {}
    for block in source.blocks():
        here = wanted[(wanted >= first) & (wanted < first + len(block.texts))]
        found |= {int(row): block.texts[int(row) - first].as_py() or "" for row in here}
        first += len(block.texts)
        if len(found) == len(wanted):
            return found
    if len(found) < len(wanted):
        raise BadInput(f"{source.name}: has {first} rows and no row {wanted[-1]}; give the corpus that was scored")
    return found


def is_empty(texts: pa.Array) -> np.ndarray:
    """Return which texts are null or white space alone."""
    lengths = pc.fill_null(pc.binary_length(pc.utf8_ltrim_whitespace(texts)), 0)
    return lengths.to_numpy(zero_copy_only=False) == 0


ODD = {"U+FFFD": "\ufffd", "NUL": "\0", "U+2028": "\u2028", "CR": "\r"}


def odd(texts: pa.Array) -> dict[str, int]:
    """Return how many texts have a replacement character (bytes that were lost), a NUL, a line separator, a bare "\\r"."""
    return {name: pc.sum(pc.match_substring(texts, character)).as_py() or 0 for name, character in ODD.items()}


def format_of(path: Path) -> Format:
    """Return the format that a file's name tells. `news.en-00001-of-00100` is text: shard marks and languages say nothing."""
    suffix = re.sub(r"(-\d+)+(-of-\d+)?$", "", suffixes(path)[0])
    if re.fullmatch(r"\.((?!xz|lz)[a-z]{2}|\d+|heldout)", suffix):
        suffix = ""
    if suffix not in FORMATS:
        raise BadInput(
            f"{path}: files of the format {suffix!r} are not known; there are {_KNOWN}; rename a file of one sentence a "
            "line to .txt, convert others to .jsonl or .parquet"
        )
    return FORMATS[suffix]


def _inside(folder: Path) -> list[Path]:
    """Return the data files of a folder, all of one format."""
    names = {path: path.relative_to(folder).parts for path in folder.rglob("*") if path.is_file()}
    paths = sorted(
        path for path, parts in names.items() if not any(fnmatch.fnmatch(p, no) for p in parts for no in _NO_TEXT)
    )
    if not paths:
        raise BadInput(f"{folder}: the folder has no corpus file; there are {_KNOWN}")
    formats = {path: format_of(path) for path in paths}
    if other := [path for path in paths if formats[path] != formats[paths[0]]]:
        raise BadInput(
            f"{folder}: {paths[0].name} and {other[0].name} are of different formats; give a folder of one, or a pattern "
            f"such as '{folder}/*{suffixes(paths[0])[0]}*'"
        )
    return paths


def _of_files(name: str, paths: list[Path], column: str) -> Source:
    readers = [_READERS[format_of(path)] for path in paths]
    shown = [name] if len(paths) == 1 and name.startswith((PREFIX, PACKAGE)) else [str(path) for path in paths]

    def blocks() -> Iterator[Block]:
        for reader, path, told in zip(readers, paths, shown):
            yield from reader(path, told, column)

    return Source(name, blocks)


def _text_blocks(path: Path, shown: str, column: str) -> Iterator[Block]:
    for block, first in line_blocks(path):
        yield Block(lines(block), lambda i, first=first: f"{shown}: line {first + i}")  # type: ignore[misc]


def _json_blocks(path: Path, shown: str, column: str) -> Iterator[Block]:
    texts: list[str] = []
    first = 1
    for number, value in objects(path, blank={column: ""}):
        texts.append("" if value.get(column, "") is None else text_of(value, path, number, column))
        if len(texts) == _ROWS:
            yield _json_block(texts, shown, first)
            texts, first = [], number + 1
    if texts:
        yield _json_block(texts, shown, first)


def _json_block(texts: list[str], shown: str, first: int) -> Block:
    return Block(pa.array(texts, pa.large_string()), lambda i: f"{shown}: line {first + i}")


def _parquet_blocks(path: Path, shown: str, column: str) -> Iterator[Block]:
    try:
        with pq.ParquetFile(path) as file:
            if column not in file.schema_arrow.names:
                raise _no_column(shown, column, file.schema_arrow.names)
            first = 0
            for batch in file.iter_batches(batch_size=_ROWS, columns=[column]):
                yield _table_block(batch.column(0), shown, column, first)
                first += len(batch)
    except (pa.ArrowException, OSError) as error:
        told = " ".join(str(error).split())[:200]
        raise BadInput(f"{shown}: truncated, damaged or not a Parquet file ({told}); fetch it again") from None


_READERS: dict[Format, Callable[[Path, str, str], Iterator[Block]]] = {
    "text": _text_blocks,
    "json": _json_blocks,
    "parquet": _parquet_blocks,
}


_TEXT_TYPES = (
    pa.types.is_string,
    pa.types.is_large_string,
    pa.types.is_string_view,
    pa.types.is_dictionary,
    pa.types.is_null,
)


def _table_block(values: pa.Array, shown: str, column: str, first: int) -> Block:
    """Return the texts of a table's column; rows of a table are counted from 0."""
    try:
        if not any(test(values.type) for test in _TEXT_TYPES):
            raise pa.ArrowInvalid("not text")
        texts = values.cast(pa.large_string())
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        raise BadInput(
            f"{shown}: the column {column!r} holds {values.type}, not strings; name the column of the texts with --text-column"
        ) from None
    try:
        texts.validate(full=True)
    except pa.ArrowInvalid:
        raise BadInput(
            f"{shown}: the column {column!r} is not UTF-8 at or after row {first}; repair the file"
        ) from None
    return Block(texts, lambda i: f"{shown}: row {first + i}")


def _no_column(shown: str, column: str, names: list[str]) -> BadInput:
    listed = ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")
    return BadInput(
        f"{shown}: there is no column {column!r}; there are {listed or 'none'}; name the texts' with --text-column"
    )


def _no_split(text: str, split: str | None) -> None:
    if split is not None:
        raise BadInput(f"{text}: --split {split} was given, but files have no splits; leave it out")


def _saved(path: Path, column: str, split: str | None) -> Source:
    import datasets  # slow to import, and needed by few

    try:
        data = datasets.load_from_disk(str(path))
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
        told = " ".join(str(error).split())[:200]
        raise BadInput(f"{path}: cannot be read as a folder of save_to_disk ({told}); save it again") from None
    if isinstance(data, datasets.DatasetDict):
        if split not in data:
            told = "none was given" if split is None else f"there is no {split!r}"
            raise BadInput(f"{path}: has the splits {', '.join(data)}, and {told}; choose one with --split")
        data = data[split]
    else:
        _no_split(str(path), split)
    return _of_dataset(data, column, str(path))


def _of_hub(name: str, column: str, split: str, streaming: bool) -> Source:
    import datasets

    repository, _, config = name.partition(":")
    try:
        data = datasets.load_dataset(repository, config or None, split=split, streaming=streaming)
    except Exception as error:  # whatever the network, the hub or a script raises
        told = " ".join(str(error).split())[:200]
        raise BadInput(
            f"{name}: there is no such file, and the data set of this name, split {split!r}, could not be loaded from the "
            f"hub ({type(error).__name__}: {told}); check the name, the split and the network"
        ) from None
    return _of_dataset(data, column, name)


def _of_dataset(data: Any, column: str, name: str | None = None) -> Source:
    """Return the source of a `datasets.Dataset` or `IterableDataset`."""
    import datasets

    if isinstance(data, datasets.DatasetDict | datasets.IterableDatasetDict):
        raise BadInput(
            f"a data set with the splits {', '.join(data)} was given; choose one, data[{next(iter(data))!r}]"
        )
    if not isinstance(data, datasets.Dataset | datasets.IterableDataset):
        raise BadInput(f"a corpus cannot be read from {type(data).__name__}; give a path, a Dataset or texts")
    shown = name or "the data set"
    known = data.column_names
    if known is not None and column not in known:
        raise _no_column(shown, column, list(known))

    def blocks() -> Iterator[Block]:
        first = 0
        chosen = data if known is None else data.select_columns([column])
        for table in chosen.with_format("arrow").iter(batch_size=_ROWS):
            if column not in table.column_names:
                raise _no_column(shown, column, table.column_names)
            for values in table.column(column).chunks:
                yield _table_block(values, shown, column, first)
                first += len(values)

    return Source(shown, blocks)
