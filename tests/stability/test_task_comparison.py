"""Test, interval and verdict of whole comparisons say the same."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import chain

import numpy as np
import pytest
from scipy.stats import t as scipy_t

from streamline_bench.stability.compare_answers import compare_answers
from streamline_bench.stability.comparison import Clusters, GroupComparison, Overall, TaskComparison
from streamline_bench.stability.samples import Samples
from streamline_bench.stability.settings import Settings
from streamline_bench.stability.statistics.clusters import ClusterLabels
from streamline_bench.stability.statistics.paired import Outcomes, PairedSample
from streamline_bench.stability.task_comparison import paired_estimates, paired_sample

FAST = Settings(draws=4000)


def answers(counts: tuple[int, int, int, int]) -> tuple[list[list[float]], list[list[float]]]:
    """Scores of both runs, gold 0, for these numbers of outcomes."""
    right, wrong = [-1.0, -2.0], [-2.0, -1.0]
    pairs = [(right, right), (right, wrong), (wrong, right), (wrong, wrong)]
    every = [pair for pair, count in zip(pairs, counts, strict=True) for _ in range(count)]
    return [first for first, _ in every], [second for _, second in every]


def test_balanced_clusters_say_more_than_documents_alone(
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
    found = compare_answers(dense, pruned, settings=FAST).tasks[0]
    assert (found.flips.right_to_wrong, found.flips.wrong_to_right) == (30, 20)
    assert found.p_method == "McNemar over 40 passages, score"
    # Passages differ less than documents that stand alone would, so that they say more.
    rows = np.array([[sum(counts), counts[2] - counts[1]] for counts in passages])
    within = 40 / 39 * np.square(rows[:, 1] + 0.05 * rows[:, 0]).sum()
    effect = (within + 0.5) / (30 + 20 - 10**2 / 200 + 0.5)
    assert effect < 0.5
    expected = 2 * scipy_t.sf(10 / math.sqrt(effect * 50), 39)
    assert found.p_value == pytest.approx(expected)
    assert found.difference.high < 0 and found.decision == "worse"


def contradictory(found: TaskComparison | GroupComparison | Overall, level: float) -> bool:
    """Whether p, interval and verdict of one row part, by themselves or after Holm."""
    excludes = not found.difference.low <= 0 <= found.difference.high
    p, ends = found.p_value, found.difference
    if isinstance(found, TaskComparison | GroupComparison):
        p, ends = found.p_holm, found.adjusted
        assert ends.low <= found.difference.low and found.difference.high <= ends.high
    significant = not ends.low <= 0 <= ends.high
    decided = found.decision in ("better", "worse")
    return (
        excludes != (found.p_value < level)
        or significant != (p < level)
        or (decided and not significant)
        or (found.noninferiority_p < level / 2) != (found.difference.low > -found.margin)
        or (found.decision == "cannot tell" and found.difference.low > -found.margin)
    )


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
        result = compare_answers(*runs, settings=Settings(draws=1000))
        assert result.macro is not None and result.micro is not None
        for found in (*result.tasks, *result.groups, result.macro, result.micro):
            assert not contradictory(found, 0.05), (trial, found)
            seen.add(str(found.p_method).split(" over")[0])
            if found.p_holm is not None and found.p_value < 0.05 <= found.p_holm:
                seen.add("Holm alone")
    assert {"McNemar", "McNemar, score", "score", "Holm alone"} <= seen


def test_one_passage_that_lost_most_is_one_witness() -> None:
    """Eight passages all lost answers, one of them most."""
    lost = np.array([1, 1, 1, 1, 1, 1, 1, 30])
    right = np.repeat([True, False], [8 * 40, 8 * 20])
    labels = np.concatenate([np.repeat(np.arange(8), 40), np.repeat(np.arange(8), 20)])
    now = right.copy()
    for passage, count in enumerate(lost):
        now[np.flatnonzero(right & (labels == passage))[:count]] = False
    shown = Clusters(kind="passages", count=8, largest=60)
    sample = paired_sample(right, now, ClusterLabels(labels, shown))
    found = paired_estimates(sample, FAST)
    assert sample.outcomes == Outcomes(8 * 40 - 37, 37, 0, 160)
    assert found["difference"].low < 0 < found["difference"].high and found["p_value"] > 0.05
    alone = paired_estimates(PairedSample(sample.outcomes), FAST)
    assert alone["p_value"] < 1e-6 and alone["difference"].high < 0
    for name in ("agreement", "retention"):
        assert found[name].value == alone[name].value
        assert found[name].high - found[name].low > 2 * (alone[name].high - alone[name].low)
    assert found["detectable"] > 2 * alone["detectable"]
    assert found["noninferiority_p"] < 1 and found["margin"] == 0.02


def test_errors_of_a_difference_are_given() -> None:
    found = paired_estimates(PairedSample(Outcomes(50, 12, 5, 33)), FAST)["difference"]
    assert found.standard_error == pytest.approx(math.sqrt((17 - 49 / 100) / 100**2))
    assert paired_estimates(PairedSample(Outcomes(5, 0, 0, 3)), FAST)["difference"].low < 0
