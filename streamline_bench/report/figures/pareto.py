"""Accuracy against what rows differ in (speed, size, bytes, time to make), with its frontier."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from markupsafe import Markup, escape

from streamline_bench.report.figures.labels import Box, Label, Place, labels
from streamline_bench.report.row import Row
from streamline_bench.report.text import (
    count,
    duration,
    percent,
    times,
    visible_text,
    with_error,
)
from streamline_bench.stability.estimate import Estimate

_WIDTH, _HEIGHT = 1000.0, 400.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 48.0, 44.0, 14.0, 44.0


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


def root(value: float) -> float:
    """Return the square root, for an axis from 0 on: small values stay apart, and 0 has a place."""
    return math.sqrt(max(0.0, value))


def root_ticks(largest: float, count: int = 8) -> list[float]:
    """0 and numbers of 1, 2 or 5 times a power of ten, ``1 / count`` of an axis by roots apart."""
    apart = root(largest) / count
    exponent = math.floor(math.log10(largest))
    powers = (10.0**power for power in range(exponent, exponent - 4, -1))
    found = [math.inf]
    for value in (size * power for power in powers for size in (5, 2, 1)):
        if value <= largest and apart <= root(value) <= root(found[-1]) - apart:
            found.append(value)
    return [0.0, *reversed(found[1:])]


@dataclass(frozen=True)
class Axis:
    """An axis from ``low`` to ``high``, drawn from ``start`` to ``end``.

    ``by`` is what it is linear in (a logarithm, :func:`root`); ``low`` and ``high`` are that.
    """

    low: float
    high: float
    start: float
    end: float
    by: Callable[[float], float] = float

    @classmethod
    def around(
        cls, values: Iterable[float], start: float, end: float, pad: float = 0.06,
        by: Callable[[float], float] = float,
    ) -> Axis:  # fmt: skip
        """An axis that holds every value, with a share ``pad`` of room at either end."""
        places = [by(value) for value in values]
        low, high = min(places), max(places)
        room = pad * (high - low) or 0.05 * abs(high) or 1.0
        return cls(low - room, high + room, start, end, by)

    def place(self, value: float) -> float:
        """Where the value lies, rounded to a hundredth."""
        share = (self.by(value) - self.low) / (self.high - self.low)
        return round(self.start + share * (self.end - self.start), 2)


@dataclass(frozen=True)
class Point:
    """One row of the picture: ``x`` by the picture's kind, ``y`` accuracy.

    ``low`` and ``high`` are the ends of x, where it has an interval.
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


@dataclass(frozen=True)
class Measure:
    """What accuracy is drawn against.

    Attributes:
        heading: of the section, after "Accuracy against".
        axis: name of the axis, with the direction that is better.
        words: for the caption.
        x: of a row; None where it has none.
        ends: interval of x.
        written: a value for a tick or a title.
        more: whether more is better.
        log: draw the axis by the logarithm.
    """

    heading: str
    axis: str
    words: str
    x: Callable[[Row], float | None]
    written: Callable[[float], str]
    ends: Callable[[Row], tuple[float | None, float | None]] = lambda row: (None, None)
    more: bool = False
    log: bool = False


def _ratio(row: Row) -> float | None:
    if row.speed is None:
        return None
    return 1.0 if row.is_dense and row.speed.ratio is None else row.speed.ratio


def _bytes(row: Row) -> float | None:
    return row.bytes or (row.speed.weights_bytes if row.speed else None)


def _ends_of(estimate: Estimate) -> tuple[float | None, float | None]:
    """Ends that a logarithm can place."""
    positive = estimate.low is not None and estimate.low > 0
    return (estimate.low, estimate.high) if positive else (None, None)


def _making(row: Row) -> float | None:
    """Seconds that making the row took, evaluations aside."""
    spent = sum(value for stage, value in row.seconds.items() if stage != "evaluate")
    return None if row.is_dense else spent or None


MEASURES: dict[str, Measure] = {
    "ratio": Measure(
        "measured speed", "output tokens per second, \N{MULTIPLICATION SIGN} reference →",
        "speed as a ratio to the reference in the same rounds, bars: its interval",
        _ratio, times,
        lambda row: (row.speed.ratio_low, row.speed.ratio_high) if row.speed else (None, None),
        more=True,
    ),
    "throughput": Measure(
        "measured speed", "output tokens per second →",
        "output tokens per second, bars from slowest to fastest round",
        lambda row: row.speed.output_tokens_per_second if row.speed else None,
        lambda value: f"{value:,.4g}",
        lambda row: (row.speed.low, row.speed.high) if row.speed else (None, None),
        more=True,
    ),
    "goodput": Measure(
        "goodput", "good requests per second →",
        "requests per second that keep the objective, at the highest load that does",
        lambda row: row.speed.goodput.value if row.speed and row.speed.goodput else None,
        lambda value: f"{value:,.4g}",
        more=True,
    ),
    "kl": Measure(
        "token KL", "← token KL to the reference, nats (log scale)",
        "KL of the next-token distributions to the reference's, bars: its interval",
        lambda row: row.divergence.kl.value if row.divergence else None,
        lambda value: f"{value:,.3g}",
        lambda row: _ends_of(row.divergence.kl) if row.divergence else (None, None),
        log=True,
    ),
    "parameters": Measure(
        "size", "← parameters", "parameters", lambda row: row.parameters, count
    ),
    "bytes": Measure("bytes", "← bytes of the weights", "bytes of the weights", _bytes,
                     lambda value: f"{count(value)}B"),
    "memory": Measure("memory", "← bytes of memory", "memory for the sequences of the target",
                      lambda row: row.memory, lambda value: f"{count(value)}B"),
    "making": Measure("time to make", "← time to make the model (log scale)",
                      "wall-clock time of compression and training", _making, duration, log=True),
}  # fmt: skip
"""Kind of picture -> what is across."""

