"""Compare two runs: ``compare_answers(load_samples("dense"), load_samples("pruned"))``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import TypeVar

import numpy as np
import pandas as pd

from streamline_bench.errors import SamplesError
from streamline_bench.stability.align import AlignedPairs, align
from streamline_bench.stability.comparison import Comparison, GroupComparison, TaskComparison
from streamline_bench.stability.format_comparison import compare_formats
from streamline_bench.stability.generation_comparison import compare_generations
from streamline_bench.stability.grade_comparison import (
    ComparedGrade,
    compare_grades,
    compare_repetitions,
    decided_grades,
)
from streamline_bench.stability.metrics import asked_metrics, with_asked_metrics
from streamline_bench.stability.over_tasks import compare_groups, macro, micro
from streamline_bench.stability.samples import Samples
from streamline_bench.stability.settings import Quantity, Settings
from streamline_bench.stability.statistics.paired import PairedSample
from streamline_bench.stability.statistics.score import PairedDifference, decide, holm
from streamline_bench.stability.task_comparison import (
    PERPLEXITIES,
    ComparedTask,
    compare_perplexities,
    compare_task,
)
from streamline_bench.stability.texts import GenerationComparison, PerplexityComparison

_Result = TypeVar("_Result", TaskComparison, GroupComparison)


def compare_answers(
    dense: Samples,
    pruned: Samples,
    *,
    tasks: Sequence[str] | None = None,
    common_only: bool = False,
    across_engines: bool = False,
    settings: Settings | None = None,
) -> Comparison:
    """Compare the pruned run with the dense one, per task and over tasks.

    What judges a task is decided in :mod:`streamline_bench.stability.metrics`: verdicts, or grades.
    Tasks that have neither, and those that a run did not finish, are listed in ``not_compared``
    with the reason; their perplexities and texts are compared all the same. A task with several
    filters has a result for each; the summaries over tasks, Holm's adjustment and decisions use its
    first. The summaries are over tasks with verdicts; where there are none, there are no summaries.

    Raises:
        ComparisonError: the runs were not asked the same (see :func:`align`).
        SamplesError: no task has verdicts, grades, perplexities or texts, only some documents of a
            task have them, or the samples do not hold a metric that was asked for.
        NumericsError: a log-likelihood, a spread or a grade is not finite; the document is named.
    """
    pairs = align(
        dense, pruned, tasks=tasks, common_only=common_only, across_engines=across_engines
    )
    return compare_pairs(pairs, settings)


def compare_pairs(pairs: AlignedPairs, settings: Settings | None = None) -> Comparison:
    """:func:`compare_answers` for two runs that are aligned already."""
    settings = with_recorded_quantity(settings or Settings(), pairs.dense)
    if settings.metrics and settings.verdict == "correct_norm":
        raise SamplesError(
            "acc_norm judges every task, so that no other metric can be asked for; give one of the "
            "two (a task: --metric TASK=acc_norm)."
        )
    pairs = with_asked_metrics(with_script_verdicts(pairs, settings), settings.metrics)
    dense, pruned = pairs.dense_info, pairs.pruned_info
    asked = asked_metrics(settings.metrics, dense, pairs.dense["task"].unique())
    compared: list[ComparedTask] = []
    skipped: dict[str, str] = {}
    perplexities: list[PerplexityComparison] = []
    generations: list[GenerationComparison] = []
    grades: list[ComparedGrade] = []
    aggregate_only: dict[str, dict[str, str]] = {}
    for task, first, second in _tasks(pairs):
        perplexities += compare_perplexities(first, second, settings.confidence)
        reason = _no_verdict(pairs, first, second, task, settings.verdict)
        found, left_out = compare_grades(
            pairs, first, second, settings,
            asked=asked.get(task), judged=reason is None, known=PERPLEXITIES,
        )  # fmt: skip
        grades += found
        if left_out:
            aggregate_only.setdefault(task, {}).update(left_out)
        if reason is None:
            compared.append(compare_task(first, second, settings))
        elif not any(each.result.decides for each in found):
            skipped[task] = reason
        exact_match = None if reason else compared[-1].result.difference
        generated = compare_generations(first, second, settings, exact_match)
        generations += [generated] if generated else []
    grades += compare_repetitions(pairs, settings)
    if not (compared or perplexities or generations or grades):
        raise SamplesError(
            f"No task of '{dense.run}' has right or wrong answers by '{settings.verdict}', "
            "grades, perplexities or texts; add a task with acc, exact_match or a perplexity."
        )
    first_filters = pairs.first_filters
    main = [item for item in compared if item.result.filter == first_filters[item.result.task]]
    results = _decided([(item.result, item.sample) for item in main], settings)
    decided = {(task.task, task.filter): task for task in results}
    used = {name: value for name, value in settings.used().items() if name != "verdict"}
    return Comparison(
        dense_run=dense.run,
        pruned_run=pruned.run,
        **used,
        tasks=tuple(
            decided.get((item.result.task, item.result.filter), item.result) for item in compared
        ),
        macro=macro(main, settings) if main else None,
        micro=micro(main, settings) if main else None,
        not_compared={**dense.missing, **pruned.missing, **skipped},
        groups=tuple(_decided(compare_groups(main, dense.groups, settings), settings)),
        perplexities=tuple(perplexities),
        generations=tuple(generations),
        formats=tuple(compare_formats(pairs, main, settings)),
        grades=tuple(decided_grades(grades, _main_grades(grades, first_filters), settings)),
        aggregate_only=aggregate_only,
    )


def _main_grades(found: Sequence[ComparedGrade], first_filters: Mapping[str, str]) -> list[int]:
    """Places of the grades that decide a task, by its first filter."""
    return [
        place
        for place, each in enumerate(found)
        if each.result.decides and first_filters[each.result.task] == each.result.filter
    ]


def _tasks(pairs: AlignedPairs) -> Iterator[tuple[str, pd.DataFrame, pd.DataFrame]]:
    """Aligned rows of each (task, filter); the tables are sorted by both."""
    keys = pairs.dense[["task", "filter"]]
    changes = (keys != keys.shift()).any(axis=1).to_numpy()
    edges = [*np.flatnonzero(changes).tolist(), len(keys)]
    for begin, end in pairwise(edges):
        first, second = pairs.dense.iloc[begin:end], pairs.pruned.iloc[begin:end]
        yield str(first.iloc[0]["task"]), first, second


def _decided(found: Sequence[tuple[_Result, PairedSample]], settings: Settings) -> list[_Result]:
    """Adjust the p-values of one family by Holm, and decide."""
    level = 1 - settings.confidence
    p_values = [item.p_value for item, _ in found if item.p_value is not None]
    decided = []
    for (item, sample), (p, comparisons) in zip(found, holm(p_values, level), strict=True):
        adjusted = PairedDifference((sample,)).interval(
            settings.confidence, settings.margin, comparisons
        )
        decision = decide(item.difference, settings.margin, significant=p < level)
        update = {"p_holm": p, "adjusted": adjusted, "decision": decision}
        decided.append(item.model_copy(update=update))
    return decided


def _no_verdict(
    pairs: AlignedPairs, dense: pd.DataFrame, pruned: pd.DataFrame, task: str, verdict: str
) -> str | None:
    """Why a (task, filter) cannot be compared by its verdicts; None if it can."""
    for frame, info in ((dense, pairs.dense_info), (pruned, pairs.pruned_info)):
        missing = frame[verdict].isna()
        if missing.all():
            return f"no right or wrong answers by '{verdict}'"
        if missing.any():
            document = frame.loc[missing, "doc_id"].iloc[0]
            raise SamplesError(
                f"Run '{info.run}' has no verdict on document {document} of task '{task}', but on "
                "others; evaluate again."
            )
    before, after = (sorted(frame["verdict_metric"].dropna().unique()) for frame in (dense, pruned))
    if verdict == "correct" and before != after:
        return f"judged by {', '.join(before)} in one run, by {', '.join(after)} in the other"
    return None


def with_recorded_quantity(settings: Settings, frame: pd.DataFrame) -> Settings:
    """Settings whose quantity is chosen: the given one, or else what the rows record.

    That is ``mean_token_nll`` where the engine gives it (OpenCompass' PPL, which the paper's
    numbers were made from), ``nll_per_byte`` where the scored text is known (lm-eval), and ``nll``
    where only the log-likelihood is (OpenCompass' LL).

    Args:
        frame: rows of the dense run that are to be compared.

    Raises:
        SamplesError: its tasks record different things, so that one must be chosen.
    """
    if settings.quantity is not None:
        return settings
    found: dict[Quantity, str] = {}
    rows = frame.drop_duplicates("task")
    for task, choices, mean, sizes in zip(
        rows["task"], rows["choices"], rows["mean_nll"], rows["byte_lengths"], strict=True
    ):
        if isinstance(choices, list) and len(choices) > 1:
            recorded: Quantity = "nll_per_byte" if isinstance(sizes, list) else "nll"
            found.setdefault("mean_token_nll" if isinstance(mean, list) else recorded, str(task))
    if len(found) > 1:
        named = ", ".join(f"{quantity} of '{task}'" for quantity, task in found.items())
        raise SamplesError(
            f"The tasks record different quantities ({named}), whose stability must not be "
            "averaged; compare them apart (--task)."
        )
    return replace(settings, quantity=next(iter(found), None))


def with_script_verdicts(pairs: AlignedPairs, settings: Settings) -> AlignedPairs:
    """The pairs with the script's verdicts, where its mode is asked for and they are recorded."""
    if settings.mode != "reference_script" or settings.verdict != "correct":
        return pairs
    return replace(pairs, dense=_strict(pairs.dense), pruned=_strict(pairs.pruned))


def _strict(frame: pd.DataFrame) -> pd.DataFrame:
    same = [metrics.get("same_value") for metrics in frame["metrics"]]
    known = pd.Series(same, index=frame.index, dtype="Float64").astype("boolean")
    metric = frame["verdict_metric"].mask(known.notna().to_numpy(), "same value")
    return frame.assign(correct=known.fillna(frame["correct"]), verdict_metric=metric)
