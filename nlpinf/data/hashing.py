"""Random numbers that are a function of (seed, row, position) alone, whatever the batch they are drawn in.

SplitMix64 (Steele, Lea and Flood, OOPSLA 2014) as a counter-based generator, vectorised over int64 tensors.
"""

from __future__ import annotations

import torch
from torch import Tensor


def _signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value


_GAMMA, _MIX_1, _MIX_2 = (_signed(c) for c in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def _shifted(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)  # a logical shift: int64 has only the arithmetic one


def mix(x: Tensor) -> Tensor:
    """Return the SplitMix64 finaliser of int64 `x`, elementwise."""
    x = x + _GAMMA
    x = (x ^ _shifted(x, 30)) * _MIX_1
    x = (x ^ _shifted(x, 27)) * _MIX_2
    return x ^ _shifted(x, 31)


def uniform(seed: int, *keys: Tensor) -> Tensor:
    """Return float64 numbers in [0, 1), one for each tuple of int64 `keys` (broadcast), a function of (seed, keys)."""
    state = mix(torch.tensor(seed, dtype=torch.int64))
    for key in keys:
        state = mix(state ^ mix(key.to(torch.int64)))
    return _shifted(state, 11).to(torch.float64) * 2.0**-53
