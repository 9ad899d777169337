"""A board of several sizes: ranks of each, a head for each, curves, tables, nothing said twice."""

from __future__ import annotations

import copy
from html import unescape
from itertools import pairwise
from typing import Any
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamline_bench.report.figures.lines import COLOURS, spread
from streamline_bench.report.figures.pareto import root_ticks, tradeoffs
from streamline_bench.report.figures.sizes import at_equal_size, chance_of, equal_note, size_curves
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
    assert "cannot be told apart from slice (" in small and "least token KL: slice, 0.50" in small
    assert "from slice with about 400 documents, of 100 now" in small
    assert large.startswith("50 %: slice") and "tell it apart from all" in large
    assert "least token KL: map, 2.00" in large


def test_the_head_names_the_best_of_a_size_whatever_its_cost(sized: dict[str, Any]) -> None:
    """And the leader of every other cost; what only very many documents tell apart is equal."""
    trained = {**sized["rows"][1], "label": "lora-0.25", "group": "lora", "cost": "recovered",
               "accuracy_macro": {"value": 0.75}}  # fmt: skip
    contests = [{**each, "tests": [{**test, "needed": 123_456} for test in each["tests"]]}
                for each in sized["contests"]]  # fmt: skip
    one = {**sized, "rows": [*sized["rows"], trained], "contests": contests}
    small = headline(Leaderboard.model_validate(one)).split("Asked to lose ")[1]
    assert small.startswith("25 %: lora answers 75.0 %, most of all, with no other recovered")
    assert "; map answers 70.0 %" in small and "practically equal to slice" in small
    tested = {**contests[1]["tests"][0], "first": "lora-0.25", "needed": None}
    met = {**contests[1], "cost": "recovered", "accuracy": 0.75, "tests": [tested],
           "entries": ["lora-0.25", "none-0.25"]}  # fmt: skip
    both = Leaderboard.model_validate({**one, "contests": [*contests, met]})
    small = headline(both).split("Asked to lose ")[1]
    assert small.startswith("25 %: lora answers 75.0 %, most of 2 recovered models")
    assert "; map answers 70.0 %, most of 3 calibrated models" in small
    assert "> 100,000 / 100" in unescape(to_markdown(both))


def test_time_to_make_is_not_drawn_where_sizes_share_their_scans(sized: dict[str, Any]) -> None:
    rows = [{**row, "seconds": {"compress": 10.0 * place}} for place, row in
            enumerate(sized["rows"])]  # fmt: skip
    board = Leaderboard.model_validate({**sized, "rows": rows})
    one = [row for row in board.rows if row.is_dense or row.axes["sparsity"] == 0.25]
    assert "making" in {found.kind for found in tradeoffs(one)}
    assert "making" not in {found.kind for found in tradeoffs(board.rows)}


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
    assert token_kl.best(1) == 2.0, "its interval of 0.1 is apart from 2.5's"
    assert token_kl.best(0) is None and accuracy.best(1) is None and stability.best(0) is None
    wide = {one.label: cells for one, cells in accuracy.lines}["slice"][1]
    assert wide.ends == pytest.approx((0.5 - 1.96 * 0.02, 0.5 + 1.96 * 0.02), abs=1e-5), "95 %"
    assert [one.label for one, _ in accuracy.lines] == ["slice", "map", "none"], "best first"


def test_markdown_has_a_table_for_every_size(board: Leaderboard) -> None:
    text = to_markdown(board).replace("\\", "")
    small, large = text.split("### Asked to lose ")[1:3]
    assert "map-0.25" in small and "-0.5 |" not in small and "| dense |" in small
    assert "map-0.5" in large.partition("\n\n|")[2].partition("\n\n")[0]
    equal = text.partition("## At equal size: token KL, nats")[2].partition("##")[0]
    assert "| slice | 0.50 [0.40, 0.60] | 2.50 [2.40, 2.60] |" in equal
    assert "| **2.00 [1.90, 2.10]** |" in equal, "apart from all others"
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


