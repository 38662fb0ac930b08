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
        self._table: Tensor | None = None
        if which is not None:
            self._x = self._x.expand(2, *self._x.shape)
            self._dx = None if self._dx is None else self._dx.expand(2, *self._dx.shape)

    def packs(self) -> bool:
        """Whether the loop is that of `packed`, which makes a step's gates in one product."""
        return packed.applies(self._x, self.low)

    def inputs(self, way: int) -> cell.Pair:
        """The tokens' inputs (N, k) of a direction."""
        if self._which is None:
            return self._x[way], None if self._dx is None else self._dx[way]
        ids = self._which[way]
        return self._x[way][ids], None if self._dx is None else self._dx[way][ids]

    def weights(self, way: int) -> list[cell.Pair]:
        """W_ih (m, k) and b (m, 1) of a direction."""
        bias = self._b[way, :, None], None if self._db is None else self._db[way, :, None]
        return [(self._w[way], None if self._dw is None else self._dw[way]), bias]

    def fill(self, block: Tensor, rows: slice) -> None:
        """Write the gate inputs of these tokens, and their tangents if they have any, to `block` (2, n, 1 or 2, m)."""
        if self._which is None:
            return self._make(block, rows)
        if self._table is None:  # of the distinct words
            self._table = block.new_empty(2, self._x.shape[1], block.shape[2], self.width)
            self._make(self._table, slice(None))
        for way in range(2):
            torch.index_select(self._table[way], 0, self._which[way, rows], out=block[way])

    def _make(self, block: Tensor, rows: slice) -> None:
        values, x = block[:, :, 0], self._x[:, rows]
        if block.shape[2] == 1:
            values.copy_(self._b[:, None].expand_as(values)).baddbmm_(x, self._w.mT)
            return
        bias = torch.stack([self._b, torch.zeros_like(self._b) if self._db is None else self._db], 1)
        block.copy_(bias[:, None].expand_as(block))
        if self._dx is None:
            values.baddbmm_(x, self._w.mT)
        else:
            block.flatten(1, 2).baddbmm_(torch.stack([x, self._dx[:, rows]], 2).flatten(1, 2), self._w.mT)
        if self._dw is not None:
            block[:, :, 1].baddbmm_(x, self._dw.mT)


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


def _of(pair: cell.Pair, way: int) -> cell.Pair:
    return pair[0][way], None if pair[1] is None else pair[1][way]


def _advance(
    gates: Gates,
    sizes: list[int],
    weight_hh: Tensor,
    weight_hr: Tensor | None,
    cell_clip: float | None,
    projection_clip: float | None,
) -> Tensor:
    """A token's tangent lies behind its value, so that both meet a weight in one product of twice the rows."""
    low = gates.low
    w, dw = _pair(weight_hh, low)
    r, dr = (None, None) if weight_hr is None else _pair(weight_hr, low)
    copies = 2 if gates.moving or dw is not None or dr is not None else 1
    hidden, width = gates.width // 4, w.shape[2]
    out = w.new_empty(2, sum(sizes), copies, width)
    c = w.new_zeros(copies, 2, sizes[0], hidden, dtype=gates.dtype)
    y = w.new_empty(2, sizes[0], copies, hidden, dtype=gates.dtype)
    room = w.new_empty(2 * max(ROWS, sizes[0]) * copies * gates.width)  # the same for all steps
    block = room
    first = end = start = before = 0
    for step_number, n in enumerate(sizes):
        if start == end:
            first, end = start, start + _count(sizes[step_number:])
            block = room[: 2 * (end - first) * copies * gates.width].view(2, end - first, copies, gates.width)
            gates.fill(block, slice(first, end))
        step, last = slice(start, start + n), slice(before, before + n)
        g = block[:, start - first : start - first + n]
        if start:
            for way in range(2):
                g[way].flatten(0, 1).addmm_(out[way, last].flatten(0, 1), w[way].T)
                if dw is not None:
                    g[way, :, 1].addmm_(out[way, last, 0], dw[way].T)
        y, now = y[:, :n], out[:, step]
        states = c[0, :, :n], c[1, :, :n] if copies == 2 else None
        cell.advance(g[:, :, 0], g[:, :, 1] if copies == 2 else None, states, cell_clip, _both(y))
        if r is None:
            now.copy_(y)
        else:
            cells = y.to(low)
            now.copy_(torch.bmm(cells.flatten(1, 2), r.mT).view_as(now))
            if dr is not None:
                for way in range(2):
                    now[way, :, 1].addmm_(cells[way, :, 0], dr[way].T)
            cell.clip(*_both(now), projection_clip)
        start, before = start + n, start
    value, tangent = _both(out.to(gates.dtype))
    return value if tangent is None else forward_ad.make_dual(value, tangent)


def _both(x: Tensor) -> cell.Pair:
    """A value and its tangent, which lies behind it along axis 2."""
    return x[:, :, 0], x[:, :, 1] if x.shape[2] == 2 else None


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
