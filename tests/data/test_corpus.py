"""Corpora and labelled sets: what a row is, and every way a file can be wrong."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import json
from pathlib import Path

import pyarrow as pa
import pytest
import torch

from nlpinf.data.corpus import Corpus, examples_sha256, read_labelled
from nlpinf.errors import BadInput
from tests.shared import shared_data


def test_lines_end_at_line_feeds_alone(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_bytes("\ufeffone\r\ntwo\u2028still two\u0085 and\rtwo\x0b\nnul \0\nfour".encode())
    corpus = Corpus.read(file)
    assert list(corpus) == ["one", "two\u2028still two\u0085 and\rtwo\x0b", "nul \0", "four"]
    assert corpus.rows.tolist() == [0, 1, 2, 3]
    assert corpus[-1] == "four" and corpus[1:3] == list(corpus)[1:3] and corpus[::2] == ["one", "nul \0"]


@pytest.mark.parametrize("block", [1, 2, 3, 5, 1 << 20])
def test_lines_do_not_depend_on_how_the_file_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    monkeypatch.setattr("nlpinf.data.files._BLOCK", block)
    texts = ["é", "日本語 text\u2028", "a" * 7, "\r \rz", "last"]
    file = tmp_path / "a.txt"
    file.write_bytes("\r\n".join(texts).encode())
    assert list(Corpus.read(file)) == texts


@pytest.mark.parametrize("suffix", ["txt", "txt.gz", "txt.zst", "txt.bz2", "jsonl", "jsonl.gz"])
def test_formats(tmp_path: Path, suffix: str) -> None:
    texts = ["a b", "c\u2028d", "e"]
    plain = "\n".join(json.dumps({"text": t}) if "json" in suffix else t for t in texts).encode()
    file = tmp_path / f"a.{suffix}"
    packed = {"gz": gzip.compress, "bz2": bz2.compress, "zst": lambda b: pa.compress(b, "zstd", asbytes=True)}
    file.write_bytes(packed.get(suffix.split(".")[-1], bytes)(plain))
    corpus = Corpus.read(file)
    assert list(corpus) == texts and corpus.path == str(file) and corpus.skipped == {}
    assert corpus.sha256 == hashlib.sha256("a b\nc\u2028d\ne\n".encode()).hexdigest()


def test_rows_keep_their_numbers(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("zero\n\ntwo\n \t\nfour\n")
    corpus = Corpus.read(file, empty="skip")
    assert corpus.rows.tolist() == [0, 2, 4] and corpus.skipped == {"empty": 2}
    left = corpus.without([2])
    assert list(left) == ["zero", "four"] and left.rows.tolist() == [0, 4] and corpus.rows.tolist() == [0, 2, 4]
    assert left.skipped == {"empty": 2, "left out": 1} and left.sha256 != corpus.sha256
    with pytest.raises(BadInput, match="there is no row 1"):
        corpus.without([1])
    with pytest.raises(BadInput, match="every row is left out"):
        corpus.without([0, 2, 4])
    json_file = tmp_path / "a.jsonl"
    json_file.write_text('{"text": "zero"}\n\n{"text": ""}\n{"text": "three"}\n')
    assert Corpus.read(json_file, empty="skip").rows.tolist() == [0, 3]


def test_in_memory() -> None:
    corpus = Corpus(iter(["a", "b"]), rows=[7, 3])
    assert corpus.rows.tolist() == [7, 3] and corpus.rows.dtype == torch.int64 and len(corpus) == 2
    for texts, rows, message in [
        ([], None, "no text"), (["a", ""], None, "row 1 is empty"), (["a", 3], None, "text 1 .* int"),
        (["a"], [1, 2], "1 texts with 2 row numbers"), (["a", "b"], [1, 1], "occurs twice"),
        (["\ud800"], None, "Unicode"),
    ]:  # fmt: skip
        with pytest.raises(BadInput, match=message):
            Corpus(texts, rows)  # type: ignore[arg-type]


def test_real_file_is_its_own_checksum() -> None:
    file = shared_data("pretrain", "1bw_heldout_10_11.txt.gz")
    plain = gzip.decompress(file.read_bytes())
    corpus = Corpus.read(file)
    assert list(corpus) == plain.decode().split("\n")[:-1]
    assert corpus.sha256 == hashlib.sha256(plain).hexdigest()


WRONG = {
    "missing.txt": (None, "there is no such file"),
    "nothing.txt": (b"", "corpus is empty"),
    "blank.txt": (b"a\nb\n\nc\n", "line 3 is empty.*--empty skip"),
    "latin.txt": (b"a\nb\ncaf\xe9\n", "line 3 is not UTF-8 .byte 0xe9"),
    "cut.txt.gz": (gzip.compress(b"some sentence\n" * 5000)[:-20], "truncated"),
    "cut_header.txt.gz": (gzip.compress(b"some sentence\n" * 5000)[:8], "truncated"),
    "plain.txt.gz": (b"not packed\n", "not a gzip file"),
    "cut.txt.zst": (pa.compress(b"some sentence\n" * 5000, "zstd", asbytes=True)[:-9], "truncated|cannot be read"),
    "broken.jsonl": (b'{"text": "a"}\n{"text": \n', "line 2 is not valid JSON"),
    "list.jsonl": (b'["a"]\n', "line 1 is a JSON list"),
    "nokey.jsonl": (b'{"text": "a"}\n{"txt": "b"}\n', "line 2 has no `text`"),
    "number.jsonl": (b'{"text": 3}\n', "line 1: `text` is of type int"),
    "surrogate.jsonl": (b'{"text": "\\ud800"}\n', "line 1: .*surrogate"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_corpora_are_refused_in_one_line(tmp_path: Path, name: str) -> None:
    content, message = WRONG[name]
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(BadInput, match=message) as caught:
        Corpus.read(tmp_path / name)
    assert name in str(caught.value) and "\n" not in str(caught.value)


def test_only_empty_lines(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\n \n")
    with pytest.raises(BadInput, match="corpus is empty"):
        Corpus.read(tmp_path / "a.txt", empty="skip")
    with pytest.raises(BadInput, match="neither"):
        Corpus.read(tmp_path / "a.txt", empty="drop")  # type: ignore[arg-type]


def test_labelled(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl.gz"
    rows = [{"text": "good", "label": 1, "id": 4}, {"text": "bad", "label": 0}]
    file.write_bytes(gzip.compress("".join(json.dumps(r) + "\n" for r in rows).encode()))
    assert read_labelled(file, 2, training=True) == [{"text": "good", "label": 1}, {"text": "bad", "label": 0}]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "b"}', "line 2 has no `label`"),
        ('{"label": 1}', "line 2 has no `text`"),
        ('{"text": "b", "label": 2}', "line 2: the label 2 is out of range; it must be from 0 to 1"),
        ('{"text": "b", "label": -1}', "line 2: the label -1"),
        ('{"text": "b", "label": "1"}', "line 2: the label '1' is not an integer"),
        ('{"text": "b", "label": true}', "line 2: the label True is not an integer"),
        ('{"text": " ", "label": 1}', "line 2: the text is empty"),
        ("", "line 2 is empty"),
        ('{"text": "b", "label": 0}', "all 2 examples have the label 0"),
    ],
)
def test_wrong_labelled_sets(tmp_path: Path, line: str, message: str) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "a", "label": 0}\n' + line + "\n")
    with pytest.raises(BadInput, match=message) as caught:
        read_labelled(file, 2, training=True)
    assert str(file) in str(caught.value) and "\n" not in str(caught.value)


def test_empty_labelled_set(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("")
    with pytest.raises(BadInput, match="has no example"):
        read_labelled(tmp_path / "a.jsonl")


def test_checksums_of_other_examples_tell_values_apart() -> None:
    x = torch.arange(6.0)
    variants = [
        [(x, 1)], [(x, 2)], [(x.view(2, 3), 1)], [(x.double(), 1)], [(x, 1), (x, 1)], [[1, 2, 3]], [[1, 2], [3]],
        [[1, 23]], [{"text": "a", "label": 0}], [{"text": "a", "label": 1}], [{"text": "a", "label": "0"}], ["a"],
        ["a", "b"], ["ab"],
    ]  # fmt: skip
    digests = [examples_sha256(v) for v in variants]
    assert len(set(digests)) == len(variants)
    assert examples_sha256([(x.clone(), 1)]) == digests[0]
    assert examples_sha256(["a", "b"]) == examples_sha256(Corpus(["a", "b"]))
