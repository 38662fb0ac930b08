"""One pass over a corpus: ⟨v, g'(z)⟩ of every row and query, part by part, into a folder or into memory.

Inside a part, rows of like length share a batch, and results go back into the corpus's order. A row's score depends on
the row alone (its text, and its number where masks are drawn), so batches, parts, processes and resumption do not change it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from nlpinf.data.corpus import Corpus
from nlpinf.data.sources import EmptyPolicy
from nlpinf.errors import BadInput
from nlpinf.influence import QueryVectors
from nlpinf.parameters import Parameters
from nlpinf.scoring.documents import write_documents
from nlpinf.scoring.feed import Feed, Part, deduped, feed_of
from nlpinf.scoring.making import Scoring
from nlpinf.scoring.manifest import scores_identity, scores_manifest
from nlpinf.scoring.rows import Mode, RowScorer, Tick
from nlpinf.scoring.shards import Make, Progress, Shard, Worker
from nlpinf.scoring.store import Scores, Store, write_repeats
from nlpinf.scoring.tables import finite, table
from nlpinf.stages import Precision, Stage
from nlpinf.tasks import MaskedLM

PART_ROWS = 8192  # a minute or two of work on a laptop: what a killed run loses at most


def score(
    vectors: QueryVectors,
    corpus: Feed | Corpus | Sequence[Any] | str | Path | None = None,
    out: str | Path | None = None,
    *,
    token_scores: bool = False,
    text: bool = True,
    mode: Mode = "auto",
    empty: EmptyPolicy = "error",
    dedupe: bool = False,
    compress: float | None = None,
    precision: Precision | None = None,
    compiled: bool = False,
    shard: Shard | None = None,
    part_rows: int = PART_ROWS,
    batch_size: int | None = None,
    batch_tokens: int | None = None,
    progress: Progress | None = None,
) -> Scores:
    """Return the score ⟨v, g'(z)⟩ of every row z of `corpus` for every query.

    It is dq/dε for upweighting z by ε, in the query's unit times m; positive = harmful. Formulas: docs/concepts.md.

    `corpus`        examples as the pretraining task takes them; a path or `datasets` object, whose texts are read in a
                    stream, never held whole; or None: the stage's own data
    `out`           folder for the result, resumed if it holds part of it; None keeps the result in memory. Any number of
                    processes may be given the same folder: they share the parts (`nlpinf.scoring.shards`)
    `token_scores`  keep the parts of each score by counted token as well (forward mode); `text` keep the texts
    `mode`          "forward" costs about 3 forward passes a query; "reverse" costs 3 for one, 3.5 for two and 4 for 32.
                    "auto" takes the cheaper. Both are exact and agree to rounding
    `empty`         texts of white space alone in a path: "error", or "skip", counted in the manifest
    `dedupe`        score equal texts once: the first row's score (and the first row's masks, for a masked language model)
                    stands for all; the column `count` says for how many, `duplicates.parquet` for which
    `compress`      make do with query vectors of low rank, whose scores err by at most this many of the scores' standard
                    deviations in the root mean square, measured on rows of the corpus, and rank them as the exact ones
                    do to a correlation of at least 0.99; 0.05 is a good value. The manifest has what was measured
    `precision`     "bfloat16": the network's products in that precision, losses and sums as ever; where the
                    processor has units for it, scores of the same ranking in less than half of the time
    `compiled`      run reverse mode through `torch.compile`: half a minute to begin with, then about three quarters of the
                    time. What cannot be compiled is scored without, and the manifest says why
    `shard`         do no more than this share of the parts: `Shard(3, 64)`; the result then has the parts that are there
    `part_rows`     rows in a part: what is done again after an interruption, at most
    `batch_size`    sequences, `batch_tokens` padded tokens in a batch at most; default: the stage's, twice that for
                    many queries. They set the memory and change no score beyond rounding
    `progress`      called with (rows done, rows in all) after each part, and about once a second

    Raises `BadInput` for a row whose score is not finite, for a folder of another query, corpus, weights or setting,
    and when the disk is full; finished parts stay.
    """
    if part_rows < 1:
        raise BadInput(f"a part of {part_rows} rows was asked for; give a number of at least 1")
    scoring = Scoring(mode, token_scores, compress, precision, compiled, batch_size, batch_tokens)
    if shard is not None and out is None:
        raise BadInput("a shard is done into a folder; give one (out=...)")
    feed = feed_of(vectors.stage.data if corpus is None else corpus, empty)
    if dedupe:
        feed = deduped(feed)
    text = text and feed.has_texts
    identity = scores_identity(vectors, feed, part_rows, text, token_scores, compress, precision)
    if out is not None:
        Store.check(out, identity)
    scorer = scoring.scorer(vectors, feed, None if out is None else Path(out), identity)
    manifest = scores_manifest(vectors, feed, scorer, identity)

    def make(part: Part, tick: Tick | None = None) -> pa.Table:
        return table(scorer(part.examples, part.rows.tolist(), tick), part, text)

    if out is None:
        return _in_memory(manifest, feed, make, progress)
    store = Store.start(out, manifest)
    if feed.repeats is not None:
        write_repeats(store.folder, feed.repeats.rows, feed.repeats.first)
    Worker(store, feed, make, shard, progress).run()
    store.finish()
    scores = Scores.open(store.folder, partial=shard is not None)
    write_documents(scores)
    return scores


def _in_memory(manifest: dict[str, Any], feed: Feed, make: Make, progress: Progress | None) -> Scores:
    identity, tables, done = manifest["identity"], [], 0
    for part in feed.parts(range(identity["parts"]), identity["part_rows"]):
        tables.append(make(part, lambda rows: None))
        done += len(part.rows)
        if progress is not None:
            progress(done, feed.size)
    scores = Scores(manifest, [_selecting(table) for table in tables])
    if (truncated := scores.count_of("truncated")) is not None:
        manifest["corpus"]["truncated"] = truncated
    return scores


def _selecting(table: pa.Table) -> Callable[[list[str] | None], pa.Table]:
    return lambda columns: table if columns is None else table.select(columns)


class _Few(Sequence[Any]):
    """As many examples as a corpus has, the first few of them over and over: scores need m, and some to try layers on."""

    def __init__(self, examples: list[Any], size: int) -> None:
        self._examples, self._size = examples, size

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, i: Any) -> Any:
        return self._examples[i % len(self._examples)]


class Scorer:
    """The scores as a function on columns, for `datasets.Dataset.map(scorer, batched=True)` and the like.

    Takes {"text": [...]} (and "label" where the task wants it) and returns {"score": [...]}, a number a row, or a list
    with one for each query. Masked language models also need row numbers: a column "row", or `with_indices=True`.
    `text_column` names another column of texts.

    It pickles to the model, the vectors and its settings, without the corpus or anything that using it left behind: so
    `map` with `num_proc` sends it to other processes, and finds its cached result again.
    """

    def __init__(self, vectors: QueryVectors, *, mode: Mode = "auto", text_column: str = "text") -> None:
        stage = vectors.stage
        record = {"items": stage.items} if stage.reduction == "token" else {}
        lean = replace(stage, data=_Few([stage.data[i] for i in range(min(32, stage.size))], stage.size), record=record)
        self._make(lean, vectors.vectors, mode, text_column)

    def _make(self, stage: Stage, vectors: tuple[Parameters, ...], mode: Mode, text_column: str) -> None:
        self._given = {"stage": stage, "vectors": vectors, "mode": mode, "text_column": text_column}
        self._text_column = text_column
        if hasattr(stage.task, "tokenizer"):  # whose first use leaves its settings in it, and so in the pickle
            stage.task.encode([{"text": "a", "label": 0}])
        lean = QueryVectors(replace(stage), (), vectors, (), (), {})
        self._scorer = RowScorer(lean, mode)

    def __getstate__(self) -> dict[str, Any]:
        return self._given

    def __setstate__(self, given: dict[str, Any]) -> None:
        self._make(**given)

    def __call__(
        self, columns: Mapping[str, Sequence[Any]], indices: Sequence[int] | None = None
    ) -> dict[str, list[Any]]:
        if self._text_column not in columns:
            raise BadInput(
                f"the columns have no {self._text_column!r}; there are {', '.join(columns)}; name the sentences' one (text_column)"
            )
        examples: list[Any] = list(columns[self._text_column])
        if "label" in columns:
            examples = [{"text": text, "label": label} for text, label in zip(examples, columns["label"])]
        rows = columns.get("row", indices)
        if rows is None:
            if isinstance(self._scorer.stage.task, MaskedLM):
                raise BadInput("masks are drawn by row number; give a column 'row', or map with with_indices=True")
            rows = range(len(examples))
        if not examples:
            return {"score": []}
        scores = finite(self._scorer(examples, list(rows)).scores, np.asarray(rows), "score")
        return {"score": (scores[:, 0] if self._scorer.queries == 1 else scores).tolist()}
