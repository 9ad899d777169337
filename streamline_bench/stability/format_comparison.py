"""Two tasks that ask the same, of which one gives choices and one wants a free answer.

Pruning often keeps what is chosen and loses what is written. Whether it does is a paired question:
the same questions, the same two models. Which tasks belong together, a task says in its metadata
(``same_questions_as: TASK``), or the user (``--pair FREE=CHOICE``); document k of one is document k
of the other.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from streamline_bench.core.recipe.validation import suggest_or_list
from streamline_bench.errors import SamplesError
from streamline_bench.stability.align import AlignedPairs
from streamline_bench.stability.comparison import FormatComparison, Quadrants
from streamline_bench.stability.settings import Settings
from streamline_bench.stability.statistics import BoolArray, IntArray
from streamline_bench.stability.statistics.grades import PairedGrades
from streamline_bench.stability.statistics.paired import Outcomes, mcnemar
from streamline_bench.stability.task_comparison import ComparedTask


def compare_formats(
    pairs: AlignedPairs, compared: Sequence[ComparedTask], settings: Settings
) -> list[FormatComparison]:
    """Compare every declared pair of tasks by the first filter of each.

    Args:
        compared: tasks with verdicts, by that filter.

    Raises:
        SamplesError: a pair that was asked for names a task that is not there or has no right or
            wrong answers, or the two tasks have other documents.
    """
    asked = settings.pairs
    tasks = {item.result.task: item for item in compared}
    found = []
    for free, choice in {**pairs.dense_info.same_questions, **asked}.items():
        missing = [task for task in (free, choice) if task not in tasks]
        if missing and free in asked:
            raise SamplesError(
                f"Pair '{free}={choice}': there are no right or wrong answers to '{missing[0]}'"
                f"{suggest_or_list(missing[0], sorted(tasks))}"
            )
        if not missing:
            found.append(_compared(pairs, tasks[free], tasks[choice], settings))
    return found


def _compared(
    pairs: AlignedPairs, free: ComparedTask, choice: ComparedTask, settings: Settings
) -> FormatComparison:
    names = free.result.task, choice.result.task
    asked, given = _documents(pairs, free), _documents(pairs, choice)
    if not np.array_equal(asked, given):
        raise SamplesError(
            f"Tasks '{names[0]}' ({len(asked)} documents) and '{names[1]}' ({len(given)}) are "
            "declared to ask the same, and their documents have other numbers; give both the same "
            "data and the same limit, or leave the pair out."
        )
    kept = free.right & choice.right
    change = (free.right_now * 1.0 - free.right) - (choice.right_now * 1.0 - choice.right)
    # Both changes are within 1, so that half of their difference is.
    test = PairedGrades.of(
        change / 2, free.clusters, (*names, "formats"), draws=settings.draws, seed=settings.seed
    )
    half = test.interval(settings.confidence)
    doubled = {
        name: None if (value := getattr(half, name)) is None else 2 * value
        for name in ("value", "standard_error", "low", "high")
    }
    return FormatComparison(
        free=names[0],
        choice=names[1],
        filter=free.result.filter,
        n=len(kept),
        dense=quadrants(choice.right, free.right),
        pruned=quadrants(choice.right_now, free.right_now),
        kept=quadrants(choice.right_now[kept], free.right_now[kept]),
        kept_p=mcnemar(Outcomes.of(choice.right_now[kept], free.right_now[kept]))
        if kept.any()
        else None,
        gap=half.model_copy(update=doubled),
        p_value=test.p_value(),
        p_method=test.method,
    )


def quadrants(choice: BoolArray, free: BoolArray) -> Quadrants:
    """Count questions by which form is right, bool [n] each."""
    return Quadrants(
        both=int((choice & free).sum()),
        choice_only=int((choice & ~free).sum()),
        free_only=int((~choice & free).sum()),
        neither=int((~choice & ~free).sum()),
    )


def _documents(pairs: AlignedPairs, item: ComparedTask) -> IntArray:
    rows = pairs.dense
    own = (rows["task"] == item.result.task) & (rows["filter"] == item.result.filter)
    found: IntArray = rows.loc[own, "doc_id"].to_numpy(dtype=np.int64)
    return found
