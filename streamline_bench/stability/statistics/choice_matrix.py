"""Lists per choice (a column of the samples table) as matrices, one per number of choices."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from streamline_bench.errors import NumericsError, SamplesError

__all__ = ["choice_counts", "choice_matrix", "rows_by_count", "scores"]

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
