"""Generated texts, dense against pruned: how alike, how long, and whether they degenerate."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from itertools import takewhile
from operator import eq
from statistics import median
from typing import Any

import numpy as np
import pandas as pd

from streamline_bench.stability.estimate import Estimate
from streamline_bench.stability.settings import Settings
from streamline_bench.stability.statistics import FloatArray
from streamline_bench.stability.statistics.clusters import ClusterLabels, cluster_labels
from streamline_bench.stability.statistics.grades import PairedGrades, mean_ratio, ratio_of_ratios
from streamline_bench.stability.statistics.paired import wilson_estimate
from streamline_bench.stability.statistics.score import PairedDifference
from streamline_bench.stability.task_comparison import paired_sample
from streamline_bench.stability.texts import GenerationComparison, LengthChange, TextChange

Names = tuple[str, str]
"""Task and filter."""


def compare_generations(
    dense: pd.DataFrame, pruned: pd.DataFrame, settings: Settings, exact_match: Estimate | None
) -> GenerationComparison | None:
    """Compare aligned rows of one (task, filter); None if some answer is no text.

    Args:
        exact_match: difference of the task's verdict, where it has one.
    """
    texts = list(zip(_written(dense), _written(pruned), strict=True))
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
    return GenerationComparison(
        task=str(dense.iloc[0]["task"]),
        filter=str(dense.iloc[0]["filter"]),
        n=n,
        identical=wilson_estimate(sum(same) / n, n, settings.confidence),
        first_word=float(median(kept[index] for index in parted)) if parted else None,
        first_character=(
            float(median(first_difference(*texts[index]) for index in parted)) if parted else None
        ),
        shared=sum(shares) / n,
        dense_words=sum(len(first) for first, _ in words) / n,
        pruned_words=sum(len(second) for _, second in words) / n,
        exact_match=exact_match,
        **_text_changes(dense, words, settings),
        **_token_changes(dense, pruned, settings),
    )


def _written(frame: pd.DataFrame) -> list[Any]:
    """What the model wrote, before a filter took an answer out of it."""
    return [
        answer if isinstance(answer, str) else text
        for answer, text in zip(frame["answer"], frame["text"], strict=True)
    ]


def _text_changes(
    dense: pd.DataFrame, words: Sequence[tuple[list[str], list[str]]], settings: Settings
) -> dict[str, Any]:
    """Lengths and degeneration, as the fields of a generation."""
    names, clusters = _names(dense), cluster_labels(dense["cluster"])
    lengths, empty, repeated = (
        np.array([[float(measure(text)) for text in pair] for pair in words])
        for measure in (len, operator.not_, repetition)
    )
    options = clusters, settings
    return {
        "length_ratio": mean_ratio(lengths[:, 0], lengths[:, 1], *options, (*names, "words")),
        "empty": _change(empty[:, 0], empty[:, 1], *options, (*names, "empty"), verdicts=True),
        "repetition": _change(
            repeated[:, 0], repeated[:, 1], *options, (*names, "repetition"), verdicts=False
        ),
    }


def _token_changes(dense: pd.DataFrame, pruned: pd.DataFrame, settings: Settings) -> dict[str, Any]:
    """What the numbers of tokens say, as the fields of a generation; nothing where they lack."""
    columns = [
        frame[["tokens", "thinking", "unfinished"]].to_numpy(dtype=np.float64, na_value=np.nan)
        for frame in (dense, pruned)
    ]
    if any(np.isnan(values).any() for values in columns):
        return {}
    names, clusters = _names(dense), cluster_labels(dense["cluster"])
    (tokens, thinking, endless), (tokens_now, thinking_now, endless_now) = (
        values.T for values in columns
    )
    options = clusters, settings
    verdicts = bool(np.isin([endless, endless_now], (0.0, 1.0)).all())
    found: dict[str, Any] = {
        "tokens": _length(tokens, tokens_now, *options, (*names, "tokens")),
        "unfinished": _change(
            endless, endless_now, *options, (*names, "unfinished"), verdicts=verdicts
        ),
    }
    if thinking.any() or thinking_now.any():
        found["thinking"] = _length(thinking, thinking_now, *options, (*names, "thinking"))
    if dense["correct"].notna().all() and pruned["correct"].notna().all():
        right, right_now = (
            frame["correct"].to_numpy(dtype=np.float64) for frame in (dense, pruned)
        )
        found["tokens_per_solved"] = LengthChange(
            dense=_quotient(tokens, right),
            pruned=_quotient(tokens_now, right_now),
            ratio=ratio_of_ratios(
                (tokens, right), (tokens_now, right_now), *options, (*names, "solved")
            ),
        )
    return found


def _names(dense: pd.DataFrame) -> Names:
    first = dense.iloc[0]
    return str(first["task"]), str(first["filter"])


def _quotient(above: FloatArray, below: FloatArray) -> float | None:
    return float(above.sum() / below.sum()) if below.sum() > 0 else None


def _length(
    dense: FloatArray,
    pruned: FloatArray,
    clusters: ClusterLabels | None,
    settings: Settings,
    names: Sequence[str],
) -> LengthChange:
    ratio = mean_ratio(dense, pruned, clusters, settings, names)
    return LengthChange(dense=float(dense.mean()), pruned=float(pruned.mean()), ratio=ratio)


def _change(
    dense: FloatArray,
    pruned: FloatArray,
    clusters: ClusterLabels | None,
    settings: Settings,
    names: tuple[str, ...],
    *,
    verdicts: bool,
) -> TextChange:
    """A share between 0 and 1 of each document, float64 [n]; ``verdicts``: all are 0 or 1."""
    if verdicts:
        sample = paired_sample(dense.astype(np.bool_), pruned.astype(np.bool_), clusters)
        difference = PairedDifference((sample,)).interval(settings.confidence)
    else:
        moved = PairedGrades.of(
            pruned - dense, clusters, names, draws=settings.draws, seed=settings.seed
        )
        difference = moved.interval(settings.confidence)
    return TextChange(dense=float(dense.mean()), pruned=float(pruned.mean()), difference=difference)


def repetition(words: Sequence[str]) -> float:
    """Share of the runs of four words that stand in the text before."""
    runs = [tuple(words[begin : begin + 4]) for begin in range(len(words) - 3)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def first_difference(first: Sequence[str], second: Sequence[str]) -> int:
    """How many items (words, characters) are shared before the first that differs or is missing."""
    return sum(1 for _ in takewhile(bool, map(eq, first, second)))
