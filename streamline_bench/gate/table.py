"""A gate's result as text: a table for the terminal, and what GitHub Actions shows.

GitHub shows the step summary, in Markdown, and annotations. Workflow commands
(https://docs.github.com/actions/reference/workflow-commands-for-github-actions) are lines of output
that begin with ``::``; their text must have ``%``, line ends and, in properties, ``:`` and ``,``
escaped, or a name could begin a command of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from streamline_bench.errors import OutputError
from streamline_bench.gate.result import SPEEDS, Check, GateResult
from streamline_bench.report.text import (
    MISSING,
    markdown_text,
    p_value,
    percent,
    points,
    rate,
    terminal_text,
    times,
)

if TYPE_CHECKING:
    from rich.table import Table

HEADINGS = ("row", "task", "quantity", "reference", "now", "change", "interval", "p", "status")
_NUMERIC = ("reference", "now", "change", "interval", "p")
NOTE = (
    "Accuracy and grades by task: interval and p are adjusted over the row's tasks (Holm) and "
    "decide; speeds likewise, over all of them. "
    "Stability by task: the interval is adjusted over them too (Bonferroni) and decides."
)
"""Which of the figures decide."""
_ORDER = ("missing", "regressed", "cannot tell", "not compared", "ok")
_COLOURS = {"missing": "red", "regressed": "red", "cannot tell": "yellow", "ok": "green"}


def ordered(result: GateResult) -> list[Check]:
    """Checks by status, the worst first; within a status as they were made."""
    return sorted(result.checks, key=lambda check: _ORDER.index(check.status))


def brief(result: GateResult) -> list[Check]:
    """The checks to look at, ordered: all that are not ok, and the means over tasks.

    A task that is ok is left out where its row has a mean over tasks.
    """
    summed = {(check.row, check.quantity) for check in result.checks if check.task is None}
    return [
        check
        for check in ordered(result)
        if check.status != "ok" or check.task is None or (check.row, check.quantity) not in summed
    ]


def cells(check: Check) -> list[str]:
    """One check as text, in the order of :data:`HEADINGS`; not escaped."""
    speed = check.quantity.removesuffix(" ratio") in SPEEDS
    write = _written(check.quantity) if speed else percent
    change = f"{points(check.change)} %" if speed and check.change is not None else None
    ends = MISSING
    if check.low is not None and check.high is not None:
        ends = f"{points(check.low)} to {points(check.high)}"
    task = check.task or ("mean over tasks" if check.quantity != "result" and not speed else "")
    status = check.status if check.reason is None else f"{check.status}: {check.reason}"
    return [
        check.row,
        task,
        check.quantity,
        write(check.reference),
        write(check.value),
        change or points(check.change),
        ends,
        MISSING if check.p_value is None else p_value(check.p_value),
        status,
    ]


def _written(quantity: str) -> Callable[[float | None], str]:
    if quantity == "speed-up" or quantity.endswith(" ratio"):
        return times
    return rate if quantity == "tokens/s" else _figure


def _figure(value: float | None) -> str:
    return MISSING if value is None else f"{value:.4g}"


def line(check: Check) -> str:
    """One check as a line for a terminal: where, what, from which figure to which."""
    row, task, quantity, before, now, change, ends, p, status = map(terminal_text, cells(check))
    where = f"{row}, {task}" if task else row
    if check.value is None:
        return f"{where}: {quantity} {status}"
    parts = [f"change {change}"]
    if check.low is not None and check.high is not None:
        parts.append(f"interval {ends}")
    if check.p_value is not None:
        parts.append(f"p {p}, both adjusted")
    return f"{where}: {quantity} {status}: {before} before, {now} now ({', '.join(parts)})"


def verdict(result: GateResult) -> str:
    """One sentence on the whole."""
    closing = len(result.closing)
    unclear = sum(check.status == "cannot tell" for check in result.checks)
    more = f"; {unclear} cannot tell" if unclear else ""
    if not result.compared:
        how = "closed:" if closing else "open, but"
        return f"Gate {how} nothing was compared; the reasons are in the table."
    if closing:
        return f"Gate closed: {closing} of {result.compared} checks fail{more}."
    return f"Gate open: none of {result.compared} checks shows a regression{more}."


def to_table(checks: Sequence[Check]) -> Table:
    """Checks as a rich table."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(title="Run against reference, in % and points")
    for name in HEADINGS:
        side: Literal["left", "right"] = "right" if name in _NUMERIC else "left"
        table.add_column(name, justify=side, overflow="fold")
    for check in checks:
        row = [escape(terminal_text(cell)) for cell in cells(check)]
        colour = _COLOURS.get(check.status)
        table.add_row(*row[:-1], f"[{colour}]{row[-1]}[/]" if colour else row[-1])
    return table


_SHOWN = 10  # annotations that GitHub shows per step and kind


def to_markdown(result: GateResult) -> str:
    """The result in GitHub's Markdown: open checks first, the others folded."""
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
    if any(check.p_value is not None for check in result.checks):
        lines += [NOTE, ""]
    if result.new:
        lines += [f"Not in the reference: {', '.join(map(markdown_text, result.new))}.", ""]
    return "\n".join(lines)


def _table(checks: Sequence[Check]) -> list[str]:
    rows = [[markdown_text(cell) for cell in cells(check)] for check in checks]
    rule = ["---:" if name in _NUMERIC else "---" for name in HEADINGS]
    return ["| " + " | ".join(row) + " |" for row in [list(HEADINGS), rule, *rows]]


def append_summary(result: GateResult, path: Path) -> None:
    """Append to the file that ``GITHUB_STEP_SUMMARY`` names; earlier steps write to it too.

    Raises:
        OutputError: the file is not writable.
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
