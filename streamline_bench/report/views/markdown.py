"""``leaderboard.md``: the leaderboard as GitHub Markdown tables, from ``reports/templates``.

A template escapes every string that it prints; only numbers, which the filters write, and code stay
as they are.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from markupsafe import Markup

from streamline_bench.report import text
from streamline_bench.report.figures.pareto import bytes_tell_more
from streamline_bench.report.leaderboard import Leaderboard
from streamline_bench.report.row import Row
from streamline_bench.report.views import overview
from streamline_bench.report.views.entries import runs_of, shown
from streamline_bench.report.views.headline import headline, needed
from streamline_bench.report.views.pivot import note, pivots, table
from streamline_bench.stability.estimate import Estimate


def to_markdown(board: Leaderboard) -> str:
    """Render the leaderboard as Markdown; every string of a run is escaped."""
    rows = [row for row in overview.ranked(shown(board)) if row.failed is None]
    runs = [row for row in runs_of(board, rows) if row.failed is None]
    compared = [task.comparison for row in board.rows for task in row.tasks if task.comparison]
    return render_markdown(
        "leaderboard.md.j2",
        board=board,
        rows=rows,
        runs=runs,
        compared=[row for row in rows if row.macro],
        graded=[(row, score) for row in runs for score in row.grades if score.comparison],
        tested=[row.micro for row in rows if row.micro],
        adjusted=any(found.adjusted for found in compared),
        ranks_grades=any(_grades(row) for row in rows),
        ranks_perplexity=any(_perplexity(row) for row in rows),
        headline=headline(board),
        leaderboard=_leaderboard(board, rows),
        needed=needed,
        pivots=[(pivot.name, *table(pivot)) for pivot in pivots(board)],
        pivot_note=note(board),
        front_words=overview.FRONTS,
        front_cost=overview.front_cost,
        heat_map=overview.heat_map,
        commands=overview.commands_by_stage(board.commands),
    )


def render_markdown(template: str, **given: Any) -> str:
    """Fill a template; several blank lines become one."""
    filled = (
        overview.environment(_escaped, _MARKDOWN_FILTERS).get_template(template).render(**given)
    )
    return re.sub(r"\n{3,}", "\n\n", filled).strip("\n") + "\n"


def _escaped(value: Any) -> Markup:
    return value if isinstance(value, Markup) else Markup(text.markdown_text(value))


def _as_it_is(write: Callable[..., str]) -> Callable[..., Markup]:
    return lambda *given, **options: Markup(write(*given, **options))


_MARKDOWN_FILTERS = {
    **{name: _as_it_is(write) for name, write in text.FILTERS.items()},
    "stored": text.FILTERS["stored"],
    "code": _as_it_is(text.visible_text),
}


def _leaderboard(board: Leaderboard, rows: Sequence[Row]) -> Markup:
    """One line per row; a column in which every cell is empty is left out."""

    def rank(row: Row) -> str:
        found = board.shown_ranks.get(row.label)
        return f"{found.place} [{found.low}, {found.high}]" if found else ""

    def reference(row: Row) -> str:
        return text.markdown_text(board.other_reference(row) or "")

    first, *others = _COLUMNS
    every = [first, ("compared with", reference), ("rank", rank), *others]
    if not bytes_tell_more(rows):
        every = [(name, cell) for name, cell in every if name != "bytes"]
    columns = [(name, cell) for name, cell in every if any(cell(row) for row in rows)]
    lines = [
        [name for name, _ in columns],
        ["---", *["---:"] * (len(columns) - 1)],
        *([cell(row) or text.MISSING for _, cell in columns] for row in rows),
    ]
    return Markup("\n".join(f"| {' | '.join(line)} |" for line in lines))


def _cost(row: Row) -> str:
    return "not made here" if row.made_elsewhere else row.cost or ""


def _flips(row: Row) -> str:
    flips = row.micro and row.micro.flips
    return f"{flips.right_to_wrong} / {flips.wrong_to_right}" if flips else ""


def _perplexity(row: Row) -> str:
    """Only where it ranks the rows; a table of its own shows it in any case."""
    ranked = row.accuracy_macro or row.is_dense or overview.mean_grade(row)
    return "" if ranked else text.ratio(overview.perplexity_ratio(row))


def _grades(row: Row) -> str:
    """Only where they rank the rows, likewise."""
    change = None if row.accuracy_macro or row.is_dense else overview.mean_grade(row)
    return text.with_interval(change, signed=True)


def _speed(row: Row) -> str:
    if row.throughput is None:
        return ""
    if row.speed is None:
        return "failed"
    if row.is_dense:
        return text.times(1.0)
    if row.speed.ratio is None:
        return f"{text.rate(row.speed.output_tokens_per_second)} tokens/s"
    ends = Estimate(value=row.speed.ratio, low=row.speed.ratio_low, high=row.speed.ratio_high)
    return text.ratio(ends)


def _removed(row: Row) -> str:
    """What was reached, and what was asked for where that is another share."""
    if not row.sparsity_reached:
        return ""
    reached, asked = text.percent(row.sparsity_reached), text.percent(row.sparsity_requested)
    return reached if asked in (reached, text.MISSING) else f"{reached} (asked {asked})"


def _of(scope: str, name: str, *, signed: bool = False) -> Callable[[Row], str]:
    return lambda row: text.with_interval(getattr(getattr(row, scope), name, None), signed=signed)


_COLUMNS: Sequence[tuple[str, Callable[[Row], str]]] = (
    ("row", lambda row: text.markdown_text(row.label)),
    (
        "cost",
        lambda row: text.markdown_text(row.cost or "not made here" * bool(row.made_elsewhere)),
    ),
    ("accuracy %", lambda row: text.with_error(row.accuracy_macro) if row.accuracy_macro else ""),
    ("difference", _of("macro", "difference", signed=True)),
    ("verdict", lambda row: text.markdown_text((row.macro and row.macro.decision) or "")),
    ("stability %", _of("macro", "stability")),
    ("retention %", _of("macro", "retention")),
    ("agreement %", _of("macro", "agreement")),
    ("flips", _flips),
    ("above noise", _of("micro", "flips_above_noise", signed=True)),
    ("p", lambda row: text.p_value(row.micro.p_value) if row.micro else ""),
    ("grades", _grades),
    ("perplexity", _perplexity),
    ("token KL", lambda row: text.decimal(row.divergence.kl.value) if row.divergence else ""),
    ("speed", _speed),
    ("parameters", lambda row: text.count(row.parameters) if row.parameters else ""),
    ("bytes", lambda row: f"{text.count(row.bytes)}B" if row.bytes else ""),
    ("removed %", _removed),
    ("layers", lambda row: str(row.layers or "")),
    ("time", lambda row: text.duration(row.total_seconds) if row.seconds else ""),
)
"""Heading and cell."""
