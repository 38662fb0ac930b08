"""What touches every row does so in bulk: the calls that Python makes hardly grow with the rows."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nlpinf import Corpus, Scores
from nlpinf.experiments.removal import removals
from nlpinf.scoring import score
from tests.scoring.common import pretrain_stage, query_vectors

SMALL, LARGE = 500, 50_000


def calls(work: Callable[[], Any]) -> int:
    """Count the calls, of Python and of C functions, that `work` makes."""
    count = 0

    def watch(frame: Any, event: str, argument: Any) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(watch)
    try:
        work()
    finally:
        sys.setprofile(None)
    return count


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Scores folders of few and of many rows, each in one part, written as docs/reference/files.md has it."""
    start = tmp_path_factory.mktemp("scale")
    score(query_vectors(pretrain_stage("gpt2 sdpa")), out=start / "made")
    manifest = json.loads((start / "made/manifest.json").read_text(encoding="utf-8"))
    made = []
    for rows in (SMALL, LARGE):
        folder = start / str(rows)
        folder.mkdir()
        manifest["m"] = rows
        manifest["identity"] |= {"rows": rows, "part_rows": rows, "parts": 1}
        manifest["corpus"]["rows"] = rows
        (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
        values = np.random.default_rng(0).standard_normal(rows).astype(np.float32)
        columns = {
            "row": np.arange(rows),
            "score": values,
            "loss": values**2,
            "tokens": np.full(rows, 7, np.int32),
            "text": [f"the sentence {i}" for i in range(rows)],
        }
        pq.write_table(pa.table(columns), folder / "part-00000.parquet")
        made.append(folder)
    return made


READ: dict[str, Callable[[Scores], Any]] = {
    "top": lambda s: s.top(20),
    "column": lambda s: s.column(),
    "rows and losses": lambda s: (s.rows, s.losses),
    "removals": lambda s: removals(s, 0.05, 3),
}


@pytest.mark.parametrize("name", READ)
def test_reading_scores_does_not_loop_over_rows(name: str, folders: list[Path]) -> None:
    few, many = (calls(lambda f=folder: READ[name](Scores.open(f))) for folder in folders)
    assert many < few + LARGE // 100, (few, many)
    assert READ["column"](Scores.open(folders[1])).shape == (LARGE,)


def test_reading_a_corpus_does_not_loop_over_lines(tmp_path: Path) -> None:
    counts = []
    for rows in (SMALL, LARGE):
        path = tmp_path / f"{rows}.txt"
        path.write_text("".join(f"the sentence {i}\n" for i in range(rows)), encoding="utf-8")
        counts.append(calls(lambda p=path: Corpus.read(p)))
    assert counts[1] < counts[0] + LARGE // 100, counts


def test_a_loop_would_be_seen() -> None:
    assert calls(lambda: [abs(i) for i in range(LARGE)]) >= LARGE
