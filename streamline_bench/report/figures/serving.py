"""Served models: speed of one user against that of the card, and latency against load."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from streamline_bench.report.figures.sizes import Series, SizeCurve, line_chart
from streamline_bench.report.leaderboard import Row
from streamline_bench.stability.comparison import Estimate
from streamline_bench.throughput.speed import Metric, ServedFigure

_Load = dict[Metric, ServedFigure]
_NORMAL = 1.96


def served_series(rows: Sequence[Row]) -> list[Series]:
    """The rows that were served at two loads or more."""
    served = [row for row in rows if len(_loads(row)) > 1]
    return [Series(row.label, index, (row,)) for index, row in enumerate(served)]


def serving_curves(rows: Sequence[Row]) -> list[SizeCurve]:
    """Tokens per second of a user against those of a card; time of a request against the load."""
    series = served_series(rows)
    if not series:
        return []
    cards = {one.label: one.rows[0].speed for one in series}

    def per_card(one: Series, load: _Load) -> float:
        speed = cards[one.label]
        return load["tokens/s"].value / (speed.accelerators if speed is not None else 1)

    def per_user(load: _Load) -> Estimate:
        tpot = load["TPOT"]
        return _estimate(1000 / tpot.value, tpot.error)

    pictures: tuple[tuple[str, Metric, Callable[[_Load], Estimate]], ...] = (
        ("tokens per second of one user", "TPOT", per_user),
        ("time to first token, ms", "TTFT", lambda load: _of(load["TTFT"])),
        ("time of a whole request, ms", "E2EL", lambda load: _of(load["E2EL"])),
    )
    across = "tokens per second of one card"
    found = []
    for up, needed, value in pictures:
        lines = [
            (one, sorted(
                ((per_card(one, load), value(load)) for load in _loads(one.rows[0])
                 if needed in load),
                key=lambda point: point[0],
            ))
            for one in series
        ]  # fmt: skip
        lines = [(one, points) for one, points in lines if len(points) > 1]
        if lines:
            svg = line_chart(lines, (across, _written), (up, _written))
            found.append(SizeCurve(svg, up, across))
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
