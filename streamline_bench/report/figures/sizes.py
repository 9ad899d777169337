"""Recipes over sizes: curves with bands, and tables at equal size.

A recipe's size 0 is its dense model. What lies between two of its sizes is interpolated; nothing
beyond them is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from statistics import NormalDist

from markupsafe import Markup

from streamline_bench.report.figures.lines import COLOURS, Line, Series, Written, line_chart
from streamline_bench.report.figures.pareto import MEASURES, bytes_tell_more
from streamline_bench.report.leaderboard import Leaderboard
from streamline_bench.report.row import Row
from streamline_bench.report.standing import SAME_SIZE
from streamline_bench.report.text import decimal, percent
from streamline_bench.stability.estimate import Estimate


def series_of(rows: Sequence[Row]) -> list[Series]:
    """The recipes that were run at two sizes or more, in the order of the rows."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        if row.group and row.size and row.accuracy_macro:
            others = [f"{k} {v}" for k, v in row.axes.items() if k == "model"]
            found.setdefault(", ".join([row.group, *others]), []).append(row)
    sized = {
        label: sorted(same, key=lambda row: -(row.parameters or 0))
        for label, same in found.items()
        if len({row.parameters for row in same}) > 1 and all(row.parameters for row in same)
    }
    return [Series(label, n, tuple(same)) for n, (label, same) in enumerate(sized.items())]


def _accuracy(row: Row) -> Estimate | None:
    return row.accuracy_macro


def _stability(row: Row) -> Estimate | None:
    if row.is_dense:
        return Estimate(value=1.0)
    return row.macro.stability if row.macro else None


def _token_kl(row: Row) -> Estimate | None:
    if row.is_dense:
        return Estimate(value=0.0)
    return row.divergence.kl if row.divergence else None


@dataclass(frozen=True)
class Quantity:
    """What is read off a row at a size.

    Attributes:
        name: for a heading, without unit.
        unit: of what ``write`` gives; ticks are written by ``tick``.
        more: whether more is better.
        by_root: draw it by its square root: it is 0 or more, and grows many times over.
    """

    name: str
    unit: str
    of: Callable[[Row], Estimate | None]
    write: Callable[[float], str]
    tick: Callable[[float], str]
    more: bool = True
    by_root: bool = False


QUANTITIES = (
    Quantity(
        "accuracy", "%", _accuracy, percent, lambda value: percent(value, 0)
    ),
    Quantity(
        "stability", "%", _stability, percent, lambda value: percent(value, 0)
    ),
    Quantity(
        "token KL", "nats", _token_kl, lambda value: decimal(value, 2),
        "{:g}".format, more=False, by_root=True,
    ),
)  # fmt: skip


@dataclass(frozen=True)
class SizeCurve:
    """One picture, what is up and what is across."""

    svg: Markup
    up: str
    across: str


def size_curves(board: Leaderboard, rows: Sequence[Row]) -> list[SizeCurve]:
    """Accuracy, stability and token KL against parameters removed and measured speed.

    Also against bytes, where they say something else than parameters do.
    """
    series, whole = series_of(rows), board.dense_row.parameters
    if not series or not whole:
        return []
    across: dict[str, tuple[Callable[[Row], float | None], Written]] = {
        "parameters": (
            _removed(whole), ("parameters removed, %", lambda value: percent(value, 0))
        ),
        "bytes": (MEASURES["bytes"].x, ("bytes of the weights", MEASURES["bytes"].written)),
        "speed": (
            MEASURES["ratio"].x,
            ("tokens per second, \N{MULTIPLICATION SIGN} reference", MEASURES["ratio"].written),
        ),
    }  # fmt: skip
    if not bytes_tell_more([row for row in rows if not row.is_dense]):
        del across["bytes"]
    origins = _origins(board, series)
    chance = chance_of(rows)
    guessing = (chance, f"guessing: {percent(chance)} %") if chance is not None else None
    found = []
    for up in QUANTITIES:
        for name, (x_of, written) in across.items():
            lines = []
            for one in _coloured(series, at_equal_size(board, rows)):
                points = _points(one, origins.get(one.label), x_of, up.of, board.method.confidence)
                if sum(x_of(row) is not None and up.of(row) is not None for row in one.rows) > 1:
                    lines.append((one, points))
            if lines:
                scale = " (by its square root)" if up.by_root else ""
                named = (f"{up.name}, {up.unit}{scale}{_asked(up, rows)}", up.tick)
                level = guessing if up.name == "accuracy" else None
                svg = line_chart(lines, written, named, by_root=up.by_root, level=level)
                found.append(SizeCurve(svg, up.name, name))
    return found


