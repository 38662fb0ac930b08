"""The processes of a launcher (torchrun, `accelerate launch`, srun through them) as one: each does its share, sums are of all.

With one process everything here does nothing. With several, each holds the whole model and every R-th batch of a
curvature sample; a product costs one all-reduce. All processes make the same calls in the same order, so that what is
replicated (vectors, dot products, decisions) stays equal on all of them.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from itertools import islice
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from nlpinf.errors import BadInput
from nlpinf.parameters import Parameters

T = TypeVar("T")

_BUCKET = 2**24  # scalars in one all-reduce: few calls, and no second copy of a large model
_PATIENCE = timedelta(minutes=30)  # for a process that lives but does not answer; one that died is noticed at once


def count() -> int:
    """Return the number of processes in the group, 1 without one."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Return this process's number in the group, from 0."""
    return dist.get_rank() if count() > 1 else 0


def main() -> bool:
    """Return whether this process is the one that writes and prints."""
    return rank() == 0


def speaks() -> bool:
    """Return whether this process is the one of the launcher's that prints, in a group or not."""
    return launched() == 1 or os.environ.get("RANK", "0") == "0"


def launched() -> int:
    """Return how many processes the launcher started, 1 without one."""
    value = os.environ.get("WORLD_SIZE", "1")
    return int(value) if value.isdecimal() else 1


def device() -> torch.device:
    """Return where runs are opened: NLPINF_DEVICE, which `nlpinf --device` sets; this process's own GPU of several."""
    name = os.environ.get("NLPINF_DEVICE", "cpu")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        made = torch.device(name)
        if made.type == "cuda" and not torch.cuda.is_available():
            raise RuntimeError
    except RuntimeError:
        raise BadInput(f"the device {name!r} is not there; give cpu, or cuda on a machine with a GPU") from None
    if made.type == "cuda" and made.index is None:
        made = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    return made


@contextmanager
def group(backend: str | None = None) -> Iterator[None]:
    """Join the launcher's processes while the block runs; nothing happens without a launcher, or within a group.

    `backend` "gloo" or "nccl" (default: nccl where every process has a GPU of its own). A process that ends with an error ends its connections, at which
    the others' next sum raises.
    """
    if launched() == 1 or count() > 1:
        yield
        return
    own = device()
    alone = False
    if own.type == "cuda":
        torch.cuda.set_device(own)
        alone = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) <= torch.cuda.device_count()
    dist.init_process_group(backend or ("nccl" if alone else "gloo"), timeout=_PATIENCE)
    try:
        yield
        dist.barrier()
    finally:
        dist.destroy_process_group()


def share(items: Iterable[T]) -> Iterator[T]:
    """Yield this process's share of `items`, every R-th one: all of them without a group, none if there are too few."""
    return islice(items, rank(), None, count())


def turns(items: Iterable[T], even: bool) -> Iterator[tuple[T, bool]]:
    """Yield (item, True) for this process's share of `items`.

    With `even` equally often on every process: where there are too few, (item, False) with the item of another, to be
    gone through without counting.
    """
    rest = iter(items)
    while group := list(islice(rest, count())):
        if rank() < len(group):
            yield group[rank()], True
        elif even:
            yield group[0], False


def total(sums: Parameters) -> Parameters:
    """Return the sums over all processes of tensors by name; in place. Equal on all of them, to the last bit.

    Tensors that are held in pieces are sums already (`nlpinf.sharded`).
    """
    if count() > 1:
        bucket: list[Tensor] = []
        for tensor in sums.values():
            if hasattr(tensor, "full_tensor"):
                continue
            bucket.append(tensor)
            if sum(t.numel() for t in bucket) >= _BUCKET:
                _reduce(bucket)
                bucket = []
        _reduce(bucket)
    return sums


def total_of(value: float) -> float:
    """Return the sum of a number over all processes."""
    return value if count() == 1 else float(_summed(torch.tensor([value], dtype=torch.float64)))


def all_of(holds: bool) -> bool:
    """Return whether something holds on every process, so that all decide alike."""
    return total_of(float(not holds)) == 0


def _reduce(bucket: list[Tensor]) -> None:
    if not bucket:
        return
    flat = _summed(torch.cat([tensor.reshape(-1) for tensor in bucket]))
    for tensor, part in zip(bucket, flat.split([tensor.numel() for tensor in bucket])):
        tensor.copy_(part.view_as(tensor))


def _summed(tensor: Tensor) -> Tensor:
    """Return the sum over all processes of a tensor that may be overwritten; NCCL sums what lies on a GPU, gloo the rest."""
    there = tensor.cuda() if dist.get_backend() == "nccl" else tensor.cpu()
    dist.all_reduce(there)
    return there
