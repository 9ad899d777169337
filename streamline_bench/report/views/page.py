"""``leaderboard.html``: one offline file from ``reports/templates``; autoescape does the escaping.

Style and script are inlined; a content security policy allows that one script by its hash, and no
request to anywhere.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from markupsafe import Markup, escape

from streamline_bench.core.machine.environment import resource
from streamline_bench.report.figures.pareto import Axis, bytes_tell_more, ticks, tradeoffs
from streamline_bench.report.figures.serving import kept_objectives, serving_curves
from streamline_bench.report.figures.similarity import matrix_svg, named_layers
from streamline_bench.report.figures.sizes import at_equal_size, chance_of, equal_note, size_curves
from streamline_bench.report.figures.training import curve_svg
from streamline_bench.report.leaderboard import Leaderboard
from streamline_bench.report.places import Rank
from streamline_bench.report.row import Row, ScanResult
from streamline_bench.report.text import FILTERS, visible_text
from streamline_bench.report.views import guessing, overview
from streamline_bench.report.views.citations import citations
from streamline_bench.report.views.entries import by_size, shown
from streamline_bench.report.views.headline import documents, headline
from streamline_bench.report.views.pivot import gain_text, note, pivots
from streamline_bench.report.views.repeats import commands, literature
from streamline_bench.report.views.setup import scaled_down, setup, tokens_seen
from streamline_bench.report.views.variance import note as variance_note
from streamline_bench.report.views.variance import variance_lines
from streamline_bench.stability.comparison import GroupComparison, Overall, TaskComparison
from streamline_bench.stability.estimate import Estimate


def to_html(board: Leaderboard) -> str:
    """Render the leaderboard as one self-contained page."""
    templates = resource("reports") / "templates"
    script = (templates / "leaderboard.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode("utf-8")).digest()).decode("ascii")
    rows = _rows(board)
    runs = _runs(board, rows)
    scored = [row for row in rows if row.failed is None]
    filters = {
        "pretty": _pretty,
        "breakable": _breakable,
        "ending": _ending,
        "shade": shade,
        "gain": gain_text,
    }
    return (
        overview.environment(_visible, FILTERS | filters)
        .get_template("leaderboard.html.j2")
        .render(
            board=board,
            rows=rows,
            runs=runs,
            scored=scored,
            compared=[row for row in runs if row.macro],
            measured=[row for row in runs if row.failed is None and not row.is_dense],
            lines=_lines,
            perplexity_ratio=overview.perplexity_ratio,
            mean_grade=overview.mean_grade,
            groups=Counter(row.cost for row in rows if not row.is_dense),
            has=_has(runs),
            same_verdict=overview.same_verdict(rows),
            has_noise=overview.has_noise(board),
            throughput=next((row.throughput for row in rows if row.throughput), None),
            headline=headline(board),
            known=guessing.known_tasks(board),
            known_accuracy=partial(guessing.known_accuracy, board),
            known_places=guessing.known_places(board),
            beats_random=partial(guessing.beats_random, board),
            level_of=partial(guessing.level_of, board),
            one_answer=guessing.one_answer,
            guessing_note=guessing.METHOD if board.guessing else "",
            tradeoffs=tradeoffs(rows),
            bytes_tell_more=bytes_tell_more(rows),
            sizes=size_curves(board, rows),
            chance=chance_of(rows),
            sizes_asked=[size for size, _ in by_size(scored)],
            serving=serving_curves(rows),
            kept=kept_objectives(rows),
            equal=at_equal_size(board, rows),
            equal_note=equal_note(board, rows),
            forest=forest(rows),
            heat=overview.heat_map(scored),
            metrics=_metrics(scored),
            setup=setup(board),
            scaled_down=scaled_down(board),
            tokens_seen=tokens_seen,
            scans=_scans(runs),
            curves=_curves(runs),
            literature=literature(rows),
            citations=citations(board),
            documents=documents,
            variance=variance_lines(board),
            variance_note=variance_note(board),
            pivots=pivots(board),
            pivot_note=note(board),
            front_words=overview.FRONTS,
            front_cost=overview.front_cost,
            places={row.label: row.index for row in rows},
            commands=commands(overview.commands_by_stage(board.commands), board.rows),
            level=board.level,
            style=Markup((templates / "leaderboard.css").read_text(encoding="utf-8")),
            script=Markup(script),
            script_hash=digest,
        )
    )


def _visible(value: Any) -> Any:
    """No control characters or direction overrides in anything the template prints."""
    return (
        visible_text(value) if isinstance(value, str) and not isinstance(value, Markup) else value
    )


def _pretty(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False, sort_keys=True, default=str)


def _breakable(name: str) -> Markup:
    """Escaped; a long name may break after an underscore, a slash or a hyphen."""
    return Markup(re.sub(r"([_/-])", r"\1<wbr>", str(escape(visible_text(name)))))


def _ending(text: str, size: int = 120) -> str:
    """The last words of a prompt, where its question is."""
    line = " ".join(text.split())
    if len(line) <= size:
        return line
    kept = line[-size:]
    return f"\N{HORIZONTAL ELLIPSIS} {kept[kept.find(' ') + 1 :]}"


# Rows ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bar:
    """An interval on a track, in percent of its width."""

    at: float
    low: float
    width: float

    @classmethod
    def of(cls, estimate: Estimate, ends: tuple[float, float], axis: Axis) -> Bar:
        """The bar of an estimate between two ends of its own."""
        low, high = map(axis.place, ends)
        return cls(axis.place(estimate.value), low, round(high - low, 2))


class PageRow(Row):
    """A row with its place on the page.

    Attributes:
        index: its number in the ranking; a run that is folded has that of its entry.
        id: its anchor.
        bar: its accuracy ± one standard error.
        place: its rank, where the rows were ranked.
    """

    index: int
    id: str
    bar: Any = None
    place: Rank | None = None


def _runs(board: Leaderboard, rows: Sequence[PageRow]) -> list[PageRow]:
    """Every row that was run, in the order of the entries that they are shown as."""
    single = board.shown_as
    folds = {fold.label: fold.members for fold in board.folded}
    found: dict[str, PageRow] = {}
    for row in rows:
        members = [single[label] for label in folds.get(row.label, ()) if label in single]
        for number, one in enumerate(members):
            anchor = f"{row.id}-{number}" if number else row.id
            made = PageRow.model_construct(**dict(one), index=row.index, id=anchor)
            found.setdefault(one.label, made)
        if not members:
            found[row.id] = row
    return list(found.values())


def _rows(board: Leaderboard) -> list[PageRow]:
    """Entries as ranked. They are valid already, so that nothing is validated again."""
    rows = overview.ranked(shown(board))
    ends = {
        index: _around(row.accuracy_macro) for index, row in enumerate(rows) if row.accuracy_macro
    }
    # Without accuracies there is no bar to place.
    axis = Axis.around([end for pair in ends.values() for end in pair] or [0.0], 0.0, 100.0)
    return [
        PageRow.model_construct(
            **dict(row),
            index=index,
            id=f"row-{index}",
            place=board.shown_ranks.get(row.label),
            bar=Bar.of(row.accuracy_macro, ends[index], axis) if row.accuracy_macro else None,
        )
        for index, row in enumerate(rows)
    ]


def _around(estimate: Estimate) -> tuple[float, float]:
    error = estimate.standard_error or 0.0
    return estimate.value - error, estimate.value + error


def _has(rows: Sequence[Row]) -> dict[str, bool]:
    """Which optional columns have something to show."""
    macros = [row.macro for row in rows if row.macro]
    return {
        "accuracy": any(row.accuracy_macro for row in rows),
        "decision": any(macro.decision for macro in macros),
        "verdict": bool(macros) and overview.same_verdict(rows) is None,
        "retention": any(macro.retention for macro in macros),
        "above_chance": any(macro.retention_above_chance for macro in macros),
        "choices": any(macro.choice_kl for macro in macros),
        "calibration": any(macro.pruned_calibration_error is not None for macro in macros),
        "throughput": any(row.throughput for row in rows),
        "perplexities": any(row.perplexities for row in rows),
        "grades": any(score.comparison for row in rows for score in row.grades),
        "grade_change": any(overview.mean_grade(row) for row in rows if not row.is_dense),
        "divergence": any(row.divergence for row in rows),
        "generations": any(row.generations for row in rows),
        "degeneration": any(found.empty for row in rows for found in row.generations),
        "tokens": any(found.tokens for row in rows for found in row.generations),
        "solved": any(row.solved for row in rows),
        "formats": any(row.formats for row in rows),
        "ours": any(item.ours for row in rows for item in row.published),
    }


# Tasks --------------------------------------------------------------------------------------------


def _lines(row: Row) -> list[tuple[str, str | None, TaskComparison | GroupComparison]]:
    """Name, what it is if not a task's main filter, and comparison: of every task, every group."""
    tasks = [
        (task.task, None if task.main else task.filter, task.comparison)
        for task in row.tasks
        if task.comparison
    ]
    groups = [(group.group, f"{len(group.tasks)} tasks together", group) for group in row.groups]
    return [*tasks, *groups]


