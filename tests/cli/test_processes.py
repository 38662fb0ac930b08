"""`accelerate launch -m nlpinf query` gives the folder that one process gives."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.cli.common import nlpinf

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_two_processes_write_the_query_of_one(root: Path, tmp_path: Path) -> None:
    arguments = [
        "query", "--pretrain", root / "run/pretrain", "--finetune", root / "run/finetune", "--test",
        root / "run/data/test.jsonl", "--sample", 30, "--damping", 1, "--tolerance", 1e-5,
    ]  # fmt: skip
    assert nlpinf(*arguments, "--out", tmp_path / "one").status == 0
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--cpu",
        "--num_processes",
        "2",
        "--num_machines",
        "1",
    ]
    command += ["--mixed_precision", "no", "--dynamo_backend", "no", "-m", "nlpinf", *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "two")], capture_output=True, text=True, env=environment, timeout=280
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("query 0: ") == 1  # the first process alone prints
    alone, shared = (load_file(tmp_path / name / "vectors-00000.safetensors") for name in ("one", "two"))
    for name, tensor in alone.items():
        torch.testing.assert_close(shared[name], tensor, rtol=1e-3, atol=1e-4 * float(tensor.abs().max()))


def test_of_a_launchers_processes_the_first_alone_prints(root: Path, tmp_path: Path) -> None:
    """Scoring needs no group: processes share the parts, and each ends when all are done."""
    command = [
        sys.executable, "-m", "nlpinf", "score", "--query", root / "run/query", "--out", tmp_path / "scores", "--json",
    ]  # fmt: skip
    for rank in (1, 0):
        launched = {"WORLD_SIZE": "2", "RANK": str(rank), "LOCAL_RANK": str(rank), "PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            [str(part) for part in command], capture_output=True, text=True, env={**os.environ, **launched}
        )
        assert done.returncode == 0, done.stderr
        if rank:
            assert done.stdout == "" and done.stderr == ""
        else:
            assert json.loads(done.stdout)["kind"] == "scores"
