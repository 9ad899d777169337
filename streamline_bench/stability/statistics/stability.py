"""Stability: which answers survive compression, weighted by how sure the dense model was.

LLM-Streamline (arXiv:2403.19135), equations 5 and 6. For question i with k choices, PPL_ij is the
perplexity that the *dense* model gives to choice j, std_i its standard deviation over the choices::

    Stability = sum_i e^{std_i} [both right or both wrong] / sum_i e^{std_i}

Agreement is of verdicts, not of choices: a wrong answer that becomes another wrong answer agrees.
A question on which the dense model separates the choices clearly weighs more than a close call.
"""

from __future__ import annotations

from typing import get_args

import numpy as np
import pandas as pd

from streamline_bench.errors import NumericsError, SamplesError
from streamline_bench.stability.estimate import Estimate
from streamline_bench.stability.settings import Mode, Quantity, Settings
from streamline_bench.stability.statistics import BoolArray, FloatArray, IntArray
from streamline_bench.stability.statistics.choices import (
    choice_counts,
    choice_matrix,
    rows_by_count,
)
from streamline_bench.stability.statistics.clusters import ClusterLabels
from streamline_bench.stability.statistics.intervals import (
    bootstrap_interval,
    ratio_draws,
    resamples,
    task_generator,
)
from streamline_bench.stability.statistics.paired import wilson

MAX_CELLS = 128
"""Above this many distinct pairs of spread and verdict, the bootstrap groups spreads."""

_LEAST_EXPONENT = -700.0  # weights are at least e^-700 of the largest: e^-745 is 0 in float64


def choice_spread(
    frame: pd.DataFrame, *, quantity: Quantity = "nll_per_byte", ddof: int = 1
) -> FloatArray:
    """Return std_i of equation 5 for each row of a samples table.

    Args:
        frame: rows of the dense model (columns ``loglikelihoods``, ``lengths``, ``byte_lengths``,
            ``mean_nll``).
        quantity: see :data:`Quantity`.
        ddof: 1 divides by k - 1 as the paper does, 0 by k as its script does.

    Returns:
        float64 [rows]. 0 for a question with one choice, NaN for one without (generation).

    Raises:
        SamplesError: the engine did not record what ``quantity`` needs.
        NumericsError: a value is not finite; task and document are named.
    """
    if quantity not in get_args(Quantity):
        raise SamplesError(f"Unknown quantity '{quantity}'; choose from {get_args(Quantity)}.")
    counts = choice_counts(frame)
    spread = np.full(len(frame), np.nan)
    spread[counts == 1] = 0.0
    for k, rows in rows_by_count(counts):
        values = _quantity(frame, rows, k, quantity)
        with np.errstate(invalid="ignore"):  # reported below, with the document
            spread[rows] = np.std(values, axis=1, ddof=ddof)
        if not np.isfinite(spread[rows]).all():
            bad = frame.iloc[rows[int(np.flatnonzero(~np.isfinite(spread[rows]))[0])]]
            raise NumericsError(
                f"Task '{bad['task']}', document {bad['doc_id']}: the spread of {quantity} over "
                "the choices is not finite; check the log-likelihoods of the dense model."
            )
    return spread


def _quantity(frame: pd.DataFrame, rows: IntArray, k: int, name: str) -> FloatArray:
    if name == "mean_token_nll":
        return choice_matrix(frame, "mean_nll", rows, k)
    nll = -choice_matrix(frame, "loglikelihoods", rows, k)
    if name == "nll":
        return nll
    column = "byte_lengths" if name.endswith("_byte") else "lengths"
    # An empty choice is scored too (its delimiter is): it counts as one character.
    mean: FloatArray = nll / np.maximum(choice_matrix(frame, column, rows, k), 1.0)
    with np.errstate(over="ignore"):
        return np.exp(mean) if name.startswith("ppl") else mean


def stability_weights(std: FloatArray) -> FloatArray:
    """Weights e^{std_i} / sum e^{std}, shifted by the maximum so that nothing overflows. [n]

    None is 0: a resample of negligible questions only must still have a ratio.
    """
    shifted: FloatArray = np.exp(np.maximum(std - std.max(), _LEAST_EXPONENT))
    weights: FloatArray = shifted / shifted.sum()
    return weights


