"""Generated texts of two models: how many are the same, and where the others part."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from operator import eq
from statistics import median

import pandas as pd

from streamline_bench.stability.comparison import Estimate, GenerationComparison
from streamline_bench.stability.statistics.paired import wilson

__all__ = ["compare_generations", "first_difference"]


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
    low, high = wilson(sum(same), n, confidence)
    return GenerationComparison(
        task=str(dense.iloc[0]["task"]),
        filter=str(dense.iloc[0]["filter"]),
        n=n,
        identical=Estimate(value=sum(same) / n, low=low, high=high, method="Wilson"),
        first_word=float(median(kept[index] for index in parted)) if parted else None,
        first_character=(
            float(median(first_difference(*texts[index]) for index in parted)) if parted else None
        ),
        shared=sum(1.0 if same[index] else _share(kept[index], words[index]) for index in range(n))
        / n,
        dense_words=sum(len(first) for first, _ in words) / n,
        pruned_words=sum(len(second) for _, second in words) / n,
        exact_match=exact_match,
    )


def first_difference(first: Sequence[str], second: Sequence[str]) -> int:
    """How many items (words, characters) are shared before the first that differs or is missing."""
    return sum(1 for _ in takewhile(bool, map(eq, first, second)))


def _share(kept: int, pair: tuple[Sequence[str], Sequence[str]]) -> float:
    longer = max(len(words) for words in pair)
    return kept / longer if longer else 1.0  # texts that differ in white space only
