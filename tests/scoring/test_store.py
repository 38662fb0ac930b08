"""The scores folder: whole or not there, resumed to the same bytes, refused when it belongs to something else."""

from __future__ import annotations

import copy
import json
import os
import resource
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import datasets
import duckdb
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch

from nlpinf.data.corpus import Corpus
from nlpinf.errors import BadInput
from nlpinf.influence import QueryVectors
from nlpinf.scoring import Scores, score
from nlpinf.stages import Stage
from tests.scoring.common import pretrain_stage, query_vectors, sentences

ROOT = Path(__file__).resolve().parents[2]
PART = 10


def stage_on(count: int = 47, seed: int = 0) -> Stage:
    stage = pretrain_stage("gpt2 sdpa", torch.float32)
    return replace(stage, data=Corpus(sentences(count, seed), rows=range(100, 100 + count)), batch_size=4)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def vectors() -> QueryVectors:
    return query_vectors(stage_on(), 2)


@pytest.fixture(scope="module")
def folder(vectors: QueryVectors, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "scores"
    score(vectors, out=out, part_rows=PART)
    return out


def test_folder_holds_what_memory_holds(vectors: QueryVectors, folder: Path) -> None:
    assert sorted(files(folder)) == ["manifest.json", *(f"part-{i:05d}.parquet" for i in range(5))]
    kept, read = score(vectors, part_rows=PART), Scores.open(folder)
    assert kept.manifest == read.manifest and len(read) == 47 and read.queries == ["query 0", "query 1"]
    np.testing.assert_array_equal(read.rows, np.arange(100, 147))
    np.testing.assert_array_equal(read.losses, kept.losses)
    for q in (0, 1, "query 1"):
        np.testing.assert_array_equal(read.column(q), kept.column(q))
    assert read.top(5, query=1) == kept.top(5, query=1)
    assert read.columns == kept.columns == ["row", "score", "loss", "tokens", "truncated", "text"]


@pytest.mark.parametrize("k", [1, 3, 10, 46, 47, 100])
@pytest.mark.parametrize("helpful", [False, True])
def test_top_is_the_sorted_column(vectors: QueryVectors, folder: Path, k: int, helpful: bool) -> None:
    scores = Scores.open(folder)
    column = scores.column(1)
    order = np.argsort(column if helpful else -column, kind="stable")[:k]
    found = scores.top(k, query=1, helpful=helpful)
    assert [r.row for r in found] == [100 + int(i) for i in order]
    corpus = vectors.stage.data
    for row, i in zip(found, order):
        assert row.text == corpus[int(i)] and row.score == column[i] and row.loss == scores.losses[i]
        assert row.predicted_change == -row.score / 47


def test_equal_scores_come_in_the_order_of_rows(tmp_path: Path) -> None:
    stage = stage_on()
    same = replace(stage, data=Corpus(["a cat sat"] * 25), batch_size=25, batch_tokens=10**4)
    scores = score(query_vectors(same), out=tmp_path / "s", part_rows=25)
    assert len(set(scores.column().tolist())) == 1
    assert [r.row for r in scores.top(4)] == [0, 1, 2, 3] == [r.row for r in scores.top(4, helpful=True)]


def test_manifest(vectors: QueryVectors, folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["m"] == 47 and manifest["identity"]["reduction"] == "example"
    assert [q["name"] for q in manifest["queries"]] == ["query 0", "query 1"]
    assert [q["value"] for q in manifest["queries"]] == [0.5, 1.5]
    verdict = manifest["queries"][1]["verdicts"]["pretrain"]
    assert verdict["verdict"] == "converged" and verdict["residual"] == 2e-4 and manifest["queries"][1]["converged"]
    assert manifest["query_vectors"] == {"damping": 0.1} and manifest["versions"]["torch"] == torch.__version__
    assert manifest["identity"]["corpus_sha256"] == vectors.stage.data.sha256  # type: ignore[attr-defined]


@pytest.mark.parametrize("options", [{}, {"token_scores": True}])
@pytest.mark.parametrize("queries", [1, 3])
def test_others_open_it(tmp_path: Path, queries: int, options: dict) -> None:
    stage = stage_on()
    out = tmp_path / "scores"
    scores = score(query_vectors(stage, queries), out=out, part_rows=PART, **options)
    pattern = str(out / "part-*.parquet")
    expected = np.stack([scores.column(q) for q in range(queries)], 1).squeeze()
    frame = pd.read_parquet(out / "part-00001.parquet")
    np.testing.assert_array_equal(np.stack(frame["score"]), expected[PART : 2 * PART])
    assert frame["text"][0] == stage.data[PART]
    pick = "score" if queries == 1 else "score[3]"
    found = duckdb.sql(f"select row, {pick} as s from '{pattern}' order by s desc limit 3").fetchall()
    assert [row for row, _ in found] == [r.row for r in scores.top(3, query=queries - 1)]
    loaded = datasets.load_dataset("parquet", data_files=pattern, split="train", cache_dir=str(tmp_path / "cache"))
    np.testing.assert_array_equal(np.array(loaded["score"], np.float32), expected)
    assert loaded["row"] == scores.rows.tolist()
    kinds = {
        name: str(kind)
        for name, kind in zip(
            pq.read_schema(out / "part-00000.parquet").names, pq.read_schema(out / "part-00000.parquet").types
        )
    }
    assert kinds["row"] == "int64" and kinds["loss"] == "float" and kinds["tokens"] == "int32"
    assert kinds["score"] == ("float" if queries == 1 else "fixed_size_list<element: float>[3]")


def test_without_texts(tmp_path: Path) -> None:
    scores = score(query_vectors(stage_on()), out=tmp_path / "s", text=False)
    assert "text" not in scores.columns and scores.top(1)[0].text is None


KILLED = """
import os, signal, sys
from pathlib import Path
from tests.scoring import test_store as T
import nlpinf.scoring.store as store
link = os.link
def dying(a, b):
    if str(b).endswith(sys.argv[2]):
        if sys.argv[3] == "after":
            link(a, b)
        os.kill(os.getpid(), signal.SIGKILL)
    link(a, b)
os.link = dying
T.score(T.query_vectors(T.stage_on(), 2), out=Path(sys.argv[1]), part_rows=T.PART)
"""


@pytest.mark.parametrize(
    ("at", "moment"), [("part-00002.parquet", "before"), ("part-00002.parquet", "after"), ("manifest.json", "before")]
)
def test_killed_and_run_again_gives_the_same_bytes(
    vectors: QueryVectors, folder: Path, tmp_path: Path, at: str, moment: str
) -> None:
    out = tmp_path / "scores"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    setup = "import torch; torch.set_num_threads(1)\n"
    done = subprocess.run(
        [sys.executable, "-c", setup + KILLED, str(out), at, moment],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    partial = [name for name in files(out) if name.endswith(".partial")]
    assert len(partial) == 1
    if at != "manifest.json":
        with pytest.raises(BadInput, match=r"interrupted.*parts are missing.*nlpinf score"):
            Scores.open(out)
    else:
        with pytest.raises(BadInput, match="no scores folder"):
            Scores.open(out)
    before = files(out)
    score(vectors, out=out, part_rows=PART)
    assert files(out) == files(folder)
    assert all(files(out)[name] == content for name, content in before.items() if name.startswith("part-"))


def test_finished_parts_are_not_touched_again(vectors: QueryVectors, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "scores"
    score(vectors, out=out, part_rows=PART)
    times = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    score(vectors, out=out, part_rows=PART)
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == times
    assert files(out) == files(folder)


def test_another_job_is_refused(vectors: QueryVectors, folder: Path) -> None:
    stage = vectors.stage
    before = files(folder)
    other_weights = replace(stage, model=copy.deepcopy(stage.model))
    with torch.no_grad():
        next(other_weights.model.parameters()).view(-1)[0] += 1e-3
    shifted = Corpus(stage.data[:], rows=range(47))
    cases = [
        (query_vectors(stage, 2, seed=5), {}, "another query"),
        (query_vectors(stage, 1), {}, "another query"),
        (replace_stage(vectors, other_weights), {}, "other weights"),
        (vectors, {"corpus": stage_on(seed=1).data}, "texts differ"),
        (vectors, {"corpus": stage_on(46).data}, "another corpus"),
        (vectors, {"corpus": shifted}, "other row numbers"),
        (replace_stage(vectors, replace(stage, reduction="token")), {}, "reduction.*'example' there, 'token' now"),
        (vectors, {"part_rows": 9}, "part_rows.*10 there, 9 now"),
        (vectors, {"token_scores": True}, "token_scores"),
        (vectors, {"text": False}, "'text': True there, False now"),
    ]
    for changed, arguments, message in cases:
        with pytest.raises(BadInput, match=message) as caught:
            score(changed, out=folder, **{"part_rows": PART, **arguments})  # type: ignore[arg-type]
        assert str(folder) in str(caught.value) and "\n" not in str(caught.value)
    assert files(folder) == before


def replace_stage(vectors: QueryVectors, stage: Stage) -> QueryVectors:
    return replace(vectors, stage=stage)


def test_a_folder_of_something_else_is_refused(vectors: QueryVectors, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(BadInput, match="no scores folder and has files in it"):
        score(vectors, out=tmp_path)
    with pytest.raises(BadInput, match="no scores folder"):
        Scores.open(tmp_path)
    with pytest.raises(BadInput, match="no scores folder"):
        Scores.open(tmp_path / "missing")
    with pytest.raises(BadInput, match="cannot be written"):
        score(vectors, out=tmp_path / "notes.txt")
    for content, message in [
        ("{", "not valid JSON"),
        ('{"kind": "query"}', "no manifest of scores"),
        ('{"kind": "scores", "format": 99}', "format 99"),
    ]:
        (tmp_path / "manifest.json").write_text(content)
        with pytest.raises(BadInput, match=message):
            Scores.open(tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_damaged_part_is_named(vectors: QueryVectors, tmp_path: Path) -> None:
    out = tmp_path / "scores"
    scores = score(vectors, out=out, part_rows=PART)
    part = out / "part-00003.parquet"
    part.write_bytes(part.read_bytes()[:200])
    with pytest.raises(BadInput, match=r"part-00003.parquet: cannot be read.*delete this part"):
        scores.top(3)


def test_unknown_queries_and_sizes(folder: Path) -> None:
    scores = Scores.open(folder)
    for call, message in [
        (lambda: scores.column(2), "no query 2"), (lambda: scores.column("x"), "no query 'x'.*'query 0', 'query 1'"),
        (lambda: scores.top(0), "at least 1"),
    ]:  # fmt: skip
        with pytest.raises(BadInput, match=message):
            call()


def test_a_full_disk_leaves_whole_parts_only(vectors: QueryVectors, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "scores"
    sizes = [len(content) for name, content in files(folder).items()]
    # A limit on the size of files stands in for the disk: the manifest fits, the parts do not fit whole.
    seen = []

    def limited(done: int, rows: int) -> None:
        seen.append(done)
        if len(seen) == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (min(sizes) // 2, limits[1]))

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.raises(BadInput, match=r"part-00002.parquet: cannot be written .*free some space") as caught:
            score(vectors, out=out, part_rows=PART, progress=limited)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "\n" not in str(caught.value)
    assert sorted(files(out)) == ["manifest.json", "part-00000.parquet", "part-00001.parquet"]
    score(vectors, out=out, part_rows=PART)
    assert files(out) == files(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e42])
def test_a_score_that_is_not_finite_names_its_row(tmp_path: Path, value: float) -> None:
    stage = replace(
        pretrain_stage("gpt2 sdpa"),
        data=Corpus(["a cat"] * 25 + ["the cat sat on the mat"] + ["a dog"] * 9, rows=range(3, 38)),
    )
    vectors = query_vectors(stage)
    places = vectors.vectors[0]["transformer.wpe.weight"]
    places[6:, 0] = value  # only the long sentence reaches so far
    out = tmp_path / "scores"
    with pytest.raises(BadInput, match="row 28: its score is not a finite number"):
        score(vectors, out=out, part_rows=PART)
    assert sorted(files(out)) == ["manifest.json", "part-00000.parquet", "part-00001.parquet"]
