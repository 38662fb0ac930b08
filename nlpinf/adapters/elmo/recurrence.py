"""An LSTM's steps without gradients: in place, and with a direction's derivative by hand beside the values.

The same formulas as `ProjectedLSTM`, whose own loop is made of operations with derivatives of every kind and order. Here
memory is written over, which only values and forward-mode tangents allow: gate inputs are made for a few steps at a time in
memory that stays in the processor's cache, and products add themselves to what is there. With h' for dh/dt,
(h W)' = h' W + h W'.

Under autocast on a CPU the gates and products are of its dtype, cell states and what is returned as they were.
"""

from __future__ import annotations

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from nlpinf.adapters.elmo import cell, packed

ROWS = 512  # tokens whose gate inputs are made at a time, in each direction


def applies() -> bool:
    """Whether nothing but values and plain forward-mode tangents is asked for."""
    return not (
        torch.is_grad_enabled()
        or torch._C._are_functorch_transforms_active()
        or torch.compiler.is_compiling()
        or torch.is_autocast_enabled("cuda")
    )


class Gates:
    """Gate inputs x Wᵀ + b of all tokens, made when they are asked for; parameters and x may be dual tensors.

    bias (2, m), weight (2, m, k); x (2, N, k), or with `which` (2, N) the words (n, k) that the tokens are.
    """

    def __init__(self, bias: Tensor, x: Tensor, weight: Tensor, which: Tensor | None = None) -> None:
        self.dtype = x.dtype
        self.low = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
        self._b, self._db = _pair(bias, self.low)
        self._x, self._dx = _pair(x, self.low)
        self._w, self._dw = _pair(weight, self.low)
        self.moving = any(t is not None for t in (self._db, self._dx, self._dw))
        self.width, self._which = self._w.shape[1], which
        self._table: tuple[Tensor, Tensor | None] | None = None
        if which is not None:
            self._x = self._x.expand(2, *self._x.shape)
            self._dx = None if self._dx is None else self._dx.expand(2, *self._dx.shape)

    def packs(self) -> bool:
        """Whether the loop is that of `packed`, which makes a step's gates in one product."""
        return packed.applies(self._x, self.low)

    def inputs(self, way: int) -> packed.Pair:
        """The tokens' inputs (N, k) of a direction."""
        if self._which is None:
            return self._x[way], None if self._dx is None else self._dx[way]
        ids = self._which[way]
        return self._x[way][ids], None if self._dx is None else self._dx[way][ids]

    def weights(self, way: int) -> list[packed.Pair]:
        """W_ih (m, k) and b (m, 1) of a direction."""
        bias = self._b[way, :, None], None if self._db is None else self._db[way, :, None]
        return [(self._w[way], None if self._dw is None else self._dw[way]), bias]

    def fill(self, values: Tensor, changes: Tensor | None, rows: slice) -> None:
        """Write the gate inputs of these tokens to `values` (2, n, m) and their tangents to `changes`."""
        if self._which is None:
            return self._make(values, changes, rows)
        if self._table is None:  # of the distinct words
            table = self._x.new_empty(2, self._x.shape[1], self.width)
            self._table = table, torch.empty_like(table) if self.moving else None
            self._make(*self._table, slice(None))
        table, change = self._table
        for way in range(2):
            ids = self._which[way, rows]
            torch.index_select(table[way], 0, ids, out=values[way])
            if changes is not None:
                changes[way].zero_() if change is None else torch.index_select(change[way], 0, ids, out=changes[way])

    def _make(self, values: Tensor, changes: Tensor | None, rows: slice) -> None:
        values.copy_(self._b[:, None].expand_as(values)).baddbmm_(self._x[:, rows], self._w.mT)
        if changes is None:
            return
        changes.zero_() if self._db is None else changes.copy_(self._db[:, None].expand_as(changes))
        if self._dx is not None:
            changes.baddbmm_(self._dx[:, rows], self._w.mT)
        if self._dw is not None:
            changes.baddbmm_(self._x[:, rows], self._dw.mT)


