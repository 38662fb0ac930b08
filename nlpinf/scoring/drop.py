"""Which rows somebody means to drop: the row numbers of a file, or the most harmful of a scores folder."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from nlpinf.data.files import line_blocks, objects, suffixes
from nlpinf.errors import BadInput
from nlpinf.influence import QueryVectors
from nlpinf.scoring.feed import feed_of
from nlpinf.scoring.filter import differs, dropped_rows
from nlpinf.scoring.select import Amount, Rule, select
from nlpinf.scoring.store import Scores
from nlpinf.stages import fingerprint


def rows_to_drop(told: str, scores: Scores | None, query: int | str = 0, *, helpful: bool = False) -> np.ndarray:
    """Return row numbers, ascending: those of the file `told`, or of the most harmful (helpful) rows an amount "5%" or "200".

    A file has one number a line, or is .jsonl (compressed or not) or .parquet with `row`, as `nlpinf filter` writes them.
    """
    if Path(told).is_file() or not re.fullmatch(r"[\d.]+\s*%?", told.strip()):
        return rows_in_file(told)
    if scores is None:
        raise BadInput(
            f"{told}: an amount of rows needs the scores that rank them (--scores), or give a file of row numbers"
        )
    rule = Rule("helpful" if helpful else "harmful", Amount.parse(told))
    rows = dropped_rows(scores, select(scores, rule, [query]).chosen)
    if not len(rows):
        raise BadInput(f"{told} of {len(scores):,} rows is no row; give a larger amount")
    return rows


def rows_in_file(path: str | Path) -> np.ndarray:
    """Return the row numbers of a file, ascending; raise `BadInput` with the line for what is none, or is there twice."""
    name, packed = suffixes(path)
    rows: list[int] = []
    if name == ".parquet" and not packed:
        try:
            column = pq.read_table(path, columns=["row"])["row"].drop_null().to_pylist()
        except (pa.ArrowInvalid, pa.ArrowKeyError, OSError) as error:
            raise BadInput(f"{path}: has no column `row` to read ({str(error).splitlines()[0]})") from None
        rows = [_number(value, path, f"entry {i}") for i, value in enumerate(column)]
    elif name == ".jsonl":
        rows = [_number(value.get("row"), path, f"line {number}") for number, value in objects(path)]
    else:
        for block, first in line_blocks(path):
            for number, line in enumerate(block.decode().splitlines(), first):
                if line.strip():
                    rows.append(_number(line.strip(), path, f"line {number}"))
    if not rows:
        raise BadInput(f"{path}: names no row; give one row number a line")
    found = np.sort(np.array(rows, np.int64))
    if len(twice := found[1:][found[1:] == found[:-1]]):
        raise BadInput(f"{path}: names row {twice[0]} twice; give each row to drop once")
    return found


def _number(value: object, path: str | Path, where: str) -> int:
    digits = str(value)
    if isinstance(value, bool) or not re.fullmatch(r"\d{1,18}", digits):
        raise BadInput(f"{path}: {where} holds {value!r} where a row number is expected, a whole number from 0")
    return int(digits)


def positions_of(rows: Sequence[int] | np.ndarray, vectors: QueryVectors, where: str) -> list[int]:
    """Return the places of rows, by their numbers, in the pretraining data; raise `BadInput` for a row that is not there."""
    place = {number: i for i, number in enumerate(vectors.stage.rows.tolist())}
    absent = [row for row in map(int, rows) if row not in place]
    if absent:
        raise BadInput(f"{where}: there is no row {absent[0]} in the pretraining corpus of {len(place):,} rows")
    return [place[int(row)] for row in rows]


def check_queries(scores: Scores, vectors: QueryVectors) -> None:
    """Raise `BadInput` unless the scores are of these query vectors."""
    if scores.manifest["identity"]["queries"] != [fingerprint(vector) for vector in vectors.vectors]:
        raise BadInput(
            f"{scores.folder or 'the scores'}: holds scores of another query (another query vector); give those of this query folder"
        )


def check_scores(scores: Scores, vectors: QueryVectors) -> None:
    """Raise `BadInput` unless the scores are of these query vectors and of the corpus that was pretrained on."""
    where = scores.folder or "the scores"
    check_queries(scores, vectors)
    if difference := differs(scores, feed_of(vectors.stage.data)):
        raise BadInput(
            f"{where}: holds scores of another corpus than was pretrained on ({difference}), whose rows cannot be left out "
            "of the pretraining"
        )
