"""What the C library does with memory that is freed."""

from __future__ import annotations

import ctypes
import sys

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # of glibc's <malloc.h>


def keep() -> bool:
    """Let this process keep what it frees for what it needs next; say whether the C library knows how (glibc does).

    By default glibc returns every large buffer to the system, and the next batch pays for every page of it again: a third
    of the time of a pass over a corpus on a CPU, at the same peak. For programs, not libraries, as it is the whole process's.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(_MMAP_MAX, 0)) and bool(mallopt(_TRIM_THRESHOLD, 2**31 - 1))
