"""One pass over a corpus: ⟨v, g'(z)⟩ of every row and query, part by part, into a folder or into memory.

Inside a part, rows of like length share a batch, and results go back into the corpus's order. A row's score depends on
the row alone (its text, and its number where masks are drawn), so batches, parts and resumption do not change it.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from nlpinf.data.corpus import Corpus, examples_sha256
from nlpinf.errors import BadInput
from nlpinf.influence import QueryVectors
from nlpinf.scoring.forward import BatchScores, ForwardScorer
from nlpinf.scoring.reverse import ReverseScorer
from nlpinf.scoring.store import FORMAT, Scores, Store
from nlpinf.stages import Stage, fingerprint, length_batches
from nlpinf.tasks import Batch, MaskedLM

Mode = Literal["auto", "forward", "reverse"]
Progress = Callable[[int, int], None]

PART_ROWS = 8192  # a minute or two of work on a laptop: what a killed run loses at most
FORWARD_QUERIES = 1  # measured: two queries cost 5.7 forward passes in forward mode and 3.5 in reverse mode


@dataclass(frozen=True)
class RowScores:
    """Results in the order of the rows given: `scores` (n, queries), `losses` (n,), `tokens` (n,), float64 and int64.

    With item scores also `items` (I, queries) in the rows' order, `targets` (I,) and `positions` (I,), of which row i
    has `tokens[i]`.
    """

    scores: np.ndarray
    losses: np.ndarray
    tokens: np.ndarray
    items: np.ndarray | None = None
    targets: np.ndarray | None = None
    positions: np.ndarray | None = None


class RowScorer:
    """Scores lists of examples with their row numbers: encodes, batches by length, scores, restores the order."""

    def __init__(
        self,
        vectors: QueryVectors,
        mode: Mode = "auto",
        token_scores: bool = False,
        batch_size: int | None = None,
        batch_tokens: int | None = None,
    ) -> None:
        if not len(vectors):
            raise BadInput("there is no query vector to score with; compute at least one")
        if mode not in ("auto", "forward", "reverse"):
            raise BadInput(f"mode {mode!r} is none of 'auto', 'forward', 'reverse'")
        if token_scores and mode == "reverse":
            raise BadInput("token scores come from forward mode; use mode='forward' or 'auto'")
        if any(limit is not None and limit < 1 for limit in (batch_size, batch_tokens)):
            raise BadInput(f"batches of {batch_size} examples, {batch_tokens} tokens were asked for; give at least 1")
        self.stage, self.token_scores, self.queries = vectors.stage, token_scores, len(vectors)
        trees = list(vectors.vectors)
        self._score: Callable[[Batch], BatchScores] = ForwardScorer(self.stage, trees)
        self.mode: Mode = "forward"
        if mode == "reverse" or (mode == "auto" and not token_scores and self.queries > FORWARD_QUERIES):
            reverse = ReverseScorer(self.stage, trees)
            # A parameter without a rule costs a forward-mode pass a query, and then reverse mode saves nothing.
            if mode == "reverse" or not reverse.uncovered:
                self._score, self.mode = reverse, "reverse"
        self.batch_size = self._budget(batch_size, self.stage.batch_size)
        self.batch_tokens = self._budget(batch_tokens, self.stage.batch_tokens)

    def __call__(self, examples: Sequence[Any], rows: Sequence[int]) -> RowScores:
        stage, task, n = self.stage, self.stage.task, len(examples)
        scores, losses, tokens = np.empty((n, self.queries)), np.empty(n), np.empty(n, np.int64)
        items: list[tuple[np.ndarray, ...]] = []
        encoded = task.encode(examples)
        waiting = list(length_batches([task.length(e) for e in encoded], self.batch_size, self.batch_tokens))[::-1]
        while waiting:
            chosen = waiting.pop()
            batch = stage.on_device(task.collate([encoded[i] for i in chosen], [rows[i] for i in chosen]))
            result = self._score(batch)
            if len(chosen) > 1 and not bool(torch.isfinite(result.scores).all()):
                waiting += [[i] for i in chosen[::-1]]  # one NaN spreads to its neighbours (0 · NaN): find whose it is
                continue
            where = np.asarray(chosen)
            scores[where], losses[where] = _numpy(result.scores), _numpy(result.losses)
            tokens[where] = _numpy(batch.counts)
            if self.token_scores:
                assert result.item_scores is not None
                items.append((where[_numpy(batch.example)], _numpy(result.item_scores), *_shown(batch)))
        if not self.token_scores:
            return RowScores(scores, losses, tokens)
        owner, values, targets, positions = (np.concatenate(column) for column in zip(*items))
        order = np.argsort(owner, kind="stable")
        return RowScores(scores, losses, tokens, values[order], targets[order], positions[order])

    def _budget(self, given: int | None, default: int) -> int:
        """Return the limit of a batch that was given, or the stage's, which the masks of an example share."""
        task = self.stage.task
        if given is None:
            # Reverse mode reads all query vectors once a batch, so larger batches pay.
            given = default * 2 if self.mode == "reverse" and self.queries > 1 else default
        return max(1, given // (task.masks if isinstance(task, MaskedLM) else 1))


def score(
    vectors: QueryVectors,
    corpus: Corpus | Sequence[Any] | str | Path | None = None,
    out: str | Path | None = None,
    *,
    token_scores: bool = False,
    text: bool = True,
    mode: Mode = "auto",
    part_rows: int = PART_ROWS,
    batch_size: int | None = None,
    batch_tokens: int | None = None,
    progress: Progress | None = None,
) -> Scores:
    """Return the score ⟨v, g'(z)⟩ of every row z of `corpus` for every query.

    It is dq/dε for upweighting z by ε, in the query's unit times m; positive = harmful. Formulas: docs/concepts.md.

    `corpus`        examples as the pretraining task takes them, a file for `Corpus.read`, or None: the stage's own data
    `out`           folder for the result, resumed if it holds part of it; None keeps the result in memory
    `token_scores`  keep the parts of each score by counted token as well (forward mode); `text` keep the texts
    `mode`          "forward" costs about 3 forward passes a query; "reverse" costs 3 for one, 3.5 for two and 4 for 32.
                    "auto" takes the cheaper. Both are exact and agree to rounding
    `part_rows`     rows in a part: what is done again after an interruption, at most
    `batch_size`    sequences, `batch_tokens` padded tokens in a batch at most; default: the stage's, twice that for
                    many queries. They set the memory and change no score beyond rounding
    `progress`      called with (rows done, rows in all) after each part

    Raises `BadInput` for a row whose score is not finite, for a folder of another query, corpus, weights or setting,
    and when the disk is full; finished parts stay.
    """
    if part_rows < 1:
        raise BadInput(f"a part of {part_rows} rows was asked for; give a number of at least 1")
    data = _examples(vectors.stage.data if corpus is None else corpus)
    scorer = RowScorer(vectors, mode, token_scores, batch_size, batch_tokens)
    rows = _rows(data)
    text = text and isinstance(data, Corpus)
    manifest = _manifest(vectors, data, rows, scorer, part_rows, text)
    store = None if out is None else Store.start(out, manifest)
    missing = range(manifest["identity"]["parts"]) if store is None else store.missing()
    tables: list[pa.Table] = []
    done = len(data) - sum(min(part_rows, len(data) - part * part_rows) for part in missing)
    for part in missing:
        start, stop = part * part_rows, min((part + 1) * part_rows, len(data))
        numbers = rows[start:stop]
        result = scorer(_slice(data, start, stop), numbers.tolist())
        table = _table(result, numbers, data.texts(start, stop) if text and isinstance(data, Corpus) else None)
        if store is None:
            tables.append(table)
        else:
            store.write(part, table)
        done += stop - start
        if progress is not None:
            progress(done, len(data))
    if store is not None:
        store.tidy()
        return Scores.open(store.folder)
    return Scores(manifest, [_selecting(table) for table in tables])


class Scorer:
    """The scores as a function on columns, for `datasets.Dataset.map(scorer, batched=True)` and the like.

    Takes {"text": [...]} (and "label" where the task wants it) and returns {"score": [...]}, a number a row, or a list
    with one for each query. Masked language models also need row numbers: a column "row", or `with_indices=True`.
    """

    def __init__(self, vectors: QueryVectors, *, mode: Mode = "auto") -> None:
        self._scorer = RowScorer(vectors, mode)

    def __call__(
        self, columns: Mapping[str, Sequence[Any]], indices: Sequence[int] | None = None
    ) -> dict[str, list[Any]]:
        if "text" not in columns:
            raise BadInput("the columns have no 'text'; rename the column that holds the sentences")
        examples: list[Any] = list(columns["text"])
        if "label" in columns:
            examples = [{"text": text, "label": label} for text, label in zip(examples, columns["label"])]
        rows = columns.get("row", indices)
        if rows is None:
            if isinstance(self._scorer.stage.task, MaskedLM):
                raise BadInput("masks are drawn by row number; give a column 'row', or map with with_indices=True")
            rows = range(len(examples))
        if not examples:
            return {"score": []}
        scores = _finite(self._scorer(examples, list(rows)).scores, np.asarray(rows), "score")
        return {"score": (scores[:, 0] if self._scorer.queries == 1 else scores).tolist()}


def _examples(corpus: Any) -> Any:
    if isinstance(corpus, str | Path):
        return Corpus.read(corpus)
    if isinstance(corpus, Corpus):
        return corpus
    if not len(corpus):
        raise BadInput("the corpus is empty; give at least one example")
    return Corpus(corpus) if all(isinstance(example, str) for example in corpus) else corpus


def _rows(data: Any) -> Tensor:
    rows = getattr(data, "rows", None)
    return torch.arange(len(data)) if rows is None else torch.as_tensor(rows, dtype=torch.int64)


def _slice(data: Any, start: int, stop: int) -> list[Any]:
    return data[start:stop] if isinstance(data, Corpus | list) else [data[i] for i in range(start, stop)]


def _selecting(table: pa.Table) -> Callable[[list[str] | None], pa.Table]:
    return lambda columns: table if columns is None else table.select(columns)


def _numpy(tensor: Tensor) -> np.ndarray:
    return tensor.detach().cpu().numpy()


def _shown(batch: Batch) -> tuple[np.ndarray, np.ndarray]:
    """Return what each item predicts (a class, −1 where targets are none) and at which place of its sequence."""
    count = len(batch.example)
    words = batch.targets if batch.shown is None else batch.shown
    targets = _numpy(words) if words.dim() == 1 and not words.is_floating_point() else None
    if batch.position is None:
        positions = np.zeros(count, np.int64)
    else:
        width = next(value.shape[1] for value in batch.inputs.values() if value.dim() > 1)
        positions = _numpy(batch.position) % width
    return np.full(count, -1) if targets is None else targets, positions


def _finite(values: np.ndarray, rows: np.ndarray, what: str) -> np.ndarray:
    """Return the values in float32; raise `BadInput` naming the first row that has one that is not finite there."""
    with np.errstate(over="ignore"):
        single = values.astype(np.float32)
    bad = ~np.isfinite(single).reshape(len(single), -1).all(1)
    if bad.any():
        row = int(rows[int(bad.argmax())])
        raise BadInput(
            f"row {row}: its {what} is not a finite number in float32; run `nlpinf check` on the model, or leave it out"
        )
    return single


def _table(result: RowScores, rows: Tensor, texts: pa.Array | None) -> pa.Table:
    numbers = _numpy(rows)
    scores = _finite(result.scores, numbers, "score")
    columns = {
        "row": pa.array(numbers),
        "score": _lists_of(scores),
        "loss": pa.array(_finite(result.losses, numbers, "loss")),
        "tokens": pa.array(result.tokens.astype(np.int32)),
    }
    if result.items is not None and result.targets is not None and result.positions is not None:
        offsets = pa.array(np.concatenate([[0], np.cumsum(result.tokens)]).astype(np.int32))
        owner = np.repeat(numbers, result.tokens)
        columns["token_scores"] = pa.ListArray.from_arrays(
            offsets, _lists_of(_finite(result.items, owner, "token score"))
        )
        columns["token_ids"] = pa.ListArray.from_arrays(offsets, pa.array(result.targets.astype(np.int32)))
        columns["token_positions"] = pa.ListArray.from_arrays(offsets, pa.array(result.positions.astype(np.int32)))
    if texts is not None:
        columns["text"] = texts
    return pa.table(columns)


def _lists_of(values: np.ndarray) -> pa.Array:
    """Return (n, queries) as a column: plain for one query, a fixed-size list for many."""
    flat = pa.array(np.ascontiguousarray(values).reshape(-1))
    return flat if values.shape[1] == 1 else pa.FixedSizeListArray.from_arrays(flat, values.shape[1])


def _manifest(
    vectors: QueryVectors, data: Any, rows: Tensor, scorer: RowScorer, part_rows: int, text: bool
) -> dict[str, Any]:
    stage = vectors.stage
    digests = [fingerprint(vector) for vector in vectors.vectors]
    identity = {
        "queries": digests,
        "weights_sha256": fingerprint(stage.parameters),
        "corpus_sha256": examples_sha256(data),
        "rows": len(data),
        "rows_sha256": hashlib.sha256(_numpy(rows).tobytes()).hexdigest(),
        "m": stage.size,
        "reduction": stage.reduction,
        "items": stage.items if stage.reduction == "token" else None,
        "task": stage.task.settings(),
        "tokenizer_sha256": _tokenizer_sha256(stage),
        "token_scores": scorer.token_scores,
        "text": text,
        "part_rows": part_rows,
        "parts": math.ceil(len(data) / part_rows),
    }
    queries = [
        {
            "name": query.name,
            "value": value if math.isfinite(value) else None,
            "sha256": digest,
            "converged": all(solution.converged for solution in verdicts.values()),
            "verdicts": {name: solution.summary() for name, solution in verdicts.items()},
        }
        for query, value, digest, verdicts in zip(vectors.queries, vectors.values, digests, vectors.verdicts)
    ]
    return {
        "kind": "scores",
        "format": FORMAT,
        "identity": identity,
        "m": stage.size,
        "sign": "positive = harmful: upweighting the row raises the query's value",
        "predicted_change": "-score/m: the change of the query's value when the row is removed, in the query's unit",
        "queries": queries,
        "query_vectors": vectors.settings,
        "stage": stage.name,
        "corpus": {"path": getattr(data, "path", None), "rows": len(data), "skipped": getattr(data, "skipped", {})},
        "scoring": {"mode": scorer.mode, "batch_size": scorer.batch_size, "batch_tokens": scorer.batch_tokens},
        "versions": {name: _version(name) for name in ("nlpinf", "torch", "transformers", "pyarrow")},
    }


def _tokenizer_sha256(stage: Stage) -> str | None:
    backend = getattr(getattr(stage.task, "tokenizer", None), "backend_tokenizer", None)
    return None if backend is None else hashlib.sha256(backend.to_str().encode()).hexdigest()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