_DIFFERS = 0.02
"""Rows differ where their extremes are at least this share of the largest apart."""


@dataclass(frozen=True)
class Pareto:
    """The picture as inline SVG, with what its caption says."""

    kind: str
    svg: Markup
    frontier: list[str]
    groups: list[str]

    @property
    def measure(self) -> Measure:
        """What is across."""
        return MEASURES[self.kind]


def points_of(rows: Sequence[Row], kind: str) -> list[Point]:
    """Return a point for each row that has accuracy and x; a point's index is its row's."""
    measure, points = MEASURES[kind], []
    for index, row in enumerate(rows):
        accuracy, x = row.accuracy_macro, measure.x(row)
        if accuracy is None or not x:
            continue
        low, high = measure.ends(row)
        points.append(
            Point(
                index=index,
                label=visible_text(row.label),
                group="dense" if row.is_dense else (row.cost or "other").replace(" ", "-"),
                x=float(x),
                y=accuracy.value,
                error=accuracy.standard_error or 0.0,
                text=f"{measure.written(x)}, {with_error(accuracy)} % right",
                low=low,
                high=high,
            )
        )
    return points


def frontier(points: Sequence[Point], *, more_is_better: bool) -> list[Point]:
    """Points that no other one beats in accuracy without losing in x; from best x to worst."""
    sign = 1 if more_is_better else -1
    kept: list[Point] = []
    for point in sorted(points, key=lambda p: (-sign * p.x, -p.y)):
        if not kept or point.y > kept[-1].y:
            kept.append(point)
    return kept


def tradeoffs(rows: Sequence[Row]) -> list[Pareto]:
    """Draw accuracy against everything in which the compressed rows differ, speed first.

    Where they differ in nothing, the size is drawn; where all were asked for one size, token KL in
    its place. Bytes are left out where they say what the parameters say, and the time to make a row
    where several sizes were asked for: one scan serves them all and counts for the first. Goodput
    is also drawn of one row beside the dense one. Nothing with fewer than two points.
    """
    differing = [kind for kind in MEASURES if _differs(rows, kind)]
    if "ratio" in differing:
        differing = [kind for kind in differing if kind != "throughput"]
    if "parameters" in differing and not _differs(rows, "bytes", per="parameters"):
        differing = [kind for kind in differing if kind != "bytes"]
    told = "parameters" if _one_size(rows) else "kl"
    differing = [kind for kind in differing if kind != told]
    if len({row.size for row in rows if row.size}) > 1:
        differing = [kind for kind in differing if kind != "making"]
    return [
        drawn for kind in differing or ["parameters"] if (drawn := pareto(rows, kind)) is not None
    ]


def _one_size(rows: Sequence[Row]) -> bool:
    """Whether the compressed rows were asked for one size and came near it: one vertical column."""
    compressed = [row for row in rows if row.accuracy_macro and not row.is_dense]
    sizes = [row.parameters or 0 for row in compressed]
    whole = max((row.parameters or 0 for row in rows), default=0)
    return (
        len({row.sparsity_requested for row in compressed}) == 1
        and compressed[0].sparsity_requested is not None
        and max(sizes) - min(sizes) < _ONE_SIZE * whole
    )


_ONE_SIZE = 0.05
"""Rows whose parameters differ by less than this share of the reference's are of one size."""


def bytes_tell_more(rows: Sequence[Row]) -> bool:
    """Whether rows differ in bytes per parameter, as quantised ones do from others."""
    sizes = [row.bytes / row.parameters for row in rows if row.bytes and row.parameters]
    return _apart(sizes)


def _differs(rows: Sequence[Row], kind: str, per: str | None = None) -> bool:
    values = []
    for row in rows:
        x, unit = MEASURES[kind].x(row), MEASURES[per].x(row) if per else 1.0
        shown = not row.is_dense or kind == "goodput"  # it is measured only where asked for
        if row.accuracy_macro and shown and x and unit:
            values.append(x / unit)
    return _apart(values)


def _apart(values: Sequence[float]) -> bool:
    return len(values) > 1 and max(values) - min(values) > _DIFFERS * max(values)


