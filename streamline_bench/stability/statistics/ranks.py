"""Ranks of several models that answered the same documents, with intervals.

The bootstrap is paired: a draw takes the same documents for every model, within each task, and
clusters stay together. What all models find hard or easy then leaves their order alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from streamline_bench.stability.statistics import BoolArray, FloatArray, IntArray
from streamline_bench.stability.statistics.intervals import resamples


class Ranks(NamedTuple):
    """Place of every model, 1 is the best.

    Attributes:
        low, high: int64 [models]: the interval of its place.
        first: float64 [models]: share of the draws in which none is better.
    """

    low: IntArray
    high: IntArray
    first: FloatArray


def bootstrap_ranks(
    tasks: Sequence[tuple[FloatArray, IntArray | None]],
    errors: FloatArray,
    *,
    draws: int,
    confidence: float,
    generator: np.random.Generator,
) -> Ranks:
    """Rank models by their mean over tasks in every draw.

    Models that tie in a draw share their places: the better one counts for the lower end of an
    interval, the worse one for its upper end.

    Args:
        tasks: scores float64 [models, n], and clusters int64 [n] (None: documents stand alone).
        errors: float64 [models], standard error that a model's mean has besides that of documents
            (of its seeds); 0 for none.
    """
    means = bootstrap_means(tasks, errors, draws=draws, generator=generator)
    better = np.array([(means > means[:, [one]]).sum(axis=1) for one in range(len(errors))])
    equal = np.array([(means == means[:, [one]]).sum(axis=1) for one in range(len(errors))])
    tail = (1 - confidence) / 2
    low = np.quantile(better + 1, tail, axis=1, method="lower")
    high = np.quantile(better + equal, 1 - tail, axis=1, method="higher")
    return Ranks(low.astype(np.int64), high.astype(np.int64), (better == 0).mean(axis=1))


def bootstrap_means(
    tasks: Sequence[tuple[FloatArray, IntArray | None]],
    errors: FloatArray,
    *,
    draws: int,
    generator: np.random.Generator,
) -> FloatArray:
    """Return the mean over tasks of every model in every draw, float64 [draws, models].

    Args:
        tasks, errors: as of :func:`bootstrap_ranks`.
    """
    means: FloatArray = np.zeros((draws, len(errors)))
    for scores, clusters in tasks:
        means += _drawn(scores, clusters, draws, generator) / len(tasks)
    means += errors * generator.standard_normal(means.shape)
    rounded: FloatArray = means.round(12)  # equal answers must tie
    return rounded


def on_front(costs: FloatArray, means: FloatArray) -> BoolArray:
    """Return in which draws a model is on the Pareto front, bool [draws, models].

    It is where no other is at least as cheap and at least as good, and better in one of both.

    Args:
        costs: float64 [draws, models]; less is better.
        means: float64 [draws, models]; more is better.
    """
    found = np.ones(means.shape, dtype=np.bool_)
    for one in range(means.shape[1]):
        cost, mean = costs[:, [one]], means[:, [one]]
        no_worse = (costs <= cost) & (means >= mean)
        found[:, one] = ~(no_worse & ((costs < cost) | (means > mean))).any(axis=1)
    return found


def _drawn(
    scores: FloatArray, clusters: IntArray | None, draws: int, generator: np.random.Generator
) -> FloatArray:
    """Means of resampled documents, float64 [draws, models]."""
    sizes = np.ones(scores.shape[1])
    if clusters is not None:
        sizes = np.bincount(clusters).astype(np.float64)
        scores = np.array([np.bincount(clusters, weights=row) for row in scores])
    # Documents that every model answers alike are drawn together.
    table, counts = np.unique(np.vstack([scores, sizes]), axis=1, return_counts=True)
    found = [
        drawn @ table[:-1].T / (drawn @ table[-1])[:, None]
        for drawn in resamples(counts.astype(np.int64), draws, generator)
    ]
    return np.concatenate(found)
