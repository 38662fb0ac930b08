"""Small charts as inline SVG, coloured by the page's own variables, so that they follow light, dark and print."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from markupsafe import Markup, escape

from nlpinf.report.numbers import count, in_column, shared_power, superscript

WIDTH, HEIGHT = 380, 210
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 12, 38


def residual_curve(
    history: Sequence[float], tolerance: float | None, residual: float | None, second: float | None
) -> Markup:
    """Return the relative residual after each product on a logarithmic axis, the tolerance, and the two true residuals.

    `residual` and `second` are measured at the end, on the curvature sample and on the second one.
    """
    steps = [
        (0, 1.0),
        *((k + 1, h) for k, h in enumerate(history) if h > 0 and math.isfinite(h)),
    ]
    if len(steps) < 2:
        return Markup("")
    ends = [r for r in (residual, second) if r is not None and r > 0 and math.isfinite(r)]
    values = [h for _, h in steps] + ends + ([tolerance] if tolerance else [])
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    high = max(high, low + 1)
    last = steps[-1][0]

    def x(k: float) -> float:
        return LEFT + k / last * (WIDTH - LEFT - RIGHT - 14)

    def y(value: float) -> float:
        return TOP + (high - math.log10(value)) / (high - low) * (HEIGHT - TOP - BOTTOM)

    parts = []
    decades = range(low, high + 1, max(1, math.ceil((high - low) / 6)))
    for power in decades:
        at = y(10.0**power)
        parts.append(_line(LEFT, at, WIDTH - RIGHT, at, "grid"))
        label = "1" if power == 0 else "10" if power == 1 else f"10{superscript(power)}"
        parts.append(_text(LEFT - 6, at + 4, label, "end"))
    for k in _whole_ticks(last):
        parts.append(_text(x(k), HEIGHT - BOTTOM + 16, str(k), "middle"))
    parts.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 4, "curvature products", "middle"))
    if tolerance:
        at = y(tolerance)
        parts.append(_line(LEFT, at, WIDTH - RIGHT, at, "limit"))
        parts.append(_text(LEFT + 4, at - 5 if at > TOP + 40 else at + 14, "tolerance", "start"))
    shown = steps[:: max(1, len(steps) // 240)]
    if shown[-1] != steps[-1]:
        shown.append(steps[-1])
    points = " ".join(f"{x(k):.1f},{y(h):.1f}" for k, h in shown)
    parts.append(f'<polyline class="curve" points="{points}"/>')
    end = x(steps[-1][0])
    if residual is not None and residual > 0 and math.isfinite(residual):
        parts.append(f'<circle class="mark" cx="{end:.1f}" cy="{y(residual):.1f}" r="4"/>')
    if second is not None and second > 0 and math.isfinite(second):
        parts.append(f'<circle class="mark hollow" cx="{end:.1f}" cy="{y(second):.1f}" r="4.5"/>')
    return _svg(parts, f"Relative residual after each of {len(history)} curvature products, logarithmic axis")


def growth(sizes: Sequence[dict[str, Any]], spearman: float) -> Markup:
    """Return, over the rows of a curvature sample that grew (logarithmic), the rank correlation of the scores with those of the
    size before (curve, with the limit `spearman`) and the second-sample residual (hollow marks)."""
    if len(sizes) < 2:
        return Markup("")
    logs = [math.log2(size["rows"]) for size in sizes]
    ranks = [(at, size["spearman"]) for at, size in zip(logs, sizes) if size["spearman"] is not None]
    seconds = [(at, size["second_residual"]) for at, size in zip(logs, sizes) if size["second_residual"] is not None]
    values = [value for _, value in ranks + seconds]
    low, high = min(0.0, *values), max(1.0, *values)

    def x(at: float) -> float:
        return LEFT + 14 + (at - logs[0]) / (logs[-1] - logs[0]) * (WIDTH - LEFT - RIGHT - 42)

    def y(value: float) -> float:
        return TOP + (high - value) / (high - low) * (HEIGHT - TOP - BOTTOM)

    parts = []
    for tick in _even_ticks(low, high):
        parts.append(_line(LEFT, y(tick), WIDTH - RIGHT, y(tick), "grid"))
        parts.append(_text(LEFT - 6, y(tick) + 4, f"{tick:.2g}", "end"))
    for at, size in zip(logs, sizes):
        parts.append(_text(x(at), HEIGHT - BOTTOM + 16, _short(size["rows"]), "middle"))
    parts.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 4, "rows of the curvature sample", "middle"))
    parts.append(_line(LEFT, y(spearman), WIDTH - RIGHT, y(spearman), "limit"))
    points = " ".join(f"{x(at):.1f},{y(value):.1f}" for at, value in ranks)
    parts.append(f'<polyline class="curve" points="{points}"/>')
    for at, value in ranks:
        parts.append(f'<circle class="mark" cx="{x(at):.1f}" cy="{y(value):.1f}" r="4"/>')
    for at, value in seconds:
        parts.append(f'<circle class="mark hollow" cx="{x(at):.1f}" cy="{y(value):.1f}" r="4.5"/>')
    return _svg(parts, "Rank correlation and second-sample residual for each size of the curvature sample")


def histogram(scores: np.ndarray, bins: int = 41) -> Markup:
    """Return the histogram of the finite scores; the 0.5 % largest sizes are gathered in the bars at the ends."""
    values = scores[np.isfinite(scores)].astype(np.float64)
    if not len(values):
        return Markup("")
    edge = float(np.quantile(np.abs(values), 0.995)) or float(np.abs(values).max()) or 1.0
    edges = np.linspace(-edge, edge, bins + 1)
    counts, _ = np.histogram(values.clip(-edge, edge), edges)
    top = int(counts.max())
    width = (WIDTH - LEFT - RIGHT) / bins

    def y(number: float) -> float:
        return TOP + (1 - number / top) * (HEIGHT - TOP - BOTTOM)

    parts = []
    for tick in _round_ticks(top):
        parts.append(_line(LEFT, y(tick), WIDTH - RIGHT, y(tick), "grid"))
        parts.append(_text(LEFT - 6, y(tick) + 4, _short(tick), "end"))
    for i, number in enumerate(counts):
        if number:
            middle = (edges[i] + edges[i + 1]) / 2
            kind = "harm" if middle > edge / bins / 2 else "help" if middle < -edge / bins / 2 else "neutral"
            height = max(1.0, y(0) - y(number))
            parts.append(
                f'<rect class="{kind}" x="{LEFT + i * width + 0.6:.1f}" y="{y(0) - height:.1f}" '
                f'width="{width - 1.2:.1f}" height="{height:.1f}"><title>{count(int(number))} sentences</title></rect>'
            )
    parts.append(_line(LEFT, y(0), WIDTH - RIGHT, y(0), "axis"))
    power = shared_power([edge])
    for value in (-edge, 0.0, edge):
        at = LEFT + (value + edge) / (2 * edge) * (WIDTH - LEFT - RIGHT)
        anchor = "middle" if value == 0 else "start" if value < 0 else "end"
        parts.append(_text(at, HEIGHT - BOTTOM + 16, in_column(value, power), anchor))
    unit = f"score{' × 10' + superscript(power) if power else ''}"
    parts.append(_text(LEFT, HEIGHT - 4, "← helpful", "start"))
    parts.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 4, unit, "middle"))
    parts.append(_text(WIDTH - RIGHT, HEIGHT - 4, "harmful →", "end"))
    return _svg(parts, "Histogram of the scores; helpful (negative) left, harmful (positive) right")


def removals(rows: Sequence[dict[str, Any]]) -> Markup:
    """Return predicted (hollow) beside actual (full) changes of the query, one line a set; `draws` are small ticks."""
    values = [0.0] + [v for row in rows for v in (row["predicted"], row["actual"], *row["draws"]) if v is not None]
    low, high = min(values), max(values)
    spread = (high - low) or 1.0
    low, high = low - 0.08 * spread, high + 0.08 * spread
    step, top = 46, 14
    height = top + step * len(rows) + 34
    power = shared_power(values)

    def x(value: float) -> float:
        return 12 + (value - low) / (high - low) * (WIDTH - 24)

    bottom = top + step * len(rows)
    parts = []
    for tick in _even_ticks(low, high):
        parts.append(_line(x(tick), top - 6, x(tick), bottom, "axis" if tick == 0 else "grid"))
        anchor = "middle" if 30 < x(tick) < WIDTH - 30 else "start" if x(tick) <= 30 else "end"
        parts.append(_text(x(tick), bottom + 15, in_column(tick, power, signed=True), anchor))
    unit = f"change of the query{' × 10' + superscript(power) if power else ''}"
    parts.append(_text(WIDTH / 2, height - 3, unit, "middle"))
    for i, row in enumerate(rows):
        at = top + step * i + 30
        name = str(row["name"])
        parts.append(_text(12, at - 16, name if len(name) <= 52 else name[:51] + "…", "start", "name"))
        for draw in row["draws"]:
            parts.append(_line(x(draw), at - 6, x(draw), at + 6, "tick"))
        if row["actual"] is not None and row["predicted"] is not None:
            parts.append(_line(x(row["predicted"]), at, x(row["actual"]), at, "join"))
        if row["predicted"] is not None:
            parts.append(f'<circle class="mark hollow" cx="{x(row["predicted"]):.1f}" cy="{at}" r="6.5"/>')
        if row["actual"] is not None:
            parts.append(f'<circle class="mark" cx="{x(row["actual"]):.1f}" cy="{at}" r="3.5"/>')
    return _svg(parts, "Predicted and actual change of the query for each removed set", height)


def _svg(parts: Sequence[str], label: str, height: float = HEIGHT) -> Markup:
    return Markup(
        f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{escape(label)}">{"".join(parts)}</svg>'
    )


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _text(x: float, y: float, text: str, anchor: str, kind: str = "") -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _short(value: float) -> str:
    for size, unit in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


def _nice(step: float) -> float:
    power = 10.0 ** math.floor(math.log10(step))
    return next(m * power for m in (1, 2, 5, 10) if m * power >= step * 0.999)


def _round_ticks(top: int) -> list[float]:
    step = max(1.0, _nice(top / 4))
    return [step * i for i in range(1, int(top / step) + 1)]


def _whole_ticks(last: int) -> list[int]:
    step = max(1, int(_nice(last / 5)))
    return list(range(0, last + 1, step))


def _even_ticks(low: float, high: float) -> list[float]:
    step = _nice((high - low) / 4)
    return [step * i for i in range(math.ceil(low / step), math.floor(high / step) + 1)]
