"""Curves over sizes: one line per recipe that was run at several sizes, with bands.

What lies between two of a row's own points is interpolated; nothing beyond them is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from markupsafe import Markup, escape

from streamline_bench.report.figures.pareto import MEASURES, Axis, ticks
from streamline_bench.report.leaderboard import Leaderboard
from streamline_bench.report.row import Row
from streamline_bench.report.text import decimal, percent, visible_text
from streamline_bench.stability.estimate import Estimate

_WIDTH, _HEIGHT = 460.0, 260.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 46.0, 12.0, 20.0, 38.0
COLOURS = 8
"""Lines that have a colour of their own; further ones repeat them with dashes."""


@dataclass(frozen=True)
class Series:
    """A recipe at several sizes: its rows from the largest to the smallest model."""

    label: str
    index: int
    rows: tuple[Row, ...]


def series_of(rows: Sequence[Row]) -> list[Series]:
    """The recipes that were run at two sizes or more, in the order of the rows."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        if row.group and row.axes.keys() & {"sparsity", "n_layers"} and row.accuracy_macro:
            others = [f"{k} {v}" for k, v in row.axes.items() if k == "model"]
            found.setdefault(", ".join([row.group, *others]), []).append(row)
    sized = {
        label: sorted(same, key=lambda row: -(row.parameters or 0))
        for label, same in found.items()
        if len({row.parameters for row in same}) > 1 and all(row.parameters for row in same)
    }
    return [Series(label, n, tuple(same)) for n, (label, same) in enumerate(sized.items())]


def _accuracy(row: Row) -> Estimate | None:
    found = row.accuracy_macro
    if found is None or found.low is not None or found.standard_error is None:
        return found
    return found.model_copy(
        update={"low": found.value - found.standard_error,
                "high": found.value + found.standard_error}
    )  # fmt: skip


_UP: dict[str, tuple[str, Callable[[Row], Estimate | None], Callable[[float], str]]] = {
    "accuracy": ("accuracy, %", _accuracy, lambda value: percent(value, 0)),
    "stability": (
        "stability, %", lambda row: row.macro.stability if row.macro else None,
        lambda value: percent(value, 0),
    ),
    "token_kl": (
        "token KL, nats", lambda row: row.divergence.kl if row.divergence else None,
        lambda value: decimal(value, 2),
    ),
}  # fmt: skip


@dataclass(frozen=True)
class SizeCurve:
    """One picture, what is up and what is across."""

    svg: Markup
    up: str
    across: str


def size_curves(board: Leaderboard, rows: Sequence[Row]) -> list[SizeCurve]:
    """Accuracy, stability and token KL against parameters removed, bytes and measured speed."""
    series, whole = series_of(rows), board.dense_row.parameters
    if not series or not whole:
        return []
    across: dict[str, tuple[str, Callable[[Row], float | None], Callable[[float], str]]] = {
        "parameters": (
            "parameters removed, %",
            lambda row: 1 - row.parameters / whole if row.parameters else None,
            lambda value: percent(value, 0),
        ),
        "bytes": ("bytes of the weights", MEASURES["bytes"].x, MEASURES["bytes"].written),
        "speed": (
            "tokens per second, \N{MULTIPLICATION SIGN} reference",
            MEASURES["ratio"].x,
            MEASURES["ratio"].written,
        ),
    }
    found = []
    for up_name, up_of, up_written in _UP.values():
        for name, x_of, written in across.values():
            lines = [
                (one, points) for one in series if len(points := _points(one, x_of, up_of)) > 1
            ]
            if lines:
                svg = line_chart(lines, (name, written), (up_name, up_written))
                found.append(SizeCurve(svg, up_name, name))
    return found


_Line = list[tuple[float, Estimate]]


def _points(
    series: Series, across: Callable[[Row], float | None], up: Callable[[Row], Estimate | None]
) -> _Line:
    found = [(across(row), up(row)) for row in series.rows]
    return sorted(((x, y) for x, y in found if x is not None and y is not None),
                  key=lambda point: point[0])  # fmt: skip


