"""Served models: speed of one user against that of the card, and latency against load."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

from streamline_bench.report.figures.lines import Series, line_chart
from streamline_bench.report.figures.sizes import SizeCurve
from streamline_bench.report.row import Row
from streamline_bench.stability.estimate import Estimate
from streamline_bench.throughput.speed import Metric, ServedFigure

_Load = dict[Metric, ServedFigure]
_NORMAL = 1.96


def served_series(rows: Sequence[Row]) -> list[Series]:
    """The rows that were served at two loads or more."""
    served = [row for row in rows if len(_loads(row)) > 1]
    return [Series(row.label, index, (row,)) for index, row in enumerate(served)]


def serving_curves(rows: Sequence[Row]) -> list[SizeCurve]:
    """Tokens per second of a user against those of a card; latency against the load.

    Requests in flight and requests per second have pictures of their own.
    """
    series = served_series(rows)
    found = [_curve(series, "tokens per second of one card", _per_card,
                    "tokens per second of one user", "TPOT", _per_user)]  # fmt: skip
    for across, unit in _UNITS.items():
        for up, metric in _LATENCIES.items():
            found.append(
                _curve(series, across, lambda _, load, unit=unit: _size(load, unit),  # type: ignore[misc]
                       up, metric, lambda load, metric=metric: _of(load[metric]))  # type: ignore[misc]
            )  # fmt: skip
    return [curve for curve in found if curve is not None]


_UNITS = {"requests in flight": "in flight", "requests per second": "per second"}
_LATENCIES: dict[str, Metric] = {
    "time to first token, ms": "TTFT",
    "time per output token, ms": "TPOT",
    "time of a whole request, ms": "E2EL",
}


def _curve(
    series: Sequence[Series],
    across: str,
    x: Callable[[Row, _Load], float | None],
    up: str,
    needed: Metric,
    y: Callable[[_Load], Estimate],
) -> SizeCurve | None:
    """A line for every model with two points or more; None without any."""
    lines = []
    for one in series:
        (row,) = one.rows
        loads = [load for load in _loads(row) if needed in load]
        points = [(at, y(load)) for load in loads if (at := x(row, load)) is not None]
        if len(points) > 1:
            lines.append((one, sorted(points, key=lambda point: point[0])))
    if not lines:
        return None
    return SizeCurve(line_chart(lines, (across, _written), (up, _written)), up, across)


def _per_card(row: Row, load: _Load) -> float:
    cards = row.speed.accelerators if row.speed is not None else 1
    return load["tokens/s"].value / cards


def _per_user(load: _Load) -> Estimate:
    return _estimate(1000 / load["TPOT"].value, load["TPOT"].error)


def _size(load: _Load, unit: str) -> float | None:
    """The load as a number; None of another unit, and where all requests are sent at once."""
    match = re.fullmatch(rf"(\S+) {unit}", load["tokens/s"].load)
    return float(match[1]) if match else None


class Kept(NamedTuple):
    """The highest load at which a row keeps an objective, and the goodput there."""

    row: Row
    objective: str
    load: ServedFigure
    goodput: ServedFigure | None


def kept_objectives(rows: Sequence[Row]) -> list[Kept]:
    """What searches found, by row."""
    found = []
    for row in rows:
        served = row.speed.served if row.speed is not None else ()
        good = {figure.load: figure for figure in served if figure.metric == "goodput"}
        found += [
            Kept(row, figure.load, figure, good.get(figure.load))
            for figure in served
            if figure.metric == "load"
        ]
    return found


def _loads(row: Row) -> list[_Load]:
    """Figures of each load by metric; those of a search have no tokens per second."""
    found: dict[str, _Load] = {}
    for figure in row.speed.served if row.speed is not None else ():
        found.setdefault(figure.load, {})[figure.metric] = figure
    return [load for load in found.values() if "tokens/s" in load]


def _of(figure: ServedFigure) -> Estimate:
    return _estimate(figure.value, figure.error)


def _estimate(value: float, error: float | None) -> Estimate:
    if error is None:
        return Estimate(value=value)
    factor = math.exp(_NORMAL * error)
    return Estimate(value=value, low=value / factor, high=value * factor)


def _written(value: float) -> str:
    return f"{value:,.4g}"
