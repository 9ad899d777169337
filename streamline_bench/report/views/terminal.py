"""The leaderboard as plain text: what a finished comparison prints in the terminal or a pipe."""

from __future__ import annotations

from collections.abc import Sequence
from unicodedata import east_asian_width

from streamline_bench.report import text
from streamline_bench.report.leaderboard import Leaderboard
from streamline_bench.report.row import Row
from streamline_bench.report.views.entries import shown
from streamline_bench.report.views.overview import FRONTS, mean_grade, perplexity_ratio, ranked

_SHOWN = 12
_LABEL, _REASON = 40, 60
"""Columns of the terminal that a row's name and the reason of a failure may take."""


def terminal_table(board: Leaderboard) -> str:
    """Return the best rows, best first: accuracy, difference, stability and verdict.

    Plain text without colours or control characters, no newline at the end. The dense row is always
    shown; a board without right or wrong answers shows grades instead, else perplexities.
    """
    rows = ranked(shown(board))
    head: tuple[str, ...] = _PERPLEXITY
    cells, note = _of_perplexity, _PERPLEXITY_NOTE
    if any(row.accuracy_macro for row in rows):
        head, cells, note = _ACCURACY, _of_accuracy, _ACCURACY_NOTE
    elif any(mean_grade(row) for row in rows if not row.is_dense):
        head, cells, note = _GRADE, _of_grade, _GRADE_NOTE
    scored = [row for row in rows if row.failed is None]
    best = scored[:_SHOWN]
    best += [row for row in scored[_SHOWN:] if row.is_dense]
    lines = _aligned([head, *(cells(row) for row in best)])
    if len(best) < len(scored):
        lines.append(f"{len(scored) - len(best)} more rows are in the report.")
    lines += [f"{_name(row)} failed: {_cut(row.failed, _REASON)}" for row in rows if row.failed]
    lines += [_same(row) for row in best if row.same_weights]
    if len(scored) > 1:
        lines.append(note.format(level=board.level, dense=_cut(board.dense, _LABEL)))
    for front in board.fronts:
        on = [place for place in front.places if place.on]
        names = ", ".join(
            f"{_cut(each.label, _LABEL)} ({text.percent(each.share, 0)} %)" for each in on
        )
        lines.append(f"Pareto front, {FRONTS[front.measure]} (share of resamples): {names}.")
    others = dict.fromkeys(filter(None, map(board.other_reference, best)))
    for other in others:
        names = ", ".join(_name(row) for row in best if board.other_reference(row) == other)
        lines.append(f"Compared with {_cut(other, _LABEL)}: {names}.")
    return "\n".join(lines)


_ACCURACY = ("row", "accuracy %", "difference", "stability %", "verdict")
_GRADE = ("row", "grades", "interval")
_PERPLEXITY = ("row", "perplexity", "interval")
_ACCURACY_NOTE = "Difference to {dense} in points, mean over tasks, with {level} interval."
_GRADE_NOTE = "Grades: change from {dense} in points, mean over tasks, with {level} interval."
_PERPLEXITY_NOTE = "Perplexity: a multiple of {dense}'s, with {level} interval."


def _of_accuracy(row: Row) -> tuple[str, ...]:
    accuracy, macro = row.accuracy_macro, row.macro
    if accuracy is None:
        return (_name(row), *[text.MISSING] * 4)
    if macro is None:
        change = "reference" if row.is_dense else text.MISSING
        return _name(row), text.with_error(accuracy), change, "", ""
    change = text.with_interval(macro.difference, signed=True)
    stability = text.percent(macro.stability.value) if macro.stability else text.MISSING
    return _name(row), text.with_error(accuracy), change, stability, macro.decision or ""


def _of_perplexity(row: Row) -> tuple[str, ...]:
    ratio = perplexity_ratio(row)
    if ratio is None:
        return _name(row), text.MISSING, ""
    if row.is_dense:
        return _name(row), "reference", ""
    ends = f"[{text.times(ratio.low)}, {text.times(ratio.high)}]" if ratio.low is not None else ""
    return _name(row), text.times(ratio.value), ends


def _of_grade(row: Row) -> tuple[str, ...]:
    change = mean_grade(row)
    if change is None or row.is_dense:
        return _name(row), "reference" if row.is_dense else text.MISSING, ""
    return _name(row), text.points(change.value), text.interval(change, signed=True)


def _same(row: Row) -> str:
    others = ", ".join(_cut(same.label, _LABEL) for same in row.same_weights)
    return f"{_name(row)} has the same weights as {others}."


def _name(row: Row) -> str:
    return _cut(row.label, _LABEL)


def _cut(value: object, most: int) -> str:
    line = text.terminal_text(value)
    return line if len(line) <= most else f"{line[: most - 1]}…"


def _aligned(table: Sequence[Sequence[str]]) -> list[str]:
    """Columns two blanks apart; names and verdicts to the left, the others to the right."""
    widths = [max(map(_width, column)) for column in zip(*table, strict=True)]
    left = {0} | ({4} if len(widths) == len(_ACCURACY) else set())
    lines = []
    for line in table:
        blanks = [" " * (width - _width(cell)) for cell, width in zip(line, widths, strict=True)]
        cells = [
            cell + blank if index in left else blank + cell
            for index, (cell, blank) in enumerate(zip(line, blanks, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return lines


def _width(line: str) -> int:
    """Columns that a terminal needs: two for wide letters of East Asian scripts."""
    return sum(2 if east_asian_width(letter) in "WF" else 1 for letter in line)
