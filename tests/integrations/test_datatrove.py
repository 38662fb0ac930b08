"""The datatrove step, on its local executor: the scores of `nlpinf score`, whatever the number of tasks."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from pathlib import Path

import pytest

from nlpinf.errors import BadInput
from nlpinf.querystore import load
from nlpinf.scoring import score
from tests.cli.common import sentences, tiny

pytest.importorskip("datatrove", reason="datatrove is an optional extra (pip install nlpinf[datatrove])")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny(tmp_path_factory)


def run(root: Path, tmp_path: Path, tasks: int, **options: object) -> dict[str, dict]:
    """Run a pipeline of so many tasks, each with its share of the sentences; return the metadata of what came out."""
    from datatrove.data import Document
    from datatrove.executor.local import LocalPipelineExecutor

    from nlpinf.integrations.datatrove import InfluenceScorer

    found: dict[str, dict] = {}

    def read(data: object, rank: int, world_size: int) -> Iterator[Document]:
        documents = [Document(text, f"d{i}", metadata={"row": i}) for i, text in enumerate(sentences())]
        yield from [*documents, Document(" \n", "blank", metadata={"row": 1000})][rank::world_size]

    def collect(data: Iterator[Document], rank: int, world_size: int) -> Iterator[Document]:
        for document in data:
            found[document.id] = document.metadata
            yield document

    step = pickle.loads(pickle.dumps(InfluenceScorer(root / "run/query", batch_rows=13, **options)))  # type: ignore[arg-type]
    executor = LocalPipelineExecutor(
        pipeline=[read, step, collect], tasks=tasks, workers=1, logging_dir=str(tmp_path / f"log{tasks}")
    )
    executor.run()
    return found


def test_scores_are_those_of_the_corpus_pass(root: Path, tmp_path: Path) -> None:
    scores = score(load(root / "run/query"), sentences())
    expected = {f"d{row}": column for row, column in zip(scores.rows, zip(*(scores.column(q) for q in range(2))))}
    found = run(root, tmp_path, 1)
    scale = float(max(abs(scores.column(0))))
    assert len(found) == 61
    for name, values in expected.items():
        assert found[name]["influence"] == pytest.approx(list(values), abs=1e-5 * scale, rel=1e-4)
    limit = float(sorted(scores.column(0))[40])
    shared = run(root, tmp_path, 3, drop_above=limit, key="harm")
    assert set(shared) == {name for name, values in expected.items() if values[0] <= limit} | {"blank"}
    assert "harm" not in shared["blank"]
    for name in set(shared) - {"blank"}:
        assert shared[name]["harm"] == pytest.approx(found[name]["influence"], abs=1e-5 * scale)


def test_rows_without_numbers_are_told_apart_by_their_ids() -> None:
    from datatrove.data import Document

    from nlpinf.integrations.datatrove import InfluenceScorer, _row

    numbers = [_row(Document(text="x", id=f"id {i}")) for i in range(1000)]
    assert len(set(numbers)) == 1000 and all(0 <= n < 2**63 for n in numbers)
    assert _row(Document(text="x", id="a", metadata={"row": 5})) == 5
    with pytest.raises(BadInput, match="no such query folder"):
        InfluenceScorer("nowhere")
