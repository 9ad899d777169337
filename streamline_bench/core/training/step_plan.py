"""Which sequences go into which optimizer step: a pure function of seed and step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch

from streamline_bench.core.recipe.schema import TrainingSpec

__all__ = ["StepPlan"]


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
