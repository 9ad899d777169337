"""Prompts are fixed by their seed and hold no reserved token."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from streamline_bench.throughput.load import ServingLoad
from streamline_bench.throughput.workload import Workload, prompts


def test_prompts_are_the_same_everywhere_and_differ_from_one_another() -> None:
    first = prompts(4, 16, 100, seed=3)
    assert first == prompts(4, 16, 100, seed=3)
    assert len({tuple(prompt) for prompt in first}) == 4
    assert all(len(prompt) == 16 for prompt in first)
    assert prompts(4, 16, 100, seed=4) != first


def test_a_larger_batch_begins_with_the_smaller() -> None:
    assert prompts(5, 8, 100, seed=0)[:2] == prompts(2, 8, 100, seed=0)


def test_reserved_tokens_are_left_out() -> None:
    (prompt,) = prompts(1, 200, 6, seed=0, reserved=frozenset({0, 1, 5}))
    assert set(prompt) == {2, 3, 4}
    with pytest.raises(ValueError, match="leaves no token"):
        prompts(1, 1, 2, seed=0, reserved=frozenset({0, 1}))


def test_batch_sizes_are_taken_once_and_checked() -> None:
    assert Workload(batch_sizes=(8, 1, 8)).batch_sizes == (8, 1)
    for wrong in ((), (0,), (-1,)):
        with pytest.raises(ValidationError):
            Workload(batch_sizes=wrong)
    with pytest.raises(ValidationError):
        ServingLoad(request_rates=(0.0,))


def test_the_cost_counts_starts_and_rounds() -> None:
    workload = Workload(batch_sizes=(1, 8), blocks=4, rounds=5, warmup_rounds=1)
    assert workload.steps == 1 + 2 * 6
    assert all(part in workload.cost(3) for part in ("12 starts", "144 rounds"))
    bounded = workload.model_copy(update={"until_precision": 0.02, "minutes": 30})
    assert all(part in bounded.cost(3) for part in ("at least", "30 minutes"))
    for wrong in (
        {"blocks": 0}, {"until_precision": 0}, {"until_precision": 1}, {"minutes": 0}, {"seed": -1}
    ):  # fmt: skip
        with pytest.raises(ValidationError):
            Workload.model_validate(wrong)
