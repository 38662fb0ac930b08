"""An LSTM cell without gradients: in place, a direction's derivative by hand beside the values.

The tangents of σ and tanh come from their values. Gates may be of lower precision than cell states.
"""

from __future__ import annotations

import torch
from torch import Tensor

Pair = tuple[Tensor, Tensor | None]
"""A value and its tangent in the direction, if it moves."""


def advance(gates: Tensor, tangents: Tensor | None, state: Pair, limit: float | None, result: Pair) -> None:
    """Write the next cell state c over `state` and o ⊙ tanh(c) to `result`, both with the tangents where there are any.

    gates (..., 4 hidden): i, j, f, o before σ and tanh, written over, `tangents` too; state, result (..., hidden) of one dtype.
    """
    (c, dc), (y, dy) = state, result
    hidden = c.shape[-1]
    i, j, f, o = gates.split(hidden, -1)
    torch.sigmoid_(i), torch.tanh_(j), torch.sigmoid_(gates[..., 2 * hidden :])
    if tangents is None or dc is None or dy is None:
        _add_product(c.mul_(f), i, j)
        clip(c, None, limit)
        torch.mul(o, torch.tanh(c), out=y)
        return
    di, dj, df, do = tangents.split(hidden, -1)
    _add_product(dc.mul_(f), _sigmoid_tangent(df, f), c)
    _add_product(_add_product(dc, _sigmoid_tangent(di, i), j), i, _tanh_tangent(dj, j))
    _add_product(c.mul_(f), i, j)
    clip(c, dc, limit)
    squashed = torch.tanh(c)
    torch.mul(o, squashed, out=y)
    _add_product(torch.mul(_sigmoid_tangent(do, o), squashed, out=dy), o, _tanh_tangent(dc.clone(), squashed))


def _sigmoid_tangent(tangent: Tensor, value: Tensor) -> Tensor:
    """The tangent of σ(x), from that of x, which it is written over, and σ(x)."""
    return torch.ops.aten.sigmoid_backward.grad_input(tangent, value, grad_input=tangent)


def _tanh_tangent(tangent: Tensor, value: Tensor) -> Tensor:
    return torch.ops.aten.tanh_backward.grad_input(tangent, value, grad_input=tangent)


def clip(value: Tensor, tangent: Tensor | None, limit: float | None) -> None:
    """Clip to ±limit in place; a tangent is zero where that changes anything."""
    if limit is None:
        return
    if tangent is not None:
        beyond = float(torch.nextafter(value.new_tensor(limit), value.new_tensor(torch.inf)))  # at the limit: moves on
        torch.ops.aten.hardtanh_backward.grad_input(tangent, value, -beyond, beyond, grad_input=tangent)
    value.clamp_(-limit, limit)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return total.addcmul_(a, b) if a.dtype == b.dtype == total.dtype else total.add_(a * b)
