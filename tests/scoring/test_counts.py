"""Rows that were cut, skipped or look damaged are counted: in the parts, the manifest, `status` and the report."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from nlpinf import score
from nlpinf.data.corpus import Corpus
from nlpinf.data.sources import find
from nlpinf.report.notices import notices
from nlpinf.scoring import Shard
from nlpinf.scoring.feed import StreamFeed, deduped
from nlpinf.scoring.merge import merge
from nlpinf.scoring.status import status
from nlpinf.scoring.store import Scores
from tests.cases import WORDS
from tests.scoring.common import pretrain_stage, query_vectors, sentences

LONG = " ".join(WORDS[i % len(WORDS)] for i in range(40))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = sentences(20)
    rows[3] = rows[11] = LONG
    rows[4] += " \ufffd"
    rows[5], rows[6] = "\0 " + rows[5] + "\ufffd", rows[6] + "\u2028"
    rows[8] += "\rand"
    rows[9] = "  "
    path = tmp_path_factory.mktemp("counts") / "corpus.txt"
    path.write_bytes("\r\n".join([*rows, "", ""]).encode())
    return path


def test_every_odd_row_is_counted(corpus: Path, tmp_path: Path) -> None:
    vectors = query_vectors(pretrain_stage("gpt2 sdpa"))
    scores = score(vectors, corpus, tmp_path / "s", empty="skip", part_rows=6)
    told = scores.manifest["corpus"]
    assert told["odd"] == {"U+FFFD": 2, "NUL": 1, "U+2028": 1, "CR": 1}
    assert told["skipped"] == {"empty": 2} and told["truncated"] == 2
    flags = {row: cut for t in scores.tables(["row", "truncated"]) for row, cut in zip(*t.to_pydict().values())}
    assert {row for row, cut in flags.items() if cut} == {3, 11}
    assert status(tmp_path / "s").corpus == told
    shown = " ".join(n.text for n in notices(scores.manifest, [scores.column()], 0))
    for piece in ("2 sentences of the corpus are longer", "U+FFFD", "a NUL", "U+2028", "carriage return", "(empty)"):
        assert piece in shown
    memory = score(vectors, corpus, empty="skip", part_rows=6)
    assert memory.manifest == json.loads((tmp_path / "s/manifest.json").read_text())
    assert Corpus.read(corpus, empty="skip").skipped == {"empty": 2}
    held = score(vectors, Corpus.read(corpus, empty="skip"), part_rows=6)
    assert held.manifest["corpus"]["odd"] == told["odd"]
    once = deduped(StreamFeed.of(find(corpus), "skip"))
    assert once.odd == told["odd"] and score(vectors, once).manifest["corpus"]["truncated"] == 1


def test_the_count_waits_for_the_last_part(corpus: Path, tmp_path: Path) -> None:
    vectors = query_vectors(pretrain_stage("gpt2 sdpa"))
    for i in (0, 1):
        score(vectors, corpus, tmp_path / str(i), empty="skip", part_rows=6, shard=Shard(i, 2))
        assert "truncated" not in Scores.open(tmp_path / str(i), partial=True).manifest["corpus"]
    merge([tmp_path / "0", tmp_path / "1"], tmp_path / "m")
    whole = score(vectors, corpus, tmp_path / "w", empty="skip", part_rows=6)
    assert Scores.open(tmp_path / "m").manifest == whole.manifest
    # A process that died between the last part and the count.
    before = (tmp_path / "w/manifest.json").read_bytes()
    manifest = json.loads(before)
    del manifest["corpus"]["truncated"]
    (tmp_path / "w/manifest.json").write_text(json.dumps(manifest))
    score(vectors, corpus, tmp_path / "w", empty="skip", part_rows=6)
    assert (tmp_path / "w/manifest.json").read_bytes() == before


def test_a_line_of_ten_megabytes_has_the_score_of_its_beginning(tmp_path: Path) -> None:
    stage = pretrain_stage("gpt2 sdpa")
    (tmp_path / "long.txt").write_text(f"{LONG} {'the cat ' * 1_300_000}\n{LONG}\n" + "\n" * 100_000)
    scores = score(query_vectors(replace(stage)), tmp_path / "long.txt", empty="skip", text=False)
    np.testing.assert_array_equal(*scores.column())
    assert scores.manifest["corpus"]["skipped"] == {"empty": 100_000}
    assert pc.all(pa.concat_tables(scores.tables(["truncated"]))["truncated"]).as_py()
