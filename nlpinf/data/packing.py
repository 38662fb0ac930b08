"""Packing: texts joined end to end and cut into rows of one length, as `group_texts` of the training scripts does it.

Which documents a row has tokens of is kept, so that token scores can be added up by document.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from nlpinf.errors import BadInput

GROUP = 1000  # texts that are joined: the batch size of `datasets.map`; what is over at a group's end is left out


def pack(
    columns: Mapping[str, Sequence[Sequence[int]]], indices: Sequence[int], size: int
) -> dict[str, list[list[int]]]:
    """Join the lists of `columns["input_ids"]` and cut them into rows of `size` tokens, leaving out what is over.

    For `tokenized.map(pack, batched=True, with_indices=True, fn_kwargs={"size": 512}, remove_columns=...)`. Returns the
    columns `input_ids`; `documents`, the numbers (`indices`) of the texts that a row has tokens of; and `starts`, the place in
    the row of each one's first token there.
    """
    if size < 2:
        raise BadInput(f"rows of {size} tokens were asked for; give at least 2")
    lengths = np.array([len(ids) for ids in columns["input_ids"]], np.int64)
    joined = [i for ids in columns["input_ids"] for i in ids]
    owners = np.repeat(np.asarray(indices, np.int64), lengths)
    rows: dict[str, list[list[int]]] = {"input_ids": [], "documents": [], "starts": []}
    for start in range(0, len(joined) - size + 1, size):
        owner = owners[start : start + size]
        first = np.flatnonzero(np.diff(owner, prepend=owner[0] - 1))
        rows["input_ids"].append(joined[start : start + size])
        rows["documents"].append(owner[first].tolist())
        rows["starts"].append(first.tolist())
    return rows


def packed_rows(encoded: Sequence[Sequence[int]], numbers: Sequence[int], size: int) -> Iterator[dict[str, Any]]:
    """Yield the packed rows of texts with these numbers, joined a thousand at a time."""
    for start in range(0, len(encoded), GROUP):
        group = slice(start, start + GROUP)
        columns = pack({"input_ids": encoded[group]}, numbers[group], size)
        for row in zip(*columns.values()):
            yield dict(zip(columns, row))
