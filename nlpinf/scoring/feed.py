"""A corpus cut into parts, read in order as often as asked; texts are held a part at a time.

A part is a range of the feed's rows: all of the corpus, or those that were chosen (`Feed.choose`, `StreamFeed.dedupe`).
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pyarrow as pa

from nlpinf.data.corpus import Corpus, TextsDigest, examples_sha256
from nlpinf.data.sources import ODD, EmptyPolicy, Source, find, kept, odd
from nlpinf.errors import BadInput

_BLOCK = 1 << 16

Blocks = Callable[[], Iterator[tuple[np.ndarray, pa.Array, int]]]


@dataclass(frozen=True)
class Part:
    """Rows in a row: their numbers (n,) int64, their texts if they have any, and the examples that the task takes.

    Of packed rows, `documents` tells the document (I,) of the tokens at given places (I,) of given rows of the part (I,).
    """

    number: int
    rows: np.ndarray
    texts: pa.ChunkedArray | None
    read: Callable[[], Sequence[Any]]
    counts: np.ndarray | None = None
    documents: Callable[[np.ndarray, np.ndarray], np.ndarray] | None = None

    @cached_property
    def examples(self) -> Sequence[Any]:
        """The examples, made when first asked for: most processes skip most parts."""
        return self.read()


@dataclass(frozen=True)
class Repeats:
    """Rows whose text an earlier row has: `rows` and, beside each, the number of that `first` row; both (n,) int64."""

    rows: np.ndarray
    first: np.ndarray


class Feed(ABC):
    """Rows of a corpus in order. `size` of them are fed, of `total`; `sha256` is that of all texts or examples.

    `reading` is what else than `path` it takes to read it again. `odd` tells how many of all its texts have characters that hint at damage, by name (`nlpinf.data.sources.ODD`).
    """

    path: str | None
    skipped: dict[str, int]
    total: int
    sha256: str
    chosen: np.ndarray | None = None  # (total,) bool
    counts: np.ndarray | None = None  # (size,) int32
    repeats: Repeats | None = None
    odd: Mapping[str, int] = MappingProxyType({})
    reading: Mapping[str, Any] = MappingProxyType({})
    packed: bool = False  # whether rows hold pieces of several documents

    @property
    def size(self) -> int:
        """The number of rows fed."""
        return self.total if self.chosen is None else int(self.chosen.sum())

    @cached_property
    def rows(self) -> np.ndarray:
        """The numbers of the rows fed, (size,) int64."""
        return self.all_rows if self.chosen is None else self.all_rows[self.chosen]

    @property
    @abstractmethod
    def all_rows(self) -> np.ndarray:
        """The numbers of all rows of the corpus, (total,) int64."""

    @abstractmethod
    def parts(self, wanted: Iterable[int], part_rows: int) -> Iterator[Part]:
        """Yield the parts of these numbers, which ascend; one pass over the corpus."""

    @abstractmethod
    def choose(self, chosen: np.ndarray) -> Feed:
        """Return the feed of the rows at which `chosen`, (total,) bool, is true; they keep their numbers."""

    def taken(self, places: np.ndarray) -> Part:
        """Return the rows at these places of the feed, (n,) distinct, as one part, in the corpus's order."""
        chosen = np.zeros(self.total, bool)
        inside = np.arange(self.total) if self.chosen is None else np.flatnonzero(self.chosen)
        chosen[inside[places]] = True
        return next(iter(self.choose(chosen).parts([0], len(places))))

    def rows_sha256(self) -> str:
        """Return the sha256 of the numbers of the rows fed."""
        return hashlib.sha256(np.ascontiguousarray(self.rows, "<i8").tobytes()).hexdigest()

    @property
    def has_texts(self) -> bool:
        """Whether rows have texts to keep."""
        return True


