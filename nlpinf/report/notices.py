"""What a reader must know before the scores: the warnings that stand first on the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from nlpinf.report.numbers import count

SECOND_RESIDUAL_LIMIT = 0.5
"""A larger second-sample residual is a warning: rows outside the sample leave more than half of b unexplained."""

_ADVICE = {
    "not converged": "Allow more iterations, or take a larger damping.",
    "negative curvature": "Use curvature “ggn”, or a damping larger than the most negative eigenvalue.",
    "diverged": "Use a larger damping.",
    "not finite": "Run nlpinf check on the model, and use a larger damping.",
}


@dataclass(frozen=True)
class Notice:
    """A warning: with a `serious` one the scores are no result as they stand; `advice` says what to do."""

    serious: bool
    text: str
    advice: str


def notices(manifest: Mapping[str, Any], columns: list[np.ndarray], missing: int | None) -> list[Notice]:
    """Return the warnings of a scores store: its solves, rows that are missing, scores that are no numbers."""
    found: list[Notice] = []
    queries = manifest.get("queries") or []
    for query in queries:
        for stage, verdict in (query.get("verdicts") or {}).items():
            found += _of_solve(f"the solve at stage “{stage}” for “{query['name']}”", verdict)
        if not query.get("verdicts"):
            text = f"No verdict is recorded for the solves of “{query['name']}”."
            found.append(Notice(True, text, "Compute the query vector again; a solve without a verdict is no result."))
    if missing:
        text = f"{count(missing)} rows of the corpus have no score yet, so the lists may change."
        advice = "Run nlpinf score again with the same arguments: it does the missing parts only."
        found.append(Notice(True, text, advice))
    for query, column in zip(queries, columns):
        found += _of_scores(query["name"], column)
    settings = manifest.get("query_vectors") or {}
    if any(cut := settings.get("truncated") or []):
        found.append(_of_cut_texts([query["name"] for query in queries], cut))
    growth = settings.get("growth") or {}
    if growth.get("ended") == "limit reached":
        found.append(_of_growth(growth))
    for stage in settings.get("stages") or []:
        if (head := stage.get("head") or {}).get("fitted"):
            found.append(_of_head(stage["name"], head))
    skipped = (manifest.get("corpus") or {}).get("skipped") or {}
    for reason, number in skipped.items() if isinstance(skipped, Mapping) else [("", skipped)]:
        if number:
            told = f" ({str(reason).replace('_', ' ')})" if reason else ""
            text = f"{count(int(number))} sentences of the corpus were skipped{told} and have no score."
            found.append(Notice(False, text, "What was skipped has no part in any list or chart here."))
    return found + _of_rows(manifest.get("corpus") or {})


_DAMAGE = {
    "U+FFFD": "the replacement character U+FFFD: letters that were lost before",
    "NUL": "a NUL character",
    "U+2028": "a line separator U+2028",
    "CR": "a carriage return inside the line",
}


def _of_rows(corpus: Mapping[str, Any]) -> list[Notice]:
    found = []
    if (exact := corpus.get("exact")) is not None:
        guessed = int(corpus.get("rows", exact)) - int(exact)
        text = (
            f"{count(guessed)} sentences were screened only: their scores are guesses of a regression. The lists show "
            f"the {count(int(exact))} that were scored exactly; the histogram shows all."
        )
        found.append(
            Notice(False, text, "What share of the true top was scored exactly stands in screening/recall.json.")
        )
    if cut := corpus.get("truncated"):
        text = f"{count(int(cut))} sentences of the corpus are longer than the model takes; their scores are of their beginnings."
        found.append(Notice(False, text, "The column truncated of the scores tells which."))
    for name, number in (corpus.get("odd") or {}).items():
        text = f"{count(int(number))} sentences of the corpus contain {_DAMAGE.get(name, name)}."
        found.append(Notice(False, text, "They were scored as they are."))
    return found


def _of_cut_texts(names: Sequence[str], cut: Sequence[int]) -> Notice:
    most = max(range(len(cut)), key=lambda i: cut[i])
    others = sum(map(bool, cut)) - 1
    told = f"{count(others)} other {'query' if others == 1 else 'queries'}"
    text = (
        f"The rows of the finetuned model are too short for {count(cut[most])} {'text' if cut[most] == 1 else 'texts'} of "
        f"“{names[most]}”{f' and some of {told}' if others else ''}: their losses are of their beginnings."
    )
    return Notice(False, text, "They are cut at its max_length: finetune with a larger one to read more of them.")


def _of_growth(growth: Mapping[str, Any]) -> Notice:
    last = growth["sizes"][-1]
    known = last["spearman"]
    told = "only one size was tried" if known is None else f"the rank correlation with the size before is {known:.2f}"
    text = (
        f"The curvature sample reached its limit of {count(int(last['rows']))} rows before the order of the scores was "
        f"stable: {told}, where {growth['spearman']:.2f} was asked for."
    )
    return Notice(False, text, "Raise the limit, or take a larger damping; until then the order is not settled.")


def _of_head(stage: str, head: Mapping[str, Any]) -> Notice:
    text = (
        f"The encoder of stage “{stage}” came without its pretraining head: one was fitted on {count(int(head['rows']))} "
        "texts with the encoder fixed."
    )
    advice = (
        "The pretraining objective here is that of this head and these texts, not the one that the encoder was trained with: "
        "trust the order of the scores more than their sizes."
    )
    return Notice(False, text, advice)


def _of_scores(query: str, column: np.ndarray) -> list[Notice]:
    bad = int((~np.isfinite(column)).sum())
    if bad:
        text = f"{count(bad)} scores of “{query}” are not finite; the lists and the histogram leave them out."
        return [Notice(True, text, "Run nlpinf check on the model, and score in float32.")]
    if len(column) and not column.any():
        text = f"Every score of “{query}” is zero: nothing of the pretraining reaches the query."
        return [Notice(True, text, "Check that the stages of the chain share the encoder.")]
    return []


def _of_solve(where: str, verdict: Mapping[str, Any]) -> list[Notice]:
    found = []
    residual, second, tolerance = (verdict.get(key) for key in ("residual", "second_residual", "tolerance"))
    ending = str(verdict.get("verdict"))
    if ending != "converged":
        size = "not finite" if residual is None else f"{residual:.2g}"
        limit = f", where {tolerance:.2g} was asked for" if tolerance else ""
        text = (
            f"{where[0].upper()}{where[1:]} ended “{ending}”, with a relative residual of {size}{limit}. "
            "Unconverged solves were allowed, so it was used all the same."
        )
        found.append(Notice(True, text, _ADVICE.get(ending, _ADVICE["not converged"])))
    if second is not None and second > SECOND_RESIDUAL_LIMIT:
        text = (
            f"On a second curvature sample {where} has a relative residual of {second:.2g}: "
            "other rows of the same corpus would give rather different scores."
        )
        advice = "Take a larger curvature sample or a larger damping; until then trust signs and ranks more than sizes."
        found.append(Notice(False, text, advice))
    return found
