"""A kept heap holds on to memory that was used before."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from nlpinf import heap

_LEFT = """
import sys, torch
from nlpinf import heap
if sys.argv[1] == "kept" and not heap.keep():
    sys.exit(3)
def size():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[0]) * 4096
before = size()
torch.ones(1 << 24)
print(size() - before)
"""


def _left(how: str) -> int:
    """Return the bytes that a process still holds after it made and freed 64 MiB."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")} | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", _LEFT, how], capture_output=True, text=True, env=clean, check=False)
    if done.returncode == 3:
        pytest.skip("this C library has no mallopt")
    return int(done.stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="sizes are read where Linux tells them")
def test_freed_memory_stays_with_the_process() -> None:
    assert _left("default") < 1 << 24
    assert _left("kept") > 0.9 * (1 << 26)


def test_other_systems_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "win32")
    assert not heap.keep()
