"""The parts of the page that compute something: ranking, axes, forest, heat map, frontier."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamline_bench.report.figures.pareto import (
    Axis,
    Point,
    frontier,
    points_of,
    ticks,
    tradeoffs,
)
from streamline_bench.report.provenance import published_numbers
from streamline_bench.report.row import Row
from streamline_bench.report.views.overview import commands_by_stage, heat_map, ranked
from streamline_bench.report.views.page import forest, shade
from streamline_bench.stability.estimate import Estimate


def row(label: str, accuracy: float | None, **fields: Any) -> Row:
    estimate = None if accuracy is None else {"value": accuracy, "standard_error": 0.01}
    return Row.model_validate(
        {"label": label, "is_dense": label == "dense", "accuracy_macro": estimate, "macro": None,
         "accuracy_micro": None, "micro": None, "tasks": [],
         "provenance": {"results_file": None, "model": None, "engine": None}, **fields}
    )  # fmt: skip


def test_ranking_is_by_accuracy_and_keeps_failed_rows_last() -> None:
    rows = [row("a", 0.2), row("lost", None, failed="why"), row("b", 0.9), row("c", 0.2)]
    assert [one.label for one in ranked(rows)] == ["b", "a", "c", "lost"]


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6))
def test_ticks_are_inside_evenly_spaced_and_round(low: float, span: float) -> None:
    found = ticks(low, low + span)
    assert 1 <= len(found) <= 12
    for value in found:
        assert low - 1e-6 * span - 1e-9 <= value <= low + span + 1e-6 * span + 1e-9


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]), (-0.31, 0.12, [-0.3, -0.2, -0.1, 0, 0.1]), (5, 5, [5])],
)
def test_ticks(low: float, high: float, expected: list[float]) -> None:
    assert ticks(low, high) == pytest.approx(expected)


def test_an_axis_places_its_ends() -> None:
    axis = Axis(10, 20, 100, 0)
    assert [axis.place(value) for value in (10, 15, 20)] == [100, 50, 0]
    around = Axis.around([3.0, 3.0], 0, 10)
    assert around.low < 3 < around.high and around.place(3.0) == 5.0


def compared(value: float, low: float, high: float) -> dict[str, Any]:
    half = {"value": 0.5}
    difference = {"value": value, "low": low, "high": high}
    flips = {"right_to_wrong": 0, "wrong_to_right": 0, "wrong_to_other_wrong": None}
    return {"difference": difference, "margin": 0.02, "decision": "worse", "tasks": 1, "n": 5,
            "stability_tasks": 0, "dense": half, "pruned": half, "agreement": half,
            "stability": None, "flips": flips}  # fmt: skip


def test_forest_places_intervals_on_one_scale() -> None:
    rows = [
        row("dense", 0.9),
        row("bad", 0.5, macro=compared(-0.4, -0.5, -0.3)),
        row("good", 0.88, macro=compared(-0.02, -0.05, 0.01)),
    ]
    found = forest(rows)
    assert found is not None and found.margin is not None
    assert [row.label for row, _, _ in found.lines] == ["good", "bad"]
    good, bad = (bar for _, _, bar in found.lines)
    per_point = (good.at - bad.at) / 38
    assert found.zero - found.margin == pytest.approx(2 * per_point, abs=0.05)
    assert bad.width == pytest.approx(20 * per_point, abs=0.05)
    assert 0 < bad.low < bad.at < found.zero < 100
    assert forest(rows[:1]) is None


def test_heat_map_columns_are_those_of_any_row_without_what_all_share() -> None:
    def task(name: str, change: float | None) -> dict[str, Any]:
        common = {"task": name, "filter": "none", "output_type": "multiple_choice",
                  "verdict": "acc", "n": 5}  # fmt: skip
        comparison = None if change is None else {
            **common, "dense": {"value": 0.5}, "pruned": {"value": 0.5},
            "difference": {"value": change}, "agreement": {"value": 0.9}, "stability": None,
            "mcnemar_p": 1.0, "mcnemar_mid_p": 1.0, "effective_n": None, "same_choice": None,
            "kappa": None,
            "flips": {"right_to_wrong": 0, "wrong_to_right": 0, "wrong_to_other_wrong": None},
        }  # fmt: skip
        return {**common, "main": True, "accuracy": {"value": 0.5}, "comparison": comparison}

    rows = [
        row("dense", 0.9, tasks=[task("set_piqa", None)]),
        row("a", 0.5, tasks=[task("set_piqa", -0.25), task("set_pi", 0.8)]),
    ]
    found = heat_map(rows)
    assert found.prefix == "set_"
    assert [column.task for column in found.columns] == ["set_piqa", "set_pi"]
    dense, line = (cells for _, cells in found.lines)
    assert dense[0] is not None and dense[0].comparison is None and dense[1] is None
    assert [cell and cell.task for cell in line] == ["set_piqa", "set_pi"]
    assert [shade(share) for share in (-0.25, 0.0, 0.1, 0.25, 0.8)] == [0, 0, 0.2, 0.5, 1]
    assert heat_map([row("dense", 0.9, tasks=[task("one_task", None)])]).prefix == ""


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=12))
def test_the_frontier_is_what_no_point_beats(places: list[tuple[int, int]]) -> None:
    points = [Point(i, str(i), "g", x, y, 0.0, "") for i, (x, y) in enumerate(places)]
    for more in (True, False):
        sign = 1 if more else -1
        beaten = {
            point
            for point in points
            for other in points
            if sign * other.x >= sign * point.x and other.y >= point.y
            and (other.x, other.y) != (point.x, point.y)
        }  # fmt: skip
        best = frontier(points, more_is_better=more)
        assert {(p.x, p.y) for p in best} == {(p.x, p.y) for p in points if p not in beaten}
        assert len({(p.x, p.y) for p in best}) == len(best), "of equal points one"


def speed(value: float | None) -> dict[str, Any]:
    status = "failed" if value is None else "ok"
    return {"status": status, "output_tokens_per_second": value, "engine": "e", "device": "d",
            "dtype": "float32", "batch_size": 1}  # fmt: skip


def test_rows_are_drawn_against_what_they_differ_in() -> None:
    rows = [
        row("dense", 0.9, parameters=100, throughput=speed(10.0)),
        row(
            "a<b>",
            0.8,
            parameters=80,
            throughput={**speed(15.0), "low": 14.0, "high": 16.0},
            cost="no training",
        ),
        row("b", 0.7, parameters=80, throughput=speed(12.0), cost="calibrated"),
        row("c", 0.6, parameters=80, throughput=speed(None), cost="calibrated"),
        row("lost", None, parameters=60),
    ]
    assert [point.x for point in points_of(rows, "throughput")] == [10.0, 15.0, 12.0]
    (found,) = tradeoffs(rows)
    assert found.kind == "throughput" and found.frontier == ["a<b>", "dense"]
    root = ElementTree.fromstring(found.svg)
    assert {group.get("data-row") for group in root.iter("g")} == {"0", "1", "2"}
    whiskers = [p.get("d") for p in root.iter("path") if p.get("class") == "whisker"]
    assert sum("H" in whisker for whisker in whiskers) == 1, "where rounds are known"
    labels = {text.text for text in root.iter("text")}
    assert {"a<b>", "dense"} <= labels, "escaped once"
    assert tradeoffs(rows[:1]) == []
    alike = [rows[0], rows[3], row("d", 0.5, parameters=80)]
    assert [drawn.kind for drawn in tradeoffs(alike)] == ["parameters"], "if nothing differs"


def test_the_paired_ratio_counts_and_the_reference_is_one() -> None:
    rows = [
        row("dense", 0.9, throughput=speed(10.0)),
        *(
            row(name, 0.8, throughput={**speed(rate), "ratio": ratio, "ratio_low": ratio - 0.1,
                                       "ratio_high": ratio + 0.1})
            for name, rate, ratio in (("a", 2926.0, 1.49), ("b", 2973.0, 1.44))
        ),
    ]  # fmt: skip
    (found,) = tradeoffs(rows)
    assert found.kind == "ratio"
    assert [point.x for point in points_of(rows, "ratio")] == [1.0, 1.49, 1.44]
    assert found.frontier == ["a", "dense"]


def test_bytes_are_drawn_only_where_they_say_more_than_parameters() -> None:
    def sized(label: str, parameters: int, weights: int) -> Row:
        return row(label, 0.5, parameters=parameters, bytes=weights)

    plain = [row("dense", 0.9, parameters=100), sized("a", 80, 160), sized("b", 60, 120)]
    assert [drawn.kind for drawn in tradeoffs(plain)] == ["parameters"]
    quantised = [*plain, sized("c", 100, 50)]
    assert [drawn.kind for drawn in tradeoffs(quantised)] == ["parameters", "bytes"]


def test_rows_of_one_size_are_drawn_against_token_kl() -> None:
    text = {"documents": 1, "windows": 1, "tokens": 9, "window": 9, "same_top": {"value": 0.5},
            "dense_perplexity": 5.0, "pruned_perplexity": 9.0,
            "nats_per_token": {"value": 1.0}}  # fmt: skip
    rows = [row("dense", 0.9, parameters=1000)] + [
        row(name, 0.5, parameters=size, sparsity_requested=0.25,
            divergence={**text, "kl": {"value": kl, "low": kl - 0.5, "high": kl + 0.5}})
        for name, size, kl in (("a", 750, 0.4), ("b", 780, 4.0))
    ]  # fmt: skip
    (found,) = tradeoffs(rows)
    assert found.kind == "kl" and found.frontier == ["a"]
    assert [(p.low, p.high) for p in points_of(rows, "kl")] == [(None, None), (3.5, 4.5)], (
        "a logarithm has no place for an end below 0"
    )
    other = rows[2].model_copy(update={"sparsity_requested": 0.2})
    assert [drawn.kind for drawn in tradeoffs([*rows[:2], other])] == ["parameters"]


def test_every_point_of_the_frontier_has_a_name() -> None:
    """Also in a crowd at the left edge, and no name covers another."""
    rows = [row("dense", 0.9, parameters=1000)]
    rows += [row(f"long_name_{n}", 0.5 + n / 60, parameters=700 + n) for n in range(20)]
    (found,) = tradeoffs(rows)
    root = ElementTree.fromstring(found.svg)
    named = {text.text for text in root.iter("text") if "label" in (text.get("class") or "")}
    assert set(found.frontier) <= named


def test_points_off_the_frontier_that_coincide_have_a_name_together() -> None:
    rows = [row("dense", 0.9, parameters=1000), row("first", 0.8, parameters=700)]
    rows += [row(f"same_{n}", 0.6 + n / 1000, parameters=750) for n in range(3)]
    (found,) = tradeoffs(rows)
    root = ElementTree.fromstring(found.svg)
    (group,) = (group for group in root.iter("g") if group.get("data-rows"))
    assert group.get("data-rows") == "4 3 2"  # the highest first
    assert [text.text for text in group.iter("text")] == ["same_2, same_1, same_0"]
    assert len([mark for mark in root.iter("g") if mark.get("data-row")]) == 5


def number(metric: str, **more: Any) -> dict[str, Any]:
    return {"model": "m", "metric": metric, "value": 1.0, "source": "s", **more}


def test_published_numbers_find_the_task_of_their_metric() -> None:
    names = {
        "HellaSwag": "local_hellaswag", "HeSw": "local_hellaswag", "ARC-easy": "local_arc_easy",
        "ARC-e": "local_arc_easy", "C3": "streamline_c3", "Race-H": "streamline_race_high",
        "MMLU": "mmlu", "average of 13": None, "CoQA": None, "WSC": None,
    }  # fmt: skip
    ours = {name: Estimate(value=0.1) for name in filter(None, names.values())}
    ours["local_commonsense_qa"] = ours["wsc273"] = Estimate(value=0.2)
    recipe = {"published": [number(metric) for metric in names]}
    found = published_numbers(recipe, ours)
    assert [item.task for item in found] == list(names.values())
    assert [item.ours is None for item in found] == [task is None for task in names.values()]
    assert published_numbers({}, ours) == []


def test_stability_and_retention_stand_beside_the_rows_own() -> None:
    stable, kept = Estimate(value=0.7), Estimate(value=0.8)
    recipe = {"published": [number("stability"), number("retained average"), number("average")]}
    found = published_numbers(recipe, {"piqa": Estimate(value=0.1)}, stability=stable,
                              retention=kept)  # fmt: skip
    assert [item.ours for item in found] == [stable, kept, None]
    assert [item.ours for item in published_numbers(recipe, {})] == [None] * 3


def test_numbers_of_another_selection_or_patch_are_left_out() -> None:
    own, other = "in place of the cosine block", "in place of ShortGPT's layers"
    recipe: dict[str, Any] = {
        "name": "r", "method": "linear_patch", "sparsity": 0.25, "cost": "calibrated",
        "published": [number(own), number(other, selection="shortgpt")],
    }  # fmt: skip

    def shown(changed: Mapping[str, Any], **parameters: Any) -> list[str]:
        row = {**recipe, "parameters": parameters, "overridden": changed}
        return [item.metric for item in published_numbers(row, {})]

    assert shown({}) == shown({"sparsity": (0.25, 0.5)}) == [own]
    assert shown({"parameters.selection": (None, "shortgpt")}, selection="shortgpt") == [other]
    assert shown({"parameters.selection": (None, "sleb")}, selection="sleb") == []


def test_numbers_in_other_units_stand_alone() -> None:
    recipe = {"published": [number("WikiText-2 perplexity"), number("piqa", unit="perplexity")]}
    found = published_numbers(recipe, {"piqa": Estimate(value=0.1)})
    assert [(item.unit, item.task) for item in found] == [("perplexity", None)] * 2


def test_commands_are_told_apart_by_what_they_do() -> None:
    stages = commands_by_stage([
        "lm_eval --model streamline --tasks x", "streamline-bench compress m -o 'a b'",
        "OMP_NUM_THREADS=1 HF_HUB_OFFLINE='1' /usr/bin/lm_eval --tasks y",
        "python -m streamline_bench throughput m", "streamline-bench divergence a b",
        "streamline-bench lm-eval --model streamline --include_path mine",
        "echo 'unclosed", "tool lm", "",
    ])  # fmt: skip
    assert [(name, len(lines)) for name, lines in stages.items()] == [
        ("Compress", 1), ("Evaluate", 3), ("Compare on a text", 1), ("Measure speed", 1),
        ("Other", 3),
    ]  # fmt: skip
    assert commands_by_stage([]) == {}
