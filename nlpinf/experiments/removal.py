"""Remove rows from the pretraining corpus, retrain both stages, and set the actual change of a query beside the predicted."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from nlpinf.errors import BadInput
from nlpinf.scoring import Scores


@dataclass(frozen=True)
class Removal:
    """Rows to do without, and the predicted change of the query: −Σ score/m over them (first order)."""

    name: str
    rows: list[int]
    predicted: float


def removed_rows(share: float, rows: int) -> int:
    """Return how many of `rows` rows a share is; raise `BadInput` if that is none or all of them."""
    count = round(share * rows)
    if not 0 < count < rows:
        raise BadInput(f"a share of {share} of {rows} rows is {count} rows; it must leave some and take some")
    return count


def removals(
    scores: Scores, share: float, draws: int, seed: int = 0, query: int = 0, *, helpful: bool = True
) -> list[Removal]:
    """Return the most harmful `share` of the rows, `draws` random sets of as many, and with `helpful` the most helpful."""
    values, rows = scores.column(query).astype(np.float64), scores.rows
    count = removed_rows(share, len(rows))
    order = np.argsort(-values, kind="stable")
    generator = np.random.default_rng(seed)
    chosen = {"most harmful": order[:count]}
    for draw in range(draws):
        chosen[f"random {draw + 1}"] = generator.choice(len(rows), count, replace=False)
    if helpful:
        chosen["most helpful"] = order[-count:]
    return [
        Removal(name, sorted(rows[where].tolist()), float(-values[where].sum() / scores.m))
        for name, where in chosen.items()
    ]
