"""What GitHub shows; names from models and files cannot break out of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from streamline_bench.errors import OutputError
from streamline_bench.gate.result import Check, GateResult, Thresholds
from streamline_bench.gate.table import (
    append_summary,
    brief,
    cells,
    line,
    ordered,
    to_markdown,
    verdict,
    workflow_commands,
)
from streamline_bench.report.text import MINUS, MISSING

HOSTILE = "a|b<script>,c:\n::set-output name=x::100%\x1b[31m"


def result(*checks: Check, strict: bool = False) -> GateResult:
    return GateResult(
        run="run", against="ref", thresholds=Thresholds(strict=strict), checks=tuple(checks)
    )


def check(status: str, row: str = "streamline", **fields: object) -> Check:
    numbers = {"reference": 0.5, "value": 0.4, "change": -0.1, "low": -0.15, "high": -0.05}
    return Check.model_validate(
        {"row": row, "quantity": "accuracy", "task": "arc", "status": status, **numbers, **fields}
    )


def test_an_error_for_what_closes_the_gate_and_a_warning_for_the_unclear() -> None:
    found = result(check("ok"), check("cannot tell", "b"), check("regressed", "c"))
    commands = [command.replace(MINUS, "-") for command in workflow_commands(found)]
    assert [command.split("::")[1] for command in commands] == [
        "error title=c%2C arc%3A accuracy", "warning title=b%2C arc%3A accuracy"
    ]  # fmt: skip
    for command, status in zip(commands, ("regressed", "cannot tell"), strict=True):
        for shown in (status, "50.0 before, 40.0 now", "-10.0", "-15.0 to -5.0"):
            assert shown in command
    strict = result(check("cannot tell"), strict=True)
    assert workflow_commands(strict)[0].startswith("::error")
    assert not strict.passed


def test_not_more_than_github_shows() -> None:
    commands = workflow_commands(result(*(check("regressed", f"row{i}") for i in range(25))))
    assert len(commands) == 10
    assert commands[-1].endswith("::16 more checks fail")


def test_hostile_names_stay_in_their_line() -> None:
    (command,) = workflow_commands(result(check("regressed", HOSTILE, reason=HOSTILE)))
    assert "\n" not in command and "\x1b" not in command
    title, _, text = command.removeprefix("::error title=").partition("::")
    assert ":" not in title and "," not in title
    assert "100%25" in title and "100%25" in text


def test_markdown_escapes_and_folds() -> None:
    text = to_markdown(result(check("regressed", HOSTILE), check("ok")))
    assert "<script>" not in text and "\\|b" in text
    assert "<details><summary>1 more checks</summary>" in text
    lines = text.splitlines()
    table = [part for part in lines if part.startswith("| ")]
    unescaped = {part.replace("\\|", "").count("|") for part in table}
    assert unescaped == {10}, "nine columns in every line"


def test_summary_is_appended(tmp_path: Path) -> None:
    path = tmp_path / "summary.md"
    path.write_text("before\n")
    append_summary(result(check("ok")), path)
    text = path.read_text()
    assert text.startswith("before\n### streamline-bench gate") and "Gate open" in text
    with pytest.raises(OutputError, match="cannot be written"):
        append_summary(result(check("ok")), tmp_path / "no" / "summary.md")


def test_the_worst_comes_first_and_speed_is_relative() -> None:
    found = result(check("ok"), check("not compared"), check("missing"), check("regressed"))
    assert [c.status for c in ordered(found)] == ["missing", "regressed", "not compared", "ok"]
    assert verdict(found).startswith("Gate closed: 2 of 3")
    assert brief(found) == ordered(found), "no mean over tasks sums them up"
    mean = check("ok", task=None)
    assert brief(result(check("ok"), mean)) == [mean]
    speed = check(
        "ok", quantity="tokens/s", task=None, reference=1234.0, value=1300.0, change=0.0535
    )
    assert cells(speed)[1:6] == ["", "tokens/s", "1,234", "1,300", "+5.3 %"]
    assert cells(check("ok", task=None))[1] == "mean over tasks"


def test_what_is_adjusted_is_said_beside_the_figures() -> None:
    """Interval and p of a task are adjusted over the row's tasks, those of a mean are not."""
    found = check("cannot tell", p_value=0.0612)
    assert cells(found)[-2] == "0.061" and cells(check("ok"))[-2] == MISSING
    shown = line(found)
    assert "0.061, both adjusted" in shown
    text = to_markdown(result(found))
    assert "adjusted" in text and "Holm" in text and "0.061" in text
    assert "Holm" not in to_markdown(result(check("ok", quantity="stability")))
