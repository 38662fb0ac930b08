"""What a scores folder says of itself: what was scored, with what, and what must be the same for a run to go on."""

from __future__ import annotations

import hashlib
import json
import math
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from nlpinf.influence import QueryVectors
from nlpinf.scoring.feed import Feed
from nlpinf.scoring.rows import RowScorer
from nlpinf.scoring.store import FORMAT
from nlpinf.stages import Precision, Stage, fingerprint


def scores_identity(
    vectors: QueryVectors,
    feed: Feed,
    part_rows: int,
    text: bool = True,
    token_scores: bool = False,
    compress: float | None = None,
    precision: Precision | None = None,
) -> dict[str, Any]:
    """Return what must be the same for a scores folder to be gone on with; the arguments are those of `nlpinf.score`."""
    stage = vectors.stage
    identity = {
        "queries": [fingerprint(vector) for vector in vectors.vectors],
        "weights_sha256": fingerprint(stage.parameters),
        "corpus_sha256": feed.sha256,
        "rows": feed.size,
        "rows_sha256": feed.rows_sha256(),
        "m": stage.size,
        "reduction": stage.reduction,
        "items": stage.items if stage.reduction == "token" else None,
        "task": stage.task.settings(),
        "tokenizer_sha256": _tokenizer_sha256(stage),
        "token_scores": token_scores,
        "text": text,
        "part_rows": part_rows,
        "parts": math.ceil(feed.size / part_rows),
    }
    if vectors.errors:
        identity["errors"] = [[fingerprint(error) for error in errors] for errors in vectors.errors]
    if feed.counts is not None:
        identity["dedupe"] = True
    if feed.packed and token_scores:
        identity["documents"] = True
    if compress is not None:
        identity["compress"] = compress
    if precision is not None:
        identity["precision"] = precision
    return identity


def scores_manifest(vectors: QueryVectors, feed: Feed, scorer: RowScorer, identity: dict[str, Any]) -> dict[str, Any]:
    """Return the manifest of a scores folder of this identity."""
    stage = vectors.stage
    queries = [
        {
            "name": query.name,
            "value": value if math.isfinite(value) else None,
            "sha256": digest,
            "converged": all(solution.converged for solution in verdicts.values()),
            "verdicts": {name: solution.summary() for name, solution in verdicts.items()},
        }
        for query, value, digest, verdicts in zip(
            vectors.queries, vectors.values, identity["queries"], vectors.verdicts
        )
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
        "corpus": {
            "path": feed.path,
            "reading": dict(feed.reading),
            "rows": feed.size,
            "skipped": feed.skipped,
            "odd": dict(feed.odd),
        },
        "scoring": scorer.summary(),
        "versions": {name: _version(name) for name in ("nlpinf", "torch", "transformers", "pyarrow")},
    }


def _tokenizer_sha256(stage: Stage) -> str | None:
    backend = getattr(getattr(stage.task, "tokenizer", None), "backend_tokenizer", None)
    if backend is None:
        return None
    content = json.loads(backend.to_str())
    for setting in ("truncation", "padding"):  # which each call leaves behind
        content.pop(setting, None)
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
