"""Recipes over sizes: curves with bands, and tables at equal size.

A recipe's size 0 is its dense model. What lies between two of its sizes is interpolated; nothing
beyond them is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from markupsafe import Markup

from streamline_bench.report.figures.lines import Line, Series, Written, line_chart
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
    found = row.accuracy_macro
    if found is None or found.low is not None or found.standard_error is None:
        return found
    return found.model_copy(
        update={"low": found.value - found.standard_error,
                "high": found.value + found.standard_error}
    )  # fmt: skip


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
    found = []
    for up in QUANTITIES:
        for name, (x_of, written) in across.items():
            lines = [
                (one, points)
                for one in series
                if len(points := _points(one, origins.get(one.label), x_of, up.of)) > 1
                and len(_points(one, None, x_of, up.of)) > 1
            ]
            if lines:
                scale = " (by its square root)" if up.by_root else ""
                named = (f"{up.name}, {up.unit}{scale}", up.tick)
                svg = line_chart(lines, written, named, by_root=up.by_root)
                found.append(SizeCurve(svg, up.name, name))
    return found


def _removed(whole: int) -> Callable[[Row], float | None]:
    return lambda row: 1 - row.parameters / whole if row.parameters else None


def _origins(board: Leaderboard, series: Sequence[Series]) -> dict[str, Row]:
    """The dense model of each series, by its label."""
    dense = {row.label: row for row in board.rows if row.is_dense}
    named = {one.label: one.rows[0].reference or board.dense for one in series}
    return {label: dense[name] for label, name in named.items() if name in dense}


def _points(
    series: Series,
    origin: Row | None,
    across: Callable[[Row], float | None],
    up: Callable[[Row], Estimate | None],
) -> Line:
    rows = series.rows if origin is None else (origin, *series.rows)
    found = [(across(row), up(row)) for row in rows]
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
        """The best value at a size."""
        known = [cell.value for _, line in self.lines if (cell := line[place]) is not None]
        return (max if self.quantity.more else min)(known, default=None)


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
            points = _points(one, origins.get(one.label), _removed(whole), quantity.of)
            lines.append((one, [interpolated(points, size) for size in asked]))
        kept = [n for n, _ in enumerate(asked) if sum(bool(line[n]) for _, line in lines) > 1]
        if kept:
            chosen = [(one, [line[n] for n in kept]) for one, line in lines]
            chosen.sort(key=lambda line: _mean(line[1], quantity))
            tables.append(EqualSize(quantity, [asked[n] for n in kept], chosen))
    return tables


def equal_note(board: Leaderboard) -> str:
    """How the numbers of the tables at equal size come about."""
    return (
        f"On the straight line between a recipe's own two nearest sizes (size 0 is {board.dense}); "
        f"nothing beyond its sizes, {percent(SAME_SIZE, 0)} % of the parameters aside, and never "
        "from another recipe. Bold: the best at a size, whether or not a test tells it apart."
    )


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
