"""The columns of a part: results of rows as an Arrow table."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from nlpinf.errors import BadInput
from nlpinf.scoring.feed import Part
from nlpinf.scoring.rows import RowScores


def finite(values: np.ndarray, rows: np.ndarray, what: str) -> np.ndarray:
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


def table(result: RowScores, part: Part, text: bool = True) -> pa.Table:
    """Return the columns of a part, with its texts if `text`."""
    numbers = part.rows
    scores = finite(result.scores, numbers, "score")
    columns = {
        "row": pa.array(numbers),
        "score": lists_of(scores),
        **(
            {}
            if result.errors is None
            else {"standard_error": lists_of(finite(result.errors, numbers, "standard error"))}
        ),
        "loss": pa.array(finite(result.losses, numbers, "loss")),
        "tokens": pa.array(result.tokens.astype(np.int32)),
    }
    if result.items is not None and result.targets is not None and result.positions is not None:
        offsets = pa.array(np.concatenate([[0], np.cumsum(result.tokens)]).astype(np.int32))
        owner = np.repeat(numbers, result.tokens)
        columns["token_scores"] = pa.ListArray.from_arrays(
            offsets, lists_of(finite(result.items, owner, "token score"))
        )
        columns["token_ids"] = pa.ListArray.from_arrays(offsets, pa.array(result.targets.astype(np.int32)))
        columns["token_positions"] = pa.ListArray.from_arrays(offsets, pa.array(result.positions.astype(np.int32)))
        if part.documents is not None and result.places is not None:
            whose = part.documents(np.repeat(np.arange(len(numbers)), result.tokens), result.places)
            columns["token_documents"] = pa.ListArray.from_arrays(offsets, pa.array(whose))
    if result.truncated is not None:
        columns["truncated"] = pa.array(result.truncated)
    if part.counts is not None:
        columns["count"] = pa.array(part.counts.astype(np.int32))
    if text and part.texts is not None:
        columns["text"] = part.texts
    return pa.table(columns)


def lists_of(values: np.ndarray) -> pa.Array:
    """Return (n, queries) as a column: plain for one query, a fixed-size list for many."""
    flat = pa.array(np.ascontiguousarray(values).reshape(-1))
    return flat if values.shape[1] == 1 else pa.FixedSizeListArray.from_arrays(flat, values.shape[1])
