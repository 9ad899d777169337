"""A board of several sizes: ranks of each, a head for each, curves, tables, nothing said twice."""

from __future__ import annotations

from itertools import pairwise
from typing import Any
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamline_bench.report.figures.lines import spread
from streamline_bench.report.figures.pareto import root_ticks
from streamline_bench.report.figures.sizes import at_equal_size, size_curves
from streamline_bench.report.leaderboard import Leaderboard
from streamline_bench.report.views.headline import headline
from streamline_bench.report.views.markdown import to_markdown
from streamline_bench.report.views.overview import commands_by_stage
from streamline_bench.report.views.page import to_html
from streamline_bench.report.views.repeats import commands, published_beside, settings


@pytest.fixture
def board(sized: dict[str, Any]) -> Leaderboard:
    return Leaderboard.model_validate(sized)


def test_the_head_has_a_sentence_for_every_size(board: Leaderboard) -> None:
    small, large = headline(board).split("Asked to lose ")[1:]
    assert small.startswith("25 %: map answers 70.0 %, most of 3 calibrated models")
    assert "cannot be told apart from slice;" in small and "least token KL: slice, 0.50" in small
    assert large.startswith("50 %: slice") and "tell it apart from all" in large
    assert "least token KL: map, 2.00" in large


def test_curves_set_out_from_the_dense_model(board: Leaderboard) -> None:
    curves = {(curve.up, curve.across): curve.svg for curve in size_curves(board, board.rows)}
    assert set(curves) == {(up, "parameters") for up in ("accuracy", "stability", "token KL")}, (
        "bytes say the same"
    )
    groups = [
        group
        for group in ElementTree.fromstring(curves["token KL", "parameters"]).iter("g")
        if "series" in (group.get("class") or "")
    ]
    starts = set()
    for group in groups:
        circles = [
            (float(one.get("cx", "")), float(one.get("cy", ""))) for one in group.iter("circle")
        ]
        assert len(circles) == 3
        starts.add(circles[0])
        title, name = group.find("title"), group.find("text")
        assert title is not None and name is not None and title.text == name.text
    assert len(starts) == 1 and [group.find("title").text for group in groups] == [
        "none", "map", "slice",
    ]  # fmt: skip


def test_equal_sizes_are_interpolated_from_the_dense_model_on(board: Leaderboard) -> None:
    accuracy, stability, token_kl = at_equal_size(board, board.rows)
    assert accuracy.sizes == [0.25, 0.5]
    values = {one.label: [cell and cell.value for cell in cells] for one, cells in token_kl.lines}
    # map has 26 % removed at its first size: a 26th of the way back to the dense model's 0.
    assert values["map"] == pytest.approx([0.6 * 25 / 26, 2.0]), "and 49.5 % count as 50 %"
    assert values["none"] == [1.0, 3.0]
    assert [token_kl.best(place) for place in (0, 1)] == pytest.approx([0.5, 2.0])
    assert accuracy.best(1) == 0.5 and stability.best(0) == pytest.approx(0.75, abs=0.02)
    assert [one.label for one, _ in accuracy.lines] == ["slice", "map", "none"], "best first"


def test_markdown_has_a_table_for_every_size(board: Leaderboard) -> None:
    text = to_markdown(board).replace("\\", "")
    small, large = text.split("### Asked to lose ")[1:3]
    assert "map-0.25" in small and "-0.5 |" not in small and "| dense |" in small
    assert "map-0.5" in large.partition("\n\n|")[2].partition("\n\n")[0]
    equal = text.partition("## At equal size: token KL, nats")[2].partition("##")[0]
    assert "| slice | **0.50** | 2.50 |" in equal and "| map | 0.58 | **2.00** |" in equal
    assert text.count("compress m --output run/ROW/checkpoint") == 1
    assert "none-0.5, map-0.25" in text.partition("ROW: ")[2]


def test_published_numbers_stand_beside_the_nearest_size(board: Leaderboard) -> None:
    found = {
        row.label: [one.value for one in numbers] for row, numbers in published_beside(board.rows)
    }
    assert found == {f"{name}-{size}": [value] for name in ("none", "map", "slice")
                     for size, value in ((0.25, 61.0), (0.5, 40.0))}  # fmt: skip
    assert to_html(board).count("its paper") == 6


def test_settings_of_every_size_are_those_of_the_recipe(board: Leaderboard) -> None:
    found = [(one.rows, one.key, one.used) for one in settings(board.rows) if "map" in one.rows]
    assert found == [("map", "samples", 64), ("map-0.25", "seed", 1), ("map-0.5", "seed", 2)]


def test_commands_that_differ_in_the_label_are_one(board: Leaderboard) -> None:
    stages = commands(commands_by_stage(board.commands), board.rows)
    (shared,), (other,) = stages["Compress"], stages["Evaluate"]
    lines = [shared.line.replace("ROW", label) for label in shared.rows]
    assert [*lines, other.line] == board.commands and not other.rows
    own = commands({"Compress": ["compress a", "compress b"]}, board.rows[:1])
    assert [one.line for one in own["Compress"]] == ["compress a", "compress b"]


@given(st.lists(st.floats(0, 300), max_size=40))
def test_names_at_the_ends_of_lines_are_apart(places: list[float]) -> None:
    found = spread(places, 13.0, 20.0, 340.0)
    gap = min(13.0, 320 / max(1, len(places) - 1))
    order = sorted(range(len(places)), key=lambda index: places[index])
    for one, two in pairwise(found[index] for index in order):
        assert two - one >= gap - 1e-6
    assert all(20 - 1e-6 <= place <= 340 + 1e-6 for place in found)
    if all(b - a >= 13 for a, b in pairwise(sorted(places))) and min(places, default=20) >= 20:
        assert found == places


def test_token_kl_is_drawn_by_its_root(board: Leaderboard) -> None:
    curves = {(curve.up, curve.across): curve.svg for curve in size_curves(board, board.rows)}
    svg = ElementTree.fromstring(curves["token KL", "parameters"])
    grid = [float((one.get("d") or "").split(" ")[1].split("H")[0]) for one in svg.iter("path")
            if one.get("class") == "grid"]  # fmt: skip
    texts = [float(one.text or "") for one in svg.iter("text") if one.get("class") == "end"
             and (one.text or "").replace(".", "").isdigit()]  # fmt: skip
    assert len(grid) == len(texts) > 3 and texts[0] == 0
    scale = (grid[0] - grid[-1]) / texts[-1] ** 0.5
    for y, value in zip(grid, texts, strict=True):
        assert grid[0] - y == pytest.approx(scale * value**0.5, abs=0.03)


@given(st.floats(1e-6, 1e6))
def test_marks_of_a_root_axis_are_apart(largest: float) -> None:
    marks = root_ticks(largest)
    roots = [mark**0.5 for mark in marks]
    assert 3 <= len(marks) <= 9 and marks[0] == 0 and marks[-1] <= largest
    assert all(b - a >= largest**0.5 / 8 - 1e-9 for a, b in pairwise(roots))
