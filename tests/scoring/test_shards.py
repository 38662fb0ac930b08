"""Many processes on one folder: killed at any moment, twice at the same part, on a full disk, the bytes come out the same."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import time
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nlpinf import files
from nlpinf.data.corpus import Corpus
from nlpinf.errors import BadInput
from nlpinf.scoring.feed import Part, feed_of
from nlpinf.scoring.rows import Tick
from nlpinf.scoring.shards import Claims, Shard, Worker
from nlpinf.scoring.store import Store

ROWS, PART = 1203, 10
PARTS = 121
TEXTS = [f"sentence {i} {'x' * (i % 13)}" for i in range(ROWS)]


def make(part: Part, tick: Tick) -> pa.Table:
    """A scorer that costs nothing: the checksum of the text."""
    scores = np.array([zlib.crc32(text.encode()) / 2**32 for text in part.examples], np.float32)
    tick(len(scores))
    return pa.table({"row": part.rows, "score": scores, "text": part.texts})


def manifest() -> dict[str, Any]:
    return {"kind": "scores", "format": 1, "identity": {"rows": ROWS, "part_rows": PART, "parts": PARTS}}


def work(folder: Path, only: Shard | None = None, do: Callable[..., pa.Table] = make, **options: Any) -> None:
    Worker(Store.start(folder, manifest()), feed_of(Corpus(TEXTS)), do, only, **options).run()


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def child(job: Callable[[], None]) -> int:
    """Fork; the child does the job and exits 0, or 1 if that raises."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        job()
        status = 0
    finally:
        os._exit(status)


