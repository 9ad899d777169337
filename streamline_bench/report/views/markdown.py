"""``leaderboard.md``: the leaderboard as GitHub Markdown tables, from ``reports/templates``.

A template escapes every string that it prints; only numbers, which the filters write, and code stay
as they are.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from markupsafe import Markup

from streamline_bench.report import text
from streamline_bench.report.figures.pareto import bytes_tell_more
from streamline_bench.report.figures.sizes import EqualSize, at_equal_size, equal_note
from streamline_bench.report.leaderboard import Leaderboard
from streamline_bench.report.row import Row
from streamline_bench.report.views import overview
from streamline_bench.report.views.entries import by_size, runs_of, shown
from streamline_bench.report.views.guessing import (
    METHOD,
    beats_random,
    known_accuracy,
    known_places,
    level_of,
    one_answer,
)
from streamline_bench.report.views.headline import documents, headline
from streamline_bench.report.views.pivot import note, pivots, table
from streamline_bench.report.views.repeats import commands, literature, settings
from streamline_bench.report.views.setup import scaled_down, setup, tokens_seen
from streamline_bench.report.views.variance import note as variance_note
from streamline_bench.report.views.variance import variance_lines
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
        tables=_tables(board, rows),
        same_verdict=overview.same_verdict(rows),
        has_noise=overview.has_noise(board),
        read=next((row.divergence for row in runs if row.divergence), None),
        setup=setup(board),
        scaled_down=scaled_down(board),
        tokens_seen=tokens_seen,
        equal=[(table.quantity, _equal(table)) for table in at_equal_size(board, rows)],
        equal_note=equal_note(board, rows),
        guessing_note=METHOD if board.guessing else "",
        level_of=partial(level_of, board),
        one_answer=one_answer,
        documents=documents,
        variance=variance_lines(board),
        variance_note=variance_note(board),
        pivots=[(pivot.name, *table(pivot)) for pivot in pivots(board)],
        pivot_note=note(board),
        front_words=overview.FRONTS,
        front_cost=overview.front_cost,
        heat_map=overview.heat_map,
        literature=literature(rows),
        settings=settings(runs),
        commands=commands(overview.commands_by_stage(board.commands), board.rows),
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


def _tables(board: Leaderboard, rows: Sequence[Row]) -> list[tuple[str | None, Markup]]:
    """The ranking; of a board of several sizes a table for each, with the size in words."""
    sizes = by_size(rows)
    if len(sizes) < 2:
        return [(None, _leaderboard(board, rows, rows))]
    dense = [row for row in rows if row.is_dense]
    return [(size, _leaderboard(board, rows, [*dense, *same])) for size, same in sizes]


def _equal(table: EqualSize) -> Markup:
    """One line per recipe, one column per size."""
    write = table.quantity.write

    def cell(found: Estimate | None, place: int) -> str:
        if found is None:
            return text.MISSING
        written = " ".join(filter(None, [write(found.value), ends(found)]))
        return f"**{written}**" if found.value == table.best(place) else written

    def ends(found: Estimate) -> str:
        low, high = map(write, found.ends)
        return "" if found.low is None else f"[{low}, {high}]"

    lines = [
        ["recipe", *(f"{text.percent(size)} % removed" for size in table.sizes)],
        ["---", *["---:"] * len(table.sizes)],
        *(
            [text.markdown_text(one.label), *(cell(found, n) for n, found in enumerate(cells))]
            for one, cells in table.lines
        ),
    ]
    return _drawn(lines)


def _drawn(lines: Sequence[Sequence[str]]) -> Markup:
    return Markup("\n".join(f"| {' | '.join(line)} |" for line in lines))


def _leaderboard(board: Leaderboard, every_row: Sequence[Row], rows: Sequence[Row]) -> Markup:
    """One line per row; a column in which every cell of the board is empty is left out."""

    def rank(row: Row) -> str:
        found = board.shown_ranks.get(row.label)
        return f"{found.place} [{found.low}, {found.high}]" if found else ""

    def reference(row: Row) -> str:
        return text.markdown_text(board.other_reference(row) or "")

    places = known_places(board)

    def known(row: Row) -> str:
        mean, place = known_accuracy(board, row), places.get(row.label)
        written = text.with_error(mean) if mean else ""
        return f"{written} ({place[0]} of {place[1]})" if place else written

    def random(row: Row) -> str:
        return text.markdown_text(beats_random(board, row))

    first, *others = _COLUMNS
    every = [first, ("compared with", reference), ("rank", rank), *others]
    every[5:5] = [("on known tasks %", known), ("beats random", random)]
    needless = {
        "bytes": not bytes_tell_more(every_row),
        "verdict": overview.same_verdict(every_row) is not None,
        "above noise": not overview.has_noise(board),
    }
    columns = [
        (name, cell)
        for name, cell in every
        if not needless.get(name) and any(cell(row) for row in every_row)
    ]
    lines = [
        [name for name, _ in columns],
        ["---", *["---:"] * (len(columns) - 1)],
        *([cell(row) or text.MISSING for _, cell in columns] for row in rows),
    ]
    return _drawn(lines)


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


def _token_kl(row: Row) -> str:
    kl = row.divergence.kl if row.divergence else None
    return f"{text.decimal(kl.value)} {text.nats(kl)}".strip() if kl else ""


def _text_perplexity(row: Row) -> str:
    return text.significant(row.divergence.pruned_perplexity) if row.divergence else ""


def _kappa(row: Row) -> str:
    kappa = row.macro.answer_kappa if row.macro else None
    return "" if kappa is None else text.decimal(kappa, 2)


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
    ("κ of answers", _kappa),
    ("kept above chance %", _of("macro", "retention_above_chance")),
    ("retention %", _of("macro", "retention")),
    ("agreement %", _of("macro", "agreement")),
    ("flips", _flips),
    ("above noise", _of("micro", "flips_above_noise", signed=True)),
    ("p", lambda row: text.p_value(row.micro.p_value) if row.micro else ""),
    ("grades", _grades),
    ("perplexity", _perplexity),
    ("token KL", _token_kl),
    ("text's perplexity", _text_perplexity),
    ("speed", _speed),
    ("parameters", lambda row: text.count(row.parameters) if row.parameters else ""),
    ("bytes", lambda row: f"{text.count(row.bytes)}B" if row.bytes else ""),
    ("removed %", _removed),
    ("layers", lambda row: str(row.layers or "")),
    ("time", lambda row: text.duration(row.total_seconds) if row.seconds else ""),
)
"""Heading and cell."""
