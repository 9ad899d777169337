"""Noise floor: what changes between dense and dense again, at another batch size, dtype or engine.

Sums in another order differ in their last bits, and a close call flips. Flips of a pruned model
mean something only above that; so do grades that move and texts that change.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeVar

from streamline_bench.errors import SamplesError
from streamline_bench.stability.compare_answers import compare_answers
from streamline_bench.stability.comparison import (
    Comparison,
    GradeComparison,
    GroupComparison,
    NoiseFloor,
    NoiseGrade,
    NoiseTask,
    NoiseText,
    Overall,
    TaskComparison,
)
from streamline_bench.stability.estimate import Estimate, square_and_add
from streamline_bench.stability.samples import Samples
from streamline_bench.stability.settings import Settings
from streamline_bench.stability.statistics.paired import wilson, wilson_estimate
from streamline_bench.stability.texts import GenerationComparison

_Metric = tuple[str, str, str]
"""Task, filter, metric."""

_Compared = TypeVar("_Compared", TaskComparison, GroupComparison, Overall)


def noise_floor(
    dense: Samples,
    repeats: Sequence[Samples],
    *,
    tasks: Sequence[str] | None = None,
    common_only: bool = False,
    settings: Settings | None = None,
) -> NoiseFloor:
    """Compare the dense run with its repetitions.

    Shares are means over the repetitions that have the task; their intervals are Wilson's at the
    number of documents (repetitions on the same documents are not independent).

    Repetitions may be those of another engine, as their labels then say.

    Args:
        tasks, common_only, settings: see :func:`.compare_answers`.

    Raises:
        SamplesError: there is no repetition, or no task has verdicts, grades or texts; otherwise
            as ``compare_answers``.
    """
    if not repeats:
        raise SamplesError(
            f"A noise floor of '{dense.info.run}' needs at least one repetition; evaluate the "
            "dense model again at another batch size or dtype."
        )
    settings = settings or Settings()
    found = [
        compare_answers(
            dense,
            again,
            tasks=tasks,
            common_only=common_only,
            across_engines=True,
            settings=settings,
        )
        for again in repeats
    ]
    by_task: dict[tuple[str, str], list[TaskComparison]] = {}
    for task in (task for result in found for task in result.tasks):
        by_task.setdefault((task.task, task.filter), []).append(task)
    by_metric: dict[_Metric, list[GradeComparison]] = {}
    for grade in (grade for result in found for grade in result.grades):
        by_metric.setdefault((grade.task, grade.filter, grade.metric), []).append(grade)
    by_text: dict[tuple[str, str], list[GenerationComparison]] = {}
    for text in (text for result in found for text in result.generations):
        by_text.setdefault((text.task, text.filter), []).append(text)
    floor = {key: _task(parts, settings) for key, parts in by_task.items()}
    counted = [floor[key] for key, parts in by_task.items() if parts[0].p_holm is not None]
    if not (counted or by_metric or by_text):
        raise SamplesError(
            f"No task of '{dense.info.run}' has right or wrong answers that could flip, grades or "
            "texts; leave the noise floor out, or add a task with acc, exact_match or F1."
        )
    return NoiseFloor(
        dense_run=dense.info.run,
        repeats=tuple(again.info.run for again in repeats),
        tasks=tuple(floor.values()),
        grades=tuple(_grade(parts, settings) for parts in by_metric.values()),
        texts=tuple(_text(parts, settings) for parts in by_text.values()),
        n=sum(task.n for task in counted),
        **(_over_all(counted, settings) if counted else {}),
    )


def _over_all(counted: Sequence[NoiseTask], settings: Settings) -> dict[str, Any]:
    """What is over all tasks with verdicts, as the fields of a floor."""
    n = sum(task.n for task in counted)
    share = _pooled([(task.n, task.flips.value) for task in counted])
    divergences = [task.choice_kl for task in counted if task.choice_kl is not None]
    return {
        "flips": wilson_estimate(share, n, settings.confidence),
        "agreement": wilson_estimate(1 - share, n, settings.confidence),
        "macro_flips": _mean([task.flips.value for task in counted]),
        "choice_kl": _mean(divergences) if divergences else None,
    }


def above_noise(comparison: Comparison, floor: NoiseFloor) -> Comparison:
    """The comparison with its fields about noise filled in.

    A summary has the floor of the tasks that it is over, and stays as it is if the floor does not
    know them all, as do tasks that it does not know.
    """
    known = {(task.task, task.filter): task for task in floor.tasks}
    confidence = comparison.confidence
    tasks = tuple(
        _filled(task, known[key].flips.value, confidence)
        if (key := (task.task, task.filter)) in known
        else task
        for task in comparison.tasks
    )
    # The summaries are over one filter of each task.
    counted = {task.task: task for task in tasks if task.p_holm is not None}
    groups = tuple(
        _over(group, [counted[name] for name in group.tasks], confidence)
        for group in comparison.groups
    )
    moves = {(grade.task, grade.filter, grade.metric): grade.moved.value for grade in floor.grades}
    grades = tuple(
        _moved_above(grade, moves[name], confidence)
        if (name := (grade.task, grade.filter, grade.metric)) in moves
        else grade
        for grade in comparison.grades
    )
    changes = {(text.task, text.filter): text.changed.value for text in floor.texts}
    texts = tuple(
        _changed_above(text, changes[key], confidence)
        if (key := (text.task, text.filter)) in changes
        else text
        for text in comparison.generations
    )
    filled: dict[str, Any] = {
        "tasks": tasks, "groups": groups, "grades": grades, "generations": texts
    }  # fmt: skip
    if comparison.micro is not None and comparison.macro is not None:
        members = list(counted.values())
        filled["micro"] = _over(comparison.micro, members, confidence)
        filled["macro"] = _macro(comparison.macro, members)
    return comparison.model_copy(update=filled)


def flips_above(share: float, floor: float, n: int, confidence: float) -> Estimate:
    """Excess of a share of flips over the floor, both of the same ``n`` documents.

    Wilson's intervals of both, square-and-add without their correlation: a document that flips by
    noise is likelier to flip by pruning too, so that this errs on the wide side.
    """
    low, high = wilson(share, n, confidence)
    floor_low, floor_high = wilson(floor, n, confidence)
    excess = share - floor
    return Estimate(
        value=excess,
        low=excess - math.hypot(share - low, floor_high - floor),
        high=excess + math.hypot(high - share, floor - floor_low),
        method="square-and-add of Wilson's",
    )


def _filled(found: _Compared, floor: float, confidence: float) -> _Compared:
    excess = flips_above(found.flips.verdicts / found.n, floor, found.n, confidence)
    return found.model_copy(update={"noise_flips": floor, "flips_above_noise": excess})


def _moved_above(found: GradeComparison, floor: float, confidence: float) -> GradeComparison:
    excess = flips_above(1 - found.ties / found.n, floor, found.n, confidence)
    return found.model_copy(update={"noise_moved": floor, "moved_above_noise": excess})


def _changed_above(
    found: GenerationComparison, floor: float, confidence: float
) -> GenerationComparison:
    excess = flips_above(1 - found.identical.value, floor, found.n, confidence)
    return found.model_copy(update={"noise_changed": floor, "changed_above_noise": excess})


def _over(summary: _Compared, members: Sequence[TaskComparison], confidence: float) -> _Compared:
    """A summary over the documents of these tasks."""
    floors = [(task.n, task.noise_flips) for task in members if task.noise_flips is not None]
    if len(floors) < len(members):
        return summary
    return _filled(summary, _pooled(floors), confidence)


def _macro(macro: Overall, members: Sequence[TaskComparison]) -> Overall:
    floors = [task.noise_flips for task in members if task.noise_flips is not None]
    excess = [task.flips_above_noise for task in members if task.flips_above_noise is not None]
    if len(floors) < len(members):
        return macro
    return macro.model_copy(
        update={"noise_flips": _mean(floors), "flips_above_noise": square_and_add(excess)}
    )


def _task(parts: list[TaskComparison], settings: Settings) -> NoiseTask:
    first = parts[0]
    share = _mean([part.flips.verdicts / part.n for part in parts])
    choices = [part.same_choice for part in parts if part.same_choice is not None]
    divergences = [part.choices.kl.value for part in parts if part.choices is not None]
    return NoiseTask(
        task=first.task,
        filter=first.filter,
        n=first.n,
        flips=wilson_estimate(share, first.n, settings.confidence),
        agreement=wilson_estimate(1 - share, first.n, settings.confidence),
        same_choice=_mean(choices) if choices else None,
        choice_kl=_mean(divergences) if divergences else None,
    )


def _grade(parts: list[GradeComparison], settings: Settings) -> NoiseGrade:
    first = parts[0]
    share = _mean([1 - part.ties / part.n for part in parts])
    return NoiseGrade(
        task=first.task,
        filter=first.filter,
        metric=first.metric,
        n=first.n,
        moved=wilson_estimate(share, first.n, settings.confidence),
        difference=_mean([part.pruned.value - part.dense.value for part in parts]),
    )


def _text(parts: list[GenerationComparison], settings: Settings) -> NoiseText:
    first = parts[0]
    share = _mean([1 - part.identical.value for part in parts])
    return NoiseText(
        task=first.task,
        filter=first.filter,
        n=first.n,
        changed=wilson_estimate(share, first.n, settings.confidence),
    )


def _pooled(shares: Sequence[tuple[int, float]]) -> float:
    """Share over all documents, given (documents, share) of each task."""
    return sum(n * share for n, share in shares) / sum(n for n, _ in shares)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
