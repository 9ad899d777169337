"""The committed reference report: valid, portable, and what a fresh run finds.

``tox -e report`` makes the fresh run and names its folder in STREAMLINE_BENCH_FRESH_RUN.
"""

from __future__ import annotations

import importlib.util
import math
import os
from pathlib import Path
from typing import Any

import pytest

from streamline_bench.report.leaderboard import Leaderboard, read_leaderboard
from streamline_bench.report.views.csv_table import to_csv
from streamline_bench.report.views.markdown import to_markdown
from streamline_bench.report.views.page import to_html

valid = Leaderboard.model_validate


@pytest.fixture(scope="module")
def committed(repository: Path) -> dict[str, Any]:
    return read_leaderboard(repository / "reports" / "demo" / "leaderboard.json").model_dump(
        mode="json"
    )


@pytest.fixture(scope="module")
def fresh() -> dict[str, Any]:
    run = os.environ.get("STREAMLINE_BENCH_FRESH_RUN")
    if not run:
        pytest.skip("there is no fresh run (tox -e report makes one)")
    return read_leaderboard(Path(run) / "leaderboard.json").model_dump(mode="json")


def test_the_committed_views_are_those_of_the_committed_data(
    committed: dict[str, Any], repository: Path
) -> None:
    """Else: ``tox -e report -- --update``, or ``streamline-bench report reports/demo``."""
    folder = repository / "reports" / "demo"
    for name, made in (
        ("leaderboard.csv", to_csv(valid(committed))),
        ("leaderboard.md", to_markdown(valid(committed))),
        ("leaderboard.html", to_html(valid(committed))),
    ):
        assert (folder / name).read_bytes() == made.encode(), name


def test_every_committed_board_has_every_view(repository: Path) -> None:
    """Also those without the comparisons of single tasks."""
    for path in (repository / "reports").glob("*/leaderboard.json"):
        board = read_leaderboard(path)
        for render in (to_csv, to_markdown, to_html):
            assert board.dense in render(board), path


def test_no_path_of_a_machine_is_committed(committed: dict[str, Any], repository: Path) -> None:
    for path in (repository / "reports").glob("*/leaderboard.*"):
        text = path.read_text(encoding="utf-8")
        for folder in ("/home/", "/root/", "/tmp/", "/work/", ".tox"):
            assert folder not in text, f"{path.name} of {path.parent.name} names {folder}"


def test_published_paths_are_relative(repository: Path, tmp_path: Path) -> None:
    path = repository / "tests" / "report" / "reference.py"
    spec = importlib.util.spec_from_file_location("reference", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    run = tmp_path / "run"
    data = {"a": [f"lm_eval --out {run}/dense/eval", f"{repository}/tasks"], "b": str(run), "c": 1}
    wanted = {"a": ["lm_eval --out run/dense/eval", "tasks"], "b": "run", "c": 1}
    assert module.portable(data, run) == wanted


def test_a_fresh_run_has_the_same_rows_and_tasks(
    committed: dict[str, Any], fresh: dict[str, Any]
) -> None:
    def shape(board: dict[str, Any]) -> list[tuple[str, Any, list[tuple[str, int]]]]:
        return [
            (row["label"], row["layers"], [(task["task"], task["n"]) for task in row["tasks"]])
            for row in board["rows"]
        ]

    assert shape(fresh) == shape(committed)
    assert all(row["failed"] is None for row in fresh["rows"])


def test_a_fresh_run_agrees_within_the_intervals(
    committed: dict[str, Any], fresh: dict[str, Any]
) -> None:
    """Over tasks always; on single tasks as often as 95 % intervals promise.

    Another processor trains to other last bits, which 800 steps make a few other answers of.
    """
    checks, outside = 0, []
    for before, now in zip(committed["rows"], fresh["rows"], strict=True):
        if before["is_dense"]:
            assert _far(before["accuracy_macro"], now["accuracy_macro"]) == []
        for one, other in zip(before["tasks"], now["tasks"], strict=True):
            found = _far(one["accuracy"], other["accuracy"])
            checks += 1
            if not before["is_dense"]:
                checks += len(_SCORES) + len(_DIRECTIONS)
                found += _outside(one["comparison"], other["comparison"])
                found += _other_flips(one["comparison"], other["comparison"])
            outside += [(before["label"], one["task"], name) for name in found]
        if not before["is_dense"]:
            for scope in ("macro", "micro"):
                assert _outside(before[scope], now[scope]) == []
            checks += len(_DIRECTIONS)
            found = _other_flips(before["micro"], now["micro"])
            outside += [(before["label"], "all tasks", name) for name in found]
    assert len(outside) <= 0.05 * checks, outside


_DIRECTIONS = ("right_to_wrong", "wrong_to_right")


def _far(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Accuracies further apart than the committed one's error explains."""
    gap = abs(now["value"] - before["value"])
    return ["accuracy"] if gap > 1.96 * (before["standard_error"] or 0.0) else []


def _other_flips(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Directions in which the number of flips changed by more than counting explains.

    A number of flips is one of n documents, so that its deviation is at most that of a binomial.
    """
    found = []
    for name in _DIRECTIONS:
        share = before["flips"][name] / before["n"]
        # One flip of the committed run is the least that a task without any has to allow for.
        error = math.sqrt(max(share * (1 - share) * before["n"], 1.0))
        if abs(now["flips"][name] - before["flips"][name]) > 1.96 * error:
            found.append(name)
    return found


_SCORES = ("difference", "agreement", "stability")


def _outside(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    return [
        name
        for name in _SCORES
        if before[name] and not before[name]["low"] <= now[name]["value"] <= before[name]["high"]
    ]


def test_the_noise_floor_is_small(committed: dict[str, Any]) -> None:
    """Another batch size changes the last bits of sums, and hardly an answer."""
    assert committed["noise"]["flips"]["value"] < 0.01