def more_recipes(sized: dict[str, Any], count: int) -> Leaderboard:
    """The board with further recipes that are the worst everywhere, their tasks with choices."""
    rows = copy.deepcopy(sized["rows"])
    for number in range(count):
        for row in copy.deepcopy(rows[1:3]):
            row["group"] = f"other{number}"
            row["label"] = row["label"].replace("none", row["group"])
            row["accuracy_macro"] = {"value": 0.2 - number / 100, "standard_error": 0.02}
            row["divergence"]["kl"] = {"value": 9.0 + number}
            rows.append(row)
    for row in rows[1:]:
        compared = {
            "task": "t", "filter": "none", "output_type": "multiple_choice", "verdict": "acc",
            "n": 100, "dense": {"value": 0.8}, "pruned": {"value": 0.5}, "chance": 0.25,
            "difference": {"value": -0.3}, "agreement": {"value": 0.6}, "stability": None,
            "effective_n": None, "same_choice": None, "kappa": None, "mcnemar_p": 0.5,
            "mcnemar_mid_p": 0.5,
            "flips": {"right_to_wrong": 9, "wrong_to_right": 1, "wrong_to_other_wrong": None},
        }  # fmt: skip
        row["tasks"] = [{
            "task": "t", "filter": "none", "main": True, "output_type": "multiple_choice",
            "verdict": "acc", "n": 100, "accuracy": {"value": 0.5}, "comparison": compared,
        }]  # fmt: skip
    return Leaderboard.model_validate({**sized, "rows": rows})


def test_the_best_have_a_colour_and_the_rest_is_grey(sized: dict[str, Any]) -> None:
    board = more_recipes(sized, 30)
    curves = {(curve.up, curve.across): curve.svg for curve in size_curves(board, board.rows)}
    for up in ("accuracy", "token KL"):
        root = ElementTree.fromstring(curves[up, "parameters"])
        groups = [one for one in root.iter("g") if "series" in (one.get("class") or "")]
        grey = [one for one in groups if "rest" in (one.get("class") or "")]
        assert len(groups) == 33 and len(grey) == 33 - COLOURS and groups[: len(grey)] == grey
        assert not any(path.get("class") == "band" for one in grey for path in one.iter("path"))
        coloured = [one.findtext("title") for one in groups[len(grey) :]]
        assert {"map", "slice", "none"} <= set(coloured)
        assert len({one.get("class") for one in groups[len(grey) :]}) == COLOURS
        assert all(one.find("text") is not None for one in groups[len(grey) :]), "named"


def test_guessing_is_drawn_and_what_the_numbers_rest_on(sized: dict[str, Any]) -> None:
    board = more_recipes(sized, 1)
    assert chance_of(board.rows) == 0.25 and chance_of(board.rows[:1]) is None
    curves = {(curve.up, curve.across): curve.svg for curve in size_curves(board, board.rows)}
    assert "guessing: 25.0 %" in curves["accuracy", "parameters"]
    assert "100 questions" in curves["accuracy", "parameters"]
    assert "guessing" not in curves["stability", "parameters"]
    assert "700 tokens" in curves["token KL", "parameters"]


def test_a_rise_with_what_is_removed_has_a_caveat(sized: dict[str, Any]) -> None:
    board = Leaderboard.model_validate(sized)
    assert "rises" not in equal_note(board, board.rows)
    rising = copy.deepcopy(sized)
    rising["rows"][2]["accuracy_macro"]["value"] = 0.62
    board = Leaderboard.model_validate(rising)
    assert "(none), within the intervals" in equal_note(board, board.rows)
    rising["rows"][2]["accuracy_macro"]["value"] = 0.75
    board = Leaderboard.model_validate(rising)
    assert "beyond the intervals of none" in equal_note(board, board.rows)


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
