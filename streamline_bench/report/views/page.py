"""``leaderboard.html``: one offline file from ``reports/templates``; autoescape does the escaping.

Style and script are inlined; a content security policy allows that one script by its hash, and no
request to anywhere.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeGuard

from markupsafe import Markup, escape

from streamline_bench.core.machine.environment import resource
from streamline_bench.report.figures.pareto import Axis, pareto, ticks
from streamline_bench.report.figures.similarity import matrix_svg, named_layers
from streamline_bench.report.leaderboard import CurvePoint, Leaderboard, Row, ScanResult
from streamline_bench.report.text import FILTERS, visible_text
from streamline_bench.report.views import overview
from streamline_bench.stability.comparison import Estimate, GroupComparison, Overall, TaskComparison


def to_html(board: Leaderboard) -> str:
    """Render the leaderboard as one self-contained page."""
    templates = resource("reports") / "templates"
    script = (templates / "leaderboard.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode("utf-8")).digest()).decode("ascii")
    rows = _rows(board)
    scored = [row for row in rows if row.failed is None]
    filters = {"pretty": _pretty, "breakable": _breakable, "ending": _ending, "shade": shade}
    return (
        overview.environment(_visible, FILTERS | filters)
        .get_template("leaderboard.html.j2")
        .render(
            board=board,
            rows=rows,
            scored=scored,
            compared=[row for row in rows if row.macro],
            measured=[row for row in scored if not row.is_dense],
            lines=_lines,
            perplexity_ratio=overview.perplexity_ratio,
            groups=Counter(row.cost for row in rows if not row.is_dense),
            has=_has(rows),
            throughput=next((row.throughput for row in rows if row.throughput), None),
            headline=overview.headline(board),
            pareto=pareto(rows),
            forest=forest(rows),
            heat=overview.heat_map(scored),
            metrics=_metrics(scored),
            scans=_scans(rows),
            curves=_curves(rows),
            literature=[row for row in rows if row.published],
            commands=overview.commands_by_stage(board.commands),
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
    """A row with its place on the page; ``bar`` is its accuracy ± one standard error."""

    index: int
    bar: Any = None

    @property
    def id(self) -> str:
        """Its anchor."""
        return f"row-{self.index}"


def _rows(board: Leaderboard) -> list[PageRow]:
    """Rows as ranked. They are valid already, so that nothing is validated again."""
    rows = overview.ranked(board.rows)
    ends = {
        index: _around(row.accuracy_macro) for index, row in enumerate(rows) if row.accuracy_macro
    }
    # Without accuracies there is no bar to place.
    axis = Axis.around([end for pair in ends.values() for end in pair] or [0.0], 0.0, 100.0)
    return [
        PageRow.model_construct(
            **dict(row),
            index=index,
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
        "retention": any(macro.retention for macro in macros),
        "choices": any(macro.choice_kl for macro in macros),
        "calibration": any(macro.pruned_calibration_error is not None for macro in macros),
        "throughput": any(row.throughput for row in rows),
        "perplexities": any(row.perplexities for row in rows),
        "divergence": any(row.divergence for row in rows),
        "generations": any(row.generations for row in rows),
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
    ends = [end for _, macro in found for end in _ends(macro.difference)]
    axis = Axis.around([*marks, *ends], 0.0, 100.0)
    return Forest(
        [
            (row, macro, Bar.of(macro.difference, _ends(macro.difference), axis))
            for row, macro in sorted(found, key=lambda item: -item[1].difference.value)
        ],
        zero=axis.place(0.0),
        margin=None if margin is None else axis.place(-margin),
        ticks=[(axis.place(value), value) for value in ticks(axis.low, axis.high)],
    )


def _ends(change: Estimate) -> tuple[float, float]:
    if change.low is None or change.high is None:
        return change.value, change.value
    return change.low, change.high


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


# Losses -------------------------------------------------------------------------------------------

_POINTS = 120
"""Points of a curve's line: more could not be seen in its width."""
_WIDTH, _HEIGHT = 460.0, 220.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 52.0, 12.0, 12.0, 32.0
_Line = list[tuple[int, float]]


