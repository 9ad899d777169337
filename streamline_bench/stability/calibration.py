"""Expected calibration error over bins of equal numbers of documents."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

__all__ = ["MAX_BINS", "MIN_PER_BIN", "calibration_bins", "calibration_error"]

MAX_BINS = 15
MIN_PER_BIN = 20
"""Fewer documents in a bin and the error measures their noise: even a perfectly calibrated model
shows about 0.4 / sqrt(documents in a bin)."""

FloatArray = npt.NDArray[np.float64]


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
