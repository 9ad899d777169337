"""What several views share: rows in order, tables by task, commands, templates.

Rows are ordered by accuracy, or by perplexity where no task has right or wrong answers.
"""

from __future__ import annotations

import math
import os
import re
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from streamline_bench.core.machine.environment import resource
from streamline_bench.report.leaderboard import Leaderboard
from streamline_bench.report.row import Row
from streamline_bench.report.scores import TaskScore, grade_change
from streamline_bench.report.text import count, times
from streamline_bench.stability.estimate import Estimate, exponentiated, square_and_add

_Row = TypeVar("_Row", bound=Row)


FRONTS = {
    "memory": "memory for the sequences of the target",
    "time": "time for the same tokens",
    "bytes": "bytes of the weights",
    "parameters": "parameters",
}
"""What accuracy is set against on a Pareto front, in words."""


def front_cost(measure: str, cost: float) -> str:
    """A cost of a front, with its unit."""
    if measure == "time":
        return times(cost)
    return count(cost) if measure == "parameters" else f"{count(cost)}B"


def environment(finalize: Callable[[Any], Any], filters: Mapping[str, Any]) -> Environment:
    """The templates of ``reports/templates``.

    Args:
        finalize: applied to everything that a template prints, before it is escaped as HTML.
    """
    found = Environment(
        loader=FileSystemLoader(resource("reports") / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=finalize,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    found.filters.update(filters)
    return found


def ranked(rows: Iterable[_Row]) -> list[_Row]:
    """Sort rows by accuracy (mean over tasks), the best first, failed rows last.

    Without any accuracy, rows are sorted by the mean change of the grades that judge tasks, else by
    perplexity as a multiple of the dense model's, the smallest first. Equal rows keep the order of
    the run.
    """
    every = list(rows)
    scored = [row for row in every if row.failed is None]
    by_accuracy = any(row.accuracy_macro for row in scored)
    by_grade = any(mean_grade(row) for row in scored if not row.is_dense)

    def place(row: Row) -> float:
        if by_accuracy:
            return -row.accuracy_macro.value if row.accuracy_macro else math.inf
        if by_grade:
            return -grade.value if (grade := mean_grade(row)) else math.inf
        return nats.value if (nats := _nats(row)) else math.inf

    return [*sorted(scored, key=place), *(row for row in every if row.failed is not None)]


def same_verdict(rows: Iterable[Row]) -> str | None:
    """The verdict that two rows or more share with every other one: no column for it helps."""
    found = [row.macro.decision for row in rows if row.macro]
    return found[0] if len(found) > 1 and len(set(found)) == 1 else None


def has_noise(board: Leaderboard) -> bool:
    """Whether verdicts flip when the dense model is asked again: else all flips are above it."""
    return bool(board.noise and board.noise.flips and board.noise.flips.value > 0)


def mean_grade(row: Row) -> Estimate | None:
    """Change of the grades that judge tasks, mean over tasks, positive where they are better.

    Returns:
        0 for the dense row; None for a row without such grades.
    """
    if row.is_dense:
        return Estimate(value=0.0) if row.grades else None
    return row.grade_change or grade_change(row.grades)


def perplexity_ratio(row: Row) -> Estimate | None:
    """Perplexity as a multiple of the dense model's: geometric mean over tasks, with interval.

    Of a task that counts several units (words, bytes), the first is taken. Distances to the ends of
    the intervals of the tasks' logarithms add up by squares, as those of accuracies do.

    Returns:
        1 for the dense row; None for a row without perplexities, or if the ratio exceeds float64.
    """
    nats = _nats(row)
    return exponentiated(nats) if nats else None


def _nats(row: Row) -> Estimate | None:
    if row.is_dense:
        return Estimate(value=0.0)
    tasks: dict[tuple[str, str], Estimate] = {}
    for found in row.perplexities:
        tasks.setdefault((found.task, found.filter), found.nats_per_unit)
    return square_and_add(list(tasks.values())) if tasks else None


@dataclass(frozen=True)
class HeatMap:
    """One line per row, one column per task and filter; ``prefix`` is common to all task names."""

    prefix: str
    columns: list[TaskScore]
    lines: list[tuple[Row, list[TaskScore | None]]]


def heat_map(rows: Sequence[Row]) -> HeatMap:
    """Arrange every task of any row."""
    columns: dict[tuple[str, str], TaskScore] = {}
    for task in (task for row in rows for task in row.tasks):
        columns.setdefault((task.task, task.filter), task)
    lines = []
    for row in rows:
        found = {(task.task, task.filter): task for task in row.tasks}
        lines.append((row, [found.get(key) for key in columns]))
    return HeatMap(_prefix([name for name, _ in columns]), list(columns.values()), lines)


def _prefix(names: Sequence[str]) -> str:
    """What all names begin with, up to an underscore; nothing for a single name."""
    shared = os.path.commonprefix(list(names))  # noqa: RUF071 - characters are meant
    return shared[: shared.rfind("_") + 1] if len(names) > 1 else ""


_STAGES = {
    "compress": "Compress",
    "scan": "Compress",
    "lm_eval": "Evaluate",
    "lm-eval": "Evaluate",
    "opencompass": "Evaluate",
    "divergence": "Compare on a text",
    "throughput": "Measure speed",
    "compare": "All at once",
}
_OTHER = "Other"


def commands_by_stage(commands: Sequence[str]) -> dict[str, list[str]]:
    """Return heading -> command lines, headings in the order of a run, none without a line."""
    order = dict.fromkeys((*_STAGES.values(), _OTHER))
    found: dict[str, list[str]] = {heading: [] for heading in order}
    for command in commands:
        found[_stage(command)].append(command)
    return {heading: lines for heading, lines in found.items() if lines}


def _stage(command: str) -> str:
    try:
        words = shlex.split(command)
    except ValueError:
        words = command.split()
    # Variables before the program, the interpreter and its -m say nothing of the stage.
    program = [word for word in words if not re.fullmatch(r"\w+=.*", word, re.S)][:4]
    names = (word.rsplit("/", 1)[-1].removesuffix("-bench") for word in program)
    return next((_STAGES[name] for name in names if name in _STAGES), _OTHER)
