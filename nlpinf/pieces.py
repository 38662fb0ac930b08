"""Large tensors worked on in pieces that stay in the processor's cache, so that several operations read memory once."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import torch
from torch import Tensor

ENTRIES = 1 << 17  # of a piece: half a MiB in float32


def entries(count: int, like: Tensor) -> int:
    """Return how many entries are made at a time: `count`, which the CPU's cache holds; elsewhere, where calls cost more, 16 times as many."""
    return count if like.device.type == "cpu" else 16 * count


class Room(threading.local):
    """Memory for what one use after the other overwrites: the last one's tensor is lost with the next, in each thread.

    What is taken anew for every batch would leave holes in the process's memory wherever a library keeps something small
    meanwhile (oneDNN a program for every shape), into which the next does not fit, so that the process grows. Off the CPU
    the allocator sees to that, and memory is taken anew.
    """

    def __init__(self) -> None:
        self._held: dict[torch.dtype, Tensor] = {}

    def like(self, tensor: Tensor, *shape: int) -> Tensor:
        """Return a tensor of this shape, of the dtype and device of `tensor`, with anything in it."""
        if tensor.device.type != "cpu":
            return tensor.new_empty(shape)
        size, held = torch.Size(shape).numel(), self._held.pop(tensor.dtype, None)
        if held is None or held.numel() < size:
            del held  # before there is more
            held = tensor.new_empty(size)
        self._held[tensor.dtype] = held
        return held[:size].view(shape)


def pieces(tensor: Tensor) -> Iterator[slice]:
    """Yield slices of the tensor's rows, a piece each; off the CPU, where calls cost more than memory, all of them at once."""
    rows = len(tensor)
    few = ENTRIES // max(1, tensor.numel() // max(1, rows)) if tensor.device.type == "cpu" else rows
    step = max(1, few)
    yield from (slice(start, min(start + step, rows)) for start in range(0, rows, step))