class StreamFeed(Feed):
    """A feed of texts from blocks (row numbers, texts, rows left out) that can be read again and again.

    Holds 8 bytes a row for its number (and while it looks for repeated texts, 16 more), and the texts of a block.
    """

    def __init__(self, blocks: Blocks, path: str | None = None, skipped: dict[str, int] | None = None) -> None:
        self._blocks, self.path = blocks, path
        self.skipped = dict(skipped or {})
        self._scanned: tuple[str, np.ndarray] | None = None

    @classmethod
    def of(cls, source: Source, empty: EmptyPolicy = "error") -> StreamFeed:
        """Return the feed of a source; reads it once, to count, number and hash its rows."""
        feed = cls(lambda: kept(source, empty), source.name)
        feed.reading = source.reading
        feed._scan()
        return feed

    @classmethod
    def of_corpus(cls, corpus: Corpus) -> StreamFeed:
        """Return the feed of a corpus in memory, without copying it."""
        numbers = corpus.rows.numpy()

        def blocks() -> Iterator[tuple[np.ndarray, pa.Array, int]]:
            for start in range(0, len(corpus), _BLOCK):
                stop = min(start + _BLOCK, len(corpus))
                yield numbers[start:stop], corpus.texts(start, stop), 0

        feed = cls(blocks, corpus.path, corpus.skipped)
        feed._scanned, feed.reading = (corpus.sha256, numbers), corpus.reading
        found = [odd(texts) for _, texts, _ in blocks()]
        feed.odd = {name: count for name in ODD if (count := sum(each[name] for each in found))}
        return feed

    def _scan(self) -> None:
        digest, numbers, blank, strange = TextsDigest(), [], 0, dict.fromkeys(ODD, 0)
        for rows, texts, left_out in self._blocks():
            digest.update(texts)
            numbers.append(rows)
            blank += left_out
            strange = {name: strange[name] + count for name, count in odd(texts).items()}
        if not sum(map(len, numbers)):
            raise BadInput(f"{self.path}: the corpus is empty; give one with at least one sentence")
        if blank:
            self.skipped["empty"] = blank
        self._scanned = digest.hexdigest(), np.concatenate(numbers)
        self.odd = {name: count for name, count in strange.items() if count}

    @property
    def sha256(self) -> str:  # type: ignore[override]
        """The sha256 of all texts: `nlpinf.data.corpus.TextsDigest`."""
        assert self._scanned is not None
        return self._scanned[0]

    @property
    def all_rows(self) -> np.ndarray:
        assert self._scanned is not None
        return self._scanned[1]

    @property
    def total(self) -> int:  # type: ignore[override]
        """The number of rows of the corpus."""
        return len(self.all_rows)

    def choose(self, chosen: np.ndarray) -> StreamFeed:
        feed = StreamFeed(self._blocks, self.path, self.skipped)
        feed._scanned, feed.chosen, feed.odd, feed.reading = self._scanned, chosen, self.odd, self.reading
        return feed

    def dedupe(self) -> StreamFeed:
        """Return the feed of the first row of every text, with `counts` and `repeats`; texts are told apart by a 128-bit hash."""
        hashes = np.empty((self.total, 2), np.uint64)
        start = 0
        for _, texts, _ in self._blocks():
            marks = [hashlib.blake2b(t.encode(), digest_size=16).digest() for t in texts.to_pylist()]
            hashes[start : start + len(marks)] = np.frombuffer(b"".join(marks), "<u8").reshape(-1, 2)
            start += len(marks)
        order = np.lexsort((hashes[:, 1], hashes[:, 0]))  # stable: of equal texts the first row comes first
        new = np.ones(len(order), bool)
        new[1:] = (hashes[order[1:]] != hashes[order[:-1]]).any(1)
        del hashes
        heads = order[new]
        group = np.cumsum(new) - 1
        chosen = np.zeros(len(order), bool)
        chosen[heads] = True
        counts = np.bincount(group).astype(np.int32)[np.argsort(heads)]
        later = order[~new]
        first = heads[group[~new]]
        ascending = np.argsort(later)
        feed = self.choose(chosen)
        feed.counts = counts
        feed.repeats = Repeats(self.all_rows[later[ascending]], self.all_rows[first[ascending]])
        feed.skipped = {**self.skipped, **({"repeated": len(later)} if len(later) else {})}
        return feed

    def parts(self, wanted: Iterable[int], part_rows: int) -> Iterator[Part]:
        todo = iter(wanted)
        part = next(todo, None)
        pieces: list[pa.Array] = []
        seen = passed = 0  # rows of the corpus, rows of the feed
        for _, texts, _ in self._blocks():
            if part is None:
                return
            if self.chosen is not None:
                here = self.chosen[seen : seen + len(texts)]
                seen += len(texts)
                if passed + (count := int(here.sum())) <= part * part_rows:
                    passed += count
                    continue
                texts = texts.filter(pa.array(here))
            end = passed + len(texts)
            while part is not None and (start := part * part_rows) < end:
                stop = min(start + part_rows, self.size)
                first = max(start, passed)
                pieces.append(texts.slice(first - passed, min(stop, end) - first))
                if stop > end:
                    break
                column = pa.chunked_array(pieces)
                counts = None if self.counts is None else self.counts[start:stop]
                yield Part(part, self.rows[start:stop], column, column.to_pylist, counts)
                pieces, part = [], next(todo, None)
            passed = end
        if part is not None:
            raise BadInput(
                f"{self.path}: has fewer rows than a moment ago; a corpus must stay as it is while it is scored"
            )


