"""Which of PyTorch's two libraries for the CPU takes the float32 matrix products.

PyTorch hands them to MKL, which runs on AMD's processors without AVX-512; oneDNN, which PyTorch carries too, takes half the
time there. PyTorch's one way to choose it is to permit bfloat16 in float32 products, of which oneDNN makes use only where
the processor has matrix tiles (AMX); elsewhere its products are float32's own, and that is tried before it is relied upon.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

_KEPT, _PROGRAM = "ONEDNN_PRIMITIVE_CACHE_CAPACITY", 1 << 19  # bytes of a program: 0.45 to 0.85 MiB
_CPUINFO = Path("/proc/cpuinfo")
_EXACT = 1e-5  # relative error of a product in float32; in bfloat16 it is 2e-3
_SHAPES = ((256, 256, 768), (64, 512, 1024), (31, 77, 1001), (128, 1024, 32), (1, 256, 1000))


@contextmanager
def fast() -> Iterator[None]:
    """Take the library that is the faster one on this processor within; a caller who permits less than float32 is obeyed.

    Which one depends on the kind of processor alone, never on a timing, so that a run that is repeated ends in the same bytes.
    """
    settings = _settings()
    before = None if settings is None else settings.fp32_precision
    if before not in ("none", "ieee") or not onednn_pays():
        yield
        return
    settings.fp32_precision = "bf16"
    try:
        yield
    finally:
        settings.fp32_precision = before


@lru_cache(maxsize=1)
def onednn_pays() -> bool:
    """Say whether oneDNN is the faster library here, AMD with AVX-512, and its products are float32's."""
    if _settings() is None or not torch.backends.mkldnn.is_available() or not _amd():
        return False
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or getattr(torch.cpu, "_is_amx_tile_supported", bool)():
        return False
    return exact("bf16")


def exact(setting: str) -> bool:
    """Say whether products of float32 matrices and batches of them keep its precision under a setting of PyTorch's."""
    settings = _settings()
    before, settings.fp32_precision = settings.fp32_precision, setting
    try:
        draw = torch.Generator().manual_seed(0)
        for rows, inner, columns in _SHAPES:
            a, b = (torch.randn(shape, generator=draw) for shape in ((2, rows, inner), (2, inner, columns)))
            truth = a.double() @ b.double()
            for found, wanted in (
                (torch.bmm(a, b), truth),
                (a[0] @ b[0], truth[0]),
                (torch.addmm(torch.zeros(columns), a[0], b[0].T.contiguous().T), truth[0]),
            ):
                if not bool((found - wanted).norm() <= _EXACT * wanted.norm()):
                    return False
    finally:
        settings.fp32_precision = before
    return True


def programs() -> int:
    """Return the bytes that oneDNN's programs come to once a corpus has shown all its shapes; 0 where products are not its."""
    kept = os.environ.get(_KEPT, "")
    return min(int(kept) if kept.isdecimal() else 1024, 1024) * _PROGRAM if onednn_pays() else 0


def _settings() -> Any:
    """PyTorch's settings of oneDNN's products, from 2.9 on, or None."""
    found = getattr(torch.backends.mkldnn, "matmul", None)
    return found if hasattr(found, "fp32_precision") else None


def _amd() -> bool:
    try:
        return platform.machine() in ("x86_64", "AMD64") and "AuthenticAMD" in _CPUINFO.read_text()[:4096]
    except OSError:
        return False


if _amd():
    # Read by MKL at its first product. By default the last bits depend there on where matrices lie, and what is resumed
    # must end in the same ones; it costs no time.
    os.environ.setdefault("MKL_CBWR", "AUTO")
    # Read by oneDNN at its first product: for how many shapes it keeps its programs. A corpus has more shapes than that; with
    # 1,024, oneDNN's own number, a pass of a one-layer model held 300 MiB more and was 4 % faster.
    os.environ.setdefault(_KEPT, "256")
