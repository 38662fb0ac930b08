"""Screening: exact scores of a random sample teach a cheap regressor, and only its candidates are scored exactly.

Every step is a scores folder of its own under `screening/`, so that any number of processes share it and a killed run
goes on; the last one puts the exact and the guessed scores together, each marked.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from nlpinf.data.sources import EmptyPolicy
from nlpinf.errors import BadInput
from nlpinf.influence import QueryVectors
from nlpinf.scoring.corpus import PART_ROWS, score
from nlpinf.scoring.features import Features, fit, predict
from nlpinf.scoring.feed import Feed, Part, feed_of
from nlpinf.scoring.files import first_name, publish
from nlpinf.scoring.manifest import scores_identity, scores_manifest
from nlpinf.scoring.rows import Mode, RowScorer, Tick
from nlpinf.scoring.shards import Make, Progress, Worker
from nlpinf.scoring.store import Scores, Store, write_repeats
from nlpinf.scoring.tables import finite, lists_of

FOLDER, REPORT, MODEL = "screening", "recall.json", "model.npz"
SAMPLE_SHARE, SAMPLE_ROWS = 0.02, 1000
_Z = 1.959964  # of a 95 % interval


@dataclass(frozen=True)
class Recall:
    """Of the true top `share` of the rows at one end of one query's ranking, the fraction that was scored exactly.

    Estimated on `seen` held-out random rows that belong to that top; `low` to `high` is Wilson's 95 % interval.
    """

    query: str
    end: str
    share: float
    seen: int
    found: int
    recall: float
    low: float
    high: float


def screen(
    vectors: QueryVectors,
    corpus: Any,
    out: str | Path,
    *,
    exact: float = 0.1,
    top: float = 0.01,
    mode: Mode = "auto",
    empty: EmptyPolicy = "error",
    text: bool = True,
    part_rows: int = PART_ROWS,
    seed: int = 0,
    progress: Progress | None = None,
) -> Scores:
    """Return scores of which about a share of `exact` is exact: a random sample, and the best candidates of each end.

    2 % of the rows, at least 1,000, are scored exactly; one half teaches a ridge regression on hashed n-grams and the mean
    of the model's word vectors, the other half is held out. All rows get the regression's guess, the `exact` · N rows with
    the greatest and least guesses (shared equally among queries and ends) the exact score. The column `exact` tells them
    apart; a guessed row has no `loss` and `tokens`. `recall(folder)` says which fraction of the true top `top` of each
    end was found, by the held-out half.
    """
    if not 0 < exact < 1 or not 0 < top < 1:
        raise BadInput(f"screening takes shares between 0 and 1, not exact={exact} and top={top}")
    feed = feed_of(vectors.stage.data if corpus is None else corpus, empty)
    if not feed.has_texts:
        raise BadInput("only texts can be screened; these examples are labelled rows, token ids or tensors")
    taken = max(SAMPLE_ROWS, math.ceil(SAMPLE_SHARE * feed.size))
    if taken > exact * feed.size:
        raise BadInput(
            f"the corpus has {feed.size:,} rows, too few to screen: {taken:,} would be scored to begin with; score it whole"
        )
    vectors = replace(vectors, errors=())  # of guesses there are none, and they would be taken for those of the scores
    scorer = RowScorer(vectors, mode)
    manifest = scores_manifest(vectors, feed, scorer, scores_identity(vectors, feed, part_rows, text))
    manifest["identity"]["screen"] = {"exact": exact, "top": top, "seed": seed, "sample": taken}
    store = Store.start(out, manifest)
    if feed.repeats is not None:
        write_repeats(store.folder, feed.repeats.rows, feed.repeats.first)
    if store.missing():
        folder = store.folder / FOLDER
        drawn = np.random.default_rng(seed).choice(feed.size, taken, replace=False)
        chosen = _mask(feed.size, drawn)
        options: dict[str, Any] = {"mode": mode, "text": False, "part_rows": part_rows}
        sample = score(vectors, _choose(feed, chosen), folder / "sample", progress=progress, **options)
        held = _mask(feed.size, drawn[taken // 2 :])[chosen]
        guesses = _guessed(vectors, feed, folder, manifest, sample, chosen, held)
        near = _candidates(guesses, exact)
        _report(folder, guesses, sample, chosen, held, near, top)
        rest = near & ~chosen
        found = [sample]
        if rest.any():
            found.append(score(vectors, _choose(feed, rest), folder / "candidates", progress=progress, **options))
        Worker(store, feed, _joining(guesses, found, text), progress=progress).run()
        store.finish()
    return Scores.open(store.folder)


def recall(folder: str | Path) -> list[Recall] | None:
    """Return what screening found, by query and end; None for a folder whose scores are all exact."""
    path = Path(folder) / FOLDER / REPORT
    return [Recall(**entry) for entry in json.loads(path.read_text(encoding="utf-8"))] if path.exists() else None


def _guessed(
    vectors: QueryVectors,
    feed: Feed,
    folder: Path,
    manifest: dict[str, Any],
    sample: Scores,
    chosen: np.ndarray,
    held: np.ndarray,
) -> Scores:
    features = Features(vectors.stage)
    path = folder / MODEL
    if not path.exists():  # of processes that come at once the first one's fit stands for all
        part = next(iter(_choose(feed, chosen).parts([0], int(chosen.sum()))))
        texts = [text for text, out in zip(part.examples, held) if not out]
        columns = np.stack([sample.column(query) for query in range(len(sample.queries))], 1).astype(np.float64)
        model = fit(features(texts), columns[~held])

        def write(temporary: Path) -> None:
            with temporary.open("wb") as file:
                np.savez(file, **model)  # type: ignore[arg-type]

        publish(path, write, first_name)
    with np.load(path) as saved:
        model = {name: saved[name] for name in ("weights", "constant")}

    def make(part: Part, tick: Tick) -> pa.Table:
        guesses = finite(predict(model, features(part.examples)), part.rows, "guessed score")
        tick(len(part.rows))
        return pa.table({"row": part.rows, "score": lists_of(guesses)})

    Worker(Store.start(folder / "guesses", manifest), feed, make).run()
    return Scores.open(folder / "guesses")


def _candidates(guesses: Scores, exact: float) -> np.ndarray:
    """Return which rows are at either end of any query's guesses: shares that add up to `exact` at most."""
    near = np.zeros(len(guesses), bool)
    count = max(1, int(exact * len(guesses) / (2 * len(guesses.queries))))
    for query in range(len(guesses.queries)):
        column = guesses.column(query)
        for key in (column, -column):
            near[np.argpartition(key, count - 1)[:count]] = True
    return near


