"""Pictures of lines with bands: one line per recipe or row, its name at its end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from streamline_bench.report.figures.pareto import Axis, root, root_ticks, ticks
from streamline_bench.report.row import Row
from streamline_bench.report.text import visible_text
from streamline_bench.stability.estimate import Estimate

_WIDTH, _HEIGHT = 640.0, 380.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 46.0, 12.0, 20.0, 38.0
_NAMES = 164.0
"""Room for the names at the right."""
_LETTERS = 26
"""Of a name; longer ones are cut."""
_APART = 13.0
"""From one name down to the next."""
COLOURS = 8
"""Lines that have a colour of their own; further ones repeat them with dashes."""
FEW = 4
"""Up to so many lines have strong bands."""

Line = list[tuple[float, Estimate]]
Written = tuple[str, Callable[[float], str]]
"""Name of an axis, and how its values are written."""


@dataclass(frozen=True)
class Series:
    """What a line is of: a recipe at several sizes, from the largest model on; or one row."""

    label: str
    index: int
    rows: tuple[Row, ...]


def line_chart(
    lines: Sequence[tuple[Series, Line]], across: Written, up: Written, *, by_root: bool = False
) -> Markup:
    """Draw a line with its band for each series; ``by_root``: what is up by its square root."""
    bottom, right = _HEIGHT - _BOTTOM, _WIDTH - _RIGHT - _NAMES
    horizontal = Axis.around([x for _, line in lines for x, _ in line], _LEFT, right)
    ends = [end for _, line in lines for _, y in line for end in y.ends]
    largest = max(ends)
    if by_root and largest > 0:
        vertical = Axis.around([0.0, *ends], bottom, _TOP, by=root)
        marks = root_ticks(largest)
    else:
        vertical = Axis.around(ends, bottom, _TOP)
        marks = ticks(vertical.low, vertical.high, 6)
    names = escape(", ".join(visible_text(one.label) for one, _ in lines))
    parts = [
        f'<svg class="sizes{" many" if len(lines) > FEW else ""}" '
        f'viewBox="0 0 {_WIDTH:.0f} {_HEIGHT:.0f}" role="img" '
        f'aria-label="{up[0]} against {across[0]}: {names}">'
    ]
    for value in marks:
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
    at = spread([vertical.place(line[-1][1].value) for _, line in lines], _APART, _TOP, bottom)
    for (one, line), name_at in zip(lines, at, strict=True):
        parts += _drawn(one, line, horizontal, vertical, (right + 10, name_at))
    return Markup("".join([*parts, "</svg>"]))


def _drawn(
    series: Series, line: Line, across: Axis, up: Axis, name_at: tuple[float, float]
) -> list[str]:
    places = [(across.place(x), up.place(y.value)) for x, y in line]
    above = [(across.place(x), up.place(y.ends[1])) for x, y in line]
    below = [(across.place(x), up.place(y.ends[0])) for x, y in reversed(line)]
    band = "M" + "L".join(f"{x} {y}" for x, y in [*above, *below]) + "Z"
    path = "M" + "L".join(f"{x} {y}" for x, y in places)
    dashed = " dashed" if series.index >= COLOURS else ""
    label = visible_text(series.label)
    name = label if len(label) <= _LETTERS else f"{label[: _LETTERS - 1]}\u2026"
    (x, y), (left, middle) = places[-1], name_at
    return [
        f'<g class="series s{series.index % COLOURS}{dashed}"><title>{escape(label)}</title>',
        f'<path class="band" d="{band}"/><path class="line" d="{path}"/>',
        *(f'<circle cx="{x}" cy="{y}" r="3"/>' for x, y in places),
        f'<path class="leader" d="M{x} {y}L{left - 2} {middle:.1f}"/>',
        f'<text class="series-name" x="{left}" y="{middle + 4:.1f}">{escape(name)}</text>',
        "</g>",
    ]


def spread(places: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Places in the same order, at least ``gap`` apart between ``low`` and ``high``.

    Where so many do not fit, they are equally far apart.
    """
    gap = min(gap, (high - low) / max(1, len(places) - 1))
    order = sorted(range(len(places)), key=lambda index: places[index])
    found = [0.0] * len(places)
    least = low
    for index in order:
        found[index] = max(places[index], least)
        least = found[index] + gap
    most = high
    for index in reversed(order):
        found[index] = min(found[index], most)
        most = found[index] - gap
    return found
