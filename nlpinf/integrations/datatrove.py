"""Scores as a step of a datatrove pipeline (`pip install nlpinf[datatrove]`), on its local, Slurm and Ray executors."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep

from nlpinf import querystore
from nlpinf.errors import BadInput
from nlpinf.scoring.rows import Mode, RowScorer
from nlpinf.scoring.tables import finite


class InfluenceScorer(PipelineStep):
    """Adds ⟨v, g'(z)⟩ to every document's metadata, and drops documents of which it is too great. Positive = harmful.

    `query`       query folder of `nlpinf query`; every worker opens it, with its pretraining run (`pretrain`, if that moved)
    `key`         the metadata key: a number, or with several queries a list in their order
    `drop_above`  drop documents whose score for the first query is greater; choose it from the scores of a sample
    `batch_rows`  documents held and sorted by length together

    A document of white space alone has no score and passes as it is. Masks of masked language models are drawn by row
    number: the integer `row` of the metadata if there is one, else a hash of the document's id, so that a document's score
    depends on neither the order nor the number of tasks.
    """

    type = "📊 - SCORE"
    name = "🧭 nlpinf influence"

    def __init__(
        self,
        query: str | Path,
        *,
        pretrain: str | Path | None = None,
        key: str = "influence",
        drop_above: float | None = None,
        mode: Mode = "auto",
        batch_rows: int = 4096,
    ) -> None:
        super().__init__()
        if batch_rows < 1:
            raise BadInput(f"batches of {batch_rows} documents were asked for; give at least 1")
        if drop_above is not None and not np.isfinite(drop_above):
            raise BadInput(f"drop_above is {drop_above}; give a finite number")
        querystore.manifest(query)  # says at once if it is none; the models are opened where the step runs
        self.query, self.pretrain, self.key = str(query), None if pretrain is None else str(pretrain), key
        self.drop_above, self.mode, self.batch_rows = drop_above, mode, batch_rows

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        """Yield the documents in their order."""
        scorer = RowScorer(querystore.load(self.query, run=self.pretrain), self.mode)
        documents = iter(data or ())
        while batch := list(islice(documents, self.batch_rows)):
            with self.track_time("batch"):
                self._score(scorer, [document for document in batch if document.text.strip()])
            for document in batch:
                value = document.metadata.get(self.key)
                first = value[0] if isinstance(value, list) else value
                if self.drop_above is not None and first is not None and first > self.drop_above:
                    self.stat_update("dropped")
                    continue
                self.stat_update("forwarded" if value is not None else "empty")
                yield document

    def _score(self, scorer: RowScorer, documents: list[Document]) -> None:
        if not documents:
            return
        rows = [_row(document) for document in documents]
        scores = finite(scorer([d.text for d in documents], rows).scores, np.array(rows), "score")
        for document, values in zip(documents, scores.tolist()):
            document.metadata[self.key] = values[0] if scorer.queries == 1 else values
            self.stat_update("score", value=values[0])


def _row(document: Document) -> int:
    row = document.metadata.get("row")
    if isinstance(row, int) and not isinstance(row, bool):
        return row
    return int.from_bytes(hashlib.blake2b(str(document.id).encode(), digest_size=8).digest(), "big") >> 1
