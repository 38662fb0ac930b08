"""A corpus without the rows that scores tell to drop: read, filtered and written in a stream."""

from __future__ import annotations

import bz2
import gzip
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from nlpinf.data.files import suffixes
from nlpinf.data.sources import find
from nlpinf.errors import BadInput
from nlpinf.scoring.feed import Feed, feed_of
from nlpinf.scoring.files import disk, publish, tidy
from nlpinf.scoring.select import Selection
from nlpinf.scoring.store import REPEATS, Scores

_FORMATS = (".txt", ".jsonl", ".parquet")


@dataclass(frozen=True)
class Filtered:
    """What was written: `rows` of the source, how many were `dropped` and `replaced`, how many `written`.

    `predicted_change` is −Σ score/m over the dropped rows, by query: by about so much leaving them out of pretraining
    changes the query's value, to first order; what replaces them adds its own.
    """

    out: Path
    rows: int
    dropped: int
    replaced: int
    written: int
    edges: dict[str, float]
    predicted_change: dict[str, float]


def filter_corpus(
    scores: Scores,
    selection: Selection,
    out: str | Path,
    *,
    keep: bool = False,
    corpus: Any = None,
    replacement: Any = None,
) -> Filtered:
    """Write the corpus without the rows of `selection` (with `keep`, those rows alone) to `out`, in their order.

    `out`          .txt (one text a line), .jsonl (`text` and `row`), each also .gz, .zst or .bz2, or .parquet
    `corpus`       where the texts are, if the scores keep none or equal texts were scored once: it must be the one
                   that was scored; a path is read as it was then (column, split)
    `replacement`  another corpus, whose rows take the places of the dropped ones, from its first on; their `row` is null

    Memory: 9 bytes a row for the decision, and a block of texts.
    """
    path = Path(out)
    name, packed = suffixes(path)
    if name not in _FORMATS or (packed and name == ".parquet"):
        raise BadInput(
            f"{path}: the format of the output is not known; name it .txt, .jsonl (also .gz, .zst, .bz2) or .parquet"
        )
    if path.exists():
        raise BadInput(f"{path}: is there already; give another name, or delete it")
    drop = ~selection.chosen if keep else selection.chosen
    dropped = dropped_rows(scores, drop)
    source = _source(scores, corpus)
    total = len(scores) if source is None else source.total
    filler = None if replacement is None else feed_of(replacement, "skip")
    if filler is not None and filler.size < len(dropped):
        raise BadInput(
            f"{filler.path}: has {filler.size:,} rows to replace {len(dropped):,}; give a larger corpus, or drop fewer"
        )
    if filler is None and len(dropped) == total:
        raise BadInput(f"{path}: every row would be dropped; drop fewer")
    blocks = _filled(_blocks(scores, source), dropped, filler)
    with disk(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        tidy(path)
    written = [0]
    publish(path, lambda temporary: written.append(_WRITERS[name](blocks, temporary, packed, path)))
    replaced = len(dropped) if filler is not None else 0
    return Filtered(path, total, len(dropped), replaced, written[-1], selection.edges, _predicted_change(scores, drop))


def dropped_rows(scores: Scores, drop: np.ndarray) -> np.ndarray:
    """Return the numbers of the rows to drop, ascending; a text that was scored once goes with all its rows."""
    return _with_repeats(scores, scores.rows[drop])


def differs(scores: Scores, feed: Feed) -> str | None:
    """Say in what a corpus is another than that which was scored; None if in nothing."""
    if feed.sha256 != scores.manifest["identity"]["corpus_sha256"]:
        return "the texts differ"
    if not np.array_equal(np.sort(feed.all_rows), _with_repeats(scores, scores.rows)):
        return "the texts have other row numbers, as where empty lines were removed"
    return None


def _with_repeats(scores: Scores, rows: np.ndarray) -> np.ndarray:
    """Return these row numbers and those of the rows that have the same texts and were not scored, ascending."""
    if scores.folder is None and scores.manifest["identity"].get("dedupe", False):
        raise BadInput("scores in memory do not know the rows of equal texts; score into a folder (out=...)")
    if scores.folder is not None and (scores.folder / REPEATS).exists():
        table = pq.read_table(scores.folder / REPEATS)
        repeated = np.isin(table["first"].to_numpy(), rows)
        rows = np.concatenate([rows, table["row"].to_numpy()[repeated]])
    return np.sort(rows)


def _source(scores: Scores, corpus: Any) -> Feed | None:
    """Return the feed of the texts, None for those that the scores keep."""
    deduped = scores.manifest["identity"].get("dedupe", False)
    if corpus is None:
        if "text" in scores.columns and not deduped:
            return None
        told = "score equal texts once" if deduped else "keep no texts"
        if scores.manifest["corpus"]["path"] is None:
            raise BadInput(f"{scores.folder or 'the scores'}: {told}; give the corpus too (--corpus)")
        corpus = scores.manifest["corpus"]["path"]
    if isinstance(corpus, str | Path):
        corpus = find(corpus, **scores.manifest["corpus"].get("reading", {}))
    skipped = scores.manifest["corpus"].get("skipped", {})
    feed = feed_of(corpus, "skip" if "empty" in skipped else "error")
    if difference := differs(scores, feed):
        raise BadInput(f"{feed.path or 'the corpus'}: is not the corpus that was scored ({difference}); give that one")
    return feed


def _blocks(scores: Scores, source: Feed | None) -> Iterator[tuple[np.ndarray, pa.ChunkedArray]]:
    if source is None:
        for table in scores.tables(["row", "text"]):
            yield table["row"].to_numpy(), table["text"]
        return
    size = 1 << 16
    for part in source.parts(range(-(-source.size // size)), size):
        if part.texts is None:
            raise BadInput(
                f"{source.path or 'the corpus'}: its rows are no texts; filter them in Python (docs/how-to/read-scores.md)"
            )
        yield part.rows, part.texts


def _filled(
    blocks: Iterator[tuple[np.ndarray, pa.ChunkedArray]], dropped: np.ndarray, filler: Feed | None
) -> Iterator[tuple[pa.Array, pa.Array]]:
    """Yield (rows, texts) of what stays, and of the filler at the places of what does not."""
    fresh = None if filler is None else _Texts(filler)
    for rows, texts in blocks:
        place = np.searchsorted(dropped, rows)
        out = dropped[np.minimum(place, len(dropped) - 1)] == rows if len(dropped) else np.zeros(len(rows), bool)
        column = _joined(texts)
        if fresh is None:
            yield pa.array(rows[~out]), column.filter(pa.array(~out))
        elif not out.any():
            yield pa.array(rows), column
        else:
            both = pa.concat_arrays([column, fresh.take(int(out.sum()))])
            source = np.arange(len(rows))
            source[out] = len(rows) + np.arange(int(out.sum()))
            yield pa.array(rows, mask=out), both.take(pa.array(source))


class _Texts:
    """The texts of a feed, so many at a time."""

    def __init__(self, feed: Feed) -> None:
        size = 1 << 16
        self._parts = feed.parts(range(-(-feed.size // size)), size)
        self._left = pa.array([], pa.large_string())

    def take(self, count: int) -> pa.Array:
        while len(self._left) < count:
            texts = next(self._parts).texts
            assert texts is not None
            self._left = pa.concat_arrays([self._left, _joined(texts)])
        taken, self._left = self._left.slice(0, count), self._left.slice(count)
        return taken


def _joined(texts: pa.ChunkedArray) -> pa.Array:
    return pa.concat_arrays([chunk.cast(pa.large_string()) for chunk in texts.chunks])


def _predicted_change(scores: Scores, drop: np.ndarray) -> dict[str, float]:
    total, start = np.zeros(len(scores.queries)), 0
    columns = ["score", "count"] if "count" in scores.columns else ["score"]
    for table in scores.tables(columns):
        here = drop[start : start + len(table)].astype(np.float64)
        start += len(table)
        if len(columns) == 2:
            here *= table["count"].to_numpy()
        for query in range(len(total)):
            total[query] += scores.scores_of(table, query).astype(np.float64) @ here
    return dict(zip(scores.queries, (-total / scores.m).tolist()))


@contextmanager
def _opened(path: Path, packed: str) -> Iterator[Any]:
    """Open a file to write; closing it writes its last bytes, and raises where there is no room for them."""
    with path.open("wb") as raw:
        if packed == ".gz":  # without a name and a time, so that equal texts give equal bytes
            with gzip.GzipFile("", "wb", fileobj=raw, mtime=0) as file:
                yield file
        elif packed == ".bz2":
            with bz2.open(raw, "wb") as file:
                yield file
        elif packed:
            with pa.CompressedOutputStream(raw, "zstd") as file:
                yield file
        else:
            yield raw


def _write_lines(blocks: Iterator[tuple[pa.Array, pa.Array]], temporary: Path, packed: str, path: Path) -> int:
    count = 0
    with _opened(temporary, packed) as file:
        for rows, texts in blocks:
            broken = pc.or_(pc.match_substring(texts, "\n"), pc.ends_with(texts, "\r"))
            if pc.any(broken).as_py():
                row = rows[broken.index(True).as_py()].as_py()
                which = "a row that takes the place of a dropped one" if row is None else f"row {row}"
                raise BadInput(
                    f"{path}: the text of {which} has a line break, which a .txt file cannot hold; write .jsonl"
                )
            if not count and len(texts) and texts[0].as_py().startswith("\ufeff"):
                raise BadInput(
                    f"{path}: the first text begins with U+FEFF, which readers of a .txt file leave out; write .jsonl"
                )
            count += len(texts)
            if len(texts):
                file.write("\n".join([*texts.to_pylist(), ""]).encode())
    return count


def _write_json(blocks: Iterator[tuple[pa.Array, pa.Array]], temporary: Path, packed: str, path: Path) -> int:
    count = 0
    encode = json.JSONEncoder(ensure_ascii=False).encode
    with _opened(temporary, packed) as file:
        for rows, texts in blocks:
            count += len(texts)
            lines = (encode({"text": text, "row": row}) for text, row in zip(texts.to_pylist(), rows.to_pylist()))
            file.write("".join(f"{line}\n" for line in lines).encode())
    return count


def _write_parquet(blocks: Iterator[tuple[pa.Array, pa.Array]], temporary: Path, packed: str, path: Path) -> int:
    count = 0
    schema = pa.schema({"row": pa.int64(), "text": pa.large_string()})
    with pq.ParquetWriter(temporary, schema, compression="zstd", use_dictionary=False) as writer:
        for rows, texts in blocks:
            count += len(texts)
            writer.write_table(pa.table([rows, texts], schema=schema))
    return count


_WRITERS: dict[str, Callable[[Iterator[tuple[pa.Array, pa.Array]], Path, str, Path], int]] = {
    ".txt": _write_lines,
    ".jsonl": _write_json,
    ".parquet": _write_parquet,
}
