"""An LSTM's steps without gradients: in place, and with a direction's derivative by hand beside the values.

The same formulas as `ProjectedLSTM`, whose own loop is made of operations with derivatives of every kind and order. Here
memory is written over, which only values and forward-mode tangents allow: products add themselves to what is there, and
the tangents of σ and tanh come from their values. With h' for dh/dt, (h W)' = h' W + h W'.
"""

from __future__ import annotations

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

_sigmoid_tangent = torch.ops.aten.sigmoid_backward.default  # (tangent of x, σ(x)) to that of σ(x)
_tanh_tangent = torch.ops.aten.tanh_backward.default


def applies() -> bool:
    """Whether nothing but values and plain forward-mode tangents is asked for."""
    return not (
        torch.is_grad_enabled()
        or torch._C._are_functorch_transforms_active()
        or torch.compiler.is_compiling()
        or torch.is_autocast_enabled("cpu")
        or torch.is_autocast_enabled("cuda")
    )


def affine(bias: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """x Wᵀ + b for both directions: bias (2, m), x (2, n, k), weight (2, m, k) to (2, n, m), dual if one of them is."""
    (b, db), (x, dx), (w, dw) = (_pair(t) for t in (bias, x, weight))
    out = torch.baddbmm(b[:, None], x, w.mT)
    if db is None and dx is None and dw is None:
        return out
    change = out.new_zeros(1).expand_as(out) if db is None else db[:, None]
    if dx is not None:
        change = torch.baddbmm(change, dx, w.mT)
    if dw is not None:
        change = torch.baddbmm(change, x, dw.mT) if dx is None else change.baddbmm_(x, dw.mT)
    return forward_ad.make_dual(out, change.expand_as(out).contiguous())


def advance(
    gates: Tensor,
    sizes: list[int],
    weight_hh: Tensor,
    weight_hr: Tensor | None,
    cell_clip: float | None,
    projection_clip: float | None,
) -> Tensor:
    """Packed gate inputs (2, N, 4 hidden), which are written over, to packed outputs (2, N, projection), from zero states.

    Parameters and gates may be dual tensors; then so is the result.
    """
    (g, dg), (w, dw) = _pair(gates), _pair(weight_hh)
    r, dr = (None, None) if weight_hr is None else _pair(weight_hr)
    moving = dg is not None or dw is not None or dr is not None
    hidden, width = g.shape[2] // 4, w.shape[2]
    dg = dg if dg is not None or not moving else torch.zeros_like(g)
    out = g.new_empty(2, g.shape[1], width)
    dout = torch.empty_like(out) if moving else None
    c = g.new_zeros(2, sizes[0], hidden)
    dc = torch.zeros_like(c) if moving else None
    start = before = 0
    for n in sizes:
        step, last = slice(start, start + n), slice(before, before + n)
        for way in range(2) if start else ():
            g[way, step].addmm_(out[way, last], w[way].T)
            if dg is not None and dout is not None:
                dg[way, step].addmm_(dout[way, last], w[way].T)
                if dw is not None:
                    dg[way, step].addmm_(out[way, last], dw[way].T)
        i, j, f, o = g[:, step].split(hidden, -1)
        torch.sigmoid_(i), torch.tanh_(j), torch.sigmoid_(g[:, step, 2 * hidden :])
        value, tangent = c[:, :n], None if dc is None else dc[:, :n]
        if dg is not None and tangent is not None:
            di, dj, df, do = dg[:, step].split(hidden, -1)
            tangent.mul_(f).addcmul_(_sigmoid_tangent(df, f), value)
            tangent.addcmul_(_sigmoid_tangent(di, i), j).addcmul_(i, _tanh_tangent(dj, j))
        value.mul_(f).addcmul_(i, j)
        _clip(value, tangent, cell_clip)
        squashed = torch.tanh(value)
        y = o * squashed
        if dout is not None and tangent is not None:
            dy = _sigmoid_tangent(do, o).mul_(squashed).addcmul_(o, _tanh_tangent(tangent, squashed))
            dout[:, step] = dy if r is None else torch.bmm(dy, r.mT)
            if dr is not None:
                for way in range(2):
                    dout[way, step].addmm_(y[way], dr[way].T)
        out[:, step] = y if r is None else torch.bmm(y, r.mT)
        if r is not None:
            _clip(out[:, step], None if dout is None else dout[:, step], projection_clip)
        start, before = start + n, start
    return out if dout is None else forward_ad.make_dual(out, dout)


def _pair(tensor: Tensor) -> tuple[Tensor, Tensor | None]:
    value, tangent = forward_ad.unpack_dual(tensor)
    return value, tangent


def _clip(value: Tensor, tangent: Tensor | None, limit: float | None) -> None:
    if limit is None:
        return
    if tangent is not None:
        tangent.masked_fill_(value.abs() > limit, 0.0)
    value.clamp_(-limit, limit)
