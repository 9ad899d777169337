"""Pictures of served models: what is across, what is up, and where they are shown."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest

from streamline_bench.report.figures.pareto import tradeoffs
from streamline_bench.report.figures.serving import kept_objectives, served_series, serving_curves
from streamline_bench.report.leaderboard import Leaderboard, read_leaderboard
from streamline_bench.report.views.exports import figures
from streamline_bench.report.views.page import to_html
from streamline_bench.throughput.speed import Metric, ServedFigure, Speed


def speed(factor: float, loads: int = 3, accelerators: int = 1) -> Speed:
    """Twice the users, half the speed of each, less latency for a larger factor."""

    def figure(load: str, metric: Metric, value: float) -> ServedFigure:
        return ServedFigure(load=load, metric=metric, value=value, error=0.01, blocks=3)

    served = [
        figure(f"{users} in flight", metric, value)
        for users in (1, 4, 16)[:loads]
        for metric, value in (
            ("tokens/s", factor * 100 * users**0.5),
            ("TPOT", 10 * users**0.5 / factor),
            ("TTFT", 30 * users / factor),
            ("E2EL", 300 * users / factor),
        )
    ]
    served += [figure("tpot=50ms,p=95", "load", 20 * factor),
               figure("tpot=50ms,p=95", "goodput", 3 * factor)]  # fmt: skip
    fields = {"engine": "vllm", "device": "a", "dtype": "float32", "batch_size": 0,
              "request_load": "32 requests at 1, 4, 16 in flight"}  # fmt: skip
    return Speed(**fields, status="ok", served=tuple(served), accelerators=accelerators)


@pytest.fixture(scope="module")
def board(repository: Path) -> Leaderboard:
    """The committed board, as if its rows were served."""
    made = read_leaderboard(repository / "reports" / "demo" / "leaderboard.json")
    rows = [
        row.model_copy(update={"throughput": speed(1 + 0.2 * index)})
        for index, row in enumerate(made.rows)
    ]
    return made.model_copy(update={"rows": rows})


def circles(svg: str) -> list[tuple[float, float]]:
    return [
        (float(x), float(y)) for x, y in re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)"', svg)
    ]


def test_a_point_per_load_and_model(board: Leaderboard) -> None:
    curves = serving_curves(board.rows)
    in_flight = "requests in flight"
    assert [(curve.up, curve.across) for curve in curves] == [
        ("tokens per second of one user", "tokens per second of one card"),
        ("time to first token, ms", in_flight),
        ("time per output token, ms", in_flight),
        ("time of a whole request, ms", in_flight),
    ]
    users, first, *_ = (circles(str(curve.svg)) for curve in curves)
    assert len(users) == len(first) == 3 * len(board.rows)
    across, up = zip(*users[:3], strict=True)
    assert sorted(across) == list(across) and sorted(up) == list(up), "more load, slower users"
    assert sorted((y for _, y in first[:3]), reverse=True) == [y for _, y in first[:3]]
    assert [one.label for one in served_series(board.rows)] == [row.label for row in board.rows]


def test_two_cards_count_as_two(board: Leaderboard) -> None:
    one, two = board.rows[:2]
    rows = [one.model_copy(update={"throughput": speed(1.0)}),
            two.model_copy(update={"throughput": speed(2.0, accelerators=2)})]  # fmt: skip
    places = circles(str(serving_curves(rows)[0].svg))
    assert [x for x, _ in places[:3]] == [x for x, _ in places[3:]]


def test_one_load_is_no_curve(board: Leaderboard) -> None:
    rows = [row.model_copy(update={"throughput": speed(1.0, loads=1)}) for row in board.rows]
    assert serving_curves(rows) == [] and serving_curves([]) == []


def test_the_page_and_the_exports_show_them(board: Leaderboard) -> None:
    html = to_html(board)
    assert 'id="serving"' in html and html.count('data-name="serving-') == 4
    assert "Highest load" in html and "tpot=50ms,p=95" in html
    assert "batch size 0" not in html
    assert "goodput" in [drawn.kind for drawn in tradeoffs(board.rows)]
    assert "goodput" in [drawn.kind for drawn in tradeoffs(board.rows[:2])]
    assert "good requests per second" in html
    names = [name for name, _ in figures(board)]
    assert "accuracy-against-goodput" in names
    assert sum("tokens-per-second-of-one-card" in name for name in names) == 1
    assert sum("requests-in-flight" in name for name in names) == 3


def test_rates_and_users_have_pictures_of_their_own(board: Leaderboard) -> None:
    def figure(load: str, metric: Metric, value: float) -> ServedFigure:
        return ServedFigure(load=load, metric=metric, value=value)

    served = tuple(
        figure(load, metric, 10.0 + place)
        for place, load in enumerate(
            ("1 per second", "2.5 per second", "all at once", "4 in flight")
        )
        for metric in ("tokens/s", "TTFT")
    )
    one = speed(1.0).model_copy(update={"served": served})
    row = board.rows[0].model_copy(update={"throughput": one})
    (curve,) = serving_curves([row])
    assert (curve.up, curve.across) == ("time to first token, ms", "requests per second")
    assert len(circles(str(curve.svg))) == 2, "not the load without a rate, nor the one in flight"


def test_the_interval_of_a_load_is_students(board: Leaderboard) -> None:
    figure = ServedFigure(load="p=95", metric="load", value=8, ratio=1.5, ratio_error=0.1, blocks=3)
    low, high = figure.ratio_ends(0.95) or (0, 0)
    assert (low, high) == pytest.approx(
        (1.5 * math.exp(-0.43027), 1.5 * math.exp(0.43027)), rel=1e-4
    )
    assert figure.model_copy(update={"blocks": 1}).ratio_ends(0.95) is None
    row = board.rows[1].model_copy(
        update={"throughput": speed(1.0).model_copy(update={"served": (figure,)})}
    )
    (kept,) = kept_objectives([board.rows[0].model_copy(update={"throughput": None}), row])
    assert (kept.row.label, kept.load, kept.goodput) == (row.label, figure, None)
