"""The first sentences of a report: who leads among equals, and what telling the rest apart takes.

A leader is named among rows of equal cost and about equal size only, and as the first only where
the paired tests against all of them say so.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import NormalDist

from streamline_bench.report.leaderboard import Leaderboard
from streamline_bench.report.places import Between, Contest
from streamline_bench.report.row import Row
from streamline_bench.report.text import MISSING, p_value, percent, points, significant
from streamline_bench.report.views.entries import shown
from streamline_bench.report.views.guessing import guessing_said
from streamline_bench.report.views.overview import mean_grade, perplexity_ratio, ranked
from streamline_bench.stability.comparison import Overall

_GUESSING = 0.1
"""Share of the way from guessing to all right; a dense model that may be below it (by the lower end
of its interval) has nothing to lose."""


def headline(board: Leaderboard) -> str:
    """One or two sentences on the best row against the dense model. Not escaped."""
    failed = sum(row.failed is not None for row in board.rows)
    told = [_best(board), guessing_said(board), f"{failed} more failed." if failed else ""]
    return " ".join(filter(None, told))


def _best(board: Leaderboard) -> str:
    dense = board.dense_row
    if dense.accuracy_macro is None:
        return _best_grade(board) or _best_perplexity(board)
    before = percent(dense.accuracy_macro.value)
    others = [(row, row.macro) for row in ranked(shown(board)) if row.macro]
    if not others:
        return f"{dense.label} answers {before} % right, averaged over tasks."
    best, macro = others[0]
    close = _close_to_guessing(board, macro, len(others))
    if close and not any(level.beaten for level in board.guessing):
        return close
    opening = close or f"{dense.label} answers {before} % right."
    alone = f"{best.label} answers {percent(macro.pruned.value)} % right{_removed(best)}, against "
    change = macro.difference
    if len(others) == 1:
        return (
            f"{alone}{before} % of {dense.label} ({points(change.value)} points, {board.level} "
            f"interval {points(change.low)} to {points(change.high)}). "
            f"{percent(macro.agreement.value)} % of its verdicts are unchanged."
        )
    if told := _by_size(board):
        return f"{opening} {' '.join(told)}"
    if board.contests:
        told = [_leader(board, contest) for contest in board.contests[:_CONTESTS]]
        return f"{opening} {' '.join(told)}"
    low, high = (
        percent(row.accuracy_macro.value)
        for row, _ in (others[-1], others[0])
        if row.accuracy_macro
    )
    return (
        f"{opening} The {_models(len(others))} answer {low} to {high} % right. "
        f"{_why_no_winner(board)}"
    )


def _close_to_guessing(board: Leaderboard, macro: Overall, count: int) -> str | None:
    """Where the lower end of how far the dense model is from guessing is near 0; None elsewhere."""
    corrected = macro.dense_corrected
    if corrected is None:
        return None
    error = NormalDist().inv_cdf(0.5 + board.method.confidence / 2) * (
        corrected.standard_error or 0.0
    )
    low, high = corrected.value - error, corrected.value + error
    if low >= _GUESSING:
        return None
    return (
        f"{board.dense} is close to guessing on these tasks: {percent(macro.dense.value)} % right "
        f"is {percent(corrected.value)} % of the way from guessing to all right ({board.level} "
        f"interval {percent(low)} to {percent(high)}). The order of the {_models(count)} therefore "
        "says little; stability and flips still show how much their verdicts changed."
    )


_CONTESTS = 3
"""Groups of rows of which the headline speaks."""


def _leader(board: Leaderboard, contest: Contest) -> str:
    """Who is first of equal size and cost, and what it takes to tell the others apart."""
    level = 1 - board.method.confidence
    first, count = contest.entries[0], len(contest.entries)
    cost = f"{contest.cost}, " if contest.cost else ""
    among = f"{count} models ({cost}{_range(contest.removed)} % removed)"
    tied = [test for test in contest.tests if test.p_holm >= level]
    nearest = contest.tests[0]
    if not tied:
        adjusted = "Holm's " if len(contest.tests) > 1 else ""  # the interval is of this test alone
        return (
            f"Of {among}, {first} is first with {percent(contest.accuracy)} %: "
            f"{points(nearest.difference.value)} points before {nearest.second} "
            f"({board.level} interval {points(nearest.difference.low)} to "
            f"{points(nearest.difference.high)}, {adjusted}p {p_value(nearest.p_holm)})."
        )
    return (
        f"Of {among}, {first} has most right ({percent(contest.accuracy)} %), but cannot be told "
        f"apart from {_names([test.second for test in tied])}. {needed(tied[0])}"
    )


def _by_size(board: Leaderboard) -> list[str]:
    """A sentence for each size that was asked for, on its leaders by cost; none for one size.

    With the recipe whose next-token distributions are closest, of all of that size.
    """
    entries = {row.label: row for row in ranked(shown(board))}
    contests: dict[str, list[Contest]] = {}
    for contest in board.contests:
        if size := entries[contest.entries[0]].size:
            contests.setdefault(size, []).append(contest)
    if len(contests) < 2:
        return []
    found = []
    for size, same in sorted(contests.items(), key=lambda item: item[1][0].removed):
        rows = [row for row in entries.values() if row.size == size]
        first = rows[0]
        told = [_most_right(board, contest, entries) for contest in _leading(same)]
        if first.label not in {contest.entries[0] for contest in same} and first.accuracy_macro:
            cost = f" {first.cost}" if first.cost else ""
            told.insert(
                0,
                f"{_recipe(first)} answers {percent(first.accuracy_macro.value)} %, most of all, "
                f"with no other{cost} model of its size",
            )
        if near := min((row for row in rows if row.divergence), key=_token_kl, default=None):
            told.append(f"least token KL: {_recipe(near)}, {_token_kl(near):.2f}")
        found.append(f"Asked to lose {size}: {'; '.join(told)}.")
    return found


def _leading(contests: Sequence[Contest]) -> list[Contest]:
    """Of each cost the contest whose first has most right, the best of them first."""
    found: dict[str | None, Contest] = {}
    for contest in sorted(contests, key=lambda each: -each.accuracy):
        found.setdefault(contest.cost, contest)
    return list(found.values())


def _token_kl(row: Row) -> float:
    return row.divergence.kl.value if row.divergence else math.inf


def _recipe(row: Row) -> str:
    """What a row is called where its size is said already."""
    return row.group or row.label


def _most_right(board: Leaderboard, contest: Contest, entries: Mapping[str, Row]) -> str:
    """The first of a contest, and how many of the others it cannot be told apart from."""
    count = len(contest.entries)
    cost = f"{contest.cost} " if contest.cost else ""
    first = _recipe(entries[contest.entries[0]])
    told = f"{first} answers {percent(contest.accuracy)} %, most of {count} {cost}models"
    level = 1 - board.method.confidence
    tied = [_recipe(entries[test.second]) for test in contest.tests if test.p_holm >= level]
    if not tied:
        return f"{told}, and the paired tests tell it apart from all"
    names = _names(tied) if len(tied) < 3 else f"{len(tied)} of them"
    if len(tied) == len(contest.tests):
        names = "any" if len(tied) > 1 else tied[0]
    nearest = next(test for test in contest.tests if test.p_holm >= level)
    return f"{told}, but cannot be told apart from {names} ({_takes(nearest, entries)})"


def _takes(test: Between, entries: Mapping[str, Row]) -> str:
    """What it takes to tell two entries apart, in brackets."""
    other = _recipe(entries[test.second])
    if test.difference.value == 0:
        return f"{other} has as many right"
    if test.needed is None:
        return f"from {other} by more seeds, not by more documents"
    if test.needed > PRACTICALLY_EQUAL:
        return f"practically equal to {other}"
    return f"from {other} with about {_rounded(test.needed):,} documents, of {test.n:,} now"


PRACTICALLY_EQUAL = 100_000
"""Documents; a difference that only more of them would show matters to nobody."""


def documents(test: Between) -> str:
    """A cell: documents needed / asked."""
    if test.needed is None:
        needed = MISSING
    elif test.needed > PRACTICALLY_EQUAL:
        needed = f"> {PRACTICALLY_EQUAL:,}"
    else:
        needed = f"{test.needed:,}"
    return f"{needed} / {test.n:,}"


def needed(test: Between) -> str:
    """A sentence: how many documents it would take to tell two entries apart."""
    if test.difference.value == 0:
        return f"{test.first} and {test.second} have equally many right."
    seen = (
        f"For the difference of {points(abs(test.difference.value)).lstrip('+')} points from "
        f"{test.second}, with {percent(test.discordance)} % of the documents discordant,"
    )
    if test.needed is None:
        return f"{seen} more documents do not help, but more seeds do; {test.n:,} were asked."
    if test.needed > PRACTICALLY_EQUAL:
        return (
            f"{seen} it takes more than {PRACTICALLY_EQUAL:,} documents: practically equal; "
            f"{test.n:,} were asked."
        )
    return f"{seen} it takes about {_rounded(test.needed):,} documents; {test.n:,} were asked."


def _rounded(count: int) -> int:
    """Two significant digits: the discordance seen is no more exact."""
    step = int("1" + "0" * max(0, len(str(count)) - 2))
    return -(-count // step) * step


def _range(ends: tuple[float, float]) -> str:
    low, high = map(percent, ends)
    return low if low == high else f"{low} to {high}"


def _names(labels: Sequence[str], most: int = 3) -> str:
    """``a, b and c``, or ``a, b, c and 4 more``."""
    if len(labels) > most + 1:
        return f"{', '.join(labels[:most])} and {len(labels) - most} more"
    return " and ".join(filter(None, [", ".join(labels[:-1]), labels[-1]]))


def _why_no_winner(board: Leaderboard) -> str:
    if board.ranks:
        return "No two of them are of about equal size and equal cost, so that none is named first."
    return "They were not tested against each other, so that none is named first."


def _models(count: int) -> str:
    return f"{count} compressed {'model' if count == 1 else 'models'}"


def _removed(row: Row) -> str:
    if row.sparsity_reached is None:
        return ""
    return f" with {percent(row.sparsity_reached)} % of the parameters removed"


def _best_grade(board: Leaderboard) -> str | None:
    """What happened to the grades, where no task has right or wrong answers; None without any."""
    rows = [row for row in ranked(shown(board)) if not row.is_dense]
    known = [(row, change) for row in rows if (change := mean_grade(row)) is not None]
    if not known:
        return None
    best, change = known[0]
    tasks = len({score.task for score in best.grades if score.main and score.decides})
    ends = f" ({board.level} interval {points(change.low)} to {points(change.high)})"
    rank = board.grade_ranks.get(best.label)
    # A rank's interval that begins at 1 holds the first place, too.
    others = () if rank is None or rank.high == 1 else board.grade_ranks.items()
    tied = [label for label, other in others if label != best.label and other.low == 1]
    apart = f" It cannot be told apart from {_names(tied)}." if tied else ""
    return (
        f"Tasks are graded. Of {_models(len(known))}, {best.label} does best{_removed(best)}: its "
        f"grades change by {points(change.value)} points{ends if change.low is not None else ''}, "
        f"mean over {tasks} task{'s' * (tasks > 1)}.{apart}"
    )


def _best_perplexity(board: Leaderboard) -> str:
    """What happened to perplexity, where no task has right or wrong answers."""
    none, dense = "No task has right or wrong answers", board.dense
    others = [row for row in ranked(board.rows) if not row.is_dense and row.failed is None]
    known = [(row, ratio) for row in others if (ratio := perplexity_ratio(row)) is not None]
    if not others:
        return f"{none}, and there is no row to compare {dense} with."
    if not known and any(score.decides for row in others for score in row.grades):
        return f"{none}; what has no highest value is compared with {dense}'s task by task."
    if not known:
        return f"{none}, and no model has a perplexity to compare with {dense}'s."
    best, ratio = known[0]
    ends = ""
    if ratio.low is not None:
        low, high = significant(ratio.low, 3), significant(ratio.high, 3)
        ends = f" ({board.level} interval {low} to {high})"
    tasks = len({found.task for found in best.perplexities})
    mean = f", geometric mean over {tasks} texts" if tasks > 1 else ""
    return (
        f"{none}. Of {_models(len(others))}, {best.label} does best{_removed(best)}: its "
        f"perplexity is {significant(ratio.value, 3)} times {dense}'s{ends}{mean}."
    )
