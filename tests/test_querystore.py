"""Query folders: what is saved is what is loaded, and what was changed since is refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nlpinf import Query, QueryVectors, querystore, score
from nlpinf.adapters.huggingface import chain_from_runs, save_run
from nlpinf.errors import BadInput
from nlpinf.influence import query_vectors
from nlpinf.stages import Chain
from tests.cases import ASKED
from tests.runs import make_runs


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Chain, QueryVectors]:
    """A folder with pretrain/, finetune/ and query/, the chain and the vectors in memory; tests only read it."""
    folder = tmp_path_factory.mktemp("stored")
    chain = chain_from_runs(make_runs(folder, {"proximity": 0.05}).folders)
    queries = [Query.mean_loss(ASKED, "mean"), Query.margin(ASKED[1])]
    vectors = query_vectors(chain, queries, damping=[0.5, 0.25], sample=5, seed=2)
    querystore.save(vectors, folder / "query", chain)
    return folder, chain, vectors


@pytest.fixture
def copied(made: tuple[Path, Chain, QueryVectors], tmp_path: Path) -> Path:
    """A copy of the folder, to be damaged."""
    return Path(shutil.copytree(made[0], tmp_path / "copied"))


def test_what_is_loaded_is_what_was_saved(made: tuple[Path, Chain, QueryVectors]) -> None:
    folder, _, vectors = made
    loaded = querystore.load(folder / "query")
    assert loaded.values == vectors.values and len(loaded) == 2 and loaded.converged
    for one, other in zip(loaded.vectors, vectors.vectors):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[n], other[n]) and one[n].dtype == other[n].dtype for n in one)
    for ours, theirs in zip(loaded.verdicts, vectors.verdicts):
        assert list(ours) == list(theirs) == ["finetune", "pretrain"]
        assert [end.summary() for end in ours.values()] == [end.summary() for end in theirs.values()]
    assert [(q.kind, q.examples, q.name) for q in loaded.queries] == [
        (q.kind, tuple(q.examples), q.name) for q in vectors.queries
    ]
    kept = {k: v for k, v in loaded.settings.items() if k != "query_folder"}
    assert kept == json.loads(json.dumps(vectors.settings))
    np.testing.assert_array_equal(score(loaded).column(1), score(vectors).column(1))


def test_who_may_read_one_file_may_read_all(made: tuple[Path, Chain, QueryVectors], tmp_path: Path) -> None:
    files = [path for path in made[0].rglob("*") if path.is_file()]
    assert {path.suffix for path in files} >= {".json", ".safetensors"}
    (tmp_path / "like").touch()
    assert {path.stat().st_mode for path in files} == {(tmp_path / "like").stat().st_mode}


def test_a_solve_that_ended_badly_comes_back_as_it_ended(
    made: tuple[Path, Chain, QueryVectors], tmp_path: Path
) -> None:
    _, chain, vectors = made
    verdicts = [dict(v) for v in vectors.verdicts]
    verdicts[0]["finetune"] = replace(verdicts[0]["finetune"], verdict="not finite", residual=float("nan"))
    querystore.save(replace(vectors, verdicts=tuple(verdicts)), tmp_path / "q", chain)
    json.loads((tmp_path / "q/manifest.json").read_text(encoding="utf-8"), parse_constant=pytest.fail)
    loaded = querystore.load(tmp_path / "q")
    end = loaded.verdicts[0]["finetune"]
    assert end.verdict == "not finite" and end.residual != end.residual
    assert not loaded.converged and loaded.verdicts[1]["finetune"].converged


def flip(path: Path) -> None:
    """Change one bit of a file's last number."""
    content = bytearray(path.read_bytes())
    content[-4] ^= 1
    path.write_bytes(content)


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **changes}), encoding="utf-8")


def retrained(folder: Path) -> None:
    """Train the pretraining run again, and record it as it now is."""
    stage = chain_from_runs([folder / "pretrain"]).stages[0]
    with torch.no_grad():
        next(stage.model.parameters())[0] += 1
    save_run(stage, folder / "pretrain", data={"path": "../corpus.txt"})


