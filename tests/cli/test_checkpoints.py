"""`nlpinf query` killed in the middle of a solve, and given again."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest

from tests.cli.common import files, nlpinf, refused
from tests.runs import make_runs


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two small runs, held near; tests only read them."""
    return make_runs(tmp_path_factory.mktemp("runs"), {"proximity": 0.05}).folder


def command(runs: Path, out: Path, **changes: Any) -> list[str]:
    options: dict[str, Any] = {
        "pretrain": runs / "pretrain", "finetune": runs / "finetune", "test": runs / "rows.jsonl", "row": 1, "out": out,
        "damping": 1e-2, "sample": 5, "tolerance": 1e-5, "checkpoint-every": 0, **changes,
    }  # fmt: skip
    return ["query", *(text for name, value in options.items() for text in (f"--{name}", str(value)))]


@pytest.mark.parametrize(("processes", "preconditioner", "steps"), [(1, "none", 9), (2, "ekfac", 4)])
def test_a_query_that_was_killed_goes_on_to_the_same_bytes(
    processes: int, preconditioner: str, steps: int, runs: Path, tmp_path: Path
) -> None:
    """Killed when it has written so many states of the pretraining's solve; of a group all processes at once."""
    options = {"preconditioner": preconditioner, "tolerance": 1e-5 if processes == 1 else 1e-4}
    undisturbed = nlpinf(*command(runs, tmp_path / "whole", **options), processes=processes)
    assert undisturbed.status == 0, undisturbed
    assert "goes on" not in undisturbed.err
    out = tmp_path / "query"
    killed = nlpinf(
        *command(runs, out, **options), processes=processes, where="solves/pretrain/", kill=steps + 2
    )  # the first file says what is solved
    assert killed.status == -signal.SIGKILL
    assert not (out / "manifest.json").exists()

    before = files(out)
    told = "another damping (0.01 there, 0.02 now)"
    refused(nlpinf(*command(runs, out, damping=2e-2, **options), processes=processes), "solves/finetune", told)
    refused(nlpinf(*command(runs, out, seed=1, **options)), "another seed (0 there, 1 now)")
    assert files(out) == before

    again = nlpinf(*command(runs, out, **options), processes=processes)
    assert again.status == 0, again
    assert "finetune: done before" in again.err and f"pretrain: goes on after {2 * steps} products" in again.err
    found, expected = files(out), files(tmp_path / "whole")
    assert set(found) == set(expected) and not (out / "solves").exists()
    for name in expected:
        if name.endswith(".safetensors"):
            assert found[name] == expected[name]


def test_a_query_that_ran_out_of_products_goes_on_with_more(runs: Path, tmp_path: Path) -> None:
    out = tmp_path / "query"
    ended = nlpinf(*command(runs, out, **{"max-iterations": 5}))
    assert ended.status != 0 and "not converged" in ended.err
    more = nlpinf(*command(runs, out))
    assert more.status == 0 and "finetune: goes on after " in more.err
    anew = tmp_path / "anew"
    assert nlpinf(*command(runs, anew, **{"max-iterations": 5})).status != 0
    afresh = nlpinf(*command(runs, anew, damping=0.5), "--restart")
    assert afresh.status == 0 and "goes on" not in afresh.err