def _report(
    folder: Path, guesses: Scores, sample: Scores, chosen: np.ndarray, held: np.ndarray, near: np.ndarray, top: float
) -> None:
    """Write which fraction of the held-out rows' own top would have been scored exactly, had they not been drawn."""
    if (folder / REPORT).exists():
        return
    entries, caught = [], near[chosen][held]
    for query, name in enumerate(sample.queries):
        column = sample.column(query)[held]
        count = max(1, round(top * len(column)))
        for end, key in (("harmful", -column), ("helpful", column)):
            best = np.argsort(key, kind="stable")[:count]
            entries.append(asdict(_recall(name, end, top, count, int(caught[best].sum()))))
    content = json.dumps(entries, indent=1).encode() + b"\n"
    publish(folder / REPORT, lambda temporary: temporary.write_bytes(content), first_name)


def _recall(name: str, end: str, share: float, seen: int, found: int) -> Recall:
    rate, square = found / seen, _Z * _Z
    middle = (rate + square / (2 * seen)) / (1 + square / seen)
    half = _Z / (1 + square / seen) * math.sqrt(rate * (1 - rate) / seen + square / (4 * seen * seen))
    return Recall(name, end, share, seen, found, rate, max(0.0, middle - half), min(1.0, middle + half))


def _joining(guesses: Scores, exact: list[Scores], text: bool) -> Make:
    """Return the function that makes a part: exact scores where there are any, guesses elsewhere."""
    rows = np.concatenate([scores.rows for scores in exact])
    order = np.argsort(rows)
    rows = rows[order]
    values = np.concatenate([np.stack([s.column(q) for q in range(len(s.queries))], 1) for s in exact])[order]
    losses = np.concatenate([scores.losses for scores in exact])[order]
    tokens = np.concatenate([t["tokens"].to_numpy() for scores in exact for t in scores.tables(["tokens"])])[order]
    cut = None
    if "truncated" in exact[0].columns:
        flags = [t["truncated"] for scores in exact for t in scores.tables(["truncated"])]
        cut = np.concatenate([flag.to_numpy(zero_copy_only=False) for flag in flags])[order]

    def make(part: Part, tick: Tick) -> pa.Table:
        place = np.minimum(np.searchsorted(rows, part.rows), len(rows) - 1)
        known = rows[place] == part.rows
        guessed = guesses.part(part.number, ["score"])
        scores = np.stack([guesses.scores_of(guessed, query) for query in range(values.shape[1])], 1)
        scores[known] = values[place[known]]
        columns: dict[str, Any] = {
            "row": pa.array(part.rows),
            "score": lists_of(scores),
            "loss": pa.array(losses[place], mask=~known),
            "tokens": pa.array(tokens[place], mask=~known),
            "exact": pa.array(known),
        }
        if cut is not None:
            columns["truncated"] = pa.array(cut[place], mask=~known)
        if part.counts is not None:
            columns["count"] = pa.array(part.counts)
        if text:
            columns["text"] = part.texts
        return pa.table(columns)

    return make


def _mask(size: int, places: np.ndarray) -> np.ndarray:
    mask = np.zeros(size, bool)
    mask[places] = True
    return mask


def _choose(feed: Feed, inside: np.ndarray) -> Feed:
    """Return the feed of those rows of `feed` at which `inside`, (feed.size,), is true."""
    if feed.chosen is None:
        return feed.choose(inside)
    chosen = feed.chosen.copy()
    chosen[np.flatnonzero(chosen)] = inside
    return feed.choose(chosen)
