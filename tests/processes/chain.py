"""A chain with fewer batches in one stage than there are processes, and an uneven number in the other."""

from __future__ import annotations

from dataclasses import replace

import torch

from nlpinf.stages import Chain, Proximity
from tests.cases import case


def chain(dtype: torch.dtype, family: str = "bert sdpa") -> Chain:
    """Return a tiny language model of five batches and a classifier of one, held near."""
    first, last = case(family, "proximity", dtype).chain.stages[:2]
    first = replace(first, data=[*first.data, *first.data][:5], batch_size=1)
    return Chain([first, replace(last, batch_size=64)], Proximity(0.3))
