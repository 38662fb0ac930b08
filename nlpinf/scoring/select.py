"""Which rows a rule means: the most harmful 5 %, the 1,000 most helpful, those above a threshold, as many at random."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from nlpinf.errors import BadInput
from nlpinf.scoring.store import Scores

Side = Literal["harmful", "helpful", "random"]
How = Literal["all", "any", "mean"]


@dataclass(frozen=True)
class Amount:
    """So many rows, or a share of them, rounded down."""

    count: int | None = None
    share: float | None = None

    @classmethod
    def parse(cls, text: str) -> Amount:
        """Read "5%" or "5000"."""
        number = text.strip().removesuffix("%").strip()
        try:
            value = float(number) if text.strip().endswith("%") else int(number)
        except ValueError:
            value = -1
        if text.strip().endswith("%"):
            if not 0 < value <= 100:
                raise BadInput(f"the amount {text!r} is no share; give one such as 5%, above 0% and at most 100%")
            return cls(share=value / 100)
        if value < 1:
            raise BadInput(f"the amount {text!r} is neither a share such as 5% nor a number of rows of at least 1")
        return cls(count=int(value))

    def of(self, rows: int) -> int:
        """Return the number of rows."""
        if self.share is not None:
            return int(self.share * rows + 1e-9)
        assert self.count is not None
        if self.count > rows:
            raise BadInput(f"{self.count:,} rows were asked for, and there are {rows:,}")
        return self.count


@dataclass(frozen=True)
class Rule:
    """Rows at one end of the ranking: an `amount` of them, or those beyond a `threshold` (harmful: score > threshold;
    helpful: score < threshold). `side` "random" draws the amount by `seed`, a control to compare with.
    """

    side: Side
    amount: Amount | None = None
    threshold: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if (self.amount is None) == (self.threshold is None):
            raise BadInput("a rule takes either an amount or a threshold")
        if self.threshold is not None and not np.isfinite(self.threshold):
            raise BadInput(f"the threshold is {self.threshold}; give a finite number")


@dataclass(frozen=True)
class Selection:
    """`chosen` (N,) bool in the order of the stored rows, and by query the score at the edge of what was chosen, if anything was."""

    chosen: np.ndarray
    edges: dict[str, float]


def select(scores: Scores, rule: Rule, queries: Sequence[int | str] = (0,), how: How = "all") -> Selection:
    """Return which stored rows the rule means. Exact; rows of equal score count in the order of their numbers.

    For several queries the rule is applied to each, and a row is meant if it is for "all" or for "any" of them, or it is
    applied once, to the "mean" of their scores. Holds the scores of one query: about 13 bytes a row. Where equal texts were
    scored once, an amount counts all rows of the corpus, and a text goes with all its rows or not at all.
    """
    if not queries:
        raise BadInput("there is no query to rank by; give at least one")
    counts = _counts(scores)
    if rule.side == "random":
        assert rule.amount is not None
        return Selection(_first(np.random.default_rng(rule.seed).random(len(scores)), rule.amount, counts), {})
    if how == "mean":
        mean = np.zeros(len(scores))
        for query in queries:
            mean += scores.column(query)
        names = " + ".join(_name(scores, query) for query in queries)
        chosen, edge = _one((mean / len(queries)).astype(np.float32), rule, counts)
        return Selection(chosen, {} if edge is None else {names: edge})
    total: np.ndarray | None = None
    edges = {}
    for query in queries:
        chosen, edge = _one(scores.column(query), rule, counts)
        if edge is not None:
            edges[_name(scores, query)] = edge
        total = chosen if total is None else total & chosen if how == "all" else total | chosen
    assert total is not None
    return Selection(total, edges)


def _one(column: np.ndarray, rule: Rule, counts: np.ndarray | None) -> tuple[np.ndarray, float | None]:
    key = -column if rule.side == "harmful" else column
    if rule.threshold is not None:
        # In float64: a threshold that a score was rounded to does not count as beyond it by the rounding alone.
        return (column > rule.threshold if rule.side == "harmful" else column < rule.threshold), rule.threshold
    assert rule.amount is not None
    chosen = _first(key, rule.amount, counts)
    if not chosen.any():
        return chosen, None
    edge = float(key[chosen].max())
    return chosen, -edge if rule.side == "harmful" else edge


def _first(key: np.ndarray, amount: Amount, counts: np.ndarray | None) -> np.ndarray:
    """Return which entries are the first of the ascending order that make up the amount, ties in their order."""
    chosen = np.zeros(len(key), bool)
    if counts is not None:
        order = np.argsort(key, kind="stable")
        together = np.cumsum(counts[order], dtype=np.int64)
        chosen[order[together <= amount.of(int(together[-1]))]] = True
        return chosen
    number = amount.of(len(key))
    if number == 0:
        return chosen
    edge = np.partition(key, number - 1)[number - 1]
    chosen = key < edge
    ties = np.flatnonzero(key == edge)
    chosen[ties[: number - int(chosen.sum())]] = True
    return chosen


def _counts(scores: Scores) -> np.ndarray | None:
    if "count" not in scores.columns:
        return None
    return np.concatenate([table["count"].to_numpy() for table in scores.tables(["count"])])


def _name(scores: Scores, query: int | str) -> str:
    return query if isinstance(query, str) else scores.queries[query]
