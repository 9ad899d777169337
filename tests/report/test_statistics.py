"""What decides is what is shown: the p of the verdict with its test, tasks beside documents."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from streamline_bench.report.build import build_leaderboard
from streamline_bench.report.leaderboard import Leaderboard
from streamline_bench.report.run_file import RunFile, RunRow
from streamline_bench.report.text import decimal, p_value, percent, points
from streamline_bench.report.views.csv_table import to_csv
from streamline_bench.report.views.markdown import to_markdown
from streamline_bench.report.views.page import to_html
from streamline_bench.stability.comparison import GroupComparison
from streamline_bench.stability.settings import Settings

valid = Leaderboard.model_validate

EXCESS = {"value": 0.0712, "low": 0.0309, "high": 0.1123, "method": "by hand"}
CLUSTERED = {
    "p_value": 0.04321,
    "p_method": "McNemar over 12 passages, mid-p",
    "mcnemar_p": 0.001717,
    "clusters": {"kind": "passages", "count": 12, "largest": 31},
    "flips_above_noise": EXCESS,
}
NOISE = {
    "dense_run": "dense", "repeats": ["again"], "n": 240, "flips": {"value": 0.01},
    "agreement": {"value": 0.99}, "macro_flips": 0.01, "choice_kl": None,
    "tasks": [{"task": "colours", "filter": "none", "n": 120, "flips": {"value": 0.01},
               "agreement": {"value": 0.99}, "same_choice": 0.99, "choice_kl": None}],
}  # fmt: skip


@pytest.fixture(scope="module")
def board(
    make_run: Callable[[Path], Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """Verdicts over documents that come in clusters, above a noise floor."""
    folder = make_run(tmp_path_factory.mktemp("run"))
    rows = [RunRow(label=label, eval=f"{label}/eval") for label in ("dense", "none")]
    run = RunFile(dense="dense", rows=rows)
    board = build_leaderboard(run, folder, settings=Settings(draws=100), progress=False)
    found = board.model_dump(mode="json")
    row = found["rows"][1]
    row["micro"] |= CLUSTERED
    row["tasks"][0]["comparison"] |= CLUSTERED
    return Leaderboard.model_validate({**found, "noise": NOISE}).model_dump(mode="json")


def cells(html: str, first: str) -> list[str]:
    """Text of the cells of the table row that begins with ``first``."""
    lines = re.findall(r"<tr[^>]*>(.*?)</tr>", html, re.S)
    texts = [
        [re.sub(r"<[^>]*>", " ", cell).strip() for cell in re.findall(r"<t[hd].*?</t[hd]>", line)]
        for line in lines
    ]
    return next(found for found in texts if found and found[0].split()[:1] == [first])


def table(page: str, label: str) -> str:
    return re.search(rf'aria-label="{label}">(.*?)</table>', page, re.S).group(1)


def test_the_p_that_decides_is_shown_with_its_test(board: dict[str, Any]) -> None:
    page, text = to_html(valid(board)), to_markdown(valid(board))
    overall = " ".join(cells(table(page, "Tasks and documents"), "none"))
    assert "0.043 12 passages, mid-p" in overall
    assert "12 passages, the largest of 31 documents" in page
    assert "0.0017" not in overall and "0.0017" not in text
    assert "| 0.043 |" in text
    assert "McNemar over 12 passages, mid\\-p" in text
    assert "exact over all documents" not in page
    record = list(csv.DictReader(io.StringIO(to_csv(valid(board)))))[1]
    assert (record["p_value"], record["p_method"]) == ("0.04321", CLUSTERED["p_method"])
    assert record["mcnemar_p"] == "0.001717" and record["clusters"] == "12"
    assert record["p_unadjusted:colours"] == "0.04321" and record["clusters:colours"] == "12"
    assert record["p_method:places"] and record["clusters:places"] == ""


def test_documents_stand_beside_tasks(board: dict[str, Any]) -> None:
    row = board["rows"][1]
    shown = " ".join(cells(table(to_html(valid(board)), "Tasks and documents"), "none"))
    for found in (row["macro"], row["micro"]):
        assert percent(found["pruned"]["value"]) in shown
        assert points(found["difference"]["value"]) in shown
        assert points(found["difference"]["low"]) in shown
        assert found["decision"] in shown


def test_every_task_has_its_statistics(board: dict[str, Any]) -> None:
    page = to_html(valid(board))
    change, answers = (table(page, f"none, {what} by task") for what in ("change", "answers"))
    for task in board["rows"][1]["tasks"]:
        found = task["comparison"]
        shown = " ".join(cells(answers, task["task"]))
        assert decimal(found["kappa"], 2) in shown
        assert percent(found["retention"]["low"]) in shown
        if found["choices"]:
            assert percent(found["pruned_corrected"]["value"]) in shown
            assert decimal(found["choices"]["margin_shift"]["value"], signed=True) in shown
            assert percent(found["calibration"]["pruned_error"]) in shown
    first = " ".join(cells(change, "colours"))
    assert "120 12 passages" in first and "+7.1 [+3.1, +11.2]" in first


def test_a_group_has_its_statistics(board: dict[str, Any]) -> None:
    row = board["rows"][1]
    names = set(GroupComparison.model_fields)
    group = {name: value for name, value in row["micro"].items() if name in names}
    group |= {"group": "both", "tasks": ["colours", "places"], "n": 240}
    found = Leaderboard.model_validate(
        {**board, "rows": [board["rows"][0], {**row, "groups": [group]}]}
    ).model_dump(mode="json")
    shown = " ".join(cells(table(to_html(valid(found)), "none, answers by task"), "both"))
    micro = row["micro"]
    assert decimal(micro["kappa"], 2) in shown
    assert decimal(micro["choice_kl"]["value"]) in shown
    assert decimal(micro["margin_shift"]["value"], signed=True) in shown
    assert percent(micro["pruned_calibration_error"]) in shown


def test_means_over_tasks_have_their_test_in_the_table(board: dict[str, Any]) -> None:
    record = list(csv.DictReader(io.StringIO(to_csv(valid(board)))))[1]
    macro, micro = board["rows"][1]["macro"], board["rows"][1]["micro"]
    for column, value in (
        ("p_value_macro", macro["p_value"]),
        ("kappa_macro", macro["kappa"]),
        ("noninferiority_p_macro", macro["noninferiority_p"]),
        ("pruned_calibration_error_micro", micro["pruned_calibration_error"]),
    ):
        assert value is not None and float(record[column]) == value, column


def test_flips_above_noise_are_in_every_view(board: dict[str, Any]) -> None:
    assert "+7.1 [+3.1, +11.2]" in to_markdown(valid(board))
    overall = " ".join(cells(table(to_html(valid(board)), "Answers behind the change"), "none"))
    assert "+7.1 [+3.1, +11.2]" in overall


def test_it_is_said_which_figures_are_adjusted_over_tasks(board: dict[str, Any]) -> None:
    """Holm moves p and verdict, not the interval: every view says so beside them."""
    found = board["rows"][1]["tasks"][0]["comparison"]
    page, text = to_html(valid(board)), to_markdown(valid(board))
    change = table(page, "none, change by task")
    heads = [
        re.sub(r"<[^>]*>", " ", head) for head in re.findall(r"<th scope=.col.*?</th>", change)
    ]
    for title, word in (("Change", "unadjusted"), ("p", "unadjusted"), ("p", "Holm"),
                        ("Verdict", "Holm")):  # fmt: skip
        assert any(head.split()[0] == title and word in head for head in heads), (title, word)
    line = next(part for part in text.split("## Difference by task")[1].splitlines()
                if part.startswith("| none"))  # fmt: skip
    for shown in (points(found["difference"]["value"]), points(found["adjusted"]["low"]),
                  p_value(found["p_holm"]), found["decision"]):  # fmt: skip
        assert shown in line
    assert "not adjusted" in text and "Holm" in text
    record = list(csv.DictReader(io.StringIO(to_csv(valid(board)))))[1]
    for column, value in (
        ("difference_low_unadjusted:colours", found["difference"]["low"]),
        ("difference_high_holm:colours", found["adjusted"]["high"]),
        ("p_holm:colours", found["p_holm"]),
    ):
        assert float(record[column]) == value
    assert record["decision_by_p_holm:colours"] == found["decision"]