def line_chart(
    lines: Sequence[tuple[Series, _Line]],
    across: tuple[str, Callable[[float], str]],
    up: tuple[str, Callable[[float], str]],
) -> Markup:
    """Draw a line with its band for each series; names and how values are written, per axis."""
    bottom, right = _HEIGHT - _BOTTOM, _WIDTH - _RIGHT
    horizontal = Axis.around([x for _, line in lines for x, _ in line], _LEFT, right)
    ends = [end for _, line in lines for _, y in line for end in y.ends]
    vertical = Axis.around(ends, bottom, _TOP)
    names = escape(", ".join(visible_text(one.label) for one, _ in lines))
    parts = [
        f'<svg class="sizes" viewBox="0 0 {_WIDTH:.0f} {_HEIGHT:.0f}" role="img" '
        f'aria-label="{up[0]} against {across[0]}: {names}">'
    ]
    for value in ticks(vertical.low, vertical.high, 5):
        y = vertical.place(value)
        parts.append(f'<path class="grid" d="M{_LEFT} {y}H{right}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" class="end">{up[1](value)}</text>')
    for value in ticks(horizontal.low, horizontal.high, 5):
        x = horizontal.place(value)
        parts.append(f'<path class="axis" d="M{x} {bottom}v4"/>')
        parts.append(f'<text x="{x}" y="{bottom + 16}" class="mid">{across[1](value)}</text>')
    parts.append(f'<path class="axis" d="M{_LEFT} {bottom}H{right}"/>')
    parts.append(f'<text x="{right}" y="{_HEIGHT - 5}" class="end">{across[0]}</text>')
    parts.append(f'<text x="{_LEFT}" y="12">{up[0]}</text>')
    for one, line in lines:
        parts += _drawn(one, line, horizontal, vertical)
    return Markup("".join([*parts, "</svg>"]))


def _drawn(series: Series, line: _Line, across: Axis, up: Axis) -> list[str]:
    places = [(across.place(x), up.place(y.value)) for x, y in line]
    above = [(across.place(x), up.place(y.ends[1])) for x, y in line]
    below = [(across.place(x), up.place(y.ends[0])) for x, y in reversed(line)]
    band = "M" + "L".join(f"{x} {y}" for x, y in [*above, *below]) + "Z"
    path = "M" + "L".join(f"{x} {y}" for x, y in places)
    dashed = " dashed" if series.index >= COLOURS else ""
    label = escape(visible_text(series.label))
    return [
        f'<g class="series s{series.index % COLOURS}{dashed}"><title>{label}</title>',
        f'<path class="band" d="{band}"/><path class="line" d="{path}"/>',
        *(f'<circle cx="{x}" cy="{y}" r="3"/>' for x, y in places),
        "</g>",
    ]


@dataclass(frozen=True)
class EqualSize:
    """Recipes at the same sizes.

    Attributes:
        sizes: shares of the parameters that are removed.
        lines: of every series, the accuracy at each size, interpolated between its own points
            (with the ends of their intervals); None outside them.
    """

    sizes: list[float]
    lines: list[tuple[Series, list[Estimate | None]]]


def at_equal_size(rows: Sequence[Row]) -> EqualSize | None:
    """Accuracy of every series at the sizes that were asked for; None without two series."""
    series = series_of(rows)
    whole = next((row.parameters for row in rows if row.is_dense), None)
    asked = sorted({
        float(row.axes["sparsity"]) for one in series for row in one.rows if "sparsity" in row.axes
    })  # fmt: skip
    if len(series) < 2 or not whole or not asked:
        return None
    lines = []
    for one in series:
        points = _points(one, lambda row: 1 - (row.parameters or whole) / whole, _accuracy)
        lines.append((one, [interpolated(points, size) for size in asked]))
    sizes = [n for n, _ in enumerate(asked) if sum(line[n] is not None for _, line in lines) > 1]
    if not sizes:
        return None
    return EqualSize(
        [asked[n] for n in sizes], [(one, [line[n] for n in sizes]) for one, line in lines]
    )


def interpolated(points: Sequence[tuple[float, Estimate]], at: float) -> Estimate | None:
    """The estimate at ``at``, on the straight line between its neighbours in ``points``.

    The interval lies between theirs as the value does: for two independent points that is wide.
    None outside the points.
    """
    for (x, left), (y, right) in pairwise(points):
        if x <= at <= y:
            share = (at - x) / (y - x) if y > x else 0.0
            value, low, high = (
                (1 - share) * a + share * b
                for a, b in zip((left.value, *left.ends), (right.value, *right.ends), strict=True)
            )
            return Estimate(value=value, low=low, high=high, method="interpolated")
    return None
