"""How compression moves the distribution over the choices, where no verdict flips yet.

The distribution of a document is the softmax of its choices' log-likelihoods, P for the dense model
and Q for the pruned one. Everything is in nats.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields
from itertools import chain

import numpy as np
import pandas as pd

from streamline_bench.errors import NumericsError, SamplesError
from streamline_bench.stability.comparison import Calibration, ChoiceShift
from streamline_bench.stability.statistics import FloatArray, IntArray
from streamline_bench.stability.statistics.intervals import mean_estimate

MAX_BINS = 15
MIN_PER_BIN = 20
"""Fewer documents in a bin and the error measures their noise: even a perfectly calibrated model
shows about 0.4 / sqrt(documents in a bin)."""


def choice_counts(frame: pd.DataFrame) -> IntArray:
    """Number of choices per row, int64 [rows]; 0 for generated and rolling text."""
    sizes = [len(value) if isinstance(value, list) else 0 for value in frame["choices"].tolist()]
    return np.array(sizes, dtype=np.int64)


def rows_by_count(counts: IntArray) -> Iterator[tuple[int, IntArray]]:
    """Yield each number of choices above one, with the rows that have it."""
    for k in np.unique(counts[counts > 1]):
        yield int(k), np.flatnonzero(counts == k)


def choice_matrix(frame: pd.DataFrame, column: str, rows: IntArray, k: int) -> FloatArray:
    """Values of ``column`` for ``rows``, float64 [rows, k]; k is at least 2.

    Raises:
        SamplesError: a row has not one value for each of its k choices.
    """
    listed = frame[column].to_numpy()[rows].tolist()
    try:
        complete = set(map(len, listed)) <= {k}
    except TypeError:  # None, or NaN for None
        complete = False
    if not complete:
        place = next(i for i, value in enumerate(listed) if np.size(value) != k)
        bad = frame.iloc[int(rows[place])]
        raise SamplesError(
            f"Task '{bad['task']}', document {bad['doc_id']} has no '{column}' for each of its "
            f"{k} choices; choose another quantity (--quantity)."
        )
    flat = np.fromiter(chain.from_iterable(listed), dtype=np.float64, count=k * len(listed))
    return flat.reshape(-1, k)


def _log_shares(frame: pd.DataFrame, rows: IntArray, k: int) -> FloatArray:
    """Log-softmax of the choices' log-likelihoods, float64 [rows, k].

    Raises:
        SamplesError: a row has not one for each of its k choices.
        NumericsError: one is NaN or infinite; run, task and document are named.
    """
    found = choice_matrix(frame, "loglikelihoods", rows, k)
    finite = np.isfinite(found)
    if not finite.all():
        row, choice = (int(axis[0]) for axis in np.nonzero(~finite))
        bad = frame.iloc[int(rows[row])]
        raise NumericsError(
            f"Run '{bad['run']}': Task '{bad['task']}', document {bad['doc_id']}, choice {choice} "
            f"has log-likelihood {found[row, choice]}; check the weights and the dtype of the "
            "model."
        )
    shifted: FloatArray = found - found.max(axis=1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return shifted


@dataclass(frozen=True)
class ChoiceMeasures:
    """Measures per document, each [n]; NaN where a document has fewer than two choices.

    Attributes:
        chance: 1 / number of choices; the only one where the engine gives no log-likelihoods.
        kl, js: KL(P || Q), Jensen-Shannon divergence.
        dense_margin, pruned_margin: right choice minus best other; NaN without one right choice, as
            are all that follow.
        dense_brier, pruned_brier: sum over choices of (share - [right])^2.
        dense_top, pruned_top: share of the chosen.
        dense_right, pruned_right: 1 where the chosen is the right one, else 0.
    """

    chance: FloatArray
    kl: FloatArray
    js: FloatArray
    dense_margin: FloatArray
    pruned_margin: FloatArray
    dense_brier: FloatArray
    pruned_brier: FloatArray
    dense_top: FloatArray
    pruned_top: FloatArray
    dense_right: FloatArray
    pruned_right: FloatArray

    @classmethod
    def joined(cls, parts: list[ChoiceMeasures]) -> ChoiceMeasures:
        """The documents of all parts, in their order."""
        columns = ([getattr(part, field.name) for part in parts] for field in fields(cls))
        return cls(*map(np.concatenate, columns))


def measure_choices(dense: pd.DataFrame, pruned: pd.DataFrame) -> ChoiceMeasures | None:
    """Measure aligned rows; None if no row has two choices.

    Raises:
        SamplesError, NumericsError: some log-likelihoods are missing or not finite.
    """
    counts = choice_counts(dense)
    if not (counts > 1).any():
        return None
    found = ChoiceMeasures(*(np.full(len(dense), np.nan) for _ in fields(ChoiceMeasures)))
    gold = dense["gold"].to_numpy(dtype=np.float64, na_value=np.nan)
    scored = not (dense["loglikelihoods"].isna().all() or pruned["loglikelihoods"].isna().all())
    for k, rows in rows_by_count(counts):
        found.chance[rows] = 1 / k
        if not scored:
            continue
        first, second = _log_shares(dense, rows, k), _log_shares(pruned, rows, k)
        found.kl[rows], found.js[rows] = divergences(first, second)
        known = (gold[rows] >= 0) & (gold[rows] < k)  # NaN compares as false
        index, right = rows[known], gold[rows][known].astype(np.int64)
        for side, shares in (("dense", first), ("pruned", second)):
            values = _against_gold(shares[known] if not known.all() else shares, right)
            for name, value in zip(("margin", "brier", "top", "right"), values, strict=True):
                getattr(found, f"{side}_{name}")[index] = value
    return found


def divergences(first: FloatArray, second: FloatArray) -> tuple[FloatArray, FloatArray]:
    """KL(P || Q) and Jensen-Shannon divergence of log-shares [rows, k], in nats, [rows] each."""
    p, q = np.exp(first), np.exp(second)
    middle = np.log((p + q) / 2, where=p + q > 0, out=np.zeros_like(p))
    kl = (p * (first - second)).sum(axis=1)
    js = ((p * (first - middle)).sum(axis=1) + (q * (second - middle)).sum(axis=1)) / 2
    # Rounding must not make equal distributions nearer than equal.
    return np.maximum(kl, 0.0), np.clip(js, 0.0, math.log(2))


def _against_gold(shares: FloatArray, gold: IntArray) -> tuple[FloatArray, ...]:
    """Margin, Brier score, share of the chosen, and whether it is right; [rows] each."""
    row = np.arange(len(gold))
    others, p, chosen = shares.copy(), np.exp(shares), shares.argmax(axis=1)
    others[row, gold] = -np.inf
    margin = shares[row, gold] - others.max(axis=1)
    brier = np.square(p).sum(axis=1) - 2 * p[row, gold] + 1
    return margin, np.maximum(brier, 0.0), p[row, chosen], (chosen == gold).astype(np.float64)


def choice_shift(
    measures: ChoiceMeasures, confidence: float, clusters: IntArray | None = None
) -> ChoiceShift | None:
    """Means over documents with their intervals; None without log-likelihoods.

    Args:
        clusters: int64 [n], which documents belong together; None if all stand alone.
    """
    n = int((~np.isnan(measures.kl)).sum())
    if n == 0:
        return None
    known = ~np.isnan(measures.dense_margin)
    shift = measures.pruned_margin - measures.dense_margin
    return ChoiceShift(
        n=n,
        kl=mean_estimate(measures.kl, confidence, clusters, floor=0.0),
        js=mean_estimate(measures.js, confidence, clusters, floor=0.0),
        margin_n=int(known.sum()),
        dense_margin=float(measures.dense_margin[known].mean()) if known.any() else None,
        pruned_margin=float(measures.pruned_margin[known].mean()) if known.any() else None,
        margin_shift=mean_estimate(shift, confidence, clusters) if known.any() else None,
    )


def calibration(
    measures: ChoiceMeasures, confidence: float, clusters: IntArray | None = None
) -> Calibration | None:
    """Calibration of both models; None if no document has a known right choice."""
    known = ~np.isnan(measures.dense_brier)
    if not known.any():
        return None
    n = int(known.sum())
    bins = max(1, min(MAX_BINS, n // MIN_PER_BIN))
    m = measures
    return Calibration(
        n=n,
        bins=bins,
        dense_error=calibration_error(m.dense_top[known], m.dense_right[known], bins),
        pruned_error=calibration_error(m.pruned_top[known], m.pruned_right[known], bins),
        dense_brier=float(m.dense_brier[known].mean()),
        pruned_brier=float(m.pruned_brier[known].mean()),
        brier_shift=mean_estimate(m.pruned_brier - m.dense_brier, confidence, clusters),
    )


def calibration_error(shares: FloatArray, right: FloatArray, bins: int) -> float:
    """Mean over bins, weighted by documents, of |share right - mean share|.

    Bins hold equal numbers of documents (to within one), in the order of their shares (Nixon et
    al. 2019, arXiv:1904.01685, call it adaptive). Documents of equal share are never parted, or the
    error would depend on the order of documents: all are in the bin of the middle one of them.

    Args:
        shares: float64 [n], share of the chosen.
        right: float64 [n], 1 where the chosen is right.
    """
    n = len(shares)
    _, label, sizes = np.unique(shares, return_inverse=True, return_counts=True)
    middle = np.cumsum(sizes) - (sizes + 1) // 2
    edges = (np.arange(bins) * n) // bins
    bin_of = np.searchsorted(edges, middle, side="right")[label]
    return float(np.abs(np.bincount(bin_of, weights=right - shares)).sum() / n)
