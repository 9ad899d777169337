"""Which metric of a task says right or wrong: decided once per task, not answer by answer.

Metrics of one name are verdicts in one task and grades in another: ``acc`` of truthfulqa_mc2 is a
probability, ``em`` of coqa a mean over references. A grade may happen to be 0 or 1.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

__all__ = ["GRADED", "NORM_METRIC", "VERDICT_METRICS", "graded_metrics", "with_verdicts"]

VERDICT_METRICS = ("acc", "exact_match", "em", "acc_mutual_info")
"""Metrics that say right (1) or wrong (0); the first that a task has decides ``correct``."""

NORM_METRIC = "acc_norm"
"""The metric that decides ``correct_norm``."""

GRADED = "graded, no right or wrong"
"""Why a task whose verdict metrics are grades is not compared."""


def graded_metrics(records: Iterable[Any]) -> set[str]:
    """Those of the verdict metrics that are neither 0 nor 1 for some answer.

    Args:
        records: metrics of each answer, name -> value; what is no mapping counts as empty.
    """
    return {
        name
        for record in records
        if isinstance(record, Mapping)
        for name in (*VERDICT_METRICS, NORM_METRIC)
        if name in record and record[name] not in (0.0, 1.0)
    }


def with_verdicts(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of one task without verdicts by metrics that are graded in their filter.

    A metric that is no verdict says nothing of the right choice either: where ``gold`` was read
    with its help, it is unknown.
    """
    by_filter: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        by_filter.setdefault(row["filter"], []).append(row)
    graded = {
        name: graded_metrics(row["metrics"] for row in part) for name, part in by_filter.items()
    }
    return [_judged(row, graded[row["filter"]]) for row in rows]


def _judged(row: dict[str, Any], graded: set[str]) -> dict[str, Any]:
    changed: dict[str, Any] = {}
    if NORM_METRIC in graded:
        changed["correct_norm"] = None
    if row["verdict_metric"] in graded:
        metrics = row["metrics"]
        name = next((n for n in VERDICT_METRICS if n in metrics and n not in graded), None)
        changed |= {
            "correct": None if name is None else bool(metrics[name]),
            "verdict_metric": name,
            "gold": None,
        }
    return row | changed
