"""How two runs are compared: the options of the command and of the library, in one value."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from streamline_bench.stability.metrics import Mode, Quantity

__all__ = ["Settings", "Verdict"]

Verdict = Literal["correct", "correct_norm"]
"""Which verdict decides right or wrong: the task's own (acc, exact_match) or acc_norm."""


@dataclass(frozen=True)
class Settings:
    """How runs are compared.

    Attributes:
        mode: paper's stability, or the arithmetic of its script (which has no interval and ignores
            ``ddof``: it is always 0).
        quantity: None takes what the samples of the dense run record (``recorded_quantity``).
        draws: bootstrap draws for the intervals of stability and of clusters.
        margin: how large a drop of accuracy is tolerated, as a share (0.02 is two points).
    """

    mode: Mode = "paper"
    ddof: int = 1
    quantity: Quantity | None = None
    verdict: Verdict = "correct"
    confidence: float = 0.95
    draws: int = 10_000
    seed: int = 0
    margin: float = 0.02

    @property
    def spread_ddof(self) -> int:
        """The degrees of freedom really used."""
        return 0 if self.mode == "reference_script" else self.ddof

    @property
    def spread_quantity(self) -> Quantity:
        """The quantity really used; lm-eval's where none was chosen and no samples were seen."""
        return self.quantity or "nll_per_byte"
