"""The order in which a reader sees rows: best accuracy first, failed rows last.

A board without right and wrong answers is ranked by perplexity instead.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["perplexity_ratio", "ranked"]

_LARGEST = 700.0  # e^709 is the largest float64


def ranked(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Sort by accuracy (mean over tasks); equal rows keep the order of the run.

    Without any accuracy, by perplexity as a multiple of the dense model's, the smallest first.
    """
    failed = [row for row in rows if row.get("failed")]
    scored = [row for row in rows if not row.get("failed")]
    key = _by_accuracy if any(row["accuracy_macro"] for row in scored) else _by_perplexity
    return [*sorted(scored, key=key), *failed]


def _by_accuracy(row: Mapping[str, Any]) -> float:
    accuracy = row["accuracy_macro"]
    return -float(accuracy["value"]) if accuracy else math.inf


def _by_perplexity(row: Mapping[str, Any]) -> float:
    nats = _nats(row)
    return math.inf if nats is None else nats[0]


def perplexity_ratio(row: Mapping[str, Any]) -> dict[str, float | None] | None:
    """Perplexity as a multiple of the dense model's: geometric mean over tasks, with interval.

    Of a task that counts several units (words, bytes), the first is taken. Distances to the ends of
    the intervals of the tasks' logarithms add up by squares, as those of accuracies do.

    Returns:
        value, low and high (None without an interval); 1 for the dense row; None for a row without
        perplexities, or if float64 does not hold the ratio.
    """
    nats = _nats(row)
    if nats is None:
        return None
    value, low, high = nats
    if value >= _LARGEST:
        return None
    ends = low is not None and high is not None and high < _LARGEST
    return {
        "value": math.exp(value),
        "low": math.exp(low) if ends and low is not None else None,
        "high": math.exp(high) if ends and high is not None else None,
    }


def _nats(row: Mapping[str, Any]) -> tuple[float, float | None, float | None] | None:
    if row["is_dense"]:
        return 0.0, None, None
    tasks: dict[tuple[str, str], Mapping[str, Any]] = {}
    for found in row.get("perplexities") or ():
        tasks.setdefault((found["task"], found["filter"]), found["nats_per_unit"])
    if not tasks:
        return None
    parts = list(tasks.values())
    value = sum(part["value"] for part in parts) / len(parts)
    if any(part["low"] is None or part["high"] is None for part in parts):
        return value, None, None
    below = math.hypot(*(part["value"] - part["low"] for part in parts)) / len(parts)
    above = math.hypot(*(part["high"] - part["value"] for part in parts)) / len(parts)
    return value, value - below, value + above
