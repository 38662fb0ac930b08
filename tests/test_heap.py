"""A kept heap takes no page anew for memory that was used before."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from nlpinf import heap

_FAULTS = """
import resource, sys, torch
from nlpinf import heap
if sys.argv[1] == "kept" and not heap.keep():
    sys.exit(3)
torch.ones(1 << 24)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    torch.ones(1 << 24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def _faults(how: str) -> int:
    clean = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")}
    done = subprocess.run([sys.executable, "-c", _FAULTS, how], capture_output=True, text=True, env=clean, check=False)
    if done.returncode == 3:
        pytest.skip("this C library has no mallopt")
    return int(done.stdout)


def test_freed_memory_is_used_again() -> None:
    """Ten times 64 MiB: pages anew each time by default, at most once when they are kept."""
    assert _faults("kept") * 5 < _faults("default")


def test_other_systems_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "win32")
    assert not heap.keep()
