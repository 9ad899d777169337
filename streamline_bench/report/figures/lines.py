"""Pictures of lines with bands: one line per recipe or row, its name at its end.

The first have a colour and a band each; the others are grey, without bands.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from markupsafe import Markup, escape

from streamline_bench.report.figures.labels import Box, Place, labels
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
COLOURS = 6
"""Lines that have a colour of their own; further ones are grey."""
_AT_THE_EDGE = 24.0
"""A line that ends at most so far before the longest has its name beside the picture."""

Line = list[tuple[float, Estimate]]
Written = tuple[str, Callable[[float], str]]
"""Name of an axis, and how its values are written."""
Level = tuple[float, str]
"""A height with what it stands for, such as that of guessing."""


@dataclass(frozen=True)
class Series:
    """What a line is of: a recipe at several sizes, from the largest model on; or one row.

    ``index`` decides on its colour; from :data:`COLOURS` on it is grey.
    """

    label: str
    index: int
    rows: tuple[Row, ...]

    @property
    def grey(self) -> bool:
        """Whether it is one of those in the background."""
        return self.index >= COLOURS


@dataclass(frozen=True)
class _Frame:
    """The axes of a picture."""

    across: Axis
    up: Axis

    @property
    def right(self) -> float:
        return self.across.end

    def places(self, line: Line) -> list[tuple[float, float]]:
        """The points of a line in the picture."""
        return [(self.across.place(x), self.up.place(y.value)) for x, y in line]


def line_chart(
    lines: Sequence[tuple[Series, Line]], across: Written, up: Written, *,
    by_root: bool = False, level: Level | None = None,
) -> Markup:  # fmt: skip
    """Draw a line for each series, with its band where it has a colour.

    Args:
        by_root: what is up by its square root.
        level: also draw this height, dashed.
    """
    bottom, right = _HEIGHT - _BOTTOM, _WIDTH - _RIGHT - _NAMES
    horizontal = Axis.around([x for _, line in lines for x, _ in line], _LEFT, right)
    drawn = [y for one, line in lines for _, y in line if not one.grey]
    ends = [y.value for _, line in lines for _, y in line] + [end for y in drawn for end in y.ends]
    ends += [level[0]] if level else []
    if by_root and max(ends) > 0:
        frame = _Frame(horizontal, Axis.around([0.0, *ends], bottom, _TOP, by=root))
        marks = root_ticks(max(ends))
    else:
        frame = _Frame(horizontal, Axis.around(ends, bottom, _TOP))
        marks = ticks(frame.up.low, frame.up.high, 6)
    names = escape(", ".join(visible_text(one.label) for one, _ in lines))
    parts = [
        f'<svg class="sizes" viewBox="0 0 {_WIDTH:.0f} {_HEIGHT:.0f}" role="img" '
        f'aria-label="{up[0]} against {across[0]}: {names}">',
        *_axes(frame, across, up, marks),
        *(_level(frame, *level) if level else ()),
    ]
    written = _names(lines, frame)
    for one, line in sorted(lines, key=lambda each: not each[0].grey):  # grey lies below
        parts += _drawn(one, line, frame, written.get(one.index))
    return Markup("".join([*parts, "</svg>"]))


def _axes(frame: _Frame, across: Written, up: Written, marks: Sequence[float]) -> list[str]:
    bottom, right, parts = _HEIGHT - _BOTTOM, frame.right, []
    for value in marks:
        y = frame.up.place(value)
        parts.append(f'<path class="grid" d="M{_LEFT} {y}H{right}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" class="end">{up[1](value)}</text>')
    for value in ticks(frame.across.low, frame.across.high, 5):
        x = frame.across.place(value)
        parts.append(f'<path class="axis" d="M{x} {bottom}v4"/>')
        parts.append(f'<text x="{x}" y="{bottom + 16}" class="mid">{across[1](value)}</text>')
    parts.append(f'<path class="axis" d="M{_LEFT} {bottom}H{right}"/>')
    parts.append(f'<text x="{right}" y="{_HEIGHT - 5}" class="end">{across[0]}</text>')
    parts.append(f'<text x="{_LEFT}" y="12">{up[0]}</text>')
    return parts


def _level(frame: _Frame, height: float, words: str) -> list[str]:
    y = frame.up.place(height)
    return [
        f'<path class="level" d="M{_LEFT} {y}H{frame.right}"/>',
        f'<text class="level-name" x="{_LEFT + 5}" y="{y - 4:.1f}">{escape(words)}</text>',
    ]


def _drawn(series: Series, line: Line, frame: _Frame, name: Markup | None) -> list[str]:
    places = frame.places(line)
    path = "M" + "L".join(f"{x} {y}" for x, y in places)
    colour = "rest" if series.grey else f"s{series.index}"
    parts = [f'<g class="series {colour}"><title>{escape(visible_text(series.label))}</title>']
    if not series.grey:
        above = [(frame.across.place(x), frame.up.place(y.ends[1])) for x, y in line]
        below = [(frame.across.place(x), frame.up.place(y.ends[0])) for x, y in reversed(line)]
        band = "M" + "L".join(f"{x} {y}" for x, y in [*above, *below]) + "Z"
        parts.append(f'<path class="band" d="{band}"/>')
    radius = 1.5 if series.grey else 3
    parts.append(f'<path class="line" d="{path}"/>')
    parts += [f'<circle cx="{x}" cy="{y}" r="{radius}"/>' for x, y in places]
    return [*parts, name or Markup(""), "</g>"]


def _names(lines: Sequence[tuple[Series, Line]], frame: _Frame) -> dict[int, Markup]:
    """The name of each line by its index: beside the picture, or where the line ends before.

    Of those in grey, the ones that find no room have none.
    """
    ends = {one.index: frame.places(line)[-1] for one, line in lines}
    last = max(x for x, _ in ends.values())
    edge = [(one, line) for one, line in lines if ends[one.index][0] >= last - _AT_THE_EDGE]
    if len(edge) * _APART > _HEIGHT - _BOTTOM - _TOP:
        edge = [(one, line) for one, line in edge if not one.grey]
    heights = spread([ends[one.index][1] for one, _ in edge], _APART, _TOP, _HEIGHT - _BOTTOM)
    found = {
        one.index: _beside(one, ends[one.index], (frame.right + 10, height))
        for (one, _), height in zip(edge, heights, strict=True)
    }
    return found | _inside([each for each in lines if each[0].index not in found], lines, frame)


def _beside(series: Series, end: tuple[float, float], at: tuple[float, float]) -> Markup:
    (x, y), (left, middle) = end, at
    return Markup(
        f'<path class="leader" d="M{x} {y}L{left - 2} {middle:.1f}"/>'
        f'<text class="series-name" x="{left}" y="{middle + 4:.1f}">{escape(_short(series))}</text>'
    )


def _inside(
    named: Sequence[tuple[Series, Line]], lines: Sequence[tuple[Series, Line]], frame: _Frame
) -> dict[int, Markup]:
    """Names next to the ends of lines, where they cover no line."""
    taken = [box for one, line in lines if not one.grey for box in _boxes(frame.places(line))]
    places = []
    for one, line in sorted(named, key=lambda each: each[0].grey):
        x, y = frame.places(line)[-1]
        places.append(Place(one.index, _short(one), x, y, always=not one.grey))
    found = labels(places, taken, Box(_LEFT, _TOP, frame.right, _HEIGHT - _BOTTOM))
    return {label.rows[0]: label.svg for label in found if len(label.rows) == 1}


def _boxes(places: Sequence[tuple[float, float]]) -> list[Box]:
    """What a line covers, as small boxes along it."""
    found = []
    for (x, y), (to_x, to_y) in pairwise(places):
        steps = max(1, int(max(abs(to_x - x), abs(to_y - y)) / 8))
        for step in range(steps + 1):
            at, up = x + (to_x - x) * step / steps, y + (to_y - y) * step / steps
            found.append(Box(at - 4, up - 4, at + 4, up + 4))
    return found


def _short(series: Series) -> str:
    label = visible_text(series.label)
    return label if len(label) <= _LETTERS else f"{label[: _LETTERS - 1]}\u2026"


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
