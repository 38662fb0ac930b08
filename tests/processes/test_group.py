"""Several processes give what one gives: products, gradients, query vectors; and none waits for one that died."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from nlpinf import parameters as P
from tests.processes import sharded
from tests.processes.chain import chain
from tests.processes.worker import SOLVED, results

ROOT = Path(__file__).parents[2]


def launched(
    processes: int, dtype: str, out: Path, *more: str, module: str = "tests.processes.worker"
) -> subprocess.CompletedProcess[str]:
    """Run the worker under torchrun."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command += ["-m", module, *([dtype] if dtype else []), str(out), *more]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=280)


@pytest.mark.parametrize(("processes", "dtype", "tolerance"), [(2, "float32", 1e-6), (3, "float64", 1e-12)])
def test_a_group_gives_what_one_process_gives(processes: int, dtype: str, tolerance: float, tmp_path: Path) -> None:
    """Five batches for two or three processes, and one batch for all of them: uneven shares, and processes without work."""
    ended = launched(processes, dtype, tmp_path / "found")
    assert ended.returncode == 0, ended.stderr[-3000:]
    alone = results(chain(getattr(torch, dtype)))
    ranks = [torch.load(tmp_path / f"found.{rank}", weights_only=True) for rank in range(processes)]
    fits = [int(found.pop("batches")["made"]) for found in ranks]
    assert sum(fits) == 2 * 5 and max(fits) == 2 * -(-5 // processes)  # for the basis and for the eigenvalues
    assert alone["rows"]["rows"].tolist() == [2, 4, 5]
    for name, expected in alone.items():
        found = ranks[0][name]
        error = P.norm(P.axpy(-1.0, found, expected)) / P.norm(expected)
        assert error <= (10 * SOLVED[dtype] if name.startswith("v") else tolerance), name
        for other in ranks[1:]:  # replicated decisions rest on this
            assert all(torch.equal(found[n], other[name][n]) for n in found), name


def test_sharded_models_give_what_whole_ones_give(tmp_path: Path) -> None:
    """FSDP2 as accelerate applies it: gradients, products, query vectors and scores, with five batches for two processes."""
    ended = launched(2, "", tmp_path / "found", module="tests.processes.sharded")
    assert ended.returncode == 0, ended.stderr[-3000:]
    alone = sharded.results(chain(torch.float64, "gpt2 eager"))
    for rank in range(2):
        found = torch.load(tmp_path / f"found.{rank}", weights_only=True)
        for name, expected in alone.items():
            error = P.norm(P.axpy(-1.0, found[name], expected)) / P.norm(expected)
            assert error <= (1e-10 if name.startswith(("v", "scores")) else 1e-13), name


def test_a_process_that_dies_ends_the_others(tmp_path: Path) -> None:
    start = time.monotonic()
    ended = launched(2, "float64", tmp_path / "found", "dies")
    assert ended.returncode != 0 and "exitcode  : 13" in ended.stderr
    assert time.monotonic() - start < 60
    assert not list(tmp_path.iterdir())
