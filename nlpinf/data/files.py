"""Files of lines, plain or compressed: blocks of whole lines, the lines of text files, the objects of JSON lines files.

Lines end at "\\n" alone ("\\r\\n" counts as one end); U+2028, U+0085 and a bare "\\r" are characters like any other. A byte
order mark at the start of a file is dropped.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from nlpinf.data.shipped import resolve
from nlpinf.errors import BadInput

PACKED = (".gz", ".zst", ".bz2")
_BLOCK = 1 << 24


def suffixes(path: str | Path) -> tuple[str, str]:
    """Return (format suffix, compression suffix) of a name, in lower case."""
    parts = [s.lower() for s in resolve(path).suffixes]
    packed = parts.pop() if parts and parts[-1] in PACKED else ""
    return (parts[-1] if parts else ""), packed


def line_blocks(path: str | Path) -> Iterator[tuple[bytes, int]]:
    """Yield blocks of whole lines, valid UTF-8, every line with its "\\n", and the number of each one's first line, from 1."""
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


def _opened(path: str | Path, packed: str) -> Any:
    if packed == ".gz":
        return gzip.open(resolve(path))
    if packed:
        return pa.input_stream(str(resolve(path)), compression={".zst": "zstd", ".bz2": "bz2"}[packed])
    return resolve(path).open("rb")


def _stream(path: str | Path) -> Iterator[bytes]:
    packed = suffixes(path)[1]
    try:
        with _opened(path, packed) as file:
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
        told = "is truncated, damaged or not of its suffix" if packed else "cannot be read"
        raise BadInput(f"{path}: {told} ({error.strerror or error}); fetch the file again") from None


def _checked(block: bytes, path: str | Path, number: int) -> bytes:
    try:
        block.decode("utf-8")
    except UnicodeDecodeError as error:
        line = number + block.count(b"\n", 0, error.start)
        raise BadInput(
            f"{path}: line {line} is not UTF-8 (byte {block[error.start]:#04x}); convert the file, e.g. with iconv"
        ) from None
    return block


def lines(block: bytes) -> pa.Array:
    """Return the lines of a block that ends in "\\n", without Python objects."""
    ends = np.flatnonzero(np.frombuffer(block, np.uint8) == 10)
    offsets = np.concatenate([[0], ends - np.arange(len(ends))]).astype(np.int64)
    text = block.replace(b"\n", b"")
    return pa.Array.from_buffers(pa.large_string(), len(ends), [None, pa.py_buffer(offsets), pa.py_buffer(text)])


def objects(path: str | Path, blank: dict[str, Any] | None = None) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number, object) of a JSON lines file; `blank` stands for empty lines, else they are an error."""
    for block, first in line_blocks(path):
        for number, line in enumerate(block[:-1].split(b"\n"), first):
            if blank is not None and not line.strip():
                yield number, blank
                continue
            try:
                value = json.loads(line)
            except (ValueError, RecursionError):
                hint = "is empty; remove it" if not line.strip() else "is not valid JSON; each line is one object"
                raise BadInput(f"{path}: line {number} {hint}") from None
            if not isinstance(value, dict):
                raise BadInput(
                    f"{path}: line {number} is a JSON {type(value).__name__}; each line is one object with `text`"
                )
            yield number, value


def text_of(value: dict[str, Any], path: str | Path, number: int, column: str = "text") -> str:
    """Return the text of an object of a JSON lines file."""
    if column not in value:
        others = [str(key) for key in value][:8]
        told = f"its keys are {', '.join(others)}; name one of them with --text-column" if others else "it is empty"
        raise BadInput(f"{path}: line {number} has no `{column}`; {told}")
    text = value[column]
    if not isinstance(text, str):
        raise BadInput(f"{path}: line {number}: `{column}` is of type {type(text).__name__}; it must be a string")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise BadInput(
            f"{path}: line {number}: the text has half of a surrogate pair, which is no character; repair it"
        ) from None
    return text
