"""What guessing gets, and what a model has beyond it.

Two baselines need no model: chance, the mean of 1 / number of choices, and the majority class, the
most frequent right answer given to every question. A model that says "no" to everything has the
accuracy of the second, and agrees with any other that does.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd

from streamline_bench.stability.estimate import Estimate
from streamline_bench.stability.statistics import BoolArray, FloatArray
from streamline_bench.stability.statistics.intervals import t_quantile
from streamline_bench.stability.statistics.paired import PairedSample

Answers = npt.NDArray[Any]
"""Indices of choices, or texts, [n]."""


class Frequent(NamedTuple):
    """An answer, and the share of questions that it was given to, or is the right one of."""

    answer: str
    share: float


def chosen(frame: pd.DataFrame, verdict: str) -> pd.Series | None:
    """What was chosen (its index) or written; None where the engine does not say.

    Args:
        verdict: the metric that judges the task.
    """
    by_norm = verdict == "acc_norm"
    for column in ("text", "prediction_norm" if by_norm else "prediction"):
        if frame[column].notna().all():
            return frame[column]
    return None


def most_given(frame: pd.DataFrame, verdict: str) -> Frequent | None:
    """The answer that a model gives most often, by its text, and to what share of the questions.

    Where every question has choices of its own, no answer can be given to two. None where the
    engine does not say what was chosen.
    """
    answers = chosen(frame, verdict)
    if answers is None:
        return None
    given = zip(answers.tolist(), frame["choices"].tolist(), strict=True)
    texts = [
        str(answer) if listed is None or isinstance(answer, str) else listed[answer]
        for answer, listed in given
    ]
    return _most_frequent(texts, len(texts))


def right_answers(frame: pd.DataFrame) -> list[str] | None:
    """The right answers by their text; None where a question has not exactly one that is known."""
    choices = frame["choices"].tolist()
    if all(each is None for each in choices):
        return [str(target) for target in frame["target"]]
    if frame["gold"].isna().any() or any(each is None for each in choices):
        return None
    return [each[int(gold)] for each, gold in zip(choices, frame["gold"], strict=True)]


def constant_answer(frame: pd.DataFrame) -> Frequent | None:
    """The majority-class baseline: the most frequent right answer, and its score if always given.

    Only an answer that every question offers can be always given; without choices, any can. None
    where there is none, and where the right answers are not known.
    """
    right = right_answers(frame)
    if right is None:
        return None
    offered = [set(each) for each in frame["choices"].tolist() if each is not None]
    everywhere = set.intersection(*offered) if offered else set(right)
    return _most_frequent([answer for answer in right if answer in everywhere], len(right))


def _most_frequent(answers: Sequence[str], n: int) -> Frequent | None:
    if not answers:
        return None
    answer, count = max(Counter(answers).items(), key=lambda item: (item[1], item[0]))
    return Frequent(answer, count / n)


def always(frame: pd.DataFrame, answer: str) -> BoolArray:
    """The verdicts of a model that gives this answer to every question, bool [n]."""
    return np.array([right == answer for right in right_answers(frame) or ()], dtype=np.bool_)


def answer_kappa(first: Answers, second: Answers) -> float | None:
    """Cohen's kappa of the answers of two models, by their places among the choices.

    Agreement beyond what both models' habits give: two that say "no" to everything agree fully,
    and have none (J. Cohen, Educational and Psychological Measurement 20 (1960) 37-46).

    Returns:
        None where both give one answer to all questions, the same.
    """
    codes, names = pd.factorize(np.concatenate([first, second]))
    one, two = np.split(codes, 2)
    shares = [np.bincount(each, minlength=len(names)) / len(one) for each in (one, two)]
    chance = float(shares[0] @ shares[1])
    return None if chance == 1.0 else float(((one == two).mean() - chance) / (1 - chance))


def retention_above_chance(
    samples: Sequence[PairedSample], chances: Sequence[float], confidence: float
) -> Estimate | None:
    """What is left of the way from guessing to all right: mean over tasks of both models' ways.

    The way is (accuracy - chance) / (1 - chance). The interval is Fieller's for the ratio of two
    paired means (E. C. Fieller, Journal of the Royal Statistical Society B 16 (1954) 175-185), with
    the variances of the verdicts, cluster-robust where there are clusters; half a flip is added to
    that of their difference, as in the test of the difference. Degrees of freedom: of the tasks
    with clusters, the fewest.

    Args:
        chances: of each task, below 1.

    Returns:
        None where the dense model cannot be told from guessing at this confidence: then the ratio
        has no bounds.
    """
    means, spread = np.zeros(2), np.zeros((2, 2))
    for sample, chance in zip(samples, chances, strict=True):
        weight = 1 / (1 - chance) / len(samples)
        outcomes = sample.outcomes
        means += weight * (np.array([outcomes.pruned_accuracy, outcomes.dense_accuracy]) - chance)
        spread += weight**2 * _covariance(sample)
    freedom = min(sample.design(dense=-1.0, pruned=1.0).freedom for sample in samples)
    outer = np.outer(means, means) - t_quantile(confidence, freedom) ** 2 * spread
    c, b, a = outer[0, 0], outer[0, 1], outer[1, 1]
    if means[1] <= 0 or a <= 0:
        return None
    root = math.sqrt(max(0.0, b * b - a * c))
    low, high = float((b - root) / a), float((b + root) / a)
    return Estimate(value=float(means[0] / means[1]), low=low, high=high, method="Fieller")


def _covariance(sample: PairedSample) -> FloatArray:
    """Of the accuracies of the pruned and of the dense model, [2, 2]."""
    outcomes, n = sample.outcomes, sample.outcomes.n
    p, d = outcomes.pruned_accuracy, outcomes.dense_accuracy
    pruned = sample.design(pruned=1.0).effect * p * (1 - p) / n
    dense = sample.design(dense=1.0).effect * d * (1 - d) / n
    apart = (outcomes.flips + 0.5) / (n + 1) - outcomes.difference**2
    change = sample.design(dense=-1.0, pruned=1.0).effect * max(0.0, apart) / n
    both = (pruned + dense - change) / 2
    return np.array([[pruned, both], [both, dense]])