def curve_svg(curve: Sequence[CurvePoint], training: str = "replacement") -> Markup:
    """Training and validation loss over steps, logarithmic where the losses allow it.

    Empty without a finite loss.
    """
    lines: dict[str, _Line] = {
        "train_loss": [(p.step, p.train_loss) for p in curve if _is_drawn(p.train_loss)],
        "val_loss": [(p.step, p.val_loss) for p in curve if _is_drawn(p.val_loss)],
    }
    values = [value for line in lines.values() for _, value in line]
    if not values:
        return Markup("")
    logarithmic = min(values) > 0
    scale = math.log10 if logarithmic else float
    low, high = scale(min(values)), scale(max(values))
    last = max(point.step for point in curve) or 1

    def place(step: float, value: float) -> tuple[str, str]:
        x = _LEFT + (step / last) * (_WIDTH - _LEFT - _RIGHT)
        share = (scale(value) - low) / (high - low) if high > low else 0.5
        return f"{x:.1f}", f"{_HEIGHT - _BOTTOM - share * (_HEIGHT - _TOP - _BOTTOM):.1f}"

    parts = [
        f'<svg class="curve" viewBox="0 0 {_WIDTH:.0f} {_HEIGHT:.0f}" role="img" '
        f'aria-label="{_curve_words(lines, last, training)}">'
    ]
    parts += _curve_axes(min(values), max(values), last, "log" if logarithmic else "")
    for name, line in lines.items():
        shown = _thinned(line)
        path = " ".join(",".join(place(step, value)) for step, value in shown)
        parts.append(f'<polyline class="{name}" points="{path}"/>')
        for step, value in shown if name == "val_loss" else ():
            x, y = place(step, value)
            parts.append(
                f'<circle class="{name}" cx="{x}" cy="{y}" r="2.5"><title>step {step}: '
                f"{value:.5g}</title></circle>"
            )
    return Markup("".join([*parts, "</svg>"]))


def _is_drawn(loss: float | None) -> TypeGuard[float]:
    return loss is not None and math.isfinite(loss)


def _curve_words(lines: Mapping[str, _Line], last: int, training: str) -> str:
    """First, best and last loss, of the validation where it was measured."""
    name, kind = ("val_loss", "validation") if lines["val_loss"] else ("train_loss", "training")
    line = lines[name]
    best = min(line, key=lambda point: point[1])
    words = [
        f"{which} {value:.4g} at step {step}"
        for which, (step, value) in (("first", line[0]), ("best", best), ("last", line[-1]))
    ]
    return f"Training of the {training}, {last} steps; {kind} loss: {', '.join(words)}"


def _thinned(line: _Line) -> _Line:
    """At most some hundred points, among them the first and the last."""
    step = max(1, math.ceil(len(line) / _POINTS))
    return [point for index, point in enumerate(line) if index % step == 0 or point is line[-1]]


def _curve_axes(low: float, high: float, last: int, kind: str) -> list[str]:
    bottom, right = _HEIGHT - _BOTTOM, _WIDTH - _RIGHT
    label = f"step{', loss on a log scale' if kind else ''}"
    return [
        f'<path class="axis" d="M{_LEFT} {_TOP}V{bottom}H{right}"/>',
        f'<text x="{_LEFT - 6}" y="{_TOP + 8}" class="end">{high:.3g}</text>',
        f'<text x="{_LEFT - 6}" y="{bottom}" class="end">{low:.3g}</text>',
        f'<text x="{_LEFT}" y="{bottom + 16}">0</text>',
        f'<text x="{right}" y="{bottom + 16}" class="end">{last}</text>',
        f'<text x="{(_LEFT + right) / 2}" y="{bottom + 24}" class="mid">{label}</text>',
    ]
