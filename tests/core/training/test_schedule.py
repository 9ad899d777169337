"""The learning rate over optimizer steps."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest

from streamline_bench.core.recipe.schema import TrainingSpec
from streamline_bench.core.training.state import CosineSchedule


def rates(steps: int, **changes: Any) -> list[float]:
    settings = {"lr": 2e-4, "min_lr_ratio": 0.25, "warmup_ratio": 0.1, **changes}
    schedule = CosineSchedule.of(TrainingSpec.model_validate(settings), steps, hidden_size=64)
    return [schedule.at(step) for step in range(steps)]


@pytest.mark.parametrize("steps", [2, 7, 100, 1001])
def test_last_step_has_the_minimum(steps: int) -> None:
    assert rates(steps)[-1] == pytest.approx(5e-5, rel=1e-12)


def test_warm_up_rises_to_the_peak_and_falls_from_there() -> None:
    lrs = rates(100)
    assert lrs[:10] == pytest.approx([2e-4 * (i + 1) / 10 for i in range(10)])
    assert max(lrs) == lrs[9] == lrs[10] == 2e-4
    assert all(a > b for a, b in itertools.pairwise(lrs[10:]))


def test_halfway_is_the_mean() -> None:
    assert rates(101, warmup_ratio=0.0)[50] == pytest.approx((2e-4 + 5e-5) / 2)


def test_a_single_step_has_the_peak() -> None:
    assert rates(1) == [2e-4]


def test_reference_uses_an_eighth_of_its_horizon() -> None:
    """64 optimizer steps of 16 micro-batches: position 64 of 512, and the rate barely falls."""
    schedule = CosineSchedule(2e-4, 5e-5, steps=64, warmup=5, stride=1, horizon=0.5 * 64 * 16)
    assert schedule.at(63) == pytest.approx(1.95e-4, rel=5e-3)


def test_reference_wraps_when_stepped_per_micro_batch() -> None:
    schedule = CosineSchedule(2e-4, 5e-5, steps=64, warmup=0, stride=16, horizon=0.5 * 64 * 16)
    assert schedule.at(32) == pytest.approx(5e-5)
    assert schedule.at(63) > 1.9e-4
    assert math.isclose(schedule.at(0), 2e-4)


def test_a_straight_line_with_a_warm_up_counted_in_steps() -> None:
    settings = {"lr": 1.0, "min_lr_ratio": 0.0, "warmup_ratio": 0.5, "warmup_steps": 4}
    lrs = rates(13, **settings, decay="linear")
    assert lrs[:4] == [0.25, 0.5, 0.75, 1.0]
    assert lrs[4:] == pytest.approx([1 - i / 8 for i in range(9)])


def test_a_warm_up_longer_than_the_training_never_reaches_the_peak() -> None:
    settings = {"lr": 1.0, "min_lr_ratio": 0.0, "warmup_ratio": 0.0, "warmup_steps": 10}
    assert rates(5, **settings) == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5])
