"""Corpora in every form that people have: the same texts under the same row numbers, and what is refused."""

from __future__ import annotations

import bz2
import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nlpinf.data.corpus import Corpus
from nlpinf.data.sources import find, kept
from nlpinf.errors import BadInput

TEXTS = ["one cat", "two\u2028dogs", " ", "", "five é", "six"]
LEFT = [0, 1, 4, 5]


def table(texts: list[Any] = TEXTS, column: str = "text") -> pa.Table:
    return pa.table({"id": list(range(len(texts))), column: pa.array(texts, pa.string())})


def plain(texts: list[str] = TEXTS) -> bytes:
    return "".join(t + "\n" for t in texts).encode()


def objects(texts: list[str] = TEXTS, column: str = "text") -> bytes:
    return "".join(json.dumps({"id": i, column: t}) + "\n" for i, t in enumerate(texts)).encode()


def zst(data: bytes) -> bytes:
    return pa.compress(data, "zstd", asbytes=True)


def _parquet(folder: Path) -> Path:
    pq.write_table(table(), folder / "a.parquet", row_group_size=2)
    return folder / "a.parquet"


def _large_strings(folder: Path) -> Path:
    pq.write_table(pa.table({"text": pa.array(TEXTS, pa.large_string()).dictionary_encode()}), folder / "a.parquet")
    return folder / "a.parquet"


def _nulls(folder: Path) -> Path:
    pq.write_table(table([*TEXTS[:2], None, None, *TEXTS[4:]]), folder / "a.parquet")
    return folder / "a.parquet"


def _folder(folder: Path) -> Path:
    """Files count on in the order of their paths; what is no data is left alone."""
    (folder / "c" / "deep").mkdir(parents=True)
    (folder / "c" / "a.txt").write_bytes(plain(TEXTS[:1]))
    (folder / "c" / "b.txt.gz").write_bytes(gzip.compress(plain(TEXTS[1:4])))
    (folder / "c" / "deep" / "news.en-00001-of-00100.zst").write_bytes(zst(plain(TEXTS[4:])))
    for name in ("README", "notes.md", ".hidden.json", "_SUCCESS"):
        (folder / "c" / name).write_text("no sentence\n")
    return folder / "c"


def _parquet_folder(folder: Path) -> Path:
    (folder / "p").mkdir()
    pq.write_table(table(TEXTS[:3]), folder / "p" / "train-00000-of-00002.parquet")
    pq.write_table(table(TEXTS[3:]), folder / "p" / "train-00001-of-00002.parquet")
    return folder / "p"


def _saved(folder: Path) -> Path:
    datasets.Dataset(table()).save_to_disk(str(folder / "s"))
    return folder / "s"


def _written(name: str, data: bytes) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        (folder / name).write_bytes(data)
        return folder / name

    return write


def _pattern(folder: Path) -> str:
    _folder(folder)
    return f"{folder}/c/**/*[tz]"


