"""What views say of guessing: tasks that the dense model does not know, leads that rest on them."""

from __future__ import annotations

import math
from collections.abc import Sequence

from streamline_bench.report.leaderboard import Leaderboard
from streamline_bench.report.places import RANDOM, Between
from streamline_bench.report.row import Row
from streamline_bench.report.scores import GuessingLevel, TaskScore
from streamline_bench.report.text import MISSING, p_value, percent
from streamline_bench.report.views.entries import by_size, shown
from streamline_bench.report.views.overview import ranked
from streamline_bench.stability.estimate import Estimate

ONE_ANSWER = 0.9
"""A row that gives one answer to a larger share of a task's questions is marked."""

METHOD = (
    "Guessing: chance is the mean of 1 / number of choices; the majority class is the accuracy of "
    "the most frequent right answer given to every question (only where every question offers it). "
    "The dense model beats guessing on a task if the interval of its accuracy is above chance and "
    "that of its paired difference to the majority class above 0. Retention above chance: "
    "(accuracy - chance) / (1 - chance), mean over tasks, as a share of the dense model's, with "
    "Fieller's interval; none where the dense model cannot be told from chance. κ of answers: "
    "Cohen's kappa of the chosen answers, mean over tasks: agreement beyond the habits of both "
    "models. Stability compares verdicts alone: two models that give one answer to everything are "
    "fully stable, and have no κ. A task is judged by the first metric of its configuration, so by "
    "acc where acc_norm is computed as well; --metric TASK=acc_norm judges it by that."
)
"""For the notes of a page."""


def guessed_tasks(board: Leaderboard) -> list[str]:
    """The tasks on which the dense model does not beat guessing."""
    return [found.task for found in board.guessing if not found.beaten]


def known_tasks(board: Leaderboard) -> list[str]:
    """The others, where there are both kinds; else the mean over them says nothing new."""
    known = [found.task for found in board.guessing if found.beaten]
    return known if len(known) < len(board.guessing) else []


def guessing_mean(board: Leaderboard) -> float | None:
    """What guessing gets, mean over tasks."""
    levels = [found.level for found in board.guessing]
    return sum(levels) / len(levels) if levels else None


def level_of(board: Leaderboard, task: TaskScore) -> GuessingLevel | None:
    """The baselines of a task, of its main filter."""
    same = (found for found in board.guessing if found.task == task.task)
    return next(same, None) if task.main else None


def known_accuracy(board: Leaderboard, row: Row) -> Estimate | None:
    """Accuracy, mean over the tasks on which the dense model beats guessing; None without them."""
    tasks = known_tasks(board)
    found = [task.accuracy for task in row.tasks if task.main and task.task in tasks]
    if not found:
        return None
    errors = [one.standard_error for one in found if one.standard_error is not None]
    error = math.hypot(*errors) / len(found) if len(errors) == len(found) else None
    return Estimate(value=sum(one.value for one in found) / len(found), standard_error=error)


def known_places(board: Leaderboard) -> dict[str, tuple[int, int]]:
    """Row -> its place by :func:`known_accuracy`, and of how many; among those of its size."""
    found = {}
    for _, rows in by_size(shown(board)):
        means = {row.label: mean.value for row in rows if (mean := known_accuracy(board, row))}
        for label, own in means.items():
            better = sum(round(other, 12) > round(own, 12) for other in means.values())
            found[label] = (1 + better, len(means))
    return found


def one_answer(task: TaskScore) -> str | None:
    """``“no” to 97.0 %`` where a row gives one answer to nearly all questions of a task."""
    given = task.given
    if given is None or given.share <= ONE_ANSWER:
        return None
    return f"“{given.answer}” to {percent(given.share)} %"


def beats_random(board: Leaderboard, row: Row) -> str:
    """``yes, p 0.004``; nothing for what was not tested."""
    test = next((test for test in board.against_random if test.first == row.label), None)
    if test is None:
        return MISSING if row.method == RANDOM and board.against_random else ""
    return f"{_told(board, test)}, p {p_value(test.p_holm)}"


def _told(board: Leaderboard, test: Between) -> str:
    if test.p_holm >= 1 - board.method.confidence:
        return "cannot tell"
    return "yes" if test.difference.value > 0 else "worse"


def guessing_said(board: Leaderboard) -> str:
    """Sentences for the head: what guessing gets, and which leads rest on it; empty if nothing."""
    guessed = guessed_tasks(board)
    said = [_levels(board, guessed)] if guessed else []
    if known_tasks(board):
        said += _leads(board)
    return " ".join([*said, *_habits(board), *_not_random(board)])


def _levels(board: Leaderboard, guessed: Sequence[str]) -> str:
    mean = percent(guessing_mean(board))
    return (
        f"Guessing gets {mean} %; {board.dense} does not beat it on {len(guessed)} of "
        f"{len(board.guessing)} tasks ({', '.join(guessed)})."
    )


def _leads(board: Leaderboard) -> list[str]:
    """The first rows of the sizes that are not first on the other tasks."""
    places, moved = known_places(board), []
    for size, rows in by_size(ranked(shown(board))):
        leader = next((row for row in rows if row.label in places), None)
        if leader is None or places[leader.label][0] == 1:
            continue
        place, count = places[leader.label]
        best = [row.label for row in rows if places.get(row.label, (0, 0))[0] == 1]
        name = f"{leader.label} ({size})" if size and size not in leader.label else leader.label
        moved.append(f"{name} is {place} of {count} there, {' and '.join(best)} first")
    if not moved:
        return []
    count = len(known_tasks(board))
    tasks = f"the {count} other tasks" if count > 1 else "the other task"
    return [f"Leads that rest on such tasks, by the mean over {tasks}: {'; '.join(moved)}."]


def _habits(board: Leaderboard) -> list[str]:
    """How many rows give one answer to nearly everything."""
    rows = [row for row in shown(board) if not row.is_dense and row.failed is None]
    marked = [row for row in rows if any(map(one_answer, row.tasks))]
    if not marked:
        return []
    return [
        f"{len(marked)} of {len(rows)} compressed models give one answer to more than "
        f"{100 * ONE_ANSWER:.0f} % of a task's questions."
    ]


def _not_random(board: Leaderboard) -> list[str]:
    """How many rows beat random layers."""
    tests = board.against_random
    if not tests:
        return []
    better = [test.first for test in tests if _told(board, test) == "yes"]
    return [f"{len(better)} of {len(tests)} are told to be better than random layers removed."]
