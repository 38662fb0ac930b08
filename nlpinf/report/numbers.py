"""Numbers as people read them: few digits, a true minus sign, powers of ten that a whole column shares."""

from __future__ import annotations

import math
from collections.abc import Iterable

from markupsafe import Markup

MINUS = "−"


def figure(value: float | None, digits: int = 3, signed: bool = False) -> Markup:
    """Return `value` with so many significant digits, as 1.23 × 10⁻⁶ where it is very small or very large."""
    if value is None or not math.isfinite(value):
        return Markup("not finite")
    if value == 0:
        return Markup("0")
    sign = MINUS if value < 0 else "+" if signed else ""
    size = float(f"{abs(value):.{digits - 1}e}")
    exponent = math.floor(math.log10(size))
    if -4 <= exponent < 6:
        return Markup(sign + f"{size:,.{max(0, digits - 1 - exponent)}f}")
    mantissa, power = f"{size:.{digits - 1}e}".split("e")
    return Markup(f"{sign}{mantissa} × 10<sup>{_signed(int(power))}</sup>")


def count(value: int) -> str:
    """Return a whole number with thin spaces between thousands."""
    return f"{value:,}".replace(",", "\u2009")


def shared_power(values: Iterable[float]) -> int:
    """Return the power of ten, a multiple of three, that brings the largest of `values` between 1 and 1000."""
    largest = max((abs(v) for v in values if math.isfinite(v)), default=0.0)
    if largest == 0:
        return 0
    power = 3 * math.floor(math.log10(largest) / 3)
    return 0 if power in (-3, 0, 3) and 0.1 <= largest < 1e4 else power


def power_of_ten(power: int) -> Markup:
    """Return ` (× 10⁻⁶)` for a column's head, nothing for power 0."""
    return Markup("") if power == 0 else Markup(f' <span class="power">(× 10<sup>{_signed(power)}</sup>)</span>')


def superscript(power: int) -> str:
    """Return the exponent in raised digits, for places that take no markup."""
    return str(power).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def in_column(value: float, power: int, signed: bool = False) -> str:
    """Return `value` in units of 10^power with three significant digits of the column's largest values."""
    if not math.isfinite(value):
        return "not finite"
    scaled = value / 10.0**power
    size = abs(scaled)
    decimals = 4 if size < 0.1 else 3 if size < 1 else 2 if size < 10 else 1 if size < 100 else 0
    text = f"{size:.{decimals}f}"
    if float(text) == 0:
        return "0"
    return (MINUS if scaled < 0 else "+" if signed else "") + text


def _signed(power: int) -> str:
    return str(power).replace("-", MINUS)
