"""An LSTM cell without gradients: in place, a direction's derivative by hand beside the values.

The tangents of σ and tanh come from their values. Gates may be of lower precision than cell states.
"""

from __future__ import annotations

import torch
from torch import Tensor

_sigmoid_tangent = torch.ops.aten.sigmoid_backward.default  # (tangent of x, σ(x)) to that of σ(x)
_tanh_tangent = torch.ops.aten.tanh_backward.default


def advance(
    gates: Tensor, tangents: Tensor | None, c: Tensor, dc: Tensor | None, limit: float | None
) -> tuple[Tensor, Tensor | None]:
    """Write the next cell state to `c` and return o ⊙ tanh(c), in c's dtype, with the tangents where there are any.

    gates (..., 4 hidden): i, j, f, o before σ and tanh, written over, `tangents` too; c, dc (..., hidden).
    """
    hidden = c.shape[-1]
    i, j, f, o = gates.split(hidden, -1)
    torch.sigmoid_(i), torch.tanh_(j), torch.sigmoid_(gates[..., 2 * hidden :])
    if tangents is not None and dc is not None:
        di, dj, df, do = tangents.split(hidden, -1)
        _add_product(dc.mul_(f), _sigmoid_tangent(df, f), c)
        _add_product(_add_product(dc, _sigmoid_tangent(di, i), j), i, _tanh_tangent(dj, j))
    _add_product(c.mul_(f), i, j)
    clip(c, dc, limit)
    squashed = torch.tanh(c)
    if tangents is None or dc is None:
        return o * squashed, None
    return o * squashed, _add_product(_sigmoid_tangent(do, o) * squashed, o, _tanh_tangent(dc, squashed))


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
