"""Large tensors worked on in pieces that stay in the processor's cache, so that several operations read memory once."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

ENTRIES = 1 << 17  # of a piece: half a MiB in float32


def entries(count: int, like: Tensor) -> int:
    """Return how many entries are made at a time: `count`, which the CPU's cache holds; elsewhere, where calls cost more, 16 times as many."""
    return count if like.device.type == "cpu" else 16 * count


def pieces(tensor: Tensor) -> Iterator[slice]:
    """Yield slices of the tensor's rows, a piece each; off the CPU, where calls cost more than memory, all of them at once."""
    rows = len(tensor)
    few = ENTRIES // max(1, tensor.numel() // max(1, rows)) if tensor.device.type == "cpu" else rows
    step = max(1, few)
    yield from (slice(start, min(start + step, rows)) for start in range(0, rows, step))
