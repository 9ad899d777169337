"""What a gate found: one check per row, task and quantity."""

from __future__ import annotations

from typing import Literal

from streamline_bench.core.recipe.frozen import Frozen
from streamline_bench.gate.thresholds import Thresholds

__all__ = ["Check", "GateResult", "Quantity", "Status"]

Quantity = Literal["result", "accuracy", "stability", "tokens/s", "speed-up"]
"""``result``: whether there is one; ``speed-up``: tokens per second, as a ratio to the dense model
of the same run."""

Status = Literal["ok", "regressed", "cannot tell", "missing", "not compared"]
"""``regressed``: worse beyond noise and beyond what is tolerated. ``missing``: the reference has
it, the run has not. ``cannot tell``: neither a regression nor its absence is shown."""


class Check(Frozen):
    """One quantity of one row, now and in the reference.

    Attributes:
        row: label of the model.
        task: None for the mean over tasks, and where there are no tasks.
        reference, value: accuracies and stabilities as shares; tokens per second; ratios to dense.
        change: value - reference; for speed value / reference - 1.
        low, high: interval of ``change``; None where no answer changed.
        p_value: of "nothing changed", adjusted over the row's tasks.
        how: what the interval was made from.
        reason: why it is missing or not compared, or why the row failed.
    """

    row: str
    quantity: Quantity
    task: str | None = None
    status: Status
    reference: float | None = None
    value: float | None = None
    change: float | None = None
    low: float | None = None
    high: float | None = None
    p_value: float | None = None
    how: str | None = None
    reason: str | None = None


class GateResult(Frozen):
    """The outcome of a gate.

    Attributes:
        new: what the run has and the reference has not: labels of rows (those that failed there
            included), then tasks, each with the rows that have it.
    """

    kind: Literal["streamline-bench gate"] = "streamline-bench gate"
    schema_version: Literal[1] = 1
    run: str
    against: str
    thresholds: Thresholds
    checks: tuple[Check, ...]
    new: tuple[str, ...] = ()

    @property
    def closing(self) -> tuple[Check, ...]:
        """The checks for which the gate is closed."""
        closes = {"regressed", "missing"} | ({"cannot tell"} if self.thresholds.strict else set())
        return tuple(check for check in self.checks if check.status in closes)

    @property
    def passed(self) -> bool:
        """Whether nothing closes the gate."""
        return not self.closing
