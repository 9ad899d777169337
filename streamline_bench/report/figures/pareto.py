"""Accuracy against speed (or size, where no speed was measured), with the Pareto frontier."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from markupsafe import Markup, escape

from streamline_bench.report.leaderboard import Row
from streamline_bench.report.text import count, percent, visible_text, with_error

_WIDTH, _HEIGHT = 1000.0, 400.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 48.0, 20.0, 14.0, 44.0
_LETTER = 6.4
"""Width of a label's letter in the picture's units, a little generous."""


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) inside [low, high], about ``count``."""
    span = high - low
    if not span > 0:
        return [low]
    rough = span / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(size * power for size in (1, 2, 5, 10) if size * power >= rough * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(index * step, 12) for index in range(first, last + 1)]


@dataclass(frozen=True)
class Axis:
    """A linear axis from ``low`` to ``high``, drawn from ``start`` to ``end``."""

    low: float
    high: float
    start: float
    end: float

    @classmethod
    def around(cls, values: list[float], start: float, end: float, pad: float = 0.06) -> Axis:
        """An axis that holds every value, with a share ``pad`` of room at either end."""
        low, high = min(values), max(values)
        room = pad * (high - low) or 0.05 * abs(high) or 1.0
        return cls(low - room, high + room, start, end)

    def place(self, value: float) -> float:
        """Where the value lies, rounded to a hundredth."""
        share = (value - self.low) / (self.high - self.low)
        return round(self.start + share * (self.end - self.start), 2)


@dataclass(frozen=True)
class Point:
    """One row of the picture: ``x`` is tokens per second or parameters, ``y`` accuracy.

    ``low`` and ``high`` are the extremes of x, where it was measured more than once.
    """

    index: int
    label: str
    group: str
    x: float
    y: float
    error: float
    text: str
    low: float | None = None
    high: float | None = None


Kind = Literal["throughput", "parameters"]


@dataclass(frozen=True)
class Pareto:
    """The picture as inline SVG, with what its caption says."""

    kind: Kind
    svg: Markup
    frontier: list[str]
    groups: list[str]


def points_of(rows: Sequence[Row]) -> tuple[Kind, list[Point]]:
    """Return what x is and a point for each row that has it; a point's index is its row's.

    Throughput is taken where at least two rows were measured, else the number of parameters.
    """
    speeds = [row.speed.output_tokens_per_second if row.speed else None for row in rows]
    by_speed = sum(bool(row.accuracy_macro and s) for row, s in zip(rows, speeds, strict=True)) >= 2
    points = []
    for index, (row, speed) in enumerate(zip(rows, speeds, strict=True)):
        accuracy, x = row.accuracy_macro, speed if by_speed else row.parameters
        if accuracy is None or not x:
            continue
        written = f"{x:.4g} tokens/s" if by_speed else f"{count(x)} parameters"
        points.append(
            Point(
                index=index,
                label=visible_text(row.label),
                group="dense" if row.is_dense else (row.cost or "other").replace(" ", "-"),
                x=float(x),
                y=accuracy.value,
                error=accuracy.standard_error or 0.0,
                text=f"{written}, {with_error(accuracy)} % right",
                low=row.speed.low if by_speed and row.speed else None,
                high=row.speed.high if by_speed and row.speed else None,
            )
        )
    return ("throughput" if by_speed else "parameters"), points


def frontier(points: Sequence[Point], *, more_is_better: bool) -> list[Point]:
    """Points that no other one beats in accuracy without losing in x; from best x to worst."""
    sign = 1 if more_is_better else -1
    kept: list[Point] = []
    for point in sorted(points, key=lambda p: (-sign * p.x, -p.y)):
        if not kept or point.y > kept[-1].y:
            kept.append(point)
    return kept


def pareto(rows: Sequence[Row]) -> Pareto | None:
    """Draw the rows; None with fewer than two points."""
    kind, points = points_of(rows)
    if len(points) < 2:
        return None
    best = frontier(points, more_is_better=kind == "throughput")
    return Pareto(
        kind=kind,
        svg=_svg(kind, points, best),
        frontier=[point.label for point in best],
        groups=sorted({point.group for point in points}),
    )


def _svg(kind: Kind, points: list[Point], best: list[Point]) -> Markup:
    wide = [x for p in points for x in (p.low, p.x, p.high) if x is not None]
    across = Axis.around(wide, _LEFT, _WIDTH - _RIGHT, pad=0.1)
    ends = [p.y + sign * p.error for p in points for sign in (-1, 1)]
    up = Axis.around(ends, _HEIGHT - _BOTTOM, _TOP)
    names = escape(", ".join(point.label for point in best))
    what = "tokens per second" if kind == "throughput" else "parameters"
    parts = [
        f'<svg class="pareto" viewBox="0 0 {_WIDTH:.0f} {_HEIGHT:.0f}" role="img" '
        f'aria-label="Accuracy against {what}; on the frontier: {names}">',
        *_axes(kind, across, up),
        f'<path class="frontier" d="{_steps(best, across, up)}"/>',
    ]
    labels = _labels(points, best, across, up)
    for point in sorted(points, key=lambda p: p in best):
        parts += _mark(point, point in best, labels.get(point.index), across, up)
    return Markup("".join([*parts, "</svg>"]))


