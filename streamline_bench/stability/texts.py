"""Texts of two models: generated ones (how many are the same), and perplexities of given ones."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import takewhile
from operator import eq
from statistics import median
from typing import Literal

import numpy as np
import numpy.typing as npt
import pandas as pd

from streamline_bench.errors import NumericsError, SamplesError
from streamline_bench.stability.comparison import (
    Estimate,
    GenerationComparison,
    PerplexityComparison,
    exponential,
    exponentiated,
)
from streamline_bench.stability.statistics.intervals import mean_per_unit
from streamline_bench.stability.statistics.paired import wilson

FloatArray = npt.NDArray[np.float64]
Unit = Literal["word", "byte", "answer"]

# lm-eval logs (log-likelihood, number of units) per document under these names.
_METRICS: dict[Unit, tuple[str, ...]] = {
    "word": ("word_perplexity",),
    "byte": ("byte_perplexity", "bits_per_byte"),
}
_ANSWER = "perplexity"  # one log-likelihood per document


def compare_generations(
    dense: pd.DataFrame, pruned: pd.DataFrame, confidence: float, exact_match: Estimate | None
) -> GenerationComparison | None:
    """Compare aligned rows of one (task, filter); None if some answer is no text.

    Args:
        exact_match: difference of the task's verdict, where it has one.
    """
    texts = list(zip(dense["text"].tolist(), pruned["text"].tolist(), strict=True))
    if not all(isinstance(text, str) for pair in texts for text in pair):
        return None
    n = len(texts)
    words = [(first.split(), second.split()) for first, second in texts]
    same = [first == second for first, second in texts]
    parted = [index for index in range(n) if not same[index]]
    kept = [first_difference(*pair) for pair in words]
    # Without words, texts differ in white space only.
    shares = [
        1.0 if equal or not (longer := max(map(len, pair))) else begin / longer
        for equal, begin, pair in zip(same, kept, words, strict=True)
    ]
    low, high = wilson(sum(same) / n, n, confidence)
    return GenerationComparison(
        task=str(dense.iloc[0]["task"]),
        filter=str(dense.iloc[0]["filter"]),
        n=n,
        identical=Estimate(value=sum(same) / n, low=low, high=high, method="Wilson"),
        first_word=float(median(kept[index] for index in parted)) if parted else None,
        first_character=(
            float(median(first_difference(*texts[index]) for index in parted)) if parted else None
        ),
        shared=sum(shares) / n,
        dense_words=sum(len(first) for first, _ in words) / n,
        pruned_words=sum(len(second) for _, second in words) / n,
        exact_match=exact_match,
    )


def first_difference(first: Sequence[str], second: Sequence[str]) -> int:
    """How many items (words, characters) are shared before the first that differs or is missing."""
    return sum(1 for _ in takewhile(bool, map(eq, first, second)))


def compare_perplexities(
    dense: pd.DataFrame, pruned: pd.DataFrame, confidence: float
) -> list[PerplexityComparison]:
    """Compare aligned rows of one (task, filter): one result per unit that the engine counted.

    Raises:
        SamplesError: only some documents have the numbers.
        NumericsError: a log-likelihood is NaN or infinite; run, task and document are named.
    """
    found = []
    for unit, name in _recorded(dense):
        first, units = _values(dense, name)
        second, _ = _values(pruned, name)
        log = mean_per_unit(first - second, units, confidence)
        found.append(
            PerplexityComparison(
                task=str(dense.iloc[0]["task"]),
                filter=str(dense.iloc[0]["filter"]),
                unit=unit,
                n=len(dense),
                units=float(units.sum()),
                dense=exponential(-float(first.sum() / units.sum())),
                pruned=exponential(-float(second.sum() / units.sum())),
                ratio=exponentiated(log),
                nats_per_unit=log,
            )
        )
    return found


def _recorded(frame: pd.DataFrame) -> Iterator[tuple[Unit, str]]:
    first = frame.iloc[0]["metrics"]
    names = set(first) if isinstance(first, dict) else set()
    for unit, metrics in _METRICS.items():
        known = [name for name in metrics if {f"{name}.0", f"{name}.1"} <= names]
        if known:
            yield unit, known[0]
    if _ANSWER in names:
        yield "answer", _ANSWER


def _values(frame: pd.DataFrame, name: str) -> tuple[FloatArray, FloatArray]:
    """Log-likelihoods and units, float64 [n] each."""
    records = frame["metrics"].tolist()
    keys = [name] if name == _ANSWER else [f"{name}.0", f"{name}.1"]
    for row, record in enumerate(records):
        missing = [key for key in keys if not isinstance(record, dict) or key not in record]
        if missing:
            bad = frame.iloc[row]
            raise SamplesError(
                f"Run '{bad['run']}' has no '{name}' on document {bad['doc_id']} of task "
                f"'{bad['task']}', but on others; evaluate again."
            )
    values = np.array([[record[key] for key in keys] for record in records], dtype=np.float64)
    if not np.isfinite(values).all():
        row = int(np.flatnonzero(~np.isfinite(values).all(axis=1))[0])
        bad = frame.iloc[row]
        raise NumericsError(
            f"Run '{bad['run']}': Task '{bad['task']}', document {bad['doc_id']} has {name} "
            f"{values[row].tolist()}; check the weights and the dtype of the model."
        )
    units = np.ones(len(values)) if name == _ANSWER else values[:, 1]
    return values[:, 0], units
