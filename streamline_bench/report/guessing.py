"""What guessing gets on a board: baselines of every task, habits of rows, random rows to beat."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from streamline_bench.report.places import RANDOM, Between
from streamline_bench.report.scores import GivenAnswer, GuessingLevel
from streamline_bench.report.standing import Entry, adjusted, between
from streamline_bench.stability.align import AlignedPairs
from streamline_bench.stability.compare_answers import with_script_verdicts
from streamline_bench.stability.comparison import Comparison, TaskComparison
from streamline_bench.stability.metrics import with_asked_metrics
from streamline_bench.stability.samples import Samples
from streamline_bench.stability.settings import Settings
from streamline_bench.stability.statistics.clusters import cluster_labels
from streamline_bench.stability.statistics.guessing import always, constant_answer, most_given
from streamline_bench.stability.statistics.paired import wilson_estimate
from streamline_bench.stability.statistics.score import PairedDifference
from streamline_bench.stability.task_comparison import paired_sample

_LONGEST = 60  # characters of an answer that are kept


def guessing_levels(
    pairs: AlignedPairs, result: Comparison, settings: Settings
) -> list[GuessingLevel]:
    """The baselines of every task that the summaries are over.

    Args:
        pairs: the dense model's answers with themselves; ``result`` is their comparison.
    """
    first = pairs.first_filters
    judged = with_asked_metrics(with_script_verdicts(pairs, settings), settings.metrics).dense
    return [
        _level(_rows(judged, task), task, settings)
        for task in result.tasks
        if task.filter == first[task.task]
    ]


def _rows(frame: pd.DataFrame, task: TaskComparison) -> pd.DataFrame:
    return frame[(frame["task"] == task.task) & (frame["filter"] == task.filter)]


def _level(frame: pd.DataFrame, task: TaskComparison, settings: Settings) -> GuessingLevel:
    right = frame[settings.verdict].to_numpy(dtype=np.bool_)
    clusters = cluster_labels(frame["cluster"])
    design = paired_sample(right, right, clusters).design(dense=1.0)
    dense = wilson_estimate(
        float(right.mean()), len(right) / design.effect, settings.confidence, design.freedom
    )
    found = constant_answer(frame)
    above = None
    if found is not None:
        sample = paired_sample(always(frame, found.answer), right, clusters)
        above = PairedDifference((sample,)).interval(settings.confidence)
    return GuessingLevel(
        task=task.task,
        n=len(right),
        chance=task.chance,
        constant=found.share if found else None,
        answer=_short(found.answer) if found else None,
        dense=dense,
        above_constant=above,
        beaten=(dense.low or 0.0) > (task.chance or 0.0) and (above is None or above.ends[0] > 0),
    )


def given_answer(samples: Samples, task: TaskComparison) -> GivenAnswer | None:
    """The most frequent answer of a row to a task; None where the engine does not say."""
    found = most_given(_rows(samples.frame, task), task.verdict)
    return GivenAnswer(answer=_short(found.answer), share=found.share) if found else None


def _short(answer: str) -> str:
    return answer if len(answer) <= _LONGEST else f"{answer[: _LONGEST - 1]}\N{HORIZONTAL ELLIPSIS}"


def against_random(entries: Sequence[Entry], settings: Settings) -> list[Between]:
    """Every entry against the random rows of its size, on the same documents.

    Of several that are not one entry, against the best. Holm's adjustment is over a size.
    """
    baselines: dict[Any, Entry] = {}
    for entry in entries:  # the best first
        if entry.row.method == RANDOM:
            baselines.setdefault(_asked(entry), entry)
    found = []
    for size, baseline in baselines.items():
        others = [each for each in entries if _asked(each) == size and each.row.method != RANDOM]
        made = [each for each in others if not each.row.is_dense]
        found += adjusted([between(entry, baseline, settings) for entry in made], settings)
    return found


def _asked(entry: Entry) -> tuple[str | None, float | None]:
    """The size that was asked of an entry."""
    row = entry.row
    return row.size, None if row.size else row.sparsity_requested
