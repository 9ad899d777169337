"""Dense against pruned on metrics that are more than right or wrong: F1, ROUGE, chrF, lengths."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd

from streamline_bench.errors import NumericsError
from streamline_bench.stability.align import AlignedPairs
from streamline_bench.stability.comparison import GradeComparison
from streamline_bench.stability.estimate import Estimate
from streamline_bench.stability.metrics import (
    NORM_METRIC,
    deciding_of,
    is_verdict,
    left_out_reasons,
    names_in_order,
    records_of,
    values_of,
)
from streamline_bench.stability.samples import REPETITION
from streamline_bench.stability.settings import Settings
from streamline_bench.stability.statistics import FloatArray
from streamline_bench.stability.statistics.clusters import ClusterLabels, cluster_labels
from streamline_bench.stability.statistics.grades import PairedGrades, mean_ratio
from streamline_bench.stability.statistics.intervals import (
    mean_estimate,
)
from streamline_bench.stability.statistics.score import decide, holm

Kind = Literal["grade", "ratio", "difference"]
Metric = tuple[str, str, str]
"""Task, filter, metric."""


@dataclass(frozen=True)
class ComparedGrade:
    """One metric of one task; ``test`` is None for ratios."""

    result: GradeComparison
    test: PairedGrades | None


def compare_grades(
    pairs: AlignedPairs,
    dense: pd.DataFrame,
    pruned: pd.DataFrame,
    settings: Settings,
    *,
    asked: str | None,
    judged: bool,
    known: Collection[str] = (),
) -> tuple[list[ComparedGrade], dict[str, str]]:
    """Compare every metric of one (task, filter) that is a number per document and no verdict.

    Args:
        dense, pruned: aligned rows of one (task, filter) of ``pairs``.
        asked: the metric that was asked for in place of the task's own.
        judged: the task has verdicts, which decide.
        known: metrics that are compared elsewhere (log-likelihoods).

    Returns:
        The comparisons, in the order of the task's configuration, and why others are left out.

    Raises:
        SamplesError: the metric that decides has no value on some documents.
        NumericsError: it is NaN or infinite on one; run, task and document are named.
    """
    runs = (dense, pairs.dense_info), (pruned, pairs.pruned_info)
    task = str(dense.iloc[0]["task"])
    held = [names_in_order(info.metrics.get(task, ()), records_of(rows)) for rows, info in runs]
    own = deciding_of(pairs.dense_info, dense)
    if settings.verdict == "correct_norm" and NORM_METRIC in held[0]:
        own = NORM_METRIC
    main = asked or own
    left_out = {
        name: why
        for rows, info in runs
        for name, why in left_out_reasons(task, info, rows).items()
        if name not in known
    }
    found = []
    for name in dict.fromkeys([*held[0], *held[1]]):
        if name in known and name != asked:
            continue
        decides = name == main and not judged
        if name not in held[0] or name not in held[1]:
            without = runs[name in held[0]][1].run
            left_out[name] = f"run '{without}' has no number for it"
            continue
        if not decides and (why := _incomplete(name, dense, pruned)):
            left_out[name] = why
            continue
        before, now = (values_of(rows, name, info) for rows, info in runs)
        _finite(name, dense, before)
        _finite(name, pruned, now)
        told = is_verdict(before) and is_verdict(now)
        if told and not (decides and task in pairs.dense_info.graded):
            continue
        higher = pairs.dense_info.higher_is_better.get(task, {}).get(name)
        found.append(
            graded(
                (task, str(dense.iloc[0]["filter"]), name), before, now,
                cluster_labels(dense["cluster"]), settings,
                higher=higher is not False, decides=decides,
            )
        )  # fmt: skip
    return found, left_out


def compare_repetitions(pairs: AlignedPairs, settings: Settings) -> Iterator[ComparedGrade]:
    """Share of right answers to a question that was asked several times, for each such task.

    The times belong together: a question is what is drawn.
    """
    dense, pruned = pairs.dense, pairs.pruned
    asked = dense["filter"].str.startswith(f"{REPETITION} ")
    for task in dense.loc[asked, "task"].unique():
        rows = asked & (dense["task"] == task)
        parts = [(frame[rows], frame.loc[rows, settings.verdict]) for frame in (dense, pruned)]
        if any(verdicts.isna().any() for _, verdicts in parts):
            continue
        before, now = (
            verdicts.astype("float64").groupby(frame["doc_id"]).mean().to_numpy()
            for frame, verdicts in parts
        )
        if is_verdict(before) and is_verdict(now):
            continue
        of_document = dense[rows].drop_duplicates("doc_id").sort_values("doc_id")
        name = f"mean of {dense.loc[rows, 'filter'].nunique()} repetitions"
        yield graded(
            (str(task), name, "accuracy"), before, now, cluster_labels(of_document["cluster"]),
            settings, higher=True, decides=False,
        )  # fmt: skip


def _incomplete(name: str, *frames: pd.DataFrame) -> str | None:
    """Why a metric that does not decide is left out."""
    for frame in frames:
        values = [record.get(name) for record in records_of(frame)]
        for document, value in zip(frame["doc_id"], values, strict=True):
            if value is None or not math.isfinite(value):
                what = "has none" if value is None else f"is {value}"
                return f"run '{frame.iloc[0]['run']}' {what} on document {document}"
    return None


def _finite(name: str, rows: pd.DataFrame, values: FloatArray) -> None:
    wrong = np.flatnonzero(~np.isfinite(values))
    if len(wrong):
        bad = rows.iloc[int(wrong[0])]
        raise NumericsError(
            f"Run '{bad['run']}': Task '{bad['task']}', document {bad['doc_id']} has {name} "
            f"{values[wrong[0]]}; mend the metric and evaluate again, or compare by another one "
            "(--metric TASK=NAME)."
        )


def kind_of(values: FloatArray, *, higher: bool) -> tuple[Kind, float]:
    """What the values of both runs are, and the number that brings a grade to between 0 and 1."""
    low, high = float(values.min()), float(values.max())
    if low < 0:
        return "difference", 1.0
    if high <= 1:
        return "grade", 1.0
    return ("grade", 100.0) if high <= 100 and higher else ("ratio", 1.0)


def graded(
    names: Metric,
    dense: FloatArray,
    pruned: FloatArray,
    clusters: ClusterLabels | None,
    settings: Settings,
    *,
    higher: bool,
    decides: bool,
) -> ComparedGrade:
    """Compare the values of one metric, float64 [n] each, all finite."""
    kind, scale = kind_of(np.concatenate([dense, pruned]), higher=higher)
    better = pruned > dense if higher else pruned < dense
    wins, ties = int(better.sum()), int((pruned == dense).sum())
    labels = None if clusters is None else clusters.labels
    before, now = dense / scale, pruned / scale
    result = GradeComparison(
        task=names[0],
        filter=names[1],
        metric=names[2],
        kind=kind,
        scale=scale,
        higher_is_better=higher,
        decides=decides,
        n=len(dense),
        dense=_mean(before, labels),
        pruned=_mean(now, labels),
        wins=wins,
        ties=ties,
        losses=len(dense) - wins - ties,
        clusters=None if clusters is None else clusters.shown,
    )
    if kind == "ratio":
        ratio = mean_ratio(before, now, clusters, settings, names)
        return ComparedGrade(result.model_copy(update={"ratio": ratio}), None)
    test = PairedGrades.of(
        now - before, clusters, names,
        draws=settings.draws, seed=settings.seed, bounded=kind == "grade",
    )  # fmt: skip
    update: dict[str, object] = {
        "difference": test.interval(settings.confidence),
        "p_value": test.p_value(),
        "p_method": test.method,
    }
    if kind == "grade":
        worse = test.worse_by(settings.margin, higher=higher)
        update |= {"margin": settings.margin, "noninferiority_p": worse}
    return ComparedGrade(result.model_copy(update=update), test)


def _mean(values: FloatArray, labels: np.ndarray | None) -> Estimate:
    found = mean_estimate(values, 0.95, labels)
    return Estimate(value=found.value, standard_error=found.standard_error)


def decided_grades(
    found: Sequence[ComparedGrade], counted: Collection[int], settings: Settings
) -> Iterator[GradeComparison]:
    """Adjust the p-values of the grades that decide a task by Holm, and decide.

    Args:
        counted: places in ``found`` of the one family: one filter of each task.
    """
    level = 1 - settings.confidence
    places = [place for place in sorted(counted) if found[place].test is not None]
    p_values = [found[place].result.p_value or 0.0 for place in places]
    adjusted = dict(zip(places, holm(p_values, level), strict=True))
    for place, each in enumerate(found):
        if place not in adjusted or each.test is None:
            yield each.result
            continue
        p, comparisons = adjusted[place]
        shown = each.test.interval(settings.confidence, comparisons=comparisons)
        update: dict[str, object] = {"p_holm": p, "adjusted": shown}
        improvement = each.result.improvement
        if improvement is not None and each.result.kind == "grade":
            update["decision"] = decide(improvement, settings.margin, significant=p < level)
        yield each.result.model_copy(update=update)
