"""Which metric of a task says right or wrong: decided once per task, not answer by answer.

Metrics of one name are verdicts in one task and grades in another: ``acc`` of truthfulqa_mc2 is a
probability, ``em`` of coqa a mean over references. A grade may happen to be 0 or 1.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from streamline_bench.stability.samples import Row

VERDICT_METRICS = ("acc", "exact_match", "em", "acc_mutual_info")
"""Metrics that say right (1) or wrong (0); the first that a task has decides ``correct``."""

NORM_METRIC = "acc_norm"
"""The metric that decides ``correct_norm``."""

GRADED = "graded, no right or wrong"
"""Why a task whose verdict metrics are grades is not compared."""


def graded_metrics(records: Iterable[Any]) -> set[str]:
    """Those of the verdict metrics that are neither 0 nor 1 for some answer.

    Args:
        records: metrics of each answer, name -> value; anything but a mapping counts as empty.
    """
    return {
        name
        for record in records
        if isinstance(record, Mapping)
        for name in (*VERDICT_METRICS, NORM_METRIC)
        if name in record and record[name] not in (0.0, 1.0)
    }


def with_verdicts(rows: Sequence[Row]) -> None:
    """Take the verdicts by metrics that are graded in their filter from the rows of one task.

    A graded metric says nothing of the right choice either: where ``gold`` was read with its help,
    it is unknown.
    """
    by_filter: dict[str, list[Row]] = {}
    for row in rows:
        by_filter.setdefault(row.filter, []).append(row)
    for part in by_filter.values():
        graded = graded_metrics(row.metrics for row in part)
        for row in part if graded else ():
            _judge_again(row, graded)


def _judge_again(row: Row, graded: set[str]) -> None:
    if NORM_METRIC in graded:
        row.correct_norm = None
    if row.verdict_metric in graded:
        left = (name for name in VERDICT_METRICS if name in row.metrics and name not in graded)
        row.verdict_metric = next(left, None)
        row.correct = bool(row.metrics[row.verdict_metric]) if row.verdict_metric else None
        row.gold = None
