"""Forest plot: each row's paired difference of accuracy with its interval, on one scale."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from streamline_bench.report.figures.axes import Axis, ticks

__all__ = ["forest"]


def forest(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Places (in percent of the width) of differences, intervals, zero and margin.

    Returns:
        ``lines`` (largest difference first), ``zero``, ``margin`` (None without one) and ``ticks``;
        None where no row is compared.
    """
    found = [(row, row["macro"]["difference"]) for row in rows if row["macro"]]
    if not found:
        return None
    margin = found[0][0]["macro"]["margin"]
    ends = [0.0] if margin is None else [0.0, -margin]
    for _, difference in found:
        ends += [value for value in _ends(difference) if value is not None]
    axis = Axis.around(ends, 0.0, 100.0)
    lines = [
        {
            "row": row,
            "difference": difference,
            "at": axis.place(difference["value"]),
            "low": axis.place(low),
            "width": round(axis.place(high) - axis.place(low), 2),
            "decision": row["macro"]["decision"],
        }
        for row, difference in sorted(found, key=lambda item: -float(item[1]["value"]))
        for _, low, high in [_ends(difference)]
    ]
    return {
        "lines": lines,
        "zero": axis.place(0.0),
        "margin": None if margin is None else axis.place(-margin),
        "margin_value": margin,
        "ticks": [(axis.place(value), value) for value in ticks(axis.low, axis.high)],
    }


def _ends(difference: Mapping[str, Any]) -> tuple[float, float, float]:
    value = difference["value"]
    if difference["low"] is None:
        return value, value, value
    return value, difference["low"], difference["high"]
