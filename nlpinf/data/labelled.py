"""Labelled sets as people have them: JSON lines, Parquet or a `datasets` folder, with columns and label names of their own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from nlpinf.data.corpus import read_labelled
from nlpinf.data.files import objects
from nlpinf.data.shipped import resolve
from nlpinf.errors import BadInput

_PAIRS = (("sentence1", "sentence2"), ("premise", "hypothesis"), ("question1", "question2"), ("question", "sentence"))
_SECOND = {one: other for pair in _PAIRS for one, other in (pair, pair[::-1])}


def read_rows(
    where: str | Path,
    labels: int | None,
    names: Sequence[str] | None = None,
    *,
    text_column: str | None = None,
    label_column: str | None = None,
    split: str | None = None,
) -> list[dict[str, Any]]:
    """Read the labelled rows of a classifier of `labels` classes; see `read_examples`, and `read_labelled` for plain files.

    `names` are the classes' names, where the model has some.
    """
    path = resolve(where)
    plain = not (names or text_column or label_column or split or path.is_dir() or path.suffix == ".parquet")
    if plain or labels is None:
        return read_labelled(path, labels)
    return read_examples(
        where,
        names or [f"LABEL_{i}" for i in range(labels)],
        text_column=text_column or "text",
        label_column=label_column or "label",
        split=split,
    )


def read_examples(
    where: str | Path,
    names: Sequence[str],
    *,
    text_column: str = "text",
    label_column: str = "label",
    split: str | None = None,
) -> list[dict[str, Any]]:
    """Read {"text", "label"} rows for a classifier whose classes are called `names`, in its order.

    A label is a number from 0, or a name. `where` is a .jsonl file (plain or compressed), a .parquet file, or a folder of
    `datasets.save_to_disk`. Raises `BadInput` with the row for a column that is missing, a label out of range, or names
    that are not the classifier's.
    """
    path = resolve(where)
    examples = []
    numbers = {name: i for i, name in enumerate(names)}
    for place, row in _rows(path, str(where), names, label_column, split):
        for column in (text_column, label_column):
            if column not in row:
                raise BadInput(
                    f"{where}: {place} has no column {column!r}, but {', '.join(map(repr, list(row)[:6]))}; name it with --text-column or --label-column"
                )
        other = _SECOND.get(text_column, text_column)
        if other != text_column and isinstance(row.get(other), str):
            raise BadInput(
                f"{where}: {place} is a pair of sentences, {text_column!r} and {other!r}, which no task here has; remove the column if the model read one of them alone"
            )
        text, label = row[text_column], row[label_column]
        if not isinstance(text, str) or not text.strip():
            raise BadInput(f"{where}: {place}: {text_column!r} is empty or no string; remove the row")
        if isinstance(label, str):
            if label not in numbers:
                raise BadInput(
                    f"{where}: {place}: the label {label!r} is none of the model's ({', '.join(names)}); give those names, or numbers"
                )
            label = numbers[label]
        if not isinstance(label, int) or isinstance(label, bool):
            raise BadInput(f"{where}: {place}: the label {label!r} is neither a number nor a name")
        if not 0 <= label < len(names):
            raise BadInput(
                f"{where}: {place}: the label {label} is out of range; it must be from 0 to {len(names) - 1}"
            )
        examples.append({"text": text, "label": label})
    if not examples:
        raise BadInput(f"{where}: there is no example in it")
    return examples


def _rows(
    path: Path, where: str, names: Sequence[str], label_column: str, split: str | None
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    if path.is_dir():
        table: Any = _saved(path, where, split)
        feature = table.features.get(label_column)
        _same_names(where, getattr(feature, "names", None), names)
        yield from ((f"row {i}", row) for i, row in enumerate(table.with_format(None)))
    elif path.suffix == ".parquet":
        try:
            rows = pq.read_table(path)
        except FileNotFoundError:
            raise BadInput(f"{where}: there is no such file; check the path") from None
        except (pa.ArrowInvalid, OSError) as error:
            raise BadInput(
                f"{where}: is not a Parquet file or truncated ({' '.join(str(error).split())[:200]})"
            ) from None
        yield from ((f"row {i}", row) for i, row in enumerate(rows.to_pylist()))
    else:
        yield from ((f"line {number}", row) for number, row in objects(where))


def _saved(path: Path, where: str, split: str | None) -> Any:
    from datasets import DatasetDict, load_from_disk

    try:
        data = load_from_disk(str(path))
    except (FileNotFoundError, ValueError) as error:
        raise BadInput(
            f"{where}: is no folder of datasets.save_to_disk ({' '.join(str(error).split())[:200]})"
        ) from None
    if isinstance(data, DatasetDict):
        wanted = split or "train"
        if wanted not in data:
            raise BadInput(f"{where}: has no split {wanted!r}, but {', '.join(data)}; name one as PATH:SPLIT")
        return data[wanted]
    return data


def _same_names(where: str, theirs: Sequence[str] | None, names: Sequence[str]) -> None:
    """Raise `BadInput` where both sides have names for the classes and these are not the same."""
    default = [f"LABEL_{i}" for i in range(len(names))]
    if theirs is None or list(names) == default or [t.lower() for t in theirs] == [n.lower() for n in names]:
        return
    raise BadInput(
        f"{where}: its classes are {', '.join(theirs)}, the model's {', '.join(names)}, in this order; give the data that the model was finetuned on"
    )
