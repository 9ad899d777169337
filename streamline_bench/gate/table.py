"""A gate's checks as a table for the terminal: what closes it first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from streamline_bench.gate.result import Check, GateResult
from streamline_bench.report.text.escaping import terminal_text
from streamline_bench.report.text.formats import MISSING, percent, points, rate, times

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["HEADINGS", "brief", "cells", "line", "ordered", "to_table", "verdict"]

HEADINGS = ("row", "task", "quantity", "reference", "now", "change", "interval", "status")
_ORDER = ("missing", "regressed", "cannot tell", "not compared", "ok")
_COLOURS = {"missing": "red", "regressed": "red", "cannot tell": "yellow", "ok": "green"}


def ordered(result: GateResult) -> list[Check]:
    """Checks by status, the worst first; within a status as they were made."""
    return sorted(result.checks, key=lambda check: _ORDER.index(check.status))


def brief(result: GateResult) -> list[Check]:
    """The checks worth a look, ordered: all that are not plainly fine, and what sums up the rest.

    A task that is fine is left out where its row has a mean over tasks.
    """
    summed = {(check.row, check.quantity) for check in result.checks if check.task is None}
    return [
        check
        for check in ordered(result)
        if check.status != "ok" or check.task is None or (check.row, check.quantity) not in summed
    ]


def cells(check: Check) -> list[str]:
    """One check as text, in the order of :data:`HEADINGS`; not escaped."""
    speed = check.quantity in ("tokens/s", "speed-up")
    write = {"tokens/s": rate, "speed-up": times}.get(check.quantity, percent)
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
        status,
    ]


def line(check: Check) -> str:
    """One check as a line for a terminal: what, where, from which figure to which."""
    row, task, quantity, before, now, change, ends, status = map(terminal_text, cells(check))
    where = f"{row}, {task}" if task else row
    if check.value is None:
        return f"{where}: {quantity} {status}"
    return f"{where}: {quantity} {status}: {before} before, {now} now (change {change}, {ends})"


def verdict(result: GateResult) -> str:
    """One sentence on the whole."""
    closing = len(result.closing)
    unclear = sum(check.status == "cannot tell" for check in result.checks)
    compared = sum(check.status != "not compared" for check in result.checks)
    told = f"; {unclear} cannot tell" if unclear else ""
    if closing:
        return f"Gate closed: {closing} of {compared} checks fail{told}."
    return f"Gate open: none of {compared} checks shows a regression{told}."


def to_table(checks: Sequence[Check]) -> Table:
    """Checks as a rich table."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(title="Run against reference, in % and points")
    for name in HEADINGS:
        numeric = name in ("reference", "now", "change", "interval")
        table.add_column(name, justify="right" if numeric else "left", overflow="fold")
    for check in checks:
        row = [escape(terminal_text(cell)) for cell in cells(check)]
        colour = _COLOURS.get(check.status)
        table.add_row(*row[:-1], f"[{colour}]{row[-1]}[/]" if colour else row[-1])
    return table
