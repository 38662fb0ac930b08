"""Scores folders made up row by row, without a model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from nlpinf.data.corpus import Corpus
from nlpinf.scoring.feed import Feed, feed_of
from nlpinf.scoring.store import Scores, Store, write_repeats
from nlpinf.scoring.tables import lists_of

SIZE = 7


def manifest(feed: Feed, queries: int = 1, **identity: Any) -> dict[str, Any]:
    same = {"rows": feed.size, "part_rows": SIZE, "parts": -(-feed.size // SIZE), "corpus_sha256": feed.sha256}
    names = [{"name": f"query {i}"} for i in range(queries)]
    corpus = {"path": feed.path, "reading": dict(feed.reading), "rows": feed.size, "skipped": feed.skipped}
    return {
        "kind": "scores",
        "format": 1,
        "identity": {**same, **identity},
        "m": 50,
        "queries": names,
        "corpus": corpus,
    }


def made(
    folder: Path, corpus: Feed | Corpus | Sequence[str], values: np.ndarray, *, text: bool = True, **identity: Any
) -> Scores:
    """Write a folder with these scores, (rows,) or (rows, queries), for the rows of the corpus."""
    feed = feed_of(corpus)
    values = np.asarray(values, np.float32).reshape(feed.size, -1)
    more = {"dedupe": True} if feed.counts is not None else {}
    store = Store.start(folder, manifest(feed, values.shape[1], **more, **identity))
    if feed.repeats is not None:
        write_repeats(store.folder, feed.repeats.rows, feed.repeats.first)
    for part in feed.parts(store.missing(), SIZE):
        here = values[part.number * SIZE : (part.number + 1) * SIZE]
        columns = {"row": pa.array(part.rows), "score": lists_of(here)}
        columns |= {"loss": pa.array(np.ones(len(here), np.float32)), "tokens": pa.array(np.ones(len(here), np.int32))}
        if part.counts is not None:
            columns["count"] = pa.array(part.counts)
        if text:
            columns["text"] = part.texts
        store.write(part.number, pa.table(columns))
    return Scores.open(folder)