def pareto(rows: Sequence[Row], kind: str) -> Pareto | None:
    """Draw the rows; None with fewer than two points."""
    points = points_of(rows, kind)
    if len(points) < 2:
        return None
    best = frontier(points, more_is_better=MEASURES[kind].more)
    dense = next((row.accuracy_macro.value for row in rows if row.is_dense and row.accuracy_macro),
                 None)  # fmt: skip
    return Pareto(
        kind=kind,
        svg=_svg(MEASURES[kind], points, best, dense),
        frontier=[point.label for point in best],
        groups=sorted({point.group for point in points}),
    )


def _across(measure: Measure, points: Sequence[Point]) -> Axis:
    wide = [x for p in points for x in (p.low, p.x, p.high) if x is not None]
    ends = (_LEFT, _WIDTH - _RIGHT)
    return Axis.around(wide, *ends, pad=0.1, by=math.log10 if measure.log else float)


def _svg(measure: Measure, points: list[Point], best: list[Point], dense: float | None) -> Markup:
    across = _across(measure, points)
    ends = [p.y + sign * p.error for p in points for sign in (-1, 1)]
    up = Axis.around(ends, _HEIGHT - _BOTTOM, _TOP)
    names = escape(", ".join(point.label for point in best))
    parts = [
        f'<svg class="pareto" viewBox="0 0 {_WIDTH:.0f} {_HEIGHT:.0f}" role="img" '
        f'aria-label="Accuracy against {measure.heading}; on the frontier: {names}">',
        *_axes(measure, across, up, dense),
        f'<path class="frontier" d="{_steps(best, across, up)}"/>',
    ]
    named = {label.rows: label.svg for label in _labels(points, best, across, up)}
    for point in sorted(points, key=lambda p: p in best):
        parts += _mark(point, point in best, named.get((point.index,)), across, up)
    groups = {point.index: _group(point, point in best) for point in points}
    for rows, svg in named.items():
        if len(rows) > 1:
            every = " ".join(map(str, rows))
            parts.append(f'<g class="{groups[rows[0]]}" data-rows="{every}">{svg}</g>')
    return Markup("".join([*parts, "</svg>"]))


def _group(point: Point, on: bool) -> Markup:
    return escape(point.group) + (" best" if on else "")


def _axes(measure: Measure, across: Axis, up: Axis, dense: float | None) -> list[str]:
    bottom, right = _HEIGHT - _BOTTOM, _WIDTH - _RIGHT
    parts = []
    for value in ticks(up.low, up.high, 6):
        y = up.place(value)
        parts.append(f'<path class="grid" d="M{_LEFT} {y}H{right}"/>')
        parts.append(
            f'<text x="{_LEFT - 8}" y="{y + 4:.2f}" class="end">{percent(value, 0)}</text>'
        )
        if dense:
            kept = percent(value / dense, 0)
            parts.append(f'<text x="{right + 8}" y="{y + 4:.2f}">{kept}</text>')
    for value in _ticks_across(measure, across):
        x = across.place(value)
        parts.append(f'<path class="axis" d="M{x} {bottom}v5"/>')
        written = measure.written(value)
        parts.append(f'<text x="{x}" y="{bottom + 18}" class="mid">{written}</text>')
    place, end = (right, "end") if measure.more else (_LEFT, "")
    parts.append(f'<path class="axis" d="M{_LEFT} {bottom}H{right}"/>')
    parts.append(f'<text x="{place}" y="{_HEIGHT - 6}" class="{end}">{measure.axis}</text>')
    parts.append(f'<text x="{_LEFT + 6}" y="{_TOP + 8}" class="name">accuracy, %</text>')
    if dense:
        words = "share of the reference's, %"
        parts.append(f'<text x="{right - 6}" y="{_TOP + 8}" class="name end">{words}</text>')
    return parts


def _ticks_across(measure: Measure, across: Axis) -> list[float]:
    if not measure.log:
        return ticks(across.low, across.high, 6)
    whole = range(math.floor(across.low), math.ceil(across.high) + 1)
    found = [size * 10.0**power for power in whole for size in (1, 2, 5)]
    return [value for value in found if across.low <= math.log10(value) <= across.high]


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
        f'<g class="{_group(point, on)}" data-row="{point.index}">'
        f"<title>{escape(point.label)}: {point.text}</title>",
        f'<path class="whisker" d="{whisker}"/>',
        f'<path class="shape" d="{shape}"/>',
        label or "",
        "</g>",
    ]


def _labels(points: list[Point], best: list[Point], across: Axis, up: Axis) -> list[Label]:
    """Names of the points; the frontier's come first and have one in any case."""
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
    places = [
        Place(
            point.index, point.label, across.place(point.x), up.place(point.y),
            always=point in best or point.group == "dense",
        )
        for point in sorted(points, key=lambda p: (p not in best, p.group != "dense", -p.y))
    ]  # fmt: skip
    frame = Box(_LEFT, _TOP + 7, _WIDTH - _RIGHT, _HEIGHT - _BOTTOM + 1)
    return labels(places, taken, frame)


def _box(left: float, top: float, width: float, height: float) -> Box:
    return Box(left, top, left + width, top + height)
