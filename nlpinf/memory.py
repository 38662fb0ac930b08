"""Work on batches that a GPU's memory holds: where it does not suffice, the batches are halved and the work is begun anew."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

import torch

from nlpinf import processes
from nlpinf.errors import BadInput

if TYPE_CHECKING:
    from nlpinf.stages import Stage

T = TypeVar("T")

OutOfMemory = torch.cuda.OutOfMemoryError
SIZES = {"cpu": (64, 2048), "cuda": (512, 16384)}  # examples and padded tokens of a batch, where nobody says


def sizes(device: torch.device) -> tuple[int, int]:
    """Return the examples and the padded tokens that a batch has at most on this kind of device."""
    return SIZES.get(device.type, SIZES["cpu"])


def halved(stage: Stage) -> Stage:
    """Return the stage with batches half as large; raise `BadInput` where they are of one example."""
    torch.cuda.empty_cache()
    if stage.batch_size == 1:
        raise BadInput(
            f"stage {stage.name!r}: the GPU's memory does not hold the work on one example; take a shorter max_length, a "
            "GPU with more memory, or --device cpu"
        )
    smaller = copy.copy(stage)
    object.__setattr__(smaller, "batch_size", stage.batch_size // 2)
    object.__setattr__(smaller, "batch_tokens", max(1, stage.batch_tokens // 2))
    return smaller


def within(stage: Stage, work: Callable[[Stage], T]) -> T:
    """Return `work(stage)`, with smaller batches where the GPU's memory asks for them; `work` must leave nothing half done.

    In a group of processes, which must cut their batches alike, the batches stay as they are and `BadInput` says so.
    """
    while True:
        try:
            return work(stage)
        except OutOfMemory:
            pass  # what the failed work held is let go of with the exception
        if processes.count() > 1:
            raise BadInput(
                f"stage {stage.name!r}: the GPU's memory does not hold a batch of {stage.batch_size} examples or "
                f"{stage.batch_tokens} tokens; give the stage a smaller batch_tokens, or run one process"
            )
        stage = halved(stage)