def stability(std: FloatArray, agree: BoolArray, *, mode: Mode = "paper") -> float:
    """Stability of equation 6, in [0, 1].

    Args:
        std: float64 [n], spread of the dense model's choices per question (:func:`choice_spread`;
            for ``reference_script`` with ``ddof=0``).
        agree: bool [n], whether both models are right or both are wrong.
        mode: see :data:`Mode`.

    Raises:
        SamplesError: there is no question, or the lengths differ.
        NumericsError: a spread is not finite, or ``reference_script`` overflows as the original.
    """
    std, agree = np.asarray(std, dtype=np.float64), np.asarray(agree, dtype=np.bool_)
    if std.size == 0 or std.shape != agree.shape:
        raise SamplesError(
            f"Stability needs one spread per verdict and at least one question; got {std.shape} "
            f"spreads and {agree.shape} verdicts."
        )
    if not np.isfinite(std).all():
        index = int(np.flatnonzero(~np.isfinite(std))[0])
        raise NumericsError(f"The spread of question {index} is {std[index]}; it must be finite.")
    if mode == "paper":  # rounding of the weights must not make 1 to 0.9999999999
        return 1.0 if agree.all() else float(stability_weights(std)[agree].sum())
    with np.errstate(over="ignore", invalid="ignore"):
        weights = np.exp(std)
        # One after the other, as the script adds: pairwise sums differ in the last digit.
        value = float(np.cumsum(weights / weights.sum())[agree.sum() - 1]) if agree.any() else 0.0
    if not np.isfinite(value):
        raise NumericsError(
            f"The reference script's softmax overflows at a spread of {std.max():.4g}; use mode "
            "'paper', or a length-normalised quantity."
        )
    return value


def effective_sample_size(std: FloatArray) -> float:
    """Kish's (sum w)^2 / sum w^2: how many equally weighted questions the weights amount to."""
    weights = stability_weights(np.asarray(std, dtype=np.float64))
    return float(1.0 / np.square(weights).sum())


def stability_estimate(
    std: FloatArray,
    agree: BoolArray,
    settings: Settings,
    *names: str,
    clusters: ClusterLabels | None = None,
) -> Estimate:
    """Stability with its bootstrap interval, seeded by the settings and ``names``.

    Where all pairs agree, or none, a bootstrap would claim certainty: then Wilson's interval at the
    effective sample size (at most the number of clusters). The reference script's value gets none:
    it is not a statistic of the answers but of their order.
    """
    value = stability(std, agree, mode=settings.mode)
    if settings.mode == "reference_script":
        return Estimate(value=value)
    if agree.all() or not agree.any():
        n = effective_sample_size(std)
        if clusters is not None:
            n = min(n, clusters.shown.count)
        low, high = wilson(value, n, settings.confidence)
        return Estimate(value=value, low=low, high=high, method="Wilson at the effective n")
    generator = task_generator(settings.seed, *names)
    units, over = len(std), ""
    if clusters is None:
        draws = stability_draws(std, agree, settings.draws, generator)
    else:
        weights = stability_weights(std)
        sums = clusters.sums(weights * agree, weights)
        draws = ratio_draws(sums[:, 0], sums[:, 1], settings.draws, generator)
        units, over = clusters.shown.count, f" over {clusters.shown.count:,} {clusters.shown.kind}"
    (low, high), method = bootstrap_interval(value, draws, units, settings.confidence)
    method = f"{method}{over}, {settings.draws} draws"
    return Estimate(value=value, low=max(0.0, low), high=min(1.0, high), method=method)


def stability_draws(
    std: FloatArray,
    agree: BoolArray,
    draws: int,
    generator: np.random.Generator,
    *,
    max_cells: int = MAX_CELLS,
) -> FloatArray:
    """Resampled stability (equation 6), float64 [draws].

    Pairs of equal weight and verdict form a cell; a resample is a multinomial draw over the cells.
    With too many, pairs of neighbouring spread (equal steps of std) share a cell and its mean
    weight; that leaves out only the variance of weights inside a cell.

    Args:
        std: float64 [n], spread per question; its weight is e^std, kept with its question.
        agree: bool [n], same verdict.
        max_cells: above this many distinct (spread, verdict) pairs, spreads are grouped.
    """
    sizes, weights, agreeing = _cells(std, agree, max_cells)
    drawn = (counts * weights for counts in resamples(sizes, draws, generator))
    return np.concatenate([each[:, agreeing].sum(axis=1) / each.sum(axis=1) for each in drawn])


def _cells(
    std: FloatArray, agree: BoolArray, max_cells: int
) -> tuple[IntArray, FloatArray, BoolArray]:
    """Sizes, mean weights and verdicts of the cells that the pairs fall into, each [cells]."""
    # A resample of negligible questions only must still have a ratio.
    shifted = np.maximum(std - std.max(), _LEAST_EXPONENT)
    _, label = np.unique(shifted, return_inverse=True)
    if 2 * (int(label.max()) + 1) > max_cells:
        bins = max_cells // 2
        label = np.minimum((shifted / shifted.min() * bins).astype(np.int64), bins - 1)
    cell = 2 * label + agree
    sizes = np.bincount(cell)
    weights = np.bincount(cell, weights=np.exp(shifted))
    used = np.flatnonzero(sizes)
    agreeing: BoolArray = used % 2 == 1
    return sizes[used].astype(np.int64), weights[used] / sizes[used], agreeing
