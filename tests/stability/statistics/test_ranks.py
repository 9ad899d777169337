"""Ranks of models on the same documents, against a bootstrap by loops."""

from __future__ import annotations

import math

import numpy as np

from streamline_bench.stability.statistics.ranks import bootstrap_means, bootstrap_ranks, on_front

OPTIONS = {"draws": 2000, "confidence": 0.9}


def ranks(tasks: list, models: int, **more: object):
    generator = np.random.default_rng(0)
    return bootstrap_ranks(tasks, np.zeros(models), generator=generator, **OPTIONS, **more)


def by_loops(tasks: list[np.ndarray], draws: int) -> np.ndarray:
    """Share of the draws in which each model is first, resampling documents one by one."""
    generator, first = np.random.default_rng(1), np.zeros(len(tasks[0]))
    for _ in range(draws):
        means = np.zeros(len(first))
        for scores in tasks:
            drawn = generator.integers(scores.shape[1], size=scores.shape[1])
            means += scores[:, drawn].mean(axis=1)
        first += means.round(12) == means.round(12).max()
    return first / draws


def test_ranks_are_those_of_resampled_documents() -> None:
    source = np.random.default_rng(3)
    tasks = [
        (source.random((4, n)) < np.array([[0.8], [0.75], [0.72], [0.4]])).astype(float)
        for n in (60, 90)
    ]
    found = ranks([(scores, None) for scores in tasks], 4)
    expected = by_loops(tasks, 2000)
    assert np.abs(found.first - expected).max() < 0.05
    assert (found.low[3], found.high[3]) == (4, 4), "far behind"
    assert found.low.min() == 1 and (found.low <= found.high).all()


def test_equal_answers_share_their_places() -> None:
    scores = np.array([[1.0, 0, 1, 0, 1, 1], [1.0, 0, 1, 0, 1, 1]])
    found = ranks([(scores, None)], 2)
    assert found.low.tolist() == [1, 1] and found.high.tolist() == [2, 2]
    assert found.first.tolist() == [1.0, 1.0]


def test_pairing_removes_what_all_find_hard() -> None:
    """One always has one more right: its place is sure, however much the documents vary."""
    source = np.random.default_rng(2)
    worse = (source.random(200) < 0.5).astype(float)
    better = np.maximum(worse, (np.arange(200) % 7 == 0).astype(float))
    found = ranks([(np.array([worse, better]), None)], 2)
    assert (found.low[1], found.high[1]) == (1, 1)


def test_clusters_and_errors_of_seeds_widen_the_ranks() -> None:
    source = np.random.default_rng(4)
    cluster = source.random((2, 8)) < np.array([[0.75], [0.45]])
    scores = np.repeat(cluster, 25, axis=1).astype(float)
    alone = ranks([(scores, None)], 2)
    together = ranks([(scores, np.repeat(np.arange(8), 25))], 2)
    assert min(together.first) > min(alone.first)
    generator = np.random.default_rng(0)
    unsure = bootstrap_ranks([(scores, None)], np.array([0.5, 0.5]), generator=generator, **OPTIONS)
    assert (unsure.low == 1).all() and (unsure.high == 2).all()


def test_the_front_is_that_of_pairs() -> None:
    draw = np.random.default_rng(5)
    costs, means = draw.integers(0, 4, (300, 5)), draw.integers(0, 4, (300, 5))
    found = on_front(costs.astype(float), means.astype(float))
    for cost, mean, front in zip(costs, means, found, strict=True):
        for one in range(5):
            beaten = any(
                cost[other] <= cost[one] and mean[other] >= mean[one]
                and (cost[other], mean[other]) != (cost[one], mean[one])
                for other in range(5)
            )  # fmt: skip
            assert front[one] == (not beaten)


def test_the_share_on_a_known_front() -> None:
    """Two models, the dearer one right on a documents more and b fewer: an exact share.

    It is on the front where a resample of n documents holds more of the a than of the b.
    """
    n, a, b = 60, 7, 4
    dearer, cheaper = np.zeros(n), np.zeros(n)
    dearer[:a], cheaper[a : a + b] = 1, 1
    worst = np.full(n, -1.0)  # dearest and worst: never
    means = bootstrap_means(
        [(np.array([cheaper, dearer, worst]), None)], np.zeros(3), draws=20_000,
        generator=np.random.default_rng(0),
    )  # fmt: skip
    shares = on_front(np.array([[1.0, 2.0, 3.0]]).repeat(20_000, 0), means).mean(axis=0)
    exact = 0.0
    for more in range(n + 1):
        for less in range(min(more, n - more + 1)):
            ways = math.factorial(n) / (
                math.factorial(more) * math.factorial(less) * math.factorial(n - more - less)
            )
            exact += (
                ways * (a / n) ** more * (b / n) ** less * (1 - (a + b) / n) ** (n - more - less)
            )
    assert shares[0] == 1.0 and shares[2] == 0.0
    assert abs(shares[1] - exact) < 4 * math.sqrt(exact * (1 - exact) / 20_000)
