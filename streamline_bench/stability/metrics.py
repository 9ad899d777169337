"""Which metric judges a task: read from its configuration and its samples.

Of the metrics that a task's configuration names, in its order, the first counts for which higher is
better and of which the samples hold a number for each document. If all its values are 0 or 1, they
are verdicts; else they are grades (:mod:`streamline_bench.stability.grade_comparison`). What the
samples hold is not assumed: BLEU has its texts there, MCC a pair of classes, and only the harness
makes a number of them, over all documents.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from streamline_bench.core.recipe.validation import suggest_or_list
from streamline_bench.errors import SamplesError
from streamline_bench.stability.over_tasks import leaf_tasks
from streamline_bench.stability.samples import RunInfo, Samples
from streamline_bench.stability.statistics import FloatArray

if TYPE_CHECKING:
    from streamline_bench.stability.align import AlignedPairs

Records = Sequence[Mapping[str, float]]
"""Numbers of each answer, by metric."""

NORM_METRIC = "acc_norm"
"""The metric that decides ``correct_norm``."""

KNOWN_DIRECTION = frozenset(
    {"acc", "exact_match", "em", "acc_mutual_info", "accuracy", "score", NORM_METRIC}
)
"""Metrics for which higher is better where the results say nothing: lm-eval before 0.4.3 does not
say it, nor does OpenCompass."""


def records_of(rows: pd.DataFrame) -> list[Mapping[str, Any]]:
    """Return name -> value of each row's metrics; empty where a row has none (None or NaN)."""
    return [found if isinstance(found, Mapping) else {} for found in rows["metrics"]]


def names_in_order(asked: Sequence[str], records: Iterable[Mapping[str, float]]) -> list[str]:
    """Metrics that some answer has a number for: those of the task's configuration first.

    Parts of lists (``f1.0``, ``f1.1``) are not numbers of the document.
    """
    held = list(dict.fromkeys(name for record in records for name in record))
    plain = [name for name in held if not is_part(name, held)]
    return list(dict.fromkeys([*(name for name in asked if name in plain), *plain]))


def is_part(name: str, held: Iterable[str]) -> bool:
    """Whether a name stands for a part of a metric that is a list."""
    whole, dot, number = name.rpartition(".")
    return bool(dot) and number.isdecimal() and f"{whole}.0" in held


def deciding(
    asked: Sequence[str], higher: Mapping[str, bool | None], records: Records
) -> str | None:
    """The metric that judges a task by its own configuration; None where none does."""
    for name in names_in_order(asked, records):
        says = higher.get(name)
        if says or (says is None and name in KNOWN_DIRECTION):
            return name
    return None


def is_verdict(values: Iterable[float | None]) -> bool:
    """Whether every value says right (1) or wrong (0)."""
    return all(value in (0.0, 1.0) for value in values)


def deciding_of(info: RunInfo, frame: pd.DataFrame) -> str | None:
    """:func:`deciding` for the rows of one (task, filter)."""
    task = str(frame.iloc[0]["task"])
    records = records_of(frame)
    return deciding(info.metrics.get(task, ()), info.higher_is_better.get(task, {}), records)


def asked_metrics(
    metrics: Mapping[str, str], info: RunInfo, tasks: Iterable[str]
) -> dict[str, str]:
    """Task -> the metric that was asked for; a group stands for its tasks.

    Raises:
        SamplesError: no task of the run has that name.
    """
    found: dict[str, str] = {}
    known = sorted(set(tasks))
    for name, metric in metrics.items():
        members = [task for task in leaf_tasks(name, info.groups) if task in known]
        if not members:
            raise SamplesError(
                f"Metric '{name}={metric}' is for a task that run '{info.run}' does not "
                f"have{suggest_or_list(name, [*known, *info.groups])}"
            )
        found |= dict.fromkeys(members, metric)
    return found


def with_metrics(frame: pd.DataFrame, metrics: Mapping[str, str], info: RunInfo) -> pd.DataFrame:
    """The answers judged by these metrics, task by task; where one is a grade, not judged at all.

    Args:
        frame: answers of the run that ``info`` describes.

    Raises:
        SamplesError: the samples of a task hold no such number; those that they hold are named.
    """
    chosen = asked_metrics(metrics, info, frame["task"].unique())
    if not chosen:
        return frame
    frame = frame.copy()
    for (task, _), rows in frame.groupby(["task", "filter"], sort=False):
        if task not in chosen:
            continue
        name = chosen[str(task)]
        values = values_of(rows, name, info)
        verdicts = is_verdict(values) and task not in info.graded
        frame.loc[rows.index, "correct"] = (
            pd.array(values == 1.0, dtype="boolean") if verdicts else pd.NA
        )
        frame.loc[rows.index, "verdict_metric"] = name if verdicts else None
    return frame


def as_grades(samples: Samples, tasks: Sequence[str]) -> Samples:
    """The same run, these tasks judged by grades although all of them are 0 or 1."""
    rows = samples.frame["task"].isin(list(tasks))
    if not rows.any():
        return samples
    frame = samples.frame.copy()
    frame.loc[rows, "correct"] = pd.NA
    frame.loc[rows, "verdict_metric"] = None
    return Samples(frame, samples.info.model_copy(update={"graded": list(tasks)}))


def with_asked_metrics(pairs: AlignedPairs, metrics: Mapping[str, str]) -> AlignedPairs:
    """Both runs judged by the metrics that were asked for (:func:`with_metrics`)."""
    if not metrics:
        return pairs
    return replace(
        pairs,
        dense=with_metrics(pairs.dense, metrics, pairs.dense_info),
        pruned=with_metrics(pairs.pruned, metrics, pairs.pruned_info),
    )


def values_of(rows: pd.DataFrame, name: str, info: RunInfo) -> FloatArray:
    """The values of a metric for the rows of one (task, filter), float64 [n].

    Raises:
        SamplesError: some answers have none, or none has one; then those that they have are named.
    """
    records = records_of(rows)
    missing = [index for index, record in enumerate(records) if name not in record]
    if not missing:
        return np.array([record[name] for record in records], dtype=np.float64)
    task = str(rows.iloc[0]["task"])
    if len(missing) < len(records):
        raise SamplesError(
            f"Run '{info.run}' has no number '{name}' on document "
            f"{rows.iloc[missing[0]]['doc_id']} of task '{task}', but on others; evaluate again."
        )
    held = names_in_order(info.metrics.get(task, ()), records)
    reason = left_out_reasons(task, info, rows).get(name)
    raise SamplesError(
        f"The samples of task '{task}' in run '{info.run}' have no number '{name}' per document"
        f"{f' ({reason})' if reason else ''}; they have: {', '.join(held) or 'none'}."
    )


def left_out_reasons(task: str, info: RunInfo, rows: pd.DataFrame) -> dict[str, str]:
    """Metric -> why it is known over all documents only."""
    records = records_of(rows)
    held = list(dict.fromkeys(name for record in records for name in record))
    plain = set(names_in_order((), records))
    printed = [
        name.partition(",")[0]
        for name, value in info.results.get(task, {}).items()
        if "," in name and "_stderr" not in name and isinstance(value, int | float)
    ]
    found = {}
    for name in dict.fromkeys([*info.metrics.get(task, ()), *printed]):
        if name not in plain:
            listed = any(is_part(each, held) and each.rpartition(".")[0] == name for each in held)
            if listed or name in printed:
                found[name] = LISTED if listed else UNKNOWN
    return found


LISTED = "its samples hold a list per document, of which only the harness makes a number"
UNKNOWN = "its samples hold no number per document"
