"""The change of one task, of accuracy or of stability, and what is decided from it.

A drop counts as a regression if it is significant and the interval does not exclude a drop of the
tolerated size or more. Where no answer of the same questions changed, there is none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from streamline_bench.errors import ComparisonError
from streamline_bench.gate.evidence import Evidence
from streamline_bench.gate.reference import RowReference, TaskReference
from streamline_bench.gate.result import Check, Quantity, Status
from streamline_bench.stability.comparison import Estimate
from streamline_bench.stability.over_tasks import square_and_add
from streamline_bench.stability.statistics.score import decide


@dataclass(frozen=True)
class Change:
    """The change of one task.

    Attributes:
        unchanged: the questions are the same and no answer changed.
    """

    task: TaskReference
    before: float
    now: float
    difference: Estimate
    how: str
    unchanged: bool = False


def shared_tasks(
    now: RowReference, before: RowReference, against: Evidence, run: Evidence
) -> list[tuple[TaskReference, TaskReference]]:
    """Tasks of both, now and before, which must ask the same.

    Raises:
        ComparisonError: a task has other questions now.
    """
    old = {(task.task, task.filter): task for task in before.tasks}
    pairs = [
        (task, old[task.task, task.filter]) for task in now.tasks if (task.task, task.filter) in old
    ]
    for task, reference in pairs:
        known = task.documents is not None and reference.documents is not None
        if (known and task.documents != reference.documents) or task.n != reference.n:
            raise ComparisonError(
                f"The questions of task '{task.task}' differ: '{run.figures.source}' has {task.n}, "
                f"'{against.figures.source}' has {reference.n}, and documents, prompts or answers "
                "changed; evaluate with the same data and settings, or write a new reference."
            )
    return pairs


def excludes_zero(difference: Estimate) -> bool:
    """Whether the interval says that something changed."""
    low, high = difference.low, difference.high
    return low is not None and high is not None and (low > 0 or high < 0)  # NaN is neither


def _status(difference: Estimate, margin: float, significant: bool) -> Status:
    decision = decide(difference, margin, significant=significant)
    if decision == "worse":
        return "regressed"
    return "cannot tell" if decision == "cannot tell" else "ok"


def check_of(
    row: RowReference,
    quantity: Quantity,
    change: Change,
    margin: float,
    significant: bool,
    p_value: float | None = None,
) -> Check:
    """What is decided on one task."""
    return Check(
        row=row.label,
        quantity=quantity,
        task=change.task.task,
        status=("ok" if change.unchanged else _status(change.difference, margin, significant)),
        reference=change.before,
        value=change.now,
        change=change.difference.value,
        low=None if change.unchanged else change.difference.low,
        high=None if change.unchanged else change.difference.high,
        p_value=p_value,
        how="no answer changed" if change.unchanged else change.how,
    )


def mean_checks(
    row: RowReference, quantity: Quantity, changes: Sequence[Change], margin: float
) -> list[Check]:
    """The mean over tasks, where there are several; its interval speaks for it."""
    if len(changes) < 2:
        return []
    unchanged = all(change.unchanged for change in changes)
    difference = square_and_add([change.difference for change in changes])
    return [
        Check(
            row=row.label,
            quantity=quantity,
            status=("ok" if unchanged else _status(difference, margin, excludes_zero(difference))),
            reference=float(np.mean([change.before for change in changes])),
            value=float(np.mean([change.now for change in changes])),
            change=difference.value,
            low=None if unchanged else difference.low,
            high=None if unchanged else difference.high,
            how="no answer changed" if unchanged else f"mean of {len(changes)} tasks",
        )
    ]