TAMPERED: dict[str, tuple[Any, str]] = {
    "a bit of a vector": (lambda f: flip(f / "query/vectors-00001.safetensors"), r"vectors-00001.*changed"),
    "a vector gone": (lambda f: (f / "query/vectors-00000.safetensors").unlink(), r"vectors-00000.*missing"),
    "vectors swapped": (
        lambda f: shutil.copy(f / "query/vectors-00000.safetensors", f / "query/vectors-00001.safetensors"),
        r"vectors-00001.*changed",
    ),
    "the run's weights": (lambda f: flip(f / "pretrain/model.safetensors"), r"model\.safetensors.*weights changed"),
    "another run in its place": (retrained, r"pretrain.*not those that .*query was made with"),
    "the run gone": (lambda f: shutil.rmtree(f / "pretrain"), r"pretrain.*not there.*--pretrain"),
    "the corpus": (lambda f: (f / "corpus.txt").write_text("a cat\n" * 12), r"corpus\.txt.*not those of the run"),
    "the manifest cut": (lambda f: (f / "query/manifest.json").write_text("{"), r"manifest\.json.*not valid JSON"),
    "the manifest gone": (lambda f: (f / "query/manifest.json").unlink(), r"manifest\.json.*no such file"),
    "another format": (lambda f: edit(f / "query/manifest.json", format=99), r"manifest\.json.*format 1"),
    "a scores folder": (lambda f: edit(f / "query/manifest.json", kind="scores"), r"manifest\.json.*no query manifest"),
}


@pytest.mark.parametrize("case", TAMPERED)
def test_what_was_changed_since_is_refused(case: str, copied: Path) -> None:
    change, message = TAMPERED[case]
    querystore.load(copied / "query")
    change(copied)
    with pytest.raises(BadInput, match=message) as caught:
        querystore.load(copied / "query")
    assert "\n" not in str(caught.value)


def test_only_the_pretraining_run_is_needed_and_may_lie_elsewhere(copied: Path, tmp_path: Path) -> None:
    shutil.rmtree(copied / "finetune")
    assert len(querystore.load(copied / "query")) == 2
    shutil.move(copied / "query", tmp_path / "far" / "query")
    with pytest.raises(BadInput, match="not there"):
        querystore.load(tmp_path / "far" / "query")
    assert len(querystore.load(tmp_path / "far" / "query", run=copied / "pretrain")) == 2


def test_an_interrupted_save_is_taken_for_none_and_done_again(
    made: tuple[Path, Chain, QueryVectors], copied: Path, tmp_path: Path
) -> None:
    folder, chain, vectors = made
    started = tmp_path / "started"
    shutil.copytree(folder / "query", started)
    (started / "manifest.json").rename(started / "manifest.json.part")
    shutil.copy(started / "vectors-00001.safetensors", started / "vectors-00007.safetensors")
    with pytest.raises(BadInput, match=r"no such file.*finished query folder"):
        querystore.load(started)
    querystore.save(vectors, started, chain)
    assert sorted(p.name for p in started.iterdir()) == [
        "manifest.json", "vectors-00000.safetensors", "vectors-00001.safetensors",
    ]  # fmt: skip
    with pytest.raises(BadInput, match="holds a query already"):
        querystore.save(vectors, started, chain)


def test_a_chain_in_memory_is_refused_before_a_folder_is_made(
    made: tuple[Path, Chain, QueryVectors], tmp_path: Path
) -> None:
    _, chain, vectors = made
    bare = Chain([replace(stage, record={}) for stage in chain.stages], chain.links[1].transfer)  # type: ignore[arg-type]
    with pytest.raises(BadInput, match=r"'pretrain' is in memory only; save it with save_run"):
        querystore.save(vectors, tmp_path / "query", bare)
    assert list(tmp_path.iterdir()) == []