def _asked(up: Quantity, rows: Sequence[Row]) -> str:
    """How much the numbers of a picture rest on."""
    if up.name == "token KL":
        read = next((row.divergence.tokens for row in rows if row.divergence), 0)
        return f"; {read:,} tokens" if read else ""
    asked = next((row.macro.n for row in rows if row.macro), 0)
    return f"; {asked:,} questions" if asked else ""


def chance_of(rows: Sequence[Row]) -> float | None:
    """Accuracy of guessing, mean over tasks; None where a task has no choices."""
    main = ([task for task in row.tasks if task.main] for row in rows if row.macro)
    compared = [task.comparison for task in next(main, []) if task.comparison]
    known = [found.chance for found in compared if found.chance is not None]
    return sum(known) / len(known) if known and len(known) == len(compared) else None


def _coloured(series: Sequence[Series], tables: Sequence[EqualSize]) -> list[Series]:
    """With the colours for those that are the best somewhere, the smallest sizes first.

    Where there are no more series than colours, all keep theirs.
    """
    if len(series) <= COLOURS:
        return list(series)
    judged = [table for table in tables if table.quantity.name != "stability"]
    wanted = [
        leader.label
        for size in sorted({size for table in judged for size in table.sizes})
        for table in judged
        if (leader := table.leader(size)) is not None
    ]
    wanted += [one.label for table in judged[:1] for one, _ in table.lines]
    order = {label: place for place, label in enumerate(dict.fromkeys(wanted))}
    ranked = sorted(series, key=lambda one: order.get(one.label, len(order)))
    return [replace(one, index=place) for place, one in enumerate(ranked)]


def _removed(whole: int) -> Callable[[Row], float | None]:
    return lambda row: 1 - row.parameters / whole if row.parameters else None


def _origins(board: Leaderboard, series: Sequence[Series]) -> dict[str, Row]:
    """The dense model of each series, by its label."""
    dense = {row.label: row for row in board.rows if row.is_dense}
    named = {one.label: one.rows[0].reference or board.dense for one in series}
    return {label: dense[name] for label, name in named.items() if name in dense}


def _with_ends(estimate: Estimate | None, confidence: float) -> Estimate | None:
    """The estimate with an interval; of a mean of shares from its standard error."""
    if estimate is None or estimate.low is not None or estimate.standard_error is None:
        return estimate
    room = NormalDist().inv_cdf((1 + confidence) / 2) * estimate.standard_error
    ends = {"low": max(0.0, estimate.value - room), "high": min(1.0, estimate.value + room)}
    return estimate.model_copy(update={**ends, "method": "normal"})


def _points(
    series: Series,
    origin: Row | None,
    across: Callable[[Row], float | None],
    up: Callable[[Row], Estimate | None],
    confidence: float,
) -> Line:
    rows = series.rows if origin is None else (origin, *series.rows)
    found = [(across(row), _with_ends(up(row), confidence)) for row in rows]
    return sorted(((x, y) for x, y in found if x is not None and y is not None),
                  key=lambda point: point[0])  # fmt: skip


@dataclass(frozen=True)
class EqualSize:
    """One quantity of recipes at the same sizes.

    Attributes:
        sizes: shares of the parameters that are removed.
        lines: of every series, the quantity at each size, interpolated between its own points
            (with the ends of their intervals), the best recipes over all sizes first; None outside
            them.
    """

    quantity: Quantity
    sizes: list[float]
    lines: list[tuple[Series, list[Estimate | None]]]

    def best(self, place: int) -> float | None:
        """The best value at a size, where its interval lies apart from all others; else None."""
        first, *others = self._ordered(place)
        if any(_overlap(first[1], cell) for _, cell in others):
            return None
        return first[1].value

    def leader(self, size: float) -> Series | None:
        """The series with the best value at a size."""
        found = self._ordered(self.sizes.index(size)) if size in self.sizes else []
        return found[0][0] if found else None

    def _ordered(self, place: int) -> list[tuple[Series, Estimate]]:
        """What is known at a size, the best first."""
        known = [(one, cell) for one, line in self.lines if (cell := line[place]) is not None]
        sign = -1 if self.quantity.more else 1
        return sorted(known, key=lambda each: sign * each[1].value)


