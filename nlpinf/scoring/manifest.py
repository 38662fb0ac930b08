"""What a scores folder says of itself: what was scored, with what, and what must be the same for a run to go on."""

from __future__ import annotations

import hashlib
import math
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from nlpinf.influence import QueryVectors
from nlpinf.scoring.feed import Feed
from nlpinf.scoring.rows import RowScorer
from nlpinf.scoring.store import FORMAT
from nlpinf.stages import Stage, fingerprint


def scores_manifest(vectors: QueryVectors, feed: Feed, scorer: RowScorer, part_rows: int, text: bool) -> dict[str, Any]:
    """Return the manifest of a scores folder; `identity` in it is what must be the same."""
    stage = vectors.stage
    digests = [fingerprint(vector) for vector in vectors.vectors]
    identity = {
        "queries": digests,
        "weights_sha256": fingerprint(stage.parameters),
        "corpus_sha256": feed.sha256,
        "rows": feed.size,
        "rows_sha256": feed.rows_sha256(),
        "m": stage.size,
        "reduction": stage.reduction,
        "items": stage.items if stage.reduction == "token" else None,
        "task": stage.task.settings(),
        "tokenizer_sha256": _tokenizer_sha256(stage),
        "token_scores": scorer.token_scores,
        "text": text,
        "part_rows": part_rows,
        "parts": math.ceil(feed.size / part_rows),
    }
    if feed.counts is not None:
        identity["dedupe"] = True
    if feed.packed and scorer.token_scores:
        identity["documents"] = True
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
        "corpus": {"path": feed.path, "rows": feed.size, "skipped": feed.skipped},
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
