"""How compression moves the distribution over the choices, where no verdict flips yet.

The distribution of a document is the softmax of its choices' log-likelihoods, P for the dense model
and Q for the pruned one. Everything is in nats.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from streamline_bench.errors import NumericsError, SamplesError
from streamline_bench.stability.comparison import Calibration, ChoiceShift
from streamline_bench.stability.statistics.intervals import mean_estimate

MAX_BINS = 15
MIN_PER_BIN = 20
"""Fewer documents in a bin and the error measures their noise: even a perfectly calibrated model
shows about 0.4 / sqrt(documents in a bin)."""

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
RowIndex = npt.NDArray[np.intp]


def choice_counts(frame: pd.DataFrame) -> IntArray:
    """Number of choices per row, int64 [rows]; 0 for generated and rolling text."""
    sizes = [len(value) if isinstance(value, list) else 0 for value in frame["choices"].tolist()]
    return np.array(sizes, dtype=np.int64)


def rows_by_count(counts: IntArray) -> Iterator[tuple[int, RowIndex]]:
    """Yield each number of choices above one, with its rows."""
    for k in np.unique(counts[counts > 1]):
        yield int(k), np.flatnonzero(counts == k)


def choice_matrix(frame: pd.DataFrame, column: str, rows: RowIndex, k: int) -> FloatArray:
    """Values of ``column`` for ``rows``, float64 [rows, k].

    Raises:
        SamplesError: a row has not one value for each of its k choices.
    """
    values = frame[column].to_numpy()
    listed = (values if len(rows) == len(values) else values[rows]).tolist()
    if not _all_of_length(listed, k):
        place = next(i for i, value in enumerate(listed) if not _all_of_length([value], k))
        bad = frame.iloc[int(rows[place])]
        raise SamplesError(
            f"Task '{bad['task']}', document {bad['doc_id']} has no '{column}' for each of its "
            f"{k} choices; choose another quantity."
        )
    flat = np.fromiter(chain.from_iterable(listed), dtype=np.float64, count=k * len(listed))
    return flat.reshape(-1, k)


def _all_of_length(listed: list[Any], k: int) -> bool:
    try:
        return set(map(len, listed)) <= {k}
    except TypeError:  # None, or NaN for None
        return False


def scores(frame: pd.DataFrame, rows: RowIndex, k: int) -> FloatArray:
    """Log-likelihoods of the choices in nats, float64 [rows, k].

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
    return found


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
        names = [field.name for field in fields(cls)]
        return cls(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))


def measure_choices(dense: pd.DataFrame, pruned: pd.DataFrame) -> ChoiceMeasures | None:
    """Measure aligned rows; None if no row has two choices.

    Raises:
        NumericsError: a log-likelihood is NaN or infinite; run, task and document are named.
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
        first, second = _log_shares(scores(dense, rows, k)), _log_shares(scores(pruned, rows, k))
        found.kl[rows], found.js[rows] = divergences(first, second)
        known = (gold[rows] >= 0) & (gold[rows] < k)  # NaN compares as false
        index, right = rows[known], gold[rows][known].astype(np.int64)
        for side, shares in (("dense", first), ("pruned", second)):
            values = _against_gold(shares[known] if not known.all() else shares, right)
            for name, value in zip(("margin", "brier", "top", "right"), values, strict=True):
                getattr(found, f"{side}_{name}")[index] = value
    return found


def _log_shares(values: FloatArray) -> FloatArray:
    """Log-softmax over the last axis [rows, k]."""
    shifted: FloatArray = values - values.max(axis=1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return shifted


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
    right = shares[row, gold]
    others = shares.copy()
    others[row, gold] = -np.inf
    p = np.exp(shares)
    brier = np.square(p).sum(axis=1) - 2 * p[row, gold] + 1
    chosen = shares.argmax(axis=1)
    hit = (chosen == gold).astype(np.float64)
    return right - others.max(axis=1), np.maximum(brier, 0.0), p[row, chosen], hit


def choice_shift(
    measures: ChoiceMeasures, confidence: float, clusters: IntArray | None = None
) -> ChoiceShift | None:
    """Means over documents with their intervals; None without log-likelihoods.

    Args:
        clusters: int64 [n], which documents belong together; None if all stand alone.
    """
    counted = ~np.isnan(measures.kl)
    if not counted.any():
        return None
    known = ~np.isnan(measures.dense_margin)
    shift = measures.pruned_margin - measures.dense_margin
    return ChoiceShift(
        n=int(counted.sum()),
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
    bins = calibration_bins(n)
    errors = [
        calibration_error(top[known], right[known], bins)
        for top, right in (
            (measures.dense_top, measures.dense_right),
            (measures.pruned_top, measures.pruned_right),
        )
    ]
    shift = measures.pruned_brier - measures.dense_brier
    return Calibration(
        n=n,
        bins=bins,
        dense_error=errors[0],
        pruned_error=errors[1],
        dense_brier=float(measures.dense_brier[known].mean()),
        pruned_brier=float(measures.pruned_brier[known].mean()),
        brier_shift=mean_estimate(shift, confidence, clusters),
    )


def calibration_bins(n: int) -> int:
    """How many bins ``n`` documents are worth."""
    return max(1, min(MAX_BINS, n // MIN_PER_BIN))


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
