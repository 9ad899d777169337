"""How numbers are written in a report: shares in percent, differences in points, signs as signs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = [
    "MISSING",
    "count",
    "decimal",
    "duration",
    "interval",
    "p_value",
    "percent",
    "points",
    "rate",
    "significant",
    "stored",
    "times",
    "with_error",
]

MISSING = "\N{EN DASH}"
"""What stands where there is no number."""
MINUS = "\N{MINUS SIGN}"


def percent(value: float | None, digits: int = 1) -> str:
    """0.8125 -> ``81.2`` (the unit stands in the heading)."""
    return MISSING if value is None else f"{100 * value:.{digits}f}"


def points(value: float | None, digits: int = 1) -> str:
    """-0.031 -> ``−3.1`` percentage points, always with a sign."""
    if value is None:
        return MISSING
    text = f"{abs(100 * value):.{digits}f}"
    if float(text) == 0:
        return text
    return f"{MINUS if value < 0 else '+'}{text}"


def interval(estimate: Mapping[str, Any] | None, *, signed: bool = False) -> str:
    """``[70.1, 84.2]`` in percent, or an empty string without one."""
    if estimate is None or estimate["low"] is None:
        return ""
    write = points if signed else percent
    return f"[{write(estimate['low'])}, {write(estimate['high'])}]"


def with_error(estimate: Mapping[str, Any] | None) -> str:
    """``81.2 ± 1.1`` in percent."""
    if estimate is None:
        return MISSING
    error = estimate["standard_error"]
    return percent(estimate["value"]) + (f" ± {percent(error)}" if error is not None else "")


def p_value(value: float | None) -> str:
    """Two significant digits, never a false zero."""
    if value is None:
        return MISSING
    return "< 0.001" if value < 0.001 else f"{value:.2g}" if value < 0.1 else f"{value:.2f}"


def count(value: float | None) -> str:
    """6738415616 -> ``6.74 B``."""
    if value is None:
        return MISSING
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.0f}"


def duration(seconds: float | None) -> str:
    """Seconds, minutes or hours, two units at most."""
    if seconds is None:
        return MISSING
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def decimal(value: float | None, digits: int = 3, *, signed: bool = False) -> str:
    """-0.0312 -> ``−0.031``: nats, Brier scores, kappas."""
    if value is None:
        return MISSING
    text = f"{abs(value):.{digits}f}"
    if float(text) == 0:
        return text
    return f"{MINUS if value < 0 else '+' if signed else ''}{text}"


def significant(value: float | None, digits: int = 4) -> str:
    """17.3571 -> ``17.36``, 3.2e9 -> ``3.2e+09``."""
    return MISSING if value is None else f"{value:.{digits}g}"


def stored(value: float) -> str:
    """12.86 -> ``12.86``, 72.0 -> ``72``: every digit that a number was given with."""
    return f"{value:.10g}"


def times(value: float | None) -> str:
    """1.3125 -> ``1.31×``."""
    return MISSING if value is None else f"{value:.2f}\N{MULTIPLICATION SIGN}"


def rate(value: float | None) -> str:
    """1234.5 -> ``1,234``; 12.34 -> ``12.3`` (tokens per second)."""
    if value is None:
        return MISSING
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"
