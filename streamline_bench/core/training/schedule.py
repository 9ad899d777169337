"""Learning rate over optimizer steps: linear warm-up, then a fall that ends at its minimum."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

__all__ = ["CosineSchedule"]


@dataclass(frozen=True)
class CosineSchedule:
    """A pure function of the step, so that nothing needs saving to resume.

    Attributes:
        peak, minimum: learning rates; the last of ``steps`` has exactly ``minimum``.
        steps: optimizer steps of the whole training.
        warmup: steps of linear warm-up; the last of them has ``peak``.
        stride, horizon: the reference's deviation: step s stands at position ``s * stride`` of
            a cosine over ``horizon`` positions, which may end early or wrap.
        decay: the fall after the warm-up: half a cosine, or a straight line.
    """

    peak: float
    minimum: float
    steps: int
    warmup: int
    stride: int = 1
    horizon: float | None = None
    decay: Literal["cosine", "linear"] = "cosine"

    @classmethod
    def over(
        cls,
        steps: int,
        *,
        peak: float,
        min_ratio: float,
        warmup_ratio: float,
        warmup_steps: int | None = None,
        decay: Literal["cosine", "linear"] = "cosine",
    ) -> CosineSchedule:
        """Return the schedule of a training of ``steps`` optimizer steps.

        Args:
            warmup_steps: length of the warm-up, in place of its ratio; if longer than the
                training, the peak is never reached.
        """
        warmup = round(steps * warmup_ratio) if warmup_steps is None else warmup_steps
        return cls(peak, peak * min_ratio, steps, warmup, decay=decay)

    def at(self, step: int) -> float:
        """Return the learning rate of optimizer step ``step`` (0-based)."""
        position = step * self.stride
        if position < self.warmup:
            return self.peak * (position + 1) / self.warmup
        last = self.steps - 1 if self.horizon is None else self.horizon
        progress = (position - self.warmup) / max(last - self.warmup, 1)
        cosine = 0.5 * (1 + math.cos(math.pi * progress))
        share = cosine if self.decay == "cosine" else 1 - progress
        return self.minimum + (self.peak - self.minimum) * share