def _metrics(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """Every (task, metric) without verdicts, in the order in which rows name them."""
    return list(
        dict.fromkeys(
            (task, name)
            for row in rows
            for task, metrics in row.other_metrics.items()
            for name in metrics
        )
    )


def shade(value: float) -> float:
    """Strength of a cell's colour, 0 to 1; at half the scale a model of two choices is guessing."""
    return round(min(1.0, max(0.0, value / 0.5)), 3)


# Figures ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Forest:
    """Every difference on one scale, the largest first; places in percent of the width."""

    lines: list[tuple[Row, Overall, Bar]]
    zero: float
    margin: float | None
    ticks: list[tuple[float, float]]


def forest(rows: Sequence[Row]) -> Forest | None:
    """Place the differences, their intervals, zero and the margin; None if no row is compared."""
    found = [(row, row.macro) for row in rows if row.macro]
    if not found:
        return None
    margin = found[0][1].margin
    marks = [0.0] if margin is None else [0.0, -margin]
    ends = [end for _, macro in found for end in macro.difference.ends]
    axis = Axis.around([*marks, *ends], 0.0, 100.0)
    return Forest(
        [
            (row, macro, Bar.of(macro.difference, macro.difference.ends, axis))
            for row, macro in sorted(found, key=lambda item: -item[1].difference.value)
        ],
        zero=axis.place(0.0),
        margin=None if margin is None else axis.place(-margin),
        ticks=[(axis.place(value), value) for value in ticks(axis.low, axis.high)],
    )


@dataclass(frozen=True)
class Figure:
    """A picture with the rows that share it and the words below it."""

    svg: Markup
    rows: list[PageRow]
    words: str
    notes: list[str] = field(default_factory=list)


def _scans(rows: Sequence[PageRow]) -> list[Figure]:
    """Each matrix and block once, with the rows that share it."""
    grouped: list[tuple[ScanResult, list[PageRow]]] = []
    for row in rows:
        if row.scan is None:
            continue
        theirs = next((found for scan, found in grouped if scan == row.scan), None)
        if theirs is None:
            grouped.append((row.scan, [row]))
        else:
            theirs.append(row)
    return [
        Figure(
            matrix_svg(scan),
            found,
            ", ".join(filter(None, [named_layers(scan.removed), f"{scan.num_tokens:,} tokens"])),
        )
        for scan, found in grouped
    ]


def _curves(rows: Sequence[PageRow]) -> list[Figure]:
    """Every training of every row, with what its curve leaves out."""
    return [
        Figure(
            curve_svg(curve, training),
            [row],
            training,
            [note for note in row.curve_notes if note.startswith(training)],
        )
        for row in rows
        for training, curve in (("replacement", row.curve), ("recovery", row.recovery_curve))
        if curve
    ]