class SequenceFeed(Feed):
    """A feed of any sequence of examples in memory: labelled rows, lists of token ids, tensors."""

    def __init__(self, data: Sequence[Any], chosen: np.ndarray | None = None) -> None:
        self._data, self.chosen = data, chosen
        self.path = getattr(data, "path", None)
        self.skipped = dict(getattr(data, "skipped", {}))
        self.total = len(data)
        self.packed = bool(getattr(data, "packed", False))

    @cached_property
    def sha256(self) -> str:  # type: ignore[override]
        """The sha256 of the examples."""
        return examples_sha256(self._data)

    @cached_property
    def all_rows(self) -> np.ndarray:
        rows = getattr(self._data, "rows", None)
        return np.arange(self.total) if rows is None else np.asarray(rows, np.int64)

    @property
    def has_texts(self) -> bool:
        return hasattr(self._data, "texts") and self._data.texts(0, 1) is not None

    def choose(self, chosen: np.ndarray) -> SequenceFeed:
        return SequenceFeed(self._data, chosen)

    def parts(self, wanted: Iterable[int], part_rows: int) -> Iterator[Part]:
        places = np.arange(self.total) if self.chosen is None else np.flatnonzero(self.chosen)
        for part in wanted:
            here = places[part * part_rows : (part + 1) * part_rows]
            texts = None
            if self.has_texts:
                first = int(here[0])
                block = self._data.texts(first, int(here[-1]) + 1)  # type: ignore[attr-defined]
                texts = pa.chunked_array([block.take(pa.array(here - first))])
            yield Part(part, self.all_rows[here], texts, partial(self._read, here), None, self._documents(here))

    def _read(self, here: np.ndarray) -> list[Any]:
        return [self._data[int(i)] for i in here]

    def _documents(self, here: np.ndarray) -> Callable[[np.ndarray, np.ndarray], np.ndarray] | None:
        if not self.packed:
            return None
        return lambda rows, places: self._data.documents_of(here[rows], places)  # type: ignore[attr-defined]


def feed_of(corpus: Any, empty: EmptyPolicy = "error") -> Feed:
    """Return the feed of whatever a corpus may be: a path, a source, a `datasets` object, a `Corpus`, or examples."""
    if isinstance(corpus, Feed):
        return corpus
    if isinstance(corpus, str | Path) or type(corpus).__module__.startswith("datasets."):
        return StreamFeed.of(find(corpus), empty)
    if isinstance(corpus, Source):
        return StreamFeed.of(corpus, empty)
    if isinstance(corpus, Corpus):
        return StreamFeed.of_corpus(corpus)
    if not len(corpus):
        raise BadInput("the corpus is empty; give at least one example")
    if all(isinstance(corpus[i], str) for i in range(len(corpus))):
        return StreamFeed.of_corpus(Corpus(corpus))
    return SequenceFeed(corpus)


def deduped(feed: Feed) -> StreamFeed:
    """Return the feed without repeated texts; `BadInput` if the examples are no texts."""
    if not isinstance(feed, StreamFeed):
        raise BadInput("only texts can be deduplicated; these examples are labelled rows, token ids or tensors")
    return feed.dedupe()
