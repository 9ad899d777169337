"""The table at the end of a comparison: the best rows first, safe for any terminal and pipe."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from streamline_bench.report.build import build_report
from streamline_bench.report.leaderboard import Leaderboard, read_leaderboard
from streamline_bench.report.views.terminal import terminal_table
from streamline_bench.stability.settings import Settings


@pytest.fixture(scope="module")
def board(
    make_run: Callable[[Path], Path], tmp_path_factory: pytest.TempPathFactory
) -> Leaderboard:
    run = make_run(tmp_path_factory.mktemp("terminal") / "run")
    build_report(run, settings=Settings(draws=50), progress=False)
    return read_leaderboard(run / "leaderboard.json")


def renamed(board: Leaderboard, **labels: str) -> Leaderboard:
    rows = [
        row.model_copy(update={"label": labels.get(row.label, row.label)}) for row in board.rows
    ]
    return board.model_copy(update={"rows": rows})


def test_best_rows_first_with_difference_stability_and_verdict(board: Leaderboard) -> None:
    lines = terminal_table(board).splitlines()
    assert [line.split()[0] for line in lines[1:4]] == ["dense", "layer", "none"]
    layer = next(row for row in board.rows if row.label == "layer")
    assert layer.accuracy_macro and layer.macro and layer.macro.stability
    for number in (
        layer.accuracy_macro.value, layer.accuracy_macro.standard_error, layer.macro.stability.value
    ):  # fmt: skip
        assert f"{100 * number:.1f}" in lines[2]
    change = layer.macro.difference
    for number in (change.value, change.low, change.high):
        assert f"{abs(100 * number):.1f}" in lines[2]
    assert lines[2].endswith(layer.macro.decision or "")
    assert "95 %" in lines[-1] and "dense" in lines[-1]


def test_columns_line_up_with_wide_letters(board: Leaderboard) -> None:
    lines = terminal_table(renamed(board, layer="层层", none="none")).splitlines()
    places = [line.index("±") + (2 if "层" in line else 0) for line in lines[1:4]]
    assert len(set(places)) == 1


def test_control_characters_do_not_reach_the_terminal(board: Leaderboard) -> None:
    text = terminal_table(renamed(board, layer="\x1b[31mred\r\n\u202eevil"))
    assert all(letter.isprintable() or letter == "\n" for letter in text)
    assert len(text.splitlines()) == len(terminal_table(board).splitlines())


def test_a_failed_row_and_what_is_left_out_are_named(board: Leaderboard) -> None:
    dense, none, layer = board.rows
    many = [none.model_copy(update={"label": f"row-{index}"}) for index in range(30)]
    lost = layer.model_copy(
        update={"label": "lost", "failed": "Out of\nmemory " + "x" * 200, "tasks": [],
                "accuracy_macro": None, "macro": None, "micro": None}
    )  # fmt: skip
    text = terminal_table(board.model_copy(update={"rows": [*many, lost, dense]}))
    assert "lost failed: Out of" in text and "19 more rows" in text
    assert sum(line.startswith("dense") for line in text.splitlines()) == 1
    assert max(map(len, text.splitlines())) < 100


def test_perplexities_where_nothing_is_right_or_wrong(
    board: Leaderboard, parts_named: Callable[[str], dict[str, object]]
) -> None:
    payload = board.model_dump(mode="json")
    for row in payload["rows"]:
        row |= {"accuracy_macro": None, "accuracy_micro": None, "macro": None, "micro": None,
                "tasks": []}  # fmt: skip
        row["perplexities"] = [] if row["is_dense"] else parts_named("x")["perplexities"]
    text = terminal_table(Leaderboard.model_validate(payload))
    assert "perplexity" in text and "1.65\N{MULTIPLICATION SIGN}" in text  # e^0.5
    assert "accuracy" not in text
