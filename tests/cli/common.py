"""A tiny experiment that runs in seconds, and the command line run as processes."""

from __future__ import annotations

import atexit
import itertools
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

SUBJECTS = ["the film", "a plot", "the cat", "that dog", "the actor", "a scene"]
VERBS = ["was", "seems", "is", "looked"]
GOOD = ["good", "warm", "bright", "funny", "great"]
BAD = ["bad", "cold", "dull", "slow", "thin"]
ENDS = ["", " today", " on the mat", " in the end", " and nobody saw it"]


def sentences(count: int = 60) -> list[str]:
    """Distinct sentences of three to nine words."""
    every = [f"{s} {v} {w}{e}" for s, v, w, e in itertools.product(SUBJECTS, VERBS, GOOD + BAD, ENDS)]
    return random.Random(7).sample(every, count)


def labelled(count: int = 24) -> list[dict[str, Any]]:
    """Rows whose label is whether the adjective is good, both classes as often."""
    generator = random.Random(11)
    return [
        {"text": f"{generator.choice(SUBJECTS)} was {generator.choice(GOOD if i % 2 else BAD)}", "label": i % 2}
        for i in range(count)
    ]


def write_data(folder: Path, texts: Sequence[str] | None = None, rows: Sequence[dict[str, Any]] | None = None) -> Path:
    """Write corpus.txt and rows.jsonl."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "corpus.txt").write_text("\n".join(texts or sentences()) + "\n", encoding="utf-8")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows or labelled()), encoding="utf-8")
    return folder


def recipe(data: Path, **changes: Any) -> dict[str, Any]:
    """A recipe of seconds; `changes` by dotted key, with `__` for the dot, e.g. finetune__transfer="frozen"."""
    content: dict[str, Any] = {
        "name": "tiny",
        "seed": 3,
        "pretrain": {
            "corpus": str(data / "corpus.txt"),
            "tokenizer": {"kind": "wordpiece", "size": 80},
            "model": {"type": "bert", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16},
            "max_length": 16,
            "training": {"epochs": 1, "batch_size": 16, "learning_rate": 3e-3, "weight_decay": 1e-3},
        },
        "finetune": {
            "data": str(data / "rows.jsonl"),
            "test_share": 0.25,
            "alpha": 0.03,
            "training": {"epochs": 1, "batch_size": 8, "learning_rate": 1e-2, "weight_decay": 1e-3},
        },
        "query": {"misclassified": 1, "damping": [0.1, 0.01], "sample": 30, "tolerance": 0.01},
        "report": {"examples": 5},
    }  # fmt: skip
    for key, value in changes.items():
        *path, last = key.split("__")
        place = content
        for part in path:
            place = place[part]
        place[last] = value
    return content


def write_recipe(path: Path, content: dict[str, Any]) -> Path:
    """Write a recipe file."""
    path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return path


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """The document on stdout."""
        return json.loads(self.out)


@cache
def _server() -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.cli.server"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
        env=environment,
    )
    atexit.register(process.communicate)
    return process


def nlpinf(*arguments: Any, cwd: Path | None = None, kill: int = 0, where: str = "", processes: int = 1) -> Ended:
    """Run the command line as a process, or as a group of `processes`, of which what the first printed is returned.

    With `kill` it dies by SIGKILL just before the kill-th file whose path has `where` in it gets its name; all of a group do.
    """
    server = _server()
    assert server.stdin is not None and server.stdout is not None
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        request = {
            "argv": [str(a) for a in arguments],
            "cwd": str(cwd or folder),
            "out": str(out),
            "err": str(err),
            "kill": kill,
            "where": where,
            "processes": processes,
        }
        server.stdin.write(json.dumps(request) + "\n")
        server.stdin.flush()
        status = int(server.stdout.readline())
        return Ended(status, out.read_text(encoding="utf-8"), err.read_text(encoding="utf-8"))


def refused(ended: Ended, *named: str) -> str:
    """Assert that a command was refused: status 2, one line on stderr that names `named`, nothing on stdout; return it."""
    assert ended.status == 2, ended
    assert ended.out == "", ended
    lines = ended.err.splitlines()
    assert len(lines) == 1, ended.err
    for name in named:
        assert name in lines[0], lines[0]
    assert "Traceback" not in ended.err
    return lines[0]


def files(folder: Path) -> dict[str, bytes]:
    """Every file below a folder by its relative name."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def scored(folder: Path) -> dict[str, bytes]:
    """The parts of a scores folder."""
    return {name: content for name, content in files(folder).items() if name.endswith(".parquet")}


@cache
def _finished(root: Path) -> Path:
    data = write_data(root / "data")
    ended = nlpinf("run", write_recipe(root / "recipe.yaml", recipe(data)), "--out", root / "run")
    assert ended.status == 0, ended
    return root


_ROOT: list[Path] = []


def tiny(factory: pytest.TempPathFactory) -> Path:
    """The folder of the finished tiny experiment, made once: data/, recipe.yaml, run/. Tests only read it."""
    if not _ROOT:
        _ROOT.append(factory.mktemp("tiny"))
    return _finished(_ROOT[0])


def copied(run: Path, to: Path, *names: str) -> Path:
    """Copy parts of a run folder (default: all of it), so that a test may damage it."""
    for name in names or [p.name for p in run.iterdir()]:
        if (run / name).is_dir():
            shutil.copytree(run / name, to / name)
        else:
            to.mkdir(parents=True, exist_ok=True)
            shutil.copy2(run / name, to / name)
    return to
