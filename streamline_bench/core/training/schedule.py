"""The order of the data and the learning rate: pure functions of seed and step, so that nothing
needs saving to resume."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch

from streamline_bench.core.recipe.schema import TrainingSpec


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


def learning_rate(training: TrainingSpec, hidden_size: int) -> float:
    """Return the peak learning rate; ``auto`` scales the paper's 2e-4 at width 4096."""
    if training.lr != "auto":
        return float(training.lr)
    return min(2e-4 * math.sqrt(4096 / hidden_size), 2e-3)


@dataclass(frozen=True)
class StepPlan:
    """The order of all training sequences over all epochs.

    Attributes:
        sequences: number of training sequences.
        batch_size: sequences of a micro-batch.
        accumulation: micro-batches of an optimizer step; the last step of an epoch may have fewer.
        epochs: passes over the sequences.
        seed: decides the order, which differs between epochs.
    """

    sequences: int
    batch_size: int
    accumulation: int
    epochs: int
    seed: int

    @classmethod
    def of(cls, training: TrainingSpec, sequences: int, seed: int) -> StepPlan:
        """Plan ``training.epochs`` epochs, or as many as ``training.min_steps`` steps need."""
        per_step = training.batch_size * training.gradient_accumulation
        per_epoch = math.ceil(sequences / per_step)
        epochs = max(training.epochs, math.ceil(training.min_steps / per_epoch))
        return cls(sequences, training.batch_size, training.gradient_accumulation, epochs, seed)

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(self.sequences / (self.batch_size * self.accumulation))

    @property
    def steps(self) -> int:
        return self.epochs * self.steps_per_epoch

    @property
    def micro_batches(self) -> int:
        """Micro-batches of the whole training."""
        return self.epochs * math.ceil(self.sequences / self.batch_size)

    def micro_batches_of(self, step: int) -> list[torch.Tensor]:
        """Return the row indices (int64) of each micro-batch of optimizer step ``step``."""
        epoch, within = divmod(step, self.steps_per_epoch)
        per_step = self.batch_size * self.accumulation
        rows = _order(self.sequences, self.seed, epoch)[within * per_step : (within + 1) * per_step]
        return list(torch.split(rows, self.batch_size))


@lru_cache(maxsize=2)
def _order(sequences: int, seed: int, epoch: int) -> torch.Tensor:
    # An odd multiplier keeps (seed, epoch) apart for all seeds and epochs in use.
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(sequences, generator=generator)