def status_of(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.fixture(autouse=True)
def without_sync(monkeypatch: pytest.MonkeyPatch) -> None:
    """A killed process needs no sync, only a machine without power does; here it would only cost time."""
    monkeypatch.setattr(files.os, "fsync", lambda handle: None)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("undisturbed") / "scores"
    work(out)
    return bytes_of(out)


def test_undisturbed(undisturbed: dict[str, bytes]) -> None:
    assert list(undisturbed) == ["manifest.json", *(f"part-{i:05d}.parquet" for i in range(PARTS))]
    table = pa.concat_tables([pq.read_table(pa.BufferReader(undisturbed[name])) for name in list(undisturbed)[1:]])
    assert table["text"].to_pylist() == TEXTS and table["row"].to_pylist() == list(range(ROWS))


def test_killed_at_fifty_random_moments(undisturbed: dict[str, bytes], tmp_path: Path) -> None:
    out, draw, killed, running = tmp_path / "scores", random.Random(0), 0, []
    while killed < 50:
        if len(list(out.glob("part-*"))) > PARTS - 20:  # begin again, so that the kills fall into work
            for path in draw.sample(sorted(out.glob("part-*")), 90):
                path.unlink()
        running = [child(lambda: work(out)) for _ in range(2)]
        time.sleep(draw.uniform(0, 0.05))
        for pid in running:
            os.kill(pid, signal.SIGKILL)
            killed += status_of(pid) == -signal.SIGKILL
    work(out)
    assert bytes_of(out) == undisturbed


@pytest.mark.parametrize("call", ["open", "link", "unlink", "replace", "pwrite"])
def test_killed_at_each_step(undisturbed: dict[str, bytes], tmp_path: Path, call: str) -> None:
    out, kills = tmp_path / "scores", 0
    for number in range(1, 13):
        if number == 6:
            shutil.rmtree(out)

        def job(number: int = number) -> None:
            original, left = getattr(os, call), [number]

            def dying(*arguments: Any, **options: Any) -> Any:
                left[0] -= 1
                if left[0] == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return original(*arguments, **options)

            setattr(os, call, dying)
            work(out, Shard(0, 8))

        kills += status_of(child(job)) == -signal.SIGKILL
    assert kills >= (0 if call == "replace" else 5)
    work(out)
    assert bytes_of(out) == undisturbed


def test_processes_at_once_do_each_part_once(undisturbed: dict[str, bytes], tmp_path: Path) -> None:
    out, log = tmp_path / "scores", tmp_path / "log"

    def logged(part: Part, tick: Tick) -> pa.Table:
        with log.open("a") as file:
            file.write(f"{part.number}\n")
        return make(part, tick)

    pids = [child(lambda: work(out, do=logged)) for _ in range(3)]
    assert [status_of(pid) for pid in pids] == [0, 0, 0]
    assert bytes_of(out) == undisturbed
    assert Counter(log.read_text().split()) == Counter(map(str, range(PARTS)))


def test_the_same_shard_twice(undisturbed: dict[str, bytes], tmp_path: Path) -> None:
    out = tmp_path / "scores"
    pids = [child(lambda: work(out, Shard(3, 64))) for _ in range(2)]
    assert [status_of(pid) for pid in pids] == [0, 0]
    assert sorted(path.name for path in out.glob("part-*")) == ["part-00003.parquet", "part-00067.parquet"]
    for index in range(64):
        work(out, Shard(index, 64))
    assert bytes_of(out) == undisturbed


def test_without_locks_and_claims_nothing_is_lost(
    undisturbed: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from contextlib import contextmanager

    @contextmanager
    def everyone(self: Claims, part: int, again: bool = False):  # type: ignore[no-untyped-def]
        yield True

    monkeypatch.setattr(Claims, "take", everyone)
    out = tmp_path / "scores"
    pids = [child(lambda: work(out)) for _ in range(3)]
    assert [status_of(pid) for pid in pids] == [0, 0, 0]
    assert bytes_of(out) == undisturbed


def test_a_dead_process_holds_nothing_up_and_a_live_one_is_waited_for(tmp_path: Path) -> None:
    claims = Claims(tmp_path)
    ready = tmp_path / "ready"

    def holding() -> None:
        with claims.take(5) as ours:
            assert ours
            ready.touch()
            time.sleep(60)

    pid = child(holding)
    while not ready.exists():
        time.sleep(0.01)
    assert claims.held(5)
    for again in (False, True):
        with claims.take(5, again) as ours:
            assert not ours
    os.kill(pid, signal.SIGKILL)
    status_of(pid)
    assert claims.path(5).exists() and not claims.held(5)
    with claims.take(5) as ours:
        assert not ours  # it is left for last
    with claims.take(5, again=True) as ours:
        assert ours and claims.path(5).read_text().split()[1] == str(os.getpid())
    assert not claims.path(5).exists()


def test_a_group_begins_with_its_own_share(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order = []

    def noted(part: Part, tick: Tick) -> pa.Table:
        order.append(part.number)
        return make(part, tick)

    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "4")
    work(tmp_path / "scores", do=noted)
    assert order[:31] == [*range(1, PARTS, 4), 0] and sorted(order) == list(range(PARTS))


def test_a_full_file_system(undisturbed: dict[str, bytes], tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=96k", "tmpfs", str(small)], capture_output=True).returncode:
        pytest.skip("a small file system cannot be mounted here")
    try:
        out = small / "scores"
        with pytest.raises(BadInput, match=r"cannot be written .*free some space"):
            work(out)
        there = bytes_of(out)
        assert 2 < len(there) < PARTS and all(undisturbed[name] == content for name, content in there.items())
        subprocess.run(["mount", "-o", "remount,size=16m", str(small)], check=True)
        work(out)
        assert bytes_of(out) == undisturbed
    finally:
        subprocess.run(["umount", str(small)], check=True)


@pytest.mark.parametrize("text", ["3", "3/", "/4", "4/4", "-1/4", "a/b", "0/0"])
def test_shards_that_are_none(text: str) -> None:
    with pytest.raises(BadInput, match=r"shard.*from 0"):
        Shard.parse(text)


def test_shards_cover_all_parts_once() -> None:
    assert [sum(part in Shard(i, 7) for i in range(7)) for part in range(20)] == [1] * 20
    assert Shard.parse("3/64") == Shard(3, 64)
