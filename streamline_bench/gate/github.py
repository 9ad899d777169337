"""A gate's result where GitHub Actions shows it: the step summary, and annotations.

Workflow commands (https://docs.github.com/actions/reference/workflow-commands-for-github-actions)
are lines of output that begin with ``::``; their text must have ``%``, line ends and, in
properties, ``:`` and ``,`` escaped, or a name could begin a command of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from streamline_bench.errors import OutputError
from streamline_bench.gate.result import Check, GateResult
from streamline_bench.gate.table import HEADINGS, cells, line, ordered, verdict
from streamline_bench.report.text.escaping import markdown_text, terminal_text

__all__ = ["append_summary", "to_markdown", "workflow_commands"]

_SHOWN = 10  # annotations that GitHub shows per step and kind


def to_markdown(result: GateResult) -> str:
    """The result in GitHub's Markdown: what needs eyes open, the rest folded."""
    open_checks = [c for c in ordered(result) if c.status not in ("ok", "not compared")]
    rest = [c for c in ordered(result) if c.status in ("ok", "not compared")]
    lines = [
        "### streamline-bench gate",
        "",
        f"**{markdown_text(verdict(result))}**",
        "",
        f"{markdown_text(result.run)} against {markdown_text(result.against)}",
        "",
    ]
    if open_checks:
        lines += [*_table(open_checks), ""]
    if rest:
        summary = f"{len(rest)} more checks"
        lines += [f"<details><summary>{summary}</summary>", "", *_table(rest), "", "</details>", ""]
    if result.new:
        lines += [f"Not in the reference: {', '.join(map(markdown_text, result.new))}.", ""]
    return "\n".join(lines)


def _table(checks: Sequence[Check]) -> list[str]:
    rows = [[markdown_text(cell) for cell in cells(check)] for check in checks]
    rule = ["---:" if 3 <= index <= 6 else "---" for index in range(len(HEADINGS))]
    return ["| " + " | ".join(row) + " |" for row in [list(HEADINGS), rule, *rows]]


def append_summary(result: GateResult, path: Path) -> None:
    """Append to the file that ``GITHUB_STEP_SUMMARY`` names; earlier steps wrote to it too.

    Raises:
        OutputError: it is not writable.
    """
    try:
        with path.open("a", encoding="utf-8") as stream:
            stream.write(to_markdown(result) + "\n")
    except OSError as error:
        raise OutputError(
            f"The step summary '{path}' cannot be written ({error.strerror or error})."
        ) from None


def workflow_commands(result: GateResult) -> list[str]:
    """An error for each check that closes the gate, a warning for each that cannot tell."""
    closing = set(map(id, result.closing))
    errors = [check for check in ordered(result) if id(check) in closing]
    warnings = [
        check
        for check in ordered(result)
        if check.status == "cannot tell" and id(check) not in closing
    ]
    lines = [_command("error", check) for check in errors[:_SHOWN]]
    if len(errors) > _SHOWN:
        lines[-1] = (
            f"::error title=streamline-bench gate::{len(errors) - _SHOWN + 1} more checks fail"
        )
    return lines + [_command("warning", check) for check in warnings[:_SHOWN]]


def _command(kind: str, check: Check) -> str:
    row, task, quantity, *_ = cells(check)
    name = f"{row}, {task}" if task else row
    return f"::{kind} title={_property(f'{name}: {quantity}')}::{_data(line(check))}"


def _data(text: str) -> str:
    return terminal_text(text).replace("%", "%25")


def _property(text: str) -> str:
    return _data(text).replace(":", "%3A").replace(",", "%2C")
