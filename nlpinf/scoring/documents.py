"""Scores of documents whose tokens lie in packed rows: the scores of their tokens, added up.

A packed row holds pieces of several documents, and a long document lies in several rows. A token's score belongs to the
document that the token is of; a causal model's loss of a token belongs to the token predicted, although the output before
it, maybe in another document, predicts it. So the documents' scores add up to the rows' scores.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from nlpinf.errors import BadInput
from nlpinf.scoring.files import first_name, publish, write_table
from nlpinf.scoring.store import Scores
from nlpinf.scoring.tables import lists_of

DOCUMENTS = "documents.parquet"


@dataclass(frozen=True)
class ScoredDocument:
    """One document of the result for one query.

    `document`          its number in the corpus before packing
    `score`             the sum of its tokens' scores; positive = harmful
    `predicted_change`  −score/m: by about so much leaving its tokens out of the loss changes the query's value
    `tokens`            its counted tokens; the first of each row of a causal model is not predicted, so not counted
    `first_row`, `rows` the first packed row with counted tokens of it, and how many there are
    """

    document: int
    score: float
    predicted_change: float
    tokens: int
    first_row: int
    rows: int


class Documents:
    """The scores of the documents, in the order of their numbers; those without a counted token are not there.

    `table` has the columns `document`, `score` (as in the rows' parts), `tokens`, `first_row` and `rows`.
    """

    def __init__(self, scores: Scores, table: pa.Table) -> None:
        self.scores, self.table = scores, table

    @classmethod
    def of(cls, scores: Scores) -> Documents:
        """Return the documents of scores that were made from packed rows with token scores: read, or else added up.

        One pass over the parts; holds 32 bytes a document and 8 more for each query. Raises `BadInput` without token
        scores, where rows are documents themselves, and where parts are missing.
        """
        identity = scores.manifest["identity"]
        where = scores.folder or "the scores"
        if not identity.get("documents"):
            if identity.get("token_scores"):
                raise BadInput(f"{where}: the rows are no packed ones, so that each is a document; rank the rows")
            raise BadInput(
                f"{where}: has no token scores, which documents of packed rows are added up from; score with --token-scores"
            )
        if scores.missing:
            raise BadInput(f"{where}: {len(scores.missing)} parts are missing; finish or merge it before")
        path = None if scores.folder is None else scores.folder / DOCUMENTS
        if path is not None and path.exists():
            return cls(scores, _read(path))
        return cls(scores, _added(scores))

    def __len__(self) -> int:
        return len(self.table)

    @cached_property
    def numbers(self) -> np.ndarray:
        """The documents' numbers, ascending, (D,) int64."""
        return self.table["document"].to_numpy()

    def column(self, query: int | str = 0) -> np.ndarray:
        """Return the documents' scores for a query, by number or name, (D,) float32."""
        return self.scores.scores_of(self.table, self.scores.index_of(query))

    def top(self, k: int = 20, query: int | str = 0, helpful: bool = False) -> list[ScoredDocument]:
        """Return the `k` documents with the largest scores (most harmful first), or the smallest (most helpful first)."""
        if k < 1:
            raise BadInput(f"top {k} documents were asked for; give a number of at least 1")
        values = self.column(query)
        order = np.argsort(values if helpful else -values, kind="stable")[:k]
        chosen = self.table.select(["document", "tokens", "first_row", "rows"]).take(pa.array(order)).to_pylist()
        return [
            ScoredDocument(score=float(values[i]), predicted_change=-float(values[i]) / self.scores.m, **row)
            for i, row in zip(order, chosen)
        ]


def write_documents(scores: Scores) -> None:
    """Write documents.parquet beside the parts, unless it is there, where rows are packed and no part is missing."""
    if scores.folder is None or scores.missing or not scores.manifest["identity"].get("documents"):
        return
    path = scores.folder / DOCUMENTS
    if not path.exists():
        table = _added(scores)
        publish(path, lambda temporary: write_table(table, temporary), first_name)


def _added(scores: Scores) -> pa.Table:
    found = [_part_sums(table, len(scores.queries)) for table in scores.tables(_COLUMNS)]
    numbers, sums, tokens, first_rows, rows = (np.concatenate(column) for column in zip(*found))
    documents, inverse = np.unique(numbers, return_inverse=True)
    first = np.full(len(documents), np.iinfo(np.int64).max)
    np.minimum.at(first, inverse, first_rows)
    return pa.table(
        {
            "document": pa.array(documents),
            "score": lists_of(_sums(inverse, sums, len(documents)).astype(np.float32)),
            "tokens": pa.array(np.bincount(inverse, tokens).astype(np.int64)),
            "first_row": pa.array(first),
            "rows": pa.array(np.bincount(inverse, rows).astype(np.int32)),
        }
    )


_COLUMNS = ["row", "tokens", "token_scores", "token_documents"]


def _part_sums(table: pa.Table, queries: int) -> tuple[np.ndarray, ...]:
    """Return, for the documents of a part: numbers, sums (D, queries), tokens, least row number, number of rows."""
    owner = np.repeat(table["row"].to_numpy(), table["tokens"].to_numpy())
    values = table["token_scores"].combine_chunks().flatten()
    values = (values if queries == 1 else values.flatten()).to_numpy().astype(np.float64).reshape(len(owner), queries)
    documents, inverse = np.unique(table["token_documents"].combine_chunks().flatten().to_numpy(), return_inverse=True)
    first = np.full(len(documents), np.iinfo(np.int64).max)
    np.minimum.at(first, inverse, owner)
    pairs = np.unique(np.stack([inverse, owner]), axis=1)
    rows = np.bincount(pairs[0], minlength=len(documents))
    return documents, _sums(inverse, values, len(documents)), np.bincount(inverse), first, rows


def _sums(groups: np.ndarray, values: np.ndarray, count: int) -> np.ndarray:
    return np.stack([np.bincount(groups, column, count) for column in values.T], 1)


def _read(path: Path) -> pa.Table:
    try:
        return pq.read_table(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise BadInput(f"{path}: cannot be read ({str(error).splitlines()[0]}); delete it") from None