def _overlap(one: Estimate, two: Estimate) -> bool:
    return one.ends[0] <= two.ends[1] and two.ends[0] <= one.ends[1]


def at_equal_size(board: Leaderboard, rows: Sequence[Row]) -> list[EqualSize]:
    """Each quantity of every series at the sizes that were asked for; none without two series."""
    series, whole = series_of(rows), board.dense_row.parameters
    asked = sorted({
        float(row.axes["sparsity"]) for one in series for row in one.rows if "sparsity" in row.axes
    })  # fmt: skip
    if len(series) < 2 or not whole or not asked:
        return []
    origins = _origins(board, series)
    tables = []
    for quantity in QUANTITIES:
        lines = []
        for one in series:
            points = _points(one, origins.get(one.label), _removed(whole), quantity.of,
                             board.method.confidence)  # fmt: skip
            lines.append((one, [interpolated(points, size) for size in asked]))
        kept = [n for n, _ in enumerate(asked) if sum(bool(line[n]) for _, line in lines) > 1]
        if kept:
            chosen = [(one, [line[n] for n in kept]) for one, line in lines]
            chosen.sort(key=lambda line: _mean(line[1], quantity))
            tables.append(EqualSize(quantity, [asked[n] for n in kept], chosen))
    return tables


def equal_note(board: Leaderboard, rows: Sequence[Row]) -> str:
    """How the numbers of the tables at equal size come about, and what they do not say."""
    return (
        f"On the straight line between a recipe's own two nearest sizes (size 0 is {board.dense}); "
        f"nothing beyond its sizes, {percent(SAME_SIZE, 0)} % of the parameters aside, and never "
        f"from another recipe. Brackets: {board.level} intervals of each number for itself. Bold: "
        f"the best at a size, where its interval lies apart from all others.{_rising(board, rows)}"
    )


def _rising(board: Leaderboard, rows: Sequence[Row]) -> str:
    """A caveat where a recipe answers more right the more is removed."""
    rising, apart = [], []
    for one in series_of(rows):
        line = [found for row in one.rows
                if (found := _with_ends(row.accuracy_macro, board.method.confidence))]  # fmt: skip
        steps = [(a, b) for a, b in pairwise(line) if b.value > a.value]
        if steps:
            rising.append(one.label)
            apart += [one.label] if not all(_overlap(a, b) for a, b in steps) else []
    if not rising:
        return ""
    names = ", ".join(rising[:_NAMED])
    names += f" and {len(rising) - _NAMED} more" if len(rising) > _NAMED else ""
    read = (
        f"beyond the intervals of {', '.join(apart)}" if apart
        else "within the intervals: no sign of a gain"
    )  # fmt: skip
    return f" Accuracy rises where more is removed ({names}), {read}."


_NAMED = 4
"""So many recipes are named in a caveat."""


def _mean(cells: Sequence[Estimate | None], quantity: Quantity) -> tuple[int, float]:
    """For sorting: rows that miss a size last, then by the mean, the best first."""
    values = [cell.value for cell in cells if cell is not None]
    mean = sum(values) / len(values) if values else 0.0
    return len(cells) - len(values), -mean if quantity.more else mean


def interpolated(points: Line, at: float, beyond: float = SAME_SIZE) -> Estimate | None:
    """The estimate at ``at``, on the straight line between its neighbours in ``points``.

    The interval lies between theirs as the value does: for two independent points that is wide.
    None outside the points; where the last ends less than ``beyond`` before, it counts.
    """
    for (x, left), (y, right) in pairwise(points):
        if x <= at <= y:
            share = (at - x) / (y - x) if y > x else 0.0
            value, low, high = (
                (1 - share) * a + share * b
                for a, b in zip((left.value, *left.ends), (right.value, *right.ends), strict=True)
            )
            return Estimate(value=value, low=low, high=high, method="interpolated")
    if len(points) > 1 and points[-1][0] < at <= points[-1][0] + beyond:
        return points[-1][1]
    return None