def advance(
    gates: Gates,
    sizes: list[int],
    weight_hh: Tensor,
    weight_hr: Tensor | None,
    cell_clip: float | None,
    projection_clip: float | None,
) -> Tensor:
    """Gate inputs of packed tokens to packed outputs (2, N, projection), from zero states.

    Parameters and gates may be dual tensors; then so is the result.
    """
    with torch.autocast("cpu", enabled=False):
        if gates.packs():
            return _advance_packed(gates, sizes, weight_hh, weight_hr, (cell_clip, projection_clip))
        return _advance(gates, sizes, weight_hh, weight_hr, cell_clip, projection_clip)


def _advance_packed(
    gates: Gates,
    sizes: list[int],
    weight_hh: Tensor,
    weight_hr: Tensor | None,
    clips: tuple[float | None, float | None],
) -> Tensor:
    w = _pair(weight_hh, gates.low)
    r = None if weight_hr is None else _pair(weight_hr, gates.low)
    ways = []
    for way in range(2):
        input_weight, bias = gates.weights(way)
        weights = [input_weight, _of(w, way), bias]
        project = None if r is None else _of(r, way)
        ways.append(packed.advance(gates.inputs(way), weights, project, sizes, clips, gates.dtype))
    out = torch.stack([value for value, _ in ways]).to(gates.dtype)
    if ways[0][1] is None and ways[1][1] is None:
        return out
    return forward_ad.make_dual(out, torch.stack([t for _, t in ways if t is not None]).to(gates.dtype))


def _of(pair: packed.Pair, way: int) -> packed.Pair:
    return pair[0][way], None if pair[1] is None else pair[1][way]


def _advance(
    gates: Gates,
    sizes: list[int],
    weight_hh: Tensor,
    weight_hr: Tensor | None,
    cell_clip: float | None,
    projection_clip: float | None,
) -> Tensor:
    low = gates.low
    w, dw = _pair(weight_hh, low)
    r, dr = (None, None) if weight_hr is None else _pair(weight_hr, low)
    moving = gates.moving or dw is not None or dr is not None
    hidden, width = gates.width // 4, w.shape[2]
    out = w.new_empty(2, sum(sizes), width)
    dout = torch.empty_like(out) if moving else None
    c = w.new_zeros(2, sizes[0], hidden, dtype=gates.dtype)
    dc = torch.zeros_like(c) if moving else None
    room = w.new_empty((2 if moving else 1) * 2 * max(ROWS, sizes[0]) * gates.width)  # the same for all steps
    g = dg = None
    first = end = start = before = 0
    for step_number, n in enumerate(sizes):
        if start == end:
            first, end = start, start + _count(sizes[step_number:])
            shape = (2, end - first, gates.width)
            size = 2 * shape[1] * shape[2]
            g = room[:size].view(shape)
            dg = room[size : 2 * size].view(shape) if moving else None
            gates.fill(g, dg, slice(first, end))
        assert g is not None
        step, here, last = slice(start, start + n), slice(start - first, start - first + n), slice(before, before + n)
        if start:
            for way in range(2):
                g[way, here].addmm_(out[way, last], w[way].T)
                if dg is not None and dout is not None:
                    dg[way, here].addmm_(dout[way, last], w[way].T)
                    if dw is not None:
                        dg[way, here].addmm_(out[way, last], dw[way].T)
        y, dy = cell.advance(
            g[:, here], None if dg is None else dg[:, here], c[:, :n], None if dc is None else dc[:, :n], cell_clip
        )
        y = y.to(low)
        if dout is not None and dy is not None:
            dy = dy.to(low)
            dout[:, step] = dy if r is None else torch.bmm(dy, r.mT)
            if dr is not None:
                for way in range(2):
                    dout[way, step].addmm_(y[way], dr[way].T)
        out[:, step] = y if r is None else torch.bmm(y, r.mT)
        if r is not None:
            cell.clip(out[:, step], None if dout is None else dout[:, step], projection_clip)
        start, before = start + n, start
    out, dout = out.to(gates.dtype), None if dout is None else dout.to(gates.dtype)
    return out if dout is None else forward_ad.make_dual(out, dout)


def _count(sizes: list[int]) -> int:
    """Return the tokens of as many of the steps as have at most `ROWS`, one at least."""
    total = sizes[0]
    for n in sizes[1:]:
        if total + n > ROWS:
            break
        total += n
    return total


def _pair(tensor: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    value, tangent = forward_ad.unpack_dual(tensor)
    return value.to(dtype), None if tangent is None else tangent.to(dtype)
