"""The order of sequences."""

from __future__ import annotations

import pytest
import torch

from streamline_bench.core.recipe.schema import TrainingSpec
from streamline_bench.core.training.state import StepPlan


@pytest.mark.parametrize(("sequences", "batch", "accumulation"), [(23, 4, 2), (8, 4, 2), (3, 8, 4)])
def test_each_epoch_visits_every_sequence_once(
    sequences: int, batch: int, accumulation: int
) -> None:
    plan = StepPlan(sequences, batch, accumulation, epochs=3, seed=1)
    epochs = []
    for epoch in range(3):
        steps = range(epoch * plan.steps_per_epoch, (epoch + 1) * plan.steps_per_epoch)
        micro = [rows for step in steps for rows in plan.micro_batches_of(step)]
        assert all(1 <= len(rows) <= batch for rows in micro)
        epochs.append(torch.cat(micro))
        assert epochs[-1].sort().values.tolist() == list(range(sequences))
    assert len({tuple(order.tolist()) for order in epochs}) > 1


def test_a_step_is_a_function_of_seed_and_number() -> None:
    plan, twin = (StepPlan(23, 4, 2, 2, seed=1) for _ in range(2))
    other = StepPlan(23, 4, 2, 2, seed=2)
    for step in reversed(range(plan.steps)):
        ours, theirs = plan.micro_batches_of(step), twin.micro_batches_of(step)
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert not torch.equal(plan.micro_batches_of(0)[0], other.micro_batches_of(0)[0])


def test_epochs_are_added_for_min_steps() -> None:
    training = TrainingSpec(batch_size=4, gradient_accumulation=2, min_steps=10)
    plan = StepPlan.of(training, 23, seed=0)
    assert (plan.steps_per_epoch, plan.epochs, plan.steps) == (3, 4, 12)
    assert plan.micro_batches == 4 * 6
    assert StepPlan.of(TrainingSpec(epochs=2), 16, seed=0).steps == 4


@pytest.mark.parametrize("batch_size", [2, 5])
@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_processes_share_the_rows_of_a_step(count: int, batch_size: int) -> None:
    plan = StepPlan(23, batch_size, 3, epochs=2, seed=1, at_once=2)
    for step in range(plan.steps):
        whole = torch.cat(plan.micro_batches_of(step))
        shares = [plan.share_of(step, rank, count) for rank in range(count)]
        assert all(1 <= len(rows) <= 2 for share in shares for rows in share)
        sizes = [sum(len(rows) for rows in share) for share in shares]
        assert max(sizes) - min(sizes) <= 1
        assert torch.equal(torch.cat([rows for share in shares for rows in share]), whole)
