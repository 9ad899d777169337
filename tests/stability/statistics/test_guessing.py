"""What guessing gets, counted one by one; answers beyond habit; the ratio above chance."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import pytest

from streamline_bench.stability.statistics.guessing import (
    Frequent,
    always,
    answer_kappa,
    constant_answer,
    most_given,
    retention_above_chance,
)
from streamline_bench.stability.statistics.paired import Outcomes, PairedSample

YES_NO = ["no", "yes"]


def asked(
    gold: Sequence[int | None], given: Sequence[int], choices: Sequence[list[str]] | None = None
) -> pd.DataFrame:
    """A task of choices as the samples table has it."""
    listed = choices or [YES_NO] * len(gold)
    return pd.DataFrame({
        "choices": listed, "gold": pd.array(gold, dtype="Int64"), "prediction": given, "text": None,
        "target": [str(one) for one in gold], "prediction_norm": None,
    })  # fmt: skip


def test_the_majority_class_is_what_its_answer_scores_question_by_question() -> None:
    gold = [1] * 27 + [0] * 6
    frame = asked(gold, [0] * 31 + [1] * 2)
    scores = {answer: sum(YES_NO[one] == answer for one in gold) / len(gold) for answer in YES_NO}
    assert constant_answer(frame) == Frequent("yes", scores["yes"]) == Frequent("yes", 27 / 33)
    assert always(frame, "no").mean() == scores["no"]
    assert most_given(frame, "acc") == Frequent("no", 31 / 33)


def test_what_not_every_question_offers_cannot_be_always_given() -> None:
    endings = [[f"ending {n}", f"other {n}"] for n in range(6)]
    frame = asked([0] * 6, [0] * 6, endings)
    assert constant_answer(frame) is None
    assert most_given(frame, "acc") == Frequent("ending 5", 1 / 6)
    shared = asked([0, 0, 1], [0, 0, 0], [["a", "b"], ["a", "b"], ["c", "b"]])
    assert constant_answer(shared) == Frequent("b", 1 / 3)  # "a" is right twice, but not offered
    assert constant_answer(asked([0, None], [0, 0])) is None


def test_of_written_answers_any_can_be_always_given() -> None:
    frame = asked([0] * 4, [0] * 4).assign(
        choices=None, gold=None, target=["5", "7", "5", "9"], text=["", "", "5", ""]
    )
    assert constant_answer(frame) == Frequent("5", 0.5)
    assert most_given(frame, "acc") == Frequent("", 0.75)
    assert most_given(frame.assign(text=None, prediction=None), "acc") is None


def test_the_answer_is_the_one_by_which_the_task_is_judged() -> None:
    frame = asked([0, 1], [0, 1]).assign(prediction_norm=[1, 1])
    assert most_given(frame, "acc_norm") == Frequent("yes", 1.0)
    assert most_given(frame, "acc") == Frequent("yes", 0.5)


def test_answers_agree_beyond_habit_as_counted_pair_by_pair() -> None:
    source = np.random.default_rng(3)
    first = source.choice(4, 60, p=[0.7, 0.1, 0.1, 0.1])
    second = np.where(source.random(60) < 0.5, first, source.integers(4, size=60))
    same = sum(a == b for a, b in zip(first, second, strict=True)) / 60
    chance = sum(a == b for a in first for b in second) / 60**2
    assert answer_kappa(first, second) == pytest.approx((same - chance) / (1 - chance))
    # "no" to everything on both sides: full agreement, and nothing beyond the habit.
    assert answer_kappa(np.zeros(60), np.zeros(60)) is None
    assert answer_kappa(np.zeros(60), first) == pytest.approx(0.0)


def verdicts(seed: int, n: int = 150, p: float = 0.45, d: float = 0.6) -> tuple[Any, Any]:
    hard = np.random.default_rng(seed).random((2, n))
    mixed = 0.6 * hard[0] + 0.4 * hard[1]
    return mixed < np.quantile(mixed, p), hard[0] < d


def sample(pruned: Any, dense: Any) -> PairedSample:
    return PairedSample(Outcomes.of(dense, pruned))


def test_the_interval_above_chance_holds_the_ratios_that_the_documents_do_not_exclude() -> None:
    tasks, chances = [verdicts(1), verdicts(2, n=220, p=0.5, d=0.7)], [0.25, 0.5]
    found = retention_above_chance([sample(*task) for task in tasks], chances, 0.95)
    assert found is not None

    def distance(ratio: float) -> float:
        """Of mean(pruned's way - ratio * dense's way) from 0, in its standard errors."""
        mean = variance = 0.0
        for (pruned, dense), chance in zip(tasks, chances, strict=True):
            way = (pruned - chance) - ratio * (dense - chance * 1.0)
            mean += way.mean() / (1 - chance) / 2
            variance += way.var() / len(way) / (2 * (1 - chance)) ** 2
        return abs(mean) / math.sqrt(variance)

    assert distance(found.value) == pytest.approx(0.0, abs=1e-9)
    for end in (found.low, found.high):  # half a flip more than was seen
        assert distance(end) == pytest.approx(1.96, abs=0.03)
    assert found.low < found.value < found.high


def test_a_guesser_keeps_nothing_above_chance_and_a_guessing_model_has_nothing_to_keep() -> None:
    gold = np.random.default_rng(5).integers(4, size=400)
    guesses, able = np.random.default_rng(6).integers(4, size=400) == gold, gold >= 1
    found = retention_above_chance([sample(guesses, able)], [0.25], 0.95)
    assert found is not None and found.low < 0 < found.high
    assert guesses.mean() / able.mean() > 0.3  # what a ratio of accuracies would call kept
    assert retention_above_chance([sample(able, guesses)], [0.25], 0.95) is None
    same = retention_above_chance([sample(able, able)], [0.25], 0.95)
    assert same is not None and same.value == 1.0 and same.low < 1 < same.high


def test_the_interval_above_chance_covers() -> None:
    """Two tasks of 150 questions, retention 0.5 of what is above chance."""
    source = np.random.default_rng(7)
    inside = 0
    for _ in range(1000):
        pairs = []
        for chance in (0.25, 0.5):
            hard = source.random((2, 150))
            dense = hard[0] < chance + 0.3
            kept = hard[1] < 0.6
            # Half of the dense model's way: of its right answers 60 %, of the others the rest.
            rest = (chance + 0.15 - 0.6 * (chance + 0.3)) / (1 - chance - 0.3)
            pairs.append(sample(np.where(dense, kept, hard[1] < rest), dense))
        found = retention_above_chance(pairs, [0.25, 0.5], 0.95)
        inside += found is None or found.low <= 0.5 <= found.high
    assert 0.925 <= inside / 1000 <= 0.975
