"""The LSTM's steps in bfloat16 on a processor with products of it: weights laid out once, all of a step's gates in one product.

For the few rows of a step the library takes longer to lay out the weights than to multiply, so they are packed before the
loop (oneDNN's format). With z = [x, h, 1, 0 …] and W = [W_ih, W_hh, b, 0 …], of as many columns as fill the processor's
tiles, a step's gates are z Wᵀ, and in a direction gates' = z' Wᵀ + z W'ᵀ, of which z' Wᵀ rides with z Wᵀ as further
rows. Products are summed in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nlpinf.adapters.elmo import cell
from nlpinf.adapters.elmo.cell import Pair

COLUMNS = 32  # of bfloat16 in a row of a tile; a product of 513 columns takes 1.6 times as long as one of 544


def applies(x: Tensor, dtype: torch.dtype) -> bool:
    """Whether the processor has products of this dtype and the library can pack weights for them."""
    ops = torch.ops.mkldnn
    known = all(hasattr(ops, name) for name in ("_reorder_linear_weight", "_linear_pointwise"))
    return dtype == torch.bfloat16 and x.device.type == "cpu" and known and ops._is_mkldnn_bf16_supported()


class _Packed:
    """x ↦ x Wᵀ of a weight (out, in) that is laid out once, for about so many rows."""

    def __init__(self, weight: Tensor, rows: int) -> None:
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight, rows)

    def __call__(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self._weight, None, "none", [None], "")

    def plus(self, x: Tensor, other: Tensor) -> Tensor:
        """Return x Wᵀ + other."""
        return torch.ops.mkldnn._linear_pointwise.binary(x, other, self._weight, None, "add")


class _Product:
    """z Wᵀ and its tangent of a moving weight and a moving z (2, n, in), the second half its tangent."""

    def __init__(self, weight: Pair, rows: int, moving: bool) -> None:
        value, tangent = weight
        self._value = _Packed(value, 2 * rows if moving else rows)
        self._tangent = None if tangent is None else _Packed(tangent, rows)

    def __call__(self, z: Tensor) -> Pair:
        n = z.shape[1]
        both = self._value(z.reshape(-1, z.shape[2]))
        if len(z) == 1:
            return both, None
        tangent = both[n:]
        return both[:n], tangent if self._tangent is None else self._tangent.plus(z[0], tangent)


def advance(
    x: Pair,
    weights: list[Pair],
    weight_hr: Pair | None,
    sizes: list[int],
    clips: tuple[float | None, float | None],
    state_dtype: torch.dtype,
) -> Pair:
    """One direction's packed inputs x (N, k) to its packed outputs (N, projection), from zero states.

    weights: W_ih (4 hidden, k), W_hh (4 hidden, projection) and b (4 hidden, 1).
    """
    moving = any(pair is not None and pair[1] is not None for pair in (x, *weights, weight_hr))
    hidden, width, k = len(weights[0][0]) // 4, weights[1][0].shape[1], x[0].shape[1]
    first, copies = sizes[0], 2 if moving else 1
    gates_of = _Product(_joined(weights), first, moving)
    outputs_of = None if weight_hr is None else _Product(weight_hr, first, moving)
    out = x[0].new_empty(copies, len(x[0]), width)
    z = x[0].new_zeros(copies, first, _whole(k + width + 1))
    z[0, :, k + width] = 1.0
    c = x[0].new_zeros(copies, first, hidden, dtype=state_dtype)
    start = 0
    for n in sizes:
        z = z[:, :n]
        z[0, :, :k] = x[0][start : start + n]
        if x[1] is not None:
            z[1, :, :k] = x[1][start : start + n]
        gates, dgates = gates_of(z)
        gates, dgates = gates.to(state_dtype), None if dgates is None else dgates.to(state_dtype)
        cells = c.new_empty(copies, n, hidden)
        y, dy = _pair(cells)
        cell.advance(gates, dgates, _pair(c[:, :n]), clips[0], (y, dy))
        if outputs_of is not None:
            y, dy = outputs_of(cells.to(z.dtype))
            cell.clip(y, dy, clips[1])
        here = out[:, start : start + n]
        here[0] = y
        if dy is not None:
            here[1] = dy
        z[:, :, k : k + width] = here
        start += n
    return out[0], out[1] if moving else None


def _pair(both: Tensor) -> Pair:
    return both[0], both[1] if len(both) > 1 else None


def _joined(weights: list[Pair]) -> Pair:
    """Return matrices side by side and columns of zeros to whole tiles, the tangents likewise."""
    columns = sum(value.shape[1] for value, _ in weights)
    fill = weights[0][0].new_zeros(len(weights[0][0]), _whole(columns) - columns)
    tangent = None
    if any(moved is not None for _, moved in weights):
        tangent = torch.cat(
            [torch.zeros_like(value) if moved is None else moved for value, moved in weights] + [fill], 1
        )
    return torch.cat([value for value, _ in weights] + [fill], 1), tangent


def _whole(columns: int) -> int:
    return -(-columns // COLUMNS) * COLUMNS
