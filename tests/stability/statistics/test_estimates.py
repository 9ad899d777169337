"""Test, interval and verdict say the same; clusters only widen."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest
from scipy.stats import t as scipy_t

from streamline_bench.stability.compare_answers import compare
from streamline_bench.stability.comparison import GroupComparison, Overall, TaskComparison
from streamline_bench.stability.samples import Samples
from streamline_bench.stability.settings import Settings
from streamline_bench.stability.statistics.clustered_mcnemar import clustered_test
from streamline_bench.stability.statistics.estimates import paired_estimates
from streamline_bench.stability.statistics.paired import Outcomes, mcnemar, mcnemar_test, newcombe
from streamline_bench.stability.statistics.resampled import resample_clusters

FAST = Settings(draws=4000)


def answers(counts: tuple[int, int, int, int]) -> tuple[list[list[float]], list[list[float]]]:
    """Scores of both runs, gold 0, for these numbers of outcomes."""
    right, wrong = [-1.0, -2.0], [-2.0, -1.0]
    pairs = [(right, right), (right, wrong), (wrong, right), (wrong, wrong)]
    every = [pair for pair, count in zip(pairs, counts, strict=True) for _ in range(count)]
    return [first for first, _ in every], [second for _, second in every]


def test_balanced_clusters_do_not_make_a_difference_significant(
    questions: Callable[..., Samples],
) -> None:
    """Ten passages lost two answers and gained one each, ten lost and gained one each."""
    passages = [(1, 2, 1, 1)] * 10 + [(3, 1, 1, 0)] * 10 + [(3, 0, 0, 2)] * 15 + [(1, 0, 0, 4)] * 5
    runs: list[list[list[float]]] = [[], []]
    for counts in passages:
        for run, scores in zip(runs, answers(counts), strict=True):
            run.extend(scores)
    labels = [f"passages:{index // 5}" for index in range(200)]
    dense, pruned = (
        questions(run, {"t": (scores, [0] * 200, labels)})
        for run, scores in zip(("dense", "pruned"), runs, strict=True)
    )
    result = compare(dense, pruned, settings=FAST)
    for found in (result.tasks[0], result.micro, result.macro):
        assert (found.flips.right_to_wrong, found.flips.wrong_to_right) == (30, 20)
        assert found.p_value == pytest.approx(binomtest(20, 50).pvalue)
        assert found.p_method == "McNemar, exact"
        assert found.difference.low < 0 < found.difference.high
        assert found.decision == "cannot tell"


def contradictory(found: TaskComparison | GroupComparison | Overall, level: float) -> bool:
    contains = found.difference.low <= 0 <= found.difference.high
    decided = found.decision in ("better", "worse")
    return contains != (found.p_value >= level) or (decided and contains)


def test_interval_p_and_verdict_never_contradict(questions: Callable[..., Samples]) -> None:
    source = np.random.default_rng(12)
    seen: set[str] = set()
    for trial in range(24):
        tasks = {}
        for task in ("a", "b"):
            size = int(source.choice([2, 4]))
            tables = source.multinomial(
                size,
                [0.4, *source.permutation([0.08, 0.22]), 0.3],
                size=int(source.choice([6, 25])),
            )
            scores = [answers(tuple(table)) for table in tables.tolist()]
            labels = [f"passages:{index // size}" for index in range(size * len(tables))]
            tasks[task] = (
                [list(chain(*part)) for part in zip(*scores, strict=True)],
                [0] * len(labels),
                labels if trial % 3 else None,
            )
        runs = [
            questions(run, {task: (sides[side], gold, labels)
                            for task, (sides, gold, labels) in tasks.items()},
                      groups={"both": ["a", "b"]})
            for side, run in enumerate(("dense", "pruned"))
        ]  # fmt: skip
        result = compare(*runs, settings=Settings(draws=1000))
        assert result.macro is not None and result.micro is not None
        for found in (*result.tasks, *result.groups, result.macro, result.micro):
            assert not contradictory(found, 0.05), (trial, found)
            seen.add(str(found.p_method).split(" over")[0])
            seen.add("widened" * ("does not exclude" in str(found.difference.method)))
    assert {"widened", "McNemar", "normal, from the interval"} <= seen


def test_p_is_the_intervals_where_that_contains_zero() -> None:
    """Eight passages all lost answers, one of them most: the signs say worse, Student does not."""
    lost = np.array([1, 1, 1, 1, 1, 1, 1, 30])
    sums = np.stack([np.full(8, 60), np.full(8, 40), 40 - lost, 60 - lost], axis=1).astype(float)
    drawn = resample_clusters(sums, "passages", FAST, "t")
    outcomes = Outcomes(int((40 - lost).sum()), int(lost.sum()), 0, 160)
    found = paired_estimates(outcomes, FAST, drawn, sums[:, 2] - sums[:, 1])
    assert clustered_test(-lost, "passages")[0] < 0.05 and mcnemar(outcomes) < 0.05
    assert found["difference"].low < 0 < found["difference"].high
    assert found["p_method"] == "interval of the difference"
    distance = -found["difference"].value / found["difference"].standard_error
    assert found["p_value"] == pytest.approx(2 * scipy_t.sf(distance, 7))


@settings(deadline=None)
@given(
    st.tuples(*[st.integers(0, 60)] * 4).filter(lambda counts: sum(counts) > 0),
    st.sampled_from([0.8, 0.95, 0.99]),
)
def test_without_clusters_they_do_not_either(
    counts: tuple[int, int, int, int], confidence: float
) -> None:
    outcomes, level = Outcomes(*counts), 1 - confidence
    found = paired_estimates(outcomes, Settings(confidence=confidence), None, None)
    difference = found["difference"]
    assert (difference.low <= 0 <= difference.high) == (found["p_value"] >= level)
    low, high = newcombe(outcomes, confidence)
    p, method = mcnemar_test(outcomes)
    if (low <= 0 <= high) == (p >= level):  # what agrees stays as it is
        assert (difference.low, difference.high) == (low, high)
        assert (found["p_value"], found["p_method"]) == (p, method)
