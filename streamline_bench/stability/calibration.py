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

    Bins hold equal numbers of documents (to within one), in the order of their shares, so that
    no bin is empty (Nixon et al. 2019, arXiv:1904.01685, call it adaptive). Documents of equal
    share keep their order.

    Args:
        shares: float64 [n], share of the chosen.
        right: float64 [n], 1 where the chosen is right.
    """
    order = np.argsort(shares, kind="stable")
    gaps = (right - shares)[order]
    edges = (np.arange(bins) * len(gaps)) // bins
    return float(np.abs(np.add.reduceat(gaps, edges)).sum() / len(gaps))
