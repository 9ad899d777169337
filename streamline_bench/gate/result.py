"""What a gate tolerates, and what it found: one check per row, task and quantity."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from streamline_bench.core.recipe.schema import Frozen


class Thresholds(Frozen):
    """What a gate tolerates, and how sure it must be.

    Attributes:
        accuracy: tolerated drop of accuracy, and of grades, as a share (0.02 is two points).
        stability: tolerated drop of stability, as a share.
        speed: tolerated drop of tokens per second and of the ratio to dense, relative (0.05).
        confidence: of all intervals.
        draws, seed: of the bootstrap.
        strict: whether 'cannot tell' closes the gate too, and that nothing could be compared.
    """

    accuracy: float = Field(default=0.02, ge=0, lt=1)
    stability: float = Field(default=0.02, ge=0, lt=1)
    speed: float = Field(default=0.05, ge=0, lt=1)
    confidence: float = Field(default=0.95, ge=0.5, lt=1)
    draws: int = Field(default=10_000, ge=100)
    seed: int = Field(default=0, ge=0)
    strict: bool = False


Quantity = Literal[
    "result", "accuracy", "grade", "stability", "tokens/s", "speed-up",
    "TTFT", "TPOT", "ITL", "E2EL", "goodput", "load",
    "tokens/s ratio", "TTFT ratio", "TPOT ratio", "ITL ratio", "E2EL ratio", "goodput ratio",
    "load ratio",
]  # fmt: skip
"""``result``: whether the row has one; ``grade``: what judges a task that has no verdicts, as a
share of the highest grade; ``speed-up``: tokens per second as a multiple of the dense
model's in the same run. Of served models: mean latencies in milliseconds, good requests per second,
the highest load that keeps the objective; and each as a multiple of the dense model's."""

SPEEDS = ("tokens/s", "speed-up", "TTFT", "TPOT", "ITL", "E2EL", "goodput", "load")
"""Quantities of speed, without their ratios."""

Status = Literal["ok", "regressed", "cannot tell", "missing", "not compared"]
"""``regressed``: worse beyond noise and beyond what is tolerated. ``missing``: the reference has
it and the run does not. ``cannot tell``: the data show neither a regression nor its absence."""


class Check(Frozen):
    """One quantity of one row, now and in the reference.

    Attributes:
        row: label of the model.
        task: None for the mean over tasks, and where there are no tasks; of a served model, the
            load.
        reference, value: accuracies, grades and stabilities as shares; tokens per second; ratios to
            dense.
        change: value - reference; for speed value / reference - 1.
        low, high: interval of ``change``, adjusted over the row's tasks for one task, and over all
            speeds for a speed; None where no answer changed.
        p_value: of "nothing changed", adjusted likewise: below 1 - confidence where the interval
            excludes 0.
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
        new: what only the run has: labels of rows (also those that failed in the reference), then
            tasks, each with the rows that have it.
    """

    kind: Literal["streamline-bench gate"] = "streamline-bench gate"
    schema_version: Literal[1] = 1
    run: str
    against: str
    thresholds: Thresholds
    checks: tuple[Check, ...]
    new: tuple[str, ...] = ()

    @property
    def compared(self) -> int:
        """How many checks compare something."""
        return sum(check.status != "not compared" for check in self.checks)

    @property
    def closing(self) -> tuple[Check, ...]:
        """The checks for which the gate is closed."""
        closes = {"regressed", "missing"}
        if self.thresholds.strict:
            closes |= {"cannot tell"} if self.compared else {"not compared"}
        return tuple(check for check in self.checks if check.status in closes)

    @property
    def passed(self) -> bool:
        """Whether nothing closes the gate."""
        return not self.closing