def _axes(kind: Kind, across: Axis, up: Axis) -> list[str]:
    bottom, right = _HEIGHT - _BOTTOM, _WIDTH - _RIGHT
    parts = []
    for value in ticks(up.low, up.high, 6):
        y = up.place(value)
        parts.append(f'<path class="grid" d="M{_LEFT} {y}H{right}"/>')
        parts.append(
            f'<text x="{_LEFT - 8}" y="{y + 4:.2f}" class="end">{percent(value, 0)}</text>'
        )
    for value in ticks(across.low, across.high, 6):
        x = across.place(value)
        written = f"{value:,.4g}" if kind == "throughput" else count(value)
        parts.append(f'<path class="axis" d="M{x} {bottom}v5"/>')
        parts.append(f'<text x="{x}" y="{bottom + 18}" class="mid">{written}</text>')
    name = "output tokens per second \u2192" if kind == "throughput" else "\u2190 parameters"
    place, end = (right, "end") if kind == "throughput" else (_LEFT, "")
    parts.append(f'<path class="axis" d="M{_LEFT} {bottom}H{right}"/>')
    parts.append(f'<text x="{place}" y="{_HEIGHT - 6}" class="{end}">{name}</text>')
    parts.append(f'<text x="{_LEFT + 6}" y="{_TOP + 8}" class="name">accuracy, %</text>')
    return parts


def _steps(best: list[Point], across: Axis, up: Axis) -> str:
    """A staircase: between two points of the frontier, no row is better than the worse one."""
    path = f"M{across.place(best[0].x)} {up.place(best[0].y)}"
    for point in best[1:]:
        path += f"H{across.place(point.x)}V{up.place(point.y)}"
    return path


def _mark(point: Point, on: bool, label: Markup | None, across: Axis, up: Axis) -> list[str]:
    x, y = across.place(point.x), up.place(point.y)
    whisker = f"M{x} {up.place(point.y + point.error)}V{up.place(point.y - point.error)}"
    if point.low is not None and point.high is not None:
        whisker += f"M{across.place(point.low)} {y}H{across.place(point.high)}"
    shape = {
        "no-training": f"M{x - 5} {y + 4.5}L{x} {y - 5}L{x + 5} {y + 4.5}Z",
        "calibrated": f"M{x - 4.2} {y - 4.2}h8.4v8.4h-8.4Z",
    }.get(point.group, f"M{x - 5} {y}a5 5 0 1 0 10 0a5 5 0 1 0 -10 0Z")
    return [
        f'<g class="{escape(point.group)}{" best" if on else ""}" data-row="{point.index}">'
        f"<title>{escape(point.label)}: {point.text}</title>",
        f'<path class="whisker" d="{whisker}"/>',
        f'<path class="shape" d="{shape}"/>',
        label or "",
        "</g>",
    ]


def _labels(points: list[Point], best: list[Point], across: Axis, up: Axis) -> dict[int, Markup]:
    """A name next to each point if there is room; the frontier's points come first."""
    taken = [_box(across.place(p.x) - 6, up.place(p.y) - 6, 12.0, 12.0) for p in points]
    for point in points:
        if point.low is not None and point.high is not None:
            left, right = across.place(point.low), across.place(point.high)
            taken.append(_box(left, up.place(point.y) - 1, right - left, 2.0))
    for one, two in pairwise(best):  # the frontier's own steps
        left, right = sorted((across.place(one.x), across.place(two.x)))
        taken.append(_box(left, up.place(one.y) - 1, right - left, 2.0))
        taken.append(
            _box(across.place(two.x) - 1, up.place(two.y), 2.0, up.place(one.y) - up.place(two.y))
        )
    placed: dict[int, Markup] = {}
    for point in sorted(points, key=lambda p: (p not in best, p.group != "dense", -p.y)):
        x, y = across.place(point.x), up.place(point.y)
        name = point.label if len(point.label) <= 28 else f"{point.label[:27]}\u2026"
        width = _LETTER * len(name)
        for left, middle, anchor in (
            (x + 9, y, ""),
            (x - 9 - width, y, "end"),
            (x - width / 2, y - 15, "mid"),
            (x - width / 2, y + 15, "mid"),
            (x + 8, y - 12, ""),
            (x - 8 - width, y - 12, "end"),
        ):
            box = _box(left, middle - 7, width, 14.0)
            inside = left >= _LEFT and left + width <= _WIDTH and middle < _HEIGHT - _BOTTOM - 6
            if inside and not any(_overlap(box, other) for other in taken):
                taken.append(box)
                at = left + {"": 0.0, "mid": width / 2, "end": width}[anchor]
                placed[point.index] = Markup(
                    '<text class="{} label" x="{:.1f}" y="{:.1f}">{}</text>'
                ).format(anchor, at, middle + 4, name)
                break
    return placed


_Box = tuple[float, float, float, float]


def _box(left: float, top: float, width: float, height: float) -> _Box:
    return left, top, left + width, top + height


def _overlap(one: _Box, two: _Box) -> bool:
    return one[0] < two[2] and two[0] < one[2] and one[1] < two[3] and two[1] < one[3]