FORMS: dict[str, Callable[[Path], Any]] = {
    "text": _written("a.txt", plain()),
    "text gz": _written("a.txt.gz", gzip.compress(plain())),
    "text zst": _written("a.txt.zst", zst(plain())),
    "jsonl": _written("a.jsonl", objects()),
    "jsonl gz": _written("a.jsonl.gz", gzip.compress(objects())),
    "jsonl zst": _written("a.jsonl.zst", zst(objects())),
    "jsonl bz2": _written("a.ndjson.bz2", bz2.compress(objects())),
    "parquet": _parquet,
    "parquet of dictionaries": _large_strings,
    "parquet with nulls": _nulls,
    "folder": _folder,
    "pattern": _pattern,
    "folder of parquet": _parquet_folder,
    "save_to_disk": _saved,
    "Dataset": lambda folder: datasets.Dataset(table()),
    "Dataset, chosen rows": lambda folder: datasets.Dataset(table([*TEXTS[::-1], "more"])).select([5, 4, 3, 2, 1, 0]),
    "IterableDataset": lambda folder: datasets.Dataset(table()).to_iterable_dataset(num_shards=3),
    "generator": lambda folder: datasets.IterableDataset.from_generator(lambda: ({"text": t} for t in TEXTS)),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_rows(tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nlpinf.data.sources._ROWS", 4)
    where = FORMS[form](tmp_path)
    corpus = Corpus.read(where, empty="skip")
    assert corpus.rows.tolist() == LEFT and list(corpus) == [TEXTS[i] for i in LEFT]
    assert corpus.skipped == {"empty": 2}
    assert corpus.sha256 == Corpus([TEXTS[i] for i in LEFT]).sha256
    source = find(where)
    for _ in range(2):  # a source can be read again
        rows, texts, left_out = zip(*kept(source, "skip"))
        assert np.concatenate(rows).tolist() == LEFT and sum(left_out) == 2
        assert [t for part in texts for t in part.to_pylist()] == list(corpus)
    with pytest.raises(BadInput, match=r"(line 3|line 2|row 2) is empty.*--empty skip") as caught:
        Corpus.read(where)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("form", ["jsonl", "parquet", "Dataset", "IterableDataset", "save_to_disk", "generator"])
def test_other_columns(tmp_path: Path, form: str) -> None:
    texts = [TEXTS[i] for i in LEFT]
    (tmp_path / "a.jsonl").write_bytes(objects(texts, "body"))
    pq.write_table(table(texts, "body"), tmp_path / "a.parquet")
    data = datasets.Dataset(table(texts, "body"))
    where: Any = {
        "jsonl": tmp_path / "a.jsonl", "parquet": tmp_path / "a.parquet", "Dataset": data,
        "IterableDataset": data.to_iterable_dataset(), "save_to_disk": tmp_path / "s",
        "generator": datasets.IterableDataset.from_generator(lambda: ({"id": 0, "body": t} for t in texts)),
    }[form]  # fmt: skip
    if form == "save_to_disk":
        data.save_to_disk(str(where))
    assert list(Corpus.read(where, text_column="body")) == texts
    with pytest.raises(BadInput, match=r"no (column 'text'|`text`).*id, body.*--text-column"):
        Corpus.read(where)
    if form not in ("jsonl", "generator"):
        with pytest.raises(BadInput, match="'id' holds int64, not strings"):
            Corpus.read(where, text_column="id")


def test_splits(tmp_path: Path) -> None:
    splits = datasets.DatasetDict({"train": datasets.Dataset(table(["a"])), "dev": datasets.Dataset(table(["b", "c"]))})
    splits.save_to_disk(str(tmp_path / "s"))
    assert list(Corpus.read(tmp_path / "s", split="dev")) == ["b", "c"]
    for split, told in ((None, "none was given"), ("test", "there is no 'test'")):
        with pytest.raises(BadInput, match=f"splits train, dev, and {told}"):
            Corpus.read(tmp_path / "s", split=split)
    with pytest.raises(BadInput, match="splits train, dev was given"):
        Corpus.read(splits)
    (tmp_path / "a.txt").write_text("a\n")
    for where in (tmp_path / "a.txt", _saved(tmp_path / "one")):
        with pytest.raises(BadInput, match="leave it out"):
            Corpus.read(where, split="train")


def test_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is fetched but where a split is given: a path that is mistyped is no name of a data set."""
    asked: list[Any] = []

    def load(name: str, config: str | None, *, split: str, streaming: bool) -> Any:
        asked.append((name, config, split, streaming))
        if name == "no/such":
            raise ConnectionError("offline\nby choice")
        data = datasets.Dataset(table(["a", "b"]))
        return data.to_iterable_dataset() if streaming else data

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert list(Corpus.read("some/set:small", split="train")) == ["a", "b"]
    rows, texts, _ = next(iter(kept(find("some/set", split="dev", streaming=True), "error")))
    assert texts.to_pylist() == ["a", "b"] and rows.tolist() == [0, 1]
    assert asked == [("some/set", "small", "train", False), ("some/set", None, "dev", True)]
    with pytest.raises(BadInput, match=r"no/such: .*split 'train', could not be loaded.*ConnectionError: offline by"):
        Corpus.read("no/such", split="train")
    with pytest.raises(BadInput, match=r"no such file.*--split"):
        Corpus.read("some/set")
    assert len(asked) == 3


def test_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("a\n")
    monkeypatch.setenv("SOME_PLACE", str(tmp_path))
    assert Corpus.read("$SOME_PLACE/a.txt").path == str(tmp_path / "a.txt")
    with pytest.raises(BadInput, match="variable NO_PLACE is not set"):
        Corpus.read("${NO_PLACE}/a.txt")
    assert Corpus.read("package:nlpinf/data/texts/wikitext2.txt.gz").sha256 == Corpus.read("shipped:wikitext2").sha256
    with pytest.raises(BadInput, match="'no_package' is not installed"):
        Corpus.read("package:no_package/a.txt")


def _parquet_bytes() -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(table(["some sentence"] * 5000), sink, compression="none", use_dictionary=False)
    return sink.getvalue().to_pybytes()


def _with_bad_page() -> bytes:
    data = bytearray(_parquet_bytes())
    data[60000:60400] = b"\xff" * 400
    return bytes(data)


SOME = ["some sentence"] * 5000
WRONG = [
    ("a.csv", b"text\na\n", "format '.csv' are not known; there are .txt, .jsonl"),
    ("a.pdf.gz", gzip.compress(b"x"), "format '.pdf' are not known"),
    ("a.txt.gz", gzip.compress(plain(SOME))[:-9], "truncated"),
    ("a.txt.zst", zst(plain(SOME))[:-9], "truncated"),
    ("a.txt.zst", plain(SOME), "truncated, damaged or not of its suffix"),
    ("a.jsonl.gz", gzip.compress(objects(SOME))[:-9], "truncated"),
    ("a.jsonl.zst", zst(objects(SOME))[:-9], "truncated"),
    ("a.txt.xz", b"\xfd7zXZ", "format '.xz' are not known"),
    ("a.jsonl", b"[" * 200_000 + b"\n", "line 1 is not valid JSON"),
    ("a.parquet", _parquet_bytes()[:-9], "truncated"),
    ("a.parquet", _parquet_bytes()[:3000], "truncated"),
    ("a.parquet", b"", "truncated"),
    ("a.parquet", _with_bad_page(), "truncated, damaged|not UTF-8"),
]


@pytest.mark.parametrize("which", range(len(WRONG)))
def test_damaged_and_unknown_files(tmp_path: Path, which: int) -> None:
    name, data, message = WRONG[which]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(BadInput, match=message) as caught:
        Corpus.read(tmp_path / name)
    assert str(caught.value).startswith(str(tmp_path / name)) and "\n" not in str(caught.value)
    if "format" not in message:  # in a folder the file is named, not the folder
        with pytest.raises(BadInput, match=name.replace(".", r"\.")):
            Corpus.read(tmp_path)


def test_folders_of_nothing_and_of_two_formats(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="the folder has no corpus file"):
        Corpus.read(tmp_path)
    (tmp_path / "README.md").write_text("no sentence\n")
    with pytest.raises(BadInput, match="the folder has no corpus file"):
        Corpus.read(tmp_path)
    (tmp_path / "a.txt").write_text("a\n")
    (tmp_path / "b.jsonl").write_text('{"text": "b"}\n')
    with pytest.raises(BadInput, match=r"a.txt and b.jsonl are of different formats.*/\*.txt"):
        Corpus.read(tmp_path)
    assert list(Corpus.read(f"{tmp_path}/*.txt")) == ["a"]
    with pytest.raises(BadInput, match="no file has such a name"):
        Corpus.read(f"{tmp_path}/*.parquet")
    (tmp_path / "state.json").write_text("{}")
    with pytest.raises(BadInput, match="cannot be read as a folder of save_to_disk"):
        Corpus.read(tmp_path)
    with pytest.raises(BadInput, match="cannot be read from int"):
        Corpus.read(3)


def test_pipes_are_refused_instead_of_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.txt")
    for path in (tmp_path / "pipe.txt", Path("/dev/null")):
        with pytest.raises(BadInput, match=r"a pipe or a device.*write it to a file first"):
            find(path)


def test_nulls_in_json_lines_are_empty_rows(tmp_path: Path) -> None:
    (tmp_path / "c.jsonl").write_text('{"text": "a"}\n{"text": null}\n{"text": "b"}\n')
    corpus = Corpus.read(tmp_path / "c.jsonl", empty="skip")
    assert list(corpus) == ["a", "b"] and corpus.rows.tolist() == [0, 2] and corpus.skipped == {"empty": 1}
    with pytest.raises(BadInput, match="line 2 is empty"):
        Corpus.read(tmp_path / "c.jsonl")


def test_string_views_are_strings(tmp_path: Path) -> None:
    path = tmp_path / "c.parquet"
    pq.write_table(pa.table({"text": pa.array(["a", "b"]).cast(pa.string_view())}), path)
    assert list(Corpus.read(path)) == ["a", "b"]


def test_a_source_tells_how_it_was_asked_for(tmp_path: Path) -> None:
    (tmp_path / "c.jsonl").write_bytes(objects(["a"], "body"))
    source = find(tmp_path / "c.jsonl", "body")
    assert source.reading == {"text_column": "body"}
    assert find(source.name, **source.reading).reading == source.reading
    (tmp_path / "c.txt").write_bytes(plain(["a"]))
    assert find(tmp_path / "c.txt").reading == {}
